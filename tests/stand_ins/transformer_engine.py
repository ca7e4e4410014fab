"""Stands in for Transformer Engine where there is none: the names, arguments, shapes, attributes and extra states of
release 2.20's modules, computed by torch.

With it on the path megatron builds its own layers of them, and trains them on CPU and gloo. What megatron-core does not
ask for is not here, and an argument that the real modules do not have is an error. Products in FP8 are of operands that
are rounded to it, with one scale a tensor or one a block of 32.
"""

import contextlib
import enum
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional

__version__ = "2.20.0"
__path__: list[str] = []  # a package, whose modules are registered below


class Format(enum.Enum):
    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    def __init__(self, fp8_format: Format = Format.HYBRID, **_: Any) -> None:
        self.fp8_format = fp8_format


class DelayedScaling(_Recipe):
    pass


class Float8CurrentScaling(_Recipe):
    def __init__(self, fp8_format: Format = Format.HYBRID, fp8_dpa: bool = False) -> None:
        super().__init__(fp8_format)


class Float8BlockScaling(_Recipe):
    pass


class MXFP8BlockScaling(_Recipe):
    pass


class FP8GlobalStateManager:
    recipe: _Recipe | None = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(
    enabled: bool = True, calibrating: bool = False, fp8_recipe: Any = None, fp8_group: Any = None
) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def _rounded(operand: torch.Tensor) -> torch.Tensor:
    """As a product in FP8 sees it. The gradient passes as it is."""
    recipe = FP8GlobalStateManager.recipe
    if recipe is None or not operand.numel():
        return operand
    block = 32 if isinstance(recipe, MXFP8BlockScaling) else 1
    rows = operand.numel() // operand.shape[-1]
    assert rows % max(block, 8) == 0, f"{rows} rows"
    assert operand.shape[-1] % max(block, 16) == 0, f"rows of {operand.shape[-1]}"
    parts = operand.detach().float().reshape(-1, block if block > 1 else operand.numel())
    scales = 448 / parts.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    if block > 1:
        scales = scales.log2().floor().exp2()
    rounded = ((parts * scales).to(torch.float8_e4m3fn).float() / scales).reshape(operand.shape).to(operand.dtype)
    return operand + (rounded - operand).detach()


def _normalised(module: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if module.normalization == "RMSNorm":
        return functional.rms_norm(states, weight.shape, weight, module.eps)
    return functional.layer_norm(states, weight.shape, weight, bias, module.eps)


class _Module(torch.nn.Module):
    """What every module has: an extra state in every state_dict, empty without a scaling that has a history."""

    fp8 = fp8_calibration = False

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        assert state.numel() == 0, "no scaling with a history"

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass


def _mark(weight: torch.Tensor, parallel_mode: str | None, device: Any) -> None:
    """reset_parameters of the real ones, which leaves out what is on the meta device."""
    if torch.device(device).type != "meta":
        weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        weight.partition_dim = int(parallel_mode == "row")  # type: ignore[attr-defined]
        weight.partition_stride = 1  # type: ignore[attr-defined]


class Linear(_Module):
    """`weight` of [out, in], and `bias`; cut over the group, with the communication that goes with it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        assert not fuse_wgrad_accumulation, "autograd has the gradients"
        self.save_original_input = save_original_input
        self._of_linear(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode
        )
        self._make_weights(params_dtype, device, init_method)

    def _of_linear(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool,
        tp_group: Any,
        tp_size: int,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
    ) -> None:
        self.tp_group, self.tp_size = tp_group, tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.sequence_parallel = sequence_parallel and self.tp_size > 1
        self.in_features = in_features // self.tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // self.tp_size if parallel_mode == "column" else out_features

    def _make_weights(self, dtype: Any, device: Any, init_method: Callable[[torch.Tensor], Any] | None) -> None:
        self.weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=dtype, device=device))
        if init_method is not None and torch.device(device).type != "meta":
            init_method(self.weight)
        _mark(self.weight, self.parallel_mode, device)
        if not self.use_bias:
            self.bias = torch.empty(0, dtype=dtype, device=device)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, dtype=dtype, device=device))
        if self.parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        elif self.parallel_mode == "column":
            _mark(self.bias, "column", device)

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Any:
        from megatron.core import tensor_parallel as mapped

        group, is_cut = self.tp_group, self.tp_size > 1
        if is_cut and self.parallel_mode == "column":
            if self.sequence_parallel:
                inp = mapped.gather_from_sequence_parallel_region(inp, True, group)
            else:
                inp = mapped.copy_to_tensor_model_parallel_region(inp, group)
        output = functional.linear(_rounded(inp), _rounded(self.weight))
        if is_cut and self.parallel_mode == "row":
            if self.sequence_parallel:
                output = mapped.reduce_scatter_to_sequence_parallel_region(output, group)
            else:
                output = mapped.reduce_from_tensor_model_parallel_region(output, group)
        if self.return_bias:
            return output, self.bias
        return output + self.bias if self.use_bias else output


class LayerNormLinear(Linear):
    """`layer_norm_weight`, of LayerNorm `layer_norm_bias`, then as Linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        _Module.__init__(self, name)
        assert not fuse_wgrad_accumulation, "autograd has the gradients"
        assert not zero_centered_gamma
        self._of_linear(
            in_features, out_features, sequence_parallel, tp_group, tp_size, bias, return_bias, parallel_mode
        )
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype, device=device))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self._make_weights(params_dtype, device, init_method)

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Any:
        return super().forward(_normalised(self, inp, self.layer_norm_weight, self.layer_norm_bias))


class RMSNorm(torch.nn.Module):
    """`weight`."""

    normalization = "RMSNorm"

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = "cuda",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        size, dtype = normalized_shape or hidden_size, dtype or params_dtype
        assert size is not None
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype, device=device))
        self.bias = None
        if self.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        for param in self.parameters():
            param.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _normalised(self, input, self.weight, self.bias)


class LayerNorm(RMSNorm):
    """`weight` and `bias`."""

    normalization = "LayerNorm"


class GroupedLinear(_Module):
    """`weight0`, `weight1`, …: the experts of a rank, without communication. One extra state for all."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_overlap_rs: bool = False,
        ub_overlap_ag: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        save_original_input: bool = False,
        single_grouped_weight: bool = False,
        single_grouped_bias: bool = False,
        name: str | None = None,
        use_grouped_tensor: bool | None = None,
    ) -> None:
        super().__init__(name)
        assert not fuse_wgrad_accumulation, "autograd has the gradients"
        assert not bias, "experts have none"
        assert parallel_mode is None or tp_size == 1
        self.num_gemms, self.use_bias, self.save_original_input = num_gemms, bias, save_original_input
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
            _mark(weight, parallel_mode, device)
            self.register_parameter(f"weight{index}", weight)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> torch.Tensor:
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        parts = zip(inp.split(m_splits), weights, strict=True)
        return torch.cat([functional.linear(_rounded(part), _rounded(weight)) for part, weight in parts])


class _Padding(torch.nn.Module):
    """The rows of each expert, padded to whole blocks."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        padded = [-(-rows // 32) * 32 for rows in m_splits]
        parts = zip(inp.split(m_splits), m_splits, padded, strict=True)
        return torch.cat([functional.pad(part, (0, 0, 0, new - old)) for part, old, new in parts]), padded


class _Unpadding(torch.nn.Module):
    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        parts = inp.split([-(-rows // 32) * 32 for rows in m_splits])
        return torch.cat([part[:rows] for part, rows in zip(parts, m_splits, strict=True)])


class DotProductAttention(_Module):
    """Causal attention, to a window of tokens if it has one. No weights, but an extra state."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool | None = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        assert attn_mask_type == "causal"
        width = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = softmax_scale or width**-0.5
        self.window = None if window_size is None else window_size[0]
        self.cp_group = cp_group
        assert cp_group is None or window_size is None, "the ring has no windows"

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        attn_mask_type: str = "causal",
    ) -> torch.Tensor:
        assert attn_mask_type == "causal", "which takes no mask"
        queries = torch.arange(len(query_layer))
        if self.cp_group is not None:  # the two pieces of each sequence, as in a ring
            from copus.backends.megatron.attention import _gather_pieces, own_pieces

            key_layer, value_layer = (_gather_pieces(own, self.cp_group) for own in (key_layer, value_layer))
            queries = own_pieces(torch.arange(len(key_layer))[None])[0]
        distance = queries[:, None] - torch.arange(len(key_layer))[None, :]
        seen = (distance >= 0) if self.window is None else (distance >= 0) & (distance <= self.window)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query_layer, key_layer, value_layer))
        context = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=self.softmax_scale, enable_gqa=key.shape[1] != query.shape[1]
        )
        return context.permute(2, 0, 1, 3).flatten(2)


def _register(name: str, **content: Any) -> None:
    module = types.ModuleType(f"{__name__}.{name}")
    module.__path__ = []
    vars(module).update(content)
    sys.modules[module.__name__] = module
    parent, _, child = module.__name__.rpartition(".")
    setattr(sys.modules[parent], child, module)


class _Named:
    """A class that megatron names and never makes."""


_register("common")
_register(
    "common.recipe",
    Format=Format,
    Recipe=_Recipe,
    DelayedScaling=DelayedScaling,
    Float8CurrentScaling=Float8CurrentScaling,
    Float8BlockScaling=Float8BlockScaling,
    MXFP8BlockScaling=MXFP8BlockScaling,
)
_register(
    "pytorch",
    Linear=Linear,
    LayerNormLinear=LayerNormLinear,
    RMSNorm=RMSNorm,
    LayerNorm=LayerNorm,
    GroupedLinear=GroupedLinear,
    DotProductAttention=DotProductAttention,
    Fp8Padding=_Padding,
    Fp8Unpadding=_Unpadding,
    fp8_autocast=fp8_autocast,
    fp8_model_init=lambda *_, **__: contextlib.nullcontext(),
)
_register(
    "pytorch.fp8",
    FP8GlobalStateManager=FP8GlobalStateManager,
    fp8_autocast=fp8_autocast,
    fp8_model_init=lambda *_, **__: contextlib.nullcontext(),
)
_register("pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (_Named,), {}))
_register("pytorch.float8_tensor", Float8Tensor=type("Float8Tensor", (_Named,), {}))
_register(
    "pytorch.ops",
    **{
        name: type(name, (torch.nn.Module,), {})
        for name in ("Sequential", "FusibleOperation", "BasicOperation", "SwiGLU", "GEGLU", "GELU", "ReLU")
    },
)
_register(
    "pytorch.distributed",
    CudaRNGStatesTracker=type("CudaRNGStatesTracker", (_Named,), {}),
    activation_recompute_forward=lambda *_, **__: contextlib.nullcontext(),
    is_fp8_activation_recompute_enabled=lambda: False,
)
_register(
    "pytorch.router",
    **dict.fromkeys(
        ("fused_topk_with_score_function", "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss"), _Named
    ),
)
