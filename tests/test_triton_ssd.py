"""The scan's kernels are the recurrence of Mamba-2; compiled for a GPU they stay within its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from recurrence import doubled, error, given, recurrence
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import ssd, triton_ssd
from megahf.models.kernel_choice import only
from megahf.models.ssd import ssd_scan
from megahf.models.triton_ssd import LARGEST
from megahf.models.triton_ssd_backward import triton_ssd_scan

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SMALL = {"chunk": 16, "p": 16, "n": 16, "rows": 16, "columns": 16, "slice": 16, "programs": 1}


def sized(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    patch.setattr(triton_ssd, "FORWARD", {0: triton_ssd.FORWARD[0] | sizes})
    patch.setattr(triton_ssd, "FLOAT32", {})


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with chunks of 16 tokens, and memory that holds NaN until something is stored."""
    with interpreted(triton_ssd) as patch, torch.no_grad():
        sized(patch, **SMALL)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def errors(inputs: dict[str, Tensor | None]) -> list[float]:
    """Of the outputs and the last state."""
    wanted = recurrence(**doubled(inputs))  # type: ignore[arg-type]
    return [error(*pair) for pair in zip(triton_ssd_scan(**inputs), wanted, strict=True)]  # type: ignore[arg-type]


CASES = [
    (1, 2, 1, "bias"),
    (1, 2, 2, "state"),
    (15, 2, 2, "skip state"),
    (16, 2, 1, "gate state"),
    (17, 4, 2, "bias documents state"),
    (17, 4, 4, ""),
    (35, 2, 1, "bias skip each gate state padding"),
    (35, 2, 2, "skip documents state"),
    (35, 2, 1, "documents padding"),
]


@pytest.mark.parametrize(("length", "heads", "groups", "options"), CASES)
@pytest.mark.usefixtures("small")
def test_it_is_the_recurrence(length: int, heads: int, groups: int, options: str) -> None:
    found = errors(given(length, heads, groups, options))
    assert max(found) < TOLERANCE[torch.float32], found


@pytest.mark.usefixtures("small")
def test_sizes_that_fill_no_block() -> None:
    assert max(errors(given(17, 2, 1, "skip each gate state padding", rows=2, channels=12, state=20))) < 2e-5


@pytest.mark.parametrize("options", ["state", "documents state padding"])
def test_it_may_walk_from_several_places_at_once(small: pytest.MonkeyPatch, options: str) -> None:
    small.setattr(triton_ssd, "SHORTEST", 1)
    sized(small, programs=64)
    assert max(errors(given(35, 2, 1, options, rows=2))) < 2e-5


def test_the_size_of_chunks_and_tiles_changes_nothing(small: pytest.MonkeyPatch) -> None:
    inputs = given(70, 2, 1, "skip state", state=32)
    sized(small, chunk=32, n=32)
    assert max(errors(inputs)) < 2e-5
    sized(small, chunk=64, rows=32, slice=32)
    assert max(errors(inputs)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    found = errors(given(35, 2, 1, "bias skip gate state", dtype))
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize(("rate", "raw"), [(-60.0, 3.0), (-16.0, -18.0), (-1e-3, 30.0)])
@pytest.mark.usefixtures("small")
def test_large_decays_and_the_smallest_time_steps(rate: float, raw: float) -> None:
    inputs = given(35, 2, 1, "state")
    inputs |= {"A": torch.full((2,), rate), "dt": torch.full((1, 35, 2), raw)}
    found = errors(inputs)
    assert max(found) < 2e-5, found


@torch.no_grad()
def test_offsets_may_pass_two_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = 2**30 + 8  # elements from token to token; memory that nobody touches costs nothing
    wide = torch.empty(2 * apart + 48, dtype=torch.float16).as_strided((1, 3, 48), (0, apart, 1))
    inputs = given(3, 1, 1, dtype=torch.float16)
    wide.copy_(torch.cat([inputs[name].flatten(2) for name in ("x", "B", "C")], dim=-1))  # type: ignore[union-attr]
    far = inputs | {name: t[:, :, None] for name, t in zip("xBC", wide.split(16, dim=-1), strict=True)}
    with interpreted(triton_ssd) as patch:
        sized(patch, **SMALL)
        results = zip(triton_ssd_scan(**far), triton_ssd_scan(**inputs), strict=True)  # type: ignore[arg-type]
        assert all(torch.equal(*pair) for pair in results)


def test_the_scan_takes_kernels_where_they_run_and_torchs_ops_where_not(small: pytest.MonkeyPatch) -> None:
    real, ran = triton_ssd.ssd_forward, []
    small.setattr("megahf.models.triton_ssd_backward.forward", lambda *args: ran.append(1) or real(*args))
    inputs = given(17, 2, 1, "bias state padding")
    with only("packages", "triton"):
        ours = ssd_scan(**inputs)  # type: ignore[arg-type]
        assert ran == [1]
        exact = doubled(inputs)
        exact["A"] = inputs["A"]
        assert ssd_scan(**exact)[0].dtype == torch.float64  # type: ignore[arg-type]
        wide = given(2, 1, 1, channels=LARGEST[0] + 1)
        assert ssd_scan(**wide)[0].shape == wide["x"].shape  # type: ignore[arg-type, union-attr]
        mixed = given(2, 2, 1) | {"B": torch.randn(1, 2, 1, 16).half()}
        assert ssd_scan(**mixed)[0].isfinite().all()  # type: ignore[arg-type]
    for got, want in zip(ours, ssd_scan(**inputs), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ran == [1]


def test_a_package_that_is_installed_comes_first(small: pytest.MonkeyPatch) -> None:
    seven = torch.full((1, 5, 2, 16), 7.0)
    small.setattr(ssd, "mamba_chunk_scan_combined", lambda *args, **options: (seven, None))
    small.setattr(ssd, "kernel_fits", lambda x, B: True)
    inputs = given(5, 2, 1)
    with only("packages", "triton"):
        assert ssd_scan(**inputs)[0] is seven  # type: ignore[arg-type]
    with only("triton"):
        assert not ssd_scan(**inputs)[0].eq(7).any()  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@torch.no_grad()
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    packed = torch.zeros(1, 300, 18560, dtype=torch.bfloat16)  # of 128 heads of 64 channels and 8 groups of 128
    _, x, B, C, dt = packed.split([8192, 8192, 1024, 1024, 128], dim=-1)
    B, C = B.unflatten(-1, (8, 128)), C.unflatten(-1, (8, 128))
    more = {"D": torch.zeros(128), "dt_bias": torch.zeros(128), "seq_idx": torch.zeros(1, 300, dtype=torch.int64)}
    with compiled(architecture, triton_ssd) as launched:
        triton_ssd_scan(x.unflatten(-1, (128, 64)), dt, torch.zeros(128), B, C, **more)
    found = {kernel.name: kernel for kernel in launched.values()}
    assert sorted(found) == ["join_kernel", "scan_kernel", "states_kernel"]
    assert all(kernel.fits for kernel in found.values()), found
    assert all(found[name].multiplies for name in ("states_kernel", "scan_kernel")), found
