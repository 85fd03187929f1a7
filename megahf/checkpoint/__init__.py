"""Megatron checkpoints as they lie on disk: what is there, in which format, and every tensor as a view of a file.

`open_checkpoint` recognises the format, refuses what is incomplete or not Megatron's, and reads no weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megahf.checkpoint.mapped import Entry, Files, MappedFile
from megahf.checkpoint.opcodes import malformed_is_refused
from megahf.errors import refuse
from megahf.tiles import Tiled

__all__ = ["Checkpoint", "Entry", "Files", "Holding", "MappedFile", "Rank", "open_checkpoint"]

UNFINISHED = ".megahf"  # inside a folder that is being written
TRACKER = "latest_checkpointed_iteration.txt"
ITERATION = re.compile(r"iter_(\d+)")
GIVE = "give the directory that Megatron's --save named, or an iter_* or release directory inside it"


class Rank(NamedTuple):
    """Who wrote a file. `expert` is 0 when the directory's name has none."""

    tensor: int
    pipeline: int
    expert: int


@dataclass(frozen=True)
class Holding:
    """The weights of one rank's model chunk, or of a whole distributed checkpoint.

    Attributes:
        where: for messages: `"mp_rank_00_001/model_optim_rng.pt: model1"`.
        rank: None when keys are global and tensors whole (torch_dist, torch_dcp).
        chunk: virtual pipeline chunk; 0 without.
        shapes: shape and dtype of every tensor under the model.
        objects: what is no tensor (None, bytes, an extra state): key -> a word for its kind.
    """

    where: str
    rank: Rank | None
    chunk: int
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    objects: Mapping[str, str]
    reader: Callable[[str], Tiled] = field(repr=False)

    def read(self, key: str) -> Tiled:
        """The tensor as views on mapped files that cover it exactly once; KeyError for a key not in `shapes`."""
        return self.reader(key)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: the iteration's directory.
        format: "torch", "torch_dist" or "torch_dcp".
        iteration: None for a release.
        version: Megatron's checkpoint_version; None where it is not noted.
        args: the arguments Megatron ran with, as inert plain data.
        holdings: where the weights are.
        files: the mapped files.
    """

    path: Path
    format: str
    iteration: int | None
    version: float | None
    args: dict[str, object]
    holdings: list[Holding]
    files: Files


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Megatron checkpoint: a directory of iterations, one of them, or a release. Refused with the reason."""
    from megahf.checkpoint import distributed, legacy

    with malformed_is_refused(str(path)):
        directory = chosen(existing_directory(Path(path)))
        refuse_others(directory)
        if distributed.recognises(directory):
            return distributed.open_distributed(directory, Files())
        return legacy.open_legacy(directory, Files())


def existing_directory(path: Path) -> Path:
    if path.name.endswith(".nemo"):
        raise refuse(
            "this is a NeMo archive",
            path,
            "NeMo's own exporter, or Megatron-Bridge, writes a Megatron directory from it",
        )
    if not path.exists():
        raise refuse("there is nothing there", path, GIVE)
    if not path.is_dir():
        raise refuse("this is a file", path, GIVE)
    if (path / UNFINISHED).exists():
        raise refuse("this is what a conversion left that was stopped", path, "run the same command again")
    return path


def chosen(directory: Path) -> Path:
    """The iteration in a directory of them that the tracker names, or the only one; else the directory itself."""
    saved = {child.name: child for child in sorted(directory.iterdir()) if is_saved(child)}
    tracker = directory / TRACKER
    if not saved and not tracker.exists():
        return directory
    if not saved:
        raise refuse(f"{TRACKER} is there and no iteration is", directory, "copy the iter_* directory beside it")
    if not tracker.exists():
        if len(saved) == 1:
            return next(iter(saved.values()))
        raise refuse(f"there are several iterations and no {TRACKER}", directory, f"give one of {listed(saved)}")
    named = tracker.read_text(encoding="utf-8", errors="replace").strip()
    for name, child in saved.items():
        number = ITERATION.fullmatch(name)
        if named == name or (number and named.isdecimal() and int(named) == int(number[1])):
            return child
    raise refuse(f"{TRACKER} names {named[:40]!r}, which is not there", directory, f"give one of {listed(saved)}")


def is_saved(child: Path) -> bool:
    return child.is_dir() and (child.name == "release" or ITERATION.fullmatch(child.name) is not None)


def listed(names: Mapping[str, Path]) -> str:
    shown = list(names)[-8:]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def refuse_others(directory: Path) -> None:
    """What people give by mistake, each by its name."""
    names = {child.name for child in directory.iterdir()}
    if not names:
        raise refuse("the directory is empty", directory, GIVE)
    if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".index.json")) for name in names):
        config = (directory / "config.json").read_text(errors="replace")
        if '"ssm_cfg"' in config and '"model_type"' not in config:
            raise refuse(
                "this is a folder of state-spaces' own, for their package mamba_ssm",
                directory,
                "give a model that is converted for transformers; on the Hub such end in -hf",
            )
        raise refuse(
            "this is a Hugging Face folder whose weights are no safetensors",
            directory,
            "load it with from_pretrained and save it with save_pretrained",
        )
    if "config.json" not in names and any(name.endswith(".safetensors") for name in names):
        raise refuse("this is a Hugging Face folder without its config.json", directory, "copy that, too")
    if "model_config.yaml" in names or {"context", "weights"} <= names:
        raise refuse(
            "this is a NeMo checkpoint",
            directory,
            "give the directory with .metadata inside it, or export it to Megatron",
        )
    if "model_optim_rng.pt" in names:
        raise refuse("this is the directory of one rank", directory, "give the one above it, with every mp_rank_*")


def iteration_in(directory: Path) -> int | None:
    """The iteration a directory's name says."""
    number = ITERATION.fullmatch(directory.name)
    return int(number[1]) if number else None
