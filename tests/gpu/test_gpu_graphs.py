"""Promise: on a GPU ops give the same bits each time, on any stream, in CUDA graphs and in those of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_triton_conv as conv
import test_triton_moe as moe
import test_triton_norm as norm
import test_triton_selective_scan as selective
import test_triton_ssd_update as update
import torch
from placed import captured, moved, quick
from recurrence import given
from test_triton_grouped import inputs as grouped
from tiny import tiny_hybrid, tokens
from torch import Tensor

from megahf.models.conv import causal_conv1d, causal_conv1d_update
from megahf.models.kernel_choice import only
from megahf.models.mamba import GatedRMSNorm
from megahf.models.norm import RMSNorm
from megahf.models.ops import grouped_linear
from megahf.models.selective_scan import selective_scan, selective_update
from megahf.models.ssd import ssd_scan, ssd_update
from megahf.models.triton_moe import triton_experts

pytestmark = pytest.mark.gpu

HALF = torch.bfloat16
Case = tuple[Callable[..., Any], dict[str, Any]]


def experts_of(tokens: int, dtype: torch.dtype = HALF) -> dict[str, Any]:
    chosen = moe.chosen(tokens, 2, 5)
    return {"experts": chosen, **moe.inputs(chosen, 5, width=64, inner=48, bias=True, dtype=dtype)}


def scan_case() -> Case:
    inputs = given(259, 4, 2, "bias skip documents state", HALF, 2, 64, 64)
    return ssd_scan, {name: t for name, t in inputs.items() if name != "mask"}


def conv_case() -> Case:
    inputs = conv.inputs(140, 4, "bias state documents", HALF)
    return causal_conv1d, {name: t for name, t in inputs.items() if name != "lengths"}


def norm_case() -> Case:
    y, z, weight = norm.inputs(90, 2, 33, HALF)
    module = GatedRMSNorm(66, 2, norm.EPSILON)

    def call(y: Tensor, z: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (y, z))

    return call, {"y": y, "z": z, "weight": weight}


def cast_norm_case() -> Case:
    module = RMSNorm(66, 1e-5, True)

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(90, 66, generator=generator), torch.randn(66, generator=generator)
    return call, {"x": x.to(HALF).requires_grad_(), "weight": weight.to(HALF).requires_grad_()}


def grouped_case() -> Case:
    x, weight, ends = grouped([50, 0, 90], 32, 48, HALF)
    leaves = {"x": x[:140].contiguous().requires_grad_(), "weight": weight.requires_grad_()}
    return grouped_linear, {**leaves, "ends": ends}


def experts_case() -> Case:
    return lambda **given: triton_experts(**given, act="silu", gated=True), experts_of(90)


CASES: dict[str, Callable[[], Case]] = {  # the interpreter has the first, the shortest
    "norm": cast_norm_case,
    "conv": conv_case,
    "ssd": scan_case,
    "selective scan": lambda: (selective_scan, selective.inputs(200, "D z bias documents state", HALF)),
    "gated norm": norm_case,
    "grouped": grouped_case,
    "experts": experts_case,
}


def outcome(call: Callable[..., Any], inputs: dict[str, Any]) -> list[Tensor]:
    """Results, and the gradients of every leaf."""
    results = call(**inputs)
    results = [results] if isinstance(results, Tensor) else list(results)
    leaves = [t for t in inputs.values() if isinstance(t, Tensor) and t.requires_grad]
    total = sum((t.float() * torch.linspace(-1, 1, t.numel(), device=t.device).view_as(t)).sum() for t in results)
    return [*results, *torch.autograd.grad(total, leaves)]  # type: ignore[arg-type]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_each_time_and_on_any_stream(name: str, device: torch.device) -> None:
    call, inputs = CASES[name]()
    inputs = moved(inputs, device)
    first = outcome(call, inputs)
    again = [outcome(call, inputs)]
    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            again.append(outcome(call, inputs))
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_that_is_not_the_current_one(name: str, device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call, inputs = CASES[name]()
    pair = [outcome(call, moved(inputs, torch.device("cuda", number))) for number in range(2)]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_graph_holds_it_whole_forwards_and_backwards(name: str, device: torch.device) -> None:
    call, inputs = CASES[name]()
    inputs = moved(inputs, device)
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for eager, graph in zip(outcome(call, inputs), outcome(compiled, inputs), strict=True):
        torch.testing.assert_close(graph, eager, rtol=2e-2, atol=2e-2)  # bfloat16, summed elsewhere


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_cuda_graph_holds_a_forward(name: str, device: torch.device) -> None:
    call, inputs = CASES[name]()
    inputs = {name: t.detach() if isinstance(t, Tensor) else t for name, t in moved(inputs, device).items()}

    def first(**given: Any) -> Tensor:
        results = call(**given)
        return results if isinstance(results, Tensor) else results[0]

    replay = captured(lambda: first(**inputs), device)
    changed = next(t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point())
    changed.mul_(-0.5)
    assert torch.equal(replay(), first(**inputs))


@torch.no_grad()
def test_a_cuda_graph_holds_a_step_of_decoding(device: torch.device) -> None:
    """Convolution, scan and experts of one token, each for three rows, with states that they change in place."""
    scan = moved(given(1, 4, 2, "bias skip state", HALF, 3, 16, 32), device)
    step = update.steps({name: None if t is None else t.detach() for name, t in scan.items()})[0]
    window = {
        name: t if t is None else t.detach() for name, t in moved(conv.inputs(1, 4, "bias", HALF), device).items()
    }
    narrow = moved(selective.inputs(1, "D z bias state", HALF), device)
    token = {name: t.detach() if t.dim() < 3 else t.detach()[:, 0] for name, t in narrow.items() if t is not None}
    chosen = {name: t.detach() for name, t in moved(experts_of(1), device).items()}
    held = torch.zeros(2, conv.CHANNELS, 4, device=device)
    states = [held, scan["state"].detach(), token.pop("state")[:, None].repeat(2, 1, 1)]
    states[2] = narrow["state"].detach().clone()

    def decode() -> Tensor:
        outs = [
            causal_conv1d_update(states[0], window["x"][:, 0], window["weight"], window["bias"]),
            ssd_update(states[1], **step),
            selective_update(states[2], **token),
            triton_experts(**chosen, act="silu", gated=True),
        ]
        return torch.cat([out.flatten() for out in outs])

    before = [state.clone() for state in states]

    def back() -> None:
        for state, old in zip(states, before, strict=True):
            state.copy_(old)

    replay = captured(decode, device)
    results = []
    for run in (replay, decode):
        back()
        results.append([run().clone(), run().clone(), *(state.clone() for state in states)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], results[0][1]), "the states go on"


@pytest.mark.parametrize("variant", ["mamba", "everything", "mamba 1"])
@torch.no_grad()
def test_a_cuda_graph_holds_a_models_forward_of_one_shape(variant: str, device: torch.device) -> None:
    model = tiny_hybrid(variant).to(device)
    ids = tokens(2, 40).to(device)
    with only(*quick(device)):
        replay = captured(lambda: model(ids, use_cache=False).logits, device)
        ids.copy_(tokens(2, 40, seed=7))
        torch.testing.assert_close(replay(), model(ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["mamba", "everything", "mamba 1"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_graph_holds_a_models_training_step(variant: str, device: torch.device) -> None:
    model, ids = tiny_hybrid(variant).to(device).train(), tokens(2, 40 if device.type == "cuda" else 5).to(device)
    names, parameters = zip(*model.named_parameters(), strict=True)
    backend = "inductor" if device.type == "cuda" else "eager"
    results = []
    with only(*quick(device)):
        for function in (model, torch.compile(model, fullgraph=True, backend=backend)):
            loss = function(ids, labels=ids, use_cache=False).loss
            results.append((loss, *torch.autograd.grad(loss, parameters, allow_unused=True)))
    for name, eager, graph in zip(("loss", *names), *results, strict=True):
        torch.testing.assert_close(graph, eager, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
