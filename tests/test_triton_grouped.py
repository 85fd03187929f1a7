"""Promise: the grouped matmul's kernels are each group's matmul, with its gradients; compiled they stay within limits.

The oracle goes over the groups one by one in float64, with none of our functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import kernel_table, ops, triton_grouped, triton_route
from megahf.models.kernel_choice import only
from megahf.models.ops import grouped_linear
from megahf.models.triton_grouped import multiply_outer, multiply_rows, sum_groups, triton_outer, triton_rows
from megahf.models.triton_route import cut_tiles

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
COUNTS = [[1], [17], [5, 0, 17, 1], [0, 0, 33], [40, 0, 0], [2, 3, 1, 0, 2, 1, 7]]


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_grouped, "options_of", lambda *rest, **more: {"N": 16, "K": 16})
    patch.setattr(triton_grouped, "options_of_outer", lambda dtype: {"M": 16, "N": 32, "K": 16})
    patch.setattr(triton_grouped, "TOGETHER", 2)


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, tiles of 16 columns, several of which take turns, and memory that holds NaN until stored to."""
    with interpreted(triton_grouped, triton_route) as patch:
        shrink(patch)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def inputs(counts: list[int], n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in a view of something wider, three of them in no group and NaN; matrices; and where groups end."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(sum(counts) + 3, k + 5, generator=generator).to(dtype)[:, 2:-3]
    x[sum(counts) :] = torch.nan
    weight = torch.randn(len(counts), n, k, generator=generator).to(dtype)
    return x, weight, torch.tensor(counts).cumsum(0).int()


def groups(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


def rows_written_down(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat([x[rows].double() @ matrix.double().T for rows, matrix in zip(groups(ends), weight, strict=True)])


def outer_written_down(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return torch.stack([left[rows].double().T @ right[rows].double() for rows in groups(ends)])


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.usefixtures("small")
def test_rows_are_multiplied_by_their_groups_matrix(counts: list[int], dtype: torch.dtype) -> None:
    x, weight, ends = inputs(counts, 33, 20, dtype)
    out = triton_rows(x, weight, ends)
    assert out.dtype == dtype
    assert error(out[: sum(counts)], rows_written_down(x, weight, ends)) < TOLERANCE[dtype]
    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)  # as the gradient of rows has them
    assert torch.equal(triton_rows(x, transposed, ends)[: sum(counts)], out[: sum(counts)])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.usefixtures("small")
def test_outer_products_are_summed_over_each_group_and_nothing_over_none(counts: list[int], dtype: torch.dtype) -> None:
    (left, _, ends), (right, _, _) = inputs(counts, 8, 33, dtype), inputs(counts, 9, 20, dtype)
    out = triton_outer(left, right, ends)
    assert out.shape == (len(counts), 33, 20)
    assert error(out, outer_written_down(left, right, ends)) < TOLERANCE[dtype]
    assert not out[torch.tensor(counts) == 0].any()


@pytest.mark.usefixtures("small")
def test_rows_are_read_through_an_index() -> None:
    counts = [5, 0, 17]
    x, weight, ends = inputs(counts, 20, 16)
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(0, 22, (25,), generator=generator).int()
    index[22:] = 2**31 - 1  # of no group: nobody looks there
    read = x[index[:22]]
    out, _ = multiply_rows(x, weight, ends, *cut_tiles(ends, 25, 16), 16, rows=25, index=index)
    assert error(out[:22], rows_written_down(read, weight, ends)) < 2e-5
    assert error(multiply_outer(x, x, ends, index, None), outer_written_down(read, x, ends)) < 2e-5
    assert error(multiply_outer(x, x, ends, None, index), outer_written_down(x, read, ends)) < 2e-5
    scale, order = torch.randn(25, generator=generator), torch.randperm(25, generator=generator).int()
    sums = sum_groups(x, ends, torch.float32, index, scale, order)
    wanted = [(read[rows].double() * scale[order[rows]].double()[:, None]).sum(dim=0) for rows in groups(ends)]
    assert error(sums, torch.stack(wanted)) < 2e-5


def test_offsets_may_pass_two_to_the_31() -> None:
    apart = 2**30 + 8  # elements; memory that nobody touches costs nothing
    x, weight, ends = inputs([1, 1, 1], 7, 16, torch.float16)
    x = x[:3]
    far_x = torch.empty(2 * apart + 16, dtype=torch.float16).as_strided((3, 16), (apart, 1)).copy_(x)
    far_weight = torch.empty(2 * apart + 7 * 16, dtype=torch.float16).as_strided((3, 7, 16), (apart, 16, 1))
    far_weight.copy_(weight)
    with interpreted(triton_grouped, triton_route):
        assert torch.equal(triton_rows(far_x, far_weight, ends), triton_rows(x, weight, ends))
        assert torch.equal(triton_outer(far_x, x, ends), triton_outer(x, x, ends))
        assert torch.equal(triton_outer(x, far_x, ends), triton_outer(x, x, ends))
        assert torch.equal(sum_groups(far_x, ends, torch.float32), sum_groups(x, ends, torch.float32))


def watched(patch: pytest.MonkeyPatch) -> list[str]:
    """The names of our kernels that `ops.py` called since."""
    ran: list[str] = []
    for name in ("triton_rows", "triton_outer"):
        real = getattr(ops, name)
        patch.setattr(ops, name, lambda *args, name=name, real=real: ran.append(name) or real(*args))
    return ran


def linear(function: object = grouped_linear, width: int = 8) -> list[Tensor]:
    x, weight, ends = inputs([5, 0, 9], 16, width)
    x = x[:14].contiguous()
    leaves = [t.requires_grad_() for t in (x, weight)]
    out = function(*leaves, ends)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_torchs_kernel_runs_where_ours_was_not_measured_to_be_quicker(small: pytest.MonkeyPatch) -> None:
    ran = watched(small)
    wanted, narrow = linear(), linear(width=5)  # rows of 5 are not aligned as torch's kernel wants them
    with only("triton"):
        linear()
        assert not ran
        found = linear(width=5)
        assert ran == ["triton_rows", "triton_rows", "triton_outer"]
        for got, want in zip(found, narrow, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        small.setattr(ops, "architecture", lambda device: 90)
        small.setattr(ops, "QUICKER", {("grouped_rows", 90): 5, ("grouped_outer", 90): 4})  # rows a group; 14 of 3
        for got, want in zip(linear(), wanted, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        assert ran[3:] == ["triton_rows", "triton_rows"]


def test_a_compiled_graph_holds_it_whole_forwards_and_backwards(small: pytest.MonkeyPatch) -> None:
    small.setattr(ops, "HAS_KERNEL", False)
    ran = watched(small)
    with only("triton"):
        eager = linear()
        graph = linear(torch.compile(grouped_linear, fullgraph=True, backend="aot_eager"))
    assert len(ran) == 6
    for got, want in zip(graph, eager, strict=True):
        torch.testing.assert_close(got, want)


def test_tuning_keeps_the_quickest_and_prints_its_row(
    small: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.setattr(kernel_table, "TUNE", True)
    small.setattr(kernel_table, "TABLE", {})
    small.setattr(kernel_table, "milliseconds", lambda run, options: run(options) or abs(options["K"] - 32) + 1.0)
    x, weight, ends = inputs([5, 0, 9], 16, 20)
    out = triton_rows(x, weight, ends)[:14]
    assert error(out, rows_written_down(x, weight, ends)) < 2e-5
    assert kernel_table.TABLE[("grouped_rows", 0, "float32 16 odd")]["K"] == 32
    assert "('grouped_rows', 0, 'float32 16 odd'): " in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_tensor_cores_multiply(architecture: int, dtype: torch.dtype) -> None:
    with compiled(architecture, triton_grouped, triton_route) as launched:
        weight = torch.empty(4, 768, 1024, dtype=dtype)
        for rows in (64, 512) if dtype == torch.bfloat16 else (512,):  # tiles of 16 and of 128 rows
            x, grad = torch.empty(rows, 1024, dtype=dtype), torch.empty(rows, 768, dtype=dtype)
            ends = torch.zeros(4, dtype=torch.int32)
            triton_rows(x, weight, ends)
            triton_rows(grad, weight.transpose(1, 2), ends)
        triton_outer(grad, x, ends)
    kernels = [kernel for kernel in launched.values() if kernel.name != "cut_kernel"]
    assert {kernel.name for kernel in kernels} == {"rows_kernel", "outer_kernel"}
    assert all(kernel.fits for kernel in launched.values()), launched
    if dtype == torch.bfloat16:
        assert all(kernel.multiplies for kernel in kernels), kernels
        assert sum(kernel.newest for kernel in kernels) == (5 if architecture == 80 else 3), kernels


@pytest.mark.parametrize(("architecture", "columns"), [(80, 64), (90, 128), (100, 128), (120, 64)])
def test_gated_tiles_are_wide_where_there_is_shared_memory_for_them(
    monkeypatch: pytest.MonkeyPatch, architecture: int, columns: int
) -> None:
    """The RTX of sm_120 comes after sm_100, and has less than half of what that has."""
    seen: list[dict[str, int]] = []
    monkeypatch.setattr(triton_grouped, "architecture", lambda device: architecture)
    monkeypatch.setattr(triton_grouped, "launch", lambda *launched, **options: seen.append(options))
    x, weight, ends = inputs([512], 128, 64, torch.bfloat16)
    multiply_rows(x, weight, ends, ends, ends, 128, rows=512, act="silu", gated=True)
    assert seen[0]["N"] == columns
