"""Small checkpoints as torch.save and torch.distributed.checkpoint write them, laid out as Megatron lays them out."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megahf.checkpoint import Checkpoint, Rank

Grid = tuple[int, int, int]


def arguments(tensor: int = 1, pipeline: int = 1, expert: int = 1, **more: object) -> argparse.Namespace:
    return argparse.Namespace(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        expert_model_parallel_size=expert,
        hidden_size=8,
        params_dtype=torch.bfloat16,
        **more,
    )


def state(seed: int = 0) -> OrderedDict[str, Any]:
    torch.manual_seed(seed)
    weight = torch.randn(4, 6, dtype=torch.bfloat16)
    return OrderedDict(
        {
            "decoder.layers.0.w": weight,
            "tied.w": weight,
            "turned.w": weight.t(),
            "x._extra_state": None,
            "b": torch.randn(3),
        }
    )


def write_rank(
    folder: Path, args: argparse.Namespace | None, models: Mapping[str, object], iteration: int = 10, **more: object
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = {"state": {0: {"exp_avg": torch.ones(100)}}, "param_groups": [{"lr": 0.1}]}
    content = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "optimizer": optimizer,
        **models,
        **more,
    }
    torch.save({key: value for key, value in content.items() if value is not None}, folder / "model_optim_rng.pt")


def write_grid(root: Path, grid: Grid, names: Mapping[str, Rank]) -> None:
    """A directory with a file for each rank; the seed of a rank's weights is its place in `names`."""
    for seed, (name, rank) in enumerate(names.items()):
        number = rank.tensor + grid[0] * seed  # Megatron counts tensor ranks fastest
        write_rank(root / name, arguments(*grid, rank=number, local_rank=seed % 2), {"model": state(seed)})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_holds(checkpoint: Checkpoint, index: int, wanted: Mapping[str, Any]) -> None:
    holding = checkpoint.holdings[index]
    tensors = {key: value for key, value in wanted.items() if torch.is_tensor(value)}
    assert set(holding.shapes) == set(tensors)
    assert set(holding.objects) == set(wanted) - set(tensors)
    for key, tensor in tensors.items():
        whole = holding.read(key)
        assert holding.shapes[key] == (tuple(tensor.shape), whole.dtype) == (whole.shape, whole.dtype)
        assert whole.numpy().tobytes() == bits(tensor)


def distributed_state() -> dict[str, Any]:
    torch.manual_seed(3)
    return {
        "embedding.word_embeddings.weight": torch.randn(16, 8, dtype=torch.bfloat16),
        "decoder.layers.mlp.linear_fc1.weight": torch.randn(4, 6, 8),
        "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4": b"x",
        "number": torch.tensor(2.0),
        "optimizer.state.exp_avg.number": torch.ones(1),
        "chained_0.optimizer.state.exp_avg.number": torch.ones(1),
        "rng_state/shard_0.0_1.1": [1, 2],
    }


COMMON = {"args": arguments(), "checkpoint_version": 3.0, "iteration": 10}


def write_torch_dist(root: Path, in_file: bool = False) -> None:
    content = distributed_state()
    backend: dict[str, object] = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    if in_file:
        content["common_state/shard_0_1"] = [COMMON]
    root.mkdir(parents=True, exist_ok=True)
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)  # as Megatron's own: a list is one item
    dcp.save(content, checkpoint_id=str(root), no_dist=True, planner=planner)
    if not in_file:
        torch.save(COMMON, root / "common.pt")
        backend |= {"common_backend": "torch", "common_backend_version": 1}
    (root / "metadata.json").write_text(json.dumps(backend))
