"""What only a tokenizer tells of a LLaVA: the id of its image token, and the tokens that stand in front of tiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import refuse
from .llava import IMAGE_TOKEN
from .processors import added_tokens, with_tokens
from .saved_tokenizer import ids_with

MOST = 12  # tiles that Megatron has tags for


def tell(config: Any, args: Mapping[str, Any], folder: Path) -> None:
    """Settles in a LLaVA's `config` what the tokenizer saved in `folder` says.

    Raises:
        Refused: there is no image token, or tags would be of several lengths.
    """
    ids = ids_with(folder, added_tokens(args))
    if IMAGE_TOKEN not in ids:
        given = " ".join(added_tokens(args))
        remedy = f"save it again after tokenizer.add_tokens(['{IMAGE_TOKEN}'], special_tokens=True)"
        raise refuse(f"neither the tokenizer nor --special-tokens {given} has {IMAGE_TOKEN}", folder, remedy)
    config.image_token_id = ids[IMAGE_TOKEN]
    if args.get("use_tile_tags"):
        texts = tags(config.max_num_tiles, str(args.get("tokenizer_prompt_format") or ""))
        config.tile_tags = tokens(texts, folder, added_tokens(args))
        if len(lengths := {len(tag) for tag in config.tile_tags}) != 1:
            raise refuse(f"the tags of tiles are {sorted(lengths)} tokens long, not all alike", folder,
                         "is it the tokenizer that the model was trained with?")  # fmt: skip


def tags(tiles: int, prompt_format: str) -> list[str]:
    """The text in front of each tile, the thumbnail's last (`_get_tile_tags` of examples/multimodal/model.py)."""
    if tiles > MOST:
        raise refuse(f"max_num_tiles is {tiles}: Megatron has tags for at most {MOST}", "args")
    few, nemotron = tiles < 10, prompt_format.startswith("nemotron")
    digits = 1 if few and not nemotron else 2
    whole = "tile_global" if prompt_format == "nvlm-yi-34b" else "tile_global_thumbnail"
    zero = "" if few or nemotron or prompt_format == "llama3p1" else "0"
    return [*(f"<tile_{tile:0{digits}d}>" for tile in range(1, tiles + 1)), f"<{whole}{zero}>"]


def tokens(texts: list[str], folder: Path, added: list[str]) -> list[list[int]]:
    """Each text as tokens, once those `added` are, without what a tokenizer puts in front of a whole text."""
    from tokenizers import Tokenizer

    name = "tokenizer.json"
    tokenizer = Tokenizer.from_buffer(with_tokens(folder, added).get(name) or (folder / name).read_bytes())
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
