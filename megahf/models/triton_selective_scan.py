# mypy: disable-error-code="no-untyped-def"
"""The selective scan of `selective_scan.py` by Triton kernels: of a sequence, with its gradients, and of one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import dense, rowwise, strides
from .triton_selective_backward import backward
from .triton_selective_forward import blocks, forward, key, offset_of, power
from .triton_ssd import softplus

UPDATE: Options = {"CHANNELS": 32, "num_warps": 4}  # its rows of places lie side by side


@jit
def update_kernel(
    state, u, dt, A, B, C, D, z, bias, indices, out, channels, places,
    state_row, state_channel, state_place, u_row, dt_row, A_channel, A_place, B_row, C_row, z_row,
    CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(channels, CHANNELS)
    row, block = (tl.program_id(0) // across).to(tl.int64), tl.program_id(0) % across
    c, n = block * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, PLACES)[None, :]
    here, place = c < channels, row
    if indices is not None:
        place = tl.load(indices + row).to(tl.int64)
    wide, held = c.to(tl.int64)[:, None], here[:, None] & (n < places) & (place >= 0)
    raw = tl.load(dt + row * dt_row + c, mask=here, other=0).to(tl.float32) + offset_of(bias, c, here)
    value, step = tl.load(u + row * u_row + c, mask=here, other=0).to(tl.float32), softplus(raw)
    rates = tl.load(A + wide * A_channel + n * A_place, mask=here[:, None] & (n < places), other=0).to(tl.float32)
    b = tl.load(B + row * B_row + n, mask=n < places, other=0).to(tl.float32)
    at = state + place * state_row + wide * state_channel + n * state_place
    new = tl.load(at, mask=held, other=0).to(tl.float32) * tl.exp(rates * step[:, None]) + (step * value)[:, None] * b
    tl.store(at, new.to(state.dtype.element_ty), mask=held)
    y = tl.sum(new * tl.load(C + row * C_row + n, mask=n < places, other=0).to(tl.float32), axis=1)
    if D is not None:
        y += value * tl.load(D + c, mask=here, other=0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * z_row + c, mask=here, other=0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    y = tl.where(place >= 0, y, 0.0)
    tl.store(out + row * channels + c, y.to(out.dtype.element_ty), mask=here)


def scan_update(
    state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, indices: Tensor | None,
) -> Tensor:  # fmt: skip
    u, dt, B, C, D, bias = rowwise(u), rowwise(dt), rowwise(B), rowwise(C), dense(D), dense(bias)
    z = None if z is None else rowwise(z)
    rows, channels = u.shape
    out, options = u.new_empty(u.shape), options_for(key("scan_update", u, A.shape[1]), UPDATE)
    steps = (*state.stride(), u.stride(0), dt.stride(0), *A.stride(), B.stride(0), C.stride(0), *strides(z, 0))
    tensors, grid = (state, u, dt, A, B, C, D, z, bias, dense(indices), out), (rows * blocks(channels, options),)
    launch(update_kernel, grid, *tensors, channels, A.shape[1], *steps, PLACES=power(A.shape[1]), **options)
    return out


update = operator(
    scan_update,
    "(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "Tensor? indices) -> Tensor",
    lambda state, u, *rest: u.new_empty(u.shape),
)


class Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last, states, sums = forward(*inputs)
        ctx.save_for_backward(*inputs, states, sums)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = backward(grad, grad_last, *saved)
        return (*(None if t is None else d for t, d in zip(saved, gradients, strict=False)), None)


def triton_selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    marks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of `selective_scan.py`, arguments and results, but for `marks`.

    Args:
        marks: `[b, s]` integers: 1 for padding, 2 where a document starts that is not the state's, 3 for both.

    Its gradients have none of their own.
    """
    inputs = (u, dt, A, B, C, D, z, bias, state, marks)
    return Scan.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)[:2]


def triton_selective_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    bias: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """`selective_update` of `selective_scan.py`."""
    return update(state, u, dt, A, B, C, D, z, bias, indices)
