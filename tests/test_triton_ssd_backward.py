"""The scan's gradients by kernels are those of the recurrence of Mamba-2; for a GPU they stay within its limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recurrence import FLOATING, Given, doubled, error, given, recurrence
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_ssd, triton_ssd_backward
from megahf.models.kernel_choice import only
from megahf.models.ssd import ssd_scan
from megahf.models.triton_ssd_backward import triton_ssd_scan

SMALL = {"chunk": 16, "p": 16, "n": 16, "rows": 16, "columns": 16, "slice": 16, "shared_slice": 16, "programs": 1}


def sized(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    for module, name in ((triton_ssd, "FORWARD"), (triton_ssd_backward, "BACKWARD")):
        patch.setattr(module, name, {0: getattr(module, name)[0] | sizes})
    patch.setattr(triton_ssd, "FLOAT32", {})
    patch.setattr(triton_ssd_backward, "BACKWARD_FLOAT32", {})


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with chunks of 16 tokens, and memory that holds NaN until something is stored."""
    with interpreted(triton_ssd, triton_ssd_backward) as patch:
        sized(patch, **SMALL)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def gradients(call: Any, inputs: Given, weights: list[Tensor]) -> dict[str, Tensor]:
    names = [name for name in FLOATING if inputs[name] is not None]
    results = call(**inputs)
    weights = [w.to(t.dtype) for w, t in zip(weights, results, strict=True)]
    return dict(zip(names, torch.autograd.grad(results, [inputs[name] for name in names], weights), strict=True))


def errors(inputs: Given) -> dict[str, float]:
    """Of the gradients of a weighing of the outputs and the last state; the weights are slices of something wider."""
    x, B, generator = inputs["x"], inputs["B"], torch.Generator().manual_seed(1)
    assert x is not None and B is not None
    shapes = x.shape, (*x.shape[:1], *x.shape[2:], B.shape[-1])
    wide = [torch.randn(*shape[:-1], shape[-1] + 3, generator=generator) for shape in shapes]
    weights = [weight.to(x.device)[..., 1:-2] for weight in wide]
    weights[0] = weights[0].to(x.dtype)
    wanted = gradients(recurrence, doubled(inputs), weights)
    found = gradients(triton_ssd_scan, inputs, weights)
    return {name: error(found[name], wanted[name]) for name in wanted}


CASES = [
    (1, 2, 1, "bias state"),
    (15, 2, 2, "skip state"),
    (16, 2, 1, "gate state"),
    (17, 4, 2, "bias documents state"),
    (17, 4, 1, ""),
    (35, 2, 1, "bias skip each gate state padding"),
    (35, 2, 2, "skip documents state"),
]


@pytest.mark.parametrize(("length", "heads", "groups", "options"), CASES)
@pytest.mark.usefixtures("small")
def test_every_gradient_is_the_recurrences(length: int, heads: int, groups: int, options: str) -> None:
    found = errors(given(length, heads, groups, options))
    assert max(found.values()) < 2e-5, found


@pytest.mark.usefixtures("small")
def test_sizes_that_fill_no_block() -> None:
    found = errors(given(17, 2, 1, "skip each gate state padding", rows=2, channels=12, state=20))
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("options", ["state", "documents state padding"])
def test_it_may_walk_from_several_places_at_once(small: pytest.MonkeyPatch, options: str) -> None:
    small.setattr(triton_ssd, "SHORTEST", 1)
    sized(small, **SMALL | {"programs": 64})
    found = errors(given(35, 2, 1, options))
    assert max(found.values()) < 2e-5, found


def test_programs_that_share_the_heads_of_a_group(small: pytest.MonkeyPatch) -> None:
    sized(small, **SMALL | {"heads": 2, "chunk": 32})
    found = errors(given(17, 3, 1, "state"))
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_too(dtype: torch.dtype) -> None:
    found = errors(given(35, 2, 1, "bias skip gate state", dtype))
    assert max(found.values()) < {torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype], found


@pytest.mark.parametrize(("rate", "raw"), [(-60.0, 3.0), (-16.0, -18.0), (-1e-3, 30.0)])
@pytest.mark.usefixtures("small")
def test_large_decays_and_the_smallest_time_steps(rate: float, raw: float) -> None:
    inputs = given(35, 2, 1, "state")
    inputs["A"] = torch.full((2,), rate, requires_grad=True)
    inputs["dt"] = torch.full((1, 35, 2), raw, requires_grad=True)
    found = errors(inputs)
    assert max(found.values()) < 2e-5, found


@pytest.mark.usefixtures("small")
def test_the_gradient_of_a_sum_which_is_one_number_for_all() -> None:
    inputs, exact = given(17, 2, 1), doubled(given(17, 2, 1))
    (got,) = torch.autograd.grad(triton_ssd_scan(**inputs)[0].sum(), inputs["x"])  # type: ignore[arg-type]
    (want,) = torch.autograd.grad(recurrence(**exact)[0].sum(), exact["x"])  # type: ignore[arg-type]
    assert error(got, want) < 2e-5


@pytest.mark.usefixtures("small")
def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    inputs = given(1, 1, 1)
    out = triton_ssd_scan(**inputs)[0].square().sum()  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(out, inputs["x"], create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    inputs, results = given(17, 2, 1, "bias skip gate state padding"), []
    names = [name for name in FLOATING if inputs[name] is not None]
    with only("triton"):
        for function in (ssd_scan, torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")):
            out, state = function(**inputs)  # type: ignore[arg-type]
            leaves = [inputs[name] for name in names]
            results.append((out, state, *torch.autograd.grad(out.sum() + state.square().sum(), leaves)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_offsets_may_pass_two_to_the_31() -> None:
    apart = 2**30 + 8  # elements from token to token; memory that nobody touches costs nothing
    wide = torch.empty(2 * apart + 48, dtype=torch.float16).as_strided((1, 3, 48), (0, apart, 1))
    inputs = given(3, 1, 1, dtype=torch.float16)
    near = [None if t is None else t.detach() for t in map(inputs.get, triton_ssd.Inputs._fields)]
    near[7], near[8] = torch.zeros(1), torch.zeros(1, 1, 16, 16)
    wide.copy_(torch.cat([near[place].flatten(2) for place in (0, 3, 4)], dim=-1))  # type: ignore[union-attr]
    far = list(near)
    for place, t in zip((0, 3, 4), wide.split(16, dim=-1), strict=True):
        far[place] = t[:, :, None]
    grad = torch.randn(1, 3, 1, 16).half(), torch.randn(1, 1, 16, 16)
    with interpreted(triton_ssd, triton_ssd_backward) as patch:
        sized(patch, **SMALL)
        pairs = zip(triton_ssd_backward.backward(*grad, *far), triton_ssd_backward.backward(*grad, *near), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    packed = torch.zeros(1, 300, 18560, dtype=torch.bfloat16)  # of 128 heads of 64 channels and 8 groups of 128
    _, x, B, C, dt = packed.split([8192, 8192, 1024, 1024, 128], dim=-1)
    B, C, x = B.unflatten(-1, (8, 128)), C.unflatten(-1, (8, 128)), x.unflatten(-1, (128, 64))
    numbers, documents = torch.zeros(128), torch.zeros(1, 300, dtype=torch.int64)
    grad = torch.zeros(1, 300, 128, 64, dtype=torch.bfloat16), torch.zeros(1, 128, 64, 128)
    with compiled(architecture, triton_ssd, triton_ssd_backward) as launched:
        triton_ssd_backward.backward(*grad, x, dt, numbers, B, C, numbers, None, numbers, None, documents, None)
    names = sorted(kernel.name for kernel in launched.values())
    assert names == ["inputs_kernel", "join_kernel", *["shared_kernel"] * 2, *["states_kernel"] * 2]
    assert all(kernel.fits for kernel in launched.values()), launched
    assert all(kernel.multiplies for kernel in launched.values() if kernel.name != "join_kernel"), launched
