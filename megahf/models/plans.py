"""How several processes share a model, in transformers' words: its plans of tensor and of expert parallelism.

Names are those of the base model, `*` stands for a layer's number. What a plan leaves out is whole on every process:
norms, routers, latents, and the mixers of hybrids, whose `z | x | B | C | dt` none of transformers' styles can cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig

MATRICES = ("gate_up_proj", "down_proj")  # of the experts


def tensor_parallel_plan(config: McoreGPTConfig) -> dict[str, str]:
    """Attention by heads, MLPs and each expert by width, the embedding by words."""
    parts = {"self_attention": attention_plan, "mlp": mlp_plan, "experts": experts_plan}
    plan = {"embedding.word_embeddings": "embedding_rowwise"}
    for part in sorted(config.layer_parts):
        plan |= {layer(config) + name: style for name, style in parts[part](config).items()}
    return plan


def layer(config: McoreGPTConfig) -> str:
    return f"{config.stack}.layers.*."


def attention_plan(config: McoreGPTConfig) -> dict[str, str]:
    plan = {"linear_proj": "rowwise"}
    if not config.multi_latent_attention:
        plan["linear_qkv"] = "colwise"
    else:  # latents are not cut
        plan["linear_q_proj" if config.q_lora_rank is None else "linear_q_up_proj"] = "colwise"
        plan["linear_kv_up_proj"] = "colwise"
        # Whole too, but every process' heads look at the one key that rotates: its gradient is a sum over them.
        plan["linear_kv_down_proj"] = "mla_kv_a_proj"
    if config.softmax_type == "learnable":
        plan["core_attention.softmax_offset"] = "colwise"
    if config.qk_layernorm and not config.qk_l2_norm and not config.multi_latent_attention:
        plan["q_layernorm"] = plan["k_layernorm"] = "replicated_with_grad_allreduce"  # each process norms its heads
    return {f"self_attention.{name}": style for name, style in plan.items()}


def mlp_plan(config: McoreGPTConfig, prefix: str = "mlp.", biased: bool | None = None) -> dict[str, str]:
    """A gated fc1 is cut in each half of `gate | up`; with a bias not at all, since none of the styles cuts that so.

    Args:
        biased: whether the matrices have biases; None: as the configuration says.
    """
    if config.gated_linear_unit and (config.add_bias_linear if biased is None else biased):
        return {}
    columns = "packed_colwise" if config.gated_linear_unit else "colwise"
    return {f"{prefix}linear_fc1": columns, f"{prefix}linear_fc2": "rowwise"}


def experts_plan(config: McoreGPTConfig) -> dict[str, str]:
    """Every expert is cut as an MLP is. The last bias is whole: `Experts` gives each process its share of it."""
    gated = config.gated_linear_unit
    plan = {"gate_up_proj": "packed_colwise" if gated else "colwise", "down_proj": "rowwise"}
    if config.add_bias_linear:  # [E, 2 f]: the styles are named after what they do to the last dimension but one
        plan["gate_up_proj_bias"] = "packed_rowwise" if gated else "rowwise"
    plan = {"mlp.experts": "moe_tp_experts", **{f"mlp.experts.{name}": style for name, style in plan.items()}}
    shared = config.moe_shared_expert_intermediate_size
    return plan | (mlp_plan(config, "mlp.shared_experts.", biased=False) if shared else {})


def expert_parallel_plan(config: McoreGPTConfig) -> dict[str, str]:
    """Each process holds whole experts; empty where there are none.

    transformers sends tokens to their experts, or masks those that are elsewhere. A version that cannot send (5.17)
    masks in the router: then weights cannot go onto the experts' input, whose gradient each process would find in part.
    """
    sends = "ep_dispatch_experts" in ALL_PARALLEL_STYLES
    if "experts" not in config.layer_parts or (config.moe_apply_probs_on_input and not sends):
        return {}
    names = [f"{matrix}{bias}" for matrix in MATRICES for bias in (("", "_bias") if config.add_bias_linear else ("",))]
    at = layer(config)
    plan = {f"{at}mlp.experts.{name}": "grouped_gemm" for name in names}
    if sends:
        return {**plan, f"{at}mlp.experts": "ep_dispatch_experts"}
    return {**plan, f"{at}mlp.experts": "moe_tp_experts", f"{at}mlp.router": "ep_router"}
