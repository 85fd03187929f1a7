"""Megatron's checkpoint formats, written by Megatron.

`torch` follows `megatron/training/checkpointing.py` (its path rule, who writes, its keys), which cannot be imported
without the rest of its trainer; the distributed formats are calls of `megatron.core.dist_checkpointing` and of
`torch.distributed.checkpoint` as Megatron makes them.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed

from megahf.judge import bert, hybrid, multimodal

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

ITERATION = 10


def save(args: Namespace, models: list[GPTModel], root: Path, format: str) -> None:
    """Writes `models`, all ranks together, as `root/iter_0000010` and the tracker file beside it.

    Args:
        format: a name of `FORMATS`.
    """
    args.iteration, args.rank = ITERATION, distributed.get_rank()
    args.ckpt_format = format.partition(":")[0]
    target = root / f"iter_{ITERATION:07d}"
    if distributed.get_rank() == 0:
        target.mkdir(parents=True)
    distributed.barrier()
    FORMATS[format](args, models, target)
    distributed.barrier()
    if distributed.get_rank() == 0:
        (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def common(args: Namespace) -> dict[str, Any]:
    """What every format holds beside the weights."""
    return {
        "args": bert.as_stored(multimodal.as_stored(args)),
        "checkpoint_version": 3.0,
        "iteration": args.iteration,
        "num_floating_point_operations_so_far": 0,
        "opt_param_scheduler": {"max_lr": 1e-4, "num_steps": args.iteration, "lr_decay_style": "linear"},
    }


def rng_state() -> dict[str, Any]:
    """One rank's generators, as `get_rng_state` collects them."""
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.cuda.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.cuda.get_rng_state()},
    }


def names(models: list[GPTModel]) -> list[str]:
    return ["model"] if len(models) == 1 else [f"model{index}" for index in range(len(models))]


def local_state(model: GPTModel) -> dict[str, Any]:
    """`state_dict_for_save_checkpoint` in tensors of their own (a pipelined run saves whole storages)."""
    state = model.state_dict_for_save_checkpoint()
    return type(state)((key, value.clone() if torch.is_tensor(value) else value) for key, value in state.items())


def checkpoint_file(args: Namespace, target: Path) -> Path:
    """`get_checkpoint_name` of the trainer, for this rank."""
    from megatron.core import parallel_state

    folder = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if args.pipeline_model_parallel_size > 1:
        folder += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if args.expert_model_parallel_size > 1:
        folder += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    return target / folder / "model_optim_rng.pt"


def save_torch(
    args: Namespace,
    models: list[GPTModel],
    target: Path,
    renamed: Callable[[dict[str, Any]], dict[str, Any]] = lambda state: state,
) -> None:
    """`save_checkpoint` of the trainer: a file a tensor, pipeline and expert rank, as far as there are such ranks.

    Written by the first rank of each data-parallel group and of each group of the experts' data parallelism.
    """
    from megatron.core import parallel_state

    if parallel_state.get_data_parallel_rank() != 0 and parallel_state.get_expert_data_parallel_rank() != 0:
        return
    state = common(args)
    state |= {name: renamed(local_state(model)) for name, model in zip(names(models), models, strict=True)}
    state["rng_state"] = [rng_state()]
    file = checkpoint_file(args, target)
    file.parent.mkdir()
    torch.save(state, file)


def save_torch_as_main(args: Namespace, models: list[GPTModel], target: Path) -> None:
    """`torch` as Megatron's main has it of hybrids: args and two of the names differ."""
    hybrid.as_main(args)
    save_torch(args, models, target, hybrid.as_main_names)


def metadata() -> dict[str, Any]:
    """What `sharded_state_dict` has to be told about the run."""
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def sharded_state(args: Namespace, models: list[GPTModel], content: dict[str, Any]) -> dict[str, Any]:
    """`generate_state_dict` of the trainer: sharded models, the common part, and generators as a sharded object."""
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = common(args)
    for name, model in zip(names(models), models, strict=True):
        state[name] = model.sharded_state_dict(metadata=metadata() | content)
    state["rng_state"] = ShardedObject(
        "rng_state",
        [rng_state()],
        (args.pipeline_model_parallel_size, args.tensor_model_parallel_size),
        (parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()),
        replica_id=parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return state


def content_metadata(**changed: bool) -> dict[str, Any]:
    return {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **changed}


def save_dist(**changed: bool) -> Callable[[Namespace, list[GPTModel], Path], None]:
    """`dist_checkpointing.save`; stacked layers unless `changed` says otherwise."""

    def write(args: Namespace, models: list[GPTModel], target: Path) -> None:
        from megatron.core import dist_checkpointing

        content = content_metadata(**changed)
        state = sharded_state(args, models, content)
        dist_checkpointing.save(state, str(target), content_metadata=content)

    return write


def save_dist_as_main(args: Namespace, models: list[GPTModel], target: Path) -> None:
    """`dist_checkpointing.save` as Megatron's main has it: the common part is an object in the files, no common.pt."""
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

    hybrid.as_main(args)
    content = content_metadata()
    state = sharded_state(args, models, content) | {"content_metadata": content}
    sharded, rest = save_preprocess(state, True)
    sharded["common_state"] = ShardedObject("common_state", rest, (1,), (0,), replica_id=distributed.get_rank())
    strategy = get_default_save_sharded_strategy()
    strategy.save(sharded, target)
    if distributed.get_rank() == 0:
        save_config(CheckpointingConfig(strategy.backend, strategy.version), str(target))


def save_dcp(args: Namespace, models: list[GPTModel], target: Path) -> None:
    """`--ckpt-format torch_dcp`: the module's own state dict, nothing sharded but by data parallel."""
    from torch.distributed import checkpoint

    state = common(args) | {"model": local_state(models[0]), "rng_state": [rng_state()]}
    checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(target))


FORMATS: dict[str, Callable[[Namespace, list[GPTModel], Path], None]] = {
    "torch": save_torch,
    "torch:main": save_torch_as_main,
    "torch_dist": save_dist(),
    "torch_dist:layers": save_dist(non_homogeneous_layers=True),
    "torch_dist:singleton": save_dist(singleton_local_shards=True),
    "torch_dist:main": save_dist_as_main,
    "torch_dcp": save_dcp,
}
