"""`verify` derives every weight again, and a folder that differs in a byte, a name or a number is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from small import megahf, rewrite, tensors, write_torch

import megahf as package
from megahf.checkpoint.safetensors import INDEX
from megahf.errors import Refused

Folder = tuple[Path, Path]
NORM = "decoder.final_layernorm.weight"


@pytest.fixture
def converted(tmp_path: Path) -> Folder:
    """A checkpoint of TP2, and the folder in several shards that was made of it."""
    write_torch(tmp_path / "ckpt", tensor=2)
    package.convert(tmp_path / "ckpt", tmp_path / "hf", max_shard_size="40KB")
    return tmp_path / "ckpt", tmp_path / "hf"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = NORM) -> None:
    """Changes the shard that holds a weight, and the index with it, as someone who knows the format would."""
    file = next(file for file in shards(folder) if name in load_file(file))
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {key: path.name for path in shards(folder) for key in load_file(path)}
    (folder / INDEX).write_text(json.dumps(index))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "bf16"}, {"dtype": "fp16"}, {"true_vocab_size": 40}, {"checksums": False}]
)
def test_what_convert_wrote_is_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    write_torch(tmp_path / "ckpt", tensor=2)
    package.convert(tmp_path / "ckpt", tmp_path / "hf", **options)
    verified = package.verify(tmp_path / "ckpt", tmp_path / "hf")
    written = tensors(tmp_path / "hf")
    assert (verified.weights, verified.nbytes) == (len(written), sum(value.nbytes for value in written.values()))
    assert verified.digests == {
        name: blake3(value.view(torch.uint8).numpy()).hexdigest() for name, value in written.items()
    }


def test_progress_counts_the_bytes_of_the_folder(converted: Folder) -> None:
    seen: list[int] = []
    assert package.verify(*converted, progress=seen.append).nbytes == sum(seen)


@pytest.mark.parametrize("shard", range(3))
def test_a_flipped_bit_in_any_shard_is_found_and_its_weight_named(converted: Folder, shard: int) -> None:
    file = shards(converted[1])[shard]
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    last = max(load_file(file), key=lambda name: json_offset(file, name))
    with pytest.raises(Refused, match=rf"weights that differ from the checkpoint \({last}\); convert again"):
        package.verify(*converted)


def json_offset(file: Path, name: str) -> int:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return int(header[name]["data_offsets"][0])


EDITS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weight": (lambda folder: edit(folder, lambda state: state.pop(NORM)), rf"weights missing .*\({NORM}\)"),
    "extra weight": (
        lambda folder: edit(folder, lambda state: state.update(extra=torch.ones(2))),
        r"weights that the source does not have \(extra\)",
    ),
    "another shape": (
        lambda folder: edit(folder, lambda state: state.update({NORM: torch.ones(31)})),
        rf"shape \[31\], should be \[32\] \({NORM}\)",
    ),
    "another number": (
        lambda folder: edit(folder, lambda state: state[NORM][7:8].mul_(1.0000001)),
        rf"weights that differ from the checkpoint \({NORM}\)",
    ),
    "missing shard": (lambda folder: shards(folder)[1].unlink(), "that the index names is missing"),
    "cut shard": (
        lambda folder: shards(folder)[1].write_bytes(shards(folder)[1].read_bytes()[:-1]), "the file was cut short",
    ),
    "another config": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(rotary_base=5e5)),
        r"config.json says rotary_base 500000.0, the source 10000.0",
    ),
    "another activation": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(activation_func="gelu")),
        r"config.json says activation_func 'gelu', the source 'silu'",
    ),
    "another vocabulary": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(vocab_size=60)),
        r"shape \[61, 32\], should be \[60, 32\]",
    ),
    "another digest": (
        lambda folder: edit_json(folder / "megahf.json", lambda made: made["weights"].update({NORM: "0" * 64})),
        rf"weights whose digest in megahf.json is another \({NORM}\)",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"there is no config.json"),
    "no json": (lambda folder: (folder / "config.json").write_text("{"), r"the file cannot be read: .*config.json"),
    "a config of something else": (lambda folder: (folder / "config.json").write_text("{}"), "there is no vocab_size"),
    "a broken record": (lambda folder: (folder / "megahf.json").write_text("[]"), "the file holds no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("change, says", EDITS.values(), ids=list(EDITS))
def test_a_changed_folder_is_refused_with_what_differs(
    converted: Folder, change: Callable[[Path], Any], says: str
) -> None:
    change(converted[1])
    with pytest.raises(Refused, match=says):
        package.verify(*converted)


def test_several_differences_are_said_at_once(converted: Folder) -> None:
    edit(converted[1], lambda state: (state.pop(NORM), state.update(extra=torch.ones(2))))
    with pytest.raises(Refused) as error:
        package.verify(*converted)
    assert len(str(error.value).splitlines()) == 2


def test_another_checkpoint_is_not_taken_for_the_source(converted: Folder, tmp_path: Path) -> None:
    write_torch(tmp_path / "other", tensor=2, seed=1)
    with pytest.raises(Refused, match=r"weights that differ from the checkpoint .* and 22 more"):
        package.verify(tmp_path / "other", converted[1])


def test_a_source_that_was_damaged_since_is_found(converted: Folder) -> None:
    rewrite(converted[0], lambda content: content["model"][NORM].add_(1), "mp_rank_01")
    with pytest.raises(Refused, match="stored twice and not equal"):
        package.verify(*converted)


def test_a_folder_without_a_record_is_compared_all_the_same(converted: Folder) -> None:
    (converted[1] / "megahf.json").unlink()
    assert package.verify(*converted).weights == 27


def test_on_the_command_line_a_difference_is_exit_code_1(converted: Folder) -> None:
    edit(converted[1], lambda state: state[NORM].add_(1))
    result = megahf("verify", *converted)
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: weights that differ from the checkpoint")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("folder", ["nowhere", "empty", "file"])
def test_what_is_no_converted_folder_is_refused(converted: Folder, tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    result = megahf("verify", converted[0], tmp_path / folder)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("refused: ")
