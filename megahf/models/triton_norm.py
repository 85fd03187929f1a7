# mypy: disable-error-code="no-untyped-def"
"""The gated norm of `mamba.py` as Triton kernels, forward and backward: one group of channels a program, read once.

The gate is read where it lies in the packed projection. Sums are float32, offsets 64 bits wide, and no sum depends on
the order of programs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Options, options_for

LARGEST = 8192  # channels of a group, which a program holds


# Channels of a thread, and how many programs share a group's rows. Chosen by registers, of which none spills.
FORWARD: Options = {"channels": 16}
BACKWARD: Options = {"channels": 8, "programs": 256}


@jit
def gated(y, z, eps, here, size):
    """`y`, the gate and its sigmoid, what the norm is taken of and one over its root mean square, in float32."""
    value, gate = tl.load(y, mask=here, other=0).to(tl.float32), tl.load(z, mask=here, other=0).to(tl.float32)
    open_ = tl.sigmoid(gate)
    inner = value * gate * open_
    return value, gate, open_, inner, tl.rsqrt(tl.sum(inner * inner, axis=0) / size + eps)


@jit
def forward_kernel(y, z, weight, out, eps, size, y_row, z_row, SIZE: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    here, first = c < size, tl.program_id(1) * size
    w = tl.load(weight + first + c, mask=here, other=0).to(tl.float32)
    _, _, _, inner, scale = gated(y + row * y_row + first + c, z + row * z_row + first + c, eps, here, size)
    value = (inner * scale * w).to(out.dtype.element_ty)
    tl.store(out + row * tl.num_programs(1) * size + first + c, value, mask=here)


@jit
def backward_kernel(
    grad, y, z, weight, dy, dz, sums, eps, size, rows, grad_row, y_row, z_row, SIZE: tl.constexpr
):  # fmt: skip
    """Every so many rows of a group, and their part of the weight's gradient."""
    c, width = tl.arange(0, SIZE), (tl.num_programs(1) * size).to(tl.int64)
    here, at = c < size, tl.program_id(1) * size + c
    w = tl.load(weight + at, mask=here, other=0).to(tl.float32)
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        value, gate, open_, inner, scale = gated(y + row * y_row + at, z + row * z_row + at, eps, here, size)
        upstream = tl.load(grad + row * grad_row + at, mask=here, other=0).to(tl.float32)
        normed = inner * scale
        total += upstream * normed
        upstream *= w
        d = scale * (upstream - normed * (tl.sum(upstream * normed, axis=0) / size))
        dgate = d * value * open_ * (1 + gate * (1 - open_))
        tl.store(dy + row * width + at, (d * gate * open_).to(dy.dtype.element_ty), mask=here)
        tl.store(dz + row * width + at, dgate.to(dz.dtype.element_ty), mask=here)
    tl.store(sums + tl.program_id(0) * width + at, total, mask=here)


def rows_of(t: Tensor) -> Tensor:
    """`t` `[..., d]` as `[rows, d]` with channels side by side, which copies nothing of a packed projection."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(-1) == 1 else t.contiguous()


def held(size: int, options: Options) -> dict[str, int]:
    """A program's constants for rows of `size` channels: at most 16 warps of 32 threads."""
    block = 1 << (size - 1).bit_length()
    return {"SIZE": block, "num_warps": min(16, max(1, block // (32 * options["channels"])))}


def norm_forward(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    flat, gate = rows_of(y), rows_of(z)
    size = y.shape[-1] // groups
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    tensors, steps = (flat, gate, weight.contiguous(), out), (flat.stride(0), gate.stride(0))

    def run(options: Options) -> None:
        launch(forward_kernel, (len(flat), groups), *tensors, eps, size, *steps, **held(size, options))

    run(options_for(("norm_forward", architecture(y.device), str(size)), FORWARD, run=run))
    return out.view(y.shape)


def norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, flat, gate = rows_of(grad), rows_of(y), rows_of(z)
    rows, width = flat.shape
    size = width // groups
    dy, dz = flat.new_empty(flat.shape), gate.new_empty(gate.shape)
    tensors = (upstream, flat, gate, weight.contiguous(), dy, dz)
    steps = (upstream.stride(0), flat.stride(0), gate.stride(0))

    def run(options: Options) -> Tensor:
        sums = torch.empty(min(rows, options["programs"]), width, dtype=torch.float32, device=y.device)
        constants = held(size, options)
        launch(backward_kernel, (len(sums), groups), *tensors, sums, eps, size, rows, *steps, **constants)
        return sums

    sums = run(options_for(("norm_backward", architecture(y.device), str(size)), BACKWARD, run=run))
    return dy.view(y.shape), dz.view(z.shape), sums.sum(dim=0).to(weight.dtype)


INPUTS = "Tensor y, Tensor z, Tensor weight, int groups, float eps"
forward = operator(norm_forward, f"({INPUTS}) -> Tensor", lambda y, *rest: y.new_empty(y.shape))
backward = operator(
    norm_backward,
    f"(Tensor grad, {INPUTS}) -> (Tensor, Tensor, Tensor)",
    lambda grad, y, z, weight, *rest: (y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)),
)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.settings = groups, eps
        return forward(y, z, weight, groups, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(grad, *ctx.saved_tensors, *ctx.settings), None, None)


def triton_gated_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`GatedRMSNorm` of `mamba.py`: `y` and `z` `[..., d]` to the same. Its gradients have none of their own."""
    call = Norm.apply if torch.is_grad_enabled() else forward
    return call(y, z, weight, groups, eps)
