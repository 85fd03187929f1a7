"""Multi-latent attention of Megatron-core: queries, keys and values through low ranks, and a cache of the low rank.

What is kept of a token is its latent and one key that rotates, `latent | key`, for all heads together. A prefill
expands latents into every head's keys and values. Decoding does not: queries go into the space of latents, attend
there, and what they find comes back by the values' matrix. Source: megatron/core/transformer/multi_latent_attention.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import QuantizedCache

from .attention import Attention, CoreAttention
from .layout import Layout
from .mlp import ResidualLinear
from .norm import build_norm
from .rope import rotate, yarn_mscale

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_mcore import McoreGPTConfig

LATENT = ("sdpa", "eager")  # they take heads as wide as a latent; flash attention, for one, ends at 256 channels


class MLASelfAttention(Attention):
    """`linear_proj(attention(q, k, v))`, where k and v of all heads are one small matrix' view of a latent."""

    def __init__(self, config: McoreGPTConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.latent, self.nope, self.rope = config.kv_lora_rank, config.qk_head_dim, config.qk_pos_emb_head_dim
        self.values = config.v_head_dim
        # As Megatron: also where rope_type is "rope", and whatever softmax_scale says.
        sharper = yarn_mscale(config.yarn_rotary_scaling_factor, config.yarn_mscale_all_dim or 0.0)
        self.scaling = sharper**2 * (self.nope + self.rope) ** -0.5

        heads, hidden = config.num_attention_heads, config.hidden_size
        self.low_rank_queries = config.q_lora_rank is not None
        if config.q_lora_rank is None:
            self.linear_q_proj = nn.Linear(hidden, heads * (self.nope + self.rope), bias=False)
        else:
            self.linear_q_down_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.linear_q_up_proj_layernorm = build_latent_norm(config, config.q_lora_rank)
            # For each head: its channels without position | those that rotate, as in linear_q_proj.
            self.linear_q_up_proj = nn.Linear(config.q_lora_rank, heads * (self.nope + self.rope), bias=False)
        self.linear_kv_down_proj = nn.Linear(hidden, self.latent + self.rope, bias=False)  # latent | key that rotates
        self.linear_kv_up_proj_layernorm = build_latent_norm(config, self.latent)
        # For each head: its key without position | its value.
        self.linear_kv_up_proj = nn.Linear(self.latent, heads * (self.nope + self.values), bias=False)
        self.linear_proj = ResidualLinear(heads * self.values, hidden, bias=config.add_bias_linear)
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
        if position_embeddings is None:
            raise ValueError("multi-latent attention rotates: position_embeddings, cosines and sines, are needed")
        query, key = self.project(hidden, *position_embeddings)
        if past_key_values is not None:
            key = self.remember(key, past_key_values)
            if layout is not None:
                key = layout.cut(key, hidden.shape[1])
        if layout is not None and layout.context is not None:
            key = layout.context.latents(key)
        form = self.absorbed if self.absorbs(query.shape[2], key.shape[2], attention_mask) else self.expanded
        out, weights = form(query, key, attention_mask, layout, **kwargs)  # [b, s, n, v]
        return self.linear_proj(out.flatten(2)), weights

    def project(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Queries `[b, n, s, nope + rope]` and what is remembered, latents and keys `[b, 1, s, latent + rope]`.

        Megatron takes pairs (2 i, 2 i + 1) apart to turn them and leaves them so, in queries and keys alike. Here they
        are put back: the order of channels is nothing to their product.
        """
        if self.low_rank_queries:
            query = self.linear_q_up_proj(self.linear_q_up_proj_layernorm(self.linear_q_down_proj(hidden)))
        else:
            query = self.linear_q_proj(hidden)
        query = query.view(*hidden.shape[:-1], -1, self.nope + self.rope)  # [b, s, n, nope + rope]
        latent, key = self.linear_kv_down_proj(hidden)[:, :, None].split((self.latent, self.rope), dim=-1)
        latent = self.linear_kv_up_proj_layernorm(latent)  # [b, s, 1, latent]
        cos, sin = cos[:, :, 0], sin[:, :, 0]  # [b, s, 1, rope / 2]
        plain, turned = query.split((self.nope, self.rope), dim=-1)
        query = torch.cat((plain, rotate(turned, cos, sin, interleaved=True)), dim=-1)
        remembered = torch.cat((latent, rotate(key, cos, sin, interleaved=True)), dim=-1)
        return query.transpose(1, 2), remembered.transpose(1, 2)

    def remember(self, key: Tensor, past_key_values: Cache) -> Tensor:
        """All tokens' `latent | key` so far: the cache's keys; its values have no channels.

        Held together a step reads them as they lie. A quantized cache scales keys and values each by their own, and
        makes new tensors at every step: latents are its keys, keys its values.
        """
        if isinstance(past_key_values, QuantizedCache):
            return torch.cat(past_key_values.update(*key.split((self.latent, self.rope), -1), self.layer_idx), dim=-1)
        return past_key_values.update(key, key[..., :0], self.layer_idx)[0]

    def absorbs(self, queries: int, keys: int, mask: Tensor | None) -> bool:
        """Whether attending among latents is less work than expanding them first.

        It saves a matmul a key, costs one a query (or a row of the identity, see `up_matrices`), and wider heads a pair
        of both. With DeepSeek-V2's sizes that is worth it up to 157 new tokens after a long cache. The module measured
        on a CPU (16 heads, float32, one thread), absorbed against expanded: after 4096 tokens 1 more takes 7 ms against
        225, 64 take 101 against 276, 128 208 against 334, 256 405 against 425; after 1024 tokens 1 more takes 5 against
        43, 128 69 against 77, 256 133 against 113. In bfloat16 the sides change in the same places.
        """
        if self.config._attn_implementation not in LATENT or (mask is None and queries > 1):
            return False  # no mask stands for causal rows here, which the absorbed form cannot tell
        saved = keys - queries - (0 if self.up_is_plain() else self.latent)
        wider = 2 * (self.latent + self.rope) - (self.nope + self.rope + self.values)
        return queries * keys * wider < saved * self.latent * (self.nope + self.values)

    def expanded(
        self, query: Tensor, key: Tensor, mask: Tensor | None, layout: Layout | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over each head's own keys and values: `[b, n, s, nope + rope]` to `[b, s, n, v]`."""
        latent, turned = key.split((self.latent, self.rope), dim=-1)
        both = self.linear_kv_up_proj(latent[:, 0]).unflatten(-1, (-1, self.nope + self.values))  # [b, k, n, nope + v]
        plain, value = both.transpose(1, 2).split((self.nope, self.values), dim=-1)
        key = torch.cat((plain, turned.expand(-1, plain.shape[1], -1, -1)), dim=-1)  # [b, n, k, nope + rope]
        query, key, value = as_wide(query, key, value)
        out, weights = self.attend(query, key, value, mask, layout, self.sinks(query), **kwargs)
        return out[..., : self.values], weights

    def absorbed(
        self, query: Tensor, key: Tensor, mask: Tensor | None, layout: Layout | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention over the latents themselves: `[b, n, s, nope + rope]` to `[b, s, n, v]`.

        All heads look at one key, so their queries are rows of one head. Keys serve as values, whole: kernels want both
        as wide, and the last channels found are dropped.
        """
        batch, heads, length, _ = query.shape
        keys, values = self.up_matrices(query).split((self.nope, self.values), dim=1)
        plain, turned = query.split((self.nope, self.rope), dim=-1)
        plain = torch.einsum("bnsd,ndc->bnsc", plain, keys)
        rows = torch.cat((plain, turned), dim=-1).flatten(1, 2)[:, None]  # [b, 1, n s, latent + rope]
        if mask is not None:
            mask = mask.expand(-1, heads, -1, -1).flatten(1, 2)[:, None]  # [b, 1, n s, k]
        sinks = self.sinks(query)
        sinks = None if sinks is None else sinks.repeat_interleave(length)
        out, weights = self.attend(rows, key, key, mask, layout, sinks, **{**kwargs, "is_causal": False})
        out = out[..., : self.latent].view(batch, heads, length, self.latent)
        weights = None if weights is None else weights.view(batch, heads, length, -1)
        return torch.einsum("bnsc,nvc->bsnv", out, values), weights

    def up_matrices(self, like: Tensor) -> Tensor:
        """The rows of `linear_kv_up_proj`, head by head: `[n, nope + v, latent]`.

        Where the module is more than its weight it is asked for them: it maps the identity.
        """
        if self.up_is_plain():
            rows = self.linear_kv_up_proj.weight
        else:
            rows = self.linear_kv_up_proj(torch.eye(self.latent, dtype=like.dtype, device=like.device)).t()
        return rows.unflatten(0, (-1, self.nope + self.values))

    def up_is_plain(self) -> bool:
        """Whether `linear_kv_up_proj` is its weight: no adapter, not quantized, not on the disk, not a rank's part."""
        up = self.linear_kv_up_proj
        return type(up) is nn.Linear and type(up.weight) is nn.Parameter and not up.weight.is_meta


def build_latent_norm(config: McoreGPTConfig, size: int) -> nn.Module:
    """The model's norm over a latent of `size` channels, if it has one."""
    return build_norm(config, size) if config.qk_layernorm else nn.Identity()


def as_wide(*heads: Tensor) -> list[Tensor]:
    """Tensors `[..., d]` with zeros behind their channels up to the widest: fused kernels want one width."""
    width = max(x.shape[-1] for x in heads)
    return [x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in heads]
