"""Whether megahf reads a checkpoint right: every weight to the bit and the logits, against Megatron's own.

The oracle for weights is the state dict of Megatron's model in one process, renamed by the table below, which shares
nothing with megahf's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

import megahf
from megahf.load import canonical_state

CLOSE = 1e-5  # fp32 logits against Megatron's in one process
APART = 3e-5  # where Megatron's own sharded logits are not that close, and of hybrids: the judge scans in fp64
NEW_TOKENS = 16

LAYER = re.compile(r"(decoder\.layers\.\d+\.|mtp\.layers\.\d+\.transformer_layer\.)(.+)")
EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded at the end of their rows

# The local spec's norms and the matrices they feed: where a layer has the matrix, the canonical name, which is TE's, is
# the matrix's with `layer_norm_`.
LOCAL = (
    ("norm.", "mixer.in_proj."),
    ("input_layernorm.", "self_attention.linear_qkv."),
    ("pre_mlp_layernorm.", "mlp.linear_fc1."),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj."),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj."),
)


def canonical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Megatron's names, in one process and experts one by one, under canonical names; experts stacked."""
    named: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, value in state.items():  # experts come in order
        layer, own = match.groups() if (match := LAYER.fullmatch(name)) else ("", name)
        for norm, matrix in LOCAL:
            if own.startswith(norm) and f"{layer}{matrix}weight" in state:
                own = f"{matrix}layer_norm_{own.removeprefix(norm)}"
        if expert := EXPERT.fullmatch(own):
            experts.setdefault(f"{layer}mlp.experts.{expert[2]}", []).append(value)
        else:
            named[layer + own] = value
    return named | {name: torch.stack(each) for name, each in experts.items()}


def expected_state(known: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical names and what a file in `dtype` holds under them; expert biases are float32 in all files."""
    state = {}
    for name, value in canonical(known["state_dict"]).items():
        if name in VOCABULARY:
            value = value[: known["args"]["vocab_size"]]
        state[name] = value if name.endswith(".expert_bias") else value.to(dtype)
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
    """fp32 logits over the true vocabulary are Megatron's, on all of its prompts; returns the largest difference."""
    model = megahf.from_megatron(path, dtype=torch.float32).eval()
    asked = {"tokens": known, **known.get("prompts", {})}
    padded = asked.get("padded")
    if padded and not known["args"]["moe_expert_capacity_factor"]:  # else Megatron's padding takes the tokens' places
        asked |= {"padded right": masked(padded), "padded left": masked(left_padded(padded))}
    differences = {name: apart(model, prompt, known["args"]["vocab_size"]) for name, prompt in asked.items()}
    allowed = CLOSE if known["difference"] <= CLOSE and known["args"]["spec"] is None else APART
    wrong = {name: f"{difference:.2e} off" for name, difference in differences.items() if not difference <= allowed}
    assert not wrong, f"logits are {wrong}"
    return max(differences.values())


def apart(model: PreTrainedModel, prompt: dict[str, Any], vocabulary: int) -> float:
    """The largest difference of the logits, and of those of heads for further tokens, where they are `counted`."""
    options = {"output_mtp_logits": True} if "mtp_logits" in prompt else {}
    output = model(prompt["input_ids"], **prompt.get("call", {}), **options)
    logits, expected = output.logits[None], prompt["logits"][None]  # [heads, b, s, vocabulary]
    if "mtp_logits" in prompt:
        logits = torch.cat([logits, torch.stack(output.mtp_logits)])
        expected = torch.cat([expected, prompt["mtp_logits"]])
    expected = expected[..., :vocabulary]
    assert logits.shape == expected.shape
    difference = (logits - expected).abs().amax(dim=-1)  # [heads, b, s]
    return difference.where(counted(prompt, len(expected)), 0).max().item()


def masked(prompt: dict[str, Tensor]) -> dict[str, Any]:
    """The prompt with its mask given to the model, and positions counted from each row's first token."""
    mask = prompt["attention_mask"]
    call = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    return {**prompt, "call": call}


def counted(prompt: dict[str, Any], heads: int) -> Tensor:
    """Which positions `[heads, b, s]` Megatron says something about: all where there is no mask.

    With one, tokens, and for head k those with k tokens behind them: Megatron takes padding for further tokens.
    """
    mask = prompt["call"]["attention_mask"] if "call" in prompt else torch.ones_like(prompt["input_ids"])
    kept = [mask.bool()]
    for _ in range(1, heads):
        kept.append(kept[-1] & F.pad(kept[-1], (0, 1))[:, 1:] if "call" in prompt else kept[-1])
    return torch.stack(kept)


def left_padded(prompt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row's padding moved from its right end to its left, and with it the logits that Megatron has for it."""
    length = prompt["input_ids"].shape[1]
    tokens = prompt["attention_mask"].sum(dim=1, keepdim=True)
    at = (torch.arange(length) + tokens) % length  # [b, s], from where each position comes
    moved = {name: prompt[name].gather(1, at) for name in ("input_ids", "attention_mask")}
    return moved | {
        name: prompt[name].gather(-2, at[..., None].expand_as(prompt[name]))
        for name in ("logits", "mtp_logits")
        if name in prompt
    }


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
