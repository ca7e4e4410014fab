"""What `copus.NoiseMeter` adds to a step of the training loops that are not ours: what every rank runs, and how the
times are compared. See benchmarks/noise.py."""

import gc
import math
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import copus
from benchmarks.paired import median_ratio
from planner.config import PlannerConfig
from tests.meter_loops import Loop, Microbatch, loop_of

LOOPS = {"plain": 1, "ddp": 2, "fsdp": 2, "deepspeed1": 2, "megatron_dp": 2}
"""Loops by name (`tests/meter_loops.py`), and ranks."""
SHAPE = {"layers": 2, "hidden": 256, "ffn_hidden": 688, "heads": 4, "kv_heads": 4, "seq_len": 128, "vocab": 1000}
MICRO_BATCH, MICRO_BATCHES = 4, 2
"""Sequences in a backward pass, and passes of a replica in a step: 512 tokens each. A small model on few tokens is
the hard case: a norm costs as much as reading its gradient, and a backward pass grows with the tokens."""
WARM_UP = 3
"""Steps before anything is timed."""
MODES = ("without", "with", "again")
"""The same model with a meter, and twice without one, of which the second shows what is chance. It is one model, since
two may differ by where they lie in memory."""

Seconds = dict[str, dict[str, list[float]]]
"""Of every step, by clock (`wall`, `processor`) and by mode."""


def step_times(kind: str, rounds: int) -> Seconds:
    """Seconds of the steps of a loop, with and without a meter, in turns within one process: a turn is as many steps as
    lie between two measured ones, and every round begins with another mode."""
    settings = PlannerConfig()
    cycle = settings.noise_every_steps
    loop = loop_of(kind, MICRO_BATCHES, SHAPE, MICRO_BATCH)
    generator = torch.Generator().manual_seed(dist.get_rank())
    parts = [_tokens(generator) for _ in range(MICRO_BATCHES)]
    meter = loop.meter(MICRO_BATCHES, MICRO_BATCH)
    for _ in range(WARM_UP):
        loop.step(parts, _as_it_is)
    # Of the first steps all are measured, and in a few the meter looks at the loss: both are over.
    state = {**meter.state_dict(), "steps": math.ceil(settings.min_noise_samples / cycle) * cycle}
    meter.close()
    seconds: Seconds = {clock: {mode: [] for mode in MODES} for clock in ("wall", "processor")}
    gc.disable()
    for number in range(rounds):
        for place in range(len(MODES)):
            mode = MODES[(place + number) % len(MODES)]
            meter = _attached(loop, state) if mode == "with" else meter
            gc.collect()  # making a meter leaves garbage, which is no part of a step
            for _ in range(cycle):
                dist.barrier()
                wall, processor = time.perf_counter(), time.process_time()
                loop.step(parts, _as_it_is)
                seconds["processor"][mode].append(time.process_time() - processor)
                seconds["wall"][mode].append(time.perf_counter() - wall)
            if mode == "with":
                assert not meter.problems, meter.problems
                state = meter.state_dict()
                meter.close()
    gc.enable()
    assert meter.noise.samples == WARM_UP + rounds, "one step in a turn is measured"
    return seconds


def _attached(loop: Loop, state: dict[str, Any]) -> copus.NoiseMeter:
    """A meter that goes on, without another look at the loss."""
    meter = loop.meter(MICRO_BATCHES, MICRO_BATCH)
    meter.load_state_dict(state)
    if meter._loss_check is not None:
        meter._loss_check.close()
    return meter


def compared(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """What the meter adds, in percent, each with the 90 % interval of the median over rounds: to a step on average, to
    a measured one, to the others, and, as a check, the other steps without a meter over the first ones."""
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
