# mypy: disable-error-code="no-untyped-def"
"""The causal depthwise convolution of `conv.py` as Triton kernels: forward, backward, and one token more.

Tokens are read where they lie, channels last, in a view of a packed projection or not: no copy, no transpose, and no
window with the state in front. Sums are float32, offsets 64 bits wide, no sum depends on the order of programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Key, Options, options_for

WIDTHS = (2, 3, 4)


# Chosen by registers, of which none spills. The backward pass walks over its tokens, and holds 4 of them.
FORWARD: Options = {"TOKENS": 16, "CHANNELS": 128, "num_warps": 4}
BACKWARD: Options = {"TOKENS": 64, "CHANNELS": 256, "num_warps": 2}
# No channel in two threads, of which one might read what the other has changed: channels >= 32 warps.
UPDATE: Options = {"CHANNELS": 256, "num_warps": 4}


@jit
def place(length, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's row, its block of tokens in all rows, its first token, and its channels."""
    program = tl.program_id(0)
    across, along = tl.cdiv(channels, CHANNELS), tl.cdiv(length, TOKENS)
    block = program // across
    channel = (program % across) * CHANNELS + tl.arange(0, CHANNELS)
    return (block // along).to(tl.int64), block, (block % along) * TOKENS, channel


@jit
def read(x, state, first, t, c, here, length, x_token, state_channel, state_place, WIDTH: tl.constexpr):
    """What came in at the times `t`, of which `first` is the earliest: below 0 the state, where there is one, or 0."""
    t = tl.cast(t, tl.int64)
    inside = (t >= 0) & (t < length) & here
    value = tl.load(x + t * x_token + c, mask=inside, other=0).to(tl.float32)
    if state is not None and first < 0:
        held = state + c.to(tl.int64) * state_channel + (t + WIDTH) * state_place
        before = tl.load(held, mask=(t < 0) & (t >= -WIDTH) & here, other=0)
        value = tl.where(t < 0, before.to(x.dtype.element_ty).to(tl.float32), value)
    return value


@jit
def document(seq_idx, t, length, seq_token):
    """Which document the times `t` are of; those before 0 are of the first token's."""
    inside = tl.minimum(tl.maximum(t, 0), length - 1)
    return tl.load(seq_idx + tl.cast(inside, tl.int64) * seq_token)


@jit
def tap(weight, back, c, here, WIDTH: tl.constexpr):
    """What a channel's input `back` tokens ago counts; anything where the convolution does not look so far."""
    return tl.load(weight + c * WIDTH + tl.maximum(WIDTH - 1 - back, 0), mask=here, other=0).to(tl.float32)


@jit
def entered(
    total, x, state, weight, seq_idx, t, c, here, length, state_channel, state_place, seq_token, WIDTH: tl.constexpr
):  # fmt: skip
    """`total` and what the first tokens take from the state; a row at a time, for few registers."""
    for p in tl.static_range(WIDTH - 1):
        more = tl.zeros_like(c).to(tl.float32)
        for back in tl.static_range(p + 1, WIDTH):
            held = state + c.to(tl.int64) * state_channel + (WIDTH + p - back) * state_place
            value = tl.load(held, mask=here, other=0).to(x.dtype.element_ty).to(tl.float32)
            more += value * tap(weight, back, c, here, WIDTH)
        if seq_idx is not None:
            same = document(seq_idx, p, length, seq_token) == document(seq_idx, 0, length, seq_token)
            more = tl.where(same, more, 0.0)
        total = tl.where(t == p, total + more, total)
    return total


@jit
def forward_kernel(
    x, weight, bias, state, seq_idx, lengths, out, after,
    length, channels, x_row, x_token, state_row, state_channel, state_place, seq_row, seq_token,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, _, start, channel = place(length, channels, TOKENS, CHANNELS)
    x += row * x_row
    if state is not None:
        state += row * state_row
    if seq_idx is not None:
        seq_idx += row * seq_row
    c, here = channel[None, :], channel[None, :] < channels
    t = (start + tl.arange(0, TOKENS))[:, None]
    total = tl.zeros((TOKENS, CHANNELS), dtype=tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    for i in tl.static_range(WIDTH):
        back = WIDTH - 1 - i
        value = read(x, None, 0, t - back, c, here, length, x_token, 0, 0, WIDTH)
        if seq_idx is not None:
            same = document(seq_idx, t, length, seq_token) == document(seq_idx, t - back, length, seq_token)
            value = tl.where(same, value, 0)
        total += value * tap(weight, back, c, here, WIDTH)
    if state is not None and start == 0:
        total = entered(
            total, x, state, weight, seq_idx, t, c, here, length, state_channel, state_place, seq_token, WIDTH
        )
    total *= tl.sigmoid(total)
    to = (row * length + t) * channels + c
    tl.store(out + to, total.to(out.dtype.element_ty), mask=(t < length) & here)
    if start == 0:  # these programs also leave the state
        end = length
        if lengths is not None:
            end = tl.load(lengths + row).to(tl.int32)
        for i in tl.static_range(WIDTH):
            p = end - WIDTH + i
            last = read(x, state, p, p, c, here, length, x_token, state_channel, state_place, WIDTH)
            tl.store(after + (row * WIDTH + i) * channels + c, last.to(after.dtype.element_ty), mask=here)


@jit
def kept(value, one, other, seq_idx):
    """`value` where there is but one document, or `one` is `other`."""
    if seq_idx is not None:
        value = tl.where(one == other, value, 0.0)
    return value


@jit
def slope(total, grad):
    """The gradient of what `silu` was taken of."""
    gate = tl.sigmoid(total)
    return grad * gate * (1 + total * (1 - gate))


@jit
def weigh(v0, v1, v2, v3, w0, w1, w2, w3, total, WIDTH: tl.constexpr):
    """`total` plus values times weights; what is not looked at may be anything, NaN too."""
    if WIDTH > 3:
        total += w3 * v3
    if WIDTH > 2:
        total += w2 * v2
    return total + w1 * v1 + w0 * v0


@jit
def leave_sums(sums, s0, s1, s2, s3, offset, c, here, channels, WIDTH: tl.constexpr):
    """Stores a program's part of the gradients of the weight, in its order, and after them of the bias."""
    tl.store(sums + WIDTH * channels + c, offset, mask=here)
    tl.store(sums + (WIDTH - 1) * channels + c, s0, mask=here)
    tl.store(sums + (WIDTH - 2) * channels + c, s1, mask=here)
    if WIDTH > 2:
        tl.store(sums + (WIDTH - 3) * channels + c, s2, mask=here)
    if WIDTH > 3:
        tl.store(sums + (WIDTH - 4) * channels + c, s3, mask=here)


@jit
def documents(seq_idx, t, length, seq_token):
    """Which documents the times `t` to `t - 3` are of, where there are several."""
    n0, n1, n2, n3 = 0, 0, 0, 0
    if seq_idx is not None:
        n0 = document(seq_idx, t, length, seq_token)
        n1 = document(seq_idx, t - 1, length, seq_token)
        n2 = document(seq_idx, t - 2, length, seq_token)
        n3 = document(seq_idx, t - 3, length, seq_token)
    return n0, n1, n2, n3


@jit
def leave(value, grad_after, dx, dstate, p, start, end, c, here, length, channels, WIDTH: tl.constexpr):
    """Stores the gradient of what came in at time `p`, if it is the program's: an input's or, below 0, the state's."""
    out = p - (end - WIDTH)  # its place in the state that is left
    left = tl.load(grad_after + tl.cast(out, tl.int64) * channels + c, mask=(out >= 0) & (out < WIDTH) & here, other=0)
    value += left.to(tl.float32)
    tl.store(
        dx + tl.cast(p, tl.int64) * channels + c,
        value.to(dx.dtype.element_ty),
        mask=(p >= start) & (p < length) & here,
    )
    if dstate is not None:
        to = dstate + (p + WIDTH) * channels + c
        tl.store(to, value.to(dstate.dtype.element_ty), mask=(p < 0) & (p >= -WIDTH) & here)


@jit
def backward_kernel(
    grad, grad_after, x, weight, bias, state, seq_idx, lengths, dx, dstate, sums,
    length, channels, grad_row, grad_token, x_row, x_token, state_row, state_channel, state_place, seq_row, seq_token,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row, block, start, c = place(length, channels, TOKENS, CHANNELS)
    here, end = c < channels, length
    if lengths is not None:
        end = tl.load(lengths + row).to(tl.int32)
    if seq_idx is not None:
        seq_idx += row * seq_row
    if state is not None:
        state, dstate = state + row * state_row, dstate + row * WIDTH * channels
    walk(
        grad + row * grad_row, grad_after + row * WIDTH * channels, x + row * x_row, weight, bias, state, seq_idx,
        dx + row * length * channels, dstate, sums + tl.cast(block, tl.int64) * (WIDTH + 1) * channels,
        start, end, c, here, length, channels, grad_token, x_token, state_channel, state_place, seq_token,
        WIDTH, TOKENS, CHANNELS,
    )  # fmt: skip


@jit
def walk(
    grad, grad_after, x, weight, bias, state, seq_idx, dx, dstate, sums,
    start, end, c, here, length, channels, grad_token, x_token, state_channel, state_place, seq_token,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Over a block of tokens and the 3 after it, which hold a part of their gradients. `d1` is one token back."""
    zero = tl.zeros((CHANNELS,), dtype=tl.float32)
    offset = zero
    if bias is not None:
        offset += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    w0, w1 = tap(weight, 0, c, here, WIDTH), tap(weight, 1, c, here, WIDTH)
    w2, w3 = tap(weight, 2, c, here, WIDTH), tap(weight, 3, c, here, WIDTH)
    s0, s1, s2, s3, s, d1, d2, d3 = zero, zero, zero, zero, zero, zero, zero, zero
    first = tl.where(start == 0, -1, start)  # a state of 4 starts at -4
    x1 = read(x, state, first - 1, first - 1, c, here, length, x_token, state_channel, state_place, WIDTH)
    x2 = read(x, state, first - 2, first - 2, c, here, length, x_token, state_channel, state_place, WIDTH)
    x3 = read(x, state, first - 3, first - 3, c, here, length, x_token, state_channel, state_place, WIDTH)
    n0, n1, n2, n3 = documents(seq_idx, first, length, seq_token)
    for i in range(first, tl.minimum(start + TOKENS, length) + 3):
        t = tl.cast(i, tl.int32)
        x0 = read(x, state, t, t, c, here, length, x_token, state_channel, state_place, WIDTH)
        if seq_idx is not None:
            n0 = document(seq_idx, t, length, seq_token)
        v1, v2, v3 = kept(x1, n0, n1, seq_idx), kept(x2, n0, n2, seq_idx), kept(x3, n0, n3, seq_idx)
        inside = (t >= 0) & (t < length) & here
        upstream = tl.load(grad + tl.cast(t, tl.int64) * grad_token + c, mask=inside, other=0).to(tl.float32)
        total = weigh(x0, v1, v2, v3, w0, w1, w2, w3, offset, WIDTH)
        d0 = tl.where(inside, slope(total, upstream), 0.0)
        own = tl.where((t >= start) & (t < start + TOKENS), d0, 0.0)
        s, s0, s1, s2, s3 = s + own, s0 + own * x0, s1 + own * v1, s2 + own * v2, s3 + own * v3
        e2, e1, e0 = kept(d2, n2, n3, seq_idx), kept(d1, n1, n3, seq_idx), kept(d0, n0, n3, seq_idx)
        value = weigh(d3, e2, e1, e0, w0, w1, w2, w3, zero, WIDTH)
        leave(value, grad_after, dx, dstate, t - 3, start, end, c, here, length, channels, WIDTH)
        x3, x2, x1, d3, d2, d1, n3, n2, n1 = x2, x1, x0, d2, d1, d0, n2, n1, n0
    leave_sums(sums, s0, s1, s2, s3, s, c, here, channels, WIDTH)


@jit
def update_kernel(
    state, x, weight, bias, out, channels, state_row, state_channel, state_place, x_row,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // across).to(tl.int64)
    c = (tl.program_id(0) % across) * CHANNELS + tl.arange(0, CHANNELS)
    here = c < channels
    held = state + row * state_row + c.to(tl.int64) * state_channel
    total = tl.zeros((CHANNELS,), dtype=tl.float32)
    if bias is not None:
        total += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    for i in tl.static_range(WIDTH):
        if i < WIDTH - 1:
            value = tl.load(held + (i + 1) * state_place, mask=here, other=0).to(x.dtype.element_ty).to(tl.float32)
        else:
            value = tl.load(x + row * x_row + c, mask=here, other=0).to(tl.float32)
        tl.store(held + i * state_place, value.to(state.dtype.element_ty), mask=here)
        total += value * tap(weight, WIDTH - 1 - i, c, here, WIDTH)
    total *= tl.sigmoid(total)
    tl.store(out + row * channels + c, total.to(out.dtype.element_ty), mask=here)


def dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def strides(t: Tensor | None, *dims: int) -> tuple[int, ...]:
    return (0,) * len(dims) if t is None else tuple(t.stride(dim) for dim in dims)


def rowwise(t: Tensor) -> Tensor:
    """`t` with channels side by side, as kernels read them; a sum's gradient, one number for all, is spread out."""
    return t if t.stride(-1) == 1 else t.contiguous()


def programs(x: Tensor, options: Options) -> tuple[int]:
    """Blocks of tokens times blocks of channels of `x` `[b, s, c]`."""
    return (x.shape[0] * -(-x.shape[1] // options["TOKENS"]) * -(-x.shape[2] // options["CHANNELS"]),)


def key(kernel: str, x: Tensor) -> Key:
    return kernel, architecture(x.device), str(x.dtype)[6:]


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, weight, bias = rowwise(x), weight.contiguous(), dense(bias)
    rows, length, channels = x.shape
    width = weight.shape[-1]
    out, after = x.new_empty(x.shape), x.new_empty(rows, width, channels)
    steps = (*x.stride()[:2], *strides(state, 0, 1, 2), *strides(seq_idx, 0, 1))
    tensors = (x, weight, bias, state, seq_idx, lengths, out, after)

    def run(options: Options) -> None:
        launch(forward_kernel, programs(x, options), *tensors, length, channels, *steps, WIDTH=width, **options)

    run(options_for(key("conv_forward", x), FORWARD, run=run))
    return out, after.transpose(1, 2)


def conv_backward(
    grad: Tensor, grad_after: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    seq_idx: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, grad, weight, bias = rowwise(x), rowwise(grad), weight.contiguous(), dense(bias)
    grad_after = grad_after.transpose(1, 2).contiguous()  # [b, w, c]
    rows, length, channels = x.shape
    width = weight.shape[-1]
    dx, dstate = x.new_empty(x.shape), None if state is None else state.new_empty(rows, width, channels)
    steps = (*grad.stride()[:2], *x.stride()[:2], *strides(state, 0, 1, 2), *strides(seq_idx, 0, 1))
    tensors = (grad, grad_after, x, weight, bias, state, seq_idx, lengths, dx, dstate)

    def run(options: Options) -> Tensor:
        blocks = rows * -(-length // options["TOKENS"])
        sums = torch.empty(blocks, width + 1, channels, dtype=torch.float32, device=x.device)
        numbers = (length, channels, *steps)
        launch(backward_kernel, programs(x, options), *tensors, sums, *numbers, WIDTH=width, **options)
        return sums

    sums = run(options_for(key("conv_backward", x), BACKWARD, run=run))
    dweight = sums[:, :width].sum(dim=0).t()[:, None].to(weight.dtype)  # [c, 1, w]
    dbias = sums[:, width].sum(dim=0).to(weight.dtype if bias is None else bias.dtype)
    return dx, dweight, dbias, x.new_empty(0) if dstate is None else dstate.transpose(1, 2)


def conv_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight, bias = rowwise(x), weight.contiguous(), dense(bias)
    rows, channels = x.shape
    out = x.new_empty(x.shape)
    options = options_for(key("conv_update", x), UPDATE)
    grid, numbers = (rows * -(-channels // options["CHANNELS"]),), (channels, *state.stride(), x.stride(0))
    launch(update_kernel, grid, state, x, weight, bias, out, *numbers, WIDTH=weight.shape[-1], **options)
    return out


def fake_forward(x: Tensor, weight: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
    rows, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(rows, weight.shape[-1], channels).transpose(1, 2)


def fake_backward(
    grad: Tensor, grad_after: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels, _, width = weight.shape
    dweight = weight.new_empty(width, channels).t()[:, None]
    dbias = (weight if bias is None else bias).new_empty(channels)
    dstate = x.new_empty(0) if state is None else state.new_empty(x.shape[0], width, channels).transpose(1, 2)
    return x.new_empty(x.shape), dweight, dbias, dstate


INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? seq_idx, Tensor? lengths"
forward = operator(conv_forward, f"({INPUTS}) -> (Tensor, Tensor)", fake_forward)
backward = operator(
    conv_backward, f"(Tensor grad, Tensor grad_after, {INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", fake_backward
)
update = operator(
    conv_update,
    "(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda state, x, weight, bias: x.new_empty(x.shape),
)


class Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_after: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        dx, dweight, dbias, dstate = backward(grad, grad_after, *inputs)
        return dx, dweight, None if inputs[2] is None else dbias, None if inputs[3] is None else dstate, None, None


def triton_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of `conv.py`, arguments and results, with `lengths` `[b]` for a mask: tokens before the padding.

    Its gradients have none of their own.
    """
    call = Conv.apply if torch.is_grad_enabled() else forward
    return call(x, weight, bias, state, seq_idx, lengths)


def triton_conv1d_update(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`causal_conv1d_update` of `conv.py`."""
    return update(state, x, weight, bias)
