"""The processes of a pool: one imports torch and Megatron, then forks into the ranks, which do case after case.

Run as `python -m megahf.judge.worker DESCRIPTOR...`, a connected socket for each rank. Importing takes seconds of a
core, forking none, and what was imported is in memory once.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megahf.judge import cpu

if TYPE_CHECKING:
    from torch.distributed import TCPStore

IMPORTED = (
    "torch.distributed.checkpoint",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.models.mamba",
    "megahf.judge.tasks",
)
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def main(descriptors: list[int]) -> None:
    """Forks a rank for each descriptor and waits for them all."""
    prepare()
    for rank, descriptor in enumerate(descriptors):
        if os.fork() == 0:
            for other in descriptors:
                if other != descriptor:  # else a rank that dies would keep its socket open in its siblings
                    os.close(other)
            serve(rank, Connection(descriptor))
            return
    for descriptor in descriptors:
        os.close(descriptor)
    for _ in descriptors:
        os.wait()


def prepare() -> None:
    """Imports everything that a case needs, while there is one process and no thread."""
    cpu.patch()
    for name in IMPORTED:
        import_module(name)


def serve(rank: int, connection: Connection) -> None:
    """Tells its process id and, for rank 0, the port of the store; then answers until the connection closes."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    connection.send((True, (os.getpid(), store.port if store else 0)))
    try:
        while order := connection.recv():
            connection.send(answer(rank, store, **order))
    except EOFError:
        pass


def answer(
    rank: int, store: TCPStore | None, case: int, port: int, world: int, task: str, arguments: dict[str, Any]
) -> tuple[bool, Any]:
    """(True, what the task returned) or (False, the traceback as text)."""
    import torch
    from torch.distributed import PrefixStore, TCPStore

    from megahf.judge.tasks import TASKS

    try:
        shared = PrefixStore(f"case {case}", store or TCPStore("127.0.0.1", port))
        torch.distributed.init_process_group(
            "gloo", store=shared, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
        value = TASKS[task](**arguments)
        torch.distributed.barrier()  # nobody leaves while another still talks to it
        return True, value
    except BaseException:  # torch's CheckpointException is no Exception
        return False, traceback.format_exc()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main([int(descriptor) for descriptor in sys.argv[1:]])
    sys.stdout.flush()
    os._exit(0)  # the ordinary way out takes seconds, and gloo's threads sometimes make a signal of it
