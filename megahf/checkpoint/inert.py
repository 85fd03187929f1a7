"""What the records of a pickle mean: plain data for arguments, checked views of the file for tensors.

Every meaning here is recognised by the name's spelling and given by a line of ours. A name that is not recognised stays
what it is, an `Opaque` to look at under the arguments, and is refused among the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megahf.checkpoint.mapped import MappedFile
from megahf.checkpoint.opcodes import DAMAGED, HOSTILE, LEAVES, Global, Made, Persistent, fold
from megahf.dtypes import BY_TORCH
from megahf.errors import refuse

SHOWN = 60  # characters of an Opaque's repr
MAX_DIMENSIONS = 32
UNKNOWN = "megahf reads tensors and extra states only; save the checkpoint without this object"


@dataclass(frozen=True)
class Opaque:
    """An object of a class that is not ours to build: its name and what it would have been made of."""

    cls: str
    args: tuple[object, ...] | None = None  # None: the class or function itself
    state: object = None

    def __repr__(self) -> str:
        name = self.cls.rpartition(".")[2]
        if self.args is None:
            return f"<{self.cls[:SHOWN]}>"
        inside = ", ".join("..." if isinstance(arg, (dict, list, tuple)) else repr(arg) for arg in self.args[:4])
        return f"{name[:SHOWN]}({inside[:SHOWN]}{'...' if len(inside) > SHOWN or self.state is not None else ''})"


class Storage(NamedTuple):
    """Where a torch storage lies in its file."""

    offset: int  # bytes
    size: int  # bytes
    dtype: np.dtype | None  # None: untyped, the tensor says


Storages = Callable[[Persistent], Storage]


def plain(node: object, where: str) -> object:
    """A record graph as plain data: dict, list, tuple, str, bytes, numbers, None, and `Opaque` for all else.

    Namespaces become dicts, torch dtypes their names (`"torch.bfloat16"`), enums of Megatron's with words for values
    the word, paths strings. Tensors and NumPy arrays stay `Opaque`: no argument is one.
    """
    return fold(node, plain_node, where)


def plain_node(node: object, value_of: Callable[[object], object]) -> object:
    if type(node) is Global:
        return node.name if is_torch_dtype(node) else Opaque(node.name)
    if type(node) in LEAVES:
        return node
    if type(node) is dict:
        return {plain_key(value_of(key)): value_of(value) for key, value in node.items()}
    if type(node) is list:
        return [value_of(item) for item in node]
    if type(node) is tuple:
        return tuple(value_of(item) for item in node)
    if type(node) is Persistent:
        return Opaque("storage", ())
    assert type(node) is Made
    args = tuple(value_of(arg) for arg in node.args)
    pairs = {plain_key(value_of(key)): value_of(value) for key, value in node.pairs}
    items = [value_of(item) for item in node.items]
    state = value_of(node.state)
    meaning = MEANINGS.get(node.cls)
    known = meaning(args, state, pairs, items) if meaning else enum_word(node.cls, args)
    if known is not None:
        return known
    rest = [value for value in (value_of(node.kwargs), state, pairs, items) if value]
    return Opaque(node.cls, args, (rest[0] if len(rest) == 1 else rest) if rest else None)


def plain_key(key: object) -> object:
    """A key that hashes whatever it is made of."""
    return repr(key) if isinstance(key, Opaque) else key


def is_torch_dtype(node: Global) -> bool:
    return node.name.startswith("torch.") and node.name.removeprefix("torch.") in BY_TORCH


def enum_word(cls: str, args: tuple[object, ...]) -> object:
    """The word of one of Megatron's enums (`Fp8Recipe("delayed")`); None when it is none."""
    if cls.startswith("megatron.") and len(args) == 1 and type(args[0]) is str:
        return args[0]
    return None


# Each meaning gets (args, state, pairs, items), all plain, and gives None when they are not what the name needs.
Meaning = Callable[[tuple, object, dict, list], object]  # type: ignore[type-arg]


def namespace(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    return state if isinstance(state, dict) else {} if state is None else None


def dictionary(args: tuple[object, ...], state: object, pairs: dict[object, object], items: object) -> object:
    return pairs


def collection(args: tuple[object, ...], state: object, pairs: object, items: list[object]) -> object:
    """A set or a deque: a list; sets sorted, as their order differs from rank to rank."""
    given = args[0] if args and isinstance(args[0], list) else []
    return sorted([*given, *items], key=repr)


def size(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    return args[0] if len(args) == 1 and isinstance(args[0], tuple) else None


def joined(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    texts = [str(arg) for arg in args]
    return ("/" + "/".join(texts[1:]) if texts and texts[0] == "/" else "/".join(texts)) or "."


def device(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    return ":".join(str(arg) for arg in args)


def text(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    return args[0] if len(args) == 1 and isinstance(args[0], str) else None


def encoded(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    """Bytes, as protocol 2 spells them."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] == "latin1":
        return args[0].encode("latin1")
    return None


def raw(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    return args[0] if args and isinstance(args[0], bytes) else b"" if not args else None


def member(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    """An enum's member, as Python before 3.11.4 spells it: getattr(class, name)."""
    return args[1] if len(args) == 2 and isinstance(args[0], Opaque) and isinstance(args[1], str) else None


def number(args: tuple[object, ...], state: object, pairs: object, items: object) -> object:
    """A NumPy number: `scalar(dtype("f8"), bytes)`."""
    if len(args) == 2 and isinstance(args[0], Opaque) and args[0].cls == "numpy.dtype" and args[0].args:
        code, data = args[0].args[0], args[1]
        if code in NUMPY_CODES and isinstance(data, bytes):
            values = np.frombuffer(data, f"<{code}")
            return values[0].item() if len(values) == 1 else None
    return None


NUMPY_CODES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
MEANINGS: Mapping[str, Meaning] = {
    "argparse.Namespace": namespace,
    "types.SimpleNamespace": namespace,
    "collections.OrderedDict": dictionary,
    "collections.defaultdict": dictionary,
    "builtins.set": collection,
    "builtins.frozenset": collection,
    "torch.Size": size,
    "torch.device": device,
    "torch.serialization._get_layout": text,
    "pathlib.PosixPath": joined,
    "pathlib.PurePosixPath": joined,
    "pathlib._local.PosixPath": joined,
    "_codecs.encode": encoded,
    "builtins.bytes": raw,
    "builtins.bytearray": raw,
    "builtins.getattr": member,
    "numpy.core.multiarray.scalar": number,
    "numpy._core.multiarray.scalar": number,
}


def entries_of(node: object, what: str, where: str) -> dict[str, object]:
    """A dict or OrderedDict of the pickle as a dict of records, its values untouched."""
    if type(node) is Made and node.cls in ("collections.OrderedDict", "builtins.dict") and not node.args:
        node = dict(node.pairs)
    if type(node) is not dict or not all(type(key) is str and key.isprintable() for key in node):
        raise refuse(f"{what} is no dictionary of names but {word(node)}", where, DAMAGED)
    return node


def word(node: object) -> str:
    """A record's kind, in a word for messages and lists."""
    if type(node) is Made:
        return KINDS.get(node.cls, node.cls)
    if type(node) is Global:
        return node.name
    return "None" if node is None else type(node).__name__


KINDS = {"_io.BytesIO": "bytes", "_codecs.encode": "bytes", "builtins.bytearray": "bytes", "builtins.bytes": "bytes"}
OBJECTS = ("None", "bool", "int", "float", "str", "bytes")  # what a model may hold beside tensors
TENSORS = {
    "torch._utils._rebuild_tensor": 4,  # arguments: storage, offset, size, stride
    "torch._utils._rebuild_tensor_v2": 6,  # requires_grad, backward hooks
    "torch._utils._rebuild_tensor_v3": 7,  # dtype, over an untyped storage
}


def tensor_of(node: object, storages: Storages, file: MappedFile, where: str) -> np.ndarray | None:
    """The tensor a record stands for, as a read-only view of the file; None when the record is no tensor.

    Parameters are their data. Refused: a tensor that reaches outside its storage, or whose elements share bytes (an
    expanded tensor of two billion elements takes four bytes to write down).
    """
    if type(node) is Made and node.cls.startswith("torch._utils._rebuild_parameter") and node.args:
        node = node.args[0]
    if type(node) is not Made or node.cls not in TENSORS:
        return None
    if len(node.args) < TENSORS[node.cls] or type(node.args[0]) is not Persistent:
        raise refuse(f"a tensor is made of {len(node.args)} arguments", where, HOSTILE)
    reference, offset, shape, strides = node.args[:4]
    storage = storages(reference)  # type: ignore[arg-type]
    dtype = dtype_of(node.args[6], where) if TENSORS[node.cls] == 7 else storage.dtype
    if dtype is None:
        raise refuse("a tensor on an untyped storage names no dtype", where, HOSTILE)
    return checked_view(file, storage, dtype, offset, shape, strides, where)


def dtype_of(node: object, where: str) -> np.dtype:
    if type(node) is not Global or not is_torch_dtype(node):
        raise refuse(f"a tensor has the dtype {word(node)}", where, f"megahf reads {', '.join(BY_TORCH)}")
    return BY_TORCH[node.name.removeprefix("torch.")]


def checked_view(
    file: MappedFile, storage: Storage, dtype: np.dtype, offset: object, shape: object, strides: object, where: str
) -> np.ndarray:
    """`offset` and `strides` in elements, as torch writes them: checked, then a view."""
    if not (type(offset) is int and counts(shape) and counts(strides) and offset >= 0):
        raise refuse(
            f"a tensor has offset {offset!r:.40}, shape {shape!r:.80}, strides {strides!r:.80}", where, HOSTILE
        )
    assert isinstance(shape, tuple) and isinstance(strides, tuple)
    if len(shape) != len(strides):
        raise refuse(f"a tensor of shape {list(shape)} has {len(strides)} strides", where, HOSTILE)
    available = storage.size // dtype.itemsize
    reach = 1 + offset
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and stride < reach - offset and math.prod(shape):
            raise refuse(
                f"elements of a tensor of shape {list(shape)}, strides {list(strides)} overlap", where, HOSTILE
            )
        reach += stride * (length - 1)
    if math.prod(shape) == 0:
        return file.view(storage.offset, shape, dtype)
    if reach > available:
        raise refuse(f"a tensor reaches element {reach:,} of a storage of {available:,}", where, HOSTILE)
    steps = tuple(stride * dtype.itemsize for stride in strides)
    return file.view(storage.offset + offset * dtype.itemsize, shape, dtype, steps)


def counts(values: object) -> bool:
    """Whether it is a tuple of sizes: plain integers from 0 that a file can hold."""
    if type(values) is not tuple or len(values) > MAX_DIMENSIONS:
        return False
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)
