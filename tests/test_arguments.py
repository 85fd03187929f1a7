"""Megatron's arguments become the config of the model that was trained: judged by Megatron's own TransformerConfig."""

from __future__ import annotations

from typing import Any

import pytest
from small import megahf, rewrite, write_torch

from megahf.arguments import FIELDS, fields, notes, unknown, vocabulary
from megahf.errors import Refused
from megahf.judge import model, namespace

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "vocab_size": 101,
    "tokenizer_type": "NullTokenizer",
}
ROPE = {"position_embedding_type": "rope"}
CASES: dict[str, dict[str, Any]] = {
    "megatron's defaults": {},
    "no biases": {"add_bias_linear": False},
    "no biases but qkv": {"add_bias_linear": False, "add_qkv_bias": True},
    "exact gelu": {"bias_gelu_fusion": False},
    "swiglu": {"swiglu": True},
    "swiglu, unfused, clamped": {"swiglu": True, "bias_swiglu_fusion": False, "activation_func_clamp_value": 0.5},
    "squared relu": {"squared_relu": True, "bias_gelu_fusion": False},
    "quick geglu": {"quick_geglu": True, "bias_gelu_fusion": False, "glu_linear_offset": 1.0},
    "ffn": {"ffn_hidden_size": 96},
    "groups": {"group_query_attention": True, "num_query_groups": 2},
    "groups without the switch": {"num_query_groups": 2},
    "kv channels": {"kv_channels": 12},
    "rmsnorm": {"normalization": "RMSNorm", "layernorm_epsilon": 1e-6},
    "zero-centred": {"layernorm_zero_centered_gamma": True},
    "q and k norms": {"qk_layernorm": True},
    "l2 norm": {"qk_l2_norm": True, **ROPE},
    "output gate": {"attention_output_gate": True},
    "off by one": {"softmax_type": "off-by-one"},
    "sinks": {"softmax_type": "learnable"},
    "window": {"window_size": (7, 0), "window_attn_skip_freq": 2},
    "window list": {"window_size": (7, 0), "window_attn_skip_freq": [1, 0, 1, 1]},
    "interleaved": {"rotary_interleaved": True, **ROPE},
    "nope": {"no_rope_freq": [0, 0, 1, 1], **ROPE},
    "fp32 residual": {"fp32_residual_connection": True},
    "init": {"init_method_std": 0.01},
}
# Our field -> TransformerConfig's, where they mean the same.
SAME = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_query_groups",
    "kv_channels": "kv_channels",
    "normalization": "normalization",
    "layernorm_epsilon": "layernorm_epsilon",
    "layernorm_zero_centered_gamma": "layernorm_zero_centered_gamma",
    "add_bias_linear": "add_bias_linear",
    "gated_linear_unit": "gated_linear_unit",
    "activation_func_clamp_value": "activation_func_clamp_value",
    "glu_linear_offset": "glu_linear_offset",
    "qk_layernorm": "qk_layernorm",
    "qk_l2_norm": "qk_l2_norm",
    "attention_output_gate": "attention_output_gate",
    "softmax_type": "softmax_type",
    "window_size": "window_size",
    "window_attn_skip_freq": "window_attn_skip_freq",
    "rotary_interleaved": "rotary_interleaved",
    "no_rope_freq": "no_rope_freq",
    "fp32_residual_connection": "fp32_residual_connection",
    "init_method_std": "init_method_std",
}


def megatrons_activation(config: Any) -> str:
    """The function of MLP.forward: with the fused kernel, an unlabelled gelu is its tanh approximation."""
    name = {"gelu": "gelu", "silu": "silu", "squared_relu": "squared_relu", "quick_gelu": "quick_gelu"}[
        config.activation_func.__name__
    ]
    return "gelu_tanh" if name == "gelu" and config.bias_activation_fusion else name


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_every_field_is_the_one_megatron_builds_its_model_with(changes: dict[str, Any]) -> None:
    args = namespace.namespace({**SMALL, **changes})
    theirs, ours = model.config(args), fields(vars(args))
    for field, name in SAME.items():
        assert ours[field] == plain(getattr(theirs, name)), field
    assert ours["add_qkv_bias"] == bool(theirs.add_qkv_bias or theirs.add_bias_linear)
    assert ours["activation_func"] == megatrons_activation(theirs)
    assert ours["tie_word_embeddings"] is not args.untie_embeddings_and_output_weights


def test_sizes_megatron_fills_in_are_filled_in_the_same_when_a_file_lacks_them() -> None:
    for swiglu in (False, True):
        for hidden in (64, 100, 768, 2048, 4096):
            args = namespace.namespace({**SMALL, "hidden_size": hidden, "num_attention_heads": 4, "swiglu": swiglu})
            theirs = model.config(args)
            bare = {**vars(args), "ffn_hidden_size": None, "kv_channels": None}
            assert fields(bare)["ffn_hidden_size"] == theirs.ffn_hidden_size
            assert fields(bare)["kv_channels"] == theirs.kv_channels


BARE: dict[str, Any] = {  # what a Namespace of megatron-core 0.5 surely has
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    "old, field, value",
    [
        ({"norm_epsilon": 1e-6}, "layernorm_epsilon", 1e-6),
        ({"norm_epsilon": 1e-6, "layernorm_epsilon": 1e-3}, "layernorm_epsilon", 1e-3),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma", True),
        ({"use_rotary_position_embeddings": True}, "position_embedding_type", "rope"),
        ({"encoder_num_layers": 2, "num_layers": None}, "num_layers", 2),
        ({"rotary_base": 500000}, "rotary_base", 500000.0),
        ({}, "rotary_base", 10000.0),
        ({}, "position_embedding_type", "learned_absolute"),
        ({}, "normalization", "LayerNorm"),
        ({}, "add_qkv_bias", True),
        ({"add_bias_linear": False}, "add_qkv_bias", False),
        ({}, "num_query_groups", 4),
        ({}, "activation_func", "gelu_tanh"),
        ({"add_bias_linear": False}, "activation_func", "gelu"),
        ({"bias_gelu_fusion": False}, "activation_func", "gelu"),
        ({"untie_embeddings_and_output_weights": True}, "tie_word_embeddings", False),
    ],
)
def test_older_files_are_read_by_the_names_and_defaults_of_their_time(
    old: dict[str, Any], field: str, value: Any
) -> None:
    assert fields({**BARE, **old})[field] == value


@pytest.mark.parametrize(
    "stored, read",
    [
        (None, None),
        (4, 4),
        ("4", 4),
        ([1, 0, 0, 1], [1, 0, 0, 1]),
        ((1, 0), [1, 0]),
        ("[1,0,0,1]", [1, 0, 0, 1]),
        ("([0]*3+[1]*1)*2", [0, 0, 0, 1, 0, 0, 0, 1]),
        ("[1]*2+[0]", [1, 1, 0]),
        ("2*[0,1]", [0, 1, 0, 1]),
    ],
)
@pytest.mark.parametrize("name", ["no_rope_freq", "window_attn_skip_freq"])
def test_layer_patterns_are_numbers_lists_or_the_text_of_lists(name: str, stored: Any, read: Any) -> None:
    assert fields({**BARE, name: stored})[name] == read


@pytest.mark.parametrize(
    "text",
    [
        "every 4",
        "__import__('os')",
        "[x for x in (1,)]",
        "[1]*10**9",
        "[1]*99999999",
        "([1]*9999)*9999",
        "1+",
        "[1]*[2]",
        "4+[1]",
        "-" * 9999 + "1",
        "[[1]]",
        "['a']",
    ],
)
def test_what_is_no_pattern_is_refused_and_never_run(text: str) -> None:
    with pytest.raises(Refused, match="no_rope_freq"):
        fields({**BARE, "no_rope_freq": text})


@pytest.mark.parametrize(
    "stored, read", [(None, None), ((7, 0), [7, 0]), ("(7, 0)", [7, 0]), ((-1, -1), None), ((-1, 0), None)]
)
def test_windows(stored: Any, read: Any) -> None:
    assert fields({**BARE, "window_size": stored})["window_size"] == read


@pytest.mark.parametrize("window", [(7, 3), (7, -1), "7 and 0", (1, 2, 3), 7, ("a", 0), "[1"])
def test_a_window_that_is_not_one_back_in_time_is_refused(window: Any) -> None:
    with pytest.raises(Refused, match="window"):
        fields({**BARE, "window_size": window})


def test_mup_scales_as_its_config_does() -> None:
    """Numbers by hand from TransformerConfig: logits / width, attention by 1 / d instead of its root."""
    mup = {"use_mup": True, "hidden_size": 64, "mup_base_hidden_size": 16, "mup_embedding_mult": 3.0}
    made = fields({**BARE, **mup, "num_attention_heads": 4, "mup_output_mult": 1.0})
    assert (made["mup_output_mult"], made["mup_embedding_mult"], made["softmax_scale"]) == (0.25, 3.0, 1 / 16)
    assert fields({**BARE, **mup, "mup_output_mult": 0.5})["mup_output_mult"] == 0.5
    assert fields({**BARE, **mup, "mup_base_head_dim": 4.0})["softmax_scale"] == 2.0 / 16
    off = fields({**BARE, **mup, "use_mup": False, "mup_output_mult": 0.5})
    assert (off["mup_output_mult"], off["mup_embedding_mult"], off["softmax_scale"]) == (1.0, 1.0, None)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"moe_router_score_function": "tanh"}, "--moe-router-score-function tanh is a router that is not built"),
    ({"moe_router_load_balancing_type": "quantile_balancing"}, "quantile_balancing is a router that is not built"),
    ({"moe_router_load_balancing_type": ["aux_loss", "odd"]}, "['aux_loss', 'odd'] is a router that is not built"),
    ({"moe_router_dtype": "fp8"}, "--moe-router-dtype fp8 is a number format for routers that is not built"),
    ({"moe_token_drop_policy": "luck"}, "--moe-token-drop-policy luck"),
    ({"moe_router_force_load_balancing": True}, "routing at random"),
    ({"moe_router_force_biased": 0.1}, "routing at random"),
    ({"mtp_hsm": True}, "mixing of hidden states"),
    ({"rope_type": "mrope"}, "--rope-type mrope"),
    ({"use_grouped_gemm_for_dense_mlp": True}, "--use-grouped-gemm-for-dense-mlp True is gate and up by turns"),
    (
        {"multi_latent_attention": True, "rotary_scaling_factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        "--mscale and --mscale-all-dim differ",
    ),
    ({"linear_attention_freq": 4}, "linear attention"),
    ({"position_embedding_type": "mrope"}, "--position-embedding-type mrope"),
    ({"position_embedding_type": "relative"}, "--position-embedding-type relative"),
    ({"normalization": "L2Norm"}, "--normalization L2Norm"),
    ({"softmax_type": "sparse"}, "--softmax-type sparse"),
    ({"use_legacy_models": True}, "a model from before megatron-core"),
    ({"spec": ["some.module", "spec"]}, "layers from a module of your own"),
    ({"heterogeneous_layers_config_path": "x.json"}, "layers that differ from one another"),
]


@pytest.mark.parametrize("args, says", REFUSALS)
def test_what_is_not_built_is_refused_by_name(args: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as error:
        fields({**BARE, **args})
    assert says in str(error.value)


def test_everything_that_is_not_built_is_said_at_once() -> None:
    with pytest.raises(Refused) as error:
        fields({**BARE, "mtp_hsm": True, "moe_router_dtype": "fp8", "normalization": "L2Norm"})
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings"])
def test_a_size_that_is_missing_is_refused(name: str) -> None:
    with pytest.raises(Refused, match=f"the args do not say {name}"):
        fields({key: value for key, value in BARE.items() if key != name})


@pytest.mark.parametrize(
    "args",
    [
        {"hidden_size": "big"},
        {"hidden_size": object()},
        {"num_layers": 0},
        {"num_layers": 2.0},
        {"num_attention_heads": 0},
        {"ffn_hidden_size": -4},
        {"kv_channels": [8]},
        {"rotary_base": "x"},
    ],
)
def test_an_argument_of_the_wrong_kind_is_refused_with_its_name(args: dict[str, Any]) -> None:
    with pytest.raises(Refused, match=next(iter(args))):
        fields({**BARE, **args})


def test_every_argument_of_megatrons_main_is_known() -> None:
    assert unknown(namespace.defaults()) == []
    assert unknown({**namespace.defaults(), "my_own": 1, "another": None}) == ["another", "my_own"]


def test_no_two_rows_fill_one_field() -> None:
    names = [row.field for row in FIELDS]
    assert len(names) == len(set(names))


def test_unknown_arguments_are_reported_and_refused_when_strict(tmp_path: Any) -> None:
    write_torch(tmp_path / "ckpt")
    rewrite(tmp_path / "ckpt", lambda content: setattr(content["args"], "my_own", 3))
    said = megahf("convert", tmp_path / "ckpt", tmp_path / "hf", "--dry-run")
    assert said.exit_code == 0
    assert "my_own" in said.output
    refused = megahf("convert", tmp_path / "ckpt", tmp_path / "hf", "--strict")
    assert refused.exit_code == 1
    assert "my_own" in refused.stderr
    assert not (tmp_path / "hf").exists()


def test_the_vocabulary_is_the_asked_one_then_the_tokenizers_then_that_of_the_args_then_all_rows() -> None:
    args = {"vocab_size": 61}
    assert vocabulary(args, 64, asked=50, tokenizer=55) == (50, "as asked for")
    assert vocabulary(args, 64, tokenizer=55) == (55, "the tokenizer's")
    assert vocabulary(args, 64) == (61, "from the args")
    assert vocabulary({}, 64) == (64, "unknown: all rows kept, padding included")


@pytest.mark.parametrize("asked", [65, 0, -1])
def test_a_vocabulary_that_is_not_stored_is_refused(asked: int) -> None:
    with pytest.raises(Refused, match=rf"a vocabulary of {asked} \(as asked for\) does not fit the 64 rows stored"):
        vocabulary({}, 64, asked=asked)


def test_what_megatron_runs_otherwise_than_asked_is_noted() -> None:
    assert notes({}) == []
    (note,) = notes({"use_rope_scaling": True, "rope_scaling_factor": 32.0})
    assert "32.0 has no effect" in note
    assert fields({**BARE, "use_rope_scaling": True, "rope_scaling_factor": 32.0})["rope_scaling_factor"] == 8.0
