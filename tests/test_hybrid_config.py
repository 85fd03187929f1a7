"""Promise: a hybrid's configuration fills in what follows from its pattern, and refuses in words what cannot be."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from tiny import EXPERTS, HYBRIDS, MLA, tiny_hybrid_config

from megahf.models.configuration_mcore_hybrid import McoreHybridConfig


def test_without_a_pattern_every_layer_is_mamba() -> None:
    assert McoreHybridConfig(num_layers=3).hybrid_layer_pattern == "MMM"
    assert McoreHybridConfig().num_layers == 12


def test_heads_follow_from_the_hidden_size_unless_they_are_given() -> None:
    assert McoreHybridConfig(hidden_size=512, mamba_expand=3, mamba_head_dim=32).mamba_num_heads == 48
    assert McoreHybridConfig(hidden_size=512, mamba_num_heads=80).mamba_num_heads == 80
    assert McoreHybridConfig(hidden_size=100, mamba_version=1).mamba_dt_rank == 7


def test_each_layer_says_what_it_caches() -> None:
    config = tiny_hybrid_config("window", hybrid_layer_pattern="*M*-*E", window_attn_skip_freq=5, **EXPERTS)
    sliding = "sliding_attention"
    assert config.layer_types == [sliding, "linear_attention", sliding, "moe", "full_attention", "moe"]
    assert config.moe_layers == [False] * 5 + [True]


def test_without_attention_a_mixer_counts_the_tokens() -> None:
    assert tiny_hybrid_config("no attention").layer_types == ["moe", "hybrid"]
    assert tiny_hybrid_config("mamba").counting_layer == 0
    assert tiny_hybrid_config("attention").counting_layer is None


@pytest.mark.parametrize("variant", HYBRIDS)
def test_a_config_is_read_back_as_it_was_written(variant: str) -> None:
    config = tiny_hybrid_config(variant)
    again = McoreHybridConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


def test_the_plan_of_tensor_parallelism_names_modules_that_are_there() -> None:
    assert set(tiny_hybrid_config("mamba").base_model_tp_plan) == {"embedding.word_embeddings"}
    layers = {name.split(".")[3] for name in tiny_hybrid_config("attention").base_model_tp_plan if name.count(".") > 2}
    assert layers == {"self_attention", "mlp"}


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"hybrid_layer_pattern": "MGM"}, "G is a layer of Gated DeltaNet, not run here"),
        ({"hybrid_layer_pattern": "M-D"}, "D is a layer of DeepSeek sparse attention, not run here"),
        ({"hybrid_layer_pattern": "M*x"}, "'x' is no layer; layers are M"),
        ({"hybrid_layer_pattern": "M|M"}, r"without \| between stages"),
        ({"hybrid_layer_pattern": "MM*", "num_layers": 2}, "has 3 layers, num_layers is 2"),
        ({"hybrid_layer_pattern": "--"}, "no token sees another"),
        ({"hybrid_layer_pattern": "M+"}, r"\+ needs multi_latent_attention"),
        ({**MLA, "hybrid_layer_pattern": "M*"}, r"an attention layer is \+, not \*"),
        ({"hybrid_layer_pattern": "ME"}, "E needs num_experts"),
        ({"mamba_num_heads": 9}, "9 Mamba heads cannot be shared out over 2 groups"),
        ({"mamba_head_dim": 24}, "2 times hidden_size 32 are no whole heads of 24 channels: give mamba_num_heads"),
        ({"mamba_version": 3}, "mamba_version is 3: it must be 1 or 2"),
        ({"mamba_state_dim": 0}, "mamba_state_dim is 0"),
        ({"mtp_num_layers": 1}, "mtp_layer_pattern does not say of which layers a head is"),
        ({"mtp_num_layers": 1, "mtp_layer_pattern": "MG"}, "mtp_layer_pattern MG: G is a layer of Gated DeltaNet"),
    ],
)
def test_what_cannot_be_is_refused_in_words(fields: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=words):
        tiny_hybrid_config("mamba", **fields)


def test_sizes_of_mixers_that_are_not_there_are_not_looked_at() -> None:
    assert tiny_hybrid_config("gpt", mamba_num_heads=9).num_layers == 4
