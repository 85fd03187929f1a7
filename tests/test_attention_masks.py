"""Promise: under `sdpa` no prefill makes a tensor that grows with the square of the sequence, or differs from eager.

Every op's output is looked at while a model runs over rows that are whole, padded left, padded right, packed, cut
from a longer context, or seen through a window.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny import HYBRIDS, LLAMA, VARIANTS, tiny, tiny_hybrid, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, StaticCache

LONG = 640  # longer than any width of the model, so that two dimensions of half of it can only be positions twice


class Squares(TorchDispatchMode):
    """Collects the ops one of whose outputs has two dimensions of half the sequence or more."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.found = length, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and sum(size >= self.length / 2 for size in leaf.shape) > 1:
                self.found.add(f"{func}: {tuple(leaf.shape)}")
        return out


def left(pads: list[int], length: int) -> Tensor:
    """A mask of rows with so many places of padding on the left."""
    return torch.stack([(torch.arange(length) >= pad).long() for pad in pads])


def packed(lengths: list[int]) -> Tensor:
    """Positions of documents of these lengths in one row."""
    return torch.cat([torch.arange(length) for length in lengths])[None]


def situations(length: int) -> dict[str, dict[str, Tensor]]:
    """Inputs of two rows (packed: one) in each way a batch can lie."""
    ids, third = tokens(2, length), length // 3
    return {
        "whole": {"input_ids": ids},
        "mask of ones": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        "padded left": {"input_ids": ids, "attention_mask": left([0, third], length)},
        "padded right": {"input_ids": ids, "attention_mask": left([0, third], length).flip(1)},
        "packed": {"input_ids": ids[:1], "position_ids": packed([third, 1, length - 2 * third - 1, third])},
        "packed in two rows": {"input_ids": ids, "position_ids": packed([third, length - third]).expand(2, -1)},
        "part of a longer context": {
            "input_ids": ids,
            "position_ids": torch.cat((torch.arange(third), torch.arange(5 * third, 5 * third + length - third)))[None],
        },
    }


@pytest.mark.parametrize("variant", ["llama", "sinks", "gate and norms"])
@pytest.mark.parametrize("situation", situations(6))
@torch.no_grad()
def test_no_prefill_makes_a_square(situation: str, variant: str) -> None:
    model = tiny(**{**VARIANTS[variant], "max_position_embeddings": LONG})
    with Squares(LONG) as squares:
        model(**situations(LONG)[situation], use_cache=False, logits_to_keep=1)
    assert not squares.found


@torch.no_grad()
def test_a_window_costs_the_window_and_not_the_sequence() -> None:
    length = 4 * 1024
    with Squares(length) as squares:
        tiny(**LLAMA, window_size=[64, 0])(tokens(1, length), use_cache=False, logits_to_keep=1)
    assert not squares.found


@torch.no_grad()
def test_the_watch_sees_a_square() -> None:
    model = tiny(**LLAMA)
    model.set_attn_implementation("eager")
    with Squares(LONG) as squares:
        model(tokens(1, LONG), use_cache=False, logits_to_keep=1)
    assert squares.found


@pytest.mark.parametrize("length", [24, 40])
@pytest.mark.parametrize("situation", situations(6))
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_sdpa_equals_eager_on_every_token(variant: str, situation: str, length: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("megahf.models.layout.BAND", 16)  # bands at lengths where eager is affordable
    model = tiny(**{**VARIANTS[variant], "max_position_embeddings": 6 * length})
    inputs = situations(length)[situation]
    got = model(**inputs).logits
    model.set_attn_implementation("eager")
    expected = model(**inputs).logits
    kept = inputs.get("attention_mask", torch.ones(got.shape[:2])).bool()
    torch.testing.assert_close(got[kept], expected[kept], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_are_as_if_alone() -> None:
    model, ids, lengths = tiny(**VARIANTS["window and sinks"]), tokens(1, 30), [11, 1, 18]
    together = model(ids, position_ids=packed(lengths)).logits
    alone = torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_padded_left_are_as_if_alone(variant: str) -> None:
    model, ids, pads = tiny(**VARIANTS[variant]), tokens(3, 20), [0, 4, 13]
    mask = left(pads, 20)
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits
        torch.testing.assert_close(logits[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("narrow", [1, 32])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_mask_with_holes_is_obeyed(variant: str, narrow: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("megahf.models.layout.NARROW", narrow)
    model, ids = tiny(**VARIANTS[variant]), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[0, 5:8], mask[1, 14:] = 0, 0, 0
    kept, positions = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
    got = model(ids, attention_mask=mask, position_ids=positions).logits
    other = torch.where(kept, ids, 1)  # what is masked has no say
    again = model(other, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[kept], again[kept], atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[kept], expected[kept], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("few, narrow", [(64, 32), (2, 32), (2, 1)])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("padding", ["left", "holes", None])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_chunks_after_a_cache_equal_the_whole(
    variant: str, padding: str | None, kind: str, few: int, narrow: int, monkeypatch: Any
) -> None:
    """`few`: with a mask, or without; `narrow`: windows in bands with a mask, or in blocks."""
    monkeypatch.setattr("megahf.models.layout.FEW", few)
    monkeypatch.setattr("megahf.models.layout.NARROW", narrow)
    model, ids = tiny(**VARIANTS[variant]), tokens(3, 21)
    mask = torch.ones_like(ids) if padding is None else left([0, 3, 11], 21)
    if padding == "holes":
        mask[0, 4:6], mask[1, 10:13] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)
    edges = [0, 9, 16, 17, 18, 21]
    chunks = [
        model(
            ids[:, start:end],
            attention_mask=None if padding is None else mask[:, :end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
        ).logits
        for start, end in pairwise(edges)
    ]
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(chunks, dim=1)[kept], whole[kept], atol=2e-5, rtol=1e-5)


WITH_ATTENTION = [name for name, variant in HYBRIDS.items() if set("*+") & set(variant["hybrid_layer_pattern"])]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("model", ["llama", "window and sinks", "latents", *(f"hybrid {x}" for x in WITH_ATTENTION)])
def test_generation_after_long_chunks_says_the_same(model: str, kind: str) -> None:
    made: Any = tiny(**{**VARIANTS.get(model, {}), "max_position_embeddings": 200})
    if model.startswith("hybrid "):
        made = tiny_hybrid(model.removeprefix("hybrid "), max_position_embeddings=200)
    inputs = {"input_ids": tokens(3, 170), "attention_mask": left([0, 20, 100], 170)}
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
    whole = made.generate(**inputs, **greedy, disable_compile=True)
    assert torch.equal(made.generate(**inputs, **greedy, disable_compile=True, prefill_chunk_size=70), whole)


def test_gradients_through_a_chunk_equal_eager(monkeypatch: Any) -> None:
    monkeypatch.setattr("megahf.models.layout.FEW", 2)
    monkeypatch.setattr("megahf.models.layout.NARROW", 1)
    ids, mask, gradients = tokens(2, 18), left([0, 5], 18), []
    for implementation in ("sdpa", "eager"):
        model, cache = tiny(**VARIANTS["window and sinks"]), DynamicCache()
        model.set_attn_implementation(implementation)
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        loss = model(ids[:, 9:], attention_mask=mask, past_key_values=cache, labels=ids[:, 9:]).loss
        loss.backward()  # through the keys and values of the first nine tokens too
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("variant", ["llama", "window and sinks"])
def test_dropout_in_a_chunk_still_sees_no_further(variant: str, monkeypatch: Any) -> None:
    """Fused blocks drop nothing: bands with masks do then, and what they see is the same."""
    monkeypatch.setattr("megahf.models.layout.FEW", 2)
    monkeypatch.setattr("megahf.models.layout.BAND", 4)
    model, ids, mask = tiny(**VARIANTS[variant]), tokens(2, 18), left([0, 5], 18)
    outs = []
    for dropout in (0.0, 1e-12):
        for module in model.modules():
            if hasattr(module, "dropout") and hasattr(module, "sliding_window"):
                module.dropout, module.training = dropout, True
        cache = DynamicCache(config=model.config)
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        outs.append(model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


def test_gradients_through_moved_rows_equal_eager() -> None:
    ids, mask = tokens(2, 18), left([0, 5], 18)
    labels = ids.masked_fill(left([1, 6], 18) == 0, -100)  # nothing is asked of padding, nor of what it predicts
    gradients = []
    for implementation in ("sdpa", "eager"):
        model = tiny(**VARIANTS["window and sinks"])
        model.set_attn_implementation(implementation)
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4, msg=name)
