"""A LLaVA that has learned in a few seconds to say what it sees: coloured shapes, one or several, in a chat."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tiny import LLAMA, SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megahf.models.configuration_mcore_llava import McoreLlavaConfig, McoreVisionConfig
from megahf.models.image_processing_mcore_llava import McoreLlavaImageProcessor
from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration
from megahf.models.processing_mcore_llava import McoreLlavaProcessor
from megahf.processors import CHATML, PRELUDE

COLOURS, SHAPES = ("red", "green", "blue"), ("square", "circle", "cross")
THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
Thing = tuple[str, str]
SIDE, STEPS = 16, 300
SPECIAL = ["<|im_start|>", "<|im_end|>", "<image>"]
WORDS = ["<unk>", "<pad>", "user", "assistant", "What", "is", "this", "are", "these", "?", "a", "and"]


def drawn(thing: Thing, left: int = 10, top: int = 10) -> Image.Image:
    """A shape of 20 pixels on a white sheet of 40."""
    (colour, shape), sheet = thing, Image.new("RGB", (40, 40), "white")
    draw, right, bottom = ImageDraw.Draw(sheet), left + 20, top + 20
    if shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    elif shape == "circle":
        draw.ellipse((left, top, right, bottom), outline=colour, width=5)
    else:
        draw.line((left, top, right, bottom), fill=colour, width=5)
        draw.line((left, bottom, right, top), fill=colour, width=5)
    return sheet


def said(*things: Thing) -> str:
    return " and ".join(f"a {colour} {shape}" for colour, shape in things)


def chat(*images: object) -> list[dict[str, object]]:
    """The question about images: of Pillow's, paths, or nothing yet."""
    parts: list[dict[str, object]] = []
    for image in images:
        key = "path" if isinstance(image, (str, Path)) else "image"
        parts.append({"type": "image"} if image is None else {"type": "image", key: image})
    words = "What is this?" if len(images) == 1 else "What are these?"
    return [{"role": "user", "content": [*parts, {"type": "text", "text": words}]}]


def tokenizer(special: list[str] = SPECIAL) -> PreTrainedTokenizerFast:
    """A token a word."""
    vocabulary = dict.fromkeys([*WORDS, *COLOURS, *SHAPES])
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", padding_side="left")
    made.add_tokens(special, special_tokens=True)
    made.eos_token = "<|im_end|>"
    return made


def untaught() -> tuple[McoreLlavaForConditionalGeneration, McoreLlavaProcessor]:
    """CLIP of one layer before a Llama of two, with weights large enough to tell images apart at once."""
    words = tokenizer()
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2, "kv_channels": 64, "num_layers": 1}
    image = {"img_h": SIDE, "img_w": SIDE, "patch_dim": 4}
    vision = McoreVisionConfig(vision_model_type="clip", **sizes, **image)
    text = {**SIZES, **LLAMA, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "init_method_std": 0.1}
    text |= {"vocab_size": len(words), "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = McoreLlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        projection_ffn_hidden_size=32,
        drop_vision_class_token=True,
    )
    torch.manual_seed(0)
    images = McoreLlavaImageProcessor(size={"height": SIDE, "width": SIDE})
    seen = {"image_seq_length": config.img_seq_len, "chat_template": PRELUDE + CHATML}
    model = McoreLlavaForConditionalGeneration(config)
    for weight in model.model.vision_model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.1)
    return model, McoreLlavaProcessor(images, words, **seen)


def teach(folder: Path) -> Path:
    """Saves a model that answers for one image or two, and its processor, in `folder`."""
    model, processor = untaught()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    chance = random.Random(0)
    for step in range(STEPS):
        count = 1 if step % 3 == 0 else 2
        rows = [[chance.choice(THINGS) for _ in range(count)] for _ in range(9)]
        asked = processor.apply_chat_template(chat(*[None] * count), add_generation_prompt=True)
        images = [[drawn(thing, chance.randint(8, 12), chance.randint(8, 12)) for thing in row] for row in rows]
        texts = [f"{asked}{said(*row)}<|im_end|>" for row in rows]
        inputs = processor(images=images, text=texts, return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, : -4 * count] = -100  # all but the answer: three words for each thing, `and` or the end
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
