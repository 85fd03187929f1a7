"""The router of a mixture of experts: which experts a token goes to, how much each counts, and what balances them.

Everything is computed as megatron-core 0.16.1 does (`moe/router.py`, `moe/moe_utils.py`), `sqrtsoftplus` as its main.
Where results depend on the order of tokens (an expert's capacity, Sinkhorn), it is Megatron's: position by position,
the rows of the batch side by side, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, None: None}
SINKHORN_TOLERANCE = 1e-4


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.float32)


def sigmoid(logits: Tensor) -> Tensor:
    return torch.sigmoid(logits.float())


def sqrtsoftplus(logits: Tensor) -> Tensor:
    return F.softplus(logits.float()).sqrt()


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "sqrtsoftplus": sqrtsoftplus,
}


class TopKRouter(nn.Module):
    """Chooses k of E experts for each token.

    `weight` `[E, h]` and `bias` `[E]` make the logits; `expert_bias` `[E]`, always float32, is added to the scores for
    the choice alone. Training does not move it: Megatron does that outside of the gradient.
    """

    expert_bias: Tensor | None

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = experts = config.num_experts or 0
        self.topk = config.moe_router_topk
        self.gating_dtype = DTYPES[config.moe_router_dtype]
        self.score = SCORES[config.moe_router_score_function]
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(experts)) if config.moe_router_bias else None
        bias = torch.zeros(experts, dtype=torch.float32) if config.moe_router_enable_expert_bias else None
        self.register_buffer("expert_bias", bias)
        # Whether what becomes of a token depends on the others, and so on their order.
        sinkhorn = config.moe_router_load_balancing_type == "sinkhorn"
        self.ordered = sinkhorn or config.moe_expert_capacity_factor is not None
        self.coefficients = coefficients(config)
        self.step: tuple[Tensor, int] | None = None  # tokens each expert was chosen for since the optimizer's step

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """As torch's, but `.to()`, `.half()` and others leave `expert_bias` float32: its last bits choose experts."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `[b, s, h]` to logits `[b s, E]`, weights `[b s, k]` (0 where dropped) and experts `[b s, k]`."""
        batch, length = hidden.shape[:2]
        logits = self.gating(self.jitter(hidden))  # [b, s, E]
        if batch == 1 or not self.ordered:
            logits = logits.flatten(0, 1)
            return logits, *self.route(logits)
        weights, experts = self.route(logits.transpose(0, 1).flatten(0, 1))  # [s b, k] each, in Megatron's order
        weights, experts = (x.unflatten(0, (length, batch)).transpose(0, 1).flatten(0, 1) for x in (weights, experts))
        return logits.flatten(0, 1), weights, experts

    def jitter(self, hidden: Tensor) -> Tensor:
        """Noise on what the router sees (and the experts do not), in evaluation too."""
        eps = self.config.moe_input_jitter_eps
        return hidden if eps is None else hidden * (torch.rand_like(hidden) * (2 * eps) + (1 - eps))

    def gating(self, hidden: Tensor) -> Tensor:
        if self.gating_dtype is None:
            return F.linear(hidden, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(self.gating_dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # a router's dtype is asked for, so that it is kept
            return F.linear(hidden.to(self.gating_dtype), self.weight.to(self.gating_dtype), bias)

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts `[t, k]` from logits `[t, E]`."""
        if self.config.moe_router_load_balancing_type == "sinkhorn":
            return self.sinkhorn(logits)
        weights, experts = self.choose(logits)
        if self.config.moe_router_topk_scaling_factor:
            weights = weights * self.config.moe_router_topk_scaling_factor
        weights = weights.type_as(logits)
        if self.config.moe_expert_capacity_factor is not None:
            weights = self.drop(weights, experts, logits)
        return weights, experts

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if self.score is softmax and not self.config.moe_router_pre_softmax:
            chosen, experts = self.best(logits)
            return softmax(chosen).type_as(logits), experts
        if self.score is softmax:
            return self.best(softmax(logits).type_as(logits))
        scores = self.score(logits)
        if self.score is sigmoid:  # rounded where Megatron rounds; its main, whose sqrtsoftplus is, rounds at the end
            scores = scores.type_as(logits)
        experts = self.best(scores if self.expert_bias is None else scores + self.expert_bias)[1]
        weights = scores.gather(1, experts)
        if self.topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights, experts

    def best(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The k best scores `[t, k]` and their experts; where experts are in groups, of the best groups alone.

        A group's score is the sum of its best `k // group_topk` experts. Others are out whatever their scores: -inf
        (0, as other code has it, a score with a negative bias may be less than).
        """
        if self.config.moe_router_group_topk:
            kept = self.config.moe_router_group_topk
            groups = scores.unflatten(-1, (self.config.moe_router_num_groups, -1))  # [t, groups, E / groups]
            best = groups.topk(self.topk // kept, dim=-1).values.sum(dim=-1).topk(kept, dim=-1, sorted=False).indices
            out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
            scores = groups.masked_fill(out[..., None], -math.inf).flatten(1)
        values, experts = torch.topk(scores, self.topk, dim=1)
        return values, experts

    def drop(self, weights: Tensor, experts: Tensor, logits: Tensor) -> Tensor:
        """Weights `[t, k]`, 0 where an expert has more tokens than its capacity; which of equals go is `topk`'s choice.

        By probability the least go. By position all are equal to `topk`: that is Megatron's way, kept as it is.
        """
        tokens = len(weights)
        even = tokens * self.topk / self.num_experts
        capacity = math.ceil(even * (self.config.moe_expert_capacity_factor or 0.0))
        if capacity > tokens:
            return weights
        if self.config.moe_token_drop_policy == "probs":
            ranks = torch.zeros_like(logits).scatter(1, experts, weights)  # [t, E]
        else:
            ranks = torch.zeros_like(logits, dtype=torch.int32).scatter(1, experts, 1)
        within = torch.topk(ranks, capacity, dim=0, sorted=False).indices  # [capacity, E]
        kept = torch.zeros_like(ranks).scatter(0, within, 1)
        return weights * kept.gather(1, experts)

    def sinkhorn(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights are sigmoids (k = 1) or softmaxes; the choice is by them, in training by what Sinkhorn makes even."""
        scores = torch.sigmoid(logits) if self.topk == 1 else softmax(logits).type_as(logits)
        ranks = even_out(logits.detach().float()) if self.training else scores
        experts = torch.topk(ranks, self.topk, dim=1).indices
        return scores.gather(1, experts), experts

    def statistics(self, logits: Tensor, tokens: Tensor | None) -> Tensor:
        """What auxiliary losses are made of, in sums over each row of the batch: `[b, 2 E + 1]`, float32.

        Args:
            logits: `[b, s, E]`.
            tokens: `[b, s]`, 0 where there is padding, which does not count; None: all are tokens.
        """
        scores = self.score(logits)
        if self.score is not softmax:
            scores = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        experts = torch.topk(scores, self.topk, dim=-1).indices  # without groups and expert_bias, as Megatron
        chosen = torch.zeros_like(scores).scatter(-1, experts, 1)
        squares = torch.logsumexp(logits.float(), dim=-1, keepdim=True).square()
        each = torch.cat((scores, chosen, squares), dim=-1)  # scores | 1 where chosen | log-partition squared
        return each.sum(dim=1) if tokens is None else (each * tokens[..., None].to(each.dtype)).sum(dim=1)

    def auxiliary_loss(self, statistics: Tensor) -> Tensor:
        """The sum of the router's losses, times their coefficients. To be called once a forward, outside of what
        gradient checkpointing runs twice: `global_aux_loss` counts on over the microbatches of a step."""
        scores, chosen, squares = statistics.split((self.num_experts, self.num_experts, 1), dim=1)
        rows, tokens = len(statistics), (chosen.sum() / self.topk).clamp(min=1)
        total = scores.sum(dim=0), chosen.sum(dim=0)  # [E] each
        parts = {
            "z_loss": lambda: squares.sum() / tokens,
            "aux_loss": lambda: self.balance(*total, tokens),
            "seq_aux_loss": lambda: self.balance(scores, chosen, tokens / rows) / rows,
            "global_aux_loss": lambda: self.balance(total[0], self.of_step(total[1]), tokens),
        }
        return torch.stack([coefficient * parts[kind]() for kind, coefficient in self.coefficients.items()]).sum()

    def balance(self, scores: Tensor, chosen: Tensor, tokens: Tensor) -> Tensor:
        """Switch Transformer's loss: E times the product of each expert's share of the choices and mean score."""
        return (scores * chosen).sum() * self.num_experts / (self.topk * tokens * tokens)

    def of_step(self, chosen: Tensor) -> Tensor:
        """Tokens `[E]` an expert was chosen for, the mean over the microbatches of this optimizer's step so far.

        A step begins where the weight has no gradient. Each process counts its own tokens (Megatron: all data ranks').
        """
        begins = self.step is None or self.weight.grad is None
        counts, microbatches = (0, 0) if begins or self.step is None else self.step
        self.step = (chosen.detach() + counts, microbatches + 1)
        return self.step[0] / self.step[1]


def coefficients(config: McoreGPTConfig) -> dict[str, float]:
    """The auxiliary losses of training, those that are on, with their coefficients."""
    kinds: Any = config.moe_router_load_balancing_type
    values: Any = config.moe_aux_loss_coeff
    pairs: dict[str, Any] = dict(zip(kinds, values, strict=True)) if isinstance(kinds, list) else {kinds: values}
    pairs["z_loss"] = config.moe_z_loss_coeff
    return {kind: value for kind, value in pairs.items() if value and kind not in ("none", "sinkhorn")}


def even_out(logits: Tensor) -> Tensor:
    """Sinkhorn's algorithm: `exp(logits)` `[t, E]` with rows and columns scaled until each has its even share."""
    cost = torch.exp(logits)
    rows, columns = cost.new_ones(len(cost)), cost.new_ones(cost.shape[1])
    error = math.inf
    while error > SINKHORN_TOLERANCE:
        before = columns
        rows = 1 / len(rows) / (torch.sum(columns * cost, 1) + 1e-8)
        columns = 1 / len(columns) / (torch.sum(rows[:, None] * cost, 0) + 1e-8)
        error = float(torch.mean(torch.abs(before - columns)))
    return columns * cost * rows[:, None]
