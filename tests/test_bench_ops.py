"""`benchmarks/ops.py` runs all of its cases, at small sizes and with a clock that is none, where there is no GPU.

Packages that are not installed are played by functions of their signatures, so that what is called a baseline computes
the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ops
import ops_cpu
import ops_layers
import ops_scans
import record
from ops import Speeds, measured, tables
from ops_case import Call, Case, Other, tensors

from megahf.models.selective_scan import selective_scan, selective_update
from megahf.models.ssd import ssd_scan

CPU, SPEEDS = torch.device("cpu"), Speeds(1e9, 1e9)
SMALL: dict[Any, dict[str, Any]] = {
    ops_scans: {
        "HEAD": 4, "STATE": 8, "SSD": {"tiny": (4, 2), "8B": (2, 1)}, "LENGTHS": (6,), "TRAINED": 5, "BATCHES": (2,),
        "WIDTH": 12, "PLACES": 4,
    },
    ops_layers: {
        "CHANNELS": 12, "PACKED": 20, "LENGTHS": (6,), "BATCHES": (2,), "NORMED": (4, 16, 2),
        "EXPERTS": {"tiny": (4, 2, 16, 8)}, "TOKENS": (1, 5), "MULTIPLIED": (5,),
    },
    ops_cpu: {"SSD": ((70, 4, 2),), "CONV": (9, 8), "MOE": ((5, 4, 2, 16, 8, 1.3),)},
    ops: {"COPIED": 64, "SQUARE": 8, "ROUNDS": 1},
}  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    torch.manual_seed(0)
    for module, sizes in SMALL.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(ops_cpu, "EXPERTS", ops_layers.EXPERTS)
    return monkeypatch


def no_clock(calls: dict[str, Call], graph: bool) -> dict[str, tuple[float, float]]:
    for call in calls.values():
        call()
    return dict.fromkeys(calls, (20.0, 10.0))


def mamba2(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any) -> Any:
    assert options.pop("dt_softplus") and options.pop("return_final_states")
    return ssd_scan(x, dt, A, B, C, **options)


def mamba1(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: None, soft: bool
) -> Any:
    assert soft and bias is None
    return selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z.mT)[0].mT


def mamba_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    dt_bias: Tensor | None = None, dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    """Each head is a Mamba-1 of its own."""
    assert dt_softplus
    if state.dim() == 3:
        return selective_update(state, x, dt, A, B, C, D, z, dt_bias=dt_bias)
    heads, per_group, out = x.shape[1], x.shape[1] // B.shape[1], torch.empty_like(x)
    for h in range(heads):
        g = h // per_group
        bias = None if dt_bias is None else dt_bias[h]
        out[:, h] = selective_update(state[:, h], x[:, h], dt[:, h], A[h], B[:, g], C[:, g], D[h], dt_bias=bias)
    return out


def conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    assert activation == "silu"
    return F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=len(weight))[..., : x.shape[-1]])


def norm(x: Tensor, weight: Tensor, bias: None, z: Tensor, eps: float, size: int, before: bool) -> Tensor:
    assert bias is None and not before
    gated = (x.float() * F.silu(z.float())).unflatten(-1, (-1, size))
    return (F.rms_norm(gated, (size,), eps=eps).flatten(-2) * weight.float()).to(x.dtype)


PACKAGES = {
    ops_scans: {"mamba2": mamba2, "mamba1": mamba1, "mamba_update": mamba_update},
    ops_layers: {
        "their_conv": conv,
        "their_norm": norm,
        "fla_conv": lambda x, *rest, **options: (conv(x.mT, *rest, **options).mT, None),
    },
}


@pytest.mark.parametrize("name", ops.OPS["cuda"])
def test_every_case_for_a_gpu_is_right_and_so_is_every_baseline(small: pytest.MonkeyPatch, name: str) -> None:
    for module, functions in PACKAGES.items():
        for function, played in functions.items():
            small.setattr(module, function, played)
    made = [make() for make in ops.OPS["cuda"][name](CPU)]
    assert made
    for case in made:
        assert case.error() <= case.tolerance, case
        assert case.moved > 0
        for other, (call, _) in case.others.items():
            if other == "cuBLAS, dense":  # as many operations, and other numbers
                call()
                continue
            first, want = tensors(call())[0].float(), tensors(case.exact())[0].float()
            if not case.graph:  # others have moved their states on
                assert (first - want).norm() <= 3e-2 * want.norm(), (case, other)


def test_all_ops_give_whole_rows_with_floors_and_ratios() -> None:
    rows = tables(CPU, ops.OPS["cuda"].values(), no_clock, SPEEDS)
    names = {row[0] for row in rows}
    for op in (
        "ssd forward",
        "ssd update",
        "selective scan update",
        "conv update",
        "gated norm",
        "grouped outer",
        "moe layer",
    ):
        assert op in names
    for row in rows:
        assert len(row) == len(ops.COLUMNS) and row[3] == 10.0 and row[4] != "-"
        if row[6] != "-":
            assert row[8] == 1.0 and row[10] == "100%"


def case(ours: Call, **others: Call) -> Case:
    named = {name: Other(call, 2.0) for name, call in others.items()}
    return Case("op", "1", "float32", ours, lambda: torch.ones(2), named, moved=1e4)


@pytest.mark.parametrize("value", [2.0, float("nan")])
def test_what_is_wrong_is_not_timed(value: float) -> None:
    rows = measured(case(lambda: torch.full((2,), value), other=lambda: None), None, SPEEDS)  # type: ignore[arg-type]
    assert [row[3] for row in rows] == ["WRONG"] and len(rows[0]) == len(ops.COLUMNS)


def test_a_baseline_that_does_not_run_is_named_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise RuntimeError

    rows = measured(case(lambda: torch.ones(2), broken=broken, works=lambda: None), no_clock, SPEEDS)
    assert [row[6:10] for row in rows] == [("broken", "RuntimeError", "-", 2.0), ("works", 10.0, 1.0, 2.0)]
    assert rows[0][3:6] == (10.0, 10.0, 100)


def test_what_does_not_fit_the_memory_is_said(small: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> Case:
        raise torch.OutOfMemoryError

    refuse.__name__ = "conv_update_case"
    small.setattr(ops_layers, "conv_update_case", refuse)
    rows = tables(CPU, [ops_layers.conv], no_clock, SPEEDS)
    assert [row[:2] for row in rows if row[6] == "not enough memory"] == [("conv_update_case", "2")]


def test_the_clock_of_a_gpu_takes_two_medians_and_replays_graphs(small: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    ran: list[Any] = []

    class Graph:
        def replay(self) -> None:
            ran.append("replay")

    class Capture:
        def __init__(self, graph: Graph) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *args: Any) -> None: ...

    def do_bench(call: Call, warmup: int, rep: int, return_mode: str) -> float:
        call()
        return {"median": 0.5}[return_mode]

    small.setattr(testing, "do_bench", do_bench)
    small.setattr(torch.cuda, "CUDAGraph", Graph)
    small.setattr(torch.cuda, "graph", Capture)
    small.setattr(torch.cuda, "synchronize", lambda: None)
    assert ops.on_gpu({"a": lambda: ran.append("call")}, False) == {"a": (500.0, 500.0)} and ran == ["call"] * 2
    assert ops.on_gpu({"a": lambda: None}, True) == {"a": (500.0, 500.0)} and ran[2:] == ["replay"] * 2


def test_a_machines_speed_is_in_bytes_and_operations_a_second() -> None:
    assert ops.speeds_of(CPU, no_clock) == pytest.approx((2 * 64 / 1e-5, 2 * 8**3 / 1e-5))


def test_the_command_measures_the_twins_where_there_is_no_gpu(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.setattr(record, "RESULTS", tmp_path)
    small.setattr(sys, "argv", ["ops.py", "--device", "cpu"])
    assert ops.main(["--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["op"] for row in rows} == {"ssd", "conv", "moe layer"}
    assert {row["baseline"] for row in rows} >= {"transformers, chunk 256", "transformers, eager"}
    assert all(row["ratio"] > 0 and row["floor"] == "-" for row in rows)
    (page,) = tmp_path.glob("ops_cpu_*.md")
    assert (
        "| ssd | 70 tokens, 4 heads, 2 groups | float32 |" in page.read_text() and "--device cpu`" in page.read_text()
    )
    with pytest.raises(SystemExit):
        ops.main(["--device", "cpu", "--op", "scan"])
