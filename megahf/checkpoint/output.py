"""A file to be written: bytes that are known beforehand, weights at their places, and what only their bytes tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np

Known = tuple[int, bytes]  # offset in the file, bytes


class Sized(Protocol):
    """A weight to be: its name, shape, number format and bytes."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...


W = TypeVar("W", bound=Sized)


@dataclass(frozen=True)
class Output(Generic[W]):
    """One file to be; every byte of it is known, a weight's, or written by `finish`.

    Attributes:
        file: its path below the target, with `/`.
        nbytes: its size.
        known: written first.
        weights: in the order of their offsets; their names are unique within the file.
        offsets: weight -> where its bytes start in the file.
        finish: from the CRC-32 of each weight's bytes to what is written last; None where no CRC is wanted.
    """

    file: str
    nbytes: int
    known: tuple[Known, ...]
    weights: tuple[W, ...]
    offsets: Mapping[str, int]
    finish: Callable[[Mapping[str, int]], Iterable[Known]] | None = None
