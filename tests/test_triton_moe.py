"""Promise: the experts' kernels are a mixture's experts, with every gradient, for any mixture of transformers.

The oracles go token by token in float64, with none of our functions, and transformers' own eager experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import moe, triton_grouped, triton_moe, triton_route
from megahf.models.kernel_choice import only
from megahf.models.triton_grouped import ACTIVATIONS
from megahf.models.triton_moe import triton_experts

MODULES = (triton_moe, triton_grouped, triton_route)
FORWARD = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
FUNCTIONS: dict[str, Any] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
}
NAMES = ("hidden", "weights", "up", "down", "up_bias", "down_bias")


def shrink(patch: pytest.MonkeyPatch) -> None:
    for module in (triton_grouped, triton_moe):
        patch.setattr(module, "options_of", lambda *rest, **more: {"N": 16, "K": 16})
    patch.setattr(triton_grouped, "options_of_outer", lambda dtype: {"M": 16, "N": 32, "K": 16})
    patch.setattr(triton_moe, "COLUMNS", 16)


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, tiles of 16 columns, several of which take turns, and memory that holds NaN until stored to."""
    with interpreted(*MODULES) as patch:
        shrink(patch)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def inputs(
    experts: Tensor, held: int, *, width: int = 24, inner: int = 20, gated: bool = True, bias: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor | None]:  # fmt: skip
    """Tokens, weights of the experts chosen for them, and `held` experts."""
    generator = torch.Generator().manual_seed(held)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    rows = 2 * inner if gated else inner
    return {
        "hidden": drawn(len(experts), width),
        "weights": torch.rand(experts.shape, generator=generator).requires_grad_(),
        "up": drawn(held, rows, width),
        "down": drawn(held, width, inner),
        "up_bias": drawn(held, rows) if bias else None,
        "down_bias": drawn(held, width) if bias else None,
    }


def written_down(experts: Tensor, given: dict[str, Tensor | None], act: str, gated: bool) -> Tensor:
    hidden, weights, up, down, up_bias, down_bias = (given[name] for name in NAMES)
    assert hidden is not None and weights is not None and up is not None and down is not None
    outs = []
    for token, chosen in enumerate(experts.tolist()):
        out = 0 * hidden[token]
        for place, expert in enumerate(chosen):
            if expert < len(up):
                x = up[expert] @ hidden[token] + (0 if up_bias is None else up_bias[expert])
                gate, linear = x.chunk(2) if gated else (x, 1)
                x = down[expert] @ (FUNCTIONS[act](gate) * linear)
                out = out + weights[token, place] * (x + (0 if down_bias is None else down_bias[expert]))
        outs.append(out)
    return torch.stack(outs)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))


def check(experts: Tensor, given: dict[str, Tensor | None], act: str = "silu", gated: bool = True) -> None:
    """The output and every gradient, against float64; and that all comes out the same without gradients."""
    there = [name for name in NAMES if given[name] is not None]
    exact = {name: t if t is None else t.detach().double().requires_grad_() for name, t in given.items()}
    wanted = written_down(experts, exact, act, gated)
    out = triton_experts(experts=experts, **given, act=act, gated=gated)  # type: ignore[arg-type]
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, [given[name] for name in there], upstream)
    leaves = [exact[name] for name in there]
    expected = torch.autograd.grad(wanted, leaves, upstream.double(), allow_unused=True, materialize_grads=True)
    found = {name: error(got, want) for name, got, want in zip(there, gradients, expected, strict=True)}
    assert error(out, wanted) < FORWARD[out.dtype]
    assert max(found.values()) < GRADIENTS[out.dtype], found
    with torch.no_grad():
        assert torch.equal(triton_experts(experts=experts, **given, act=act, gated=gated), out)  # type: ignore[arg-type]


def chosen(tokens: int, topk: int, held: int) -> Tensor:
    return torch.rand(tokens, held, generator=torch.Generator().manual_seed(tokens)).topk(topk)[1]


KINDS = [*((act, True) for act in ACTIVATIONS), ("squared_relu", False), ("gelu", False)]


@pytest.mark.parametrize(("act", "gated"), KINDS)
@pytest.mark.usefixtures("small")
def test_each_activation_with_biases(act: str, gated: bool) -> None:
    check(chosen(7, 2, 3), given=inputs(chosen(7, 2, 3), 3, gated=gated, bias=True), act=act, gated=gated)


ROUTES = [
    chosen(1, 1, 4),
    chosen(1, 8, 9),
    chosen(5, 8, 9),
    chosen(70, 1, 4),  # more than a tile each
    torch.full((35, 1), 2),  # all tokens to one
    torch.tensor([[3, 3]] * 5 + [[3, 0]]),  # an expert twice in a row
    torch.tensor([[0, 4], [5, 4], [1, 9]]),  # experts of other processes
    torch.full((4, 2), 4),  # nothing but those
]


@pytest.mark.parametrize("experts", ROUTES)
@pytest.mark.usefixtures("small")
def test_empty_full_and_foreign_experts(experts: Tensor) -> None:
    check(experts, inputs(experts, 9 if experts.shape[1] == 8 else 4, bias=True))


WIDTHS = [(16, 16), (33, 17), (7, 5), (1, 1)]


@pytest.mark.parametrize(("width", "inner"), WIDTHS)
@pytest.mark.usefixtures("small")
def test_widths_that_are_no_whole_tiles(width: int, inner: int) -> None:
    experts = chosen(5, 2, 3)
    check(experts, inputs(experts, 3, width=width, inner=inner))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("small")
def test_in_half_precision_it_is_as_near_as_it_can_be(dtype: torch.dtype) -> None:
    experts = chosen(40, 2, 3)
    check(experts, inputs(experts, 3, bias=True, dtype=dtype))


@pytest.mark.usefixtures("small")
def test_matrices_may_lie_transposed_and_tokens_in_something_wider() -> None:
    experts = chosen(6, 2, 3)
    given = inputs(experts, 3)
    for name in ("up", "down"):
        given[name] = given[name].detach().mT.contiguous().mT.requires_grad_()  # type: ignore[union-attr]
    given["hidden"] = torch.randn(6, 40)[:, 9:33].requires_grad_()
    check(experts, given)


@pytest.mark.usefixtures("small")
def test_frozen_matrices_get_no_gradient_and_the_rest_does() -> None:
    experts = chosen(6, 2, 3)
    given = inputs(experts, 3, bias=True)
    leaves = [given[name] for name in ("hidden", "weights", "up_bias")]
    wanted = torch.autograd.grad(triton_experts(experts=experts, **given, act="silu", gated=True).sum(), leaves)  # type: ignore[arg-type]
    for name in ("up", "down"):
        given[name] = given[name].detach()  # type: ignore[union-attr]
    found = torch.autograd.grad(triton_experts(experts=experts, **given, act="silu", gated=True).sum(), leaves)  # type: ignore[arg-type]
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards() -> None:
    experts = chosen(6, 2, 3)
    given = inputs(experts, 3, bias=True)
    leaves = [given[name] for name in NAMES]
    results = []
    for function in (triton_experts, torch.compile(triton_experts, fullgraph=True, backend="aot_eager", dynamic=True)):
        out = function(experts=experts, **given, act="silu", gated=True)  # type: ignore[operator]
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


COMMON = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 12,
          "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 32}  # fmt: skip


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=20, num_local_experts=5))


def qwen3() -> PreTrainedModel:
    config = Qwen3MoeConfig(**COMMON, moe_intermediate_size=20, num_experts=7, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Its matrices are transposed, its gates interleaved and clamped: not in our kernels."""
    return GptOssForCausalLM(GptOssConfig(**COMMON, intermediate_size=20, num_local_experts=5))


def nemotron() -> PreTrainedModel:
    """No gate, squared relu."""
    config = NemotronHConfig(
        **COMMON, hybrid_override_pattern="E", moe_intermediate_size=20, n_routed_experts=5, n_shared_experts=1,
        moe_shared_expert_intermediate_size=12, n_group=1, topk_group=1,
    )  # fmt: skip
    return NemotronHForCausalLM(config)


def outcome(model: PreTrainedModel, implementation: str) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter that has one."""
    model.set_experts_implementation(implementation)
    ids = torch.arange(22).remainder(9).view(2, 11)
    logits = model(ids, use_cache=False).logits
    upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(logits, list(named.values()), upstream, allow_unused=True)
    found = {name: x for name, x in zip(named, gradients, strict=True) if x is not None}
    return {"logits": logits, **found}


def transformers_model(make: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("make", "fused"), [(mixtral, True), (qwen3, True), (gpt_oss, False), (nemotron, True)])
def test_any_mixture_of_transformers_may_be_told_to_use_it(
    small: pytest.MonkeyPatch, make: Any, fused: bool, kernels: bool
) -> None:
    model, ran = transformers_model(make), []
    small.setattr(moe, "triton_experts", lambda *args, **rest: ran.append(1) or triton_experts(*args, **rest))
    wanted = outcome(model.double(), "eager")
    with only(*["triton"] * kernels):
        found = outcome(model.float(), "megahf")
    assert bool(ran) == (kernels and fused)
    assert found.keys() == wanted.keys() and any("experts" in name for name in found)
    for name, got in found.items():
        assert error(got, wanted[name]) < 2e-5, name


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_transformers_experts_whole(kernels: bool) -> None:
    module = transformers_model(mixtral).model.layers[0].mlp.experts
    module.config._experts_implementation = "megahf"
    given = torch.randn(6, 24), chosen(6, 2, 5), torch.rand(6, 2)
    torch._dynamo.reset()
    compiled_module = torch.compile(module, fullgraph=True, backend="aot_eager")
    with only(*["triton"] * kernels):
        results = [[out := made(*given), *torch.autograd.grad(out.sum(), module.parameters())]
                   for made in (module, compiled_module)]  # fmt: skip
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


@pytest.mark.usefixtures("small")
def test_a_norm_behind_the_experts_is_of_what_is_not_weighed_yet() -> None:
    module = transformers_model(mixtral).model.layers[0].mlp.experts.double()
    module.has_post_expert_norm, module.post_expert_norm = True, nn.RMSNorm(24).double()
    given = torch.randn(6, 24).double(), chosen(6, 2, 5), torch.rand(6, 2).double()
    results = []
    for module.config._experts_implementation in ("megahf", "batched_mm"):
        with only("triton"):
            results.append(module(*given))
    torch.testing.assert_close(*results)
    with only("triton"):
        module.config._experts_implementation = "megahf"
        half = module.float()(given[0].float(), given[1], given[2].float())
    torch.testing.assert_close(half.double(), results[0], atol=1e-5, rtol=1e-4)


def test_activations_nobody_has_heard_of_are_named() -> None:
    experts = chosen(3, 1, 2)
    with pytest.raises(ValueError, match="no activation 'tanh'; give one of silu, quick_gelu"):
        triton_experts(experts=experts, **inputs(experts, 2), act="tanh", gated=True)  # type: ignore[arg-type]


@pytest.mark.usefixtures("small")
def test_no_token_at_all_is_no_error() -> None:
    module = transformers_model(mixtral).model.layers[0].mlp.experts
    module.config._experts_implementation = "megahf"
    with only("triton"):
        assert module(torch.zeros(0, 24), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 24)


@pytest.mark.usefixtures("small")
def test_under_autocast_matrices_are_multiplied_in_its_dtype() -> None:
    module = transformers_model(mixtral).model.layers[0].mlp.experts
    given = torch.randn(6, 24), chosen(6, 2, 5), torch.rand(6, 2)
    module.config._experts_implementation = "megahf"
    exact = module(*given)
    with only("triton"), torch.autocast("cpu", torch.bfloat16):
        out = module(*given)
    assert out.dtype == torch.float32
    assert 1e-4 < error(out, exact.double()) < 1e-2


@pytest.mark.parametrize(
    ("architecture", "rows", "odd"), [(90, 64, 0), (90, 512, 1), *((number, 512, 0) for number in SHARED_MEMORY)]
)
def test_compiled_for_a_gpu_nothing_spills_and_tensor_cores_multiply(architecture: int, rows: int, odd: int) -> None:
    """In a model's widths, or `odd` ones with all there is beside, 4 experts: tiles of 16 and of 128 rows."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16).requires_grad_()

    with compiled(architecture, *MODULES) as launched:
        width, inner = 1024 + odd, 768 + odd
        tensors = [empty(rows // 2, width), empty(4, 2 * inner, width), empty(4, width, inner)]
        tensors += [empty(4, 2 * inner), empty(4, width)] * odd
        experts = torch.zeros(rows // 2, 2, dtype=torch.int64)
        weights = torch.empty(rows // 2, 2).requires_grad_()
        out = triton_experts(tensors[0], experts, weights, *tensors[1:], act="gelu" if odd else "silu", gated=True)
        torch.autograd.grad(out, (weights, *tensors), torch.ones_like(out))
    assert all(kernel.fits for kernel in launched.values()), launched
    names = ("rows_kernel", "inner_backward_kernel", "outer_kernel")
    products = [kernel for kernel in launched.values() if kernel.name in names]
    assert len(products) == 6 and all(kernel.multiplies for kernel in products), launched
    if rows == 512:
        assert all(kernel.newest for kernel in products), products
