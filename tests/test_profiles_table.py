"""The throughput table on disk: append-only, durable, and readable whatever stands in it."""

import json

import pytest

from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Fingerprint, Measurement
from profiles.model_shape import ModelShape
from profiles.table import ThroughputTable

MODEL = ModelShape(layers=2, hidden=64, ffn_hidden=128, heads=4, kv_heads=2, seq_len=32, vocab=512)
HERE = Fingerprint(
    model=MODEL.digest,
    precision="fp32",
    backend="megatron-core 0.16.1",
    hardware="2 × cpu",
    software="torch 2.13.0 gloo",
)


def measurement(fingerprint=HERE, global_batch=4, step_seconds=0.5):
    return Measurement(
        fingerprint=fingerprint,
        model=MODEL,
        configuration=Configuration(layout=Layout(dp=2), micro_batch=1, global_batch=global_batch),
        step_seconds=step_seconds,
        spread_seconds=0.01,
        count=3,
        time=1.0,
    )


def test_rows_come_back_as_added_and_in_order(tmp_path):
    table = ThroughputTable(tmp_path / "deep" / "folder" / "throughput.jsonl")
    assert table.rows(HERE) == []
    added = [measurement(global_batch=batch) for batch in (4, 2, 4)]
    for row in added:
        table.add(row)
    assert ThroughputTable(table.path).rows(HERE) == added
    assert table.skipped == 0


def test_rows_of_another_fingerprint_stay_out(tmp_path):
    table = ThroughputTable(tmp_path / "t.jsonl")
    for field in Fingerprint.model_fields:
        table.add(measurement(HERE.model_copy(update={field: "another"})))
    assert table.rows(HERE) == []
    assert len(table.path.read_text().splitlines()) == len(Fingerprint.model_fields)


def test_a_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    ThroughputTable("~/t.jsonl").add(measurement())
    assert ThroughputTable(tmp_path / "t.jsonl").rows(HERE) == [measurement()]


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_a_torn_last_line_costs_only_itself(tmp_path, keep):
    table = ThroughputTable(tmp_path / "t.jsonl")
    table.add(measurement(global_batch=2))
    table.add(measurement(global_batch=4))
    whole, torn, _ = table.path.read_bytes().split(b"\n")
    table.path.write_bytes(whole + b"\n" + torn[:keep])
    with pytest.warns(UserWarning, match="skipped 1 of 2 lines"):
        assert table.rows(HERE) == [measurement(global_batch=2)]
    assert table.skipped == 1
    table.add(measurement(global_batch=8))
    with pytest.warns(UserWarning, match="skipped 1 of 3 lines"):
        assert table.rows(HERE) == [measurement(global_batch=2), measurement(global_batch=8)]


def test_a_line_that_another_version_wrote_is_named_with_what_is_wrong_with_it(tmp_path):
    """0.1.0 took copies of one rank for a configuration before December 2026."""
    table = ThroughputTable(tmp_path / "t.jsonl")
    copies = json.loads(measurement().model_dump_json())
    copies["configuration"]["layout"] |= {"dp": 2, "dp_replicate": 2, "zero": 3}
    table.add(measurement())
    table.path.write_text(table.path.read_text() + "\n" + json.dumps(copies) + "\nno JSON\n")
    message = r"skipped 2 of 4 lines, .* \(line 3: configuration\.layout: dp_replicate\(2\) leaves dp\(2\) .*\)$"
    with pytest.warns(UserWarning, match=message):
        assert table.rows(HERE) == [measurement()]


def test_foreign_lines_are_skipped_and_counted(tmp_path):
    table = ThroughputTable(tmp_path / "t.jsonl")
    newer = json.loads(measurement().model_dump_json()) | {"field_of_the_future": 1}
    table.path.write_bytes(b"\xff\xfe binary\n\n[]\n" + json.dumps(newer).encode() + b"\n")
    table.add(measurement())
    with pytest.warns(UserWarning, match="skipped 3"):
        assert table.rows(HERE) == [measurement()]
    assert table.skipped == 3


@pytest.mark.parametrize("content", ["name: job\n", '{"kind": "start", "step": 0}\n', "\nto be or not to be\n"])
def test_a_file_of_something_else_is_no_table_and_stays_as_it_is(tmp_path, content):
    (tmp_path / "other").write_text(content)
    table = ThroughputTable(tmp_path / "other")
    for look in (table.check, table.check_writable, table.rows):
        with pytest.raises(OSError, match="no throughput table"):
            look()
    (tmp_path / "other").write_text("\n")
    assert table.rows() == []


def test_what_does_not_change_the_work_of_a_step_is_no_part_of_a_models_name():
    assert MODEL.model_copy(update={"rope_base": 500_000.0, "norm_epsilon": 1e-6}).digest == MODEL.digest
    assert MODEL.model_copy(update={"layers": MODEL.layers + 1}).digest != MODEL.digest


def test_whether_a_table_can_be_written_is_found_out_without_a_trace(tmp_path):
    table = ThroughputTable(tmp_path / "new" / "table.jsonl")
    table.check_writable()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="/proc"):
        ThroughputTable("/proc/nowhere/table.jsonl").check_writable()
