"""The two containers of `torch.save`: the zip archive, and the stream that came before torch 1.6."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megahf.checkpoint.inert import Storage, entries_of
from megahf.checkpoint.mapped import Entry, MappedFile
from megahf.checkpoint.opcodes import DAMAGED, HOSTILE, MAX_PICKLE, Global, Machine, Persistent, malformed_is_refused
from megahf.dtypes import BY_STORAGE
from megahf.errors import Refused, refuse

END, END_SIGNATURE = struct.Struct("<4s4H2LH"), b"PK\x05\x06"
END64, END64_SIGNATURE = struct.Struct("<4sQ2H2L4Q"), b"PK\x06\x06"
LOCATOR, LOCATOR_SIGNATURE = struct.Struct("<4sLQL"), b"PK\x06\x07"
CENTRAL, CENTRAL_SIGNATURE = struct.Struct("<4s6H3L5H2L"), b"PK\x01\x02"
LOCAL, LOCAL_SIGNATURE = struct.Struct("<4s5H3L2H"), b"PK\x03\x04"
ZIP64_FIELD, FULL = 1, 0xFFFFFFFF  # a 32-bit field that is full has its value in the extra field of this number
SMALL = 4096  # bytes of a pickle of one tensor, and room to spare
STREAM_MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001


class TorchFile(NamedTuple):
    """An opened `torch.save` file: its records, and where its storages lie."""

    file: MappedFile
    where: str
    root: object
    storage: Callable[[Persistent], Storage]


def read_torch(file: MappedFile, where: str, start: int = 0, size: int | None = None) -> TorchFile:
    """What `torch.save` wrote into bytes `start .. start + size` of the file. Storages are located, not read."""
    size = file.size - start if size is None else size
    with malformed_is_refused(where):
        if file.map[start : start + 4] == LOCAL_SIGNATURE:
            return read_zip(file, where, start, size)
        return read_stream(file, where, start, start + size)


class Member(NamedTuple):
    """A line of a zip's directory."""

    header: int  # offset of the local header in the file
    limit: int  # where the next member or the directory begins
    size: int
    crc: int


class Archive:
    """A zip inside a window of a mapped file. Members are stored, unique, apart and inside, or refused."""

    def __init__(self, file: MappedFile, where: str, start: int, size: int) -> None:
        self.file, self.where, self.start, self.stop = file, where, start, start + size
        self.members = self.directory()

    def directory(self) -> dict[str, Member]:
        count, length, begin = self.find_directory()
        data = self.file.map[begin : begin + length]
        rows: dict[str, tuple[int, int, int]] = {}
        at = 0
        for _ in range(count):
            name, row, at = self.central(data, at)
            if name in rows:
                raise refuse(f"two members of the zip are called {name}", self.where, HOSTILE)
            rows[name] = row
        if at != length:
            raise refuse(f"the zip directory has {length - at:,} bytes too many", self.where, DAMAGED)
        order = sorted({header for header, _, _ in rows.values()})
        if len(order) != len(rows):
            raise refuse("two members of the zip begin at the same byte", self.where, HOSTILE)
        limits = dict(zip(order, [*order[1:], begin], strict=True))
        return {name: Member(header, limits[header], size, crc) for name, (header, size, crc) in rows.items()}

    def find_directory(self) -> tuple[int, int, int]:
        """Number of members, bytes and offset of the directory. torch writes no comment: it ends the window."""
        data, end = self.file.map, self.stop - END.size
        if end < self.start or data[end : end + 4] != END_SIGNATURE:
            raise refuse(
                f"the file is cut off: its {self.stop - self.start:,} bytes end in no zip directory",
                self.where,
                DAMAGED,
            )
        _, _, _, _, count, length, begin, _ = END.unpack_from(data, end)
        at = end - LOCATOR.size
        if at >= self.start and data[at : at + 4] == LOCATOR_SIGNATURE:
            _, _, record, _ = LOCATOR.unpack_from(data, at)
            end = self.start + record
            if not self.start <= end <= at - END64.size or data[end : end + 4] != END64_SIGNATURE:
                raise refuse("the zip64 directory is not where the zip says", self.where, DAMAGED)
            *_, count, length, begin = END64.unpack_from(data, end)
        begin += self.start
        if begin + length != end or count * CENTRAL.size > length:
            raise refuse(f"a zip directory of {count:,} members and {length:,} bytes does not fit", self.where, DAMAGED)
        return count, length, begin

    def central(self, data: bytes, at: int) -> tuple[str, tuple[int, int, int], int]:
        """A line of the directory: name, (local header, size, crc), and where the next line begins."""
        line = CENTRAL.unpack_from(data, at)
        signature, flags, method, (crc, packed, size, names, extras, comments), header = (
            *line[:1],
            *line[3:5],
            line[7:13],
            line[-1],
        )
        middle, end = at + CENTRAL.size + names, at + CENTRAL.size + names + extras
        if signature != CENTRAL_SIGNATURE or end > len(data):
            raise refuse("the zip directory is malformed", self.where, DAMAGED)
        name = data[at + CENTRAL.size : middle].decode("utf-8")
        size, packed, header = zip64_values(data[middle:end], size, packed, header)
        if not name.isprintable():
            raise refuse(f"a member of the zip is called {name!r:.80}", self.where, HOSTILE)
        if method or flags & 1 or packed != size:
            raise refuse(f"{name} is compressed or encrypted: {packed:,} bytes for {size:,}", self.where, HOSTILE)
        return name, (self.start + header, size, crc), end + comments

    def entry(self, name: str) -> Entry:
        """Where a member's bytes lie in the file, its local header checked against the directory."""
        if name not in self.members:
            raise refuse(f"the zip has no {name}", self.where, DAMAGED)
        member = self.members[name]
        local = LOCAL.unpack_from(self.file.map, member.header)
        signature, method, names, extras = local[0], local[3], *local[-2:]
        offset = member.header + LOCAL.size + names + extras  # torch pads with the extra field to align the data
        begin = member.header + LOCAL.size
        if signature != LOCAL_SIGNATURE or method or self.file.map[begin : begin + names] != name.encode():
            raise refuse(f"the zip's directory and its local header disagree about {name}", self.where, HOSTILE)
        if offset + member.size > member.limit:
            raise refuse(f"{name} of {member.size:,} bytes runs into the next member", self.where, HOSTILE)
        crc = member.crc or None  # torch.serialization.set_crc32_options(False) writes zeros
        return Entry(name, offset, member.size, crc)

    def read(self, name: str) -> bytes:
        """A small member, whole and checked."""
        entry = self.entry(name)
        if entry.size > MAX_PICKLE:
            raise refuse(f"{name} has {entry.size:,} bytes, more than {MAX_PICKLE:,}", self.where, HOSTILE)
        data = self.file.map[entry.offset : entry.offset + entry.size]
        if entry.crc is not None and zlib.crc32(data) != entry.crc:
            raise refuse(f"{name} does not have the checksum it was saved with", self.where, DAMAGED)
        return data


def zip64_values(extra: bytes, *values: int) -> list[int]:
    """The values with those that are full taken from the zip64 extra field, where they stand in the same order."""
    at = 0
    while at + 4 <= len(extra) and FULL in values:
        number, length = struct.unpack_from("<2H", extra, at)
        if number == ZIP64_FIELD:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
            return [next(wide, value) if value == FULL else value for value in values]
        at += 4 + length
    return list(values)


def read_zip(file: MappedFile, where: str, start: int, size: int) -> TorchFile:
    archive = Archive(file, where, start, size)
    pickles = [name for name in archive.members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise refuse(f"the zip holds {len(pickles)} pickles, not one", where, "give a file written by torch.save")
    prefix = pickles[0].removesuffix("data.pkl")
    order = archive.read(prefix + "byteorder") if prefix + "byteorder" in archive.members else b"little"
    if order != b"little":
        raise refuse(f"the byte order is {order[:20]!r}", where, "save it on a little-endian machine")
    root = records(archive.read(pickles[0]), where)
    found: dict[str, Storage] = {}

    def storage(reference: Persistent) -> Storage:
        key, dtype, count = storage_reference(reference, where)
        if key not in found:
            entry = archive.entry(f"{prefix}data/{key}")
            file.note(entry)
            found[key] = Storage(entry.offset, entry.size, dtype)
        located = found[key]._replace(dtype=dtype)
        if count * (dtype.itemsize if dtype else 1) != located.size:
            raise refuse(
                f"storage {key} is said to hold {count:,} {dtype} and has {located.size:,} bytes", where, HOSTILE
            )
        return located

    return TorchFile(file, where, root, storage)


def records(data: bytes, where: str) -> object:
    """The records of a pickle. Tensors of one shape and type have the same one: of small ones each is run once."""
    if len(data) <= SMALL:
        try:
            return small(data)
        except Refused:
            pass  # again, to say where
    return Machine(data, 0, len(data), where).run()


@lru_cache(maxsize=256)
def small(data: bytes) -> object:
    return Machine(data, 0, len(data), "").run()


def storage_reference(reference: Persistent, where: str) -> tuple[str, np.dtype | None, int]:
    """Key, dtype (None: untyped) and number of elements of `("storage", class, key, device, count, ...)`."""
    value = reference.value
    if not (type(value) is tuple and len(value) in (5, 6) and value[0] == "storage" and type(value[1]) is Global):
        raise refuse("a storage is referred to in an unknown way", where, HOSTILE)
    key, count, (module, _, name) = value[2], value[4], value[1].name.rpartition(".")
    if module not in ("torch", "torch.storage", "torch.cuda") or name not in (*BY_STORAGE, "UntypedStorage"):
        raise refuse(f"a storage has the class {value[1].name}", where, "megahf reads plain torch tensors")
    if type(key) is not str or not key.isascii() or not key.isdigit() or type(count) is not int or count < 0:
        raise refuse(f"a storage is called {key!r:.40} and holds {count!r:.40} elements", where, HOSTILE)
    return key, BY_STORAGE.get(name), count


def read_stream(file: MappedFile, where: str, start: int, stop: int) -> TorchFile:
    """The stream: magic, version, system, records, keys (a pickle each), then a count and the bytes of each storage."""
    position = start

    def unpickled() -> tuple[object, list[Persistent]]:
        nonlocal position
        machine = Machine(file.map, position, stop, where)
        value, position = machine.run(), machine.position
        return value, machine.persistent

    if file.map[start : start + 1] != b"\x80" or unpickled()[0] != STREAM_MAGIC:
        raise refuse("this is no file of torch.save", where, DAMAGED)
    version, system = unpickled()[0], entries_of(unpickled()[0], "the system's description", where)
    if version != STREAM_VERSION or system.get("little_endian") is not True:
        raise refuse(f"a torch stream of version {version!r:.20}, or not little-endian", where, "save it again")
    root, references = unpickled()
    keys, _ = unpickled()
    found = stream_storages(file, where, references, keys, position, stop)
    return TorchFile(file, where, root, lambda reference: found[storage_reference(reference, where)[0]])


def stream_storages(
    file: MappedFile, where: str, references: list[Persistent], keys: object, position: int, stop: int
) -> dict[str, Storage]:
    """Walks the storages behind the pickles; there is no checksum in this format."""
    described: dict[str, tuple[np.dtype | None, int]] = {}
    for reference in references:
        key, dtype, count = storage_reference(reference, where)
        if described.setdefault(key, (dtype, count)) != (dtype, count) or reference.value[5:] not in ((), (None,)):  # type: ignore[index]
            raise refuse(f"storage {key} is described in two ways", where, HOSTILE)
    if type(keys) is not list or sorted(described) != sorted(map(str, keys)):
        raise refuse("the storages written are not the storages referred to", where, HOSTILE)
    found = {}
    for key in keys:
        dtype, count = described[key]
        size = count * (dtype.itemsize if dtype else 1)
        if position + 8 + size > stop:
            raise refuse(
                f"the file is cut off: storage {key} ends at byte {position + 8 + size:,} of {stop:,}", where, DAMAGED
            )
        if int.from_bytes(file.map[position : position + 8], "little") != count:
            raise refuse(f"storage {key} does not hold the {count:,} elements its tensors need", where, DAMAGED)
        found[key] = Storage(position + 8, size, dtype)
        file.note(Entry(key, position + 8, size, None))
        position += 8 + size
    if position != stop:
        raise refuse(f"{stop - position:,} bytes follow the last storage", where, DAMAGED)
    return found
