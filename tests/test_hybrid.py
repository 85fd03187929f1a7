"""Promise: a hybrid's states are as good as its past: however tokens come in, it says what one pass over them says.

By one, by chunks, beside padding, packed behind one another, from beams and from static caches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from test_attention_masks import LONG, Squares, left, packed, situations
from test_generate import padded
from tiny import EXPERTS, HYBRIDS, LLAMA, VARIANTS, tiny, tiny_config, tiny_hybrid, tiny_hybrid_config, tokens
from transformers import DynamicCache, StaticCache

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.modeling_mcore_hybrid import McoreHybridForCausalLM

ALL = pytest.mark.parametrize("variant", HYBRIDS)
MIXED = pytest.mark.parametrize("variant", [name for name, fields in HYBRIDS.items() if "M" in str(fields)])
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


@ALL
def test_a_cache_changes_no_token(variant: str) -> None:
    model, inputs = tiny_hybrid(variant), padded(tokens(2, 9), [0, 4])
    without = model.generate(**inputs, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**inputs, **GREEDY), without)
    assert len(set(without[:, 9:].flatten().tolist())) > 2, "the model repeats itself: nothing is seen by this test"


@ALL
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_batch_padded_left_says_what_its_rows_say_alone(variant: str, cache: str) -> None:
    model, ids, pads = tiny_hybrid(variant), tokens(3, 12), [0, 5, 11]
    batch = model.generate(**padded(ids, pads), **GREEDY, cache_implementation=cache, disable_compile=True)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], **GREEDY)
        assert batch[row, 12:].tolist() == alone[0, 12 - pad :].tolist()


@ALL
def test_beams_over_a_batch_equal_beams_over_its_rows(variant: str) -> None:
    model, ids, pads = tiny_hybrid(variant), tokens(2, 8), [0, 3]
    batch = model.generate(**padded(ids, pads), **GREEDY, num_beams=3)
    for row, pad in enumerate(pads):
        alone = model.generate(ids[row : row + 1, pad:], **GREEDY, num_beams=3, use_cache=False)
        assert batch[row, 8:].tolist() == alone[0, 8 - pad :].tolist()


@ALL
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_prefill_in_chunks_says_the_same(variant: str, cache: str) -> None:
    model, inputs = tiny_hybrid(variant), padded(tokens(2, 14), [0, 6])
    options = {**GREEDY, "cache_implementation": cache, "disable_compile": True}
    chunked = model.generate(**inputs, **options, prefill_chunk_size=5)
    assert torch.equal(chunked, model.generate(**inputs, **GREEDY))


@ALL
def test_generation_goes_on_from_a_cache(variant: str) -> None:
    model, ids = tiny_hybrid(variant), tokens(1, 9)
    whole = model.generate(ids, **GREEDY)
    first = model.generate(
        ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True, use_cache=True
    )
    rest = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    assert torch.equal(model.generate(first.sequences, past_key_values=first.past_key_values, **rest), whole)


@ALL
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_chunks_after_a_cache_equal_the_whole(variant: str, kind: str) -> None:
    model, ids = tiny_hybrid(variant), tokens(2, 21)
    mask = left([0, 3], 21)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=24)
    chunks = [
        model(
            ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end], past_key_values=cache
        ).logits
        for start, end in pairwise([0, 2, 9, 16, 17, 18, 21])  # the first chunk of a row is padding and nothing else
    ]
    kept = mask.bool()
    torch.testing.assert_close(torch.cat(chunks, dim=1)[kept], whole[kept], atol=2e-5, rtol=1e-5)
    assert int(cache.get_seq_length()) == 21


@ALL
@torch.no_grad()
def test_positions_are_counted_on_from_the_cache(variant: str) -> None:
    model, ids = tiny_hybrid(variant, position_embedding_type="learned_absolute", rope_type="rope"), tokens(2, 12)
    cache = model(ids[:, :7]).past_key_values
    torch.testing.assert_close(model(ids[:, 7:], past_key_values=cache).logits, model(ids).logits[:, 7:])


@ALL
@torch.no_grad()
def test_packed_documents_are_as_if_alone(variant: str) -> None:
    model, ids, lengths = tiny_hybrid(variant), tokens(1, 30), [11, 1, 18]
    together = model(ids, position_ids=packed(lengths)).logits
    alone = torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, model(ids).logits, atol=1e-2), "the documents see nothing of each other anyway"


@MIXED
@torch.no_grad()
def test_packed_documents_leave_the_state_of_the_last(variant: str) -> None:
    model, ids = tiny_hybrid(variant), tokens(1, 12)
    cache = model(ids, position_ids=packed([5, 7])).past_key_values
    alone = model(ids[:, 5:]).past_key_values
    for layer, symbol in enumerate(model.config.hybrid_layer_pattern):
        if symbol == "M":
            for state in ("conv_states", "recurrent_states"):
                torch.testing.assert_close(getattr(cache.layers[layer], state), getattr(alone.layers[layer], state))


@ALL
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_padded_left_are_as_if_alone(variant: str, implementation: str) -> None:
    model, ids, pads = tiny_hybrid(variant), tokens(3, 20), [0, 4, 13]
    model.set_attn_implementation(implementation)
    mask = left(pads, 20)
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    for row, pad in enumerate(pads):
        alone = model(ids[row : row + 1, pad:]).logits
        torch.testing.assert_close(logits[row : row + 1, pad:], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["mamba", "everything", "mamba 1"])
@torch.no_grad()
def test_padding_anywhere_leaves_the_state_as_it_is(variant: str) -> None:
    model, ids = tiny_hybrid(variant), tokens(1, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(logits, model(ids[mask.bool()][None]).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["everything", "mamba"])
def test_a_mask_that_is_not_of_padding_is_refused_by_mixers(variant: str) -> None:
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    with pytest.raises(ValueError, match="take only a mask of padding"):
        tiny_hybrid(variant)(tokens(1, 4), attention_mask=mask)
    gpt = tiny_hybrid("gpt")
    torch.testing.assert_close(gpt(tokens(1, 4), attention_mask=mask).logits, gpt(tokens(1, 4)).logits)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "window and sinks", "gate and norms", "latents"])
@torch.no_grad()
def test_a_gpt_written_as_a_hybrid_is_the_gpt(variant: str) -> None:
    gpt, ids = tiny(**VARIANTS[variant]), tokens(2, 13)
    fields = {
        name: value
        for name, value in VARIANTS[variant].items()
        if name not in ("window_attn_skip_freq", "no_rope_freq")
    }
    if "window_attn_skip_freq" in VARIANTS[variant]:
        fields["window_attn_skip_freq"] = [1, 1, 0, 0]
    if "no_rope_freq" in VARIANTS[variant]:
        fields["no_rope_freq"] = [0, 0, 1, 1]
    pattern = "+-+-" if fields.get("multi_latent_attention") else "*-*-"
    plain = {name: getattr(tiny_config(), name) for name in LLAMA}
    hybrid = tiny_hybrid("gpt", **{**plain, **fields, "hybrid_layer_pattern": pattern})
    hybrid.load_state_dict(as_hybrid(gpt))
    torch.testing.assert_close(hybrid(ids).logits, gpt(ids).logits, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_a_gpt_of_experts_written_as_a_hybrid_is_the_gpt() -> None:
    gpt, ids = tiny(**LLAMA, **EXPERTS), tokens(2, 13)
    hybrid = tiny_hybrid("gpt of experts")
    hybrid.load_state_dict(as_hybrid(gpt))
    torch.testing.assert_close(hybrid(ids).logits, gpt(ids).logits, atol=1e-6, rtol=1e-6)


def as_hybrid(gpt: McoreGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The GPT's weights by the names of a hybrid: attention of layer l in 2 l, its MLP in 2 l + 1."""
    renamed = {}
    for name, weight in gpt.state_dict().items():
        name = name.replace("decoder.final_layernorm", "decoder.final_norm")
        if name.startswith("model.decoder.layers."):
            layer, rest = name.removeprefix("model.decoder.layers.").split(".", 1)
            late = rest.startswith(("mlp.", "pre_mlp_layernorm."))
            name = f"model.decoder.layers.{2 * int(layer) + late}.{rest}"
        renamed[name] = weight
    return renamed


@pytest.mark.parametrize("situation", situations(6))
@torch.no_grad()
def test_no_prefill_makes_a_square(situation: str) -> None:
    model = tiny_hybrid("everything", max_position_embeddings=LONG)
    with Squares(LONG) as squares:
        model(**situations(LONG)[situation], use_cache=False, logits_to_keep=1)
    assert not squares.found


def test_only_a_model_with_states_refuses_an_assistant() -> None:
    ids = tokens(1, 9)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        tiny_hybrid("everything").generate(ids, **GREEDY, assistant_model=tiny(**LLAMA))
    gpt = tiny_hybrid("gpt")
    assert torch.equal(gpt.generate(ids, **GREEDY, assistant_model=tiny(**LLAMA)), gpt.generate(ids, **GREEDY))


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded_by_layer() -> None:
    model = tiny_hybrid("everything")
    model.set_attn_implementation("eager")
    out = model(tokens(2, 9), output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert [tuple(x.shape) for x in out.hidden_states] == [(2, 9, 32)] * 7
    assert [tuple(x.shape) for x in out.attentions] == [(2, 4, 9, 9)]
    assert [x.shape[-1] for x in out.router_logits] == [4]


@torch.no_grad()
def test_a_float32_residual_keeps_what_bfloat16_would_drop() -> None:
    model = tiny_hybrid("everything", fp32_residual_connection=True).to(torch.bfloat16)
    out = model.model(tokens(1, 5), output_hidden_states=True)
    assert [x.dtype for x in out.hidden_states[:-1]] == [torch.float32] * 6
    assert out.last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["everything", "mamba"])
@torch.no_grad()
def test_compiles_without_a_break_and_says_the_same(variant: str) -> None:
    model, inputs = tiny_hybrid(variant), padded(tokens(2, 16), [0, 4])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    packs = {"input_ids": inputs["input_ids"], "position_ids": packed([7, 9]).expand(2, -1)}
    for call in ({"input_ids": inputs["input_ids"]}, inputs, packs):
        kept = inputs["attention_mask"].bool() if "attention_mask" in call else slice(None)
        found, expected = compiled(**call, use_cache=False).logits, model(**call).logits
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["everything", "mamba", "attention"])
@torch.no_grad()
def test_a_compiled_step_over_a_static_cache_says_the_same(variant: str) -> None:
    torch.compiler.reset()
    model, whole = tiny_hybrid(variant), tokens(2, 14)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(whole[:, :8], past_key_values=cache)
    for end in range(9, 15):
        with torch.compiler.set_stance("default" if end < 11 else "fail_on_recompile"):
            found = compiled(whole[:, end - 1 : end], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, model(whole[:, :end]).logits[:, -1], rtol=1e-4, atol=1e-5)


def test_a_fresh_model_spreads_its_decays_and_keeps_its_stream_narrow() -> None:
    torch.manual_seed(0)
    model = McoreHybridForCausalLM(tiny_hybrid_config("mamba", hidden_size=256, hybrid_layer_pattern="M" * 8))
    mixer = model.model.decoder.layers[0].mixer
    assert (mixer.A_log >= 0).all() and (mixer.A_log.exp() <= 16).all() and (mixer.D == 1).all()
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert (steps > 0.9e-3).all() and (steps < 1.1e-1).all() and steps.max() > 5 * steps.min()
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.out_proj.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
