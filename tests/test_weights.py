"""The table: every weight is one row, cut over tensor-parallel ranks and put together again without loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megahf.plan import runtime
from megahf.tiles import Tiled, join
from megahf.weights import GPT, Row, foreign, ignored, recognise, spellings, weights


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
    }
    return SimpleNamespace(**{**base, **changes})


def by_name(name: str) -> Row:
    return next(row for row in GPT if row.name == name)


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


LAYER = "decoder.layers.{l}"


@pytest.mark.parametrize("row", GPT, ids=[row.name for row in GPT])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@given(gated=st.booleans(), gate=st.booleans(), groups=st.sampled_from([1, 2, 4, 8]), width=st.integers(1, 3))
def test_what_is_split_merges_to_what_it_was(
    row: Row, ranks: int, gated: bool, gate: bool, groups: int, width: int
) -> None:
    config = settings(
        gated_linear_unit=gated, attention_output_gate=gate, num_query_groups=groups, ffn_hidden_size=8 * width
    )
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


@pytest.mark.parametrize("key, layer, stacked", SPELLED)
def test_a_norm_is_one_weight_in_all_its_spellings(key: str, layer: int | None, stacked: bool) -> None:
    found = recognise(key)
    assert found is not None
    assert found.row.name == f"{LAYER}.self_attention.linear_qkv.layer_norm_weight"
    assert (found.layer, found.stacked, found.part, found.parts) == (layer, stacked, 0, 1)


@pytest.mark.parametrize(
    "key, part", [("decoder.layers.1.mlp.linear_fc1.weight_w", 0), ("decoder.layers.mlp.linear_fc1.weight_v", 1)]
)
def test_gate_and_up_stored_apart_are_parts_of_one_weight(key: str, part: int) -> None:
    found = recognise(key)
    assert found is not None
    assert (found.row.name, found.part, found.parts) == (f"{LAYER}.mlp.linear_fc1.weight", part, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "model.module."])
@pytest.mark.parametrize("row", GPT, ids=[row.name for row in GPT])
def test_every_spelling_of_every_row_is_recognised_as_that_row_and_no_other(row: Row, prefix: str) -> None:
    for template in filter(None, (row.name, row.local, *row.blocks)):
        for key in {template.format(l=11), template.replace(".{l}", "")}:
            found = recognise(prefix + key)
            assert found is not None
            assert found.row is row
            assert found.layer == (11 if ".11." in key else None)
            assert found.stacked == ("{l}" in template and ".11." not in key)
            matching = {other.name for pattern, other, *_ in spellings() if pattern.fullmatch(prefix + key)}
            assert matching == {row.name}


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
    assert recognise(key) is None
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
    assert recognise(key) is None


@pytest.mark.parametrize("row", GPT, ids=[row.name for row in GPT])
def test_no_weight_is_left_out_or_taken_for_another_models(row: Row) -> None:
    assert ignored(row.name.format(l=0)) is None
    assert foreign(row.name.format(l=0)) is None


@pytest.mark.parametrize(
    "key, kind",
    [
        ("decoder.layers.0.mixer.in_proj.weight", "a hybrid Mamba model"),
        ("decoder.final_norm.weight", "a hybrid Mamba model"),
        ("decoder.layers.0.mlp.router.weight", "a mixture of experts"),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", "a mixture of experts"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "a mixture of experts"),
        ("decoder.layers.0.self_attention.linear_kv_down_proj.weight", "multi-latent attention"),
        ("mtp.layers.0.eh_proj.weight", "multi-token prediction"),
        ("vision_model.conv1.weight", "LLaVA"),
        ("language_model.decoder.layers.0.mlp.linear_fc1.weight", "LLaVA"),
        ("encoder.layers.0.mlp.linear_fc1.weight", "BERT or T5"),
    ],
)
def test_weights_of_models_to_come_are_known_by_name(key: str, kind: str) -> None:
    assert recognise(key) is None
    assert foreign(key) == kind


def test_stacked_layers_are_taken_apart_in_order() -> None:
    whole = numbered((3, 4, 2))
    tiled = join([Tiled.of(whole[:1]), Tiled.of(whole[1:])], 0)
    for layer in range(3):
        np.testing.assert_array_equal(tiled.take(layer).numpy(), whole[layer])


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
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=list(CONFIGS))
def test_the_models_parameters_are_the_rows_one_for_one(changes: dict[str, Any]) -> None:
    from megahf import McoreGPTConfig, McoreGPTForCausalLM

    sizes = {"vocab_size": 61, "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    config = McoreGPTConfig(**{**sizes, "max_position_embeddings": 40, **changes})
    with torch.device("meta"):
        model = McoreGPTForCausalLM(config)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {runtime(weight): weight.shape for weight in weights(config)} == parameters
