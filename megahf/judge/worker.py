"""One process of a pool: patches, imports Megatron once, then does one case after another until told to stop.

Run as `python -m megahf.judge.worker FILE_DESCRIPTOR RANK`.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from megahf.judge import cpu

COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def main(descriptor: int, rank: int) -> None:
    """Serves cases; a closed connection is an end like any other."""
    connection = Connection(descriptor)
    cpu.patch()
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    connection.send(store.port if store else None)
    try:
        while order := connection.recv():
            connection.send(answer(rank, store, **order))
    except EOFError:
        pass


def answer(rank: int, store: Any, case: int, port: int, world: int, task: str, arguments: dict[str, Any]) -> Any:
    """(True, what the task returned) or (False, the traceback as text)."""
    import torch

    from megahf.judge.tasks import TASKS

    store = store or torch.distributed.TCPStore("127.0.0.1", port)
    try:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.PrefixStore(f"case {case}", store),
            rank=rank,
            world_size=world,
            timeout=COLLECTIVE_TIMEOUT,
        )
        value = TASKS[task](**arguments)
        torch.distributed.barrier()  # nobody leaves while another still talks to it
        return True, value
    except Exception:
        return False, traceback.format_exc()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes end a process by a signal on the ordinary way out
