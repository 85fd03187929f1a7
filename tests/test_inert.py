"""The promise: what pickle writes is read as the same plain data and the same tensors, without calling anything.

The oracles are Python's pickle and torch.load, on files they wrote themselves.
"""

from __future__ import annotations

import argparse
import collections
import enum
import io
import pathlib
import pickle
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from megahf.checkpoint.inert import Opaque, entries_of, plain, tensor_of
from megahf.checkpoint.mapped import Files
from megahf.checkpoint.opcodes import Machine
from megahf.checkpoint.torchfile import read_torch
from megahf.dtypes import TORCH_NAME
from megahf.errors import Refused


class Shade(enum.Enum):
    dark = 3


class Custom:
    def __init__(self) -> None:
        self.field = [1, 2]


PLAIN = {
    "numbers": [0, 1, -1, 255, 256, 65536, -(2**31), 2**31, 2**127, True, False, None, 1.5, float("inf")],
    "words": ["", "a", "ü" * 300, "日本", "x" * 70000],
    "bytes": [b"", b"\x00\xff", b"y" * 300, bytearray(b"z")],
    "nested": {"a": {"b": [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ()]}, ("k", 1): 2, 7: 8},
    "shared": [[1], [1]],
}


def read(value: object, protocol: int) -> object:
    data = pickle.dumps(value, protocol)
    return plain(Machine(data, 0, len(data), "here").run(), "here")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_values_are_read_as_pickle_reads_them(name: str, protocol: int) -> None:
    assert read(PLAIN[name], protocol) == pickle.loads(pickle.dumps(PLAIN[name], protocol))


@pytest.mark.parametrize("protocol", [2, 4])
def test_known_objects_become_plain_values(protocol: int) -> None:
    given = argparse.Namespace(
        dtype=torch.bfloat16,
        size=torch.Size([2, 3]),
        device=torch.device("cuda", 1),
        path=pathlib.PurePosixPath("/data/x"),
        relative=pathlib.PurePosixPath("data/x"),
        ordered=collections.OrderedDict(a=1),
        words={"b", "a"},
        frozen=frozenset({1}),
        number=np.float64(0.5),
        count=np.int64(7),
        inner=argparse.Namespace(x=1),
    )
    assert read(given, protocol) == {
        "dtype": "torch.bfloat16",
        "size": (2, 3),
        "device": "cuda:1",
        "path": "/data/x",
        "relative": "data/x",
        "ordered": {"a": 1},
        "words": ["a", "b"],
        "frozen": [1],
        "number": 0.5,
        "count": 7,
        "inner": {"x": 1},
    }


@pytest.mark.parametrize("protocol", [2, 4])
def test_unknown_objects_stay_opaque_and_compare(protocol: int) -> None:
    signals, shade, custom = read([signal.SIGTERM, Shade.dark, Custom()], protocol)  # type: ignore[misc]
    assert repr(signals) == "Signals(15)"
    assert "3" in repr(shade) or shade == "dark"
    assert isinstance(custom, Opaque) and custom.cls.endswith("Custom") and custom.state == {"field": [1, 2]}
    assert read(Custom(), protocol) == custom


def test_an_enum_of_megatron_with_a_word_is_the_word() -> None:
    data = b"\x80\x02cmegatron.core.enums\nFp8Recipe\nX\x07\x00\x00\x00delayed\x85R."
    assert plain(Machine(data, 0, len(data), "here").run(), "here") == "delayed"


def test_shared_objects_are_built_once() -> None:
    inner = list(range(100))
    first, second = read([inner, inner], 2)  # type: ignore[misc]
    assert first is second


def test_two_hundred_levels_are_refused_and_a_hundred_are_not() -> None:
    def nested(levels: int) -> list:  # type: ignore[type-arg]
        return [] if levels == 0 else [nested(levels - 1)]

    assert read(nested(100), 4) == nested(100)
    with pytest.raises(Refused, match="200 deep"):
        read(nested(250), 4)


TENSORS = {
    "whole": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "a narrow part": torch.arange(24).reshape(4, 6)[1:3, 2:5],
    "every second row": torch.arange(24).reshape(6, 4)[::2],
    "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "a number": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "empty from one end": torch.arange(4.0)[4:],
    "a parameter": torch.nn.Parameter(torch.ones(2, 2)),
    **{name: torch.arange(6).to(getattr(torch, name)) for name in TORCH_NAME.values()},
}
NEW_ONLY = {
    "uint16",
    "uint32",
    "uint64",
    "float8_e4m3fn",
    "float8_e5m2",
}  # torch.save refuses to write them as a stream


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize(
    ("name", "stream"), [(name, False) for name in TENSORS] + [(name, True) for name in TENSORS if name not in NEW_ONLY]
)
def test_a_tensor_is_the_view_torch_would_load(tmp_path: Path, name: str, stream: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(
        {"odd": torch.ones(3, dtype=torch.uint8), "x": TENSORS[name]}, path, _use_new_zipfile_serialization=not stream
    )
    wanted = torch.load(path)["x"]
    files = Files()
    opened = read_torch(files.open(path), "here")
    array = tensor_of(entries_of(opened.root, "the file", "here")["x"], opened.storage, opened.file, "here")
    assert array is not None
    assert (array.shape, TORCH_NAME[array.dtype]) == (tuple(wanted.shape), str(wanted.dtype).removeprefix("torch."))
    assert not array.flags.writeable
    assert np.ascontiguousarray(array).tobytes() == raw(wanted)
    if wanted.numel():
        assert tuple(step // array.itemsize for step in array.strides) == wanted.stride()
        file, offset = files.locate(array)
        assert file.path == path
        assert path.read_bytes()[offset : offset + array.itemsize] == raw(wanted.flatten()[:1])


@pytest.mark.parametrize("stream", [False, True], ids=["zip", "stream"])
def test_tied_tensors_lie_at_one_place(tmp_path: Path, stream: bool) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    torch.save(
        {"a": weight, "b": weight, "c": weight.t()}, tmp_path / "f.pt", _use_new_zipfile_serialization=not stream
    )
    files = Files()
    opened = read_torch(files.open(tmp_path / "f.pt"), "here")
    nodes = entries_of(opened.root, "the file", "here")
    places = {files.locate(tensor_of(nodes[key], opened.storage, opened.file, "here"))[1] for key in "abc"}  # type: ignore[arg-type]
    assert len(places) == 1


def test_an_expanded_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(10)}, tmp_path / "f.pt")
    opened = read_torch(Files().open(tmp_path / "f.pt"), "here")
    with pytest.raises(Refused, match="overlap"):
        tensor_of(entries_of(opened.root, "f", "here")["x"], opened.storage, opened.file, "here")


def test_without_checksums_the_entry_says_so(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.ones(3)}, tmp_path / "f.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    files = Files()
    opened = read_torch(files.open(tmp_path / "f.pt"), "here")
    array = tensor_of(entries_of(opened.root, "f", "here")["x"], opened.storage, opened.file, "here")
    file, offset = files.locate(array)  # type: ignore[arg-type]
    entry = file.entry_at(offset)
    assert entry is not None and entry.crc is None


def sparse_zip64(path: Path, count: int) -> None:
    """What torch.save writes for one float32 tensor of `count` elements, with a hole in the file for its zeros."""
    small = io.BytesIO()
    torch.save({"x": torch.ones(5)}, small)
    opened = pickle_member(small.getvalue()).replace(b"K\x05", b"\x8a\x05" + count.to_bytes(5, "little"))
    header = 100 + len(opened)
    header += -header % 4
    local = struct.Struct("<4s5H3L2H")
    with open(path, "wb") as out:
        out.write(
            local.pack(b"PK\x03\x04", 45, 0, 0, 0, 0, zlib.crc32(opened), len(opened), len(opened), 10, 0)
            + b"a/data.pkl"
            + opened
        )
        out.seek(header)
        wide = struct.pack("<2H2Q", 1, 16, count * 4, count * 4)
        out.write(
            local.pack(b"PK\x03\x04", 45, 0, 0, 0, 0, 7, 0xFFFFFFFF, 0xFFFFFFFF, 8, len(wide)) + b"a/data/0" + wide
        )
        out.seek(count * 4, 1)
        central, begin = struct.Struct("<4s6H3L5H2L"), out.tell()
        wide = struct.pack("<2H3Q", 1, 24, count * 4, count * 4, header)
        out.write(
            central.pack(
                b"PK\x01\x02", 45, 45, 0, 0, 0, 0, zlib.crc32(opened), len(opened), len(opened), 10, 0, 0, 0, 0, 0, 0
            )
            + b"a/data.pkl"
        )
        out.write(
            central.pack(b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 7, *[0xFFFFFFFF] * 2, 8, len(wide), 0, 0, 0, 0, 0xFFFFFFFF)
            + b"a/data/0"
            + wide
        )
        end = out.tell()
        out.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, end - begin, begin))
        out.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        out.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, 0xFFFFFFFF, 0xFFFFFFFF, 0))


def pickle_member(archive: bytes) -> bytes:
    import zipfile

    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith("data.pkl")))


def test_a_file_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    count = (1 << 30) + 3
    sparse_zip64(tmp_path / "big.pt", count)
    files = Files()
    opened = read_torch(files.open(tmp_path / "big.pt"), "here")
    array = tensor_of(entries_of(opened.root, "f", "here")["x"], opened.storage, opened.file, "here")
    assert array is not None and array.shape == (count,) and array[-1] == 0
    file, offset = files.locate(array[-1:])
    entry = file.entry_at(offset)
    assert entry is not None and (entry.size, entry.crc) == (count * 4, 7)


def test_a_thousand_files_where_few_may_be_open(tmp_path: Path) -> None:
    """The soft limit is raised when it is met; every view finds its own file."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for number in range(1000):
        (tmp_path / str(number)).write_bytes(bytes([number % 256]) * (number + 1))
    files = Files()
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        views = [files.open(tmp_path / str(number)).view(number, (1,), np.dtype("u1")) for number in range(1000)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for number, view in enumerate(views):
        file, offset = files.locate(view)
        assert (file.path.name, offset, view[0]) == (str(number), number, number % 256)
    files.close()


def test_an_array_in_memory_is_on_no_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    files = Files()
    files.open(tmp_path / "f")
    with pytest.raises(LookupError):
        files.locate(np.zeros(3))


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    file = Files().open(tmp_path / "f")
    (tmp_path / "f").write_bytes(b"abcd")
    with pytest.raises(Refused, match="changed"):
        file.fileno()
