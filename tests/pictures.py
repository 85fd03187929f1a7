"""Images and a tokenizer of a few words, for tests of models that see."""

from __future__ import annotations

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def picture(width: int = 50, height: int = 40, mode: str = "RGB") -> Image.Image:
    """An image in which no two neighbours are alike."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<pad>", "what", "is", "this", "?", "and", "user"]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", padding_side="left")
    made.add_tokens(["<image>", "<img>", "</img>"], special_tokens=True)
    return made
