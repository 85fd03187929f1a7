"""Which pipeline stage, or virtual chunk of it, holds what of a model: layers, embedding, final norm, heads, output.

Follows `GPTModel`, `TransformerBlock.has_final_layernorm_in_this_stage` and `mtp_on_this_rank` of megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .cuts import Config
from .layouts import Chunk, Grid, layers, unrolled
from .rows import IMAGES, LAYERS, is_hybrid, language
from .weights import Weight, heads


@dataclass(frozen=True)
class Stages:
    """Where things live.

    Attributes:
        held: the layers of each chunk.
        heads: the chunk of all heads for further tokens.
        places: the chunks of each of the rows' stages; the embedding has a copy where heads need it.
    """

    held: Mapping[Chunk, range]
    heads: Chunk
    places: Mapping[str, tuple[Chunk, ...]]

    @classmethod
    def of(cls, config: Config, grid: Grid) -> Stages:
        """Raises Refused where the layers of `config` do not fit the stages of `grid`."""
        config = language(config)
        held = layers(grid, config.num_layers)
        first, last = (0, 0), (grid.pipeline - 1, grid.virtual - 1)
        ending = next(chunk for chunk, numbers in held.items() if config.num_layers - 1 in numbers)
        written = unrolled(grid.layout or "").split("|")
        turn = next((turn for turn, stage in enumerate(written) if "m" in stage), None)
        further = last if turn is None else (turn % grid.pipeline, turn // grid.pipeline)
        predicts = heads(config) > 0
        places = {
            "embedding": (first, further) if predicts and further != first else (first,),
            "norm": (ending,) if predicts and not is_hybrid(config) else (last,),
            "output": (last,),
            IMAGES: (first,),
        }
        return cls(held, further, places)

    def of_weight(self, weight: Weight) -> list[tuple[Chunk, int]]:
        """The chunks that hold a weight, the one that has it by right first, and its layer's number there."""
        layer = weight.layer or 0
        if weight.row.stack in LAYERS:
            return [(chunk, numbers.index(layer)) for chunk, numbers in self.held.items() if layer in numbers]
        if weight.row.stack == IMAGES:
            return [(chunk, layer) for chunk in self.places[IMAGES]]
        if weight.row.stack:
            return [(self.heads, layer)]
        return [(chunk, 0) for chunk in self.places[weight.row.stage]]
