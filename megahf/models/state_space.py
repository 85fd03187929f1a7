"""What every state-space mixer needs: how tokens lie in their rows, the states in the cache, and a walk over spans.

The recurrence reads tokens in order, so padding is moved behind a row's tokens (and back in the outputs): the states
then pass from token to token whatever the mask, and are those of the last token, from which the next call goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .context_parallel import ContextParallel, active
from .context_recurrence import Scan
from .conv import CausalConv1d, upcast
from .layout import permute

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

# Tokens that go through a mixer at once, without gradients: its projections are several times as wide as the stream.
CPU_SPAN = 1024  # stays in the cache
SPAN = 2**15  # elsewhere, and in a compiled graph, which holds every round of the loop

States = tuple[Tensor | None, Tensor | None]  # the convolution's last inputs `[b, c, w]`, the recurrence's state


class Rows(NamedTuple):
    """How tokens lie in their rows, where a row is not simply one sequence.

    Args:
        order: `[b, s]`, for each place the token that moves there so that padding comes last; None: as they are.
        back: `[b, s]`, the way back.
        mask: `[b, s]`, False for padding, in the new order.
        seq_idx: `[b, s]`, which packed document a token is of, growing.
        context: with which ranks the sequence is shared; None: a row is here whole.
    """

    order: Tensor | None = None
    back: Tensor | None = None
    mask: Tensor | None = None
    seq_idx: Tensor | None = None
    context: ContextParallel | None = None

    def recurrence(self, convolution: CausalConv1d, scan: Scan) -> tuple[Callable[..., tuple[Tensor, Tensor]], Scan]:
        """A mixer's convolution and scan, over the slices of all ranks if there are some."""
        return (convolution, scan) if self.context is None else self.context.recurrence(convolution, scan)


def rows_of(attention_mask: Tensor | None, position_ids: Tensor | None, hidden: Tensor, fresh: bool) -> Rows:
    """Worked out once a forward, for all mixers.

    Args:
        attention_mask: None or `[b, s_k]`, 1 a token, 0 padding, of which the last s are these tokens'.
        position_ids: the caller's own `[b, s]`, None if there are none: packed documents each start at 0.
        hidden: embeddings `[b, s, h]`.
        fresh: whether no token came before; only then are there packed documents.
    """
    if (context := active()) is not None:
        return Rows(context=context)
    rows, length = hidden.shape[:2]
    if length == 1:  # of decoding: never padding
        return Rows()
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(
            f"attention_mask has the shape {shape}: Mamba layers read their tokens in order and take only a mask of "
            f"padding, {(rows, length)}; show packed documents by position_ids that start over at 0"
        )
    look = not torch.compiler.is_compiling()  # a compiled graph cannot look at values: it takes the general way
    if attention_mask is not None:
        kept = attention_mask[:, -length:].bool()
        if look and bool(kept.all()):
            return Rows()
        if look and not bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            return Rows(mask=kept)
        order = torch.argsort(~kept, dim=-1, stable=True)
        return Rows(order, torch.argsort(order, dim=-1), kept.gather(1, order))
    if position_ids is None or not fresh:
        return Rows()
    starts = position_ids.expand(rows, -1) == 0
    if look and not bool(starts[:, 1:].any()):
        return Rows()
    return Rows(seq_idx=starts.cumsum(dim=-1))


def recall(past_key_values: Cache | None, layer_idx: int) -> States:
    """The states that a layer left in the cache, both None where no token came before."""
    if past_key_values is None or not past_key_values.has_previous_state(layer_idx):
        return None, None
    layer = past_key_values.layers[layer_idx]
    held = (layer.conv_states, layer.recurrent_states)  # of several convolutions; one alone before transformers 5.17
    conv_state, state = (states[0] if isinstance(states, dict) else states for states in held)
    if torch.is_grad_enabled():  # the cache is written in place, and the graph needs what was there
        return conv_state.clone(), state.clone()
    return conv_state, state


def remember(past_key_values: Cache, layer_idx: int, conv_state: Tensor, state: Tensor) -> None:
    """Leaves the states in the cache; both in float32, for transformers 5.10 gives one the other's dtype."""
    past_key_values.update_conv_state(upcast(conv_state), layer_idx)
    past_key_values.update_recurrent_state(state, layer_idx)


def walk(
    mix: Callable[[Tensor, States, Rows], tuple[Tensor, tuple[Tensor, Tensor]]],
    hidden: Tensor,
    layer_idx: int,
    past_key_values: Cache | None,
    rows: Rows | None,
) -> Tensor:
    """Takes `hidden` `[b, s, h]` through a mixer span by span, each from the states that the one before left.

    Args:
        mix: `[b, s, h]` to the same, from states to states, of rows whose padding comes last.
        past_key_values: holds the states of the tokens before, and then those of the last of these.
        rows: as `rows_of` made them; None: a row is one sequence.
    """
    rows = rows or Rows()
    if rows.context is not None:
        out, rows.context.states[layer_idx] = mix(hidden, (None, None), rows)
        return out
    if rows.order is not None:
        hidden = permute(hidden, rows.order)
    states = recall(past_key_values, layer_idx)
    span = hidden.shape[1]
    if not torch.is_grad_enabled():
        span = CPU_SPAN if hidden.device.type == "cpu" and not torch.compiler.is_compiling() else SPAN
    outs = []
    for start in range(0, hidden.shape[1], span):
        order, back, mask, seq_idx = (t if t is None else t[:, start : start + span] for t in rows[:4])
        here = Rows(order, back, mask, seq_idx)
        if start and rows.seq_idx is not None:
            states = kept(states, rows.seq_idx[:, start - 1] == rows.seq_idx[:, start])
        out, left = mix(hidden[:, start : start + span], states, here)
        outs.append(out)
        states = left
    if past_key_values is not None:
        remember(past_key_values, layer_idx, *left)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return out if rows.back is None else permute(out, rows.back)


def kept(states: States, same: Tensor) -> States:
    """The states of the rows that go on with the `same` `[b]` document, zeros for the others."""
    conv_state, state = (t if t is None else t * same.view(-1, *[1] * (t.dim() - 1)) for t in states)
    return conv_state, state
