"""Arguments that change the mathematics in a way that is not built: each is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .bert import LOCAL_SPEC, is_marked
from .errors import Problems
from .hybrid import pattern_of

OFF = (None, False, 0, "", "None")

# (name, values that change nothing, what others are)
REFUSED = (
    ("experimental_attention_variant", OFF, "an experimental attention"),
    ("linear_attention_freq", OFF, "linear attention"),
    ("heterogeneous_layers_config_path", OFF, "layers that differ from one another"),
    ("heterogeneous_layers_config_encoded_json", OFF, "layers that differ from one another"),
    ("enable_mhc_connections", OFF, "hyper-connections"),
    ("enable_hyper_connections", OFF, "hyper-connections"),
    ("position_embedding_type", ("learned_absolute", "rope", "yarn", "none"), "a position embedding that is not built"),
    ("softmax_type", ("vanilla", "off-by-one", "learnable"), "a softmax that is not built"),
    ("normalization", ("LayerNorm", "RMSNorm"), "a normalization that is not built"),
    ("moe_router_score_function", ("softmax", "sigmoid", "sqrtsoftplus"), "a router that is not built"),
    ("moe_router_dtype", ("fp32", "fp64"), "a number format for routers that is not built"),
    ("moe_router_load_balancing_type", ("none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn"),
     "a router that is not built"),
    ("moe_token_drop_policy", ("probs", "position"), "a way to drop tokens that is not built"),
    ("use_grouped_gemm_for_dense_mlp", OFF, "gate and up by turns, or not, as the Transformer Engine had it"),
    ("rope_type", ("rope", "yarn"), "a position embedding that is not built"),
    ("moe_router_force_load_balancing", OFF, "routing at random"),
    ("moe_router_force_biased", OFF, "routing at random"),
    ("mtp_hsm", OFF, "mixing of hidden states for further tokens"),
    ("spec", OFF, "layers from a module of your own"),
    ("use_legacy_models", OFF, "a model from before megatron-core"),
    ("retro_add_retriever", OFF, "a RETRO model"),
    ("fp8_param_gather", OFF, "weights in fp8"),
    ("fp8_param", OFF, "weights in fp8"),
    ("fp4_param_gather", OFF, "weights in fp4"),
)  # fmt: skip


def refuse_unbuilt(args: Mapping[str, Any], found: Problems) -> None:
    """Adds everything in `args` that the model classes cannot compute."""
    hybrid = pattern_of(args) is not None
    for name, harmless, meaning in REFUSED:
        if hybrid and name == "spec":  # a hybrid's is always given; what it sets is read off the weights
            continue
        if is_marked(args) and name == "spec":  # of BERT: Megatron's own layers
            harmless = (*harmless, *LOCAL_SPEC)
        value = args.get(name)
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(one is not None and one not in harmless for one in values):
            found.add(f"--{name.replace('_', '-')} {value} is {meaning}", "args")
    stretched = (args.get("rotary_scaling_factor") or 1) != 1
    if before_014(args) and stretched and args.get("mscale") != args.get("mscale_all_dim"):
        found.add("--mscale and --mscale-all-dim differ, which Megatron before 0.14 took otherwise", "args")


def before_014(args: Mapping[str, Any]) -> bool:
    """Whether a model with multi-latent attention was written before there was `--rope-type`."""
    return bool(args.get("multi_latent_attention")) and "rope_type" not in args
