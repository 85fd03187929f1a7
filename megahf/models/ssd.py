"""State-space duality, the recurrence of Mamba-2, in plain torch: by chunks for many tokens, by one step for one.

For each head a state `S` `[p, n]` is carried from token to token, and read:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t'        y_t = S_t C_t + D x_t

Inside a chunk this is attention without softmax, `(C B' * decay) (dt x)`, and from chunk to chunk the state is passed:
matmuls, and memory in proportion to the sequence (Dao and Gu, https://arxiv.org/abs/2405.21060, section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .conv import OFFSETS, upcast
from .kernel_choice import may_run, takes
from .triton_ssd import LARGEST
from .triton_ssd_backward import triton_ssd_scan
from .triton_ssd_update import triton_ssd_update

try:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
except Exception:  # not installed, or built against another torch or Triton, which may raise anything
    mamba_chunk_scan_combined = None

CHUNK = 64  # tokens a chunk on the CPU, where exponentials cost as much as matmuls
CPU_TILE = 2**17  # decays worked on at once: they stay in the cache
TRITON_CHUNK = 128  # Megatron's
TILE = 2**25  # elsewhere, and in a compiled graph, which holds every round of the loop
# exp(-60) is nothing beside the 1 of a token's own decay. Below, float32 gets to denormal numbers, which make
# every multiplication several times slower.
LOWEST = -60.0


def ssd_scan(
    x: Tensor,
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
    """The outputs of all tokens and the state after the last one; in float32, or float64 if `x` is.

    Memory grows with the sequence, not with its square, for the gradients too: a segment of chunks is worked on at a
    time, and in the backward pass once more.

    Args:
        x: `[b, s, h, p]`.
        dt: `[b, s, h]`, before the bias and the softplus; not clamped after, as in Megatron.
        A: `[h]`, negative.
        B: `[b, s, g, n]`; head i is of group i // (h / g).
        C: `[b, s, g, n]`.
        D: `[h]` or `[h, p]`.
        z: `[b, s, h, p]`: the outputs are multiplied by `silu(z)`.
        dt_bias: `[h]`.
        state: before the first token, `[b, h, p, n]`; None: zeros.
        seq_idx: `[b, s]`, which document a token is of, growing; the state is of the first one.
        mask: `[b, s]`, False for padding, anywhere: it leaves the state as it is.
        chunk_size: tokens a chunk; the sequence need be no multiple of it. Changes only how sums are associated.

    Returns:
        `[b, s, h, p]` in the dtype of `x`, and the state `[b, h, p, n]`.
    """
    packaged = mamba_chunk_scan_combined is not None and may_run("packages") and kernel_fits(x, B)
    if not packaged and triton_fits(x, B, C) and takes(x, dt, A, B, C, D, z, dt_bias, state):
        return triton_ssd_scan(x, dt, A, B, C, D, z, dt_bias, state, seq_idx, mask)
    rows, length, heads, _ = x.shape
    dt = time_step(dt, dt_bias, mask)
    A = A.to(dt.dtype)
    if packaged:
        return kernel(x, dt, A, B, C, D, z, state, seq_idx)
    if state is None:
        state = dt.new_zeros(rows, heads, x.shape[-1], B.shape[-1])
    state = state.to(dt.dtype)
    document = None if seq_idx is None else seq_idx[:, 0]  # of the state

    run: Callable[..., tuple[Tensor, Tensor]] = recomputed if torch.is_grad_enabled() else segment
    outs = []
    for start, chunks, size in segments(length, chunk_size, rows * heads, x.device):
        tokens = slice(start, start + chunks * size)
        cut = (t if t is None else t[:, tokens].unflatten(1, (chunks, size)) for t in (x, dt, B, C, z, seq_idx))
        pieces: list[Any] = [*cut, A, D, state, document]
        with torch.autocast(x.device.type, enabled=False):
            out, state = run(*pieces)
        outs.append(out)
        document = None if seq_idx is None else seq_idx[:, tokens.stop - 1]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1), state


def time_step(dt: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """`softplus(dt + bias)`, 0 where `mask` is False: there the state neither decays nor takes anything in."""
    dt = F.softplus(upcast(dt) if bias is None else upcast(dt) + upcast(bias))
    return dt if mask is None else dt * mask[..., None]


def segments(length: int, size: int, width: int, device: torch.device) -> list[tuple[int, int, int]]:
    """Start, number of chunks and their length, of all segments; what remains of a chunk is one by itself.

    Args:
        width: rows times heads, how many decays of `size` by `size` a chunk has.
    """
    tile = CPU_TILE if device.type == "cpu" and not torch.compiler.is_compiling() else TILE
    at_once, whole = max(1, tile // (width * size * size)), length // size
    cut = [(first * size, min(at_once, whole - first), size) for first in range(0, whole, at_once)]
    return [*cut, (whole * size, 1, length % size)] if length % size else cut


def recomputed(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    """`segment`, of which the backward pass keeps the inputs alone."""
    return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=False)


def segment(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    seq_idx: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    state: Tensor,
    document: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A few chunks; arguments as of `ssd_scan` with `[b, s]` cut to `[b, k, q]`, `document` `[b]` that of the state.

    Returns:
        `[b, k q, h, p]`, and the state after.
    """
    groups = B.shape[3]
    inputs = upcast(x).transpose(2, 3)  # [b, k, h, q, p]
    steps = dt.transpose(2, 3)  # [b, k, h, q]
    B, C = upcast(B).transpose(2, 3), upcast(C).transpose(2, 3)  # [b, k, g, q, n]
    since, lost = running_sum(steps * A[:, None])  # log of the decay since the chunk's start
    kept = since.clamp(min=LOWEST).exp()  # of the state that enters the chunk
    left = (since[..., -1:] - since).clamp(min=LOWEST).exp()  # of a token's input, at the chunk's end
    back = lost.exp()  # what rounding took from a row of decays, and gave to a column
    through = kept[..., -1] * back[..., -1]  # [b, k, h], of the entering state at the chunk's end
    scores = (C @ B.mT).tril()  # [b, k, g, q, q]
    if seq_idx is not None and document is not None:
        last = seq_idx[..., -1]
        entering = torch.cat((document[:, None], last[:, :-1]), dim=1)  # [b, k], the document of the entering state
        scores = scores * (seq_idx[..., None] == seq_idx[..., None, :])[:, :, None]
        kept = kept * (seq_idx == entering[..., None])[:, :, None]
        left = left * (seq_idx == last[..., None])[:, :, None]
        through = through * (entering == last)[..., None]

    # Within chunks.
    decay = (since[..., :, None] - since[..., None, :]).clamp_(LOWEST, 0).exp_()  # [b, k, h, q, q]
    weights = (decay.unflatten(2, (groups, -1)) * scores[:, :, :, None]).flatten(2, 3)
    taken = inputs * (steps / back)[..., None]  # [b, k, h, q, p]
    out = (weights @ taken).transpose(2, 3)  # [b, k, q, h, p]

    # From chunk to chunk: the heads of a group share B and C, so their channels are rows of one matrix.
    lasting = (taken * (left * back[..., -1:])[..., None]).mT  # [b, k, h, p, q]
    stacked = lasting.unflatten(2, (groups, -1)).flatten(3, 4)  # [b, k, g, r p, q]
    added = (stacked @ B).view(*through.shape, *state.shape[2:])  # [b, k, h, p, n]
    entered = []
    for decays, new in zip(through.unbind(1), added.unbind(1), strict=True):
        entered.append(state)
        state = torch.addcmul(new, state, decays[..., None, None])
    read = C @ torch.stack(entered, dim=1).view(*stacked.shape[:4], -1).mT  # [b, k, g, q, r p]
    out = torch.addcmul(out, read.transpose(2, 3).reshape(out.shape), kept.transpose(2, 3)[..., None])
    out = out * back.transpose(2, 3)[..., None]
    return finish(out, x, spread(D), z).flatten(1, 2), state


def running_sum(x: Tensor) -> tuple[Tensor, Tensor]:
    """The running sum over the last dimension, and what its rounding lost: differences of sums need both.

    A decay is `exp(sum_i - sum_j)`; of a sum of -100 float32 keeps 4e-6, a hundred times what it keeps of the decay.
    """
    total = x.cumsum(dim=-1)
    with torch.no_grad():
        return total, (x - total.diff(dim=-1, prepend=torch.zeros_like(x[..., :1]))).cumsum(dim=-1)


def spread(D: Tensor | None) -> Tensor | None:
    """`D` `[h]` or `[h, p]` as it multiplies `[..., h, p]`."""
    return D[:, None] if D is not None and D.dim() == 1 else D


def finish(out: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """`(out + D x) silu(z)`, in the dtype of `x`; `D` is spread over the last dimensions of `x`."""
    if D is not None:
        out = torch.addcmul(out, upcast(x), upcast(D))
    if z is not None:
        out = out * F.silu(upcast(z))
    return out.to(x.dtype)


def ssd_update(
    state: Tensor,
    x: Tensor,
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
    """One token more: changes `state` `[b, h, p, n]` in place.

    Args:
        x: `[b, h, p]`, and so `z`; dt: `[b, h]`; A: `[h]`; B, C: `[b, g, n]`; D: `[h]` or `[h, p]`; dt_bias: `[h]`.
        indices: `[b]`, where in a pool of states `[m, h, p, n]` that of each row is, no two the same; below 0: the row
            has none, and its outputs are 0. None: in their order.

    Returns:
        `[b, h, p]` in the dtype of `x`.
    """
    if triton_fits(x, B, C) and takes(state, x, dt, A, B, C, D, z, dt_bias):
        return triton_ssd_update(state, x, dt, A, B, C, D, z, dt_bias, indices)
    if indices is not None:
        held, real = state[indices.clamp(min=0)], indices >= 0
        out = ssd_update(held, x, dt, A, B, C, D, z, dt_bias=dt_bias)
        state[indices[real]] = held[real]
        return out.masked_fill(~real[:, None, None], 0)
    dt = time_step(dt, dt_bias, None)
    grouped = state.view(len(state), B.shape[1], -1, state.shape[-1])  # [b, g, r p, n]
    state.mul_((dt * A).exp()[..., None, None])
    taken = (upcast(x) * dt[..., None]).reshape(grouped.shape[:3])
    grouped.addcmul_(taken[..., None].to(state.dtype), B[:, :, None].to(state.dtype))
    out = grouped @ C[..., None].to(state.dtype)  # [b, g, r p, 1]
    return finish(out.view(x.shape).to(dt.dtype), x, spread(D), z)


def triton_fits(x: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether our kernels hold a head and a state of these, which they multiply in one dtype."""
    return x.dtype == B.dtype == C.dtype and x.shape[-1] <= LARGEST[0] and B.shape[-1] <= LARGEST[1]


def kernel_fits(x: Tensor, B: Tensor) -> bool:
    """Whether mamba-ssm is right for these inputs.

    It multiplies float32 as TF32, and its offsets are 32 bits wide: over views of one packed projection, and over the
    states of all chunks (https://github.com/state-spaces/mamba/issues/1015).
    """
    states = x.shape[0] * -(-x.shape[1] // TRITON_CHUNK) * x.shape[2] * x.shape[3] * B.shape[3]
    spans = (t.shape[0] * t.shape[1] * t.stride(1) for t in (x, B))
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and max(states, *spans) < OFFSETS


def kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`mamba-ssm`, which takes the state to be of document 0."""
    seq_idx = None if seq_idx is None else (seq_idx - seq_idx[:, :1]).int()
    options = {"D": D, "z": z, "initial_states": state, "seq_idx": seq_idx, "return_final_states": True}
    return mamba_chunk_scan_combined(x, dt, A, B, C, TRITON_CHUNK, **options)
