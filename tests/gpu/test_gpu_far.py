"""Promise: a tensor may have more than 2^31 numbers: what lies behind them is computed as if it lay in front.

Packed projections of a published hybrid over 131,072 tokens, of which the scan reads x, B and C where they lie; other
ops likewise. What the last tokens give is compared with a run over the last tokens alone, from a state that was passed
on by runs too short to reach so far. A test that takes more memory than is free is skipped, and says how much.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from placed import room
from recurrence import error
from torch import Tensor

from megahf.models import triton_conv, triton_selective_backward, triton_ssd_backward
from megahf.models.triton_conv import triton_conv1d
from megahf.models.triton_grouped import triton_outer, triton_rows
from megahf.models.triton_moe import triton_experts
from megahf.models.triton_norm import triton_gated_norm
from megahf.models.triton_selective_scan import forward as selective_forward
from megahf.models.triton_ssd_backward import triton_ssd_scan

pytestmark = pytest.mark.gpu

FAR, HALF = 2**31, torch.bfloat16
PIECES = 4


def sizes(device: torch.device, **there: tuple[int, int]) -> list[int]:
    """Of each pair the first on a GPU, the second elsewhere."""
    return [large if device.type == "cuda" else small for large, small in there.values()]


def normal(device: torch.device, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Drawn without a copy in float32."""
    return torch.empty(shape, dtype=dtype, device=device).normal_(generator=torch.Generator(device).manual_seed(0))


def is_far(t: Tensor, device: torch.device) -> None:
    """Some of it lies beyond what 32 bits count, where that can be."""
    last = sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    assert device.type != "cuda" or last > FAR


def packed_scan(device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the scan in views of a packed projection `z | x | B | C | dt`; and that."""
    length, heads, groups, channels, state = sizes(
        device, length=(131072, 64), heads=(128, 2), groups=(8, 1), channels=(64, 8), state=(128, 8)
    )
    width, shared = heads * channels, groups * state
    packed = normal(device, 1, length, 2 * width + 2 * shared + heads)
    z, x, B, C, dt = packed.split([width, width, shared, shared, heads], dim=-1)
    rates = -torch.rand(heads, device=device, generator=torch.Generator(device).manual_seed(1)) - 0.01
    given = {"x": x.unflatten(-1, (heads, channels)), "dt": dt, "A": rates}
    given |= {"B": B.unflatten(-1, (groups, state)), "C": C.unflatten(-1, (groups, state))}
    return given | {"dt_bias": torch.full((heads,), -4.0, device=device)}, z


def pieces(given: dict[str, Any], which: int, names: tuple[str, ...]) -> dict[str, Any]:
    """A piece of the sequence; a copy, so that nothing of it is far."""
    return {name: t.chunk(PIECES, dim=1)[which].contiguous() if name in names else t for name, t in given.items()}


def last_piece(t: Tensor) -> Tensor:
    return t.chunk(PIECES, dim=1)[-1]


RUNNING = ("x", "dt", "B", "C")


def passed_on(given: dict[str, Any]) -> Tensor:
    """The state that enters the last piece."""
    state = None
    for which in range(PIECES - 1):
        _, state = triton_ssd_scan(**pieces(given, which, RUNNING), state=state)
    assert state is not None
    return state


@torch.no_grad()
def test_the_scan(device: torch.device) -> None:
    room(device, 20)
    given, _ = packed_scan(device)
    is_far(given["x"], device)
    out, last = triton_ssd_scan(**given)
    wanted = triton_ssd_scan(**pieces(given, PIECES - 1, RUNNING), state=passed_on(given))
    assert out.isfinite().all()
    assert error(last_piece(out), wanted[0]) < 1e-2 and error(last, wanted[1]) < 1e-2


@torch.no_grad()
def test_the_scans_gradients(device: torch.device) -> None:
    """Those of the last piece's tokens are of its outputs alone."""
    room(device, 50)
    given, upstream = packed_scan(device)
    upstream = upstream.unflatten(-1, given["x"].shape[2:])
    is_far(upstream, device)

    def gradients(given: dict[str, Any], upstream: Tensor, state: Tensor | None) -> tuple[Tensor, ...]:
        x, B = given["x"], given["B"]
        none = torch.zeros(1, *x.shape[2:], B.shape[-1], device=device)
        inputs = (x, given["dt"], given["A"], B, given["C"], None, None, given["dt_bias"], state, None, None)
        dx, ddt, _, dB, dC, *_ = triton_ssd_backward.backward(upstream, none, *inputs)
        return dx, ddt, dB, dC

    found = gradients(given, upstream, None)
    wanted = gradients(pieces(given, PIECES - 1, RUNNING), last_piece(upstream).contiguous(), passed_on(given))
    errors = [error(last_piece(got), want) for got, want in zip(found, wanted, strict=True)]
    assert max(errors) < 2e-2, errors


@torch.no_grad()
def test_the_convolution_and_its_gradients(device: torch.device) -> None:
    room(device, 20)
    length, channels, wide = sizes(device, length=(131072, 32), channels=(10240, 12), wide=(18560, 20))
    x, weight = normal(device, 1, length, wide)[..., wide - channels :], normal(device, channels, 1, 4)
    is_far(x, device)
    near = last_piece(x).contiguous()
    state = x[:, -near.shape[1] - 4 : -near.shape[1]].transpose(1, 2).contiguous()
    for got, want in zip(triton_conv1d(x, weight), triton_conv1d(near, weight, state=state), strict=True):
        assert torch.equal(got[:, -near.shape[1] :] if got.shape == x.shape else got, want)
    none = torch.zeros(1, channels, 4, device=device, dtype=HALF)
    found = triton_conv.backward(x, none, x, weight, None, None, None, None)[0]
    wanted = triton_conv.backward(near, none, near, weight, None, state, None, None)[0]
    assert torch.equal(last_piece(found), wanted)


@torch.no_grad()
def test_the_gated_norm(device: torch.device) -> None:
    room(device, 20)
    rows, size, wide = sizes(device, rows=(131072, 8), size=(8192, 16), wide=(18560, 40))
    packed = normal(device, rows, wide)
    y, z, weight = packed[:, size : 2 * size], packed[:, -size:], normal(device, size)
    is_far(z, device)
    wanted = triton_gated_norm(y[-4:].contiguous(), z[-4:].contiguous(), weight, 2, 1e-5)
    assert torch.equal(triton_gated_norm(y, z, weight, 2, 1e-5)[-4:], wanted)


@torch.no_grad()
def test_the_selective_scan_and_its_gradients(device: torch.device) -> None:
    room(device, 70)
    length, channels, places = sizes(device, length=(2**18, 32), channels=(5120, 8), places=(16, 4))
    u, z = normal(device, 1, length, 2 * channels).chunk(2, dim=-1)
    is_far(z, device)
    B, C = normal(device, 1, length, 2 * places).chunk(2, dim=-1)
    A = -torch.arange(1.0, places + 1, device=device).repeat(channels, 1)
    dt, D = normal(device, 1, length, channels), torch.ones(channels, device=device)

    def run(which: slice, state: Tensor | None) -> tuple[Any, list[Any]]:
        running = [t[:, which] for t in (u, dt, B, C, z)]
        running = running if which.start is None else [t.contiguous() for t in running]
        inputs = [*running[:2], A, *running[2:4], D, running[4], None, state, None]
        return inputs, [*selective_forward(*inputs)]

    size, state = length // PIECES, None
    for start in range(0, length - size, size):
        state = run(slice(start, start + size), state)[1][1]
    gradients = []
    for which, entering in ((slice(None), None), (slice(length - size, length), state)):
        inputs, (out, last, *kept) = run(which, entering)
        upstream = torch.zeros_like(last)
        gradients.append([out, *triton_selective_backward.backward(inputs[6], upstream, *inputs, *kept)])
    for place in (0, 1, 2, 4, 5, 7):  # the outputs, and the gradients of u, dt, B, C and z
        assert error(gradients[0][place][:, -size:], gradients[1][place]) < 1e-2, place


@torch.no_grad()
def test_grouped_matmuls(device: torch.device) -> None:
    """Rows, and then matrices, that lie far."""
    room(device, 20)
    rows, inner, groups, columns = sizes(
        device, rows=(2**17, 40), inner=(2**14 + 64, 20), groups=(96, 3), columns=(64, 7)
    )
    x, weight = normal(device, rows, inner), normal(device, 2, columns, inner)
    is_far(x, device)
    ends = torch.tensor([rows - 7, rows], dtype=torch.int32, device=device)
    assert error(triton_rows(x, weight, ends)[-7:], x[-7:].double() @ weight[1].double().T) < 1e-2
    grad = normal(device, rows, columns)
    assert error(triton_outer(grad, x, ends)[1], grad[-7:].double().T @ x[-7:].double()) < 1e-2
    del x, weight, grad
    (tall,) = sizes(device, tall=(11264, 9))
    x, weight = (
        normal(device, 2 * groups, 2048 if tall > 9 else 20),
        normal(device, groups, tall, 2048 if tall > 9 else 20),
    )
    is_far(weight, device)
    ends = torch.arange(1, groups + 1, device=device, dtype=torch.int32) * 2
    assert error(triton_rows(x, weight, ends)[-2:], x[-2:].double() @ weight[-1].double().T) < 1e-2
    grad = normal(device, 2 * groups, tall)
    assert error(triton_outer(grad, x, ends)[-1], grad[-2:].double().T @ x[-2:].double()) < 1e-2


@torch.no_grad()
def test_experts_between_whose_matrices_there_is_more(device: torch.device) -> None:
    room(device, 40)
    tokens, topk, width, inner = sizes(device, tokens=(65536, 24), topk=(8, 2), width=(512, 16), inner=(4352, 12))
    hidden, few = normal(device, tokens, width), 5
    chosen = torch.rand(tokens, 16, device=device, generator=torch.Generator(device).manual_seed(2)).topk(topk)[1]
    weights = torch.rand(tokens, topk, device=device, generator=torch.Generator(device).manual_seed(3))
    up, down = normal(device, 16, 2 * inner, width) / 8, normal(device, 16, width, inner) / 8
    assert device.type != "cuda" or tokens * topk * inner > FAR
    with torch.enable_grad():  # rows before the activation are kept, twice as wide
        leaves = [t.requires_grad_() for t in (hidden, weights, up, down)]
        out = triton_experts(hidden, chosen, weights, up, down, act="silu", gated=True)
        found = torch.autograd.grad(out, leaves[:2], torch.ones_like(out))
        rows = [t.detach()[-few:].clone().requires_grad_() for t in (hidden, weights)]
        alone = triton_experts(rows[0], chosen[-few:], rows[1], up.detach(), down.detach(), act="silu", gated=True)
        wanted = torch.autograd.grad(alone, rows, torch.ones_like(alone))
    for got, want in zip((out, *found), (alone, *wanted), strict=True):
        assert error(got[-few:], want.double()) < 2e-2
