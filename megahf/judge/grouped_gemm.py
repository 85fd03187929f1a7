"""A stand-in for the package `grouped_gemm`, so that Megatron's legacy GroupedMLP runs on a CPU.

The package has one function of one kernel; here it is a loop over the experts. How the weights lie in `weight1` and
`weight2` is Megatron's own code. That this computes the right thing is checked where it can be: SequentialMLP, which
has none of it, must give the same logits.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False) -> Tensor:
    """`[tokens, i] x [experts, i, o] -> [tokens, o]`; the first `batch_sizes[0]` tokens are the first expert's."""
    if trans_a or trans_b:
        raise ValueError("the stand-in for grouped_gemm does not transpose")
    groups = a.split(batch_sizes.tolist())
    return torch.cat([group @ weight for group, weight in zip(groups, b, strict=True)])


def install() -> None:
    """Puts the stand-in where `import grouped_gemm` finds it; before Megatron is imported."""
    module: Any = ModuleType("grouped_gemm")
    module.ops = SimpleNamespace(gmm=gmm)
    sys.modules["grouped_gemm"] = module


def allow_fp32() -> None:
    """GroupedMLP refuses all but bf16, as the kernel does; a copy of the config that it alone reads says bf16."""
    from megatron.core.transformer.moe.experts import GroupedMLP

    make = GroupedMLP.__init__

    def init(self: Any, num_local_experts: int, config: Any, pg_collection: Any = None) -> None:
        make(self, num_local_experts, config, pg_collection)
        self.config = copy.copy(config)
        self.config.bf16 = True

    GroupedMLP.__init__ = init
