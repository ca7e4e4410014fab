"""The README.md of an exported folder: what was trained, on how much, from which data and weights."""

from pathlib import Path
from typing import Any

from copus.job import JobConfig
from copus.weights.trained import Training


def model_card(job: JobConfig, checkpoint: Path, training: Training, config: dict[str, Any]) -> str:
    """The text of a model card, in the form that the Hugging Face Hub reads."""
    model, settings = job.model, job.training
    rows = [
        ("architecture", f"{config['architectures'][0]}, {_parameters(job)} parameters"),
        ("trained tokens", f"{training.tokens:,} in {training.steps:,} steps, sequences of {model.seq_len:,} tokens"),
        ("loss of the last step", _loss(training.loss)),
        ("held-out loss", _loss(training.held_out_loss)),
        ("data", f"digest `{training.data}`" if training.data else "not recorded"),
        ("weights at the start", _start(job)),
        ("precision of the training", settings.precision),
        ("optimizer", f"{settings.optimizer.kind}, peak learning rate {settings.lr:g}"),
        ("backend", settings.backend),
        ("checkpoint", f"`{checkpoint.name}`"),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [copus]\n---\n\n"
        f"# {job.name}\n\n"
        "Trained with copus, which chooses the global batch and the layout while a job runs. "
        "Losses are in nats per token.\n\n"
        f"| | |\n|---|---|\n{table}\n"
    )


def _parameters(job: JobConfig) -> str:
    padding = (job.model.padded_vocab - job.model.vocab) * job.model.hidden * (1 if job.model.tied_embeddings else 2)
    return f"{job.model.parameters - padding:,}"


def _loss(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.4f}"


def _start(job: JobConfig) -> str:
    source = job.training.init_from
    if source is None:
        return f"random, seed {job.training.seed}"
    return f"`{source.name}`, digest `{job.training.init_digest}`"
