"""Promise: a compiled graph is told of our kernels' results the shapes, strides and dtypes that they have.

Only inductor holds them to it, on a GPU; `aot_eager` takes whatever comes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import placed
from test_gpu_graphs import CASES, outcome

from megahf.models import kernel_choice
from megahf.models.kernel_choice import only


class Told(TorchDispatchMode):
    """Compares what our ops give with what they would be said to give, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace.startswith("megahf"):
            self.ops.append(func.overloadpacket.__name__)
            with FakeTensorMode() as mode:
                told = func(*tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, args))
            assert laid_out(told) == laid_out(results), func
        return results


def laid_out(results: Any) -> list[tuple[Any, ...]]:
    """Of every tensor, but for strides over what is one or none."""
    return [
        (t.shape, [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1], t.dtype)
        for t in tree_leaves(results)
    ]


@pytest.mark.parametrize("name", CASES)
def test_what_is_told_is_what_comes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, inputs = CASES[name]()
    monkeypatch.setattr(kernel_choice, "architecture", lambda device: 90)
    for module in placed.MODULES:
        monkeypatch.setattr(module, "launch", lambda *launched, **options: None)  # whatever lies in memory is as good
    with only("triton"), Told() as told:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that ops are called, not functions
        outcome(function, inputs)
    assert len(told.ops) >= 2, "forwards and backwards"
