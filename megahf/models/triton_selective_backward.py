# mypy: disable-error-code="no-untyped-def"
"""The gradients of the selective scan as Triton kernels, from the states that the forward pass kept.

The gradient of the state is walked back through every chunk at once, and passed from chunk to chunk. Then a program
has a chunk and some channels, works out again what the states were, a place at a time, and leaves all gradients; of
what several programs share, each leaves its part, so that no sum depends on their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel_choice import jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import dense, rowwise, strides
from .triton_selective_forward import (
    CHUNK,
    INPUTS,
    PASS,
    WALK,
    blocks,
    by_place,
    handed_on,
    key,
    leave_by_place,
    marked,
    offset_of,
    place,
    power,
    read,
)
from .triton_ssd import softplus

GRADIENTS: Options = {"CHANNELS": 32, "num_warps": 8}


@jit
def through_gate(grad, z, t, c, inside, z_token):
    """The gradient of what the gate was multiplied with."""
    if z is not None:
        gate = read(z, t, c, inside, z_token)
        grad *= gate * tl.sigmoid(gate)
    return grad


@jit
def back_kernel(
    grad, dt, A, C, z, bias, marks, states,
    length, channels, places, grad_row, grad_token, dt_row, dt_token, A_channel, A_place, C_row, C_token,
    z_row, z_token, marks_row, marks_token, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Back through one chunk, from zero at its end, to leave the gradient of the state that enters it."""
    row, chunk, c, _, chunks = place(length, channels, CHUNK, CHANNELS)
    n, here = tl.arange(0, PLACES)[:, None], c < channels
    offset = offset_of(bias, c, here)
    rates = by_place(A + c * A_channel, A_place, here, places, PLACES)
    grad, dt, C = grad + row * grad_row, dt + row * dt_row, C + row * C_row
    if z is not None:
        z += row * z_row
    if marks is not None:
        marks += row * marks_row
    state = tl.zeros((PLACES, CHANNELS), dtype=tl.float32)
    start, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)
    for i in range(0, end - start):
        t = tl.cast(end - 1 - i, tl.int64)
        step = softplus(read(dt, t, c, here, dt_token) + offset)
        upstream = through_gate(read(grad, t, c, here, grad_token), z, t, c, here, z_token)
        state += upstream[None, :] * read(C, t, n, n < places, C_token)
        if marks is not None:
            mark = tl.load(marks + t * marks_token)
            step = tl.where((mark & 1) != 0, 0.0, step)
            state = tl.where((mark & 2) != 0, 0.0, state)
        state *= tl.exp(rates * step[None, :])
    kept = states + (row * chunks + chunk) * places * channels + c
    leave_by_place(kept, state, channels, here, places, PLACES)


@jit
def then(decay, value, next_decay, next_value):
    """Two steps of a recurrence as one."""
    return decay * next_decay, value * next_decay + next_value


@jit
def steps_at(dt, marks, t, c, inside, offset, dt_token, marks_token):
    """Time steps at the times `t`, 0 for padding and outside; what they are the softplus of; whether they are any."""
    raw = read(dt, t, c, inside, dt_token) + offset
    if marks is not None:
        inside = inside & (marked(marks, t, inside, marks_token, 1) == 0)
    return tl.where(inside, softplus(raw), 0.0), raw, inside


@jit
def goes_on(marks, t, inside, token):
    """1, or 0 where a document starts."""
    value = tl.zeros_like(t).to(tl.float32) + 1.0
    if marks is not None:
        value = tl.where(marked(marks, t, inside, token, 2), 0.0, 1.0)
    return value


@jit
def over_places(
    A, B, C, states, adjoints, parts, shares, apart, step, step_later, on, on_later, taken, taken_before, upstream,
    t, first, final, now, before, here, length, channels, places, A_place, B_token, C_token,
):  # fmt: skip
    """What tokens read of the states, and the gradients of what they take in and, but for that, of their time steps."""
    y, dtaken, dstep = tl.zeros_like(step), tl.zeros_like(step), tl.zeros_like(step)
    for n in range(0, places):
        b, reads = read(B, t, n, now, B_token), read(C, t, n, now, C_token)
        rate = tl.load(A + n * A_place, mask=here, other=0).to(tl.float32)
        decay, later = tl.exp(rate * step) * on, tl.exp(rate * step_later) * on_later
        entering = tl.where(t == first, tl.load(states + n * channels, mask=here, other=0), 0.0)
        coming = read(B, t - 1, n, before, B_token) * taken_before + entering  # what the token before left new
        _through, old = tl.associative_scan((decay, decay * coming), 0, then)  # of the state, decayed to the token
        state = old + b * taken
        y += reads * state
        leaving = tl.where(t == final, tl.load(adjoints + n * channels, mask=here, other=0), 0.0)
        _through, adjoint = tl.associative_scan((later, reads * upstream + leaving), 0, then, reverse=True)
        dtaken += adjoint * b
        dstep += adjoint * old * rate
        tl.store(parts + n * channels, tl.sum(adjoint * old * step, axis=0)[None, :], mask=here)
        share = shares + tl.cast(n, tl.int64) * length
        tl.store(share, tl.sum(adjoint * taken, axis=1)[:, None], mask=now)
        tl.store(share + apart, tl.sum(upstream * state, axis=1)[:, None], mask=now)
    return y, dtaken, dstep


@jit
def gradients_kernel(
    grad, u, dt, A, B, C, D, z, bias, marks, states, adjoints, du, ddt, dz, shared, sums,
    length, channels, places, grad_row, grad_token, u_row, u_token, dt_row, dt_token, A_channel, A_place,
    B_row, B_token, C_row, C_token, z_row, z_token, marks_row, marks_token, rows,
    CHUNK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All of a chunk's tokens at once, for some channels, going over the places of the state.

    `states` enter chunks, `adjoints` are the gradients of what leaves them, both `[b, k, n, d]`. Parts of the gradients
    of B and C go to `shared` `[2, blocks, b, n, s]`, of those of A, D and the bias to `sums` `[b, k, n + 2, d]`.
    """
    row, chunk, c, block, chunks = place(length, channels, CHUNK, CHANNELS)
    t, c = (chunk * CHUNK + tl.arange(0, CHUNK))[:, None], c[None, :]  # [q, 1], [1, c]
    grad, u, dt, B, C = grad + row * grad_row, u + row * u_row, dt + row * dt_row, B + row * B_row, C + row * C_row
    if z is not None:
        z += row * z_row
    if marks is not None:
        marks += row * marks_row
    here, offset = c < channels, offset_of(bias, c, c < channels)
    first, end = chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)
    now, before, later = t < end, (t > first) & (t < end), t + 1 < end
    step, raw, real = steps_at(dt, marks, t, c, now & here, offset, dt_token, marks_token)
    step_before, _, _ = steps_at(dt, marks, t - 1, c, before & here, offset, dt_token, marks_token)
    step_later, _, _ = steps_at(dt, marks, t + 1, c, later & here, offset, dt_token, marks_token)
    value, taken_before = read(u, t, c, now & here, u_token), step_before * read(u, t - 1, c, before & here, u_token)
    on, on_later = goes_on(marks, t, now, marks_token), goes_on(marks, t + 1, later, marks_token)
    taken, upstream = step * value, through_gate(read(grad, t, c, now & here, grad_token), z, t, c, now & here, z_token)
    kept = (row * chunks + chunk) * places * channels + c
    parts = sums + (row * chunks + chunk) * (places + 2) * channels + c
    shares = shared + (tl.cast(block, tl.int64) * rows + row) * places * length + t
    apart = tl.cast(tl.cdiv(channels, CHANNELS), tl.int64) * rows * places * length
    y, dtaken, dstep = over_places(
        A + c * A_channel, B, C, states + kept, adjoints + kept, parts, shares, apart, step, step_later, on, on_later,
        taken, taken_before, upstream, t, first, first + CHUNK - 1, now, before, here, length, channels, places,
        A_place, B_token, C_token,
    )  # fmt: skip
    leave(
        grad, D, z, value, y, upstream, dtaken * step, tl.where(real, (dstep + dtaken * value) * tl.sigmoid(raw), 0.0),
        du, ddt, dz, parts + places * channels, row, t, c, now & here, length, channels, grad_token, z_token,
    )  # fmt: skip


@jit
def leave(
    grad, D, z, value, y, upstream, dvalue, dstep, du, ddt, dz, parts, row, t, c, inside, length, channels, grad_token,
    z_token,
):  # fmt: skip
    """Stores the gradients that are no one else's, and the parts of those of D and the bias."""
    to, here = (row * length + t) * channels + c, c < channels
    if D is not None:
        skip = tl.load(D + c, mask=here, other=0).to(tl.float32)
        dvalue += skip * upstream
        y += skip * value
        tl.store(parts, tl.sum(upstream * value, axis=0)[None, :], mask=here)
    if z is not None:
        gate = read(z, t, c, inside, z_token)
        open_ = tl.sigmoid(gate)
        dgate = read(grad, t, c, inside, grad_token) * y * open_ * (1 + gate * (1 - open_))
        tl.store(dz + to, dgate.to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + channels, tl.sum(dstep, axis=0)[None, :], mask=here)
    tl.store(du + to, dvalue.to(du.dtype.element_ty), mask=inside)
    tl.store(ddt + to, dstep.to(ddt.dtype.element_ty), mask=inside)


def adjoints_of(
    grad: Tensor, grad_last: Tensor, dt: Tensor, A: Tensor, C: Tensor, z: Tensor | None, bias: Tensor | None,
    marks: Tensor | None, sums: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of the states that leave chunks `[b, k, n, d]`, and of the first state `[b, d, n]`."""
    rows, length, channels = grad.shape
    places, chunks = A.shape[1], sums.shape[1]
    states = torch.empty(rows, chunks, places, channels, dtype=torch.float32, device=grad.device)
    steps = (
        *grad.stride()[:2],
        *dt.stride()[:2],
        *A.stride(),
        *C.stride()[:2],
        *strides(z, 0, 1),
        *strides(marks, 0, 1),
    )
    numbers = (length, channels, places, *steps)

    def run(options: Options) -> None:
        grid, constants = (rows * chunks * blocks(channels, options),), {"CHUNK": CHUNK, "PLACES": power(places)}
        launch(back_kernel, grid, grad, dt, A, C, z, bias, marks, states, *numbers, **constants, **options)

    run(options_for(key("scan_back", grad, places), WALK, run=run))
    dstate = handed_on(states, sums, A, grad_last, options_for(key("scan_pass", grad, places), PASS), back=True)
    return states, dstate


def scan_backward(
    grad: Tensor, grad_last: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, bias: Tensor | None, state: Tensor | None, marks: Tensor | None, states: Tensor, sums: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Gradients of u, dt, A, B, C, D, z, bias and state; of those that are None there is nothing to be used."""
    grad, u, dt, B, C, skip, offset = (
        rowwise(grad),
        rowwise(u),
        rowwise(dt),
        rowwise(B),
        rowwise(C),
        dense(D),
        dense(bias),
    )
    z = None if z is None else rowwise(z)
    (rows, length, channels), places, chunks = u.shape, A.shape[1], states.shape[1]
    adjoints, dstate = adjoints_of(grad, grad_last, dt, A, C, z, offset, marks, sums)
    du, ddt, dz = u.new_empty(u.shape), dt.new_empty(u.shape), None if z is None else z.new_empty(u.shape)
    pairs = (*grad.stride()[:2], *u.stride()[:2], *dt.stride()[:2], *A.stride(), *B.stride()[:2], *C.stride()[:2])
    numbers = (length, channels, places, *pairs, *strides(z, 0, 1), *strides(marks, 0, 1), rows)

    def run(options: Options) -> tuple[Tensor, Tensor]:
        across = blocks(channels, options)
        shared, parts = (
            states.new_empty(2, across, rows, places, length),
            states.new_empty(rows, chunks, places + 2, channels),
        )
        tensors = (grad, u, dt, A, B, C, skip, z, offset, marks, states, adjoints, du, ddt, dz, shared, parts)
        launch(gradients_kernel, (rows * chunks * across,), *tensors, *numbers, CHUNK=CHUNK, **options)
        return shared, parts

    shared, parts = run(options_for(key("scan_gradients", u, places), GRADIENTS, run=run))
    dB, dC = shared.sum(dim=1).transpose(-1, -2).contiguous()  # [b, s, n]
    total = parts.sum(dim=(0, 1))  # [n + 2, d]
    dA = total[:places].t().contiguous().to(A.dtype)
    dD, dbias = (
        x.to(torch.float32 if t is None else t.dtype, copy=True) for x, t in zip(total[-2:], (D, bias), strict=True)
    )
    dz, dstate = u.new_empty(0) if dz is None else dz, dstate if state is None else dstate.to(state.dtype)
    return [du, ddt, dA, dB.to(B.dtype, copy=True), dC.to(C.dtype, copy=True), dD, dz, dbias, dstate]


def fake_backward(
    grad: Tensor, grad_last: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, bias: Tensor | None, state: Tensor | None, *rest: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    given = (u, dt, A, B, C)
    vectors = [grad_last.new_empty(u.shape[2], dtype=torch.float32 if t is None else t.dtype) for t in (D, bias)]
    dz = u.new_empty(0) if z is None else z.new_empty(z.shape)
    dstate = grad_last.new_empty(grad_last.shape, dtype=grad_last.dtype if state is None else state.dtype)
    return [*(t.new_empty(t.shape) for t in given), vectors[0], dz, vectors[1], dstate]


backward = operator(
    scan_backward, f"(Tensor grad, Tensor grad_last, {INPUTS}, Tensor states, Tensor sums) -> Tensor[]", fake_backward
)
