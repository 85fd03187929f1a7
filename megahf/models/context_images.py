"""Images among words that several ranks hold: each encodes all tiles, and takes the vectors of its own places.

So does Megatron, which shares out words and images once they are put together: `_process_embedding_token_parallel` of
megatron/core/models/multimodal/llava_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .context_parallel import IGNORED, ContextParallel
from .zigzag import collect, in_order, numbers


def sizes_of_images(
    input_ids: Tensor | None, pixel_values: Tensor | None, num_tiles: Tensor | list[int] | None
) -> dict[str, int]:
    """What all ranks must be given alike, for images that are whole on each."""
    return {
        "input_ids": int(input_ids is not None),
        "tiles": -1 if pixel_values is None else len(pixel_values),
        "pixels": -1 if pixel_values is None else pixel_values.numel(),
        "num_tiles": -1 if num_tiles is None else len(num_tiles),
    }


def number_images(context: ContextParallel, places: Tensor) -> tuple[Tensor, int]:
    """Which of all images' vectors stand in this rank's places.

    Args:
        places: `[b, s]`, True where this rank's two slices have an image token.

    Returns:
        numbers `[own]`, counted through the whole rows one after the other; and how many places all ranks have.
    """
    slices = places.chunk(2, dim=1)
    pairs = collect(torch.stack([part.sum(1) for part in slices]), context.group)  # [n, 2, b]
    counts = torch.stack(in_order([pair.unbind(0) for pair in pairs.unbind(0)]), dim=1)  # [b, 2 n]
    before = counts.flatten().cumsum(0).view_as(counts) - counts
    here = zip(numbers(context.size, context.rank), slices, strict=True)
    found = torch.cat([before[:, number, None] + part.cumsum(1) - 1 for number, part in here], dim=1)  # [b, s]
    return found[places], int(counts.sum())


def targets_of_words(
    context: ContextParallel, images: Tensor, labels: Tensor, call: dict[str, Any]
) -> tuple[Tensor | float, dict[str, Any]]:
    """As `context.targets`, less those that are image tokens or follow one; `images` `[b, s]` says where they are."""
    shifted = call.get("shift_labels")
    shifted = context.following(labels, IGNORED) if shifted is None else shifted
    following = context.following(images.to(labels.dtype), 0).bool()
    return context.targets(labels, {**call, "shift_labels": shifted.masked_fill(images | following, IGNORED)})


def reasons_of_encoder(encoder: Any) -> Iterator[str]:
    """What in an encoder depends on chance, so that ranks would encode images otherwise than one process."""
    if not encoder.training:
        return
    config = encoder.config
    for name in ("attention_dropout", "hidden_dropout"):
        if getattr(config, name):
            yield f"{name} of vision_config is {getattr(config, name)}: ranks would drop differently; set it to 0"
    size = config.img_h // config.patch_dim, config.img_w // config.patch_dim
    if getattr(encoder, "crops", False) and encoder.table != size:
        yield (
            "vision_config's positions in training are random parts of their table, which ranks would draw "
            "differently; set force_cpe_eval_mode to true"
        )
