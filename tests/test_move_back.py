"""Memory that runs out on one rank in the first steps of a new configuration: the job moves back in place."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from copus.backends.megatron import groups
from copus.backends.megatron.backend import MegatronBackend
from copus.checkpoints.trainer_state import TrainerState
from copus.collectives import MidCollectiveError, no_agreement
from copus.events import DecisionMade, Event, Failure, Reconfigure, Step
from copus.loop import Trainer
from copus.oom_recovery import Trial, World
from profiles.configuration import Configuration
from profiles.layout import Layout
from tests.eager_planner import EagerPlanner, decide_often
from tests.megatron_jobs import backend_of, configuration, random_batches, tiny_job
from tests.ranks import run_ranks

NO_ROOM = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
SAMPLES = 64


class Case(NamedTuple):
    """What is moved to, and which rank then runs out of memory, where, and with which error."""

    before: dict[str, Any]
    after: Configuration
    place: str
    victim: int
    error: Exception


TWO_RANKS = [
    Case({"tp": 2}, configuration(4, 1, dp=2), "forward", 1, torch.OutOfMemoryError("no room")),
    Case({"dp": 2, "zero": 1}, configuration(4, 1, pp=2), "backward", 0, MemoryError()),
    Case({"dp": 2}, configuration(8, 2, dp=2), "forward", 0, RuntimeError(NO_ROOM)),
]
FOUR_RANKS = [
    Case({"tp": 2, "dp": 2}, configuration(4, 1, tp=2, pp=2), "forward", 3, torch.OutOfMemoryError("no room")),
    Case({"pp": 2, "dp": 2}, configuration(4, 1, dp=4), "backward", 1, torch.OutOfMemoryError("no room")),
]


def _run_out(backend: MegatronBackend, case: Case, in_step: int) -> None:
    """From now on the victim has no memory for the second micro-batch (or the only one) of a step in the new
    configuration, the `in_step`-th."""
    train_step, steps = backend.train_step, []

    def ruined(*arguments: Any, **options: Any) -> Any:
        if backend.configuration != case.after or dist.get_rank() != case.victim:
            return train_step(*arguments, **options)
        steps.append(1)
        calls = []

        def fail(*arguments: Any) -> None:
            calls.append(1)
            if len(calls) == min(2, case.after.num_microbatches):
                raise case.error

        modules = backend.built.chunks[0].modules()
        layer = [module for module in modules if type(module).__name__ == "TransformerLayer"][-1]
        if len(steps) == in_step:
            if case.place == "forward":
                layer.register_forward_hook(fail)
            else:
                next(layer.parameters()).register_hook(fail)
        return train_step(*arguments, **options)

    backend.train_step = ruined  # type: ignore[method-assign]


def _train(case: Case, table: Path, moves: bool, in_step: int = 1) -> tuple[list[Event], list[torch.Tensor]]:
    """Events of rank 0, and what weights and moments this rank has in the end."""
    decide_often()
    settings = {"global_batch": 4, "tokens": 16 * SAMPLES, "micro_batch": 1}
    job = tiny_job(dist.get_world_size(), case.before, **settings)
    limits = {"every_samples": 16, "max_global_batch": 8, "max_micro_batch": 2}
    job = job.model_copy(
        update={
            "planner": job.planner.model_copy(update=limits),
            "profile": job.profile.model_copy(update={"table": table}),
        }
    )
    backend = backend_of(job)
    if moves:
        _run_out(backend, case, in_step)
    planner = EagerPlanner(job, case.after) if dist.get_rank() == 0 else None
    if planner is not None and not moves:
        planner.throughput.refuse(case.after, "not today")
    events: list[Event] = []
    Trainer(
        job,
        table.parent,
        backend,
        random_batches,
        random_batches,
        planner,  # type: ignore[arg-type]
        TrainerState(),
        events.append,
        lambda: False,
        keep_nothing=True,
    ).train()
    state = [backend.live_state()[place]().clone() for place in sorted(backend.live_state())]
    backend.close()
    return events, state


def _no_memory_for_groups(folder: Path) -> list[str]:
    """A move whose groups no rank has memory for: what is raised, and what the throughput table then says."""
    case = Case({"tp": 2}, configuration(4, 1, dp=2), "", 0, torch.OutOfMemoryError("no room"))
    make_groups = groups.make_groups

    def make(layout: Layout, timeout_seconds: float) -> None:
        with no_agreement():
            if layout == case.after.layout:
                raise case.error
        make_groups(layout, timeout_seconds)

    groups.make_groups = make
    table = folder / f"{dist.get_rank()}.jsonl"
    with pytest.raises(MidCollectiveError):
        _train(case, table, moves=True)
    return table.read_text().splitlines()


@pytest.mark.dist
def test_a_layout_without_memory_for_its_groups_is_recorded_before_the_restart(tmp_path: Path) -> None:
    for rows in run_ranks(2, _no_memory_for_groups, tmp_path):
        assert len(rows) == 1
        assert '"failure":"out of memory"' in rows[0]


def _forget_all_groups() -> None:
    """What torch does when it aborts NCCL groups (`_abort_process_group`; gloo has no such): it knows none any more."""
    distributed_c10d._update_default_pg(None)
    world = distributed_c10d._world
    for each in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config, world.pg_to_tag):
        each.clear()
    world.tags_to_pg.clear()


def _there_and_back(cases: list[Case], folder: Path, groups_gone: bool = False) -> None:
    """Every case against a run that stays, in the same processes."""
    if groups_gone:
        break_ = World._break

        def break_all(world: World, trial: Trial) -> None:
            break_(world, trial)
            _forget_all_groups()

        World._break = break_all  # type: ignore[method-assign]
    for number, case in enumerate(cases):
        table = folder / f"table-{number}.jsonl"
        expected, steady = _train(case, table, moves=False)
        events, state = _train(case, table, moves=True)
        assert _losses(events) == _losses(expected), "to the bit: nothing was lost, rounded or done twice"
        assert len(_losses(events)) == SAMPLES // 4
        assert all(torch.equal(mine, other) for mine, other in zip(state, steady, strict=True))
        there, back = [event for event in events if isinstance(event, Reconfigure)]
        assert (there.before, there.after) == (back.after, back.before), "and never again"
        assert there.samples_consumed == back.samples_consumed == 16
        (failure,) = [event for event in events if isinstance(event, Failure)]
        assert not failure.fatal
        assert f"{case.after.label} ran out of memory" in failure.message
        assert f"rank {case.victim}: {type(case.error).__name__}" in failure.message
        if dist.get_rank() == 0:
            assert sum(isinstance(event, DecisionMade) for event in events) == SAMPLES // 16, "asked again"
            rows = table.read_text().splitlines()
            assert len(rows) == 1
            assert '"failure":"out of memory"' in rows[0]


def _losses(events: list[Event]) -> list[tuple[int, float | None]]:
    return [(event.samples_consumed, event.loss) for event in events if isinstance(event, Step)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "cases", "groups_gone"),
    [
        pytest.param(2, TWO_RANKS[:1], True, id="2 ranks, groups gone as on NCCL"),
        pytest.param(4, FOUR_RANKS[:1], False, id="4 ranks", marks=pytest.mark.slow),
        pytest.param(2, TWO_RANKS[1:], False, id="2 ranks, one move back after the other", marks=pytest.mark.slow),
        pytest.param(4, FOUR_RANKS[1:], False, id="4 ranks, in the backward pass", marks=pytest.mark.slow),
    ],
)
def test_the_job_moves_back_in_place(ranks: int, cases: list[Case], groups_gone: bool, tmp_path: Path) -> None:
    run_ranks(ranks, _there_and_back, cases, tmp_path, groups_gone)
