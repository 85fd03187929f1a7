"""Promise: a hybrid's heads for further tokens are stacks by their own pattern, and else are a GPT's.

The oracles are the GPT with heads, on the same weights, and a hybrid of the heads' pattern that is fed by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_attention_masks import left, packed
from test_hybrid import as_hybrid
from tiny import EXPERTS, LLAMA, MLA, tiny, tiny_hybrid, tokens

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.modeling_mcore_hybrid import McoreHybridForCausalLM

KINDS = {
    "dense": (LLAMA, {"hybrid_layer_pattern": "*-*-", "mtp_layer_pattern": "*-"}),
    "experts": (
        {**LLAMA, **EXPERTS, "moe_aux_loss_coeff": 0.1},
        {**EXPERTS, "moe_aux_loss_coeff": 0.1, "hybrid_layer_pattern": "*E*E", "mtp_layer_pattern": "*E"},
    ),
    "latents": (MLA, {**MLA, "hybrid_layer_pattern": "+-+-", "mtp_layer_pattern": "+-"}),
}
SITUATIONS = {
    "whole": {},
    "padded left": {"attention_mask": left([0, 4], 12)},
    "packed": {"position_ids": packed([5, 7]).expand(2, -1)},
}


def heads_as_hybrid(gpt: McoreGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a GPT with heads by the names of a hybrid: a head's attention first, then its MLP."""
    renamed = {}
    for name, weight in as_hybrid(gpt).items():
        before, inner, rest = name.partition(".transformer_layer.")
        late = int(rest.startswith(("mlp.", "pre_mlp_layernorm.")))
        renamed[f"{before}.mtp_model_layer.layers.{late}.{rest}" if inner else before] = weight
    return renamed


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_a_gpt_written_as_a_hybrid_are_the_gpts(kind: str, situation: str, repeated: bool) -> None:
    plain, stacked = KINDS[kind]
    heads = {"mtp_num_layers": 2, "mtp_use_repeated_layer": repeated}
    gpt, hybrid = tiny(**plain, **heads).train(), tiny_hybrid("gpt", **stacked, **heads).train()
    hybrid.load_state_dict(heads_as_hybrid(gpt))
    ids = tokens(2, 12)
    inputs = {"input_ids": ids, "labels": ids, "output_mtp_logits": True, **SITUATIONS[situation]}
    expected, found = gpt(**inputs), hybrid(**inputs)
    kept = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    for theirs, ours in zip(expected.mtp_logits, found.mtp_logits, strict=True):
        torch.testing.assert_close(ours[kept], theirs[kept], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.mtp_loss, expected.mtp_loss)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("pattern", ["M", "*M-"])
@torch.no_grad()
def test_a_head_is_a_hybrid_of_its_pattern(pattern: str) -> None:
    model, ids = tiny_hybrid("everything", mtp_num_layers=1, mtp_layer_pattern=pattern), tokens(2, 12)
    head, embed = model.model.mtp.layers[0], model.get_input_embeddings()
    stack = tiny_hybrid("mamba", hybrid_layer_pattern=pattern).model
    stack.decoder.layers.load_state_dict(head.mtp_model_layer.layers.state_dict())
    stack.decoder.final_norm = head.final_layernorm
    following = torch.cat((embed(ids[:, 1:]), embed(torch.zeros(2, 1, dtype=torch.long))), dim=1)
    hidden = model.model(ids).last_hidden_state
    entering = head.eh_proj(torch.cat((head.enorm(following), head.hnorm(hidden)), dim=-1))
    expected = model.output_layer(stack(inputs_embeds=entering).last_hidden_state)
    torch.testing.assert_close(model(ids, output_mtp_logits=True).mtp_logits[0], expected, atol=1e-6, rtol=1e-6)


def test_every_weight_of_a_head_learns_and_packed_documents_stay_apart() -> None:
    model, ids = tiny_hybrid("attention", mtp_num_layers=2, mtp_layer_pattern="M*").train(), tokens(1, 12)
    inputs = {"labels": ids, "output_mtp_logits": True}
    together = model(ids, **inputs, position_ids=packed([5, 7]))
    together.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.model.mtp.parameters())
    alone = [model(document, labels=document, output_mtp_logits=True) for document in ids.split([5, 7], dim=1)]
    for head in range(2):
        apart = torch.cat([out.mtp_logits[head] for out in alone], dim=1)
        torch.testing.assert_close(together.mtp_logits[head], apart, atol=1e-5, rtol=1e-5)


def test_heads_are_saved_under_megatrons_names_and_loaded(tmp_path: Path) -> None:
    model = tiny_hybrid("attention", mtp_num_layers=1, mtp_layer_pattern="M-")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = {name.removeprefix("mtp.layers.0.") for name in file.keys() if name.startswith("mtp.")}  # noqa: SIM118
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight"} < names
    assert {"mtp_model_layer.layers.0.mixer.in_proj.layer_norm_weight", "mtp_model_layer.layers.0.mixer.A_log"} < names
    assert "mtp_model_layer.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    again, info = McoreHybridForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_heads_do_not_draft_for_generate() -> None:
    model = tiny_hybrid("gpt", mtp_num_layers=1, mtp_layer_pattern="*-")
    with pytest.raises(ValueError, match="a hybrid's heads for further tokens go over whole sequences"):
        model.generate(tokens(1, 5), max_new_tokens=4, do_sample=False, use_mtp=True)
