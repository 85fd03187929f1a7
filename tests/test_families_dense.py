"""A dense model of transformers' own comes in with the same logits and goes back with the same bytes.

transformers builds the model, computes the logits and loads what was lowered. Every option of a family that is in use
is met once. What Megatron's GPT, or the architecture, does not compute is refused in words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import (
    SIZES,
    change,
    config_of,
    loaded,
    logits,
    model_of,
    refusal_of,
    refusal_to_lower,
    roundtrip,
    unheard_of,
)
from safetensors.torch import load_file, save_file
from tiny import LLAMA, randomise, tiny

from megahf import convert
from megahf.families import FAMILIES

HEADS = {**SIZES, "head_dim": 12}  # not hidden_size / num_attention_heads
ONE_KEY_A_HEAD = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": 1}
WINDOW = {"sliding_window": 6}
SLIDING, FULL = "sliding_attention", "full_attention"


def rope(kind: str, **told: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500000.0, **told}}


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

MODELS: dict[str, T.PretrainedConfig] = {
    "llama": T.LlamaConfig(**SIZES),
    "llama, heads of their own size": T.LlamaConfig(**HEADS, rms_norm_eps=1e-3),
    "llama 3.1": T.LlamaConfig(**SIZES, **rope("llama3", factor=8.0, **LLAMA3)),
    "llama, positions divided": T.LlamaConfig(**SIZES, **rope("linear", factor=4.0)),
    "llama with YaRN": T.LlamaConfig(**SIZES, **rope("yarn", factor=4.0, original_max_position_embeddings=24)),
    "llama with biases": T.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with GELU": T.LlamaConfig(**SIZES, hidden_act="gelu"),
    "smollm2": T.LlamaConfig(**SIZES, tie_word_embeddings=True, **rope("default")),
    "arcee": T.ArceeConfig(**SIZES),
    "seed-oss": T.SeedOssConfig(**HEADS),
    "mistral": T.MistralConfig(**HEADS, sliding_window=None),
    "mistral with a window": T.MistralConfig(**SIZES, **WINDOW),
    "ministral": T.MinistralConfig(**HEADS, **WINDOW, layer_types=[SLIDING, FULL, SLIDING]),
    "qwen2": T.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2 with windows": T.Qwen2Config(**SIZES, **WINDOW, use_sliding_window=True, max_window_layers=1),
    "qwen3": T.Qwen3Config(**HEADS),
    "qwen3 with windows": T.Qwen3Config(
        **HEADS, **WINDOW, use_sliding_window=True, layer_types=[FULL, SLIDING, SLIDING]
    ),
    "gpt2": T.GPT2Config(**GPT2),
    "gpt2, not tied": T.GPT2Config(**GPT2, n_inner=48, tie_word_embeddings=False, activation_function="gelu"),
    "starcoder": T.GPTBigCodeConfig(**GPT2),
    "starcoder, a key for each head": T.GPTBigCodeConfig(**GPT2, multi_query=False),
    "nemotron": T.NemotronConfig(**HEADS),
    "nemotron, all channels rotating": T.NemotronConfig(**SIZES, partial_rotary_factor=1.0),
    "gpt-neox in sequence": T.GPTNeoXConfig(**ONE_KEY_A_HEAD, use_parallel_residual=False),
    "starcoder2": T.Starcoder2Config(**SIZES),
    "starcoder2 with a window": T.Starcoder2Config(**SIZES, **WINDOW, use_bias=False, tie_word_embeddings=False),
    "phi3": T.Phi3Config(**SIZES),
    "phi3, part of each head, with a window": T.Phi3Config(
        **SIZES, **WINDOW, tie_word_embeddings=True, **rope("default", partial_rotary_factor=0.75)
    ),
    "smollm3": T.SmolLM3Config(**SIZES),
    "smollm3 with windows": T.SmolLM3Config(**SIZES, **WINDOW, use_sliding_window=True, no_rope_layers=[0, 1, 1]),
    "stablelm": T.StableLmConfig(**SIZES),
    "stablelm with biases": T.StableLmConfig(**SIZES, use_qkv_bias=True),
    "granite without its factor of residuals": T.GraniteConfig(
        **SIZES, embedding_multiplier=12.0, logits_scaling=3.0, attention_multiplier=0.5
    ),
    "glm": T.GlmConfig(**HEADS),
    "ernie": T.Ernie4_5Config(**HEADS),
    "ernie with biases": T.Ernie4_5Config(**HEADS, use_bias=True),
    "helium": T.HeliumConfig(**SIZES, head_dim=8),
}


@torch.no_grad()
def about_zero(model: T.PreTrainedModel) -> T.PreTrainedModel:
    """`model` with the scales of its norms so, as trained ones are; transformers starts them about one."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.sub_(1)
    return model


@pytest.mark.parametrize("case", MODELS)
def test_logits_and_bytes_survive_the_way_in_and_back(tmp_path: Path, case: str) -> None:
    model = model_of(MODELS[case])
    roundtrip(about_zero(model) if case.startswith("nemotron") else model, tmp_path)


@pytest.mark.parametrize("kind", sorted({config.model_type for config in MODELS.values()}))
def test_every_setting_that_transformers_writes_is_known(kind: str) -> None:
    assert not unheard_of(T.AutoConfig.for_model(kind))


NEEDED: dict[str, dict[str, Any]] = {
    "qwen2": {"num_hidden_layers": 30, "use_sliding_window": True},  # windows begin at layer 28
    "helium": {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1},  # 128 channels a head
    "ministral": {"head_dim": 4},  # transformers' class does not work without
    "gpt_neox": {"use_parallel_residual": False},
}


@pytest.mark.parametrize("kind", sorted({config.model_type for config in MODELS.values()}))
def test_a_config_that_leaves_out_what_is_usual_means_the_same(tmp_path: Path, kind: str) -> None:
    """transformers' defaults are ours: of windows, epsilons, heads, activations, ties, factors."""
    needed = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 8, **NEEDED.get(kind, {})}
    config = T.AutoConfig.for_model(kind, **GPT2 if kind in ("gpt2", "gpt_bigcode") else needed)
    usual = T.AutoConfig.for_model(kind).to_dict()
    spare = {key for key, value in config.to_dict().items() if key in usual and usual[key] == value}
    model_of(config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "full", to="hf")
    change(tmp_path / "theirs", *spare - set(SIZES) - {"model_type", "dtype"}, "layer_types")
    convert(tmp_path / "theirs", tmp_path / "sparse", to="hf")
    assert config_of(tmp_path / "sparse") == config_of(tmp_path / "full")


def test_sharded_folders_go_both_ways(tmp_path: Path) -> None:
    theirs, _, _ = roundtrip(model_of(MODELS["llama"]), tmp_path, max_shard_size="20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn", "default"])
def test_the_configs_of_transformers_4_are_read(tmp_path: Path, kind: str) -> None:
    told = {"llama3": LLAMA3, "yarn": {"original_max_position_embeddings": 24}}.get(kind, {})
    scaling = {} if kind == "default" else {"factor": 8.0, **told}
    model_of(T.LlamaConfig(**SIZES, **rope(kind, **scaling))).save_pretrained(tmp_path / "new")
    model_of(T.LlamaConfig(**SIZES, **rope(kind, **scaling))).save_pretrained(tmp_path / "old")
    name = "type" if kind == "linear" else "rope_type"  # as it was written before llama3
    before = None if kind == "default" else {name: kind, **scaling}
    change(tmp_path / "old", "rope_parameters", rope_theta=500000.0, rope_scaling=before)
    for folder in ("new", "old"):
        convert(tmp_path / folder, tmp_path / f"{folder}_hf", to="hf")
    assert config_of(tmp_path / "old_hf") == config_of(tmp_path / "new_hf")


def test_windows_of_upper_layers_are_read_where_layers_are_not_named(tmp_path: Path) -> None:
    """As transformers 4 wrote them: `max_window_layers` alone."""
    model_of(MODELS["qwen2 with windows"]).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "new", to="hf")
    convert(change(tmp_path / "theirs", "layer_types"), tmp_path / "old", to="hf")
    assert config_of(tmp_path / "old") == config_of(tmp_path / "new")
    assert config_of(tmp_path / "old")["window_attn_skip_freq"] == [0, 1, 1]


def test_a_lowered_config_also_has_the_words_of_transformers_4(tmp_path: Path) -> None:
    _, _, back = roundtrip(model_of(MODELS["llama 3.1"]), tmp_path)
    config = config_of(back)
    assert config["rope_theta"] == 500000.0
    assert config["rope_scaling"]["rope_type"] == "llama3" and config["rope_scaling"]["factor"] == 8.0


def test_gpt2_is_read_as_it_lies_on_the_hub(tmp_path: Path) -> None:
    """Its base model was saved, with the causal mask beside the weights."""
    model = model_of(MODELS["gpt2"])
    model.save_pretrained(tmp_path / "hub")
    file = tmp_path / "hub" / "model.safetensors"
    weights = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96).tril() for layer in range(3)}
    weights |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
    save_file(weights, file, metadata={"format": "pt"})
    change(tmp_path / "hub", "tie_word_embeddings", n_ctx=96)
    convert(tmp_path / "hub", tmp_path / "ours", to="hf")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(model), atol=1e-5, rtol=0)


def test_a_tied_weight_that_is_stored_twice_must_be_the_same_twice(tmp_path: Path) -> None:
    model_of(MODELS["smollm2"]).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    weights["lm_head.weight"][3, 5] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"stored twice and not equal .*lm_head\.weight"):
        convert(tmp_path / "theirs", tmp_path / "again", to="hf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_scales_about_zero_are_folded_where_the_architecture_has_them_about_one(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model = tiny(**LLAMA, layernorm_zero_centered_gamma=True, qk_layernorm=family == "qwen3").to(dtype)
    model.save_pretrained(tmp_path / "ours")
    plan = convert(tmp_path / "ours", tmp_path / "theirs", to=family)
    name = "bfloat16" if dtype == torch.bfloat16 else "float32"
    assert any("1 was added" in note and name in note for note in plan.notes)
    there = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = model.model.decoder.final_layernorm.weight
    assert torch.equal(there["model.norm.weight"], (ours.float() + 1).to(dtype))
    expected = logits(model).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * expected.abs().max().item()
    torch.testing.assert_close(logits(loaded(tmp_path / "theirs")).float(), expected, atol=tolerance, rtol=0)


def test_scales_about_one_become_those_about_zero(tmp_path: Path) -> None:
    options = {"activation_func": "squared_relu", "add_bias_linear": False, "position_embedding_type": "rope"}
    model = tiny(**options, rotary_percent=0.5, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "ours")
    plan = convert(tmp_path / "ours", tmp_path / "nemotron", to="nemotron")
    assert any("1 was taken away" in note for note in plan.notes)
    there = loaded(tmp_path / "nemotron")
    assert there.model.norm.weight.abs().mean() < 0.5
    torch.testing.assert_close(logits(there), logits(model), atol=1e-5, rtol=0)


REFUSED_IN: dict[str, tuple[T.PretrainedConfig, dict[str, Any], str]] = {
    "dynamic positions": (
        MODELS["llama"],
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic'; built for it are default, linear, llama3, yarn",
    ),
    "another Llama 3 rule": (
        MODELS["llama 3.1"],
        rope("llama3", factor=8.0, **{**LLAMA3, "low_freq_factor": 2.0}),
        "low_freq_factor is 2.0, Megatron has 1.0 built in",
    ),
    "positions with settings nobody knows": (
        MODELS["llama"],
        rope("default", mrope_section=[2, 1, 1]),
        "mrope_section with rope_type 'default', which is not known here",
    ),
    "half of each head": (
        MODELS["llama"],
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5; the architecture rotates whole heads",
    ),
    "biases of attention alone": (
        MODELS["llama with biases"],
        {"mlp_bias": False},
        "attention_bias, mlp_bias: True and False; Megatron has biases in attention and MLP, or in neither",
    ),
    "an activation": (MODELS["llama"], {"hidden_act": "mish"}, "hidden_act cannot be read: 'mish' is not built"),
    "no width": (MODELS["llama"], {"intermediate_size": None}, "shapes do not fit"),
    "mistral with windows in some layers": (
        MODELS["mistral with a window"],
        {"layer_types": [SLIDING, FULL, SLIDING]},
        "full_attention in layer_types; the architecture has sliding_attention in every layer",
    ),
    "a window that is off": (
        MODELS["qwen2 with windows"],
        {"use_sliding_window": False},
        "there are layers of sliding_attention, and no sliding_window",
    ),
    "layers of another kind": (
        MODELS["qwen3"],
        {"layer_types": [FULL, FULL, "linear_attention"]},
        "layer_types: ['linear_attention']; built are sliding_attention and full_attention",
    ),
    "biases of qwen3": (MODELS["qwen3"], {"attention_bias": True}, "attention_bias is True; built for qwen3 is False"),
    "scores by layer": (
        MODELS["gpt2"],
        {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx is True; built for gpt2 is False",
    ),
    "gpt-neox in parallel": (
        MODELS["gpt-neox in sequence"],
        {"use_parallel_residual": True},
        "use_parallel_residual: it is True, built is False",
    ),
    "phi3 of 128k tokens": (
        MODELS["phi3"],
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "rope_type 'longrope'; built for it are default",
    ),
    "a norm for each head": (MODELS["stablelm"], {"qk_layernorm": True}, "qk_layernorm is True; built for stablelm"),
    "granite's factor of residuals": (
        MODELS["granite without its factor of residuals"],
        {"residual_multiplier": 0.22},
        "residual_multiplier is 0.22; built for granite is 1.0",
    ),
    "another model": (MODELS["llama"], {"model_type": "bloom"}, "model_type 'bloom' is not among the families"),
    "weights of another size": (MODELS["llama"], {"num_key_value_heads": 1}, "shapes do not fit"),
    "one layer fewer": (MODELS["llama"], {"num_hidden_layers": 2}, "weights that llama does not have"),
    "one layer more": (MODELS["llama"], {"num_hidden_layers": 4}, "missing weights"),
}


@pytest.mark.parametrize("case", REFUSED_IN)
def test_what_megatron_does_not_compute_is_refused_in_words(tmp_path: Path, case: str) -> None:
    config, changes, words = REFUSED_IN[case]
    assert words in refusal_of(config, tmp_path, **changes)


NEMOTRON = {"activation_func": "squared_relu", "add_bias_linear": False, "position_embedding_type": "rope"}
REFUSED_OUT: dict[str, tuple[str, dict[str, Any], str]] = {
    "norms of queries": ("llama", {**LLAMA, "qk_layernorm": True}, "qk_layernorm is True, in LlamaForCausalLM False"),
    "a window": ("llama", {**LLAMA, "window_size": [5, 0]}, "window_size is [5, 0], in LlamaForCausalLM None"),
    "sinks": ("llama", {**LLAMA, "softmax_type": "learnable"}, "softmax_type is 'learnable'"),
    "a gate of attention": ("llama", {**LLAMA, "attention_output_gate": True}, "attention_output_gate is True"),
    "biases of queries": ("llama", {**LLAMA, "add_qkv_bias": True}, "add_qkv_bias is True, in LlamaForCausalLM False"),
    "half of each head": ("llama", {**LLAMA, "rotary_percent": 0.5}, "partial_rotary_factor is 0.5"),
    "pairs of neighbours": ("llama", {**LLAMA, "rotary_interleaved": True}, "rotary_interleaved is True"),
    "layers without positions": ("llama", {**LLAMA, "no_rope_freq": 2}, "no_rope_freq is [False, True]"),
    "learned positions": (
        "llama",
        {**LLAMA, "position_embedding_type": "learned_absolute"},
        "position_embedding_type is 'learned_absolute', in LlamaForCausalLM 'rope'",
    ),
    "LayerNorm": ("llama", {**LLAMA, "normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
    "no gate": (
        "llama",
        {**LLAMA, "gated_linear_unit": False},
        "gated_linear_unit is False, in LlamaForCausalLM True",
    ),
    "heads for further tokens": ("llama", {**LLAMA, "mtp_num_layers": 1}, "mtp_num_layers is 1"),
    "experts": ("llama", {**LLAMA, "num_experts": 4}, "num_experts is 4, in LlamaForCausalLM None"),
    "a float32 residual stream": ("llama", {**LLAMA, "fp32_residual_connection": True}, "fp32_residual_connection"),
    "muP": ("llama", {**LLAMA, "mup_output_mult": 0.25}, "mup_output_mult is 0.25, in LlamaForCausalLM 1.0"),
    "a scale of scores": ("llama", {**LLAMA, "softmax_scale": 0.5}, "softmax_scale is 0.5"),
    "windows in some layers": (
        "mistral",
        {**LLAMA, "window_size": [5, 0], "window_attn_skip_freq": 2},
        "window_attn_skip_freq is [True, False], in MistralForCausalLM [True, True]",
    ),
    "heads of their own size": ("gpt2", {"num_query_groups": 4, "kv_channels": 12}, "kv_channels is 12"),
    "such heads of stablelm": (
        "stablelm",
        {**LLAMA, "normalization": "LayerNorm", "kv_channels": 12},
        "kv_channels is 12, in StableLmForCausalLM 8",
    ),
    "two groups of queries": ("gpt_bigcode", {}, "num_query_groups is 2, in GPTBigCodeForCausalLM 4"),
    "no biases": ("qwen2", LLAMA, "add_qkv_bias is False, in Qwen2ForCausalLM True"),
    "no norms of queries": ("qwen3", LLAMA, "qk_layernorm is False, in Qwen3ForCausalLM True"),
    "groups": ("gpt2", {}, "num_query_groups is 2, in GPT2LMHeadModel 4"),
    "rotary positions": ("gpt2", LLAMA, "position_embedding_type is 'rope', in GPT2LMHeadModel 'learned_absolute'"),
    "stretched parts": (
        "nemotron",
        {**NEMOTRON, "position_embedding_type": "yarn", "rotary_percent": 0.5},
        "with YaRN Megatron rotates whole heads",
    ),
    "a window of nemotron": ("nemotron", {**NEMOTRON, "window_size": [5, 0]}, "window_size is [5, 0]"),
    "nobody": ("bloom", LLAMA, "'bloom' is not a family"),
}


@pytest.mark.parametrize("case", REFUSED_OUT)
def test_what_the_architecture_does_not_compute_is_refused_in_words(tmp_path: Path, case: str) -> None:
    family, options, words = REFUSED_OUT[case]
    assert words in refusal_to_lower(tiny(**options), family, tmp_path)


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    said = refusal_to_lower(tiny(**LLAMA, qk_layernorm=True, window_size=[5, 0], mtp_num_layers=1), "llama", tmp_path)
    assert all(word in said for word in ("qk_layernorm", "window_size", "mtp_num_layers"))


ALIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "every second layer without positions": ("smollm3", {**LLAMA, "no_rope_freq": 2}),
    "a window without a limit": ("llama", {**LLAMA, "window_size": [-1, 0]}),
    "windows by a frequency": (
        "qwen3",
        {**LLAMA, "qk_layernorm": True, "window_size": [5, 0], "window_attn_skip_freq": 2},
    ),
    "the usual scale, said": ("granite", {**LLAMA, "softmax_scale": 8**-0.5, "mup_embedding_mult": 10.0}),
    **{
        f"heads of their own size, {family}": (family, {**LLAMA, "kv_channels": 12, **options})
        for family, options in {
            "qwen2": {"add_qkv_bias": True},
            "phi3": {},
            "smollm3": {},
            "granite": {},
            "starcoder2": {"normalization": "LayerNorm", "gated_linear_unit": False},
        }.items()
    },
    "YaRN without its scales": ("llama", {**LLAMA, "position_embedding_type": "yarn", "yarn_mscale": None,
                                          "yarn_rotary_scaling_factor": 4.0}),
}  # fmt: skip


@pytest.mark.parametrize("case", ALIKE)
def test_a_model_of_ours_is_lowered_however_it_says_the_same(tmp_path: Path, case: str) -> None:
    family, options = ALIKE[case]
    model = randomise(tiny(**options))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=family)
    lowered = loaded(tmp_path / "theirs")
    assert type(lowered).__name__ == FAMILIES[family].architecture
    torch.testing.assert_close(logits(lowered), logits(model), atol=1e-5, rtol=0)
