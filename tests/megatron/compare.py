"""Whether megahf reads a checkpoint right: every weight to the bit and the logits, against Megatron's own.

The oracle for weights is the state dict of Megatron's model in one process, renamed by the table below, which shares
nothing with megahf's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import megahf
from megahf.load import canonical_state

CLOSE = 1e-5  # fp32 logits against Megatron's in one process
APART = 3e-5  # where Megatron's own sharded logits are not that close
NEW_TOKENS = 16

# The local spec's names and the canonical ones; the TE spec's are canonical.
LOCAL = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}
LAYER = re.compile(r"(decoder\.layers\.\d+\.)(.+)")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded at the end of their rows


def expected_state(known: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical names and what a file in `dtype` holds under them."""
    state = {}
    for name, value in known["state_dict"].items():
        if match := LAYER.fullmatch(name):
            name = match[1] + LOCAL.get(match[2], match[2])
        if name in VOCABULARY:
            value = value[: known["args"]["vocab_size"]]
        state[name] = value.to(dtype)
    return state


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(bits(a), bits(b)))


def bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().view({2: torch.int16, 4: torch.int32}[value.element_size()])


def check_weights(path: Path, known: dict[str, Any]) -> None:
    """Every weight of the model that megahf makes of the checkpoint is Megatron's, and there is no other."""
    dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16, "torch.float16": torch.float16}
    expected = expected_state(known, dtype[known["args"]["params_dtype"]])
    found = canonical_state(megahf.from_megatron(path))
    assert found.keys() == expected.keys()
    unequal = [name for name, value in expected.items() if not same_bits(found[name], value)]
    assert not unequal, f"not Megatron's bits: {unequal}"


@torch.no_grad()
def check_logits(path: Path, known: dict[str, Any]) -> float:
    """fp32 logits over the true vocabulary are Megatron's; returns the largest difference."""
    model = megahf.from_megatron(path, dtype=torch.float32).eval()
    logits = model(known["input_ids"]).logits  # [b, s, vocabulary]
    expected = known["logits"][..., : known["args"]["vocab_size"]]
    assert logits.shape == expected.shape
    difference = (logits - expected).abs().max().item()
    allowed = CLOSE if known["difference"] <= CLOSE else APART
    assert difference <= allowed, f"logits are {difference:.2e} off"
    return difference


@torch.no_grad()
def check_generation(path: Path) -> None:
    """Greedy tokens with a cache are those without."""
    known = torch.load(path / "reference.pt")
    model = megahf.from_megatron(path, dtype=torch.float32).eval()
    prompt = known["input_ids"][:, :8]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **options)
    assert cached.shape == (prompt.shape[0], prompt.shape[1] + NEW_TOKENS)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


def check(path: Path) -> float:
    """Weights and logits of a folder that the judge wrote; returns the largest difference of the logits."""
    known = torch.load(path / "reference.pt")
    check_weights(path, known)
    return check_logits(path, known)
