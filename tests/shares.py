"""Checkpoints in memory, made of what shares say, as megahf reads them: keys and arrays, and no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from small import arguments

from megahf.arguments import config as config_of
from megahf.checkpoint import Checkpoint, Files, Holding, Rank
from megahf.global_tensors import GlobalTensor, global_objects, global_tensors
from megahf.plan import Copy, Plan, build
from megahf.shares import ranked
from megahf.target import Target
from megahf.tiles import Tiled
from megahf.weights import weights

SMALL: dict[str, Any] = {
    "hidden_size": 16, "ffn_hidden_size": 24, "kv_channels": 4, "seq_length": 12, "max_position_embeddings": 12,
}  # fmt: skip


def model(**changes: Any) -> tuple[dict[str, Any], SimpleNamespace]:
    """Megatron's arguments of a small Llama with `changes`, and the config they stand for."""
    args = {**arguments(**SMALL), **changes}
    return args, config_of(args, args["vocab_size"])


def numbered(config: Any, dtype: Any = np.float32) -> list[Copy]:
    """Every weight of the model; no two numbers in all of them are alike."""
    copies, at = [], 1
    for weight in weights(config):
        kind, size = np.dtype(np.float32 if weight.row.float32 else dtype), int(np.prod(weight.shape))
        values = np.arange(at, at + size).reshape(weight.shape)
        copies.append(Copy(weight.name, Tiled.of(values.astype(kind)), kind))
        at += size
    return copies


def read_files(args: Mapping[str, Any], config: Any, copies: list[Copy], target: Target) -> Plan:
    """What megahf reads in the files of ranks that shares say."""
    holdings = []
    for place, models in ranked(config, copies, target).items():
        for chunk, (name, stored) in enumerate(models.items()):
            arrays = {key: copy.array for key, copy in stored.items() if copy is not None}
            objects = {key: "None" for key, copy in stored.items() if copy is None}
            holdings.append(holding(f"{place.folder}: {name}", place.rank, chunk, arrays, objects))
    return read(args, target, holdings)


def read_tensors(args: Mapping[str, Any], config: Any, copies: list[Copy], target: Target) -> Plan:
    """What megahf reads in the global tensors that shares say; every place of them is covered once."""
    arrays = {tensor.key: Tiled.of(covered(tensor)) for tensor in global_tensors(config, copies, target)}
    objects = {item.key: "bytes" for item in global_objects(config, target)}
    return read(args, target, [holding("whole", None, 0, arrays, objects)])


def covered(tensor: GlobalTensor) -> np.ndarray:
    """A global tensor from its pieces, which must cover it exactly once."""
    whole, times = np.zeros(tensor.shape, tensor.dtype), np.zeros(tensor.shape, int)
    for start, copy, _ in tensor.pieces:
        at = tuple(slice(first, first + size) for first, size in zip(start, copy.shape, strict=True))
        whole[at] = copy.array.numpy()
        times[at] += 1
    assert (times == 1).all(), tensor.key
    return whole


def holding(where: str, rank: Rank | None, chunk: int, arrays: dict[str, Tiled], objects: dict[str, str]) -> Holding:
    shapes = {key: (array.shape, array.dtype) for key, array in arrays.items()}
    return Holding(where, rank, chunk, shapes, objects, lambda key: Tiled.of(arrays[key].numpy()))


def read(args: Mapping[str, Any], target: Target, holdings: list[Holding]) -> Plan:
    grid = target.grid
    bars = with_bars(args.get("hybrid_override_pattern") or "", grid.layout)
    layout: dict[str, Any] = {
        "tensor_model_parallel_size": grid.tensor,
        "pipeline_model_parallel_size": grid.pipeline,
        "virtual_pipeline_model_parallel_size": grid.virtual if grid.virtual > 1 else None,
        "expert_model_parallel_size": grid.expert,
        "expert_tensor_parallel_size": grid.expert_tensor,
        "decoder_first_pipeline_num_layers": grid.first,
        "decoder_last_pipeline_num_layers": grid.last,
        "account_for_embedding_in_pipeline_split": grid.embedding,
        "account_for_loss_in_pipeline_split": grid.loss,
        "pipeline_model_parallel_layout": None if bars else grid.layout,
        **({"hybrid_override_pattern": bars} if bars else {}),
    }
    made = Checkpoint(Path("none"), target.format, 7, 3.0, {**args, **layout}, holdings, Files())
    return build(made)


def with_bars(pattern: str, layout: str | None) -> str:
    """The pattern with `|` where the stages of `layout` end."""
    if layout is None or not pattern:
        return pattern
    main, *heads = pattern.split("/")
    symbols: Iterator[str] = iter(main)
    return "/".join(["".join("|" if letter == "|" else next(symbols) for letter in layout), *heads])


def assert_same(plan: Plan, config: Any, copies: list[Copy]) -> None:
    """The same model, and every weight of it bit for bit, each time it is stored."""
    assert vars(plan.config) == vars(config)
    assert [copy.name for copy in plan.copies] == [copy.name for copy in copies]
    for found, wanted in zip(plan.copies, copies, strict=True):
        assert found.dtype == wanted.dtype, found.name
        for array in (found.array, *(array for _, array in found.same)):
            np.testing.assert_array_equal(array.numpy(), wanted.array.numpy(), found.name)
