"""How long does it take to write Megatron checkpoints, against `cp -r` of the source and a converter of the usual kind?

    python benchmarks/recut.py --gb 6 --rounds 3

From a Llama's folder to TP4 x PP2, and from TP4 x PP2 to TP2 x PP4, both formats, in turns as convert.py takes them.
The peer holds the whole model in memory (peer.py). What was written is compared with the source (`megahf verify`) once.
Prints a table and writes `benchmarks/results/recut_<hardware>_<date>.{csv,md}`; leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from convert import COLUMNS, REPOSITORY, Question, Turn, disk, make, measure, say
from record import command, machine, markdown, versions, write

MEGAHF = (sys.executable, "-m", "megahf.cli")
CONVERT = (*MEGAHF, "convert", "{source}", "{target}", "--to", "megatron")
CP = Question("cp -r", "", ("cp", "-r", "{source}", "{target}"))
PEER = Question("the whole model in memory", "", (sys.executable, "benchmarks/peer.py", "{source}", "{target}"))
OPTIONS = (
    ("--format torch --no-checksums", "1.4"),
    ("--format torch", "1.6"),
    ("--format torch_dist --no-checksums", "1.4"),
    ("--format torch_dist", "1.6"),
)
TAKEN_IN, RECUT = ("--tp", "4", "--pp", "2"), ("--tp", "2", "--pp", "4")


def questions(layout: tuple[str, ...], *others: Question) -> list[Question]:
    ways = [
        Question(
            f"megahf convert --format {format}{flag}", goal, (*CONVERT, *layout, "--format", format, *flag.split())
        )
        for format in ("torch", "torch_dist")
        for flag, goal in ((" --no-checksums", "1.4"), ("", "1.6"))
    ]
    return [CP, *ways, *others]


JOURNEYS = {  # what is read, and what is asked of it
    "Llama to TP4 PP2": ("llama", questions(TAKEN_IN, PEER)),
    "torch TP4 PP2 to TP2 PP4": ("torch", questions(RECUT)),
    "torch_dist TP4 PP2 to TP2 PP4": ("torch_dist", questions(RECUT)),
}


def prepare(kind: str, gb: float, source: Path) -> None:
    if kind != "llama":
        make(source, gb, kind)
        return
    make(source.with_name("first"), gb, "torch_dist")
    words = [*MEGAHF, "convert", str(source.with_name("first")), str(source), "--to", "llama"]
    subprocess.run(words, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE)
    shutil.rmtree(source.with_name("first"))


def measured(gb: float, rounds: int, root: Path) -> Iterator[Turn]:
    """All turns; what they made is removed."""
    for journey, (kind, asked) in JOURNEYS.items():
        source, target = root / "source", root / "target"
        try:
            prepare(kind, gb, source)
            for round in range(rounds):
                for question in asked:
                    turn = Turn(gb, journey, question.what, round, *measure(question, source, target))
                    say(turn)
                    yield turn
                    if round == 0 and question.what.startswith("megahf"):
                        words = [*MEGAHF, "verify", str(source), str(target)]
                        subprocess.run(words, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE)
        finally:
            shutil.rmtree(source, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)


def table(turns: Sequence[Turn]) -> str:
    """One row for each question: minima and medians, and how many times `cp` they took."""
    rows = []
    for journey, (_, asked) in JOURNEYS.items():
        by = {q.what: [turn for turn in turns if (turn.format, turn.what) == (journey, q.what)] for q in asked}
        cp = [turn.seconds for turn in by[CP.what]]
        for question in asked:
            seconds = [turn.seconds for turn in by[question.what]]
            low, middle = min(seconds), statistics.median(seconds)
            figures = (low, middle, low / min(cp), middle / statistics.median(cp))
            cpu = statistics.median(turn.cpu_seconds for turn in by[question.what])
            peak = max(turn.peak_mb for turn in by[question.what])
            shown = [f"{figure:.2f}" for figure in figures]
            rows.append((journey, question.what, *shown, question.goal, f"{cpu:.2f}", f"{peak:.0f}"))
    return markdown(COLUMNS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; a new folder beside the repository's files by default")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.dir or REPOSITORY) as root:
        where = disk(Path(root))
        turns = list(measured(given.gb, given.rounds, Path(root)))
    facts = (
        f"command: `{command('--dir')}`",
        f"hardware: {machine()}, {where}; load when it began {load:.1f}",
        f"versions: {versions('megahf', 'numpy', 'blake3', 'torch', 'transformers')}",
    )
    page = f"# Megatron checkpoints written, against `cp -r` of {given.gb:g} GB\n\n{table(turns)}\n\n{READ}"
    header = [field.name for field in fields(Turn)]
    path = write("recut", [header, *(astuple(turn) for turn in turns)], page, facts)
    print(f"\n{table(turns)}\n\nwrote {path}.csv and .md")


READ = """Times include a sync; the whole command each time. CPU seconds (median) and peak resident memory (largest) are
of the whole process. Every turn found the source in the page cache and no target; turns alternate."""

if __name__ == "__main__":
    main()
