# mypy: disable-error-code="no-untyped-def"
"""A mixture's experts as Triton kernels: what `moe.py` does between the router and the residual stream.

Up: rows are read where their tokens are, biased and activated before they are stored. Down: rows stay sorted, and each
token sums its experts' in float32, in their order, weighed there. Kept for the way back are the rows before the
activation alone: the gradient of an expert's weight, `<dy, down(a)>`, is `<down^T(dy), a>`, and `a` is made again then
for the matrices' sake anyway. Nothing waits for the GPU, and there is no sorted copy of tokens or of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import rowwise
from .triton_grouped import (
    ACTIVATIONS,
    TOGETHER,
    activated,
    block_rows,
    multiply,
    multiply_outer,
    multiply_rows,
    options_of,
    place,
    size,
    sum_groups,
)
from .triton_route import Route, fake_route, most_tiles, route

COLUMNS = 1024  # of a row, that a program sums


@jit
def gather_kernel(rows, inverse, weights, ends, out, groups, columns, TOPK: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a token's rows, weighed; those that no group here has are none."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    held = tl.load(ends + groups - 1)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for i in range(TOPK):
        row = tl.load(inverse + token * TOPK + i)
        value = tl.load(rows + row.to(tl.int64) * columns + column, mask=(column < columns) & (row < held), other=0)
        value = value.to(tl.float32)
        if weights is not None:
            value *= tl.load(weights + token * TOPK + i).to(tl.float32)
        total += value
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


@jit
def inner_backward_kernel(
    grad, order, token, weights, down, pre, tile_group, tile_row, ends, dpre, weighed, dots,
    tiles, inner, columns, rows, grad_row, w_group, w_out, w_in, ACT: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, TOGETHER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """From the tokens' gradients to that of `pre`; weighed activations; a tile's part of the gradients of weights."""
    tile, across = place(tiles, tl.cdiv(columns, N), TOGETHER)
    group = tl.load(tile_group + tile).to(tl.int64)
    if group < 0:
        return
    first = tl.load(tile_row + tile)
    row = first + tl.arange(0, M)
    there = row < tl.load(ends + group)
    column = across * N + tl.arange(0, N)
    here = column < columns
    source = tl.load(token + row, mask=there, other=0)
    left = grad + source.to(tl.int64)[:, None] * grad_row
    right = down + group * w_group + column.to(tl.int64)[None, :] * w_out
    back, _ = multiply(left, right, 0, there, here, inner, w_in, False, EVEN, M, N, K)
    mask, at = there[:, None] & here[None, :], tl.arange(0, M)[:, None] * columns + column[None, :]
    width = columns * (2 if GATED else 1)
    before = tl.arange(0, M)[:, None] * width + column[None, :]
    weighed += first.to(tl.int64) * columns
    pre += first.to(tl.int64) * width
    dpre += first.to(tl.int64) * width
    original = tl.load(order + row, mask=there, other=0)
    weight = tl.load(weights + original, mask=there, other=0).to(tl.float32)[:, None]
    value, slope = activated(tl.load(pre + before, mask=mask, other=0).to(tl.float32), ACT)
    if GATED:
        dup = (back * weight * value).to(dpre.dtype.element_ty)
        tl.store(dpre + columns + before, dup, mask=mask)
        up = tl.load(pre + columns + before, mask=mask, other=0).to(tl.float32)
        value *= up
        slope *= up
    tl.store(dots + across.to(tl.int64) * rows + original, tl.sum(back * value, axis=1), mask=there)
    tl.store(dpre + before, (back * weight * slope).to(dpre.dtype.element_ty), mask=mask)
    tl.store(weighed + at, (value * weight).to(weighed.dtype.element_ty), mask=mask)


def gather_sum(rows: Tensor, where: Route, weights: Tensor | None, tokens: int, topk: int) -> Tensor:
    """Sorted `rows` `[t k, h]` to `[t, h]`, times `weights` `[t, k]` if there are."""
    columns = rows.shape[1]
    out = rows.new_empty(tokens, columns)
    block = min(COLUMNS, 1 << (columns - 1).bit_length())
    grid = (tokens, -(-columns // block))
    fixed = {"TOPK": topk, "COLUMNS": block, "num_warps": max(1, min(4, block // 256))}
    launch(gather_kernel, grid, rows, where.inverse, weights, where.ends, out, len(where.ends), columns, **fixed)
    return out


def inner_backward(
    grad: Tensor, weights: Tensor, down: Tensor, pre: Tensor, where: Route, block: int, act: str, gated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `pre` and weighed activations `[m, f]`, sorted; those of the weights `[t k]`, float32, are not."""
    grad = rowwise(grad)
    rows, columns, inner = len(pre), down.shape[2], down.shape[1]
    dpre, weighed = torch.empty_like(pre), pre.new_empty(rows, columns)
    tensors = (grad, where.order, where.token, weights.contiguous(), down, pre, where.tile_expert, where.tile_row)
    tiles = most_tiles(rows, len(down), block)
    strides = (grad.stride(0), down.stride(0), down.stride(2), down.stride(1))

    def run(options: Options) -> Tensor:
        across = -(-columns // options["N"])
        dots = torch.empty(across, rows, dtype=torch.float32, device=grad.device)
        fixed = {"ACT": act, "GATED": gated, "EVEN": inner % options["K"] == 0, "TOGETHER": TOGETHER, "M": block}
        outs, numbers = (where.ends, dpre, weighed, dots), (tiles, inner, columns, rows)
        launch(inner_backward_kernel, (tiles * across,), *tensors, *outs, *numbers, *strides, **fixed, **options)
        return dots.sum(dim=0)

    key = ("experts_inner_backward", architecture(grad.device), size(grad.dtype, block, (inner, columns)))
    options = options_for(key, options_of(key[-1], wide=False), run=run)
    return dpre, weighed, run(options)


def experts_forward(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, act: str, gated: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `triton_experts` gives; the rows before the activation, if they are kept; and the route."""
    tokens, topk = experts.shape
    rows, groups = tokens * topk, len(up)
    block = block_rows(rows, groups)
    where = route(experts, groups, block)
    tiles = (where.ends, where.tile_expert, where.tile_row, block)
    x, pre = multiply_rows(
        hidden, up, *tiles, rows=rows, index=where.token, bias=up_bias, act=act, gated=gated, keep=keep
    )
    x, _ = multiply_rows(x, down, *tiles, rows=rows, bias=down_bias)
    out = gather_sum(x, where, weights.contiguous(), tokens, topk)
    return out, hidden.new_empty(0) if pre is None else pre, *where


def experts_backward(
    grad: Tensor, hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, pre: Tensor, order: Tensor, token: Tensor, inverse: Tensor, ends: Tensor,
    tile_expert: Tensor, tile_row: Tensor, act: str, gated: bool, matrices: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of hidden, weights, up, its bias, down and its bias; empty where there is none, or none is wanted."""
    (tokens, topk), where = experts.shape, Route(order, token, inverse, ends, tile_expert, tile_row)
    block = block_rows(len(order), len(ends))
    dpre, weighed, dots = inner_backward(grad, weights, down, pre, where, block, act, gated)
    tiles = (ends, tile_expert, tile_row, block)
    back, _ = multiply_rows(dpre, up.transpose(1, 2), *tiles, rows=len(order))
    dhidden = gather_sum(back, where, None, tokens, topk)
    dots = dots.view(tokens, topk)
    dup, ddown, dup_bias, ddown_bias = (hidden.new_empty(0) for _ in range(4))
    if matrices:
        dup = multiply_outer(dpre, hidden, ends, right_index=token)
        ddown = multiply_outer(grad, weighed, ends, left_index=token)
    if up_bias is not None:
        dup_bias = sum_groups(dpre, ends, up_bias.dtype)
    if down_bias is not None:
        ddown_bias = sum_groups(grad, ends, down_bias.dtype, token, weights.contiguous(), order)
        own = grad.float() @ down_bias.float().T  # [t, e], what its bias adds to the gradient of an expert's weight
        dots = dots + own.gather(1, experts.clamp(max=len(ends) - 1).long())
    dweights = torch.where(experts < len(ends), dots, 0).to(weights.dtype)
    return dhidden, dweights, dup, dup_bias, ddown, ddown_bias


def fake_forward(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, act: str, gated: bool, keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    pre = hidden.new_empty(experts.numel(), up.shape[1]) if keep else hidden.new_empty(0)
    return hidden.new_empty(hidden.shape[0], down.shape[1]), pre, *fake_route(experts, up.shape[0])


def fake_backward(grad: Tensor, hidden: Tensor, experts: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    up, up_bias, down, down_bias, *_, matrices = rest
    wanted = ((up, matrices), (up_bias, up_bias is not None), (down, matrices), (down_bias, down_bias is not None))
    made = [t.new_empty(t.shape) if there else hidden.new_empty(0) for t, there in wanted]
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape), *made


INPUTS = "Tensor hidden, Tensor experts, Tensor weights, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias"
ROUTE = "Tensor pre, Tensor order, Tensor token, Tensor inverse, Tensor ends, Tensor tile_expert, Tensor tile_row"
forward = operator(
    experts_forward, f"({INPUTS}, str act, bool gated, bool keep) -> ({', '.join(['Tensor'] * 8)})", fake_forward
)
backward = operator(
    experts_backward,
    f"(Tensor grad, {INPUTS}, {ROUTE}, str act, bool gated, bool matrices) -> ({', '.join(['Tensor'] * 6)})",
    fake_backward,
)


class Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out, *kept = forward(*inputs, True)
        *tensors, ctx.act, ctx.gated = inputs
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        matrices = ctx.needs_input_grad[3] or ctx.needs_input_grad[5]
        dhidden, dweights, *rest = backward(grad, *ctx.saved_tensors, ctx.act, ctx.gated, matrices)
        return dhidden, None, dweights, *(t if t.numel() else None for t in rest), None, None


def triton_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, *, act: str, gated: bool,
) -> Tensor:  # fmt: skip
    """Tokens `[t, h]` through their experts, weighed and summed: `[t, h]`. Its gradients have none of their own.

    Args:
        experts: `[t, k]`, integers; a number beyond the last is another process's expert, and adds nothing.
        weights: `[t, k]`.
        up: `[e, 2 f, h]`, `gate | up`, or `[e, f, h]` if not gated; of any strides.
        down: `[e, h, f]`, of any strides.
        up_bias, down_bias: `[e, 2 f]` or `[e, f]`, and `[e, h]`.
        act: one of `ACTIVATIONS` of `triton_grouped.py`.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"the experts' kernels have no activation {act!r}; give one of {', '.join(ACTIVATIONS)}")
    inputs = (hidden, experts, weights, up, up_bias, down, down_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return Experts.apply(*inputs, act, gated)
    return forward(*inputs, act, gated, False)[0]
