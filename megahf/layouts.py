"""Where things live: which layers each pipeline stage and virtual chunk holds, and the grid of ranks.

Follows `get_num_layers_to_build` (megatron/core/transformer/transformer_block.py), `get_transformer_layer_offset`
(transformer_layer.py) and `PipelineParallelLayerLayout`, all of megatron-core 0.16.1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import refuse

Chunk = tuple[int, int]  # pipeline rank, virtual chunk


@dataclass(frozen=True)
class Grid:
    """How the writer's ranks were arranged."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks a pipeline rank holds
    expert: int = 1
    expert_tensor: int = 1
    first: int | None = None  # layers of the first stage, when given
    last: int | None = None
    embedding: bool = False  # the embedding counts as a layer
    loss: bool = False  # the loss counts as a layer
    layout: str | None = None  # "Et|t|tt|L"
    encoder: int | None = None  # tensor-parallel ranks of an image encoder that has the first stage to itself

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VPP": self.virtual, "EP": self.expert}
        named = [f"{name}{size}" for name, size in sizes.items() if size > 1 or name == "TP"]
        named += [f"an encoder's stage of TP{self.encoder}"] if self.encoder else []
        return " ".join([*named, f"ETP{self.expert_tensor}"] if self.expert_tensor != self.tensor else named)


def layers(grid: Grid, num_layers: int) -> dict[Chunk, range]:
    """The global numbers of the layers that each chunk holds, in the order the layers run."""
    counts = by_layout(grid, num_layers) if grid.layout else by_numbers(grid, num_layers)
    held, start = {}, 0
    for virtual in range(grid.virtual):
        for rank in range(grid.pipeline):
            held[rank, virtual] = range(start, start + counts[rank, virtual])
            start += counts[rank, virtual]
    if start != num_layers:
        raise refuse(
            f"the pipeline stages of {grid} hold {start} layers, the model has {num_layers}",
            "args",
            "the args do not describe the run that wrote this checkpoint",
        )
    return held


def by_numbers(grid: Grid, num_layers: int) -> dict[Chunk, int]:
    """Even stages, uneven first and last ones, and the embedding or the loss counted as a layer."""
    total = num_layers + grid.embedding + grid.loss
    given = {rank: count for rank, count in ((0, grid.first), (grid.pipeline - 1, grid.last)) if count is not None}
    others = grid.pipeline - len(given)
    left = total - sum(given.values())
    if left and (others <= 0 or left % others):
        raise refuse(f"{left} layers do not divide over {others} pipeline stages", "args")
    stages = [given.get(rank, left // max(others, 1)) for rank in range(grid.pipeline)]
    if min(stages) < 0:
        raise refuse(f"stages of {stages} layers", "args", "these are not the args of the run that wrote it")
    if any(count % grid.virtual for count in stages):
        raise refuse(f"stages of {stages} layers do not divide into {grid.virtual} virtual chunks", "args")
    counts = {(rank, v): stages[rank] // grid.virtual for rank in range(grid.pipeline) for v in range(grid.virtual)}
    counts[0, 0] -= grid.embedding
    counts[grid.pipeline - 1, grid.virtual - 1] -= grid.loss
    return counts


def by_layout(grid: Grid, num_layers: int) -> dict[Chunk, int]:
    """A layout string: `E`mbedding, `t`ransformer layer, `m`tp, `L`oss; `|` between stages, dealt round the ranks."""
    stages = unrolled(grid.layout or "").split("|")
    if len(stages) != grid.pipeline * grid.virtual:
        raise refuse(
            f"layout {grid.layout!r} has {len(stages)} stages for {grid.pipeline} ranks x {grid.virtual} chunks",
            "args.pipeline_model_parallel_layout",
        )
    return {(i % grid.pipeline, i // grid.pipeline): stage.count("t") for i, stage in enumerate(stages)}


def unrolled(layout: str, where: str = "args.pipeline_model_parallel_layout") -> str:
    """`layout` with its repeats `(..)*3` and `t*4` written out; refused, as seen in `where`, with other letters."""
    text = layout.replace(",", "").replace(" ", "")
    for repeat in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(repeat, lambda match: match.group(1) * int(match.group(2)), text)
    if odd := set(text) - set("EtmL|"):
        raise refuse(f"layout {layout!r} has {sorted(odd)}; known are E, t, m, L and |", where)
    return text


def stage_count(layout: str) -> int:
    """How many stages (pipeline ranks times virtual chunks) a layout string has."""
    return len(unrolled(layout).split("|"))
