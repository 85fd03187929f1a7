"""Promise: a compiled graph is told of our kernels' results the shapes, strides and dtypes that they have.

Only inductor holds them to it, on a GPU; `aot_eager` takes whatever comes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import placed
from placed import without
from test_gpu_graphs import CASES, outcome

from megahf.models import conv, ssd
from megahf.models.kernel_choice import only

Call = tuple[str, tuple[Any, ...], Any]


def listened(patch: pytest.MonkeyPatch, module: ModuleType, public: str, function: Any, calls: list[Call]) -> None:
    name = f"{re.sub(r'\W', '_', function.__module__)}::{function.__name__}"

    def call(*args: Any) -> Any:
        results = function(*args)
        calls.append((name, args, results))
        return results

    for user in placed.MODULES:  # under whatever name it was imported
        for other, held in list(vars(user).items()):
            if held is getattr(module, public):
                patch.setattr(user, other, call)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Of our ops in the interpreter: which, with what, and what came out."""
    found: list[Call] = []
    with without(), only("triton"):
        for module in placed.MODULES:
            for public in ("forward", "backward", "update"):
                call = vars(module).get(public)
                if call is not None and call.__closure__ and call.__globals__["__name__"].endswith("kernel_choice"):
                    function = next(c.cell_contents for c in call.__closure__ if type(c.cell_contents).__name__ == "function")
                    listened(monkeypatch, module, public, function, found)
        yield found


def laid_out(results: Any) -> list[tuple[Any, ...]]:
    """Of every tensor, but for strides over what is one or none."""
    results = [results] if isinstance(results, Tensor) else list(results)
    return [(t.shape, [step for size, step in zip(t.shape, t.stride(), strict=True) if size > 1], t.dtype) for t in results]


@pytest.mark.parametrize("name", [name for name in CASES if name != "grouped"])
def test_what_is_told_is_what_comes(name: str, calls: list[Call]) -> None:
    function, inputs = CASES[name]()
    outcome(function, inputs)
    assert len(calls) >= 2, "forwards and backwards"
    for op, args, results in calls:
        space, function_name = op.split("::")
        with FakeTensorMode() as mode:
            told = getattr(getattr(torch.ops, space), function_name)(
                *(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in args)
            )
        assert laid_out(told) == laid_out(results), op


def test_both_recurrences_and_the_convolution_are_reached_by_their_modules() -> None:
    assert conv.triton_conv1d.__module__.endswith("triton_conv") and ssd.triton_ssd_scan is not None
