"""Promise: a model of transformers' own, taken to Megatron, is computed by real Megatron as transformers computes it.

And the reverse: a model that Megatron wrote, lowered to a family, is computed by transformers as Megatron computed it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from cases import Case
from cases_hybrid import KINDS as HYBRIDS
from cases_hybrid import HybridCase
from conftest import Judge

import megahf
from megahf.checkpoint import open_checkpoint
from megahf.errors import Refused
from megahf.judge.namespace import recovered

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_families_dense as dense
import test_families_experts as experts
import test_families_mamba as mamba
from families import model_of, stored
from tiny import tokens

CLOSE = 1e-5

MODELS: dict[str, Callable[[str], T.PreTrainedModel]] = {
    **dict.fromkeys(dense.MODELS, lambda case: model_of(dense.MODELS[case])),
    **dict.fromkeys(experts.CASES, lambda case: model_of(experts.CASES[case]())),
    **dict.fromkeys(mamba.CASES, mamba.model),
}
# What Megatron has no words for, and what is said then.
REFUSED = {
    "llama with GELU": "Megatron's silu and quick_gelu are gated, its other functions are not",
    "starcoder2 with a window": "Megatron approximates gelu by tanh where it fuses it with a bias, and only there",
    "mixtral, tied": "one expert a token is always of weight 1",
    "deepseek v3, stretched": "multi-latent attention of Megatron's has no argument for it",
    "deepseek v3, stretched as Megatron by itself": "multi-latent attention of Megatron's has no argument for it",
}
# What megatron-core 0.16.1 does not have: muP; Mamba-1; mixers of another shape, which take a spec of one's own.
BEYOND = (
    "granite without its factor of residuals", "Mamba", "Mamba, untied, without the convolution's bias, of a rank",
    "Mamba with another epsilon", "Mamba-2, tied, three channels for one", "Mamba-2 without the convolution's bias",
)  # fmt: skip
THERE = [case for case in MODELS if case not in BEYOND and case not in REFUSED]
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tp": 2, "format": "torch_dist"},
    {"tp": 2, "format": "torch"},
    {"pp": 3, "format": "torch_dist"},
)
BY_LAYERS = {  # three of them, as far as they may stand on stages of their own
    case for case in THERE if case not in mamba.CASES and "MTP" not in case
}


def layout_of(number: int, case: str) -> dict[str, Any]:
    layout = LAYOUTS[number % (3 if case in BY_LAYERS else 2)]
    return {**layout, "etp": 1} if case.startswith("gpt-oss") else layout


WAYS = [(case, layout_of(number, case)) for number, case in enumerate(THERE)]


@pytest.mark.parametrize(("case", "layout"), WAYS, ids=[case for case, _ in WAYS])
@torch.no_grad()
def test_megatron_says_what_transformers_says(judge: Judge, case: str, layout: dict[str, Any], tmp_path: Path) -> None:
    model = MODELS[case](case)
    model.save_pretrained(tmp_path / "theirs")
    megahf.convert(tmp_path / "theirs", tmp_path / "megatron", to="megatron", **layout)
    checkpoint, ids = open_checkpoint(tmp_path / "megatron"), tokens(2, 24, vocabulary=model.config.vocab_size)
    arguments = recovered(checkpoint.args)
    found = judge.bench.logits(arguments, checkpoint.path, checkpoint.format, ids.numpy(), sharded=True)
    assert np.abs(found[..., : model.config.vocab_size] - model(ids).logits.numpy()).max() <= CLOSE
    megahf.convert(tmp_path / "megatron", tmp_path / "back", to=model.config.model_type)
    assert stored(tmp_path / "back") == stored(tmp_path / "theirs")


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_has_no_words_for_is_refused(case: str, tmp_path: Path) -> None:
    MODELS[case](case).save_pretrained(tmp_path / "theirs")
    with pytest.raises(Refused, match=REFUSED[case]):
        megahf.convert(tmp_path / "theirs", tmp_path / "megatron", to="megatron")


EPSILON = {"layernorm_epsilon": 1e-6}  # written into transformers' classes of DeepSeek
SQUARED = {"swiglu": False, "squared_relu": True}
INTERLEAVED = {"rotary_interleaved": True}
# family, kind of model that Megatron writes, arguments that make it one of the family
LOWERED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("arcee", "llama", SQUARED),
    ("bamba", "gpt_as_stack", {}),
    ("deepseek_v2", "mla", EPSILON),
    ("deepseek_v3", "mla_no_q_lora", EPSILON),
    ("dots1", "qwen3", {}),
    ("ernie4_5", "llama_biases", INTERLEAVED),
    ("glm", "qwen2", INTERLEAVED),
    ("glm4_moe", "llama_tied", {}),
    ("gpt2", "gpt2_tanh", {}),
    ("gpt2", "gpt_zero_centered", {}),
    ("gpt_bigcode", "gpt3_qk_scaling", {}),
    ("gpt_neox", "neox", {}),
    ("gpt_oss", "gpt_oss", {}),
    ("granite", "long_base", {}),
    ("helium", "llama_mqa", INTERLEAVED),
    ("llama", "llama31", {}),
    ("llama", "llama_zero_centered", {}),
    ("mamba2", "mamba2", {}),
    ("ministral", "window_skip_list", {}),
    ("mistral", "window", {}),
    ("mixtral", "mixtral", {}),
    ("nemotron", "nemotron", {}),
    ("nemotron_h", "hybrid_zero_centered", {}),
    ("nemotron_h", "nemotron3_latent", {}),
    ("phi3", "llama_mha", {}),
    ("qwen2", "qwen2", {}),
    ("qwen2_moe", "qwen2_moe", {}),
    ("qwen3", "qwen3", {}),
    ("qwen3_moe", "qwen3_moe", {}),
    ("seed_oss", "llama_two_groups", {}),
    ("smollm3", "nope_list", {}),
    ("stablelm", "llama_layernorm", {}),
    ("starcoder2", "gpt2_tanh", {"position_embedding_type": "rope"}),
)


@pytest.mark.parametrize(
    ("family", "kind", "more"), LOWERED, ids=[f"{kind} to {family}" for family, kind, _ in LOWERED]
)
@torch.no_grad()
def test_transformers_says_what_megatron_said(
    judge: Judge, family: str, kind: str, more: dict[str, Any], tmp_path: Path
) -> None:
    layout = "tp2_ep2_etp1" if kind == "gpt_oss" else "tp2"
    case = (HybridCase if kind in HYBRIDS else Case)(kind, layout, "torch_dist", "te")
    judge.bench.save({**case.arguments, **more}, tmp_path / "megatron", case.format)
    megahf.convert(tmp_path / "megatron", tmp_path / "theirs", to=family)
    megahf.verify(tmp_path / "megatron", tmp_path / "theirs")
    known = torch.load(tmp_path / "megatron" / "reference.pt")
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    logits = model(known["input_ids"], use_cache=False).logits
    assert (logits - known["logits"][..., : logits.shape[-1]]).abs().max() <= CLOSE
