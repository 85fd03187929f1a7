"""A folder of a LLaVA speaks and sees as Megatron's run did: its prompts, its special tokens, its images."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pictures import picture, tokenizer
from transformers import AutoProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 has it hidden without torchvision

from megahf.errors import Refused
from megahf.folder import MODELS, code
from megahf.processors import CODE, TEMPLATES, processor_files, with_tokens
from megahf.saved_tokenizer import ids_with

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]},
    {"role": "assistant", "content": "this"},
]
# What Megatron's templates (multimodal_tokenizer.py) make of the conversation above, with <s> and </s>.
SAID = {
    "mistral": "<s>[INST] <image>\nwhat is this ?[/INST] this</s> ",
    "llama3p1": "<s><|start_header_id|>system<|end_header_id|>\n\nbe brief<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat is this ?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nthis<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2p5": "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n<image>\nwhat is this ?<|im_end|>\n"
    "<|im_start|>assistant\nthis<|im_end|>\n<|im_start|>assistant\n",
    "nemotron5": "<s><SPECIAL_14>system\nbe brief<SPECIAL_15>\n<SPECIAL_14>user\n<image>\nwhat is this ?<SPECIAL_15>\n"
    "<SPECIAL_14>assistant\nthis<SPECIAL_15>\n<SPECIAL_14>assistant\n",
    "nemotron5-aligned": "<s>System\nbe brief\n[PREFIX]User\n<image>\nwhat is this ?\n[PREFIX]Assistant\nthis\n[PREFIX]"
    "Assistant\n",
}
SAID |= {"llama3p2": SAID["llama3p1"], "qwen2p0": SAID["qwen2p5"], "nvlm-yi-34b": "<s>" + SAID["qwen2p5"]}


def config(**fields: Any) -> SimpleNamespace:
    vision = SimpleNamespace(vision_model_type="internvit300M", img_h=28, img_w=28, patch_dim=7, class_token_len=1)
    tiles = {"use_tiling": True, "max_num_tiles": 4, "use_thumbnail": True, "tile_tags": None}
    return SimpleNamespace(
        **{"vision_config": vision, "drop_vision_class_token": True, "pixel_shuffle": True, **tiles, **fields}
    )


def folder(where: Path, args: dict[str, Any], with_tokenizer: bool = True) -> Path:
    """What a conversion leaves of a processor in a folder whose tokenizer knows neither images nor people."""
    tokens = where / "tokenizer"
    made = tokenizer()
    made.bos_token, made.eos_token = "<s>", "</s>"
    made.save_pretrained(tokens)
    target = where / "folder"
    target.mkdir()
    files = {path.name: path.read_bytes() for path in tokens.iterdir()} if with_tokenizer else {}
    files |= processor_files(config(), args, tokens if with_tokenizer else None)
    files |= {path.name: path.read_bytes() for module in CODE for path in code(module)}
    for name, content in files.items():
        (target / name).write_bytes(content)
    (target / "config.json").write_text(json.dumps({"model_type": "mcore_llava"}))
    return target


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_conversation_is_laid_out_as_megatrons(form: str, tmp_path: Path) -> None:
    where = folder(tmp_path, {"vision_model_type": "clip", "tokenizer_prompt_format": form})
    processor = AutoProcessor.from_pretrained(where, trust_remote_code=True)
    assert processor.apply_chat_template(TALK, add_generation_prompt=True) == SAID[form]


def test_a_format_that_megatron_leaves_to_the_tokenizer_is_the_tokenizers_own(tmp_path: Path) -> None:
    own = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + ';' }}{% endfor %}"
    made = tokenizer()
    made.chat_template = own
    made.save_pretrained(tmp_path)
    files = processor_files(config(), {"tokenizer_prompt_format": "chatml"}, tmp_path)
    assert files["chat_template.jinja"].decode().endswith(own)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    again = processor_files(config(), {}, tmp_path)  # which takes images already
    assert again["chat_template.jinja"] == files["chat_template.jinja"]


def test_images_take_their_places_and_their_tags(tmp_path: Path) -> None:
    args = {
        "vision_model_type": "clip",
        "image_tag_type": "internvl",
        "special_tokens": ["<image>", "<img>", "</img>", "<box>"],
    }
    processor = AutoProcessor.from_pretrained(folder(tmp_path, args), trust_remote_code=True)
    got = processor(images=picture(56, 28), text="what <image> is", return_tensors="pt")
    words = processor.tokenizer.convert_ids_to_tokens(got["input_ids"][0])
    assert words == ["what", "<img>", *["<image>"] * (3 * 4), "</img>", "is"]  # two tiles, a thumbnail; 4 x 4 / 4
    assert got["pixel_values"].shape == (3, 3, 28, 28)
    assert "<box>" in processor.tokenizer.get_vocab()


def test_special_tokens_get_the_numbers_that_add_tokens_gives(tmp_path: Path) -> None:
    made = tokenizer()
    made.save_pretrained(tmp_path)
    tokens = ["<box>", "<image>", "<quad>"]
    made.add_tokens(tokens, special_tokens=True)
    assert ids_with(tmp_path, tokens) == made.get_vocab()
    (tmp_path / "tokenizer.json").write_bytes(with_tokens(tmp_path, tokens)["tokenizer.json"])
    assert with_tokens(tmp_path, tokens) == {}


def test_without_a_tokenizer_there_is_the_image_processor_alone(tmp_path: Path) -> None:
    where = folder(tmp_path, {}, with_tokenizer=False)
    made = AutoImageProcessor.from_pretrained(where, trust_remote_code=True)
    assert made(picture(56, 56))["num_tiles"] == [5]


def test_what_it_writes_is_what_save_pretrained_writes(tmp_path: Path) -> None:
    where = folder(tmp_path, {"image_tag_type": "nvlm", "tokenizer_prompt_format": "mistral"})
    AutoProcessor.from_pretrained(where, trust_remote_code=True).save_pretrained(tmp_path / "again")
    ours, theirs = (json.loads((at / "processor_config.json").read_text()) for at in (where, tmp_path / "again"))
    assert theirs["image_processor"].pop("auto_map").items() >= ours["image_processor"].pop("auto_map").items()
    assert ours == theirs
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {
        path.name for path in where.glob("*.py") if path.stem in (*CODE, "vision_kinds")
    }
    assert (MODELS / "vision_kinds.py").read_bytes() == (tmp_path / "again" / "vision_kinds.py").read_bytes()


def test_several_templates_are_refused(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    settings = {"chat_template": [{"name": "default", "template": "a"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(Refused, match="several chat templates"):
        processor_files(config(), {}, tmp_path)
