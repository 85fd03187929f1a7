"""Promise: a LLaVA takes images like words: with and without a cache, padded, several in a row, in tiles, with tags.

transformers' own models are met in test_llava_vs_transformers.py, real Megatron in megatron/test_llava_checkpoints.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import LLAMA, tiny_config, tokens
from tiny_llava import IMAGE, SHUFFLED, TAGS, TEXT, VARIANTS, batch, pixels, row, tiny_llava, tiny_llava_config
from torch import Tensor

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}


def rows_of(inputs: dict[str, Tensor], tiles: list[int], images: list[int]) -> list[dict[str, Any]]:
    """A batch as rows without padding, each with its own images (None where it has none)."""
    shares = zip(inputs["pixel_values"].split(tiles), inputs["num_tiles"].split(images), strict=True)
    rows = []
    for ids, mask, (pixel_values, num_tiles) in zip(inputs["input_ids"], inputs["attention_mask"], shares, strict=True):
        given = {"pixel_values": pixel_values, "num_tiles": num_tiles} if len(pixel_values) else {}
        rows.append({"input_ids": ids[mask.bool()][None], **given})
    return rows


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_padded_batch_is_its_rows_alone(variant: str) -> None:
    model = tiny_llava(variant)
    inputs = batch(model.config)
    logits = model(**inputs).logits
    generated = model.generate(**inputs, **GREEDY)[:, -6:]
    for index, alone in enumerate(rows_of(inputs, [3, 1, 0], [2, 1, 0])):
        expected = model(**alone).logits[0]
        torch.testing.assert_close(logits[index, -len(expected) :], expected, atol=2e-5, rtol=1e-5)
        assert torch.equal(generated[index], model.generate(**alone, **GREEDY)[0, -6:])


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_tokens_after_a_cache_are_those_of_the_whole_sequence(variant: str) -> None:
    model = tiny_llava(variant)
    inputs = batch(model.config)
    further = tokens(3, 3, seed=9) % 50 + 1
    cached = model(**inputs, use_cache=True)
    mask = F.pad(inputs["attention_mask"], (0, 3), value=1)
    steps, past = [], cached.past_key_values
    for step in range(3):
        seen = mask[:, : inputs["input_ids"].shape[1] + step + 1]
        out = model(further[:, step : step + 1], attention_mask=seen, past_key_values=past)
        steps.append(out.logits)
    whole = {**inputs, "input_ids": torch.cat((inputs["input_ids"], further), dim=1), "attention_mask": mask}
    torch.testing.assert_close(torch.cat(steps, dim=1), model(**whole).logits[:, -3:], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["clip", "radio-g, hybrid", "cradio-g, tags"])
@torch.no_grad()
def test_generation_is_the_same_with_every_cache_and_without(variant: str) -> None:
    model = tiny_llava(variant)
    call = {**batch(model.config), **GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**call, use_cache=False)
    for cache in ("dynamic", "static"):
        found = model.generate(**call, cache_implementation=cache, disable_compile=True)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["clip", "cradio-g, tags"])
@torch.no_grad()
def test_beams_keep_the_images_of_their_row(variant: str) -> None:
    model = tiny_llava(variant)
    inputs = batch(model.config)
    beams = {
        **GREEDY,
        "num_beams": 3,
        "num_return_sequences": 2,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    together = model.generate(**inputs, **beams)
    for index, alone in enumerate(rows_of(inputs, [3, 1, 0], [2, 1, 0])):
        expected = model.generate(**alone, **beams)
        pair = slice(2 * index, 2 * index + 2)
        torch.testing.assert_close(together.sequences_scores[pair], expected.sequences_scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(together.sequences[pair, -6:], expected.sequences[:, -6:])


@torch.no_grad()
def test_text_alone_is_the_language_models() -> None:
    model, ids = tiny_llava(), tokens(2, 9) % 50 + 1
    language = McoreGPTForCausalLM(tiny_config(**LLAMA)).eval()
    language.model.load_state_dict(model.model.language_model.state_dict())
    language.output_layer.load_state_dict(model.output_layer.state_dict())
    torch.testing.assert_close(model(ids).logits, language(ids).logits, atol=0, rtol=0)


@torch.no_grad()
def test_a_tag_is_words_before_its_tile() -> None:
    tagged = tiny_llava("cradio-g, tags")
    plain = tiny_llava("cradio-g, tags", tile_tags=None)
    plain.load_state_dict(tagged.state_dict())
    tile = torch.full((1, plain.config.img_seq_len), IMAGE)
    words, (first, second, last) = tokens(1, 4) % 50 + 1, torch.tensor(TAGS)[:, None]
    spelled = torch.cat((words, first, tile, second, tile, last, tile, words, last, tile, words), dim=1)
    short = torch.cat((words, row(tagged.config, -3), words, row(tagged.config, -1), words), dim=1)
    expected = plain(spelled, pixel_values=pixels(4)).logits
    found = tagged(short, pixel_values=pixels(4), num_tiles=[3, 1]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_places_may_be_given_as_vectors() -> None:
    model = tiny_llava()
    inputs = batch(model.config)
    vectors = model.get_input_embeddings()(inputs["input_ids"])
    given = {**inputs, "input_ids": None, "inputs_embeds": vectors}
    torch.testing.assert_close(model(**given).logits, model(**inputs).logits, atol=0, rtol=0)
    assert torch.equal(model.generate(**given, **GREEDY), model.generate(**inputs, **GREEDY)[:, -6:])


@pytest.mark.parametrize("variant", ["clip", "internvit", "radio, gate"])
@torch.no_grad()
def test_attention_as_it_is_written_down_gives_the_same(variant: str) -> None:
    model = tiny_llava(variant)
    inputs = batch(model.config)
    kept = inputs["attention_mask"].bool()
    expected = model(**inputs).logits[kept]
    model.set_attn_implementation("eager")
    assert model.model.vision_model.config._attn_implementation == "eager"
    torch.testing.assert_close(model(**inputs).logits[kept], expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_no_mask_over_the_sequence_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, attend, masks = tiny_llava("radio-g, hybrid"), F.scaled_dot_product_attention, []

    def watched(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    model(**batch(model.config))
    assert masks == [None] * 3  # of the encoder's two layers and the language model's one


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones() -> None:
    model = tiny_llava()
    inputs = batch(model.config)
    torch.testing.assert_close(model(**inputs, logits_to_keep=2).logits, model(**inputs).logits[:, -2:])


@torch.no_grad()
def test_images_can_be_looked_at_by_themselves() -> None:
    model = tiny_llava("cradio-g, tags")
    out = model.get_image_features(pixels(3), [2, 1], output_hidden_states=True)
    assert out.last_hidden_state.shape == (3, 26, 24)
    assert out.pooler_output.shape == (3, 2 + 4, 32)
    assert len(out.hidden_states) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_weight_and_checkpointing_changes_none(variant: str) -> None:
    model = tiny_llava(variant).train()
    model.config.vision_config.force_cpe_eval_mode = True
    inputs = batch(model.config)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if not name.endswith("mask_token")})
    plain, again = gradients
    silent = [name for name, x in plain.items() if x is None or not x.abs().max() > 0]
    # A bias of keys moves no softmax; it is a part of linear_qkv, the rest of which learns.
    assert silent == []
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)


def test_images_neither_predict_nor_are_predicted() -> None:
    model = tiny_llava()
    ids = row(model.config, 3, -1, 4)
    labels = ids.clone()
    with torch.no_grad():
        out = model(ids, pixel_values=pixels(1), labels=labels)
    counted = [0, 1, ids.shape[1] - 4, ids.shape[1] - 3, ids.shape[1] - 2]  # places that predict a word from a word
    expected = F.cross_entropy(out.logits[0, counted], ids[0, [place + 1 for place in counted]])
    torch.testing.assert_close(out.loss, expected)


def test_random_parts_of_radios_positions_are_for_training_alone() -> None:
    model = tiny_llava("radio, gate").model.vision_model
    with torch.no_grad():
        evaluated = model(pixels(2)).last_hidden_state
        model.train()
        first, second = (model(pixels(2)).last_hidden_state for _ in range(2))
        model.config.force_cpe_eval_mode = True
        forced = model(pixels(2)).last_hidden_state
    assert (first - second).abs().max() > 0.01
    torch.testing.assert_close(forced, evaluated)


def test_tied_embeddings_stay_one() -> None:
    model = tiny_llava(text_config={**TEXT, "tie_word_embeddings": True})
    assert model.output_layer.weight is model.model.language_model.embedding.word_embeddings.weight
    model.resize_token_embeddings(70)
    assert model.output_layer.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == model.config.text_config.vocab_size == 70


def test_a_tile_takes_as_many_places_as_the_configuration_says() -> None:
    for variant in VARIANTS:
        model = tiny_llava(variant)
        out = model.get_image_features(pixels(2), [2])
        assert out.pooler_output.shape == (2, model.config.img_seq_len, 32)
    assert tiny_llava_config("clip").img_seq_len == 17
    assert tiny_llava_config("clip", **SHUFFLED).img_seq_len == 4
    assert tiny_llava_config("cradio-g, tags").img_seq_len == 6
