"""The zip archive of `torch.save`, laid out before the bytes of its tensors are there.

Byte for byte what torch 2.13 writes: members stored in torch's order, each with its bytes at a multiple of 64 (the
extra field of its local header fills the gap) and, unless it is empty, a descriptor with the checksum behind them. Only
the serialization id, a fingerprint that nothing reads, is made in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from operator import mul
from pathlib import PurePosixPath
from struct import Struct, pack
from typing import Generic, NamedTuple
from zlib import crc32

from megahf.checkpoint.opcodes import Global, Made, Persistent
from megahf.checkpoint.output import Known, Output, Sized, W
from megahf.checkpoint.pickling import pickled, unknown
from megahf.checkpoint.torchfile import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    END_SIGNATURE,
    FULL,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR,
    LOCATOR_SIGNATURE,
    ZIP64_FIELD,
)  # fmt: skip
from megahf.dtypes import BY_STORAGE, TORCH_NAME
from megahf.errors import refuse

ALIGNMENT = 64  # bytes
DESCRIPTOR, DESCRIPTOR64, DESCRIPTOR_SIGNATURE = Struct("<4s3L"), Struct("<4sL2Q"), b"PK\x07\x08"
UTF8, DESCRIBED = 1 << 11, 1 << 3  # flags: names are UTF-8; the checksum is behind the bytes
MADE_BY, NEEDED = 0x031E, 45  # Unix and zip 3.0; a reader of zip64
PICKLE, IDENTITY, DIGITS = "data.pkl", ".data/serialization_id", 40
BEFORE = {".format_version": b"1", ".storage_alignment": b"%d" % ALIGNMENT, "byteorder": b"little"}
AFTER = {"version": b"3\n"}
STORAGE = {dtype: f"torch.{storage}" for storage, dtype in BY_STORAGE.items()}


@dataclass(frozen=True, eq=False)
class Tensor(Generic[W]):
    """A leaf among records: a contiguous tensor whose bytes come later. Those of one weight share a storage."""

    weight: W


def torch_file(file: str, root: object) -> Output[W]:
    """`torch.save(root, file)` to be. A file without weights is known whole, as one piece.

    Args:
        root: records, as `pickling.pickled` takes them, with a `Tensor` wherever a tensor belongs.

    Raises:
        Refused: what cannot be pickled.
    """
    stored: dict[str, tuple[W, Made]] = {}
    small = {PICKLE: pickled(root, lambda leaf: record(leaf, stored)), **BEFORE, **AFTER}
    weights = {f"data/{key}": weight for key, (weight, _) in enumerate(stored.values())}
    order = [PICKLE, *BEFORE, *weights, *AFTER, IDENTITY]
    sizes = {name: len(data) for name, data in small.items()} | {IDENTITY: DIGITS}
    sizes |= {name: weight.nbytes for name, weight in weights.items()}
    members = placed(PurePosixPath(file).stem, {name: sizes[name] for name in order})
    known = [(members[name].at, members[name].whole(small[name])) for name in (PICKLE, *BEFORE)]
    known += [(members[name].at, members[name].header) for name in weights]

    def finish(crcs: Mapping[str, int]) -> Iterator[Known]:
        found = {name: crcs[weight.name] for name, weight in weights.items()}
        for name, crc in found.items():
            if members[name].size:
                yield members[name].start + members[name].size, members[name].descriptor(crc)
        yield members[next(iter(AFTER))].at, closing(members, small, found)

    last = list(finish({weight.name: 0 for weight in weights.values()}))  # as long as it will be
    return Output(
        file=file,
        nbytes=last[-1][0] + len(last[-1][1]),
        known=joined(known if weights else known + last),
        weights=tuple(weights.values()),
        offsets={weight.name: members[name].start for name, weight in weights.items()},
        finish=finish if weights else None,
    )


def record(leaf: object, stored: dict[str, tuple[W, Made]]) -> Made:
    """A tensor as the call that makes it of a storage, which is the file `data/KEY`; notes its weight in `stored`."""
    if type(leaf) is not Tensor:
        raise unknown(leaf)
    weight = leaf.weight
    if weight.name not in stored:
        stored[weight.name] = weight, rebuilt(weight, str(len(stored)))
    first, made = stored[weight.name]
    if (first.shape, first.dtype) != (weight.shape, weight.dtype):
        raise refuse(f"two weights of one file are called {weight.name}")
    return made


def rebuilt(weight: Sized, key: str) -> Made:
    strides = tuple(accumulate((max(size, 1) for size in weight.shape[:0:-1]), mul, initial=1))[::-1]
    plain = weight.dtype in STORAGE  # the newer number formats have no storage class
    storage = STORAGE[weight.dtype] if plain else "torch.storage.UntypedStorage"
    count = math.prod(weight.shape) if plain else weight.nbytes
    reference = Persistent(("storage", Global(storage), key, "cpu", count))
    arguments = (reference, 0, weight.shape, strides[: len(weight.shape)], False, Made("collections.OrderedDict", ()))
    if plain:
        return Made("torch._utils._rebuild_tensor_v2", arguments)
    return Made("torch._utils._rebuild_tensor_v3", (*arguments, Global(f"torch.{TORCH_NAME[weight.dtype]}")))


class Member(NamedTuple):
    """A file of the zip: a local header at byte `at`, then its bytes, then their descriptor."""

    name: bytes
    at: int
    size: int
    header: bytes  # padded; sizes and checksum are zeros in it

    @property
    def start(self) -> int:
        """Where its bytes begin."""
        return self.at + len(self.header)

    @property
    def flags(self) -> int:
        return UTF8 | DESCRIBED if self.size else UTF8

    def wide(self, packed: int) -> bytes:
        """The extra field of sizes and an offset that do not fit 32 bits; `packed` is 0 in torch's local headers."""
        values = [self.size, packed] * (self.size >= FULL) + [self.at] * (self.at >= FULL)
        return pack(f"<2H{len(values)}Q", ZIP64_FIELD, 8 * len(values), *values) if values else b""

    def descriptor(self, crc: int) -> bytes:
        kind = DESCRIPTOR64 if self.wide(0) else DESCRIPTOR
        return kind.pack(DESCRIPTOR_SIGNATURE, crc, self.size, self.size) if self.size else b""

    def whole(self, data: bytes) -> bytes:
        return self.header + data + self.descriptor(crc32(data))

    def central(self, crc: int) -> bytes:
        """Its line in the directory."""
        size, at = min(self.size, FULL), min(self.at, FULL)
        extra = self.wide(self.size)
        lengths = len(self.name), len(extra), 0
        fixed = CENTRAL.pack(CENTRAL_SIGNATURE, 0, 0, self.flags, 0, 0, 0, crc, size, size, *lengths, 0, 0, 0, at)
        return fixed + self.name + extra


def placed(prefix: str, sizes: Mapping[str, int]) -> dict[str, Member]:
    """Members one behind the other, in the order of `sizes`."""
    members, at = {}, 0
    for short, size in sizes.items():
        name = f"{prefix}/{short}".encode()
        member = Member(name, at, size, b"")
        gap = -(at + LOCAL.size + len(name) + len(member.wide(0)) + 4) % ALIGNMENT
        extra = member.wide(0) + b"FB" + pack("<H", gap) + b"Z" * gap
        fixed = LOCAL.pack(LOCAL_SIGNATURE, 0, member.flags, 0, 0, 0, 0, 0, 0, len(name), len(extra))
        members[short] = member._replace(header=fixed + name + extra)
        at = members[short].start + size + len(member.descriptor(0))
    return members


def closing(members: Mapping[str, Member], small: Mapping[str, bytes], crcs: Mapping[str, int]) -> bytes:
    """What follows the last weight: the version, the id (a digest of names and checksums), the directory."""
    crcs = {**crcs, **{name: crc32(data) for name, data in small.items()}}
    noted = "".join(f"{name} {crcs[name]}\n" for name in members if name != IDENTITY)
    identity = b"%0*d" % (DIGITS, int.from_bytes(blake2b(noted.encode(), digest_size=16).digest()))
    crcs[IDENTITY] = crc32(identity)
    last = b"".join(members[name].whole(small[name]) for name in AFTER) + members[IDENTITY].whole(identity)
    begin = members[IDENTITY].start + DIGITS + len(members[IDENTITY].descriptor(0))
    lines = b"".join(member.central(crcs[name]) for name, member in members.items())
    count, end = len(members), begin + len(lines)
    few = min(count, 0xFFFF)
    return b"".join((
        last, lines,
        END64.pack(END64_SIGNATURE, END64.size - 12, MADE_BY, NEEDED, 0, 0, count, count, len(lines), begin),
        LOCATOR.pack(LOCATOR_SIGNATURE, 0, end, 1),
        END.pack(END_SIGNATURE, 0, 0, few, few, min(len(lines), FULL), min(begin, FULL), 0),
    ))  # fmt: skip


def joined(pieces: Iterable[Known]) -> tuple[Known, ...]:
    """Pieces in order, those that touch as one."""
    made: list[tuple[int, bytearray]] = []
    for at, data in pieces:
        if made and made[-1][0] + len(made[-1][1]) == at:
            made[-1][1].extend(data)
        else:
            made.append((at, bytearray(data)))
    return tuple((at, bytes(data)) for at, data in made)


def end_to_end(file: str, outputs: Sequence[Output[W]]) -> Output[W]:
    """Files one behind the other as one.

    Raises:
        Refused: weights of one name in two of them.
    """
    starts = list(accumulate((output.nbytes for output in outputs), initial=0))
    parts = list(zip(starts[:-1], outputs, strict=True))
    offsets: dict[str, int] = {}
    for start, output in parts:
        for name, at in output.offsets.items():
            if offsets.setdefault(name, start + at) != start + at:
                raise refuse(f"two weights of one file are called {name}", file)

    def finish(crcs: Mapping[str, int]) -> Iterator[Known]:
        for start, output in parts:
            for at, data in output.finish(crcs) if output.finish else ():
                yield start + at, data

    return Output(
        file=file,
        nbytes=starts[-1],
        known=joined((start + at, data) for start, output in parts for at, data in output.known),
        weights=tuple(weight for output in outputs for weight in output.weights),
        offsets=offsets,
        finish=finish if offsets else None,
    )
