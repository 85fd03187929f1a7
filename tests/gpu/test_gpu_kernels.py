"""Promise: on a GPU every kernel and each gradient is what it is in the interpreter: as float64 has it.

The cases and oracles are those of the interpreter's tests, with their small tiles and, over longer sequences and in
wider layers, with the tiles that users get.
"""

from __future__ import annotations

from typing import Any

import pytest
import recurrence
import test_triton_conv as conv
import test_triton_grouped as grouped
import test_triton_layer_norm as layer_norm
import test_triton_moe as moe
import test_triton_norm as norm
import test_triton_route as route
import test_triton_selective_scan as selective
import test_triton_ssd as ssd
import test_triton_ssd_backward as ssd_backward
import test_triton_ssd_update as update
import torch
from placed import moved, small_tiles
from recurrence import doubled, error, given
from torch import Tensor

from megahf.models.triton_conv import triton_conv1d, triton_conv1d_update
from megahf.models.triton_grouped import triton_outer, triton_rows
from megahf.models.triton_norm import triton_gated_norm
from megahf.models.triton_ssd_update import triton_ssd_update

pytestmark = pytest.mark.gpu

FORWARD = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENTS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# Heads' and states' sizes: the interpreter's, published models', those that fill no block, the largest.
SIZES = [(16, 16), (64, 128), (64, 64), (12, 20), (32, 256), (128, 256)]
LONG = [
    (1, 2, 1, "bias"),
    (63, 4, 2, "skip state"),
    (64, 4, 4, "gate state padding"),
    (128, 4, 1, ""),
    (129, 4, 2, "bias skip gate state"),
    (259, 8, 2, "bias skip each gate state padding"),
    (259, 9, 1, "skip documents state"),
]


def scan_errors(inputs: dict[str, Any]) -> dict[str, float]:
    with torch.no_grad():
        out, state = ssd.errors(inputs)
    return {"out": out, "last": state, **ssd_backward.errors(inputs)}


def check(found: dict[str, float], dtype: torch.dtype) -> None:
    forward = {name: found[name] for name in ("out", "last", "after") if name in found}
    assert max(forward.values()) < FORWARD[dtype], found
    assert max(found.values()) < GRADIENTS[dtype], found


@pytest.mark.parametrize(("length", "heads", "groups", "options"), ssd.CASES)
def test_the_scan_in_small_tiles(
    length: int, heads: int, groups: int, options: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_tiles(monkeypatch)
    check(scan_errors(moved(given(length, heads, groups, options), device)), torch.float32)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("length", "heads", "groups", "options"), LONG)
def test_the_scan_over_several_chunks(
    length: int, heads: int, groups: int, options: str, dtype: torch.dtype, device: torch.device
) -> None:
    channels, state = (64, 128) if device.type == "cuda" else (16, 16)
    inputs = given(length, heads, groups, options, dtype, rows=2, channels=channels, state=state)
    check(scan_errors(moved(inputs, device)), dtype)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("channels", "state"), SIZES)
def test_the_scan_of_every_size_that_it_takes(
    channels: int, state: int, dtype: torch.dtype, device: torch.device
) -> None:
    length = 150 if device.type == "cuda" else 17
    check(scan_errors(moved(given(length, 2, 1, "skip gate state", dtype, 1, channels, state), device)), dtype)


@pytest.mark.parametrize(("rate", "raw"), [(-60.0, 3.0), (-16.0, -18.0), (-1e-3, 30.0)])
def test_the_scan_of_large_decays_and_the_smallest_time_steps(rate: float, raw: float, device: torch.device) -> None:
    length = 150 if device.type == "cuda" else 17
    inputs = moved(given(length, 2, 1, "state"), device)
    for name, value in (("A", rate), ("dt", raw)):
        inputs[name] = torch.full_like(inputs[name], value).requires_grad_()
    check(scan_errors(inputs), torch.float32)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("channels", "state"), SIZES)
@torch.no_grad()
def test_a_token_more_of_the_scan(channels: int, state: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = moved(given(3, 4, 2, "bias skip gate state", dtype, 3, channels, state), device)
    wanted, last = recurrence.recurrence(**doubled(inputs))  # type: ignore[arg-type]
    where = torch.tensor([4, -1, 1], device=device)
    pool = torch.full((6, *inputs["state"].shape[1:]), torch.nan, device=device)
    pool[where[::2]] = inputs["state"][::2]
    outs = [triton_ssd_update(pool, **step, indices=where) for step in update.steps(inputs)]  # type: ignore[arg-type]
    out = torch.stack(outs, dim=1)
    assert error(out[::2], wanted[::2]) < FORWARD[dtype] and error(pool[where[::2]], last[::2]) < FORWARD[torch.float32]
    assert out[1].eq(0).all() and pool[[0, 2, 3, 5]].isnan().all()


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("channels", [conv.CHANNELS, 520])
@pytest.mark.parametrize(("length", "width", "options"), [*conv.CASES, (140, 4, "bias state documents padding")])
def test_the_convolution(
    length: int, width: int, options: str, channels: int, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(conv, "CHANNELS", channels)
    inputs = moved(conv.inputs(length, width, options, dtype), device)
    check(conv.errors(triton_conv1d, inputs), dtype)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("width", [2, 3, 4])
@torch.no_grad()
def test_a_token_more_of_the_convolution(width: int, dtype: torch.dtype, device: torch.device) -> None:
    inputs = moved(conv.inputs(6, width, "bias state", dtype), device)
    wanted, last = conv.written_down(**conv.doubled(inputs))  # type: ignore[arg-type]
    x, weight, bias, state = (inputs[name].detach() for name in conv.NAMES)
    outs = [triton_conv1d_update(state, token, weight, bias) for token in x.unbind(1)]
    assert error(torch.stack(outs, dim=1), wanted) < FORWARD[dtype] and torch.equal(state.double(), last)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("rows", "groups", "size"), [*norm.SHAPES, (300, 8, 1024), (3, 1, 8192)])
def test_the_gated_norm(rows: int, groups: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    leaves = moved(norm.inputs(rows, groups, size, dtype), device)
    assert max(norm.errors(triton_gated_norm, leaves, groups)) < FORWARD[dtype]


@pytest.mark.parametrize("size", [20, 4096, 8192])
@pytest.mark.parametrize(("kind", "zero_centered", "dtype", "weights"), layer_norm.KINDS)
def test_the_norms_that_cast(
    kind: Any, zero_centered: bool, dtype: torch.dtype, weights: torch.dtype, size: int, device: torch.device
) -> None:
    module = layer_norm.build(kind, zero_centered, weights, size).to(device)
    x = torch.randn(2, 300, size + 11, generator=torch.Generator().manual_seed(0)).to(dtype)[:, :4, 5:-6]
    found = layer_norm.errors(module, moved(x.requires_grad_(), device))
    assert max(found) < max(FORWARD[dtype], FORWARD[weights]), found


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("channels", "places"), [(selective.CHANNELS, selective.PLACES), (300, 16), (40, 32)])
@pytest.mark.parametrize(
    ("length", "options"),
    [*selective.CASES, (64, "D z bias state"), (65, "D state padding"), (200, "D z bias documents state padding")],
)
def test_the_selective_scan(
    length: int, options: str, channels: int, places: int, dtype: torch.dtype, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(selective, "CHANNELS", channels)
    monkeypatch.setattr(selective, "PLACES", places)
    check(selective.errors(moved(selective.inputs(length, options, dtype), device)), dtype)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("n", "k"), [(33, 20), (256, 128), (130, 513)])
@pytest.mark.parametrize("counts", [*grouped.COUNTS, [300, 0, 77, 1]])
def test_grouped_matmuls(counts: list[int], n: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight, ends = moved(grouped.inputs(counts, n, k, dtype), device)
    grad = moved(grouped.inputs(counts, 7, n, dtype)[0], device)
    rows = sum(counts)
    found = {
        "rows": error(triton_rows(x, weight, ends)[:rows], grouped.rows_written_down(x, weight, ends)),
        "transposed": error(
            triton_rows(grad, weight.transpose(1, 2), ends)[:rows],
            grouped.rows_written_down(grad, weight.transpose(1, 2), ends),
        ),
        "outer": error(triton_outer(grad, x, ends), grouped.outer_written_down(grad, x, ends)),
    }
    assert max(found.values()) < FORWARD[dtype], found


@pytest.mark.parametrize(("tokens", "topk", "groups", "block"), [*route.CASES, (4096, 8, 128, 128), (999, 2, 512, 16)])
def test_routes_are_stable_sorts(tokens: int, topk: int, groups: int, block: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts = torch.rand(tokens, groups, generator=generator).topk(min(topk, groups))[1]
    route.check(experts.to(device), groups, block)


@pytest.mark.parametrize("experts", route.UNEVEN)
def test_routes_of_empty_full_and_foreign_experts(experts: Tensor, device: torch.device) -> None:
    route.check(moved(experts, device), 5, 16)


def mixture(experts: Tensor, held: int, device: torch.device, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    return moved(experts, device), moved(moe.inputs(experts, held, bias=True, **options), device)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("experts", moe.ROUTES)
def test_experts_whatever_their_tokens(experts: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    moe.check(*mixture(experts, 9 if experts.shape[1] == 8 else 4, device, dtype=dtype))


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("act", "gated"), moe.KINDS)
def test_experts_of_every_activation(act: str, gated: bool, dtype: torch.dtype, device: torch.device) -> None:
    moe.check(*mixture(moe.chosen(7, 2, 3), 3, device, gated=gated, dtype=dtype), act, gated)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize(("width", "inner"), [(7, 5), *moe.WIDTHS, (256, 192), (513, 130)])
@pytest.mark.parametrize("tokens", [5, 200])  # tiles of 16 rows, and of 128
def test_experts_of_every_width(tokens: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> None:
    moe.check(*mixture(moe.chosen(tokens, 2, 3), 3, device, width=width, inner=inner, dtype=dtype))
