"""The convolution's kernels are the convolution, with its gradients; compiled for a GPU they stay within its limits.

The oracle is written down token by token in float64, with none of our functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import conv, triton_conv
from megahf.models.conv import CausalConv1d, causal_conv1d, causal_conv1d_update
from megahf.models.kernel_choice import only
from megahf.models.triton_conv import triton_conv1d, triton_conv1d_update

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHANNELS = 20  # no whole block
SMALL = {"TOKENS": 8, "CHANNELS": 32, "num_warps": 1}
NAMES = ("x", "weight", "bias", "state")
# Documents that start where a block of 8 tokens does, around it, and one by one; then of 16 and 64.
DOCUMENTS = {9: [8, 1], 19: [3, 1, 1, 5, 6, 3], 140: [15, 1, 1, 46, 1, 1, 70, 5]}


def shrink(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(triton_conv, "FORWARD", SMALL)
    patch.setattr(triton_conv, "BACKWARD", SMALL)
    patch.setattr(triton_conv, "UPDATE", {"CHANNELS": 32, "num_warps": 1})


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with blocks of 8 tokens, and memory that holds NaN until something is stored."""
    with interpreted(triton_conv) as patch:
        shrink(patch)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def inputs(length: int, width: int, options: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Two rows in a view of a packed projection, and other strides; `options` are what there is beside x and weight."""
    generator = torch.Generator().manual_seed(length)
    given: dict[str, Tensor | None] = dict.fromkeys(("bias", "state", "seq_idx", "lengths"))
    packed = torch.randn(2, length, CHANNELS + 30, generator=generator).to(dtype)
    weight = torch.randn(width, 1, CHANNELS, generator=generator).transpose(0, 2)
    given |= {"x": packed[..., 7 : 7 + CHANNELS], "weight": weight}
    if "bias" in options:
        given["bias"] = torch.randn(CHANNELS, 2, generator=generator)[:, 0]
    if "state" in options:
        given["state"] = torch.randn(2, CHANNELS, width, generator=generator).to(dtype).float()
    if "documents" in options:
        lengths = torch.tensor(DOCUMENTS[length])
        given["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)) + 3, lengths).expand(2, -1)
    if "padding" in options:
        given["lengths"] = torch.tensor([length - 1, min(2, length)])
    return {name: t.requires_grad_() if t is not None and name in NAMES else t for name, t in given.items()}


def doubled(given: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same numbers in float64, to be differentiated too."""
    return {
        name: t.detach().double().requires_grad_() if t is not None and name in NAMES else t
        for name, t in given.items()
    }


def written_down(
    x: Tensor, weight: Tensor, bias: Any, state: Any, seq_idx: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, length, channels = x.shape
    width = weight.shape[-1]
    before = x.new_zeros(rows, width, channels) if state is None else state.mT
    window, outs = torch.cat((before, x), dim=1), []
    for t in range(length):
        total = 0 if bias is None else bias
        for back in range(width):
            value = window[:, width + t - back] * weight[:, 0, width - 1 - back]
            same = True if seq_idx is None else seq_idx[:, t, None] == seq_idx[:, max(t - back, 0), None]
            total = total + same * value
        outs.append(total * torch.sigmoid(total))
    ends = [length] * rows if lengths is None else lengths.tolist()
    after = torch.stack([window[row, end : end + width] for row, end in enumerate(ends)]).mT
    return torch.stack(outs, dim=1), after


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def errors(call: Any, given: dict[str, Tensor | None]) -> dict[str, float]:
    """Of the outputs and every gradient of `call`; upstream gradients lie as a slice of something wider."""
    exact = doubled(given)
    results, wanted = call(**given), written_down(**exact)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(*t.shape[:-1], t.shape[-1] + 3, generator=generator) for t in wanted]
    weights = [weight.to(results[0].device)[..., 1:-2] for weight in wide]
    names = [name for name in NAMES if given[name] is not None]
    gradients = torch.autograd.grad(
        results, [given[name] for name in names], [w.to(t.dtype) for w, t in zip(weights, results, strict=True)]
    )
    rounded = [w.to(t.dtype).double() for w, t in zip(weights, results, strict=True)]
    expected = torch.autograd.grad(wanted, [exact[name] for name in names], rounded)
    pairs = zip(("out", "after", *names), (*results, *gradients), (*wanted, *expected), strict=True)
    return {name: error(got.detach(), want.detach()) for name, got, want in pairs}


CASES = [
    (1, 4, "bias"),
    (1, 3, "state"),
    (2, 4, "bias state padding"),
    (3, 2, "bias state"),
    (7, 4, "bias"),
    (8, 2, "state"),
    (9, 4, "bias state documents"),
    (9, 3, ""),
    (19, 4, "bias state padding"),
    (19, 3, "bias state documents padding"),
    (19, 2, "documents"),
]


@pytest.mark.parametrize(("length", "width", "options"), CASES)
@pytest.mark.usefixtures("small")
def test_it_is_the_convolution_with_every_gradient(length: int, width: int, options: str) -> None:
    found = errors(triton_conv1d, inputs(length, width, options))
    assert max(found.values()) < TOLERANCE[torch.float32], found


def test_channels_of_several_programs(small: pytest.MonkeyPatch) -> None:
    for name in ("FORWARD", "BACKWARD"):
        small.setattr(triton_conv, name, SMALL | {"CHANNELS": 16})
    assert max(errors(triton_conv1d, inputs(9, 4, "bias state documents")).values()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_it_is_as_near_as_torchs_ops(dtype: torch.dtype) -> None:
    given = inputs(9, 4, "bias state documents", dtype)

    def twin(lengths: None, **rest: Any) -> tuple[Tensor, Tensor]:
        with only():
            return causal_conv1d(**rest)

    found, torchs = errors(triton_conv1d, given), errors(twin, given)
    assert max(found.values()) < TOLERANCE[dtype], found
    assert all(found[name] <= 1.5 * torchs[name] + 1e-6 for name in found), (found, torchs)


@pytest.mark.usefixtures("small")
def test_gradients_of_a_sum_which_is_one_number_for_all() -> None:
    given = inputs(5, 4, "bias")
    exact = doubled(given)
    got = torch.autograd.grad(triton_conv1d(**given)[0].sum(), [given["x"], given["weight"]])
    want = torch.autograd.grad(written_down(**exact)[0].sum(), [exact["x"], exact["weight"]])  # type: ignore[arg-type]
    assert max(map(error, got, want)) < 2e-5


@pytest.mark.usefixtures("small")
def test_nothing_of_another_document_comes_through_not_even_nan() -> None:
    given = inputs(19, 4, "bias documents")
    clean = [t.detach() for t in triton_conv1d(**given)]
    first = 3  # tokens of the first document
    with torch.no_grad():
        given["x"][:, :first] = torch.nan
    out, _ = triton_conv1d(**given)
    assert out[:, :first].isnan().all() and torch.equal(out[:, first:], clean[0][:, first:])
    (gradient,) = torch.autograd.grad(out[:, first:].sum(), given["x"])
    assert gradient[:, first:].isfinite().all()


@pytest.mark.usefixtures("small")
def test_gradients_of_gradients_are_refused_not_wrong() -> None:
    given = inputs(3, 4, "")
    (gradient,) = torch.autograd.grad(triton_conv1d(**given)[0].square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_token_by_token_from_a_state_it_is_the_whole(width: int, dtype: torch.dtype) -> None:
    given = inputs(6, width, "bias state", dtype)
    wanted, last = written_down(**doubled(given))  # type: ignore[arg-type]
    x, weight, bias, state = (given[name] for name in NAMES)
    state = state.clone()
    outs = [triton_conv1d_update(state, token, weight, bias) for token in x.unbind(1)]
    assert error(torch.stack(outs, dim=1), wanted) < TOLERANCE[dtype]
    assert torch.equal(state.double(), last)


@torch.no_grad()
def test_offsets_may_pass_two_to_the_31() -> None:
    apart = 2**30 + 8  # elements from token to token; memory that nobody touches costs nothing
    x = torch.empty(2 * apart + CHANNELS, dtype=torch.float16).as_strided((1, 3, CHANNELS), (0, apart, 1))
    x.copy_(torch.randn(1, 3, CHANNELS))
    weight, grad = torch.randn(CHANNELS, 1, 4), torch.randn(1, 3, CHANNELS).half()
    after = torch.zeros(1, CHANNELS, 4)
    with interpreted(triton_conv):
        far, near = triton_conv1d(x, weight), triton_conv1d(x.contiguous(), weight)
        assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1])
        rest = (weight, None, None, None, None)
        for one, other in zip(*(triton_conv.backward(grad, after, t, *rest) for t in (x, x.contiguous())), strict=True):
            assert torch.equal(one, other)


def test_the_module_takes_kernels_where_they_run_and_torchs_ops_where_it_is_told_to(small: pytest.MonkeyPatch) -> None:
    module, hidden, ran = CausalConv1d(CHANNELS, 4, bias=True), torch.randn(2, 9, CHANNELS), []
    for name in ("conv_forward", "conv_update"):
        real = getattr(triton_conv, name)
        public = {"conv_forward": "forward", "conv_update": "update"}[name]
        small.setattr(triton_conv, public, lambda *args, real=real: ran.append(real.__name__) or real(*args))

    @torch.no_grad()
    def run() -> list[Tensor]:
        out, state = module(hidden[:, :8], mask=torch.arange(8) < torch.tensor([[8], [3]]))
        return [out, *module(hidden[:, 8:], state)]

    with only("packages", "triton"):
        ours = run()
    assert ran == ["conv_forward", "conv_update"]
    for got, want in zip(ours, run(), strict=True):  # not asked for, they do not run
        torch.testing.assert_close(got, want)
    assert len(ran) == 2


def test_a_package_that_is_installed_comes_first(small: pytest.MonkeyPatch) -> None:
    small.setattr(conv, "causal_conv1d_fn", lambda x, *rest, **options: torch.full_like(x, 7.0))
    small.setattr(conv, "kernel_fits", lambda x, width: True)
    given = {name: t for name, t in inputs(5, 4, "bias").items() if name != "lengths"}
    assert causal_conv1d(**given)[0].eq(7).all()
    with only("triton"):
        assert not causal_conv1d(**given)[0].eq(7).any()


def test_what_the_kernels_cannot_do_torchs_ops_do(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_conv, "conv_forward", None)
    for dtype, width in ((torch.float64, 4), (torch.float32, 5)):
        out, _ = causal_conv1d(torch.randn(1, 6, 4, dtype=dtype), torch.randn(4, 1, width, dtype=dtype))
        assert out.dtype == dtype
    assert causal_conv1d(torch.randn(1, 0, 4), torch.randn(4, 1, 4))[0].shape == (1, 0, 4)


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    given = {name: t for name, t in inputs(5, 4, "bias state").items() if name != "lengths"}
    leaves, results = [given[name] for name in NAMES], []
    for function in (causal_conv1d, torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")):
        out, after = function(**given)
        results.append((out, after, *torch.autograd.grad(out.sum() + after.square().sum(), leaves)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)
    with torch.no_grad():
        x, weight, bias, state = (t.detach() for t in leaves)
        states = state.clone(), state.clone()
        step = torch.compile(causal_conv1d_update, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            step(states[0], x[:, 0], weight, bias), causal_conv1d_update(states[1], x[:, 0], weight, bias)
        )
        assert torch.equal(*states) and not torch.equal(states[0], state)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    packed = torch.randn(1, 130, 18560).bfloat16()  # of 128 heads of 64 channels and 8 groups of 128
    x, weight = packed[..., 8192 : 8192 + 10240].requires_grad_(), torch.randn(10240, 1, 4).bfloat16().requires_grad_()
    bias, state = torch.randn(10240).bfloat16(), torch.randn(1, 10240, 4)
    with compiled(architecture, triton_conv) as launched:
        for rest in ((None, None), (state, torch.zeros(1, 130, dtype=torch.int64))):
            out, _ = triton_conv1d(x, weight, bias, *rest)
            torch.autograd.grad(out, (x, weight), torch.ones_like(out))
        triton_conv1d_update(state, packed[:, 0, :10240], weight.detach(), bias)
    names = [kernel.name for kernel in launched.values()]
    assert sorted(names) == [*["backward_kernel"] * 2, *["forward_kernel"] * 2, "update_kernel"]
    assert all(kernel.fits for kernel in launched.values()), launched
