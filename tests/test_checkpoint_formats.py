"""The promise: every `--ckpt-format torch` directory is opened for what it is; incomplete and foreign ones are refused.

Files are written by torch.save; torch is the oracle.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from checkpoint_files import Grid, arguments, assert_holds, bits, state, write_grid, write_rank

from megahf.checkpoint import Rank, open_checkpoint
from megahf.errors import Refused

SHAPES: dict[str, tuple[Grid, dict[str, Rank]]] = {
    "TP1": ((1, 1, 1), {"mp_rank_00": Rank(0, 0, 0)}),
    "TP2": ((2, 1, 1), {"mp_rank_00": Rank(0, 0, 0), "mp_rank_01": Rank(1, 0, 0)}),
    "PP2": ((1, 2, 1), {"mp_rank_00_000": Rank(0, 0, 0), "mp_rank_00_001": Rank(0, 1, 0)}),
    "EP2, the same names as PP2": ((1, 1, 2), {"mp_rank_00_000": Rank(0, 0, 0), "mp_rank_00_001": Rank(0, 0, 1)}),
    "TP2 PP2": (
        (2, 2, 1),
        {f"mp_rank_{t:02d}_{p:03d}": Rank(t, p, 0) for t in range(2) for p in range(2)},
    ),
    "PP2 EP2": (
        (1, 2, 2),
        {f"mp_rank_00_{p:03d}_{e:03d}": Rank(0, p, e) for p in range(2) for e in range(2)},
    ),
    "TP2 EP2 with half the pairs": (
        (2, 1, 2),
        {"mp_rank_00_000": Rank(0, 0, 0), "mp_rank_01_001": Rank(1, 0, 1)},
    ),
    "TP 120": ((120, 1, 1), {f"mp_rank_{t:02d}": Rank(t, 0, 0) for t in range(120)}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_of_rank_directory(tmp_path: Path, name: str) -> None:
    grid, names = SHAPES[name]
    write_grid(tmp_path / "iter_0000010", grid, names)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.format, checkpoint.iteration, checkpoint.version) == ("torch", 10, 3.0)
    assert checkpoint.path == tmp_path / "iter_0000010"
    assert checkpoint.args["params_dtype"] == "torch.bfloat16"
    assert {holding.rank for holding in checkpoint.holdings} == set(names.values())
    order = list(names.values())
    for index, holding in enumerate(checkpoint.holdings):
        assert holding.rank is not None
        assert_holds(checkpoint, index, state(order.index(holding.rank)))


def test_virtual_chunks_are_holdings_of_their_own(tmp_path: Path) -> None:
    models = {f"model{chunk}": state(chunk) for chunk in range(11)}
    write_rank(tmp_path / "mp_rank_00", arguments(), models)
    checkpoint = open_checkpoint(tmp_path)
    assert [holding.chunk for holding in checkpoint.holdings] == list(range(11))
    assert checkpoint.holdings[10].where == "mp_rank_00/model_optim_rng.pt: model10"
    for index in range(11):
        assert_holds(checkpoint, index, state(index))


def test_a_missing_chunk_is_refused(tmp_path: Path) -> None:
    write_rank(tmp_path / "mp_rank_00", arguments(), {"model0": state(), "model2": state()})
    with pytest.raises(Refused, match=r"chunks \[0, 2\]"):
        open_checkpoint(tmp_path)


def test_a_release_has_no_iteration(tmp_path: Path) -> None:
    write_rank(tmp_path / "release" / "mp_rank_00", arguments(), {"model": state()}, iteration=0)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert open_checkpoint(tmp_path).iteration is None


def test_the_stream_of_old_torch_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    content = {"args": arguments(), "checkpoint_version": 3.0, "iteration": 10, "model": state()}
    torch.save(content, folder / "model_optim_rng.pt", _use_new_zipfile_serialization=False)
    assert_holds(open_checkpoint(tmp_path), 0, state())


def test_tied_weights_lie_at_one_place_with_a_checksum(tmp_path: Path) -> None:
    write_rank(tmp_path / "mp_rank_00", arguments(), {"model": state()})
    checkpoint = open_checkpoint(tmp_path)
    places = [checkpoint.files.locate(checkpoint.holdings[0].read(key).tiles[0].view) for key in ("tied.w", "turned.w")]
    assert places[0] == places[1]
    file, offset = places[0]
    entry = file.entry_at(offset)
    assert entry is not None and entry.crc == zlib.crc32(bits(state()["tied.w"])) and entry.size == 48


# Which iteration


def iterations(root: Path, *names: str) -> None:
    for name in names:
        write_rank(root / name / "mp_rank_00", arguments(), {"model": state()}, iteration=int(name[5:]))


@pytest.mark.parametrize(("tracker", "chosen"), [("10", "iter_0000010"), ("0000020\n", "iter_0000020")])
def test_the_tracker_chooses(tmp_path: Path, tracker: str, chosen: str) -> None:
    iterations(tmp_path, "iter_0000010", "iter_0000020")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert open_checkpoint(tmp_path).path.name == chosen


def test_an_iteration_can_be_given(tmp_path: Path) -> None:
    iterations(tmp_path, "iter_0000010", "iter_0000020")
    assert open_checkpoint(str(tmp_path / "iter_0000010")).iteration == 10


def test_one_iteration_needs_no_tracker(tmp_path: Path) -> None:
    iterations(tmp_path, "iter_0000010")
    assert open_checkpoint(tmp_path).iteration == 10


@pytest.mark.parametrize("tracker", ["30", "release", "nonsense", None])
def test_an_unclear_choice_lists_what_is_there(tmp_path: Path, tracker: str | None) -> None:
    iterations(tmp_path, "iter_0000010", "iter_0000020")
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    with pytest.raises(Refused, match="iter_0000010, iter_0000020"):
        open_checkpoint(tmp_path)


# What is no Megatron checkpoint


def test_foreign_things_are_named(tmp_path: Path) -> None:
    def made(name: str, *files: str) -> Path:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "model.nemo").write_text("x")
    for path, words in {
        tmp_path / "absent": "nothing there",
        tmp_path / "file": "a file",
        tmp_path / "model.nemo": "NeMo",
        tmp_path / "empty": "empty",
        made("hf", "config.json", "model.safetensors"): "Hugging Face",
        made("nemo", "model_config.yaml"): "NeMo",
        made("other", "notes.txt"): "notes.txt",
        made("tracker", "latest_checkpointed_iteration.txt"): "no iteration is",
        made("rank", "model_optim_rng.pt"): "one rank",
        made("hollow", "mp_rank_00/other.pt"): "no model_optim_rng.pt",
        made("zarr", "decoder.layers.w/.zarray", "metadata.json"): "",
        made("zarr_named", "decoder.layers.w/.zarray"): "zarr",
    }.items():
        with pytest.raises(Refused, match=words):
            open_checkpoint(path)


def test_a_zarr_backend_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    with pytest.raises(Refused, match=r"zarr checkpoint.*torch_dist"):
        open_checkpoint(tmp_path)


def test_a_model_from_before_megatron_core_is_refused_by_name(tmp_path: Path) -> None:
    write_rank(tmp_path / "mp_rank_00", arguments(), {"model": {"language_model": {"encoder": state()}}})
    with pytest.raises(Refused, match=r"before megatron-core.*convert\.py"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(("lacking", "words"), [("args", "no args"), ("model", "no model")])
def test_a_file_without_its_parts_is_refused(tmp_path: Path, lacking: str, words: str) -> None:
    parts = {"args": arguments(), "model": state(), lacking: None}
    write_rank(tmp_path / "mp_rank_00", parts["args"], {"model": parts["model"]})
    with pytest.raises(Refused, match=words):
        open_checkpoint(tmp_path)


def test_an_unknown_object_in_the_model_is_refused_with_its_key(tmp_path: Path) -> None:
    write_rank(tmp_path / "mp_rank_00", arguments(), {"model": {**state(), "odd": Path("x"), "list": [1]}})
    with pytest.raises(Refused, match=r"PosixPath.*odd(.|\n)*list"):
        open_checkpoint(tmp_path)


# Ranks that do not belong together


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    write_grid(tmp_path, *SHAPES["TP2 PP2"])
    open_checkpoint(tmp_path)
    return tmp_path


def test_a_missing_rank_is_named(grid: Path) -> None:
    shutil.rmtree(grid / "mp_rank_01_001")
    with pytest.raises(Refused, match=r"2 x 2 x 1.*tensor rank 1, pipeline rank 1"):
        open_checkpoint(grid)


@pytest.mark.parametrize("extra", ["mp_rank_02_000", "mp_rank_00_002", "mp_rank_00", "mp_rank_00_000_001"])
def test_an_extra_rank_is_named(grid: Path, extra: str) -> None:
    shutil.copytree(grid / "mp_rank_00_000", grid / extra)
    with pytest.raises(Refused, match=extra):
        open_checkpoint(grid)


def test_ranks_of_two_iterations_are_refused(grid: Path) -> None:
    write_rank(grid / "mp_rank_01_001", arguments(2, 2), {"model": state()}, iteration=20)
    with pytest.raises(Refused, match=r"iteration: 10 and 20.*mp_rank_00_000.*mp_rank_01_001"):
        open_checkpoint(grid)


def test_files_in_one_anothers_directory_are_refused(grid: Path) -> None:
    (grid / "mp_rank_00_000").rename(grid / "away")
    (grid / "mp_rank_01_000").rename(grid / "mp_rank_00_000")
    (grid / "away").rename(grid / "mp_rank_01_000")
    with pytest.raises(Refused, match=r"tensor rank 1, not 0 \(mp_rank_00_000"):
        open_checkpoint(grid)


def test_ranks_of_two_runs_are_refused_by_the_argument(grid: Path) -> None:
    write_rank(grid / "mp_rank_01_001", arguments(2, 2, seed=7), {"model": state()})
    with pytest.raises(Refused, match=r"args\.seed: None and 7"):
        open_checkpoint(grid)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99999])
def test_a_truncated_file_is_refused_with_its_name(grid: Path, share: float) -> None:
    path = grid / "mp_rank_01_000" / "model_optim_rng.pt"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(Refused, match=r"(cut off|empty).*mp_rank_01_000"):
        open_checkpoint(grid)
