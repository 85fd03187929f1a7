"""The promise: torch_dist and torch_dcp give whole tensors, and chunks that do not make one are refused.

Files are written by torch.distributed.checkpoint; torch is the oracle.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import COMMON, assert_holds, distributed_state, state, write_torch_dist

from megahf.checkpoint import open_checkpoint
from megahf.errors import Refused


@pytest.mark.parametrize("in_file", [False, True], ids=["common.pt", "common_state"])
def test_torch_dist_holds_whole_tensors(tmp_path: Path, in_file: bool) -> None:
    write_torch_dist(tmp_path / "iter_0000010", in_file)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.iteration, checkpoint.version) == ("torch_dist", 10, 3.0)
    assert checkpoint.args["hidden_size"] == 8
    assert checkpoint.holdings[0].rank is None
    wanted = {
        key: value for key, value in distributed_state().items() if torch.is_tensor(value) and "optimizer" not in key
    }
    assert_holds(checkpoint, 0, {**wanted, "decoder.layers.mlp.linear_fc1._extra_state": b"x"})


def test_shapes_are_known_before_a_data_file_is_mapped(tmp_path: Path) -> None:
    write_torch_dist(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.holdings[0].shapes) == 3
    assert {file.path.name for file in checkpoint.files} == {".metadata", "common.pt"}


def test_torch_dcp_keys_lose_the_model_prefix(tmp_path: Path) -> None:
    dcp.save({"model": state(), **COMMON, "rng_state": [{"a": 1}]}, checkpoint_id=str(tmp_path), no_dist=True)
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.iteration, checkpoint.version) == ("torch_dcp", 10, 3.0)
    assert checkpoint.args["tensor_model_parallel_size"] == 1
    assert_holds(checkpoint, 0, state())


def rewritten(root: Path, change: Any) -> None:
    """The `.metadata` as torch writes it, after `change(metadata)`."""
    metadata = dcp.FileSystemReader(str(root)).read_metadata()
    (root / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


def chunked(metadata: Any, *chunks: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """The embedding cut into `chunks`, all said to lie where the whole lies."""
    key = "embedding.word_embeddings.weight"
    info = next(value for index, value in metadata.storage_data.items() if index.fqn == key)
    kind = type(metadata.state_dict_metadata[key].chunks[0])
    parts = [kind(offsets=torch.Size(start), sizes=torch.Size(size)) for start, size in chunks]
    metadata.state_dict_metadata[key] = replace(metadata.state_dict_metadata[key], chunks=parts)
    for start, _ in chunks:
        metadata.storage_data[dcp.metadata.MetadataIndex(key, torch.Size(start))] = info


BAD_CHUNKS = {
    "a hole": (((0, 0), (8, 8)), ((9, 0), (7, 8))),
    "an overlap": (((0, 0), (8, 8)), ((7, 0), (9, 8))),
    "an overlap and a hole of one size": (((0, 0), (8, 8)), ((4, 0), (8, 8))),
    "twice the same": (((0, 0), (8, 8)), ((0, 0), (8, 8))),
    "a chunk outside": (((0, 0), (8, 8)), ((12, 0), (8, 8))),
    "a flat chunk": (((0,), (128,)),),
    "none": (),
}


@pytest.mark.parametrize("name", BAD_CHUNKS)
def test_chunks_that_do_not_cover_once_are_refused(tmp_path: Path, name: str) -> None:
    write_torch_dist(tmp_path)
    rewritten(tmp_path, lambda metadata: chunked(metadata, *BAD_CHUNKS[name]))
    with pytest.raises(Refused, match=r"embedding\.word_embeddings\.weight.*\.metadata"):
        open_checkpoint(tmp_path)


def test_chunks_of_any_tiling_are_accepted_and_their_data_checked(tmp_path: Path) -> None:
    """A pinwheel is no grid and covers once; the file holds other shapes, which is seen on reading."""
    write_torch_dist(tmp_path)
    pinwheel = (((0, 0), (12, 2)), ((12, 0), (4, 6)), ((4, 6), (12, 2)), ((0, 2), (4, 6)), ((4, 2), (8, 4)))
    rewritten(tmp_path, lambda metadata: chunked(metadata, *pinwheel))
    holding = open_checkpoint(tmp_path).holdings[0]
    with pytest.raises(Refused, match=r"bfloat16\[16, 8\], not bfloat16\[12, 2\]"):
        holding.read("embedding.word_embeddings.weight")


@pytest.mark.parametrize("path", ["../__0_0.distcp", "/etc/passwd", "..", "", "a/b", "x\x00"])
def test_a_way_out_of_the_directory_is_refused(tmp_path: Path, path: str) -> None:
    write_torch_dist(tmp_path)

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, relative_path=path)

    rewritten(tmp_path, change)
    with pytest.raises(Refused, match="lies in"):
        open_checkpoint(tmp_path)


def test_missing_and_short_data_files_are_named(tmp_path: Path) -> None:
    write_torch_dist(tmp_path)
    data = next(tmp_path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:2000])
    with pytest.raises(Refused, match=r"cut off: 2,000 bytes.*\.distcp"):
        open_checkpoint(tmp_path)
    data.unlink()
    with pytest.raises(Refused, match=r"missing.*\.distcp"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_torch_dist_directory_without_its_heads_is_refused(tmp_path: Path, file: str) -> None:
    write_torch_dist(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(Refused, match=file):
        open_checkpoint(tmp_path)


def test_a_metadata_of_megatron_core_0_8_to_0_15_is_read(tmp_path: Path) -> None:
    """It notes every tensor, and flattened ones with the shape they had; 0.15 has a class of its own."""
    write_torch_dist(tmp_path)
    metadata = dcp.FileSystemReader(str(tmp_path)).read_metadata()
    metadata.mcore_data = {key: {} for key in metadata.state_dict_metadata}  # type: ignore[attr-defined]
    metadata.mcore_data["optimizer.state.exp_avg.number"] = {"nd_reformulated_orig_global_shape": (1, 1)}  # type: ignore[attr-defined]
    data = pickle.dumps(metadata, 2)
    theirs, own = b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"strategies.torch\nMCoreMetadata\n"
    assert theirs in data
    for written in (data, data.replace(theirs, b"cmegatron.core.dist_checkpointing." + own)):
        (tmp_path / ".metadata").write_bytes(written)
        assert "number" in open_checkpoint(tmp_path).holdings[0].shapes


def test_a_weight_stored_flattened_is_refused(tmp_path: Path) -> None:
    write_torch_dist(tmp_path)
    noted = {"number": {"nd_reformulated_orig_global_shape": (1, 1)}}
    rewritten(tmp_path, lambda metadata: setattr(metadata, "mcore_data", noted))
    with pytest.raises(Refused, match=r"flattened.*number"):
        open_checkpoint(tmp_path)
