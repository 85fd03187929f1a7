"""A Megatron checkpoint to be written: every file of it, from the plan of a model and a target layout.

A folder as `--save` makes it: the tracker, and in `iter_*` (or `release`, for weights that no run trained) the files of
every rank or the distributed checkpoint, with the arguments that a Megatron process finds the model by.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import __version__, dtypes, llava
from .arguments import unsaid
from .checkpoint import TRACKER
from .checkpoint.distributed import BACKEND, COMMON, METADATA, Chunk, Place, Stored
from .checkpoint.distributed_writing import backend, distcp, metadata
from .checkpoint.legacy import FILE
from .checkpoint.opcodes import Made
from .checkpoint.output import Output
from .checkpoint.torch_writing import Tensor, torch_file
from .command_lines import command_line, remarks
from .folder import provenance
from .global_tensors import CONTENT_METADATA, global_objects, global_tensors
from .plan import Copy, Plan
from .rows import is_llava
from .run_arguments import as_records, run_arguments
from .shares import Model, ranked
from .shares import Place as RankFile
from .target import Target
from .tensor_sizes import sensible_tp
from .writing import Digests, Job

VERSION = 3.0  # `checkpoint_version`, since 2021
Small = dict[str, bytes]


@dataclass(frozen=True)
class Run:
    """What the run says of itself that would have written the checkpoint."""

    plan: Plan
    target: Target
    args: dict[str, Any]

    @property
    def iteration(self) -> int | None:
        return self.plan.checkpoint.iteration

    @property
    def folder(self) -> str:
        return "release" if self.iteration is None else f"iter_{self.iteration:07d}"

    def common(self) -> dict[str, Any]:
        """What every format holds beside the weights."""
        return {
            "args": as_records(self.args),
            "checkpoint_version": VERSION,
            "iteration": self.iteration or 0,
            "num_floating_point_operations_so_far": 0,
        }


def megatron_job(plan: Plan, target: Target) -> Job:
    """Everything to write for Megatron to load the model of `plan` with the layout of `target`.

    Raises:
        Refused: what Megatron has no argument for, or would not load.
    """
    args = run_arguments(
        plan.config,
        target,
        source_args=plan.checkpoint.args or None,
        dtype=dtypes.TORCH_NAME[plan.dtype],
        iteration=plan.checkpoint.iteration or 0,
    )
    run = Run(plan, target, args)
    outputs, small = (rank_files if target.format == "torch" else distributed_files)(run)
    outputs = [with_folder(run.folder, output) for output in outputs]

    def all_small(digests: Digests) -> Small:
        made = {f"{run.folder}/{name}": data for name, data in small.items()}
        made["megahf.json"] = (json.dumps(noted(run, digests), indent=2, sort_keys=True) + "\n").encode()
        return {**made, TRACKER: str("release" if run.iteration is None else run.iteration).encode()}

    plan.notes.extend(unsaid(plan.config))

    def how_to_load(place: Path) -> list[str]:
        *options, last = (f"    {option}" for option in command_line(args, str(place)))
        fewer = sensible_tp(plan.config)
        size = [f"--tp {fewer} would be enough for its size"] if target.grid.tensor > fewer else []
        said = llava.remarks(args, plan.config) if is_llava(plan.config) else []
        return ["Megatron loads it with", *(f"{option} \\" for option in options), last, *remarks(args), *said, *size]

    return Job(outputs, all_small, TRACKER, how_to_load)


def noted(run: Run, digests: Digests) -> dict[str, Any]:
    """`megahf.json`: as a folder's, with a digest of every share."""
    flat = {f"{file}: {name}": digest for file, names in digests.items() for name, digest in names.items()}
    return {**provenance(run.plan, flat), "megahf": __version__, "written_for": str(run.target.grid)}


def with_folder(folder: str, output: Output[Copy]) -> Output[Copy]:
    return Output(f"{folder}/{output.file}", output.nbytes, output.known, output.weights, output.offsets, output.finish)


def rank_files(run: Run) -> tuple[list[Output[Copy]], Small]:
    """`torch`: a file of each rank."""
    files = ranked(run.plan.config, run.plan.copies, run.target)
    return [rank_file(run, place, models) for place, models in files.items()], {}


def rank_file(run: Run, place: RankFile, models: Mapping[str, Model]) -> Output[Copy]:
    root = {**run.common(), **{name: state_dict(model) for name, model in models.items()}}
    root["args"] = as_records({**run.args, "rank": place.process})
    return torch_file(f"{place.folder}/{FILE}", root)


def state_dict(model: Model) -> Made:
    """A model's state dict, in records."""
    made = Made("collections.OrderedDict", ())
    made.pairs = [(key, None if copy is None else Tensor(copy)) for key, copy in model.items()]
    return made


def distributed_files(run: Run) -> tuple[list[Output[Copy]], Small]:
    """`torch_dist`: a data file of each rank that writes, and what says where each piece lies."""
    tensors = global_tensors(run.plan.config, run.plan.copies, run.target)
    items: dict[int, dict[str, object]] = defaultdict(dict)
    for tensor in tensors:
        for piece in tensor.pieces:
            items[piece.writer][piece.copy.name] = Tensor(piece.copy)
    objects = global_objects(run.plan.config, run.target)
    for one in objects:
        items[one.writer][one.key] = [None]
    outputs, places = [], dict[str, Place]()
    for writer in sorted(items):
        made: tuple[Output[Copy], dict[str, Place]] = distcp(f"__{writer}_0.distcp", items[writer])
        output, lies = made
        outputs.append(output)
        places |= lies
    stored = {
        tensor.key: Stored(
            tensor.shape,
            tensor.dtype,
            tuple(Chunk(piece.start, piece.copy.shape, places[piece.copy.name]) for piece in tensor.pieces),
        )
        for tensor in tensors
    }
    common: Output[Copy] = torch_file(COMMON, {**run.common(), "content_metadata": CONTENT_METADATA})
    ((_, data),) = common.known
    return outputs, {
        COMMON: data,
        METADATA: metadata(stored, {one.key: places[one.key] for one in objects}),
        BACKEND: backend(),
    }
