"""Multi-token prediction: heads that predict further tokens, each from the states of the one before it.

At position i head k (from 1) sees the hidden state that head k - 1 left there (head 0 is the model itself, after its
final norm) and the word vector of token i + k; it predicts token i + k + 1 by the model's own output layer. Everything
is computed as megatron-core 0.16.1 does (`transformer/multi_token_prediction.py`); `mtp_use_repeated_layer`, and what
0.16.1 crashes on, as its main.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .layout import plan
from .norm import build_norm
from .transformer_layer import TransformerLayer, run_layer

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_mcore import McoreGPTConfig
    from .modeling_mcore_gpt import McoreGPTModel

IGNORED = -100  # the target that no loss counts
PLAN_PREFIXES = ("decoder.layers.*.", "layers.*.transformer_layer.")


@dataclass
class MTPOutput(MoeCausalLMOutputWithPast):
    """A causal model's output with its heads'.

    Args:
        last_hidden_state: of the model, `[b, s, h]`, if asked for.
        mtp_loss: each head's cross entropy, `[heads]`; `loss` has their mean, times `mtp_loss_scaling_factor`, in it.
        mtp_logits: each head's `[b, s, V]`, if asked for; head k's at position i are of token i + k + 1.
    """

    last_hidden_state: Tensor | None = None
    mtp_loss: Tensor | None = None
    mtp_logits: tuple[Tensor, ...] | None = None


class HeadConfig:
    """The model's configuration as a head's inner layer sees it: that of a model of one layer, number 0.

    A view, so that what is set on the model's later (its attention implementation) is set here.
    """

    num_layers = 1

    def __init__(self, config: McoreGPTConfig, head: int) -> None:
        self.whole = config
        self.layer_types = [head_layer_type(config, head)]
        self.rotary_layers = [config.rotary_layers[min(head, config.num_layers - 1)]]  # as main; 0.16.1 crashes
        self.moe_layers = config.moe_layers[-1:]

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.whole, name)


def head_layer_type(config: McoreGPTConfig, head: int) -> str:
    """Whether a head's layer has the window.

    For a frequency Megatron's 0.16.1 goes on counting layers after the last (its main starts over, which differs where
    the frequency does not divide their number). For a list it crashes, and main takes the list's first entries.
    """
    frequency = config.window_attn_skip_freq
    if config.sliding_window is None or not isinstance(frequency, int):
        return config.layer_types[min(head, config.num_layers - 1)]
    return "full_attention" if (config.num_layers + head + 1) % frequency == 0 else "sliding_attention"


class MultiTokenPredictionLayer(nn.Module):
    """One head: `norm(layer(eh_proj(norm(words) | norm(hidden))))`, with a layer of the kind of the model's last."""

    def __init__(self, config: McoreGPTConfig, head: int) -> None:
        super().__init__()
        self.enorm = build_norm(config, config.hidden_size)
        self.hnorm = build_norm(config, config.hidden_size)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)  # of words | hidden
        self.layer_type = head_layer_type(config, head)
        self.transformer_layer = TransformerLayer(cast("McoreGPTConfig", HeadConfig(config, head)), 0)
        self.final_layernorm = build_norm(config, config.hidden_size)

    def forward(self, words: Tensor, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Embedded next tokens and hidden states to hidden states, `[b, s, h]` all, and the router's auxiliary loss."""
        both = torch.cat((self.enorm(words), self.hnorm(hidden)), dim=-1)  # [b, s, 2 h]
        losses: list[Tensor] = []
        hidden = run_layer(self.transformer_layer, self.eh_proj(both), losses, **kwargs)
        return self.final_layernorm(hidden), losses


class MultiTokenPrediction(nn.Module):
    """The heads; embedding, rotation and output layer are the model's.

    Has methods in place of `forward`, around which accelerate would move the model among their arguments.
    """

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = config.mtp_num_layers or 0
        own = 1 if config.mtp_use_repeated_layer else self.heads
        self.layers = nn.ModuleList(MultiTokenPredictionLayer(config, head) for head in range(own))
        self._tp_plan = self.plan_like_layers(config.base_model_tp_plan)
        self._ep_plan = self.plan_like_layers(config.base_model_ep_plan)
        self._fsdp_plan = {"layers.*": "free_full_weight"}

    def plan_like_layers(self, plan: dict[str, str] | None) -> dict[str, str]:
        """The parallel plan of the model's layers as that of the heads', which transformers finds by its attribute."""
        own = {re.sub(r"\.\d+(?=\.|$)", ".*", name) for name, _ in (*self.named_modules(), *self.named_parameters())}
        moved = {name.replace(*PLAN_PREFIXES, 1): style for name, style in (plan or {}).items()}
        return {name: style for name, style in moved.items() if name in own}

    def run(
        self,
        model: McoreGPTModel,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        hidden: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        **kwargs: Any,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden states `[b, s, h]` of each head over whole sequences, and their routers' auxiliary losses.

        Where a row or a packed document ends there is no further token: as in Megatron token 0 at position 0 stands in,
        so that head k's last k positions predict nothing. Rotation stays that of position i.

        Args:
            hidden: of the model `[b, s, h]`, after its final norm; the others are as the model was given them.
        """
        embed = model.get_input_embeddings()
        words = embed(input_ids) if inputs_embeds is None else inputs_embeds  # [b, s, h]
        none = embed(torch.zeros(1, 1, dtype=torch.long, device=words.device))  # [1, 1, h]
        ends = ends_of(words, attention_mask, position_ids)
        positions = model.positions(words, None) if position_ids is None else position_ids
        kwargs["rotation"] = None if model.rotary_pos_emb is None else model.rotary_pos_emb(positions, model.dtype)
        if self.training and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            kwargs["expert_tokens"] = attention_mask
        states: list[Tensor] = []
        losses: list[Tensor] = []
        for head in range(self.heads):
            words, positions = roll(words, ends, none), roll(positions.expand(ends.shape), ends, 0)
            embedded = model.embedding(words, positions)
            hidden = self.step(head, embedded, hidden, attention_mask, position_ids, losses, **kwargs)
            states.append(hidden)
        return states, losses

    def step(
        self,
        head: int,
        words: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        losses: list[Tensor],
        past_key_values: Cache | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states `[b, s, h]` of one head (from 0) from embedded `words`; a cache of one layer, for it alone.

        Its router's auxiliary loss, if there is one, is appended to `losses`.
        """
        layer = cast("MultiTokenPredictionLayer", self.layers[min(head, len(self.layers) - 1)])
        masks, layout = plan(self.config, [layer.layer_type], hidden, attention_mask, position_ids, past_key_values)
        call = {**layout, **kwargs, "past_key_values": past_key_values, "position_embeddings": rotation}
        hidden, more = layer(words, hidden, attention_mask=masks[layer.layer_type], **call)
        losses += more
        return hidden


def ends_of(tokens: Tensor, attention_mask: Any, position_ids: Tensor | None) -> Tensor:
    """Which of the tokens `[b, s, ...]` have no successor: the last of each row, and of each packed document.

    Documents are seen as `plan` sees them: by positions that start over at 0, where there is no mask.
    """
    ends = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    ends[:, -1] = True
    if attention_mask is None and position_ids is not None:
        ends = ends | (position_ids.roll(-1, dims=1) == 0)
    return ends


def roll(x: Tensor, ends: Tensor, filling: Tensor | int) -> Tensor:
    """`x` `[b, s, ...]` with each place taken by the next one's, and by `filling` at the `ends` `[b, s]`."""
    return torch.where(ends.view(*ends.shape, *[1] * (x.dim() - 2)), filling, x.roll(-1, dims=1))


def head_losses(
    language_loss: Callable[..., Tensor],
    states: list[Tensor],
    logits: Sequence[Tensor | None],
    labels: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Each head's mean cross entropy over the tokens it has to predict, `[heads]`; 0 for one that has none.

    Args:
        language_loss: of hidden states and of logits, or None for these.
        states: `[b, s, h]` of each head.
        logits: `[b, s, V]` of each head, or None.
        labels: a token's own `[b, s]`, as transformers gives them; or shifted, what follows it, `shift_labels`.
    """
    following = F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shift_labels is None else shift_labels
    losses = []
    given = head_targets(following, attention_mask, position_ids)
    for hidden, predicted, targets in zip(states, logits, given, strict=False):
        count = (targets != IGNORED).sum().clamp(min=1)
        losses.append(language_loss(hidden, predicted, labels=None, shift_labels=targets, num_items_in_batch=count))
    return torch.stack(losses)


def head_targets(following: Tensor, attention_mask: Any, position_ids: Tensor | None) -> Iterator[Tensor]:
    """What head after head is to predict `[b, s]`, from what follows each token `[b, s]`; `IGNORED` where nothing.

    Padding predicts nothing. (The model itself, as all of transformers' are, has a left-padded row's first token
    predicted by the padding before it.)
    """
    ends = ends_of(following, attention_mask, position_ids)
    padding = isinstance(attention_mask, Tensor) and attention_mask.shape == following.shape
    while True:
        following = roll(following, ends, IGNORED)
        yield following.masked_fill(attention_mask == 0, IGNORED) if padding else following
