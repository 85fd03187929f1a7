"""Promise: LoRA on Megatron's matrices trains, is saved and reloaded, and merges into a model like any other.

Experts are tensors of all of them at once, which peft takes as `target_parameters`.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from tiny import MIXTURES, VARIANTS, tiny, tiny_hybrid, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import megahf

megahf.register()

MATRICES = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
BOTH = pytest.mark.parametrize("variant", ["llama", "gpt2"])


def tuned(base: PreTrainedModel, **options: object) -> peft.PeftModel:
    """LoRA of rank 4 on the four matrices, after 20 steps."""
    torch.manual_seed(0)
    targets = {"target_modules": MATRICES, **options}
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)
    model = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW((x for x in model.parameters() if x.requires_grad), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(tokens(4, 9), labels=tokens(4, 9)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
    return model.eval()


def names(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(tokens(2, 9)).logits


@BOTH
def test_training_moves_the_adapters_and_nothing_else(variant: str) -> None:
    before = dict(tiny(**VARIANTS[variant]).named_parameters())
    model = tuned(tiny(**VARIANTS[variant]))
    adapters = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * 4 * 2  # a and b of four matrices in two layers
    for name, parameter in model.named_parameters():
        if name not in adapters:
            assert torch.equal(parameter, before[name.removeprefix("base_model.model.").replace(".base_layer.", ".")])
    assert not torch.allclose(logits(model), logits(tiny(**VARIANTS[variant])), atol=0.1)


@BOTH
def test_a_saved_adapter_is_reloaded_onto_a_saved_folder(variant: str, tmp_path: Path) -> None:
    tiny(**VARIANTS[variant]).save_pretrained(tmp_path / "base")
    model = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    # transformers finds the base by the adapter's folder.
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), logits(model))


@BOTH
def test_a_merged_model_is_saved_under_canonical_names_and_loads(variant: str, tmp_path: Path) -> None:
    base = tiny(**VARIANTS[variant])
    base.save_pretrained(tmp_path / "base")
    model = tuned(base)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert names(tmp_path / "merged" / "model.safetensors") == names(tmp_path / "base" / "model.safetensors")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(again), logits(merged))


def test_an_adapter_trains_under_gradient_checkpointing() -> None:
    base = tiny(**VARIANTS["llama"])
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.enable_input_require_grads()
    tuned(base)


def test_the_embeddings_may_be_trained_whole_beside_the_adapters(tmp_path: Path) -> None:
    model = tuned(tiny(**VARIANTS["llama"]), modules_to_save=["word_embeddings", "output_layer"])
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny(**VARIANTS["llama"]), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    start = tiny(**VARIANTS["llama"]).output_layer.weight
    assert not torch.allclose(model.merge_and_unload().output_layer.weight, start, atol=1e-3)


LATENTS = ["linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj", "linear_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MIXED: dict[str, tuple[PreTrainedModel, dict[str, list[str]], int]] = {  # and how many matrices get an adapter
    "experts": (tiny(**MIXTURES["experts"]), {"target_parameters": EXPERTS}, 2 * 4 + 2),
    "biases": (tiny(**MIXTURES["experts with biases"]), {"target_modules": [], "target_parameters": EXPERTS}, 2 * 2),
    "latents": (tiny(**VARIANTS["latents"]), {"target_modules": LATENTS}, 2 * 5),
    "mixers": (tiny_hybrid("mamba"), {"target_modules": ["in_proj", "out_proj"]}, 2 * 2),
}


@pytest.mark.parametrize("kind", MIXED)
def test_experts_latents_and_mixers_take_adapters_too(kind: str, tmp_path: Path) -> None:
    base, targets, adapted = MIXED[kind]
    base.save_pretrained(tmp_path / "base")
    model = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), **targets)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2 * adapted
    expected, plain = logits(model), logits(base)
    assert not torch.allclose(expected, plain, atol=0.1)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert names(tmp_path / "merged" / "model.safetensors") == names(tmp_path / "base" / "model.safetensors")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))
