"""Which keys a query sees, and scaled dot-product attention that needs no mask to know it.

A mask over a sequence costs its square. A prefill does without: padding on the left is moved behind the tokens
(where a causal query never looks) and back afterwards, padding on the right is there already, packed documents are
attended one by one, a sliding window in blocks, a chunk after a cache as a rectangle and a triangle (prefix.py).
transformers' mask helpers serve the rest: decoding (a few rows of keys), compiled graphs where they must look at
values, and every implementation but `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .block_attention import attend_blocks, causal_blocks
from .context_parallel import ContextParallel, active
from .prefix import Prefix, attend_after, prefix_of, stretches

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
FEW = 64  # queries after a cache that take a mask, as one does: multi-latent attention then stays among its latents
NARROW = 32  # a window of fewer tokens is attended in bands with a mask: its blocks would be many and small
BAND = 1024  # queries a band of a sliding window holds at least: wide enough to keep a kernel busy
SINK_CHANNELS = 8  # the sink's channel, and seven zeros that keep rows of bfloat16 aligned for fused kernels


class Layout(NamedTuple):
    """How a prefill's tokens lie in their rows, where a row is not simply one causal sequence.

    Args:
        order: `[b, s]`, for each place the token that moves there so that padding comes last; None: as they are.
        back: `[b, s]`, the way back.
        documents: lengths of packed documents over the flattened rows; None: a row is one document.
        kept: `[b, s]`, False for padding, where a row may have padding between its tokens.
        prefix: what came before a chunk of tokens; None: nothing.
        context: with which ranks the sequence is shared; None: a row is here whole.
    """

    order: Tensor | None = None
    back: Tensor | None = None
    documents: list[int] | None = None
    kept: Tensor | None = None
    prefix: Prefix | None = None
    context: ContextParallel | None = None

    def cut(self, keys: Tensor, length: int) -> Tensor:
        """A cache's `keys` `[b, g, k, d]` without the room a static one has behind its last `length` tokens."""
        return keys[:, :, : length + (0 if self.prefix is None else self.prefix.past)]


def plan(
    config: PreTrainedConfig,
    types: list[str],
    hidden: Tensor,
    attention_mask: Tensor | dict[str, Tensor] | None,
    position_ids: Tensor | None,
    past_key_values: Cache | None,
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """A mask for each type of layer (None where none is needed), and what else the attention call is to be told.

    Args:
        types: the types of layer there are: `full_attention`, `sliding_attention`.
        hidden: embeddings `[b, s, h]`.
        attention_mask: None, `[b, s_k]` (1 a token, 0 padding), `[b, 1, s, s_k]`, or one of those a layer type.
        position_ids: the caller's own `[b, s]`, None if there are none. Packed documents are seen by them: each
            starts at 0. Positions that only jump (a rank's part of a longer context) are no documents.
    """
    if (context := active()) is not None:
        return dict.fromkeys(types), {"layout": Layout(context=context)}
    if isinstance(attention_mask, dict):
        return {kind: attention_mask.get(kind) for kind in types}, {}
    if attention_mask is not None and attention_mask.dim() == 4:
        return dict.fromkeys(types, attention_mask), {}

    prefill = hidden.shape[1] > 1 and is_empty(past_key_values)
    positions = position_ids if prefill and attention_mask is None else None
    documents = packed_documents(positions, len(hidden))
    if (layout := after_cache(config, hidden, attention_mask, past_key_values)) is not None:
        return dict.fromkeys(types), {"layout": layout}
    maybe = positions is not None and torch.compiler.is_compiling()  # a compiled graph cannot look at positions
    if prefill and config._attn_implementation == "sdpa" and not maybe:
        layout = layout_of(attention_mask, hidden.shape[1]) if documents is None else Layout(documents=documents)
        if layout is not None:
            return dict.fromkeys(types), {"layout": layout}
    # transformers looks for packed documents where there are positions and no cache: only where there may be some.
    packed = positions if documents is not None or maybe else None
    arguments = {
        "config": config,
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        "past_key_values": past_key_values if packed is None else None,
        "position_ids": None if packed is None else within_documents(packed),
    }
    masks = {kind: MASKS[kind](**arguments) for kind in types}
    return masks, {} if documents is None else varlen(documents, hidden.device)


def after_cache(
    config: PreTrainedConfig, hidden: Tensor, attention_mask: Tensor | None, past_key_values: Cache | None
) -> Layout | None:
    """The layout of a chunk of tokens `[b, s, h]` after a cache; None where it takes a mask, or there is no cache."""
    length = hidden.shape[1]
    if length < FEW or config._attn_implementation != "sdpa" or torch.compiler.is_compiling():
        return None
    if past_key_values is None or is_empty(past_key_values):
        return None
    prefix = prefix_of(attention_mask, int(past_key_values.get_seq_length()), length)
    return None if prefix is None else Layout(prefix=prefix)


def varlen(documents: list[int], device: torch.device) -> dict[str, Any]:
    """Packed documents as flash attention's variable length functions take them; other implementations ignore it."""
    edges = torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device=device)
    longest = max(documents)
    return {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}


def is_empty(past_key_values: Cache | None) -> bool:
    """Whether no token came before; a compiled graph with a static cache cannot know, and says no."""
    if past_key_values is None:
        return True
    length = past_key_values.get_seq_length()
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        return False
    return int(length) == 0


def packed_documents(position_ids: Tensor | None, rows: int) -> list[int] | None:
    """Lengths of the documents that positions `[b, s]` starting over at 0 show, None for one document a row."""
    if position_ids is None or torch.compiler.is_compiling():
        return None
    starts = position_ids.expand(rows, -1) == 0
    if not starts[:, 1:].any():
        return None
    starts = starts.clone()
    starts[:, 0] = True
    edges = starts.flatten().nonzero().flatten().tolist()
    return [end - start for start, end in zip(edges, [*edges[1:], starts.numel()], strict=True)]


def within_documents(position_ids: Tensor) -> Tensor:
    """Places `[b, s]` counted from where positions last were 0: without the jumps that are no documents' edges."""
    places = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    return places - torch.where(position_ids == 0, places, 0).cummax(dim=-1).values


def layout_of(attention_mask: Tensor | None, length: int) -> Layout | None:
    """The layout of rows with padding anywhere; None for a mask of another length."""
    if attention_mask is None:
        return Layout()
    if attention_mask.shape[-1] != length:
        return None
    kept, holes = attention_mask.bool(), True
    if not torch.compiler.is_compiling():  # a compiled graph cannot look into the mask: it always moves the tokens
        holes = bool(stretches(kept).max() > 1)
        if not holes and bool(kept[:, 0].all()):
            return Layout()
    order = torch.argsort(~kept, dim=-1, stable=True)
    return Layout(order, torch.argsort(order, dim=-1), kept=kept if holes else None)


def attend(
    interface: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    layout: Layout | None,
    sinks: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`sdpa` attention over a mask or a layout: `[b, n, s, d]` to `[b, s, n, d]`."""
    scaling, window = options["scaling"], options["sliding_window"]
    in_blocks = not options["dropout"] and not torch.compiler.is_compiling()

    def masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        if sinks is not None:
            return with_sink(interface, module, query, key, value, mask, sinks, **options)
        return interface(module, query, key, value, mask, **options)[0]

    def causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[2]
        if window is None or length <= window:
            return masked(query, key, value)
        if in_blocks and window >= NARROW:
            return attend_blocks(query, key, value, causal_blocks(0, length, 0, window), scaling, sinks)
        return banded(masked, query, key, value, window)

    if layout is None:
        return masked(query, key, value, mask), None
    if (prefix := layout.prefix) is not None:
        if in_blocks and (window is None or not prefix.holes):
            return attend_after(query, key, value, prefix, window, scaling, sinks), None
        return banded(masked, query, key, value, window, prefix.kept), None
    if layout.documents is not None:
        return by_document(causal, query, key, value, layout.documents), None
    if layout.kept is not None and window is not None and query.shape[2] > window:
        return banded(masked, query, key, value, window, layout.kept), None
    if layout.order is None or layout.back is None:
        return causal(query, key, value), None
    query, key, value = (permute(x.transpose(1, 2), layout.order).transpose(1, 2) for x in (query, key, value))
    return permute(causal(query, key, value), layout.back), None


def permute(x: Tensor, order: Tensor) -> Tensor:
    """`x` `[b, s, ...]` with row i's places filled from `order[i]`."""
    return x[torch.arange(len(x), device=x.device)[:, None], order]


def by_document(causal: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Each packed document attends to itself; rows are laid end to end, so `lengths` add up to b s."""
    rows, _, length, _ = query.shape
    flat = [x.transpose(1, 2).flatten(0, 1)[None].transpose(1, 2) for x in (query, key, value)]  # [1, heads, b s, d]
    documents = zip(*(x.split(lengths, dim=2) for x in flat), strict=True)
    outs = [causal(q, k, v) for q, k, v in documents]
    return torch.cat(outs, dim=1).unflatten(1, (rows, length)).squeeze(0)


def banded(
    masked: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    kept: Tensor | None = None,
) -> Tensor:
    """Causal attention in bands of queries, each with a mask: of a window s x window at most, never s x s.

    Args:
        key, value: as many as queries or, of those before a chunk too, more.
        kept: `[b, k or more]`, False for padding; its last are the keys'. Padding sees itself, lest it see nothing.
    """
    length, held = query.shape[2], key.shape[2]
    outs = []
    for start in range(0, length, max(window or 0, BAND)):
        end = min(start + max(window or 0, BAND), length)
        first = 0 if window is None else max(0, held - length + start - window + 1)
        queries = torch.arange(held - length + start, held - length + end, device=query.device)[:, None]
        keys = torch.arange(first, held - length + end, device=query.device)
        seen = keys <= queries  # [band, keys]
        if window is not None:
            seen = seen & (keys > queries - window)
        mask = seen[None, None]
        if kept is not None:
            mask = mask & kept[:, None, None, kept.shape[-1] - held :][..., first : first + len(keys)]
            mask = mask | (keys == queries)
        here = slice(first, first + len(keys))
        outs.append(masked(query[:, :, start:end], key[:, :, here], value[:, :, here], mask))
    return torch.cat(outs, dim=1)


def with_sink(
    interface: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor,
    **options: Any,
) -> Tensor:
    """Attention with one more logit a head, as one more key that every query sees and whose value is zero.

    The logit comes from a channel of its own: the query carries `sink / scaling` there, the extra key 1, all others
    0. Before a causal prefill goes an empty query, so that the diagonal still falls where it should.
    """
    batch, _, length, channels = query.shape
    causal = mask is None and length > 1 and options.get("is_causal", True)
    if causal:  # a static cache is longer than its prefill
        key, value = key[:, :, :length], value[:, :, :length]
    logit = (sinks.float() / options["scaling"]).to(query.dtype).view(1, query.shape[1], -1, 1)  # [1, n, 1 or s, 1]
    logit = F.pad(logit, (0, SINK_CHANNELS - 1)).expand(batch, -1, length, -1)
    query = torch.cat((query, logit), dim=-1)  # [b, n, s, d + 8]
    key, value = (F.pad(x, (0, SINK_CHANNELS, 1, 0)) for x in (key, value))  # [b, g, 1 + s_k, d + 8]
    key[:, :, 0, channels] = 1
    if causal:
        query = F.pad(query, (0, 0, 1, 0))
    elif mask is not None:
        mask = F.pad(mask, (1, 0), value=True if mask.dtype == torch.bool else 0.0)
    out, _ = interface(module, query, key, value, mask, **options)  # [b, s, n, d + 8]
    return out[:, int(causal) :, :, :channels]
