"""Where each weight lies in a checkpoint: every stored key, recognised and placed under its canonical name.

Nothing is merged yet: a place knows the pipeline chunk, the run of experts, the block of the cut and the rank of each
array, and every array that is stored there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .arguments import Args
from .checkpoint import Checkpoint, Holding
from .cuts import Config, deinterleaved, gates
from .errors import Problems, refuse
from .layouts import Chunk, Grid, layers
from .recognition import Found, foreign, ignored, recognise
from .rows import IMAGES, PROJECTION, VISION, Row, language
from .tiles import Tiled, join, replaced, unstack
from .weights import depth, heads

Copies = list[tuple[str, Tiled]]  # (where, array): one and the same, each time it is stored
Run = dict[int, dict[int, Copies]]  # block of the cut -> tensor-parallel rank -> copies


@dataclass
class Stored:
    """One weight as it lies in one pipeline chunk."""

    row: Row
    layer: int | None
    chunk: Chunk
    sharded: bool  # by ranks, as legacy files are
    runs: dict[int, Run] = field(default_factory=dict)  # first expert of a run of experts (0: no experts) -> run
    layouts: set[str] = field(default_factory=set)  # of experts

    def add(self, first: int, part: int, rank: int, where: str, array: Tiled) -> None:
        self.runs.setdefault(first, {}).setdefault(part, {}).setdefault(rank, []).append((where, array))


Places = dict[str, dict[Chunk, Stored]]  # canonical name -> chunk -> what it holds


class Source(NamedTuple):
    """What reading needs to know of the checkpoint."""

    config: Config
    args: Args
    ranks: Grid
    held: Mapping[Chunk, range]  # the layers of each chunk
    padding: bool = False  # whether rows beyond the vocabulary are kept

    @classmethod
    def of(cls, config: Config, args: Args, ranks: Grid) -> Source:
        experts = language(config).num_experts or 0
        if experts % ranks.expert:
            raise refuse(f"{experts} experts do not divide over {ranks.expert} expert-parallel ranks", "args")
        return cls(config, args, ranks, layers(ranks, language(config).num_layers))

    @property
    def local_experts(self) -> int:
        """Experts that a rank holds."""
        return (language(self.config).num_experts or 0) // self.ranks.expert

    def tensor_ranks(self, row: Row) -> int:
        """Ranks that share out the matrices of `row`."""
        if row.part in (VISION, PROJECTION):
            return self.ranks.encoder or self.ranks.tensor
        return self.ranks.expert_tensor if row.experts else self.ranks.tensor

    def turns(self, row: Row) -> int | None:
        """Rows of gate before as many of up, and so on by turns; None where gate and up lie one after the other."""
        if not row.interleave or gates(row.of(self.config)) == 1:
            return None
        size, switch = map(self.args.get, row.interleave.split())
        return size if switch else None


def locate(checkpoint: Checkpoint, source: Source) -> tuple[Places, dict[str, int]]:
    """Every stored key under its canonical name, and how many keys were left out for what reason."""
    places: Places = defaultdict(dict)
    left_out: dict[str, int] = defaultdict(int)
    strange = Problems()
    for holding in checkpoint.holdings:
        for key in (*holding.shapes, *holding.objects):
            where = f"{key} in {holding.where}"
            found = recognise(key)
            if not found and (reason := ignored(key)):
                left_out[reason] += 1
            elif not found:
                kind = foreign(key)
                what = f"these weights belong to {kind}, which is not supported yet" if kind else "unknown weights"
                strange.add(what, where, "" if kind else "every key must be in a row of weights.py")
            elif key in holding.objects:
                strange.add(f"a weight that is no tensor but {holding.objects[key]}", where)
            else:
                place(places, holding, key, found, source, strange)
    for name, chunks in places.items():
        if len(chunks) > 1 and next(iter(chunks.values())).row.stack:
            strange.add(f"one layer in the chunks {sorted(chunks)}", name, "are these files of one run?")
    strange.raise_if_any()
    return places, dict(left_out)


def place(
    places: Places, holding: Holding, key: str, found: Sequence[Found], source: Source, problems: Problems
) -> None:
    """Puts what `key` stores under the names of its weights; one key may hold several layers, and two weights."""
    where, chunk = f"{key} in {holding.where}", (0, 0)
    rank = 0
    if holding.rank:
        chunk, rank = (holding.rank.pipeline, holding.chunk), holding.rank.tensor
    if chunk != (0, 0) and found[0].row.part in (VISION, PROJECTION):
        what = f"an image encoder, or its projection, on pipeline stage {chunk[0]}"
        problems.add(what, where, "Megatron's LLaVA has them on the first alone: are these files of one run?")
        return
    try:
        for choice, layer, array in read(holding, key, found, source):
            row = choice.row
            name = row.name.format(l=layer, k=choice.head)
            stored = places[name].setdefault(chunk, Stored(row, layer, chunk, holding.rank is not None))
            first, own = own_form(choice, array, holding, source)
            stored.layouts.add(choice.spelling.layout)
            stored.add(first, choice.spelling.part, rank % source.tensor_ranks(row), where, own)
    except ValueError as error:
        problems.add(str(error), where, "were these files written by one run, and are these its args?")


def read(
    holding: Holding, key: str, found: Sequence[Found], source: Source
) -> Iterator[tuple[Found, int | None, Tiled]]:
    """Each weight in `key`: the row it is, its global layer, its array as stored."""
    if found[0].stacked:
        stacked, (count, *_) = holding.read(key), holding.shapes[key][0]
        if count != (wanted := found[0].row.of(source.config).num_layers):
            raise ValueError(f"{count} layers are stacked, the args say {wanted}")
        for layer, array in enumerate(unstack(stacked)):
            for choice in chosen(found, source.config, layer):
                yield choice, layer, array
        return
    here = global_layer(holding, found[0], source)
    for choice in chosen(found, source.config, here):
        yield choice, here, holding.read(key)


def chosen(found: Sequence[Found], config: Config, layer: int | None) -> list[Found]:
    """Which of the rows that spell a key so this model has; if none, the likeliest, to be named as too many."""
    there = [one for one in found if one.row.exists(config, layer)]
    return there or [min(found, key=lambda one: len(one.row.unmet(config, layer)))]


def global_layer(holding: Holding, found: Found, source: Source) -> int | None:
    """The layer's number in the whole model."""
    if found.layer is None:
        return None
    if found.row.stack == IMAGES:
        return found.layer
    if found.row.stack == "mtp":  # all in one chunk
        if found.layer >= (count := depth("mtp", source.config)):
            raise ValueError(f"head {found.layer} for further tokens, the args say {count}")
        return found.layer
    if found.row.stack == "heads":
        if (found.head or 0) >= heads(source.config) or found.layer >= depth("heads", source.config):
            raise ValueError(f"layer {found.layer} of head {found.head} for further tokens, which the args do not have")
        return found.layer
    chunk = (holding.rank.pipeline, holding.chunk) if holding.rank else None
    mine = range(language(source.config).num_layers) if chunk is None else source.held[chunk]
    if found.layer >= len(mine):
        raise ValueError(f"layer {found.layer} of a stage that the args give {len(mine)} layers")
    return mine[found.layer]


def own_form(found: Found, array: Tiled, holding: Holding, source: Source) -> tuple[int, Tiled]:
    """A stored array in its weight's own form, and the first expert it holds (0: no experts)."""
    if not found.row.experts:
        return 0, found.spelling.pack.read(array, found.row.of(source.config), 0)
    total = language(source.config).num_experts or 0
    here, first = source.local_experts if holding.rank else total, 0
    if holding.rank:
        first = holding.rank.expert * here
    run = found.spelling.pack.read(array, found.row.of(source.config), here)
    number = found.expert or 0
    if number + run.shape[0] > here:
        what = f"{run.shape[0]} experts" if found.expert is None else f"expert {number}"
        raise ValueError(f"{what} on a rank that the args give {here} of {total} experts")
    return first + number, run


def versions(row: Row, stored: Stored, run: Run, shape: tuple[int, ...], source: Source) -> Copies:
    """The run's array, merged over tensor-parallel ranks, each time it is stored."""
    parts = [run[part] for part in sorted(run)]
    everywhere = [copy for rank in parts[0].values() for copy in rank]
    if row.cut.dim is None or (row.cut.by_version and everywhere[0][1].shape == shape):
        return everywhere
    turns = max(len(copies) for part in parts for copies in part.values())
    return [merged(row, stored, parts, turn, shape, source) for turn in range(turns)]


def merged(
    row: Row, stored: Stored, parts: list[dict[int, Copies]], turn: int, shape: tuple[int, ...], source: Source
) -> tuple[str, Tiled]:
    """A cut weight over its ranks; `turn` picks among several files that hold the same rank."""
    chosen = [[part[rank][min(turn, len(part[rank]) - 1)] for rank in sorted(part)] for part in parts]
    where, dim, config = chosen[0][0][0], row.cut.dim or 0, row.of(source.config)
    ranks = [join(list(blocks), dim) for blocks in zip(*([array for _, array in part] for part in chosen), strict=True)]
    check_blocks(parts, row.cut.blocks(config), dim)
    whole = replaced(ranks[0].shape, dim, sum(rank.shape[dim] for rank in ranks))
    if len(row.cut.blocks(config)) > 2:  # blocks of sizes that the args say: those first
        check_shape(row, whole, shape, source.config)
    size = source.turns(row)
    if size is None:
        return where, ranks[0] if len(ranks) == 1 else row.cut.merge(ranks, config)
    if not stored.sharded:  # as the ranks that wrote it saw it: each had its own gates and ups by turns
        ranks = row.cut.split(ranks[0], config, source.tensor_ranks(row))
    return where, row.cut.merge([deinterleaved(rank, dim, size) for rank in ranks], config)


def check_shape(
    row: Row, stored: tuple[int, ...], wanted: tuple[int, ...], config: Config, say: str = "the args say"
) -> None:
    """Raises ValueError where a whole weight is not of the shape that the args, or whoever, `say`."""
    if stored != wanted:
        blocks, letters = row.cut.blocks(row.of(config)), row.shape.replace(" ", " x ")
        made = f", {' + '.join(map(str, blocks))} of them" if len(blocks) > 2 else ""
        raise ValueError(f"stored {list(stored)}, {say} {list(wanted)} ({letters}{made})")


def check_blocks(parts: list[dict[int, Copies]], blocks: Sequence[int], dim: int) -> None:
    """Raises ValueError where blocks that are stored one by one are not to one another as the args say."""
    places = [sum(copies[0][1].shape[dim] for copies in part.values()) for part in parts]
    if len(parts) > 1 and (len(parts) != len(blocks) or crossed(places, blocks)):
        raise ValueError(f"{' + '.join(map(str, places))} are stored, the args say {' + '.join(map(str, blocks))}")


def crossed(places: Sequence[int], blocks: Sequence[int]) -> bool:
    return any(place * sum(blocks) != block * sum(places) for place, block in zip(places, blocks, strict=True))
