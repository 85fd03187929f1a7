"""Promise: multi-latent attention computes what Megatron writes down, in both its forms, and so do its gradients.

The reference is float64 and follows megatron/core/transformer/multi_latent_attention.py line by line, loops and all.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from test_attention_masks import LONG, Squares, situations
from tiny import MLA, VARIANTS, tiny, tiny_config, tokens
from torch import Tensor

from megahf.models.mla import MLASelfAttention
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

Weights = dict[str, Tensor]
LENGTH = 13
ROPE = {**MLA, "rope_type": "rope"}
OPTIONS: dict[str, dict[str, Any]] = {
    "yarn": MLA,
    "rope": ROPE,
    "queries of full rank": {**MLA, "q_lora_rank": None},
    "no norms": {**MLA, "qk_layernorm": False},
    "layer norms and biases": {**MLA, "normalization": "LayerNorm", "add_bias_linear": True},
    "zero-centred gamma": {**MLA, "layernorm_zero_centered_gamma": True},
    "values wider than keys": {**MLA, "v_head_dim": 14},
    "values as wide as keys": {**MLA, "v_head_dim": 12},
    "half the channels turn": {**ROPE, "qk_pos_emb_head_dim": 8, "rotary_percent": 0.5},
    "YaRN turns all channels": {**MLA, "rotary_percent": 0.5},
    "another stretch": {**MLA, "yarn_mscale": 1.3, "yarn_rotary_scaling_factor": 40.0, "yarn_beta_fast": 16.0},
    "no stretch": {**MLA, "yarn_rotary_scaling_factor": 1.0},
    "window": {**MLA, "window_size": [4, 0]},
    "sinks": {**MLA, "softmax_type": "learnable"},
    "off by one": {**MLA, "softmax_type": "off-by-one"},
    "window and sinks": {**MLA, "softmax_type": "learnable", "window_size": [4, 0]},
    # What Megatron's latent attention never asks for changes nothing.
    "layers without RoPE": {**MLA, "no_rope_freq": 1},
    "a softmax scale": {**MLA, "softmax_scale": 0.5},
    "interpolation and Llama's scaling": {**ROPE, "rotary_seq_len_interpolation_factor": 4.0, "use_rope_scaling": True},
    "a range of fractions": {**MLA, "yarn_correction_range_round_to_int": False},
}
CHANGING = ("rope", "no norms", "zero-centred gamma", "another stretch", "no stretch", "window", "sinks", "off by one")
FORMS = pytest.mark.parametrize("form", ["expanded", "absorbed"])
EACH = pytest.mark.parametrize("option", OPTIONS)


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def frequencies(c: Any) -> list[float]:
    """What each pair turns a position; `_yarn_find_correction_range`, `_yarn_linear_ramp_mask` for YaRN."""
    whole = c.qk_pos_emb_head_dim
    channels = int(whole * c.rotary_percent) if c.rope_type == "rope" else whole
    plain = [c.rotary_base ** (-2 * pair / channels) for pair in range(channels // 2)]
    if c.rope_type == "rope":
        return plain

    def bound(turns: float) -> float:
        ratio = c.yarn_original_max_position_embeddings / (turns * 2 * math.pi)
        return channels * math.log(ratio) / (2 * math.log(c.rotary_base))

    low, high = max(math.floor(bound(c.yarn_beta_fast)), 0), min(math.ceil(bound(c.yarn_beta_slow)), channels - 1)
    ramp = [min(max((pair - low) / max(high - low, 0.001), 0), 1) for pair in range(channels // 2)]
    return [f / c.yarn_rotary_scaling_factor * part + f * (1 - part) for f, part in zip(plain, ramp, strict=True)]


def turned(c: Any, x: Tensor) -> Tensor:
    """`_apply_rotary_pos_emb_bshd` with multi_latent_attention, `x` `[s, ..., rope]`."""
    angles = torch.outer(torch.arange(len(x), dtype=torch.float64), torch.tensor(frequencies(c), dtype=torch.float64))
    angles = torch.cat((angles, angles), dim=-1).view(len(x), *[1] * (x.dim() - 2), -1)
    factor = 1.0
    if c.rope_type == "yarn":
        scale = c.yarn_rotary_scaling_factor
        factor = mscale(scale, c.yarn_mscale) / mscale(scale, c.yarn_mscale_all_dim)
    x, passed = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    x = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    first, second = x.chunk(2, dim=-1)
    x = x * angles.cos() * factor + torch.cat((-second, first), dim=-1) * angles.sin() * factor
    return torch.cat((x, passed), dim=-1)


def normed(c: Any, w: Weights, name: str, x: Tensor) -> Tensor:
    if not c.qk_layernorm:
        return x
    weight = w[f"{name}.weight"] + int(c.layernorm_zero_centered_gamma)
    if c.normalization == "LayerNorm":
        x = x - x.mean(-1, keepdim=True)
    return x * (x.square().mean(-1, keepdim=True) + c.layernorm_epsilon) ** -0.5 * weight + w.get(f"{name}.bias", 0.0)


def reference(c: Any, w: Weights, hidden: Tensor) -> Tensor:
    """One row `[s, h]` through the attention, with weights named as in the module."""
    heads, length = c.num_attention_heads, len(hidden)
    if c.q_lora_rank is None:
        query = hidden @ w["linear_q_proj.weight"].T
    else:
        compressed = normed(c, w, "linear_q_up_proj_layernorm", hidden @ w["linear_q_down_proj.weight"].T)
        query = compressed @ w["linear_q_up_proj.weight"].T
    query = query.view(length, heads, -1)
    latent, key = (hidden @ w["linear_kv_down_proj.weight"].T).split([c.kv_lora_rank, c.qk_pos_emb_head_dim], dim=-1)
    both = normed(c, w, "linear_kv_up_proj_layernorm", latent) @ w["linear_kv_up_proj.weight"].T
    keys, values = both.view(length, heads, -1).split([c.qk_head_dim, c.v_head_dim], dim=-1)
    queries = torch.cat((query[..., : c.qk_head_dim], turned(c, query[..., c.qk_head_dim :])), dim=-1)
    keys = torch.cat((keys, turned(c, key)[:, None].expand(-1, heads, -1)), dim=-1)
    scale = mscale(c.yarn_rotary_scaling_factor, c.yarn_mscale_all_dim) ** 2
    scores = torch.einsum("snd,tnd->nst", queries, keys) * scale / math.sqrt(c.qk_head_dim + c.qk_pos_emb_head_dim)
    weights = scores.masked_fill(~seen(c, length), -math.inf).exp()  # small numbers: no maximum needs to go first
    sink = {"learnable": w.get("core_attention.softmax_offset"), "off-by-one": torch.zeros(heads), "vanilla": None}
    more = sink[c.softmax_type]
    total = weights.sum(-1) + (0 if more is None else more[:, None].exp())
    out = torch.einsum("nst,tnd->snd", weights / total[..., None], values).flatten(1)
    return out @ w["linear_proj.weight"].T + w.get("linear_proj.bias", 0.0)


def seen(c: Any, length: int) -> Tensor:
    """Which keys each query sees, `[s, s]`."""
    back = length if c.window_size is None else c.window_size[0]
    return torch.tensor([[0 <= query - key <= back for key in range(length)] for query in range(length)])


def attention(option: str) -> tuple[MLASelfAttention, tuple[Tensor, Tensor]]:
    """One attention in float64, and the cosines and sines of the first positions."""
    model = tiny(**{**OPTIONS[option], "num_layers": 1}).double()
    rotation = model.model.rotary_pos_emb(torch.arange(LENGTH)[None], torch.float64)
    return model.model.decoder.layers[0].self_attention, rotation


def through(form: str, option: str, hidden: Tensor, monkeypatch: Any) -> tuple[MLASelfAttention, Tensor]:
    module, rotation = attention(option)
    monkeypatch.setattr(module, "absorbs", lambda *args: form == "absorbed")
    mask = seen(module.config, LENGTH)[None, None]
    return module, module(hidden, mask, rotation)[0]


def rows(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, LENGTH, 32, generator=generator, dtype=torch.float64)


@EACH
@FORMS
@torch.no_grad()
def test_both_forms_are_what_megatron_writes_down(form: str, option: str, monkeypatch: Any) -> None:
    module, out = through(form, option, rows(), monkeypatch)
    weights = dict(module.named_parameters())
    expected = torch.stack([reference(module.config, weights, row) for row in rows()])
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-6)  # angles are float32, as Megatron's


@pytest.mark.parametrize("option", ["yarn", "queries of full rank", "layer norms and biases", "window and sinks"])
@FORMS
def test_gradients_are_those_of_the_reference(form: str, option: str, monkeypatch: Any) -> None:
    ours, expected = rows().requires_grad_(), rows().requires_grad_()
    probe = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    module, out = through(form, option, ours, monkeypatch)
    (out * probe).sum().backward()
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in module.named_parameters()}
    out = torch.stack([reference(module.config, weights, row) for row in expected])
    (out * probe).sum().backward()
    torch.testing.assert_close(ours.grad, expected.grad, atol=1e-6, rtol=1e-6)
    for name, weight in module.named_parameters():
        assert weight.grad is not None and weights[name].grad is not None
        torch.testing.assert_close(weight.grad, weights[name].grad, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("option", CHANGING)
@torch.no_grad()
def test_the_same_weights_mean_something_else_under_another_option(option: str) -> None:
    outs = []
    weights = attention("yarn")[0].state_dict()
    for choice in ("yarn", option):
        module, rotation = attention(choice)
        module.load_state_dict(weights, strict=False)
        outs.append(module(rows(), seen(module.config, LENGTH)[None, None], rotation)[0])
    assert not torch.allclose(*outs, atol=1e-3)


@torch.no_grad()
def test_an_implementation_that_returns_weights_returns_those_of_each_head(monkeypatch: Any) -> None:
    found = {}
    for form in ("expanded", "absorbed"):
        module, rotation = attention("sinks")
        module.config._attn_implementation = "eager"
        monkeypatch.setattr(module, "absorbs", lambda *args, form=form: form == "absorbed")
        mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen(module.config, LENGTH), -1e30)
        found[form] = module(rows(), mask[None, None], rotation)[1]
    assert found["expanded"].shape == (2, 4, LENGTH, LENGTH)
    torch.testing.assert_close(found["absorbed"], found["expanded"])
    assert (found["expanded"].sum(-1) < 1).all(), "the sink takes its share"


@pytest.mark.parametrize("variant", ["latents", "latents, window and sinks"])
@pytest.mark.parametrize("situation", situations(6))
@torch.no_grad()
def test_no_prefill_makes_a_square(situation: str, variant: str) -> None:
    model = tiny(**{**VARIANTS[variant], "window_size": None, "max_position_embeddings": LONG})
    with Squares(LONG) as squares:
        model(**situations(LONG)[situation], use_cache=False, logits_to_keep=1)
    assert not squares.found


@pytest.mark.parametrize("positions", ["learned_absolute", "none"])
@torch.no_grad()
def test_it_rotates_whatever_embedding_of_positions_there_is(positions: str) -> None:
    model = tiny(**{**MLA, "position_embedding_type": positions})
    plain = tiny(**MLA)
    plain.load_state_dict(model.state_dict(), strict=False)
    learned = model.model.embedding.position_embeddings
    words = model.get_input_embeddings()(tokens(2, 9))
    expected = plain(inputs_embeds=words if learned is None else words + learned.weight[:9]).logits
    torch.testing.assert_close(model(tokens(2, 9)).logits, expected)


ALWAYS = {
    "input_layernorm.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.linear_proj.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
SOMETIMES = {
    "yarn": {"q_down_proj.weight", "q_up_proj.weight", "q_up_proj.layer_norm_weight", "kv_up_proj.layer_norm_weight"},
    "queries of full rank": {"q_proj.weight", "kv_up_proj.layer_norm_weight"},
    "no norms": {"q_down_proj.weight", "q_up_proj.weight"},
}


@pytest.mark.parametrize("option", SOMETIMES)
@torch.no_grad()
def test_names_on_disk_are_those_of_megatron(option: str, tmp_path: Path) -> None:
    model = tiny(**{**OPTIONS[option], "num_layers": 1})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {name.removeprefix("decoder.layers.0.") for name in file.keys() if "layers" in name}  # noqa: SIM118
    assert names == ALWAYS | {f"self_attention.linear_{name}" for name in SOMETIMES[option]}
    again = McoreGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no latent": ({"kv_lora_rank": 0}, "kv_lora_rank is 0: at least 1"),
    "no rank": ({"q_lora_rank": 0}, "q_lora_rank is 0: at least 1"),
    "no channels turn": ({"rope_type": "rope", "rotary_percent": 0.1}, "0 channels .qk_pos_emb_head_dim 4"),
    "odd": ({"qk_pos_emb_head_dim": 5}, "5 channels .* even number from 2 to 5"),
    "rope type": ({"rope_type": "llama3"}, "rope_type is 'llama3': it must be one of rope, yarn"),
    "gate": ({"attention_output_gate": True}, "attention_output_gate does not go with multi_latent_attention"),
    "L2 norm": ({"qk_l2_norm": True}, "qk_l2_norm does not go with"),
    "interleaved": ({"rotary_interleaved": True}, "rotary_interleaved does not go with"),
    "two rotations": ({"position_embedding_type": "yarn"}, "position_embedding_type 'yarn' .* rope_type"),
    "groups": ({"num_query_groups": 2}, "num_query_groups is 2, .* it must be 4"),
    "no scale": ({"yarn_mscale_all_dim": None}, "yarn_mscale_all_dim is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_megatron_cannot_build_is_refused_in_words(case: str) -> None:
    changes, words = REFUSED[case]
    with pytest.raises(Exception, match=words):
        tiny_config(**{**MLA, **changes})


def test_a_call_without_a_rotation_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="multi-latent attention rotates: position_embeddings"):
        attention("yarn")[0](rows())
