"""Promise: no causal model makes a tensor, in any case a batch can lie in, that grows faster than its sequence.

Every op's outputs are looked at over a sequence and over one twice as long, forward and backward: none grows by more
than 2.2, none has two dimensions of half the sequence, and attention is given no mask but to decode.
The vocabulary is longer than half the sequence too, so that all tokens' logits would count.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_attention_masks import left, packed
from tiny import LLAMA, MIXTURES, VARIANTS, tiny, tiny_hybrid, tokens
from tiny_llava import HYBRID, TEXT, tiny_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel, StaticCache

from megahf.models import conv, state_space

LENGTH = 512  # and 1024; longer than twice any width of the models
SIZES: dict[str, Any] = {"vocab_size": 600, "max_position_embeddings": 2 * LENGTH + 8, "loss_chunk_size": 64}
WINDOW: dict[str, Any] = {"window_size": [63, 0], "window_attn_skip_freq": 2}
GPTS: dict[str, dict[str, Any]] = {
    "gpt": LLAMA,
    "sinks and gates": {**VARIANTS["sinks"], "attention_output_gate": True},
    "window": {**LLAMA, **WINDOW, "softmax_type": "learnable"},
    "further tokens": VARIANTS["further tokens"],
    "mixture": MIXTURES["experts"],
    "latents": VARIANTS["latents"],
    "latents, window": {**VARIANTS["latents"], **WINDOW},
}
HYBRIDS = ["everything", "latents", "mamba 1", "no attention"]
MODELS = [*GPTS, *(f"hybrid, {name}" for name in HYBRIDS), "llava", "llava, hybrid"]
GROWTH = 2.2
ROWS = 4  # of a mask while decoding: a query's heads, where they attend to latents
FEW = 64  # elements; what is smaller is a count or a shape


def made(name: str) -> PreTrainedModel:
    if name in GPTS:
        return tiny(**GPTS[name], **SIZES)
    if name.startswith("hybrid, "):
        return tiny_hybrid(name.removeprefix("hybrid, "), **SIZES)
    return tiny_llava(text_config={**(HYBRID if name.endswith("hybrid") else TEXT), **SIZES}, image_token_id=-200)


class Watch(TorchDispatchMode):
    """The largest output of each op, outputs that are square, and masks of more than `ROWS` that attention is given.

    A mapped or prepared parameter is no output; in place ops return what was there, and count as what they return.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.largest: dict[str, int] = {}
        self.squares: set[str] = set()
        self.masks: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            self.largest[str(func)] = max(self.largest.get(str(func), 0), leaf.numel())
            if sum(size >= self.length / 2 for size in leaf.shape) > 1:
                self.squares.add(f"{func}: {tuple(leaf.shape)}")
        if "scaled_dot_product" in str(func):
            given = func._schema.arguments
            mask = {**dict(zip((a.name for a in given), args, strict=False)), **(kwargs or {})}.get("attn_mask")
            if mask is not None and mask.shape[-2] > ROWS:
                self.masks.add(f"{func}: {tuple(mask.shape)}")
        return out


def forward(model: PreTrainedModel, length: int, **inputs: Any) -> None:
    rows = len(next(iter(inputs.values()))) if inputs else 2
    with torch.no_grad():
        model(tokens(rows, length), **inputs, use_cache=False, logits_to_keep=1)


def whole(model: PreTrainedModel, length: int) -> None:
    forward(model, length)


def ones(model: PreTrainedModel, length: int) -> None:
    forward(model, length, attention_mask=torch.ones(2, length, dtype=torch.long))


def padded_left(model: PreTrainedModel, length: int) -> None:
    forward(model, length, attention_mask=left([0, length // 3], length))


def padded_right(model: PreTrainedModel, length: int) -> None:
    forward(model, length, attention_mask=left([0, length // 3], length).flip(1))


def packed_documents(model: PreTrainedModel, length: int) -> None:
    third = length // 3
    forward(model, length, position_ids=packed([third, 1, length - 2 * third - 1, third]))


def part_of_a_longer_context(model: PreTrainedModel, length: int) -> None:
    half = length // 2
    forward(model, length, position_ids=torch.cat((torch.arange(half), torch.arange(half) + 3 * half))[None])


def chunks(model: PreTrainedModel, length: int, cache: Any, mask: Tensor | None) -> None:
    ids = tokens(2, length)
    with torch.no_grad():
        for start, end in pairwise([0, length // 4, length // 2, length]):
            seen = None if mask is None else mask[:, :end]
            model(ids[:, start:end], attention_mask=seen, past_key_values=cache, logits_to_keep=1)


def chunks_after_a_cache(model: PreTrainedModel, length: int) -> None:
    chunks(model, length, DynamicCache(config=model.config.get_text_config()), None)


def chunks_of_padded_rows(model: PreTrainedModel, length: int) -> None:
    chunks(model, length, DynamicCache(config=model.config.get_text_config()), left([0, length // 3], length))


def chunks_after_a_static_cache(model: PreTrainedModel, length: int) -> None:
    cache = StaticCache(model.config.get_text_config(), max_cache_len=length + 4)
    chunks(model, length, cache, left([0, length // 3], length))


def generation_in_chunks(model: PreTrainedModel, length: int) -> None:
    mask = left([0, length // 3], length)
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    model.generate(tokens(2, length), attention_mask=mask, prefill_chunk_size=length // 4, **options)


def training(model: PreTrainedModel, length: int) -> None:
    mask = left([0, length // 3], length)
    ids = tokens(2, length)
    model.train()
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    model.zero_grad()
    model.eval()


CASES = (
    whole, ones, padded_left, padded_right, packed_documents, part_of_a_longer_context, chunks_after_a_cache,
    chunks_of_padded_rows, chunks_after_a_static_cache, generation_in_chunks, training,
)  # fmt: skip


def watched(model: PreTrainedModel, case: Any) -> tuple[dict[str, float], set[str], set[str]]:
    """Each op's growth where it is above `GROWTH`, squares, masks: over `LENGTH` tokens and twice as many."""
    watches = []
    for length in (LENGTH, 2 * LENGTH):
        with Watch(length) as watch:
            case(model, length)
        watches.append(watch)
    short, long = watches
    grown = {
        op: size / max(short.largest.get(op, 0), 1)
        for op, size in long.largest.items()
        if size > max(FEW, GROWTH * short.largest.get(op, 0))
    }
    return grown, short.squares | long.squares, short.masks | long.masks


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixers go over both lengths in several spans, as they do over long ones: else an op of theirs is in one alone."""
    monkeypatch.setattr(state_space, "CPU_SPAN", 64)
    monkeypatch.setattr(conv, "CPU_BLOCK", 32)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_grows_faster_than_the_sequence(name: str) -> None:
    model, found = made(name), {}
    for case in CASES:
        result = watched(model, case)
        if any(result):
            found[case.__name__] = result
    assert not found


def test_the_watch_sees_eager_attention() -> None:
    """What it would say: eager attention's scores are square, grow fourfold, and transformers' masks with them."""
    model = made("gpt")
    model.set_attn_implementation("eager")
    grown, squares, _ = watched(model, padded_left)
    assert squares and max(grown.values()) > 3.9


def test_the_watch_sees_a_mask_of_a_chunk(monkeypatch: Any) -> None:
    """What a chunk after a cache would be given by transformers' own way."""
    monkeypatch.setattr("megahf.models.layout.FEW", 2**30)
    grown, squares, masks = watched(made("gpt"), chunks_of_padded_rows)
    assert masks and squares and max(grown.values()) > 3.9


def test_the_watch_sees_all_logits() -> None:
    model = made("gpt")
    model.config.loss_chunk_size = None
    assert any(str((2 * LENGTH, 600))[1:-1] in square for square in watched(model, training)[1])
