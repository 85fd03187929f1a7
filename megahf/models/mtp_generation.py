"""Drafts for `generate(use_mtp=True)`: heads for further tokens guess ahead, the model checks their guesses at once.

transformers' assisted decoding does the checking, the rolling back of the model's cache and the sampling; it takes what
is here in place of its own generator, which knows other models' heads only. What comes out is what the model alone
would say: its tokens if decoding is greedy, its distribution if it samples.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.candidate_generator import CandidateGenerator

if TYPE_CHECKING:
    from transformers.generation import GenerationConfig, LogitsProcessorList

    from .modeling_mcore_gpt import McoreGPTForCausalLM
    from .mtp import MultiTokenPrediction

CROPPED = (DynamicLayer, DynamicSlidingWindowLayer)  # layers of a cache that can be rolled back


class MTPCandidateGenerator(CandidateGenerator):
    """One draft a head and round, of one sequence.

    The model has seen tokens 0 .. n - 1 and said token n. Head k (from 1) then goes over positions up to n - 1, where
    it needs token n + k - 1: the first head knows it, further ones have a draft for it. Each has a cache of its own;
    from it the next round takes back the k - 1 positions that hung on drafts, and does them again with what is known.
    """

    requires_model_outputs = True
    model_kwargs_overrides: ClassVar[dict[str, Any]] = {"output_last_hidden_state": True}

    def __init__(
        self,
        model: McoreGPTForCausalLM,
        generation_config: GenerationConfig,
        logits_processor: LogitsProcessorList | None,
        past_key_values: Cache | None,
    ) -> None:
        heads = getattr(model.model, "mtp", None)
        if heads is None:
            raise ValueError("use_mtp: this model has no heads for further tokens, mtp_num_layers is None")
        check_cache(past_key_values)
        self.model = model
        self.heads: MultiTokenPrediction = heads
        self.processor = logits_processor
        self.samples = generation_config.do_sample
        self.max_length = generation_config.max_length
        self.eos = generation_config._eos_token_tensor
        self.caches = [DynamicCache() for _ in range(heads.heads)]  # whole: a window is in the mask
        self.tails: dict[int, Tensor] = {}  # by head, the input states `[1, 1, h]` of the first position taken back
        self.seen = 0  # positions done

    @torch.no_grad()
    def get_candidates(
        self,
        input_ids: Tensor,
        model_kwargs: dict[str, Any],
        model_outputs: Any,
        is_first_iteration: bool,
        n_last_matches: int,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens `[1, n + 1]` with drafts behind them, and the drafts' logits `[1, drafts, V]`; no drafts at first."""
        room = self.max_length - input_ids.shape[1] - 1  # a round ends with a token of the model's own
        if is_first_iteration or room < 1:
            return input_ids, None
        end, hidden = input_ids.shape[1] - 1, model_outputs.last_hidden_state
        if self.seen == 0 and hidden.shape[1] != end:
            raise ValueError("use_mtp drafts from tokens, which inputs_embeds does not tell: give input_ids")
        hidden = hidden[:, : end - self.seen]  # without positions of rejected drafts
        places = torch.arange(end + 1 + len(self.caches), device=input_ids.device)[None]
        given = model_kwargs.get("position_ids")
        positions = places if given is None else (places + given[:, -1:] - end).clamp(min=0)  # of drafts too
        mask = model_kwargs.get("attention_mask")
        mask = None if mask is None else mask[:, :end]
        tokens, logits = self.draft(input_ids, hidden, positions, mask, room)
        self.seen = end
        if self.eos is not None:  # nothing comes after it
            over = torch.isin(tokens[0, end + 1 :], self.eos.to(tokens.device)).nonzero()
            drafts = int(over[0]) + 1 if len(over) else logits.shape[1]
            tokens, logits = tokens[:, : end + 1 + drafts], logits[:, :drafts]
        return tokens, logits

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        """Nothing to adapt: there are as many drafts as heads. (transformers 5.17 wants to hear it.)"""

    def draft(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor | None, room: int
    ) -> tuple[Tensor, Tensor]:
        """`tokens` with a draft of each head, and the drafts' logits; `hidden` is of the model's new positions."""
        logits, end = list[Tensor](), self.seen + hidden.shape[1]
        for head in range(min(len(self.caches), room)):
            start = max(self.seen - head, 0)
            if hidden.shape[1] < end - start:
                hidden = torch.cat((self.tails[head], hidden), dim=1)
            self.tails[head] = hidden[:, -head or -1 :][:, :1]
            hidden = self.advance(head, hidden, tokens, positions, mask, start)
            scores = self.model.to_logits(hidden[:, -1]).to(tokens.device, torch.float32)  # [1, V]
            if self.processor is not None:
                scores = self.processor(tokens, scores)
            token = torch.multinomial(scores.softmax(-1), 1) if self.samples else scores.argmax(-1, keepdim=True)
            tokens, logits = torch.cat((tokens, token), dim=1), [*logits, scores]
        return tokens, torch.stack(logits, dim=1)

    def advance(
        self, head: int, hidden: Tensor, tokens: Tensor, positions: Tensor, mask: Tensor | None, start: int
    ) -> Tensor:
        """States `[1, s, h]` of one head from `hidden` `[1, s, h]`, at positions from `start` on."""
        model, cache, end = self.model.model, self.caches[head], start + hidden.shape[1]
        drafted = cache.get_seq_length() - start
        if drafted > 0:
            cache.crop(-drafted)
        further = slice(start + head + 1, end + head + 1)
        words = model.embedding(model.get_input_embeddings()(tokens[:, further]), positions[:, further])
        rotary = model.rotary_pos_emb
        rotation = None if rotary is None else rotary(positions[:, start:end], model.dtype)
        return self.heads.step(head, words, hidden, mask, None, [], past_key_values=cache, rotation=rotation)


def check_cache(past_key_values: Cache | None) -> None:
    """A cache to begin with: one that can be rolled back, and empty."""
    if past_key_values is None:
        return
    for layer in past_key_values.layers:
        if type(layer) not in CROPPED:
            raise ValueError(
                f"use_mtp takes rejected tokens back out of the cache, but a {type(layer).__name__} cannot be cropped: "
                f"leave cache_implementation and past_key_values out, or give a DynamicCache"
            )
    if seen := past_key_values.get_seq_length():
        raise ValueError(
            f"use_mtp: past_key_values holds {seen} tokens, which transformers' assisted decoding would take in once "
            f"more: leave it out"
        )
