"""`copus profile show` and `copus profile import`: what is printed, drawn and taken over."""

import json
import shutil
from pathlib import Path

import pytest
from launch_jobs import copus_here, write_job
from test_profiles_query import LAYOUTS, row, table_of
from test_profiles_table import HERE, MODEL

from copus.job import load_job
from launch.lines import lines_of, winners
from launch.profile_plot import draw_lines
from profiles.published import read_csv
from profiles.query import Filter, groups, query
from profiles.table import ThroughputTable

HEADER = "gpus,layers,hidden,heads,seq_len,vocab,gbs,mbs,tp,pp,dp,step_time_s,tokens_per_s_per_gpu,peak_mem_gb"
HEADER += ",notes,sharding"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two lines that cross between 4 and 8, two micro-batches at 8, and a failure."""
    data, tensor = LAYOUTS[:2]
    rows = [
        row(data, 4, 0.50),
        row(data, 8, 0.60),
        row(tensor, 4, 0.40, spread_seconds=0.04),
        row(tensor, 8, 0.80),
        row(LAYOUTS[2], 16, failure="out of memory"),
    ]
    faster = rows[1].configuration.model_copy(update={"micro_batch": 2})
    rows.append(rows[1].model_copy(update={"configuration": faster, "step_seconds": 0.5}))
    return table_of(tmp_path / "table.jsonl", *rows)


def test_what_is_shown(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert copus_here("profile", "show", str(table)) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines[3:6]}
    assert cells["batch"] == ["4", "8"]
    assert cells["TP1·PP1·DP2"] == ["8", "m1", "16", "m2*"]
    assert cells["TP2·PP1·DP1·SP"] == ["10", "m1*", "10", "m1"]
    assert "fastest: TP2·PP1·DP1·SP at 4, TP1·PP1·DP2 at 8" in lines
    assert "failed: TP1·PP2·DP1·VP2·Z1 B16 m1: out of memory" in lines


def test_json_has_every_row_with_repeats_as_one(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(table, row(LAYOUTS[0], 4, 0.50, time=2.0))
    assert copus_here("profile", "show", str(table), "--json", "--layout", "DP2") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(each["label"], each["rows"]) for each in rows] == [
        ("TP1·PP1·DP2 B4 m1", 2),
        ("TP1·PP1·DP2 B8 m1", 1),
        ("TP1·PP1·DP2 B8 m2", 1),
    ]
    assert rows[0]["samples_per_second"] == 8.0


def test_a_job_shows_its_table_and_its_model_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, model={"layers": 6})
    monkeypatch.chdir(tmp_path)
    table_of(tmp_path / "table.jsonl", row())
    assert copus_here("profile", "show", "job.yaml") == 0
    assert capsys.readouterr().out == "nothing in table.jsonl that fits the filter; copus profile JOB.yaml measures\n"
    assert copus_here("profile", "show", str(job), "--model", MODEL.digest[:6]) == 0
    assert "TP1·PP1·DP2" in capsys.readouterr().out


def test_a_table_can_be_named_by_an_option_too(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert copus_here("profile", "show", str(table)) == 0
    shown = capsys.readouterr().out
    assert copus_here("profile", "show", "--table", str(table)) == 0
    assert capsys.readouterr().out == shown
    job = write_job(tmp_path, model={"layers": 6})  # another model, and a table of its own
    monkeypatch.chdir(tmp_path)
    assert copus_here("profile", "show", str(job), "--table", "other.jsonl", "--json") == 2
    assert "other.jsonl: No such file or directory; copus profile JOB.yaml measures\n" in capsys.readouterr().err
    assert copus_here("profile", "show", str(job), "--table", str(table), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "tables": [str(table)], "rows": []}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["no-run"], "no-run: no table, job file or run"),
        (["table.jsonl", "--where", "nonsense ="], "--where nonsense ="),
        (["table.jsonl", "--layout", "XP2"], "'xp2' is no degree"),
        (["table.jsonl", "--plot", "lines.txt"], "--plot lines.txt: expected a name"),
        (["table.jsonl", "--plot", "lines.png", "--model", "0"], "nothing to draw"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    table: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    assert copus_here("profile", "show", *arguments) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1


def test_the_picture_has_the_lines_and_the_failures(table: Path, tmp_path: Path) -> None:
    found = query([table])
    best = winners(lines_of(found))
    assert [(each.batch, each.layout) for each in best] == [(4, "TP2·PP1·DP1·SP"), (8, "TP1·PP1·DP2")]
    figure = draw_lines(list(groups(found).values()))
    (panel,) = figure.axes
    drawn = {container.get_label(): container.lines[0].get_xydata().tolist() for container in panel.containers}
    assert drawn == {"TP1·PP1·DP2": [[4, 8], [8, 16]], "TP2·PP1·DP1·SP": [[4, 10], [8, 10]]}
    assert any(line.get_marker() == "x" and line.get_xdata()[0] == 16 for line in panel.lines)
    assert copus_here("profile", "show", str(table), "--plot", str(tmp_path / "lines.png")) == 0
    assert (tmp_path / "lines.png").stat().st_size > 5000


def csv_of(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "rows.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_csv_rows_become_measurements(tmp_path: Path) -> None:
    read = read_csv(
        csv_of(
            tmp_path,
            "8,12,1024,16,1024,50257,16,2,2,2,2,0.5,,10.5,,zero1",
            "8,12,1024,16,1024,50257,16,2,8,,,,512,,,fsdp2 (zero3)",
            "8,12,1024,16,1024,50257,16,16,,,1,,,,published as OOM,",
            "8,12,1024,16,1024,50257,16,2,,,8,,,,nothing said,",
            "8,12,1024,16,1024,50257,15,2,,,,1,,,,",
            "8,12,1024,16,1024,,16,2,,,,1,,,,",
            "8,12,1024,16,1024,50257,16,2,2,2,4,1,,,,",
            "8,12,1024,16,1024,50257,16,2,,,,fast,,,,",
        )
    )
    first, second = read.measurements[:2]
    assert first.configuration.label == "TP2·PP2·DP2·Z1 B16 m2"
    assert (first.step_seconds, first.peak_bytes, first.count) == (0.5, 10_500_000_000, 1)
    assert (first.model.kv_heads, first.model.ffn_hidden) == (16, 4096)
    assert first.fingerprint.model == first.model.digest
    assert second.step_seconds == pytest.approx(16 * 1024 / (512 * 8))
    assert second.configuration.layout.zero == 3
    assert len(read.measurements) == 2
    assert dict(read.rejected) == {
        "tp × pp × cp × dp is not the number of gpus": 2,
        "neither a time nor a failure": 1,
        "configuration: global_batch ÷ (dp × micro_batch), not a whole number of micro-batches": 1,
        "vocab is empty": 1,
        "step_time_s is not a number": 1,
    }


def test_the_tensor_parallelism_of_experts_is_read_if_there_are_any(tmp_path: Path) -> None:
    rows = [f"8,12,1024,16,1024,50257,16,2,2,1,4,0.5,,,,,{rest}" for rest in ("8,2,8,1", "8,2,4,2", "8,2,4,", ",,,1")]
    read = read_csv(csv_of(tmp_path, *rows, header=f"{HEADER},experts,experts_per_token,ep,etp"))
    labels = [row.configuration.layout.label for row in read.measurements]
    assert labels == ["TP2·PP1·DP4·EP8·ETP1", "TP2·PP1·DP4·EP4", "TP2·PP1·DP4·EP4", "TP2·PP1·DP4"]


@pytest.mark.parametrize("yes", ["yes", "True", "TRUE", "1"])
def test_words_are_read_in_any_case(tmp_path: Path, yes: str) -> None:
    header = f"{HEADER},ffn_hidden,gated_mlp,tied_embeddings,sequence_parallel,recompute,gpus_per_node,system"
    row = f"8,12,1024,16,1024,50257,16,2,2,2,2,0.5,,,,,2816,{yes},{yes},{yes},Full,4,H100"
    (read,) = read_csv(csv_of(tmp_path, row, header=header)).measurements
    assert read.model.gated_mlp
    assert read.model.tied_embeddings
    assert read.configuration.layout.sequence_parallel
    assert read.configuration.layout.recompute == "full"
    assert read.fingerprint.hardware == "2 nodes × 4 × H100"


def test_cells_that_cannot_be_cost_their_row_alone(tmp_path: Path) -> None:
    header = f"{HEADER},spread_s,tied_embeddings,gpus_per_node"
    good = "8,12,1024,16,1024,50257,16,2,2,2,2,0.5,,10.5,,zero1"
    rows = (
        f"{good},,,",
        f"{good.replace('10.5', 'nan')},,,",
        f"{good.replace('10.5', 'inf')},,,",
        f"{good.replace('10.5', '-1')},,,",
        f"{good.replace(',0.5,', ',inf,')},,,",
        f"{good},-1,,",
        f"{good},,perhaps,",
        f"{good},,,3",
        f"{good},,,0",
        f"{good.replace('0.5,,', '0.5,900000,')},,,",
    )
    read = read_csv(csv_of(tmp_path, *rows, header=header))
    assert len(read.measurements) == 1
    assert dict(read.rejected) == {
        "peak_mem_gb is not a number": 2,
        "measurement: Input should be greater than or equal to 0": 2,
        "step_time_s is not a number": 1,
        "tied_embeddings is neither yes nor no": 1,
        "gpus do not fill the nodes": 2,
        "step_time_s and tokens_per_s_per_gpu contradict each other": 1,
    }


def test_failures_are_taken_over(tmp_path: Path) -> None:
    path = csv_of(
        tmp_path,
        "1,12,1024,16,1024,50257,16,16,,,,,,,line 7; OOM,",
        "1,12,1024,16,1024,50257,16,8,,,,,,,published as crashed/oom (nan),",
    )
    assert [each.failure for each in read_csv(path).measurements] == ["out of memory", "crashed, or out of memory"]


def test_what_is_no_csv_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = str(tmp_path / "into.jsonl")
    bad = csv_of(tmp_path, "1", header="gpus,layers")
    assert copus_here("profile", "import", str(bad), "--table", into) == 2
    assert "no column hidden, heads, seq_len, vocab, gbs, mbs" in capsys.readouterr().err
    assert copus_here("profile", "import", str(tmp_path / "none.csv"), "--table", into) == 2
    assert "none.csv: No such file" in capsys.readouterr().err
    assert not Path(into).exists()


def test_what_is_no_table_is_not_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    into = tmp_path / "into.jsonl"
    (tmp_path / "notes.md").write_text("# no table\n")
    assert copus_here("profile", "import", str(tmp_path / "notes.md"), "--table", str(into)) == 2
    refusal = f"copus: {tmp_path}/notes.md: no throughput table: none of its lines is a measurement\n"
    assert capsys.readouterr().err == refusal
    assert copus_here("profile", "import", str(into), "--table", str(tmp_path / "notes.md")) == 2
    assert capsys.readouterr().err == refusal
    assert (tmp_path / "notes.md").read_text() == "# no table\n"
    assert copus_here("profile", "import", "--table", str(into)) == 2
    assert "missing argument 'FILE.csv|.jsonl …'" in capsys.readouterr().err
    assert not into.exists()


def test_importing_twice_adds_once(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = csv_of(tmp_path, *["8,12,1024,16,1024,50257,16,2,2,2,2,0.5,,10.5,,zero1"] * 2, "8,12,1024,16,,,16,2,,,,1,,,,")
    into = ["--table", str(tmp_path / "into.jsonl"), "--json"]
    assert copus_here("profile", "import", str(csv), str(table), *into) == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["added"], first["failures"], first["rejected"]) == (7, 1, {"seq_len is empty": 1})
    copied = shutil.copy(csv, tmp_path / "again.csv")
    assert copus_here("profile", "import", str(csv), str(table), *into) == 0
    assert json.loads(capsys.readouterr().out)["added"] == 0
    Path(copied).touch()
    assert len(query([tmp_path / "into.jsonl"])) == 7


def test_rows_that_leave_out_what_is_usual_are_the_same_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one writes them by hand: found by the defaults, and not added again."""
    short = row().model_dump(mode="json", exclude_defaults=True)
    source, into = tmp_path / "hand.jsonl", tmp_path / "into.jsonl"
    source.write_text(json.dumps(short) + "\n")
    assert "vp" not in short["configuration"]["layout"]
    for added in (1, 0, 0):
        assert copus_here("profile", "import", str(source), "--table", str(into), "--json") == 0
        assert json.loads(capsys.readouterr().out)["added"] == added
    for wanted in (Filter(where="vp = 1 AND experts = 0"), Filter(layout="TP1")):
        assert len(query([source], wanted)) == 1


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


def test_jobs_that_are_named_show_the_models_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = (
        write_job(new_folder(tmp_path / name), model={"layers": layers}) for name, layers in (("a", 2), ("b", 4))
    )
    table = ThroughputTable(tmp_path / "both.jsonl")
    for path in (one, other):
        model = load_job(path).model
        here = HERE.model_copy(update={"model": model.digest})
        table.add(row(fingerprint=here).model_copy(update={"model": model}))
    table.add(row())
    shown = []
    for jobs in ([one], [other], [one, other]):
        assert copus_here("profile", "show", *map(str, jobs), "--table", str(table.path), "--json") == 0
        shown.append(len(json.loads(capsys.readouterr().out)["rows"]))
    assert shown == [1, 1, 2]
