"""Records as a pickle: what `opcodes.Machine` reads, written again.

Protocol 2, as `torch.save` writes and `torch.load(weights_only=True)` takes. It has no opcode for bytes and for sets,
which are calls in it: a machine gives `_codecs.encode(text, "latin1")` for bytes, and `inert.plain` bytes again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from megahf.checkpoint.opcodes import Global, Made, Persistent
from megahf.errors import Refused, refuse

BATCH = 1000  # items between a mark and the opcode that takes them, as Python's own pickler has it
LIMIT = 1 << 32  # bytes of a text
REMEDY = "give plain values and the records of megahf.checkpoint.opcodes"

Leaf = Callable[[object], object]


def unknown(value: object) -> Refused:
    return refuse(f"{type(value).__module__}.{type(value).__name__} cannot be pickled", f"{value!r:.80}", REMEDY)


def no_leaf(value: object) -> object:
    raise unknown(value)


def pickled(value: object, leaf: Leaf = no_leaf) -> bytes:
    """The pickle of records: a machine that runs it has equal ones, and Python's `pickle.loads` what they stand for.

    What is in two places of the graph is written once; equal texts and names are too.

    Args:
        value: None, bool, int, float, str, bytes, list, tuple, dict (in its order), `Global`, `Made`, `Persistent`.
        leaf: called for a value of any other type, gives the record to write in its place.

    Raises:
        Refused: a type that is none of these, or what needs a newer protocol: keyword arguments, a text of 4 GiB.
    """
    pickler = Pickler(leaf)
    pickler.save(value)
    return bytes(pickler.data + b".")


class Pickler:
    """Writes one pickle; `memo` knows what was written before."""

    def __init__(self, leaf: Leaf) -> None:
        self.data = bytearray(b"\x80\x02")  # PROTO 2
        self.leaf = leaf
        self.memo: dict[object, int] = {}  # key_of a value -> its number
        self.kept: list[object] = []  # an id is a value's own only as long as the value lives
        self.records: dict[int, object] = {}  # id of a leaf -> what is written in its place

    def save(self, value: object) -> None:
        number = self.memo.get(key_of(value))
        if number is not None:
            self.data += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<L", number)
            return
        write = WRITERS.get(type(value))
        if write is not None:
            write(self, value)
            return
        if id(value) not in self.records:
            self.records[id(value)] = self.leaf(value)
            self.kept.append(value)
        self.save(self.records[id(value)])

    def put(self, value: object) -> None:
        """Memoises what was just written."""
        number = len(self.memo)
        self.memo[key_of(value)] = number
        self.kept.append(value)
        self.data += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<L", number)

    def integer(self, value: int) -> None:
        if 0 <= value < 1 << 8:
            self.data += b"K" + bytes([value])
        elif 0 <= value < 1 << 16:
            self.data += b"M" + struct.pack("<H", value)
        elif -(1 << 31) <= value < 1 << 31:
            self.data += b"J" + struct.pack("<l", value)
        else:
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            size = b"\x8a" + bytes([len(digits)]) if len(digits) < 256 else b"\x8b" + struct.pack("<L", len(digits))
            self.data += size + digits

    def text(self, value: str) -> None:
        encoded = value.encode("utf-8", "surrogatepass")
        if len(encoded) >= LIMIT:
            raise refuse(f"a text of {len(encoded):,} bytes", f"{value[:40]}...", "a pickle of protocol 2 has no room")
        self.data += b"X" + struct.pack("<L", len(encoded)) + encoded
        self.put(value)

    def raw(self, value: bytes) -> None:
        call = ("_codecs.encode", (value.decode("latin1"), "latin1")) if value else ("builtins.bytes", ())
        self.call(*call)
        self.put(value)

    def tuple_of(self, value: tuple[object, ...]) -> None:
        if not value:
            self.data += b")"
            return
        self.data += b"(" if len(value) > 3 else b""
        for item in value:
            self.save(item)
        self.data += b"t" if len(value) > 3 else b"\x85\x86\x87"[len(value) - 1 : len(value)]
        self.put(value)

    def list_of(self, value: list[object]) -> None:
        self.data += b"]"
        self.put(value)
        self.extend([(item,) for item in value], b"ae")

    def dictionary(self, value: dict[object, object]) -> None:
        self.data += b"}"
        self.put(value)
        self.extend(list(value.items()), b"su")

    def extend(self, items: Sequence[tuple[object, ...]], opcodes: bytes) -> None:
        """`items`, each of one value or two, into what was just written; `opcodes` take one and all above a mark."""
        for start in range(0, len(items), BATCH):
            batch = items[start : start + BATCH]
            self.data += b"(" if len(batch) > 1 else b""
            for item in batch:
                for value in item:
                    self.save(value)
            self.data += opcodes[1:] if len(batch) > 1 else opcodes[:1]

    def name(self, value: Global) -> None:
        """The module is all but the last word; a class inside a class cannot be told from one in a package."""
        module, dot, name = value.name.rpartition(".")
        if not dot or "\n" in value.name:
            raise refuse(f"{value.name!r:.80} names no class", "", "write it as `module.name`")
        module = "__builtin__" if module == "builtins" else module  # as protocol 2 spells it
        self.data += f"c{module}\n{name}\n".encode()
        self.put(value)

    def call(self, cls: str, args: tuple[object, ...], opcode: bytes = b"R") -> None:
        self.save(Global(cls))
        self.save(args)
        self.data += opcode

    def made(self, value: Made) -> None:
        """A call; what has no arguments and a state may need some to be called, and is made without (NEWOBJ)."""
        if value.kwargs:
            raise refuse(f"{value.cls} is made with keyword arguments", "", "a pickle of protocol 2 has none")
        args, items = value.args, value.items
        if value.cls == "builtins.set" and items:
            args, items = ([*items],), []
        self.call(value.cls, args, b"\x81" if not args and value.state is not None else b"R")
        self.put(value)
        self.extend([(item,) for item in items], b"ae")
        self.extend(value.pairs, b"su")
        if value.state is not None:
            self.save(value.state)
            self.data += b"b"

    def persistent(self, value: Persistent) -> None:
        self.save(value.value)
        self.data += b"Q"


def key_of(value: object) -> object:
    """Two values of one key are one: equal texts, equal names, else one and the same object."""
    if type(value) is str:
        return value
    if type(value) is Global:
        return "name", value.name
    return id(value)


WRITERS: dict[type, Callable[[Pickler, Any], None]] = {
    type(None): lambda p, _: p.data.extend(b"N"),
    bool: lambda p, value: p.data.extend(b"\x88" if value else b"\x89"),
    int: Pickler.integer,
    float: lambda p, value: p.data.extend(b"G" + struct.pack(">d", value)),
    str: Pickler.text,
    bytes: Pickler.raw,
    tuple: Pickler.tuple_of,
    list: Pickler.list_of,
    dict: Pickler.dictionary,
    Global: Pickler.name,
    Made: Pickler.made,
    Persistent: Pickler.persistent,
}
