"""DeepSeek-V2 and -V3: multi-latent attention and a mixture of experts.

Their norms of latents have an epsilon of 1e-6 whatever `rms_norm_eps` says; Megatron's have the model's. So models of
another epsilon are refused. A router chooses among groups as Megatron's does only where a group is to give as many
experts as it is ranked by (`grouped.check_ranks`): DeepSeek-V3 and -V2-Lite are so, DeepSeek-V2 is not.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..cuts import Config
from .activations import activation
from .experts import CORRECTION, ROUTED, THEIR_MLP, shared
from .family import GAMMA, ONE, Family, Field, Line, Settings, Theirs
from .further import HEADS, left_out, with_heads
from .grouped import sigmoids, softmaxes
from .llama import AT, DENSE, EMBEDDINGS, FREQUENCIES, GATED_RMS, LAYER, SIZES, THEIRS, WIDTH
from .rope import rope

ROTATION = rope(kinds=("default", "yarn"))
EPSILON = 1e-6  # of latents' norms, written into transformers' classes
SELF = f"{THEIRS}self_attn."

LATENTS = (
    Line(f"{LAYER}input_layernorm.weight", (f"{THEIRS}input_layernorm.weight",), GAMMA),
    Line(f"{AT}linear_q_proj.weight", (f"{SELF}q_proj.weight",), ONE),
    Line(f"{AT}linear_q_down_proj.weight", (f"{SELF}q_a_proj.weight",), ONE),
    Line(f"{AT}linear_q_up_proj.layer_norm_weight", (f"{SELF}q_a_layernorm.weight",), GAMMA),
    Line(f"{AT}linear_q_up_proj.weight", (f"{SELF}q_b_proj.weight",), ONE),
    Line(f"{AT}linear_kv_down_proj.weight", (f"{SELF}kv_a_proj_with_mqa.weight",), ONE),
    Line(f"{AT}linear_kv_up_proj.layer_norm_weight", (f"{SELF}kv_a_layernorm.weight",), GAMMA),
    Line(f"{AT}linear_kv_up_proj.weight", (f"{SELF}kv_b_proj.weight",), ONE),
    Line(f"{AT}linear_proj.weight", (f"{SELF}o_proj.weight",), ONE),
)


def read_epsilon(theirs: Theirs) -> dict[str, Any]:
    epsilon = theirs.get("rms_norm_eps", EPSILON)
    if epsilon != EPSILON:
        raise ValueError(f"{epsilon}; the norms of latents have {EPSILON} there whatever it says, Megatron's have it")
    return {"layernorm_epsilon": epsilon}


def write_epsilon(config: Config) -> dict[str, Any]:
    return {"rms_norm_eps": config.layernorm_epsilon}


def read_heads(theirs: Theirs) -> dict[str, Any]:
    heads, keys = theirs["num_attention_heads"], theirs.get("num_key_value_heads")
    if keys not in (None, heads):
        raise ValueError(f"{keys} for {heads} attention heads; latents make a key and a value for each head")
    return {"num_query_groups": heads}


def write_heads(config: Config) -> dict[str, Any]:
    return {"num_key_value_heads": config.num_attention_heads}


def read_rotation(theirs: Theirs) -> dict[str, Any]:
    """Plain and YaRN's, of which Megatron's attention by latents always rounds the range."""
    told = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if told.get("mscale_all_dim") and not told.get("mscale"):
        raise ValueError("mscale_all_dim without mscale, and Megatron weighs cosines and sines by both")
    if not told.get("truncate", True):
        raise ValueError("truncate is false, and Megatron's attention by latents always rounds the range")
    ours = {"yarn_rotary_scaling_factor": 1.0, "yarn_mscale_all_dim": 0.0, **ROTATION.read(theirs)}
    return {**ours, "position_embedding_type": "rope", "rope_type": ours["position_embedding_type"]}


def write_rotation(config: Config) -> dict[str, Any]:
    plain = {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None, "rotary_percent": 1.0}
    model = {**vars(config), **plain, "position_embedding_type": config.rope_type}
    return ROTATION.write(SimpleNamespace(**model))


ELSEWHERE = ("num_key_value_heads", "head_dim", "rms_norm_eps")
FIELDS = (
    *(row for row in SIZES if row.theirs not in ELSEWHERE),
    WIDTH,
    activation("hidden_act", "silu"),
    Field("q_lora_rank", "q_lora_rank", 1536),
    Field("kv_lora_rank", "kv_lora_rank", 512),
    Field("qk_nope_head_dim", "qk_head_dim", 128),
    Field("qk_rope_head_dim", "qk_pos_emb_head_dim", 64),
    Field("v_head_dim", "v_head_dim", 128),
)
LATENT = (
    Settings(("num_key_value_heads",), read_heads, write_heads),
    Settings(("rms_norm_eps",), read_epsilon, write_epsilon),
    Settings(ROTATION.keys, read_rotation, write_rotation),
)
CONSTANTS = {"attention_bias": (False,)}
HARMLESS = frozenset(("head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux"))
FIXED = {**GATED_RMS, "multi_latent_attention": True, "qk_layernorm": True}
LINES = (*EMBEDDINGS, *LATENTS, *DENSE, *ROUTED, *shared(f"{THEIR_MLP}shared_experts."))

V2 = {
    "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
V3 = {
    "n_routed_experts": 256, "n_shared_experts": 1, "moe_intermediate_size": 2048, "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
}  # fmt: skip

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    fields=FIELDS,
    lines=LINES,
    settings=(*LATENT, softmaxes(V2)),
    fixed=FIXED,
    constants={**CONSTANTS, "mlp_bias": (False,), "scoring_func": ("softmax",)},
    harmless=HARMLESS,
    ignored=FREQUENCIES,
    base="model.",
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    fields=FIELDS,
    lines=with_heads((*LINES, CORRECTION)),
    settings=(*LATENT, sigmoids(V3), HEADS),
    fixed=FIXED,
    constants={
        **CONSTANTS,
        "rope_interleave": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    harmless=HARMLESS,
    ignored=FREQUENCIES,
    base="model.",
    seen=left_out,
)
