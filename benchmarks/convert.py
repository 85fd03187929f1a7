"""How long does `megahf convert` take, against `cp -r` of the same checkpoint on the same disk?

    python benchmarks/convert.py --gb 2 6 --formats torch torch_dist --rounds 3
    python benchmarks/convert.py --gb 6 --formats experts:sequential experts:legacy-grouped experts:torch_dist

Makes each checkpoint and measures in turns, so that whatever else the machine does falls on all alike: `cp -r`, the
whole command, and the copy itself (everything after planning, in a process that has planned), the last two with and
without checksums. A sample of the first folder's weights is compared with what the checkpoint was made of. Before every
turn the target is removed, the disk is synced and the source is read once, so that all find the same page cache; every
time includes the sync after it.
Prints a table and writes `benchmarks/results/convert_<hardware>_<date>.{csv,md}`; leaves nothing else behind.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from record import command, machine, markdown, versions, write

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
READ = 4 << 20  # bytes at a time
FORMATS = ("torch", "torch_dist", "experts:sequential", "experts:legacy-grouped", "experts:torch_dist")

# What the copy itself is: planned before the clock starts, all of `carry_out` and the sync after it.
COPY = """
import os, sys, time
from pathlib import Path
from megahf.execute import Checks
from megahf.export import job_for, plan_for
from megahf.writing import carry_out
source, target, checksums = sys.argv[1:]
plan, start = plan_for(source), time.perf_counter()
carry_out(plan, job_for(plan), Path(target), Checks(checksums == "1", False), False, lambda size: None)
os.sync()
print(time.perf_counter() - start)
"""


@dataclass
class Turn:
    """One measured run."""

    gb: float
    format: str
    what: str
    round: int
    seconds: float  # with the sync
    cpu_seconds: float  # of the process, without what the kernel writes later
    peak_mb: float  # resident


@dataclass(frozen=True)
class Question:
    """A way to make the target from the source."""

    what: str
    goal: str
    command: tuple[str, ...]
    times_itself: bool = False  # prints its seconds, sync included


def questions() -> list[Question]:
    convert, copy = (sys.executable, "-m", "megahf.cli", "convert"), (sys.executable, "-c", COPY)
    return [
        Question("cp -r", "", ("cp", "-r", "{source}", "{target}")),
        Question("the copy, --no-checksums", "1.1", (*copy, "{source}", "{target}", "0"), times_itself=True),
        Question("the copy", "1.3", (*copy, "{source}", "{target}", "1"), times_itself=True),
        Question("megahf convert --no-checksums", "1.4 at 6 GB", (*convert, "{source}", "{target}", "--no-checksums")),
        Question("megahf convert", "1.6 at 6 GB", (*convert, "{source}", "{target}")),
        Question("megahf convert --dry-run", "", (*convert, "{source}", "{target}", "--dry-run")),
    ]


def measure(question: Question, source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak resident MB of one run."""
    shutil.rmtree(target, ignore_errors=True)
    warm(source)
    os.sync()
    words = [word.replace("{source}", str(source)).replace("{target}", str(target)) for word in question.command]
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{shlex.join(words)} ended with {process.returncode}")
    seconds = float(printed) if question.times_itself else seconds
    cpu_seconds, peak_mb = used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6
    return round(seconds, 3), round(cpu_seconds, 3), round(peak_mb, 1)


def warm(source: Path) -> None:
    """Reads every file of `source`."""
    buffer = bytearray(READ)
    for path in sorted(source.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def make(source: Path, gb: float, format: str) -> None:
    """The checkpoint, by a process of its own that takes its memory with it."""
    script = str(HERE / f"{maker(format)}.py")
    format = format.removeprefix("experts:")
    subprocess.run([sys.executable, script, str(source), "--gb", str(gb), "--format", format], check=True)


def maker(format: str) -> str:
    """The script that makes a checkpoint of this format."""
    return "make_experts" if format.startswith("experts:") else "make_checkpoint"


def check(gb: float, format: str, folder: Path) -> None:
    """Compares weights of every kind, of the first and the last layer, with what the checkpoint was made of."""
    check = f"import {maker(format)} as made; print(made.differences({gb}, {str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", check], check=True, cwd=HERE, stdout=subprocess.PIPE, text=True)
    if done.stdout.strip() != "[]":
        sys.exit(f"wrong weights: {done.stdout.strip()}")


def measured(sizes: Sequence[float], formats: Sequence[str], rounds: int, root: Path) -> Iterator[Turn]:
    """All turns; what they made is removed."""
    for gb in sizes:
        for format in formats:
            source, target = root / "checkpoint", root / "target"
            try:
                make(source, gb, format)
                for round in range(rounds):
                    for question in questions():
                        turn = Turn(gb, format, question.what, round, *measure(question, source, target))
                        say(turn)
                        yield turn
                        if round == 0 and question.what == "megahf convert":
                            check(gb, format, target)
            finally:
                shutil.rmtree(source, ignore_errors=True)
                shutil.rmtree(target, ignore_errors=True)


def say(turn: Turn) -> None:
    which = f"{turn.gb:g} GB {turn.format}, round {turn.round + 1}: {turn.what}"
    print(f"{which}: {turn.seconds:.2f} s, {turn.cpu_seconds:.2f} s of CPU, {turn.peak_mb:.0f} MB", flush=True)


COLUMNS = ("checkpoint", "what", "min s", "median s", "x cp, min", "x cp, median", "goal", "CPU s", "peak MB")


def table(turns: Sequence[Turn]) -> str:
    """One row for each question: minima and medians, and how many times `cp` they took."""
    rows = []
    for gb, format in dict.fromkeys((turn.gb, turn.format) for turn in turns):
        by = {q.what: [t for t in turns if (t.gb, t.format, t.what) == (gb, format, q.what)] for q in questions()}
        cp = [turn.seconds for turn in by["cp -r"]]
        for question in questions():
            seconds = [turn.seconds for turn in by[question.what]]
            low, middle = min(seconds), statistics.median(seconds)
            cpu = statistics.median(turn.cpu_seconds for turn in by[question.what])
            peak = max(turn.peak_mb for turn in by[question.what])
            figures = (low, middle, low / min(cp), middle / statistics.median(cp))
            shown = [f"{figure:.2f}" for figure in figures]
            rows.append((f"{gb:g} GB {format}", question.what, *shown, question.goal, f"{cpu:.2f}", f"{peak:.0f}"))
    return markdown(COLUMNS, rows)


def disk(path: Path) -> str:
    """Device and file system that `path` is on."""
    done = subprocess.run(["df", "--output=source,fstype", path], capture_output=True, text=True)
    return " ".join(done.stdout.splitlines()[-1].split()) if done.returncode == 0 else "unknown"


def page(turns: Sequence[Turn]) -> str:
    return f"""# `megahf convert` against `cp -r`

{table(turns)}

Times include a sync. "The copy" is everything after planning; the goal of the whole command is 0.3 more, at 6 GB.
`--dry-run` is start-up and planning alone. CPU seconds (median) and peak resident memory (largest) are of the whole
process. Every turn found the source in the page cache and no target; turns alternate."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[2, 6])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS[:2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="where to work; a new folder beside the repository's files by default")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.dir or REPOSITORY) as root:
        where = disk(Path(root))
        turns = list(measured(given.gb, given.formats, given.rounds, Path(root)))
    facts = (
        f"command: `{command('--dir')}`",
        f"hardware: {machine()}, {where}; load when it began {load:.1f}",
        f"versions: {versions('megahf', 'numpy', 'blake3', 'torch')}",
    )
    header = [field.name for field in fields(Turn)]
    what = "convert_experts" if all(format.startswith("experts:") for format in given.formats) else "convert"
    path = write(what, [header, *(astuple(turn) for turn in turns)], page(turns), facts)
    print(f"\n{table(turns)}\n\nwrote {path}.csv and .md")


if __name__ == "__main__":
    main()
