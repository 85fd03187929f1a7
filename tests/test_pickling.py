"""The promise: records become a pickle that our machine reads as equal records, and Python's as what they stand for."""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import pickle
import pickletools
from collections import OrderedDict, defaultdict, deque
from pathlib import PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megahf.checkpoint.inert import plain
from megahf.checkpoint.opcodes import Global, Machine, Made, Persistent
from megahf.checkpoint.pickling import pickled
from megahf.errors import Refused

LEAVES = st.none() | st.booleans() | st.integers() | st.integers(-(1 << 600), 1 << 600) | st.floats() | st.text()
KEYS = st.text() | st.integers() | st.tuples(st.text(), st.integers())
VALUES = st.recursive(
    LEAVES | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(KEYS, inner, max_size=5) | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=20,
)


def read(data: bytes) -> object:
    return Machine(data, 0, len(data), "").run()


def made(cls: str, *args: object, state: object = None, items: Any = (), pairs: Any = ()) -> Made:
    record = Made(cls, args)
    record.state, record.items, record.pairs = state, list(items), list(pairs)
    return record


def compared(node: object) -> object:
    """A record graph as values that compare: numbers with their types, bytes as the call they are in protocol 2."""
    if type(node) is bytes:
        node = made("_codecs.encode", node.decode("latin1"), "latin1") if node else made("builtins.bytes")
    if type(node) is Made:
        parts = [node.args, node.state, node.items, node.pairs]
        return "made", node.cls, [compared(part) for part in parts]
    if type(node) is Global:
        return "global", node.name
    if type(node) is Persistent:
        return "persistent", compared(node.value)
    if type(node) is dict:
        return "dict", [(compared(key), compared(value)) for key, value in node.items()]
    if type(node) in (list, tuple):
        return type(node).__name__, [compared(item) for item in node]  # type: ignore[attr-defined]
    return type(node).__name__, repr(node)


NAMES = st.from_regex(r"[a-z]{1,5}(\.[A-Za-z_]{1,5}){1,3}", fullmatch=True)


def objects(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    several = st.lists(inner, max_size=4)
    fields = st.none() | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    pairs = st.lists(st.tuples(KEYS, inner), max_size=4)
    return (
        several
        | several.map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | inner.map(Persistent)
        | st.builds(
            lambda name, args, state, items, pairs: made(name, *args, state=state, items=items, pairs=pairs),
            NAMES, several, fields, several, pairs,
        )
    )  # fmt: skip


@given(st.recursive(LEAVES | st.binary() | NAMES.map(Global), objects, max_leaves=20))
def test_the_machine_reads_equal_records(value: object) -> None:
    assert compared(read(pickled(value))) == compared(value)


@given(VALUES)
def test_python_reads_equal_values(value: object) -> None:
    assert compared(pickle.loads(pickled(value))) == compared(value)


@given(VALUES)
def test_our_arguments_are_equal_values(value: object) -> None:
    assert compared(plain(read(pickled(value)), "")) == compared(value)


def test_no_opcode_is_newer_than_protocol_2() -> None:
    data = pickled([b"x", {"a": 1 << 2100}, ("b", 2.0, None, True, -1), Made("builtins.set", ([1],))])
    assert max(opcode.proto for opcode, _, _ in pickletools.genops(data)) == 2


@pytest.mark.parametrize("size", [0, 1, 2, 999, 1000, 1001, 2000, 3001])
def test_long_containers_are_whole_and_in_order(size: int) -> None:
    value = [list(range(size)), {f"key {size - i}": i for i in range(size)}, tuple(range(size))]
    loaded = pickle.loads(pickled(value))
    assert loaded == value
    assert list(loaded[1]) == list(value[1])


@pytest.mark.parametrize("value", [255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, -128])
def test_integers_have_the_opcode_that_python_gives_them(value: int) -> None:
    assert pickled(value) == pickle.dumps(value, 2)


class Precision(enum.Enum):
    DELAYED = "delayed"
    FIVE = 5


HERE = __name__
OBJECTS = {
    "Namespace": (made("argparse.Namespace", state={"b": 2, "a": [1]}), argparse.Namespace(b=2, a=[1])),
    "empty Namespace": (made("argparse.Namespace", state={}), argparse.Namespace()),
    "OrderedDict": (made("collections.OrderedDict", pairs=[("b", 1), ("a", 2)]), OrderedDict(b=1, a=2)),
    "defaultdict": (
        made("collections.defaultdict", Global("builtins.list"), pairs=[("a", [1])]),
        defaultdict(list, a=[1]),
    ),
    "deque": (made("collections.deque", (), 3, items=[1, 2]), deque([1, 2], 3)),
    "set": (made("builtins.set", items=[1, 2]), {1, 2}),
    "empty set": (made("builtins.set"), set()),
    "frozenset": (made("builtins.frozenset", [1, 2]), frozenset([1, 2])),
    "class": (Global("builtins.int"), int),
    "Size": (made("torch.Size", (2, 3)), torch.Size([2, 3])),
    "dtype": (Global("torch.bfloat16"), torch.bfloat16),
    "device": (made("torch.device", "cuda", 1), torch.device("cuda", 1)),
    "layout": (made("torch.serialization._get_layout", "torch.strided"), torch.strided),
    "path": (made("pathlib.PurePosixPath", "/", "a", "b"), PurePosixPath("/a/b")),
    "date": (made("datetime.datetime", 2026, 1, 2, 3), datetime.datetime(2026, 1, 2, 3)),
    "timedelta": (made("datetime.timedelta", 1, 2, 3), datetime.timedelta(1, 2, 3)),
    "member of an enum, by its word": (made(f"{HERE}.Precision", "delayed"), Precision.DELAYED),
    "member of an enum, by its number": (made(f"{HERE}.Precision", 5), Precision.FIVE),
    "member of an enum, by its name": (made("builtins.getattr", Global(f"{HERE}.Precision"), "FIVE"), Precision.FIVE),
    "dataclass without fields": (
        made("torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        BytesStorageMetadata(),
    ),
    "dataclass with fields that it needs": (
        made("torch.distributed.checkpoint.filesystem._StoragePrefix", state={"prefix": "__0_"}),
        _StoragePrefix("__0_"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTS)
def test_python_makes_the_object_of_its_record(name: str) -> None:
    record, wanted = OBJECTS[name]
    loaded = pickle.loads(pickled({"value": record}))["value"]
    assert loaded == wanted
    assert type(loaded) is type(wanted)
    assert repr(loaded) == repr(wanted)


@pytest.mark.parametrize("name", OBJECTS)
def test_records_that_python_wrote_come_back(name: str) -> None:
    """From Python's pickle to records, and by ours back to Python."""
    _, wanted = OBJECTS[name]
    record = read(pickle.dumps(wanted, 2))
    assert pickle.loads(pickled(record)) == wanted


def test_a_file_of_bytes_comes_back() -> None:
    """Extra states of earlier releases of Transformer Engine are io.BytesIO."""
    record = read(pickle.dumps(io.BytesIO(b"state"), 2))
    assert pickle.loads(pickled(record)).getvalue() == b"state"


def test_what_is_shared_is_written_once_and_stays_shared() -> None:
    part = made("argparse.Namespace", state={"a": [1]})
    name = "a name that is long enough to be seen twice"
    data = pickled([part, part, name, name + "", Global("torch.bfloat16"), Global("torch.bfloat16")])
    assert data.count(b"Namespace") == data.count(name.encode()) == data.count(b"bfloat16") == 1
    first, second, *_ = pickle.loads(data)
    assert first is second


def test_values_that_are_only_equal_are_not_shared() -> None:
    first, second = pickle.loads(pickled([[1], [1]]))
    assert first == second
    assert first is not second


def test_a_leaf_is_asked_for_once_and_written_as_its_record() -> None:
    class Leaf:
        pass

    asked: list[object] = []

    def stand_in(value: object) -> object:
        asked.append(value)
        return made("argparse.Namespace", state={"number": len(asked)})

    one = Leaf()
    loaded = pickle.loads(pickled([one, Leaf(), one], stand_in))
    assert [value.number for value in loaded] == [1, 2, 1]
    assert loaded[0] is loaded[2]
    assert len(asked) == 2


REFUSED = {
    "keyword arguments": (Made("a.b", (), {"x": 1}), "keyword"),
    "a name without a module": (Global("print"), "names no class"),
    "a name of two lines": (Global("os.path\nos.system"), "names no class"),
    "an object": (argparse.Namespace(), "argparse.Namespace cannot"),
    "an object deep inside": ({"a": [({"b": {1}},)]}, r"builtins\.set cannot"),
    "a number of NumPy's": ([torch.ones(1).numpy()[0]], r"numpy\.float32 cannot"),
    "a subclass of a plain type": (OrderedDict(a=1), "OrderedDict cannot"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_record_is_refused(name: str) -> None:
    value, why = REFUSED[name]
    with pytest.raises(Refused, match=why):
        pickled(value)
