"""A pickle machine that keeps records: it resolves, imports and calls nothing that a file names.

Pickle is a stack language. Python's own machine looks names up and calls them; this one writes down that they were
named (`Global`) and what they would have been called with (`Made`). What a record means is for `inert.py` to say.
The opcodes are those that `torch.save` and `pickle` emit at protocols 2 to 5 for data; the others (INST, OBJ, EXT,
PERSID, DUP, protocol 0 text) are refused, as nothing that saves a checkpoint emits them.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megahf.errors import Refused, refuse

MAX_PICKLE = 1 << 28  # bytes; a large checkpoint's .metadata is some tens of MB
MAX_INTEGER = 256  # bytes of one integer: random states hold 128 bits, a megabyte is an attack on whoever prints it
MAX_NAME = 1000  # characters of a module or class name
MAX_DEPTH = 200
MAX_EXPANDED = 5_000_000  # nodes when everything shared is counted as often as it is reached
SECONDS, SECONDS_PER_MB = 5.0, 1.0  # of processor time: what a slow machine needs, many times over
DAMAGED = "copy it again from where it was saved, or use another iteration"
HOSTILE = "no saving code writes this: do not trust where the file comes from"


class Global:
    """A name in the file: `torch.bfloat16`, a class, a function. Never looked up."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Made:
    """What calling a name would have made: `args` of REDUCE or NEWOBJ, `state` of BUILD, what a container holds."""

    __slots__ = ("args", "cls", "items", "kwargs", "pairs", "state")

    def __init__(self, cls: str, args: tuple[object, ...], kwargs: object = None) -> None:
        self.cls = cls
        self.args = args
        self.kwargs = kwargs
        self.state: object = None
        self.items: list[object] = []
        self.pairs: list[tuple[object, object]] = []


class Persistent:
    """A reference out of the pickle: torch's storages are written beside it."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class Machine:
    """Runs one pickle in `data[position:end]`; `data` is bytes or a mapped file."""

    def __init__(self, data: bytes | mmap.mmap, position: int, end: int, where: str) -> None:
        self.data, self.position, self.where = data, position, where
        self.end = min(end, position + MAX_PICKLE)
        self.stack: list[object] = []
        self.outer: list[list[object]] = []  # stacks below the marks
        self.memo: dict[int, object] = {}
        self.persistent: list[Persistent] = []
        self.steps = 0
        self.deadline = time.thread_time() + SECONDS + SECONDS_PER_MB * (self.end - position) / 1e6

    def run(self) -> object:
        """The pickled graph, in records; `position` is then just behind it."""
        while self.position < self.end:
            opcode = self.data[self.position]
            self.position += 1
            if opcode == STOP:
                return self.result()
            step = STEPS.get(opcode)
            if step is None:
                raise refuse(f"pickle opcode {bytes([opcode])!r} at byte {self.position - 1:,}", self.where, HOSTILE)
            step(self)
            self.tick()
        raise refuse(f"the pickle has no end in its {self.end:,} bytes", self.where, DAMAGED)

    def result(self) -> object:
        if len(self.stack) != 1 or self.outer:
            raise refuse("the pickle ends with work left on its stack", self.where, DAMAGED)
        return self.stack.pop()

    def tick(self) -> None:
        """Counts a step; colliding keys make steps slow, so the clock is looked at too."""
        self.steps += 1
        if not self.steps & 63 and time.thread_time() > self.deadline:
            raise refuse(f"the pickle takes longer than its {self.end:,} bytes explain", self.where, HOSTILE)

    def take(self, size: int) -> bytes:
        start, self.position = self.position, self.position + size
        if self.position > self.end:
            raise refuse(f"the pickle needs {size:,} bytes at {start:,} and ends at {self.end:,}", self.where, DAMAGED)
        return self.data[start : self.position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + MAX_NAME))
        if stop < 0:
            raise refuse(f"a name without an end at byte {self.position:,}", self.where, HOSTILE)
        text = self.take(stop + 1 - self.position)[:-1]
        return text.decode("utf-8")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        return self.stack.pop()

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def above_mark(self) -> list[object]:
        above, self.stack = self.stack, self.outer.pop()
        return above

    def integer(self, size: int) -> None:
        if size > MAX_INTEGER:
            raise refuse(f"an integer of {size:,} bytes", self.where, HOSTILE)
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "backslashreplace"))  # a lone surrogate could not be printed

    def tuple_of(self, count: int) -> None:
        values = tuple(self.pop() for _ in range(count))
        self.push(values[::-1])

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def named(self, module: object, name: object) -> None:
        module = "builtins" if module == "__builtin__" else module  # as protocol 2 spells it
        name = f"{module}.{name}" if type(module) is str and type(name) is str else ""
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise refuse("a class is named by something that is no name", self.where, HOSTILE)
        self.push(Global(name))

    def made(self, opcode: str, with_kwargs: bool = False) -> None:
        kwargs = self.pop() if with_kwargs else None
        args, cls = self.pop(), self.pop()
        if type(cls) is not Global or type(args) is not tuple:
            what = cls.cls if type(cls) is Made else type(cls).__name__
            raise refuse(f"{opcode} calls {what} made by the file itself", self.where, HOSTILE)
        self.push(Made(cls.name, args, kwargs))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if type(target) is not Made or target.state is not None:
            raise refuse(f"a state is set on {type(target).__name__}", self.where, HOSTILE)
        target.state = state

    def extend(self, values: list[object]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(values)
        elif type(target) is Made:
            target.items.extend(values)
        else:
            raise refuse(f"items are added to {type(target).__name__}", self.where, HOSTILE)

    def set_items(self, flat: list[object]) -> None:
        target = self.stack[-1]
        if len(flat) % 2 or type(target) not in (dict, Made):
            raise refuse(f"{len(flat)} keys and values for {type(target).__name__}", self.where, HOSTILE)
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not is_key(key):
                raise refuse(f"a dictionary key of type {type(key).__name__}", self.where, HOSTILE)
            if type(target) is dict:
                target[key] = value
            else:
                target.pairs.append((key, value))  # type: ignore[attr-defined]
            self.tick()

    def set_of(self, values: list[object]) -> None:
        self.push(Made("builtins.set", ()))
        self.extend(values)

    def persist(self) -> None:
        self.persistent.append(Persistent(self.pop()))
        self.push(self.persistent[-1])


def is_key(key: object) -> bool:
    """Whether hashing it takes bounded time: a tuple of shared tuples would hash as long as it is when written out."""
    if type(key) is tuple:
        return len(key) <= 32 and all(type(item) in KEYS for item in key)
    return type(key) in KEYS


KEYS = (str, int, float, bool, bytes, type(None), Global, Made)
STOP = ord(".")
BY_LETTER: dict[str, Callable[[Machine], object]] = {
    "N": lambda m: m.push(None),
    "\x88": lambda m: m.push(True),
    "\x89": lambda m: m.push(False),
    "J": lambda m: m.integer(4),
    "K": lambda m: m.push(m.take(1)[0]),
    "M": lambda m: m.push(m.number(2)),
    "\x8a": lambda m: m.integer(m.number(1)),
    "\x8b": lambda m: m.integer(m.number(4)),
    "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    "\x8c": lambda m: m.text(m.number(1)),
    "X": lambda m: m.text(m.number(4)),
    "\x8d": lambda m: m.text(m.number(8)),
    "C": lambda m: m.push(m.take(m.number(1))),
    "B": lambda m: m.push(m.take(m.number(4))),
    "\x8e": lambda m: m.push(m.take(m.number(8))),
    "\x96": lambda m: m.push(m.take(m.number(8))),  # a bytearray: as bytes
    "(": lambda m: m.mark(),
    ")": lambda m: m.push(()),
    "\x85": lambda m: m.tuple_of(1),
    "\x86": lambda m: m.tuple_of(2),
    "\x87": lambda m: m.tuple_of(3),
    "t": lambda m: m.push(tuple(m.above_mark())),
    "]": lambda m: m.push([]),
    "a": lambda m: m.extend([m.pop()]),
    "e": lambda m: m.extend(m.above_mark()),
    "}": lambda m: m.push({}),
    "s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    "u": lambda m: m.set_items(m.above_mark()),
    "\x8f": lambda m: m.set_of([]),
    "\x90": lambda m: m.extend(m.above_mark()),
    "\x91": lambda m: m.set_of(m.above_mark()),
    "q": lambda m: m.put(m.take(1)[0]),
    "r": lambda m: m.put(m.number(4)),
    "\x94": lambda m: m.put(len(m.memo)),
    "h": lambda m: m.get(m.take(1)[0]),
    "j": lambda m: m.get(m.number(4)),
    "c": lambda m: m.named(m.line(), m.line()),
    "\x93": lambda m: m.named(*[m.pop(), m.pop()][::-1]),
    "R": lambda m: m.made("REDUCE"),
    "\x81": lambda m: m.made("NEWOBJ"),
    "\x92": lambda m: m.made("NEWOBJ_EX", with_kwargs=True),
    "b": lambda m: m.build(),
    "Q": lambda m: m.persist(),
    "\x80": lambda m: m.take(1),  # PROTO
    "\x95": lambda m: m.take(8),  # FRAME: only a hint for buffered readers
}
STEPS = {ord(letter): step for letter, step in BY_LETTER.items()}
LEAVES = frozenset((str, int, float, bool, bytes, type(None), Global))


def children(node: object) -> Iterator[object]:
    """The nodes directly below one of the graph."""
    if type(node) is dict:
        yield from node
        yield from node.values()
    elif type(node) is list or type(node) is tuple:
        yield from node
    elif type(node) is Persistent:
        yield node.value
    elif type(node) is Made:
        yield node.args
        yield node.kwargs
        yield node.state
        yield from node.items
        for pair in node.pairs:
            yield from pair


def fold(root: object, combine: Callable[[object, Callable[[object], object]], object], where: str) -> object:
    """Builds a value for every node from the values of the nodes below it, and returns the root's.

    Args:
        combine: called once a node, deepest first, with the node and a function from a child to its value. Leaves
            are passed too.

    Refuses what would not end or would not fit when written out: cycles, depth and shared structure. No recursion,
    so that a file cannot exhaust the stack.
    """
    values: dict[int, object] = {}
    weights: dict[int, tuple[int, int]] = {}  # nodes when written out, depth
    entered: set[int] = set()

    def value_of(node: object) -> object:
        return combine(node, value_of) if type(node) in LEAVES else values[id(node)]

    todo = [root]
    while todo:
        node = todo[-1]
        if type(node) in LEAVES or id(node) in values:
            todo.pop()
        elif id(node) not in entered:
            entered.add(id(node))
            below = [child for child in children(node) if type(child) not in LEAVES and id(child) not in values]
            if any(id(child) in entered for child in below):
                raise refuse("an object contains itself", where, HOSTILE)
            todo += below
        else:
            weights[id(node)] = weighed(node, weights, where)
            values[id(node)] = combine(node, value_of)
            todo.pop()
    return value_of(root)


def weighed(node: object, weights: dict[int, tuple[int, int]], where: str) -> tuple[int, int]:
    """Nodes below when written out, and depth; refuses too much of either."""
    count, depth = 1, 0
    for child in children(node):
        below, levels = weights.get(id(child), (1, 0))
        count += below + (len(child) // 64 if type(child) in (str, bytes) else 0)  # type: ignore[arg-type]
        depth = max(depth, levels)
    if depth >= MAX_DEPTH:
        raise refuse(f"objects are nested more than {MAX_DEPTH} deep", where, HOSTILE)
    if count > MAX_EXPANDED:
        raise refuse(f"the objects would be more than {MAX_EXPANDED:,} when written out", where, HOSTILE)
    return count, depth + 1


MALFORMED = (
    ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError, struct.error,
)  # fmt: skip


@contextmanager
def malformed_is_refused(where: str) -> Iterator[None]:
    """Turns whatever a malformed file makes our own code raise into a refusal that names the file."""
    try:
        yield
    except Refused:
        raise
    except OSError as error:
        raise refuse(f"the file cannot be read: {error.strerror}", where, "check the disk and permissions") from error
    except MALFORMED as error:
        raise refuse(f"the file is malformed: {type(error).__name__}: {error}", where, DAMAGED) from error
