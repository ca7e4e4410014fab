"""Bad job files: each is refused with exit code 2 and one line that says what to mend, and leaves nothing behind."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from launch_events import start, write_run
from launch_jobs import copus_here, copus_process, write_job

from copus.data.prepared import prepared_path
from copus.job import load_job
from launch.engines import LocalEngine

pytestmark = pytest.mark.timeout(30)  # huge numbers and pipes without a writer are refused, not waited for

Prepare = Callable[[Path], object]
HUGE = str(10**30)


@dataclass(frozen=True)
class Bad:
    """Something wrong with a job."""

    name: str
    """Of the test."""
    words: str
    """Part of the line that is printed."""
    overrides: tuple[str, ...] = ()
    """Given with --set."""
    prepare: Prepare = lambda folder: None
    """What is done to the folder before."""


def rewritten(change: Callable[[str], str | bytes]) -> Prepare:
    """The job file with another content."""

    def write(folder: Path) -> None:
        path = folder / "job.yaml"
        content = change(path.read_text())
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def replaced(name: str, make: Callable[[Path], object]) -> Prepare:
    """A file of the folder replaced by something else, or made."""

    def write(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return write


def named(name: str) -> Prepare:
    """The job file with that name of the job, in YAML's double quotes."""
    return rewritten(lambda text: text.replace("name: small", f'name: "{name}"'))


def appended(text: str | bytes) -> Prepare:
    """The job file with more at its end."""
    return rewritten(lambda job: job.encode() + (text if isinstance(text, bytes) else text.encode()))


def bomb(lines: int, width: int, form: str) -> str:
    """Aliases of aliases: `lines` lines that stand for width ** lines values."""
    first = "b0: &b0 {k: v}\n" if "<<" in form else "b0: &b0 [v]\n"
    return first + "".join(
        f"b{n}: &b{n} {form.format(', '.join([f'*b{n - 1}'] * width))}\n" for n in range(1, lines + 1)
    )


TYPES = [
    Bad("a word for a number", "training.tokens: input should be a valid integer", ("training.tokens=many",)),
    Bad(
        "a list for a number", "training.global_batch: input should be a valid integer", ("training.global_batch=[4]",)
    ),
    Bad("a number for a section", "training: input should be a valid dictionary", ("training=5",)),
    Bad(
        "true for a number", "training.micro_batch: input should be a number, got True", ("training.micro_batch=true",)
    ),
    Bad("a mapping for a path", "launch.runs: ", ("launch.runs={a: b}",)),
    Bad("a mapping for a list", "data.held_out: input should be a valid list", ("data.held_out={a: b}",)),
    Bad("bytes that are no text", "name: ", ("name=!!binary /w==",)),
    Bad("an unknown section", "trainin: unknown key", ("trainin.lr=1",)),
    Bad("an unknown key", "training.epochs: unknown key", ("training.epochs=3",)),
    Bad("an unknown choice", "planner.policy: input should be", ("planner.policy=best",)),
    Bad("an unknown engine", "launch.engine", ("launch.engine=cloud",)),
    Bad(
        "an unknown profiler",
        "profile: no profiler 'crystal' is installed; there are live",
        ("profile.profiler=crystal",),
    ),
    Bad("options of an unknown profiler", "no profiler 'crystal'", ("profile={profiler: crystal, options: {a: 1}}",)),
    Bad(
        "an unknown option of a profiler",
        "profile: options: the live profiler takes none, got colour",
        ("profile.options={colour: red}",),
    ),
    Bad("no section of that name", "name is not a section", ("name.first=1",)),
    Bad("no value", "--set training.lr: expected section.field=value", ("training.lr",)),
    Bad("a line break in an override", "--set training.lr�a: expected", ("training.lr\na",)),
]

ARITHMETIC = [
    Bad("ranks that are not there", "tp(4) × pp(1) × cp(1) × dp(2) = 8 ≠ 2", ("training.layout={tp: 4, dp: 2}",)),
    Bad("heads that cannot be split", "model.kv_heads(1) ÷ tp(2) is not whole: 0.5", ("model.kv_heads=1",)),
    Bad(
        "layers that cannot be split",
        "model.layers(1) ÷ pp(2) is not whole",
        ("model.layers=1", "training.layout={pp: 2}"),
    ),
    Bad("an odd width", "hidden(66) ÷ heads(4) is not whole", ("model.hidden=66",)),
    Bad(
        "a micro-batch that does not divide", "global_batch(4) ÷ (dp(1) × micro_batch(3))", ("training.micro_batch=3",)
    ),
    Bad("limits that exclude every layout", "planner: tp(3), global batches", ("planner.tp=3",)),
    Bad(
        "limits that exclude every batch",
        "planner: global batches from 33 to 63, multiples of batch_multiple(1)",
        ("planner={min_global_batch: 33, max_global_batch: 63}",),
    ),
    Bad(
        "replicas to compare, and only one",
        "planner: noise_source(replica) compares data parallel replicas, and training.layout.dp is 1",
        ("planner.noise_source=replica",),
    ),
    Bad(
        "replicas to compare, and only one, for a job that never moves",
        "training.layout.dp is 1: the noise scale would never be known; set another noise_source",
        ("planner.noise_source=replica", "planner.policy=static"),
    ),
    Bad(
        "steps of one sequence, whose noise cannot be seen",
        "training.micro_batch(1), which is not even and cannot be halved: policy(norm-test) would never know",
        ("training.global_batch=1", "planner.policy=norm-test"),
    ),
    Bad("limits in the wrong order", "min_global_batch(2048) is larger than", ("planner.min_global_batch=2048",)),
    Bad(
        "no accelerator",
        "cluster.accelerators_per_node: input should be greater than 0, got 0",
        ("cluster.accelerators_per_node=0",),
    ),
    Bad("a negative size", "model.hidden: input should be greater than 0, got -64", ("model.hidden=-64",)),
    Bad("not a number", "training.lr: input should be greater than 0, got nan", ("training.lr=.nan",)),
    Bad("not a number, where any will do", "planner.min_gain: ", ("planner.min_gain=.nan",)),
    Bad("infinite", "training.lr: input should be a finite number, got inf", ("training.lr=.inf",)),
    Bad(
        "evaluations that ranks cannot share",
        "training.evaluate_sequences(63) ÷ 2 accelerators is not whole: 31.5",
        ("training.evaluate_sequences=63",),
    ),
    Bad(
        "a batch longer than the run", "global_batch(4096) is more than the whole run", ("training.global_batch=4096",)
    ),
    Bad(
        "a machine too many",
        "cluster.nodes(2): launch.engine(local) runs on one machine",
        ("cluster.nodes=2", "training.layout={tp: 2, dp: 2}"),
    ),
]

SIZES = [
    Bad("10^30 layers", "model.layers: input should be less than or equal to", (f"model.layers={HUGE}",)),
    Bad("10^30 layers in quotes", "model.layers: ", (f"model.layers='{HUGE}'",)),
    Bad("10^30 tokens", "training.tokens: ", (f"training.tokens={HUGE}",)),
    Bad("10^400 in a product", "training.layout.dp: ", (f"training.layout.dp={10**399}",)),
    Bad("a number of 10,000 digits", "a number of 10000 digits", (f"training.tokens={'1' * 10_000}",)),
    Bad("a number of 10,000 hexadecimal digits", "digits", (f"training.tokens=0x{'f' * 10_000}",)),
    Bad("a number of 10,000 digits in quotes", "training.tokens: ", (f"training.tokens='{'1' * 10_000}'",)),
    Bad("10^5 layers", "model.layers: ", ("model.layers=100000",)),
    Bad(
        "a model larger than the machine",
        "this machine has",
        ("model.layers=10000", "model.hidden=65536", "model.ffn_hidden=262144"),
    ),
    Bad(
        "a micro-batch larger than the machine",
        "training.micro_batch(1073741824)",
        ("training={micro_batch: 1073741824, global_batch: 1073741824, tokens: 34359738368, layout: {tp: 2}}",),
    ),
    Bad(
        "ten thousand ranks",
        "more than 8 ranks for each of this machine's",
        (
            "cluster.accelerators_per_node=10000",
            "training={layout: {dp: 10000}, global_batch: 10000, tokens: 320000, evaluate_sequences: 10000}",
            "planner.policy=static",
        ),
    ),
    Bad("a million ranks", "cluster.accelerators_per_node: ", ("cluster.accelerators_per_node=1000000",)),
    Bad("10^10 passes over the text", "times the 100000 tokens", (f"training.tokens={10**15}",)),
    Bad(
        "10^10 evaluations", "training.evaluate_sequences(20000000000)", (f"training.evaluate_sequences={2 * 10**10}",)
    ),
    Bad("a vocabulary of 10^15", "model.vocab: ", (f"model.vocab={10**15}",)),
    Bad("a timeout of 10^300 s", "launch.timeout_seconds: ", ("launch.timeout_seconds=1e300",)),
    Bad("10^9 threads", "launch.threads_per_rank: ", ("launch.threads_per_rank=1000000000",)),
    Bad("a seed of 10^30", "training.seed: ", (f"training.seed={HUGE}",)),
]

NAMES = [
    Bad("a command in the name", "name: string should match pattern", prepare=named("; touch pwned; rm -rf .")),
    Bad("a substitution in the name", "name: string should match pattern", prepare=named("$(touch pwned)")),
    Bad("backquotes in the name", "name: string should match pattern", prepare=named("`touch pwned`")),
    Bad("a line break in the name", "name: string should match pattern", prepare=named("a\\ntouch pwned")),
    Bad("a way out in the name", "name: string should match pattern", prepare=named("../../pwned")),
    Bad("a very long name", "name: string should match pattern", prepare=named("x" * 5000)),
    Bad("text that runs backwards in the name", "name: string should match pattern", prepare=named("\\u202egnp.exe")),
    Bad("a terminal's control codes in a key", "unknown key", prepare=appended('"a\\e[2Jb\\nc": 1\n')),
    Bad("a command in a path", "data.source: no such file or folder: ", ("data.source=['$(touch pwned)']",)),
    Bad("a command in a pattern", "data.held_out: '; touch pwned' matches none", ("data.held_out=['; touch pwned']",)),
    Bad("a line break in an engine", "launch.engine", ('launch.engine="local\\n; touch pwned"',)),
    Bad("a line break in a profiler", "no profiler", ('profile.profiler="live\\n; touch pwned"',)),
]

YAML = [
    Bad("an empty file", "a job file is a mapping of sections, got NoneType", prepare=rewritten(lambda text: "")),
    Bad("a list", "a job file is a mapping of sections, got list", prepare=rewritten(lambda text: "- 1\n- 2\n")),
    Bad("half a file", "not YAML: ", prepare=rewritten(lambda text: text + "planner: {policy: copus")),
    Bad("a key that stands twice", "the key 'name' stands twice, line ", prepare=appended("name: other\n")),
    Bad("two documents", "not YAML: expected a single document", prepare=appended("---\nname: other\n")),
    Bad(
        "a Python object",
        "not YAML: could not determine a constructor",
        prepare=appended("planner: !!python/object/apply:os.system ['touch pwned']\n"),
    ),
    Bad("a Python name", "not YAML: could not determine a constructor", ("training.lr=!!python/name:os.system",)),
    Bad("a tag that nobody knows", "not YAML: could not determine a constructor", ("training.lr=!secret x",)),
    Bad("an explosion of lists", "its aliases stand for more than", prepare=appended(bomb(9, 9, "[{}]"))),
    Bad("an explosion of keys", "its aliases stand for more than", prepare=appended(bomb(9, 9, "{{<<: [{}]}}"))),
    Bad(
        "an explosion in options",
        "its aliases stand for more than",
        prepare=appended(f"x: {{{', '.join(bomb(12, 9, '[{}]').splitlines())}}}\n"),
    ),
    Bad(
        "a value that contains itself",
        "a value that contains itself",
        prepare=appended("planner: {layouts: &a [*a]}\n"),
    ),
    Bad("brackets in brackets", "not YAML: too many brackets", prepare=rewritten(lambda text: "[" * 600)),
    Bad("a file too long", "a job file has at most 262144", prepare=appended("#" * 300_000)),
    Bad("an octal number", "0500000 is octal in YAML, 163840: write it without the 0", ("training.tokens=0500000",)),
    Bad("an octal number with a sign", "+0_17 is octal in YAML, 15", ("training.tokens=+0_17",)),
    Bad(
        "a time of day for a number", "1:30:00 is a number to the base 60 in YAML", ("profile.budget_seconds=1:30:00",)
    ),
    Bad("minutes for a number", "1:30.5 is a number to the base 60", ("launch.timeout_seconds=1:30.5",)),
    Bad("a date that there is not", "not YAML: month must be in 1..12", ("name=2024-13-45",)),
    Bad("Latin-1", "not YAML: 'utf-8' codec", prepare=appended("# ä".encode("latin-1"))),
    Bad("UTF-16", "not YAML: 'utf-8' codec", prepare=rewritten(lambda text: text.encode("utf-16"))),
    Bad("binary", "not YAML: ", prepare=rewritten(lambda text: b"\x7fELF\x02\x01\x01\0\0")),
    Bad("a folder", "job.yaml: Is a directory", prepare=replaced("job.yaml", Path.mkdir)),
    Bad("a pipe", "job.yaml: not a regular file", prepare=replaced("job.yaml", os.mkfifo)),
    Bad(
        "a device",
        "job.yaml: not a regular file",
        prepare=replaced("job.yaml", lambda path: path.symlink_to("/dev/zero")),
    ),
    Bad("nothing", "job.yaml: No such file or directory", prepare=replaced("job.yaml", lambda path: None)),
]

FILES = [
    Bad("text that is not there", "/nope.txt (the only corpus with a name", ("data.source=[nope.txt]",)),
    Bad(
        "a corpus with a misspelt name",
        "/shakespear (the only corpus with a name is `shakespeare`)",
        ("data.source=shakespear",),
    ),
    Bad("a number for text", "data.source.list: input should be a valid list, got 5", ("data.source=5",)),
    Bad("NUL in a path of text", "data.source.list.0: a path has no NUL character in it", ('data.source="a\\0b"',)),
    Bad("no text at all", "data.source: an empty list", ("data.source=[]",)),
    Bad("an empty corpus", "data.source: no text in", ("data.source=[empty]",), replaced("empty", Path.touch)),
    Bad(
        "blank text",
        "data.source: no text in",
        ("data.source=[blank]",),
        replaced("blank", lambda path: path.write_text(" \n\t\n")),
    ),
    Bad(
        "a folder without text",
        "data.source: no .txt, .md, .text, .jsonl, .ndjson, .jl file in the folder",
        ("data.source=[images]",),
        replaced("images", Path.mkdir),
    ),
    Bad(
        "binary text",
        "/binary.txt: not UTF-8 text",
        ("data.source=[binary.txt, one.txt]",),
        replaced("binary.txt", lambda path: path.write_bytes(bytes(range(256)))),
    ),
    Bad(
        "UTF-16 text",
        "not UTF-8 text",
        ("data.source=[wide.txt, one.txt]",),
        replaced("wide.txt", lambda path: path.write_text("to be", encoding="utf-16")),
    ),
    Bad(
        "a pipe for text",
        "/pipe is neither a regular file nor a folder",
        ("data.source=[pipe]",),
        replaced("pipe", os.mkfifo),
    ),
    Bad(
        "JSONL that is none",
        "/bad.jsonl:2: not JSON",
        ("data.source=[bad.jsonl]",),
        replaced("bad.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text\n')),
    ),
    Bad(
        "JSONL without text",
        'expected an object with a string "text"',
        ("data.source=[bad.jsonl]",),
        replaced("bad.jsonl", lambda path: path.write_text('{"txet": "a"}\n')),
    ),
    Bad(
        "one word alone",
        "data.held_out: the source is one work (word)",
        ("data.source=[word.txt]", "data.held_out=[]"),
        replaced("word.txt", lambda path: path.write_text("antidisestablishmentarianism")),
    ),
    Bad(
        "held-out works that there are not",
        "data.held_out: 'hamlet' matches none of the 2 works",
        ("data.held_out=[hamlet]",),
    ),
    Bad("everything held out", "data.held_out: ['*'] takes all 2 works", ("data.held_out=['*']",)),
    Bad("a vocabulary without bytes", "model.vocab(100) is less than 256 bytes", ("model.vocab=100",)),
    Bad("a tokenizer that is not there", "nope.json: No such file", ("data.tokenizer=nope.json",)),
    Bad(
        "a garbage tokenizer",
        "data.tokenizer: cannot read",
        ("data.tokenizer=garbage.json",),
        replaced("garbage.json", lambda path: path.write_bytes(b"\0\xff{]")),
    ),
    Bad(
        "a tokenizer of another kind",
        "data.tokenizer: cannot read",
        ("data.tokenizer=other.json",),
        replaced("other.json", lambda path: path.write_text('{"version": "1.0", "model": {"type": "Magic"}}')),
    ),
    Bad("a folder for a tokenizer", "not a regular file", ("data.tokenizer=.",)),
    Bad("a pipe for a tokenizer", "not a regular file", ("data.tokenizer=pipe",), replaced("pipe", os.mkfifo)),
    Bad("a device for a tokenizer", "not a regular file", ("data.tokenizer=/dev/zero",)),
    Bad(
        "a calibration that is not there",
        "planner.critical_batch_factor: ",
        ("planner.critical_batch_factor=nope.json",),
    ),
    Bad("a calibration that is none", "not a file of `copus calibrate`", ("planner.critical_batch_factor=one.txt",)),
    Bad(
        "a pipe for a calibration",
        "not a regular file",
        ("planner.critical_batch_factor=pipe",),
        replaced("pipe", os.mkfifo),
    ),
    Bad("a folder for a table", "profile.table(", ("profile.table=.",)),
    Bad("a pipe for a table", "profile.table(", ("profile.table=pipe",), replaced("pipe", os.mkfifo)),
    Bad("a table below a file", "profile.table(", ("profile.table=one.txt/table.jsonl",)),
    Bad("a file for a folder of runs", "launch.runs(", ("launch.runs=one.txt",)),
    Bad("runs below a file", "launch.runs(", ("launch.runs=one.txt/runs",)),
    Bad("runs where nobody may write", "launch.runs(/proc/copus)", ("launch.runs=/proc/copus",)),
    Bad("a user that there is not", "there is no user '~nobody-of-that-name'", ("data.cache=~nobody-of-that-name/x",)),
    Bad("NUL in a path", "launch.runs: a path has no NUL character in it", ('launch.runs="a\\0b"',)),
    Bad("a lone surrogate in a path", "launch.runs: ", ('launch.runs="a\\ud800b"',)),
    Bad("a path of 5,000 letters", "profile.table: ", (f"profile.table={'x' * 5000}",)),
]

ALL = [*TYPES, *ARITHMETIC, *SIZES, *NAMES, *YAML, *FILES]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good job; whatever is left behind anywhere would be in it."""
    write_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)

    def start(*arguments: object, **options: object) -> None:
        raise AssertionError("workers are started")

    monkeypatch.setattr(LocalEngine, "start", start)
    return tmp_path


def contents(folder: Path) -> set[tuple[Path, int]]:
    """Everything below a folder."""
    return {(path, path.lstat().st_mtime_ns if path.is_file() else 0) for path in folder.rglob("*")}


def check_line(errors: str, output: str, words: str) -> None:
    """One line for people on stderr, and nothing else."""
    assert output == ""
    assert errors.startswith("copus: "), errors
    assert errors.count("\n") == 1, errors
    assert errors[:-1].isprintable()
    assert len(errors) < 1100
    assert words.lower() in errors.lower(), errors


@pytest.mark.parametrize("bad", ALL, ids=lambda bad: bad.name)
def test_a_bad_job_is_refused_in_one_line(bad: Bad, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad.prepare(folder)
    before = contents(folder)
    arguments = [part for override in bad.overrides for part in ("--set", override)]
    code = copus_here("submit", "job.yaml", *arguments)
    output, errors = capfd.readouterr()
    assert code == 2, (output, errors)
    check_line(errors, output, bad.words)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("tokens", "policy", "warned"),
    [(5120, "copus", True), (5120 + 32, "copus", False), (5120, "static", False), (5120, "ramp", False)],
)
def test_a_job_that_ends_before_the_noise_scale_is_known_is_warned_of(
    tokens: int, policy: str, warned: bool, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [f"training.tokens={tokens}", f"planner.policy={policy}", "training.global_batch=8"]
    arguments = [part for change in changes for part in ("--set", change)]
    assert copus_here("submit", "job.yaml", "--dry-run", *arguments) == 0
    errors = capfd.readouterr().err
    words = (
        "copus: warning: planner: nothing will be decided: the noise scale is known after 20 steps × "
        "training.global_batch(8) = 160 sequences, and the job has 160\n"
    )
    assert errors == (words if warned else "")


@pytest.mark.parametrize("command", ["plan", "data", "profile", "simulate"])
@pytest.mark.parametrize(
    "bad",
    [
        Bad("10^30 layers", "model.layers: ", (f"model.layers={HUGE}",)),
        Bad("a layout that is none", "≠ 2 accelerators", ("training.layout={dp: 4}",)),
        Bad("an explosion", "its aliases stand for more than", prepare=appended(bomb(9, 9, "[{}]"))),
        Bad("a pipe for a job", "job.yaml: not a regular file", prepare=replaced("job.yaml", os.mkfifo)),
        Bad("a pipe for a table", "profile.table(", ("profile.table=pipe",), replaced("pipe", os.mkfifo)),
    ],
    ids=lambda bad: bad.name,
)
def test_every_command_that_reads_a_job_refuses_it(
    command: str, bad: Bad, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad.prepare(folder)
    before = contents(folder)
    arguments = [part for override in bad.overrides for part in ("--set", override)]
    noise = ["--noise", "4:64"] if command == "simulate" else []
    assert copus_here(command, "job.yaml", *arguments, *noise) == 2
    output, errors = capfd.readouterr()
    check_line(errors, output, bad.words)
    assert contents(folder) == before


def test_data_that_nobody_may_write_to_is_refused_before_a_launch(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    prepared = prepared_path(load_job(folder / "job.yaml"))
    access = os.access
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != prepared and access(path, mode))
    before = contents(folder)
    assert copus_here("submit", "job.yaml") == 2
    output, errors = capfd.readouterr()
    check_line(errors, output, f"data.cache: {prepared} cannot be written to, and the order of samples is kept in it")
    assert contents(folder) == before
    assert copus_here("data", "job.yaml") == 0, "which only says where it is"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("GLOO_SOCKET_IFNAME", "eth99"), ("GLOO_SOCKET_IFNAME", "lo,eth99")],
)
def test_a_network_interface_that_is_not_there_is_refused(
    variable: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    before = contents(folder)
    assert copus_here("submit", "job.yaml") == 2
    output, errors = capfd.readouterr()
    check_line(errors, output, f"{variable}({value}): this machine has no network interface eth99")
    assert contents(folder) == before


def test_a_plan_of_the_largest_cluster_is_no_wait(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a job file may say is planned, however large: 10^5 nodes, and batches up to 2^53."""
    sizes = ["cluster={nodes: 100000, accelerators_per_node: 10000, accelerator: h100-sxm}"]
    sizes += [f"planner.max_global_batch={2**53}", f"training.tokens={2**53}", f"training.global_batch={10**9}"]
    sizes += ["training.layout={dp: 1000000000}", f"training.evaluate_sequences={10**9}", "planner.policy=static"]
    code = copus_here("plan", "job.yaml", *(part for size in sizes for part in ("--set", size)))
    output, errors = capfd.readouterr()
    assert code == 0, errors
    assert "100000" in output


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(
            (command, "data.cache: there is no home directory for ~/.cache/copus")
            for command in ("submit", "plan", "data")
        ),
        ("profile run", "data.cache: there is no home directory"),
        ("submit --set data.cache=cache", "profile.table: there is no home directory"),
        ("profile show", "there is no home directory: set HOME"),
        ("profile import rows.csv", "there is no home directory: set HOME"),
        ("runs ~/runs", "there is no home directory: set HOME"),
    ],
)
def test_a_user_without_a_home_directory_is_told_so(
    command: str, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in a container whose user has no entry in /etc/passwd: the defaults of paths begin with `~`."""

    def no_entry(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", no_entry)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    del job["data"]["cache"], job["profile"]
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    before = contents(folder)
    arguments = command.split()
    wants_job = arguments[0] in ("submit", "plan", "data") or arguments[:2] == ["profile", "run"]
    assert copus_here(*arguments, *(["job.yaml"] if wants_job else [])) == 2
    output, errors = capfd.readouterr()
    check_line(errors, output, words)
    assert contents(folder) == before


RUNS: list[tuple[str, str, Prepare, str]] = [
    ("missing", "nothing", lambda folder: None, "no run nothing: neither nothing nor runs/nothing is a folder"),
    ("empty", "", lambda folder: None, "no run : neither"),
    ("a file", "one.txt", lambda folder: None, "no run one.txt"),
    ("an empty folder", "tmp", lambda folder: None, "no run tmp"),
    ("a very long name", "x" * 5000, lambda folder: None, "File name too long"),
    ("a stranger's home", "~nobody-of-that-name", lambda folder: None, "no run ~nobody-of-that-name"),
    ("control codes", "a\x1b[2J\nb", lambda folder: None, "no run a�[2J"),
    ("no events", "runs/small", lambda folder: None, ""),
    ("a folder for events", "runs/small", lambda folder: (folder / "events.jsonl").mkdir(), "not a regular file"),
    ("a pipe for events", "runs/small", lambda folder: os.mkfifo(folder / "events.jsonl"), "not a regular file"),
    ("garbage events", "runs/small", lambda folder: (folder / "events.jsonl").write_bytes(b"\0\xff{]\n" * 9), ""),
    ("a torn event", "runs/small", lambda folder: (folder / "events.jsonl").write_bytes(b'{"type":"step","st'), ""),
    ("events without steps", "runs/small", lambda folder: write_run(folder, start()), ""),
]
READERS = ["explain RUN", "plot RUN", "calibrate RUN", "simulate job.yaml --like RUN"]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(("run", "prepare", "words"), [case[1:] for case in RUNS], ids=[case[0] for case in RUNS])
def test_a_run_that_cannot_be_read_is_one_line(
    reader: str, run: str, prepare: Prepare, words: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs/small").mkdir(parents=True)
    (folder / "runs/small/job.yaml").write_text((folder / "job.yaml").read_text())
    prepare(folder / "runs/small")
    before = contents(folder)
    assert copus_here(*(run if part == "RUN" else part for part in reader.split())) == 2
    output, errors = capfd.readouterr()
    check_line(errors, output, words)
    assert contents(folder) == before


def test_the_real_command_says_the_same(folder: Path) -> None:
    (folder / "one.txt").write_text("to be or not to be")  # other text than what is prepared, and not enough of it
    before = contents(folder)
    for words, arguments in (
        ("name: string should match pattern", ["--set", "name='$(touch pwned)'"]),
        ("model.vocab(384): the training text has no more than", []),  # found by the process that prepares the data
    ):
        result = copus_process("submit", "job.yaml", *arguments, cwd=folder)
        assert result.returncode == 2, result.stderr
        check_line(result.stderr, result.stdout, words)
        assert contents(folder) == before
