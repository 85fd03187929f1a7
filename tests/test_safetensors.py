"""The files are byte for byte those of safetensors and huggingface_hub, and damaged ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from megahf import dtypes
from megahf.checkpoint.mapped import Files
from megahf.checkpoint.safetensors import INDEX, index, parse_size, shard, shards, stored
from megahf.errors import Refused
from megahf.reading import pread

KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
KINDS += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
KINDS += [torch.bool, torch.complex64]


class Weight(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    data: bytes

    @property
    def nbytes(self) -> int:
        return len(self.data)


def weights(state: dict[str, torch.Tensor]) -> list[Weight]:
    return [
        Weight(name, tuple(value.shape), dtypes.BY_TORCH[str(value.dtype)[6:]], raw(value))
        for name, value in state.items()
    ]


def raw(value: torch.Tensor) -> bytes:
    return bytes(value.contiguous().flatten().view(torch.uint8).numpy())


def random_state(draws: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    return {name: (torch.rand(shape) * 9).to(dtype) for name, dtype, shape in draws}


STATES = st.lists(
    st.tuples(
        st.text("abc.w0é", min_size=1, max_size=6),
        st.sampled_from(KINDS),
        st.lists(st.integers(1, 5), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda draw: draw[0],
).map(random_state)


@given(STATES)
def test_a_file_is_byte_for_byte_what_safetensors_writes(state: dict[str, torch.Tensor]) -> None:
    ours = shard("model.safetensors", weights(state))
    written = ours.known[0][1] + b"".join(weight.data for weight in ours.weights)
    assert written == save(state, metadata={"format": "pt"})
    assert len(written) == ours.nbytes
    for weight in ours.weights:
        at = ours.offsets[weight.name]
        assert written[at : at + weight.nbytes] == weight.data


def test_number_formats_are_in_the_order_of_safetensors() -> None:
    state = {f"w{number}": torch.zeros(8, dtype=dtype) for number, dtype in enumerate(KINDS)}
    ours = shard("model.safetensors", weights(state))
    assert ours.known[0][1] + b"".join(weight.data for weight in ours.weights) == save(state, metadata={"format": "pt"})


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 100))
def test_shards_and_index_are_those_of_huggingface_hub(lengths: list[int], size: int) -> None:
    state = {f"layers.{number}.weight": torch.zeros(length) for number, length in enumerate(lengths)}
    theirs = split_torch_state_dict_into_shards(state, max_shard_size=4 * size)
    ours = shards(weights(state), 4 * size)
    assert {file.file: sorted(w.name for w in file.weights) for file in ours} == {
        file: sorted(names) for file, names in theirs.filename_to_tensors.items()
    }
    if len(ours) > 1:
        made = json.loads(index(ours))
        assert made["weight_map"] == theirs.tensor_to_filename
        assert made["metadata"]["total_size"] == theirs.metadata["total_size"]
        assert made["metadata"]["total_parameters"] == sum(lengths)


@pytest.mark.parametrize(
    "text, size",
    [
        ("5GB", 5 * 10**9),
        ("300MB", 3 * 10**8),
        ("2GiB", 2 * 2**30),
        ("1.5kb", 1500),
        ("12", 12),
        (7, 7),
        ("1 TB", 10**12),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 bananas", "5GBps", "0", "0GB", "0.0001B", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(Refused, match=r"is not a size \(--max-shard-size\); write it like 5GB"):
        parse_size(text)


def write(folder: Path) -> None:
    save_file(
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}, folder / "model-1.safetensors"
    )
    save_file({"c": torch.arange(4)}, folder / "model-2.safetensors")
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_what_safetensors_wrote_is_read_back(tmp_path: Path) -> None:
    write(tmp_path)
    found = stored(tmp_path, Files())
    assert {name: (w.shape, str(w.dtype)) for name, w in found.items()} == {
        "a": ((2, 3), "float32"), "b": ((3,), "bfloat16"), "c": ((4,), "int64"),
    }  # fmt: skip
    data = pread(found["a"].file, found["a"].offset, np.empty(found["a"].nbytes, np.uint8))
    assert data.view(np.float32).tolist() == [0, 1, 2, 3, 4, 5]


def header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Alters the header of a file and leaves its bytes."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def patch(entry: str, field: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: header(folder / "model-1.safetensors", lambda entries: entries[entry].update({field: value}))


def cut(length: int) -> Callable[[Path], None]:
    file = "model-1.safetensors"
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:length])  # type: ignore[return-value]


def text(data: bytes) -> Callable[[Path], None]:
    made = len(data).to_bytes(8, "little") + data
    return lambda folder: (folder / "model-1.safetensors").write_bytes(made)  # type: ignore[return-value]


def places(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        made = json.loads((folder / INDEX).read_text())
        change(made["weight_map"])
        (folder / INDEX).write_text(json.dumps(made))

    return alter


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (cut(0), "the file is empty"),
    "cut in the length": (cut(5), "not a safetensors file, or cut short"),
    "cut in the header": (cut(40), "not a safetensors file, or cut short"),
    "cut in the data": (cut(-3), "the file was cut short"),
    "bytes too many": (
        lambda folder: (folder / "model-1.safetensors").open("ab").write(b"more"), "bytes where the header needs",
    ),
    "no json": (text(b"{nope"), "the header cannot be read"),
    "no object": (text(b"[1, 2]"), "the header cannot be read"),
    "not utf-8": (text(b"\xff\xfe"), "the header cannot be read"),
    "entry that is no object": (text(b'{"a": 3}'), "the header cannot be read"),
    "entry without a dtype": (text(b'{"a": {"shape": [], "data_offsets": [0, 0]}}'), "the header cannot be read"),
    "unknown dtype": (patch("a", "dtype", "F7"), "the header cannot be read"),
    "negative shape": (patch("a", "shape", [-2, -3]), "the header cannot be read"),
    "shape of text": (patch("a", "shape", ["2", "3"]), "the header cannot be read"),
    "shape that does not fit": (patch("a", "shape", [2, 4]), "the bytes of a are not where its shape needs them"),
    "overlap": (patch("b", "data_offsets", [20, 26]), "are not where its shape needs them"),
    "hole": (patch("b", "data_offsets", [26, 32]), "are not where its shape needs them"),
    "length of exabytes": (
        lambda folder: (folder / "model-1.safetensors").write_bytes(b"\xff" * 60), "not a safetensors file",
    ),
    "weight in two files": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "model-2.safetensors"), "a is in two files",
    ),
    "weight the index misses": (places(lambda made: made.pop("c")), r"index and files differ \(c\)"),
    "weight only the index has": (places(lambda made: made.update(d=made["a"])), r"index and files differ \(d\)"),
    "file only the index has": (
        places(lambda made: made.update(d="x")), r"a file that the index names is missing \(.*/x\); copy it"
    ),
    "weight in another file": (
        places(lambda made: made.update(c="model-1.safetensors")),
        "the index has it in model-1.safetensors, it is in model-2",
    ),
    "index that is no json": (lambda folder: (folder / INDEX).write_text("{"), "cannot be read"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "cannot be read"),
    "no files": (lambda folder: [file.unlink() for file in folder.glob("*.safetensors")], "no safetensors files"),
}  # fmt: skip


@pytest.mark.parametrize("damage, says", DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_files_are_refused_with_the_reason(tmp_path: Path, damage: Callable[[Path], Any], says: str) -> None:
    write(tmp_path)
    stored(tmp_path, Files())
    damage(tmp_path)
    with pytest.raises(Refused, match=says):
        stored(tmp_path, Files())
