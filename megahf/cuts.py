"""How ranks divide a weight, and how a stored array differs from the weight's own form; each with its inverse.

Everything here moves views (`megahf.tiles`) and no byte, so it holds for arrays in tests and for mapped files in plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .models.vision_kinds import vision_kind
from .tiles import Tiled, add_axis, join

Config = Any  # anything with McoreGPTConfig's fields: the class itself, or the namespace `arguments` makes


@dataclass(frozen=True)
class Cut:
    """How tensor-parallel ranks divide one weight along `dim`.

    A packed weight (gate | up, or Mamba's z | x | B | C | dt) is `blocks` laid end to end, each cut on its own; column,
    row and gated are this one rule with other numbers. `linear_qkv` is a plain column cut: Megatron stores it group by
    group, also when there are more ranks than query groups.
    """

    dim: int | None = None  # None: every rank holds the whole weight
    blocks: Callable[[Config], tuple[int, ...]] = lambda config: (1,)  # their sizes, to one another
    padded: bool = False  # rows beyond the vocabulary fill up the last ranks
    by_version: bool = False  # some Megatrons cut it and others do not: the size of what a rank stores tells
    heads: bool = False  # by whole heads, with dummy ones of zeros where an encoder's do not divide: `padded_heads`

    def split(self, whole: Tiled, config: Config, ranks: int) -> list[Tiled]:
        """The whole weight as each of `ranks` holds it."""
        if self.dim is None:
            return [whole] * ranks
        blocks = shares(whole, self.blocks(config), self.dim)
        shards = [even(block, ranks, self.dim) for block in blocks]  # [block][rank]
        return [join(rank, self.dim) for rank in zip(*shards, strict=True)]

    def merge(self, ranks: Sequence[Tiled], config: Config) -> Tiled:
        """The whole weight from what each rank holds."""
        if self.dim is None:
            return ranks[0]
        shards = [shares(rank, self.blocks(config), self.dim) for rank in ranks]  # [rank][block]
        return join([join(block, self.dim) for block in zip(*shards, strict=True)], self.dim)


def shares(whole: Tiled, sizes: Sequence[int], dim: int) -> list[Tiled]:
    """`whole` in pieces along `dim` whose sizes are to one another as `sizes`."""
    places, total = whole.shape[dim], sum(sizes)
    if any(places * size % total for size in sizes):
        by = len(sizes) if len(set(sizes)) == 1 else " : ".join(map(str, sizes))
        raise ValueError(f"{places} places along axis {dim} do not divide by {by}")
    return whole.split([places * size // total for size in sizes], dim)


def even(whole: Tiled, pieces: int, dim: int) -> list[Tiled]:
    """`whole` in equal pieces along `dim`."""
    return shares(whole, [1] * pieces, dim)


def gates(config: Config) -> int:
    """Blocks of a first MLP matrix: gate | up, or just up."""
    return 2 if config.gated_linear_unit else 1


WHOLE, COLUMN, ROW = Cut(), Cut(0), Cut(1)
VOCAB = Cut(0, padded=True)
FC1 = Cut(0, lambda config: (1,) * gates(config))  # gate | up
PROJECTION_FC1 = Cut(0, lambda config: (1,) * (2 if config.projection_gated_linear_unit else 1))
HEAD_ROWS, HEAD_COLUMNS = Cut(0, heads=True), Cut(1, heads=True)
LATENT = Cut(0, by_version=True)  # Megatron 0.14 and later keep multi-latent down projections whole under TE
EXPERTS_FC1, EXPERTS_FC2 = Cut(1, FC1.blocks), Cut(2)  # of [experts, out, in]


def padded_heads(config: Config, ranks: int) -> int:
    """An image encoder's heads on all ranks together: InternViT-6B's 25 are filled up to as many on each.

    `((24 // ranks) + 1) * ranks` in `get_vision_model_config` of examples/multimodal/config.py.
    """
    heads: int = config.num_attention_heads
    fixed = vision_kind(config.vision_model_type).num_attention_heads is not None
    return -(-heads // ranks) * ranks if fixed else heads


def mixer_width(config: Config) -> int:
    """Channels of a Mamba mixer."""
    return (
        (config.mamba_num_heads or 0) * config.mamba_head_dim
        if config.mamba_version == 2
        else config.mamba_expand * config.hidden_size
    )


def in_proj(config: Config) -> tuple[int, ...]:
    """Rows of z | x | B | C | dt; Mamba-1 has x | z."""
    width, shared = mixer_width(config), config.mamba_num_groups * config.mamba_state_dim
    return (width, width, shared, shared, config.mamba_num_heads or 0) if config.mamba_version == 2 else (width, width)


def convolved(config: Config) -> tuple[int, ...]:
    """Channels of x | B | C; Mamba-1 has x alone."""
    width, shared = mixer_width(config), config.mamba_num_groups * config.mamba_state_dim
    return (width, shared, shared) if config.mamba_version == 2 else (width,)


IN_PROJ, CONV = Cut(0, in_proj), Cut(0, convolved)


@dataclass(frozen=True)
class Pack:
    """The way from a stored array to the weight's own form, and back.

    Of experts the own form is `[experts, out, in]`, with as many experts as the array holds.
    """

    read: Callable[[Tiled, Config, int], Tiled]  # array, config, experts that a rank holds
    write: Callable[[Tiled], Tiled] | None = None  # None: read, and never written so


def same(array: Tiled, *_: Any) -> Tiled:
    return array


def only_expert(array: Tiled, *_: Any) -> Tiled:
    return add_axis(array)


def from_only_expert(array: Tiled) -> Tiled:
    return array.take(0)


def from_packed(array: Tiled, config: Config, experts: int) -> Tiled:
    """Transformer Engine's single grouped parameter: `[experts, ..]`, or the experts end to end."""
    if array.shape[0] == experts:
        return array
    if array.shape[0] % experts:
        raise ValueError(f"packed experts of {list(array.shape)} are not {experts}")
    return array.unflatten(0, (experts, -1))


def from_weight1(array: Tiled, config: Config, experts: int) -> Tiled:
    """Legacy GroupedMLP's `weight1` `[h, experts 2f]`, whose memory is `[experts, h, 2f]`."""
    hidden, size = array.shape[0], array.shape[0] * array.shape[1]
    if array.shape[1] % experts:
        raise ValueError(f"weight1 of {list(array.shape)} does not fit {experts} experts")
    return array.flatten(0).unflatten(0, (experts, size // experts)).unflatten(1, (hidden, -1)).swapaxes(1, 2)


def to_weight1(array: Tiled) -> Tiled:
    experts, width, hidden = array.shape
    return array.swapaxes(1, 2).flatten(1).flatten(0).unflatten(0, (hidden, experts * width))


def from_weight2(array: Tiled, config: Config, experts: int) -> Tiled:
    """Legacy GroupedMLP's `weight2` `[experts f, h]`."""
    if array.shape[0] % experts:
        raise ValueError(f"weight2 of {list(array.shape)} does not fit {experts} experts")
    return array.unflatten(0, (experts, -1)).swapaxes(1, 2)


def to_weight2(array: Tiled) -> Tiled:
    return array.swapaxes(1, 2).flatten(0)


def latents(config: Config, array: Tiled) -> tuple[int, int]:
    """Rows of q and of kv in a fused down projection, or in a rank's share of it."""
    whole = config.q_lora_rank + config.kv_lora_rank + config.qk_pos_emb_head_dim
    queries = array.shape[0] * config.q_lora_rank // whole
    return queries, array.shape[0] - queries


def q_of_fused(array: Tiled, config: Config, *_: Any) -> Tiled:
    return array.narrow(0, 0, latents(config, array)[0])


def kv_of_fused(array: Tiled, config: Config, *_: Any) -> Tiled:
    queries, rest = latents(config, array)
    return array.narrow(0, queries, rest)


PLAIN = Pack(same, same)
ONE_EXPERT = Pack(only_expert, from_only_expert)
PACKED = Pack(from_packed, same)
WEIGHT1, WEIGHT2 = Pack(from_weight1, to_weight1), Pack(from_weight2, to_weight2)
FUSED_Q, FUSED_KV = Pack(q_of_fused), Pack(kv_of_fused)


def deinterleaved(array: Tiled, dim: int, size: int) -> Tiled:
    """Rows in blocks of `size` gates, `size` ups, and so on, as gate | up."""
    if array.shape[dim] % (2 * size):
        raise ValueError(f"{array.shape[dim]} rows are not blocks of {size} gates and {size} ups")
    return (
        array.unflatten(dim, (-1, 2 * size))
        .unflatten(dim + 1, (2, size))
        .swapaxes(dim, dim + 1)
        .flatten(dim)
        .flatten(dim)
    )


def interleaved(array: Tiled, dim: int, size: int) -> Tiled:
    """gate | up as rows in blocks of `size` gates, `size` ups, and so on."""
    halves = array.unflatten(dim, (2, -1)).unflatten(dim + 1, (-1, size)).swapaxes(dim, dim + 1)
    return halves.flatten(dim).flatten(dim)
