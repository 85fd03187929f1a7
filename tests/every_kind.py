"""Every kind of model the tests with real Megatron know, as its arguments, for tests that need no real Megatron."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megahf.arguments import config, defaults

sys.path.append(str(Path(__file__).with_name("megatron")))

from kinds import KINDS as DENSE
from kinds_hybrid import KINDS as HYBRIDS
from kinds_moe import KINDS as MIXTURES

GPTS: dict[str, dict[str, Any]] = {**DENSE, **MIXTURES}
KINDS: dict[str, dict[str, Any]] = {**GPTS, **HYBRIDS}


def arguments(kind: str) -> dict[str, Any]:
    """All of them; a hybrid's say that it is one, as its Mamba weights otherwise do."""
    return {**defaults(), **KINDS[kind], "is_hybrid_model": kind in HYBRIDS}


def config_of(kind: str) -> SimpleNamespace:
    """As read off the arguments and, for the number of heads of a mixer, off the weights."""
    made = config(arguments(kind), KINDS[kind]["vocab_size"])
    if kind in HYBRIDS and made.mamba_num_heads is None:
        made.mamba_num_heads = made.mamba_expand * made.hidden_size // made.mamba_head_dim
    return made
