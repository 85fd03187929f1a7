"""The mixture of experts of Megatron-core: a router, experts held as one tensor a matrix, experts all tokens share.

The experts go through transformers' experts interface. Its implementations weigh what comes out of an expert; Megatron,
since 0.14, what goes into its second matrix, and so do the two that are here: `eager`, Megatron's sequence of experts
(rounded as its own), and `megahf`, the default, which multiplies all experts at once. That one any mixture of
transformers can be told to use: `model.set_experts_implementation("megahf")`, once this module is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .kernel_choice import takes
from .mlp import ACTIVATIONS, MLP, Activation, ResidualLinear
from .ops import autocast_dtype, grouped_linear
from .router import TopKRouter
from .triton_moe import triton_experts

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig

EXPERTS_IMPLEMENTATION = "megahf"
BLOCK = 2**21  # numbers between the two matrices that a CPU is to hold at once: 8 MB of float32
THEIRS = {  # activations that our kernels have, by their names in transformers
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "squared_relu": "relu2",
}
FUSED: dict[Any, str] = {ACTIVATIONS[name]: name for name in THEIRS}  # by function, or by module's type
FUSED |= {type(ACT2FN[theirs]): name for name, theirs in THEIRS.items()} | {nn.SiLU: "silu"}


class Experts(nn.Module):
    """E experts, each `down(act(gate_up(x)) * weight) + weight * bias`; which tokens they see, the router says.

    Attributes without a use in here, and the names of the parameters, are what transformers' interface asks for.
    """

    is_transposed = False  # matrices are [out, in]
    is_concatenated = True  # gate | up
    has_post_expert_norm = False

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_experts = experts = config.num_experts or 0  # of this process, if expert parallelism shares them out
        self.has_gate = config.gated_linear_unit
        self.has_bias = config.add_bias_linear
        self._is_expert_parallel = False
        self.activation = Activation(config)
        self.act_fn = self.activation.function
        width, inner = config.moe_latent_size or config.hidden_size, config.moe_ffn_hidden_size
        rows = (2 if self.has_gate else 1) * inner
        self.gate_up_proj = nn.Parameter(torch.empty(experts, rows, width))  # gate | up
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(experts, rows)) if self.has_bias else None
        self.down_proj_bias = nn.Parameter(torch.zeros(experts, width)) if self.has_bias else None

    @property
    def up_proj(self) -> Tensor:
        """The first matrices by the name they have for transformers where there is no gate."""
        return self.gate_up_proj

    @property
    def up_proj_bias(self) -> Tensor | None:
        return self.gate_up_proj_bias

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self.activation(gate_up)

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Tokens `[t, h]` through their experts `[t, k]`, weighted `[t, k]` and summed: `[t, h]`.

        An expert's number beyond the last, which expert parallelism gives where another process holds it, adds nothing.
        """
        implementation = self.config._experts_implementation or EXPERTS_IMPLEMENTATION
        run = ALL_EXPERTS_FUNCTIONS.get_interface(implementation, eager_experts)
        bias, ways = self.down_proj_bias, self.config.moe_ffn_hidden_size // self.down_proj.shape[-1]
        if bias is None or ways == 1:
            return run(self, hidden, experts, weights)
        # Each process has a part of every expert, and what comes out is summed over them: so the bias goes in in parts.
        # Its gradient is not summed, each process finds the whole.
        self._parameters["down_proj_bias"] = cast("nn.Parameter", bias.detach() / ways + (bias - bias.detach()))
        try:
            return run(self, hidden, experts, weights)
        finally:
            self._parameters["down_proj_bias"] = bias


def eager_experts(self: Experts, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """One expert after the other, as Megatron's SequentialMLP: slow, and what the others are measured against."""
    out = torch.zeros_like(hidden, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for expert in range(self.num_experts):
        token, place = torch.where(experts == expert)
        weight = weights[token, place, None]  # [tokens of this expert, 1]
        x = F.linear(hidden[token], self.gate_up_proj[expert])
        x = self.activation(x if self.gate_up_proj_bias is None else x + self.gate_up_proj_bias[expert])
        x = F.linear((x * weight).to(x.dtype), self.down_proj[expert])
        if self.down_proj_bias is not None:
            x = (x + self.down_proj_bias[expert] * weight).to(x.dtype)
        out.index_add_(0, token, x.to(out.dtype))
    return out.to(hidden.dtype)


class Matrices(NamedTuple):
    """What a module of experts holds, ours or transformers': `[e, 2 f or f, h]`, `[e, h, f]`, and biases or None."""

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def matrices(module: Any) -> Matrices:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    biases = (getattr(module, f"{name}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return Matrices(up, biases[0], down, biases[1])


def fused_activation(module: Any) -> str | None:
    """What our kernels call the activation between a module's two matrices; None: they do not have it."""
    if isinstance(module, Experts):
        plain = module.activation.clamp is None and not module.activation.offset
    else:
        plain = not module.has_gate or type(module)._apply_gate.__module__ == ALL_EXPERTS_FUNCTIONS.__module__
    if not plain or module.has_post_expert_norm:
        return None
    function = module.act_fn
    return FUSED.get(type(function) if isinstance(function, nn.Module) else function)


def grouped_experts(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Tokens sorted by expert, two grouped matmuls, and the sum over each token's experts in float32.

    Args:
        self: `Experts`, or what transformers' interface wraps.
    """
    held, act = matrices(self), fused_activation(self)
    if act is not None and takes(hidden, weights, *held):
        dtype = autocast_dtype(hidden) or held.up.dtype
        up, up_bias, down, down_bias = (t if t is None else t.to(dtype) for t in held)
        inputs = (hidden.to(dtype), experts, weights, cast("Tensor", up), cast("Tensor", down), up_bias, down_bias)
        return triton_experts(*inputs, act=act, gated=self.has_gate).to(hidden.dtype)
    tokens, k = experts.shape
    experts, order = torch.sort(experts.flatten(), stable=True)  # [t k]
    numbers = torch.arange(self.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
    weights = weights.flatten()[order, None]
    out, outs = None, []
    for first, last, start, end in blocks(ends, tokens * k, held.up):
        mine, rows = slice(first, last), slice(start, end)
        x = hidden.index_select(0, order[rows] // k)
        x = run_block(self, held, x, experts[rows], weights[rows], ends[mine] - start, mine)
        if torch.is_grad_enabled():  # writing into one tensor again and again would cost the backward pass copies of it
            outs.append(x)
        else:
            out = x.new_empty(tokens * k, x.shape[1]) if out is None else out
            out.index_copy_(0, order[rows], x)  # as the tokens were
    if out is None:
        x = outs[0] if len(outs) == 1 else torch.cat(outs)  # [t k, h]
        out = torch.empty_like(x).index_copy_(0, order, x)
    return out.unflatten(0, (tokens, k)).sum(dim=1).to(hidden.dtype)


def run_block(
    self: Any, held: Matrices, x: Tensor, experts: Tensor, weights: Tensor, ends: Tensor, mine: slice
) -> Tensor:
    """Rows `[m, h]` sorted by expert, those that `mine` counts, to weighted outputs `[m, h]`."""
    elsewhere = None  # [m, 1], rows of experts that other processes hold: they come out undefined, and go to zero
    if self._is_expert_parallel or self.num_experts < (getattr(self.config, "num_experts", None) or 0):
        elsewhere = (experts >= self.num_experts)[:, None]
        experts = experts.clamp(max=self.num_experts - 1)

    def here(x: Tensor) -> Tensor:
        return x if elsewhere is None else x.masked_fill(elsewhere, 0)

    x = here(grouped_linear(here(x), held.up[mine], ends))  # [m, 2 f or f]
    x = x if held.up_bias is None else x + held.up_bias[experts]
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    if self.has_post_expert_norm:  # of what is not weighed yet
        x = here(grouped_linear(here(x), held.down[mine], ends))
        x = self.post_expert_norm(x if held.down_bias is None else x + held.down_bias[experts])
        return here(x * weights).to(x.dtype)
    x = here(grouped_linear(here((x * weights).to(x.dtype)), held.down[mine], ends))  # [m, h]
    if held.down_bias is None:
        return x
    return (x + here(held.down_bias[experts] * weights)).to(x.dtype)


def blocks(ends: Tensor, rows: int, weight: Tensor) -> list[tuple[int, int, int, int]]:
    """First and last expert, first and last row of what is to run at once: all, or on a CPU what memory is quick for.

    Measured there at 2048 tokens: 1.15 to 1.3 times as fast as all at once in float32, 1.0 to 1.1 times in bfloat16.
    """
    whole = [(0, len(ends), 0, rows)]
    if ends.device.type != "cpu" or torch.compiler.is_compiling() or rows * weight.shape[1] <= BLOCK:
        return whole
    found, first, start = [], 0, 0
    edges = ends.tolist()
    for expert in range(1, len(edges)):
        if edges[expert] - start > BLOCK // weight.shape[1]:
            found.append((first, expert, start, edges[expert - 1]))
            first, start = expert, edges[expert - 1]
    return [*found, (first, len(edges), start, rows)]  # the last takes rows that belong to no expert here


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, grouped_experts)


class SharedExperts(MLP):
    """The MLP of all shared experts together, which every token goes through; never with a bias."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__(config, config.moe_shared_expert_intermediate_size or 0, bias=False, normed=False)
        gate = torch.empty(1, config.hidden_size) if config.moe_shared_expert_gate else None
        self.gate_weight = None if gate is None else nn.Parameter(gate)

    def forward(self, hidden: Tensor) -> Tensor:
        out = super().forward(hidden)
        if self.gate_weight is None:
            return out
        return out * torch.sigmoid(F.linear(hidden, self.gate_weight))


class MoELayer(nn.Module):
    """The sum of what a token's experts make of it, plus what the shared ones do."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.router = TopKRouter(config)
        self.experts = Experts(config)
        self.shared_experts = SharedExperts(config) if config.moe_shared_expert_intermediate_size else None
        self.weigh_input = config.moe_apply_probs_on_input
        width, latent, bias = config.hidden_size, config.moe_latent_size, config.add_bias_linear
        self.fc1_latent_proj = nn.Linear(width, latent, bias=bias) if latent else nn.Identity()
        self.fc2_latent_proj = ResidualLinear(latent, width, bias=bias) if latent else nn.Identity()

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """`[b, s, h]` to `[b, s, h]`; while training with auxiliary losses, with the router's statistics.

        Args:
            tokens: `[b, s]`, 0 where there is padding, for those losses; None: all are tokens.
        """
        logits, weights, experts = self.router(hidden)  # [b s, E], [b s, k] twice
        x = self.fc1_latent_proj(hidden).flatten(0, 1)  # [b s, h or latent]
        if self.weigh_input:
            x, weights = (weights * x).to(x.dtype), (weights != 0).to(x.dtype)  # k is 1; 0: dropped
        out = self.fc2_latent_proj(self.experts(x, experts, weights).unflatten(0, hidden.shape[:2]))
        if self.shared_experts is not None:
            out = out + self.shared_experts(hidden)
        if self.training and self.router.coefficients:
            return out, self.router.statistics(logits.unflatten(0, hidden.shape[:2]), tokens)
        return out
