"""What every rank of a Megatron run stores of a model: the table walked the other way than `stored.py` reads it.

Files of ranks (`torch`) here; the tensors that all ranks store together (`torch_dist`) are in `global_tensors.py`.
Only views move: a share is a `Copy` whose array is the tiles of the whole weight that a rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .checkpoint import Rank
from .cuts import WHOLE, Config, Cut, padded_heads
from .expert_layouts import stores
from .extra_states import states
from .layouts import Chunk, Grid
from .plan import Copy
from .rows import READ_ONLY, Row, language
from .stages import Stages
from .target import Target
from .tiles import Tiled, join, replaced, zeros
from .weights import Weight, table_of, weights

Model = dict[str, Copy | None]  # key -> what is stored; None: an extra state, stored as None
Arrays = dict[tuple[int, int], dict[str, Tiled]]  # (expert rank, rank among those that cut it) -> key -> share
Shards = dict[tuple[int, int], dict[str, Copy]]  # the same, as copies; layers have no number in the keys


class Place(NamedTuple):
    """A file of a `torch` checkpoint."""

    rank: Rank
    folder: str  # the directory that Megatron gives it: `mp_rank_00_000_000`
    process: int  # the first of the run's processes that has these ranks


def places(target: Target) -> list[Place]:
    """Every (tensor, pipeline, expert) rank that a process of the run has: those of which it reads the file.

    In each stage Megatron counts tensor ranks fastest, and for experts expert-tensor ranks, then expert ranks, so that
    not every tensor rank meets every expert rank.
    """
    grid, found = target.grid, dict[Rank, Place]()
    for process in range(target.world_size):
        stage, own = divmod(process, target.stage_size)
        rank = Rank(own % grid.tensor, stage, own // grid.expert_tensor % grid.expert)
        found.setdefault(rank, Place(rank, folder(rank, grid), process))
    return list(found.values())


def folder(rank: Rank, grid: Grid) -> str:
    """`get_checkpoint_name` of Megatron's trainer."""
    stage = f"_{rank.pipeline:03d}" if grid.pipeline > 1 else ""
    return f"mp_rank_{rank.tensor:02d}{stage}" + (f"_{rank.expert:03d}" if grid.expert > 1 else "")


def model_name(chunk: Chunk, grid: Grid) -> str:
    """The name of a model chunk in its file."""
    return f"model{chunk[1]}" if grid.virtual > 1 else "model"


def ranked(config: Config, copies: Iterable[Copy], target: Target) -> dict[Place, dict[str, Model]]:
    """What each file of a `torch` checkpoint stores: model chunk (`model`, or `model0` ..) -> key -> share.

    Copies are named by file, chunk and key. What is stored again is compared where a share is first read.

    Args:
        copies: every weight of `config`'s model, whole and in canonical form, as `Plan.copies` has them.
    """
    grid, whole = target.grid, {copy.name: copy for copy in copies}
    stages = Stages.of(config, grid)
    chunks = [model_name((0, virtual), grid) for virtual in range(grid.virtual)]
    files: dict[Place, dict[str, Model]] = {place: {name: {} for name in chunks} for place in places(target)}
    for weight, source in stored(config, stages):
        shards = sharded(weight, whole[source], config, target)
        for chunk, layer in stages.of_weight(weight):
            for place in [place for place in files if place.rank.pipeline == chunk[0]]:
                own = owner(weight.row, place.rank, target)
                for key, copy in shards[own].items():
                    numbered, name = key.format(l=layer, k=weight.head), model_name(chunk, grid)
                    files[place][name][numbered] = replace(copy, name=f"{place.folder}/{name}/{numbered}")
                shards[own] = {key: replace(copy, same=(), blank=()) for key, copy in shards[own].items()}
    for weight in states(config, target.engine, False):
        for chunk, layer in stages.of_weight(weight):
            added = {key.format(l=layer, k=weight.head): None for key in state_keys(weight.row, config, target)}
            for place, models in files.items():
                models[model_name(chunk, grid)] |= added if place.rank.pipeline == chunk[0] else {}
    return files


def stored(config: Config, stages: Stages) -> Iterator[tuple[Weight, str]]:
    """Every weight that files store, and whose values it has: a tied output layer on a stage of its own is a copy."""
    yield from ((weight, weight.name) for weight in weights(config))
    for row in table_of(config):
        if row.tied and not row.exists(config, None) and stages.places[row.stage][0] != stages.places["embedding"][0]:
            yield Weight(row.name, row, None, row.dims(config), row.runtime), row.tied


def sharded(weight: Weight, copy: Copy, config: Config, target: Target) -> Shards:
    """A weight as each rank holds it, with what is stored again cut in the same way."""
    shares, first = arrays(weight, copy.array, config, target), (0, 0)
    again = [(where, arrays(weight, array, config, target)) for where, array in copy.same]
    return {
        rank: {
            key: replace(
                copy,
                array=array,
                runtime="",
                same=tuple((where, other[rank][key]) for where, other in again),
                blank=copy.blank if rank == first else (),
            )
            for key, array in keyed.items()
        }
        for rank, keyed in shares.items()
    }


def arrays(weight: Weight, whole: Tiled, config: Config, target: Target) -> Arrays:
    """The shares of a whole weight, in the spelling of the target's layers."""
    row, grid, own = weight.row, target.grid, weight.row.of(config)
    if row.experts:
        return stores(row, whole, target.experts, own, grid.expert, grid.expert_tensor)
    (spelling,) = row.written(target.specs(config))
    shares = cut_of(row, target).split(padded(row, whole, own, target), own, grid.tensor)
    return {(0, rank): {spelling.key: share} for rank, share in enumerate(shares)}


def owner(row: Row, rank: Rank, target: Target) -> tuple[int, int]:
    """Which of the shares of `row` a rank holds; what is not cut is everywhere the first one."""
    among = target.grid.expert_tensor if row.experts else target.grid.tensor
    return rank.expert if row.experts else 0, 0 if cut_of(row, target).dim is None else rank.tensor % among


def cut_of(row: Row, target: Target) -> Cut:
    """How `target`'s layers cut a weight: Transformer Engine's keep latent down projections whole."""
    return WHOLE if row.cut.by_version and target.engine else row.cut


def padded(row: Row, whole: Tiled, config: Config, target: Target) -> Tiled:
    """A word embedding of the target's rows: zeros are added, or padding that is too much is left out; and an encoder's
    heads with dummy ones. `config` is that of the row's part."""
    if row.cut.heads and row.cut.dim is not None:
        dim, more = row.cut.dim, padded_heads(config, target.grid.tensor) - config.num_attention_heads
        dummies = replaced(whole.shape, dim, whole.shape[dim] // config.num_attention_heads * more)
        return join([whole, zeros(dummies, whole.dtype)], dim) if more else whole
    if not row.cut.padded:
        return whole
    kept = whole.narrow(0, 0, min(whole.shape[0], target.vocabulary))
    lacking = target.vocabulary - kept.shape[0]
    return join([kept, zeros((lacking, *kept.shape[1:]), kept.dtype)], 0) if lacking else kept


def state_keys(row: Row, config: Config, target: Target) -> list[str]:
    """The keys of an extra state in a file; experts that are held one by one have one each."""
    if not row.experts:
        return [row.name]
    local = range((language(config).num_experts or 0) // target.grid.expert)
    found = [one.key for one in row.spellings if one.layout == target.experts and one.spec != READ_ONLY]
    return list(dict.fromkeys(key.replace("{e}", str(number)) for key in found for number in local))
