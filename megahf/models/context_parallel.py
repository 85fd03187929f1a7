"""Context parallelism: several processes hold parts of one sequence, and the model is told so by a context.

Each rank calls the model on its own slices (zigzag.py), without a mask. Attention and mixers exchange what they need;
everything else goes token by token. The loss is the mean over the tokens of the whole sequence, and the backward pass
leaves on every rank the gradients that one process would have.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .context_attention import context_attention
from .context_recurrence import Recurrence, Scan
from .conv import CausalConv1d
from .router import coefficients
from .zigzag import Collect, Sum, collect, in_order, join, numbers, positions, split

if TYPE_CHECKING:
    from transformers.configuration_utils import PreTrainedConfig

ATTENTION = ("gather", "ring")
MAMBA = ("states", "heads")
GRADIENTS = ("summed", "averaged", "parts")
IGNORED = -100  # the target that no loss counts
NO_CACHE = (
    "a rank has keys and values of its own slices alone; leave it out, and generate outside of the context (whose "
    "`states` has what Mamba layers go on from)"
)
# Where the context is kept: one place for this file and its copies, which saved models bring with them.
SHARED = sys.modules.setdefault("_megahf_context_parallel", ModuleType("_megahf_context_parallel"))


def active() -> ContextParallel | None:
    """The context that the code runs in, if there is one."""
    return getattr(SHARED, "context", None)


@contextmanager
def context_parallel(
    mesh: Any,
    *,
    attention: str = "gather",
    mamba: str = "states",
    gradients: str = "summed",
    mean_of_ranks: bool = False,
) -> Iterator[ContextParallel]:
    """Models called in here see a sequence of which each process of `mesh` gives its slices.

        with context_parallel(mesh) as context:
            ids, labels = context.split(ids), context.split(labels)
            loss = model(ids, labels=labels).loss
        loss.backward()

    `loss` is that of all tokens, logits are of this rank's; positions are worked out. Backward may run in here or
    after. Every rank must make the same calls, and in each call its tokens must be as many. In sixteen bits ranks round
    otherwise than one process: a token between two experts may go to the other, and its logits are then not close.

    Args:
        mesh: a process group; or a `DeviceMesh` of one dimension, or with one that is named "cp".
        attention: "gather": every rank has all keys for the time of a layer; "ring": of two ranks at most.
        mamba: "states": states pass between slices; "heads": each rank scans all tokens for its share of heads, as
            Megatron does, bit for bit what one process computes.
        gradients: "summed": backward leaves those of the whole sequence in every rank's parameters. "averaged": it is
            for something else (DDP, FSDP) to average them over these ranks. "parts": nothing is done, each rank has
            its part, and `sum_gradients` adds them up.
        mean_of_ranks: the loss is the mean of the ranks' own means, as Megatron has it without
            `--calculate-per-token-loss`.

    Yields:
        the context; its `states` has each Mamba layer's states after the whole sequence, equal on all ranks.
    """
    for name, value, known in (("attention", attention, ATTENTION), ("mamba", mamba, MAMBA)):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; it is one of {', '.join(known)}")
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients is {gradients!r}; it is one of {', '.join(GRADIENTS)}")
    before = active()
    SHARED.context = ContextParallel(group_of(mesh), attention, mamba, gradients, mean_of_ranks)  # type: ignore[attr-defined]
    try:
        yield SHARED.context
    finally:
        SHARED.context = before  # type: ignore[attr-defined]


def group_of(mesh: Any) -> Any:
    """The process group of a mesh, or the group itself."""
    names = getattr(mesh, "mesh_dim_names", None)
    if names and len(names) > 1:
        if "cp" not in names:
            raise ValueError(f"a mesh of dimensions {names}: give the one of context parallelism, mesh[name]")
        mesh = mesh["cp"]
    return mesh.get_group() if hasattr(mesh, "get_group") else mesh


class ContextParallel:
    """What the model asks of the context it runs in; tensors are this rank's two slices `[b, s, ...]`."""

    def __init__(self, group: Any, attention: str, mamba: str, gradients: str, mean_of_ranks: bool) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.attention, self.mamba, self.gradients = attention, mamba, gradients
        self.mean_of_ranks = mean_of_ranks
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # of each Mamba layer: its convolution's, its scan's
        self.hooks: list[Any] = []

    def split(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's two slices of a whole `x`; see `zigzag.split`."""
        return split(x, self.size, self.rank, dim)

    def join(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of all ranks' `x`, on every rank; without gradients."""
        return join(collect(x.detach(), self.group).unbind(0), dim)

    def enter(
        self,
        model: nn.Module,
        words: Tensor,
        position_ids: Tensor | None,
        call: Mapping[str, Any],
        problems: Iterable[str] = (),
        **sizes: int,
    ) -> Tensor:
        """The positions `[1, s]` of word vectors `[b, s, h]`; before anything else is exchanged, all ranks agree.

        Args:
            position_ids: the caller's own `[b, s]`; None: he leaves them to us.
            call: what else the model is called with.
            problems: what else this rank has against it, in words.
            sizes: what else must be the same on all ranks, by its name in words.

        Raises:
            ValueError: on every rank, with what any of them has against the call.
        """
        length = words.shape[1]
        expected = positions(length, self.size, self.rank, words.device)
        problems = [*reasons_against(self, model, words, call), *problems]
        if position_ids is not None and not same(position_ids, expected):
            problems.append(
                "position_ids are not those of this rank's slices; leave them out: they are worked out. "
                "Packed documents, whose positions start over, cannot be shared out"
            )
        sizes = {"rows": len(words), "tokens": length, "choices": self.choices(model.training), **sizes}
        agree(problems, sizes, words.device, self.group)
        return expected

    def check(self, use_cache: bool | None, heads: bool) -> None:
        """Refuses what a causal model is asked for in so many words.

        Args:
            heads: whether heads for further tokens are to run.
        """
        if use_cache:
            raise ValueError(f"context parallelism: use_cache: {NO_CACHE}")
        if heads:
            raise ValueError(
                "context parallelism: heads for further tokens look past the ends of a rank's slices; train without "
                "them (mtp_loss_scaling_factor 0, or mtp_num_layers None at from_pretrained)"
            )

    def choices(self, training: bool) -> int:
        """What all ranks must have chosen alike, as a number."""
        chosen = (
            ATTENTION.index(self.attention),
            MAMBA.index(self.mamba),
            GRADIENTS.index(self.gradients),
            self.mean_of_ranks,
            training,
        )
        return sum(int(value) * 4**place for place, value in enumerate(chosen))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention `[b, n, s, d]` to `[b, s, n, v]`, as `context_attention`."""
        return context_attention(query, key, value, self.group, self.attention == "ring", scaling, window, sinks)

    def latents(self, key: Tensor) -> Tensor:
        """What multi-latent attention remembers `[b, 1, s, c]`: of all ranks, unless the keys made of it go round."""
        if self.attention == "ring":
            return key
        return join(Collect.apply(key, self.group).unbind(0), 2)

    def recurrence(self, convolution: CausalConv1d, scan: Scan) -> tuple[Scan, Scan]:
        """A mixer's convolution and scan over all ranks' slices."""
        shared = Recurrence(self.group, self.mamba == "heads", convolution, scan)
        return shared.conv, shared.scan

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, as `Sum`."""
        return Sum.apply(x, self.group)

    def targets(self, labels: Tensor, call: dict[str, Any]) -> tuple[Tensor | float, dict[str, Any]]:
        """The part of an optimizer's step that the whole sequence is, and `call` with the targets of this rank.

        Args:
            labels: a token's own, `[b, s]`, unless there are `shift_labels`.
            call: with `num_items_in_batch`, the tokens of all ranks in a step of several batches; without, it is those
                of these ranks now.
        """
        shifted = call.get("shift_labels")
        shifted = self.following(labels, IGNORED) if shifted is None else shifted
        own = (shifted != IGNORED).sum()
        count, items = self.sum(own), call.get("num_items_in_batch")
        share: Tensor | float = 1.0 if items is None else count / items
        if self.mean_of_ranks:
            items = own.clamp(min=1) * self.size / share
        elif items is None:
            items = count.clamp(min=1)
        return share, {**call, "shift_labels": shifted.contiguous(), "num_items_in_batch": items}

    def following(self, x: Tensor, filling: int) -> Tensor:
        """`x` `[b, s]` of the token after each of this rank's, which another may have; `filling` after the last."""
        slices = x.chunk(2, dim=1)
        firsts = collect(torch.stack([part[:, :1] for part in slices]), self.group)  # [n, 2, b, 1]
        starts = [*in_order([pair.unbind(0) for pair in firsts.unbind(0)])[1:], torch.full_like(x[:, :1], filling)]
        pieces = zip(numbers(self.size, self.rank), slices, strict=True)
        return torch.cat([y for number, part in pieces for y in (part[:, 1:], starts[number])], dim=1)

    def leave(self, model: nn.Module, output: Any) -> Any:
        """A causal model's output, from whose loss or logits a backward may start."""
        if output.logits is not None:  # a tensor of its own: the loss's gradient does not pass through it
            output.logits = output.logits.view_as(output.logits)
        for value in (output.loss, output.logits):
            if value is not None and value.requires_grad and self.gradients != "parts":
                value.register_hook(partial(self.begin_backward, model))
        return output

    def begin_backward(self, model: nn.Module, grad: Tensor | None) -> Tensor | None:
        """From here to the end of the backward, the gradient of each parameter is summed over ranks as it comes."""
        if grad is None:  # DDP passes on what it has of outputs without a part in the loss
            return None
        if self.gradients == "averaged":
            return grad * self.size
        if not self.hooks:
            self.hooks = [p.register_hook(self.summed) for p in model.parameters() if p.requires_grad]
            torch.autograd.Variable._execution_engine.queue_callback(self.end_backward)  # type: ignore[attr-defined]
        return grad

    def end_backward(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def summed(self, grad: Tensor) -> Tensor:
        """A parameter's gradient over all ranks; a new tensor, for autograd may use the old one elsewhere."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(getattr(grad, "_local_tensor", grad), group=self.group)
        return grad


def reasons_against(context: ContextParallel, model: Any, words: Tensor, call: Mapping[str, Any]) -> Iterator[str]:
    """What this rank has against a call of `model` on word vectors `[b, s, h]`, in words."""
    config, length = model.config, words.shape[1]
    if length % 2:
        yield (
            f"{length} tokens on a rank are no two slices of one length; cut sequences with the context's `split`, "
            f"a multiple of {2 * context.size} tokens long"
        )
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all())):
        yield (
            "attention_mask: there are no masks over a sequence that is shared out. Padding on the right needs none: "
            "leave it out and set its labels to -100 (and its `expert_tokens` to 0, for auxiliary losses of experts); "
            "padding on the left and packed documents cannot be shared out"
        )
    if call.get("past_key_values") is not None:
        yield f"past_key_values: {NO_CACHE}"
    if call.get("output_attentions"):
        yield "output_attentions: no rank has the weights of its queries over all keys; leave it out"
    yield from reasons_of_config(context, config, model.training)
    limit = config.max_position_embeddings
    if config.position_embedding_type == "learned_absolute" and length * context.size > limit:
        yield f"{length * context.size} tokens on {context.size} ranks, but the model has learned {limit} positions"


def reasons_of_config(context: ContextParallel, config: PreTrainedConfig, training: bool) -> Iterator[str]:
    """What the configuration has that depends on chance, or on other tokens in ways that are not exchanged."""
    for name in ("attention_dropout", "hidden_dropout"):
        if training and getattr(config, name):
            yield f"{name} is {getattr(config, name)}: ranks would drop otherwise than one process; set it to 0"
    if config.moe_input_jitter_eps is not None:
        yield f"moe_input_jitter_eps is {config.moe_input_jitter_eps}: ranks would draw other noise; set it to None"
    if config.moe_expert_capacity_factor is not None:
        yield "moe_expert_capacity_factor: which tokens are dropped depends on those of all ranks; set it to None"
    if config.moe_router_load_balancing_type == "sinkhorn":
        yield "moe_router_load_balancing_type is sinkhorn: an expert's tokens depend on those of all ranks"
    if context.mamba == "heads" and "M" in (getattr(config, "hybrid_layer_pattern", None) or ""):
        yield from reasons_against_heads(context.size, config)


def reasons_against_heads(size: int, config: PreTrainedConfig) -> Iterator[str]:
    """What keeps `size` ranks from sharing out a Mamba layer's heads."""
    if config.mamba_version == 1:
        yield 'mamba="heads": Mamba-1 has no heads; use mamba="states"'
        return
    heads = config.mamba_num_heads or config.mamba_expand * config.hidden_size // config.mamba_head_dim
    groups = config.mamba_num_groups
    if heads % size or (groups % size and size % groups):
        yield (
            f'mamba="heads": {heads} heads in {groups} groups do not share out over {size} ranks (heads must be a '
            f'multiple of the ranks, and groups a multiple or a divisor); use mamba="states"'
        )


def same(given: Tensor, expected: Tensor) -> bool:
    """Whether positions `[b or 1, s]` are the `[1, s]` expected."""
    return given.shape[-1] == expected.shape[-1] and bool((given == expected).all())


def agree(problems: list[str], sizes: Mapping[str, int], device: torch.device, group: Any) -> None:
    """Goes on where no rank has a problem and all have the same sizes; else raises on all of them."""
    found = collect(torch.tensor([len(problems), *sizes.values()], device=device), group).tolist()
    if not any(count for count, *_ in found) and len({tuple(rest) for _, *rest in found}) == 1:
        return
    everyone: list[Any] = [None] * len(found)
    dist.all_gather_object(everyone, problems, group=group)
    said: dict[str, list[str]] = {}
    for rank, those in enumerate(everyone):
        for problem in those:
            said.setdefault(problem, []).append(str(rank))
    _, *given = zip(*found, strict=True)
    for name, values in zip(sizes, given, strict=True):
        if len(set(values)) > 1:
            said[f"the ranks' {name} differ: {', '.join(map(str, values))}"] = [str(rank) for rank in range(len(found))]
    lines = [f"{problem} (rank {', '.join(ranks)})" for problem, ranks in said.items()]
    raise ValueError("context parallelism: " + "; ".join(lines))


def sum_gradients(parameters: Iterable[nn.Parameter], mesh: Any) -> None:
    """Adds up over ranks what a backward with `gradients="parts"` left in each; once a step, before the optimizer's."""
    group = group_of(mesh)
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(getattr(parameter.grad, "_local_tensor", parameter.grad), group=group)


def in_torchs() -> bool:
    """Whether this runs in torch's own context parallelism, accelerate's `cp_size`; a compiled graph cannot look.

    It puts a function of its own in the place of torch's attention.
    """
    if torch.compiler.is_compiling():
        return False
    return (F.scaled_dot_product_attention.__module__ or "").startswith("torch.distributed.")


def unknown_to_torchs(model: Any) -> list[str]:
    """What a model has that torch's own context parallelism gets wrong: it knows full causal attention alone."""
    config = model.config.get_text_config()
    found = {
        type(model).__name__: not model._supports_context_parallel,
        "windows": "sliding_attention" in config.layer_types,
        "attention sinks (softmax_type)": config.softmax_type != "vanilla",
        "multi-latent attention": config.multi_latent_attention,
        "Mamba's states": "M" in (getattr(config, "hybrid_layer_pattern", None) or ""),
        "heads for further tokens (mtp_num_layers)": bool(config.mtp_num_layers),
        "auxiliary losses of experts": any(config.moe_layers) and bool(coefficients(config)),
    }
    return [name for name, has in found.items() if has]


def not_in_torchs(model: nn.Module) -> None:
    """Refuses a model what torch's own context parallelism would get wrong of it, without a word."""
    if in_torchs() and (unknown := unknown_to_torchs(model)):
        raise ValueError(
            f"torch's context parallelism (parallelism_config.cp_size) knows full causal attention alone, and not "
            f"{', '.join(unknown)}: use megahf.ContextParallelTrainer, or megahf.context_parallel in a loop of your own"
        )


def whole_rows_only(module: nn.Module, *args: Any) -> None:
    """A hook before the forward of a model that looks at whole sequences."""
    if active() is not None or in_torchs():
        raise ValueError(
            f"{type(module).__name__} reads whole sequences, of which a rank of context parallelism has slices; call "
            f"it outside of the context"
        )
