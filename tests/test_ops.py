"""Promise: a grouped matmul is the matmul of each group, with its gradients, whatever kernel torch has for it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megahf.models import ops
from megahf.models.ops import grouped_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def one_by_one(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """The same in float64, a row at a time."""
    groups = [group for group, (start, end) in enumerate(pairwise([0, *ends])) for _ in range(start, end)]
    rows = [weight[group].double() @ row.double() for row, group in zip(x, groups, strict=True)]
    return torch.stack(rows) if rows else x.double().new_zeros(0, weight.shape[1])


def check(counts: list[int], inner: int, outer: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor(counts).cumsum(0)
    x = torch.randn(sum(counts), inner, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), outer, inner, generator=generator).to(dtype).requires_grad_()
    out = grouped_linear(x, weight, ends.int())
    expected = one_by_one(x, weight, ends.tolist())
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.sum(), (x, weight))  # a sum's: one number for all rows, without strides
    wanted = torch.autograd.grad(expected.sum(), (x, weight)) if len(x) else (x, torch.zeros_like(weight))
    for got, want in zip((out, *gradients), (expected, *wanted), strict=True):
        scale = max(1.0, float(want.detach().abs().max())) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want.double(), atol=TOLERANCE[dtype] * scale, rtol=0)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    inner=st.sampled_from([1, 5, 8, 32]),
    outer=st.sampled_from([1, 7, 16, 40]),
    dtype=st.sampled_from(list(TOLERANCE)),
    kernel=st.booleans(),
)
def test_rows_are_multiplied_by_their_groups_matrix(
    counts: list[int], inner: int, outer: int, dtype: torch.dtype, kernel: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "HAS_KERNEL", ops.HAS_KERNEL and kernel)
        check(counts, inner, outer, dtype)


def test_weights_that_a_file_holds_at_any_byte_are_taken() -> None:
    memory = torch.randn(4 * 16 * 32 + 1)
    weight = memory[1:].view(4, 16, 32)
    x, ends = torch.randn(6, 32), torch.tensor([2, 2, 5, 6], dtype=torch.int32)
    torch.testing.assert_close(grouped_linear(x, weight, ends), one_by_one(x, weight, ends.tolist()).float())


def test_autocast_multiplies_in_its_dtype() -> None:
    x, weight, ends = torch.randn(6, 32), torch.randn(2, 16, 32), torch.tensor([2, 6], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16):
        out = grouped_linear(x, weight, ends)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), grouped_linear(x, weight, ends), atol=0.3, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((6, 32), (4, 16, 32)))
    ends, upstream = torch.tensor([2, 2, 5, 6], dtype=torch.int32), torch.randn(6, 16).to(dtype)
    results = []
    for function in (grouped_linear, torch.compile(grouped_linear, fullgraph=True, backend="aot_eager")):
        out = function(x, weight, ends)
        results.append((out, *torch.autograd.grad(out, (x, weight), upstream)))
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
