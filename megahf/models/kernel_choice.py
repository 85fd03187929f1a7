"""Which kernels run: those of installed packages, ours in Triton, or none, which leaves torch's ops.

Every kernel has a twin in plain torch that gives the same. Kernels run on NVIDIA GPUs; those of packages wherever they
are installed, ours, which Triton's interpreter and compiler have checked and no GPU has run yet, only when asked for:
`with only("packages", "triton"):`, or `MEGAHF_KERNELS=packages,triton` in the environment. `only()` leaves out all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

try:
    import triton
    import triton.language as tl
except Exception:  # not installed, or for another torch, which may raise anything
    triton = tl = None

KINDS = ("packages", "triton")  # causal-conv1d and mamba-ssm before ours, for whoever installed them wants them
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIED = ["length", "rows", "span", "parts", "tiles"]  # often others: nothing is compiled anew for multiples of 16
OLDEST = 80  # compute capability times ten, Ampere's


def kinds(text: str) -> tuple[str, ...]:
    """What `MEGAHF_KERNELS` says: some of `KINDS` between commas, or `none`."""
    named = tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))
    if unknown := [name for name in named if name not in KINDS]:
        raise ValueError(f"there are no kernels called {unknown[0]!r}; give some of {', '.join(KINDS)}, or none")
    return named


allowed: tuple[str, ...] = kinds(os.environ.get("MEGAHF_KERNELS", "packages"))


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Inside, only these of `KINDS` run: in the whole process, and compiled graphs are compiled anew."""
    global allowed
    before, allowed = allowed, kinds(",".join(names))
    try:
        yield
    finally:
        allowed = before


def may_run(kind: str) -> bool:
    return kind in allowed


def takes(*tensors: Tensor | None) -> bool:
    """Whether our kernels run on these: not empty, of a dtype that is summed in float32, on one GPU new enough.

    Not on subclasses of tensors, which may be spread over devices or not be there at all.
    """
    if triton is None or not may_run("triton"):
        return False
    given = [t for t in tensors if t is not None]
    if not all(type(t) in (Tensor, nn.Parameter) and t.dtype in DTYPES and t.numel() for t in given):
        return False
    return len({t.device for t in given}) == 1 and architecture(given[0].device) >= OLDEST


@torch.compiler.assume_constant_result
def architecture(device: torch.device) -> int:
    """80, 90, 100, ...: the generation of an NVIDIA GPU; 0 for anything else."""
    if device.type != "cuda" or torch.version.cuda is None:
        return 0
    return 10 * torch.cuda.get_device_capability(device)[0]


def jit(function: Callable[..., Any]) -> Any:
    """`function` as a kernel, or part of one; where there is no Triton it stays as it is, and is never called."""
    return function if triton is None else triton.jit(function, do_not_specialize=VARIED)


def launch(kernel: Any, programs: tuple[int, ...], first: Tensor, /, *rest: Any, **options: Any) -> None:
    """Runs `kernel` on the GPU that `first`, its first argument, is on, which need not be the current one."""
    with torch.cuda.device_of(first):
        kernel[programs](first, *rest, **options)


def operator(function: Callable[..., Any], schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`function` to be called from anywhere: in a compiled graph it is one op, which is not looked into.

    Named after its module: a saved model's code is one more, and each version is to find its own.

    Args:
        schema: as `torch.library` writes it; `Tensor(a!)` is changed in place.
        fake: gives tensors of the results' shapes, strides and dtypes, from the same arguments.
    """
    name = re.sub(r"\W", "_", function.__module__) + "::" + function.__name__
    changed = re.findall(r"Tensor\(\w!\) (\w+)", schema)
    op = torch.library.custom_op(name, function, mutates_args=changed, schema=schema)
    op.register_fake(fake)

    def call(*args: Any) -> Any:
        return (op if torch.compiler.is_compiling() else function)(*args)

    return call
