"""Megatron's own loading, into models of any layout."""

from __future__ import annotations

import re
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from megahf.judge.save import checkpoint_file, metadata, names

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


# The names that layer specs do not share, in the distributed checkpoint that all of them load: TE's and the common one.
# (The local spec itself has TE's name for the norm before the MLP, unless attention is latent.)
SHARED = (
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".mixer.in_proj.layer_norm_", ".norm."),
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".self_attention.linear_q_up_proj.layer_norm_", ".self_attention.q_layernorm."),
    (".self_attention.linear_kv_up_proj.layer_norm_", ".self_attention.kv_layernorm."),
)
# Where InternViT-6B has heads of zeros, as many as the layout needs.
DUMMY_HEADS = re.compile(r"vision_model\..*\.self_attention\.(linear_qkv|linear_proj|[qk]_layernorm)\.weight")
EXTRA_STATE = re.compile(r".*\._extra_state\d*")  # one an expert in a grouped linear


def sharded(models: list[GPTModel], content: dict[str, Any]) -> dict[str, Any]:
    """The sharded tensors of the models, without the extra states that only TE modules have.

    Args:
        content: the checkpoint's `content_metadata`, which says how its keys are made.
    """
    return {
        name: {
            key: value
            for key, value in model.sharded_state_dict(metadata=metadata() | content).items()
            if not EXTRA_STATE.fullmatch(key)
        }
        for name, model in zip(names(models), models, strict=True)
    }


def save_weights(models: list[GPTModel], folder: Path) -> None:
    """Weights alone, as a distributed checkpoint that models of every layout and of both layer specs can load."""
    from megatron.core import dist_checkpointing

    if distributed.get_rank() == 0:
        folder.mkdir()
    distributed.barrier()
    dist_checkpointing.save(shared(models), str(folder))


def load_weights(models: list[GPTModel], folder: Path) -> None:
    """What `save_weights` saved, into models of any layout, layer spec and way to hold experts."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(shared(models), str(folder))
    for name, model in zip(names(models), models, strict=True):
        put(model, loaded.get(name, {}))  # nothing of a stage without layers


def shared(models: list[GPTModel]) -> dict[str, Any]:
    """`sharded` under names that all layer specs have in common."""
    state = sharded(models, {})
    for tensors in state.values():
        for tensor in tensors.values():
            for theirs, common in SHARED:
                tensor.key = tensor.key.replace(theirs, common)
            if DUMMY_HEADS.fullmatch(tensor.key):
                tensor.allow_shape_mismatch = True  # zeros where nothing is stored
    return state


def load_dist(args: Namespace, models: list[GPTModel], folder: Path) -> None:
    """Megatron's resharding of a distributed checkpoint into `models`."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import load_content_metadata

    with common_file(folder) as place:
        content = load_content_metadata(str(place)) or {}
        loaded = dist_checkpointing.load(sharded(models, content), str(place))
    for name, model in zip(names(models), models, strict=True):
        put(model, loaded.get(name, {}))


@contextmanager
def common_file(folder: Path) -> Iterator[Path]:
    """A folder with the same files and a `common.pt`, which 0.16.1 asks for and Megatron's main no longer writes."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy

    if (folder / "common.pt").exists():
        yield folder
        return
    asked = {"common": ShardedObject("common_state", None, (1,), (0,))}
    state = get_default_load_sharded_strategy(str(folder)).load(asked, folder)["common"]
    with tempfile.TemporaryDirectory(prefix="megahf-common-") as place:
        for file in folder.iterdir():
            (Path(place) / file.name).symlink_to(file.resolve())
        torch.save(state, Path(place) / "common.pt")
        yield Path(place)


def load_dcp(args: Namespace, models: list[GPTModel], folder: Path) -> None:
    """`torch_dcp`: torch's own loading of an unsharded model."""
    from torch.distributed import checkpoint

    state = {key: value for key, value in models[0].state_dict().items() if torch.is_tensor(value)}
    checkpoint.load({"model": state}, checkpoint_id=folder)
    put(models[0], state)


def load_torch(args: Namespace, models: list[GPTModel], folder: Path) -> None:
    """This rank's file of a `torch` checkpoint, unpickled as Megatron does it: only for files that are trusted."""
    state = torch.load(checkpoint_file(args, folder), weights_only=False, mmap=True)
    for name, model in zip(names(models), models, strict=True):
        put(model, state[name])


def put(model: GPTModel, state: dict[str, Any]) -> None:
    """`load_state_dict` that minds everything but what is no weight."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    wrong = [key for key in (*missing, *unexpected) if not EXTRA_STATE.fullmatch(key)]
    if wrong:
        raise KeyError(f"missing or unexpected: {wrong}")


LOADERS = {"torch": load_torch, "torch_dist": load_dist, "torch_dcp": load_dcp}
