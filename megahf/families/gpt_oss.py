"""GPT-OSS: experts with biases and a clamped gate, sinks, a window in every other layer, YaRN.

Its experts are `[experts, in, out]`, with gate and up by turns in the first matrix. Versions of transformers whose
config has no `swiglu_limit` clamp at 7, whatever a config.json says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..cuts import Config
from ..tiles import Tiled
from . import windows
from .experts import MLP, NORM, ROUTER, THEIR_MLP, WIDTHS
from .family import ONE, Family, Field, Joint, Line, Theirs
from .llama import AT, ATTENTION, ATTENTION_BIASES, EMBEDDINGS, FREQUENCIES, GATED_RMS, THEIRS, sizes
from .rope import rope

PLAIN = rope(150000.0)
YARN = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def by_matrix(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """`[experts, in, out]` as `[experts, out, in]`."""
    (array,) = arrays
    return array.swapaxes(1, 2)


def as_by_matrix(whole: Tiled, config: Config) -> list[Tiled]:
    return [whole.swapaxes(1, 2)]


def by_halves(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """Rows `[experts, gate, up, gate, ..]` as `[experts, gate | up]`."""
    (array,) = arrays
    return array.unflatten(1, (-1, 2)).swapaxes(1, 2).flatten(1)


def as_turns(whole: Tiled, config: Config) -> list[Tiled]:
    return [whole.unflatten(1, (2, -1)).swapaxes(1, 2).flatten(1)]


EACH_TURNED = Joint(by_matrix, as_by_matrix)
TURNS = Joint(by_halves, as_turns)
TURNED_TURNS = Joint(
    lambda arrays, config: by_halves([by_matrix(arrays, config)], config),
    lambda whole, config: as_by_matrix(as_turns(whole, config)[0], config),
)
OURS, EACH = f"{MLP}experts.", f"{THEIR_MLP}experts."
SPARSE = (
    NORM,
    replace(ROUTER, theirs=(f"{THEIR_MLP}router.weight",)),
    Line(f"{MLP}router.bias", (f"{THEIR_MLP}router.bias",), ONE),
    Line(f"{OURS}linear_fc1.weight", (f"{EACH}gate_up_proj",), TURNED_TURNS),
    Line(f"{OURS}linear_fc1.bias", (f"{EACH}gate_up_proj_bias",), TURNS),
    Line(f"{OURS}linear_fc2.weight", (f"{EACH}down_proj",), EACH_TURNED),
    Line(f"{OURS}linear_fc2.bias", (f"{EACH}down_proj_bias",), ONE),
)
SINKS = Line(f"{AT}core_attention.softmax_offset", (f"{THEIRS}self_attn.sinks",), ONE)


def by_turns(theirs: Theirs) -> list[bool]:
    """The first layer has the window, the second has not, and so on."""
    return [layer % 2 == 0 for layer in range(theirs["num_hidden_layers"])]


def read_rotation(theirs: Theirs) -> dict[str, Any]:
    """YaRN also where nothing is said."""
    told = theirs.get("rope_scaling") or theirs.get("rope_parameters")
    return PLAIN.read(theirs if told else {**theirs, "rope_parameters": YARN})


GPT_OSS = Family(
    name="gpt_oss",
    architecture="GptOssForCausalLM",
    fields=(
        *sizes(rms_norm_eps=1e-5, num_key_value_heads=8, head_dim=64),
        Field("num_local_experts", "num_experts", 128),
        Field("num_experts_per_tok", "moe_router_topk", 4),
        Field("swiglu_limit", "activation_func_clamp_value", 7.0),
    ),
    lines=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, SINKS, *SPARSE),
    settings=(replace(PLAIN, read=read_rotation), windows.by_layer(128, by_turns, switched=False, needed=True), WIDTHS),
    fixed={
        **GATED_RMS,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "moe_router_bias": True,
        "softmax_type": "learnable",
        "activation_func": "quick_gelu",
        "glu_linear_offset": 1.0,
    },
    constants={"hidden_act": ("silu",), "attention_bias": (True,), "swiglu_alpha": (1.702,)},
    harmless=frozenset(("initial_context_length", "experts_per_token")),
    ignored=FREQUENCIES,
    base="model.",
)
