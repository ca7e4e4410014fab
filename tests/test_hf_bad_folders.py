"""What is wrong with a folder of weights is said in one line, before anything starts, and nothing half made is left."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from copus.checkpoints.files import FOLDER
from copus.checkpoints.sharded import Chunk, SavedFiles, SavedState, write_index
from copus.job import JobConfig, JobError, dump_job, load_job, parse_job
from copus.manifest import describe, files_of, write_manifest
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.weights import __main__ as exporting
from copus.weights import trained
from copus.weights.families import state_shape, weights_of
from copus.weights.saved import begin
from copus.weights.source import with_tokenizer
from launch.cli import main
from launch.resume import settled
from launch.weights import check_weights
from tests.pretrained import save_tiny, tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which nothing is wrong, with a tokenizer of three tokens."""
    folder = save_tiny("llama", tmp_path_factory.mktemp("whole") / "llama")
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    shutil.copytree(whole, tmp_path / "llama")
    return tmp_path / "llama"


def _job(whole: Path, init_from: Path, model: dict[str, Any] | None = None, **data: Any) -> JobConfig:
    return parse_job(
        {
            "name": "tuned",
            "model": {"from": str(whole), "seq_len": 16, **(model or {})},
            "data": data,
            "cluster": {"accelerators_per_node": 1},
            "training": {"init_from": str(init_from), "global_batch": 4, "tokens": 1000},
        }
    )


def _first(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def _truncate(folder: Path) -> None:
    path = _first(folder)
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(_first(folder))
        change(tensors)
        save_file(tensors, _first(folder))

    return rewrite


def _shorten(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name][1:].clone()


def _round(tensors: dict[str, torch.Tensor]) -> None:
    name = min(tensors)
    tensors[name] = tensors[name].to(torch.int8)


def _edit(file: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return edit


def _loop(folder: Path) -> None:
    _first(folder).unlink()
    _first(folder).with_name("other").symlink_to(folder / "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors.index.json").symlink_to(folder / "other2")
    (folder / "other2").symlink_to(folder / "model.safetensors.index.json")


def _only_pickles(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


INDEX = "model.safetensors.index.json"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut off": (_truncate, r"is cut off: \d+ bytes, and its header says \d+"),
    "a header that is none": (lambda it: _first(it).write_bytes(b"x" * 100), "is cut off, or no safetensors file"),
    "an empty file": (lambda it: _first(it).write_bytes(b""), "is cut off, or no safetensors file"),
    "a file is missing": (lambda it: _first(it).unlink(), "is not complete: model.safetensors.index.json names model-"),
    "another shape": (_rewrite(_shorten), r"is \[\d+, 32\] in model-.*, and the model's is \[130, 32\]"),
    "quantized": (_rewrite(_round), "is of type I8; weights of type F32, BF16, F16 are read"),
    "a tensor is missing": (
        _rewrite(lambda it: it.pop(min(it))),
        "has no model.embed_tokens.weight: the weights are of another model, or not complete",
    ),
    "one too many": (_rewrite(lambda it: it.update(x=torch.ones(1))), "has x, which the model does not have"),
    "an index with another folder": (
        _edit(INDEX, lambda it: it["weight_map"].update(x="../x.safetensors")),
        "points to ../x.safetensors, which is not a file of its folder",
    ),
    "an index with a name that no file can have": (
        _edit(INDEX, lambda it: it["weight_map"].update(x="a\0b")),
        "is not complete: model.safetensors.index.json names",
    ),
    "an index that is none": (_edit(INDEX, lambda it: it.pop("weight_map")), "it has no weight_map"),
    "a symbolic link to itself": (_loop, "Too many levels of symbolic links"),
    "a file that is a symbolic link to itself": (
        lambda it: (name := _first(it).name, _first(it).unlink(), (it / name).symlink_to(name)),
        "model-00001-of-.*: Too many levels of symbolic links",
    ),
    "pickles": (_only_pickles, "pytorch_model.bin is a pickle, which could run code"),
    "an unknown architecture": (
        _edit("config.json", lambda it: it.update(model_type="mamba")),
        r"model_type\(mamba\) is unknown",
    ),
    "another model": (
        _edit("config.json", lambda it: it.update(num_hidden_layers=3)),
        "its layers is 3, and model.layers is 2: the weights are of another model",
    ),
    "no configuration": (lambda it: (it / "config.json").unlink(), "is neither a Hugging Face folder"),
    "a tokenizer with other ids": (
        _edit("tokenizer.json", lambda it: it["model"]["vocab"].update(b=7)),
        "where 'b' is token 7; .* gives it 1",
    ),
    "a tokenizer with more tokens": (
        _edit("tokenizer.json", lambda it: it["model"]["vocab"].update(c=2)),
        "where 'c' is token 2; .* does not have it",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(spoiled: str, whole: Path, folder: Path) -> None:
    spoil, message = SPOILED[spoiled]
    spoil(folder)
    with pytest.raises(JobError, match=message) as error:
        check_weights(_job(whole, folder, tokenizer=str(whole / "tokenizer.json")), notice=lambda line: None)
    assert "\n" not in str(error.value)


OF_EXPERTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an expert is missing": (
        lambda it: _without(it, "experts.3.w2.weight"),
        r"has no model.layers.0.block_sparse_moe.experts.3.w2.weight \(and 1 more\)",
    ),
    "the router is missing": (lambda it: _without(it, "block_sparse_moe.gate.weight"), "has no .*moe.gate.weight"),
    "fewer experts": (
        _edit("config.json", lambda it: it.update(num_local_experts=2)),
        "its experts is 2, and model.experts is 4: the weights are of another model",
    ),
    "no experts": (
        _edit("config.json", lambda it: it.update(model_type="llama")),
        "num_experts_per_tok.* is not understood",
    ),
}


def _without(folder: Path, end: str) -> None:
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor for name, tensor in tensors.items() if not name.endswith(end)}, path)


@pytest.mark.parametrize("spoiled", OF_EXPERTS)
def test_what_is_wrong_with_a_folder_of_experts_is_said_in_one_line(spoiled: str, tmp_path: Path) -> None:
    spoil, message = OF_EXPERTS[spoiled]
    folder = save_tiny("mixtral", tmp_path / "mixtral")
    job = _job(folder, folder)
    check_weights(job, notice=lambda line: None)
    spoil(folder)
    with pytest.raises(JobError, match=message) as error:
        check_weights(job, notice=lambda line: None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": 50.0},
            r"attention_softcap\(50.0\) is not supported by the meg",
        ),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            r"rope_local_base\(10000.0\) is not supported by the megatron backend",
        ),
        (
            "olmo3",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            r"qk_norm\(projection\) is not supported by the megatron backend.*sliding_window\(8\)",
        ),
        (
            "qwen2_moe",
            {},
            r"model_type\(qwen2_moe\): the model section has no fields for the gate",
        ),
    ],
)
def test_a_family_that_no_backend_trains_is_refused_in_one_line(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(family, **settings).save_pretrained(tmp_path / family)
    assert main(["import-hf", str(tmp_path / family)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1


@pytest.mark.parametrize("text", ["{", "[" * 100_000], ids=["cut off", "nested too deeply"])
def test_an_import_looks_at_the_tokenizer_that_it_names(
    text: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert main(["import-hf", str(folder)]) == 2
    said = capsys.readouterr()
    assert re.fullmatch(r"copus: data.tokenizer: .*tokenizer.json is not a tokenizer.json\n", said.err)
    assert said.out == ""


def test_text_without_a_tokenizer_gets_that_of_the_weights(whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    job = with_tokenizer(_job(whole, whole), said.append)
    assert job.data.tokenizer == whole / "tokenizer.json"
    assert said == [
        f"data.tokenizer: {whole}/tokenizer.json, that of training.init_from",
        f"data.eos_token: a, that of {whole}",
    ]
    assert with_tokenizer(job, said.append) == job
    (tmp_path / "tokens.idx").touch()
    tokenized = _job(whole, whole, source=str(tmp_path / "tokens"))
    assert with_tokenizer(tokenized, said.append) == tokenized
    assert len(said) == 2
    resumed = settled(_job(whole, whole), before=job)
    assert resumed.data.tokenizer == job.data.tokenizer, "the folder may be gone by then"


def test_a_whole_folder_gets_a_digest_and_another_one_is_refused(whole: Path, folder: Path) -> None:
    said: list[str] = []
    tokenizer = str(whole / "tokenizer.json")
    job, source = check_weights(_job(whole, folder, {"rope_base": 1e6}, tokenizer=tokenizer), said.append)
    assert source is not None
    assert said == [f"training.init_from({folder}): its rope_base is 500000.0, and model.rope_base is 1000000.0"]
    assert check_weights(job, said.append)[0].training.init_digest == job.training.init_digest
    _rewrite(lambda it: it[min(it)].mul_(2))(folder)
    with pytest.raises(JobError, match=f"init_digest is {job.training.init_digest}, and the weights in .* have "):
        check_weights(job, said.append)


def test_import_hf_writes_a_job_file_that_the_folder_fits(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import-hf", str(whole), "--set", f"data.source={tmp_path}", "--out", str(tmp_path / "job.yaml")]
    assert main(arguments) == 0
    assert "weights, trained by megatron; what to begin in: copus plan" in capsys.readouterr().err
    job = load_job(tmp_path / "job.yaml")
    assert (job.training.init_from, job.data.tokenizer) == (whole, whole / "tokenizer.json")
    assert job.model.seq_len == 64, "no longer than the model's positions"
    assert main([*arguments, "--set", "training.backend=fsdp"]) == 0
    assert load_job(tmp_path / "job.yaml").training.backend == "fsdp"
    _truncate(folder)
    assert main(["import-hf", str(folder)]) == 2
    assert "is cut off" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_what_transformers_passes_over_is_passed_over(extra: str, whole: Path, folder: Path) -> None:
    _rewrite(lambda it: it.update({extra: torch.ones(4)}))(folder)
    check_weights(_job(whole, folder, tokenizer=str(whole / "tokenizer.json")), notice=lambda line: None)


# A run that nobody trained: its checkpoint is written here.


def _write_weights(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True)
    record = {}
    with open(folder / "0.distcp", "wb") as file:
        for name, whole in shapes.items():
            start = file.tell()
            torch.save(torch.zeros(whole), file)
            chunk = Chunk(Box.whole(whole), Box.whole(whole), "0.distcp", start, file.tell() - start)
            record[Field(name, "float32", whole)] = [chunk]
    write_index(folder, [record])


def _make_run(run: Path, job: JobConfig) -> Path:
    checkpoint = run / FOLDER / "samples-000000000000"
    shapes = weights_of(job.model)
    _write_weights(checkpoint, {name: state_shape(name, shape, job.model) for name, shape in shapes.items()})
    configuration = job.training.configuration.model_dump(mode="json")
    (checkpoint / "trainer.json").write_text(json.dumps({"state": {}, "configuration": configuration}))
    write_manifest(checkpoint, describe(checkpoint, files_of(checkpoint)))
    (run / "job.yaml").write_text(dump_job(job))
    return checkpoint


class _Reader:
    """As much of a backend as begins with weights: it reads all of them."""

    built = False

    def build(self, *arguments: Any, **options: Any) -> None:
        self.built = True

    def translate_saved(self, weights: SavedState) -> SavedState:
        return weights

    def load_weights(self, folder: Path, weights: SavedState) -> None:
        with SavedFiles(folder) as files:
            for field, chunks in weights.items():
                files.read(field, chunks, chunks[0].box)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    return _Reader()


def test_a_job_does_not_begin_with_weights_of_a_run_that_do_not_verify(
    reader: Any, whole: Path, tmp_path: Path
) -> None:
    """A bit is another one, and every file has its size."""
    file = _make_run(tmp_path / "run", _job(whole, whole)) / "0.distcp"
    job = _job(whole, tmp_path / "run")
    begin(job, reader)
    reader.built = False
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    with pytest.raises(JobError, match=r"does not verify: 0\.distcp has changed since it was written"):
        begin(job, reader)
    assert not reader.built


def _cut(path: Path, left: float) -> None:
    path.write_bytes(path.read_bytes()[: round(left * path.stat().st_size)])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: _cut(folder / "0.distcp", 0.9),
        lambda folder: (folder / "0.distcp").write_bytes(bytes((folder / "0.distcp").stat().st_size)),
        lambda folder: (folder / "0.distcp").unlink(),
        lambda folder: _cut(folder / ".metadata", 0.9),
        lambda folder: _cut(folder / ".metadata", 0),
        lambda folder: (folder / ".metadata").write_text("an index"),
    ],
    ids=["cut off", "zeros", "gone", "half an index", "an empty index", "a text as index"],
)
def test_files_of_megatron_that_cannot_be_read_are_the_users_to_mend(
    damage: Callable[[Path], Any], reader: Any, whole: Path, tmp_path: Path
) -> None:
    """They have no checksums, and the workers are the first to read them: it is no reason to start these again."""
    folder = tmp_path / "megatron"
    hidden, rows = _job(whole, whole).model.hidden, _job(whole, whole).model.padded_vocab
    _write_weights(
        folder, {"embedding.word_embeddings.weight": (rows, hidden), "decoder.final_layernorm.weight": (hidden,)}
    )
    job = _job(whole, folder)
    begin(job, reader)
    damage(folder)
    with pytest.raises(JobError, match=r"training\.init_from\(.*megatron\): its files are not complete, or damaged: "):
        begin(job, reader)


def test_a_file_of_megatron_that_is_cut_off_in_optimizer_state_is_refused_although_only_weights_are_read(
    reader: Any, whole: Path, tmp_path: Path
) -> None:
    folder, shape = tmp_path / "megatron", (_job(whole, whole).model.hidden,)
    weight = "decoder.final_layernorm.weight"
    _write_weights(folder, {weight: shape, f"optimizer.state.exp_avg.{weight}": shape})
    begin(_job(whole, folder), reader)
    size = (folder / "0.distcp").stat().st_size
    _cut(folder / "0.distcp", (size - 100) / size)
    told = rf"0\.distcp has {size - 100} bytes, and its last tensor ends at byte {size}"
    with pytest.raises(JobError, match=told):
        begin(_job(whole, folder), reader)


@pytest.mark.parametrize("error", [KeyError("a mistake of ours"), ValueError("a mistake of ours"), IndexError("ours")])
def test_a_mistake_of_our_own_is_not_told_as_damage(
    error: Exception, reader: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(reader, "load_weights", fail)
    with pytest.raises(type(error), match="ours"):
        begin(_job(whole, whole), reader)


def test_an_export_for_megatron_has_no_optimizer_and_is_refused_where_one_is_asked_for(
    whole: Path, tmp_path: Path
) -> None:
    job = _job(whole, whole)
    checkpoint = _make_run(tmp_path / "run", job)
    exporting.export(tmp_path / "run", job, checkpoint, tmp_path / "out", "megatron", "fp32")
    check_weights(_job(whole, tmp_path / "out"), notice=lambda line: None)
    asks = _job(whole, tmp_path / "out")
    asks = asks.model_copy(update={"training": asks.training.model_copy(update={"init_optimizer": True})})
    message = (
        r"training\.init_optimizer\(true\): .*release is a release in Megatron-LM's format, which has weights alone"
    )
    with pytest.raises(JobError, match=message):
        check_weights(asks, notice=lambda line: None)


def test_an_export_overwrites_nothing_and_leaves_nothing_half_made(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, target = tmp_path / "run", tmp_path / "out" / "model"
    checkpoint = _make_run(run, _job(whole, whole))
    target.mkdir(parents=True)
    (target / "mine").touch()
    assert main(["export", str(run), str(target)]) == 2
    assert "is there already: name a folder that is not, or remove it" in capsys.readouterr().err
    (target / "mine").unlink()

    job = _job(whole, whole)
    usage = shutil.disk_usage(tmp_path)._replace(free=2**24)
    monkeypatch.setattr(exporting.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        JobError, match="the weights take 0 MiB, what is beside them up to 16 MiB, and its disk has room for 16 MiB"
    ):
        exporting.export(run, job, checkpoint, target, "hf", "fp32")
    monkeypatch.undo()

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "there")

    monkeypatch.setattr(trained.TrainedWeights, "read", fail)
    with pytest.raises(JobError, match="there: No space left on device"):
        exporting.export(run, job, checkpoint, target, "hf", "fp32")
    assert list(target.parent.iterdir()) == [target]
    assert list(target.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 20 MiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    mounted = shutil.which("mount") and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a file system takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("to", get_args(exporting.Format))
def test_an_export_onto_a_disk_that_is_full_or_becomes_so_leaves_nothing(
    to: exporting.Format, whole: Path, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors are those of a real file system."""
    job, target = _job(whole, whole), small_disk / "out"
    checkpoint = _make_run(tmp_path / "run", job)
    filling, read = tmp_path / "disk" / "another's", trained.TrainedWeights.read

    def fill_and_read(*arguments: Any) -> Any:
        if not filling.exists():
            with open(filling, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(small_disk).free)
        return read(*arguments)

    monkeypatch.setattr(trained.TrainedWeights, "read", fill_and_read)
    with pytest.raises(JobError, match=r"^\S+: No space left on device$"):
        exporting.export(tmp_path / "run", job, checkpoint, target, to, "fp32")
    assert list(small_disk.iterdir()) == [filling]
    with pytest.raises(JobError, match=r"its disk has room for 0 MiB$"):
        exporting.export(tmp_path / "run", job, checkpoint, target, to, "fp32")
    assert list(small_disk.iterdir()) == [filling]


@pytest.mark.parametrize("to", get_args(exporting.Format))
def test_an_export_that_may_not_write_so_much_leaves_nothing(to: exporting.Format, whole: Path, tmp_path: Path) -> None:
    job, target = _job(whole, whole), tmp_path / "out" / "model"
    checkpoint = _make_run(tmp_path / "run", job)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(JobError, match=r"^\S+: File too large$"):
            exporting.export(tmp_path / "run", job, checkpoint, target, to, "fp32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(target.parent.iterdir()) == []


@pytest.mark.slow
def test_a_large_export_takes_little_memory_and_several_files(whole: Path, tmp_path: Path) -> None:
    """Two tensors of 205 MB are copied in 128 MB, the mapped pages included: the peak of a process of its own."""
    job = _job(whole, whole, {"vocab": 200_000, "hidden": 256, "head_dim": 64, "layers": 1})
    checkpoint = _make_run(tmp_path / "run", job)
    program = (
        "import resource, sys\n"
        "from copus.weights import __main__ as exporting, export_hugging_face\n"
        "export_hugging_face.LARGEST_FILE_BYTES = 250 * 10**6\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert exporting.main(sys.argv[1:]) == 0\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    arguments = [tmp_path / "run", checkpoint, tmp_path / "out", "hf", "bf16"]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(finished.stdout) * 1024 < 128e6
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 200_000
