# mypy: disable-error-code="no-untyped-def"
"""RMSNorm and LayerNorm of `norm.py` as Triton kernels, for where torch's are in another dtype than the model.

With gamma around zero, or a residual stream in float32, torch casts what comes in, norms it, and casts what goes out:
three passes over memory, and more over the gradients; here it is one. Where all is of one dtype torch's own kernels
pass but once already. The residual's sum is not taken in: it has to be written for the layer after, so that it would
save one pass of five, and the norm is inside the module whose matrix it feeds, as in Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import dense
from .triton_norm import held, rows_of

LARGEST = 8192  # channels, which a program holds

# Channels of a thread, and how many programs share the rows. Chosen by registers, of which none spills.
FORWARD: Options = {"channels": 16}
BACKWARD: Options = {"channels": 8, "programs": 256}


@jit
def normed(x, eps, here, size, CENTRED: tl.constexpr):
    """What stands before gamma, and one over the deviation, in float32."""
    value = tl.load(x, mask=here, other=0).to(tl.float32)
    if CENTRED:
        value = tl.where(here, value - tl.sum(value, axis=0) / size, 0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / size + eps)
    return value * scale, scale


@jit
def forward_kernel(
    x, weight, bias, out, eps, size, x_row, SIZE: tl.constexpr, CENTRED: tl.constexpr, ONE: tl.constexpr
):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    here = c < size
    value, _ = normed(x + row * x_row + c, eps, here, size, CENTRED)
    value *= tl.load(weight + c, mask=here, other=0).to(tl.float32) + ONE
    if bias is not None:
        value += tl.load(bias + c, mask=here, other=0).to(tl.float32)
    tl.store(out + row * size + c, value.to(out.dtype.element_ty), mask=here)


@jit
def backward_kernel(
    grad, x, weight, dx, sums, eps, size, rows, grad_row, x_row,
    SIZE: tl.constexpr, CENTRED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Every so many rows, and their part of the gradients of gamma and of beta."""
    c = tl.arange(0, SIZE)
    here, wide = c < size, tl.cast(size, tl.int64)
    w = tl.load(weight + c, mask=here, other=0).to(tl.float32) + ONE
    gamma, beta = tl.zeros((SIZE,), dtype=tl.float32), tl.zeros((SIZE,), dtype=tl.float32)
    for i in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(i, tl.int64)
        value, scale = normed(x + row * x_row + c, eps, here, size, CENTRED)
        upstream = tl.load(grad + row * grad_row + c, mask=here, other=0).to(tl.float32)
        gamma += upstream * value
        if CENTRED:
            beta += upstream
        upstream *= w
        upstream -= value * (tl.sum(upstream * value, axis=0) / size)
        if CENTRED:
            upstream -= tl.sum(upstream, axis=0) / size
        tl.store(dx + row * wide + c, (upstream * scale).to(dx.dtype.element_ty), mask=here)
    to = sums + tl.program_id(0) * 2 * wide + c
    tl.store(to, gamma, mask=here)
    tl.store(to + wide, beta, mask=here)


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    flat, size = rows_of(x), x.shape[-1]
    out = torch.empty(flat.shape, dtype=weight.dtype, device=x.device)
    constants = {"CENTRED": bias is not None, "ONE": float(zero_centered)}

    def run(options: Options) -> None:
        tensors = (flat, weight.contiguous(), dense(bias), out)
        launch(forward_kernel, (len(flat),), *tensors, eps, size, flat.stride(0), **held(size, options), **constants)

    run(options_for(("layer_norm_forward", architecture(x.device), str(size)), FORWARD, run=run))
    return out.view(x.shape)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    upstream, flat, size = rows_of(grad), rows_of(x), x.shape[-1]
    dx, constants = flat.new_empty(flat.shape), {"CENTRED": bias is not None, "ONE": float(zero_centered)}
    numbers = (eps, size, len(flat), upstream.stride(0), flat.stride(0))

    def run(options: Options) -> Tensor:
        sums = torch.empty(min(len(flat), options["programs"]), 2, size, dtype=torch.float32, device=x.device)
        tensors = (upstream, flat, weight.contiguous(), dx, sums)
        launch(backward_kernel, (len(sums),), *tensors, *numbers, **held(size, options), **constants)
        return sums

    sums = run(options_for(("layer_norm_backward", architecture(x.device), str(size)), BACKWARD, run=run))
    gamma, beta = sums.sum(dim=0).to(weight.dtype, copy=True)
    return dx.view(x.shape), gamma.clone(), beta.clone()


INPUTS = "Tensor x, Tensor weight, Tensor? bias, float eps, bool zero_centered"
forward = operator(
    norm_forward, f"({INPUTS}) -> Tensor", lambda x, weight, *rest: x.new_empty(x.shape, dtype=weight.dtype)
)
backward = operator(
    norm_backward,
    f"(Tensor grad, {INPUTS}) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, weight, *rest: (
        x.new_empty(x.shape),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape),
    ),
)


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = eps, zero_centered
        return forward(x, weight, bias, eps, zero_centered)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight, dbias = backward(grad, *ctx.saved_tensors, *ctx.settings)
        return dx, dweight, None if ctx.saved_tensors[2] is None else dbias, None, None


def triton_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    """`LayerNorm` of `norm.py` over `[..., d]`, or `RMSNorm` where there is no bias. Its gradients have none."""
    call = Norm.apply if torch.is_grad_enabled() else forward
    return call(x, weight, bias, eps, zero_centered)
