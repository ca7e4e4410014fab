"""Tables as one: what duckdb makes of the JSON lines is what the planner's own reader makes of them."""

import json
import random

import pytest
from test_profiles_table import HERE, MODEL, measurement

from profiles.configuration import Configuration
from profiles.layout import Layout
from profiles.measurement import Measurement
from profiles.query import Filter, query, read_new
from profiles.table import ThroughputTable
from profiles.throughput import Throughput

LAYOUTS = (
    Layout(dp=2),
    Layout(tp=2, sequence_parallel=True),
    Layout(pp=2, vp=2, zero=1),
    Layout(tp=2, recompute="full"),
)


def row(layout=LAYOUTS[0], global_batch=4, step_seconds=0.5, time=1.0, failure=None, **others):
    return Measurement(
        fingerprint=others.pop("fingerprint", HERE),
        model=MODEL,
        configuration=Configuration(layout=layout, micro_batch=1, global_batch=global_batch),
        step_seconds=None if failure else step_seconds,
        failure=failure,
        time=time,
        **others,
    )


def table_of(path, *rows):
    ThroughputTable(path).extend(rows)
    return path


def test_a_summary_says_what_throughput_says(tmp_path):
    """Random rows, with repeats, failures and unequal counts of steps."""
    drawn = random.Random(7)
    rows = [
        row(
            drawn.choice(LAYOUTS),
            drawn.choice([4, 8, 16]),
            drawn.uniform(0.5, 2),
            time=float(index),
            failure=drawn.choice([None, None, None, "out of memory"]),
            spread_seconds=drawn.choice([None, drawn.uniform(0, 0.2)]),
            count=drawn.randrange(0, 6),
            peak_bytes=drawn.choice([None, drawn.randrange(10**9)]),
        )
        for index in range(120)
    ]
    found = query([table_of(tmp_path / "t.jsonl", *rows)])
    known = Throughput(rows)
    assert {each.measurement.configuration for each in found} == {each.configuration for each in rows}
    assert sum(each.rows for each in found) == len(rows)
    assert any(each.measurement.failure for each in found)
    for each in found:
        seen, expected = each.measurement, known.predict(each.measurement.configuration)
        assert expected is not None
        assert seen.failure == expected.failure
        if not seen.failure:
            assert seen.step_seconds == pytest.approx(expected.step_seconds)
            assert seen.peak_bytes == expected.peak_bytes


def test_tables_are_merged_and_a_row_in_both_counts_once(tmp_path):
    one, two, three = row(step_seconds=1.0, count=1), row(step_seconds=2.0, count=1), row(step_seconds=4.0, count=1)
    tables = [table_of(tmp_path / "a.jsonl", one, two), table_of(tmp_path / "b.jsonl", two, three)]
    (found,) = query(tables)
    assert (found.rows, found.measurement.step_seconds, found.measurement.count) == (3, 2.0, 3)


def test_steps_and_shards_are_kept_apart(tmp_path):
    path = table_of(tmp_path / "t.jsonl", row(step_seconds=3.0), row(step_seconds=1.0, shard=True))
    assert [(each.measurement.shard, each.measurement.step_seconds) for each in query([path])] == [
        (False, 3.0),
        (True, 1.0),
    ]
    table = ThroughputTable(path)
    assert [each.step_seconds for each in table.rows(HERE)] == [3.0]
    assert [each.step_seconds for each in table.shards(HERE)] == [1.0]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), 12),
        (Filter(models=(MODEL.digest[:5], "another")), 12),
        (Filter(models=("nothing",)), 0),
        (Filter(hardware="CPU"), 12),
        (Filter(hardware="h100"), 0),
        (Filter(layout="TP2·PP1"), 6),
        (Filter(layout="tp=2 SP"), 3),
        (Filter(layout="Z1,vp=2"), 3),
        (Filter(layout="recompute:full"), 3),
        (Filter(where="global_batch > 4 AND samples_per_second > 20"), 4),
        (Filter(layout="TP2", where="num_microbatches = 4 OR false"), 2),
    ],
)
def test_filters(tmp_path, wanted, expected):
    rows = [row(layout, batch) for layout in LAYOUTS for batch in (4, 8, 16)]
    assert len(query([table_of(tmp_path / "t.jsonl", *rows)], wanted)) == expected


@pytest.mark.parametrize(
    "where", ["no_such_column = 1", "1 +", "true); DROP TABLE rows; --", "len(read_text('/etc/hostname')) > 0"]
)
def test_a_condition_that_cannot_be_is_one_line(tmp_path, where):
    path = table_of(tmp_path / "t.jsonl", row())
    with pytest.raises(ValueError, match="where") as raised:
        query([path], Filter(where=where))
    assert "\n" not in str(raised.value)
    assert path.read_text().count("\n") == 1


def test_a_layout_that_cannot_be_read():
    with pytest.raises(ValueError, match="'xp3' is no degree"):
        Filter(layout="TP2·XP3").condition()


def test_torn_foreign_and_older_lines(tmp_path):
    path = tmp_path / "t.jsonl"
    older = json.loads(row().model_dump_json())
    del older["shard"], older["model"]["experts"], older["peak_bytes"]
    newer = json.loads(row(global_batch=8).model_dump_json()) | {"field_of_the_future": {"a": 1}}
    impossible = json.loads(row(global_batch=16).model_dump_json())
    impossible["configuration"]["layout"]["dp"] = 3
    torn = row(global_batch=16).model_dump_json()[:-30]
    lines = [json.dumps(older), "[]", json.dumps(newer), json.dumps(impossible), "no JSON", "", torn]
    path.write_bytes("\n".join(lines).encode() + b"\xff")
    with pytest.warns(UserWarning, match="skipped 5 of 7 lines"):
        assert [each.measurement.configuration.global_batch for each in query([path])] == [4]
    assert query([path])[0].measurement.model == MODEL


def test_an_empty_table_and_one_that_is_not_there(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    assert query([tmp_path / "empty.jsonl"]) == []
    with pytest.raises(FileNotFoundError):
        query([tmp_path / "none.jsonl"])


def test_what_is_new_is_added_once(tmp_path):
    source = table_of(
        tmp_path / "source.jsonl", measurement(), measurement(global_batch=8), measurement(global_batch=8)
    )
    into = tmp_path / "into.jsonl"
    new = read_new([source, source], into)
    assert new == [measurement(), measurement(global_batch=8)]
    ThroughputTable(into).extend(new)
    assert read_new([source], into) == []
    table_of(source, row(failure="out of memory"))
    assert [each.failure for each in read_new([source], into)] == ["out of memory"]
