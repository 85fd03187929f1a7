"""A stand-in for the package `mamba_ssm`, so that Megatron's real Mamba mixer runs on a CPU.

Three of its names are enough: the scan, the scan with the convolution before it, and the gated norm. All are written
from the definition, one token after the other, in fp64. That they compute the right thing is checked where it can be:
Megatron's second path (`use_mamba_mem_eff_path` off) convolves and gates by its own code and must give the same
logits. Without `causal_conv1d` and `selective_state_update`, Megatron has torch code of its own.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VERSION = "2.2.6"


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence `S = exp(dt A) S + dt x B^T`, `y = S C`, from a state of zeros; returns y `[b, s, h, p]`.

    Args:
        x: `[b, s, h, p]`.
        dt: `[b, s, h]`, above zero.
        A: `[h]`, below zero.
        B: `[b, s, g, n]`, the same for the h / g heads of a group, as C.
    """
    batch, length, heads, width = x.shape
    B, C = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (B, C))  # [b, s, h, n]
    state = x.new_zeros(batch, heads, width, B.shape[-1])  # [b, h, p, n]
    found = []
    for t in range(length):
        kept = torch.exp(dt[:, t] * A)[..., None, None] * state
        state = kept + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        found.append((state * C[:, t, :, None, :]).sum(-1))  # [b, h, p]
    return torch.stack(found, dim=1)  # [b, s, h, p]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    *,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    dt_softplus: bool,
    **unused: object,
) -> Tensor:
    """`[b, s, h, p]`: the scan, `D x` (D `[h]` or `[h, p]`), and the gate SiLU(z) if there is z; dt is not clamped."""
    if not dt_softplus or any(unused.values()):
        raise ValueError(f"the stand-in for mamba_ssm has no {sorted(unused)}, and dt always goes through softplus")
    wide = x.double()
    steps = torch.log1p(torch.exp(dt.double() + dt_bias.double()))  # softplus
    y = scan(wide, steps, A.double(), B.double(), C.double())
    y = y + wide * (D[:, None] if D.dim() == 1 else D).double()
    return (y if z is None else y * F.silu(z.double())).to(x.dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    activation: str,
    headdim: int | None,
    ngroups: int,
    norm_before_gate: bool,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """`[b, s, h * p]` of the packed z | x | B | C | dt `[b, s, ...]`: convolution, SiLU, scan and gate.

    Args:
        conv1d_weight: `[channels of x | B | C, width]`, the last column for the newest token.
        headdim: p; None where D `[h, p]` says it.
    """
    if seq_idx is not None or activation != "silu" or norm_before_gate:
        raise ValueError("the stand-in for mamba_ssm has no packed sequences, no other activation than silu")
    heads, width = A.shape[0], headdim or D.shape[1]
    inner, channels = heads * width, conv1d_weight.shape[0]
    z, xBC, dt = zxbcdt.split([inner, channels, heads], dim=-1)
    taps = conv1d_weight.shape[1]
    padded = F.pad(xBC.double(), (0, 0, taps - 1, 0))  # [b, taps - 1 + s, channels]
    mixed = conv1d_bias.double() + sum(
        padded[:, tap : tap + xBC.shape[1]] * conv1d_weight[:, tap].double() for tap in range(taps)
    )
    states = (channels - inner) // 2
    x, B, C = F.silu(mixed).split([inner, states, states], dim=-1)
    x, z = (each.unflatten(-1, (heads, width)) for each in (x, z))  # [b, s, h, p]
    B, C = (each.unflatten(-1, (ngroups, states // ngroups)) for each in (B, C))  # [b, s, g, n]
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)
    return y.flatten(2).to(zxbcdt.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over groups of channels, of x times SiLU(z) if there is z."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
        device: object = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("the stand-in for mamba_ssm has no norm before the gate")
        self.eps, self.group_size = eps, group_size
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        gated = x.double() if z is None else x.double() * F.silu(z.double())
        groups = gated.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (groups.flatten(-2) * self.weight.double()).to(x.dtype)


def install() -> None:
    """Puts the stand-in where `import mamba_ssm` finds it; before Megatron is imported."""
    scans = {name.__name__: name for name in (mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined)}
    contents: dict[str, dict[str, Any]] = {
        "mamba_ssm": {"__version__": VERSION},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": RMSNorm},
        "mamba_ssm.ops.triton.ssd_combined": scans,
        # Megatron's own, of Triton kernels for dynamic batching, which the mixer imports and only inference uses
        "megatron.core.inference.contexts.attention_context.triton.tensor_ops": dict.fromkeys(
            ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge")
        ),
    }
    for name, members in contents.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None, is_package=True)
        module.__dict__.update(members)
        sys.modules[name] = module
