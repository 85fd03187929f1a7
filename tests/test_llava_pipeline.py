"""Promise: a saved LLaVA says what it sees, from its folder and transformers alone, in the lines that README shows.

The model has learned a few coloured shapes, so that what it says shows whether pixels, places, padding and prompts are
right: `seeing.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import stranger
from PIL import Image
from seeing import SPECIAL, THINGS, chat, drawn, said, teach, tokenizer
from test_llava_convert import change, says, share, written
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig

import megahf
from megahf import convert

ROOT = Path(__file__).parents[1]
WORDS_AND_TOKENS = len(tokenizer())
RED, GREEN, BLUE = ("red", "square"), ("green", "cross"), ("blue", "circle")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model's, `OUT`, and an image of each thing."""
    path = tmp_path_factory.mktemp("place")
    teach(path / "OUT")
    for colour, shape in THINGS:
        drawn((colour, shape)).save(path / f"{colour} {shape}.png")
    drawn(GREEN).save(path / "cat.png")
    return path


def file(thing: tuple[str, str]) -> str:
    return f"{' '.join(thing)}.png"


def lines(script: str, *words: object, place: Path) -> list[str]:
    """What a script prints where megahf is not installed."""
    done = stranger.run(script, *words, folder=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_lines_of_the_readme_describe_an_image(place: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if "AutoModelForImageTextToText" in block)
    assert lines(block, place=place) == [f"user What is this ? assistant {said(GREEN)}"]


PIPELINE = """
import json, sys, torch
from transformers import pipeline
see = pipeline("image-text-to-text", "OUT", dtype=getattr(torch, sys.argv[1]), trust_remote_code=True)
for asked in map(json.loads, sys.argv[2:]):
    options = {"batch_size": 2, "processor_kwargs": {"padding": True}} if isinstance(asked[0], list) else {}
    answers = see(text=asked, max_new_tokens=20, return_full_text=False, **options)
    for answer in answers if options else [answers]:
        print(answer[0]["generated_text"].strip())
"""


def test_a_pipeline_answers_about_one_image_and_about_several(place: Path) -> None:
    asked = [[thing] for thing in THINGS] + [[RED, BLUE], [BLUE, GREEN]]
    chats = [json.dumps(chat(*map(file, things))) for things in asked]
    assert lines(PIPELINE, "float32", *chats, place=place) == [said(*things) for things in asked]


def test_chats_of_unequal_numbers_of_images_are_answered_together_in_bfloat16(place: Path) -> None:
    asked = [[RED], [GREEN, BLUE], [BLUE, RED], [GREEN]]
    batch = json.dumps([chat(*map(file, things)) for things in asked])
    assert lines(PIPELINE, "bfloat16", batch, place=place) == [said(*things) for things in asked]


BY_HAND = """
import json, sys, threading, torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer
model = AutoModelForImageTextToText.from_pretrained("OUT", trust_remote_code=True, dtype=torch.bfloat16)
processor = AutoProcessor.from_pretrained("OUT", trust_remote_code=True)
form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
single, *batch = map(json.loads, sys.argv[1:])
inputs = processor.apply_chat_template(batch, processor_kwargs={"padding": True}, **form)
static = {"cache_implementation": "static", "disable_compile": True}
for options in ({}, {"num_beams": 2}, {"use_cache": False}, static):
    ids = model.generate(**inputs, max_new_tokens=20, **options)
    print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
stream = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
given = {**processor.apply_chat_template(single, **form), "streamer": stream, "max_new_tokens": 20}
threading.Thread(target=model.generate, kwargs=given).start()
print([piece for piece in stream if piece])
"""


def test_a_padded_batch_generates_the_same_with_any_cache_and_word_by_word(place: Path) -> None:
    asked = [[GREEN], [RED, BLUE], [BLUE]]
    chats = [json.dumps(chat(*map(file, things))) for things in asked]
    *ways, streamed = lines(BY_HAND, chats[0], *chats[1:], place=place)
    assert ways == [str([said(*things) for things in asked[1:]])] * 4
    assert streamed == str(["a ", "green ", "cross"])


TURNS = """
import json, sys
from transformers import pipeline
see = pipeline("image-text-to-text", "OUT", trust_remote_code=True)
answer = see(json.loads(sys.argv[1]), max_new_tokens=20)[0]["generated_text"]
print([(turn["role"], turn["content"]) for turn in answer[1:]])
print(see(images=sys.argv[2], text=sys.argv[3], max_new_tokens=20, return_full_text=False)[0]["generated_text"])
"""


def test_an_answer_is_a_turn_of_the_chat_and_text_with_an_image_token_will_do(place: Path) -> None:
    prompt = "<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n<|im_start|>assistant\n"
    turn, answer = lines(TURNS, json.dumps(chat(file(BLUE))), file(RED), prompt, place=place)
    assert turn == str([("assistant", f" {said(BLUE)}")])
    assert answer.strip() == said(RED)


ASK = """
asked = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "What is this?"}]
form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": asked}], **form)
print(processor.decode(model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1]:]))
print(len(processor.tokenizer), model.config.text_config.vocab_size, len(model.get_input_embeddings().weight))
print(processor.image_token_id, model.config.image_token_id)
model.save_pretrained("saved")
processor.save_pretrained("saved")
"""


def test_a_checkpoint_and_the_tokenizer_of_its_words_become_a_folder_that_answers(place: Path) -> None:
    convert(place / "OUT", place / "run", to="megatron", format="torch", tp=2)
    change(place / "run", says(tokenizer_prompt_format="qwen2p0", special_tokens=SPECIAL))
    tokenizer(SPECIAL[:2]).save_pretrained(place / "words")
    convert(place / "run", place / "converted", tokenizer=place / "words")
    (code,) = re.findall(r"^```python\n(from.*?)^```$", (place / "converted" / "README.md").read_text(), re.M | re.S)
    answer, vocabulary, image = lines(code.replace("ORG/NAME", "converted") + ASK, place=place)
    assert answer == f"{said(GREEN)} <|im_end|>"
    assert vocabulary == f"{WORDS_AND_TOKENS} {WORDS_AND_TOKENS} {WORDS_AND_TOKENS}"  # of 256 rows on two ranks
    assert image == f"{WORDS_AND_TOKENS - 1} {WORDS_AND_TOKENS - 1}"
    for name in ("generation_config.json", "chat_template.jinja", "model.safetensors"):
        assert (place / "converted" / name).read_bytes() == (place / "saved" / name).read_bytes(), name
    ours, theirs = (json.loads((place / at / "config.json").read_text()) for at in ("converted", "saved"))
    defaults = json.loads(PreTrainedConfig(dtype="float32").to_json_string(use_diff=False))  # written for parts alone
    for part in ("text_config", "vision_config"):
        assert {**defaults, **ours.pop(part)} == {**defaults, **theirs.pop(part)}
    assert ours == theirs


def test_tiles_and_their_tags_are_the_models_own(tmp_path: Path) -> None:
    tags = ["<tile_1>", "<tile_2>", "<tile_global_thumbnail>"]
    told = {"use_tile_tags": True, "use_tiling": True, "use_thumbnail": True, "max_num_tiles": 2}
    told |= {"tokenizer_prompt_format": "qwen2p5", "image_tag_type": "nvlm"}
    written(tmp_path / "ckpt", share, **told, special_tokens=["<image>", "<Image>", "</Image>", *tags])
    tokenizer().save_pretrained(tmp_path / "words")
    convert(tmp_path / "ckpt", tmp_path / "hf", tokenizer=tmp_path / "words")
    megahf.register()
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert model.config.tile_tags == [[processor.tokenizer.convert_tokens_to_ids(tag)] for tag in tags]
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.img_seq_len == processor.image_seq_length
    images = [Image.new("RGB", (40, 20)), Image.new("RGB", (20, 20))]
    inputs = processor(images=images, text="<image> and <image>", return_tensors="pt")
    assert inputs["num_tiles"].tolist() == [3, 1]
    assert model(**inputs).logits.isfinite().all()


WITHOUT_PILLOW = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "PIL":
            raise ModuleNotFoundError("No module named 'PIL'", name="PIL")
sys.meta_path.insert(0, Hidden())
sys.path.insert(0, sys.argv[1])
import importlib, pkgutil, transformers, megahf, megahf.models
for module in pkgutil.iter_modules(megahf.models.__path__):
    if not module.name.startswith("triton"):
        importlib.import_module(f"megahf.models.{module.name}")
print(type(transformers.AutoModelForImageTextToText.from_pretrained("OUT")).__name__)
for make in (megahf.McoreLlavaImageProcessor, lambda: transformers.AutoProcessor.from_pretrained("OUT")):
    try:
        make()
    except ImportError as error:
        print(" ".join(str(error).split()))
"""


def test_without_pillow_all_but_images_works(place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_PILLOW, ROOT], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model, *errors = done.stdout.splitlines()
    assert model == "McoreLlavaForConditionalGeneration" and len(errors) == 2
    for error in errors:
        assert error.startswith("McoreLlavaImageProcessor requires the PIL library") and "pip install pillow" in error
