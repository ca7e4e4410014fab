"""Megatron-LM's own checkpoints, written and read by megatron-core's `dist_checkpointing`, into copus and out of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from copus.backends.megatron import cpu
from copus.backends.megatron.attention import CausalAttention
from copus.backends.megatron.model import scale_rotary_positions, transformer_config
from copus.checkpoints.sharded import Chunk, write_index
from copus.job import JobConfig, JobError
from copus.reshard.boxes import Box
from copus.reshard.table import Field
from copus.weights.__main__ import export
from copus.weights.megatron_weights import weights_in_megatron
from copus.weights.saved import read_source
from copus.weights.source import Source, find_source
from profiles.layout import Layout
from tests.pretrained import SEQ_LEN, VOCAB, open_folder, save_tiny, tokens
from tests.ranks import run_ranks
from tests.test_hf_weights import begun, job_from, logits_of, make_run
from tests.test_transformer_engine import with_transformer_engine

FAMILIES = ("llama", "qwen3", "gpt2", "mixtral", "qwen3_moe", "deepseek_v3")


def megatron_model(job: JobConfig, rows: int, layout: Layout | None = None, *, with_te: bool = False) -> Any:
    """Megatron's GPT with its own layers or Transformer Engine's, its vocabulary padded to `rows`; as a rank of a
    layout has it."""
    cpu.before_import()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    model = job.model
    config = transformer_config(model, layout or Layout(), job.training)
    if model.experts and not model.dense_layers:
        config.moe_layer_freq = 1  # Megatron-LM's default, with which all layers are one tensor
    if model.latent_attention is not None:
        config.qk_layernorm = True
    config.moe_grouped_gemm = with_te
    spec = get_gpt_decoder_block_spec(config, with_te, normalization=config.normalization)
    if model.latent_attention is not None and not with_te:  # Megatron's own attention on a CPU does not do it
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = CausalAttention
    network = GPTModel(
        config,
        spec,
        rows,
        model.seq_len,
        position_embedding_type="rope" if model.positions == "rope" else "learned_absolute",
        rotary_base=model.rope_base,
        share_embeddings_and_output_weights=model.tied_embeddings,
    )
    if model.rope_scaling is not None:
        scale_rotary_positions(network, model)
        for layer in network.decoder.layers:  # latent attention works it out of Megatron's own YaRN
            layer.self_attention.core_attention.softmax_scale = config.softmax_scale
    return network


def _tensors(network: Any) -> dict[str, torch.Tensor]:
    """Parameters, and the biases of routers."""
    return {name: value for name, value in network.state_dict().items() if not name.endswith("_extra_state")}


def _logits(network: Any) -> np.ndarray:
    inputs = tokens()
    positions = torch.arange(SEQ_LEN).expand_as(inputs)
    mask = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return network.eval()(inputs, positions, mask)[..., :VOCAB].numpy()


def _through_megatron(folder: Path, family: str, with_te: bool) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a folder → copus → Megatron-LM's checkpoint → Megatron's own model, which saves them with another
    padding → copus. The logits of Megatron's model, and of copus in the end."""
    torch.cuda.synchronize = lambda *arguments: None  # type: ignore[assignment]  # Megatron calls it on a CPU too
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    job = job_from(folder / family)
    running = begun(job)
    checkpoint = make_run(folder / f"run-{family}", job, running)
    export(folder / f"run-{family}", job, checkpoint, folder / f"megatron-{family}", "megatron", "fp32")

    from megatron.core import dist_checkpointing

    network = megatron_model(job, job.model.padded_vocab, with_te=with_te)
    source = find_source(folder / f"megatron-{family}")
    loaded = dist_checkpointing.load(network.sharded_state_dict(), str(source.folder))
    network.load_state_dict({name: loaded[name] for name in _tensors(network)}, strict=False)
    logits = _logits(network)

    other = megatron_model(job, 384, with_te=with_te)
    with torch.no_grad():
        loaded = _tensors(network)
        for name, weight in _tensors(other).items():
            own = loaded[name]
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


def _all(folder: Path, with_te: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {family: _through_megatron(folder, family, with_te) for family in FAMILIES}


def _check_logits(folder: Path, results: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for family, (megatron, ours) in results.items():
        expected = open_folder(folder / family)(input_ids=tokens()).logits.detach()
        np.testing.assert_allclose(megatron, expected, rtol=0, atol=1e-4, err_msg=family)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4, err_msg=family)


@pytest.mark.dist
def test_megatron_reads_what_copus_exports_and_copus_what_megatron_saves(tmp_path: Path) -> None:
    for family in FAMILIES:
        save_tiny(family, tmp_path / family)
    _check_logits(tmp_path, run_ranks(1, _all, tmp_path, False)[0])


@pytest.mark.dist
@pytest.mark.slow
def test_so_does_megatron_with_the_modules_of_transformer_engine(tmp_path: Path) -> None:
    """A stand-in of its modules, with its names and shapes; the experts are grouped."""
    for family in FAMILIES:
        save_tiny(family, tmp_path / family)
    _check_logits(tmp_path, with_transformer_engine(1, _all, tmp_path, True)[0])


def test_a_checkpoint_of_another_iteration_format_or_vocabulary_is_refused(tmp_path: Path) -> None:
    latest = tmp_path / "latest_checkpointed_iteration.txt"
    latest.write_text("12")
    with pytest.raises(JobError, match="says 12, and iter_0000012 is no checkpoint of format torch_dist"):
        find_source(tmp_path)
    latest.unlink()
    (tmp_path / "mp_rank_00").mkdir()
    with pytest.raises(JobError, match="format `torch` is not read"):
        find_source(tmp_path)


def test_a_checkpoint_with_other_experts_is_refused_and_so_are_models_that_megatron_has_not(tmp_path: Path) -> None:
    model = job_from(save_tiny("mixtral", tmp_path / "hf")).model
    shape = (2, 4, 32, 48)
    field = Field("decoder.layers.mlp.experts.experts.linear_fc2.weight", "float32", shape)
    (tmp_path / "x").touch()
    write_index(tmp_path, [{field: [Chunk(Box.whole(shape), Box.whole(shape), "x", 0, 0)]}])
    source = Source("megatron", tmp_path)
    assert len(read_source(source, model)) == 8
    with pytest.raises(JobError, match=r"linear_fc2.weight has 4 experts, and model.experts is 8"):
        read_source(source, model.model_copy(update={"experts": 8}))
    post = model.model_copy(update={"norm_position": "post"})
    with pytest.raises(ValueError, match=r"norm_position\(post\) is not exported to Megatron-LM: pre is"):
        weights_in_megatron(post)
