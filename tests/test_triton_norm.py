"""The gated norm's kernels are the gated norm, with its gradients; compiled for a GPU they stay within its limits.

The oracle is written down in float64, with none of our functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_mamba_mixer import build, fresh_cache, stream
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_conv, triton_norm, triton_ssd, triton_ssd_backward, triton_ssd_update
from megahf.models.kernel_choice import kinds, only
from megahf.models.mamba import GatedRMSNorm
from megahf.models.state_space import Rows
from megahf.models.triton_norm import LARGEST, triton_gated_norm

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
EPSILON = 1e-5


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, rows shared by 3 programs, and memory that holds NaN until something is stored."""
    modules = triton_conv, triton_norm, triton_ssd, triton_ssd_backward, triton_ssd_update
    with interpreted(*modules) as patch:
        patch.setattr(triton_norm, "BACKWARD", {"channels": 16, "programs": 3})
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def inputs(rows: int, groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """`y`, the gate in a view of a packed projection, and the weight in float32."""
    generator = torch.Generator().manual_seed(rows)
    y = torch.randn(2, rows, groups * size, generator=generator).to(dtype)
    packed = 3 * torch.randn(2, rows, groups * size + 11, generator=generator).to(dtype)
    weight = torch.randn(groups * size, generator=generator)
    return [t.requires_grad_() for t in (y, packed[..., 5:-6], weight)]


def written_down(y: Tensor, z: Tensor, weight: Tensor, groups: int) -> Tensor:
    gated = y * z / (1 + torch.exp(-z))
    parts = [part / (part.square().mean(-1, keepdim=True) + EPSILON).sqrt() for part in gated.chunk(groups, dim=-1)]
    return torch.cat(parts, dim=-1) * weight


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))


def errors(call: Any, leaves: list[Tensor], groups: int) -> list[float]:
    """Of the output and every gradient of `call`."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, wanted = call(*leaves, groups, EPSILON), written_down(*exact, groups)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(wanted, exact, upstream.double())
    return [error(*pair) for pair in zip((out, *gradients[0]), (wanted, *gradients[1]), strict=True)]


def twin(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    module = GatedRMSNorm(len(weight), groups, eps)
    module.weight = weight  # type: ignore[assignment]
    with only():
        return module(y, z)


SHAPES = [(1, 1, 24), (1, 8, 8), (5, 2, 33), (4, 3, 5)]


@pytest.mark.parametrize(("rows", "groups", "size"), SHAPES)
@pytest.mark.usefixtures("small")
def test_it_is_the_gated_norm_with_every_gradient(rows: int, groups: int, size: int) -> None:
    assert max(errors(triton_gated_norm, inputs(rows, groups, size, torch.float32), groups)) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_it_is_as_near_as_torchs_ops(dtype: torch.dtype) -> None:
    leaves = inputs(4, 2, 33, dtype)
    leaves[2] = torch.nn.Parameter(leaves[2].detach())
    found, torchs = errors(triton_gated_norm, leaves, 2), errors(twin, leaves, 2)
    assert max(found) < TOLERANCE[dtype], found
    assert all(ours <= 1.5 * theirs + 1e-6 for ours, theirs in zip(found, torchs, strict=True)), (found, torchs)


@pytest.mark.usefixtures("small")
def test_gates_far_from_zero_give_numbers() -> None:
    y, z, weight = torch.ones(1, 2, 8), torch.tensor([200.0, -200.0] * 8).view(1, 2, 8), torch.ones(8)
    leaves = [t.requires_grad_() for t in (y, z, weight)]
    out = triton_gated_norm(*leaves, 1, EPSILON)
    assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), leaves)))


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    leaves, results = inputs(2, 2, 8, torch.float32), []
    for function in (triton_gated_norm, torch.compile(triton_gated_norm, fullgraph=True, backend="aot_eager")):
        out = function(*leaves, 2, EPSILON)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_a_mixer_is_the_same_with_kernels_and_without(small: pytest.MonkeyPatch) -> None:
    tile = {"TOKENS": 8, "CHANNELS": 128, "num_warps": 1}
    small.setattr(triton_conv, "FORWARD", tile)
    small.setattr(triton_conv, "BACKWARD", tile)
    small.setattr(triton_conv, "UPDATE", {"CHANNELS": 128, "num_warps": 1})
    mixer, documents, ran = build("plain"), torch.tensor([[0] * 4 + [1] * 6] * 2), []
    real = triton_norm.norm_forward
    small.setattr(triton_norm, "forward", lambda *args: ran.append(1) or real(*args))

    def run() -> list[Tensor]:
        hidden, cache = stream(2, 10).requires_grad_(), fresh_cache()
        out = mixer(hidden, rows=Rows(seq_idx=documents))
        gradients = torch.autograd.grad(out.square().sum(), [hidden, *mixer.parameters()])
        with torch.no_grad():
            steps = [mixer(piece, past_key_values=cache) for piece in hidden.split([8, 1, 1], dim=1)]
        return [out, *gradients, *steps]

    with only():
        wanted = run()
    assert not ran
    with only("packages", "triton"):
        found = run()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(ran) == 4


def test_groups_too_large_for_a_program_are_left_to_torch(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_norm, "norm_forward", None)
    width = LARGEST + 1
    assert GatedRMSNorm(width, 1, EPSILON)(torch.randn(1, 1, width), torch.randn(1, 1, width)).isfinite().all()


def test_kernels_nobody_has_heard_of_are_named() -> None:
    assert kinds("none") == () and kinds("triton, packages") == ("triton", "packages")
    with pytest.raises(ValueError, match="no kernels called 'cuda'; give some of packages, triton, or none"):
        kinds("triton,cuda")


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    with compiled(architecture, triton_norm) as launched:
        for size, groups in ((1024, 8), (LARGEST, 1)):
            y, packed = torch.randn(2, 3, size * groups).bfloat16(), torch.randn(2, 3, 18560).bfloat16()
            weight = torch.randn(size * groups).bfloat16()
            leaves = y.requires_grad_(), weight.requires_grad_()
            out = triton_gated_norm(y, packed[..., : size * groups], weight, groups, EPSILON)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    names = [kernel.name for kernel in launched.values()]
    assert {*names} == {"forward_kernel", "backward_kernel"} and len(names) == 4
    assert all(kernel.fits for kernel in launched.values()), launched
