"""Where the tests of this folder run: on an NVIDIA GPU; without one the first case of each in Triton's interpreter.

So that helpers and kernels are called here as there, long before somebody has a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch's matmuls give the same bits, too


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """With our kernels alone, and memory that holds NaN until something is stored."""
    pytest.importorskip("triton", minversion="3.6", reason="the kernels are Triton's")
    from placed import without

    there = torch.cuda.is_available()
    case = getattr(request.node, "callspec", None)
    if not there and case is not None and any(case.indices.values()):
        pytest.skip("needs a CUDA device")
    from megahf.models.kernel_choice import only

    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills memory
    with only("triton"), nullcontext() if there else without():
        yield torch.device("cuda" if there else "cpu")
    torch.use_deterministic_algorithms(False)
