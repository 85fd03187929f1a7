"""How many tensor-parallel ranks a model is best given, as a rule of thumb."""

from __future__ import annotations

from math import prod

from .cuts import Config
from .rows import is_hybrid, language
from .weights import weights

RANKS = (1, 2, 4, 8)  # within one machine: beyond it, its traffic is what everything waits for
# Bytes of sixteen-bit weights a rank. Training keeps eight to nine times as much beside them (gradients, fp32 copies
# and two moments), and activations: some 80 GB in all. An 8B model gets 2 ranks, one of 70B all 8, and stages besides.
MOST = 10 * 10**9


def sensible_tp(config: Config) -> int:
    """The fewest ranks that hold `MOST` bytes each and share out heads and widths evenly; else the most that do.

    Experts are not counted: expert parallelism shares them out.
    """
    fitting = even_ranks(config)
    nbytes = 2 * sum(prod(weight.shape) for weight in weights(config) if not weight.row.experts)
    return next((ranks for ranks in fitting if nbytes <= ranks * MOST), fitting[-1])


def even_ranks(config: Config) -> list[int]:
    """How many ranks share out heads and widths evenly. More than query groups would repeat keys."""
    config = language(config)
    shared = [config.num_attention_heads, config.num_query_groups, config.ffn_hidden_size]
    if is_hybrid(config) and "M" in config.hybrid_layer_pattern:
        shared = [config.mamba_num_heads or 1, config.mamba_num_groups]
        shared += [config.num_query_groups] if "*" in config.hybrid_layer_pattern else []
    return [ranks for ranks in RANKS if all(count % ranks == 0 for count in shared)]
