"""`torch_dist` to be written: data files, `.metadata` and `metadata.json`, in the words of their reader.

As Megatron-core 0.16.1 with torch 2.13 writes them, but for what only those who wrote it can use: the plans of each
rank, kept for the next save, and the id of the save. `common.pt` is a `torch_writing.torch_file`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate

import numpy as np

from megahf.checkpoint.distributed import DATACLASSES, Chunk, Place, Stored
from megahf.checkpoint.opcodes import Global, Made
from megahf.checkpoint.output import Output, W
from megahf.checkpoint.pickling import pickled
from megahf.checkpoint.torch_writing import end_to_end, torch_file
from megahf.dtypes import TORCH_NAME

STREAM = "archive"  # what torch.save calls a file that it knows no name of
VERSION = "1.0.0"
STRIDED = Made("torch.serialization._get_layout", ("torch.strided",))
CONTIGUOUS = Made(f"{DATACLASSES}metadata._MEM_FORMAT_ENCODING", (0,))


def distcp(file: str, items: Mapping[str, object]) -> tuple[Output[W], dict[str, Place]]:
    """A data file to be: a `torch.save` archive for each item, end to end; and where each item lies.

    Args:
        file: below the target; `Place.file` is its last word, as `.metadata` beside it says it.
        items: name of the item, which only the result repeats, -> records: a `Tensor` for a chunk of a tensor, the
            list of one value for an object of Megatron's (`ShardedObject`, such as an extra state).
    """
    outputs: list[Output[W]] = [torch_file(STREAM, root) for root in items.values()]
    starts = accumulate((output.nbytes for output in outputs), initial=0)
    name = file.rpartition("/")[2]
    places = {
        item: Place(name, start, output.nbytes)
        for item, start, output in zip(items, starts, outputs, strict=False)  # one start more: the end
    }
    return end_to_end(file, outputs), places


def metadata(tensors: Mapping[str, Stored], objects: Mapping[str, Place]) -> bytes:
    """`.metadata`: what is stored where.

    Args:
        tensors: key -> whole tensor with the place of each chunk.
        objects: key with its shard (`.../shard_0_1`) -> place.
    """
    described = {key: tensor_metadata(whole) for key, whole in tensors.items()}
    described |= {key: dataclass("metadata.BytesStorageMetadata") for key in objects}
    places = [(index(key, chunk.start), info(chunk.place)) for key, whole in tensors.items() for chunk in whole.chunks]
    places += [(index(key), info(place)) for key, place in objects.items()]
    return pickled(
        dataclass(
            "metadata.Metadata",
            state_dict_metadata=described,
            planner_data=None,
            storage_data=dict(places),
            storage_meta=None,
            version=VERSION,
        )
    )


def backend() -> bytes:
    """`metadata.json`: which of Megatron's formats the tensors have, and which the rest."""
    return json.dumps(
        {
            "sharded_backend": "torch_dist",
            "sharded_backend_version": 1,
            "common_backend": "torch",
            "common_backend_version": 1,
        }
    ).encode()


def dataclass(name: str, **fields: object) -> Made:
    """One of torch.distributed.checkpoint's; one without fields has no state, as its pickle has it."""
    made = Made(DATACLASSES + name, ())
    made.state = fields or None
    return made


@lru_cache(maxsize=4096)
def size(values: tuple[int, ...]) -> Made:
    """The same record for the same sizes, which a pickle then holds once: chunks of one place or shape are many."""
    return Made("torch.Size", (values,))


def tensor_metadata(whole: Stored) -> Made:
    return dataclass(
        "metadata.TensorStorageMetadata",
        properties=properties(whole.dtype),
        size=size(whole.shape),
        chunks=[chunk_metadata(chunk) for chunk in whole.chunks],
    )


def chunk_metadata(chunk: Chunk) -> Made:
    return dataclass("metadata.ChunkStorageMetadata", offsets=size(chunk.start), sizes=size(chunk.shape))


def properties(dtype: np.dtype) -> Made:
    """Number format, layout, requires_grad, memory format, pinned: a tuple, which the class itself takes apart."""
    made = dataclass("metadata.TensorProperties")
    made.state = (Global(f"torch.{TORCH_NAME[dtype]}"), STRIDED, False, CONTIGUOUS, False)
    return made


def index(key: str, start: tuple[int, ...] | None = None) -> Made:
    """A chunk's key, or an object's, which has no offset."""
    offset = {} if start is None else {"offset": size(start)}
    return dataclass("metadata.MetadataIndex", fqn=key, index=None, **offset)


def info(place: Place) -> Made:
    return dataclass("filesystem._StorageInfo", relative_path=place.file, offset=place.offset, length=place.size)
