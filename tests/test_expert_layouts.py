"""Experts can be expressed in every layout by the table alone, and read back from it they are what they were."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megahf.arguments import fields
from megahf.checkpoint import Holding, Rank
from megahf.errors import Problems
from megahf.expert_layouts import GLOBAL, LAYOUTS, stores
from megahf.layouts import Grid
from megahf.plan import assembled
from megahf.rows import Row
from megahf.stored import Source, locate
from megahf.tiles import Tiled
from megahf.weights import Weight, weights

Keys = dict[str, Tiled]


def source(experts: int, width: int, gated: bool, biases: bool, grid: Grid, turns: int | None = None) -> Source:
    args: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 3, "ffn_hidden_size": 4, "num_attention_heads": 1,
        "max_position_embeddings": 4, "swiglu": gated,
        "num_experts": experts, "moe_ffn_hidden_size": width, "add_bias_linear": biases, "normalization": "RMSNorm",
        "moe_grouped_gemm": True, "moe_mlp_glu_interleave_size": turns,
    }  # fmt: skip
    return Source.of(SimpleNamespace(vocab_size=1, **fields(args)), args, grid)


def rows(of: Source, layout: str) -> Iterator[Weight]:
    """The weights of experts in the last layer; legacy grouped ones have no biases."""
    for weight in weights(of.config):
        if weight.row.experts and weight.layer == 1 and not (layout == "legacy-grouped" and "bias" in weight.name):
            yield weight


def numbered(weight: Weight) -> Tiled:
    return Tiled.of(np.arange(np.prod(weight.shape), dtype=np.int64).reshape(weight.shape))


def holding(rank: Rank | None, stored: Keys) -> Holding:
    keys = {key.replace("{l}", "1"): array for key, array in stored.items()}
    shapes = {key: (array.shape, array.dtype) for key, array in keys.items()}
    return Holding(f"rank {rank}", rank, 0, shapes, {}, lambda key: Tiled.of(keys[key].numpy()))


def read_back(weight: Weight, holdings: list[Holding], of: Source) -> list[np.ndarray]:
    """The weight through the plan, each time that it is stored."""
    checkpoint: Any = SimpleNamespace(holdings=holdings)
    places, _ = locate(checkpoint, of)
    assert list(places) == [weight.name]
    problems = Problems()
    found = [
        array.numpy() for stored in places[weight.name].values() for _, array in assembled(weight, stored, of, problems)
    ]
    problems.raise_if_any()
    return found


def files(row: Row, whole: Tiled, layout: str, of: Source, turns: int | None) -> list[Holding]:
    grid = of.ranks
    held = stores(row, whole, layout, of.config, grid.expert, grid.expert_tensor, turns)
    if layout in GLOBAL:
        return [holding(None, held[0, 0])]
    return [
        holding(Rank(tensor, 0, expert), held[expert, tensor % grid.expert_tensor])
        for tensor in range(grid.tensor)
        for expert in range(grid.expert)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=40)
@given(
    gated=st.booleans(), biases=st.booleans(), expert=st.integers(1, 4), shards=st.integers(1, 4),
    tensor=st.integers(1, 2), each=st.integers(1, 3), width=st.integers(1, 3),
)  # fmt: skip
def test_what_every_rank_stores_reads_back_as_it_was(
    layout: str, gated: bool, biases: bool, expert: int, shards: int, tensor: int, each: int, width: int
) -> None:
    grid = Grid(tensor=shards * tensor, expert=expert, expert_tensor=shards)
    of = source(expert * each, width * shards, gated, biases, grid)
    for weight in rows(of, layout):
        whole = numbered(weight)
        copies = read_back(weight, files(weight.row, whole, layout, of, None), of)
        assert len(copies) >= (1 if layout in GLOBAL else tensor)
        for copy in copies:
            np.testing.assert_array_equal(copy, whole.numpy())


@pytest.mark.parametrize("layout", ["te-grouped", "packed"])
@settings(deadline=None, max_examples=20)
@given(expert=st.integers(1, 3), shards=st.integers(1, 3), size=st.integers(1, 3), blocks=st.integers(1, 3))
def test_gate_and_up_by_turns_read_back_as_they_were(
    layout: str, expert: int, shards: int, size: int, blocks: int
) -> None:
    grid = Grid(tensor=shards, expert=expert, expert_tensor=shards)
    of = source(2 * expert, size * blocks * shards, True, True, grid, size)
    for weight in rows(of, layout):
        whole = numbered(weight)
        for copy in read_back(weight, files(weight.row, whole, layout, of, size), of):
            np.testing.assert_array_equal(copy, whole.numpy())


def by_name(of: Source, name: str) -> Weight:
    return next(weight for weight in weights(of.config) if weight.layer == 0 and weight.name.endswith(name))


def test_two_ranks_hold_two_experts_each_in_every_layout() -> None:
    """By hand: 4 experts of one gate and one up, hidden size 3, on 2 expert-parallel ranks."""
    of = source(4, 1, True, False, Grid(expert=2))
    weight = by_name(of, "experts.linear_fc1.weight")
    whole = np.arange(24).reshape(4, 2, 3)

    def second(layout: str) -> dict[str, Any]:
        stored = stores(weight.row, Tiled.of(whole), layout, of.config, ranks=2)
        return {key.removeprefix("decoder.layers.{l}.mlp."): value.numpy() for key, value in stored[1, 0].items()}

    for key in ("experts.local_experts.{}.linear_fc1.weight", "experts.linear_fc1.weight{}"):
        layout = "sequential" if "local" in key else "te-grouped"
        held = second(layout)
        assert list(held) == [key.format(0), key.format(1)]
        np.testing.assert_array_equal(held[key.format(1)], whole[3])
    np.testing.assert_array_equal(second("packed")["experts.linear_fc1.weight"], whole[2:])
    flat = second("legacy-grouped")["experts.weight1"]
    assert flat.shape == (3, 4)  # [h, experts 2f], whose memory is [experts, h, 2f]
    np.testing.assert_array_equal(flat.reshape(2, 3, 2), whole[2:].swapaxes(1, 2))


def test_single_experts_of_distributed_checkpoints_have_gate_and_up_apart() -> None:
    of = source(2, 1, True, False, Grid())
    weight = by_name(of, "experts.linear_fc1.weight")
    whole = np.arange(12).reshape(2, 2, 3)
    stored = stores(weight.row, Tiled.of(whole), "singleton", of.config)[0, 0]
    at = "decoder.layers.{l}.mlp.experts.experts."
    assert {key: value.numpy().tolist() for key, value in stored.items()} == {
        f"{at}{e}.linear_fc1.weight_{half}": whole[e, i : i + 1].tolist() for e in (0, 1) for i, half in enumerate("wv")
    }


def test_biases_have_no_legacy_layout() -> None:
    of = source(2, 2, True, True, Grid())
    weight = by_name(of, "experts.linear_fc1.bias")
    with pytest.raises(ValueError, match=r"experts\.linear_fc1\.bias has no layout 'legacy-grouped'"):
        stores(weight.row, numbered(weight), "legacy-grouped", of.config)


def test_experts_that_do_not_divide_are_said_with_their_numbers() -> None:
    of = source(3, 2, True, False, Grid())
    weight = by_name(of, "experts.linear_fc1.weight")
    with pytest.raises(ValueError, match="3 places along axis 0 do not divide by 2"):
        stores(weight.row, numbered(weight), "packed", of.config, ranks=2)
