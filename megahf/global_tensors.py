"""What a distributed checkpoint (`torch_dist`) stores: tensors of the whole model, in the pieces that ranks write.

Keys, shapes and pieces are those of `sharded_state_dict` of megatron-core 0.16.1 (`TransformerBlock`, `MambaStack`,
`MultiTokenPredictionBlock`, `apply_swiglu_sharded_factory`, `_split_tensor_factory`): layers of a GPT that are all
alike lie along a first axis, others have numbers; every expert, gate, up and component of a mixer is a piece of its
own, so that a rank of any layout reads little more than its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .cuts import Config, even, shares
from .errors import Problems
from .expert_layouts import spelled
from .extra_states import states
from .plan import Copy
from .rows import IMAGES, LAYERS, Row, Spelling, is_hybrid, language
from .shares import cut_of, padded
from .stages import Stages
from .target import Target
from .tiles import Tiled, add_axis, replaced, unstack
from .weights import Weight, weights

# What Megatron's trainer notes of how the keys are made (`_build_sharded_state_dict_metadata`), where no optimizer is
# stored. `load_content_metadata` reads it from common.pt under `content_metadata`.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


class Piece(NamedTuple):
    """A part of a global tensor, with as many axes."""

    start: tuple[int, ...]
    copy: Copy  # named by key and start
    writer: int  # the process of the run that would write it


@dataclass(frozen=True)
class GlobalTensor:
    """One tensor of the whole model; its pieces cover it exactly once."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: list[Piece]


class GlobalObject(NamedTuple):
    """An item that is no tensor: `[None]`, as Megatron stores a `ShardedObject` of None."""

    key: str  # with its shard: `decoder.layers.mlp.linear_fc1._extra_state/shard_0_4`
    writer: int


class Part(NamedTuple):
    """A piece of one weight, before it has a name."""

    start: tuple[int, ...]
    array: Tiled
    process: int  # in its pipeline stage


def is_stacked(row: Row, config: Config) -> bool:
    """Whether all layers of `row` are one tensor: Megatron asks whether a number says that all have experts or none.

    It asks an image encoder, too, which has that number from the language model.
    """
    mixed = is_hybrid(row.of(config)) or language(config).moe_layer_freq != 1
    return row.stack in (*LAYERS, IMAGES) and not mixed


def global_tensors(config: Config, copies: Iterable[Copy], target: Target) -> list[GlobalTensor]:
    """Every tensor of a `torch_dist` checkpoint.

    Args:
        copies: every weight of `config`'s model, whole and in canonical form, as `Plan.copies` has them.

    Raises:
        Refused: layers of one tensor that are stored in different number formats.
    """
    whole, stages, problems = {copy.name: copy for copy in copies}, Stages.of(config, target.grid), Problems()
    tensors: dict[str, GlobalTensor] = {}
    for weight in weights(config):
        copy, stacked = whole[weight.name], is_stacked(weight.row, config)
        layers = weight.row.of(config).num_layers if stacked else 1
        first = stages.of_weight(weight)[0][0][0] * target.stage_size
        for spelling in spellings(weight.row, config, target):
            key = key_of(spelling.key, weight, stacked)
            shape, parts = cut_up(weight.row, spelling, copy.array, config, target)
            again = [(where, cut_up(weight.row, spelling, array, config, target)[1]) for where, array in copy.same]
            tensor = tensors.setdefault(key, GlobalTensor(key, (layers, *shape) if stacked else shape, copy.dtype, []))
            if tensor.dtype != copy.dtype:
                what = f"layers of one tensor are stored as {tensor.dtype} and as {copy.dtype}"
                problems.add(what, key, "give one number format for all of them")
            for number, (start, array, process) in enumerate(parts):
                same = tuple((where, others[number].array) for where, others in again)
                blank = () if number else copy.blank
                piece = Piece(start, replace(copy, array=array, same=same, runtime="", blank=blank), first + process)
                tensor.pieces.append(named(key, layered(piece, weight.layer or 0) if stacked else piece))
    problems.raise_if_any()
    return list(tensors.values())


def spellings(row: Row, config: Config, target: Target) -> list[Spelling]:
    return spelled(row, "distributed", row.of(config)) if row.experts else row.written(target.specs(config))


def key_of(spelling: str, weight: Weight, stacked: bool) -> str:
    """The key of a weight, or of a stack of them."""
    return spelling.replace(".{l}", "") if stacked else spelling.format(l=weight.layer, k=weight.head)


def cut_up(
    row: Row, spelling: Spelling, whole: Tiled, config: Config, target: Target
) -> tuple[tuple[int, ...], list[Part]]:
    """The shape of what a key stores of a weight, and its pieces."""
    config = row.of(config)
    if row.experts:
        return whole.shape, list(of_experts(row, whole, config, target))
    cut, array = cut_of(row, target), padded(row, whole, config, target)
    if cut.dim is None:
        return array.shape, [Part((0,) * array.ndim, array, 0)]
    blocks = shares(array, cut.blocks(config), cut.dim)
    chosen = blocks if spelling.parts == 1 else [blocks[spelling.part]]
    return replaced(array.shape, cut.dim, sum(block.shape[cut.dim] for block in chosen)), list(
        pieces_of(chosen, cut.dim, target.grid.tensor)
    )


def pieces_of(blocks: Sequence[Tiled], dim: int, ranks: int) -> Iterator[Part]:
    """The shares of each block, end to end along `dim`; every rank writes its own."""
    at = 0
    for block in blocks:
        for rank, share in enumerate(even(block, ranks, dim)):
            yield Part(replaced((0,) * block.ndim, dim, at), share, rank)
            at += share.shape[dim]


def of_experts(row: Row, whole: Tiled, config: Config, target: Target) -> Iterator[Part]:
    """The pieces of each expert, `[1, ..]`."""
    grid = target.grid
    local = whole.shape[0] // grid.expert
    for number, expert in enumerate(map(add_axis, unstack(whole))):
        writer = number // local * grid.expert_tensor
        if row.cut.dim is None:
            yield Part((number, *(0,) * (whole.ndim - 1)), expert, writer)
            continue
        blocks = shares(expert, row.cut.blocks(config), row.cut.dim)
        for start, share, rank in pieces_of(blocks, row.cut.dim, grid.expert_tensor):
            yield Part((number, *start[1:]), share, writer + rank)


def layered(piece: Piece, layer: int) -> Piece:
    """A piece of one layer as one of all layers."""
    same = tuple((where, add_axis(array)) for where, array in piece.copy.same)
    return piece._replace(
        start=(layer, *piece.start), copy=replace(piece.copy, array=add_axis(piece.copy.array), same=same)
    )


def named(key: str, piece: Piece) -> Piece:
    return piece._replace(copy=replace(piece.copy, name=f"{key}/{'.'.join(map(str, piece.start))}"))


def global_objects(config: Config, target: Target) -> list[GlobalObject]:
    """Every item that is no tensor: the extra states that modules ask for; of layers and of experts one each."""
    stages, found = Stages.of(config, target.grid), []
    for weight in states(config, target.engine, True):
        row, stacked = weight.row, is_stacked(weight.row, config)
        first = stages.of_weight(weight)[0][0][0] * target.stage_size
        spelling = spelled(row, "distributed", row.of(config))[0].key if row.experts else row.name
        key = key_of(spelling, weight, stacked)
        layer = [(weight.layer or 0, row.of(config).num_layers)] if stacked else []
        if not row.experts:
            found.append(GlobalObject(shard(key, layer), first))
            continue
        total = row.of(config).num_experts or 0
        for expert in range(total):
            writer = first + expert // (total // target.grid.expert) * target.grid.expert_tensor
            found.append(GlobalObject(shard(key, [*layer, (expert, total)]), writer))
    return found


def shard(key: str, at: Sequence[tuple[int, int]]) -> str:
    """`ShardedObject.unique_key`: `at` is (number, of how many) for each axis."""
    offsets, sizes = zip(*(at or [(0, 1)]), strict=True)
    return f"{key}/shard_{'.'.join(map(str, offsets))}_{'.'.join(map(str, sizes))}"
