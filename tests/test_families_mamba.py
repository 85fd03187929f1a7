"""Promise: models with mixers (Mamba, Mamba-2, Bamba, Nemotron-H) come in and go back as transformers has them.

Logits are transformers', the way back is the same bytes, and what one side cannot compute is refused in words.
"""

from __future__ import annotations

import json
from inspect import signature
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
    refusal,
    refusal_of,
    refusal_to_lower,
    roundtrip,
    unheard_of,
)
from safetensors.torch import load_file, save_file
from tiny import EXPERTS, HYBRIDS, remember, tiny, tiny_hybrid
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

from megahf import convert

GROUPS = 2 if "group_size" in signature(MambaRMSNormGated).parameters else 1  # of a mixer's norm: transformers 5.23
IDS = ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id")
COMMON = {name: SIZES[name] for name in IDS}
HEADS = {name: SIZES[name] for name in SIZES if name not in (*IDS, "num_hidden_layers")}
MAMBA = {**COMMON, "num_hidden_layers": 3, "state_size": 8}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": GROUPS, "chunk_size": 16}
BAMBA = {
    **COMMON,
    **HEADS,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_n_groups": GROUPS,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
NEMOTRON = {
    **COMMON,
    **HEADS,
    "hybrid_override_pattern": "M-M*EME*-",
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 10,  # not of twice the hidden size
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "time_step_min": 1e-30,  # so that transformers raises no time step
}
CASES: dict[str, tuple[type[T.PreTrainedConfig], dict[str, Any]]] = {
    "Mamba": (T.MambaConfig, MAMBA),
    "Mamba, untied, without the convolution's bias, of a rank": (
        T.MambaConfig,
        {**MAMBA, "tie_word_embeddings": False, "use_conv_bias": False, "time_step_rank": 5, "expand": 3},
    ),
    "Mamba with another epsilon": (T.MambaConfig, {**MAMBA, "layer_norm_epsilon": 1e-3, "residual_in_fp32": False}),
    "Mamba-2": (T.Mamba2Config, MAMBA2),
    "Mamba-2, tied, three channels for one": (
        T.Mamba2Config,
        {**MAMBA2, "tie_word_embeddings": True, "expand": 3, "num_heads": 12, "conv_kernel": 3},
    ),
    "Mamba-2 without the convolution's bias": (T.Mamba2Config, {**MAMBA2, "use_conv_bias": False}),
    "Bamba": (T.BambaConfig, BAMBA),
    "Bamba, tied, rotating whole heads": (
        T.BambaConfig,
        {
            **BAMBA,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0},
        },
    ),
    "Bamba of attention alone, with another epsilon": (
        T.BambaConfig,
        {**BAMBA, "attn_layer_indices": [0, 1, 2], "rms_norm_eps": 1e-3},
    ),
    "Nemotron-H": (T.NemotronHConfig, NEMOTRON),
    "Nemotron-H without experts": (T.NemotronHConfig, {**NEMOTRON, "hybrid_override_pattern": "M-M*-"}),
    "Nemotron-H with latent experts": (T.NemotronHConfig, {**NEMOTRON, "moe_latent_size": 16}),
    "Nemotron-H with groups of experts": (
        T.NemotronHConfig,
        {**NEMOTRON, "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    ),
    "Nemotron-H with one expert a token": (
        T.NemotronHConfig,
        {**NEMOTRON, "num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
    "Nemotron-H with another activation": (T.NemotronHConfig, {**NEMOTRON, "mlp_hidden_act": "gelu"}),
}


def model(case: str, **changes: Any) -> T.PreTrainedModel:
    """transformers' own, with random weights and states that last."""
    kind, options = CASES[case]
    return remember(model_of(kind(**{**options, **changes})))


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_in_with_transformers_logits_and_goes_back_in_the_same_bytes(case: str, tmp_path: Path) -> None:
    roundtrip(model(case), tmp_path)


def test_a_model_in_several_files_goes_back_in_the_same_ones(tmp_path: Path) -> None:
    theirs, _, _ = roundtrip(model("Bamba"), tmp_path, max_shard_size="20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 2


@pytest.mark.parametrize("case", ["Mamba", "Mamba-2", "Nemotron-H"])
def test_a_model_in_bfloat16_goes_back_in_the_same_bytes(case: str, tmp_path: Path) -> None:
    model(case).save_pretrained(tmp_path / "first")
    half = T.AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "theirs")  # in which the bias of the experts' choice is float32
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    convert(tmp_path / "ours", tmp_path / "back", to=CASES[case][0].model_type)
    first, last = (tmp_path / folder / "model.safetensors" for folder in ("theirs", "back"))
    assert first.read_bytes() == last.read_bytes()


@pytest.mark.parametrize("kind", dict.fromkeys(kind for kind, _ in CASES.values()), ids=lambda kind: kind.model_type)
def test_every_setting_that_transformers_writes_is_looked_at(kind: type[T.PreTrainedConfig]) -> None:
    assert not unheard_of(kind())


def test_a_layer_of_bamba_is_two_of_ours(tmp_path: Path) -> None:
    _, ours, _ = roundtrip(model("Bamba"), tmp_path)
    assert config_of(ours)["hybrid_layer_pattern"] == "M-*-M-"


@pytest.mark.parametrize(
    ("kinds", "pattern"),
    [
        ("layers_block_type", ["mamba", "mlp", "mamba", "attention", "moe", "mamba", "moe", "attention", "mlp"]),
        ("hybrid_override_pattern", "M-M*EME*-"),
    ],
)
def test_nemotrons_layers_are_read_in_their_older_words(kinds: str, pattern: object, tmp_path: Path) -> None:
    expected = model("Nemotron-H")
    expected.save_pretrained(tmp_path / "theirs")
    convert(change(tmp_path / "theirs", "layers_block_type", **{kinds: pattern}), tmp_path / "ours", to="hf")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(expected), atol=1e-5, rtol=1e-5)


def test_what_is_lowered_says_its_layers_in_the_words_of_every_version(tmp_path: Path) -> None:
    _, _, back = roundtrip(model("Nemotron-H"), tmp_path)
    assert config_of(back)["hybrid_override_pattern"] == "M-M*EME*-"
    assert config_of(back)["num_hidden_layers"] == 9


def test_nemotrons_raised_time_steps_are_not_heeded_and_that_is_said(tmp_path: Path) -> None:
    plain = model("Nemotron-H")
    plain.save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", time_step_min=0.5)
    plan = convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    assert any("time_step_min is 0.5: transformers raises smaller time steps to it" in note for note in plan.notes)
    raised = logits(T.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval())
    found = logits(loaded(tmp_path / "ours"))
    torch.testing.assert_close(found, logits(plain), atol=1e-5, rtol=1e-5)
    assert (found - raised).abs().max() > 1e-2


def test_nemotrons_heads_for_further_tokens_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    model("Nemotron-H").save_pretrained(tmp_path / "theirs")
    stored = load_file(tmp_path / "theirs/model.safetensors")
    more = {"mtp.layers.0.eh_proj.weight": torch.ones(32, 64)}
    save_file({**stored, **more}, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    plan = convert(change(tmp_path / "theirs", num_nextn_predict_layers=1), tmp_path / "ours", to="hf")
    assert "num_nextn_predict_layers is 1: heads for further tokens are left out" in plan.notes


def test_limits_of_time_steps_that_limit_nothing_are_taken(tmp_path: Path) -> None:
    model("Mamba-2").save_pretrained(tmp_path / "theirs")
    written = change(tmp_path / "theirs", time_step_limit=[0.0, float("inf")])
    assert "Infinity" in (written / "config.json").read_text()
    convert(written, tmp_path / "ours", to="hf")


def test_mamba_2_is_a_nemotron_of_mixers(tmp_path: Path) -> None:
    expected = model("Mamba-2", residual_in_fp32=False)
    expected.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "nemotron", to="nemotron_h")
    found = loaded(tmp_path / "nemotron")
    assert type(found) is T.NemotronHForCausalLM
    found.config.use_cache = False  # transformers' has none without attention
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)
    convert(tmp_path / "nemotron", tmp_path / "back", to="mamba2")
    first, last = (tmp_path / folder / "model.safetensors" for folder in ("theirs", "back"))
    assert first.read_bytes() == last.read_bytes()


def test_a_nemotron_of_mixers_is_a_mamba_2(tmp_path: Path) -> None:
    expected = model("Nemotron-H", hybrid_override_pattern="MMM", mamba_num_heads=8, n_groups=GROUPS)
    expected.save_pretrained(tmp_path / "theirs")
    expected.config.use_cache = False
    convert(tmp_path / "theirs", tmp_path / "mamba2", to="mamba2")
    found = loaded(tmp_path / "mamba2")
    assert type(found) is T.Mamba2ForCausalLM
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=1e-5)


LIMITED = "time_step_limit: time steps are held between 0.001 and 0.1; in Megatron's mixers they are not"
EPSILON = "it is 1e-06; mixers have a norm whose epsilon is 1e-05 in Megatron, always"
NOT_TAKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "limits": ("Mamba-2", {"time_step_limit": [0.001, 0.1]}, LIMITED),
    "limits as transformers writes infinity": (
        "Bamba",
        {"time_step_limit": [0.001, {"__float__": "Infinity"}]},
        "time steps are held between 0.001 and inf",
    ),
    "an epsilon": ("Mamba-2", {"layer_norm_epsilon": 1e-6}, f"layer_norm_epsilon: {EPSILON}"),
    "an epsilon of Bamba's": ("Bamba", {"rms_norm_eps": 1e-6}, f"rms_norm_eps: {EPSILON}"),
    "biases": ("Mamba", {"use_bias": True}, "use_bias is True; built for mamba is False"),
    "an activation": ("Mamba-2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; built for mamba2 is 'silu'"),
    "heads": (
        "Mamba-2",
        {"num_heads": 7},
        "num_heads, head_dim, expand: 7 heads of 8 channels are not 2 x hidden_size 32",
    ),
    "a bias of attention": ("Bamba", {"attention_bias": True}, "attention_bias is True; built for bamba is False"),
    "an MLP's activation": (
        "Nemotron-H",
        {"mlp_hidden_act": "tanh"},
        "mlp_hidden_act cannot be read: 'tanh' is not built; built are silu",
    ),
    "a window": ("Nemotron-H", {"sliding_window": 8}, "sliding_window is 8; built for nemotron_h is None"),
    "an unknown layer": ("Nemotron-H", {"layers_block_type": ["mamba", "gdn"]}, "is not known is among mamba, gdn"),
    "weights of experts": ("Nemotron-H", {"norm_topk_prob": False}, "norm_topk_prob is False with num_experts_per_tok"),
    "groups of experts": (
        "Nemotron-H",
        {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 3},
        "groups are ranked by their best 2, in Megatron by their best 3",
    ),
    "an unknown kind": ("Mamba", {"model_type": "falcon_mamba"}, "model_type 'falcon_mamba' is not among the families"),
}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_what_is_computed_otherwise_is_not_taken(case: str, tmp_path: Path) -> None:
    base, changes, words = NOT_TAKEN[case]
    kind, options = CASES[base]
    assert words in refusal_of(kind(**options), tmp_path, **changes)


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
def test_a_folder_of_state_spaces_own_is_refused_by_name(weights: str, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    save_file({"backbone.embedding.weight": torch.ones(61, 32)}, tmp_path / "theirs" / weights)
    own = {"d_model": 32, "n_layer": 3, "vocab_size": 61, "ssm_cfg": {"layer": "Mamba2"}, "rms_norm": True}
    (tmp_path / "theirs/config.json").write_text(json.dumps(own))
    words = refusal(tmp_path / "theirs", tmp_path / "ours")
    assert "this is a folder of state-spaces' own, for their package mamba_ssm" in words
    assert "end in -hf" in words


PLAIN = {"layernorm_epsilon": 1e-5, "position_embedding_type": "none", "moe_router_dtype": "fp32"}
SQUARED = {**PLAIN, "activation_func": "squared_relu", "gated_linear_unit": False}
SIGMOID = {**SQUARED, **EXPERTS, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
NOT_LOWERED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "two mixers": ("bamba", "MM-", PLAIN, "layer 1 is a Mamba mixer where BambaForCausalLM has an MLP"),
    "an MLP": ("bamba", "M--*", PLAIN, "layer 2 is an MLP where BambaForCausalLM has a mixer or attention"),
    "no MLP at the end": ("bamba", "M-*", PLAIN, "the last layer, 2, has no MLP after it, as BambaForCausalLM"),
    "attention": ("mamba2", "MM*", PLAIN, "layer 2 is attention where Mamba2ForCausalLM has a mixer"),
    "experts": ("mamba2", "ME", SIGMOID, "layer 1 is a mixture of experts where Mamba2ForCausalLM has a mixer"),
    "Mamba-1": ("mamba2", "MM", {"mamba_version": 1}, "its mixers are Mamba-1's, whose channels are in no heads"),
    "Mamba-2": ("mamba", "MM", {}, "mamba_version is 2, in MambaForCausalLM 1"),
    "an epsilon": ("mamba2", "MM", {"layernorm_epsilon": 1e-6}, EPSILON),
    "LayerNorm": ("mamba2", "MM", {"normalization": "LayerNorm"}, "normalization is 'LayerNorm', in Mamba2ForCausalLM"),
    "no gated norm": ("mamba2", "MM", {"mamba_rmsnorm": False}, "mamba_rmsnorm is False, in Mamba2ForCausalLM True"),
    "D a channel": (
        "nemotron_h",
        "MM",
        {"mamba_d_has_hdim": True},
        "mamba_d_has_hdim is True, in NemotronHFor",
    ),
    "heads": ("mamba2", "MM", {"mamba_num_heads": 10}, "10 heads of 8 channels are no whole multiple of hidden_size"),
    "learned positions": (
        "mamba2",
        "MM",
        {"position_embedding_type": "learned_absolute"},
        "position_embedding_type is 'learned_absolute', in Mamba2ForCausalLM 'none'",
    ),
    "rotary positions": (
        "nemotron_h",
        "M*-",
        {**SQUARED, "position_embedding_type": "rope"},
        "position_embedding_type is 'rope', in NemotronHForCausalLM 'none'",
    ),
    "a gate": ("nemotron_h", "M*-", PLAIN, "gated_linear_unit is True, in NemotronHForCausalLM False"),
    "tied": (
        "nemotron_h",
        "M*-",
        {**SQUARED, "tie_word_embeddings": True},
        "tie_word_embeddings is True, in NemotronHForCausalLM False",
    ),
    "softmax": (
        "nemotron_h",
        "ME",
        {**SIGMOID, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        "moe_router_score_function is 'softmax', in NemotronHForCausalLM 'sigmoid'",
    ),
    "no shared expert": (
        "nemotron_h",
        "ME",
        {**SIGMOID, "moe_shared_expert_intermediate_size": None},
        "the mixtures have no shared expert, in NemotronHForCausalLM they always have one",
    ),
    "heads for further tokens": (
        "nemotron_h",
        "M*",
        {**PLAIN, "mtp_num_layers": 1, "mtp_layer_pattern": "M"},
        "mtp_num_layers is 1, in NemotronHForCausalLM None",
    ),
    "a GPT's kin": ("llama", "M-", {}, "it is a hybrid whose layers are M-, LlamaForCausalLM is a GPT"),
}


@pytest.mark.parametrize("case", NOT_LOWERED)
def test_what_a_family_cannot_compute_is_refused_in_words(case: str, tmp_path: Path) -> None:
    family, layers, changes, words = NOT_LOWERED[case]
    assert words in refusal_to_lower(tiny_hybrid("mamba", hybrid_layer_pattern=layers, **changes), family, tmp_path)


def test_multi_latent_attention_is_none_of_nemotrons(tmp_path: Path) -> None:
    words = refusal_to_lower(tiny_hybrid("latents"), "nemotron_h", tmp_path)
    assert "layer 1 is multi-latent attention where NemotronHForCausalLM has a mixer, attention, an MLP" in words


def test_a_gpt_is_none_of_bambas(tmp_path: Path) -> None:
    words = refusal_to_lower(tiny(), "bamba", tmp_path)
    assert "it is a GPT, layers of BambaForCausalLM are of several kinds" in words


@pytest.mark.parametrize(("layers", "family"), [("MM", "mamba2"), ("M*E-", "nemotron_h"), ("M-*-", "bamba")])
def test_scales_about_zero_become_scales_about_one_in_all_norms_but_the_mixers(
    layers: str, family: str, tmp_path: Path
) -> None:
    options = {"mamba_num_groups": GROUPS, **({} if family == "bamba" else SIGMOID)}
    ours = tiny_hybrid("mamba", hybrid_layer_pattern=layers, layernorm_zero_centered_gamma=True, **options)
    ours.save_pretrained(tmp_path / "ours")
    plan = convert(tmp_path / "ours", tmp_path / "theirs", to=family)
    found = loaded(tmp_path / "theirs")
    torch.testing.assert_close(logits(found), logits(ours), atol=1e-5, rtol=1e-5)
    assert any("1 was added" in note for note in plan.notes)


def test_settings_without_effect_are_no_reason(tmp_path: Path) -> None:
    """Rotary positions without attention, Mamba-1's numbers in Mamba-2."""
    ours = tiny_hybrid("mamba", mamba_num_heads=12, mamba_num_groups=GROUPS, mamba_dt_rank=7)
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to="mamba2")
    assert (HYBRIDS["mamba"], config_of(tmp_path / "theirs")["expand"]) == ({"hybrid_layer_pattern": "MM"}, 3)
    torch.testing.assert_close(logits(loaded(tmp_path / "theirs")), logits(ours), atol=1e-5, rtol=1e-5)


def test_the_index_of_several_files_counts_parameters_without_the_bias_of_the_choice(tmp_path: Path) -> None:
    model("Nemotron-H").save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    convert(tmp_path / "ours", tmp_path / "back", to="nemotron_h", max_shard_size="20KB")
    first, last = (tmp_path / folder / "model.safetensors.index.json" for folder in ("theirs", "back"))
    assert json.loads(first.read_text())["metadata"] == json.loads(last.read_text())["metadata"]


@pytest.mark.parametrize("case", ["Mamba", "Mamba-2", "Bamba", "Nemotron-H"])
def test_a_model_becomes_a_checkpoint_of_megatrons_and_goes_back_in_the_same_bytes(case: str, tmp_path: Path) -> None:
    model(case).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "megatron", to="megatron", format="torch", tp=GROUPS)
    convert(tmp_path / "megatron", tmp_path / "back", to=CASES[case][0].model_type)
    first, last = (tmp_path / folder / "model.safetensors" for folder in ("theirs", "back"))
    assert first.read_bytes() == last.read_bytes()


SAID_ON_THE_HUB: dict[str, tuple[str, dict[str, Any]]] = {
    "state-spaces/mamba-130m-hf": (
        "Mamba",
        {
            "d_inner": 64, "d_model": 32, "fused_add_norm": True, "intermediate_size": 64, "n_layer": 3,
            "pad_vocab_size_multiple": 8, "rms_norm": True, "ssm_cfg": {}, "torch_dtype": "float32",
        },
    ),
    "nvidia/Nemotron-H-8B-Base-8K": (
        "Nemotron-H",
        {
            "attention_head_dim": 8, "rms_norm_eps": 1e-5, "time_step_limit": [0.0, float("inf")],
            "time_step_rank": 256, "mamba_proj_bias": False, "use_mamba_kernels": True, "residual_in_fp32": False,
        },
    ),
    "ibm-ai-platform/Bamba-9B": ("Bamba", {"attn_rotary_emb": 64, "rope_theta": 10000.0, "rope_scaling": None}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID_ON_THE_HUB)
def test_a_config_of_the_hubs_says_nothing_unknown_and_changes_nothing(name: str, tmp_path: Path) -> None:
    case, more = SAID_ON_THE_HUB[name]
    expected = model(case)
    expected.save_pretrained(tmp_path / "theirs")
    plan = convert(change(tmp_path / "theirs", "rope_parameters", "head_dim", **more), tmp_path / "ours", to="hf")
    assert not plan.unknown_arguments
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["Mamba-2", "Bamba"])
def test_norms_of_groups_are_said_to_be_of_later_transformers(case: str, tmp_path: Path) -> None:
    key = {"Mamba-2": "n_groups", "Bamba": "mamba_n_groups"}[case]
    model(case, **{key: 4}).save_pretrained(tmp_path / "theirs")
    come = convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    gone = convert(tmp_path / "ours", tmp_path / "back", to=CASES[case][0].model_type)
    for plan in (come, gone):
        assert any(note.startswith(f"{key} is 4: Megatron, and transformers since 5.23, norm") for note in plan.notes)


@pytest.mark.parametrize("case", ["Mamba", "Nemotron-H"])
def test_the_embedding_is_known_by_its_older_name(case: str, tmp_path: Path) -> None:
    expected = model(case)
    expected.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/model.safetensors"
    stored = {name.replace("embeddings.", "embedding."): array for name, array in load_file(file).items()}
    assert "backbone.embedding.weight" in stored
    save_file(stored, file, {"format": "pt"})
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(expected), atol=1e-5, rtol=1e-5)


def test_a_base_model_saved_alone_is_taken_where_its_embedding_is_the_output(tmp_path: Path) -> None:
    expected = model("Mamba")
    expected.backbone.save_pretrained(tmp_path / "theirs")
    assert "embeddings.weight" in load_file(tmp_path / "theirs/model.safetensors")
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(expected), atol=1e-5, rtol=1e-5)
