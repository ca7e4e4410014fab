"""One noise scale in every loop: what `copus submit` measures, and a meter in the loops of other people, at equal
weights and data."""

from typing import Any

import pytest

from tests.meter_loops import STEPS, figures, of_loops, torch_loop
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def _assert_equal(loops: dict[str, tuple[float, float, float | None, int, list[str]]]) -> None:
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


def _alone() -> dict[str, Any]:
    given = {"micro_batch": 2, "micro_batches": 4}
    return {**of_loops(["submit"]), "plain torch": figures(torch_loop(lambda model: model, **given))}


def test_plain_torch_measures_what_a_job_on_one_rank_measures() -> None:
    _assert_equal(run_ranks(1, _alone)[0])
