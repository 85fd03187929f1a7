"""Batches for context parallelism: each process gets its slices of the same batch, and never a mask.

Labels are shifted before they are cut, for the label of a slice's last token is another rank's token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .errors import refuse
from .models.context_parallel import IGNORED, group_of
from .models.zigzag import positions, split

TARGETS = ("labels", "shift_labels")
# What is cut, and what it is padded with.
PADDED = {"input_ids": 0, "inputs_embeds": 0, **dict.fromkeys(TARGETS, IGNORED), "expert_tokens": 0}
KNOWN = {*PADDED, "position_ids", "attention_mask", "num_items_in_batch"}
IMAGES = {"pixel_values", "num_tiles"}  # whole on every rank


class ContextParallelCollator:
    """Makes a batch as `collator` does, on every process the same one, and gives each its slices.

    The processes of `mesh` must be given the same examples. Where `pad_token_id` is given, sequences are padded on the
    right to a multiple of twice the processes; without it they must have such a length.

    Args:
        collator: from a list of examples to a batch of tensors `[b, s]`.
        mesh: as `context_parallel` takes it.
    """

    def __init__(
        self, collator: Callable[[list[Any]], Mapping[str, Any]], mesh: Any, pad_token_id: int | None = None
    ) -> None:
        group = group_of(mesh)
        self.collator, self.pad_token_id = collator, pad_token_id
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        return slices_of(self.collator(examples), self.size, self.rank, self.pad_token_id)


def slices_of(batch: Mapping[str, Any], size: int, rank: int, pad_token_id: int | None = None) -> dict[str, Any]:
    """A rank's part of a whole batch: `input_ids`, `labels`, `shift_labels` and `position_ids` `[b, s / size]`.

    Where there is padding also `expert_tokens` of that shape, 0 there: auxiliary losses of experts leave it out.

    Raises:
        Refused: what cannot be shared out: padding but on the right, packed documents, unknown inputs.
        ValueError: the length is no multiple of 2 `size`, and there is no `pad_token_id`.
    """
    unknown = sorted(batch.keys() - KNOWN - IMAGES)
    if unknown:
        raise refuse(f"the batch has {', '.join(unknown)}, which context parallelism cannot cut", "", "leave it out")
    whole = dict(batch)
    mask, given = whole.pop("attention_mask", None), whole.pop("position_ids", None)
    key = "input_ids" if "input_ids" in whole else "inputs_embeds"
    length = whole[key].shape[1]
    if given is not None and not bool((given == positions(length, 1, 0, given.device)).all()):
        raise refuse(
            "position_ids start over or jump: packed documents cannot be shared out between ranks",
            "",
            "give each document a row of its own",
        )
    if "labels" in whole and "shift_labels" not in whole:
        whole["shift_labels"] = F.pad(whole["labels"], (0, 1), value=IGNORED)[:, 1:]
    if mask is not None:
        without_padding(whole, mask)
    if pad_token_id is not None and (places := -length % (2 * size)):
        whole.setdefault("expert_tokens", whole[key].new_ones(whole[key].shape[:2]))
        pad(whole, places, pad_token_id)
    sliced = {name: split(x, size, rank) if name in PADDED else x for name, x in whole.items()}
    here = sliced[key]
    sliced["position_ids"] = positions(here.shape[1], size, rank, here.device).expand(len(here), -1)
    return sliced


def without_padding(whole: dict[str, Any], mask: Tensor) -> None:
    """Padding on the right needs no mask: no token sees it, and its labels do not count."""
    kept = mask.bool()
    if mask.dim() != 2 or bool((kept[:, 1:] & ~kept[:, :-1]).any()):
        raise refuse(
            "attention_mask has padding before tokens, which context parallelism cannot leave out",
            "",
            'pad on the right: tokenizer.padding_side = "right"',
        )
    if not kept.all():
        whole["expert_tokens"] = mask
    for name, after in zip(TARGETS, (kept, F.pad(kept, (0, 1))[:, 1:]), strict=True):
        if name in whole:
            whole[name] = whole[name].masked_fill(~after, IGNORED)


def pad(whole: dict[str, Any], places: int, pad_token_id: int) -> None:
    """So many places more on the right of every sequence, whose labels do not count."""
    for name, value in {**PADDED, "input_ids": pad_token_id}.items():
        if name in whole:
            behind = (0, 0, 0, places) if name == "inputs_embeds" else (0, places)
            whole[name] = F.pad(whole[name], behind, value=value)
