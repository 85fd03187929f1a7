"""The table: every weight is one row, cut over tensor-parallel ranks and put together again without loss."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megahf.plan import runtime
from megahf.recognition import Found, foreign, ignored, recognise, spellings
from megahf.rows import IMAGES, Row
from megahf.tiles import Tiled, join
from megahf.weights import LLAVA, TABLE, weights

ROWS = (*TABLE, *LLAVA)


def settings(**changes: Any) -> SimpleNamespace:
    """A config with every size a multiple of 8, so that 8 ranks can share it."""
    base = {
        "vocab_size": 128,
        "max_position_embeddings": 24,
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "kv_channels": 8,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "gated_linear_unit": True,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "qk_layernorm": True,
        "attention_output_gate": False,
        "softmax_type": "learnable",
        "position_embedding_type": "learned_absolute",
        "tie_word_embeddings": False,
        "multi_latent_attention": False,
        "q_lora_rank": 16,
        "kv_lora_rank": 24,
        "qk_head_dim": 6,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 4,
        "qk_l2_norm": False,
        "num_experts": 5,
        "moe_layer_freq": 1,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 8,
        "moe_shared_expert_gate": True,
        "moe_latent_size": None,
        "moe_router_bias": True,
        "moe_router_enable_expert_bias": True,
        "mtp_num_layers": 2,
        "mtp_use_repeated_layer": False,
    }
    return SimpleNamespace(**{**base, **changes})


# A hybrid's own sizes, which 8 ranks can share too.
HYBRID: dict[str, Any] = {
    "num_layers": 4, "hybrid_layer_pattern": "M*-E", "mtp_layer_pattern": "EM-*", "mamba_version": 2,
    "mamba_num_heads": 8, "mamba_head_dim": 4, "mamba_num_groups": 8, "mamba_state_dim": 3, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_dt_rank": None, "mamba_d_has_hdim": False, "mamba_rmsnorm": True,
    "mamba_conv_bias": True,
}  # fmt: skip
MAMBA_1: dict[str, Any] = {**HYBRID, "mamba_version": 1, "mamba_num_heads": None, "mamba_dt_rank": 5}


def by_name(name: str) -> Row:
    return next(row for row in TABLE if row.name == name)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


LAYER = "decoder.layers.{l}"


def model_of(row: Row) -> dict[str, Any]:
    """What `settings` needs for a model that has `row`."""
    words = row.when.split(", ")
    return MAMBA_1 if "mixer 1" in words else HYBRID if {"mixer", "hybrid"} & set(words) else {}


@pytest.mark.parametrize("row", TABLE, ids=[f"{row.name}, {row.when}" for row in TABLE])
@hypothesis.settings(max_examples=40)
@given(
    ranks=st.sampled_from([1, 2, 4, 8]), gated=st.booleans(), gate=st.booleans(),
    groups=st.sampled_from([1, 2, 4, 8]), width=st.integers(1, 3),
)  # fmt: skip
def test_what_is_split_merges_to_what_it_was(
    row: Row, ranks: int, gated: bool, gate: bool, groups: int, width: int
) -> None:
    changes = {"attention_output_gate": gate, "num_query_groups": groups, "ffn_hidden_size": 8 * width}
    mixer = {"mamba_state_dim": 8 * width, "mamba_num_groups": groups, "mamba_d_has_hdim": gate}
    config = settings(**{**model_of(row), **changes, **mixer}, gated_linear_unit=gated)
    array = numbered(row.dims(config))
    pieces = row.cut.split(Tiled.of(array), config, ranks)
    assert len(pieces) == ranks
    np.testing.assert_array_equal(row.cut.merge(pieces, config).numpy(), array)
    if row.cut.dim is not None:
        assert sum(piece.nbytes for piece in pieces) == array.nbytes


def test_gate_and_up_are_cut_each_on_its_own() -> None:
    config = settings(ffn_hidden_size=4, hidden_size=1)
    row = by_name(f"{LAYER}.mlp.linear_fc1.weight")
    gate, up = [[0], [1], [2], [3]], [[10], [11], [12], [13]]
    pieces = row.cut.split(Tiled.of(np.array(gate + up)), config, 2)
    assert [piece.numpy().tolist() for piece in pieces] == [gate[:2] + up[:2], gate[2:] + up[2:]]


def test_an_ungated_fc1_is_cut_in_one() -> None:
    config = settings(gated_linear_unit=False, ffn_hidden_size=4)
    row = by_name(f"{LAYER}.mlp.linear_fc1.bias")
    pieces = row.cut.split(Tiled.of(np.arange(4)), config, 2)
    assert [piece.numpy().tolist() for piece in pieces] == [[0, 1], [2, 3]]


def test_a_rank_holds_whole_query_groups_of_linear_qkv() -> None:
    """Rows as Megatron packs them, group by group: q q k v | q q k v, one channel a head."""
    config = settings(num_attention_heads=4, num_query_groups=2, kv_channels=1, hidden_size=1)
    row = by_name(f"{LAYER}.self_attention.linear_qkv.weight")
    packed = np.array([[100], [101], [110], [120], [200], [201], [210], [220]])
    assert row.dims(config) == (8, 1)
    pieces = row.cut.split(Tiled.of(packed), config, 2)
    assert [piece.numpy()[:, 0].tolist() for piece in pieces] == [[100, 101, 110, 120], [200, 201, 210, 220]]


def test_more_ranks_than_query_groups_cut_through_a_group() -> None:
    """Megatron stores plain rows of the packed weight then: rank 0 has q q and rank 1 has k v."""
    config = settings(num_attention_heads=2, num_query_groups=1, kv_channels=1)
    row = by_name(f"{LAYER}.self_attention.linear_qkv.bias")
    pieces = row.cut.split(Tiled.of(np.array([100, 101, 110, 120])), config, 2)
    assert [piece.numpy().tolist() for piece in pieces] == [[100, 101], [110, 120]]


def test_an_output_gate_doubles_the_queries() -> None:
    row = by_name(f"{LAYER}.self_attention.linear_qkv.weight")
    assert row.dims(settings()) == ((8 + 4 + 4) * 8, 16)
    assert row.dims(settings(attention_output_gate=True)) == ((8 + 8 + 4 + 4) * 8, 16)


def test_the_components_of_a_mixers_first_matrix_are_cut_each_on_its_own() -> None:
    """z z z z | x x x x | B B | C C | dt dt: 2 heads of 2 channels, 2 groups of 1 state, hidden size 1."""
    sizes = {"mamba_num_heads": 2, "mamba_head_dim": 2, "mamba_num_groups": 2, "mamba_state_dim": 1, "hidden_size": 1}
    config = settings(**{**HYBRID, **sizes})
    row = by_name(f"{LAYER}.mixer.in_proj.weight")
    packed = np.array([[100], [101], [102], [103], [110], [111], [112], [113], [20], [21], [30], [31], [40], [41]])
    assert row.dims(config) == (14, 1)
    pieces = row.cut.split(Tiled.of(packed), config, 2)
    assert [piece.numpy()[:, 0].tolist() for piece in pieces] == [
        [100, 101, 110, 111, 20, 30, 40],
        [102, 103, 112, 113, 21, 31, 41],
    ]


def test_the_channels_of_a_convolution_are_cut_each_on_their_own() -> None:
    """x x x x | B B | C C."""
    sizes = {"mamba_num_heads": 2, "mamba_head_dim": 2, "mamba_num_groups": 2, "mamba_state_dim": 1}
    config = settings(**{**HYBRID, **sizes})
    row = by_name(f"{LAYER}.mixer.conv1d.bias")
    pieces = row.cut.split(Tiled.of(np.array([110, 111, 112, 113, 20, 21, 30, 31])), config, 2)
    assert [piece.numpy().tolist() for piece in pieces] == [[110, 111, 20, 30], [112, 113, 21, 31]]


def test_the_first_matrix_of_mamba_1_is_channels_and_gate() -> None:
    config = settings(**MAMBA_1)
    row = next(row for row in TABLE if row.name == f"{LAYER}.mixer.in_proj.weight" and row.when == "mixer 1")
    assert row.dims(config) == (2 * 2 * 16, 16)
    pieces = row.cut.split(Tiled.of(np.array([0, 1, 10, 11])), config, 2)
    assert [piece.numpy().tolist() for piece in pieces] == [[0, 10], [1, 11]]


@pytest.mark.parametrize("name", [f"{LAYER}.self_attention.linear_proj.weight", f"{LAYER}.mlp.linear_fc2.weight"])
def test_row_parallel_weights_are_cut_by_columns(name: str) -> None:
    pieces = by_name(name).cut.split(Tiled.of(np.array([[0, 1, 2, 3], [10, 11, 12, 13]])), settings(), 2)
    assert [piece.numpy().tolist() for piece in pieces] == [[[0, 1], [10, 11]], [[2, 3], [12, 13]]]


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_the_vocabulary_is_cut_by_rows(name: str) -> None:
    pieces = by_name(name).cut.split(Tiled.of(np.array([[0], [1], [2], [3]])), settings(), 4)
    assert [piece.numpy().tolist() for piece in pieces] == [[[0]], [[1]], [[2]], [[3]]]


@pytest.mark.parametrize("name", [f"{LAYER}.self_attention.linear_proj.bias", f"{LAYER}.mlp.linear_fc2.bias"])
def test_biases_after_a_sum_over_ranks_are_whole_on_each(name: str) -> None:
    pieces = by_name(name).cut.split(Tiled.of(np.arange(3)), settings(), 4)
    assert [piece.numpy().tolist() for piece in pieces] == [[0, 1, 2]] * 4


def test_a_weight_that_does_not_divide_is_said_with_its_numbers() -> None:
    with pytest.raises(ValueError, match="6 places along axis 0 do not divide by 4"):
        by_name("output_layer.weight").cut.split(Tiled.of(np.zeros((6, 2))), settings(), 4)


SPELLED = [
    ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", 3, False),
    ("decoder.layers.3.input_layernorm.weight", 3, False),
    ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", None, True),
    ("decoder.layers.input_layernorm.weight", None, True),
    ("module.decoder.layers.12.input_layernorm.weight", 12, False),
    ("module.module.decoder.layers.0.input_layernorm.weight", 0, False),
    ("model.decoder.layers.7.input_layernorm.weight", 7, False),
]


def named(key: str, name: str) -> Found:
    """What `key` is, as a spelling of the weight `name`."""
    (found,) = (found for found in recognise(key) if found.row.name == name)
    return found


@pytest.mark.parametrize("key, layer, stacked", SPELLED)
def test_a_norm_is_one_weight_in_all_its_spellings(key: str, layer: int | None, stacked: bool) -> None:
    found = named(key, f"{LAYER}.self_attention.linear_qkv.layer_norm_weight")
    assert (found.layer, found.stacked, found.spelling.part, found.spelling.parts) == (layer, stacked, 0, 1)


@pytest.mark.parametrize(
    "key, part", [("decoder.layers.1.mlp.linear_fc1.weight_w", 0), ("decoder.layers.mlp.linear_fc1.weight_v", 1)]
)
def test_gate_and_up_stored_apart_are_parts_of_one_weight(key: str, part: int) -> None:
    (found,) = recognise(key)
    assert (found.row.name, found.spelling.part, found.spelling.parts) == (f"{LAYER}.mlp.linear_fc1.weight", part, 2)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.name}, {row.when}" for row in ROWS])
def test_every_spelling_of_every_row_is_recognised_as_that_row(row: Row) -> None:
    for spelling, prefix in product(row.spellings, ("", "module.", "model.", "model.module.")):
        keys = {spelling.key.format(l=11, e=12, k=13)}
        if row.stack in ("decoder", IMAGES):
            keys.add(spelling.key.replace(".{l}", "").format(e=12))
        for key in keys:
            found = next(one for one in recognise(prefix + key) if one.row is row and one.spelling == spelling)
            assert found.layer == (11 if ".11." in key else None)
            assert found.expert == (12 if "{e}" in spelling.key else None)
            assert found.stacked == (row.stack in ("decoder", IMAGES) and ".11." not in key)
            every = spellings(bool(row.part)).values()
            matching = {id(other) for ways in every for way, other, *_ in ways if way.fullmatch(key)}
            assert {id(one.row) for one in recognise(prefix + key)} == matching


MODELS: dict[str, dict[str, Any]] = {
    "dense": {"num_experts": None},
    "experts": {},
    "experts in some layers": {"moe_layer_freq": [0, 1]},
    "latents": {"multi_latent_attention": True},
    "latents, straight queries, no norms": {
        "multi_latent_attention": True,
        "q_lora_rank": None,
        "qk_layernorm": False,
    },
    "hybrid": HYBRID,
    "hybrid with latents": {
        **HYBRID,
        "hybrid_layer_pattern": "M+-E",
        "mtp_layer_pattern": "+M-E",
        "multi_latent_attention": True,
    },
    "hybrid of Mamba-1": MAMBA_1,
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))
def test_in_one_model_a_key_is_one_weight_but_the_fused_matrix_of_latents(changes: dict[str, Any]) -> None:
    config = settings(**changes)
    for row, layer in product(TABLE, range(config.num_layers)):
        for spelling in row.spellings if row.exists(config, layer) else ():
            key = spelling.key.format(l=layer, e=0, k=0)
            found = {one.row.name for one in recognise(key) if one.row.exists(config, layer)}
            assert len(found) == 1 + ("linear_qkv_down_proj.weight" in key and config.q_lora_rank is not None), key


@pytest.mark.parametrize(
    "key, layout, expert",
    [
        ("mlp.experts.local_experts.3.linear_fc1.weight", "sequential", 3),
        ("mlp.experts.linear_fc1.weight13", "te-grouped", 13),
        ("mlp.experts.linear_fc1.weight", "packed", None),
        ("mlp.experts.weight1", "legacy-grouped", None),
        ("mlp.experts.experts.linear_fc1.weight", "distributed", None),
        ("mlp.experts.experts.3.linear_fc1.weight", "singleton", 3),
        ("mlp.experts.experts.3.linear_fc1.weight_v", "singleton", 3),
        ("mlp.experts.linear_fc1.weight13_w", "te-grouped", 13),
        ("mlp.experts.local_experts.3.linear_fc1.weight_w", "sequential", 3),
    ],
)
@pytest.mark.parametrize("at", ["decoder.layers.4", "mtp.layers.0.transformer_layer", "mtp.layers.0.mtp_model_layer"])
def test_every_layout_of_experts_is_the_same_weight(at: str, key: str, layout: str, expert: int | None) -> None:
    (found,) = recognise(f"{at}.{key}")
    assert found.row.name.endswith("mlp.experts.linear_fc1.weight")
    assert (found.spelling.layout, found.expert) == (layout, expert)


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.x.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc1.weight.extra",
        "xdecoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_gain",
        "embedding.word_embeddings.weights",
        "",
    ],
)
def test_what_is_no_spelling_is_not_recognised(key: str) -> None:
    assert recognise(key) == ()
    assert ignored(key) is None


@pytest.mark.parametrize(
    "key",
    [
        "decoder.layers.0.mlp.linear_fc1._extra_state",
        "decoder.layers.mlp.linear_fc1._extra_state/shard_3_4",
        "module.decoder.layers.0.self_attention.core_attention._extra_state",
        "rotary_pos_emb.inv_freq",
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight",
        "chained_0.optimizer.state.fp32_param.output_layer.weight",
        "rng_state/shard_0.0_1.1",
    ],
)
def test_what_is_left_out_has_a_reason(key: str) -> None:
    assert ignored(key)
    assert recognise(key) == ()


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.name}, {row.when}" for row in ROWS])
def test_no_weight_is_left_out_or_taken_for_another_models(row: Row) -> None:
    assert ignored(row.name.format(l=0, k=0)) is None
    assert foreign(row.name.format(l=0, k=0)) is None


@pytest.mark.parametrize(
    "key, kind",
    [
        ("decoder.layers.0.mlp.router.qb_beta", "quantile balancing of experts"),
        ("vision_model.video_embedder.weight", "an encoder of videos"),
        ("vision_model.model.layers.0.fc1.weight", "transformers' own models inside Megatron's LLaVA"),
        ("vision_model.patch_embed.proj.weight", "an image encoder of Megatron's that is not built"),
        ("sound_model.conv.weight", "a LLaVA that hears"),
        ("decoder.layers.0.cross_attention.linear_q.weight", "T5"),
    ],
)
def test_weights_of_models_to_come_are_known_by_name(key: str, kind: str) -> None:
    assert recognise(key) == ()
    assert foreign(key) == kind


def test_stacked_layers_are_taken_apart_in_order() -> None:
    whole = numbered((3, 4, 2))
    tiled = join([Tiled.of(whole[:1]), Tiled.of(whole[1:])], 0)
    for layer in range(3):
        np.testing.assert_array_equal(tiled.take(layer).numpy(), whole[layer])


EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24, "gated_linear_unit": True}
LATENTS: dict[str, Any] = {
    "multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8, "position_embedding_type": "rope",
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 untied": {"tie_word_embeddings": False},
    "no biases": {"add_bias_linear": False},
    "qkv bias": {"add_bias_linear": False, "add_qkv_bias": True},
    "rmsnorm": {"normalization": "RMSNorm", "qk_layernorm": True},
    "q and k norms with biases": {"qk_layernorm": True},
    "l2 norm": {"qk_l2_norm": True},
    "gated": {"gated_linear_unit": True, "activation_func": "silu"},
    "rope": {"position_embedding_type": "rope"},
    "no positions": {"position_embedding_type": "none"},
    "sinks": {"softmax_type": "learnable"},
    "off by one": {"softmax_type": "off-by-one"},
    "output gate": {"attention_output_gate": True},
    "multi-query, wide heads": {"num_query_groups": 1, "kv_channels": 24},
    "experts": {**EXPERTS, "add_bias_linear": False},
    "experts with biases": {**EXPERTS, "moe_router_bias": True},
    "experts in some layers": {**EXPERTS, "moe_layer_freq": [0, 1, 1]},
    "shared experts, expert bias": {
        **EXPERTS,
        "add_bias_linear": False,
        "moe_shared_expert_intermediate_size": 24,
        "moe_shared_expert_gate": True,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "latent experts": {**EXPERTS, "add_bias_linear": False, "moe_latent_size": 16},
    "latents": LATENTS,
    "latents, straight queries": {**LATENTS, "q_lora_rank": None},
    "latents with norms and biases": {**LATENTS, "qk_layernorm": True},
    "further heads": {**EXPERTS, "add_bias_linear": False, "mtp_num_layers": 2, "moe_layer_freq": [1, 0, 1]},
    "one head for all": {"mtp_num_layers": 2, "mtp_use_repeated_layer": True},
}


MIXERS: dict[str, Any] = {"mamba_num_groups": 2, "mamba_head_dim": 8, "mamba_state_dim": 4}
HYBRIDS: dict[str, dict[str, Any]] = {
    "mixers alone": {"hybrid_layer_pattern": "MMM"},
    "every kind of layer": {**EXPERTS, "hybrid_layer_pattern": "M*-E"},
    "latents and LayerNorm": {**LATENTS, "hybrid_layer_pattern": "M+-", "qk_layernorm": True},
    "no biases, no gated norm": {
        "hybrid_layer_pattern": "M*-",
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "mamba_rmsnorm": False,
        "mamba_conv_bias": False,
        "mamba_d_has_hdim": True,
        "mamba_d_conv": 3,
    },
    "heads given": {"hybrid_layer_pattern": "M*", "mamba_num_heads": 6},
    "further heads": {"hybrid_layer_pattern": "M*-", "mtp_layer_pattern": "*M", "mtp_num_layers": 2},
    "one further head for all": {
        "hybrid_layer_pattern": "M*-",
        "mtp_layer_pattern": "-M*",
        "mtp_num_layers": 2,
        "mtp_use_repeated_layer": True,
    },
    "mixers of Mamba-1": {"hybrid_layer_pattern": "M*-", "mamba_version": 1},
}
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 40}


def check_parameters(model_class: Any, config: Any) -> None:
    with torch.device("meta"):
        model = model_class(config)
    saved, named = model.state_dict(), (*model.named_parameters(), *model.named_buffers())
    held = {name: tuple(value.shape) for name, value in named if name in saved}
    assert {runtime(weight): weight.shape for weight in weights(config)} == held


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=list(CONFIGS))
def test_the_models_parameters_are_the_rows_one_for_one(changes: dict[str, Any]) -> None:
    from megahf import McoreGPTConfig, McoreGPTForCausalLM

    check_parameters(McoreGPTForCausalLM, McoreGPTConfig(**{**SIZES, "num_layers": 3, **changes}))


@pytest.mark.parametrize("changes", HYBRIDS.values(), ids=list(HYBRIDS))
def test_a_hybrids_parameters_are_the_rows_one_for_one(changes: dict[str, Any]) -> None:
    from megahf import McoreHybridConfig, McoreHybridForCausalLM

    check_parameters(McoreHybridForCausalLM, McoreHybridConfig(**{**SIZES, **MIXERS, **changes}))
