"""The safetensors files: which weight goes into which shard at which offset, and reading them back.

Byte for byte what `save_pretrained` writes: shards filled in the order of the weights (huggingface_hub's rule), tensors
in a file ordered by the width of their numbers and then by name, metadata `{"format": "pt"}` (safetensors' rule).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import dtypes
from ..errors import Problems, refuse
from ..jsonfile import read_json
from .mapped import Files, MappedFile
from .output import Output, W

INDEX = "model.safetensors.index.json"
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """`5GB`, `300MB`, `2GiB` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(text))
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise refuse(f"{text!r} is not a size", "--max-shard-size", "write it like 5GB, 300MB or 2GiB")
    return size


def shards(weights: Sequence[W], max_size: int) -> list[Output[W]]:
    """The weights over files of at most `max_size` bytes; a weight that is larger has a file of its own."""
    done: list[list[W]] = []
    current: list[W] = []
    filled = 0
    for weight in weights:
        if weight.nbytes > max_size:
            done.append([weight])
            continue
        if filled + weight.nbytes > max_size:
            done.append(current)
            current, filled = [], 0
        current.append(weight)
        filled += weight.nbytes
    done += [current] if current else []
    count = len(done)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return [shard(name, group) for name, group in zip(names if count > 1 else ["model.safetensors"], done, strict=True)]


def shard(file: str, weights: Sequence[W]) -> Output[W]:
    """One file: its header, and where each weight goes."""
    ordered = sorted(weights, key=lambda weight: (-rank(weight.dtype), weight.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, start = {}, 0
    for weight in ordered:
        starts[weight.name] = start
        entries[weight.name] = {
            "dtype": dtypes.SAFETENSORS_NAME[weight.dtype],
            "shape": list(weight.shape),
            "data_offsets": [start, start + weight.nbytes],
        }
        start += weight.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: len(header) + at for name, at in starts.items()}
    return Output(file, len(header) + start, ((0, header),), tuple(ordered), offsets)


# safetensors' own order of number formats (the `Dtype` enum of its Rust source): by this first, widest last
ORDER = (
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "C64",
    "F64",
    "I64",
    "U64",
)


def rank(dtype: np.dtype) -> int:
    return ORDER.index(dtypes.SAFETENSORS_NAME[dtype])


def index(shards: Sequence[Output[W]], buffers: Collection[str] = ()) -> bytes:
    """`model.safetensors.index.json`; weights named in `buffers` are no parameters."""
    weights = [weight for shard in shards for weight in shard.weights]
    metadata = {
        "total_parameters": sum(math.prod(weight.shape) for weight in weights if weight.name not in buffers),
        "total_size": sum(weight.nbytes for weight in weights),
    }
    places = {weight.name: shard.file for shard in shards for weight in shard.weights}
    return (json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Written:
    """A tensor in a safetensors file."""

    file: MappedFile
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored(folder: Path, files: Files) -> dict[str, Written]:
    """Every tensor in the safetensors files of `folder`, whose headers are checked against the files and the index."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise refuse("no safetensors files", folder)
    found: dict[str, Written] = {}
    problems = Problems()
    for path in paths:
        for name, written in header(files.open(path)).items():
            if name in found:
                problems.add(f"{name} is in two files", path)
            found[name] = written
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise refuse("the index cannot be read: it has no weight_map", folder / INDEX)
        absent = {name: file for name, file in places.items() if not (folder / str(file)).exists()}
        for file in sorted(set(map(str, absent.values()))):
            problems.add("a file that the index names is missing", folder / file, "copy it again, too")
        for name in sorted((set(places) ^ set(found)) - set(absent)):
            problems.add("index and files differ", name)
        for name in sorted(set(places) & set(found) - set(absent)):
            if places[name] != found[name].file.path.name:
                problems.add(f"the index has it in {places[name]}, it is in {found[name].file.path.name}", name)
    problems.raise_if_any()
    return found


def header(file: MappedFile) -> dict[str, Written]:
    """The tensors of one file; their bytes must fill it exactly."""
    length = int.from_bytes(file.map[:8], "little")
    if file.size < 8 or length > min(file.size - 8, 100 << 20):
        raise refuse("not a safetensors file, or cut short", file.path)
    try:
        entries = json.loads(file.map[8 : 8 + length])
        entries.pop("__metadata__", None)
        tensors, at = {}, 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            dtype, shape = dtypes.BY_SAFETENSORS[entry["dtype"]], tuple(entry["shape"])
            if not all(type(size) is int and size >= 0 for size in (start, end, *shape)):
                raise ValueError(f"{name} has the shape {shape} and the place {start} to {end}")
            if start != at or end - start != math.prod(shape) * dtype.itemsize:
                raise refuse(f"the bytes of {name} are not where its shape needs them", file.path)
            tensors[name] = Written(file, 8 + length + start, shape, dtype)
            at = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(f"the header cannot be read: {error}", file.path) from error
    if 8 + length + at != file.size:
        raise refuse(f"{file.size} bytes where the header needs {8 + length + at}", file.path, "the file was cut short")
    return tensors
