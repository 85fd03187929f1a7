"""Promise: `generate` gives the same tokens with and without a cache, in a batch and alone, and every class trains.

Dynamic, static and sliding caches; left padding; beams; loss, gradient checkpointing and `torch.compile`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import LLAMA, VARIANTS, randomise, tiny, tiny_config, tokens

from megahf.models.modeling_mcore_gpt import (
    McoreGPTForQuestionAnswering,
    McoreGPTForSequenceClassification,
    McoreGPTForTokenClassification,
)

GREEDY: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}


def padded(model_tokens: torch.Tensor, pads: list[int]) -> dict[str, torch.Tensor]:
    ids, mask = model_tokens.clone(), torch.ones_like(model_tokens)
    for row, pad in enumerate(pads):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cache_changes_no_token(variant: str, implementation: str) -> None:
    model = tiny(**VARIANTS[variant])
    model.set_attn_implementation(implementation)
    inputs = padded(tokens(2, 9), [0, 4])
    without = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**inputs, **GREEDY), without)
    assert len(set(without[:, 9:].flatten().tolist())) > 2, "the model repeats itself: nothing is seen by this test"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_padded_left_says_what_its_rows_say_alone(variant: str, cache: str) -> None:
    model, ids, pads = tiny(**VARIANTS[variant]), tokens(3, 12), [0, 5, 11]
    batch = model.generate(**padded(ids, pads), **GREEDY, cache_implementation=cache, disable_compile=True)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], **GREEDY)
        assert batch[row, 12:].tolist() == alone[0, 12 - pad :].tolist()


@pytest.mark.parametrize("variant", ["gpt2", "llama", "window and sinks"])
def test_beams_over_a_batch_equal_beams_over_its_rows(variant: str) -> None:
    model, ids, pads = tiny(**VARIANTS[variant]), tokens(2, 8), [0, 3]
    batch = model.generate(**padded(ids, pads), **GREEDY, num_beams=3)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], **GREEDY, num_beams=3)
        assert batch[row, 8:].tolist() == alone[0, 8 - pad :].tolist()


def test_prefill_in_chunks_says_the_same() -> None:
    model, inputs = tiny(**LLAMA), padded(tokens(2, 14), [0, 6])
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=5), model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_logits_to_keep_are_the_last_ones() -> None:
    model, ids = tiny(**LLAMA, mup_output_mult=0.5, mup_embedding_mult=3.0), tokens(2, 9)
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


@torch.no_grad()
def test_word_vectors_may_be_given_instead_of_tokens() -> None:
    model, ids = tiny(mup_embedding_mult=2.0), tokens(2, 9)
    vectors = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=vectors).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=vectors)


def test_more_tokens_than_learned_positions_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="97 tokens, but the model has learned 96 positions"):
        tiny()(tokens(1, 97))


def test_loss_counts_the_items_of_the_whole_batch() -> None:
    model, ids = tiny(**LLAMA), tokens(2, 9)
    mean = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=64).loss, mean * 16 / 64)
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(mean, torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded() -> None:
    model = tiny(**VARIANTS["sinks"])
    model.set_attn_implementation("eager")
    out = model(tokens(2, 9), output_hidden_states=True, output_attentions=True)
    assert [tuple(x.shape) for x in out.hidden_states] == [(2, 9, 32)] * 3
    assert [tuple(x.shape) for x in out.attentions] == [(2, 4, 9, 9)] * 2
    assert (out.attentions[0].sum(-1) < 1).all(), "the sink takes its share"


@pytest.mark.parametrize("variant", ["llama", "sinks"])
@torch.no_grad()
def test_compiles_without_a_break_and_says_the_same(variant: str) -> None:
    model, inputs = tiny(**VARIANTS[variant]), padded(tokens(2, 16), [0, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for call in ({"input_ids": inputs["input_ids"]}, inputs):
        kept = inputs["attention_mask"].bool() if "attention_mask" in call else slice(None)
        torch.testing.assert_close(compiled(**call, use_cache=False).logits[kept], model(**call).logits[kept])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_compiled_positions_show_documents_and_not_jumps(implementation: str) -> None:
    model, ids = tiny(**LLAMA), tokens(1, 12)
    model.set_attn_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packed = torch.cat((torch.arange(5), torch.arange(7)))[None]
    jumping = torch.cat((torch.arange(5), torch.arange(20, 27)))[None]
    for positions in (packed, jumping):
        expected = model(ids, position_ids=positions).logits
        torch.testing.assert_close(compiled(ids, position_ids=positions, use_cache=False).logits, expected)
    assert not torch.allclose(model(ids, position_ids=packed).logits[:, -1], model(ids).logits[:, -1], atol=1e-3)


@torch.no_grad()
def test_a_float32_residual_keeps_what_bfloat16_would_drop() -> None:
    model = tiny(**LLAMA, fp32_residual_connection=True).to(torch.bfloat16)
    out = model.model(tokens(1, 5), output_hidden_states=True)
    assert [x.dtype for x in out.hidden_states[:-1]] == [torch.float32] * 2
    assert out.last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "head", [McoreGPTForSequenceClassification, McoreGPTForTokenClassification, McoreGPTForQuestionAnswering]
)
def test_heads_learn(head: type) -> None:
    model = randomise(head(tiny_config(**LLAMA, num_labels=3)))
    targets = {
        McoreGPTForSequenceClassification: {"labels": torch.tensor([0, 2])},
        McoreGPTForTokenClassification: {"labels": torch.ones(2, 6, dtype=torch.long)},
        McoreGPTForQuestionAnswering: {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    }
    model(tokens(2, 6), **targets[head]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
