"""Mamba's recurrence over a sequence that several ranks hold in zig-zag slices.

The convolution sees the last inputs before a slice. The scan is linear in the state that enters a slice: each is
scanned from nothing, what it leaves and how much it forgets is gathered, and each is scanned again from the state that
the slices before it make. The traffic of that does not grow with the sequence. Megatron's way instead shares out the
heads: each rank scans the whole sequence for its own, as one process would.
Source of the latter: megatron/core/ssm/mamba_context_parallel.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .conv import CausalConv1d, upcast
from .ssd import time_step
from .zigzag import Collect, Exchange, collect, in_order, join, numbers, split

Scan = Callable[..., tuple[Tensor, Tensor]]  # of `ssd_scan`'s or `selective_scan`'s arguments and results


class Recurrence:
    """A mixer's convolution and scan, to be called as they are, on this rank's two slices `[b, s, ...]`.

    Args:
        heads: whether ranks share out heads and not slices.
    """

    def __init__(self, group: Any, heads: bool, convolution: CausalConv1d, scan: Scan) -> None:
        self.group, self.heads = group, heads
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.convolution, self.given_scan = convolution, scan

    def conv(self, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """As `CausalConv1d.forward` of `x` `[b, s, c]`; the state `[b, c, w]` is that after the whole sequence."""
        width = self.convolution.weight.shape[-1]
        slices = x.chunk(2, dim=1)
        ends = in_order(self.collected([part[:, -width:] for part in slices]))  # [b, w or L, c] each
        outs = []
        for number, part in zip(numbers(self.size, self.rank), slices, strict=True):
            outs.append(self.convolution(part, last_of(ends[:number], width) if number else None)[0])
        return torch.cat(outs, dim=1), last_of(ends, width).detach()

    def scan(self, x: Tensor, dt: Tensor, A: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As the scan of `[b, s, ...]`; the state is that after the whole sequence."""
        options = {name: value for name, value in options.items() if name not in ("state", "seq_idx", "mask")}
        return (self.by_heads if self.heads else self.by_states)(x, dt, A, *args, **options)

    def by_states(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        *,
        dt_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """Slice by slice, from the states that the slices before leave."""
        cut = [(None, None) if t is None else t.chunk(2, dim=1) for t in (x, dt, B, C, z)]
        slices: list[Any] = list(zip(*cut, strict=True))
        left = [self.given_scan(x, dt, A, B, C, dt_bias=dt_bias, **options)[1] for x, dt, B, C, _ in slices]
        logs = [log_decay(A, time_step(dt, dt_bias, None).sum(1), left[0].dim()) for _, dt, *_ in slices]
        states = [torch.zeros_like(left[0])]
        for log, new in zip(in_order(self.collected(logs)), in_order(self.collected(left)), strict=True):
            states.append(torch.addcmul(new, states[-1], log.exp()))
        outs = [
            self.given_scan(x, dt, A, B, C, D, z, dt_bias=dt_bias, state=states[number], **options)[0]
            for number, (x, dt, B, C, z) in zip(numbers(self.size, self.rank), slices, strict=True)
        ]
        return torch.cat(outs, dim=1), states[-1].detach()

    def by_heads(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        *,
        dt_bias: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """The whole sequence of this rank's heads."""
        size, heads = self.size, x.shape[2]
        mine = slice(self.rank * heads // size, (self.rank + 1) * heads // size)
        # A group that several ranks' heads share goes to them all.
        B, C = (t.repeat_interleave(max(1, size // t.shape[2]), dim=2) for t in (B, C))
        given = [t for t in (x, dt, B, C, z) if t is not None]
        shares = [t.unflatten(2, (size, -1)) for t in given]  # [b, s, n, heads / n, ...]
        packed = torch.cat([t.flatten(3) for t in shares], dim=3).permute(2, 0, 1, 3)
        whole = join(Exchange.apply(packed, self.group).unbind(0))  # [b, n s, ...]
        parts = whole.split([t.shape[3:].numel() for t in shares], dim=2)
        x, dt, B, C, *gate = (part.unflatten(2, t.shape[3:]) for part, t in zip(parts, shares, strict=True))
        of_heads = [t if t is None else t[mine] for t in (A, D, dt_bias)]
        z = gate[0] if gate else None
        out, state = self.given_scan(x, dt, of_heads[0], B, C, of_heads[1], z, dt_bias=of_heads[2], **options)
        slices = torch.stack([split(out, size, rank) for rank in range(size)])  # [n, b, s, heads / n, p]
        out = torch.cat(Exchange.apply(slices, self.group).unbind(0), dim=2)
        return out, torch.cat(collect(state.detach(), self.group).unbind(0), dim=1)

    def collected(self, pair: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """What each rank has of its two slices."""
        return [part.unbind(0) for part in Collect.apply(torch.stack(pair), self.group).unbind(0)]


def last_of(ends: list[Tensor], width: int) -> Tensor:
    """The last `width` inputs of what slices end with, as a convolution's state `[b, c, w]`; zeros before the first."""
    last = torch.cat(ends[-width:], dim=1)[:, -width:]
    return F.pad(last.transpose(1, 2), (width - last.shape[1], 0))


def log_decay(A: Tensor, steps: Tensor, dims: int) -> Tensor:
    """How much of the state that enters a slice is left at its end, as a logarithm that multiplies `dims` dimensions.

    Args:
        A: `[h]`, or `[d, n]` of Mamba-1.
        steps: the sum of its time steps, `[b, h]` or `[b, d]`.
    """
    logs = steps * upcast(A) if A.dim() == 1 else steps[..., None] * upcast(A)
    return logs[(...,) + (None,) * (dims - logs.dim())]
