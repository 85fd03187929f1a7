"""The causal depthwise convolution in front of a state-space scan, and the state it carries from call to call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .kernel_choice import may_run, takes
from .triton_conv import WIDTHS, triton_conv1d, triton_conv1d_update

try:
    from causal_conv1d import causal_conv1d_fn
except Exception:  # not installed, or built against another torch, which may raise anything
    causal_conv1d_fn = None

CPU_BLOCK = 128  # tokens that go through at once on the CPU, without gradients: they stay in the cache
OFFSETS = 2**31  # elements beyond which the 32-bit offsets of foreign kernels overflow


class CausalConv1d(nn.Module):
    """`silu(conv(x))`, every channel by itself; a token sees itself and the `width - 1` tokens before it.

    A module that is called, so that accelerate's hooks bring its weights back from wherever they were offloaded.
    """

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """As `nn.Conv1d`, which is Megatron's way too."""
        bound = self.weight.shape[-1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, state: Tensor | None = None, seq_idx: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `causal_conv1d`; a step of decoding, without gradients, changes the state in place."""
        if state is not None and x.shape[1] == 1 and seq_idx is None and mask is None and not torch.is_grad_enabled():
            return causal_conv1d_update(state, x[:, 0], self.weight, self.bias)[:, None], state
        return causal_conv1d(x, self.weight, self.bias, state=state, seq_idx=seq_idx, mask=mask)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, width={self.weight.shape[-1]}, bias={self.bias is not None}"


def upcast(x: Tensor) -> Tensor:
    """At least float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`silu` of the causal depthwise convolution, summed in float32, and the state to go on from.

    Args:
        x: `[b, s, c]`.
        weight: `[c, 1, w]`.
        bias: `[c]`.
        state: the last w inputs before `x`, `[b, c, w]`, the newest last; None: zeros.
        seq_idx: `[b, s]`, which document a token is of; one does not see another. The state is of the first one.
        mask: `[b, s]`, False for padding, which stands behind a row's tokens: the state is of the last token.

    Returns:
        `[b, s, c]` in the dtype of `x`, and the state `[b, c, w]`.
    """
    width = weight.shape[-1]
    packaged = causal_conv1d_fn is not None and may_run("packages") and kernel_fits(x, width)
    if not packaged and width in WIDTHS and takes(x, weight, bias, state):
        return triton_conv1d(x, weight, bias, state, seq_idx, None if mask is None else mask.sum(dim=-1))
    rows, _, channels = x.shape
    before = x.new_zeros(rows, width, channels) if state is None else state.transpose(1, 2).to(x.dtype)
    plain = mask is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if plain and x.device.type == "cpu":
        return by_blocks(before, x, weight, bias, seq_idx)
    window = torch.cat((before, x), dim=1)  # [b, w + s, c]
    if mask is None:
        after = window[:, -width:]
    else:
        last = mask.sum(dim=-1, keepdim=True) + torch.arange(width, device=x.device)  # [b, w]
        after = window[torch.arange(rows, device=x.device)[:, None], last]
    documents = None if seq_idx is None else torch.cat((seq_idx[:, :1].expand(-1, width), seq_idx), dim=1)
    if packaged:
        return kernel(window, weight, bias, documents)[:, width:], after.transpose(1, 2)
    return convolve(window, weight, bias, documents).to(x.dtype), after.transpose(1, 2)


def by_blocks(
    before: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` after the inputs `before` `[b, w, c]`, some tokens at a time: what is read stays in the cache."""
    out, width = x.new_empty(x.shape), weight.shape[-1]
    documents = None if seq_idx is None else torch.cat((seq_idx[:, :1].expand(-1, width), seq_idx), dim=1)
    for start in range(0, x.shape[1], CPU_BLOCK):
        end = start + CPU_BLOCK
        window = torch.cat((before, x[:, start:end]), dim=1)
        seen = None if documents is None else documents[:, start : end + width]
        out[:, start:end] = convolve(window, weight, bias, seen)
        before = window[:, -width:]
    return out, before.transpose(1, 2)


def convolve(window: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """The outputs `[b, s, c]` of the last s inputs of `window` `[b, w + s, c]`, at least float32."""
    width = weight.shape[-1]
    length = window.shape[1] - width
    shifted = [upcast(window[:, 1 + tap : 1 + tap + length]) for tap in range(width)]
    if documents is not None:
        same = [documents[:, 1 + tap : 1 + tap + length] == documents[:, width:] for tap in range(width)]
        shifted = [inputs * here[..., None] for inputs, here in zip(shifted, same, strict=True)]
    return weigh(shifted, weight, bias)


def weigh(shifted: Iterable[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """`silu` of the weighted sum of a token's inputs `[..., c]`, the oldest first."""
    taps = upcast(weight[:, 0]).t().contiguous()  # [w, c]; strided, they would keep the loops from being vectorised
    first, *rest = shifted
    out = first * taps[0] if bias is None else torch.addcmul(upcast(bias), first, taps[0])
    for inputs, tap in zip(rest, taps[1:], strict=True):
        out.addcmul_(inputs, tap)
    return F.silu(out, inplace=not torch.is_grad_enabled())


def causal_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One token more: changes `state` `[b, c, w]` in place.

    Args:
        x: `[b, c]`; weight: `[c, 1, w]`; bias: `[c]`.

    Returns:
        `[b, c]` in the dtype of `x`.
    """
    if weight.shape[-1] in WIDTHS and takes(x, weight, bias, state):
        return triton_conv1d_update(state, x, weight, bias)
    state.copy_(torch.cat((state[..., 1:], x[..., None].to(state.dtype)), dim=-1))
    return weigh(upcast(state.to(x.dtype)).unbind(-1), weight, bias).to(x.dtype)


def kernel_fits(x: Tensor, width: int) -> bool:
    """Whether `causal-conv1d` takes `x` `[b, s, c]` with a state in front, and counts its offsets right."""
    rows, length, channels = x.shape
    taken = x.is_cuda and x.dtype != torch.float64 and 2 <= width <= 4 and channels % 8 == 0
    return taken and rows * (width + length) * channels < OFFSETS


def kernel(window: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """`causal-conv1d` over the state and what follows it, `[b, w + s, c]` to the same."""
    bias = None if bias is None else bias.to(weight.dtype)
    documents = None if documents is None else documents.int()
    return causal_conv1d_fn(window.mT, weight[:, 0], bias, documents, activation="silu").mT
