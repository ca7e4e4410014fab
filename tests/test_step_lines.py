"""The lines that rank 0 prints."""

from launch_events import DATA, TENSOR, noise, reconfigure, start, step

from copus.events import Evaluate
from copus.step_lines import StepLines


def test_a_step_is_a_line_with_what_runs() -> None:
    lines = StepLines()
    rated = start().model_copy(update={"peak_samples_per_second": 200.0})
    events = [
        rated,
        step(4, 0.1),
        noise(4),
        reconfigure(0, 4, TENSOR, DATA),
        step(12, 0.1, 8),
        Evaluate(step=12, samples_consumed=12, loss=5.5, sequences=8, seconds=1.0),
    ]
    assert list(map(lines.line, events)) == [
        "step 0: training begins in TP2·PP1·DP1 B4 m1",
        "step 4: loss 3.0000, gradient norm 1, lr 1.00e-03, 1280 tokens/s, MFU 20 %, batch 4 in TP2·PP1·DP1 m1, 0.1 s",
        None,
        "step 4: moves to TP1·PP1·DP2 B8 m2, 2.5 s",
        "step 12: loss 3.0000, gradient norm 1, lr 1.00e-03, 2560 tokens/s, MFU 40 %, batch 8 in TP1·PP1·DP2 m2, 0.1 s",
        "step 12: validation loss 5.5000",
    ]


def test_a_step_that_was_not_finite_says_so() -> None:
    broken = step(4, 0.1).model_copy(update={"loss": None, "grad_norm": None, "skipped": True})
    assert StepLines().line(broken) == "step 4: loss not finite, gradient norm not finite, lr 1.00e-03, 0.1 s, skipped"
