"""The norms' kernels are the norms as `norm.py` computes them, with their gradients, where they save a pass.

The oracle is written down in float64, with none of our functions.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_layer_norm, triton_norm
from megahf.models.kernel_choice import only
from megahf.models.norm import LayerNorm, RMSNorm
from megahf.models.triton_layer_norm import LARGEST

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPSILON = 1e-3
# The norm, whether gamma is zero-centred, and the dtypes of what comes in and of the weights.
KINDS = [
    (RMSNorm, True, torch.bfloat16, torch.bfloat16),
    (RMSNorm, True, torch.float32, torch.float16),
    (RMSNorm, False, torch.float32, torch.bfloat16),
    (LayerNorm, True, torch.float16, torch.float16),
    (LayerNorm, False, torch.float32, torch.bfloat16),
    (LayerNorm, True, torch.bfloat16, torch.float32),
]


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, rows shared by 3 programs, and memory that holds NaN until something is stored."""
    with interpreted(triton_norm, triton_layer_norm) as patch:
        patch.setattr(triton_layer_norm, "BACKWARD", {"channels": 16, "programs": 3})
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def build(kind: type[RMSNorm], zero_centered: bool, dtype: torch.dtype, size: int = 20) -> RMSNorm:
    generator = torch.Generator().manual_seed(2)
    norm = kind(size, EPSILON, zero_centered).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm


def written_down(x: Tensor, weight: Tensor, bias: Tensor | None, zero_centered: bool) -> Tensor:
    x = x if bias is None else x - x.mean(-1, keepdim=True)
    out = x / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt() * (1 + weight if zero_centered else weight)
    return out if bias is None else out + bias


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm())


def errors(norm: RMSNorm, x: Tensor) -> list[float]:
    """Of the output and every gradient; what comes in and the upstream gradient are slices of something wider."""
    leaves = [x, *norm.parameters()]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, wanted = norm(x), written_down(*exact[:2], exact[2] if len(exact) > 2 else None, norm.zero_centered)
    wide = torch.randn(*out.shape[:-1], out.shape[-1] + 3, generator=torch.Generator().manual_seed(1))
    upstream = wide.to(out)[..., 1:-2]
    gradients = torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(wanted, exact, upstream.double())
    return [error(*pair) for pair in zip((out, *gradients[0]), (wanted, *gradients[1]), strict=True)]


@pytest.mark.parametrize(("kind", "zero_centered", "dtype", "weights"), KINDS)
def test_it_is_the_norm_with_every_gradient_and_as_near_as_torchs(
    small: pytest.MonkeyPatch, kind: type[RMSNorm], zero_centered: bool, dtype: torch.dtype, weights: torch.dtype
) -> None:
    norm, ran, real = build(kind, zero_centered, weights), [], triton_layer_norm.forward
    small.setattr(triton_layer_norm, "forward", lambda *args: ran.append(1) or real(*args))
    x = torch.randn(2, 4, 31, generator=torch.Generator().manual_seed(0)).to(dtype)[..., 5:-6].requires_grad_()
    with only("triton"):
        found = errors(norm, x)
    assert ran == [1]
    with only():
        torchs = errors(norm, x)
    assert max(found) < max(TOLERANCE[dtype], TOLERANCE[weights]), found
    assert all(ours <= 1.5 * theirs + 1e-6 for ours, theirs in zip(found, torchs, strict=True)), (found, torchs)


def test_where_no_pass_is_saved_torchs_norm_runs(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_layer_norm, "forward", None)
    with only("triton"), torch.no_grad():
        for dtype, zero_centered, size in (
            (torch.bfloat16, False, 8),
            (torch.float32, True, 8),
            (torch.float64, True, 8),
            (torch.bfloat16, True, LARGEST + 1),
        ):
            x = torch.randn(1, size, dtype=dtype)
            assert all(build(kind, zero_centered, dtype, size)(x).dtype == dtype for kind in (RMSNorm, LayerNorm))


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    norm, x, results = build(LayerNorm, True, torch.bfloat16), torch.randn(2, 20, requires_grad=True), []
    with only("triton"):
        for function in (norm, torch.compile(norm, fullgraph=True, backend="aot_eager")):
            out = function(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *norm.parameters()])))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    with compiled(architecture, triton_layer_norm) as launched:
        for kind, size in ((RMSNorm, LARGEST), (LayerNorm, 5120)):
            norm = build(kind, True, torch.bfloat16, size)
            x = torch.randn(2, 3, size).bfloat16().requires_grad_()
            out = triton_layer_norm.triton_layer_norm(x, norm.weight, getattr(norm, "bias", None), EPSILON, True)
            torch.autograd.grad(out, x, torch.ones_like(out))
    names = [kernel.name for kernel in launched.values()]
    assert sorted(names) == [*["backward_kernel"] * 2, *["forward_kernel"] * 2]
    assert all(kernel.fits for kernel in launched.values()), launched
