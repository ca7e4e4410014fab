"""`copus submit` from a Hugging Face folder, and `copus export` of what came of it, as a person types them."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from copus.data.prepared import prepared_path
from copus.data.samples import open_data
from copus.data.tokenizer import train_tokenizer
from copus.events import Evaluate, read_events
from copus.job import load_job
from tests.pretrained import open_folder, save_tiny

COPUS = [sys.executable, "-m", "launch.cli"]
WORDS = "to be or not that is the question whether nobler in mind suffer slings and arrows of fortune"


def _write_job(folder: Path, backend: str) -> Path:
    save_tiny("llama", folder / "model", vocab_size=300)
    chosen = random.Random(1)
    text = "\n".join(" ".join(chosen.choice(WORDS.split()) for _ in range(12)) for _ in range(3000))
    (folder / "text.txt").write_text(text)
    train_tokenizer([text], 300).save(str(folder / "model" / "tokenizer.json"))
    job = {
        "name": "tuned",
        "model": {"from": str(folder / "model"), "seq_len": 16},
        "data": {"source": str(folder / "text.txt"), "cache": str(folder / "cache")},  # with the folder's tokenizer
        "cluster": {"accelerators_per_node": 1},
        "training": {
            **{"backend": backend, "init_from": "model", "global_batch": 4, "tokens": 16 * 4 * 3, "lr": 1e-2},
            **{"evaluate_sequences": 4},
        },
        "planner": {"policy": "static"},
        "profile": {"when": "never", "table": "table.jsonl"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def _loss(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()


def _run(folder: Path, *arguments: str) -> str:
    finished = subprocess.run([*COPUS, *arguments], cwd=folder, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["megatron", "fsdp"])
def test_a_folder_is_tuned_and_exported(backend: str, tmp_path: Path) -> None:
    """First and last held-out loss are those of transformers with the folder that goes in and that which comes out."""
    job_file = _write_job(tmp_path, backend)
    _run(tmp_path, "submit", str(job_file))
    run = tmp_path / "runs" / "tuned"
    losses = [event.loss for event in read_events(run) if isinstance(event, Evaluate)]
    job = load_job(run / "job.yaml")
    assert job.training.init_from == tmp_path / "model"
    assert job.data.tokenizer == tmp_path / "model" / "tokenizer.json"
    _, held_out = open_data(job, prepared_path(job))
    batch = held_out(0, 4)
    assert losses[0] == pytest.approx(_loss(open_folder(tmp_path / "model"), *batch), rel=1e-5)

    said = json.loads(_run(tmp_path, "export", "tuned", "tuned-hf", "--json"))
    assert (said["folder"], said["dtype"]) == (str(tmp_path / "tuned-hf"), "fp32")
    assert said["checkpoint"] == "samples-000000000012"
    tuned = open_folder(tmp_path / "tuned-hf")
    assert losses[-1] == pytest.approx(_loss(tuned, *batch), rel=1e-5)
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned-hf")
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.decode(tokenizer("to be or not")["input_ids"]) == "to be or not"
    card = (tmp_path / "tuned-hf" / "README.md").read_text()
    assert f"| held-out loss | {losses[-1]:.4f} |" in card
    assert f"| weights at the start | `model`, digest `{job.training.init_digest}` |" in card

    _run(tmp_path, "submit", str(job_file), "--name", "again", "--set", "training.init_from=tuned")
    first = next(event.loss for event in read_events(tmp_path / "runs" / "again") if isinstance(event, Evaluate))
    assert first == pytest.approx(losses[-1], rel=1e-6), "a run goes in as its export does"
