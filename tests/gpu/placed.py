"""Tensors of the interpreter's tests on another device, lying there as they lay; the tests' small tiles; room for more.

What `recurrence.py` and the other tests make, on the CPU with its generator, is the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import test_triton_conv
import test_triton_grouped
import test_triton_moe
import test_triton_selective_scan
import test_triton_ssd_backward
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from without_gpu import interpreted

from megahf.models import (
    triton_conv,
    triton_grouped,
    triton_layer_norm,
    triton_moe,
    triton_norm,
    triton_route,
    triton_selective_backward,
    triton_selective_forward,
    triton_selective_scan,
    triton_ssd,
    triton_ssd_backward,
    triton_ssd_update,
)

MODULES = (
    triton_conv, triton_grouped, triton_layer_norm, triton_moe, triton_norm, triton_route, triton_selective_backward,
    triton_selective_forward, triton_selective_scan, triton_ssd, triton_ssd_backward, triton_ssd_update,
)  # fmt: skip
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero")  # read back what the GPU found


def small_tiles(patch: pytest.MonkeyPatch) -> None:
    """As in the interpreter's tests: sequences of some tokens are several chunks."""
    test_triton_ssd_backward.sized(patch, **test_triton_ssd_backward.SMALL)
    for test in (test_triton_conv, test_triton_selective_scan, test_triton_grouped, test_triton_moe):
        test.shrink(patch)


@contextmanager
def without() -> Iterator[None]:
    """The interpreter in the place of a GPU."""
    with interpreted(*MODULES) as patch:
        small_tiles(patch)
        yield


def moved(t: Any, device: torch.device) -> Any:
    """A tensor, or all in a list or by name, with the memory around it: strides and offsets stay what they are."""
    if isinstance(t, dict):
        return {name: moved(each, device) for name, each in t.items()}
    if isinstance(t, list | tuple):
        return [moved(each, device) for each in t]
    if not isinstance(t, Tensor):
        return t
    memory = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())  # type: ignore[call-overload]
    lying = memory.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())
    return lying.requires_grad_(t.requires_grad)


def quick(device: torch.device) -> tuple[str, ...]:
    """The kernels for whole models: in the interpreter they would take minutes."""
    return ("triton",) if device.type == "cuda" else ()


def room(device: torch.device, gib: float) -> None:
    """Skips a test that takes more memory than there is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if (free := torch.cuda.mem_get_info(device)[0] / 2**30) < gib:
            pytest.skip(f"needs {gib} GiB of a GPU's memory, of which {free:.0f} are free")


class NoWaiting(TorchDispatchMode):
    """Refuses what cannot be captured: ops that wait for the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"{name} waits for the GPU: no graph can hold it")
        return func(*args, **(kwargs or {}))


def captured(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`call` as one CUDA graph, whose memory is that of its first results; or, elsewhere, `call`, which never waits."""
    if device.type != "cuda":
        with NoWaiting():
            call()
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):  # compiles, and fills what libraries keep
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
