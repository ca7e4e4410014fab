"""`copus plot`: what is drawn is what happened."""

from pathlib import Path

import pytest
from launch_events import DATA, SEQ_LEN, TENSOR, noise, reconfigure, start, step, write_run
from launch_jobs import copus_here

from copus.events import Evaluate
from launch.plot import draw, series_of, smoothed


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """TENSOR up to 8 samples, a death at 12, a resume from 8, a move to DATA there."""
    return write_run(
        tmp_path / "one",
        start(),
        step(4, 0.1, loss=5.0),
        step(8, 0.1, loss=4.0),
        noise(8, high=None),
        step(12, 0.1, loss=99.0),
        start(8, resumed_from="x"),
        reconfigure(0, 8, TENSOR, DATA),
        Evaluate(step=8, samples_consumed=8, loss=4.5, sequences=4, seconds=0.1),
        step(16, 0.4, 8, loss=None),
        step(24, 0.4, 8, loss=3.0),
    )


def test_series_are_in_tokens_and_without_what_was_done_again(run: Path) -> None:
    series = series_of(run)
    assert series.training == [(4 * SEQ_LEN, 5.0), (8 * SEQ_LEN, 4.0), (24 * SEQ_LEN, 3.0)]
    assert series.validation == [(8 * SEQ_LEN, 4.5)]
    assert [(tokens // SEQ_LEN, batch) for tokens, batch in series.batch] == [(4, 4), (8, 4), (16, 8), (24, 8)]
    assert [rate for _, rate, _ in series.throughput] == pytest.approx([40, 40, 20, 20])
    assert series.spans == [(0, 8 * SEQ_LEN, TENSOR), (8 * SEQ_LEN, 24 * SEQ_LEN, DATA)]
    assert series.moves == [(8 * SEQ_LEN, True)]


def test_throughput_is_not_smoothed_across_a_move() -> None:
    before, after = [(place, 10.0, 1) for place in range(9)], [(place, 50.0, 2) for place in range(9, 18)]
    assert smoothed(before + after) == [10.0] * 9 + [50.0] * 9
    assert smoothed([(0, 10.0, 1), (1, 1000.0, 1), (2, 11.0, 1)]) == [11.0] * 3


def test_the_picture_has_four_panels_with_the_layouts_named(run: Path) -> None:
    loss, noise_panel, layouts, throughput = draw(series_of(run), "one").axes
    assert loss.get_ylabel() == "loss (nats per token)"
    assert noise_panel.get_yscale() == "log"
    assert [text.get_text() for text in layouts.texts] == ["TP2·PP1·DP1\nmicro-batch 1", "TP1·PP1·DP2\nmicro-batch 2"]
    assert throughput.get_xlabel() == "tokens"
    assert len({panel.get_xlim() for panel in (loss, noise_panel, layouts, throughput)}) == 1


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_the_file_is_written(run: Path, tmp_path: Path, name: str, begins: bytes) -> None:
    assert copus_here("plot", str(run), "--output", str(tmp_path / name)) == 0
    assert (tmp_path / name).read_bytes().startswith(begins)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "one"])


@pytest.mark.parametrize(
    ("output", "message"),
    [("a.txt", "expected a name that ends in .png, .svg or .pdf"), ("no/such/a.png", "No such file or directory")],
)
def test_user_errors(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    monkeypatch.chdir(run.parent)
    assert copus_here("plot", "one", "--output", output) == 2
    errors = capsys.readouterr().err
    assert errors == f"copus: --output {output}: {message}\n"


def test_a_run_without_steps_has_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("plot", str(write_run(tmp_path / "new", start()))) == 2
    assert "no step has been trained yet" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert copus_here("plot", str(run)) == 2
    assert capsys.readouterr().err == "copus: copus plot needs matplotlib: pip install 'copus[plot]'\n"
