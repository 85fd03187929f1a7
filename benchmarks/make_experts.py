"""Makes a mixture of many experts of N GB as Megatron lays it out, for measuring.

    python benchmarks/make_experts.py DIR --gb 6 --format sequential

24 layers of 128 experts in bf16, as wide as make the size, of a run of TP2 EP4. `sequential` and `legacy-grouped` are
`torch.save` files of each rank, with every expert for itself or all in two matrices whose memory is transposed;
`torch_dist` is one array for all experts of all layers, in a chunk for each expert and rank. Numbers follow from names,
as in make_checkpoint.py.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_checkpoint import ITERATION, VOCABULARY, Chunks, Weight, common, finish, shard, whole
from torch.distributed.checkpoint import planner

from megahf.judge.namespace import defaults, derive_run, derive_sizes

LAYERS, EXPERTS, TENSOR, EXPERT = 24, 128, 2, 4
HIDDEN, HEADS, GROUPS, CHANNELS = 1024, 16, 4, 64
AT = "decoder.layers.{l}"


@dataclass(frozen=True)
class Of(Weight):
    """A matrix of one expert."""

    expert: int = 0


def dense() -> tuple[Weight, ...]:
    """What a layer has beside its experts."""
    return (
        Weight(f"{AT}.self_attention.linear_qkv.layer_norm_weight", (HIDDEN,), None),
        Weight(f"{AT}.self_attention.linear_qkv.weight", ((HEADS + 2 * GROUPS) * CHANNELS, HIDDEN), 0),
        Weight(f"{AT}.self_attention.linear_proj.weight", (HIDDEN, HEADS * CHANNELS), 1),
        Weight(f"{AT}.pre_mlp_layernorm.weight", (HIDDEN,), None),
        Weight(f"{AT}.mlp.router.weight", (EXPERTS, HIDDEN), None),
    )


def of_expert(width: int, expert: int) -> tuple[Of, Of]:
    at = f"{AT}.mlp.experts.{expert}"
    return (
        Of(f"{at}.linear_fc1.weight", (2 * width, HIDDEN), 0, 2, expert),
        Of(f"{at}.linear_fc2.weight", (HIDDEN, width), 1, 1, expert),
    )


def ends() -> tuple[Weight, ...]:
    return (
        Weight("embedding.word_embeddings.weight", (VOCABULARY, HIDDEN), 0),
        Weight("decoder.final_layernorm.weight", (HIDDEN,), None),
        Weight("output_layer.weight", (VOCABULARY, HIDDEN), 0),
    )


@dataclass(frozen=True)
class Model:
    """What is made: its arguments and the width of its experts."""

    args: Namespace
    width: int
    tp: int = TENSOR

    def weights(self) -> Iterator[tuple[Weight, int | None]]:
        """Every weight with its layer, each expert's matrices apart."""
        yield from ((weight, None) for weight in ends())
        for layer in range(LAYERS):
            yield from ((weight, layer) for weight in dense())
            yield from ((weight, layer) for e in range(EXPERTS) for weight in of_expert(self.width, e))


def model(gb: float) -> Model:
    """Experts of about `gb` * 1e9 bytes in all."""
    width = max(round(gb * 1e9 / (2 * LAYERS * EXPERTS * 3 * HIDDEN) / 16), 1) * 16
    args = Namespace(
        **defaults()
        | {
            "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": 4 * HIDDEN, "num_attention_heads": HEADS,
            "num_query_groups": GROUPS, "group_query_attention": True, "kv_channels": CHANNELS, "swiglu": True,
            "normalization": "RMSNorm", "position_embedding_type": "rope", "add_bias_linear": False,
            "untie_embeddings_and_output_weights": True, "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY,
            "max_position_embeddings": 8192, "seq_length": 8192, "bf16": True, "iteration": ITERATION,
            "num_experts": EXPERTS, "moe_ffn_hidden_size": width, "moe_router_topk": 8,
            "tensor_model_parallel_size": TENSOR, "expert_model_parallel_size": EXPERT,
        }
    )  # fmt: skip
    derive_sizes(args)
    derive_run(args)
    return Model(args, width)


def save_torch(model: Model, target: Path, grouped: bool) -> None:
    """`mp_rank_TT_EEE/model_optim_rng.pt`."""
    each = EXPERTS // EXPERT
    for rank in range(TENSOR):
        for expert in range(EXPERT):
            state = {w.name: shard(w, None, rank, TENSOR) for w in ends()}
            for layer in range(LAYERS):
                state |= {w.name.format(l=layer): shard(w, layer, rank, TENSOR) for w in dense()}
                mine = [of_expert(model.width, expert * each + e) for e in range(each)]
                state |= together(mine, layer, rank) if grouped else one_by_one(mine, layer, rank)
            folder = target / f"mp_rank_{rank:02d}_{expert:03d}"
            folder.mkdir()
            torch.save(common(model.args) | {"model": state}, folder / "model_optim_rng.pt")


def one_by_one(mine: list[tuple[Of, Of]], layer: int, rank: int) -> dict[str, torch.Tensor]:
    at = f"{AT}.mlp.experts.local_experts".format(l=layer)
    return {
        f"{at}.{e}.{matrix}.weight": shard(weight, layer, rank, TENSOR)
        for e, pair in enumerate(mine)
        for matrix, weight in zip(("linear_fc1", "linear_fc2"), pair, strict=True)
    }


def together(mine: list[tuple[Of, Of]], layer: int, rank: int) -> dict[str, torch.Tensor]:
    """`weight1` and `weight2`, whose memory is `[experts, in, out]`."""
    at = f"{AT}.mlp.experts".format(l=layer)
    first, second = (torch.stack([shard(w, layer, rank, TENSOR).T for w in side]) for side in zip(*mine, strict=True))
    return {f"{at}.weight1": first.view(HIDDEN, -1), f"{at}.weight2": second.view(-1, HIDDEN)}


class ExpertChunks(Chunks):
    """Chunks of weights that are stacked by layers and by experts."""

    def items(self, rank: int) -> planner.SavePlan:
        """What one tensor rank writes; a weight that is not cut only rank 0."""
        items = []
        for weight, layer in self.model.weights():
            if weight.axis is not None or rank == 0:
                items += [self.placed(weight, layer, rank, part) for part in range(weight.parts)]
        return planner.SavePlan(items)

    def placed(self, weight: Weight, layer: int | None, rank: int, part: int) -> planner.WriteItem:
        if not isinstance(weight, Of):
            return self.item(weight, layer, rank, part)
        named = replace(weight, name=weight.name.replace(f"experts.{weight.expert}.", "experts.experts."))
        return self.item(named, layer, rank, part, (weight.expert, EXPERTS), weight)


def save_dist(model: Model, target: Path) -> None:
    """As make_checkpoint.py, with the experts of all ranks in one array."""
    chunks = ExpertChunks(model)  # type: ignore[arg-type]
    finish(model.args, target, chunks, [chunks.items(rank) for rank in range(TENSOR)])


FORMATS = {
    "sequential": lambda made, target: save_torch(made, target, grouped=False),
    "legacy-grouped": lambda made, target: save_torch(made, target, grouped=True),
    "torch_dist": save_dist,
}


def make(root: Path, gb: float, format: str) -> Model:
    """Writes the checkpoint into `root`, which must not exist."""
    made = model(gb)
    made.args.ckpt_format = "torch_dist" if format == "torch_dist" else "torch"
    target = root / f"iter_{ITERATION:07d}"
    target.mkdir(parents=True)
    FORMATS[format](made, target)
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return made


def differences(gb: float, folder: str) -> list[str]:
    """The weights of a converted folder that are not what they were made of; looks at the first and the last layer."""
    from safetensors import safe_open

    made, wrong, names = model(gb), list[str](), dict[str, Any]()
    for file in sorted(Path(folder).glob("*.safetensors")):
        opened = safe_open(file, "pt")
        names |= dict.fromkeys(opened.keys(), opened)
    for weight, layer in made.weights():
        name = weight.name.format(l=layer)
        key = name.replace(f"experts.{weight.expert}.", "experts.") if isinstance(weight, Of) else name
        if key not in names:
            wrong.append(name)
        elif layer in (None, 0, LAYERS - 1):
            found = names[key].get_slice(key)
            found = found[weight.expert] if isinstance(weight, Of) else found[:]
            if not torch.equal(found.view(torch.int16), whole(weight, layer, TENSOR).view(torch.int16)):
                wrong.append(name)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("dir", type=Path, help="where to; must not exist")
    parser.add_argument("--gb", type=float, default=6)
    parser.add_argument("--format", choices=FORMATS, default="sequential")
    given = parser.parse_args()
    made = make(given.dir, given.gb, given.format)
    size = sum(path.stat().st_size for path in given.dir.rglob("*") if path.is_file())
    print(f"{given.dir}: {LAYERS} layers of {EXPERTS} experts of {made.width}, {size / 1e9:.2f} GB, {given.format}")


if __name__ == "__main__":
    main()
