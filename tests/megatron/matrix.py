"""The whole matrix against real Megatron, case by case into a record: `python tests/megatron/matrix.py RECORD.md`.

Every kind meets every layout, format and dtype, and with experts every layer spec; every layout every format. With
`--journeys`, the way back: what megahf writes of every kind, loaded by Megatron in every rank.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from cases import Case, thorough
from cases_hybrid import thorough as thorough_hybrids
from cases_llava import LlavaCase
from cases_llava import thorough as thorough_llavas
from cases_llava import thorough_journeys as thorough_llava_journeys
from compare import APART, check
from compare_llava import check as check_llava
from journeys import Journey
from journeys import thorough as thorough_journeys

import megahf
from megahf.errors import Refused
from megahf.judge.bench import Bench
from megahf.judge.pool import Failed

VERSIONS = ("megatron-core", "torch", "transformers")


class Outcome(NamedTuple):
    case: Case
    sharded: float | None  # largest difference of Megatron's own sharded logits to one process
    ours: float | None  # of megahf's
    seconds: float
    wrong: str


def run(cases: list[Case]) -> Iterator[Outcome]:
    """Each case written by Megatron, read by megahf, compared, and deleted."""
    with Bench(size=8) as bench, tempfile.TemporaryDirectory(prefix="megahf-matrix-") as folder:
        for case in cases:
            began, out = time.monotonic(), Path(folder) / "checkpoint"
            sharded = ours = None
            wrong = ""
            try:
                sharded = bench.save(case.arguments, out, case.format, case.extra_state)
                ours = check_llava(out) if isinstance(case, LlavaCase) else check(out)
            except (Failed, Refused, AssertionError, RuntimeError) as error:
                wrong = str(error).strip().splitlines()[-1]
            yield Outcome(case, sharded, ours, time.monotonic() - began, wrong)
            shutil.rmtree(out, ignore_errors=True)


def travel(journeys: list[Journey]) -> Iterator[Outcome]:
    """Each journey: written by Megatron, by megahf for another layout, loaded by Megatron, compared, and deleted."""
    with Bench(size=8) as bench, tempfile.TemporaryDirectory(prefix="megahf-matrix-") as folder:
        for journey in journeys:
            began, out, there = time.monotonic(), Path(folder) / "checkpoint", Path(folder) / "there"
            sharded = ours = None
            wrong = ""
            try:
                sharded = bench.save(journey.source.arguments, out, journey.source.format, journey.source.extra_state)
                megahf.convert(out, there, to="megatron", **journey.options)
                megahf.verify(out, there)
                ours = bench.difference(there, torch.load(out / "reference.pt"))
                wrong = "" if ours <= APART else f"{ours:.1e} off"
            except (Failed, Refused, AssertionError, RuntimeError) as error:
                wrong = str(error).strip().splitlines()[-1]
            case = Case(str(journey.source), journey.layout, journey.format, journey.spec, journey.source.dtype)
            yield Outcome(case, sharded, ours, time.monotonic() - began, wrong)
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(there, ignore_errors=True)


READ = "checkpoints written by Megatron in {seconds:.0f} s, {wrong} of them read wrong. Weights are compared bit by bit"
WRITTEN = (
    "journeys in {seconds:.0f} s, each written by Megatron, written again by megahf for another layout, format or make "
    "of layers, and loaded by Megatron in every rank; {wrong} of them wrong. The columns say where from, and where to. "
    "Weights are compared bit by bit"
)


def report(outcomes: list[Outcome], what: str = READ) -> str:
    """The record as Markdown."""
    wrong = sum(1 for outcome in outcomes if outcome.wrong)
    worst = max((outcome.ours for outcome in outcomes if outcome.ours is not None), default=0.0)
    told = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    said = what.format(seconds=sum(outcome.seconds for outcome in outcomes), wrong=wrong)
    lines = [
        "# megahf against real Megatron",
        "",
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {told}.",
        "",
        f"{len(outcomes)} {said}, fp32 logits with those of Megatron in one process: at most {worst:.1e} off.",
        "",
        "| kind | layout | format | spec | dtype | sharded Megatron | megahf | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [" ".join(["|", *(f"{cell} |" for cell in row(outcome))]) for outcome in outcomes]
    return "\n".join(lines) + "\n"


def row(outcome: Outcome) -> list[str]:
    numbers = ["" if number is None else f"{number:.1e}" for number in (outcome.sharded, outcome.ours)]
    return [*outcome.case, *numbers, outcome.wrong or "equal"]


def main() -> int:
    """0 if every case is right; the record is written either way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    parser.add_argument("--journeys", action="store_true", help="what megahf writes, instead of what it reads")
    parser.add_argument("--kind", action="append", help="only cases of this kind; may be given again")
    options = parser.parse_args()
    every = (*thorough(), *thorough_hybrids(), *thorough_llavas())
    cases = [case for case in every if not options.kind or case.kind in options.kind]
    ways = (*thorough_journeys(), *thorough_llava_journeys()) if options.journeys else ()
    journeys = [journey for journey in ways if not options.kind or journey.source.kind in options.kind]
    outcomes = []
    for outcome in travel(journeys) if options.journeys else run(cases):
        outcomes.append(outcome)
        print(f"{len(outcomes)} {outcome.case} {outcome.wrong or 'equal'}", flush=True)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(report(outcomes, WRITTEN if options.journeys else READ), encoding="utf-8")
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
