"""What a folder of a LLaVA has beside its tokenizer: how images and conversations become its inputs.

Follows examples/multimodal of Megatron-LM (image_processing.py, multimodal_args.py) and its multimodal tokenizer
(megatron/core/tokenizers/vision/libraries/multimodal_tokenizer.py), whose formats of prompts are rows here. Written
without transformers, and what `save_pretrained` of the processor would write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .cuts import Config
from .errors import refuse
from .jsonfile import as_json, read_json
from .llava import IMAGE_TOKEN
from .models.vision_kinds import STATISTICS, places_of_a_tile
from .saved_tokenizer import ids_with, token_ids

CODE = "image_processing_mcore_llava", "processing_mcore_llava"
CLASSES = {
    "AutoImageProcessor": "image_processing_mcore_llava.McoreLlavaImageProcessor",
    "AutoProcessor": "processing_mcore_llava.McoreLlavaProcessor",
}
IMAGE_TAGS = {"nvlm": ["<Image>", "</Image>"], "internvl": ["<img>", "</img>"], "": None}

# A conversation whose turns hold images, as the text templates below and those of text models take it.
PRELUDE = """\
{%- set flat = namespace(messages=[]) %}
{%- for message in messages %}
    {%- if message['content'] is string %}
        {%- set flat.messages = flat.messages + [message] %}
    {%- else %}
        {%- set turn = namespace(text='') %}
        {%- for part in message['content'] %}
            {%- set turn.text = turn.text + ('<image>\\n' if part['type'] == 'image' else part['text']) %}
        {%- endfor %}
        {%- set flat.messages = flat.messages + [dict(message, content=turn.text)] %}
    {%- endif %}
{%- endfor %}
{%- set messages = flat.messages %}
"""
TURNS = "{%% for message in messages %%}{{ %s }}{%% endfor %%}{%% if add_generation_prompt %%}{{ %s }}{%% endif %%}"
CHATML = TURNS % (
    "'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'",
    "'<|im_start|>assistant\\n'",
)
HEADERS = "{{ bos_token }}" + TURNS % (
    "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>'",
    "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
)
INSTRUCTIONS = (  # which has no system messages
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ' }}{% endif %}"
)
# `--tokenizer-prompt-format` -> the template; of others Megatron takes the tokenizer's own.
TEMPLATES = {
    "mistral": INSTRUCTIONS,
    "llama3p1": HEADERS,
    "llama3p2": HEADERS,
    "nvlm-yi-34b": "{{ bos_token }}" + CHATML,
    "qwen2p0": CHATML,
    "qwen2p5": CHATML,
    "nemotron5": "{{ bos_token }}"
    + TURNS
    % (
        "'<SPECIAL_14>' + message['role'] + '\\n' + message['content'] + '<SPECIAL_15>\\n'",
        "'<SPECIAL_14>assistant\\n'",
    ),
    "nemotron5-aligned": "{{ bos_token }}"
    + TURNS % ("message['role'] | capitalize + '\\n' + message['content'] + '\\n[PREFIX]'", "'Assistant\\n'"),
}


def processor_files(config: Config, args: Mapping[str, Any], tokenizer: Path | None) -> dict[str, bytes]:
    """`processor_config.json`, and with a tokenizer its files with Megatron's special tokens and the chat template.

    Args:
        args: Megatron's arguments; empty where the source is no Megatron checkpoint.
        tokenizer: the folder of the language model's tokenizer; without one there is only the image processor.
    """
    files = {"processor_config.json": as_json(processor_json(config, args, with_tokens=tokenizer is not None))}
    if tokenizer is None:
        return files
    files |= with_tokens(tokenizer, added_tokens(args))
    template = TEMPLATES.get(str(args.get("tokenizer_prompt_format"))) or own_template(tokenizer)
    if template is not None:
        files["chat_template.jinja"] = (template if knows_images(template) else PRELUDE + template).encode()
    return files


def processor_json(config: Config, args: Mapping[str, Any], with_tokens: bool) -> dict[str, Any]:
    """The settings of the processor, or of the image processor alone."""
    vision = config.vision_config
    mean, std = STATISTICS[vision.vision_model_type]
    image = {
        "auto_map": {"AutoImageProcessor": CLASSES["AutoImageProcessor"]},
        "image_processor_type": CLASSES["AutoImageProcessor"].partition(".")[2],
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "resample": 3,  # Image.BICUBIC
        "rescale_factor": 1 / 255,
        "size": {"height": vision.img_h, "width": vision.img_w},
        "image_mean": list(mean),
        "image_std": list(std),
        "use_tiling": config.use_tiling,
        "max_num_tiles": config.max_num_tiles,
        "use_thumbnail": config.use_thumbnail,
        "use_area_weighted_aspect_ratio": bool(args.get("use_area_weighted_aspect_ratio")),
    }
    if not with_tokens:
        return {"image_processor": image}
    return {
        "auto_map": {"AutoProcessor": CLASSES["AutoProcessor"]},
        "processor_class": CLASSES["AutoProcessor"].partition(".")[2],
        "image_processor": image,
        "image_seq_length": places_of_a_tile(config),
        "image_token": IMAGE_TOKEN,
        "image_tags": IMAGE_TAGS.get(args.get("image_tag_type") or ""),
        "use_tile_tags": config.tile_tags is not None,
    }


def added_tokens(args: Mapping[str, Any]) -> list[str]:
    """Tokens that Megatron adds to a LLaVA's tokenizer; none for other models."""
    return list(args.get("special_tokens") or [IMAGE_TOKEN]) if args.get("vision_model_type") else []


def with_tokens(tokenizer: Path, tokens: Sequence[str]) -> dict[str, bytes]:
    """`tokenizer.json` with `tokens` as `add_tokens(.., special_tokens=True)` adds them; no file if all are there."""
    there, ids = token_ids(tokenizer), ids_with(tokenizer, tokens)
    missing = [token for token in tokens if token not in there]
    if not missing:
        return {}
    saved = read_json(tokenizer / "tokenizer.json")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    saved["added_tokens"] = [
        *(saved.get("added_tokens") or ()),
        *({"id": ids[token], "content": token, **plain} for token in missing),
    ]
    return {"tokenizer.json": (json.dumps(saved, indent=2, ensure_ascii=False) + "\n").encode()}


def knows_images(template: str) -> bool:
    """Whether a chat template looks at the parts of a turn by itself; `PRELUDE` does."""
    return "'image'" in template or '"image"' in template


def own_template(tokenizer: Path) -> str | None:
    """The chat template that the tokenizer comes with."""
    if (tokenizer / "chat_template.jinja").exists():
        return (tokenizer / "chat_template.jinja").read_text()
    path = tokenizer / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    if template is not None and not isinstance(template, str):
        raise refuse("the tokenizer has several chat templates", path, "leave one of them, as a text")
    return template
