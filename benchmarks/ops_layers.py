"""What stands around a recurrence, and mixtures of experts, on a GPU, at the sizes of published models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from ops_case import Case, Cases, Other, bytes_of, installed, normal, under, with_gradients, without_gradients
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from megahf.models import moe  # registers our implementation of experts  # noqa: F401
from megahf.models.conv import causal_conv1d, causal_conv1d_update
from megahf.models.mamba import GatedRMSNorm
from megahf.models.norm import RMSNorm
from megahf.models.ops import grouped_linear, kernel_takes
from megahf.models.triton_grouped import triton_outer, triton_rows

CHANNELS, PACKED = 10240, 18560  # of the 8B's convolution, and of the projection it is a view of
LENGTHS = (4096, 131072)
BATCHES = (64, 1024)
NORMED = (8192, 4096, 8)  # rows, channels, groups
# Experts, experts a token, hidden size, an expert's size.
EXPERTS = {
    "Mixtral 8x7B": (8, 2, 4096, 14336),
    "DeepSeek-V3": (256, 8, 7168, 2048),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
}
TOKENS = (1, 64, 512, 4096, 16384)
MULTIPLIED = (512, 4096, 16384)

their_conv = installed("causal_conv1d", "causal_conv1d_fn")
fla_conv = installed("fla.modules.convolution", "causal_conv1d")
their_norm = installed("mamba_ssm.ops.triton.layernorm_gated", "rmsnorm_fn")


def conv_case(length: int, device: torch.device, trained: bool) -> Case:
    x = normal(1, length, PACKED, device=device)[..., PACKED - CHANNELS :]
    weight, bias = normal(CHANNELS, 1, 4, device=device), normal(CHANNELS, device=device)
    leaves = [t.detach().requires_grad_(trained) for t in (x, weight, bias)]
    exact = [t.detach().float().requires_grad_(trained) for t in leaves]

    def run(call: Callable[..., Any], inputs: list[Tensor]) -> Callable[[], Any]:
        bound = partial(call, *inputs)
        return with_gradients(bound, inputs) if trained else without_gradients(bound)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert their_conv is not None
        return their_conv(x.mT, weight[:, 0], bias, activation="silu").mT

    def flas(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        assert fla_conv is not None
        return fla_conv(x, weight[:, 0], bias, activation="silu")[0]

    others = {"F.conv1d, transposed": Other(run(turned_conv, leaves))}
    if their_conv is not None:
        others["causal-conv1d"] = Other(run(theirs, leaves), 0.9 if trained else 1.0)
    if fla_conv is not None:
        others["fla"] = Other(run(flas, leaves))
    first = lambda *given, kinds: under(kinds, causal_conv1d, *given)()[0]  # noqa: E731
    ours, wanted = run(partial(first, kinds="triton"), leaves), run(partial(first, kinds=""), exact)
    op = "conv forward and backward" if trained else "conv"
    moved = bytes_of(x) * (5 if trained else 2)
    return Case(op, f"{length} x {CHANNELS}", "bfloat16", ours, wanted, others, 1e-2, moved)


def turned_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))
    return F.silu(out[..., : x.shape[1]]).transpose(1, 2)


def conv_update_case(rows: int, device: torch.device) -> Case:
    state, x = torch.randn(rows, CHANNELS, 4, device=device), normal(rows, CHANNELS, device=device)
    weight, bias = normal(CHANNELS, 1, 4, device=device), normal(CHANNELS, device=device)

    def updating(kinds: str, *given: Tensor) -> Callable[[], Any]:
        held = state.clone()
        return without_gradients(lambda: (under(kinds, causal_conv1d_update, held, *given)(), held))

    ours, exact = updating("triton", x, weight, bias), updating("", x, weight.float(), bias.float())
    moved = 2 * bytes_of(state, x)
    return Case("conv update", f"{rows} x {CHANNELS}", "float32 state", ours, exact, {}, 1e-2, moved, graph=True)


def norm_case(device: torch.device, gated: bool, trained: bool) -> Case:
    rows, size, groups = NORMED
    x, z = normal(1, rows, size, device=device), normal(1, rows, size, device=device)
    module: nn.Module = GatedRMSNorm(size, groups, 1e-5) if gated else RMSNorm(size, 1e-5, zero_centered=True)
    module = module.to(device, torch.bfloat16)
    precise = type(module)(size, groups, 1e-5) if gated else RMSNorm(size, 1e-5, zero_centered=True)
    precise = precise.to(device).requires_grad_(False)
    inputs = [t.requires_grad_(trained) for t in ((x, z) if gated else (x,))]
    exact = [t.detach().float().requires_grad_(trained) for t in inputs]

    def run(call: Callable[..., Any], given: list[Tensor]) -> Callable[[], Any]:
        bound = partial(call, *given)
        return with_gradients(bound, given) if trained else without_gradients(bound)

    def theirs(x: Tensor, z: Tensor) -> Tensor:
        assert their_norm is not None
        return their_norm(x, module.weight, None, z, 1e-5, size // groups, False)

    others = {"torch's ops": Other(run(partial(called, "", module), inputs))}
    if gated and their_norm is not None:
        others["mamba-ssm"] = Other(run(theirs, inputs))
    ours, wanted = run(partial(called, "triton", module), inputs), run(partial(called, "", precise), exact)
    op = ("gated norm" if gated else "zero-centred norm") + (" forward and backward" if trained else "")
    moved = bytes_of(*inputs, x) + (bytes_of(*inputs) * 2 + bytes_of(x) if trained else 0)
    return Case(op, f"{rows} x {size}", "bfloat16", ours, wanted, others, 1e-2, moved)


def called(kinds: str, call: Callable[..., Any], *given: Any) -> Any:
    return under(kinds, call, *given)()


def routed(name: str, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, evenly, and with which weights: `[t, k]`."""
    count, k, *_ = EXPERTS[name]
    chosen = torch.rand(tokens, count, device=device).topk(k, dim=-1).indices
    return chosen, torch.softmax(torch.randn(tokens, k, device=device), dim=-1)


def touched(name: str, tokens: int) -> float:
    """How many experts have a token, on average."""
    count, k, *_ = EXPERTS[name]
    return count * (1 - (1 - k / count) ** tokens)


def grouped_case(name: str, tokens: int, device: torch.device, outer: bool) -> Case:
    count, k, hidden, size = EXPERTS[name]
    chosen, _ = routed(name, tokens, device)
    ends = torch.bincount(chosen.flatten(), minlength=count).cumsum(0).int()
    x = normal(tokens * k, hidden, device=device)
    dense = normal(size, hidden, device=device, scale=hidden**-0.5)
    weight = grad = dense
    if outer:
        grad = normal(tokens * k, size, device=device)
    else:
        weight = dense[None].expand(count, -1, -1).contiguous()
    ours = partial(triton_outer, grad, x, ends) if outer else partial(triton_rows, x, weight, ends)
    if device.type == "cpu":  # where our kernels are not
        ours = partial(by_torch, grad, x, weight, ends, outer)
    exact = [t.float() for t in (grad, x, weight)]
    others = {
        "torch's grouped_mm": Other(partial(by_torch, grad, x, weight, ends, outer), 0.9 if outer else 1.0),
        "cuBLAS, dense": Other(partial(torch.mm, grad.T, x) if outer else partial(F.linear, x, dense), 0.75),
    }
    moved, multiplied = bytes_of(x) + 2 * (touched(name, tokens) * hidden + tokens * k) * size, 2 * x.numel() * size
    op, wanted = "grouped outer" if outer else "grouped matmul", partial(by_torch, *exact, ends, outer)
    return Case(op, f"{name}, {tokens} tokens", "bfloat16", ours, wanted, others, 1e-2, moved, multiplied)


def by_torch(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, outer: bool) -> Tensor:
    """torch's kernel where it runs, else a loop."""
    left, right = (grad.T, x) if outer else (x, weight.transpose(1, 2))
    if x.device.type == "cuda" and kernel_takes(x, weight):
        return F.grouped_mm(left, right, offs=ends)
    edges = [0, *ends.tolist()]
    if outer:
        return torch.stack([grad[a:b].T @ x[a:b] for a, b in pairwise(edges)])
    with torch.no_grad():
        return under("", grouped_linear, x, weight, ends)()


def experts_of(name: str, device: torch.device, implementation: str) -> nn.Module:
    """transformers' own module, which runs the experts by any implementation."""
    count, k, hidden, size = EXPERTS[name]
    config = Qwen3MoeConfig(num_experts=count, num_experts_per_tok=k, hidden_size=hidden, moe_intermediate_size=size)
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def moe_case(name: str, tokens: int, device: torch.device) -> Case:
    count, k, hidden, size = EXPERTS[name]
    x, (chosen, weights) = normal(tokens, hidden, device=device), routed(name, tokens, device)
    modules = {kind: experts_of(name, device, kind) for kind in ("megahf", "eager", "grouped_mm")}
    shapes = {"gate_up_proj": (count, 2 * size, hidden), "down_proj": (count, hidden, size)}
    for held, shape in shapes.items():
        matrix = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for expert in matrix:  # one by one: a float32 copy of all would not fit beside them
            expert.copy_(normal(*shape[1:], device=device, scale=shape[-1] ** -0.5))
        for module in modules.values():
            setattr(module, held, nn.Parameter(matrix, requires_grad=False))
    given, weights = (x, chosen, weights.to(x.dtype)), weights.to(x.dtype)

    def run(kinds: str, kind: str, *inputs: Tensor) -> Callable[[], Any]:
        return without_gradients(under(kinds, modules[kind], *inputs))

    others = {
        "transformers, eager": Other(run("", "eager", *given)),
        "transformers, grouped_mm": Other(run("", "grouped_mm", *given), 1.3 if size < hidden else 1.05),
        "torch's ops": Other(run("", "megahf", *given)),
    }
    moved = 2 * (touched(name, tokens) * 3 * hidden * size + 2 * tokens * hidden)
    case = partial(Case, "moe layer", f"{name}, {tokens} tokens", "bfloat16", run("triton", "megahf", *given))
    # Against transformers' loop in the same dtype: two results of bfloat16, each as far from the true one.
    return case(run("", "eager", *given), others, 2e-2, moved, 6 * tokens * k * hidden * size)


def conv(device: torch.device) -> Cases:
    yield from (partial(conv_case, length, device, False) for length in LENGTHS)
    yield partial(conv_case, LENGTHS[0], device, True)
    yield from (partial(conv_update_case, rows, device) for rows in BATCHES)


def norm(device: torch.device) -> Cases:
    yield from (partial(norm_case, device, gated, trained) for gated in (True, False) for trained in (False, True))


def grouped(device: torch.device) -> Cases:
    for name in EXPERTS:
        yield from (partial(grouped_case, name, t, device, outer) for t in MULTIPLIED for outer in (False, True))


def layer(device: torch.device) -> Cases:
    for name in EXPERTS:
        yield from (partial(moe_case, name, tokens, device) for tokens in TOKENS)
