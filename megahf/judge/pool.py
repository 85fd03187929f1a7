"""A group of worker processes, started once, that many cases are sent to."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from megahf.errors import refuse
from megahf.judge import require_megatron
from megahf.judge.cpu import ENVIRONMENT

START_TIMEOUT = 120.0  # seconds to import torch and Megatron, on a busy machine
GRACE = 5.0  # seconds for the other ranks to fail as well once one has


class Failed(Exception):
    """A case failed in the workers; carries their tracebacks."""


LOST = object()


def received(connection: Connection) -> Any:
    try:
        return connection.recv()
    except (EOFError, OSError):  # ended, or ended while it wrote
        return LOST


def failed(answer: object) -> bool:
    return answer is LOST or (isinstance(answer, tuple) and answer[0] is False)


class Worker(NamedTuple):
    process: subprocess.Popen[bytes]
    connection: Connection
    log: Path


class Pool:
    """Up to `size` processes with real Megatron-core in them.

    A case runs on the first `world` of them as a process group of its own, the rest wait. A case that fails or hangs is
    reported as `Failed` and never stands in the way of the next one: if need be the processes are replaced.
    """

    def __init__(self, size: int = 4) -> None:
        require_megatron()
        self.size = size
        self.workers: list[Worker] = []
        self.port = self.cases = 0
        self.folder = tempfile.TemporaryDirectory(prefix="megahf-judge-")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def run(self, task: str, world: int, timeout: float = 180.0, **arguments: Any) -> list[Any]:
        """What each of `world` ranks returned for `task`, a name in `tasks.TASKS`.

        Raises:
            Failed: with the tracebacks of the ranks that failed, or after `timeout` seconds.
        """
        if world > self.size:
            raise refuse(f"the case needs {world} processes, the judge has {self.size}", "", "give it more")
        if not self.workers:
            self.start()
        self.cases += 1
        order = {"case": self.cases, "port": self.port, "world": world, "task": task, "arguments": arguments}
        for worker in self.workers[:world]:
            with suppress(OSError):  # one that died meanwhile has no answer either
                worker.connection.send(order)
        answers = self.collect(self.workers[:world], timeout)
        if all(good for good, _ in answers):
            return [value for _, value in answers]
        raise Failed("\n".join(f"rank {rank}: {value}" for rank, (good, value) in enumerate(answers) if not good))

    def start(self) -> None:
        self.workers = [self.spawn(rank) for rank in range(self.size)]
        ports = self.collect(self.workers, START_TIMEOUT)
        if not isinstance(ports[0], int):
            raise Failed(f"the judge did not start: {ports}")
        self.port = ports[0]

    def spawn(self, rank: int) -> Worker:
        ours, theirs = Pipe()
        log = Path(self.folder.name) / f"{rank}.log"
        root = Path(__file__).parents[2]  # the worker imports the same megahf as this process
        path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "megahf.judge.worker", str(theirs.fileno()), str(rank)],
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        theirs.close()
        return Worker(process, ours, log)

    def collect(self, workers: list[Worker], timeout: float) -> list[Any]:
        """One answer from each worker; where one does not come, all processes are ended."""
        answers: dict[Connection, Any] = {}
        deadline = time.monotonic() + timeout
        while waiting := [worker.connection for worker in workers if worker.connection not in answers]:
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                answers[connection] = received(connection)
                if failed(answers[connection]):
                    deadline = min(deadline, time.monotonic() + GRACE)
        told = [answers.get(worker.connection) for worker in workers]
        lost = [worker for worker in workers if answers.get(worker.connection, LOST) is LOST]
        for worker in lost:
            told[workers.index(worker)] = (False, f"died or gave no answer\n{worker.log.read_text()[-2000:]}")
        if lost:
            self.end()
        return told

    def end(self) -> None:
        """Ends the processes at once; the next case starts new ones."""
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self.workers = []

    def close(self) -> None:
        """Lets the processes end, and ends those that do not."""
        for worker in self.workers:
            try:
                worker.connection.send(None)
                worker.process.wait(timeout=GRACE)
            except (OSError, subprocess.TimeoutExpired):
                break
        self.end()
        self.folder.cleanup()
