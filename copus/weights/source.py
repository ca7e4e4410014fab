"""Where the weights come from that a job begins with (`training.init_from`), and whether they are its model's.

Everything that is wrong is said before a process of the job starts. No torch: the launcher asks. What lies in a
checkpoint's index can be read with torch only: the workers look at that.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from copus.checkpoints.files import FOLDER, checkpoint_names, quick_damage
from copus.data.prepared import find_prepared
from copus.job import JobConfig, JobError, load_job
from copus.manifest import MANIFEST
from copus.weights import safetensors
from copus.weights.eos_token import eos_token_of
from copus.weights.families import Stored, stored_weights, weights_of
from profiles.huggingface_config import read_config, read_values
from profiles.model_shape import ModelShape

TOKENIZER = "tokenizer.json"
CONFIG = "config.json"
LATEST = "latest_checkpointed_iteration.txt"
"""In the folder of Megatron-LM's checkpoints: the newest iteration, or `release`."""
RELEASE = "release"
"""Megatron-LM's name for a checkpoint that no iteration of its own has written: it never takes an optimizer from it."""
TORCH_INDEX = ".metadata"
"""torch's index of a checkpoint, which Megatron's format `torch_dist` has too."""

_SAMPLE_BYTES = 64 * 2**10
_SAMPLES_OF_A_FILE = 64


class Source(NamedTuple):
    """Weights to begin with."""

    kind: Literal["hugging_face", "run", "megatron"]
    """A Hugging Face folder, a checkpoint of copus, or one of Megatron-LM."""
    folder: Path
    """With the files of the weights."""


def find_source(path: Path) -> Source:
    """What a path is: a Hugging Face folder; a run, whose newest checkpoint is taken, or one of its checkpoints; or a
    checkpoint of Megatron-LM in the format `torch_dist`, or the folder of several. Raises JobError if it is none."""
    path = path.expanduser()
    where = f"training.init_from({path})"
    try:
        path.stat()
    except OSError as error:  # not there, not to be entered, or a symbolic link that leads to itself
        raise JobError(f"{where}: {error.strerror}") from None
    if (path / "job.yaml").is_file():
        flaws = {name: quick_damage(path / FOLDER / name) for name in checkpoint_names(path)}
        whole = next((name for name, flaw in flaws.items() if flaw is None), None)
        if whole is None:
            raise JobError(f"{where}: the run has no checkpoint" + "".join(f"; {n}: {f}" for n, f in flaws.items()))
        return Source("run", path / FOLDER / whole)
    if (path / "trainer.json").is_file():
        if flaw := quick_damage(path):
            raise JobError(f"{where}: {flaw}")
        return Source("run", path)
    if (path / LATEST).is_file():
        return Source("megatron", _latest(path, where))
    if (path / TORCH_INDEX).is_file():
        return Source("megatron", path)
    if (path / CONFIG).is_file():
        return Source("hugging_face", path)
    if any(path.glob("mp_rank_*")):
        raise JobError(
            f"{where}: Megatron-LM's format `torch` is not read: convert it to `torch_dist` with --ckpt-convert"
        )
    raise JobError(
        f"{where} is neither a Hugging Face folder ({CONFIG} and safetensors), nor a run of copus or its checkpoint, "
        "nor a torch_dist checkpoint of Megatron-LM"
    )


def _latest(folder: Path, where: str) -> Path:
    """The newest checkpoint in a folder of Megatron-LM's."""
    text = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    newest = folder / (f"iter_{int(text):07d}" if text.isdecimal() else RELEASE)
    if not (newest / TORCH_INDEX).is_file():
        raise JobError(f"{where}: {LATEST} says {text[:40]}, and {newest.name} is no checkpoint of format torch_dist")
    return newest


def check_source(job: JobConfig, source: Source, notice: Callable[[str], None]) -> None:
    """Raise JobError if the weights are not those of the job's model, as far as can be told without torch, or if they
    go with another tokenizer. `notice` gets a line for each setting in which the model is another on purpose."""
    where = f"training.init_from({source.folder})"
    is_release = source.kind == "megatron" and source.folder.name == RELEASE
    if job.training.init_optimizer and (is_release or source.kind == "hugging_face"):
        of = "a release in Megatron-LM's format" if is_release else "a Hugging Face folder"
        raise JobError(f"training.init_optimizer(true): {source.folder} is {of}, which has weights alone")
    if source.kind == "hugging_face":
        try:
            fields = read_config(source.folder)
        except ValueError as error:
            raise JobError(f"training.init_from: {error}") from None
        _compare_models(fields, job.model, where, notice)
        locate(source.folder, job.model)
    elif source.kind == "run":
        _compare_models(dict(_run_of(source).model), job.model, where, notice)
    theirs = tokenizer_of(source)
    if theirs is not None:
        check_tokenizer_fits(theirs, job)


def with_tokenizer(job: JobConfig, notice: Callable[[str], None]) -> JobConfig:
    """The job with the tokenizer of the Hugging Face folder or the run that it begins with, and the token that ends a
    document there, if its text has no tokenizer of its own; `notice` gets a line for what is taken. Raises JobError if
    the weights are not there."""
    if job.training.init_from is None or job.data.tokenizer is not None or _is_tokenized(job):
        return job
    source = find_source(job.training.init_from)
    theirs = tokenizer_of(source)
    if theirs is None:
        return job
    notice(f"data.tokenizer: {theirs}, that of training.init_from")
    values: dict[str, Any] = {"tokenizer": theirs}
    eos_token = None if job.data.eos_token else _eos_token_of(source, theirs)
    if eos_token:
        notice(f"data.eos_token: {eos_token}, that of {source.folder}")
        values["eos_token"] = eos_token
    return job.model_copy(update={"data": job.data.model_copy(update=values)})


def _eos_token_of(source: Source, tokenizer: Path) -> str | None:
    """The token that ends a document where the weights are from; None if it says none."""
    if source.kind == "run":
        return _run_of(source).data.eos_token
    return eos_token_of(source.folder, tokens_of(tokenizer))


def _is_tokenized(job: JobConfig) -> bool:
    """Whether the data is there as tokens: prepared, or prefixes of Megatron's indexed datasets."""
    paths = job.data.source if isinstance(job.data.source, list) else []
    prefixes = [Path(f"{path.expanduser()}.idx").is_file() for path in paths]
    return job.data.prepared is not None or (bool(prefixes) and all(prefixes))


def _run_of(source: Source) -> JobConfig:
    """The job of the run that a checkpoint is of."""
    job_file = source.folder.parent.parent / "job.yaml"
    if not job_file.is_file():
        raise JobError(f"training.init_from({source.folder}): the checkpoint is in no run: there is no {job_file}")
    return load_job(job_file)


def _compare_models(fields: dict[str, Any], own: ModelShape, where: str, notice: Callable[[str], None]) -> None:
    """Raise JobError if the weights are of another model. Of the rest (the rotary base, windows, …) a line is said."""
    theirs = ModelShape(
        **{**fields, "seq_len": fields["seq_len"] if fields.get("positions") == "learned" else own.seq_len}
    )
    other = [name for name, value in theirs if value != getattr(own, name)]
    said = [f"its {name} is {getattr(theirs, name)}, and model.{name} is {getattr(own, name)}" for name in other]
    if weights_of(theirs) != weights_of(own):
        raise JobError(f"{where}: {'; '.join(said)}: the weights are of another model")
    for line in said:
        notice(f"{where}: {line}")


def locate(folder: Path, model: ModelShape) -> dict[str, tuple[Stored, safetensors.StoredTensor]]:
    """Where a Hugging Face folder has each weight of a model, by the weight's name in the state.

    Raises JobError, in one line, for a folder that does not have exactly the weights of the model.
    """
    where = f"training.init_from({folder})"
    try:
        family = read_values(folder / CONFIG)["model_type"]
    except ValueError as error:
        raise JobError(f"{where}: {error}") from None
    tensors = safetensors.read_folder(folder)
    weights = stored_weights(family, model)
    names = _own_names(tensors, {stored.name for stored in weights.values()})
    located = {}
    for weight, stored in weights.items():
        tensor = tensors.get(names.get(stored.name, ""))
        if tensor is None:
            lacking = sum(other.name not in names for other in weights.values())
            more = f" (and {lacking - 1} more)" if lacking > 1 else ""
            raise JobError(f"{where} has no {stored.name}{more}: the weights are of another model, or not complete")
        if tensor.shape != stored.shape:
            raise JobError(
                f"{where}: {stored.name} is {list(tensor.shape)} in {tensor.file}, and the model's is "
                f"{list(stored.shape)}"
            )
        if tensor.dtype not in safetensors.DTYPES:
            raise JobError(
                f"{where}: {stored.name} is of type {tensor.dtype}; weights of type "
                f"{', '.join(safetensors.DTYPES)} are read, and quantized ones are not"
            )
        located[weight] = stored, tensor
    surplus = sorted(tensors.keys() - set(names.values()) - set(_passed_over(tensors, model)))
    if surplus:
        more = f" (and {len(surplus) - 1} more)" if len(surplus) > 1 else ""
        raise JobError(f"{where} has {surplus[0]}{more}, which the model does not have")
    return located


def _own_names(tensors: Iterable[str], expected: set[str]) -> dict[str, str]:
    """Name as transformers would write it → name in the folder. A folder of the model without its output layer may
    have left out the first part of every name."""
    names = set(tensors)
    prefixes = {name.partition(".")[0] + "." for name in expected if not name.startswith("lm_head.")}
    own = {}
    for name in expected:
        bare = next((name.removeprefix(prefix) for prefix in prefixes if name.startswith(prefix)), name)
        if name in names or bare in names:
            own[name] = name if name in names else bare
    return own


_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of names of what is no weight, and was saved by old versions of transformers."""


def _passed_over(tensors: Iterable[str], model: ModelShape) -> Iterable[str]:
    """What transformers passes over too: buffers, an output layer where the embedding takes its place, and DeepSeek's
    layer for a second token, which comes after the model's."""
    another = (f"model.layers.{model.layers}.",) if model.latent_attention else ()
    tied = ("lm_head.weight",) if model.tied_embeddings else ()
    return (name for name in tensors if name.endswith(_BUFFERS) or name.startswith(another) or name in tied)


def tokenizer_of(source: Source) -> Path | None:
    """The `tokenizer.json` that the weights were trained with; None if nobody says."""
    if source.kind == "hugging_face":
        path = source.folder / TOKENIZER
        return path if path.is_file() else None
    if source.kind == "run":
        try:
            prepared = find_prepared(_run_of(source))
        except JobError:
            return None
        return prepared / TOKENIZER if prepared and (prepared / TOKENIZER).is_file() else None
    return None


def check_tokenizer_fits(theirs: Path, job: JobConfig) -> None:
    """Raise JobError if the job's tokenizer gives a token of the weights' tokenizer another id. It may have more."""
    prepared = find_prepared(job) if job.data.prepared else None
    own = prepared / TOKENIZER if prepared else job.data.tokenizer and job.data.tokenizer.expanduser()
    if own is None or not own.is_file() or own == theirs:
        return
    ids = tokens_of(own)
    for token, number in tokens_of(theirs).items():
        if ids.get(token) != number:
            has = f"gives it {ids[token]}" if token in ids else "does not have it"
            raise JobError(
                f"data.tokenizer: the weights of training.init_from were trained with {theirs}, where {token!r} is "
                f"token {number}; {own} {has}"
            )


def tokens_of(path: Path) -> dict[str, int]:
    """Token → id, of a `tokenizer.json`. Raises JobError if it is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        vocab = values["model"]["vocab"]
        tokens = dict(vocab) if isinstance(vocab, dict) else {token: number for number, (token, _) in enumerate(vocab)}
        return tokens | {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    except OSError as error:
        raise JobError(f"data.tokenizer: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JobError(f"data.tokenizer: {path} is not a tokenizer.json") from None


def digest_of(source: Source) -> str:
    """Identity of the weights, 16 hexadecimal digits.

    A checkpoint of copus has checksums of all its files. Of others, which may be hundreds of gigabytes, names, sizes
    and 64 samples of each file are hashed, headers included: training changes every tensor, so two models differ there.
    """
    if source.kind == "run":
        return hashlib.sha256((source.folder / MANIFEST).read_bytes()).hexdigest()[:16]
    digest = hashlib.sha256()
    pattern = "*.safetensors" if source.kind == "hugging_face" else "*.distcp"
    for path in [*sorted(source.folder.glob(pattern)), source.folder / CONFIG, source.folder / TORCH_INDEX]:
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                for number in range(_SAMPLES_OF_A_FILE):
                    file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES_OF_A_FILE - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
