"""What `copus.NoiseMeter` adds to a step of the training loops that are not ours: what every rank runs, and how the
times are compared. See benchmarks/noise.py."""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.paired import median_ratio
from planner.config import PlannerConfig
from tests.meter_loops import Microbatch, loop_of

LOOPS = {"plain": 1, "ddp": 2, "fsdp": 2, "deepspeed1": 2, "megatron_dp": 2}
"""Loops by name (`tests/meter_loops.py`), and ranks."""
SHAPE = {"layers": 2, "hidden": 256, "ffn_hidden": 688, "heads": 4, "kv_heads": 4, "seq_len": 128, "vocab": 1000}
MICRO_BATCH, MICRO_BATCHES = 4, 2
"""Sequences in a backward pass, and passes of a replica in a step: 512 tokens each. A small model on few tokens is
the hard case: a norm costs as much as reading its gradient, and a backward pass grows with the tokens."""
WARM_UP = 3
"""Steps before anything is timed; in as many the meter looks at the loss."""
MODES = ("without", "with", "again")
"""The same loop three times: with a meter, and twice without one, of which the second shows what is chance."""

Seconds = dict[str, dict[str, list[float]]]
"""Of every step, by clock (`wall`, `processor`) and by mode."""


def step_times(kind: str, rounds: int) -> Seconds:
    """Seconds of the steps of a loop, with and without a meter, in turns within one process: a turn is as many steps as
    lie between two measured ones, and every round begins with another mode."""
    cycle = PlannerConfig().noise_every_steps
    loops = {mode: loop_of(kind, MICRO_BATCHES, SHAPE, MICRO_BATCH) for mode in MODES}
    meter = loops["with"].meter(MICRO_BATCHES, MICRO_BATCH)
    generator = torch.Generator().manual_seed(dist.get_rank())
    parts = [_tokens(generator) for _ in range(MICRO_BATCHES)]
    for loop in loops.values():
        for _ in range(WARM_UP):
            loop.step(parts, _as_it_is)
    past_the_first = PlannerConfig().min_noise_samples // cycle * cycle + cycle  # of which all are measured
    meter.load_state_dict({**meter.state_dict(), "steps": past_the_first})
    seconds: Seconds = {clock: {mode: [] for mode in MODES} for clock in ("wall", "processor")}
    for number in range(rounds):
        for place in range(len(MODES)):
            mode = MODES[(place + number) % len(MODES)]
            for _ in range(cycle):
                dist.barrier()
                wall, processor = time.perf_counter(), time.process_time()
                loops[mode].step(parts, _as_it_is)
                seconds["processor"][mode].append(time.process_time() - processor)
                seconds["wall"][mode].append(time.perf_counter() - wall)
    assert not meter.problems, meter.problems
    assert meter.noise.samples == WARM_UP + rounds, "one step in a turn is measured"
    return seconds


def compared(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What the meter adds, in percent, each with the 90 % interval of the median over rounds: to a step on average, to
    a measured one, to the others, and, as a check, what a second loop without a meter adds."""
    cycle = PlannerConfig().noise_every_steps
    off, on, again = (np.array(seconds[mode]).reshape(-1, cycle) for mode in MODES)
    return {
        "step": median_ratio(on.sum(axis=1), off.sum(axis=1)),
        "measured": median_ratio(on[:, 0], off[:, 0]),
        "others": median_ratio(on[:, 1:].sum(axis=1), off[:, 1:].sum(axis=1)),
        "check": median_ratio(again.sum(axis=1), off.sum(axis=1)),
    }


def measure(kind: str, rounds: int) -> dict[str, Any]:
    """The cell of one loop."""
    from tests.ranks import run_ranks

    seconds: Seconds = run_ranks(LOOPS[kind], step_times, kind, rounds, timeout_seconds=7200)[0]
    return {
        "ranks": LOOPS[kind],
        "rounds": rounds,
        "off_seconds": {clock: float(np.median(times["without"])) for clock, times in seconds.items()},
        "overhead_pct": {clock: compared(times) for clock, times in seconds.items()},
    }


def _as_it_is(loss: torch.Tensor) -> torch.Tensor:
    return loss


def _tokens(generator: torch.Generator) -> Microbatch:
    tokens = torch.randint(SHAPE["vocab"], (MICRO_BATCH, SHAPE["seq_len"] + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
