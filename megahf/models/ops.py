"""Ops that are more than a line of torch: for now the matmul of rows sorted into groups, each group with its matrix.

Where torch has a kernel for it, one call does all groups; else a loop goes over the groups that have rows, on CPUs also
where there are fewer rows than groups. Measured there the two are equally fast otherwise, and 5 to 20 times faster than
gathering a matrix for each row, already at one token: so there is no third way. Under `torch.compile`, whose own
lowering takes bfloat16 alone, the choice is hidden in custom ops. Our own kernels, where they are asked for, do what
torch's do not take, and what they were measured to be quicker at.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernel_choice import architecture, takes
from .triton_grouped import triton_outer, triton_rows

HAS_KERNEL = hasattr(F, "grouped_mm")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUICKER: dict[tuple[str, int], int] = {}  # by op and architecture: up to how many rows a group ours was measured to be
ALIGNMENT = 16  # bytes that the kernel wants rows and starts of memory to be multiples of


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each row of `x` `[m, k]` times the matrix of its group: `[m, n]`. Under autocast in its dtype.

    Args:
        x: rows sorted by group.
        weight: `[g, n, k]`, a matrix as `nn.Linear` holds it for each group.
        ends: `[g]` int32, after which row each group ends. Rows after the last end belong to none: what comes out
            for them, and as their gradient, is undefined, and may be NaN.
    """
    dtype = autocast_dtype(x) or weight.dtype
    x, weight = x.to(dtype), weight.to(dtype)
    return GroupedLinear.apply(x, weight, ends) if torch.is_grad_enabled() else rows_op(x, weight, ends)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast multiplies in where `x` is; None outside of it."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class GroupedLinear(torch.autograd.Function):
    """`grouped_linear` with its gradients, which are grouped matmuls too; a group without rows has gradient 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return rows_op(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()  # a sum's gradient has no strides, and the kernel wants some
        x_grad = rows_op(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        return x_grad, outer_op(grad, x, ends) if ctx.needs_input_grad[1] else None, None


def rows_op(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return (ROWS if torch.compiler.is_compiling() else rows)(x, weight, ends)


def outer_op(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return (OUTER if torch.compiler.is_compiling() else outer)(grad, x, ends)


def rows(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x` `[m, k]` times `weight` `[g, n, k]` by group: `[m, n]`."""
    if ours("grouped_rows", ends, x, weight):
        return triton_rows(x, weight, ends)
    few = x.device.type == "cpu" and len(x) < len(weight)  # the kernel goes over groups without rows too, one by one
    if not few and kernel_takes(x, weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out = x.new_empty(len(x), weight.shape[1])
    for group, start, end in groups(ends):
        torch.mm(x[start:end], weight[group].T, out=out[start:end])
    return out


def outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The sum over each group's rows of `grad` `[m, n]` times `x` `[m, k]`: `[g, n, k]`."""
    if ours("grouped_outer", ends, grad, x):
        return triton_outer(grad, x, ends)
    if kernel_takes(grad, x):
        return F.grouped_mm(grad.T, x, offs=ends)
    out = x.new_zeros(len(ends), grad.shape[1], x.shape[1])
    for group, start, end in groups(ends):
        torch.mm(grad[start:end].T, x[start:end], out=out[group])
    return out


def groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """Group, first row and end of each group that has rows."""
    edges = ends.tolist()
    return [
        (group, start, end) for group, (start, end) in enumerate(zip([0, *edges], edges, strict=False)) if end > start
    ]


def ours(op: str, ends: Tensor, *operands: Tensor) -> bool:
    """Whether our kernels are to run on these: where torch's cannot, or was measured to be slower."""
    if not takes(*operands):
        return False
    most = QUICKER.get((op, architecture(ends.device)), 0) * len(ends)
    return not kernel_takes(*operands) or len(operands[0]) <= most


def kernel_takes(*operands: Tensor) -> bool:
    """Whether torch's kernel runs on these: their dtype, memory and device."""
    first = operands[0]
    if not HAS_KERNEL or first.dtype not in KERNEL_DTYPES or not first.numel():
        return False
    if first.device.type == "cuda" and torch.cuda.get_device_capability(first.device) < (8, 0):
        return False
    return first.device.type in ("cpu", "cuda") and all(is_aligned(x) for x in operands)


def is_aligned(x: Tensor) -> bool:
    """Whether `x` starts, and its rows (or columns) start, where the kernel wants them; a mapped file's may not."""
    *outer, apart, within = (*x.stride()[:-2], *sorted(x.stride()[-2:], reverse=True))
    bytes_apart = [step * x.element_size() for step in (*outer, apart)]
    return within == 1 and not any(step % ALIGNMENT for step in (x.data_ptr(), *bytes_apart))


# Named after this module: a saved model's code is one more, and each version is to find its own.
NAMESPACE = re.sub(r"\W", "_", __name__)
ROWS = torch.library.custom_op(
    f"{NAMESPACE}::grouped_rows", rows, mutates_args=(), schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor"
)
OUTER = torch.library.custom_op(
    f"{NAMESPACE}::grouped_outer", outer, mutates_args=(), schema="(Tensor grad, Tensor x, Tensor ends) -> Tensor"
)


@ROWS.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@OUTER.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
