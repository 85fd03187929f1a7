# mypy: disable-error-code="no-untyped-def"
"""Matmuls of rows sorted into groups, each group with its matrix, as Triton kernels: forward, and both gradients.

Where groups end, only the GPU knows: programs find their rows in a list of tiles (`triton_route.py`) with room for the
most there can be. Rows may be read through an index, which spares a sorted copy, and an activation follows at once.
Sums are float32, float32 is not rounded before, offsets are 64 bits wide, no sum depends on the order of programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel_choice import architecture, jit, launch, tl
from .kernel_table import Options, options_for
from .triton_conv import dense, rowwise
from .triton_route import LEAST, cut_tiles, most_tiles

ACTIVATIONS = ("silu", "quick_gelu", "gelu", "gelu_tanh", "squared_relu")
ROOMY = (90, 100)  # architectures whose programs have 227 KiB of shared memory; on 86, 89 and 120 it is 99
TOGETHER = 8  # tiles of rows that read the same columns of a matrix one after the other, while they are in the cache


def block_rows(rows: int, groups: int) -> int:
    """Rows of a tile, for `rows` shared by `groups`: tensor cores take no less than `LEAST`."""
    return min(128, max(LEAST, 1 << (-(-rows // groups) - 1).bit_length()))


@jit
def activated(x, ACT: tl.constexpr):
    """The activation of `x` and its slope there."""
    if ACT == "squared_relu":
        x = tl.maximum(x, 0.0)
        return x * x, 2 * x
    if ACT == "gelu":
        gate = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        slope = x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * gate, gate + slope
    # All others are x times the sigmoid of something: that of gelu_tanh is (1 + tanh) / 2.
    inner, slope = x, x
    if ACT == "quick_gelu":
        inner = 1.702 * x
        slope = inner
    elif ACT == "gelu_tanh":
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (x + 0.134145 * x * x * x)
    gate = tl.sigmoid(inner)
    return x * gate, gate * (1 + slope * (1 - gate))


@jit
def place(tiles, across, TOGETHER: tl.constexpr):
    """A program's tile of rows and of columns: some tiles of rows go over all columns before the next do."""
    program, wide = tl.program_id(0), TOGETHER * across
    first = (program // wide) * TOGETHER
    high = tl.minimum(tiles - first, TOGETHER)
    return first + (program % wide) % high, (program % wide) // high


@jit
def multiply(
    x, weight, other, there, here, inner, w_in, GATED: tl.constexpr, EVEN: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Rows at the pointers `x` `[M, 1]` times columns at `weight` `[1, N]`, and if gated those `other` further on."""
    k = tl.arange(0, K)
    total = tl.zeros((M, N), dtype=tl.float32)
    total2 = total
    for start in range(0, inner, K):
        at = start + k
        left, right = x + at[None, :], weight + at.to(tl.int64)[:, None] * w_in
        if EVEN:
            a = tl.load(left, mask=there[:, None], other=0)
            b = tl.load(right, mask=here[None, :], other=0)
        else:
            a = tl.load(left, mask=there[:, None] & (at < inner)[None, :], other=0)
            b = tl.load(right, mask=(at < inner)[:, None] & here[None, :], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
        if GATED:
            if EVEN:
                c = tl.load(right + other, mask=here[None, :], other=0)
            else:
                c = tl.load(right + other, mask=(at < inner)[:, None] & here[None, :], other=0)
            total2 = tl.dot(a, c, total2, input_precision="ieee")
    return total, total2


@jit
def rows_kernel(
    x, index, weight, bias, tile_group, tile_row, ends, pre, out,
    tiles, inner, columns, x_row, w_group, w_out, w_in, ACT: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr,
    TOGETHER: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`act(x w + bias)` of a tile, or `act(gate) * up`; `pre` takes what the activation is of, packed `gate | up`."""
    tile, across = place(tiles, tl.cdiv(columns, N), TOGETHER)
    group = tl.load(tile_group + tile).to(tl.int64)
    if group < 0:
        return
    first = tl.load(tile_row + tile)
    row = first + tl.arange(0, M)
    there = row < tl.load(ends + group)
    column = across * N + tl.arange(0, N)
    here = column < columns
    source = row
    if index is not None:
        source = tl.load(index + row, mask=there, other=0)
    left = x + source.to(tl.int64)[:, None] * x_row
    right = weight + group * w_group + column.to(tl.int64)[None, :] * w_out
    half = tl.cast(columns, tl.int64) * w_out  # from a gate to its up
    total, up = multiply(left, right, half, there, here, inner, w_in, GATED, EVEN, M, N, K)
    width = columns * (2 if GATED else 1)
    if bias is not None:
        total += tl.load(bias + group * width + column, mask=here, other=0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + group * width + columns + column, mask=here, other=0).to(tl.float32)[None, :]
    mask = there[:, None] & here[None, :]
    if pre is not None:  # offsets within a tile are 32 bits wide, which take half the registers
        to = pre + first.to(tl.int64) * width + tl.arange(0, M)[:, None] * width + column[None, :]
        tl.store(to, total.to(pre.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(to + columns, up.to(pre.dtype.element_ty), mask=mask)
    if ACT is not None:
        total, _ = activated(total, ACT)
    if GATED:
        total *= up
    to = out + first.to(tl.int64) * columns + tl.arange(0, M)[:, None] * columns + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@jit
def outer_kernel(
    left, left_index, right, right_index, ends, out, high, wide, left_row, right_row,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of a group's `left^T right`, summed over its rows, K at a time; 0 where it has none."""
    down, across = tl.cdiv(high, M), tl.cdiv(wide, N)
    program = tl.program_id(0)
    group = (program // (down * across)).to(tl.int64)
    i = (program % down) * M + tl.arange(0, M)
    j = (program // down % across) * N + tl.arange(0, N)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros((M, N), dtype=tl.float32)
    for first in range(start, end, K):
        row = first + tl.arange(0, K)
        there = row < end
        one, two = row, row
        if left_index is not None:
            one = tl.load(left_index + row, mask=there, other=0)
        if right_index is not None:
            two = tl.load(right_index + row, mask=there, other=0)
        a = left + one.to(tl.int64)[None, :] * left_row + i[:, None]
        b = right + two.to(tl.int64)[:, None] * right_row + j[None, :]
        a = tl.load(a, mask=there[None, :] & (i < high)[:, None], other=0)
        b = tl.load(b, mask=there[:, None] & (j < wide)[None, :], other=0)
        total = tl.dot(a, b, total, input_precision="ieee")
    to = out + (group * high + i[:, None]) * wide + j[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=(i < high)[:, None] & (j < wide)[None, :])


@jit
def sums_kernel(x, index, scale, place, ends, out, width, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of each group's rows, each times its number in `scale`, which `place` says where to find."""
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < end
        source = row
        if index is not None:
            source = tl.load(index + row, mask=there, other=0)
        at = x + source.to(tl.int64)[:, None] * x_row + column[None, :]
        value = tl.load(at, mask=there[:, None] & (column < width)[None, :], other=0).to(tl.float32)
        if scale is not None:
            factor = tl.load(scale + tl.load(place + row, mask=there, other=0), mask=there, other=0)
            value *= factor.to(tl.float32)[:, None]
        total += value
    tl.store(out + group * width + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < width)


def size(dtype: torch.dtype, block: int, widths: tuple[int, ...]) -> str:
    """What the best options depend on beside the GPU; rows of odd widths are read a number at a time."""
    odd = any(width % 16 for width in widths)
    return f"{str(dtype).removeprefix('torch.')} {block}{' odd' if odd else ''}"


def options_of(size: str, wide: bool) -> Options:
    """Defaults by registers, of which a thread has 255; float32 is not for tensor cores, and needs more of them."""
    dtype, block, *odd = size.split()
    warps = 8 if int(block) > 64 else 4
    if dtype == "float32":
        return {"N": 64 if wide else 32, "K": 16, "num_warps": warps, "num_stages": 2}
    if odd:
        return {"N": 32, "K": 32, "num_warps": warps, "num_stages": 2}
    return {"N": 128 if wide and int(block) > 32 else 64, "K": 64, "num_warps": warps, "num_stages": 3}


def options_of_outer(dtype: torch.dtype) -> Options:
    if dtype == torch.float32:
        return {"M": 64, "N": 64, "K": 16, "num_warps": 4, "num_stages": 2}
    return {"M": 128, "N": 128, "K": 64, "num_warps": 8, "num_stages": 3}


def multiply_rows(
    x: Tensor, weight: Tensor, ends: Tensor, tile_group: Tensor, tile_row: Tensor, block: int, *,
    rows: int, index: Tensor | None = None, bias: Tensor | None = None, act: str | None = None, gated: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`rows` sorted rows times their group's matrix, and what the activation was taken of if that is to be kept.

    Args:
        x: `[m, k]`; with an `index` `[rows]` sorted row i is `x[index[i]]`.
        weight: `[g, n, k]` of any strides; `[g, 2 f, k]`, `gate | up`, if gated.
        bias: `[g, n]`.
        block: rows of the tiles.
    """
    x = rowwise(x)
    inner, width = x.shape[1], weight.shape[1]
    columns = width // 2 if gated else width
    out = x.new_empty(rows, columns)
    pre = x.new_empty(rows, width) if keep else None
    tensors = (x, index, weight, dense(bias), tile_group, tile_row, ends, pre, out)
    tiles = most_tiles(rows, len(weight), block)
    numbers = (tiles, inner, columns, x.stride(0), *weight.stride())

    def run(options: Options) -> None:
        programs = tiles * -(-columns // options["N"])
        fixed = {"ACT": act, "GATED": gated, "EVEN": inner % options["K"] == 0, "TOGETHER": TOGETHER, "M": block}
        launch(rows_kernel, (programs,), *tensors, *numbers, **fixed, **options)

    arch = architecture(x.device)
    wide = not gated or (block > 64 and arch in ROOMY and x.dtype != torch.float32)
    key = ("gated_rows" if gated else "grouped_rows", arch, size(x.dtype, block, (inner, columns)))
    run(options_for(key, options_of(key[-1], wide), run=run))
    return out, pre


def multiply_outer(
    left: Tensor, right: Tensor, ends: Tensor, left_index: Tensor | None = None, right_index: Tensor | None = None
) -> Tensor:
    """The sum over each group's rows of `left` `[m, n]` times `right` `[m, k]`: `[g, n, k]`."""
    left, right = rowwise(left), rowwise(right)
    high, wide = left.shape[1], right.shape[1]
    out = right.new_empty(len(ends), high, wide)
    tensors = (left, left_index, right, right_index, ends, out)

    def run(options: Options) -> None:
        programs = len(ends) * -(-high // options["M"]) * -(-wide // options["N"])
        launch(outer_kernel, (programs,), *tensors, high, wide, left.stride(0), right.stride(0), **options)

    key = ("grouped_outer", architecture(left.device), size(left.dtype, 0, (high, wide)))
    run(options_for(key, options_of_outer(left.dtype), run=run))
    return out


def sum_groups(
    x: Tensor, ends: Tensor, dtype: torch.dtype, index: Tensor | None = None, scale: Tensor | None = None,
    place: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The sum of each group's rows of `x` `[m, c]`, weighed by `scale[place]` if there is one: `[g, c]`."""
    x = rowwise(x)
    out = torch.empty(len(ends), x.shape[1], dtype=dtype, device=x.device)
    grid = (len(ends), -(-x.shape[1] // 128))
    launch(
        sums_kernel, grid, x, index, scale, place, ends, out, x.shape[1], x.stride(0), ROWS=32, COLUMNS=128, num_warps=4
    )
    return out


def triton_rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """As `rows` of `ops.py`: rows after the last end come out undefined."""
    block = block_rows(len(x), len(ends))
    return multiply_rows(x, weight, ends, *cut_tiles(ends, len(x), block), block, rows=len(x))[0]


def triton_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """As `outer` of `ops.py`; a group without rows gets 0."""
    return multiply_outer(grad, x, ends)
