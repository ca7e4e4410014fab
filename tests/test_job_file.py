"""The job file: what is wrong with it is said in one line that names field, value and arithmetic."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launch_jobs import copus_here

from copus.job import JobConfig, JobError, dump_job, load_job, parse_job

JOB = """
name: small
model: {layers: 4, hidden: 64, ffn_hidden: 192, heads: 4, kv_heads: 2, seq_len: 32, vocab: 300}
cluster: {accelerators_per_node: 4}
training:
  layout: {tp: 2, dp: 2}
  micro_batch: 2
  global_batch: 8
  tokens: 12800
"""


def load(folder: Path, text: str = JOB, *overrides: str) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(text)
    return load_job(path, list(overrides))


def complaint(folder: Path, text: str = JOB, *overrides: str) -> str:
    """What is said about a job, without the file's name. Always one printable line."""
    with pytest.raises(JobError) as caught:
        load(folder, text, *overrides)
    message = str(caught.value)
    assert message.isprintable(), message
    assert len(message) < 500
    return message.removeprefix(f"{folder}/job.yaml: ")


def test_a_job_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    job = load(tmp_path)
    assert job.training.configuration.label == "TP2·PP1·DP2 B8 m2"
    assert job.total_samples == 400
    assert job.reference_batch == 8
    assert job.planner.min_gain == 0.10


@pytest.mark.parametrize("name", ["1e6", "007", "yes", "null", "2024-01-02", "1_0"])
def test_names_that_yaml_takes_for_something_else_survive(tmp_path: Path, name: str) -> None:
    job = parse_job(yaml.safe_load(JOB) | {"name": name})
    assert load(tmp_path, dump_job(job)) == job


def test_what_is_dumped_is_read_back_the_same(tmp_path: Path) -> None:
    job = load(
        tmp_path,
        JOB,
        "planner.layouts=[{tp: 2, pp: 2}, {dp: 4}]",
        "data.source=[a.txt, b]",
        "training.optimizer.epsilon=1e-12",
    )
    assert load(tmp_path, dump_job(job)) == job


def test_the_flat_optimizer_fields_of_earlier_versions_are_read_and_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(JOB + "  betas: [0.9, 0.99]\n  weight_decay: 0.2\n  optimizer: {epsilon: 1.0e-7}\n")
    lines: list[str] = []
    optimizer = load_job(path, ["training.lr_batch_exponent=1"], notice=lines.append).training.optimizer
    assert (optimizer.betas, optimizer.weight_decay, optimizer.epsilon) == ((0.9, 0.99), 0.2, 1e-7)
    assert optimizer.lr_batch_exponent == 1
    assert len(lines) == 1
    assert "training.betas is now training.optimizer.betas, training.weight_decay is now" in lines[0]
    path.write_text(dump_job(load_job(path)))
    lines.clear()
    assert load_job(path, notice=lines.append).training.optimizer.betas == (0.9, 0.99)
    assert lines == []


def test_a_field_given_by_its_old_and_its_new_name_is_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, JOB, "training.optimizer.betas=[0.9, 0.99]", "training.betas=[0.9, 0.95]")
    assert said == ("training.betas is called training.optimizer.betas now, and both are given: remove training.betas")
    said = complaint(tmp_path, JOB, "training.optimizer=5", "training.betas=[0.9, 0.95]")
    kinds = "adamw, sgd, adafactor, muon or signum"
    assert said == f"training.optimizer: input should be a section whose kind is {kinds}, got 5"


def test_the_precision_is_bf16_on_gpus_unless_the_job_says_otherwise(tmp_path: Path) -> None:
    assert load(tmp_path).training.precision == "fp32"
    on_gpus = load(tmp_path, JOB, "cluster.accelerator=h100-sxm")
    assert on_gpus.training.precision == "bf16"
    assert "precision: bf16" in dump_job(on_gpus)
    asked = load(tmp_path, JOB, "cluster.accelerator=h100-sxm", "training.precision=fp32")
    assert asked.training.precision == "fp32"


def test_a_path_alone_is_a_list_of_one(tmp_path: Path) -> None:
    assert load(tmp_path, JOB, "data.source=a.txt").data.source == [Path("a.txt")]
    assert load(tmp_path, JOB, "data.source=shakespeare").data.source == "shakespeare"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # layout × accelerators
        ("training.layout={tp: 4, dp: 2}", "training.layout: tp(4) × pp(1) × cp(1) × dp(2) = 8 ≠ 4 accelerators"),
        ("planner.layouts=[{dp: 4}, {pp: 2}]", "planner.layouts.1: tp(1) × pp(2) × cp(1) × dp(1) = 2 ≠ 4 accelerators"),
        # heads ÷ TP, and what else tensor parallelism cuts
        ("training.layout={tp: 4}", "training.layout: model.kv_heads(2) ÷ tp(4) is not whole: 0.5"),
        ("model={layers: 4, hidden: 66, ffn_hidden: 128, heads: 3, kv_heads: 3, seq_len: 32, vocab: 300}",
         "training.layout: model.heads(3) ÷ tp(2) is not whole: 1.5"),
        ("model.ffn_hidden=193", "training.layout: model.ffn_hidden(193) ÷ tp(2) is not whole: 96.5"),
        # layers ÷ PP
        ("training={layout: {tp: 1, pp: 4, vp: 2}, global_batch: 8, tokens: 12800}",
         "training.layout: model.layers(4) ÷ pp·vp(8) is not whole: 0.5; nor is it with 2 layers more, for the "
         "embedding and the output layer"),
        # batch ÷ (DP · micro-batch)
        ("training.global_batch=6",
         "training: global_batch(6) ÷ (dp(2) × micro_batch(2)) = 1.5, not a whole number of micro-batches"),
        # the model itself
        ("model.heads=5", "model: hidden(64) ÷ heads(5) is not whole: 12.8"),
        ("model.kv_heads=3", "model: heads(4) ÷ kv_heads(3) is not whole: 1.33333"),
        ("training.tokens=31", "training.tokens(31) is less than one sequence, model.seq_len(32)"),
        ("training.warmup_tokens=12801", "training.warmup_tokens(12801) is more than training.tokens(12800)"),
        ("training.min_lr=0.01", "training.min_lr(0.01) is larger than training.lr(0.001)"),
        ("planner.min_global_batch=2048",
         "planner: min_global_batch(2048) is larger than max_global_batch(1024)"),
        ("training.layout={dp: 4, sequence_parallel: true}",
         "training.layout: sequence_parallel(true) needs tp > 1, but tp = 1"),
    ],
)  # fmt: skip
def test_impossible_arithmetic(tmp_path: Path, override: str, message: str) -> None:
    assert complaint(tmp_path, JOB, override) == message


def test_layers_are_divided_among_the_stages(tmp_path: Path) -> None:
    said = complaint(tmp_path, JOB, "training.layout={pp: 4}", "model.layers=5")
    assert said == (
        "training.layout: model.layers(5) ÷ pp(4) is not whole, and with 2 on every other stage "
        "1 are left for the first and the last one"
    )


def test_the_padded_vocabulary_is_divided_not_the_given_one(tmp_path: Path) -> None:
    load(tmp_path, JOB, "model.vocab=301")  # padded to 384, which two ranks can share
    model = "{layers: 4, hidden: 60, ffn_hidden: 180, heads: 5, kv_heads: 5, seq_len: 32, vocab: 300}"
    layout = "cluster.accelerators_per_node=5", "training.layout={tp: 5}"
    said = complaint(tmp_path, JOB, f"model={model}", *layout)
    assert said == "training.layout: padded vocabulary(384) ÷ tp(5) is not whole: 76.8"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=3", "training.epochs: unknown key"),
        ("trainin.lr=1", "trainin: unknown key; did you mean training?"),
        ("model={layers: 4, hiden: 64}", "model.hiden: unknown key; did you mean hidden?"),
        ("training.optimizer.beta=[0.9, 0.99]", "training.optimizer.beta: unknown key; did you mean betas?"),
        ("training.layout.tensor=2", "training.layout.tensor: unknown key"),
        ("training.tokens=many",
         "training.tokens: input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ("training.tokens=1.5",
         "training.tokens: input should be a valid integer, got a number with a fractional part, got 1.5"),
        ("training.tokens=0", "training.tokens: input should be greater than 0, got 0"),
        ("training.tokens=", "training.tokens: input should be a valid integer, got None"),
        ("training.micro_batch=true", "training.micro_batch: input should be a number, got True"),
        ("training.lr=true", "training.lr: input should be a number, got True"),
        ("training.layout.sequence_parallel=1",
         "training.layout.sequence_parallel: input should be true or false, got 1"),
        ("training.lr=.inf", "training.lr: input should be a finite number, got inf"),
        ("training.lr=.nan", "training.lr: input should be greater than 0, got nan"),
        ("training.optimizer.betas=[0.9, 1.0]", "training.optimizer.betas.1: input should be less than 1, got 1.0"),
        ("training.optimizer.betas=[0.9, 0.8]",
         "training.optimizer: betas: β2(0.8) has to be larger than β1²(0.9² = 0.81)"),
        ("training.optimizer={kind: lion}",
         "training.optimizer: input should be a section whose kind is adamw, sgd, adafactor, muon or signum, got "
         "{'kind': 'lion'}"),
        ("training.optimizer={kind: sgd, betas: [0.9, 0.95]}", "training.optimizer.betas: unknown key"),
        ("training.optimizer=adamw",
         "training.optimizer: input should be a section whose kind is adamw, sgd, adafactor, muon or signum, got "
         "'adamw'"),
        ("training.optimizer.momentum=0.9", "training.optimizer.momentum: unknown key"),
        ("model.ffn_hidden=[1]", "model.ffn_hidden: input should be a valid integer, got [1]"),
        ("model.activation=[1]", "model.activation: input should be 'silu', 'gelu', 'gelu_tanh' or 'squared_relu', "
         "got [1]"),
        ("training.layout=5", "training.layout: input should be a valid dictionary or instance of Layout, got 5"),
        ("training.decay=cubic",
         "training.decay: input should be 'constant', 'cosine', 'linear', 'wsd' or 'inverse-sqrt', got 'cubic'"),
        ("data.bos_token=''", "data.bos_token: string should have at least 1 character, got ''"),
        ("data.eos_token=''", "data.eos_token: string should have at least 1 character, got ''"),
        ("data.processes=1025", "data.processes: input should be less than or equal to 1024, got 1025"),
        ("launch.options={partition: long}", "launch.options: partition: unknown key"),
        ("planner.policy=best",
            "planner.policy: input should be 'goodput', 'copus', "
            "'static', 'smallest-saturating', 'norm-test', 'cbs', 'cbs-doubling', 'ramp', 'seesaw' or 'late-switch', "
            "got 'best'"),
    ],
)  # fmt: skip
def test_unknown_keys_and_wrong_types(tmp_path: Path, override: str, message: str) -> None:
    assert complaint(tmp_path, JOB, override) == message


@pytest.mark.parametrize(
    "name",
    ["", "../evil", "a/b", ".hidden", "-rf", "a b", "a\nb", "a\n", "a;reboot", "$(id)", "ä", "x" * 65, "\x1b[2J"],
)
def test_names_that_are_no_folder_names_are_refused(name: str) -> None:
    values = yaml.safe_load(JOB) | {"name": name}
    with pytest.raises(JobError, match=r"^job: name: string should match pattern") as caught:
        parse_job(values)
    assert str(caught.value).isprintable()


def test_missing_fields_are_named(tmp_path: Path) -> None:
    assert complaint(tmp_path, JOB.replace("  tokens: 12800\n", "")) == "training.tokens: Field required"
    assert complaint(tmp_path, JOB.replace("name: small", "")) == "name: Field required"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a job file is a mapping of sections, got NoneType"),
        ("- 1", "a job file is a mapping of sections, got list"),
        ("name: [", "not YAML: "),
        ("name: !!python/object:os.system x", "not YAML: could not determine a constructor"),
        ("name: 2024-13-45", "not YAML: month must be in 1..12"),
        ("\x00", "not YAML: "),
        ("[" * 500, "not YAML: "),
        (JOB + "name: other", "not YAML: the key 'name' stands twice"),
        (JOB + "  tokens: 5", "not YAML: the key 'tokens' stands twice"),
        (JOB + '"a\\nb\\e[2J": 1', "a�b�[2J: unknown key"),
        (JOB + "data: {held_out: &a [*a]}", "not YAML: line 10: a value that contains itself"),
        (JOB + "1: 2", "1: keys should be strings, got 1"),
    ],
)
def test_files_that_are_no_job(tmp_path: Path, text: str, message: str) -> None:
    assert complaint(tmp_path, text).startswith(message)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=f"^{re.escape(str(tmp_path))}/no.yaml: No such file or directory$"):
        load_job(tmp_path / "no.yaml")
    with pytest.raises(JobError, match="Is a directory"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe4")
    with pytest.raises(JobError, match="not YAML: 'utf-8' codec"):
        load_job(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lr", "--set training.lr: expected section.field=value"),
        ("=1", "--set =1: expected section.field=value"),
        ("name.first=1", "--set name.first=1: name is not a section"),
        ("training.layout.tp.a=1", "--set training.layout.tp.a=1: training.layout.tp is not a section"),
        ("training.lr=[1", "--set training.lr=[1: not YAML: "),
    ],
)
def test_overrides_that_do_not_apply(tmp_path: Path, override: str, message: str) -> None:
    assert complaint(tmp_path, JOB, override).startswith(message)


def test_overrides_make_sections_and_touch_nothing_else(tmp_path: Path) -> None:
    text = JOB + "planner:\n  layouts: [&one {tp: 2, dp: 2}]\n" + "launch:\n"
    text = text.replace("layout: {tp: 2, dp: 2}", "layout: &one {tp: 2, dp: 2}").replace(
        "&one {tp: 2, dp: 2}]", "*one]"
    )
    job = load(
        tmp_path, text, "training.layout.tp=1", "training.layout.pp=2", "launch.max_restarts=2", "profile.steps=4"
    )
    assert job.training.layout.label == "TP1·PP2·DP2"
    assert job.planner.layouts is not None
    assert job.planner.layouts[0].label == "TP2·PP1·DP2"  # the anchor's other use
    assert (job.launch.max_restarts, job.profile.steps) == (2, 4)


def refusal(values: dict[str, Any]) -> str | None:
    """What is said about plain values; None if they are a job."""
    try:
        parse_job(values)
    except JobError as error:
        return str(error)
    return None


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(values: dict[str, Any], before: str = "") -> Iterator[str]:
    """Every section and field of a job."""
    for name, value in values.items():
        yield before + name
        if isinstance(value, dict):
            yield from places(value, f"{before}{name}.")


fields = st.sampled_from([*places(parse_job(yaml.safe_load(JOB)).model_dump(mode="json")), "training.betas"])


@given(field=fields, value=plain)
def test_whatever_stands_in_a_field_is_a_job_or_one_line(field: str, value: Any) -> None:
    values = yaml.safe_load(JOB)
    *sections, name = field.split(".")
    inner = values
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[name] = value
    said = refusal(values)
    assert said is None or (said.isprintable() and field.split(".")[0] in said)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        (JOB, ["--set", "training.layout.tp=3"]),
        (JOB + "oops: 1", []),
        ("name: [", []),
        (JOB.replace("small", "../../evil"), []),
    ],
)
def test_the_command_exits_2_with_one_line_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text(text)
    assert copus_here("submit", "job.yaml", *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert re.fullmatch(r"copus: job\.yaml: [^\n]+\n", errors)
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_what_the_backend_cannot_do_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "name: limits\n"
        "model: {layers: 2, hidden: 32, ffn_hidden: 64, heads: 4, kv_heads: 4, seq_len: 16, vocab: 250}\n"
        "cluster: {accelerators_per_node: 2}\n"
        "training: {layout: {dp: 2}, global_batch: 8, tokens: 10000}\n"
    )
    with pytest.raises(JobError) as caught:
        load_job(path, ["training.layout={dp: 2, zero: 3}"])
    assert "zero(3) is not supported by the megatron backend" in str(caught.value)
    assert "\n" not in str(caught.value)
