"""A weight of experts as each rank of a run would store it, in any layout that Megatron has or had.

The table alone says how: the cut over the ranks that share an expert, then each spelling's pack, backwards.
"""

from __future__ import annotations

from collections.abc import Iterator

from .cuts import ONE_EXPERT, Config, even, gates, interleaved
from .rows import READ_ONLY, Row, Spelling
from .tiles import Tiled, add_axis, unstack

LAYOUTS = ("sequential", "te-grouped", "packed", "legacy-grouped", "distributed", "singleton")
GLOBAL = ("distributed", "singleton")  # of distributed checkpoints, whose keys do not say who wrote them


def stores(
    row: Row, whole: Tiled, layout: str, config: Config, ranks: int = 1, shards: int = 1, turns: int | None = None
) -> dict[tuple[int, int], dict[str, Tiled]]:
    """What every rank stores of `whole`, `[experts, ..]`: (expert rank, expert-tensor rank) -> key -> array.

    Args:
        layout: one of LAYOUTS; of those in GLOBAL all ranks store one array together, named once, under (0, 0).
        ranks: that share out the experts.
        shards: ranks that share out the matrices of each.
        turns: gates before as many ups, and so on by turns, where the model's gemm wants them so.

    Raises:
        ValueError: sizes that do not divide, or a layout that this weight does not have.
    """
    chosen = spelled(row, layout, config)
    if layout in GLOBAL:
        return {(0, 0): dict(keyed(chosen, whole, row.cut.dim or 0))}
    stored = {}
    for expert, mine in enumerate(even(whole, ranks, 0)):
        for shard, share in enumerate(row.cut.split(mine, config, shards)):
            if turns and row.interleave and gates(config) == 2:
                share = interleaved(share, row.cut.dim or 0, turns)
            stored[expert, shard] = dict(keyed(chosen, share, row.cut.dim or 0))
    return stored


def spelled(row: Row, layout: str, config: Config) -> list[Spelling]:
    """The keys of `row` in `layout`: one, or gate and up apart, as single experts of distributed checkpoints are."""
    found = [spelling for spelling in row.spellings if spelling.layout == layout and spelling.spec != READ_ONLY]
    parts = 2 if layout == "singleton" and len(row.cut.blocks(config)) == 2 else 1
    found = [spelling for spelling in found if spelling.parts == parts]
    if not found:
        raise ValueError(f"{row.name} has no layout {layout!r}: biases have no legacy-grouped one")
    return found


def keyed(chosen: list[Spelling], share: Tiled, dim: int) -> Iterator[tuple[str, Tiled]]:
    """A rank's experts under the keys of `chosen`; `{l}` is left in them."""
    for spelling in chosen:
        block = even(share, spelling.parts, dim)[spelling.part]
        write = spelling.pack.write
        if write is None:
            raise ValueError(f"{spelling.key} is read only")
        each = map(add_axis, unstack(block)) if spelling.pack is ONE_EXPERT else [block]
        for number, held in enumerate(each):
            yield spelling.key.replace("{e}", str(number)), write(held)
