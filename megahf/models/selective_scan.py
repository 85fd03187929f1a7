"""The selective scan, the recurrence of Mamba-1, in plain torch: by chunks for many tokens, by one step for one.

For each channel a state `[n]` is carried from token to token, and read (Gu and Dao, https://arxiv.org/abs/2312.00752):

    S_t = exp(dt_t A) S_{t-1} + dt_t u_t B_t        y_t = C_t S_t + D u_t

Every channel and place of the state decays by its own rate, so that there is no matmul in it: a chunk's decays and
inputs are worked out at once, and the tokens are gone through one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .conv import upcast
from .kernel_choice import takes
from .ssd import LOWEST, finish, time_step
from .triton_selective_forward import LARGEST
from .triton_selective_scan import triton_selective_scan, triton_selective_update

CHUNK = 32  # tokens whose decays `[d, n]` are held at once


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    seq_idx: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The outputs of all tokens and the state after the last one; in float32, or float64 if `u` is.

    Memory grows with the sequence by its inputs and outputs and a state a chunk, for the gradients too: the backward
    pass works a chunk out once more.

    Args:
        u: `[b, s, d]`.
        dt: `[b, s, d]`, before the bias and the softplus.
        A: `[d, n]`, negative.
        B: `[b, s, n]`.
        C: `[b, s, n]`.
        D: `[d]`.
        z: `[b, s, d]`: the outputs are multiplied by `silu(z)`.
        dt_bias: `[d]`.
        state: before the first token, `[b, d, n]`; None: zeros.
        seq_idx: `[b, s]`, which document a token is of, growing; the state is of the first one.
        mask: `[b, s]`, False for padding, anywhere: it leaves the state as it is.
        chunk_size: tokens a chunk.

    Returns:
        `[b, s, d]` in the dtype of `u`, and the state `[b, d, n]`.
    """
    rows, length, channels = u.shape
    if A.shape[1] <= LARGEST and takes(u, dt, A, B, C, D, z, dt_bias, state):
        return triton_selective_scan(u, dt, A, B, C, D, z, dt_bias, state, marks_of(seq_idx, mask))
    if state is None:
        state = upcast(u).new_zeros(rows, channels, A.shape[1])
    follows = None
    if seq_idx is not None:  # whether a token is of the document of the one before
        follows = torch.cat((seq_idx[:, :1] == seq_idx[:, :1], seq_idx[:, 1:] == seq_idx[:, :-1]), dim=1)

    run: Callable[..., tuple[Tensor, Tensor]] = recomputed if torch.is_grad_enabled() else chunk
    outs = []
    for start in range(0, length, chunk_size):
        tokens = slice(start, start + chunk_size)
        pieces: list[Any] = [t if t is None else t[:, tokens] for t in (u, dt, B, C, z, follows, mask)]
        with torch.autocast(u.device.type, enabled=False):
            out, state = run(*pieces, A, D, dt_bias, state)
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), state


def marks_of(seq_idx: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """`[b, s]`: 1 for padding, plus 2 where a document starts that is not the first."""
    if seq_idx is None:
        return None if mask is None else (~mask).int()
    starts = torch.zeros_like(seq_idx, dtype=torch.int32)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return 2 * starts if mask is None else 2 * starts + (~mask).int()


def recomputed(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """`chunk`, of which the backward pass keeps the inputs alone."""
    return checkpoint(chunk, *inputs, use_reentrant=False, preserve_rng_state=False)


def chunk(
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    follows: Tensor | None,
    mask: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """A few tokens; arguments as of `selective_scan`, cut to `[b, q]`; `follows` False where a document starts."""
    steps = time_step(dt, dt_bias, mask)
    state, C = state.to(steps.dtype), upcast(C)[..., None]  # [b, d, n], [b, q, n, 1]
    decay = (steps[..., None] * A.to(steps.dtype)).clamp_(min=LOWEST).exp_()  # [b, q, d, n]
    if follows is not None:
        decay = decay * follows[..., None, None]
    taken = (steps * upcast(u))[..., None] * upcast(B)[:, :, None]  # [b, q, d, n]
    outs = []
    for kept, new, read in zip(decay.unbind(1), taken.unbind(1), C.unbind(1), strict=True):
        state = torch.addcmul(new, kept, state)
        outs.append(state @ read)
    return finish(torch.cat(outs, dim=-1).mT, u, D, z), state


def selective_update(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """One token more: changes `state` `[b, d, n]` in place.

    Args:
        u: `[b, d]`, and so `dt` and `z`; A: `[d, n]`; B, C: `[b, n]`; D, dt_bias: `[d]`.
        indices: `[b]`, where in a pool of states `[m, d, n]` that of each row is, no two the same; below 0: the row has
            none, and its outputs are 0. None: in their order.

    Returns:
        `[b, d]` in the dtype of `u`.
    """
    if A.shape[1] <= LARGEST and takes(state, u, dt, A, B, C, D, z, dt_bias):
        return triton_selective_update(state, u, dt, A, B, C, D, z, dt_bias, indices)
    if indices is not None:
        held, real = state[indices.clamp(min=0)], indices >= 0
        out = selective_update(held, u, dt, A, B, C, D, z, dt_bias=dt_bias)
        state[indices[real]] = held[real]
        return out.masked_fill(~real[:, None], 0)
    steps = time_step(dt, dt_bias, None)
    state.mul_((steps[..., None] * A.to(steps.dtype)).exp_())
    state.addcmul_((steps * upcast(u))[..., None].to(state.dtype), B[:, None].to(state.dtype))
    out = (state @ C[..., None].to(state.dtype)).squeeze(-1)
    return finish(out.to(steps.dtype), u, D, z)
