"""Small models for the tests of `megahf/models`: random weights, large enough that a wrong line shows in the logits."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

M = TypeVar("M", bound=nn.Module)

LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "tie_word_embeddings": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": False},  # tied and random, a model repeats its last token
    "llama": LLAMA,
    "sinks": {**LLAMA, "softmax_type": "learnable"},
    "off by one": {**LLAMA, "softmax_type": "off-by-one"},
    "window": {**LLAMA, "window_size": [5, 0]},
    "window and sinks": {**LLAMA, "window_size": [5, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
    "gate and norms": {**LLAMA, "attention_output_gate": True, "qk_layernorm": True, "no_rope_freq": 2},
}


def tiny_config(**changes: Any) -> McoreGPTConfig:
    """Two layers of width 32, four heads in two groups, no dropout."""
    sizes: dict[str, Any] = {
        "vocab_size": 61,
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "max_position_embeddings": 96,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "pad_token_id": 0,
    }
    return McoreGPTConfig(**{**sizes, **changes})


def tiny(**changes: Any) -> McoreGPTForCausalLM:
    """A model of `tiny_config` with weights of `randomise`, in evaluation mode."""
    return randomise(McoreGPTForCausalLM(tiny_config(**changes))).eval()


@torch.no_grad()
def randomise(model: M, seed: int = 0) -> M:
    """Fills every parameter with normal numbers: matrices keep the size of what they multiply, vectors vary."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(parameter.round() + 0.2 * noise)  # around 1 or 0, as it was initialised
    return model


def tokens(rows: int, length: int, seed: int = 1, vocabulary: int = 61) -> torch.Tensor:
    """Random tokens `[rows, length]`, never 0, which pads."""
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
