"""Attention of a chunk of tokens after those in a cache, without a mask: all of the past, then the diagonal.

Rows of a batch that keep the same places go together, each group over the keys it keeps: padding on the left, on the
right and holes are simply not there. The work is that of the keys kept, and memory grows with their number.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .block_attention import attend_blocks, causal_blocks


class Alike(NamedTuple):
    """Rows of a batch that keep the same places.

    Args:
        rows: `[r]`, their numbers.
        kept: `[past + s]`, False for padding; on the CPU, where looking costs no wait.
    """

    rows: Tensor
    kept: Tensor


class Prefix(NamedTuple):
    """What came before a chunk of tokens.

    Args:
        past: tokens in the cache, padding included.
        groups: the batch' rows by what they keep; None: they keep everything.
        kept: `[b, past + s]`, False for padding; None: there is none.
        holes: whether some row has padding between its tokens: its places are farther apart than its tokens are,
            which only matters to a window.
    """

    past: int
    groups: list[Alike] | None = None
    kept: Tensor | None = None
    holes: bool = False


def prefix_of(attention_mask: Tensor | None, past: int, length: int) -> Prefix | None:
    """The prefix of `length` tokens after `past` ones; None for a mask of another length than both together.

    Args:
        attention_mask: None, or `[b, past + s]`, 1 a token, 0 padding.
    """
    if attention_mask is None:
        return Prefix(past)
    if attention_mask.shape[-1] != past + length:
        return None
    kept = attention_mask.bool()
    if bool(kept.all()):
        return Prefix(past)
    distinct, group = kept.cpu().unique(dim=0, return_inverse=True)
    numbers = [(group == number).nonzero().flatten() for number in range(len(distinct))]
    groups = [Alike(rows, mask) for rows, mask in zip(numbers, distinct, strict=True)]
    return Prefix(past, groups, kept, holes=bool(stretches(distinct).max() > 1))


def stretches(kept: Tensor) -> Tensor:
    """How many stretches of tokens each row of a mask `[b, s]` has: `[b]`."""
    return (kept[:, 1:] & ~kept[:, :-1]).sum(dim=-1) + kept[:, 0]


def attend_after(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: Prefix,
    window: int | None,
    scaling: float,
    sinks: Tensor | None,
) -> Tensor:
    """Each query over the keys up to its own: `[b, n, s, d]` to `[b, s, n, v]`; zeros where padding asks.

    Args:
        key, value: `[b, g, k, d]`, the last k of all tokens: a sliding window's cache has forgotten the first.
        window: the last keys a query sees, itself included; None: all. Not for rows with holes.
    """
    length, held = query.shape[2], key.shape[2]
    if prefix.groups is None:
        return attend_blocks(query, key, value, causal_blocks(0, length, held - length, window), scaling, sinks)
    out = query.new_zeros(len(query), length, query.shape[1], value.shape[-1])
    for rows, kept in prefix.groups:
        kept = kept[-held:]
        asked = kept[-length:].nonzero().flatten().to(query.device)
        if not len(asked):
            continue
        rows, seen = rows.to(query.device), kept.nonzero().flatten().to(query.device)
        keys, values = key[rows[:, None], :, seen].transpose(1, 2), value[rows[:, None], :, seen].transpose(1, 2)
        queries = query[rows[:, None], :, asked].transpose(1, 2)  # [r, n, a, d]
        blocks = causal_blocks(0, len(asked), len(seen) - len(asked), window)
        found = attend_blocks(queries, keys, values, blocks, scaling, sinks)
        out = out.index_put((rows[:, None], asked), found)
    return out
