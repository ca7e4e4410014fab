"""One noise scale in every loop: what `copus submit` measures, and a meter in the loops of other people, at equal
weights and data. And what is wrong with a loop is told in every loop."""

import re

import pytest

from tests.meter_loops import STEPS, Figures, loop_of, microbatches, of_loops
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def _assert_equal(loops: dict[str, Figures]) -> None:
    """Every loop has the figures of the first, to 1e-5, and nothing to complain about."""
    first, *others = loops
    grad_sq, trace, value, samples, _ = loops[first]
    assert (value is not None, samples) == (True, STEPS)
    for name in others:
        assert loops[name][:3] == pytest.approx((grad_sq, trace, value), rel=1e-5), name
        assert loops[name][3:] == (STEPS, []), name


def test_ddp_fsdp2_and_megatron_core_measure_what_a_job_measures() -> None:
    _assert_equal(run_ranks(2, of_loops, ["submit", "ddp", "fsdp", "megatron_dp", "megatron_tp"])[0])


def test_deepspeed_measures_what_ddp_measures() -> None:
    _assert_equal(run_ranks(2, of_loops, ["ddp", "deepspeed1"])[0])


@pytest.mark.slow
def test_deepspeed_measures_the_same_at_every_stage() -> None:
    _assert_equal(run_ranks(2, of_loops, ["ddp", "deepspeed0", "deepspeed2", "deepspeed3"])[0])


def test_plain_torch_measures_what_a_job_on_one_rank_measures() -> None:
    _assert_equal(run_ranks(1, of_loops, ["submit", "plain"])[0])


# Bad use


def _told(kind: str, what: str) -> tuple[list[str], int]:
    """What the meter says of a loop in which something is wrong, and the steps that it measured."""
    count = 2 if kind != "plain" else 4
    loop = loop_of(kind, count)
    meter = loop.meter(count + (what == "passes"))
    for step in range(2):
        parts = microbatches(loop, step)[:count]
        if what == "uneven":
            tokens, labels = parts[-1]
            parts[-1] = tokens[:1], labels[:1]
        loop.step(parts, (lambda loss: 32 * loss) if what == "summed" else lambda loss: loss)
    meter.close()
    return meter.problems, meter.noise.samples


def _told_in_loops(cases: list[tuple[str, str]]) -> list[tuple[list[str], int]]:
    return [_told(kind, what) for kind, what in cases]


def _one_part_is_refused(kinds: list[str]) -> list[str]:
    """The refusals, and what is left of the meters in the models: they train as before."""
    said = []
    for kind in kinds:
        loop = loop_of(kind, 1)
        with pytest.raises(ValueError, match="is one part") as refusal:
            loop.meter(1)
        said.append(str(refusal.value))
        loop.step(microbatches(loop, 0)[:1], lambda loss: loss)
        meter = loop.meter(2)
        meter.close()  # before any step
        loop.step(microbatches(loop, 0)[:1], lambda loss: loss)
        assert meter.steps == 0
    return said


SAID = {
    "summed": (["is not the mean over its tokens"], 2),
    "passes": ([r"2 backward passes instead of micro_batches\(3\)"], 0),
    "uneven": (["micro-batches count 16 to 32 tokens", "differ in their sequences"], 0),
}
"""What is said, and the steps that are measured all the same."""


def _assert_told(ranks: int, kinds: list[str]) -> None:
    cases = [(kind, what) for kind in kinds for what in SAID if not (kind.startswith("megatron") and what == "uneven")]
    for (kind, what), (problems, measured) in zip(cases, run_ranks(ranks, _told_in_loops, cases)[0], strict=True):
        words, steps = SAID[what]
        assert len(problems) == len(words), (kind, what, problems)
        assert all(map(re.search, words, problems)), (kind, what, problems)
        assert measured == steps, (kind, what)


def test_bad_use_is_told_under_ddp_fsdp2_and_megatron_core() -> None:
    _assert_told(2, ["ddp", "fsdp", "megatron_dp", "megatron_tp"])


@pytest.mark.slow
def test_bad_use_is_told_under_deepspeed() -> None:
    _assert_told(2, ["deepspeed1", "deepspeed3"])


def test_one_part_is_refused_and_a_meter_that_is_closed_before_any_step_leaves_the_loop_as_it_was() -> None:
    for said in run_ranks(1, _one_part_is_refused, ["plain", "megatron_dp"])[0]:
        assert "micro_batches(1) × 1 replica is one part" in said
