"""Exact attention of queries over blocks of keys, merged by the logarithms of their sums: no mask, linear memory.

Causal attention after a past is a rectangle (all of the past) and a triangle (the diagonal); a sliding window is a
triangle below the diagonal and a mirrored one at the window's far edge. Fused kernels know both shapes. Each returns
the logarithm of its softmax' denominator, by which the parts are weighed (Rabe & Staats, arXiv:2112.05682).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 512  # queries and keys at once where no fused kernel runs


class Block(NamedTuple):
    """Which keys some of the queries see.

    Args:
        queries, keys: places in their tensors.
        causal: key j is seen by query i where j <= i, counted within the block, which is square; False: all keys are.
        mirrored: of a causal block: j >= i instead, as at the far edge of a sliding window.
    """

    queries: slice
    keys: slice
    causal: bool
    mirrored: bool = False


class Kernel(NamedTuple):
    """A fused attention of one device; all tensors `[b, heads, s, d]` of one width, keys in groups.

    Args:
        forward: query, key, value, causal, scaling to the output and the log-sum-exp `[b, n, s]` of its scores.
        backward: gradient, query, key, value, output, log-sum-exp, causal, scaling to the three gradients.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def causal_blocks(start: int, stop: int, position: int, window: int | None = None) -> list[Block]:
    """The blocks by which queries `start` to `stop` see the keys up to their own places, or so many last ones.

    Args:
        position: the place among the keys of query `start`; the keys from 0 on are all there.
        window: how many keys a query sees at most, itself among them.
    """
    if window is None or window >= position + stop - start:
        past = [Block(slice(start, stop), slice(0, position), False)] if position else []
        return [*past, Block(slice(start, stop), slice(position, position + stop - start), True)]
    blocks = []
    while start < stop:  # bands up to the next multiple of the window: their far edges never lie before key 0
        size = min(window - position % window, stop - start)
        band, first, edge = slice(start, start + size), position - window + 1, position + size - window
        blocks.append(Block(band, slice(position, position + size), True))
        if max(edge, 0) < position:
            blocks.append(Block(band, slice(max(edge, 0), position), False))
        if position >= window and size > 1:
            blocks.append(Block(slice(start, start + size - 1), slice(first, edge), True, mirrored=True))
        start, position = start + size, position + size
    return blocks


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float, sinks: Tensor | None = None
) -> Tensor:
    """Softmax attention of each query over the keys of all its blocks together, which must not overlap.

    Args:
        query: `[b, n, s, d]`.
        key: `[b, g, s_k, d]`, each of the g heads for n / g of the queries' in turn.
        value: `[b, g, s_k, v]`.
        sinks: one more logit for each head, `[n]`, whose value is zero.

    Returns:
        `[b, s, n, v]`; zeros for a query that sees no key.
    """
    check(query, key, value, blocks)
    query, key, value = alike(query, key, value)
    return BlockAttention.apply(query, key, value, sinks, tuple(blocks), scaling).transpose(1, 2)


def alike(*tensors: Tensor) -> list[Tensor]:
    """Tensors in one dtype: autocast's where it is on, as it does for torch's own attention."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in tensors]


def check(query: Tensor, key: Tensor, value: Tensor, blocks: Iterable[Block]) -> None:
    if query.shape[1] % key.shape[1] or key.shape[:3] != value.shape[:3]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"queries, keys and values {shapes}: keys and values share heads, which divide the queries'")
    for queries, keys, causal, mirrored in blocks:
        rows, columns = queries.stop - queries.start, keys.stop - keys.start
        if min(rows, columns) < 1 or queries.stop > query.shape[2] or keys.stop > key.shape[2]:
            raise ValueError(f"a block of queries {queries} and keys {keys}, of {query.shape[2]} and {key.shape[2]}")
        if (causal and rows != columns) or (mirrored and not causal):
            raise ValueError(f"a causal block is square, and only such a one mirrored: {rows} queries, {columns} keys")


class BlockAttention(torch.autograd.Function):
    """`attend_blocks` to `[b, n, s, v]`; keeps its inputs, its output and one number a query."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        blocks: tuple[Block, ...],
        scaling: float,
    ) -> Tensor:
        out, lse = nothing_seen(query, value.shape[-1], sinks)
        for block in blocks:
            see(out, lse, query, key, value, block, scaling)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value)]
        for block in ctx.blocks:
            see_backward(grads, grad, query, key, value, out, lse, block, ctx.scaling)
        dsinks = None if sinks is None else sinks_backward(grad, out, lse, sinks)
        return *(x.to(query.dtype) for x in grads), dsinks, None, None


def nothing_seen(query: Tensor, width: int, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What queries `[b, n, s, d]` have before their first block: outputs `[b, n, s, width]` and log-sums `[b, n, s]`.

    A sink is a score already counted, with nothing to its name.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], width, dtype=dtype)
    lse = query.new_full(query.shape[:3], float("-inf"), dtype=dtype)
    return out, lse if sinks is None else lse.copy_(sinks.detach().to(dtype).view(1, -1, 1).expand_as(lse))


def see(out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor, block: Block, scaling: float) -> None:
    """Adds what one block's queries see to `out` and `lse` (of `nothing_seen`), in place."""
    place = block.queries
    cut = [query[:, :, place], key[:, :, block.keys], value[:, :, block.keys]]
    cut = [x.flip(2) for x in cut] if block.mirrored else cut
    found, weight = kernel_for(query).forward(*as_wide(*cut), block.causal, scaling)
    found, weight = found[..., : value.shape[-1]], weight.to(lse.dtype)
    if block.mirrored:
        found, weight = found.flip(2), weight.flip(2)
    merge(out[:, :, place], lse[:, :, place], found, weight)


def merge(out: Tensor, lse: Tensor, found: Tensor, weight: Tensor) -> None:
    """Weighs what more keys gave, `found` `[b, n, s, v]` of log-sums `weight` `[b, n, s]`, into `out` and `lse`."""
    after = torch.logaddexp(lse, weight)
    out.mul_((lse - after).exp_()[..., None]).add_(found * (weight - after).exp_()[..., None])
    lse.copy_(after)


def see_backward(
    grads: Sequence[Tensor],
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    scaling: float,
) -> None:
    """Adds a block's part to the gradients of query, key and value, in place.

    With the merged output and log-sum a kernel computes the weights of the whole softmax, and so the exact part.
    """
    queries, keys = block.queries, block.keys
    cut = [grad[:, :, queries], query[:, :, queries], key[:, :, keys], value[:, :, keys], out[:, :, queries]]
    weight = lse[:, :, queries]
    if block.mirrored:
        cut, weight = [x.flip(2) for x in cut], weight.flip(2)
    parts = kernel_for(query).backward(*as_wide(*cut), weight.contiguous(), block.causal, scaling)
    for whole, part, place in zip(grads, parts, (queries, keys, keys), strict=True):
        part = part.flip(2) if block.mirrored else part
        whole[:, :, place] += part[..., : whole.shape[-1]]


def sinks_backward(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """The gradient of the sinks `[n]`: each takes its share of every query's weights, and adds nothing."""
    share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp_()
    return -(share * (grad.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)


def as_wide(*tensors: Tensor) -> list[Tensor]:
    """Tensors `[..., d]` with zeros behind their channels, to one width of whole eights: what fused kernels want.

    Their channels lie side by side, which the CPU's kernel takes for granted.
    """
    width = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    padded = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def kernel_for(query: Tensor) -> Kernel:
    """The fused kernel for tensors like these, or the plain one."""
    if query.device.type == "cpu":
        return CPU
    flash = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256
    if query.is_cuda and flash and torch.cuda.get_device_capability(query.device) >= (8, 0):
        return CUDA
    return PLAIN


def cpu_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return attention(query, key, value, 0.0, causal, scale=scaling)


def cpu_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return attention(grad, query, key, value, out, lse, 0.0, causal, scale=scaling)


def cuda_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    return attention(query, key, value, 0.0, causal, scale=scaling)[:2]


def cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_backward
    groups, lengths = key.shape[1], (query.shape[2], key.shape[2])
    key, value = (x.repeat_interleave(query.shape[1] // groups, dim=1) for x in (key, value))
    dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)  # its random state, which 0.0 leaves unread
    dquery, dkey, dvalue = attention(
        grad, query, key, value, out, lse, None, None, *lengths, 0.0, causal, dropout, dropout[0], scale=scaling
    )
    return dquery, *(of_groups(x, groups) for x in (dkey, dvalue))


def of_groups(grad: Tensor, groups: int) -> Tensor:
    """The gradients `[b, n, s, d]` of repeated heads, summed to those of the `groups` they repeat."""
    return grad if grad.shape[1] == groups else grad.unflatten(1, (groups, -1)).sum(2)


def plain_forward(query: Tensor, key: Tensor, value: Tensor, causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """As a kernel, of matmuls over tiles."""
    out, lse = nothing_seen(query, value.shape[-1], None)
    for rows, columns in tiles(query.shape[2], key.shape[2], causal):
        scores = scores_of(query, key, rows, columns, causal, scaling)  # [b, n, i, j]
        weight = scores.logsumexp(-1)
        found = (scores - weight[..., None]).exp_() @ heads_of(value, columns, query)
        merge(out[:, :, rows], lse[:, :, rows], found, weight)
    return out, lse


def plain_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dquery, dkey, dvalue = (torch.zeros_like(x, dtype=lse.dtype) for x in (query, key, value))
    for rows, columns in tiles(query.shape[2], key.shape[2], causal):
        weights = (scores_of(query, key, rows, columns, causal, scaling) - lse[:, :, rows, None]).exp_()
        dout, keys, values = (
            grad[:, :, rows].to(lse.dtype),
            heads_of(key, columns, query),
            heads_of(value, columns, query),
        )
        common = (dout * out[:, :, rows]).sum(-1, keepdim=True)
        dscores = weights * (dout @ values.mT - common) * scaling
        dquery[:, :, rows] += dscores @ keys
        dkey[:, :, columns] += of_groups(dscores.mT @ query[:, :, rows].to(lse.dtype), key.shape[1])
        dvalue[:, :, columns] += of_groups(weights.mT @ dout, key.shape[1])
    return dquery, dkey, dvalue


def tiles(queries: int, keys: int, causal: bool) -> list[tuple[slice, slice]]:
    """Queries and keys of every tile in which some are seen."""
    starts = [(row, column) for row in range(0, queries, TILE) for column in range(0, keys, TILE)]
    return [
        (slice(row, min(row + TILE, queries)), slice(column, min(column + TILE, keys)))
        for row, column in starts
        if column <= row or not causal
    ]


def scores_of(query: Tensor, key: Tensor, rows: slice, columns: slice, causal: bool, scaling: float) -> Tensor:
    """A tile of scores `[b, n, i, j]`, in float32 at least, minus infinity where a key is not seen."""
    keys = heads_of(key, columns, query)
    scores = query[:, :, rows].to(keys.dtype) @ keys.mT * scaling
    if causal and rows.start == columns.start:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def heads_of(x: Tensor, columns: slice, query: Tensor) -> Tensor:
    """A tile of keys or values, `[b, g, s, d]` to `[b, n, j, d]`: a head for each of the query's."""
    cut = x[:, :, columns].to(torch.promote_types(x.dtype, torch.float32))
    return cut.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


CPU = Kernel(cpu_forward, cpu_backward)
CUDA = Kernel(cuda_forward, cuda_backward)
PLAIN = Kernel(plain_forward, plain_backward)
