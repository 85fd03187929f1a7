"""What a program of each kernel takes on: its tile, its warps, on each generation of GPUs.

Frozen, so that a call gives the same bits each time and waits for no trials. With `MEGAHF_TUNE=1` in the environment
the first call of its kind times other options on its own inputs, keeps the quickest, and prints the row to put here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch

Options = dict[str, int]  # a kernel's constants by name; those of neighbours are powers of 2
Key = tuple[str, int, str]  # an op, an architecture (80, 90, ...), what else its best options depend on

# Measured rows, which come before the default that an op chooses by registers. No GPU has timed any yet.
TABLE: dict[Key, Options] = {}
TUNE = os.environ.get("MEGAHF_TUNE", "0") not in ("", "0")
NOISE = 0.98  # of the time before is no gain


def options_for(
    key: Key, default: Options, others: Iterable[Options] | None = None, run: Callable[[Options], Any] | None = None
) -> Options:
    """The options of `key`: its row, or `default`.

    Args:
        others: to be tried while tuning; None: those that differ by one number, twice or half as large, step by step.
        run: does all the work with some options, and changes nothing that was there before; None: nothing is tried.
    """
    if not TUNE or run is None or key in TABLE or torch.compiler.is_compiling():
        return TABLE.get(key, default)
    TABLE[key], least = tuned(default, others, run)
    print(f"    {key!r}: {TABLE[key]!r},  # {1e3 * least:.1f} us", file=sys.stderr)
    return TABLE[key]


def tuned(default: Options, others: Iterable[Options] | None, run: Callable[[Options], Any]) -> tuple[Options, float]:
    """The quickest options, and their milliseconds."""
    best, least = default, milliseconds(run, default)
    left = list(neighbours(default) if others is None else others)
    while left:
        other = left.pop(0)
        if (time := milliseconds(run, other)) < NOISE * least:
            best, least = other, time
            left = neighbours(best) if others is None else left
    return best, least


def neighbours(options: Options) -> list[Options]:
    return [{**options, name: to} for name, value in options.items() for to in (value // 2, 2 * value) if to]


def milliseconds(run: Callable[[Options], Any], options: Options) -> float:
    """Of a call on the GPU; infinite where there is not enough shared memory, or the kernel refuses its options."""
    try:
        from triton.testing import do_bench

        return float(do_bench(lambda: run(options), warmup=5, rep=20, return_mode="median"))
    except Exception:  # whatever the compiler or the driver raises
        return float("inf")
