# mypy: disable-error-code="no-untyped-def"
"""The scan of `ssd.py` as Triton kernels, forward: one walks over chunks with a state, one works out their tokens.

The first writes the state that enters each chunk; the second is attention within a chunk, and reads that state. Where
heads and rows are too few to fill a GPU, the walk starts in several parts of the sequence at once, each from zero, and
a third kernel passes the states from part to part. Tokens are read where they lie in a packed projection. Sums are
float32, decays powers of 2, offsets 64 bits wide, and no sum depends on the order of programs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import dense, rowwise, strides

LARGEST = 128, 256  # channels of a head and of a state, which a program holds
SHORTEST = 2  # chunks a part

# By architecture, 0 any other. Of the walk tokens a chunk, a tile of a state and how many programs fill a GPU; of the
# scan tokens of a program and of a step, and how much of a state at once. Chosen by registers, until a GPU times them.
FORWARD: dict[int, Options] = {
    0: {
        "chunk": 128, "p": 64, "n": 128, "warps": 4, "stages": 2, "programs": 264,
        "rows": 64, "columns": 64, "slice": 128, "scan_warps": 4, "scan_stages": 2,
    },
}  # fmt: skip
FORWARD[80] = FORWARD[0] | {"warps": 8}
FLOAT32: Options = {
    "chunk": 32,
    "p": 32,
    "n": 64,
    "stages": 1,
    "rows": 32,
    "columns": 32,
    "slice": 32,
    "scan_stages": 1,
}


class Walked(NamedTuple):
    """What the walk leaves.

    Args:
        states: `[b, k, h, p, n]`, what enters each chunk, from the start of its part on.
        ends: `[parts, b, h, p, n]` float32, the whole states at the ends of parts.
        reach: `[b, h, k]`, how much of the end of the part before enters a chunk; None where there is one part.
        since: `[b, h, k q]`, the binary logarithm of the decay since a chunk's start.
        steps: `[b, h, k q]`, time steps, 0 for padding.
        span: chunks a part.
    """

    states: Tensor
    ends: Tensor
    reach: Tensor | None
    since: Tensor
    steps: Tensor
    span: int


@jit
def product(a, b, onto=None):
    """A matmul, summed in float32. One of float32 is three of TF32, which lose as little and fit in registers."""
    return tl.dot(a, b, onto, input_precision="tf32x3")


@jit
def before_softplus(dt, bias, mask, t, length, dt_token, mask_token):
    """What time steps are the softplus of at the times `t`, and where there is anything but padding."""
    here, at = t < length, t.to(tl.int64)
    if mask is not None:
        here = here & (tl.load(mask + at * mask_token, mask=here, other=0) != 0)
    raw = tl.load(dt + at * dt_token, mask=here, other=0).to(tl.float32)
    if bias is not None:
        raw += tl.load(bias).to(tl.float32)
    return raw, here


@jit
def softplus(raw):
    """`log(1 + exp(raw))`, by a series where rounding the sum would lose what is looked for."""
    power = tl.exp(tl.minimum(raw, 20.0))
    ratio = power / (2 + power)
    square = ratio * ratio
    series = 2 * ratio * (1 + square * (1 / 3 + square * (1 / 5 + square / 7)))
    return tl.where(raw > 20, raw, tl.where(power < 0.1, series, tl.log(1 + power)))


@jit
def ends_of(seq_idx, c, length, seq_token, Q: tl.constexpr):
    """The documents of the state that enters chunk `c`, and of the one that leaves it."""
    entering, last = tl.maximum(c * Q - 1, 0), tl.minimum(c * Q + Q, length) - 1
    return (
        tl.load(seq_idx + tl.cast(entering, tl.int64) * seq_token),
        tl.load(seq_idx + tl.cast(last, tl.int64) * seq_token),
    )


@jit
def documents(seq_idx, t, length, seq_token):
    return tl.load(seq_idx + t.to(tl.int64) * seq_token, mask=t < length, other=-1)


@jit
def tile_of(pointer, t, token, r, length, size):
    """Of the tokens `t` the channels `r`, which lie side by side."""
    here = (t < length)[:, None] & (r < size)[None, :]
    return tl.load(pointer + t.to(tl.int64)[:, None] * token + r[None, :], mask=here, other=0)


@jit
def entered(
    states, ends, reach, row, c, k, h, inner, here, heads, rows, chunks, span, P: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """The state that enters chunk `c`, the `k`th of the walk, in the order of `inner`."""
    value = tl.load(states + ((row * chunks + c) * heads + h) * P * N + inner, mask=here, other=0)
    if reach is not None:
        part = k // span
        before = ((part - 1).to(tl.int64) * rows + row) * heads + h
        carried = tl.load(ends + before * P * N + inner, mask=here & (part > 0), other=0)
        carried *= tl.load(reach + (row * heads + h) * chunks + c)
        value = (value.to(tl.float32) + carried).to(states.dtype.element_ty)
    return value


@jit
def time_steps(dt, bias, mask, since, steps, rate, t, at, length, dt_token, mask_token, store):
    """The logarithm of a chunk's decay, and how much of each token its last state takes in; the rest is stored."""
    raw, real = before_softplus(dt, bias, mask, t, length, dt_token, mask_token)
    step = tl.where(real, softplus(raw), 0.0)
    decay = step * rate
    left = tl.cumsum(decay, 0, reverse=True) - decay
    if store:
        tl.store(since + at, tl.cumsum(decay, 0))
        tl.store(steps + at, step)
    return tl.sum(decay, 0), tl.exp2(tl.minimum(left, 0.0)) * step


@jit
def of_one_document(
    weight, through, seq_idx, t, c, length, seq_token, Q: tl.constexpr, BACKWARD: tl.constexpr
):  # fmt: skip
    """What tokens count for the state that leaves a chunk, and the one that enters; backwards the other way."""
    if seq_idx is not None:
        entering, last = ends_of(seq_idx, c, length, seq_token, Q)
        counts = last
        if BACKWARD:
            counts = entering
        weight = tl.where(documents(seq_idx, t, length, seq_token) == counts, weight, 0.0)
        through = tl.where(entering == last, through, 0.0)
    return weight, through


@jit
def states_kernel(
    values, keys, dt, A, bias, mask, seq_idx, first, states, ends, reach, whole, since, steps,
    length, heads, rows, per_group, span, value_row, value_token, value_head, key_row, key_token, key_group,
    dt_row, dt_token, dt_head, mask_row, mask_token, seq_row, seq_token,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A part of a head, of `BP` by `BN` of its state; backwards the gradient of the state that leaves each chunk."""
    across: tl.constexpr = tl.cdiv(P, BP)
    tile, program = tl.program_id(0) % (across * tl.cdiv(N, BN)), tl.program_id(0) // (across * tl.cdiv(N, BN))
    chunks = tl.cdiv(length, Q)
    parts = tl.cdiv(chunks, span)
    h, part, row = program % heads, program // heads % parts, (program // (heads * parts)).to(tl.int64)
    rp, rn = tile % across * BP + tl.arange(0, BP), tile // across * BN + tl.arange(0, BN)
    here, inner = (rp < P)[:, None] & (rn < N)[None, :], rp[:, None] * N + rn[None, :]
    head = row * heads + h
    values += row * value_row + h.to(tl.int64) * value_head
    keys += row * key_row + (h // per_group).to(tl.int64) * key_group
    rate, dt = tl.load(A + h).to(tl.float32) * 1.4426950408889634, dt + row * dt_row + h.to(tl.int64) * dt_head
    if seq_idx is not None:
        seq_idx += row * seq_row
    if mask is not None:
        mask += row * mask_row
    if bias is not None:
        bias += h
    state, kept = tl.zeros((BP, BN), tl.float32), 1.0
    if first is not None:
        state += tl.load(first + head * P * N + inner, mask=here & (part == 0), other=0).to(tl.float32)
    for k in tl.range(part * span, tl.minimum(part * span + span, chunks), num_stages=STAGES):
        c = chunks - 1 - k if BACKWARD else k
        t = c * Q + tl.arange(0, Q)
        at = head * chunks * Q + t
        if BACKWARD:
            sums = tl.load(since + at)
            total, weight = tl.min(sums, 0), tl.exp2(tl.minimum(sums, 0.0))
        else:
            total, weight = time_steps(
                dt, bias, mask, since, steps, rate, t, at, length, dt_token, mask_token, tile == 0
            )
        through = tl.exp2(tl.minimum(total, 0.0))
        weight, through = of_one_document(weight, through, seq_idx, t, c, length, seq_token, Q, BACKWARD)
        to = ((row * chunks + c) * heads + h) * P * N + inner
        tl.store(states + to, state.to(states.dtype.element_ty), mask=here)
        if reach is not None and tile == 0:
            tl.store(reach + head * chunks + c, kept)
        value, key = tile_of(values, t, value_token, rp, length, P), tile_of(keys, t, key_token, rn, length, N)
        weighed = (tl.trans(value).to(tl.float32) * weight[None, :]).to(key.dtype)
        state = product(weighed, key, state * through)
        kept *= through
    tl.store(ends + ((part.to(tl.int64) * rows + row) * heads + h) * P * N + inner, state, mask=here)
    if whole is not None and tile == 0:
        tl.store(whole + part.to(tl.int64) * rows * heads + head, kept)


@jit
def join_kernel(ends, whole, rows, parts, size, BLOCK: tl.constexpr):
    """Adds what is left of the states before to those at the ends of parts; `size` numbers of a head of a row."""
    blocks = tl.cdiv(size, BLOCK)
    head, at = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    place = ends + head * size + at
    state = tl.load(place, mask=at < size, other=0)
    for part in range(1, parts):
        part = tl.cast(part, tl.int64)
        own = tl.load(place + part * rows * size, mask=at < size, other=0)
        state = own + state * tl.load(whole + part * rows + head)
        tl.store(place + part * rows * size, state, mask=at < size)


@jit
def gated(y, z, grad, dz, z_at, grad_at, to, here):
    """`y` through the gate; or its gradient from that of what comes out, storing the gate's."""
    gate = tl.load(z + z_at, mask=here, other=0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    if grad is not None:
        upstream = tl.load(grad + grad_at, mask=here, other=0).to(tl.float32)
        slope = upstream * y * open_ * (1 + gate * (1 - open_))
        tl.store(dz + to, slope.to(dz.dtype.element_ty), mask=here)
        y = upstream
    return y * gate * open_


@jit
def read_state(
    C, states, ends, reach, row, c, h, t, rp, length, C_token, heads, rows, chunks, span, P: tl.constexpr,
    N: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What the tokens `t` would read of the state that enters their chunk; `BN` of a state at once."""
    y = tl.zeros((BM, BP), tl.float32)
    for start in tl.range(0, N, BN, num_stages=1):
        rn = start + tl.arange(0, BN)
        inner, here = rn[:, None] + rp[None, :] * N, (rn < N)[:, None] & (rp < P)[None, :]
        state = entered(states, ends, reach, row, c, c, h, inner, here, heads, rows, chunks, span, P, N)
        y = product(tile_of(C, t, C_token, rn, length, N), state, y)
    return y


@jit
def scan_kernel(
    x, B, C, D, z, grad, seq_idx, states, ends, reach, since, steps, out, dz,
    length, heads, rows, per_group, span, x_row, x_token, x_head, B_row, B_token, B_group, C_row, C_token, C_group,
    D_head, D_place, z_row, z_token, z_head, grad_row, grad_token, grad_head, seq_row, seq_token,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`BM` tokens of a chunk. With `grad` not the outputs but their gradient before the gate, and the gate's."""
    i, program = tl.program_id(0) % (Q // BM), tl.program_id(0) // (Q // BM)
    chunks = tl.cdiv(length, Q)
    h, c, row = program % heads, program // heads % chunks, (program // (heads * chunks)).to(tl.int64)
    rp, rn, t = tl.arange(0, BP), tl.arange(0, BN), c * Q + i * BM + tl.arange(0, BM)
    far, group, wide = t.to(tl.int64)[:, None], (h // per_group).to(tl.int64), h.to(tl.int64)
    flat = (row * heads + h) * chunks * Q
    x, B = x + row * x_row + wide * x_head, B + row * B_row + group * B_group
    since, steps = since + flat, steps + flat
    sums = tl.load(since + t)
    weight = tl.exp2(tl.minimum(sums, 0.0))
    own = t
    if seq_idx is not None:
        seq_idx += row * seq_row
        own = documents(seq_idx, t, length, seq_token)
        weight = tl.where(own == ends_of(seq_idx, c, length, seq_token, Q)[0], weight, 0.0)
    C += row * C_row + group * C_group
    y = read_state(
        C, states, ends, reach, row, c, h, t, rp, length, C_token, heads, rows, chunks, span, P, N, BM, BP, BN
    )  # fmt: skip
    y, query = y * weight[:, None], tile_of(C, t, C_token, rn, length, N)
    for start in tl.range(0, (i + 1) * BM, BK, num_stages=STAGES):
        s = c * Q + start + tl.arange(0, BK)
        value = tile_of(x, s, x_token, rp, length, P)
        score = tl.zeros((BM, BK), tl.float32)
        for n in tl.range(0, N, BN, num_stages=1):
            if BN < N:
                query = tile_of(C, t, C_token, n + rn, length, N)
            score = product(query, tl.trans(tile_of(B, s, B_token, n + rn, length, N)), score)
        score *= tl.exp2(tl.minimum(sums[:, None] - tl.load(since + s)[None, :], 0.0)) * tl.load(steps + s)[None, :]
        seen = t[:, None] >= s[None, :]
        if seq_idx is not None:
            seen = seen & (own[:, None] == documents(seq_idx, s, length, seq_token)[None, :])
        y = product(tl.where(seen, score, 0.0).to(value.dtype), value, y)
    here, to = (t < length)[:, None] & (rp < P)[None, :], ((row * length + far) * heads + h) * P + rp[None, :]
    if D is not None:
        skip = tl.load(D + wide * D_head + rp * D_place, mask=rp < P, other=0).to(tl.float32)
        y += tile_of(x, t, x_token, rp, length, P).to(tl.float32) * skip[None, :]
    if z is not None:
        z_at = row * z_row + wide * z_head + far * z_token + rp[None, :]
        y = gated(y, z, grad, dz, z_at, row * grad_row + wide * grad_head + far * grad_token + rp[None, :], to, here)
    tl.store(out + to, y.to(out.dtype.element_ty), mask=here)


def block(size: int) -> int:
    """The power of 2, at least 16, that a kernel holds `size` channels in."""
    return max(16, 1 << (size - 1).bit_length())


def at_once(size: int, channels: int, whole: int) -> int:
    """How much of a `whole` state a kernel holds, where it is `size` of a head of 64 channels."""
    return max(16, min(size * 64 // max(64, block(channels)), block(whole)))


class Inputs(NamedTuple):
    """What `ssd_scan` is given, tokens' channels side by side."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    bias: Tensor | None
    state: Tensor | None
    seq_idx: Tensor | None
    mask: Tensor | None

    @staticmethod
    def of(*given: Tensor | None) -> Inputs:
        read = Inputs(*given)  # type: ignore[arg-type]
        x, B, C = rowwise(read.x), rowwise(read.B), rowwise(read.C)
        z = None if read.z is None else rowwise(read.z)
        return read._replace(x=x, A=read.A.contiguous(), B=B, C=C, z=z, bias=dense(read.bias))


def walk(inputs: Inputs, sizes: Options) -> Walked:
    """The states that enter the chunks, and the last."""
    rows, length, heads, _ = inputs.x.shape
    tokens = -(-length // sizes["chunk"]) * sizes["chunk"]
    sums = torch.empty(2, rows, heads, tokens, dtype=torch.float32, device=inputs.x.device)
    return passed(inputs, inputs.x, inputs.B, inputs.state, sums, sizes, backward=False)


def passed(
    inputs: Inputs, values: Tensor, keys: Tensor, first: Tensor | None, sums: Tensor, sizes: Options, backward: bool
) -> Walked:
    """A walk from chunk to chunk, from the `first` state or, backwards, from the gradient of the last.

    Args:
        values, keys: `[b, s, h, p]` and `[b, s, g, n]`, whose products the states take in.
        sums: `[2, b, h, k q]`, the logarithms of decays and the time steps; written, backwards read.
    """
    rows, length, heads, channels = values.shape
    size, chunk = keys.shape[-1], sizes["chunk"]
    BP, BN = min(sizes["p"], block(channels)), min(sizes["n"], block(size))
    chunks, across = -(-length // chunk), -(-channels // BP) * -(-size // BN)
    span = span_of(chunks, rows * heads * across, sizes)
    parts = -(-chunks // span)
    states = values.new_empty(rows, chunks, heads, channels, size)
    ends = sums.new_empty(parts, rows, heads, channels, size)
    reach = whole = None
    if parts > 1:
        reach, whole = sums.new_empty(rows, heads, chunks), sums.new_empty(parts, rows * heads)
    given = (values, keys, inputs.dt, inputs.A, inputs.bias, inputs.mask, inputs.seq_idx, dense(first))
    tensors = (*given, states, ends, reach, whole, sums[0], sums[1])
    steps = (*values.stride()[:3], *keys.stride()[:3], *inputs.dt.stride(), *strides(inputs.mask, 0, 1))
    numbers = (length, heads, rows, heads // keys.shape[2], span, *steps, *strides(inputs.seq_idx, 0, 1))
    options = {"P": channels, "N": size, "Q": chunk, "BP": BP, "BN": BN, "BACKWARD": backward}
    options |= {"STAGES": sizes["stages"], "num_warps": sizes["warps"]}
    launch(states_kernel, (rows * parts * heads * across,), *tensors, *numbers, **options)
    if parts > 1:
        grid = (rows * heads * -(-channels * size // 1024),)
        launch(join_kernel, grid, ends, whole, rows * heads, parts, channels * size, BLOCK=1024, num_warps=4)
    return Walked(states, ends, reach, sums[0], sums[1], span)


def span_of(chunks: int, programs: int, sizes: Options) -> int:
    """Chunks a part, so that a walk of so many `programs` a part comes to those that the tiles ask for."""
    parts = -(-sizes["programs"] // programs)
    return min(chunks, max(SHORTEST, -(-chunks // parts)))


def attend(inputs: Inputs, walked: Walked, sizes: Options, grad: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The outputs; with their `grad` its value before the gate, and the gradient of the gate."""
    x, _, _, B, C, D, z, *_ = inputs
    rows, length, heads, channels = x.shape
    size, chunk = B.shape[-1], sizes["chunk"]
    out, dz = x.new_empty(x.shape), None if grad is None or z is None else z.new_empty(z.shape)
    read = (walked.states, walked.ends, walked.reach, walked.since, walked.steps)
    tensors = (x, B, C, D, z, grad, inputs.seq_idx, *read, out, dz)
    skip = (0, 0) if D is None else (*D.stride(), 0)[:2]
    steps = (*x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *skip, *strides(z, 0, 1, 2), *strides(grad, 0, 1, 2))
    numbers = (length, heads, rows, heads // B.shape[2], walked.span, *steps, *strides(inputs.seq_idx, 0, 1))
    BN = at_once(sizes["slice"], channels, size)
    options = {"P": channels, "N": size, "Q": chunk, "BP": block(channels), "BN": BN}
    options |= {"BM": min(chunk, sizes["rows"]), "BK": min(chunk, sizes["columns"]), "STAGES": sizes["scan_stages"]}
    programs = (rows * -(-length // chunk) * heads * (chunk // options["BM"]),)
    launch(scan_kernel, programs, *tensors, *numbers, **options, num_warps=sizes["scan_warps"])
    return out, dz


def options_of(
    op: str, inputs: Inputs, rows: dict[int, Options], float32: Options, run: Callable[[Options], Any]
) -> Options:
    """Those of the table, or of `rows`; where nothing is rounded before it is multiplied `float32` differs."""
    x, kind = inputs.x, architecture(inputs.x.device)
    default = rows.get(kind, rows[0]) | (float32 if x.dtype == torch.float32 else {})
    return options_for((op, kind, f"{str(x.dtype)[6:]} {x.shape[-1]} {inputs.B.shape[-1]}"), default, run=run)


def ssd_forward(*given: Tensor | None) -> tuple[Tensor, Tensor]:
    inputs = Inputs.of(*given)

    def run(sizes: Options) -> tuple[Tensor, Tensor]:
        walked = walk(inputs, sizes)
        return attend(inputs, walked, sizes)[0], walked.ends[-1]

    return run(options_of("ssd_forward", inputs, FORWARD, FLOAT32, run))


def fake_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, _, heads, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(rows, heads, channels, B.shape[-1], dtype=torch.float32)


INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? state, "
    "Tensor? seq_idx, Tensor? mask"
)
forward = operator(ssd_forward, f"({INPUTS}) -> (Tensor, Tensor)", fake_forward)
