"""What every test runs under: one thread a process, no network, and no deadlines: a machine may be busy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile("megahf", deadline=None, max_examples=50)
settings.load_profile("megahf")

SUITE_MARKS = ("is_training_test", "is_tensor_parallel_test", "is_expert_parallel_test", "is_fsdp_test")
OTHER_MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test")


@pytest.fixture
def inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A compiler that finds no kernels of other runs (their key does not name the CPU) and counts no other tests'."""
    import torch  # not above: it reads the number of threads as it is imported

    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler: torch.compile cannot be tested here; install g++ or set CXX")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pytest_configure(config: pytest.Config) -> None:
    for mark in (*SUITE_MARKS, *OTHER_MARKS, "slow", "order"):
        config.addinivalue_line("markers", f"{mark}: a mark of transformers' own tests")
