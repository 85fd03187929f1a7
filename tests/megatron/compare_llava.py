"""Whether megahf reads a LLaVA right: every weight to the bit, and the logits at every place of text and images.

As `compare.py`, part by part: the language model's names are a GPT's or a hybrid's behind a prefix, and an encoder's
those of such a decoder, but for encoders whose norms are never joined with the matrices they feed.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from compare import APART, CLOSE, VOCABULARY, canonical, same_bits
from kinds_llava import KINDS, PIECES
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import megahf
from megahf.judge import llava
from megahf.load import canonical_state

LANGUAGE, VISION = "language_model.", "vision_model."
PLAIN_NORMS = ("internvit", "internvit300M", "radio-g")
DTYPES = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}


def expected_state(known: dict[str, Any]) -> dict[str, Tensor]:
    """Canonical names and what a file holds under them."""
    args, state = known["args"], known["state_dict"]
    joined = [LANGUAGE] if args["vision_model_type"] in PLAIN_NORMS else [LANGUAGE, VISION]
    named = {name: value for name, value in state.items() if not name.startswith(tuple(joined))}
    for prefix in joined:
        part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        named |= {prefix + name: value for name, value in canonical(part).items()}
    rows = {LANGUAGE + name: args["vocab_size"] for name in VOCABULARY}
    kept = {name: value[: rows.get(name)] for name, value in named.items()}
    dtype = DTYPES[args["params_dtype"]]
    return {name: value if name.endswith(".expert_bias") else value.to(dtype) for name, value in kept.items()}


def model_of(path: Path, known: dict[str, Any], **options: Any) -> Any:
    """The model; where only a tokenizer tells the tags of tiles, with one."""
    told = {"tokenizer": tokenizer(path.parent / "tokenizer")} if known["args"]["tile_tags"] else {}
    return megahf.from_megatron(path, **options, **told)


def tokenizer(folder: Path) -> Path:
    """The folder, with a tokenizer in it that makes of tags what `kinds_llava.TAGS` says."""
    if not folder.exists():
        words = {number: f"w{number}" for number in range(KINDS["intern_6b_tagged"]["vocab_size"])}
        words |= {number: piece for piece, number in PIECES.items()}
        made = Tokenizer(WordLevel({word: number for number, word in words.items()}, unk_token="w0"))
        made.pre_tokenizer = Split(Regex(r"<|tile|_global|_thumbnail|_|\d|>"), "isolated")
        fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0")
        fast.add_tokens(["<image>"], special_tokens=True)
        fast.save_pretrained(folder)
    return folder


def check_weights(model: Any, known: dict[str, Any]) -> None:
    expected, found = expected_state(known), canonical_state(model)
    assert found.keys() == expected.keys()
    unequal = [name for name, value in expected.items() if not same_bits(found[name], value)]
    assert not unequal, f"not Megatron's bits: {unequal}"


def differences(model: Any, known: dict[str, Any]) -> dict[str, float]:
    """How far the logits are from Megatron's, by prompt: text and images in several rows, and each on its own."""
    args, asked = Namespace(**known["args"]), {"rows": known, **known["prompts"]}
    apart = {}
    for name, prompt in asked.items():
        said, expected = llava.ours(model, args, prompt["input_ids"]), prompt["logits"][..., : args.vocab_size]
        assert said.shape == expected.shape
        apart[name] = (said - expected).abs().max().item()
    return apart


def allowed(known: dict[str, Any]) -> float:
    scans = llava.is_hybrid(Namespace(**known["args"]))
    return CLOSE if known["difference"] <= CLOSE and not scans else 2e-5 if known["difference"] <= CLOSE else APART


def check(path: Path) -> float:
    """Weights and logits of a folder that the judge wrote; returns the largest difference of the logits."""
    known = torch.load(path / "reference.pt")
    model = model_of(path, known)
    check_weights(model, known)
    apart = differences(model.float(), known)
    wrong = {name: f"{difference:.2e} off" for name, difference in apart.items() if not difference <= allowed(known)}
    assert not wrong, f"logits are {wrong}"
    return max(apart.values())
