"""The token that ends a document in a Hugging Face folder, against transformers' own tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from copus.data.manifest import read_manifest
from copus.data.prepare import prepare
from copus.job import JobError, load_job
from copus.weights.eos_token import eos_token_of
from copus.weights.source import tokens_of, with_tokenizer
from launch.cli import main
from tests.pretrained import save_tiny

TOKENS = {"a": 0, "b": 1, "<s>": 2, "<eos>": 3, "<|im_end|>": 4, "<|endoftext|>": 5, "<unk>": 6}
AN_OBJECT = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def _write(folder: Path, **files: Any) -> Path:
    tokenizer = Tokenizer(models.WordLevel(TOKENS, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([token for token in TOKENS if token.startswith("<")])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<eos>"}},
        {"tokenizer_config": {"eos_token": {"__type": "AddedToken", **AN_OBJECT}}},
        {"tokenizer_config": {"eos_token": "<|endoftext|>"}},
        {"special_tokens_map": {"eos_token": "<eos>"}},
        {"special_tokens_map": {"eos_token": AN_OBJECT}},
        {"tokenizer_config": {"eos_token": "<eos>"}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        {
            "tokenizer_config": {"eos_token": "<eos>", "added_tokens_decoder": {"4": AN_OBJECT}},
            "special_tokens_map": {"eos_token": "<|im_end|>"},
        },
        {"tokenizer_config": {"eos_token": "<eos>"}, "generation_config": {"eos_token_id": 4}},
        {"tokenizer_config": {"eos_token": None}},
        {},
    ],
    ids=lambda files: "+".join(files) or "none",
)
def test_the_end_is_the_token_that_transformers_takes(files: dict[str, Any], tmp_path: Path) -> None:
    folder = _write(tmp_path, **files)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).eos_token
    ours = eos_token_of(folder, tokens_of(folder / "tokenizer.json"))
    assert ours == (theirs if theirs != "<|endoftext|>" else None)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [4, 3]}, "config": {"eos_token_id": 3}}, "<|im_end|>"),
        ({"config": {"eos_token_id": 3}}, "<eos>"),
        ({"tokenizer_config": {"eos_token": "<gone>"}, "config": {"eos_token_id": 3}}, "<eos>"),
        ({"config": {"eos_token_id": 99}}, None),
        ({"config": {"eos_token_id": None}}, None),
        ({"generation_config": {"eos_token_id": {"id": 4}}, "config": {"eos_token_id": [[4], 3]}}, "<eos>"),
    ],
)
def test_where_no_token_has_a_usual_name_the_ids_of_the_configuration_say(
    files: dict[str, Any], expected: str | None, tmp_path: Path
) -> None:
    folder = _write(tmp_path, **files)
    tokens = tokens_of(folder / "tokenizer.json")
    assert eos_token_of(folder, tokens) is None, "<|endoftext|> is taken anyway"
    del tokens["<|endoftext|>"]
    assert eos_token_of(folder, tokens) == expected


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is not a JSON object")])
def test_a_file_that_cannot_be_read_is_named(text: str, message: str, tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(JobError, match=rf"data\.eos_token: .*tokenizer_config\.json {message}"):
        eos_token_of(tmp_path, TOKENS)


def test_an_imported_job_ends_its_documents_as_the_folder_does(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_tiny("llama", folder, eos_token_id=3)
    _write(folder, tokenizer_config={"eos_token": "<eos>"})
    for side, word in (("train", "a "), ("valid", "b ")):
        (tmp_path / f"{side}.txt").write_text(40 * word)
    job_file = tmp_path / "job.yaml"
    settings = [f"data.source={tmp_path}/train.txt", f"data.held_out_source=[{tmp_path}/valid.txt]"]
    settings += [f"data.cache={tmp_path}/cache", "model.seq_len=16", "training.tokens=5000", "training.warmup_tokens=0"]
    assert main(["import-hf", str(folder), "--out", str(job_file), *(f"--set={setting}" for setting in settings)]) == 0
    assert yaml.safe_load(job_file.read_text())["data"]["eos_token"] == "<eos>"
    job = load_job(job_file)
    assert read_manifest(prepare(job)).eod == 3

    without = job.model_copy(update={"data": job.data.model_copy(update={"tokenizer": None, "eos_token": None})})
    said: list[str] = []
    assert with_tokenizer(without, said.append).data == job.data
    assert said[1] == f"data.eos_token: <eos>, that of {folder}"
