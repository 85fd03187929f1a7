"""Runs a plan in bounded memory: weights pass through fixed buffers, a piece at a time, whatever the model's size.

A piece is a run of rows of one weight that fits the buffer. Its bytes are read with `pread` from where the tiles lie,
put in place, checked (the zip's CRC over what was read, equality with every other copy that is stored, finite numbers)
and digested, and handed to the sink: a safetensors file, or the memory of a parameter.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from . import dtypes
from .checkpoint.mapped import Entry, Files, MappedFile
from .crc import combine
from .errors import Problems, refuse
from .plan import Copy
from .reading import expect, memory_of, pread, read_scattered, scattered, span, turned
from .tiles import Tile, Tiled, is_padding, unstack

BUFFER = 1 << 20  # bytes of a piece: stays in a core's cache while it is read, checked, digested and written
PANEL = 32 << 20  # bytes of a piece that lies transposed: its runs in the file are some thousand bytes each
THREADS = 2

Sink = Callable[[Copy, int, np.ndarray], None]  # weight, byte offset in it, the bytes


@dataclass(frozen=True)
class Checks:
    """What is looked at while the bytes pass."""

    checksums: bool = True  # CRCs of the source, digests of the weights
    refuse_nonfinite: bool = False


@dataclass
class Ledger:
    """Which bytes of which stored run were read, and their CRCs: the account that every source byte passed.

    Pieces that follow one another become one, so that the account of a model of any size stays short.
    """

    lock: threading.Lock = field(default_factory=threading.Lock)
    # (file, offset of the stored run) -> where a stretch that was read ends -> where it starts, and its CRC
    read: dict[tuple[str, int], dict[int, tuple[int, int]]] = field(default_factory=lambda: defaultdict(dict))

    def note(self, file: MappedFile, offset: int, piece: np.ndarray) -> None:
        """Remember the CRC of the bytes `piece`, read at `offset` of `file`."""
        entry = file.entry_at(offset)
        if entry is None or entry.crc is None:
            return
        with self.lock:
            stretches = self.read[str(file.path), entry.offset]
            start, crc = stretches.pop(offset, (offset, 0))
        crc = zlib.crc32(piece, crc)
        with self.lock:
            stretches[offset + piece.nbytes] = (start, crc)

    def dump(self) -> list[list[int | str]]:
        """As rows that JSON takes."""
        return [[*run, end, *rest] for run, stretches in self.read.items() for end, rest in stretches.items()]

    def load(self, rows: list[list[int | str]]) -> None:
        for path, run, end, start, crc in rows:
            self.read[str(path), int(run)][int(end)] = (int(start), int(crc))

    def settle(self, file: MappedFile, entry: Entry, buffer: np.ndarray) -> bool:
        """Whether the bytes of `entry` make its CRC; those that no weight took (padding) are read for it here."""
        read = self.read.get((str(file.path), entry.offset), {})
        at, crc, last = entry.offset, 0, entry.offset + entry.size
        for start, end, stretch in [*sorted((start, end, crc) for end, (start, crc) in read.items()), (last, last, 0)]:
            while at < start:
                size = min(start - at, buffer.nbytes)
                crc = zlib.crc32(pread(file, at, buffer[:size]), crc)
                at += size
            if start == at:
                crc = combine(crc, stretch, end - start)
                at = end
        return at == last and crc == entry.crc


def run(
    copies: Sequence[Copy],
    files: Files,
    sink: Sink,
    checks: Checks,
    ledger: Ledger,
    progress: Callable[[int], None] = lambda size: None,
) -> dict[str, str]:
    """Moves `copies` to `sink` on a few threads; gives each weight's blake3 digest (none without checksums).

    Raises:
        Refused: a copy that differs, a number that does not fit or is not finite, a source that ends too early.
    """
    work = list(copies)[::-1]
    digests: dict[str, str] = {}
    problems, stop = Problems(), threading.Event()

    def worker() -> None:
        pieces = Pieces(files, checks, ledger)
        while work and not stop.is_set():
            try:
                copy = work.pop()
            except IndexError:
                return
            digests[copy.name] = move(copy, pieces, sink, checks, problems, progress)

    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(worker) for _ in range(min(THREADS, len(work)))]
        try:
            wait(waiting, return_when=FIRST_EXCEPTION)
        finally:  # after a failure, or an interrupt, no thread takes another weight
            stop.set()
    for future in waiting:
        future.result()
    problems.raise_if_any()
    return digests if checks.checksums else {}


def move(
    copy: Copy, pieces: Pieces, sink: Sink, checks: Checks, problems: Problems, progress: Callable[[int], None]
) -> str:
    """One weight, piece by piece; its digest."""
    from blake3 import blake3

    digest, offset, itemsize = blake3(), 0, max(copy.dtype.itemsize, copy.array.dtype.itemsize)
    places = [where for where, _ in copy.same]
    for array, *others in zip(*(parts(one, copy) for one in (copy.array, *(one for _, one in copy.same))), strict=True):
        limit = {"size": PANEL} if any(turned(tile.view) for tile in array.tiles) else {}
        for one in (array, *others):
            pieces.look_ahead(one)
        for box in boxes(array.shape, itemsize, **limit):
            values = pieces.gather(inside(array, box), 0)
            for where, other in zip(places, others, strict=True):
                again = pieces.gather(inside(other, box), 1)
                mine = values.reshape(-1).view(np.uint8) if again.dtype == values.dtype else cast(copy, values, checks)
                if not np.array_equal(mine, again.reshape(-1).view(np.uint8)):
                    where = f"{copy.name}, also in {where}"
                    problems.add("stored twice and not equal", where, "the checkpoint is damaged")
                    return ""
            data = cast(copy, values, checks)
            if checks.checksums:
                digest.update(data)
            sink(copy, offset, data)
            offset += data.nbytes
            progress(data.nbytes)
    for where, array in copy.blank:
        check_blank(copy, where, array, pieces, problems)
    return digest.hexdigest()


def check_blank(copy: Copy, where: str, array: Tiled, pieces: Pieces, problems: Problems) -> None:
    """Adds a problem where what is left out of a weight is not zeros."""
    for box in boxes(array.shape, array.dtype.itemsize):
        if (pieces.gather(inside(array, box), 0) != 0).any():
            what = "dummy heads that are not zeros: they would be left out"
            problems.add(what, f"{copy.name}, in {where}", "Megatron's own converter leaves zeros there")
            return


def parts(array: Tiled, copy: Copy) -> Sequence[Tiled]:
    """`array`, or each expert of it: of its many tiles a piece then looks at its own expert's alone."""
    large = len(copy.shape) > 2 and copy.array.nbytes // copy.shape[0] >= BUFFER // 4
    return unstack(array) if large else [array]


def cast(copy: Copy, values: np.ndarray, checks: Checks) -> np.ndarray:
    """`values` in the target's number format, as bytes; a number that becomes infinite is refused."""
    if copy.plus:
        values = values.astype(np.float32) + np.float32(copy.plus)
    narrow = copy.dtype != values.dtype
    with np.errstate(over="ignore", invalid="ignore"):  # looked at below
        target = values.astype(copy.dtype) if narrow else values
    if (narrow or checks.refuse_nonfinite) and dtypes.is_float(copy.dtype) and not np.isfinite(target).all():
        finite = np.isfinite(values)
        if not np.isfinite(target[finite]).all():
            largest = float(np.abs(values[finite].astype(np.float64)).max())
            raise refuse(f"{largest:g} does not fit {copy.dtype.name}", copy.name, "convert with --dtype bf16 or fp32")
        if checks.refuse_nonfinite:
            bad = int(values.size - finite.sum())
            raise refuse(f"{bad} numbers are NaN or infinite", copy.name, "leave --refuse-nonfinite out to keep them")
    return target.reshape(-1).view(np.uint8)


Box = tuple[tuple[int, int], ...]  # (start, length) along each axis


def boxes(shape: tuple[int, ...], itemsize: int, size: int = BUFFER) -> Iterator[Box]:
    """`shape` in C order as boxes of at most `size` bytes, each one a run of rows."""
    axis, row = len(shape), itemsize
    while axis > 0 and row * shape[axis - 1] <= size:
        axis -= 1
        row *= shape[axis]
    if axis == 0:
        yield tuple((0, length) for length in shape)
        return
    step = max(size // row, 1)
    inner = tuple((0, length) for length in shape[axis:])
    for outer in np.ndindex(*shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*((i, 1) for i in outer), (start, min(step, shape[axis - 1] - start)), *inner)


def inside(array: Tiled, box: Box) -> Tiled:
    for axis, (start, length) in enumerate(box):
        if length != array.shape[axis]:
            array = array.narrow(axis, start, length)
    return array


class Pieces:
    """Reads pieces of lazy arrays into buffers of its own: one for the weight, one for a copy of it, one to spare."""

    def __init__(self, files: Files, checks: Checks, ledger: Ledger) -> None:
        self.files, self.checks, self.ledger = files, checks, ledger
        self.buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]
        self.spare = np.empty(0, np.uint8)

    def gather(self, array: Tiled, buffer: int) -> np.ndarray:
        """The values of `array` in buffer number `buffer`."""
        if self.buffers[buffer].nbytes < array.nbytes:
            self.buffers[buffer] = np.empty(array.nbytes, np.uint8)
        values = self.buffers[buffer][: array.nbytes].view(array.dtype).reshape(array.shape)
        for tile in array.tiles:
            self.fetch(tile, values)
        return values

    def fetch(self, tile: Tile, values: np.ndarray) -> None:
        """One tile to its place: straight into it where both sides are one run of bytes, else by way of the spare."""
        place = tuple(slice(at, at + size) for at, size in zip(tile.start, tile.view.shape, strict=True))
        target = values[place] if place else values
        if is_padding(tile.view):
            np.copyto(target, tile.view)
            return
        file, offset = self.files.locate(tile.view)
        if scattered(tile.view):
            read_scattered(file, offset, tile.view, self.spare_of(memory_of(tile.view)), target)
            return
        size = tile.view.nbytes
        direct = target.flags.c_contiguous
        raw = pread(file, offset, target.reshape(-1).view(np.uint8) if direct else self.spare_of(size)[:size])
        if self.checks.checksums:
            self.ledger.note(file, offset, raw)
        if not direct:
            np.copyto(target, raw.view(target.dtype).reshape(target.shape))

    def spare_of(self, size: int) -> np.ndarray:
        if self.spare.nbytes < size:
            self.spare = np.empty(size, np.uint8)
        return self.spare

    def look_ahead(self, array: Tiled) -> None:
        """Reads what lies scattered once in order, for its CRC, and so that its many small reads find it in memory."""
        spans: dict[MappedFile, list[tuple[int, int]]] = defaultdict(list)
        for _, view in array.tiles:
            if scattered(view) and not is_padding(view):
                file, offset = self.files.locate(view)
                spans[file].append((offset, offset + span(view)))
        for file, found in spans.items():
            for start, end in united(found):
                if not self.checks.checksums:
                    expect(file, start, end - start)
                    continue
                for at in range(start, end, BUFFER):
                    size = min(BUFFER, end - at)
                    self.ledger.note(file, at, pread(file, at, self.spare_of(size)[:size]))


def united(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of bytes, those that overlap as one."""
    made: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if made and start < made[-1][1]:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return made


def settle(files: Files, used: Sequence[Copy], ledger: Ledger) -> None:
    """Refuses when the bytes that passed do not make the CRCs that the zip files recorded."""
    problems, buffer = Problems(), np.empty(BUFFER, np.uint8)
    seen: set[tuple[str, int]] = set()
    for copy in used:
        for array in (copy.array, *(same for _, same in (*copy.same, *copy.blank))):
            for _, view in array.tiles:
                if is_padding(view):
                    continue
                file, offset = files.locate(view)
                entry = file.entry_at(offset)
                if entry is None or entry.crc is None or (str(file.path), entry.offset) in seen:
                    continue
                seen.add((str(file.path), entry.offset))
                if not ledger.settle(file, entry, buffer):
                    problems.add(
                        f"CRC-32 of {copy.name} is wrong", f"{entry.name} in {file.path}", "the file is damaged"
                    )
    problems.raise_if_any()


def memory_bound(copies: Sequence[Copy]) -> int:
    """An upper bound in bytes for the buffers a run of `copies` takes."""
    widest = max((math.prod(copy.shape[-1:]) * copy.array.dtype.itemsize for copy in copies), default=0)
    panel = PANEL if any(any(turned(tile.view) for tile in copy.array.tiles) for copy in copies) else 0
    return THREADS * 5 * max(BUFFER, panel, widest)  # the piece, its copy, the spare (twice a piece), and a cast
