"""Promise: what the pages of `conversion/` show is what happens: their commands and their Python print what is there.

On a page, `...` stands for what was left out: by itself any lines, within a line any characters. Seconds and rounding
errors of logits are whatever they are.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from small import megahf

import megahf as package
from megahf.tensor_sizes import sensible_tp

PAGES = Path(__file__).parents[1] / "conversion"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)\n", re.MULTILINE)
ELSEWHERE = ("megahf demo --keep", "megahf demo --hybrid")  # the one downloads, the other ends in sampled text
VARIES = {r"\b\d+(\.\d+)? s\b": "0 s", r"\b\d\.\de-\d\d\b": "0"}


class Step(NamedTuple):
    """What a page has done, and what it says is printed; None: nothing is said."""

    python: bool
    done: str
    printed: str | None


def steps(page: str) -> Iterator[Step]:
    """The commands and the Python of a page, in order."""
    blocks = [found.groups() for found in BLOCK.finditer(page)]
    for number, (language, text) in enumerate(blocks):
        if language == "python":
            following, output = blocks[number + 1] if number + 1 < len(blocks) else ("python", "")
            says = not following and not output.startswith("$ ")
            yield Step(True, text, output if says else None)
        elif text.startswith("$ "):
            parts = COMMAND.split(text)[1:]
            for command, printed in zip(parts[::2], parts[1::2], strict=True):
                yield Step(False, command, printed)


def run(step: Step) -> str:
    """What a step prints. The demo has processes of its own, which print past a caller in this one."""
    if step.python:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(step.done, {})
        return out.getvalue()
    program, *words = shlex.split(step.done)
    assert program == "megahf", f"a command that is not run here: {step.done}"
    if words[0] == "demo":
        command = [sys.executable, "-m", "megahf.cli", *words]
        place = {"PYTHONPATH": str(Path(package.__file__).parents[1])}
        return subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True).stdout
    return megahf(*words).output


def agrees(printed: str, shown: str) -> bool:
    """Whether `shown`, with its omissions, is what was printed; spaces at the ends of lines do not count."""
    pattern = ""
    for line in map(settled, shown.splitlines()):
        pattern += r"(?:.*\n)*" if line == "..." else ".*".join(map(re.escape, line.split("..."))) + r"\n"
    return re.fullmatch(pattern, "".join(f"{settled(line)}\n" for line in printed.splitlines())) is not None


def settled(line: str) -> str:
    """A line of output without what differs from run to run."""
    for varies, always in VARIES.items():
        line = re.sub(varies, always, line)
    return line.rstrip()


@pytest.mark.parametrize("page", sorted(path.name for path in PAGES.glob("*.md") if "\n$ " in path.read_text()))
def test_a_page_shows_what_happens(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conversion").symlink_to(PAGES)
    monkeypatch.chdir(tmp_path)
    package.register()  # no code of the folders made here is put into transformers' cache
    for step in steps((PAGES / page).read_text()):
        if not step.done.startswith(ELSEWHERE):
            printed = run(step)
            assert step.printed is None or agrees(printed, step.printed), f"{step.done}\nprinted\n{printed}"


@pytest.mark.parametrize(
    ("shown", "right"),
    [
        ("one\n  two ... 3.0 s\nthree\n", True),
        ("...\nthree\n", True),
        ("one\n...\n  two done, ...\nthree\n", True),
        ("one\nthree\n", False),
        ("one\n...\n", True),
        ("one\n", False),
        ("one\n  two ... 3.0 s\nthree\n...\nfour\n", False),
        ("two\n...\n", False),
        ("...\nthree\n...\n  two\n...\n", False),
        ("", False),
    ],
)
def test_a_page_that_shows_something_else_is_found(shown: str, right: bool) -> None:
    assert agrees("one\n  two done, 2.1 s\nthree\n", shown) is right


def test_the_ranks_on_the_page_are_the_rule_s() -> None:
    """Sizes are those of the models' own configs."""
    table = re.search(r"\| `--tp` \|([\d |]+)\|\n", (PAGES / "README.md").read_text())
    assert table is not None
    llama3 = {"vocab_size": 128256, "num_query_groups": 8, "activation_func": "silu", "gated_linear_unit": True}
    llama3 |= {"tie_word_embeddings": False, "add_bias_linear": False, "position_embedding_type": "rope"}
    mixtral = {**llama3, "vocab_size": 32000, "num_experts": 8}
    sizes = ((llama3, 32, 4096, 14336, 32), (llama3, 80, 8192, 28672, 64))
    sizes += ((mixtral, 32, 4096, 14336, 32), (mixtral, 56, 6144, 16384, 48))
    found = [
        sensible_tp(
            package.McoreGPTConfig(
                **kind, num_layers=layers, hidden_size=hidden, ffn_hidden_size=width, num_attention_heads=heads
            )
        )
        for kind, layers, hidden, width, heads in sizes
    ]
    assert [int(ranks) for ranks in table[1].split("|")] == found
