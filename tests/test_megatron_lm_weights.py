"""Megatron-LM's own checkpoints, written and read by megatron-core's `dist_checkpointing`, into copus and out of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.model import transformer_config
from copus.job import JobConfig, JobError
from copus.weights.__main__ import export
from copus.weights.export_megatron import weights_in_megatron
from copus.weights.saved import read_source
from copus.weights.source import Source, find_source
from profiles.latent_attention import LatentAttention
from profiles.layout import Layout
from tests.pretrained import SEQ_LEN, VOCAB, open_folder, save_tiny, tokens
from tests.ranks import run_ranks
from tests.test_hf_weights import begun, job_from, logits_of, make_run

FAMILIES = ("llama", "qwen3", "gpt2")


def megatron_model(job: JobConfig, rows: int) -> Any:
    """Megatron's GPT with its own layers on one rank, its vocabulary padded to `rows`."""
    cpu.before_import()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = job.model
    config = transformer_config(model, Layout(), job.training)
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm == "head", normalization=config.normalization)
    return GPTModel(
        config,
        spec,
        rows,
        model.seq_len,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
    )


def _logits(network: Any) -> np.ndarray:
    inputs = tokens()
    positions = torch.arange(SEQ_LEN).expand_as(inputs)
    mask = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return network.eval()(inputs, positions, mask)[..., :VOCAB].numpy()


def _through_megatron(folder: Path, family: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a folder → copus → Megatron-LM's checkpoint → Megatron's own model, which saves them with another
    padding → copus. The logits of Megatron's model, and of copus in the end."""
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]  # Megatron calls it on a CPU too
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    job = job_from(folder / family)
    running = begun(job)
    checkpoint = make_run(folder / f"run-{family}", job, running)
    export(folder / f"run-{family}", job, checkpoint, folder / f"megatron-{family}", "megatron", "fp32")

    from megatron.core import dist_checkpointing

    network = megatron_model(job, job.model.padded_vocab)
    source = find_source(folder / f"megatron-{family}")
    loaded = dist_checkpointing.load(network.sharded_state_dict(), str(source.folder))
    network.load_state_dict({name: loaded[name] for name, _ in network.named_parameters()}, strict=False)
    logits = _logits(network)

    other = megatron_model(job, 384)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            own = network.get_parameter(name)
            weight[: len(own)] = own
            weight[len(own) :] = 7.0  # padding, which is not to be read
    state = other.sharded_state_dict() | {"iteration": 3, "checkpoint_version": 3.0}
    again = folder / f"again-{family}" / "iter_0000003"
    again.mkdir(parents=True)
    dist_checkpointing.save(state, str(again))
    (again.parent / "latest_checkpointed_iteration.txt").write_text("3")
    running.close()
    running = begun(job_from(folder / family, init_from=str(again.parent)))
    ours = logits_of(running).numpy()
    running.close()
    return logits, ours


def _all(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {family: _through_megatron(folder, family) for family in FAMILIES}


@pytest.mark.dist
def test_megatron_reads_what_copus_exports_and_copus_what_megatron_saves(tmp_path: Path) -> None:
    for family in FAMILIES:
        save_tiny(family, tmp_path / family)
    for family, (megatron, ours) in run_ranks(1, _all, tmp_path)[0].items():
        expected = open_folder(tmp_path / family)(input_ids=tokens()).logits.detach()
        np.testing.assert_allclose(megatron, expected, rtol=0, atol=1e-4, err_msg=family)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=family)


def test_a_checkpoint_of_another_iteration_format_or_vocabulary_is_refused(tmp_path: Path) -> None:
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("12")
    with pytest.raises(JobError, match="says 12, and iter_0000012 is no checkpoint of format torch_dist"):
        find_source(tmp_path)
    latest.unlink()
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(JobError, match="format `torch` is not read"):
        find_source(tmp_path)
    model = job_from(save_tiny("llama", tmp_path / "hf")).model
    with pytest.raises(JobError, match="experts of Megatron-LM's checkpoints are not read"):
        read_source(Source("megatron", tmp_path), model.model_copy(update={"experts": 4}))
    latent = model.model_copy(update={"latent_attention": LatentAttention(kv_rank=8, rope_dim=4, value_dim=8)})
    with pytest.raises(JobError, match="latent attention of Megatron-LM's checkpoints is not read"):
        read_source(Source("megatron", tmp_path), latent)
    with pytest.raises(ValueError, match="latent_attention is not exported to Megatron-LM"):
        weights_in_megatron(latent)
