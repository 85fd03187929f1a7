"""Promise: multi-latent attention keeps latents and nothing else, never expands them to decode, and says the same.

Left padding, chunks and generation over caches of each kind are tests/test_generate.py and test_attention_masks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tiny import MLA, VARIANTS, tiny, tiny_config, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import megahf
from megahf.models.mla import MLASelfAttention
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

megahf.register()

LATENTS = ["latents", "latents, window and sinks"]
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
EACH = pytest.mark.parametrize("variant", LATENTS)
KINDS = pytest.mark.parametrize("kind", ["dynamic", "static"])


def attentions(model: torch.nn.Module) -> list[MLASelfAttention]:
    return [module for module in model.modules() if isinstance(module, MLASelfAttention)]


def empty(model: McoreGPTForCausalLM, kind: str) -> Cache:
    return DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=32)


def decoded(model: Any, cache: Cache, chunks: list[int], ids: Tensor) -> Tensor:
    """Logits of tokens that come in chunks."""
    parts = ids.split(chunks, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@EACH
@KINDS
@torch.no_grad()
def test_a_cache_holds_the_bytes_of_latents(variant: str, kind: str) -> None:
    model = tiny(**{**VARIANTS[variant], "window_size": None})
    cache = empty(model, kind)
    model(tokens(2, 9), past_key_values=cache)
    places = 9 if kind == "dynamic" else 32
    for layer in cache.layers:
        held = [x for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1]
        assert sum(x.numel() * x.element_size() for x in held) == 2 * places * (16 + 4) * 4  # latent, rope; float32


@EACH
@KINDS
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_both_forms_say_the_same_after_a_cache(variant: str, kind: str, implementation: str, monkeypatch: Any) -> None:
    model, ids, chunks = tiny(**VARIANTS[variant]), tokens(2, 27), [19, 1, 1, 1, 4, 1]
    model.set_attn_implementation(implementation)
    logits, forms = {}, {}
    for form in ("chosen", "expanded"):
        forms[form] = counted(model, monkeypatch)
        logits[form] = decoded(model, empty(model, kind), chunks, ids)
        monkeypatch.setattr(MLASelfAttention, "absorbs", lambda *args: False)
    # Four single tokens in two layers, at least.
    assert forms["chosen"]["absorbed"] >= 8 and forms["expanded"]["absorbed"] == 0
    torch.testing.assert_close(logits["chosen"], logits["expanded"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits["chosen"], model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def counted(model: McoreGPTForCausalLM, monkeypatch: Any) -> dict[str, int]:
    """How often each form is taken from now on."""
    counts = {"absorbed": 0, "expanded": 0}
    for attention in attentions(model):
        for form in counts:
            take = getattr(type(attention), form).__get__(attention)

            def counting(*args: Any, form: str = form, take: Any = take, **kwargs: Any) -> Any:
                counts[form] += 1
                return take(*args, **kwargs)

            monkeypatch.setattr(attention, form, counting)
    return counts


@KINDS
@torch.no_grad()
def test_decoding_expands_no_latent(kind: str) -> None:
    model = tiny(**MLA)
    cache = empty(model, kind)
    model(tokens(2, 9), past_key_values=cache)

    def expanded(module: torch.nn.Module, inputs: Any) -> None:
        raise AssertionError(f"{inputs[0].shape} expanded")

    for attention in attentions(model):
        attention.linear_kv_up_proj.register_forward_pre_hook(expanded)
    for token in tokens(2, 4).unbind(1):
        model(token[:, None], past_key_values=cache)
    with pytest.raises(AssertionError, match="expanded"):
        model(tokens(2, 9))


@pytest.mark.parametrize(
    "queries, keys, absorbed",
    [(1, 4096, True), (64, 4096, True), (150, 4096, True), (164, 4096, False), (300, 4096, False), (1, 1, False)],
)
def test_the_choice_counts_multiplications(queries: int, keys: int, absorbed: bool) -> None:
    """DeepSeek-V2-Lite's sizes; counted here for one head."""
    sizes = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
    module = MLASelfAttention(tiny_config(**{**MLA, **sizes}), 0)
    module.config._attn_implementation = "sdpa"
    mask = torch.ones(1, 1, queries, keys)
    among = queries * 512 * 256 + queries * keys * (576 + 576)
    expanding = keys * 512 * 256 + queries * keys * (192 + 128)
    assert module.absorbs(queries, keys, mask) == (among < expanding) == absorbed
    module.config._attn_implementation = "flash_attention_2"  # no kernel of it is as wide as a latent
    assert not module.absorbs(queries, keys, mask)
    module.config._attn_implementation = "sdpa"
    assert module.absorbs(queries, keys, None) == (absorbed and queries == 1)


@EACH
def test_beams_change_with_no_cache(variant: str) -> None:
    model = tiny(**VARIANTS[variant])
    without = model.generate(tokens(2, 8), **GREEDY, num_beams=3, use_cache=False)
    assert torch.equal(model.generate(tokens(2, 8), **GREEDY, num_beams=3), without)


class TwoHalves(QuantizedCache):
    """A quantized cache that rounds nothing: it wants keys and values with channels, as those that do."""

    def __init__(self, config: Any) -> None:
        Cache.__init__(self, layers=[Half() for _ in range(config.num_hidden_layers)])


class Half(DynamicLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert key_states.abs().amax() > 0 and value_states.abs().amax() > 0
        return super().update(key_states, value_states, *args, **kwargs)


@torch.no_grad()
def test_a_quantized_cache_gets_latents_and_keys_apart() -> None:
    model, ids = tiny(**MLA), tokens(2, 14)
    cache = TwoHalves(model.config)
    found = decoded(model, cache, [9, 1, 3, 1], ids)
    assert (cache.layers[0].keys.shape, cache.layers[0].values.shape) == ((2, 1, 14, 16), (2, 1, 14, 4))
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_of_eight_bits_says_nearly_the_same() -> None:
    model, ids = tiny(**MLA), tokens(2, 14)
    try:
        cache = QuantizedCache("fp8", model.config)
    except ValueError:
        pytest.skip("this version of transformers quantizes caches by other packages only")
    found, expected = decoded(model, cache, [9, 1, 3, 1], ids), model(ids, use_cache=False).logits
    assert 0 < (found - expected).square().mean().sqrt() < 0.2 * expected.std()


@EACH
def test_a_cache_can_be_cut_back(variant: str) -> None:
    model = tiny(**{**VARIANTS[variant], "window_size": None})
    options = {**GREEDY, "eos_token_id": 60}
    plain = model.generate(tokens(1, 9), **options)
    assert torch.equal(model.generate(tokens(1, 9), **options, prompt_lookup_num_tokens=3), plain)


@torch.no_grad()
def test_an_adapter_on_the_matrix_of_keys_and_values_counts_while_decoding() -> None:
    model, ids = tiny(**MLA), tokens(2, 40)
    before = model(ids, use_cache=False).logits
    config = peft.LoraConfig(r=4, target_modules=["linear_kv_up_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).eval()
    expected = tuned(ids, use_cache=False).logits
    assert not torch.allclose(expected, before, atol=1e-2)
    attention = attentions(tuned)[0]
    assert attention.absorbs(1, 33, None) and not attention.absorbs(1, 10, None)  # asking for it costs 16 rows
    found = decoded(tuned, DynamicCache(config=model.config), [9, 1, 26, 1, 1, 2], ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_layers_on_disk_decode_the_same(tmp_path: Path) -> None:
    model, ids = tiny(**MLA), tokens(2, 40)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embedding": "cpu", "model.rotary_pos_emb": "cpu", "model.decoder.layers.0": "disk"}
    places |= {"model.decoder.layers.1": "cpu", "model.decoder.final_layernorm": "cpu", "output_layer": "cpu"}
    folder = tmp_path / "disk"
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=folder)
    assert attentions(spread)[0].linear_kv_up_proj.weight.is_meta
    found = decoded(spread, DynamicCache(config=model.config), [36, 1, 1, 2], ids)
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@EACH
@torch.no_grad()
def test_compiled_decoding_says_the_same(variant: str, inductor: None) -> None:
    model, ids = tiny(**VARIANTS[variant]).double(), tokens(2, 12)
    cache = StaticCache(model.config, max_cache_len=16)
    found = [model(ids[:, :8], past_key_values=cache).logits]
    compiled = torch.compile(model, fullgraph=True)
    for place in range(8, 12):
        found.append(compiled(ids[:, place : place + 1], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids).logits, rtol=1e-4, atol=1e-5)


@EACH
@torch.no_grad()
def test_it_runs_in_bfloat16(variant: str) -> None:
    model, ids = tiny(**VARIANTS[variant]), tokens(2, 20)
    exact = model(ids).logits
    model = model.to(torch.bfloat16)
    found = decoded(model, DynamicCache(config=model.config), [16, 1, 1, 1, 1], ids)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).square().mean().sqrt() < 0.05 * exact.std()
