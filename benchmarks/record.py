"""What every record of a benchmark says: the table, the command, the date, the hardware, the versions."""

from __future__ import annotations

import csv
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def hardware() -> str:
    """For a file's name: `2core-x86_64`."""
    return f"{os.cpu_count()}core-{platform.machine()}"


def machine() -> str:
    """Cores, processor and memory, in words."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return f"{os.cpu_count()} cores of {processor()}, {memory:.0f} GB of memory"


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def versions(*packages: str) -> str:
    named = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    return f"Python {platform.python_version()}, {named}, Linux {platform.release()}"


def command(*without: str) -> str:
    """The command line, less options (with their one value) that only say something about one machine."""
    arguments = list(sys.argv[1:])
    for option in without:
        if option in arguments:
            at = arguments.index(option)
            del arguments[at : at + 2]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write(what: str, csv_rows: Sequence[Sequence[object]], page: str, facts: Sequence[str]) -> Path:
    """`results/<what>_<hardware>_<date>.csv` and `.md`; the first of `csv_rows` is the header."""
    now = datetime.now(UTC)
    path = RESULTS / f"{what}_{hardware()}_{now:%Y-%m-%d}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows(csv_rows)
    lines = "\n".join(f"- {fact}" for fact in (f"date: {now:%Y-%m-%d %H:%M} UTC", *facts))
    path.with_suffix(".md").write_text(f"{page}\n\n{lines}\n")
    return path
