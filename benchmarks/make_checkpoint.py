"""Makes a checkpoint of N GB as Megatron lays it out, for measuring: random weights, one rank in memory at a time.

    python benchmarks/make_checkpoint.py DIR --gb 6 --format torch_dist --tp 4 --pp 2

A dense GPT of the widths of Llama 3.2 3B, with as many layers as make the size, in bf16. `torch` writes a `torch.save`
file for each rank; `torch_dist` writes what Megatron's writer does: layers stacked under one key, two `.distcp` files a
rank by torch's own FileSystemWriter, one `torch.save` inside for each chunk. Every number follows from its weight's
name, so that `whole` can say later what a converted weight must be. Enums in the args are written as their names:
megatron-core is not needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata, planner

from megahf.judge.namespace import defaults, derive_run, derive_sizes

HIDDEN, FFN, HEADS, GROUPS, CHANNELS, VOCABULARY = 3072, 8192, 24, 8, 128, 32000
ITERATION, VERSION = 10, 3.0


@dataclass(frozen=True)
class Weight:
    """A weight of one layer, or of the model: whole shape and the axis that tensor parallelism cuts (None: not cut)."""

    name: str  # `{l}` stands for the layer
    shape: tuple[int, ...]
    axis: int | None
    parts: int = 1  # blocks on the axis that are cut each on its own: gate | up


LAYER = (
    Weight("decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight", (HIDDEN,), None),
    Weight("decoder.layers.{l}.self_attention.linear_qkv.weight", ((HEADS + 2 * GROUPS) * CHANNELS, HIDDEN), 0),
    Weight("decoder.layers.{l}.self_attention.linear_proj.weight", (HIDDEN, HEADS * CHANNELS), 1),
    Weight("decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight", (HIDDEN,), None),
    Weight("decoder.layers.{l}.mlp.linear_fc1.weight", (2 * FFN, HIDDEN), 0, parts=2),
    Weight("decoder.layers.{l}.mlp.linear_fc2.weight", (HIDDEN, FFN), 1),
)


def ends(padded: int) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """The weights before and after the layers."""
    return (
        (Weight("embedding.word_embeddings.weight", (padded, HIDDEN), 0),),
        (Weight("decoder.final_layernorm.weight", (HIDDEN,), None), Weight("output_layer.weight", (padded, HIDDEN), 0)),
    )


@dataclass(frozen=True)
class Model:
    """What is made: its arguments, and its weights by pipeline stage."""

    args: Namespace

    @property
    def tp(self) -> int:
        return int(self.args.tensor_model_parallel_size)

    @property
    def pp(self) -> int:
        return int(self.args.pipeline_model_parallel_size)

    def stage(self, pipeline: int) -> Iterator[tuple[Weight, int | None]]:
        """The weights of a stage with their global layer."""
        first, last = ends(self.args.padded_vocab_size)
        count = self.args.num_layers // self.pp
        yield from ((weight, None) for weight in first if pipeline == 0)
        yield from ((weight, pipeline * count + layer) for layer in range(count) for weight in LAYER)
        yield from ((weight, None) for weight in last if pipeline == self.pp - 1)


def model(gb: float, tp: int, pp: int) -> Model:
    """The model of about `gb` * 1e9 bytes: its layers are as many as fit, the same number on every stage."""
    step = 128 * tp
    padded = -(-VOCABULARY // step) * step
    a_layer = 2 * sum(int(np.prod(weight.shape)) for weight in LAYER)
    outside = 2 * sum(int(np.prod(weight.shape)) for group in ends(padded) for weight in group)
    layers = max(round((gb * 1e9 - outside) / a_layer / pp), 1) * pp
    args = Namespace(
        **defaults()
        | {
            "num_layers": layers, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
            "num_query_groups": GROUPS, "group_query_attention": True, "kv_channels": CHANNELS, "swiglu": True,
            "normalization": "RMSNorm", "position_embedding_type": "rope", "rotary_base": 500000,
            "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "vocab_size": VOCABULARY,
            "padded_vocab_size": padded, "max_position_embeddings": 8192, "seq_length": 8192, "bf16": True,
            "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "iteration": ITERATION,
        }
    )  # fmt: skip
    derive_sizes(args)
    derive_run(args)
    return Model(args)


def numbers(shape: tuple[int, ...], *identity: object) -> torch.Tensor:
    """Random bf16 below 2 in magnitude, always the same for one identity; no NaN, and nothing a disk could compress."""
    seed = int.from_bytes(hashlib.sha256(repr(identity).encode()).digest()[:8], "little")
    words = np.random.SFC64(seed).random_raw(-(-int(np.prod(shape)) // 4))
    words &= np.uint64(0xBFFFBFFFBFFFBFFF)  # the exponent's top bit off
    return torch.from_numpy(words.view(np.int16)[: int(np.prod(shape))].reshape(shape)).view(torch.bfloat16)


def shard(weight: Weight, layer: int | None, rank: int, tp: int) -> torch.Tensor:
    """What one tensor-parallel rank holds; of a weight with parts, the rank's piece of each, one after the other."""
    if weight.axis is None:
        return numbers(weight.shape, weight.name, layer)
    sizes = list(weight.shape)
    sizes[weight.axis] //= tp * weight.parts
    parts = [numbers(tuple(sizes), weight.name, layer, part, rank) for part in range(weight.parts)]
    return torch.cat(parts, weight.axis)


def whole(weight: Weight, layer: int | None, tp: int) -> torch.Tensor:
    """The weight over all ranks: all pieces of the first part, then of the second."""
    if weight.axis is None:
        return shard(weight, layer, 0, tp)
    pieces = [shard(weight, layer, rank, tp).chunk(weight.parts, weight.axis) for rank in range(tp)]
    return torch.cat([piece[part] for part in range(weight.parts) for piece in pieces], weight.axis)


def common(args: Namespace) -> dict[str, object]:
    return {"args": args, "checkpoint_version": VERSION, "iteration": ITERATION}


def save_torch(model: Model, target: Path) -> None:
    """`mp_rank_TT_PPP/model_optim_rng.pt`, layers numbered from 0 on every stage."""
    first = model.args.num_layers // model.pp
    for pipeline in range(model.pp):
        for rank in range(model.tp):
            state = {}
            for weight, layer in model.stage(pipeline):
                name = weight.name.format(l=None if layer is None else layer - pipeline * first)
                state[name] = shard(weight, layer, rank, model.tp)
            folder = target / (f"mp_rank_{rank:02d}" + (f"_{pipeline:03d}" if model.pp > 1 else ""))
            folder.mkdir()
            torch.save(common(model.args) | {"model": state}, folder / "model_optim_rng.pt")


class Chunks(planner.SavePlanner):
    """Makes each chunk when the writer asks for it."""

    def __init__(self, model: Model) -> None:
        self.model, self.made = model, dict[metadata.MetadataIndex, tuple[Weight, int | None, int, int]]()
        self.sizes = dict[metadata.MetadataIndex, list[int]]()

    def plan(self, pipeline: int, rank: int) -> planner.SavePlan:
        """What one rank writes: its shards of the stacked weights; a weight that is not cut only from rank 0."""
        items = []
        for weight, layer in self.model.stage(pipeline):
            if weight.axis is not None or rank == 0:
                items += [self.item(weight, layer, rank, part) for part in range(weight.parts)]
        return planner.SavePlan(items)

    def item(
        self, weight: Weight, layer: int | None, rank: int, part: int, expert: tuple[int, int] | None = None,
        made_as: Weight | None = None,
    ) -> planner.WriteItem:  # fmt: skip
        """One chunk. `expert`: which of how many, on an axis of its own; `made_as`: the weight its numbers are of."""
        sizes, offsets = list(weight.shape), [0] * len(weight.shape)
        if weight.axis is not None:
            sizes[weight.axis] //= self.model.tp * weight.parts
            offsets[weight.axis] = (part * self.model.tp + rank) * sizes[weight.axis]
        key, shape = weight.name.replace("{l}.", ""), weight.shape
        if expert is not None:
            sizes, offsets, shape = [1, *sizes], [expert[0], *offsets], (expert[1], *shape)
        if layer is not None:
            sizes, offsets, shape = [1, *sizes], [layer, *offsets], (self.model.args.num_layers, *shape)
        index = metadata.MetadataIndex(key, torch.Size(offsets))
        self.made[index] = (made_as or weight, layer, rank, part)
        self.sizes[index] = sizes
        data = planner.TensorWriteData(
            metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
            metadata.TensorProperties(torch.bfloat16), torch.Size(shape),
        )  # fmt: skip
        return planner.WriteItem(index, planner.WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: planner.WriteItem) -> torch.Tensor:
        weight, layer, rank, part = self.made[write_item.index]
        data = shard(weight, layer, rank, self.model.tp)
        piece = data.chunk(weight.parts, weight.axis or 0)[part].clone()
        return piece.reshape(self.sizes[write_item.index])

    def metadata_of(self, items: list[planner.WriteItem]) -> metadata.Metadata:
        tensors: dict[str, metadata.STORAGE_TYPES] = {}
        for item in items:
            data = item.tensor_data
            assert data is not None
            stored = tensors.setdefault(
                item.index.fqn, metadata.TensorStorageMetadata(data.properties, data.size, chunks=[])
            )
            stored.chunks.append(data.chunk)  # type: ignore[union-attr]
        return metadata.Metadata(tensors)

    # The rest of a planner's duties belongs to runs of several processes.
    set_up_planner = create_local_plan = create_global_plan = finish_plan = None  # type: ignore[assignment]


def save_dist(model: Model, target: Path) -> None:
    """Chunks of every pipeline stage's every tensor rank."""
    chunks = Chunks(model)
    plans = [chunks.plan(pipeline, rank) for pipeline in range(model.pp) for rank in range(model.tp)]
    finish(model.args, target, chunks, plans)


def finish(args: Namespace, target: Path, chunks: Chunks, plans: list[planner.SavePlan]) -> None:
    """`__R_K.distcp`, `.metadata`, `common.pt` and `metadata.json`."""
    writer = filesystem.FileSystemWriter(target, thread_count=2, sync_files=False)
    writer.set_up_storage_writer(True)
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(plan, chunks).wait() for plan in plans]
    writer.finish(chunks.metadata_of([item for plan in plans for item in plan.items]), results)
    torch.save(common(args), target / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    backend |= {"common_backend": "torch", "common_backend_version": 1}
    (target / "metadata.json").write_text(json.dumps(backend))


FORMATS = {"torch": save_torch, "torch_dist": save_dist}


def make(root: Path, gb: float, format: str, tp: int = 4, pp: int = 2) -> Model:
    """Writes the checkpoint of about `gb` * 1e9 bytes into `root`, which must not exist."""
    made = model(gb, tp, pp)
    made.args.ckpt_format = format
    target = root / f"iter_{ITERATION:07d}"
    target.mkdir(parents=True)
    FORMATS[format](made, target)
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return made


def differences(gb: float, folder: str, tp: int = 4, pp: int = 2) -> list[str]:
    """The weights of a converted folder that are not what they were made of; looks at the first and the last layer."""
    from safetensors import safe_open

    made, wrong, names = model(gb, tp, pp), list[str](), dict[str, Any]()
    last = made.args.num_layers - 1
    for file in sorted(Path(folder).glob("*.safetensors")):
        opened = safe_open(file, "pt")
        names |= dict.fromkeys(opened.keys(), opened)
    for weight, layer in (row for pipeline in range(pp) for row in made.stage(pipeline)):
        name = weight.name.format(l=layer)
        if layer not in (None, 0, last) or name not in names:
            wrong += [] if name in names else [name]
            continue
        expected = whole(weight, layer, tp)
        rows = VOCABULARY if expected.shape[0] == made.args.padded_vocab_size else expected.shape[0]
        found = names[name].get_tensor(name)
        if not torch.equal(found.view(torch.int16), expected[:rows].view(torch.int16)):
            wrong.append(name)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, help="where to; must not exist")
    parser.add_argument("--gb", type=float, default=2)
    parser.add_argument("--format", choices=FORMATS, default="torch")
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--pp", type=int, default=2)
    given = parser.parse_args()
    args = make(given.dir, given.gb, given.format, given.tp, given.pp).args
    size = sum(path.stat().st_size for path in given.dir.rglob("*") if path.is_file())
    print(f"{given.dir}: {args.num_layers} layers, {size / 1e9:.2f} GB, {given.format}, TP{given.tp} PP{given.pp}")


if __name__ == "__main__":
    main()
