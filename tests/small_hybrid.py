"""Small checkpoints of hybrids in Megatron's formats: Mamba, attention, MLP and expert layers in any order.

As in small.py names and cuts stand here by hand once more, after Megatron's modules and not after megahf's table.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import small_experts
import torch
from small import State, arguments, spelled
from small_experts import EXPERTS, GATED, WORDS, Run, attention, cut, mlp
from torch import Tensor

SIZES: dict[str, Any] = {
    "hidden_size": 16, "ffn_hidden_size": 24, "kv_channels": 4, "num_query_groups": 4, "moe_ffn_hidden_size": 12,
    "mamba_state_dim": 6, "mamba_head_dim": 4, "mamba_num_groups": 4, "mamba_num_heads": None,
}  # fmt: skip
AXES = small_experts.AXES | {
    "mixer.A_log": 0, "mixer.D": 0, "mixer.dt_bias": 0, "mixer.norm.weight": 0, "mixer.out_proj.weight": 1,
    "mixer.x_proj.weight": 1, "mixer.dt_proj.weight": 0, "mixer.dt_proj.bias": 0,
}  # fmt: skip
IN, CONVOLUTIONS = "mixer.in_proj.weight", ("mixer.conv1d.weight", "mixer.conv1d.bias")


@dataclass(frozen=True)
class Mixer:
    """What a spec says of the mixers, and no argument."""

    version: int = 2
    window: int = 4  # tokens that the convolution sees
    channel_D: bool = False
    norm: bool = True
    bias: bool = True  # of the convolution
    expand: int = 2
    rank: int = 3  # of Mamba-1's time steps


def sizes(args: dict[str, Any], mixer: Mixer) -> tuple[int, int, int]:
    """Channels, rows of B or of C, heads."""
    heads, each = args["mamba_num_heads"], args["mamba_head_dim"]
    width = mixer.expand * args["hidden_size"] if heads is None else heads * each
    return width, args["mamba_num_groups"] * args["mamba_state_dim"], width // each


def parts(kind: str, args: dict[str, Any], mixer: Mixer) -> dict[str, int]:
    """The rows of each component of a packed weight of the mixer; empty for any other weight."""
    width, shared, heads = sizes(args, mixer)
    if mixer.version == 1:
        return {"x": width, "z": width} if kind == IN else {}
    if kind == IN:
        return {"z": width, "x": width, "B": shared, "C": shared, "dt": heads}
    return {"x": width, "B": shared, "C": shared} if kind in CONVOLUTIONS else {}


def mamba(args: dict[str, Any], mixer: Mixer) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, state = args["hidden_size"], args["mamba_state_dim"]
    width, _, heads = sizes(args, mixer)
    convolved = sum(parts(CONVOLUTIONS[0], args, mixer).values()) or width
    yield "mixer.in_proj.layer_norm_weight", (h,)
    if args["normalization"] == "LayerNorm":
        yield "mixer.in_proj.layer_norm_bias", (h,)
    yield IN, (sum(parts(IN, args, mixer).values()), h)
    yield CONVOLUTIONS[0], (convolved, 1, mixer.window)
    if mixer.bias:
        yield CONVOLUTIONS[1], (convolved,)
    if mixer.version == 1:
        yield "mixer.x_proj.weight", (mixer.rank + 2 * state, width)
        yield "mixer.dt_proj.weight", (width, mixer.rank)
        yield "mixer.dt_proj.bias", (width,)
        yield "mixer.A_log", (width, state)
        yield "mixer.D", (width,)
    else:
        yield "mixer.A_log", (heads,)
        yield "mixer.D", (width if mixer.channel_D else heads,)
        yield "mixer.dt_bias", (heads,)
        if mixer.norm:
            yield "mixer.norm.weight", (width,)
    yield "mixer.out_proj.weight", (h, width)


def layer(symbol: str, args: dict[str, Any], mixer: Mixer) -> Iterator[tuple[str, tuple[int, ...]]]:
    if symbol == "M":
        return mamba(args, mixer)
    return attention(args) if symbol in "*+" else mlp(args, symbol == "E")


def shapes(layers: str, heads: str, args: dict[str, Any], mixer: Mixer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight in canonical names.

    Args:
        layers: a symbol a layer.
        heads: those of each head for further tokens.
    """
    h, norms = args["hidden_size"], ("weight", "bias")[: 1 + (args["normalization"] == "LayerNorm")]
    yield "embedding.word_embeddings.weight", (args["padded_vocab_size"], h)
    for number, symbol in enumerate(layers):
        yield from ((f"decoder.layers.{number}.{name}", shape) for name, shape in layer(symbol, args, mixer))
    yield from ((f"decoder.final_norm.{kind}", (h,)) for kind in norms)
    for head in range(1 if args["mtp_use_repeated_layer"] else args["mtp_num_layers"] or 0):
        at = f"mtp.layers.{head}"
        for norm in ("enorm", "hnorm", "final_layernorm"):
            yield from ((f"{at}.{norm}.{kind}", (h,)) for kind in norms)
        yield f"{at}.eh_proj.weight", (h, 2 * h)
        for number, symbol in enumerate(heads):
            for name, shape in layer(symbol, args, mixer):
                yield f"{at}.mtp_model_layer.layers.{number}.{name}", shape
    if args["untie_embeddings_and_output_weights"]:
        yield "output_layer.weight", (args["padded_vocab_size"], h)


def leaf(name: str) -> str:
    """A weight's name inside its layer."""
    return name.rsplit(".layers.", 1)[1].split(".", 1)[1] if ".layers." in name else name


def share(value: Tensor, components: dict[str, int], rank: int, ranks: int) -> Tensor:
    """A rank's share of each component."""
    return torch.cat([part.chunk(ranks)[rank] for part in value.split(list(components.values()))])


def held_by(
    state: State, args: dict[str, Any], mixer: Mixer, run: Run, turn: int, rank: tuple[int, int, int]
) -> dict[str, Tensor]:
    """What one rank's chunk holds, in the names of Transformer Engine."""
    tensor, shard, expert = rank
    layers, last = run.stages[turn], turn == len(run.stages) - 1
    held: dict[str, Tensor] = {}
    for name, value in state.items():
        key, kind = name, leaf(name)
        if name.startswith("decoder.layers."):
            number = int(name.split(".")[2])
            if number not in layers:
                continue
            key = name.replace(f"layers.{number}.", f"layers.{layers.index(number)}.", 1)
        elif not (turn == 0 if name.startswith("embedding.") else last):
            continue
        gated, axis = args["swiglu"] and kind.endswith(GATED), AXES.get(kind)
        if components := parts(kind, args, mixer):
            held[key] = share(value, components, tensor, run.tensor)
        elif kind in CONVOLUTIONS:
            held[key] = value.chunk(run.tensor)[tensor].clone()
        elif kind.startswith(EXPERTS):
            mine = value.chunk(run.expert)[expert]
            mine = mine if axis is None else cut(mine, axis, shard, run.cuts, gated)
            held |= small_experts.named(key, mine, "te-grouped")
        else:
            held[key] = value.clone() if axis is None else cut(value, axis, tensor, run.tensor, gated)
    return held


def respelled(key: str, spelling: str) -> str:
    """A key of Transformer Engine's as local layers (`local`) or the Megatron of 2026 (`main`) spell it."""
    if spelling == "local":
        return spelled(key).replace("mixer.in_proj.layer_norm_", "norm.")
    return key.replace("conv1d.", "conv1d_") if spelling == "main" else key


def prepared(
    layers: str, heads: str, mixer: Mixer, seed: int, dtype: torch.dtype, changes: dict[str, Any]
) -> tuple[dict[str, Any], State]:
    """The arguments, whose pattern `changes` spell, and random weights."""
    args = arguments(**{**SIZES, "num_layers": len(layers), "hybrid_override_pattern": layers, **changes})
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes(layers, heads, args, mixer)}
    return args, {name: value if name.endswith("expert_bias") else value.to(dtype) for name, value in made.items()}


def arrived(state: State, args: dict[str, Any]) -> State:
    """What converting must give: no rows of padding."""
    return {name: value[: args["vocab_size"]] if name in WORDS else value for name, value in state.items()}


def write_hybrid(
    path: Path, layers: str = "M*-ME-", run: Run | None = None, spelling: str = "te", heads: str = "",
    mixer: Mixer | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any,
) -> State:  # fmt: skip
    """A `--ckpt-format torch` checkpoint; gives what converting it must give.

    Args:
        spelling: te, local or main.
        changes: of the arguments; the pattern is `hybrid_override_pattern` unless they say otherwise.
    """
    run, mixer = run or Run(), mixer or Mixer()
    run = run if run.pipeline > 1 else replace(run, stages=(tuple(range(len(layers))),))
    args, state = prepared(layers, heads, mixer, seed, dtype, changes)
    args = {**args, **run.arguments(), **changes}
    for p in range(run.pipeline):
        for t, s, e in run.ranks():
            content: dict[str, Any] = {"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}
            for v in range(virtual := len(run.stages) // run.pipeline):
                held = held_by(state, args, mixer, run, v * run.pipeline + p, (t, s, e))
                held = {respelled(key, spelling): value for key, value in held.items()}
                content[f"model{v}" if virtual > 1 else "model"] = held
            name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (run.pipeline > 1) + f"_{e:03d}" * (run.expert > 1)
            (path / "iter_0000007" / name).mkdir(parents=True, exist_ok=True)
            torch.save(content, path / "iter_0000007" / name / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return arrived(state, args)


def write_hybrid_dist(
    path: Path, layers: str = "M*-ME-", spelling: str = "te", heads: str = "", mixer: Mixer | None = None,
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any,
) -> State:  # fmt: skip
    """A `--ckpt-format torch_dist` checkpoint: layers have numbers, and packed weights are stored by component."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    mixer = mixer or Mixer()
    args, state = prepared(layers, heads, mixer, seed, dtype, changes)
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        key = respelled(name, "local" if spelling == "local" else "te").replace(EXPERTS, f"{EXPERTS}experts.")
        components = parts(leaf(name), args, mixer)
        pieces = zip(components, value.split(list(components.values())), strict=True) if components else ()
        stored |= {f"{key}.{part}": piece.clone() for part, piece in pieces} or {key: value}
    folder = path / "iter_0000007"
    folder.mkdir(parents=True)
    save(stored, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return arrived(state, args)
