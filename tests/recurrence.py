"""The recurrence of Mamba-2 written down token by token in float64, and small inputs of it that lie as a mixer's do."""

from __future__ import annotations

import torch
from torch import Tensor

Given = dict[str, Tensor | None]
CHANNELS, STATE = 16, 16
FLOATING = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")  # to be differentiated
# Documents that start where a chunk of 16 tokens does, before its end, after its start, and one by one; then of 128.
DOCUMENTS = {17: [15, 2], 35: [16, 1, 14, 1, 1, 2], 259: [64, 1, 62, 1, 1, 127, 3]}


def given(
    length: int, heads: int, groups: int, options: str = "", dtype: torch.dtype = torch.float32, rows: int = 1,
    channels: int = CHANNELS, state: int = STATE,
) -> Given:  # fmt: skip
    """Inputs in views of a packed projection, z | x | B | C | dt; `options` say what there is beside x, dt, A, B, C."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inner, shared = heads * channels, groups * state
    packed = normal(rows, length, 2 * inner + 2 * shared + heads + 3).to(dtype)
    z, x, B, C, dt, _ = packed.split([inner, inner, shared, shared, heads, 3], dim=-1)
    found: Given = dict.fromkeys(("D", "z", "dt_bias", "state", "seq_idx", "mask"))
    found |= {"x": x.unflatten(-1, (heads, channels)), "dt": dt, "A": -4 * torch.rand(heads, generator=generator) - 0.1}
    found |= {"B": B.unflatten(-1, (groups, state)), "C": C.unflatten(-1, (groups, state))}
    if "skip" in options:
        found["D"] = normal(heads, channels) if "each" in options else normal(heads)
    if "gate" in options:
        found["z"] = z.unflatten(-1, (heads, channels))
    if "bias" in options:
        found["dt_bias"] = normal(heads)
    if "state" in options:
        found["state"] = normal(rows, heads, channels, state)
    if "documents" in options:
        lengths = torch.tensor(DOCUMENTS[length])
        found["seq_idx"] = torch.repeat_interleave(torch.arange(len(lengths)) + 3, lengths).expand(rows, -1)
    if "padding" in options:
        found["mask"] = torch.rand(rows, length, generator=generator) > 0.3
    return leaves(found)


def leaves(found: Given) -> Given:
    return {name: t.requires_grad_() if t is not None and name in FLOATING else t for name, t in found.items()}


def doubled(found: Given) -> Given:
    """The same numbers in float64, to be differentiated too."""
    return leaves({name: t.detach().double() if t is not None and name in FLOATING else t for name, t in found.items()})


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, state: Tensor | None, seq_idx: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows, length, heads, channels = x.shape
    B, C = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    dt = torch.logaddexp(dt if dt_bias is None else dt + dt_bias, dt.new_zeros(()))
    dt = dt if mask is None else dt * mask[..., None]
    state = x.new_zeros(rows, heads, channels, B.shape[-1]) if state is None else state
    outs = []
    for t in range(length):
        if seq_idx is not None and t:
            state = state * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        added = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    out = torch.stack(outs, dim=1)
    out = out if D is None else out + D.reshape(heads, -1) * x
    return out if z is None else out * z * torch.sigmoid(z), state


def error(got: Tensor, want: Tensor) -> float:
    """Of the norm, relative."""
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))
