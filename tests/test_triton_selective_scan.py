"""The selective scan's kernels are the scan, with its gradients; compiled for a GPU they stay within its limits.

The oracle is the recurrence, written down token by token in float64 with none of our functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_mamba_mixer import build, fresh_cache, stream
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_conv, triton_selective_backward, triton_selective_forward, triton_selective_scan
from megahf.models.kernel_choice import only
from megahf.models.selective_scan import selective_scan, selective_update
from megahf.models.state_space import Rows

MODULES = (triton_selective_forward, triton_selective_backward, triton_selective_scan)
SIZES = {"WALK": 16, "PASS": 16, "GRADIENTS": 8, "UPDATE": 8, "CHUNK": None}
CHUNK, CHANNELS, PLACES = 8, 10, 3  # neither of the last fills its block
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
HALF = ("u", "B", "C", "z")
# Documents that start where a chunk of 8 tokens does, around it, and one by one; then of 64.
DOCUMENTS = {19: [3, 1, 1, 3, 8, 3], 200: [63, 1, 1, 63, 8, 64]}
Given = dict[str, Tensor | None]


def shrink(patch: pytest.MonkeyPatch) -> None:
    for module in MODULES:
        for name, channels in SIZES.items():
            if name in vars(module):
                patch.setattr(module, name, CHUNK if channels is None else {"CHANNELS": channels, "num_warps": 1})


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with chunks of 8 tokens, and memory that holds NaN until something is stored."""
    with interpreted(triton_conv, *MODULES) as patch:
        shrink(patch)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def inputs(length: int, options: str = "", dtype: torch.dtype = torch.float32) -> Given:
    """Two rows in views of packed projections; `options` are what there is beside u, dt, A, B and C."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    packed, narrow = normal(2, length, 2 * CHANNELS + 7).to(dtype), normal(2, length, 4 + 2 * PLACES).to(dtype)
    given: Given = {
        "u": packed[..., 3 : 3 + CHANNELS],
        "dt": normal(2, length, CHANNELS),
        "A": -torch.rand(PLACES, CHANNELS, generator=generator).t() * 3,
        "B": narrow[..., 4 : 4 + PLACES],
        "C": narrow[..., 4 + PLACES :],
        "D": normal(CHANNELS) if "D" in options else None,
        "z": packed[..., 4 + CHANNELS : 4 + 2 * CHANNELS] if "z" in options else None,
        "dt_bias": normal(CHANNELS) if "bias" in options else None,
        "state": normal(2, CHANNELS, PLACES) if "state" in options else None,
    }
    given = {name: None if t is None else t.requires_grad_() for name, t in given.items()}
    if "documents" in options:
        lengths = torch.tensor(DOCUMENTS[length])
        given["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)) + 3, lengths).expand(2, -1)
    if "padding" in options:
        given["mask"] = torch.arange(length) != torch.tensor([[length - 1], [min(2, length - 1)]])
    return given


def leaves(given: Given) -> dict[str, Tensor]:
    return {name: t for name, t in given.items() if t is not None and t.requires_grad}


def doubled(given: Given) -> Given:
    """The same numbers in float64, to be differentiated too."""
    return given | {name: t.detach().double().requires_grad_() for name, t in leaves(given).items()}


def written_down(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, z: Any, dt_bias: Any, state: Any,
    seq_idx: Tensor | None = None, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    step = torch.log1p(torch.exp(dt if dt_bias is None else dt + dt_bias))
    step = step if mask is None else step * mask[..., None]
    state, outs = torch.zeros_like(u[:, 0, :, None] * A) if state is None else state, []
    for t in range(u.shape[1]):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None]
        state = torch.exp(step[:, t, :, None] * A) * state + (step[:, t] * u[:, t])[..., None] * B[:, t, None]
        outs.append((state * C[:, t, None]).sum(-1) + (0 if D is None else D * u[:, t]))
    out = torch.stack(outs, dim=1)
    return out if z is None else out * z / (1 + torch.exp(-z)), state


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))


def errors(given: Given) -> dict[str, float]:
    """Of the outputs and every gradient, as chosen kernels or torch's ops give them."""
    exact = doubled(given)
    results, wanted = selective_scan(**given), written_down(**exact)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(*t.shape[:-1], t.shape[-1] + 3, generator=generator) for t in wanted]
    weights = [weight.to(results[0].device)[..., 1:-2] for weight in wide]
    rounded = [weight.to(t.dtype) for weight, t in zip(weights, results, strict=True)]
    got = torch.autograd.grad(results, [*leaves(given).values()], rounded)
    expected = torch.autograd.grad(wanted, [*leaves(exact).values()], [weight.double() for weight in rounded])
    pairs = zip(("out", "last", *leaves(given)), (*results, *got), (*wanted, *expected), strict=True)
    return {name: error(*pair) for name, *pair in pairs}


CASES = [
    (1, "D z bias"),
    (1, "state"),
    (7, "D bias state padding"),
    (8, "z state"),
    (9, "D z bias state padding"),
    (19, "D z bias state documents"),
    (19, "documents padding state"),
]


@pytest.mark.parametrize(("length", "options"), CASES)
@pytest.mark.usefixtures("small")
def test_it_is_the_recurrence_with_every_gradient(length: int, options: str) -> None:
    given = inputs(length, options)
    with only("triton"):
        found = errors(given)
    assert max(found.values()) < TOLERANCE[torch.float32], found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_it_is_as_near_as_torchs_ops(dtype: torch.dtype) -> None:
    given = inputs(9, "D z bias state", dtype)
    with only("triton"):
        found = errors(given)
    with only():
        torchs = errors(given)
    assert max(found.values()) < TOLERANCE[dtype], found
    assert all(found[name] <= 1.5 * torchs[name] + 1e-6 for name in found), (found, torchs)


@pytest.mark.usefixtures("small")
def test_states_that_vanish_at_once_and_steps_of_almost_nothing() -> None:
    given = inputs(9, "bias state")
    with torch.no_grad():
        given["dt"][0] += 60.0
        given["dt"][1] -= 16.0
    with only("triton"):
        found = errors(given)
    assert max(found.values()) < TOLERANCE[torch.float32], found


@pytest.mark.usefixtures("small")
def test_nothing_of_another_document_comes_through_not_even_nan() -> None:
    given = {name: t if t is None else t.detach() for name, t in inputs(19, "D z bias documents").items()}
    with only("triton"), torch.no_grad():
        clean = selective_scan(**given)  # type: ignore[arg-type]
        first = DOCUMENTS[19][0]
        given["u"][:, :first] = torch.nan
        dirty = selective_scan(**given)  # type: ignore[arg-type]
    assert torch.equal(dirty[0][:, first:], clean[0][:, first:]) and torch.equal(dirty[1], clean[1])


@pytest.mark.parametrize("options", ["D z bias state", "state"])
@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_token_by_token_in_any_rows_of_a_larger_state_it_is_the_whole(options: str) -> None:
    given = inputs(4, options)
    wanted, last = written_down(**doubled(given))  # type: ignore[arg-type]
    states, rows = torch.full((5, CHANNELS, PLACES), torch.nan), torch.tensor([4, 1])
    states[rows] = given.pop("state")
    twins = states.clone()
    for names, held in ((("triton",), states), ((), twins)):
        with only(*names):
            for t in range(4):
                token = {name: x if x is None or x.dim() < 3 else x[:, t] for name, x in given.items()}
                out = selective_update(held, **token, indices=rows)  # type: ignore[arg-type]
                assert error(out, wanted[:, t]) < 2e-5
            none = selective_update(held, **token, indices=torch.tensor([-1, 0]))  # type: ignore[arg-type]
            assert none[0].eq(0).all() and none[1].isnan().all()
        assert error(held[rows], last) < 2e-5 and held[[0, 2, 3]].isnan().all()


@torch.no_grad()
def test_offsets_may_pass_two_to_the_31(small: pytest.MonkeyPatch) -> None:
    apart = 2**30 + 8  # elements from token to token; memory that nobody touches costs nothing
    wide = 3 * CHANNELS + 2 * PLACES
    memory = torch.empty(2 * apart + wide, dtype=torch.float16).as_strided((1, 3, wide), (0, apart, 1))
    memory.copy_(torch.randn(1, 3, wide))
    parts = [CHANNELS, CHANNELS, PLACES, PLACES, CHANNELS]
    A, D, results = -torch.rand(CHANNELS, PLACES), torch.randn(CHANNELS), []
    for packed in (memory, memory.contiguous()):
        u, dt, B, C, z = packed.split(parts, dim=-1)
        given = (u, dt, A, B, C, D, z, D, None, None)
        out, last, *kept = triton_selective_scan.forward(*given)
        results.append((out, last, *triton_selective_backward.backward(out, last, *given, *kept)))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)


def test_a_mixer_is_the_same_with_kernels_and_without(small: pytest.MonkeyPatch) -> None:
    for name in ("FORWARD", "BACKWARD"):
        small.setattr(triton_conv, name, {"TOKENS": 8, "CHANNELS": 64, "num_warps": 1})
    for name in ("WALK", "PASS"):
        small.setattr(triton_selective_forward, name, {"CHANNELS": 64, "num_warps": 1})
    small.setattr(triton_selective_scan, "UPDATE", {"CHANNELS": 64, "num_warps": 1})
    mixer, documents, ran = build("Mamba-1"), torch.tensor([[0] * 4 + [1] * 6] * 2), []
    for module, name in ((triton_selective_scan, "forward"), (triton_selective_scan, "update")):
        real = getattr(module, name)
        small.setattr(module, name, lambda *args, name=name, real=real: ran.append(name) or real(*args))

    @torch.no_grad()
    def run() -> list[Tensor]:
        hidden, cache = stream(2, 10), fresh_cache()
        steps = [mixer(piece, past_key_values=cache) for piece in hidden.split([8, 1, 1], dim=1)]
        return [mixer(hidden, rows=Rows(seq_idx=documents)), *steps]

    with only():
        wanted = run()
    assert not ran
    with only("triton"):
        found = run()
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert ran == ["forward", "update", "update", "forward"]


def test_what_the_kernels_cannot_do_torchs_ops_do(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_selective_scan, "forward", None)
    places = triton_selective_forward.LARGEST + 1
    u, A, B = torch.randn(1, 2, 3), -torch.rand(3, places), torch.randn(1, 2, places)
    with only("triton"), torch.no_grad():
        assert selective_scan(u, u, A, B, B)[0].isfinite().all()
        assert selective_scan(*(t.double() for t in (u, u, A[:, :2], B[..., :2], B[..., :2])))[0].dtype == torch.float64


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    given, results = inputs(3, "D z bias state"), []
    with only("triton"):
        for function in (selective_scan, torch.compile(selective_scan, fullgraph=True, backend="aot_eager")):
            out, last = function(**given)
            results.append((out, last, *torch.autograd.grad(out.sum() + last.sum(), [*leaves(given).values()])))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    packed, narrow = torch.randn(1, 130, 2 * 1536).bfloat16(), torch.randn(1, 130, 96 + 32).bfloat16()
    u, dt, A = packed[..., :1536].requires_grad_(), torch.randn(1, 130, 1536), -torch.rand(1536, 16)
    B, C, z, D = narrow[..., 96:112], narrow[..., 112:], packed[..., 1536:], torch.randn(1536)
    marks = torch.zeros(1, 130, dtype=torch.int32)
    with compiled(architecture, *MODULES) as launched:
        out, _ = triton_selective_scan.triton_selective_scan(u, dt, A, B, C, D, z, None, None, marks)
        torch.autograd.grad(out, u, torch.ones_like(out))
        state, token = torch.randn(1, 1536, 16), (u.detach()[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0])
        triton_selective_scan.triton_selective_update(state, *token)
    names = sorted(kernel.name for kernel in launched.values())
    scan = ["back_kernel", "gradients_kernel", "pass_kernel", "pass_kernel", "update_kernel", *["walk_kernel"] * 2]
    assert names == scan
    assert all(kernel.fits for kernel in launched.values()), launched
