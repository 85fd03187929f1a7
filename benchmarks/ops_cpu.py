"""The twins in plain torch on the CPU against transformers' ops, at sizes that a CPU is used for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ops_case import Case, Cases, Other, normal, under, without_gradients
from ops_layers import EXPERTS, experts_of, routed, turned_conv
from ops_scans import ssd_inputs
from torch import Tensor, nn
from transformers.models.mamba2 import modeling_mamba2

from megahf.models.conv import causal_conv1d
from megahf.models.ssd import ssd_scan

EXACT = 1e-4
SSD = ((1024, 24, 1), (1024, 32, 8))  # tokens, heads, groups
CHUNKS = {256: 3.0, 64: 2.0}  # transformers' default and a better one, and how many times quicker ours should be
CONV = (2048, 1792)  # tokens, channels
# Tokens, experts, experts a token, hidden size, an expert's size; and the goal against transformers' eager loop.
MOE = (
    (512, 128, 8, 512, 192, 1.3),
    (4, 128, 8, 512, 192, 1.3),
    (256, 8, 2, 512, 1792, 0.95),
    (2048, 8, 2, 512, 1024, 0.95),
)


def ssd_case(length: int, heads: int, groups: int, device: torch.device) -> Case:
    given = {name: t.float() for name, t in ssd_inputs(length, heads, groups, device).items()}
    theirs = modeling_mamba2.mamba2_chunk_scan

    def chunked(size: int) -> Callable[[], Any]:
        x, dt, A, B, C, D, bias = given.values()
        options = {"D": D, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
        return without_gradients(partial(theirs, x, dt, A, B, C, size, **options))

    others = {f"transformers, chunk {size}": Other(chunked(size), goal) for size, goal in CHUNKS.items()}
    ours, shape = without_gradients(under("", ssd_scan, **given)), f"{length} tokens, {heads} heads, {groups} groups"
    return Case("ssd", shape, "float32", ours, chunked(256), others, EXACT)


def conv_case(length: int, channels: int, device: torch.device) -> Case:
    given = [torch.randn(shape) for shape in ((1, length, channels), (channels, 1, 4), (channels,))]
    ours: Callable[[], Any] = without_gradients(lambda: under("", causal_conv1d, *given)()[0])
    theirs = without_gradients(partial(turned_conv, *given))
    there_and_back = without_gradients(lambda: turned_conv(*given).contiguous())
    others = {"F.conv1d, transposed there and back": Other(there_and_back, 3.0)}
    others["F.conv1d, its outputs left transposed"] = Other(theirs)
    return Case("conv", f"{length} x {channels}", "float32", ours, theirs, others, EXACT)


def moe_case(
    tokens: int, count: int, k: int, hidden: int, size: int, goal: float, dtype: torch.dtype, device: torch.device
) -> Case:
    name = f"{count} experts of {size}, {k} a token"
    EXPERTS[name] = (count, k, hidden, size)
    chosen, weights = routed(name, tokens, device)
    modules = {kind: experts_of(name, device, kind) for kind in ("megahf", "eager", "grouped_mm")}
    up, down = normal(count, 2 * size, hidden, device=device, scale=0.05), normal(count, hidden, size, device=device)
    for module in modules.values():
        module.gate_up_proj = nn.Parameter(up.to(dtype), requires_grad=False)
        module.down_proj = nn.Parameter(down.to(dtype), requires_grad=False)
    given: tuple[Tensor, ...] = (torch.randn(tokens, hidden).to(dtype), chosen, weights.to(dtype))
    calls = {kind: without_gradients(under("", module, *given)) for kind, module in modules.items()}
    others = {"transformers, eager": Other(calls["eager"], goal)}
    others["transformers, grouped_mm"] = Other(calls["grouped_mm"])
    tolerance = EXACT if dtype == torch.float32 else 2e-2
    shape = f"{tokens} tokens, {name}"
    return Case("moe layer", shape, str(dtype)[6:], calls["megahf"], calls["eager"], others, tolerance)


def ssd(device: torch.device) -> Cases:
    yield from (partial(ssd_case, *sizes, device) for sizes in SSD)


def conv(device: torch.device) -> Cases:
    yield partial(conv_case, *CONV, device)


def layer(device: torch.device) -> Cases:
    yield from (partial(moe_case, *sizes, dtype, device) for sizes in MOE for dtype in (torch.float32, torch.bfloat16))
