"""The promise: an archive laid out before its tensors' bytes are known is, once written, the one torch.save writes.

torch is the oracle: byte for byte, and by what torch.load gives; Python's zipfile checks every checksum.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from outputs import Array, contents, leaf, write
from torch.utils.serialization import config

from megahf.checkpoint.inert import entries_of, tensor_of
from megahf.checkpoint.mapped import MappedFile
from megahf.checkpoint.opcodes import Global, Made
from megahf.checkpoint.output import Known, Output
from megahf.checkpoint.torch_writing import Tensor, end_to_end, torch_file
from megahf.checkpoint.torchfile import read_torch
from megahf.dtypes import BY_TORCH
from megahf.errors import Refused

DTYPES = tuple(BY_TORCH)


def ordered(pairs: Iterable[tuple[object, object]]) -> Made:
    made = Made("collections.OrderedDict", ())
    made.pairs = list(pairs)
    return made


def tensors() -> OrderedDict[str, torch.Tensor]:
    """One of each number format, in shapes that have no elements, no axes, and sizes that are no multiple of 64."""
    torch.manual_seed(0)
    made = OrderedDict((name, (torch.randn(5, 3) * 9).to(getattr(torch, name))) for name in DTYPES)
    return made | {
        "scalar": torch.tensor(2.0),
        "none": torch.zeros(0, dtype=torch.uint8),
        "no rows": torch.zeros(0, 4),
        "no columns": torch.zeros(2, 0, 3),
        "four axes": torch.randn(2, 1, 3, 5).bfloat16(),
        "last": torch.randn(33),
    }


def roots() -> tuple[object, object]:
    """What torch.save is given, and our records of it."""
    state = tensors()
    rest = {"iteration": 10, "checkpoint_version": 3.0, "rng": [1, (2, "x"), None], "dtype": torch.bfloat16}
    model = ordered([*((name, leaf(name, value)) for name, value in state.items()), ("x._extra_state", None)])
    records = {**rest, "dtype": Global("torch.bfloat16"), "model": model}
    return {**rest, "model": OrderedDict([*state.items(), ("x._extra_state", None)])}, records


def same(found: object, wanted: object) -> bool:
    """Equal in type, and tensors bit by bit."""
    if isinstance(wanted, torch.Tensor) and isinstance(found, torch.Tensor):
        layout = (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        return layout and Array("", found).bytes == Array("", wanted).bytes
    if isinstance(wanted, dict) and isinstance(found, dict):
        return list(found) == list(wanted) and all(same(found[key], wanted[key]) for key in wanted)
    return type(found) is type(wanted) and found == wanted


def identity_of(file: Path | io.BytesIO) -> tuple[bytes, bytes]:
    """The serialization id and its checksum."""
    with zipfile.ZipFile(file) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("/.data/serialization_id"))
        return archive.read(info), info.CRC.to_bytes(4, "little")


def without_identity(data: bytes, identity: tuple[bytes, bytes]) -> bytes:
    """The bytes with the id, and its checksum in descriptor and directory, blanked."""
    value, crc = identity
    assert (data.count(value), data.count(crc)) == (1, 2)
    return data.replace(value, b"i" * 40).replace(crc, b"crc!")


def blanked(data: bytes) -> bytes:
    return without_identity(data, identity_of(io.BytesIO(data)))


@pytest.mark.parametrize("file", ["model_optim_rng.pt", "common.pt", "mp_rank_00_000/model_optim_rng.pt"])
def test_the_bytes_are_those_of_torch_save(tmp_path: Path, file: str) -> None:
    given, records = roots()
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    torch.save(given, path)
    assert blanked(contents(torch_file(file, records))) == blanked(path.read_bytes())


def test_a_lone_tensor_has_the_bytes_of_a_stream(tmp_path: Path) -> None:
    """What torch.distributed.checkpoint writes for each chunk."""
    tensor, stream = torch.randn(7, 3), io.BytesIO()
    torch.save(tensor, stream)
    assert blanked(contents(torch_file("archive", leaf("w", tensor)))) == blanked(stream.getvalue())


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("calculate", [False, True], ids=["directory", "calculated offsets"])
def test_torch_loads_it(tmp_path: Path, mmap: bool, weights_only: bool, calculate: bool) -> None:
    given, records = roots()
    path = write(torch_file("model_optim_rng.pt", records), tmp_path)
    with config.patch({"load.calculate_storage_offsets": calculate}):
        assert same(torch.load(path, weights_only=weights_only, mmap=mmap), given)


def test_every_checksum_is_right(tmp_path: Path) -> None:
    with zipfile.ZipFile(write(torch_file("a.pt", roots()[1]), tmp_path)) as archive:
        assert archive.testzip() is None
        assert all(info.CRC for info in archive.infolist() if info.file_size)


def test_a_wrong_byte_is_seen_by_its_checksum(tmp_path: Path) -> None:
    output = torch_file("a.pt", leaf("w", torch.ones(8)))
    data = bytearray(contents(output))
    data[output.offsets["w"]] ^= 1
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() == "a/data/0"


def test_our_reader_finds_the_same(tmp_path: Path) -> None:
    file = MappedFile(write(torch_file("a.pt", roots()[1]), tmp_path))
    opened = read_torch(file, "a.pt")
    model = entries_of(entries_of(opened.root, "", "")["model"], "", "")
    for name, tensor in tensors().items():
        found = tensor_of(model[name], opened.storage, file, name)
        assert found is not None
        assert (found.shape, found.dtype, found.tobytes()) == (
            tuple(tensor.shape), Array("", tensor).dtype, Array("", tensor).bytes
        )  # fmt: skip


def test_weights_lie_at_multiples_of_64() -> None:
    output = torch_file("a.pt", roots()[1])
    assert [offset % 64 for offset in output.offsets.values()] == [0] * len(tensors())


@given(st.lists(st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)), max_size=12), st.text())
def test_any_list_of_tensors_comes_back(shapes: list[tuple[list[int], str]], text: str) -> None:
    given = [
        torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype)) for shape, dtype in shapes
    ]
    root = [text, *(leaf(f"w{at}", tensor) for at, tensor in enumerate(given))]
    data = contents(torch_file("any.pt", root))
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert found[0] == text
    assert all(same(*pair) for pair in zip(found[1:], given, strict=True))


def test_a_weight_in_two_places_is_stored_once() -> None:
    """Tied weights; two leaves of one name are the same weight, as one leaf in two places is."""
    tensor = torch.randn(3)
    one = leaf("w", tensor)
    output = torch_file("a.pt", {"a": one, "b": one, "c": leaf("w", tensor)})
    assert len(output.weights) == 1
    loaded = torch.load(io.BytesIO(contents(output)), weights_only=True)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() == loaded["c"].data_ptr()


def test_two_weights_of_one_name_are_refused() -> None:
    with pytest.raises(Refused, match="two weights of one file are called w"):
        torch_file("a.pt", [leaf("w", torch.ones(3)), leaf("w", torch.ones(4))])
    part = torch_file("a.pt", leaf("w", torch.ones(3)))
    with pytest.raises(Refused, match=r"two weights of one file are called w.*x\.pt"):
        end_to_end("x.pt", [part, part])


def test_a_file_without_weights_is_known_whole() -> None:
    output: Output[Array] = torch_file("common.pt", {"iteration": 10})
    assert output.finish is None
    ((start, data),) = output.known
    assert (start, len(data)) == (0, output.nbytes)
    assert torch.load(io.BytesIO(data), weights_only=True) == {"iteration": 10}


def test_the_id_tells_files_apart_and_nothing_else() -> None:
    def identity(value: float) -> bytes:
        data = contents(torch_file("a.pt", leaf("w", torch.full((3,), value))))
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.read("a/.data/serialization_id")

    assert identity(1.0) == identity(1.0) != identity(2.0)
    assert len(identity(1.0)) == 40 and identity(1.0).isdigit()


def test_what_torch_could_not_hold_is_refused() -> None:
    with pytest.raises(Refused, match=r"torch\.Tensor cannot be pickled"):
        torch_file("a.pt", {"w": torch.ones(2)})


def test_files_end_to_end_are_each_whole(tmp_path: Path) -> None:
    state = tensors()
    parts = [torch_file("archive", leaf(name, tensor)) for name, tensor in state.items()]
    parts.insert(2, torch_file("archive", [None]))
    data = contents(end_to_end("__0_0.distcp", parts))
    at, found = 0, []
    for part in parts:
        found.append(torch.load(io.BytesIO(data[at : at + part.nbytes]), weights_only=True))
        at += part.nbytes
    assert at == len(data)
    assert found.pop(2) == [None]
    assert all(same(*pair) for pair in zip(found, state.values(), strict=True))


@dataclass(frozen=True)
class Large:
    """A weight that nobody holds."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype = np.dtype(np.uint8)  # noqa: RUF009

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


GIB = 1 << 30
LARGE = {"a": (5 * GIB,), "b": (7,), "c": (5, GIB), "d": (0,), "e": (4 * GIB - 1,), "f": (4 * GIB - 2,)}


def large() -> Output[Large]:
    """Weights of 4 GiB and more, and what begins behind them."""
    return torch_file("large.pt", {name: Tensor(Large(name, shape)) for name, shape in LARGE.items()})


def write_sparse(output: Output[Large], path: Path, values: dict[str, bytes]) -> Path:
    pieces: list[Known] = [*output.known, *((output.offsets[name], value) for name, value in values.items())]
    crcs = {weight.name: zlib.crc32(values.get(weight.name, b"")) for weight in output.weights}
    with open(path, "wb") as file:
        file.truncate(output.nbytes)
        for at, data in [*pieces, *output.finish(crcs)]:  # type: ignore[misc]
            file.seek(at)
            file.write(data)
    return path


def test_beyond_4_gib_the_bytes_are_those_of_torch_save(tmp_path: Path) -> None:
    """torch lays the file out without writing the tensors, whose checksums are then zeros: as ours here."""
    holes = str(tmp_path / "holes")
    state = {
        name: torch.from_file(holes, shared=True, size=torch.Size(shape).numel(), dtype=torch.uint8).reshape(shape)
        for name, shape in LARGE.items()
    }
    theirs = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        torch.save(state, theirs)
    output = large()
    ours = write_sparse(output, tmp_path / "ours.pt", {})
    assert theirs.stat().st_size == ours.stat().st_size == output.nbytes
    *pieces, last = [*output.known, *output.finish(dict.fromkeys(LARGE, 0))]  # type: ignore[misc]
    assert [part(theirs, at, len(data)) == data for at, data in pieces] == [True] * len(pieces)
    at, size = last[0], len(last[1])
    blanks = [without_identity(part(path, at, size), identity_of(path)) for path in (ours, theirs)]
    assert blanks[0] == blanks[1]


def part(path: Path, at: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(at)
        return file.read(size)


def test_beyond_4_gib_everybody_finds_the_weights(tmp_path: Path) -> None:
    path = write_sparse(large(), tmp_path / "large.pt", {"b": b"1234567"})
    assert os.stat(path).st_blocks * 512 < GIB  # the holes are holes
    with zipfile.ZipFile(path) as archive:
        assert archive.read("large/data/1") == b"1234567"  # its checksum is looked at
        assert [archive.getinfo(f"large/data/{at}").file_size for at in (0, 2)] == [5 * GIB, 5 * GIB]
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == LARGE
    assert bytes(loaded["b"].tolist()) == b"1234567"
    file = MappedFile(path)
    opened = read_torch(file, "large.pt")
    found = {name: tensor_of(node, opened.storage, file, name) for name, node in opened.root.items()}  # type: ignore[attr-defined]
    assert {name: array.shape for name, array in found.items() if array is not None} == LARGE
    assert found["b"].tobytes() == b"1234567"  # type: ignore[union-attr]
