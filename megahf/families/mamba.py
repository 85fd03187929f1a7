"""Mamba and Mamba-2 of state-spaces, as transformers has them: mixers alone.

transformers keeps the residual stream in float32 where `residual_in_fp32` says so, which is Megatron's
`fp32_residual_connection`.
"""

from __future__ import annotations

import math
from typing import Any

from ..cuts import Config
from .family import GAMMA, ONE, Family, Field, Line, Settings, Theirs
from .mixers import IN_1, IN_2, PLAIN_RMS, TIME_STEPS, check_layers, epsilon, groups, mixer, width

BLOCK = "backbone.layers.{l}."
EMBEDDINGS = (
    Line("embedding.word_embeddings.weight", ("backbone.embeddings.weight",), ONE),
    Line("decoder.final_norm.weight", ("backbone.norm_f.weight",), GAMMA),
    Line("output_layer.weight", ("lm_head.weight",), ONE),
)
ONCE = {r"^backbone\.embedding\.": "backbone.embeddings."}
SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("conv_kernel", "mamba_d_conv", 4),
    Field("use_conv_bias", "mamba_conv_bias", True),
    Field("residual_in_fp32", "fp32_residual_connection", True),
)
# What only makes new weights, or is left over from state-spaces' own config.
UNUSED = frozenset((
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
    "rescale_prenorm_residual", "use_mambapy", "use_associative_scan", "intermediate_size", "d_inner", "d_model",
    "n_layer", "fused_add_norm", "pad_vocab_size_multiple", "rms_norm", "ssm_cfg",
))  # fmt: skip


def only_mixers(theirs: Theirs) -> str:
    return "M" * theirs["num_hidden_layers"]


def layers(architecture: str) -> Settings:
    """A mixer a layer. Numbers that attention would need are made up: heads that any tensor parallelism divides."""

    def read(theirs: Theirs) -> dict[str, Any]:
        heads = math.gcd(theirs["hidden_size"], 64)
        return {
            "num_layers": theirs["num_hidden_layers"],
            "num_attention_heads": heads,
            "max_position_embeddings": 1 << 20,
        }

    def write(config: Config) -> dict[str, Any]:
        check_layers(config, architecture, (("M", "a mixer"),))
        return {"num_hidden_layers": config.num_layers}

    return Settings(("num_hidden_layers",), read, write)


def rank(theirs: Theirs) -> dict[str, Any]:
    given = theirs.get("time_step_rank", "auto")
    return {"mamba_dt_rank": -(-theirs["hidden_size"] // 16) if given == "auto" else given}


RANK = Settings(("time_step_rank",), rank, lambda config: {"time_step_rank": config.mamba_dt_rank})
NOTHING_ELSE: dict[str, Any] = {**PLAIN_RMS, "position_embedding_type": "none", "activation_func": "gelu"}
PLAIN = {"hidden_act": ("silu",), "use_bias": (False,)}

MAMBA2 = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    fields=(
        *SIZES,
        Field("state_size", "mamba_state_dim", 128),
        Field("n_groups", "mamba_num_groups", 8),
        Field("chunk_size", "mamba_chunk_size", 256),
        Field("tie_word_embeddings", "tie_word_embeddings", False),
    ),
    lines=(*EMBEDDINGS, *mixer(f"{BLOCK}mixer.", f"{BLOCK}norm.weight", IN_2)),
    settings=(
        layers("Mamba2ForCausalLM"),
        width("num_heads", "head_dim", "expand", 64),
        epsilon("layer_norm_epsilon", only_mixers),
        TIME_STEPS,
    ),
    fixed=NOTHING_ELSE,
    constants=PLAIN,
    harmless=UNUSED | {"time_step_rank"},
    remarks=groups("n_groups", 8),
    pattern=only_mixers,
    once=ONCE,
    base="backbone.",
)
MAMBA = Family(
    name="mamba",
    architecture="MambaForCausalLM",
    fields=(
        *SIZES,
        Field("state_size", "mamba_state_dim", 16),
        Field("expand", "mamba_expand", 2),
        Field("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tie_word_embeddings", True),
    ),
    lines=(*EMBEDDINGS, *mixer(f"{BLOCK}mixer.", f"{BLOCK}norm.weight", IN_1)),
    settings=(layers("MambaForCausalLM"), RANK),
    fixed={**NOTHING_ELSE, "mamba_version": 1},
    constants=PLAIN,
    harmless=UNUSED,
    pattern=only_mixers,
    once=ONCE,
    base="backbone.",
)
