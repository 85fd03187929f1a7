"""One comparison of an op: what is called, what it should give, what it is compared with, how fast it could be."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megahf.models.kernel_choice import only

Call = Callable[[], Any]


class Other(NamedTuple):
    """A baseline, and how many times our time its own should be."""

    call: Call
    goal: float | None = None


@dataclass
class Case:
    """
    Args:
        ours: gives the tensors that are compared with those of `exact`, as all calls of `others` may.
        tolerance: of the largest difference, relative to the norm.
        moved: bytes that have to be read or written.
        multiplied: operations of matmuls that have to be done.
        graph: whether it is measured in a CUDA graph, as decoding runs.
    """

    op: str
    shape: str
    dtype: str
    ours: Call
    exact: Call
    others: dict[str, Other] = field(default_factory=dict)
    tolerance: float = 1e-2
    moved: float = 0
    multiplied: float = 0
    graph: bool = False

    def error(self) -> float:
        pairs = zip(tensors(self.ours()), tensors(self.exact()), strict=True)
        return max(float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in pairs)


Cases = Iterable[partial[Case]]  # made one by one: each takes a good part of the memory


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)


def under(kinds: str, call: Callable[..., Any], *args: Any, **options: Any) -> Call:
    """`call(*args)` with these kernels alone; `""` for torch's ops."""

    def run() -> Any:
        with only(kinds):
            return call(*args, **options)

    return run


def without_gradients(call: Call) -> Call:
    return torch.no_grad()(call)


def with_gradients(call: Call, leaves: list[Tensor]) -> Call:
    """Forward and backward: the gradients of the leaves, for the same random upstream gradient every time."""
    upstream: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        out = tensors(call())[0]
        if not upstream:
            generator = torch.Generator(out.device).manual_seed(0)
            upstream.append(torch.randn(out.shape, generator=generator, device=out.device).bfloat16().to(out.dtype))
        return torch.autograd.grad(out, leaves, upstream[0])

    return run


def installed(module: str, name: str) -> Callable[..., Any] | None:
    """A function of a package that may not be there, or not for this torch, which may raise anything."""
    try:
        return getattr(importlib.import_module(module), name)
    except Exception:
        return None


def normal(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.float32).mul_(scale).to(dtype)


def bytes_of(*given: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in given if t is not None)
