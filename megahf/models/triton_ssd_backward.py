# mypy: disable-error-code="no-untyped-def"
"""The gradients of the scan of `ssd.py` as Triton kernels, and the scan as autograd takes it.

Kept are the inputs alone. States are worked out again, the gradients of states are passed from the last chunk to the
first, and then a program has all there is to a chunk: it goes over heads of a group and sums what they share, B and C,
in registers. Groups of more heads than a program has leave several sums; nothing depends on the order of programs.

A decay counts for every pair of tokens on both sides of it. Those are summed as what a token takes from before it less
what it gives to after it, from the same products in float32, so that pairs on one side are exactly as much on both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import jit, launch, operator, tl
from .kernel_table import Options
from .triton_conv import rowwise, strides
from .triton_ssd import (
    FLOAT32,
    FORWARD,
    INPUTS,
    Inputs,
    Walked,
    at_once,
    attend,
    before_softplus,
    block,
    documents,
    ends_of,
    entered,
    forward,
    options_of,
    passed,
    product,
    tile_of,
    walk,
)

# As of the forward pass; then heads that a program goes over, and how much of the gradients of B or C it works out.
BACKWARD: dict[int, Options] = {
    0: FORWARD[0]
    | {"chunk": 64, "heads": 8, "inputs_warps": 8, "shared_slice": 64, "shared_warps": 8, "shared_stages": 1},
}  # fmt: skip
BACKWARD[80] = BACKWARD[0] | {"chunk": 32, "warps": 8, "slice": 64}
BACKWARD_FLOAT32: Options = FLOAT32 | {"shared_slice": 32}


@jit
def decays(since, steps, seq_idx, at, t, c, length, seq_token, Q: tl.constexpr):
    """Of a chunk: logarithms, time steps, what is left of the entering state, of inputs at the end, and of both."""
    sums, step = tl.load(since + at), tl.load(steps + at)
    total = tl.min(sums, 0)
    kept, left = tl.exp2(tl.minimum(sums, 0.0)), tl.exp2(tl.minimum(total - sums, 0.0))
    through = tl.exp2(tl.minimum(total, 0.0))
    if seq_idx is not None:
        own = documents(seq_idx, t, length, seq_token)
        entering, last = ends_of(seq_idx, c, length, seq_token, Q)
        kept, left = tl.where(own == entering, kept, 0.0), tl.where(own == last, left, 0.0)
        through = tl.where(entering == last, through, 0.0)
    return sums, step, kept, left, through


@jit
def visible(seq_idx, t, length, seq_token, BACK: tl.constexpr):
    """`[t, s]`, whether token t takes anything from token s; or the other way round."""
    seen = t[:, None] >= t[None, :]
    if BACK:
        seen = t[:, None] <= t[None, :]
    if seq_idx is not None:
        own = documents(seq_idx, t, length, seq_token)
        seen = seen & (own[:, None] == own[None, :])
    return seen


@jit
def across(
    B, C, states, ends, reach, dstates, dends, dreach, row, c, h, t, rp, length, heads, rows, chunks, span, B_token,
    C_token, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What is read of the entering state, the gradients of what the leaving one takes in, `C B'`, and their product."""
    read, taken = tl.zeros((Q, BP), tl.float32), tl.zeros((Q, BP), tl.float32)
    scores, passing, k = tl.zeros((Q, Q), tl.float32), 0.0, chunks - 1 - c
    for start in tl.range(0, N, BN, num_stages=1):
        rn = start + tl.arange(0, BN)
        here, inner = (rp < P)[:, None] & (rn < N)[None, :], rp[:, None] * N + rn[None, :]
        state = entered(states, ends, reach, row, c, c, h, inner, here, heads, rows, chunks, span, P, N)
        query = tile_of(C, t, C_token, rn, length, N)
        read = product(query, tl.trans(state), read)
        dstate = entered(dstates, dends, dreach, row, c, k, h, inner, here, heads, rows, chunks, span, P, N)
        passing += tl.sum(tl.sum(state.to(tl.float32) * dstate.to(tl.float32), 1), 0)
        key = tile_of(B, t, B_token, rn, length, N)
        taken = product(key, tl.trans(dstate), taken)
        scores = product(query, tl.trans(key), scores)
    return read, taken, scores, passing


@jit
def inputs_kernel(
    x, dt, A, B, C, D, bias, mask, seq_idx, grad, states, ends, reach, dstates, dends, dreach, since, steps,
    dx, ddt, ddecay, sums_D,
    length, heads, rows, per_group, span, x_row, x_token, x_head, B_row, B_token, B_group, C_row, C_token, C_group,
    grad_row, grad_token, grad_head, seq_row, seq_token, dt_row, dt_token, dt_head, mask_row, mask_token,
    D_head, D_place, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A chunk of a head: the gradients of x, dt, A, D and the bias."""
    h, program, chunks = tl.program_id(0) % heads, tl.program_id(0) // heads, tl.cdiv(length, Q)
    c, row = program % chunks, (program // chunks).to(tl.int64)
    rp, t = tl.arange(0, BP), c * Q + tl.arange(0, Q)
    wide, group, head, far = h.to(tl.int64), (h // per_group).to(tl.int64), row * heads + h, t.to(tl.int64)
    if seq_idx is not None:
        seq_idx += row * seq_row
    if mask is not None:
        mask += row * mask_row
    if bias is not None:
        bias += h
    logs, step, kept, left, through = decays(since, steps, seq_idx, head * chunks * Q + t, t, c, length, seq_token, Q)
    value = tile_of(x + row * x_row + wide * x_head, t, x_token, rp, length, P)
    upstream = tile_of(grad + row * grad_row + wide * grad_head, t, grad_token, rp, length, P)
    B, C = B + row * B_row + group * B_group, C + row * C_row + group * C_group
    read, taken, scores, passing = across(
        B, C, states, ends, reach, dstates, dends, dreach, row, c, h, t, rp, length, heads, rows, chunks, span, B_token,
        C_token, P, N, Q, BP, BN,
    )  # fmt: skip
    crossing = tl.sum(read * upstream.to(tl.float32), 1) * kept
    taken *= left[:, None]
    given = tl.sum(taken * value.to(tl.float32), 1) * step
    decay = tl.exp2(tl.minimum(logs[:, None] - logs[None, :], 0.0))
    scores = tl.where(visible(seq_idx, t, length, seq_token, False), scores * decay, 0.0)
    pairs = tl.where(t[:, None] > t[None, :], product(upstream, tl.trans(value)) * scores * step[None, :], 0.0)
    crossing += tl.sum(pairs, 1) - tl.sum(pairs, 0)
    taken = product(tl.trans(scores.to(value.dtype)), upstream, taken)
    slope = tl.cumsum(crossing, 0, reverse=True) + tl.cumsum(given, 0) - given + passing * through  # of dt A

    raw, real = before_softplus(dt + row * dt_row + wide * dt_head, bias, mask, t, length, dt_token, mask_token)
    dstep = tl.sum(taken * value.to(tl.float32), 1) + slope * tl.load(A + h).to(tl.float32)
    dstep = tl.where(real, dstep * tl.sigmoid(raw), 0.0)
    tl.store(ddt + (row * length + far) * heads + h, dstep, mask=t < length)
    tl.store(ddecay + (row * length + far) * heads + h, slope * step, mask=t < length)
    taken *= step[:, None]
    if D is not None:
        skip = tl.load(D + wide * D_head + rp * D_place, mask=rp < P, other=0).to(tl.float32)
        taken += upstream.to(tl.float32) * skip[None, :]
        tl.store(
            sums_D + ((row * chunks + c) * heads + h) * P + rp,
            tl.sum(upstream.to(tl.float32) * value.to(tl.float32), 0),
            mask=rp < P,
        )
    to = ((row * length + far) * heads + h)[:, None] * P + rp[None, :]
    tl.store(dx + to, taken.to(dx.dtype.element_ty), mask=(t < length)[:, None] & (rp < P)[None, :])


@jit
def shared_kernel(
    mine, theirs, keys, seq_idx, states, ends, reach, since, steps, out,
    length, heads, rows, per_group, share, span, mine_row, mine_token, mine_head, theirs_row, theirs_token, theirs_head,
    key_row, key_token, key_group, seq_row, seq_token,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    OF_B: tl.constexpr,
):  # fmt: skip
    """A chunk of `share` heads of a group: their part of the gradient of C, or of B."""
    shares, groups, chunks = tl.cdiv(per_group, share), heads // per_group, tl.cdiv(length, Q)
    slices: tl.constexpr = tl.cdiv(N, BN)
    rn, program = tl.program_id(0) % slices * BN + tl.arange(0, BN), tl.program_id(0) // slices
    split, program = program % shares, program // shares
    g, c, row = program % groups, program // groups % chunks, (program // (groups * chunks)).to(tl.int64)
    rp, t = tl.arange(0, BP), c * Q + tl.arange(0, Q)
    here, inner = (rp < P)[:, None] & (rn < N)[None, :], rp[:, None] * N + rn[None, :]
    if seq_idx is not None:
        seq_idx += row * seq_row
    key = tile_of(keys + row * key_row + g.to(tl.int64) * key_group, t, key_token, rn, length, N)
    seen = visible(seq_idx, t, length, seq_token, OF_B)
    total = tl.zeros((Q, BN), tl.float32)
    for i in tl.range(split * share, tl.minimum(split * share + share, per_group), num_stages=STAGES):
        h = g * per_group + i
        wide, at, k = h.to(tl.int64), (row * heads + h) * chunks * Q + t, c
        logs, step, weight, left, _ = decays(since, steps, seq_idx, at, t, c, length, seq_token, Q)
        difference, counts = logs[:, None] - logs[None, :], step[None, :]
        if OF_B:
            difference, counts, weight, k = logs[None, :] - logs[:, None], step[:, None], step * left, chunks - 1 - c
        own = tile_of(mine + row * mine_row + wide * mine_head, t, mine_token, rp, length, P)
        other = tile_of(theirs + row * theirs_row + wide * theirs_head, t, theirs_token, rp, length, P)
        dscore = product(own, tl.trans(other)) * tl.exp2(tl.minimum(difference, 0.0)) * counts
        total = product(tl.where(seen, dscore, 0.0).to(key.dtype), key, total)
        state = entered(states, ends, reach, row, c, k, h, inner, here, heads, rows, chunks, span, P, N)
        total = product((own.to(tl.float32) * weight[:, None]).to(key.dtype), state, total)
    to = ((row * length + t.to(tl.int64)) * groups + g)[:, None] * shares * N + split * N + rn[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=(t < length)[:, None] & (rn < N)[None, :])


def passed_back(inputs: Inputs, grad: Tensor, grad_state: Tensor, walked: Walked, sizes: Options) -> Walked:
    """The gradients of the states that leave the chunks, and of the first."""
    sums = torch.stack((walked.since, walked.steps))
    return passed(inputs, grad, inputs.C, grad_state, sums, sizes, backward=True)


def of_inputs(inputs: Inputs, grad: Tensor, walked: Walked, back: Walked, sizes: Options) -> tuple[Any, ...]:
    """The gradients of x, dt, A, D and the bias."""
    x, dt, A, B, C, D, _, bias, _, seq_idx, mask = inputs
    rows, length, heads, channels = x.shape
    chunks = rows * -(-length // sizes["chunk"])
    dx, (ddt, ddecay) = x.new_empty(x.shape), walked.since.new_empty(2, *dt.shape)
    of_chunks = None if D is None else walked.since.new_empty(chunks, heads, channels)
    tensors = (x, dt, A, B, C, D, bias, mask, seq_idx, grad, *walked[:3], *back[:5])
    skip = (0, 0) if D is None else (*D.stride(), 0)[:2]
    numbers = (length, heads, rows, heads // B.shape[2], walked.span)
    steps = (*(step for t in (x, B, C, grad) for step in t.stride()[:3]), *strides(seq_idx, 0, 1), *dt.stride())
    steps = (*steps, *strides(mask, 0, 1), *skip)
    options = {**blocks_of(inputs, sizes), "num_warps": sizes["inputs_warps"]}
    launch(inputs_kernel, (chunks * heads,), *tensors, dx, ddt, ddecay, of_chunks, *numbers, *steps, **options)
    dD = None if of_chunks is None else of_chunks.sum(dim=0)
    if D is not None and dD is not None and D.dim() == 1:
        dD = dD.sum(dim=1)
    return dx, ddt, ddecay.sum(dim=(0, 1)), dD, ddt.sum(dim=(0, 1))


def of_shared(inputs: Inputs, grad: Tensor, walked: Walked, back: bool, sizes: Options) -> Tensor:
    """The gradient of C, from the states that enter; or of B, from the gradients `back` of those that leave."""
    x, _, _, B, C, *_ = inputs
    rows, length, heads, _ = x.shape
    groups, size = B.shape[2:]
    per_group = heads // groups
    share = min(sizes["heads"], per_group)
    shares = -(-per_group // share)
    mine, theirs, keys = (x, grad, C) if back else (grad, x, B)
    out = B.new_empty(rows, length, groups, shares, size, dtype=B.dtype if shares == 1 else torch.float32)
    tensors = (mine, theirs, keys, inputs.seq_idx, *walked[:5], out)
    steps = (*(step for t in tensors[:3] for step in t.stride()[:3]), *strides(inputs.seq_idx, 0, 1))
    options = {
        **blocks_of(inputs, sizes),
        "BN": at_once(sizes["shared_slice"], x.shape[-1], size),
        "STAGES": sizes["shared_stages"],
        "num_warps": sizes["shared_warps"],
    }
    programs = (rows * -(-length // sizes["chunk"]) * groups * shares * -(-size // options["BN"]),)
    numbers = (length, heads, rows, per_group, share, walked.span)
    launch(shared_kernel, programs, *tensors, *numbers, *steps, **options, OF_B=back)
    return out[:, :, :, 0] if shares == 1 else out.sum(dim=3)


def blocks_of(inputs: Inputs, sizes: Options) -> Options:
    channels, size = inputs.x.shape[-1], inputs.B.shape[-1]
    return {
        "P": channels,
        "N": size,
        "Q": sizes["chunk"],
        "BP": block(channels),
        "BN": at_once(sizes["slice"], channels, size),
    }


def ssd_backward(grad: Tensor, grad_state: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    inputs, grad = Inputs.of(*given), rowwise(grad)

    def run(sizes: Options) -> tuple[Tensor | None, ...]:
        walked, upstream, dz = walk(inputs, sizes), grad, None
        if inputs.z is not None:
            upstream, dz = attend(inputs, walked, sizes, grad)
        back = passed_back(inputs, upstream, grad_state, walked, sizes)
        dx, ddt, dA, dD, dbias = of_inputs(inputs, upstream, walked, back, sizes)
        dB = of_shared(inputs, upstream, back, True, sizes)
        dC = of_shared(inputs, upstream, walked, False, sizes)
        return dx, ddt, dA, dB, dC, dD, dz, dbias, back.ends[-1]

    gradients = run(options_of("ssd_backward", inputs, BACKWARD, BACKWARD_FLOAT32, run))
    return tuple(
        grad.new_empty(0) if gradient is None or like is None else gradient.to(like.dtype)
        for gradient, like in zip(gradients, inputs, strict=False)
    )


def fake_backward(grad: Tensor, grad_state: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(0) if t is None else t.new_empty(t.shape) for t in given[:9])


backward = operator(
    ssd_backward,
    f"(Tensor grad, Tensor grad_state, {INPUTS}) -> ({', '.join(['Tensor'] * 9)})",
    fake_backward,
)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = backward(grad, grad_state, *inputs)
        found = (None if t is None else gradient for t, gradient in zip(inputs[:9], gradients, strict=True))
        return *found, None, None


def triton_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_scan` of `ssd.py`, arguments and results. Its gradients have none of their own."""
    call = Scan.apply if torch.is_grad_enabled() else forward
    return call(x, dt, A, B, C, D, z, dt_bias, state, seq_idx, mask)
