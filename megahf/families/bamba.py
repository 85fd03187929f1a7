"""Bamba: layers of a mixer or attention and then an MLP, each of which is two layers of Megatron's pattern."""

from __future__ import annotations

from typing import Any

from ..cuts import Config
from .family import GAMMA, GATED, ONE, QKV, Family, Field, Line, Settings, Theirs
from .mixers import PLAIN_RMS, TIME_STEPS, check_layers, epsilon, groups, mixer, width
from .rope import rope

NAME, LAYER, BLOCK = "BambaForCausalLM", "decoder.layers.{l}.", "model.layers.{l}."
AT, MLP = f"{LAYER}self_attention.", f"{LAYER}mlp."


def halved(layer: int, config: Config) -> int:
    """Their layer that ours is a half of."""
    return layer // 2


def pattern(theirs: Theirs) -> str:
    attends = set(theirs.get("attn_layer_indices") or ())
    return "".join("*-" if layer in attends else "M-" for layer in range(theirs["num_hidden_layers"]))


def read_layers(theirs: Theirs) -> dict[str, Any]:
    return {"num_layers": 2 * theirs["num_hidden_layers"]}


def write_layers(config: Config) -> dict[str, Any]:
    check_layers(config, NAME, (("M*", "a mixer or attention"), ("-", "an MLP")))
    symbols = config.hybrid_layer_pattern[::2]
    if config.num_layers % 2:
        raise ValueError(f"the last layer, {config.num_layers - 1}, has no MLP after it, as {NAME} always has")
    attends = [layer for layer, symbol in enumerate(symbols) if symbol == "*"]
    return {"num_hidden_layers": len(symbols), "attn_layer_indices": attends}


UNUSED = frozenset(("num_logits_to_keep", "z_loss_coefficient", "attn_rotary_emb", "time_step_min", "time_step_max"))
ATTENTION = (
    Line(f"{AT}linear_qkv.layer_norm_weight", (f"{BLOCK}input_layernorm.weight",), GAMMA, halved),
    Line(f"{AT}linear_qkv.weight", tuple(f"{BLOCK}self_attn.{x}_proj.weight" for x in "qkv"), QKV, halved),
    Line(f"{AT}linear_proj.weight", (f"{BLOCK}self_attn.o_proj.weight",), ONE, halved),
)
DENSE = (
    Line(f"{MLP}linear_fc1.layer_norm_weight", (f"{BLOCK}pre_ff_layernorm.weight",), GAMMA, halved),
    Line(f"{MLP}linear_fc1.weight",
         tuple(f"{BLOCK}feed_forward.{x}_proj.weight" for x in ("gate", "up")), GATED, halved),
    Line(f"{MLP}linear_fc2.weight", (f"{BLOCK}feed_forward.down_proj.weight",), ONE, halved),
)  # fmt: skip

BAMBA = Family(
    name="bamba",
    architecture=NAME,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "hidden_size"),
        Field("intermediate_size", "ffn_hidden_size", 14336),
        Field("num_attention_heads", "num_attention_heads", 32),
        Field("num_key_value_heads", "num_query_groups", 8),
        Field("max_position_embeddings", "max_position_embeddings", 262144),
        Field("mamba_d_state", "mamba_state_dim", 256),
        Field("mamba_n_groups", "mamba_num_groups", 1),
        Field("mamba_d_conv", "mamba_d_conv", 4),
        Field("mamba_conv_bias", "mamba_conv_bias", True),
        Field("mamba_chunk_size", "mamba_chunk_size", 256),
        Field("tie_word_embeddings", "tie_word_embeddings", False),
    ),
    lines=(
        Line("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ONE),
        Line("decoder.final_norm.weight", ("model.final_layernorm.weight",), GAMMA),
        Line("output_layer.weight", ("lm_head.weight",), ONE),
        *mixer(f"{BLOCK}mamba.", f"{BLOCK}input_layernorm.weight", layer=halved),
        *ATTENTION,
        *DENSE,
    ),
    settings=(
        Settings(("num_hidden_layers", "attn_layer_indices"), read_layers, write_layers),
        rope(part=0.5),
        width("mamba_n_heads", "mamba_d_head", "mamba_expand", "auto"),
        epsilon("rms_norm_eps", pattern),
        TIME_STEPS,
    ),
    fixed={**PLAIN_RMS, "activation_func": "silu", "gated_linear_unit": True},
    constants={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "mamba_proj_bias": (False,),
    },
    harmless=UNUSED,
    remarks=groups("mamba_n_groups", 1),
    pattern=pattern,
    base="model.",
)
