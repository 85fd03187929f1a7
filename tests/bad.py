"""Ways for a checkpoint to be bad, one row each, and what is to be said about it."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from small import rewrite

ITERATION = "iter_0000007"
FILE = "model_optim_rng.pt"


class Bad(NamedTuple):
    """A way to be bad.

    Args:
        damage: what happens to a good checkpoint of TP2 PP2 (`legacy`), of torch_dist (`dist`), or of a mixture of
            experts of TP2 EP2 in the layouts `sequential` and `grouped` (legacy).
        says: what must be in the message: what is wrong, where, and what to do.
        options: of the command line.
    """

    damage: Callable[[Path], Any]
    says: tuple[str, ...]
    options: tuple[str, ...] = ()
    base: str = "legacy"
    reasons: int = 1


def change(rank: str, alter: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda path: rewrite(path, alter, rank)


def args(rank: str, **changes: Any) -> Callable[[Path], Any]:
    return change(rank, lambda content: vars(content["args"]).update(changes))


def every(**changes: Any) -> Callable[[Path], Any]:
    """The same change of the args of all ranks."""

    def alter(path: Path) -> None:
        for rank in sorted(path.glob("iter_*/mp_rank_*")):
            args(rank.name, **changes)(path)

    return alter


def weight(rank: str, name: str, alter: Callable[[torch.Tensor], Any]) -> Callable[[Path], Any]:
    return change(rank, lambda content: alter(content["model"][name]))


def add(rank: str, **weights: Any) -> Callable[[Path], Any]:
    """More keys under the model; `__` stands for a dot."""
    made = {name.replace("__", "."): value for name, value in weights.items()}
    return change(rank, lambda content: content["model"].update(made))


def without(rank: str, *names: str) -> Callable[[Path], Any]:
    return change(rank, lambda content: [content["model"].pop(name) for name in names])


def at(rank: str) -> Callable[[Path], Path]:
    return lambda path: path / ITERATION / rank / FILE


def cut(rank: str, keep: float) -> Callable[[Path], Any]:
    def alter(path: Path) -> None:
        file = at(rank)(path)
        os.truncate(file, int(file.stat().st_size * keep))

    return alter


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 16
    file.write_bytes(data)


def flip_in_weight(path: Path) -> None:
    """A bit of a number in the middle of the largest storage."""
    file = at("mp_rank_01_000")(path)
    content = torch.load(file, weights_only=False)
    words = content["model"]["embedding.word_embeddings.weight"].numpy().tobytes()
    flip(file, file.read_bytes().find(words) + len(words) // 2)


def flip_in(rank: str, name: str) -> Callable[[Path], Any]:
    """A bit of a number in the middle of a weight."""

    def alter(path: Path) -> None:
        file = at(rank)(path)
        held = torch.load(file, weights_only=False)["model"][name].numpy().tobytes()
        flip(file, file.read_bytes().find(held) + len(held) // 2)

    return alter


def flip_in_pickle(path: Path) -> None:
    file = at("mp_rank_00_001")(path)
    flip(file, file.read_bytes().find(b"checkpoint_version"))


class Attack:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was_here",)


def hostile(path: Path) -> None:
    at("mp_rank_00_000")(path).write_bytes(pickle.dumps({"model": Attack()}))


def hostile_zip(path: Path) -> None:
    rewrite(
        path, lambda content: content["model"].update({"decoder.final_layernorm.weight": Attack()}), "mp_rank_00_001"
    )


def replace(path: Path, *files: str) -> Path:
    """An empty directory in the place of the checkpoint, with these files in it."""
    shutil.rmtree(path)
    path.mkdir()
    for file in files:
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_text("{}")
    return path


def tied_apart(path: Path) -> None:
    """The last stage's copy of tied embeddings drifted away from the first's."""
    every(untie_embeddings_and_output_weights=False)(path)


def pre_mcore(path: Path) -> None:
    def alter(content: dict[str, Any]) -> None:
        content["model"] = {"language_model": {"embedding": {}, "encoder": {}}}

    for rank in sorted(path.glob("iter_*/mp_rank_*")):
        rewrite(path, alter, rank.name)


def rename(old: str, new: str) -> Callable[[Path], Any]:
    return lambda path: (path / ITERATION / old).rename(path / ITERATION / new)


def duplicate(old: str, new: str) -> Callable[[Path], Any]:
    return lambda path: shutil.copytree(path / ITERATION / old, path / ITERATION / new)


def remove(pattern: str) -> Callable[[Path], Any]:
    def alter(path: Path) -> None:
        for file in path.glob(pattern):
            shutil.rmtree(file) if file.is_dir() else file.unlink()

    return alter


def distcp(alter: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: alter(next(path.glob("iter_*/*.distcp")))


QKV, PROJ = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.1.self_attention.linear_proj.weight"
NORM = "decoder.layers.1.mlp.linear_fc1.layer_norm_weight"
NOT_YET = "which is not supported yet"

ROWS: dict[str, Bad] = {
    # ranks
    "missing tensor rank": Bad(
        remove(f"{ITERATION}/mp_rank_01_001"),
        ("ranks are missing: the args say tensor x pipeline x expert = 2 x 2 x 1", "tensor rank 1, pipeline rank 1",
         "copy every mp_rank_* directory"),
    ),
    "missing stage": Bad(
        remove(f"{ITERATION}/mp_rank_*_001"), ("tensor rank 0, pipeline rank 1, tensor rank 1, pipeline rank 1",)
    ),
    "only the first rank's directory": Bad(
        remove(f"{ITERATION}/mp_rank_*_00[1-9]"), ("ranks are missing", "pipeline rank 1")
    ),
    "extra rank": Bad(
        duplicate("mp_rank_01_001", "mp_rank_02_001"),
        ("this rank is too many", "2 x 2 x 1", "mp_rank_02_001", "remove what is left of another run"),
    ),
    "rank under a strange name": Bad(
        rename("mp_rank_01_001", "mp_rank_01"),
        ("the directory's name does not fit", "mp_rank_01/", "give one run's directory, whole"),
        reasons=2,
    ),
    "two files with the same rank": Bad(
        duplicate("mp_rank_01_001", "mp_rank_1_1"), ("two files are of one rank", "mp_rank_1_1", "mp_rank_01_001")
    ),
    "rank without its file": Bad(
        remove(f"{ITERATION}/mp_rank_01_001/{FILE}"), (f"there is no {FILE}", "mp_rank_01_001", "copy every mp_rank_*")
    ),
    "ranks of other iterations": Bad(
        change("mp_rank_01_001", lambda content: content.update(iteration=8)),
        ("ranks differ in iteration: 7 and 8", f"mp_rank_00_000/{FILE} and mp_rank_01_001/{FILE}", "one run's one"),
    ),
    "ranks with other args": Bad(
        args("mp_rank_01_000", rotary_base=500000),
        ("ranks differ in args.rotary_base: 10000 and 500000", "mp_rank_01_000"),
    ),
    "ranks of other versions": Bad(
        change("mp_rank_01_001", lambda content: content.update(checkpoint_version=2.0)),
        ("ranks differ in checkpoint_version: 3.0 and 2.0", "mp_rank_01_001"),
    ),
    "swapped stages": Bad(
        lambda path: (
            rename("mp_rank_00_000", "x")(path), rename("mp_rank_00_001", "mp_rank_00_000")(path),
            rename("x", "mp_rank_00_001")(path),
        ),
        ("missing on tensor-parallel ranks [1] of 2", "embedding.word_embeddings.weight"),
    ),
    # damage
    "truncated file": Bad(cut("mp_rank_00_001", 0.7), ("the file is cut off", "mp_rank_00_001", "copy it again")),
    "file of nothing": Bad(cut("mp_rank_00_001", 0), ("the file is empty", "mp_rank_00_001", "copy it again")),
    "file of rubbish": Bad(
        lambda path: at("mp_rank_00_000")(path).write_bytes(b"rubbish" * 99), ("mp_rank_00_000",), reasons=1
    ),
    "flipped byte in a weight": Bad(
        flip_in_weight,
        ("CRC-32 of embedding.word_embeddings.weight is wrong", "mp_rank_01_000", "the file is damaged"),
    ),
    "flipped byte in the pickle": Bad(
        flip_in_pickle, ("does not have the checksum it was saved with", "mp_rank_00_001", "copy it again")
    ),
    "hostile pickle": Bad(hostile, ("mp_rank_00_000",)),
    "hostile object among the weights": Bad(hostile_zip, ("posix.system", "mp_rank_00_001")),
    "torch_dist: data cut short": Bad(
        distcp(lambda file: os.truncate(file, file.stat().st_size // 2)), ("a data file is cut off", "copy it again"),
        base="dist",
    ),
    "torch_dist: data missing": Bad(
        distcp(lambda file: file.unlink()), ("a data file is missing", "copy every .distcp file"), base="dist"
    ),
    "torch_dist: flipped byte": Bad(
        distcp(lambda file: flip(file, file.stat().st_size // 2)), ("is wrong", ".distcp", "the file is damaged"),
        base="dist",
    ),
    "torch_dist: no .metadata": Bad(
        remove(f"{ITERATION}/.metadata"), ("there is no .metadata", "the save did not finish"), base="dist"
    ),
    "torch_dist: no args": Bad(
        remove(f"{ITERATION}/common.pt"), ("common.pt", "copy the whole iteration"), base="dist"
    ),
    # weights
    "unknown weight": Bad(
        add("mp_rank_00_001", decoder__layers__0__mlp__linear_fc9__weight=torch.ones(3)),
        ("unknown weights", "decoder.layers.0.mlp.linear_fc9.weight in mp_rank_00_001", "weights.py"),
    ),
    "unknown bytes among the weights": Bad(
        add("mp_rank_00_001", something=b"bytes"), ("something", "mp_rank_00_001")
    ),
    "weight that is no tensor": Bad(
        change("mp_rank_01_001", lambda content: content["model"].update({NORM: None})),
        ("a weight that is no tensor but", f"{NORM} in mp_rank_01_001"),
    ),
    "missing weight": Bad(
        lambda path: [without(f"mp_rank_0{rank}_001", NORM)(path) for rank in (0, 1)],
        ("missing weights", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight", "the checkpoint is incomplete"),
    ),
    "weight missing on one rank": Bad(
        without("mp_rank_01_001", PROJ),
        ("missing on tensor-parallel ranks [1] of 2", "decoder.layers.3.self_attention.linear_proj.weight"),
    ),
    "whole weight missing on one rank": Bad(
        without("mp_rank_01_001", NORM),
        ("missing on tensor-parallel ranks [1] of 2", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight"),
    ),
    "no embedding": Bad(
        lambda path: [without(f"mp_rank_0{rank}_000", "embedding.word_embeddings.weight")(path) for rank in (0, 1)],
        ("the word embedding is not in this checkpoint", "is the first pipeline stage missing?"),
    ),
    "weight the args do not have": Bad(
        every(swiglu=False), ("linear_fc1.weight", "stored [96, 32], the args say [48, 32]"), reasons=-1
    ),
    "weight of another option": Bad(
        add("mp_rank_00_000", decoder__layers__0__self_attention__linear_qkv__bias=torch.ones(32)),
        ("weights of a model that the args do not describe", "linear_qkv.bias", "they exist only with add_qkv_bias"),
    ),
    "layer too many": Bad(
        add("mp_rank_00_001", decoder__layers__2__mlp__linear_fc2__weight=torch.ones(32, 24)),
        ("layer 2 of a stage that the args give 2 layers", "mp_rank_00_001"),
    ),
    "shape of one rank": Bad(
        change("mp_rank_01_000", lambda content: content["model"].update({QKV: torch.ones(16, 32)})),
        ("shapes do not fit", "stored [48, 32], the args say [64, 32]", QKV, "written by one run?"),
    ),
    "number format of one rank": Bad(
        change("mp_rank_01_000", lambda content: content["model"].update({QKV: content["model"][QKV].half()})),
        ("float16[32, 32] cannot join float32[32, 32]", QKV),
    ),
    "unequal replicated weights": Bad(
        weight("mp_rank_01_001", NORM, lambda value: value[3].add_(1)),
        ("stored twice and not equal", "decoder.layers.3.mlp.linear_fc1.layer_norm_weight, also in", "mp_rank_01_001",
         "the checkpoint is damaged"),
    ),
    "unequal tied copies": Bad(
        tied_apart,
        ("stored twice and not equal", "embedding.word_embeddings.weight, also in output_layer.weight in mp_rank_00"),
    ),
    "NaN": Bad(
        weight("mp_rank_01_001", PROJ, lambda value: value[:2, 0].fill_(float("nan"))),
        ("2 numbers are NaN or infinite", "decoder.layers.3.self_attention.linear_proj.weight", "--refuse-nonfinite"),
        options=("--refuse-nonfinite",),
    ),
    "infinity": Bad(
        weight("mp_rank_01_001", PROJ, lambda value: value[0, 0].fill_(float("inf"))),
        ("1 numbers are NaN or infinite",), options=("--refuse-nonfinite",),
    ),
    "too large for fp16": Bad(
        weight("mp_rank_01_001", PROJ, lambda value: value[0, 0].fill_(1e6)),
        ("1e+06 does not fit float16", "linear_proj.weight", "--dtype bf16 or fp32"), options=("--dtype", "fp16"),
    ),
    # arguments
    "vocabulary larger than what is stored": Bad(
        lambda path: None, ("a vocabulary of 65 (as asked for) does not fit the 64 rows stored", "with N at most 64"),
        options=("--true-vocab-size", "65"),
    ),
    "no vocabulary": Bad(lambda path: None, ("a vocabulary of 0",), options=("--true-vocab-size", "0")),
    "args of a larger vocabulary": Bad(
        every(vocab_size=100), ("a vocabulary of 100 (from the args)", "--true-vocab-size N")
    ),
    "no args": Bad(change("mp_rank_00_000", lambda content: content.pop("args")), ("the file has no args",)),
    "args that are none": Bad(
        change("mp_rank_00_000", lambda content: content.update(args=[1])), ("args is", "mp_rank_00_000")
    ),
    "no model": Bad(
        change("mp_rank_00_000", lambda content: content.pop("model")),
        ("the file has no model", "give the model's file"),
    ),
    "layers that do not divide": Bad(every(num_layers=5), ("5 layers do not divide over 2 pipeline stages",)),
    "more layers than stored": Bad(every(num_layers=6), ("missing weights", "decoder.layers.2."), reasons=-1),
    "args of the wrong kind": Bad(every(hidden_size="large"), ("hidden_size",), reasons=-1),
    "a size that is a list": Bad(every(tensor_model_parallel_size=[2]), ("tensor_model_parallel_size is [2]",)),
    "unknown argument, strict": Bad(
        every(my_own=1), ("my_own", "leave --strict out"), options=("--strict",)
    ),
    "size of a shard": Bad(lambda path: None, ("'big' is not a size", "5GB"), options=("--max-shard-size", "big")),
    "size of a shard of nothing": Bad(lambda path: None, ("'0' is not a size",), options=("--max-shard-size", "0")),
    "tokenizer that is not there": Bad(
        lambda path: None,
        ("there is no tokenizer.json", "nowhere", "save_pretrained"),
        options=("--tokenizer", "nowhere"),
    ),
    # models to come
    "LLaVA": Bad(
        add("mp_rank_00_000", vision_model__conv1__weight=torch.ones(8)),
        ("the weights are a LLaVA's, and the args do not say language_model_type", "do not say vision_model_type"),
        reasons=2,
    ),
    "T5": Bad(
        add("mp_rank_00_000", lm_head__output_layer__bias=torch.ones(8)), (f"these weights belong to T5, {NOT_YET}",)
    ),
    "a head of BERT's": Bad(
        add("mp_rank_00_000", lm_head__dense__weight=torch.ones(8)),
        ("weights of a model that the args do not describe", "only with BERT"),
    ),
    # what people give by mistake
    "Hugging Face folder": Bad(
        lambda path: replace(path, "config.json", "pytorch_model.bin"),
        ("this is a Hugging Face folder whose weights are no safetensors", "save_pretrained"),
    ),
    "empty folder": Bad(replace, ("the directory is empty", "--save")),
    "nothing there": Bad(shutil.rmtree, ("there is nothing there", "--save")),
    "a file": Bad(lambda path: (shutil.rmtree(path), path.write_text("x")), ("this is a file", "--save")),
    "folder of photographs": Bad(
        lambda path: replace(path, "a.jpg", "b.jpg"),
        ("this is no Megatron checkpoint: it holds a.jpg, b.jpg", "mp_rank_*"),
    ),
    "one rank's directory": Bad(
        lambda path: replace(path, FILE), ("this is the directory of one rank", "give the one above it")
    ),
    "NeMo": Bad(lambda path: replace(path, "model_config.yaml"), ("this is a NeMo checkpoint",)),
    "zarr": Bad(
        lambda path: replace(path, f"{ITERATION}/decoder.layers.mlp.linear_fc1.weight/.zarray"),
        ("this is a zarr checkpoint", "--ckpt-format torch_dist"),
    ),
    "zarr by its metadata": Bad(
        lambda path: (replace(path, f"{ITERATION}/common.pt") / ITERATION / "metadata.json").write_text(
            '{"sharded_backend": "zarr"}'
        ),
        ("this is a zarr checkpoint",),
    ),
    "before megatron-core": Bad(pre_mcore, ("before megatron-core", "tools/checkpoint/convert.py", "mp_rank_00_000")),
    "tracker of an iteration that is gone": Bad(
        lambda path: (path / "latest_checkpointed_iteration.txt").write_text("8"),
        ("latest_checkpointed_iteration.txt names '8', which is not there", f"give one of {ITERATION}"),
    ),
    "tracker without iterations": Bad(remove("iter_*"), ("is there and no iteration is", "copy the iter_* directory")),
    "several iterations without a tracker": Bad(
        lambda path: (shutil.copytree(path / ITERATION, path / "iter_0000009"), remove("latest*")(path)),
        ("there are several iterations", f"give one of {ITERATION}, iter_0000009"),
    ),
}  # fmt: skip
