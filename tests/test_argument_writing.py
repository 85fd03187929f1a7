"""A config becomes the arguments of Megatron's that it is read from again, field for field; what cannot is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
from every_kind import GPTS, HYBRIDS, KINDS, config_of
from hypothesis import assume, given
from hypothesis import strategies as st

from megahf.arguments import FIELDS, arguments_of, config, unsaid
from megahf.errors import Refused
from megahf.grid_arguments import grid, grid_arguments
from megahf.hybrid import MIXER, UNRECORDED
from megahf.layouts import Grid, layers
from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.configuration_mcore_hybrid import McoreHybridConfig

WITH_MEGATRON = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)


def changed(kind: str, **changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(config_of(kind)), **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_read_back_as_it_was(kind: str) -> None:
    wanted = config_of(kind)
    assert vars(config(arguments_of(wanted), wanted.vocab_size)) == vars(wanted)


@WITH_MEGATRON
@pytest.mark.parametrize("kind", GPTS)
def test_megatron_makes_the_same_config_of_them_as_of_those_they_are_read_from(kind: str) -> None:
    """All fields of its TransformerConfig, but for those of how it runs."""
    from megahf.judge import model, namespace

    ours = {**arguments_of(config_of(kind)), "vocab_size": 101, "seq_length": 24}
    theirs = {name: value for name, value in KINDS[kind].items() if name != "tokenizer_type"}
    made, wanted = (vars_of(model.config(namespace.namespace(each))) for each in (ours, theirs))
    free = {"moe_token_dispatcher_type", "moe_pad_expert_input_to_capacity", "init_method", "output_layer_init_method"}
    free |= {"embedding_init_method", "bias_activation_fusion"} | MORE_SCALING
    assert {name: value for name, value in made.items() if wanted[name] != value and name not in free} == {}


MORE_SCALING = {"apply_query_key_layer_scaling", "attention_softmax_in_fp32"}  # both undone again in the softmax


def vars_of(made: Any) -> dict[str, Any]:
    return {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}


FLAGS = st.booleans()
WIDTH = st.sampled_from([8, 24, 40])
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "num_attention_heads": st.sampled_from([4, 8]),
    "group_query_attention": FLAGS,
    "num_query_groups": st.sampled_from([1, 2, 4]),
    "kv_channels": st.none() | WIDTH,
    "ffn_hidden_size": st.none() | WIDTH,
    "position_embedding_type": st.sampled_from(["learned_absolute", "rope", "yarn", "none"]),
    "use_rotary_position_embeddings": FLAGS,
    "rotary_base": st.sampled_from([10000, 500000, 0.5]),
    "rotary_percent": st.floats(0.1, 1.0),
    "rotary_seq_len_interpolation_factor": st.none() | st.integers(1, 8),
    "rotary_scaling_factor": st.none() | st.floats(1, 64),
    "yarn_original_max_position_embeddings": st.none() | st.integers(1, 4096),
    "yarn_beta_fast": st.none() | st.floats(1, 64),
    "yarn_correction_range_round_to_int": st.none() | FLAGS,
    "mscale": st.none() | st.floats(0, 2),
    "mscale_all_dim": st.none() | st.floats(0, 2),
    "rope_type": st.none() | st.sampled_from(["rope", "yarn"]),
    "multi_latent_attention": FLAGS,
    "no_rope_freq": st.none() | st.integers(1, 4) | st.lists(st.integers(0, 1), min_size=4, max_size=4),
    "window_size": st.none() | st.tuples(st.integers(-1, 9), st.just(0)),
    "window_attn_skip_freq": st.none() | st.integers(1, 4) | st.just("[1,0]*2"),
    "add_bias_linear": FLAGS,
    "add_qkv_bias": FLAGS,
    "bias_gelu_fusion": FLAGS,
    "swiglu": FLAGS,
    "squared_relu": FLAGS,
    "quick_geglu": FLAGS,
    "activation_func_clamp_value": st.none() | st.floats(0.1, 9),
    "untie_embeddings_and_output_weights": FLAGS,
    "use_mup": FLAGS,
    "mup_base_hidden_size": st.none() | st.sampled_from([16, 48]),
    "mup_base_head_dim": st.none() | st.floats(0.1, 300),
    "mup_attn_scale_power": st.floats(0, 1),
    "mup_embedding_mult": st.floats(0.1, 30),
    "mup_output_mult": st.just(1.0) | st.floats(0.1, 30),
    "num_experts": st.none() | st.sampled_from([0, 4]),
    "moe_ffn_hidden_size": st.none() | WIDTH,
    "moe_layer_freq": st.integers(1, 3) | st.just([0, 1, 1, 0]) | st.just("([0]+[1])*2"),
    "moe_router_load_balancing_type": st.sampled_from(["none", "aux_loss", ["seq_aux_loss"]]),
    "moe_expert_capacity_factor": st.none() | st.just(-1.0) | st.floats(0.5, 2),
    "mtp_num_layers": st.none() | st.integers(0, 2),
    "layernorm_epsilon": st.floats(1e-8, 1e-2),
}


@given(st.fixed_dictionaries({}, optional=OPTIONS))
def test_whatever_arguments_a_config_is_read_from_it_is_read_from_those_written_of_it(args: dict[str, Any]) -> None:
    given = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 16, **args}
    try:
        wanted = config({"rope_type": None, **given}, 11)
    except Refused:
        assume(False)
    made = config(arguments_of(wanted), 11)
    if wanted.softmax_scale is None and made.softmax_scale is not None:  # said by muP: the same number
        assert made.softmax_scale == 1.0 / wanted.kv_channels**0.5
        made.softmax_scale = None
    assert vars(made) == vars(wanted)


def test_the_model_classes_have_no_field_that_is_not_written_but_what_says_how_they_are_used() -> None:
    """Read off the classes, whose fields transformers writes into config.json."""
    used = {"use_cache", "loss_chunk_size", "bos_token_id", "eos_token_id", "pad_token_id"}
    ours = {row.field for row in FIELDS} | {"vocab_size"} | used
    assert set(vars(McoreGPTConfig)["__annotations__"]) == ours
    hybrids = {*MIXER, *UNRECORDED, "hybrid_layer_pattern", "mtp_layer_pattern", "num_layers"}
    assert set(vars(McoreHybridConfig)["__annotations__"]) == hybrids


@pytest.mark.parametrize(
    "made", [McoreGPTConfig(), McoreHybridConfig(hybrid_layer_pattern="M-M*")], ids=["gpt", "hybrid"]
)
def test_configs_of_the_model_classes_are_written_as_well(made: Any) -> None:
    read = config(arguments_of(made), made.vocab_size)
    assert {name: value for name, value in vars(read).items() if getattr(made, name) != value} == {}


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"activation_func": "gelu_tanh", "gated_linear_unit": False}, "approximates gelu by tanh where it fuses"),
    ("llama", {"gated_linear_unit": False}, "gated_linear_unit is False: Megatron's silu and quick_gelu are gated"),
    ("gpt2", {"gated_linear_unit": True}, "gated_linear_unit is True"),
    ("gpt2", {"add_qkv_bias": False}, "add_qkv_bias is False: with add_bias_linear Megatron always has it"),
    ("llama31", {"rope_scaling_factor": 32.0}, "rope_scaling_factor is 32.0: Megatron's builders always run 8"),
    ("mla", {"yarn_original_max_position_embeddings": 163840}, "multi-latent attention of Megatron's has no argument"),
    ("mla", {"yarn_beta_fast": 16.0}, "yarn_beta_fast is 16.0"),
    ("yarn", {"yarn_mscale": None}, "yarn_mscale is None"),
    ("mixtral", {"moe_router_bias": True}, "moe_router_bias is True: Megatron's routers have a bias where add_bias"),
    ("nemotron_h", {"use_rope_scaling": True}, "use_rope_scaling is True: no builder of Megatron's hybrids"),
    ("nemotron_h", {"mamba_proj_bias": True}, "mamba_proj_bias is True"),
]


@pytest.mark.parametrize("kind, changes, says", REFUSALS)
def test_a_field_that_no_argument_says_is_refused_by_name_with_its_value(
    kind: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(Refused) as error:
        arguments_of(changed(kind, **changes))
    assert says in str(error.value)


def test_all_such_fields_are_refused_at_once() -> None:
    with pytest.raises(Refused) as error:
        arguments_of(changed("llama", rope_scaling_factor=4.0, gated_linear_unit=False, moe_router_bias=True))
    assert [problem.what.split()[0] for problem in error.value.problems] == [
        "rope_scaling_factor", "gated_linear_unit", "moe_router_bias"
    ]  # fmt: skip


def test_what_the_weights_tell_is_written_and_said() -> None:
    assert [sentence for kind in KINDS for sentence in unsaid(config_of(kind)) if "q and k norms" not in sentence] == []
    odd = changed("nemotron_h", mamba_d_conv=3, mamba_chunk_size=256, mamba_rmsnorm=False)
    assert vars(config(arguments_of(odd), 101)).items() >= {"mamba_d_conv": 4}.items()
    chunk, conv, norm = unsaid(odd)
    assert "mamba_chunk_size 256 is not recorded" in chunk
    assert "mamba_d_conv 3: give --spec" in conv
    assert "mamba_rmsnorm False" in norm
    (said,) = unsaid(changed("moe_biases", moe_router_bias=False))
    assert "routers have no bias" in said
    arguments_of(changed("moe_biases", moe_router_bias=False))


def test_a_scale_of_attention_is_said_by_mup_that_changes_nothing_else() -> None:
    made = arguments_of(changed("llama", softmax_scale=0.015625, mup_embedding_mult=12.0))
    assert (made["use_mup"], made["mup_base_hidden_size"], made["mup_embedding_mult"]) == (True, 64, 12.0)
    assert made["mup_base_head_dim"] ** 0.5 / 8 ** made["mup_attn_scale_power"] == 0.015625
    made = arguments_of(changed("llama", softmax_scale=1 / 8))  # muP's own
    assert (made["mup_base_head_dim"], made["mup_attn_scale_power"]) == (None, 1.0)
    assert arguments_of(config_of("llama"))["use_mup"] is False


@WITH_MEGATRON
@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_pattern_of_a_hybrid_is_there_for_megatrons_before_and_after(kind: str) -> None:
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    wanted = config_of(kind)
    made = arguments_of(wanted)
    assert made["hybrid_layer_pattern"] == wanted.hybrid_layer_pattern
    old = made["hybrid_override_pattern"]
    assert (old is None) == ("+" in wanted.hybrid_layer_pattern)
    if old is not None:
        assert "".join(allocate_layers(made["num_layers"], 0.0, 0.0, old)) == wanted.hybrid_layer_pattern


def test_heads_for_further_tokens_of_a_hybrid_are_in_its_pattern() -> None:
    made = arguments_of(changed("nemotron_h", mtp_num_layers=2, mtp_layer_pattern="*M"))
    assert (made["hybrid_layer_pattern"], made["hybrid_override_pattern"]) == ("M-M*-M/*M/*M", None)


GRIDS = [
    Grid(),
    Grid(4, 1, 1, 2, 1),
    Grid(2, 2, 1, expert_tensor=2),
    Grid(1, 2, 3),
    Grid(1, 2, first=1),
    Grid(1, 2, 1, last=4),
    Grid(1, 4, 1, first=1, last=1),
    Grid(1, 2, 1, first=2),
    Grid(1, 4, 1, embedding=True, loss=True),
    Grid(1, 2, 4, embedding=True, loss=True),
    Grid(1, 2, 2, first=2, last=4),
    Grid(1, 2, 2, layout="Ett|t|tt|tL"),
]


@pytest.mark.parametrize("ranks", GRIDS, ids=str)
@pytest.mark.parametrize("kind", ["llama", "mixtral", "nemotron_h"])
def test_the_ranks_are_read_back_as_they_were(kind: str, ranks: Grid) -> None:
    model = changed(kind, num_layers=6)
    made = grid_arguments(ranks, model)
    again = grid(made)
    assert layers(again, 6) == layers(ranks, 6)
    assert (again.tensor, again.pipeline, again.virtual, again.expert) == (
        ranks.tensor, ranks.pipeline, ranks.virtual, ranks.expert
    )  # fmt: skip
    assert again.expert_tensor == (ranks.expert_tensor if kind == "mixtral" else ranks.tensor)
    ways = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
    said = [name for name in (*ways, "pipeline_model_parallel_layout") if made[name] is not None]
    assert len(said) == (kind != "nemotron_h" and ranks.virtual > 1)  # Megatron asserts that it is at most one


def test_the_stages_of_a_hybrid_are_in_its_pattern_where_no_other_argument_says_them() -> None:
    model = config_of("nemotron_h")
    made = grid_arguments(Grid(1, 2, layout="tt|tttt"), model)
    assert (made["hybrid_layer_pattern"], made["hybrid_override_pattern"]) == ("M-|M*-M", None)
    made = grid_arguments(Grid(1, 2, first=2), model)
    assert (made["hybrid_layer_pattern"], made["hybrid_override_pattern"]) == ("M-M*-M", "M-M*-M")
    assert made["decoder_first_pipeline_num_layers"] == 2
