"""The recurrences of Mamba on a GPU, at the sizes of published models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from ops_case import Case, Cases, Other, bytes_of, installed, normal, under, with_gradients, without_gradients
from torch import Tensor

from megahf.models.selective_scan import selective_scan, selective_update
from megahf.models.ssd import ssd_scan, ssd_update

HEAD, STATE = 64, 128
SSD = {"2.7B": (80, 1), "8B": (128, 8)}  # heads and groups
LENGTHS = (4096, 32768, 131072)
TRAINED = 4096  # tokens of a training step
TWIN = 4096  # tokens up to which torch's ops are a baseline
BATCHES = (1, 64, 256, 1024)
WIDTH, PLACES = 5120, 16  # of Mamba-1 2.8B

mamba2 = installed("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")
mamba_update = installed("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
mamba1 = installed("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def ssd_inputs(length: int, heads: int, groups: int, device: torch.device) -> dict[str, Tensor]:
    """In a view of the packed projection, as the mixer has them: `z | x | B | C | dt`."""
    width, shared = heads * HEAD, groups * STATE
    packed = normal(1, length, 2 * width + 2 * shared + heads, device=device)
    _, x, B, C, dt = packed.split([width, width, shared, shared, heads], dim=-1)
    x, B, C = x.unflatten(-1, (heads, HEAD)), B.unflatten(-1, (groups, STATE)), C.unflatten(-1, (groups, STATE))
    A, D = -1 - 15 * torch.rand(heads, device=device), torch.ones(heads, device=device)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": torch.full((heads,), -4.0, device=device)}


def upcast(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().float() for name, t in given.items()}


def theirs_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
) -> tuple[Tensor, ...]:
    options: dict[str, Any] = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "return_final_states": True}
    assert mamba2 is not None
    return mamba2(x, dt, A, B, C, 256, **options)


def ssd_case(name: str, length: int, device: torch.device, trained: bool) -> Case:
    heads, groups = SSD[name]
    given = ssd_inputs(length, heads, groups, device)
    exact, leaves = upcast(given), ("x", "dt", "B", "C")
    once = without_gradients
    if trained:
        for inputs in (given, exact):
            inputs |= {key: inputs[key].detach().requires_grad_() for key in leaves}

    def run(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
        bound = partial(call, **inputs)
        return with_gradients(bound, [inputs[key] for key in leaves]) if trained else once(bound)

    others = {}
    if mamba2 is not None:
        others["mamba-ssm"] = Other(run(theirs_ssd, given), 1.6 if trained else 1.8)
    if length <= TWIN:
        others["torch's ops"] = Other(run(under_ops(ssd_scan), given))
    moved = bytes_of(*(given[key] for key in ("x", "x", "dt", "B", "C"))) * (3 if trained else 1)
    multiplied = 2 * length * heads * HEAD * STATE * 3 * (3.5 if trained else 1)
    ours, wanted = run(under_ours(ssd_scan), given), run(under_ops(ssd_scan), exact)
    op, tolerance = ("ssd forward and backward", 2e-2) if trained else ("ssd forward", 1e-2)
    return Case(op, f"{name} {length}", "bfloat16", ours, wanted, others, tolerance, moved, multiplied)


def under_ours(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: under("triton", call, **given)()


def under_ops(call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **given: under("", call, **given)()


def ssd_update_case(rows: int, device: torch.device) -> Case:
    heads, groups = SSD["8B"]
    given = {name: t[0] for name, t in ssd_inputs(rows, heads, groups, device).items() if t.dim() > 1}
    given |= {name: t for name, t in ssd_inputs(1, heads, groups, device).items() if t.dim() == 1}
    state = torch.randn(rows, heads, HEAD, STATE, device=device)

    def updating(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
        held = state.clone()
        return without_gradients(lambda: (call(state=held, **inputs), held))

    def theirs(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        assert mamba_update is not None
        wide = [t[..., None].expand(*t.shape, HEAD) for t in (dt, D, dt_bias)]
        rates = A[:, None, None].expand(heads, HEAD, STATE)
        return mamba_update(state, x, wide[0], rates, B, C, wide[1], dt_bias=wide[2], dt_softplus=True)

    others = {} if mamba_update is None else {"mamba-ssm": Other(updating(theirs, given))}
    ours, exact = updating(under_ours(ssd_update), given), updating(under_ops(ssd_update), upcast(given))
    moved = 2 * bytes_of(state) + bytes_of(given["x"], given["x"], given["B"], given["C"], given["dt"])
    return Case("ssd update", f"8B, {rows} rows", "float32 state", ours, exact, others, 1e-2, moved, graph=True)


def scan_inputs(length: int, device: torch.device) -> dict[str, Tensor]:
    packed = normal(1, length, 2 * WIDTH, device=device)
    narrow = normal(1, length, 160 + 2 * PLACES, device=device)
    rates = -torch.arange(1.0, PLACES + 1, device=device).repeat(WIDTH, 1)
    return {
        "u": packed[..., :WIDTH], "dt": normal(1, length, WIDTH, device=device, dtype=torch.float32) - 4, "A": rates,
        "B": narrow[..., 160 : 160 + PLACES], "C": narrow[..., 160 + PLACES :], "z": packed[..., WIDTH:],
        "D": torch.ones(WIDTH, device=device),
    }  # fmt: skip


def theirs_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor) -> Tensor:
    assert mamba1 is not None
    dt = dt.to(u.dtype)
    turned = [t.mT.contiguous() for t in (u, dt, B, C, z)]
    return mamba1(turned[0], turned[1], A, turned[2], turned[3], D, turned[4], None, True).mT


def scan_case(length: int, device: torch.device, trained: bool) -> Case:
    given = scan_inputs(length, device)
    exact, leaves = upcast(given), ("u", "dt", "B", "C", "z")
    if trained:
        for inputs in (given, exact):
            inputs |= {key: inputs[key].detach().requires_grad_() for key in leaves}

    def run(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
        bound = partial(call, **inputs)
        return with_gradients(bound, [inputs[key] for key in leaves]) if trained else without_gradients(bound)

    others = {"torch's ops": Other(run(under_ops(selective_scan), given))}
    if mamba1 is not None:
        others["mamba-ssm"] = Other(run(theirs_scan, given))
    moved = bytes_of(*(given[key] for key in ("u", "u", "dt", "z", "B", "C"))) * (3 if trained else 1)
    ours, wanted = run(under_ours(selective_scan), given), run(under_ops(selective_scan), exact)
    op, tolerance = ("selective scan forward and backward", 2e-2) if trained else ("selective scan", 1e-2)
    return Case(op, f"{WIDTH} x {PLACES}, {length}", "bfloat16", ours, wanted, others, tolerance, moved)


def scan_update_case(rows: int, device: torch.device) -> Case:
    wide = scan_inputs(rows, device)
    given = {name: t if t.dim() < 3 else t[0] for name, t in wide.items()}
    state = torch.randn(rows, WIDTH, PLACES, device=device)

    def updating(call: Callable[..., Any], inputs: dict[str, Tensor]) -> Callable[[], Any]:
        held = state.clone()
        return without_gradients(lambda: (call(state=held, **inputs), held))

    def theirs(state: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, D: Tensor) -> Tensor:
        assert mamba_update is not None
        return mamba_update(state, u, dt, A, B, C, D, z=z, dt_softplus=True)

    others = {} if mamba_update is None else {"mamba-ssm": Other(updating(theirs, given))}
    ours, exact = updating(under_ours(selective_update), given), updating(under_ops(selective_update), upcast(given))
    moved = 2 * bytes_of(state) + bytes_of(given["u"], given["u"], given["dt"], given["z"])
    shape = f"{WIDTH} x {PLACES}, {rows} rows"
    return Case("selective scan update", shape, "float32 state", ours, exact, others, 1e-2, moved, graph=True)


def ssd(device: torch.device) -> Cases:
    for name in SSD:
        yield from (partial(ssd_case, name, length, device, False) for length in LENGTHS)
        yield partial(ssd_case, name, TRAINED, device, True)
    yield from (partial(ssd_update_case, rows, device) for rows in BATCHES)


def scan(device: torch.device) -> Cases:
    yield partial(scan_case, TRAINED, device, False)
    yield partial(scan_case, TRAINED, device, True)
    yield from (partial(scan_update_case, rows, device) for rows in BATCHES)
