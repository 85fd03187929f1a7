"""Triton's kernels without a GPU: run by its interpreter, and compiled for one as a wrapper would launch them.

`interpreted` swaps a module's kernels for Triton's interpreter, repaired where it is wrong about bfloat16. `compiled`
has whole wrappers run on the CPU's tensors, with a driver that compiles each launch for an architecture and launches
nothing: wrong arguments, too much shared memory and spilled registers are found, wrong results are not.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", minversion="3.6", reason="kernels are checked with Triton 3.6 or later")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler.compiler import CompiledKernel  # noqa: E402
from triton.experimental import gluon  # noqa: E402, F401  (loaded at the first launch, and wants unchanged functions)
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from megahf.models import kernel_choice  # noqa: E402

SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program can have; sm_86 has what 80 is given
MULTIPLIES = r"wgmma\.mma_async|tcgen05\.mma|\bmma\.sync"  # what tensor cores do, in PTX
NEWEST = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
MOST_SPILLS = 16
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[pytest.MonkeyPatch]:
    """Inside, the modules' kernels run on the CPU's tensors, and are chosen for them."""
    with pytest.MonkeyPatch.context() as patch:
        repair(patch)
        patch.setattr(kernel_choice, "architecture", lambda device: 90)
        for module in (tl, tl.standard, *modules):
            for name, kernel in list(vars(module).items()):
                if isinstance(kernel, JITFunction):
                    patch.setattr(module, name, interpreter.InterpretedFunction(kernel.fn))
        with interpreted_language(patch), np.errstate(over="ignore"):  # an exponential may be infinite
            yield patch


def repair(patch: pytest.MonkeyPatch) -> None:
    """bfloat16, which the interpreter holds as bits: rounded to the nearest, multiplied and added as what it is.

    Also with numpy 2.4, which makes no integer of an array of one element.
    """
    builder, tensors = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def rounding_cast(self: Any, source: Any, to: Any) -> Any:
        pair = (source.dtype.scalar, to.scalar)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(widen(source), tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        return cast(self, source, to)

    def real_dot(self: Any, a: Any, b: Any, onto: Any, *rest: Any, **options: Any) -> Any:
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return dot(self, a, b, onto, *rest, **options)
        return interpreter.TensorHandle(np.matmul(widen(a), widen(b)) + onto.data, onto.dtype.scalar)

    def real_binary(self: Any, a: Any, b: Any, op: Any) -> Any:
        half = tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar)
        handle = interpreter.TensorHandle(op(widen(a), widen(b)), tl.float32) if half else binary(self, a, b, op)
        if handle.data.dtype == np.bool_:  # a comparison, which would be spread as what was compared: no mask any more
            return interpreter.TensorHandle(handle.data, tl.int1)
        return interpreter.TensorHandle(narrow(handle.data), tl.bfloat16) if half else handle

    def patch_tensor(tensor: Any, scope: Any) -> None:
        tensors(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patch.setattr(builder, "cast_impl", rounding_cast)
    for name in ("create_fp_ext", "create_fp_trunc"):
        patch.setattr(builder, name, rounding_cast)
    patch.setattr(builder, "create_dot", real_dot)
    patch.setattr(builder, "binary_op", real_binary)
    patch.setattr(interpreter.ScanOps, "generic_scan", sliced_scan)
    patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)


def sliced_scan(self: Any, inputs: Any) -> list[Any]:
    """A scan slice by slice; the interpreter's own goes number by number."""
    slices = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    totals = [[part[0] for part in slices]]
    for parts in zip(*(part[1:] for part in slices), strict=True):
        pairs = zip((*totals[-1], *parts), (*inputs, *inputs), strict=True)
        got = self.combine_fn.fn(*(self.to_tensor(np.ascontiguousarray(part), x.dtype) for part, x in pairs))
        totals.append([part.handle.data for part in (got if isinstance(got, tuple) else (got,))])
    stacked = (np.stack(parts, axis=self.axis) for parts in zip(*totals, strict=True))
    return [self.to_tensor(part, x.dtype) for part, x in zip(stacked, inputs, strict=True)]


@contextmanager
def interpreted_language(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's language does what the interpreter says; it would do so, and half undo it, at each call."""
    namespace = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = interpreter._patch_lang(namespace)
    patch.setattr(interpreter, "_patch_lang", lambda function: interpreter._LangPatchScope())
    try:
        yield
    finally:
        scope.restore()


def widen(handle: Any) -> np.ndarray:
    """What a handle holds, bfloat16 as float32."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == tl.bfloat16 else handle.data


def narrow(data: np.ndarray) -> np.ndarray:
    """float32 as the bits of the nearest bfloat16, as torch rounds."""
    return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()


@dataclass(frozen=True)
class Launched:
    """A kernel as it would have been launched.

    Args:
        registers: of a thread, at most 255.
        spills: instructions that move registers to memory or back.
        shared: bytes of shared memory a program.
        room: how many it can have.
        multiplies: instructions of tensor cores.
        atomics: instructions whose results depend on the order of programs.
        newest: whether tensor cores are driven as the architecture would have it; those before sm_90 have one way.
    """

    name: str
    registers: int
    spills: int
    shared: int
    room: int
    multiplies: int
    atomics: int
    newest: bool

    @property
    def fits(self) -> bool:
        """Whether it can be launched, keeps its values in registers, and gives the same bits each time."""
        return self.shared <= self.room and self.spills <= MOST_SPILLS and not self.atomics


class Driver:
    """A GPU of an architecture as far as Triton asks: everything is compiled for it, and nothing runs."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        self.utils = self
        self.launched: dict[str, Launched] = {}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.architecture], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Triton 3.9 does, once a kernel is forgotten."""

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *launch: None

    def compiled(self, *, src: Any, metadata: Any, metadata_group: Any, **rest: Any) -> None:
        """Triton's listener: told of every kernel, fresh or from its cache."""
        self.launched[metadata["hash"]] = measured(CompiledKernel(src, metadata_group, metadata["hash"]))


@contextmanager
def compiled(architecture: int, *modules: ModuleType) -> Iterator[dict[str, Launched]]:
    """Inside, wrappers of the modules' kernels compile what they would launch; by hash what that was."""
    driver = Driver(architecture)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", driver)
        patch.setattr(triton.knobs.compilation, "listener", driver.compiled)
        for module in (kernel_choice, *modules):
            patch.setattr(module, "architecture", lambda device: architecture, raising=False)
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    patch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
        yield driver.launched


def measured(kernel: CompiledKernel) -> Launched:
    """What the assembler made of it."""
    instructions = disassembled(kernel.asm["cubin"])
    registers = re.findall(r"\bR(\d+)\b", instructions)
    return Launched(
        kernel.metadata.name,
        1 + max(map(int, registers)),
        len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        kernel.metadata.shared,
        SHARED_MEMORY[kernel.metadata.target.arch],
        len(re.findall(MULTIPLIES, kernel.asm["ptx"])),
        len(re.findall(r"\b(?:RED|ATOMG?)\b", instructions)),
        NEWEST[kernel.metadata.target.arch] in kernel.asm["ptx"],
    )


def disassembled(binary: bytes) -> str:
    """SASS of a cubin, by the tool that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
