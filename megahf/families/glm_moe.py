"""GLM-4.5 and -4.6 (MoE), and dots.llm1: DeepSeek-V3's mixture of experts under attention by heads."""

from __future__ import annotations

from .activations import activation
from .experts import CORRECTION, ROUTED, THEIR_MLP, shared
from .family import Family, Field, Theirs
from .further import HEADS, left_out, with_heads
from .grouped import sigmoids
from .llama import ATTENTION, DENSE, EMBEDDINGS, FREQUENCIES, GATED_RMS, QKV_BIAS, WIDTH, sizes
from .qwen import QK_NORMS
from .rope import ROPE, rope
from .windows import by_layer

LINES = (
    *EMBEDDINGS, *ATTENTION, *QK_NORMS, *DENSE, *ROUTED, CORRECTION, *shared(f"{THEIR_MLP}shared_experts."),
)  # fmt: skip
GLM = {
    "n_routed_experts": 128, "n_shared_experts": 1, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0, "num_experts_per_tok": 8, "norm_topk_prob": True,
}  # fmt: skip
DOTS = {
    "moe_intermediate_size": 1408, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
}  # fmt: skip


def last(theirs: Theirs) -> list[bool]:
    """The layers from `max_window_layers` on have the window."""
    return [layer >= theirs.get("max_window_layers", 62) for layer in range(theirs["num_hidden_layers"])]


GLM4_MOE = Family(
    name="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    fields=(
        *sizes(rms_norm_eps=1e-5, num_key_value_heads=8),
        WIDTH,
        activation("hidden_act", "silu"),
        Field("attention_bias", "add_qkv_bias", False),
        Field("use_qk_norm", "qk_layernorm", False),
    ),
    lines=with_heads((*LINES, *QKV_BIAS)),
    settings=(rope(part=0.5), sigmoids(GLM), HEADS),
    fixed=GATED_RMS,
    ignored=FREQUENCIES,
    base="model.",
    seen=left_out,
)

DOTS1 = Family(
    name="dots1",
    architecture="Dots1ForCausalLM",
    fields=(*sizes(), WIDTH, activation("hidden_act", "silu")),
    lines=LINES,
    settings=(ROPE, sigmoids(DOTS), by_layer(4096, last, switched=False)),
    fixed={**GATED_RMS, "qk_layernorm": True},
    constants={"attention_bias": (False,)},
    harmless=frozenset(("max_window_layers", "scoring_func")),
    ignored=FREQUENCIES,
    base="model.",
)
