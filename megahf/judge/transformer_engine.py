"""A stand-in for the package `transformer_engine`, so that Megatron's real TE classes and layer specs run on a CPU.

Megatron's wrappers (`TELayerNormColumnParallelLinear` and its kin) subclass six classes of Transformer Engine; here
are those six in plain torch, for what a GPT asks of them. So names, shapes and sharding in the files come from
Megatron's own code. That the stand-ins compute the right thing is checked where it can be: models of the local spec,
which have none of this in them, must give the same logits.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import Parameter

VERSION = "2.8.0"  # the first that has `softmax_type`
extra_state = "tensor"  # what a module stores beside its weights: "tensor" (TE 1.11 and later) or "bytes" (before)


class Module(nn.Module):
    """What every TE module has: an extra state, empty where there is no FP8."""

    def get_extra_state(self) -> Tensor | io.BytesIO:
        if extra_state == "tensor":
            return torch.empty(0, dtype=torch.uint8)
        state = io.BytesIO()
        torch.save({"fp8_recipe": None}, state)
        return state

    def set_extra_state(self, state: object) -> None:
        """Nothing to restore."""


class Linear(Module):
    """`x W^T + b`, the weight already cut to this rank by `parallel_mode`; bias returned apart if `return_bias`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_group: Any = None,
        tp_size: int = 1,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype = torch.float32,
        sequence_parallel: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        if sequence_parallel:
            raise ValueError("the stand-in for Transformer Engine has no sequence parallelism")
        self.in_features = in_features // tp_size if parallel_mode == "row" else in_features
        self.out_features = out_features // tp_size if parallel_mode == "column" else out_features
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.use_bias, self.return_bias = bias, return_bias
        self.weight = Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype))
        self.bias = Parameter(torch.zeros(self.out_features, dtype=params_dtype)) if bias else None
        if init_method is not None:
            init_method(self.weight)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        y = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            torch.distributed.all_reduce(y, group=self.tp_group)
        if self.return_bias:
            return y, self.bias
        return y if self.bias is None else y + self.bias


class GroupedLinear(Module):
    """`num_gemms` Linears side by side, `weight0`, `weight1` ...; each takes its share of the rows, in that order.

    How experts are cut over ranks is not TE's: Megatron gives the sizes of this rank.
    """

    fp8 = fp8_calibration = False

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        tp_size: int = 1,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        super().__init__()
        if tp_size != 1:
            raise ValueError("the stand-in for Transformer Engine has no grouped linear that communicates")
        self.num_gemms, self.use_bias, self.return_bias = num_gemms, bias, return_bias
        self.fp8_meta = {"fp8_checkpoint": False}
        for expert in range(num_gemms):
            weight = Parameter(torch.empty(out_features, in_features, dtype=params_dtype))
            self.register_parameter(f"weight{expert}", weight)
            if init_method is not None:
                init_method(weight)
            if bias:
                self.register_parameter(f"bias{expert}", Parameter(torch.zeros(out_features, dtype=params_dtype)))

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is none."""

    def forward(
        self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
    ) -> Tensor | tuple[Tensor, list[Parameter]]:
        weights = [self.get_parameter(f"weight{expert}") for expert in range(self.num_gemms)]
        biases = [self.get_parameter(f"bias{expert}") for expert in range(self.num_gemms)] if self.use_bias else []
        added = [None] * self.num_gemms if self.return_bias or not biases else biases
        y = torch.cat([F.linear(*group) for group in zip(x.split(m_splits), weights, added, strict=True)])
        return (y, biases) if self.return_bias else y


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm; `1 + weight` where gamma is zero-centred."""
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def gamma(size: int, zero_centered: bool, dtype: torch.dtype) -> Parameter:
    return Parameter(torch.full((size,), 0.0 if zero_centered else 1.0, dtype=dtype))


class LayerNormLinear(Linear):
    """A norm and the Linear it feeds in one module; the norm's weights are `layer_norm_weight` and `_bias`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **rest: Any,
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **rest)
        self.eps, self.zero_centered = eps, zero_centered_gamma
        self.layer_norm_weight = gamma(in_features, zero_centered_gamma, params_dtype)
        bias = normalization == "LayerNorm"
        self.layer_norm_bias = Parameter(torch.zeros(in_features, dtype=params_dtype)) if bias else None

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        return super().forward(norm(x, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered))


class LayerNorm(Module):
    """LayerNorm over the last dimension."""

    has_bias = True

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered_gamma
        self.weight = gamma(hidden_size, zero_centered_gamma, params_dtype)
        self.bias = Parameter(torch.zeros(hidden_size, dtype=params_dtype)) if self.has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return norm(x, self.weight, self.bias, self.eps, self.zero_centered)


class RMSNorm(LayerNorm):
    """RMSNorm over the last dimension."""

    has_bias = False


class DotProductAttention(Module):
    """Attention over `[s, b, heads, d]`, causal, over all keys or all but padding; windows, and a softmax's offset."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        *,
        tp_size: int = 1,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] | None = None,
        softmax_type: str = "vanilla",
        **_: Any,
    ) -> None:
        super().__init__()
        keys = kv_channels if isinstance(kv_channels, int) else kv_channels[0]  # (keys, values) of latent attention
        self.scale = keys**-0.5 if softmax_scale is None else softmax_scale
        self.window = (-1, 0) if window_size is None else tuple(window_size)
        offset = None if softmax_type == "vanilla" else torch.zeros(num_attention_heads // tp_size)  # off-by-one: 0
        self.softmax_offset = Parameter(offset) if offset is not None and softmax_type == "learnable" else offset

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, attn_mask_type: str, **_: Any
    ) -> Tensor:
        everywhere = self.window == (-1, 0)
        padding, free = (everywhere and attn_mask_type == kind for kind in ("padding", "no_mask"))
        if not padding and ((attn_mask_type != "causal" and not free) or attention_mask is not None):
            raise ValueError(f"the stand-in for Transformer Engine has no {attn_mask_type} mask")
        length, batch, heads, _size = query.shape
        key, value = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (key, value))  # [s, b, n, d]
        scores = torch.einsum("sbnd,tbnd->bnst", query, key) * self.scale  # [b, n, s, s]
        hidden = attention_mask if padding or free else self.hidden(length)  # a padding mask: [b, 1, 1, s]
        scores = scores if hidden is None else scores.masked_fill(hidden, float("-inf"))
        if self.softmax_offset is not None:
            offset = self.softmax_offset.view(1, heads, 1, 1).expand(batch, heads, length, 1)
            scores = torch.cat([scores, offset], dim=-1)  # [b, n, s, s + 1]
        weights = scores.softmax(dim=-1)[..., :length]  # [b, n, s, s]
        return torch.einsum("bnst,tbnd->sbnd", weights, value).reshape(length, batch, -1)  # [s, b, n * d]

    def hidden(self, length: int) -> Tensor:
        left, right = self.window
        distance = torch.arange(length)[:, None] - torch.arange(length)  # [s, s], query minus key
        hidden = distance < -right
        return hidden if left < 0 else hidden | (distance > left)


class Anything(ModuleType):
    """A module whose every name is an empty class: for what Megatron imports and a GPT never uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


class CudaRNGStatesTracker:
    """The base of Megatron's TE generator tracker; nothing here draws from it."""


@contextlib.contextmanager
def fp8_autocast(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Puts the stand-in where `import transformer_engine` finds it."""
    classes = (Linear, GroupedLinear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention)
    layers = {cls.__name__: cls for cls in classes}
    contents: dict[str, dict[str, Any]] = {
        "transformer_engine": {"__version__": VERSION},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {},
        "transformer_engine.pytorch": layers,
        "transformer_engine.pytorch.fp8": {
            "FP8GlobalStateManager": FP8GlobalStateManager,
            "fp8_autocast": fp8_autocast,
        },
        "transformer_engine.pytorch.distributed": {"CudaRNGStatesTracker": CudaRNGStatesTracker},
        "transformer_engine.pytorch.float8_tensor": {},
        "transformer_engine.pytorch.ops": {},
        "transformer_engine.pytorch.router": {},
        "transformer_engine.pytorch.tensor": {},
    }
    for name, members in contents.items():
        place(name, members)


def place(name: str, members: dict[str, Any]) -> None:
    module = Anything(name)
    module.__path__ = []
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__dict__.update(members)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def choose_final_norm(engine: bool) -> None:
    """The norm that Megatron's blocks end with; local layers' as where Transformer Engine is not installed."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.transformer import transformer_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    block: Any = transformer_block
    block.LayerNormImpl = TENorm if engine else WrappedTorchNorm
