# mypy: disable-error-code="no-untyped-def"
"""The selective scan of `selective_scan.py` as Triton kernels, all chunks of a sequence at once.

Every chunk is walked from zero, for the state at its end; states are passed from chunk to chunk; every chunk is walked
again from the state that enters it. Those are kept, for the backward pass. A thread holds all places of a channel's
state, so that reading it is no sum over threads. Sums are float32, offsets 64 bits wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Key, Options, options_for
from .triton_conv import dense, rowwise, strides
from .triton_ssd import softplus

CHUNK = 64  # tokens between two states that are kept
LARGEST = 32  # places of a state, which a thread holds

# Channels of a program: 32 for each warp, or several threads hold the same. The pass has one place of them.
WALK: Options = {"CHANNELS": 128, "num_warps": 4}
PASS: Options = {"CHANNELS": 128, "num_warps": 4}


@jit
def place(length, channels, CHUNK: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's row, chunk, channels and which block of them that is; and the number of chunks."""
    across, along = tl.cdiv(channels, CHANNELS), tl.cdiv(length, CHUNK)
    block, rest = tl.program_id(0) % across, tl.program_id(0) // across
    return (rest // along).to(tl.int64), rest % along, block * CHANNELS + tl.arange(0, CHANNELS), block, along


@jit
def read(tensor, t, c, inside, token):
    """Channels `c` at the times `t`; 0 outside."""
    return tl.load(tensor + tl.cast(t, tl.int64) * token + c, mask=inside, other=0).to(tl.float32)


@jit
def marked(marks, t, inside, token, WHICH: tl.constexpr):
    """Whether the tokens at the times `t` are padding (1), or the first of a document (2)."""
    return (tl.load(marks + tl.cast(t, tl.int64) * token, mask=inside, other=0) & WHICH) != 0


@jit
def offset_of(bias, c, here):
    value = tl.zeros_like(c).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    return value


@jit
def by_place(tensor, step, here, places, PLACES: tl.constexpr):
    """`[n, c]` whose place n is what lies at `tensor` `[c]` plus n steps; 0 where there are none.

    Read as one block it would come in fours, and a channel's places, which the walk sums, would be in several threads.
    """
    n, value = tl.arange(0, PLACES)[:, None], tl.zeros((PLACES, here.shape[0]), dtype=tl.float32)
    for i in tl.static_range(PLACES):
        one = tl.load(tensor + i * step, mask=here & (i < places), other=0).to(tl.float32)
        value = tl.where(n == i, one[None, :], value)
    return value


@jit
def leave_by_place(tensor, value, step, here, places, PLACES: tl.constexpr):
    """The other way."""
    n = tl.arange(0, PLACES)[:, None]
    for i in tl.static_range(PLACES):
        one = tl.sum(tl.where(n == i, value, 0.0), axis=0)
        tl.store(tensor + i * step, one, mask=here & (i < places))


@jit
def leave_gated(to, y, z, t, c, here, z_token):
    if z is not None:
        gate = read(z, t, c, here, z_token)
        y *= gate * tl.sigmoid(gate)
    tl.store(to, y.to(to.dtype.element_ty), mask=here)


@jit
def walk_kernel(
    u, dt, A, B, C, D, z, bias, marks, states, sums, out,
    length, channels, places, u_row, u_token, dt_row, dt_token, A_channel, A_place, B_row, B_token, C_row, C_token,
    z_row, z_token, marks_row, marks_token, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Through one chunk; without `out` from zero, to leave the state and the sum of its time steps, or -1.

    -1 says that a document starts in it, so that nothing of an entering state is left.
    """
    row, chunk, c, _, chunks = place(length, channels, CHUNK, CHANNELS)
    n, here = tl.arange(0, PLACES)[:, None], c < channels
    offset, rates = offset_of(bias, c, here), by_place(A + c * A_channel, A_place, here, places, PLACES)
    u, dt, B = u + row * u_row, dt + row * dt_row, B + row * B_row
    if marks is not None:
        marks += row * marks_row
    state, total = tl.zeros((PLACES, CHANNELS), dtype=tl.float32), tl.zeros((CHANNELS,), dtype=tl.float32)
    kept = states + (row * chunks + chunk) * places * channels + c
    if out is not None:
        C, out = C + row * C_row, out + row * length * channels
        if z is not None:
            z += row * z_row
        state = by_place(kept, channels, here, places, PLACES)
        skip = offset_of(D, c, here)
    for i in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length)):
        t = tl.cast(i, tl.int64)
        step, value = softplus(read(dt, t, c, here, dt_token) + offset), read(u, t, c, here, u_token)
        if marks is not None:
            mark = tl.load(marks + t * marks_token)
            step = tl.where((mark & 1) != 0, 0.0, step)
            state = tl.where((mark & 2) != 0, 0.0, state)
            total = tl.where((mark & 2) != 0, -float("inf"), total)
        b = read(B, t, n, n < places, B_token)
        state = tl.exp(rates * step[None, :]) * state + (step * value)[None, :] * b
        total += step
        if out is not None:
            y = tl.sum(state * read(C, t, n, n < places, C_token), axis=0) + skip * value
            leave_gated(out + t * channels + c, y, z, t, c, here, z_token)
    if out is None:
        leave_by_place(kept, state, channels, here, places, PLACES)
        tl.store(sums + (row * chunks + chunk) * channels + c, tl.maximum(total, -1.0), mask=here)


@jit
def pass_kernel(
    states, sums, A, first, last, length, channels, places, A_channel, A_place, first_row, first_channel, first_place,
    BACK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Puts in the place of what each chunk leaves what enters it, from first to last or, if `BACK`, the other way.

    Args:
        length: of the sequence, in chunks.
    """
    across = tl.cdiv(channels, CHANNELS)
    block, rest = tl.program_id(0) % across, tl.program_id(0) // across
    n, row = rest % places, (rest // places).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)
    here = c < channels
    rates = tl.load(A + c * A_channel + n * A_place, mask=here, other=0).to(tl.float32)
    state = tl.zeros((CHANNELS,), dtype=tl.float32)
    if first is not None:
        held = first + row * first_row + c.to(tl.int64) * first_channel + n * first_place
        state += tl.load(held, mask=here, other=0).to(tl.float32)
    for i in range(0, length):
        chunk = tl.cast(i, tl.int64)
        if BACK:
            chunk = length - 1 - chunk
        at = row * length + chunk
        kept = states + (at * places + n) * channels + c
        new = tl.load(kept, mask=here, other=0)
        total = tl.load(sums + at * channels + c, mask=here, other=0)
        tl.store(kept, state, mask=here)
        state = tl.where(total < 0, 0.0, tl.exp(rates * total) * state) + new
    tl.store(last + (row * channels + c) * places + n, state, mask=here)


def key(kernel: str, u: Tensor, places: int) -> Key:
    return kernel, architecture(u.device), f"{str(u.dtype)[6:]} n{places}"


def blocks(count: int, options: Options) -> int:
    return -(-count // options["CHANNELS"])


def power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def handed_on(
    states: Tensor, sums: Tensor, A: Tensor, first: Tensor | None, options: Options, back: bool = False
) -> Tensor:
    """Turns what chunks leave `[b, k, n, d]` into what enters them, and gives what leaves the last `[b, d, n]`."""
    rows, chunks, places, channels = states.shape
    last = states.new_empty(rows, channels, places)
    grid, numbers = (rows * places * blocks(channels, options),), (chunks, channels, places)
    steps = (*A.stride(), *strides(first, 0, 1, 2))
    launch(pass_kernel, grid, states, sums, A, first, last, *numbers, *steps, BACK=back, **options)
    return last


def scan_forward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, the last state, the states that enter chunks `[b, k, n, d]`, and their time steps' sums `[b, k, d]`."""
    u, dt, B, C, D, bias = rowwise(u), rowwise(dt), rowwise(B), rowwise(C), dense(D), dense(bias)
    z = None if z is None else rowwise(z)
    rows, length, channels = u.shape
    places, chunks = A.shape[1], -(-length // CHUNK)
    out = u.new_empty(u.shape)
    states = torch.empty(rows, chunks, places, channels, dtype=torch.float32, device=u.device)
    sums = states.new_empty(rows, chunks, channels)
    pairs = (*u.stride()[:2], *dt.stride()[:2], *A.stride(), *B.stride()[:2], *C.stride()[:2])
    steps = (*pairs, *strides(z, 0, 1), *strides(marks, 0, 1))

    def run(options: Options) -> Tensor:
        grid, numbers = (rows * chunks * blocks(channels, options),), (length, channels, places, *steps)
        constants = {"CHUNK": CHUNK, "PLACES": power(places), **options}
        launch(walk_kernel, grid, u, dt, A, B, None, None, None, bias, marks, states, sums, None, *numbers, **constants)
        last = handed_on(states, sums, A, state, options_for(key("scan_pass", u, places), PASS))
        launch(walk_kernel, grid, u, dt, A, B, C, D, z, bias, marks, states, None, out, *numbers, **constants)
        return last

    last = run(options_for(key("scan_walk", u, places), WALK, run=run))
    return out, last, states, sums


def fake_forward(u: Tensor, dt: Tensor, A: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, length, channels = u.shape
    places, chunks = A.shape[1], (length + CHUNK - 1) // CHUNK
    last = u.new_empty(rows, channels, places, dtype=torch.float32)
    return (
        u.new_empty(u.shape),
        last,
        last.new_empty(rows, chunks, places, channels),
        last.new_empty(rows, chunks, channels),
    )


INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor? state, "
    "Tensor? marks"
)
forward = operator(scan_forward, f"({INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", fake_forward)
