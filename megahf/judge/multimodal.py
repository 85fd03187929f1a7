"""What no argument of Megatron's examples/multimodal says, and the judge has to be told.

That script takes the widths of its parts from tables by their types (`config.py`), where small models have no row.
`SIZES` stand for those beside the arguments, in memory alone; no file gets them.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megahf.llava_arguments import ARGUMENTS, OF_0_16, PROJECTION

SIZES = (
    "vision_num_layers",
    "vision_hidden_size",
    "vision_ffn_hidden_size",
    "vision_kv_channels",
    "vision_heads",  # of an image encoder, without those that only pad
    "language_ffn_hidden_size",
    "projection_ffn_hidden_size",
    "image_token_id",
    "tile_tags",  # a list of tokens for each place a tile can have, the last the thumbnail's; or None
)


def defaults() -> dict[str, Any]:
    """What a run of 0.16.1's script has beside every run's."""
    return {name: ARGUMENTS[name] for name in OF_0_16.split()}


def is_llava(args: Namespace) -> bool:
    return getattr(args, "language_model_type", None) is not None


def as_stored(args: Namespace) -> Namespace:
    """What a real run stores: without the sizes that its script knows by heart."""
    unsaid = {*SIZES, *([PROJECTION] if getattr(args, PROJECTION, None) is None else [])}
    return Namespace(**{name: value for name, value in vars(args).items() if name not in unsaid})


def sizes(config: Any) -> dict[str, Any]:
    """`SIZES` of a LLaVA's config."""
    vision, text = config.vision_config, config.text_config
    return {
        "vision_num_layers": vision.num_layers,
        "vision_hidden_size": vision.hidden_size,
        "vision_ffn_hidden_size": vision.ffn_hidden_size,
        "vision_kv_channels": vision.kv_channels,
        "vision_heads": vision.num_attention_heads,
        "language_ffn_hidden_size": text.ffn_hidden_size,
        "projection_ffn_hidden_size": config.projection_ffn_hidden_size,
        "image_token_id": config.image_token_id,
        "tile_tags": config.tile_tags,
    }
