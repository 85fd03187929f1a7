"""Fetches transformers' own model tests: `python tests/fetch_transformers_tests.py DEST VERSION`.

They are in its source distribution, not in its wheel, and are not copied into this repository. They land in
DEST/VERSION/transformers_tests, a package. The few of their imports that the distribution lacks are written here.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "transformers_tests"
ATTEMPTS = 3

RANKS = '''"""Runs a function in one process a rank, on the CPU over gloo."""

import multiprocessing
import os
import socket
import time

import torch
import torch.distributed as dist

SECONDS = 240  # a rank that takes longer hangs
# Ranks are forks of one server that has imported torch and transformers, not of a test process with its threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "transformers.modeling_utils"])


def _get_distributed_backend():
    return "gloo"


def _get_distributed_device_type():
    return "cpu"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


def _start_rank_processes(function, args, nprocs):
    ranks = [CONTEXT.Process(target=function, args=(rank, *args), daemon=True) for rank in range(nprocs)]
    end = time.monotonic() + SECONDS
    try:
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks) and time.monotonic() < end:
            if any(process.exitcode for process in ranks):
                break
            time.sleep(0.05)
        codes = [process.exitcode for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    if any(codes) or None in codes:
        raise RuntimeError(f"exit codes of the ranks: {codes}; None: killed, as another failed or after {SECONDS} s")


def _run_rank(rank, function, world_size, port, args):
    os.environ.update(WORLD_SIZE=str(world_size), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size):
    def decorate(function):
        def run(*args):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            _start_rank_processes(_run_rank, (function, world_size, port, args), world_size)

        return run

    return decorate
'''

COMMON_CONFIG = '''"""Fields that any configuration takes, with values that are not their defaults."""

config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["SomeModel"],
    "id2label": {0: "one", 1: "two"},
    "label2id": {"one": 0, "two": 1},
    "problem_type": "regression",
}
'''

# What transformers' test files import from their own tree and its source distribution does not carry. The testers of
# generation and export are empty: their tests are not to be had; tests/test_generate.py is our own of the former.
WRITTEN = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": COMMON_CONFIG,
    "distributed_testing_utils.py": RANKS,
}


def download(version: str, folder: Path) -> Path:
    """The source distribution of transformers `version`, fetched with pip into `folder`.

    Raises:
        SystemExit: pip could not, in its own words.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # pip asks a source distribution for its metadata, which takes setuptools: this environment's, if it has it.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    command = [*pip, *isolation, "--no-binary", "transformers", "--dest", str(folder), f"transformers=={version}"]
    for _ in range(ATTEMPTS):
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(folder.glob("transformers-*.tar.gz"))
        if done.returncode == 0 and found:
            return found[0]
    raise SystemExit(f"pip cannot fetch the sources of transformers {version}:\n{done.stdout}{done.stderr}")


def unpack(archive: Path, package: Path) -> None:
    """Writes the archive's tests/test_*.py as the package."""
    with tarfile.open(archive) as tar:
        for member in tar:
            path = Path(member.name)
            if member.isfile() and path.parts[1:-1] == ("tests",) and path.match("test_*.py"):
                content = tar.extractfile(member)
                if content is not None:
                    (package / path.name).write_bytes(content.read())


def complete(package: Path) -> None:
    """Writes what the package's files import and the source distribution lacks."""
    for name, text in WRITTEN.items():
        path = package / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def main(destination: str, version: str) -> None:
    target = Path(destination) / version
    if target.is_dir():
        complete(target / PACKAGE)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        staged = Path(folder) / version
        (staged / PACKAGE).mkdir(parents=True)
        unpack(download(version, Path(folder)), staged / PACKAGE)
        complete(staged / PACKAGE)
        shutil.move(staged, target)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python tests/fetch_transformers_tests.py DEST VERSION")
    main(sys.argv[1], sys.argv[2])
