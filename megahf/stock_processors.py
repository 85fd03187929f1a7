"""The processor of a LLaVA that was lowered to an architecture of transformers' own, where its class does the same.

Llava's does for images that are not cut into tiles, given settings that it does not have by itself: CLIP's would cut a
square out of the middle. InternVL's always puts tags around an image, and cuts it by rules of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cuts import Config
from .jsonfile import as_json
from .llava import IMAGE_TOKEN
from .models.vision_kinds import STATISTICS
from .processors import added_tokens, processor_files
from .rows import is_llava
from .saved_tokenizer import ids_with

BICUBIC = 3  # of Pillow's filters
LLAVA = "llava"


def stock_processor(
    config: Config, args: Mapping[str, Any], theirs: Mapping[str, Any], tokenizer: Path | None
) -> tuple[dict[str, bytes], list[str]]:
    """The files of the processor and of its tokenizer, and what is worth saying; none for a model of text.

    Args:
        args: Megatron's arguments; empty where the source is no Megatron checkpoint.
        theirs: the config.json of the lowered model.
        tokenizer: the folder of its tokenizer.
    """
    if not is_llava(config) or tokenizer is None:
        return {}, []
    if reasons := unlike(config, args, theirs, tokenizer):
        return {}, [f"the model alone is lowered, and no processor: {'; '.join(reasons)}"]
    files = processor_files(config, args, tokenizer) if args else {}  # else its tokenizer is that of such a model
    return files | {"processor_config.json": as_json(llava_json(config, theirs))}, [
        "its processor resizes with Pillow as Megatron does where torchvision is not installed, or with "
        "AutoProcessor.from_pretrained(.., backend='pil')"
    ]


def unlike(config: Config, args: Mapping[str, Any], theirs: Mapping[str, Any], tokenizer: Path) -> list[str]:
    """Why transformers' processor would not do what Megatron does."""
    token, found = config.image_token_id, ids_with(tokenizer, added_tokens(args)).get(IMAGE_TOKEN)
    reasons = {
        f"{theirs['model_type']}'s own puts tags around images and cuts them in another way": (
            theirs["model_type"] != LLAVA
        ),
        f"{IMAGE_TOKEN} is token {found} of the tokenizer and {token} of the model": found != token,
        f"images are cut into up to {config.max_num_tiles} tiles, which {LLAVA}'s does not do": config.use_tiling,
        f"Megatron puts tags around images, image_tag_type {args.get('image_tag_type')}": bool(
            args.get("image_tag_type")
        ),
    }
    return [reason for reason, holds in reasons.items() if holds]


def llava_json(config: Config, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """`processor_config.json` of a LlavaProcessor that resizes and normalises, and cuts nothing off."""
    vision = config.vision_config
    mean, std = STATISTICS[vision.vision_model_type]
    size = {"height": vision.img_h, "width": vision.img_w}
    image = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return {
        "processor_class": "LlavaProcessor",
        "image_processor": image,
        "image_token": IMAGE_TOKEN,
        "patch_size": vision.patch_dim,
        "num_additional_image_tokens": vision.class_token_len,
        "vision_feature_select_strategy": theirs["vision_feature_select_strategy"],
    }
