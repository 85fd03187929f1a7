"""A sequence shared out as Megatron's context parallelism does, and the collectives that go with it.

The sequence is cut into 2 n slices; rank r of n holds numbers r and 2 n - 1 - r, one after the other. A causal query
of a later slice sees more keys, and so every rank has as much to do. Source: `get_batch_on_this_cp_rank`,
megatron/core/utils.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Their names since torch 2.13, and before.
NEW = hasattr(dist, "all_gather_single")
all_gather: Any = getattr(dist, "all_gather_single" if NEW else "all_gather_into_tensor", None)
reduce_scatter: Any = getattr(dist, "reduce_scatter_single" if NEW else "reduce_scatter_tensor", None)


def numbers(size: int, rank: int) -> tuple[int, int]:
    """Which two of the 2 `size` slices a rank holds."""
    return rank, 2 * size - 1 - rank


def split(x: Tensor, size: int, rank: int, dim: int = 1) -> Tensor:
    """A rank's two slices of a whole `x`, next to each other along `dim`.

    Raises:
        ValueError: the dimension is no multiple of 2 `size`.
    """
    length = x.shape[dim]
    if length % (2 * size):
        enough = -(-length // (2 * size)) * 2 * size
        raise ValueError(
            f"a sequence of {length} over {size} ranks: context parallelism cuts it into {2 * size} slices of one "
            f"length; pad it on the right to {enough} (labels -100, no mask)"
        )
    slices = x.chunk(2 * size, dim)
    return torch.cat([slices[number] for number in numbers(size, rank)], dim)


def join(parts: Sequence[Tensor], dim: int = 1) -> Tensor:
    """The whole from all ranks' parts, in the order of ranks: `split` undone."""
    return torch.cat(in_order([part.chunk(2, dim) for part in parts]), dim)


def in_order(pairs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What each slice has, slice by slice, from what each rank has of its two."""
    return [first for first, _ in pairs] + [second for _, second in reversed(pairs)]


def positions(length: int, size: int, rank: int, device: torch.device | str | None = None) -> Tensor:
    """Where a rank's `length` tokens are in the whole sequence, `[1, length]`."""
    slices = [torch.arange(length // 2, device=device) + number * (length // 2) for number in numbers(size, rank)]
    return torch.cat(slices)[None]


def collect(x: Tensor, group: Any) -> Tensor:
    """All ranks' `x`, `[n, ...]`; no gradients."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    all_gather(out.flatten(0, 1) if x.dim() else out, x.contiguous(), group=group)
    return out


def give_back(x: Tensor, group: Any) -> Tensor:
    """The sum over ranks of what they have for this one, `[...]` of `x` `[n, ...]`."""
    out = x.new_empty(x.shape[1:])
    reduce_scatter(out, x.flatten(0, 1).contiguous(), group=group)
    return out


class Collect(torch.autograd.Function):
    """`collect`; the gradient is the sum of all ranks' for this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return collect(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return give_back(grad, ctx.group), None


class Exchange(torch.autograd.Function):
    """Part j of `[n, ...]` goes to rank j; what rank j sent takes its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        x = x.contiguous()  # also what comes out: `empty_like` of a permuted tensor would be permuted
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return Exchange.apply(grad, ctx.group), None


class Sum(torch.autograd.Function):
    """The sum over ranks. Its gradient is this rank's part alone, for parameters' gradients are summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
