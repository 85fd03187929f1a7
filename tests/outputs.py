"""Outputs written from arrays in memory, piece by piece and each byte once, as no executor would be needed to."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megahf.checkpoint.output import Output
from megahf.checkpoint.torch_writing import Tensor
from megahf.dtypes import BY_TORCH


@dataclass(frozen=True)
class Array:
    """A weight whose bytes are a torch tensor's."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return BY_TORCH[str(self.tensor.dtype).removeprefix("torch.")]

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def bytes(self) -> bytes:
        flat = self.tensor.contiguous().flatten()
        return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def leaf(name: str, tensor: torch.Tensor) -> Tensor[Array]:
    return Tensor(Array(name, tensor))


def contents(output: Output[Array]) -> bytes:
    """The file; every byte of it is written, and none twice."""
    pieces = [*output.known, *((output.offsets[weight.name], weight.bytes) for weight in output.weights)]
    if output.finish is not None:
        pieces += output.finish({weight.name: zlib.crc32(weight.bytes) for weight in output.weights})
    pieces = sorted(piece for piece in pieces if piece[1])
    ends = [0, *(at + len(data) for at, data in pieces)]
    assert [*(at for at, _ in pieces), output.nbytes] == ends
    assert list(output.weights) == sorted(output.weights, key=lambda weight: output.offsets[weight.name])
    return b"".join(data for _, data in pieces)


def write(output: Output[Array], folder: Path) -> Path:
    path = folder / output.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents(output))
    return path
