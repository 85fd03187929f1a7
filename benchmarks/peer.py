"""A converter of the usual kind, to be measured against: the whole model in memory, its state dict rewritten.

    python benchmarks/peer.py LLAMA_FOLDER TARGET --tp 4 --pp 2

transformers loads a Llama; each rank's state dict is packed and cut with torch; `torch.save` writes a file for each.
Without the args and the tracker that Megatron asks for: what is left out here makes it faster, not slower.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

Weights = dict[str, Tensor]


def layer(theirs: Weights, number: int, groups: int) -> dict[str, tuple[Tensor, int | None, int]]:
    """A layer's weights in Megatron's names: tensor, the axis that ranks cut, blocks on it."""
    at = f"model.layers.{number}."
    qkv = [theirs[f"{at}self_attn.{x}_proj.weight"].unflatten(0, (groups, -1)) for x in "qkv"]
    gate_up = torch.cat([theirs[f"{at}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    return {
        "self_attention.linear_qkv.layer_norm_weight": (theirs[f"{at}input_layernorm.weight"], None, 1),
        "self_attention.linear_qkv.weight": (torch.cat(qkv, 1).flatten(0, 1), 0, 1),
        "self_attention.linear_proj.weight": (theirs[f"{at}self_attn.o_proj.weight"], 1, 1),
        "mlp.linear_fc1.layer_norm_weight": (theirs[f"{at}post_attention_layernorm.weight"], None, 1),
        "mlp.linear_fc1.weight": (gate_up, 0, 2),
        "mlp.linear_fc2.weight": (theirs[f"{at}mlp.down_proj.weight"], 1, 1),
    }


def shard(weight: Tensor, axis: int | None, blocks: int, rank: int, ranks: int) -> Tensor:
    if axis is None:
        return weight
    return torch.cat([block.chunk(ranks, axis)[rank] for block in weight.chunk(blocks, axis)], axis).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tp", type=int, default=4)
    parser.add_argument("--pp", type=int, default=2)
    given = parser.parse_args()
    model = LlamaForCausalLM.from_pretrained(given.source, dtype="auto")
    theirs, config = model.state_dict(), model.config
    count = config.num_hidden_layers // given.pp
    whole = {
        f"decoder.layers.{number}.{name}": entry
        for number in range(config.num_hidden_layers)
        for name, entry in layer(theirs, number, config.num_key_value_heads).items()
    }
    for stage in range(given.pp):
        for rank in range(given.tp):
            state = {}
            for local in range(count):
                at = f"decoder.layers.{stage * count + local}."
                for name, entry in whole.items():
                    if name.startswith(at):
                        state[f"decoder.layers.{local}.{name.removeprefix(at)}"] = shard(*entry, rank, given.tp)
            if stage == 0:
                words = theirs["model.embed_tokens.weight"]
                state["embedding.word_embeddings.weight"] = shard(words, 0, 1, rank, given.tp)
            if stage == given.pp - 1:
                state["decoder.final_layernorm.weight"] = theirs["model.norm.weight"]
                state["output_layer.weight"] = shard(theirs["lm_head.weight"], 0, 1, rank, given.tp)
            file = given.target / f"mp_rank_{rank:02d}_{stage:03d}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save({"model": state}, file)


if __name__ == "__main__":
    main()
