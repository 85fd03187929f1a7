"""`torch_dist` and `torch_dcp`: directories of torch.distributed.checkpoint, with global tensors cut into chunks.

`.metadata` is a pickle that says which chunk of which tensor lies where; each chunk is a `torch.save` file of its own,
end to end with others in a `__R_K.distcp`. Megatron's torch_dist adds `metadata.json`, has keys without `model.`, and
keeps what is no tensor in `common.pt`, or since 2026 in the item `common_state/shard_0_1`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megahf.checkpoint import Checkpoint, Holding, iteration_in
from megahf.checkpoint.inert import entries_of, plain, tensor_of, word
from megahf.checkpoint.mapped import Entry, Files
from megahf.checkpoint.opcodes import DAMAGED, HOSTILE, MAX_PICKLE, Global, Machine, Made, malformed_is_refused
from megahf.checkpoint.torchfile import read_torch
from megahf.dtypes import BY_TORCH
from megahf.errors import Problems, refuse
from megahf.tiles import Tile, Tiled

METADATA, BACKEND, COMMON = ".metadata", "metadata.json", "common.pt"
COMMON_ITEM = "common_state/shard_0_1"
COMMON_NAMES = ("args", "iteration", "checkpoint_version")
DATACLASSES = "torch.distributed.checkpoint."
METADATA_CLASSES = ("metadata.Metadata", "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata")  # any, 0.15
PROPERTIES = (
    "metadata.TensorProperties",
    "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
)  # new, old
SHARD = re.compile(r"/shard_[\d.]+_[\d.]+$")  # what Megatron's ShardedObject adds to its key
SECTIONS = re.compile(
    r"(chained_\d+\.)*(optimizer|rng_state|rerun_state_machine_state|opt_param_scheduler|common_state)\b"
)
FILE_NAME = re.compile(r"\w[\w.\-]{0,250}", re.ASCII)  # no directory, no way out of ours
MAX_CELLS = 1 << 22


class Place(NamedTuple):
    """Where an item of the checkpoint lies."""

    file: str
    offset: int
    size: int


class Chunk(NamedTuple):
    start: tuple[int, ...]
    shape: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class Stored:
    """A whole tensor of the checkpoint: its chunks cover it exactly once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[Chunk, ...]


def recognises(directory: Path) -> bool:
    """Whether the directory is a distributed checkpoint, of a backend that is read or not."""
    return any((directory / name).exists() for name in (METADATA, BACKEND, COMMON)) or has_zarr(directory)


def has_zarr(directory: Path) -> bool:
    """Whether it has a directory for each tensor: the default of megatron-core 0.5, written until 0.15."""
    return any((child / ".zarray").exists() for child in directory.iterdir())


def open_distributed(directory: Path, files: Files) -> Checkpoint:
    """Opens a checkpoint by its `.metadata`; chunks are opened when they are read."""
    refuse_backends(directory)
    with malformed_is_refused(METADATA):
        metadata = read_metadata(directory, files)
    if (directory / BACKEND).exists() or (directory / COMMON).exists():
        return open_torch_dist(directory, files, metadata)
    return open_torch_dcp(directory, files, metadata)


def refuse_backends(directory: Path) -> None:
    backend = "torch_dist"
    if (directory / BACKEND).exists():
        with malformed_is_refused(BACKEND):
            described = json.loads((directory / BACKEND).read_bytes()[: 1 << 20])
            backend = described["sharded_backend"]
    if backend == "zarr" or has_zarr(directory):
        raise refuse(
            "this is a zarr checkpoint", directory,
            "load it with Megatron-LM core_v0.15.0 or older and save it with --ckpt-format torch_dist",
        )  # fmt: skip
    if backend != "torch_dist":
        raise refuse(
            f"the sharded backend is {backend!r:.40}", directory, "save it again with --ckpt-format torch_dist"
        )
    if not (directory / METADATA).exists():
        raise refuse(
            f"there is no {METADATA}",
            directory,
            "the save did not finish, or the file (hidden by its name) was not copied",
        )


class Metadata(NamedTuple):
    """What `.metadata` says, in records."""

    tensors: Mapping[str, Made]  # TensorStorageMetadata
    objects: list[str]
    places: Mapping[str, Mapping[tuple[int, ...] | None, Place]]  # key -> offsets of the chunk -> place
    paths: Mapping[str, tuple[object, ...]]  # key -> its path in the nested state dict, where noted


def read_metadata(directory: Path, files: Files) -> Metadata:
    """`.metadata` in records: only the fields that say what lies where are looked at."""
    file = files.open(directory / METADATA)
    if file.size > MAX_PICKLE:
        raise refuse(f"{METADATA} has {file.size:,} bytes, more than {MAX_PICKLE:,}", directory, HOSTILE)
    machine = Machine(file.map, 0, file.size, METADATA)
    root = machine.run()
    name = class_of(root)
    fields = fields_of(root, name if name in METADATA_CLASSES else METADATA_CLASSES[0])
    described = entries_of(fields["state_dict_metadata"], "the list of tensors", METADATA)
    refuse_flattened(fields.get("mcore_data"))
    tensors = {
        key: node
        for key, node in described.items()
        if type(node) is Made and class_of(node) == "metadata.TensorStorageMetadata"
    }
    objects = [key for key, node in described.items() if class_of(node) == "metadata.BytesStorageMetadata"]
    if len(tensors) + len(objects) != len(described):
        odd = next(key for key in described if key not in tensors and key not in objects)
        raise refuse(f"{odd} is stored as {word(described[odd])}", METADATA, HOSTILE)
    paths = fields.get("planner_data")
    return Metadata(
        tensors, objects, places_of(fields["storage_data"]),
        entries_of(paths, "planner_data", METADATA) if paths else {},  # type: ignore[arg-type]
    )  # fmt: skip


def refuse_flattened(node: object) -> None:
    """Megatron-core 0.8 to 0.15 has an entry for each tensor here, empty unless it is stored flattened.

    Only a distributed optimizer's states are, and those nobody reads.
    """
    noted = entries_of(node, "mcore_data", METADATA) if node else {}
    weights = [key for key, entry in noted.items() if entry and not SECTIONS.match(key)]
    if weights:
        remedy = "load it with the Megatron that saved it and save it with --ckpt-format torch"
        raise refuse("a weight is stored flattened", ", ".join(weights[:5]), remedy)


def class_of(node: object) -> str:
    """The dataclass of torch.distributed.checkpoint that a record is, without the package."""
    return node.cls.removeprefix(DATACLASSES) if type(node) is Made and node.cls.startswith(DATACLASSES) else word(node)


def fields_of(node: object, name: str) -> dict[str, object]:
    """The fields of a dataclass that must be `name`."""
    if class_of(node) != name:
        raise refuse(f"{class_of(node)} stands where {name} belongs", METADATA, DAMAGED)
    assert type(node) is Made
    return entries_of(node.state, name, METADATA)


def places_of(storage_data: object) -> dict[str, dict[tuple[int, ...] | None, Place]]:
    places: dict[str, dict[tuple[int, ...] | None, Place]] = {}
    if type(storage_data) is not dict:
        raise refuse(f"the list of places is {word(storage_data)}", METADATA, DAMAGED)
    for index, info in storage_data.items():
        index, info = fields_of(index, "metadata.MetadataIndex"), fields_of(info, "filesystem._StorageInfo")
        key, offset = index["fqn"], index.get("offset")
        file, start, size = info["relative_path"], info["offset"], info["length"]
        if info.get("transform_descriptors"):
            raise refuse(f"{key} is compressed", METADATA, "save it without transforms")
        if not (type(file) is str and FILE_NAME.fullmatch(file) and type(start) is int and type(size) is int):
            raise refuse(f"{key!r:.80} lies in {file!r:.80}", METADATA, HOSTILE)
        if start < 0 or size < 0 or type(key) is not str:
            raise refuse(f"{key!r:.80} lies at {start}, {size} bytes", METADATA, HOSTILE)
        places.setdefault(key, {})[None if offset is None else sizes_of(offset)] = Place(file, start, size)
    return places


def sizes_of(node: object) -> tuple[int, ...]:
    """A torch.Size."""
    if type(node) is Made and node.cls == "torch.Size" and len(node.args) == 1:
        node = node.args[0]
    if type(node) is not tuple or not all(type(value) is int and 0 <= value < 1 << 62 for value in node):
        raise refuse(f"{word(node)} stands where a torch.Size belongs", METADATA, HOSTILE)
    return node


def stored(key: str, metadata: Metadata) -> Stored:
    """A tensor with the place of every chunk."""
    fields = fields_of(metadata.tensors[key], "metadata.TensorStorageMetadata")
    shape = sizes_of(fields["size"])
    nodes, places, chunks = fields["chunks"], metadata.places.get(key, {}), []
    if type(nodes) is not list:
        raise refuse(f"the chunks of {key} are {word(nodes)}", METADATA, DAMAGED)
    for node in nodes:
        chunk = fields_of(node, "metadata.ChunkStorageMetadata")
        start, size = sizes_of(chunk["offsets"]), sizes_of(chunk["sizes"])
        place = places.get(start, places.get(None) if len(nodes) == 1 else None)
        if place is None:
            raise refuse(f"{key}: the chunk at {list(start)} is stored nowhere", METADATA, DAMAGED)
        chunks.append(Chunk(start, size, place))
    whole = Stored(shape, dtype_of(key, fields["properties"]), tuple(chunks))
    check_cover(key, whole)
    return whole


def dtype_of(key: str, properties: object) -> np.dtype:
    """The dtype in TensorProperties, whose state is a tuple, or a dictionary in older files."""
    if type(properties) is not Made or class_of(properties) not in PROPERTIES:
        raise refuse(f"{key} has the properties {word(properties)}", METADATA, DAMAGED)
    state = properties.state
    node = state["dtype"] if type(state) is dict else state[0]  # type: ignore[index]
    name = node.name.removeprefix("torch.") if type(node) is Global else word(node)
    if name not in BY_TORCH:
        raise refuse(f"{key} has the dtype {name}", METADATA, f"megahf reads {', '.join(BY_TORCH)}")
    return BY_TORCH[name]


def check_cover(key: str, whole: Stored) -> None:
    """Refuses chunks with a hole between them, an overlap, or a place outside the tensor.

    The places where a chunk begins or ends cut the tensor into cells; every cell must be covered once.
    """
    rank = len(whole.shape)
    for start, shape, _ in whole.chunks:
        outside = len(start) != rank or len(shape) != rank
        if outside or any(at + size > length for at, size, length in zip(start, shape, whole.shape, strict=True)):
            raise refuse(
                f"{key}: a chunk at {list(start)} of {list(shape)} is outside {list(whole.shape)}", METADATA, DAMAGED
            )
    if math.prod(whole.shape) == 0:
        return
    if sum(math.prod(chunk.shape) for chunk in whole.chunks) != math.prod(whole.shape):
        raise refuse(f"{key}: its {len(whole.chunks)} chunks do not cover {list(whole.shape)}", METADATA, DAMAGED)
    cuts = [
        sorted(
            {0, length, *(c.start[axis] for c in whole.chunks), *(c.start[axis] + c.shape[axis] for c in whole.chunks)}
        )
        for axis, length in enumerate(whole.shape)
    ]
    index = [{cut: at for at, cut in enumerate(axis)} for axis in cuts]
    if math.prod(len(axis) - 1 for axis in cuts) > MAX_CELLS:
        raise refuse(f"{key}: its {len(whole.chunks)} chunks form no grid", METADATA, HOSTILE)
    covered = np.zeros([len(axis) - 1 for axis in cuts], bool)
    for start, shape, _ in whole.chunks:
        cell = tuple(
            slice(index[a][at], index[a][at + size]) for a, (at, size) in enumerate(zip(start, shape, strict=True))
        )
        if covered[cell].any():
            raise refuse(f"{key}: two chunks overlap at {list(start)}", METADATA, DAMAGED)
        covered[cell] = True


class Reader:
    """Reads chunks and items of a checkpoint's data files."""

    def __init__(self, directory: Path, files: Files, tensors: Mapping[str, Stored]) -> None:
        self.directory, self.files, self.tensors = directory, files, tensors

    def check_files(self) -> None:
        """Every data file the model needs is there and as long as `.metadata` says."""
        ends: dict[str, int] = {}
        for whole in self.tensors.values():
            for _, _, place in whole.chunks:
                ends[place.file] = max(ends.get(place.file, 0), place.offset + place.size)
        problems = Problems()
        for name, end in sorted(ends.items()):
            path = self.directory / name
            if not path.is_file():
                problems.add("a data file is missing", name, "copy every .distcp file of the iteration")
            elif path.stat().st_size < end:
                problems.add(f"a data file is cut off: {path.stat().st_size:,} bytes of {end:,}", name, DAMAGED)
        problems.raise_if_any()

    def read(self, key: str) -> Tiled:
        whole = self.tensors[key]
        tiles = tuple(
            Tile(chunk.start, self.chunk(key, whole, chunk)) for chunk in whole.chunks if math.prod(chunk.shape)
        )
        return Tiled(whole.shape, whole.dtype, tiles)

    def chunk(self, key: str, whole: Stored, chunk: Chunk) -> np.ndarray:
        """A chunk as a view: the tensor of a `torch.save` file, or bare bytes."""
        place, where = chunk.place, f"{chunk.place.file} at {chunk.place.offset:,}: {key}"
        file = self.files.open(self.directory / place.file)
        if place.offset + place.size > file.size:
            raise refuse(f"a data file is cut off: {file.size:,} bytes", where, DAMAGED)
        if (
            file.map[place.offset : place.offset + 2] != b"PK"
            and place.size == math.prod(chunk.shape) * whole.dtype.itemsize
        ):
            file.note(Entry(key, place.offset, place.size, None))
            return file.view(place.offset, chunk.shape, whole.dtype)
        opened = read_torch(file, where, place.offset, place.size)
        with malformed_is_refused(where):
            array = tensor_of(opened.root, opened.storage, file, where)
        file.forget()
        if array is None or array.shape != chunk.shape or array.dtype != whole.dtype:
            found = word(opened.root) if array is None else f"{array.dtype}{list(array.shape)}"
            raise refuse(f"the chunk is {found}, not {whole.dtype}{list(chunk.shape)}", where, DAMAGED)
        return array

    def item(self, key: str, places: Mapping[tuple[int, ...] | None, Place]) -> object:
        """The records of an item that is no tensor."""
        if not places:
            raise refuse(f"{key} is stored nowhere", METADATA, DAMAGED)
        place = next(iter(places.values()))
        return read_torch(
            self.files.open(self.directory / place.file), f"{place.file}: {key}", place.offset, place.size
        ).root


def open_torch_dist(directory: Path, files: Files, metadata: Metadata) -> Checkpoint:
    tensors = {key: stored(key, metadata) for key in metadata.tensors if not SECTIONS.match(key)}
    objects = {SHARD.sub("", key): "bytes" for key in metadata.objects if not SECTIONS.match(key)}
    reader = Reader(directory, files, tensors)
    reader.check_files()
    if (directory / COMMON).exists():
        where, root = COMMON, read_torch(files.open(directory / COMMON), COMMON).root
    elif COMMON_ITEM in metadata.objects:
        where, root = COMMON_ITEM, reader.item(COMMON_ITEM, metadata.places.get(COMMON_ITEM, {}))
        root = root[0] if type(root) is list and len(root) == 1 else root
    else:
        raise refuse(f"there is neither {COMMON} nor the item {COMMON_ITEM}", directory, "copy the whole iteration")
    common = entries_of(root, "the common state", where)
    return checkpoint("torch_dist", directory, files, reader, objects, common, where)


def open_torch_dcp(directory: Path, files: Files, metadata: Metadata) -> Checkpoint:
    """Everything is inside, under `model.`; fsdp_dtensor has the same container."""
    model = {key: short for key in metadata.tensors if (short := under_model(key, metadata.paths)) is not None}
    tensors = {short: stored(key, metadata) for key, short in model.items()}
    objects = {short: "bytes" for key in metadata.objects if (short := under_model(key, metadata.paths)) is not None}
    reader = Reader(directory, files, tensors)
    reader.check_files()
    common = {
        name: reader.item(name, metadata.places.get(name, {})) for name in metadata.objects if name in COMMON_NAMES
    }
    return checkpoint("torch_dcp", directory, files, reader, objects, common, METADATA)


def under_model(key: str, paths: Mapping[str, tuple[object, ...]]) -> str | None:
    """The key without `model.`; None for a key of another section."""
    path = paths.get(key, key.split("."))
    if type(path) not in (tuple, list) or path[0] != "model":
        return None
    return ".".join(str(part) for part in path[1:])


def checkpoint(
    kind: str, directory: Path, files: Files, reader: Reader, objects: Mapping[str, str],
    common: Mapping[str, object], where: str,
) -> Checkpoint:  # fmt: skip
    if "args" not in common:
        raise refuse(
            "there are no args",
            f"{directory.name}/{where}",
            "megahf needs the arguments that Megatron saves with every model",
        )
    args = plain(common["args"], f"{where}: args")
    if not isinstance(args, dict):
        raise refuse(f"args is {word(common['args'])}", where, "save it with Megatron's own save_checkpoint")
    if not reader.tensors:
        raise refuse("the checkpoint holds no weights", directory, "give a checkpoint of a model")
    iteration, version = plain(common.get("iteration"), where), plain(common.get("checkpoint_version"), where)
    if iteration is None:
        iteration = iteration_in(directory)
    shapes = {key: (whole.shape, whole.dtype) for key, whole in reader.tensors.items()}
    return Checkpoint(
        path=directory,
        format=kind,
        iteration=iteration if isinstance(iteration, int) and directory.name != "release" else None,
        version=float(version) if isinstance(version, (int, float)) else None,
        args=args,
        holdings=[Holding(directory.name, None, 0, shapes, objects, reader.read)],
        files=files,
    )
