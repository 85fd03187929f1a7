"""Ways for a checkpoint of a mixture of experts to be bad, as the rows of bad.py."""

from __future__ import annotations

import torch
from bad import ITERATION, NOT_YET, Bad, add, every, flip_in, remove, weight, without

EXPERT = "decoder.layers.0.mlp.experts.local_experts.{}.linear_"

ROWS: dict[str, Bad] = {
    "expert missing": Bad(
        lambda path: [without(f"mp_rank_0{t}_001", f"{EXPERT.format(3)}fc1.weight")(path) for t in (0, 1)],
        ("experts [7] of 8 are missing", "decoder.layers.0.mlp.experts.linear_fc1.weight", "file of a rank missing?"),
        base="sequential",
    ),
    "expert missing on one tensor rank": Bad(
        without("mp_rank_01_001", f"{EXPERT.format(3)}fc2.weight"),
        ("missing on tensor-parallel ranks [1] of 2", "decoder.layers.0.mlp.experts.linear_fc2.weight"),
        base="sequential",
    ),
    "expert too many": Bad(
        add("mp_rank_00_001", **{f"{EXPERT.format(4)}fc1.weight".replace(".", "__"): torch.ones(12, 16)}),
        ("expert 4 on a rank that the args give 4 of 8 experts", "mp_rank_00_001", "are these its args?"),
        base="sequential",
    ),
    "files of another number of expert ranks": Bad(
        every(expert_model_parallel_size=4), ("ranks are missing", "expert rank 2", "expert rank 3"), base="sequential"
    ),
    "missing expert rank": Bad(
        remove(f"{ITERATION}/mp_rank_*_001"),
        ("ranks are missing: the args say tensor x pipeline x expert = 2 x 1 x 2", "expert rank 1"), base="sequential",
    ),
    "missing half of an expert rank": Bad(
        remove(f"{ITERATION}/mp_rank_01_001"), ("ranks are missing", "expert rank 1, tensor rank 1"), base="sequential"
    ),
    "more experts than stored": Bad(
        every(num_experts=16), ("experts [4, 5, 6, 7, 12, 13, 14, 15] of 16 are missing",), base="sequential",
        reasons=-1,
    ),
    "experts that do not divide": Bad(
        every(num_experts=9), ("9 experts do not divide over 2 expert-parallel ranks",), base="sequential"
    ),
    "weight1 of no number of experts": Bad(
        every(num_experts=10), ("weight1 of [16, 48] does not fit 5 experts", "mp_rank_00_000"), base="grouped",
        reasons=-1,
    ),
    "weight1 of other experts": Bad(
        every(moe_ffn_hidden_size=10), ("stored [8, 24, 16], the args say [8, 20, 16]",), base="grouped", reasons=-1
    ),
    "experts cut over more ranks than files name": Bad(
        every(expert_tensor_parallel_size=4),
        ("experts cut over 4 ranks do not fit files of 2 tensor ranks", "--ckpt-format torch_dist"), base="sequential",
    ),
    "experts cut over tensor and expert ranks": Bad(
        every(moe_extended_tp=True), ("--moe-extended-tp cuts experts another way",), base="sequential"
    ),
    "flipped byte in a weight1": Bad(
        lambda path: flip_in("mp_rank_01_001", "decoder.layers.1.mlp.experts.weight1")(path),
        ("CRC-32 of decoder.layers.1.mlp.experts.linear_fc1.weight is wrong", "mp_rank_01_001"), base="grouped",
    ),
    "unequal routers": Bad(
        weight("mp_rank_01_001", "decoder.layers.0.mlp.router.weight", lambda value: value[0, 0].add_(1)),
        ("stored twice and not equal", "decoder.layers.0.mlp.router.weight", "mp_rank_01_001"), base="sequential",
    ),
    "experts in a dense model": Bad(
        every(num_experts=None), ("expert 0 on a rank that the args give 0 of 0 experts", "are these its args?"),
        base="sequential", reasons=-1,
    ),
    "router that is not built": Bad(
        every(moe_router_score_function="tanh"), ("--moe-router-score-function tanh is a router that is not built",),
        base="sequential",
    ),
    "quantile balancing": Bad(
        every(moe_router_load_balancing_type="quantile_balancing"),
        ("--moe-router-load-balancing-type quantile_balancing is a router that is not built",), base="sequential",
    ),
    "weights of quantile balancing": Bad(
        add("mp_rank_00_000", decoder__layers__0__mlp__router__qb_beta=torch.ones(8)),
        (f"these weights belong to quantile balancing of experts, {NOT_YET}",), base="sequential",
    ),
    "number format of routers": Bad(
        every(moe_router_dtype="fp8"), ("--moe-router-dtype fp8 is a number format for routers",), base="sequential"
    ),
    "heads too many": Bad(
        add("mp_rank_00_000", mtp__layers__1__enorm__weight=torch.ones(16)),
        ("head 1 for further tokens, the args say 0",), base="sequential",
    ),
}  # fmt: skip
