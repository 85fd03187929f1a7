"""Promise: a saved hybrid loads anywhere by transformers alone, under Megatron's names, and is saved the same again.

And it is spread over memory and disk, tuned with LoRA, and trained, as other models are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import test_peft
import torch
from accelerate import dispatch_model, infer_auto_device_map
from safetensors import safe_open
from test_generate import padded
from test_remote_code import digests, load_fresh
from test_training import losses, rows, trainer
from tiny import HYBRIDS, randomise, tiny_hybrid, tiny_hybrid_config, tokens
from transformers import AutoModelForCausalLM

import megahf
import megahf.models.modeling_mcore_hybrid as hybrid

megahf.register()

CLASSES = {name: place.split(".")[1] for name, place in hybrid.McoreHybridForCausalLM.auto_map.items()}
del CLASSES["AutoConfig"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("auto", CLASSES)
def test_each_class_loads_and_saves_the_same_bytes_without_megahf(auto: str, tmp_path: Path) -> None:
    model = randomise(getattr(hybrid, CLASSES[auto])(tiny_hybrid_config("everything"))).eval()
    model.save_pretrained(tmp_path / "first")
    out = load_fresh(tmp_path / "first", auto, tmp_path / "second")
    assert out["missing"] == out["unexpected"] == []
    with torch.no_grad():
        torch.testing.assert_close(out["outputs"], model(tokens(1, 7))[0], atol=0, rtol=0)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize("variant", ["mamba", "mamba 1", "latents"])
def test_a_fresh_process_generates_the_same(variant: str, tmp_path: Path) -> None:
    model = tiny_hybrid(variant)
    model.save_pretrained(tmp_path / "first")
    load_fresh(tmp_path / "first", "AutoModelForCausalLM", tmp_path / "second")
    expected = model.generate(tokens(1, 7), max_new_tokens=4, do_sample=False)
    assert torch.equal(torch.load(tmp_path / "first" / "generated.pt"), expected)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_names_on_disk_are_those_of_megatron(tmp_path: Path) -> None:
    tiny_hybrid("everything", hybrid_layer_pattern="M*-E").save_pretrained(tmp_path)
    layer = "decoder.layers."
    assert names(tmp_path) == {
        "embedding.word_embeddings.weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
        f"{layer}0.mixer.in_proj.layer_norm_weight",
        f"{layer}0.mixer.in_proj.weight",
        f"{layer}0.mixer.conv1d.weight",
        f"{layer}0.mixer.conv1d.bias",
        f"{layer}0.mixer.A_log",
        f"{layer}0.mixer.D",
        f"{layer}0.mixer.dt_bias",
        f"{layer}0.mixer.norm.weight",
        f"{layer}0.mixer.out_proj.weight",
        f"{layer}1.self_attention.linear_qkv.layer_norm_weight",
        f"{layer}1.self_attention.linear_qkv.weight",
        f"{layer}1.self_attention.linear_proj.weight",
        f"{layer}2.mlp.linear_fc1.layer_norm_weight",
        f"{layer}2.mlp.linear_fc1.weight",
        f"{layer}2.mlp.linear_fc2.weight",
        f"{layer}3.pre_mlp_layernorm.weight",
        f"{layer}3.mlp.router.weight",
        f"{layer}3.mlp.experts.linear_fc1.weight",
        f"{layer}3.mlp.experts.linear_fc2.weight",
        f"{layer}3.mlp.shared_experts.linear_fc1.weight",
        f"{layer}3.mlp.shared_experts.linear_fc2.weight",
    }


def test_what_a_mixer_leaves_out_is_not_on_disk(tmp_path: Path) -> None:
    tiny_hybrid("no norm, D a channel", normalization="LayerNorm").save_pretrained(tmp_path)
    assert "decoder.layers.0.mixer.norm.weight" not in names(tmp_path)
    assert "decoder.layers.0.mixer.in_proj.layer_norm_bias" in names(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("decoder.layers.0.mixer.D").shape == (64,)


def test_the_config_says_what_follows_from_the_pattern(tmp_path: Path) -> None:
    tiny_hybrid("everything").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_layers"], config["mamba_num_heads"]) == (6, 8)
    assert config["auto_map"] == hybrid.McoreHybridForCausalLM.auto_map


@pytest.mark.parametrize("place", ["disk", "cpu"])
@pytest.mark.parametrize("variant", HYBRIDS)
@torch.no_grad()
def test_layers_elsewhere_change_nothing(variant: str, place: str, tmp_path: Path) -> None:
    model = tiny_hybrid(variant)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embedding": "cpu", "model.rotary_pos_emb": "cpu", "output_layer": "cpu"}
    places |= {"model.decoder.layers": place, "model.decoder.final_norm": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "o")
    devices = {parameter.device.type for parameter in spread.model.decoder.layers.parameters()}
    assert devices == {"meta" if place == "disk" else "cpu"}
    inputs = padded(tokens(2, 9), [0, 4])
    assert torch.equal(spread(**inputs).logits, model(**inputs).logits)
    assert torch.equal(spread.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))


@torch.no_grad()
def test_a_map_made_for_little_memory_splits_no_layer(tmp_path: Path) -> None:
    model = tiny_hybrid("everything")
    expected, size = model(tokens(2, 9)).logits, sum(x.numel() * x.element_size() for x in model.parameters())
    places = infer_auto_device_map(
        model, {"cpu": int(0.7 * size)}, no_split_module_classes=list(model._no_split_modules)
    )
    split = {name for name in places if name.startswith("model.decoder.layers.") and name.count(".") > 3}
    assert not split and {"cpu", "disk"} == {str(place) for place in places.values()}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk")
    assert torch.equal(spread(tokens(2, 9)).logits, expected)


@pytest.mark.parametrize("variant", HYBRIDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing_and_padding(variant: str, reentrant: bool) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    gradients = []
    for checkpointing in (False, True):
        model = tiny_hybrid(variant).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_routers_add_their_losses_in_training() -> None:
    model, ids = tiny_hybrid("gpt of experts", moe_aux_loss_coeff=0.1), tokens(2, 9)
    without = model(ids, labels=ids)
    assert without.aux_loss is None
    trained = model.train()(ids, labels=ids)
    torch.testing.assert_close(trained.loss, without.loss + trained.aux_loss)
    assert trained.aux_loss > 0.1


def test_trainer_fine_tunes_a_saved_folder(tmp_path: Path) -> None:
    tiny_hybrid("everything").save_pretrained(tmp_path / "start")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=torch.bfloat16)
    run = trainer(model, rows([12] * 8), tmp_path / "run", max_steps=20)
    run.train()
    assert sum(losses(run)[-4:]) < 0.7 * sum(losses(run)[:4]), losses(run)
    run.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_lora_trains_and_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_peft, "MATRICES", ["in_proj", "out_proj", "linear_qkv", "linear_proj"])
    base = tiny_hybrid("attention")
    base.save_pretrained(tmp_path / "base")
    model = test_peft.tuned(base)
    assert len([x for x in model.parameters() if x.requires_grad]) == 2 * 4
    with torch.no_grad():
        expected = model(tokens(2, 9)).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    with torch.no_grad():
        assert torch.equal(again.eval()(tokens(2, 9)).logits, expected)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert names(tmp_path / "merged") == names(tmp_path / "base")
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(loaded(tokens(2, 9)).logits, expected, atol=1e-5, rtol=1e-5)
