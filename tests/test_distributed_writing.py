"""The promise: what is laid out as torch_dist is read by torch, by Megatron-core and by our own reader.

torch.distributed.checkpoint is the oracle of `.metadata`; loading is judged by values.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import assert_holds
from outputs import Array, leaf, write

from megahf.checkpoint import open_checkpoint
from megahf.checkpoint.distributed import Chunk, Place, Stored
from megahf.checkpoint.distributed_writing import backend, distcp, metadata
from megahf.checkpoint.opcodes import Global, Made
from megahf.checkpoint.torch_writing import torch_file

Start = tuple[int, ...]
Cuts = Mapping[str, tuple[tuple[int, ...], ...]]  # key -> where each axis is cut

CUTS: Cuts = {
    "embedding.word_embeddings.weight": ((0, 8, 16), (0, 8)),
    "decoder.layers.mlp.linear_fc1.weight": ((0, 1, 2, 3, 4), (0, 3, 6), (0, 8)),
    "decoder.final_layernorm.weight": ((0, 5, 8),),
    "output_layer.number": (),
}
EXTRA = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_2"
NOTHING = "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2"
RNG = "rng_state/shard_0.0_1.1"
COMMON_STATE = {"args": {"hidden_size": 8}, "checkpoint_version": 3.0, "iteration": 10, "content_metadata": {"a": True}}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embedding.word_embeddings.weight": torch.randn(16, 8).bfloat16(),
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(4, 6, 8),
        "decoder.final_layernorm.weight": torch.randn(8).half(),
        "output_layer.number": torch.tensor(2.0),
    }


def chunks(tensor: torch.Tensor, cuts: tuple[tuple[int, ...], ...]) -> dict[Start, torch.Tensor]:
    parts: dict[Start, torch.Tensor] = {(): tensor}
    for axis, places in enumerate(cuts):
        parts = {
            (*start, at): part.narrow(axis, at, end - at)
            for start, part in parts.items()
            for at, end in pairwise(places)
        }
    return parts


def objects() -> dict[str, list[object]]:
    """Lists of one value, as Megatron writes a ShardedObject: an extra state, none, and something nested."""
    return {
        EXTRA: [leaf(EXTRA, torch.empty(0, dtype=torch.uint8))],
        NOTHING: [None],
        RNG: [[{"random": (3, (1, 2), None), "torch": leaf(RNG, torch.arange(9, dtype=torch.uint8))}]],
    }


def write_folder(folder: Path, cuts: Cuts = CUTS) -> None:
    """Two data files: chunks by turns, objects in front of them."""
    whole, stored = tensors(), {}
    items: list[dict[Any, Any]] = [objects(), {}]
    for key, where in cuts.items():
        for number, (start, part) in enumerate(chunks(whole[key], where).items()):
            items[number % 2][key, start] = leaf(f"{key} {start}", part)
    places: dict[Any, Place] = {}
    for rank, given in enumerate(items):
        output, found = distcp(f"__{rank}_0.distcp", given)
        write(output, folder)
        places |= found
    for key, where in cuts.items():
        parts = chunks(whole[key], where)
        listed = tuple(Chunk(start, tuple(part.shape), places[key, start]) for start, part in parts.items())
        stored[key] = Stored(tuple(whole[key].shape), Array("", whole[key]).dtype, listed)
    (folder / ".metadata").write_bytes(metadata(stored, {key: places[key] for key in objects()}))
    (folder / "metadata.json").write_bytes(backend())
    namespace = Made("argparse.Namespace", ())
    namespace.state = {"hidden_size": 8, "params_dtype": Global("torch.bfloat16")}
    write(torch_file("common.pt", COMMON_STATE | {"args": namespace}), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written") / "iter_0000010"
    write_folder(place)
    return place


def test_the_metadata_is_torchs_own(tmp_path: Path) -> None:
    """Whole tensors and a list, written by torch and laid out by us: equal but for who saved it, and where."""
    whole = {"a": torch.randn(4, 3), "b": torch.ones((), dtype=torch.int64), "c": torch.zeros(0, 2).bfloat16()}
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)  # as Megatron's own: a list is one item
    dcp.save({**whole, "d": [1]}, checkpoint_id=tmp_path, no_dist=True, planner=planner)
    theirs = dcp.FileSystemReader(tmp_path).read_metadata()
    output, places = distcp("__0_0.distcp", {"d": [1]} | {key: leaf(key, tensor) for key, tensor in whole.items()})
    stored = {
        key: Stored(
            shape := tuple(tensor.shape), Array("", tensor).dtype, (Chunk((0,) * len(shape), shape, places[key]),)
        )
        for key, tensor in whole.items()
    }
    assert (tmp_path / "__0_0.distcp").stat().st_size == output.nbytes
    (tmp_path / ".metadata").write_bytes(metadata(stored, {"d": places["d"]}))
    ours = dcp.FileSystemReader(tmp_path).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data
    assert (ours.planner_data, ours.version) == (None, theirs.version)
    assert type(ours) is type(theirs)


def test_torch_loads_whole_tensors(folder: Path) -> None:
    state: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in tensors().items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    for key, tensor in tensors().items():
        assert torch.equal(state[key], tensor), key


def test_torch_loads_objects(folder: Path) -> None:
    """DCP hands an object on as the value it pickled, which for Megatron is the list of one."""
    state: dict[str, Any] = {key: io.BytesIO() for key in objects()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert state[NOTHING] == [None]
    assert state[EXTRA][0].shape == (0,)
    assert state[RNG][0][0]["random"] == (3, (1, 2), None)
    assert state[RNG][0][0]["torch"].tolist() == list(range(9))


def test_every_item_is_a_file_of_torch_save(folder: Path) -> None:
    """What a reader without DCP does: the bytes of each place, unpickled with nothing but torch's own classes."""
    for index, info in dcp.FileSystemReader(folder).read_metadata().storage_data.items():
        data = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        loaded = torch.load(io.BytesIO(data), weights_only=True)
        assert torch.is_tensor(loaded) == (index.offset is not None), index


def test_our_reader_opens_it(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.iteration, checkpoint.version) == ("torch_dist", 10, 3.0)
    assert checkpoint.args == {"hidden_size": 8, "params_dtype": "torch.bfloat16"}
    assert_holds(checkpoint, 0, {**tensors(), EXTRA.partition("/")[0]: b""})


def test_a_chunk_lies_below_the_folder_of_its_file() -> None:
    """A target may be written below another directory; `.metadata` stands beside its data files."""
    _, places = distcp("iter_0000010/__0_0.distcp", {"a": [1], "b": [2]})
    assert places["a"] == Place("__0_0.distcp", 0, places["b"].offset)


def test_common_state_is_unpickled_by_torch(folder: Path) -> None:
    loaded = torch.load(folder / "common.pt", weights_only=False)
    assert loaded == COMMON_STATE | {"args": Namespace(hidden_size=8, params_dtype=torch.bfloat16)}


MEGATRON = """
import sys
from megahf.judge import cpu
cpu.patch()
import torch
from megatron.core import dist_checkpointing as checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_content_metadata, load_tensors_metadata

folder, out = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{out}.store", rank=0, world_size=1)
whole = load_tensors_metadata(folder)
sharded = ShardedTensor.from_rank_offsets
state = {key: sharded(key, torch.empty(t.global_shape, dtype=t.dtype)) for key, t in whole.items()}
fc1 = "decoder.layers.mlp.linear_fc1.weight"
for layer in range(4):  # as a stack of layers loads it, and cut at other places than it is stored at
    for part in range(3):
        place = (0, layer, 4), (1, part, 3)
        state[f"layers.{layer}.{part}"] = sharded(fc1, torch.empty(2, 8), *place, prepend_axis_num=1)
del state[fc1]
state["extra"] = ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (2,), (0,))
state["nothing"] = ShardedObject("decoder.layers.mlp.linear_fc1._extra_state", None, (2,), (1,))
state["rng"] = ShardedObject("rng_state", None, (1, 1), (0, 0))
strict = checkpointing.validation.StrictHandling.RETURN_ALL
loaded, missing, unexpected = checkpointing.load(state, folder, strict=strict)
shapes = {key: (tuple(t.global_shape), str(t.dtype)) for key, t in whole.items()}
told = {"loaded": loaded, "missing": missing, "unexpected": unexpected, "shapes": shapes}
torch.save(told | {"content": load_content_metadata(folder)}, out)
"""


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")
def test_megatron_loads_it(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "loaded.pt"
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", MEGATRON, str(folder), str(out)], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = torch.load(out, weights_only=False)
    loaded, whole = told["loaded"], tensors()
    fc1 = whole.pop("decoder.layers.mlp.linear_fc1.weight")
    assert {key: str(tensor.dtype) for key, tensor in whole.items()}.items() <= {
        key: dtype for key, (_, dtype) in told["shapes"].items()
    }.items()
    for key, tensor in whole.items():
        assert torch.equal(loaded[key], tensor), key
    for layer in range(4):
        parts = [loaded[f"layers.{layer}.{part}"] for part in range(3)]
        assert torch.equal(torch.cat(parts), fc1[layer])
    assert (loaded["extra"].shape, loaded["nothing"], loaded["rng"][0]["torch"].tolist()) == (
        (0,),
        None,
        list(range(9)),
    )
    assert (loaded["iteration"], loaded["args"].hidden_size, told["content"]) == (10, 8, {"a": True})
    assert (told["missing"], told["unexpected"]) == (set(), set())


def test_the_backend_is_as_megatron_notes_it() -> None:
    assert json.loads(backend()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def test_a_thousand_chunks_take_little_room() -> None:
    """A checkpoint of many experts has hundreds of thousands, and `.metadata` is read whole."""
    place = Place("__0_0.distcp", 1 << 40, 1 << 30)
    parts = tuple(Chunk((at, 0, 0), (1, 4096, 4096), place) for at in range(1000))
    data = metadata(
        {
            "decoder.layers.mlp.experts.experts.linear_fc1.weight": Stored(
                (1000, 4096, 4096), Array("", torch.ones(1)).dtype, parts
            )
        },
        {},
    )
    assert len(data) < 200 * 1000
