"""The examples of the meter, which run as they stand."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "meter"


def example(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_loop_measures_and_grows_its_batch(capsys: pytest.CaptureFixture[str]) -> None:
    meter = example("plain").main()
    assert meter.problems == []
    assert meter.noise.value is not None
    assert meter.global_batch > 8
    assert "fewer steps" in capsys.readouterr().out


def test_huggingface_trainer_logs_the_noise_scale_and_accumulates_more() -> None:
    trainer = example("huggingface").main()
    logged = [record for record in trainer.state.log_history if "noise_scale" in record]
    assert logged
    assert logged[-1]["critical_batch"] == pytest.approx(2 * logged[-1]["noise_scale"])
    (callback,) = [each for each in trainer.callback_handler.callbacks if hasattr(each, "controller")]
    assert [problem for problem in callback.meter.problems if "backward passes" not in problem] == []
    assert callback.meter.samples == 8 * 30, "every sequence is trained on once, whatever the batch"
    assert trainer.args.gradient_accumulation_steps == callback.controller.micro_batches


def test_lightning_trainer_logs_the_noise_scale(tmp_path: Path) -> None:
    trainer = example("lightning").main(tmp_path / "noise.jsonl")
    (callback,) = [each for each in trainer.callbacks if hasattr(each, "meter")]
    assert callback.meter.problems == []
    assert float(trainer.callback_metrics["noise_scale"]) == pytest.approx(callback.meter.noise.value)
    lines = [json.loads(line) for line in (tmp_path / "noise.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [8 * (step + 1) for step in range(30)]


def _on_ranks(kind: str) -> Any:
    if kind == "deepspeed":
        import copus.backends.deepspeed.upstream  # noqa: F401 (where there is no GPU, nothing is compiled for minutes)
    assert dist.get_world_size() == 2
    meter = example("megatron").main() if kind == "megatron" else example("ranks").main(kind)
    return meter.noise.value, meter.problems


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "megatron", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_wrapped_models_measure(kind: str) -> None:
    (value, problems), other = run_ranks(2, _on_ranks, kind)
    assert value is not None
    assert problems == []
    assert other == (value, problems)


def _trainer_on_ranks(kind: str, strategy: str) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # where torchrun's would be; a world exists already
    if kind == "huggingface":
        callbacks = example(kind).main().callback_handler.callbacks
    else:
        from lightning.pytorch.strategies import ModelParallelStrategy

        sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        callbacks = example(kind).main(devices=2, strategy=sharded if strategy == "fsdp" else strategy).callbacks
    (callback,) = [each for each in callbacks if hasattr(each, "meter")]
    meter = callback.meter
    return meter._model.name, meter.replicas, meter.samples, meter.noise.value, meter.problems


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("huggingface", "ddp"), ("lightning", "ddp"), ("lightning", "fsdp")])
def test_callbacks_measure_on_two_ranks(kind: str, strategy: str) -> None:
    """accelerate shards on GPUs alone, so that the Hugging Face trainer has no FSDP here."""
    first, second = run_ranks(2, _trainer_on_ranks, kind, strategy)
    name, replicas, samples, value, problems = first
    assert name == ("DistributedDataParallel" if strategy == "ddp" else "FSDP2")
    assert (replicas, samples) == (2, 8 * 30), "every sequence is trained on once"
    assert value is not None
    assert [problem for problem in problems if "backward passes" not in problem] == []  # an epoch ends where it likes
    assert second == first
