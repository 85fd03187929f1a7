"""Small checkpoints in Megatron's formats, written with torch alone: names and cuts stand here by hand once more.

A test that reads them with megahf compares two descriptions of the same thing; real Megatron is in tests/megatron.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from megahf.cli import main

State = dict[str, Tensor]

SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "kv_channels": 8,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 40,
    "seq_length": 40,
    "vocab_size": 61,
    "padded_vocab_size": 64,
    "iteration": 7,
}
LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 2,
}
GPT2: dict[str, Any] = {"group_query_attention": False, "num_query_groups": 4}  # learned positions, biases, tied

# Which axis tensor-parallel ranks share out; every other weight is whole on each rank.
ROWS = {"self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias", "mlp.linear_fc1.weight"}
ROWS |= {"mlp.linear_fc1.bias", "embedding.word_embeddings.weight", "output_layer.weight"}
COLUMNS = {"self_attention.linear_proj.weight", "mlp.linear_fc2.weight"}
GATED = {"mlp.linear_fc1.weight", "mlp.linear_fc1.bias"}
# Transformer Engine's spelling -> the local one
LOCAL = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
}


def arguments(**changes: Any) -> dict[str, Any]:
    """Megatron's arguments for the small Llama with `changes`."""
    text = resources.files("megahf").joinpath("arguments.json").read_text()
    return {**json.loads(text), **SIZES, **LLAMA, **changes}


def whole(args: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Random weights of the whole model in canonical names; rows of padding hold -7."""
    h, f, d = args["hidden_size"], args["ffn_hidden_size"], args["kv_channels"]
    heads, groups = args["num_attention_heads"], args["num_query_groups"]
    gate = 2 if args["swiglu"] else 1
    bias, layernorm = args["add_bias_linear"], args["normalization"] == "LayerNorm"
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (args["padded_vocab_size"], h)}
    if args["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (args["max_position_embeddings"], h)
    for layer in (f"decoder.layers.{number}" for number in range(args["num_layers"])):
        shapes[f"{layer}.self_attention.linear_qkv.layer_norm_weight"] = (h,)
        shapes[f"{layer}.self_attention.linear_qkv.weight"] = ((heads + 2 * groups) * d, h)
        shapes[f"{layer}.self_attention.linear_proj.weight"] = (h, heads * d)
        shapes[f"{layer}.mlp.linear_fc1.layer_norm_weight"] = (h,)
        shapes[f"{layer}.mlp.linear_fc1.weight"] = (gate * f, h)
        shapes[f"{layer}.mlp.linear_fc2.weight"] = (h, f)
        if layernorm:
            shapes[f"{layer}.self_attention.linear_qkv.layer_norm_bias"] = (h,)
            shapes[f"{layer}.mlp.linear_fc1.layer_norm_bias"] = (h,)
        if bias:
            shapes[f"{layer}.self_attention.linear_qkv.bias"] = ((heads + 2 * groups) * d,)
            shapes[f"{layer}.self_attention.linear_proj.bias"] = (h,)
            shapes[f"{layer}.mlp.linear_fc1.bias"] = (gate * f,)
            shapes[f"{layer}.mlp.linear_fc2.bias"] = (h,)
    shapes["decoder.final_layernorm.weight"] = (h,)
    if layernorm:
        shapes["decoder.final_layernorm.bias"] = (h,)
    if args["untie_embeddings_and_output_weights"]:
        shapes["output_layer.weight"] = (args["padded_vocab_size"], h)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in state:
            state[name][args["vocab_size"] :] = -7
    return state


def expected(state: State, args: dict[str, Any]) -> State:
    """What the folder must hold: `state` without its rows of padding."""
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {name: value[: args["vocab_size"]] if name in names else value for name, value in state.items()}


def leaf(name: str) -> str:
    """`decoder.layers.3.mlp.linear_fc1.weight` -> `mlp.linear_fc1.weight`."""
    return name.split(".", 3)[3] if name.startswith("decoder.layers.") else name


def cut(name: str, value: Tensor, rank: int, tensor: int, gated: bool) -> Tensor:
    """What tensor-parallel rank `rank` of `tensor` holds of a weight."""
    if leaf(name) in GATED and gated:
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(tensor)[rank], up.chunk(tensor)[rank]])
    if leaf(name) in ROWS:
        return value.chunk(tensor)[rank].clone()
    if leaf(name) in COLUMNS:
        return value.chunk(tensor, dim=1)[rank].clone()
    return value.clone()


def stage(name: str, layers: list[int], first: bool, last: bool) -> str | None:
    """The name of a weight in the chunk that holds `layers`; None where it is not held."""
    if name.startswith("decoder.layers."):
        number, rest = name.split(".", 3)[2:]
        return f"decoder.layers.{layers.index(int(number))}.{rest}" if int(number) in layers else None
    return name if (first if name.startswith("embedding.") else last) else None


def write_torch(
    path: Path, tensor: int = 1, stages: list[list[int]] | None = None, pipeline: int = 1, local: bool = False,
    seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any,
) -> State:  # fmt: skip
    """A `--ckpt-format torch` checkpoint; gives what converting it must give.

    Args:
        stages: the layers of each chunk in the order they run, dealt round the pipeline ranks.
        local: spell the norms as Megatron's local layers do.
    """
    args = arguments(**changes)
    stages = stages or [list(range(args["num_layers"]))]
    virtual = len(stages) // pipeline
    args |= {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    args["virtual_pipeline_model_parallel_size"] = virtual if virtual > 1 else None
    state = whole(args, seed, dtype)
    for p in range(pipeline):
        for t in range(tensor):
            content = {"args": Namespace(**{**args, "rank": p * tensor + t}), "iteration": 7, "checkpoint_version": 3.0}
            for v in range(virtual):
                turn = v * pipeline + p
                held = rank_state(state, args, stages[turn], turn == 0, turn == len(stages) - 1, t, tensor)
                held = {spelled(key): value for key, value in held.items()} if local else held
                content[f"model{v}" if virtual > 1 else "model"] = held
            file = path / "iter_0000007" / (f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else ""))
            file.mkdir(parents=True)
            torch.save({**content, "optimizer": {"step": 3}, "rng_state": []}, file / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return expected(state, args)


def rank_state(
    state: State, args: dict[str, Any], layers: list[int], first: bool, last: bool, rank: int, tensor: int
) -> dict[str, Any]:
    """One chunk of one rank, with the extra state that Transformer Engine leaves, and a tied copy on a last stage."""
    held: dict[str, Any] = {}
    for name, value in state.items():
        if local := stage(name, layers, first, last):
            held[local] = cut(name, value, rank, tensor, args["swiglu"])
    if last and not first and not args["untie_embeddings_and_output_weights"]:
        words = "embedding.word_embeddings.weight"
        held["output_layer.weight"] = cut(words, state[words], rank, tensor, False)
    for index in range(len(layers)):
        held[f"decoder.layers.{index}.mlp.linear_fc1._extra_state"] = None
    return held


def spelled(key: str) -> str:
    for canonical, local in LOCAL.items():
        key = key.replace(canonical, local)
    return key


def write_torch_dist(path: Path, stacked: bool = True, seed: int = 0, **changes: Any) -> State:
    """A `--ckpt-format torch_dist` checkpoint of one rank: layers stacked along a first axis, or one by one."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    args = arguments(**changes)
    state = whole(args, seed)
    folder = path / "iter_0000007"
    folder.mkdir(parents=True)
    stored: dict[str, Any] = {name: value for name, value in state.items() if not stacked or leaf(name) == name}
    if stacked:
        for name in sorted({leaf(name) for name in state if leaf(name) != name}):
            layers = [state[f"decoder.layers.{layer}.{name}"] for layer in range(args["num_layers"])]
            stored[f"decoder.layers.{name}"] = torch.stack(layers)
    stored["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(4)
    save(stored, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return expected(state, args)


def rewrite(path: Path, change: Any, rank: str = "mp_rank_00") -> None:
    """Changes one rank's file: `change` gets its content and alters it."""
    file = path / "iter_0000007" / rank / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def megahf(*command: object) -> Result:
    """Runs the command line in this process."""
    return CliRunner().invoke(main, [str(word) for word in command])


def tensors(folder: Path) -> State:
    """Every weight in the safetensors files of a folder, read by safetensors itself."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(found: State, wanted: State) -> None:
    """Same names, shapes, number formats and bits."""
    assert sorted(found) == sorted(wanted)
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file under a folder and the hash of its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
