"""What the benchmarks of models measure: seconds of a prefill and of steps of decoding, and memory at its peak."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Model = Callable[..., object]


def prompt(length: int, vocabulary: int) -> Tensor:
    """The same tokens `[1, length]` every time."""
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))


def prefill(model: Model, tokens: Tensor) -> float:
    """Seconds of one forward over `[1, s]` tokens, logits of the last position."""
    start = time.perf_counter()
    model(tokens, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - start


def decode(model: Model, tokens: Tensor, count: int) -> list[float]:
    """Seconds of each of `count` greedy steps after a prefill of `[1, s]` tokens."""
    out = model(tokens, logits_to_keep=1, use_cache=True)
    token, cache, seconds = out.logits[:, -1:].argmax(-1), out.past_key_values, []
    for _ in range(count):
        start = time.perf_counter()
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds


def turns(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measured in every round; they take turns, so that what else the machine does falls on all."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items():
            times[name].append(measure())
    return times


def peak(call: Callable[[], object]) -> int:
    """MiB that a call takes at its peak, above what this process, a fresh one that is warm, holds before."""
    ctypes.CDLL(None).malloc_trim(0)  # what loading left on the heap would be filled before the peak rises
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call()
    return (status("VmHWM") - before) // 1024


def status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def in_child(*arguments: object) -> int | None:
    """The number that this script prints last when run with `--child` and these; None if it dies, of memory say."""
    command = [sys.executable, sys.argv[0], "--child", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None
