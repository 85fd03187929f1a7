"""Promise: `pipeline("text-generation")` speaks from a saved folder, in plain text and in a chat.

The model is taught two lines by heart, so that what it says shows whether tokens, templates and padding were right.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import stranger
import torch
from tiny import LLAMA, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, pipeline

import megahf

megahf.register()

LINE = "the ship sails at dawn and the crew is still asleep"
CHAT = "<user> who sails at dawn ?<assistant> the ship<eos>"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with the space before it as byte-level tokenizers write it."""
    special = ["<pad>", "<eos>", "<user>", "<assistant>", "<unk>"]
    words = dict.fromkeys([*special, "the", *(f"Ġ{word}" for word in f"{LINE} who ?".split())])
    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
        chat_template=TEMPLATE,
        padding_side="left",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model that knows both lines, with its tokenizer."""
    words, path = tokenizer(), tmp_path_factory.mktemp("model")
    model = tiny(**LLAMA, vocab_size=len(words), eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(40):
        for line in (LINE + "<eos>", CHAT):
            ids = words(line, return_tensors="pt").input_ids
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(path)
    words.save_pretrained(path)
    return path


def test_it_goes_on_with_a_text(folder: Path) -> None:
    speak = pipeline("text-generation", model=str(folder))
    assert type(speak.model).__name__ == "McoreGPTForCausalLM"
    said = speak("the ship sails", max_new_tokens=20, do_sample=False, return_full_text=False)
    assert said == [{"generated_text": " at dawn and the crew is still asleep"}]


def test_a_batch_of_unequal_prompts_is_padded_and_says_what_each_says_alone(folder: Path) -> None:
    speak = pipeline("text-generation", model=str(folder))
    prompts = ["the ship", "the ship sails at dawn and the crew", "the ship sails at"]
    batch = speak(prompts, batch_size=3, max_new_tokens=20, do_sample=False)
    assert [row[0]["generated_text"] for row in batch] == [LINE] * 3


def test_it_answers_in_a_chat(folder: Path) -> None:
    speak = pipeline("text-generation", model=str(folder))
    asked = [{"role": "user", "content": "who sails at dawn ?"}]
    said = speak(asked, max_new_tokens=20, do_sample=False)[0]["generated_text"]
    assert said[:-1] == asked
    assert said[-1]["role"] == "assistant"
    assert said[-1]["content"] == " the ship"


def test_the_chat_template_is_that_of_the_folder(folder: Path) -> None:
    words = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "who sails at dawn ?"}, {"role": "assistant", "content": "the ship"}]
    assert words.apply_chat_template(messages, tokenize=False) == CHAT


def test_bfloat16_and_a_static_cache_say_the_same(folder: Path) -> None:
    speak = pipeline("text-generation", model=str(folder), dtype=torch.bfloat16)
    options = {"cache_implementation": "static", "disable_compile": True}
    said = speak("the ship sails", max_new_tokens=20, do_sample=False, **options)
    assert said[0]["generated_text"] == LINE


WITHOUT_MEGAHF = """
import sys
from transformers import pipeline
speak = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(speak("the ship sails", max_new_tokens=20, do_sample=False)[0]["generated_text"])
"""


def test_it_needs_no_megahf(folder: Path, tmp_path: Path) -> None:
    done = stranger.run(WITHOUT_MEGAHF, folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == LINE
