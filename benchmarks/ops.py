"""Our ops on this machine: checked first, then timed beside those of other packages, and beside what it could do.

On an NVIDIA GPU our Triton kernels, at the sizes of published models, against mamba-ssm, causal-conv1d and fla where
they are installed, against torch's and transformers' ops, and against a floor: the bytes that have to be moved at the
speed of a copy, or the multiplications at that of a large matmul, both measured in the same run. On a CPU the twins in
plain torch against transformers'. Prints a table and writes `results/ops_<device>_<hardware>_<date>.{csv,md}`.

    python benchmarks/ops.py [--op ssd,conv] [--device cpu] [--json FILE] [--dry]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent))
import ops_cpu
import ops_layers
import ops_scans
from measure import turns
from ops_case import Call, Case, Cases
from record import command, machine, markdown, versions, write

COLUMNS = (
    "op",
    "shape",
    "dtype",
    "us",
    "floor",
    "% of floor",
    "baseline",
    "its us",
    "ratio",
    "goal",
    "spread",
    "error",
)
COPIED, SQUARE = 2**30, 8192  # bytes, and rows of a matrix, by which the machine is measured
ROUNDS = 5  # turns of a median on the CPU
OPS: dict[str, dict[str, Callable[[torch.device], Cases]]] = {
    "cuda": {
        "ssd": ops_scans.ssd, "scan": ops_scans.scan, "conv": ops_layers.conv, "norm": ops_layers.norm,
        "grouped": ops_layers.grouped, "moe": ops_layers.layer,
    },
    "cpu": {"ssd": ops_cpu.ssd, "conv": ops_cpu.conv, "moe": ops_cpu.layer},
}  # fmt: skip
Timer = Callable[
    [dict[str, Call], bool], dict[str, tuple[float, float]]
]  # calls, in a graph or not: two medians, in us


class Speeds(NamedTuple):
    """Of a machine: bytes copied, read and written both counted, and operations of matmuls, a second."""

    copy: float
    matmul: float


def on_gpu(calls: dict[str, Call], graph: bool) -> dict[str, tuple[float, float]]:
    """Medians of Triton's benchmark, which empties the cache before each call."""
    from triton.testing import do_bench

    def twice(call: Call) -> tuple[float, float]:
        timed = captured(call) if graph else call
        first, second = (1e3 * float(do_bench(timed, warmup=25, rep=100, return_mode="median")) for _ in range(2))
        return first, second

    return {name: twice(call) for name, call in calls.items()}


def captured(call: Call) -> Call:
    """As one CUDA graph: what is left is the kernels' time."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def on_cpu(calls: dict[str, Call], graph: bool) -> dict[str, tuple[float, float]]:
    """Medians of rounds in which all take turns."""

    def seconds(call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    measures = {name: lambda call=call: seconds(call) for name, call in calls.items()}
    turns(measures, 1)
    medians = [{name: 1e6 * statistics.median(times) for name, times in turns(measures, ROUNDS).items()} for _ in "12"]
    return {name: (medians[0][name], medians[1][name]) for name in calls}


def speeds_of(device: torch.device, timer: Timer) -> Speeds:
    source = torch.empty(COPIED, dtype=torch.uint8, device=device)
    matrix, to = torch.randn(SQUARE, SQUARE, device=device).bfloat16(), torch.empty_like(source)
    times = timer({"copy": lambda: to.copy_(source), "matmul": lambda: matrix @ matrix}, False)
    return Speeds(2e6 * COPIED / min(times["copy"]), 2e6 * SQUARE**3 / min(times["matmul"]))


def measured(case: Case, timer: Timer, speeds: Speeds | None) -> list[tuple[Any, ...]]:
    """A row for every baseline; ours is not timed where it is wrong, nor a baseline that does not run."""
    label, error = (case.op, case.shape, case.dtype), case.error()
    if not error <= case.tolerance:  # NaN is not
        return [(*label, "WRONG", "-", "-", "-", "-", "-", "-", "-", f"{error:.1e}")]
    calls, failed = {"ours": case.ours}, {}
    for name, other in case.others.items():
        try:
            other.call()
            calls[name] = other.call
        except Exception as problem:  # another package's, or its compiler's: named in the table
            failed[name] = type(problem).__name__
    times = timer(calls, case.graph)
    ours = min(times["ours"])
    floor = 1e6 * max(case.moved / speeds.copy, case.multiplied / speeds.matmul) if speeds else 0.0
    own = (*label, round(ours, 1), *((round(floor, 1), round(100 * floor / ours)) if floor else ("-", "-")))
    spread = max(abs(a - b) / min(a, b) for a, b in times.values())
    tail = (f"{100 * spread:.0f}%", f"{error:.1e}")
    rows = []
    for name, other in case.others.items():
        took = failed.get(name) or round(min(times[name]), 1)
        ratio = "-" if name in failed else round(min(times[name]) / ours, 2)
        rows.append((*own, name, took, ratio, other.goal or "-", *tail))
    return rows or [(*own, "-", "-", "-", "-", *tail)]


def tables(
    device: torch.device, ops: Iterable[Callable[[torch.device], Cases]], timer: Timer, speeds: Speeds | None
) -> list[tuple[Any, ...]]:
    """The rows of all cases of some ops, printed as they come."""
    rows = []
    for make in (make for cases in ops for make in cases(device)):
        try:
            more = measured(make(), timer, speeds)
        except torch.OutOfMemoryError:
            sizes = " ".join(str(size) for size in make.args if size is not device)
            more = [(make.func.__name__, sizes, *["-"] * 4, "not enough memory", *["-"] * 5)]
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for row in more:
            print(*row, sep=" | ", flush=True)
        rows += more
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="some of ssd, scan, conv, norm, grouped, moe, between commas; all of them")
    parser.add_argument("--device", choices=OPS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="the rows, to this file")
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    known = OPS[options.device]
    ops = options.op.split(",") if options.op else list(known)
    if unknown := [op for op in ops if op not in known]:
        parser.error(f"there is no {unknown[0]!r} on {options.device}; give some of {', '.join(known)}")
    device = torch.device(options.device)
    torch.manual_seed(0)
    timer = on_gpu if device.type == "cuda" else on_cpu
    speeds = speeds_of(device, timer) if device.type == "cuda" else None
    rows = tables(device, [known[op] for op in ops], timer, speeds)
    if options.json:
        options.json.write_text(json.dumps([dict(zip(COLUMNS, row, strict=True)) for row in rows], indent=1) + "\n")
    if not options.dry:
        print(f"wrote {recorded(device, rows, speeds)}")
    return 1 if any(row[3] == "WRONG" for row in rows) else 0


def recorded(device: torch.device, rows: list[tuple[Any, ...]], speeds: Speeds | None) -> Path:
    title = f"# Ops on {'a GPU' if speeds else 'the CPU'}: ours checked, then timed beside others'"
    facts = [f"command: `{command('--json')}`", f"hardware: {machine()}"]
    packages = ["megahf", "torch", "transformers"]
    if speeds:
        copies, multiplies = f"{speeds.copy / 1e12:.2f} TB/s", f"{speeds.matmul / 1e12:.0f} TFLOP/s"
        facts.append(
            f"GPU: {torch.cuda.get_device_name()}; floors are of copies at {copies} and bfloat16 at {multiplies}"
        )
        packages.append("triton")
    else:
        facts.append(f"threads: {torch.get_num_threads()}; medians of {ROUNDS} rounds, taking turns")
    facts.append("us: the lesser of two medians; ratio: its time by ours; spread: of the two medians, at most")
    facts.append("error: of ours, relative to the norm")
    facts.append(f"versions: {versions(*packages)}")
    return write(f"ops_{device.type}", [COLUMNS, *rows], f"{title}\n\n{markdown(COLUMNS, rows)}", facts)


if __name__ == "__main__":
    sys.exit(main())
