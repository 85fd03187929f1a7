"""Promise: `inspect --context` says what a long context takes of a GPU, from the model's own sizes, and what fits.

Keys, values and states are held against the bytes of real caches, weights against real parameters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import megahf, write_torch
from small_experts import Run, write_experts
from small_hybrid import write_hybrid
from tiny import LLAMA, MIXTURES, MLA, tiny, tiny_config, tiny_hybrid, tiny_hybrid_config, tokens
from transformers import DynamicCache

from megahf import convert
from megahf.context_advice import advise
from megahf.errors import Refused

LENGTH = 64
GPTS: dict[str, dict[str, Any]] = {
    "grouped": LLAMA,
    "latents": MLA,
    "experts": MIXTURES["experts"],
    "window": {**LLAMA, "window_size": [15, 0], "window_attn_skip_freq": 2},
}
MIXED = ["mamba", "everything", "latents", "mamba 1", "gpt"]
LARGE: dict[str, Any] = {
    **LLAMA, "vocab_size": 128256, "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336,
    "num_attention_heads": 32, "num_query_groups": 8, "kv_channels": 128, "max_position_embeddings": 131072,
}  # fmt: skip


SINKS = tiny_config(**{**LLAMA, "softmax_type": "learnable", "window_size": [5, 0]})


def held(model: Any) -> tuple[int, int]:
    """Numbers of keys and values, and of states, that a cache of `LENGTH` tokens holds; the token count's apart."""
    cache = DynamicCache(config=model.config)
    model(tokens(1, LENGTH), past_key_values=cache)
    keys, states = 0, 0
    for number, layer in enumerate(cache.layers):
        if hasattr(layer, "keys") and number != getattr(model.config, "counting_layer", None):
            keys += layer.keys.numel() + layer.values.numel() if layer.keys is not None else 0
        for name in ("conv_states", "recurrent_states"):
            kept = getattr(layer, name, None)
            for state in kept.values() if isinstance(kept, dict) else [kept]:
                states += 0 if state is None else state.numel()
    return keys, states


@pytest.mark.parametrize("name", [*GPTS, *(f"hybrid {name}" for name in MIXED)])
@torch.no_grad()
def test_caches_and_weights_are_the_real_ones(name: str) -> None:
    model: Any = tiny(**GPTS[name]) if name in GPTS else tiny_hybrid(name.removeprefix("hybrid "))
    (split,) = advise(model.config, LENGTH)["splits"]
    keys, states = held(model)
    if name == "window":  # a cache lacks the query's own token
        keys += 2 * model.config.num_query_groups * model.config.kv_channels
    assert split["run"]["kv"] == 2 * keys
    assert split["run"]["states"] == 4 * states
    parameters = sum(x.numel() for n, x in model.named_parameters()) + sum(
        x.numel() for n, x in model.named_buffers() if n.endswith("expert_bias")
    )
    assert split["run"]["weights"] == 2 * parameters


def test_ranks_share_out_tokens_heads_and_experts() -> None:
    config = tiny_config(**MIXTURES["experts"])
    splits = {(split["cp"], split["tp"]): split for split in advise(config, 64, gpus=4)["splits"]}
    assert set(splits) == {(1, 1), (1, 2), (2, 1), (2, 2), (4, 1)}
    whole, both = splits[1, 1]["run"], splits[2, 2]["run"]
    assert both["kv"] == whole["kv"] / 4 and both["weights"] < whole["weights"]
    assert [splits[key]["ep"] for key in ((1, 1), (2, 1), (2, 2))] == [1, 2, 4]
    assert splits[4, 1]["run"]["kv"] == whole["kv"] / 4 and splits[4, 1]["tokens_per_gpu"] == 16


def test_an_8b_model_of_131072_tokens_gets_the_flags_that_fit_it() -> None:
    """By hand: 8.03e9 weights; 2 x 8 x 128 numbers a token and layer of keys and values."""
    report = advise(tiny_config(**LARGE), 131072, gpus=8)
    assert report["kv_bytes_per_token"] == 32 * 2 * 8 * 128 * 2
    first = report["splits"][0]["run"]
    assert first["weights"] == 2 * 8_030_261_248 and first["kv"] == 2**34
    assert report["run"] == {"cp": 1, "tp": 1, "ep": 1}
    best = report["train"]
    words = " ".join(report["flags"]["train"])
    assert best["cp"] * best["tp"] == 8 and best["cp"] > 1
    assert f"--context-parallel-size {best['cp']}" in words and "--no-create-attention-mask-in-dataloader" in words
    assert "--seq-length 131072" in words and "--use-distributed-optimizer" in words
    assert "64.0 GiB" in report["notes"][0]


def test_small_gpus_fit_nothing_and_no_flags_are_given() -> None:
    report = advise(tiny_config(**LARGE), 131072, gpus=2, memory=10 * 10**9)
    assert report["run"] is None and report["flags"]["run"] == []


def test_more_ranks_never_take_more_of_a_gpu() -> None:
    splits = advise(tiny_config(**LARGE), 131072, gpus=16)["splits"]
    sizes = {(split["cp"], split["tp"]): split["run"]["total"] for split in splits}
    assert all(sizes[cp, tp] > sizes[2 * cp, tp] for cp, tp in sizes if (2 * cp, tp) in sizes)
    assert all(sizes[cp, tp] > sizes[cp, 2 * tp] for cp, tp in sizes if (cp, 2 * tp) in sizes)


@pytest.mark.parametrize(
    ("config", "context", "words"),
    [
        (tiny_config(**LLAMA), 60, "context parallel size 4: 60 tokens are not divisible by 8"),
        (tiny_hybrid_config("attention", mamba_num_heads=6, mamba_num_groups=2), 64, "6 Mamba heads do not share out"),
        (tiny_config(**{**LLAMA, "window_size": [5, 0]}), 64, "a sliding window goes with"),
        (SINKS, 64, "context parallel size 4: attention sinks have ranks share out heads, and 4 with 2 keys"),
        (SINKS, 64, "attention sinks go with"),
        (tiny_config(**LLAMA), 128, "trained for 96 positions: 128 are beyond"),
    ],
)
def test_what_cannot_be_is_said(config: Any, context: int, words: str) -> None:
    report = advise(config, context, gpus=4)
    assert any(words in note for note in report["notes"])
    stopped = [note.split()[3].rstrip(":") for note in report["notes"] if note.startswith("context parallel size")]
    assert not {str(split["cp"]) for split in report["splits"]} & set(stopped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, None), ({"window_size": [15, 0]}, "all_gather"), ({"softmax_type": "off-by-one"}, "a2a")],
)
def test_windows_and_sinks_do_not_go_with_megatron_s_ring(changes: dict[str, Any], words: str | None) -> None:
    flags = advise(tiny_config(**{**LARGE, **changes}), 131072, gpus=8)["flags"]["train"]
    assert "--context-parallel-size" in flags
    assert ("--cp-comm-type" in flags) == (words is not None)
    assert words is None or flags[flags.index("--cp-comm-type") + 1] == words


def test_learned_positions_end() -> None:
    with pytest.raises(Refused, match="97 tokens, but the model has learned 96 positions"):
        advise(tiny_config(), 97)


@pytest.mark.parametrize("kind", ["gpt", "experts", "hybrid"])
@pytest.mark.parametrize("folder", [False, True])
def test_the_command_says_it_of_checkpoints_and_folders(tmp_path: Path, kind: str, folder: bool) -> None:
    path = tmp_path / "ckpt"
    makers = {
        "gpt": lambda: write_torch(path, tensor=2),
        "experts": lambda: write_experts(path, "sequential", Run()),
        "hybrid": lambda: write_hybrid(path, "M*-M"),
    }
    makers[kind]()
    if folder:
        convert(path, tmp_path / "hf")
        path = tmp_path / "hf"
    said = megahf("inspect", path, "--context", 32, "--gpus", 2)
    assert said.exit_code == 0, said.output
    text = " ".join(said.output.split())
    assert "a context of 32 tokens on 2 GPUs of 80 GB" in text and "to run it: cp 1, tp 1: --seq-length 32" in text
    report = json.loads(
        megahf("inspect", path, "--context", 32, "--gpus", 2, "--gpu-memory", "0.000001", "--json").stdout
    )
    assert report["context"]["gpu_memory"] == 1000 and report["context"]["run"] is None
    assert "context" not in json.loads(megahf("inspect", path, "--json").stdout)


def test_a_refusal_of_the_command_is_one_line(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    said = megahf("inspect", tmp_path / "ckpt", "--context", 0)
    assert said.exit_code == 1 and "0 tokens on 1 GPUs" in said.output
