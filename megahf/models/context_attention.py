"""Causal attention over a sequence that several ranks hold in zig-zag slices, exact, without a mask.

By gathering, a rank has all keys for the time of one layer, in the forward and once more in the backward. In a ring
keys travel from rank to rank and their gradients after them, so that it never holds more than two ranks' (Liu et al.,
arXiv:2310.01889). A window asks for no more than the keys before a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .block_attention import Block, alike, attend_blocks, causal_blocks, nothing_seen, see, see_backward, sinks_backward
from .zigzag import Collect, collect, give_back, in_order, join, numbers, split


def context_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Any,
    ring: bool,
    scaling: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys up to their own places.

    Args:
        query: `[b, n, s, d]`, this rank's two slices.
        key, value: `[b, g, s, d]` and `[b, g, s, v]`, likewise; or those of all slices in order, `[b, g, n s, d]`.
        ring: whether keys go round; a window they need not go round for.

    Returns:
        `[b, s, n, v]`.
    """
    query, key, value = alike(query, key, value)
    size, rank, length = dist.get_world_size(group), dist.get_rank(group), query.shape[2] // 2
    whole = key.shape[2] > query.shape[2] or size == 1
    if not whole and window is not None and window - 1 <= length:
        return halo_attention(query, key, value, group, scaling, window, sinks)
    if not whole and ring and window is None:
        return RingAttention.apply(query, key, value, sinks, group, scaling).transpose(1, 2)
    blocks = [
        block
        for place, number in enumerate(numbers(size, rank))
        for block in causal_blocks(place * length, (place + 1) * length, number * length, window)
    ]
    if whole:
        return attend_blocks(query, key, value, blocks, scaling, sinks)
    return GatheredAttention.apply(query, key, value, sinks, group, tuple(blocks), scaling).transpose(1, 2)


def halo_attention(
    query: Tensor, key: Tensor, value: Tensor, group: Any, scaling: float, window: int, sinks: Tensor | None
) -> Tensor:
    """Of a window that reaches into the slice before at most: its last keys are all that is exchanged."""
    length, seen = query.shape[2] // 2, window - 1
    both = torch.cat((key, value), dim=-1).unflatten(2, (2, length))  # [b, g, 2, L, d + v]
    tails = Collect.apply(both[:, :, :, length - seen :].contiguous(), group)
    ends = in_order([part.unbind(2) for part in tails.unbind(0)])  # [b, g, window - 1, d + v] each
    pieces: list[Tensor] = []
    blocks: list[Block] = []
    held = 0  # keys so far
    for place, number in enumerate(numbers(len(tails), dist.get_rank(group))):
        before = ends[number - 1 : number] if number else []
        pieces += [*before, both[:, :, place]]
        start = seen if number else 0
        for queries, keys, causal, mirrored in causal_blocks(place * length, (place + 1) * length, start, window):
            blocks.append(Block(queries, slice(held + keys.start, held + keys.stop), causal, mirrored))
        held += start + length
    key, value = torch.cat(pieces, dim=2).split((key.shape[-1], value.shape[-1]), dim=-1)
    return attend_blocks(query, key, value, blocks, scaling, sinks)


class GatheredAttention(torch.autograd.Function):
    """Attention to `[b, n, s, v]` over keys gathered from all ranks; only this rank's are kept for the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        group: Any,
        blocks: Sequence[Block],
        scaling: float,
    ) -> Tensor:
        keys, values = (join(collect(x, group).unbind(0), 2) for x in (key, value))
        out, lse = nothing_seen(query, value.shape[-1], sinks)
        for block in blocks:
            see(out, lse, query, keys, values, block, scaling)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.group, ctx.blocks, ctx.scaling = group, blocks, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        keys, values = (join(collect(x, ctx.group).unbind(0), 2) for x in (key, value))
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, keys, values)]
        for block in ctx.blocks:
            see_backward(grads, grad, query, keys, values, out, lse, block, ctx.scaling)
        size = dist.get_world_size(ctx.group)
        parts = (torch.stack([split(x, size, rank, 2) for rank in range(size)]) for x in grads[1:])
        dkey, dvalue = (give_back(x, ctx.group) for x in parts)
        dsinks = None if sinks is None else sinks_backward(grad, out, lse, sinks)
        return *(x.to(query.dtype) for x in (grads[0], dkey, dvalue)), dsinks, None, None, None


class RingAttention(torch.autograd.Function):
    """Attention to `[b, n, s, v]` over keys that go round; in the backward their gradients follow them home."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, group: Any, scaling: float
    ) -> Tensor:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        out, lse = nothing_seen(query, value.shape[-1], sinks)
        here = torch.cat((key, value), dim=-1)
        for step in range(size):
            following = Passed(here, group) if step < size - 1 else None
            keys, values = here.split((key.shape[-1], value.shape[-1]), dim=-1)
            for block in ring_blocks(query.shape[2] // 2, rank, (rank - step) % size):
                see(out, lse, query, keys, values, block, scaling)
            here = here if following is None else following.wait()
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.group, ctx.scaling = group, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        size, rank = dist.get_world_size(ctx.group), dist.get_rank(ctx.group)
        widths = key.shape[-1], value.shape[-1]
        dquery, here = torch.zeros_like(query, dtype=lse.dtype), torch.cat((key, value), dim=-1)
        gradients = None  # of the keys that are here, from the ranks they have been to
        for step in range(size):
            following = Passed(here, ctx.group) if step < size - 1 else None
            part = torch.zeros_like(here, dtype=lse.dtype)
            keys, values = here.split(widths, dim=-1)
            for block in ring_blocks(query.shape[2] // 2, rank, (rank - step) % size):
                see_backward([dquery, *part.split(widths, -1)], grad, query, keys, values, out, lse, block, ctx.scaling)
            if gradients is not None:
                part += gradients.wait()
            gradients = Passed(part, ctx.group)
            here = here if following is None else following.wait()
        dkey, dvalue = cast(Passed, gradients).wait().split(widths, dim=-1)
        dsinks = None if sinks is None else sinks_backward(grad, out, lse, sinks)
        return *(x.to(query.dtype) for x in (dquery, dkey, dvalue)), dsinks, None, None


def ring_blocks(length: int, rank: int, source: int) -> list[Block]:
    """What a rank's two slices of `length` see of another's two."""
    first, second, both = slice(0, length), slice(length, 2 * length), slice(0, 2 * length)
    if source < rank:
        return [Block(both, first, False)]
    if source > rank:
        return [Block(second, both, False)]
    return [Block(first, first, True), Block(second, first, False), Block(second, second, True)]


class Passed:
    """A tensor on its way to the next rank, and the one before's on its way here."""

    def __init__(self, x: Tensor, group: Any) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        after, before = (dist.get_global_rank(group, (rank + step) % size) for step in (1, -1))
        self.sent = x.contiguous()  # held until it has gone
        self.received = torch.empty_like(self.sent)
        sending = dist.P2POp(dist.isend, self.sent, after, group)
        receiving = dist.P2POp(dist.irecv, self.received, before, group)
        self.works = dist.batch_isend_irecv([sending, receiving])

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.received
