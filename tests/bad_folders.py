"""Ways for a Hugging Face folder, or for the options of a Megatron checkpoint, to be bad: one row each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bad import flip_in_weight, rewrite
from safetensors.torch import load_file, save_file

SAFE = "model.safetensors"
MEGATRON = ("--to", "megatron")


class Bad(NamedTuple):
    """A way to be bad.

    Args:
        says: what must be in the message: what is wrong with its numbers, where, and what to do.
        options: of `megahf convert`.
        base: a folder of transformers' (`llama`, and `sharded` over files), of ours (`ours`, `hybrid`, `experts`), or a
            checkpoint of TP2 PP2 (`megatron`).
        reasons: lines.
    """

    says: tuple[str, ...]
    options: tuple[str, ...] = MEGATRON
    damage: Callable[[Path], Any] = lambda path: None
    base: str = "llama"
    reasons: int = 1


def to(options: str) -> tuple[str, ...]:
    return (*MEGATRON, *options.split())


def config(*without: str, **changes: Any) -> Callable[[Path], Any]:
    def alter(path: Path) -> None:
        file = path / "config.json"
        made = {name: value for name, value in json.loads(file.read_text()).items() if name not in without}
        file.write_text(json.dumps({**made, **changes}))

    return alter


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
    def alter(path: Path) -> None:
        state = load_file(path / SAFE)
        change(state)
        save_file(state, path / SAFE, metadata={"format": "pt"})

    return alter


def put(name: str, value: torch.Tensor) -> Callable[[Path], Any]:
    return weights(lambda state: state.update({name: value}))


def number(value: float) -> Callable[[Path], Any]:
    return weights(lambda state: state[DOWN].view(-1)[77:78].fill_(value))


def as_dtype(dtype: torch.dtype) -> Callable[[Path], Any]:
    return weights(lambda state: state.update({name: value.to(dtype) for name, value in state.items()}))


def unlink(name: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).unlink()


def as_bin(path: Path) -> None:
    torch.save(load_file(path / SAFE), path / "pytorch_model.bin")
    (path / SAFE).unlink()


def write(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(data)


def nan_on_every_rank(path: Path) -> None:
    norm = "decoder.final_layernorm.weight"
    for rank in ("mp_rank_00_001", "mp_rank_01_001"):
        rewrite(path, lambda content: content["model"][norm][3:5].fill_(float("nan")), rank)


DOWN, OURS = "model.layers.1.mlp.down_proj.weight", "decoder.layers.1.mlp.linear_fc2.weight"
SIZES, STAGES = "choose other parallel sizes", "choose other stages"
LEAVE = "leave {} out"

LAYOUTS: dict[str, Bad] = {
    "layers": Bad(("4 layers do not divide over 3 pipeline stages", STAGES), to("--pp 3")),
    "heads": Bad(("4 attention heads do not divide over 8 tensor-parallel ranks", SIZES), to("--tp 8")),
    "query groups": Bad(("6 query groups", "4 tensor-parallel ranks"), to("--tp 4"), base="grouped"),
    "ffn": Bad(("42 places do not divide over 4", "axis 1 of decoder.layers.*.mlp.linear_fc2"), to("--tp 4"),
               base="narrow"),
    "Mamba heads": Bad(("8 Mamba heads do not divide over 16", SIZES), to("--tp 16"), base="hybrid", reasons=3),
    "Mamba groups": Bad(("4 Mamba groups do not divide over 8 tensor-parallel ranks",), to("--tp 8"), base="hybrid",
                        reasons=2),
    "vocabulary": Bad(("divisible_by is 0, not a number of at least 1",), to("--make-vocab-size-divisible-by 0")),
    "experts by EP": Bad(("8 experts do not divide over 3 expert-parallel ranks", SIZES), to("--ep 3"), base="experts"),
    "EP without experts": Bad(("EP is 2, but the model has no experts",), to("--ep 2")),
    "ETP": Bad(("12 places do not divide over 5 expert-tensor-parallel ranks", "experts.linear_fc1"), to("--etp 5"),
               base="experts"),
    "ETP in files of ranks": Bad(("cut over 2 ranks do not fit the torch format's files of 1 tensor ranks",),
                                 to("--etp 2 --format torch"), base="experts"),
    "VPP of a hybrid": Bad(("virtual chunks only by a pattern with | after each",), to("--pp 2 --vpp 2"),
                           base="hybrid"),
    "VPP of one stage": Bad(("VPP is given, but there is one pipeline rank",), to("--vpp 2")),
    "VPP": Bad(("stages of [2, 2] layers do not divide into 3 virtual chunks",), to("--pp 2 --vpp 3")),
    "first": Bad(("stages of [9, -5] layers",), to("--pp 2 --first 9")),
    "layout": Bad(("hold 3 layers, the model has 4",), to("--pp 2 --layout Ett|tL")),
    "layout's letters": Bad(("layout 'hello' has ['e', 'h', 'l', 'o']; known are E, t, m, L and |",),
                            to("--pp 2 --layout hello")),
    "layout's stages": Bad(("layout 'Et|t|ttL' has 3 stages for 2 ranks",), to("--pp 2 --layout Et|t|ttL")),
    "pattern": Bad(("layout 'M*|MM' is not the pattern 'M*-M' with | after each stage", STAGES),
                   to("--pp 2 --layout M*|MM"), base="hybrid"),
    "no rank": Bad(("TP is 0, not a number of at least 1",), to("--tp 0")),
    "less than no rank": Bad(("PP is -1, not a number of at least 1",), to("--pp -1")),
    "grouped without TE": Bad(("te-grouped experts are Transformer Engine's",), to("--local --experts te-grouped"),
                              base="experts"),
}  # fmt: skip

OPTIONS: dict[str, Bad] = {
    "unknown --to": Bad(("'bert9' is not a family (--to); one of hf, megatron,", "llama"), ("--to", "bert9")),
    "layout of a folder": Bad(("tp: options of Megatron checkpoints alone (--to hf); give --to megatron",),
                              ("--to", "hf", "--tp", "2"), base="megatron"),
    "layout of a family": Bad(("format, tp: options of Megatron checkpoints alone (--to llama)",),
                              ("--to", "llama", "--tp", "2", "--format", "torch"), base="megatron"),
    "layout by default": Bad(("pp: options of Megatron",), ("--pp", "2"), base="megatron"),
    "shards of a checkpoint": Bad(("--max-shard-size 1GB would do nothing", LEAVE.format("--max-shard-size")),
                                  to("--max-shard-size 1GB")),
    "experts of a model without": Bad(("--experts sequential would do nothing: the model has no experts",),
                                      to("--experts sequential")),
    "tokenizer": Bad(("--tokenizer nowhere would do nothing", LEAVE.format("--tokenizer")), to("--tokenizer nowhere")),
    "vocabulary that is known": Bad(("a vocabulary of 40 is asked for, config.json says 61",),
                                    to("--true-vocab-size 40")),
    "unknown setting": Bad(("1 arguments are not known", "(novelty)"), to("--strict"), config(novelty=3)),
}  # fmt: skip

NOT_ONE_MODEL = "config and weights are not one model's"

FOLDERS: dict[str, Bad] = {
    "unknown family": Bad(("model_type 'bert9' is not among the families", "config.json", "built are"),
                          damage=config(model_type="bert9")),
    "no family": Bad(("model_type None is not among",), damage=config("model_type")),
    "shape": Bad(("stored [32, 40], config.json says [32, 48]", OURS, NOT_ONE_MODEL),
                 damage=put(DOWN, torch.zeros(32, 40))),
    "shape in ours": Bad(("stored [32, 40], config.json says [32, 48]", OURS), damage=put(OURS, torch.zeros(32, 40)),
                         base="ours"),
    "missing weight": Bad((f"missing weights ({DOWN})", "the folder is incomplete"),
                          damage=weights(lambda state: state.pop(DOWN))),
    "missing weight in ours": Bad((f"missing weights ({OURS})",), damage=weights(lambda state: state.pop(OURS)),
                                  base="ours"),
    "extra weight": Bad(("weights that llama does not have (model.layers.9.odd)", NOT_ONE_MODEL),
                        damage=put("model.layers.9.odd", torch.zeros(2))),
    "extra weight in ours": Bad(("weights that the config does not describe (decoder.odd)",),
                                damage=put("decoder.odd", torch.zeros(2)), base="ours"),
    "config of fewer layers": Bad(("weights that llama does not have (model.layers.3.",),
                                  damage=config(num_hidden_layers=3)),
    "config of more layers": Bad(("missing weights (decoder.layers.4.",), damage=config(num_layers=5), base="ours"),
    "config of another vocabulary": Bad(("stored [61, 32], config.json says [100, 32]",),
                                        damage=config(vocab_size=100)),
    "config that ties what is not tied": Bad(
        ("stored twice and not equal", "lm_head.weight, which config.json ties to it"),
        damage=config(tie_word_embeddings=True),
    ),
    "config in words": Bad(("num_layers is 'four', not a number of at least 1", "config.json"),
                           damage=config(num_hidden_layers="four")),
    "config of no heads": Bad(("num_attention_heads is 0, not a number of at least 1", "config.json"),
                              damage=config(num_attention_heads=0), reasons=3),
    "config without a size": Bad(("hidden_size", "config.json"), damage=config(hidden_size=None)),
    "activation": Bad(("'swoosh' is not built; built are silu",), damage=config(hidden_act="swoosh")),
    "ours without a field": Bad(("the config does not say rotary_base", "save_pretrained"),
                                damage=config("rotary_base"), base="ours"),
    "ours without a vocabulary": Bad(("the config has no 'vocab_size'",), damage=config("vocab_size"), base="ours"),
    "config that is no json": Bad(("the file cannot be read", "config.json"), damage=write("config.json", b"{")),
    "no config": Bad(("this is a Hugging Face folder without its config.json",), damage=unlink("config.json")),
    "missing shard": Bad(("a file that the index names is missing", "model-00002-of-00004.safetensors"),
                         damage=unlink("model-00002-of-00004.safetensors"), base="sharded"),
    "shard of rubbish": Bad(("not a safetensors file, or cut short", SAFE), damage=write(SAFE, b"x" * 999)),
    "shard of nothing": Bad(("the file is empty", SAFE), damage=write(SAFE, b"")),
    "shard cut short": Bad(("9000 bytes where the header needs 143584", "cut short"),
                           damage=lambda path: os.truncate(path / SAFE, 9000)),
    "pickles only": Bad(("whose weights are no safetensors", "save it with save_pretrained"), damage=as_bin),
    "pickles only, by default": Bad(("whose weights are no safetensors",), (), damage=as_bin),
    "quantised": Bad(("the weights are quantised with gptq", "config.json", "original weights"),
                     damage=config(quantization_config={"quant_method": "gptq", "bits": 4})),
    "quantised, ours": Bad(("the weights are quantised with torchao",), base="ours",
                           damage=config(quantization_config={"quant_method": "torchao"})),
    "quantised to fp8": Bad(("quantised with fp8", "dequantize=True"),
                            damage=put(DOWN, torch.zeros(32, 48).to(torch.float8_e4m3fn))),
    "quantised to fp8 by scales": Bad(("quantised with fp8", f"{DOWN}_scale_inv"),
                                      damage=put(f"{DOWN}_scale_inv", torch.zeros(2))),
    "whole numbers": Bad(("Megatron trains no weights in int8", "one of bf16, fp16, fp32"),
                         damage=as_dtype(torch.int8), base="ours"),
    "float64": Bad(("Megatron trains no weights in float64 (--dtype); one of bf16",), to("--format torch"),
                   as_dtype(torch.float64), base="ours"),
    "layers of two formats": Bad(("layers of one tensor are stored as float32 and as float64",),
                                 damage=put(DOWN, torch.zeros(32, 48).double())),
}  # fmt: skip

NUMBERS: dict[str, Bad] = {
    "NaN": Bad(("1 numbers are NaN or infinite", "linear_fc2.weight"), to("--refuse-nonfinite"), number(float("nan"))),
    "infinity": Bad(("1 numbers are NaN or infinite",), to("--refuse-nonfinite --format torch"), number(float("inf"))),
    "too large": Bad(("1e+09 does not fit float16", "--dtype bf16 or fp32"), to("--dtype fp16"), number(1e9)),
    "NaN on every rank": Bad(("2 numbers are NaN or infinite", "final_layernorm"),
                             to("--refuse-nonfinite --format torch"), nan_on_every_rank, "megatron"),
    "CRC": Bad(("CRC-32 of embedding.word_embeddings.weight is wrong", "mp_rank_01_000"), MEGATRON, flip_in_weight,
               "megatron"),
    "CRC, in files of ranks": Bad(("CRC-32 of embedding.word_embeddings.weight is wrong", "mp_rank_01_000"),
                                  to("--format torch --tp 4"), flip_in_weight, "megatron"),
    "CRC, to a family": Bad(("CRC-32 of", "mp_rank_01_000"), ("--to", "llama"), flip_in_weight, "megatron"),
}  # fmt: skip

ROWS = {**LAYOUTS, **OPTIONS, **FOLDERS, **NUMBERS}
