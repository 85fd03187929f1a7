"""The language loss without the logits: a chunk of tokens at a time, so that `[s, V]` never exists.

At 131,072 tokens and as many words the logits in float32 alone are 64 GiB, and a plain loss holds them three times.
A chunk's logits are made, turned into their own gradient and multiplied on, all in the forward; what stays for the
backward is one gradient of the hidden states and one of the matrix, as large as these. A matrix that is more than its
weight (an adapter, a rank's part, quantized, on the disk) is called as a module, and its chunks are computed again in
the backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

CHUNK = 1024  # tokens whose logits there are at once where the configuration does not say
IGNORED = -100  # the target that no loss counts


def check_loss(loss_function: Any) -> None:
    """Refuses a loss that is not known to be a sum over tokens."""
    if loss_function is not ForCausalLMLoss:
        raise ValueError(
            "the loss in chunks is the causal language model's cross entropy, but the model's loss_function is "
            "another, which needs all logits: skip_logits=False, or loss_chunk_size None"
        )


def chunked_loss(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    multiplier: float = 1.0,
    chunk: int = CHUNK,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORED,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As transformers' `ForCausalLMLoss` of `head(hidden) * multiplier`, a float32 scalar.

    Args:
        head: from `[t, h]` to `[t, V]`.
        hidden: `[b, s, h]`.
        labels: a token's own, `[b, s]`; or shifted, what follows it, `shift_labels`.
        chunk: tokens whose logits there are at once.
        num_items_in_batch: what the sum over tokens is divided by; None: the tokens that count.
    """
    if shift_labels is None:
        if labels is None:
            raise ValueError("a loss needs labels or shift_labels")
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    rows = hidden.reshape(-1, hidden.shape[-1])  # [t, h]
    count: Any = (targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    count = count.to(hidden.device) if isinstance(count, Tensor) else count
    if isinstance(head, nn.Linear) and is_plain(head):
        total = ChunkedLoss.apply(*in_autocast(rows, head.weight), targets, multiplier, chunk, ignore_index)
    else:
        total = called_in_chunks(head, rows, targets, multiplier, chunk, ignore_index)
    return total / count


def is_plain(head: nn.Linear) -> bool:
    """Whether `head` is its weight: no adapter, not quantized, no hook, not on the disk, not a rank's part."""
    if type(head) is not nn.Linear or head.bias is not None or "forward" in vars(head):
        return False
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head.weight) is nn.Parameter and not head.weight.is_meta and not hooked


def in_autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def loss_sum(logits: Tensor, targets: Tensor, multiplier: float, ignore_index: int) -> Tensor:
    """The sum over the tokens that count of the cross entropy of `logits` `[t, V]`, in float32."""
    scaled = logits if multiplier == 1.0 else logits * multiplier
    return F.cross_entropy(scaled.float(), targets, ignore_index=ignore_index, reduction="sum")


def called_in_chunks(
    head: nn.Module, hidden: Tensor, targets: Tensor, multiplier: float, chunk: int, ignore_index: int
) -> Tensor:
    """`loss_sum` by calls of the module; what a chunk's backward needs is computed again then."""

    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return loss_sum(head(rows), wanted, multiplier, ignore_index)

    chunks = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in chunks]).sum()


class ChunkedLoss(torch.autograd.Function):
    """`loss_sum` of `hidden weight'` over chunks, with the gradients made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, multiplier: float, chunk: int, ignore_index: int
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        # A sum over many chunks, in float32 whatever the weight is in.
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), chunk):
            place = slice(start, start + chunk)
            rows, wanted = hidden[place], targets[place]
            logits = rows @ weight.T  # [c, V]
            loss, grad = loss_and_grad(logits, wanted, multiplier, ignore_index)
            total += loss
            if for_hidden is not None:
                for_hidden[place] = grad @ weight
            if for_weight is not None:
                for_weight += grad.T @ rows
            del logits, grad  # before there are the next chunk's
        ctx.save_for_backward(for_hidden, for_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = [None if part is None else (part * grad).to(dtype) for part, dtype in parts]
        return *grads, None, None, None, None


def loss_and_grad(logits: Tensor, targets: Tensor, multiplier: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """`loss_sum` of `logits` `[t, V]`, and its gradient by them in their dtype: `softmax - one at the target`."""
    counted = targets != ignore_index
    places = targets.where(counted, 0)[:, None]
    logs = torch.log_softmax((logits if multiplier == 1.0 else logits * multiplier).float(), dim=-1)
    loss = -logs.gather(1, places).squeeze(1).where(counted, 0).sum()
    grad = logs.exp_()
    grad.scatter_add_(1, places, grad.new_full(places.shape, -1.0))
    grad *= (counted * multiplier)[:, None]
    return loss, grad.to(logits.dtype)
