"""Conversions that die at a chosen moment, in a process of their own; and disks that are full at one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

# Converts, and dies at the given event: before or after a call that moves bytes, or at any call that names the target.
CHILD = """
import json, os, signal, sys
from megahf.export import convert
source, target, options, last = *sys.argv[1:3], json.loads(sys.argv[3]), int(sys.argv[4])
count = 0
def audited(name, arguments):
    if any(target in str(argument) for argument in arguments):
        event()
def event():
    global count
    count += 1
    if count == last:
        os.kill(os.getpid(), signal.SIGKILL)
def counted(call):
    def inner(*arguments):
        event()
        result = call(*arguments)
        event()
        return result
    return inner
for name in ("pwrite", "preadv", "fsync", "rename"):
    setattr(os, name, counted(getattr(os, name)))
sys.addaudithook(audited)
convert(source, target, **options)
print(count)
"""


def child(source: Path, target: Path, options: dict[str, Any], last: int = -1) -> subprocess.CompletedProcess[str]:
    """Converts in another process, which dies at the event number `last`, and else says how many events it had."""
    command = [sys.executable, "-c", CHILD, str(source), str(target), json.dumps(options), str(last)]
    return subprocess.run(command, capture_output=True, text=True)


@contextmanager
def no_space(call: str, step: int) -> Iterator[None]:
    """`os.call` finds the disk full after `step` uses."""
    real, steps = getattr(os, call), iter(range(step))

    def full(*arguments: object, **options: object) -> object:
        if next(steps, None) is None:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    with patch.object(os, call, full):
        yield
