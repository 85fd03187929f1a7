"""Promise: a configuration carries Megatron's words and transformers' aliases, and refuses what cannot be a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, tiny_config
from transformers import AutoConfig, DynamicCache, StaticCache

from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"num_attention_heads": 6, "num_query_groups": 4}, "6 attention heads .* 4 query groups"),
    "no layers": ({"num_layers": 0}, "num_layers is 0: at least 1"),
    "odd channels": ({**LLAMA, "kv_channels": 10, "rotary_percent": 0.5}, "5 channels .* even number from 2 to 10"),
    "no channels": ({**LLAMA, "rotary_percent": 0.1}, "0 channels"),
    "positions": ({"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi': .*learned_absolute, rope"),
    "norm": ({"normalization": "BatchNorm"}, "normalization is 'BatchNorm'"),
    "activation": ({"activation_func": "swish"}, "activation_func is 'swish'"),
    "softmax": ({"softmax_type": "sparse"}, "softmax_type is 'sparse'"),
    "window to the right": ({"window_size": [4, 4]}, r"window_size \[4, 4\] must be \[left, 0\]"),
    "window pattern": ({"window_size": [4, 0], "window_attn_skip_freq": [1]}, "has 1 entries, the model 2 layers"),
    "rope pattern": ({"no_rope_freq": 0}, "no_rope_freq is 0"),
    "clamp without gate": ({"activation_func_clamp_value": 7.0}, "activation_func_clamp_value 7.0 .* gated"),
    "interleaved YaRN": (
        {"position_embedding_type": "yarn", "rotary_interleaved": True},
        "YaRN has no interleaved form",
    ),
    "base": ({**LLAMA, "rotary_base": 0.0}, "rotary_base is 0.0: it must be above 0"),
    "wrong type": ({"hidden_size": "wide"}, "hidden_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_sizes_are_refused_with_the_numbers(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(Exception, match=words):
        tiny_config(**changes)


def test_what_is_left_out_follows_megatron() -> None:
    config = McoreGPTConfig(hidden_size=64, num_attention_heads=4)
    assert (config.ffn_hidden_size, config.num_query_groups, config.kv_channels) == (256, 4, 16)
    assert config.add_qkv_bias
    assert not McoreGPTConfig(add_bias_linear=False).add_qkv_bias


def test_transformers_names_are_aliases_both_ways() -> None:
    config = McoreGPTConfig(num_hidden_layers=3, intermediate_size=20, num_key_value_heads=4, head_dim=6)
    assert (config.num_layers, config.ffn_hidden_size, config.num_query_groups, config.kv_channels) == (3, 20, 4, 6)
    assert (config.num_hidden_layers, config.head_dim, config.initializer_range) == (3, 6, 0.02)


@pytest.mark.parametrize(
    "window, skip, types",
    [
        (None, None, "ffff"),
        ([-1, 0], None, "ffff"),
        ([7, 0], None, "ssss"),
        ([7, 0], 2, "sfsf"),
        ([7, 0], [1, 0, 0, 1], "sffs"),
    ],
)
def test_caches_learn_which_layers_have_a_window(window: Any, skip: Any, types: str) -> None:
    config = tiny_config(num_layers=4, window_size=window, window_attn_skip_freq=skip)
    words = {"s": "sliding_attention", "f": "full_attention"}
    assert config.layer_types == [words[kind] for kind in types]
    for cache in (DynamicCache(config=config), StaticCache(config, max_cache_len=32)):
        assert [layer.is_sliding for layer in cache.layers] == [kind == "s" for kind in types]
    assert config.sliding_window == (8 if "s" in types else None)


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = tiny_config(**LLAMA, window_size=[7, 0], no_rope_freq=[0, 1], eos_token_id=[1, 2], rotary_base=500000)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    where = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in again.to_dict().items() if k not in where} == {
        k: v for k, v in config.to_dict().items() if k not in where
    }


def test_weights_start_as_megatron_starts_them() -> None:
    torch.manual_seed(0)
    config = McoreGPTConfig(
        vocab_size=500, num_layers=8, hidden_size=128, num_attention_heads=4, init_method_std=0.05,
        layernorm_zero_centered_gamma=True, softmax_type="learnable",
    )  # fmt: skip
    layer = McoreGPTForCausalLM(config).model.decoder.layers[3]
    assert layer.self_attention.linear_qkv.weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert layer.mlp.linear_fc1.weight.std().item() == pytest.approx(0.05, rel=0.05)
    for narrow in (layer.self_attention.linear_proj, layer.mlp.linear_fc2):
        assert narrow.weight.std().item() == pytest.approx(0.05 / 4, rel=0.05)
        assert not narrow.bias.any()
    assert not layer.self_attention.linear_qkv_layernorm.weight.any()
    assert layer.self_attention.core_attention.softmax_offset.any()
