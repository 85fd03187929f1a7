"""A group of worker processes, started once, that many cases are sent to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from megahf.errors import refuse
from megahf.judge import require_megatron
from megahf.judge.cpu import ENVIRONMENT

START_TIMEOUT = 120.0  # seconds to import torch and Megatron, on a busy machine
GRACE = 5.0  # seconds for the other ranks to fail as well once one has
LOST = (False, "died or gave no answer in time")


class Failed(Exception):
    """A case failed in the workers; carries their tracebacks."""


class Pool:
    """`size` processes with real Megatron-core in them, started with the first case.

    A case runs on the first `world` of them as a process group of its own, the rest wait. A case that fails or hangs is
    reported as `Failed` and never stands in the way of the next one: if need be the processes are replaced.
    """

    def __init__(self, size: int = 4) -> None:
        require_megatron()
        self.size = size
        self.process: subprocess.Popen[bytes] | None = None
        self.connections: list[Connection] = []
        self.pids: list[int] = []
        self.port = self.cases = 0
        self.folder = tempfile.TemporaryDirectory(prefix="megahf-judge-")
        self.log = Path(self.folder.name) / "log"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(self, task: str, world: int, timeout: float = 180.0, **arguments: Any) -> list[Any]:
        """What each of `world` ranks returned for `task`, a name in `tasks.TASKS`.

        Raises:
            Failed: with the tracebacks of the ranks that failed, or after `timeout` seconds.
        """
        if world > self.size:
            raise refuse(f"the case needs {world} processes, the judge has {self.size}", "", "give it more")
        if self.process is None:
            self.start()
        self.cases += 1
        order = {"case": self.cases, "port": self.port, "world": world, "task": task, "arguments": arguments}
        for connection in self.connections[:world]:
            with suppress(OSError):  # a rank that died meanwhile gives no answer either
                connection.send(order)
        return self.collect(self.connections[:world], timeout)

    def start(self) -> None:
        pairs = [Pipe() for _ in range(self.size)]
        self.connections = [ours for ours, _ in pairs]
        descriptors = [theirs.fileno() for _, theirs in pairs]
        root = str(Path(__file__).parents[2])  # the workers import the same megahf as this process
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megahf.judge.worker", *map(str, descriptors)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of their own, to be ended together
            )
        for _, theirs in pairs:
            theirs.close()
        told = self.collect(self.connections, START_TIMEOUT)
        self.pids, self.port = [pid for pid, _ in told], told[0][1]

    def collect(self, connections: list[Connection], timeout: float) -> list[Any]:
        """The value each rank answers with; where an answer does not come, all processes are ended."""
        answers: dict[Connection, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while waiting := [connection for connection in connections if connection not in answers]:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            answers |= {
                each: received(each) if each in ready else LOST for each in waiting if each in ready or not ready
            }
            if any(not good for good, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + GRACE)
        told = [answers[connection] for connection in connections]
        if LOST in told:
            self.end()
        if any(not good for good, _ in told):
            raise Failed(f"{reasons(told)}\n{self.log.read_text()[-2000:] if LOST in told else ''}")
        return [value for _, value in told]

    def end(self) -> None:
        """Ends the processes at once; the next case starts new ones."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for connection in self.connections:
            connection.close()
        self.process, self.connections, self.pids = None, [], []

    def close(self) -> None:
        """Lets the processes end, and ends those that do not."""
        for connection in self.connections:
            with suppress(OSError):
                connection.send(None)
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=GRACE)
        self.end()
        self.folder.cleanup()


def received(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = connection.recv()
        return answer
    except (EOFError, OSError):  # the rank ended, or ended while it wrote
        return LOST


def reasons(answers: list[tuple[bool, Any]]) -> str:
    """The tracebacks among the answers, each once, with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for rank, (good, value) in enumerate(answers):
        if not good:
            ranks.setdefault(value, []).append(str(rank))
    return "\n".join(f"rank {', '.join(which)}: {why}" for why, which in ranks.items())
