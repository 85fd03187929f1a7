"""Self-attention of Megatron-core: one packed QKV matmul, grouped queries, RoPE, gate, sinks, window.

Which keys a query sees is worked out once a forward by `plan`; the softmax runs through transformers' attention
interface. Under `sdpa` a prefill never builds a mask over the sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .layout import Layout, attend
from .mlp import ResidualLinear
from .norm import build_norm, build_qk_norm
from .rope import rotate

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_mcore import McoreGPTConfig


class CoreAttention(nn.Module):
    """Holds what the softmax itself learns: one more logit a head (`softmax_type` "learnable"), a sink of attention."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.off_by_one = config.softmax_type == "off-by-one"
        learnable = config.softmax_type == "learnable"
        self.softmax_offset = nn.Parameter(torch.zeros(config.num_attention_heads)) if learnable else None

    def forward(self, query: Tensor) -> Tensor | None:
        """The extra logit of each head `[n]`, or None. `query` is `[b, n, s, d]`."""
        if self.off_by_one:
            return query.new_zeros(query.shape[1])
        # Tensor parallelism leaves a DTensor, and queries that are plain tensors of this rank's heads.
        return getattr(self.softmax_offset, "to_local", lambda: self.softmax_offset)()


class Attention(nn.Module):
    """What every attention has: the softmax, its window and its sinks, through transformers' attention interface."""

    is_causal = True  # read by transformers' attention functions, as are the next attributes
    num_key_value_groups = 1  # query heads a key/value head
    scaling: float
    core_attention: CoreAttention | None

    def __init__(self, config: McoreGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.dropout = config.attention_dropout
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

    def sinks(self, query: Tensor) -> Tensor | None:
        """The extra logit `[n]` of each head of the queries `[b, n, s, d]`, if there is one."""
        return None if self.core_attention is None else self.core_attention(query)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        layout: Layout | None,
        sinks: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(q k' scaling) v through transformers' interface: `[b, n, s, d]` to `[b, s, n, d]`.

        Args:
            sinks: an extra logit for each head, `[n]`, or for each of their queries, `[n s]`.
        """
        if layout is not None and layout.context is not None:
            return layout.context.attend(query, key, value, self.scaling, self.sliding_window, sinks), None
        implementation = self.config._attn_implementation
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        options = {
            "scaling": self.scaling,
            "dropout": self.dropout if self.training else 0.0,
            "sliding_window": self.sliding_window,
            **kwargs,
        }
        if implementation == "sdpa":
            return attend(interface, self, query, key, value, mask, layout, sinks, **options)
        if sinks is not None:
            options["s_aux"] = sinks
        return interface(self, query, key, value, mask, **options)


class SelfAttention(Attention):
    """`linear_proj(attention(norm(q), norm(k), v))`, with q, k, v from one matmul of the normed input."""

    def __init__(self, config: McoreGPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.num_query_groups
        self.scaling = config.softmax_scale or config.kv_channels**-0.5
        self.rotary = config.rotary_layers[layer_idx]
        self.interleaved = config.rotary_interleaved
        self.gated = config.attention_output_gate

        heads = config.num_attention_heads * (2 if self.gated else 1) + 2 * config.num_query_groups
        self.linear_qkv_layernorm = build_norm(config, config.hidden_size)
        # For each group: its query heads | (their gates |) its key | its value.
        self.linear_qkv = nn.Linear(config.hidden_size, heads * config.kv_channels, bias=config.add_qkv_bias)
        width = config.num_attention_heads * config.kv_channels
        self.linear_proj = ResidualLinear(width, config.hidden_size, bias=config.add_bias_linear)
        self.q_layernorm = build_qk_norm(config)
        self.k_layernorm = build_qk_norm(config)
        self.core_attention = CoreAttention(config) if config.softmax_type != "vanilla" else None

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden` `[b, s, h]` to `[b, s, h]`, and the attention weights where the implementation returns them."""
        query, key, value, gate = self.project(hidden, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            if layout is not None:
                key, value = (layout.cut(x, hidden.shape[1]) for x in (key, value))
        out, weights = self.attend(query, key, value, attention_mask, layout, self.sinks(query), **kwargs)
        out = out.reshape(*hidden.shape[:-1], -1)  # [b, s, n d]
        if gate is not None:
            out = (out * torch.sigmoid(gate.float())).to(out.dtype)
        return self.linear_proj(out), weights

    def project(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries `[b, n, s, d]`, keys and values `[b, g, s, d]`, normed and rotated; gates `[b, s, n d]` or None."""
        per_group = self.num_key_value_groups
        heads = [per_group, per_group if self.gated else 0, 1, 1]
        mixed = self.linear_qkv(self.linear_qkv_layernorm(hidden))
        mixed = mixed.view(*hidden.shape[:-1], -1, sum(heads), self.head_dim)  # [b, s, g, heads, d]
        query, gate, key, value = mixed.split_with_sizes(heads, dim=3)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.rotary and position_embeddings is not None:
            cos, sin = position_embeddings
            query, key = (rotate(x, cos, sin, self.interleaved) for x in (query, key))
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (query, key, value))
        return query, key, value, gate.flatten(2) if self.gated else None


def eager_attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as it is written down, softmax in float32; the one that returns its weights `[b, n, s, s_k]`."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [b, n, s, s_k]
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, scores.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights
