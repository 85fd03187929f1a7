"""The causal depthwise convolution in front of a state-space scan, and the state it carries from call to call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

try:
    from causal_conv1d import causal_conv1d_fn
except Exception:  # not installed, or built against another torch, which may raise anything
    causal_conv1d_fn = None

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
    rows, length, channels = x.shape
    width = weight.shape[-1]
    before = x.new_zeros(rows, width, channels) if state is None else state.transpose(1, 2).to(x.dtype)
    window = torch.cat((before, x), dim=1)  # [b, w + s, c]
    if mask is None:
        after = window[:, -width:]
    else:
        last = mask.sum(dim=-1, keepdim=True) + torch.arange(width, device=x.device)  # [b, w]
        after = window[torch.arange(rows, device=x.device)[:, None], last]
    documents = None if seq_idx is None else torch.cat((seq_idx[:, :1].expand(-1, width), seq_idx), dim=1)
    if causal_conv1d_fn is not None and kernel_fits(window, width):
        return kernel(window, weight, bias, documents)[:, width:], after.transpose(1, 2)

    taps = upcast(weight[:, 0]).t()  # [w, c]
    shifted = [upcast(window[:, 1 + tap : 1 + tap + length]) for tap in range(width)]
    if documents is not None:
        same = [documents[:, 1 + tap : 1 + tap + length] == documents[:, width:] for tap in range(width)]
        shifted = [inputs * here[..., None] for inputs, here in zip(shifted, same, strict=True)]
    out = shifted[0] * taps[0] if bias is None else torch.addcmul(upcast(bias), shifted[0], taps[0])
    for inputs, tap in zip(shifted[1:], taps[1:], strict=True):
        out.addcmul_(inputs, tap)
    return F.silu(out).to(x.dtype), after.transpose(1, 2)


def kernel_fits(window: Tensor, width: int) -> bool:
    """Whether `causal-conv1d` takes these inputs and counts their offsets right."""
    taken = window.is_cuda and window.dtype != torch.float64 and 2 <= width <= 4 and window.shape[-1] % 8 == 0
    return taken and window.numel() < OFFSETS


def kernel(window: Tensor, weight: Tensor, bias: Tensor | None, documents: Tensor | None) -> Tensor:
    """`causal-conv1d` over the state and what follows it, `[b, w + s, c]` to the same."""
    bias = None if bias is None else bias.to(weight.dtype)
    documents = None if documents is None else documents.int()
    return causal_conv1d_fn(window.mT, weight[:, 0], bias, documents, activation="silu").mT
