"""Promise: a saved LLaVA loads anywhere by transformers alone, images and all, under Megatron's own names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_remote_code
import torch
import transformers as T
from safetensors import safe_open
from test_remote_code import digests, load_fresh
from tiny_llava import batch, tiny_llava

import megahf
from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration, McoreLlavaModel

megahf.register()
# As for models of text, but asked with images.
FRESH = (
    test_remote_code.FRESH.replace('model(torch.load(src + "/ids.pt"))', 'model(**torch.load(src + "/inputs.pt"))')
    .replace("AutoModelForCausalLM", "AutoModelForImageTextToText")
    .replace('torch.load(src + "/ids.pt"), max_new_tokens=4', '**torch.load(src + "/inputs.pt"), max_new_tokens=4')
)


def test_a_folder_loads_and_saves_the_same_bytes_without_megahf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_remote_code, "FRESH", FRESH)
    model = tiny_llava("radio-g, hybrid")
    model.save_pretrained(tmp_path / "first")
    inputs = batch(model.config)
    torch.save(inputs, tmp_path / "first" / "inputs.pt")
    out = load_fresh(tmp_path / "first", "AutoModelForImageTextToText", tmp_path / "second")
    assert out["missing"] == out["unexpected"] == []
    with torch.no_grad():
        torch.testing.assert_close(out["outputs"], model(**inputs).logits, atol=0, rtol=0)
    generated = torch.load(tmp_path / "first" / "generated.pt")
    assert torch.equal(generated, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_both_classes_load_what_either_saved(tmp_path: Path) -> None:
    model = tiny_llava("cradio-g, tags")
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    base = T.AutoModel.from_pretrained(tmp_path / "whole")
    whole, info = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert (type(base), type(whole)) == (McoreLlavaModel, McoreLlavaForConditionalGeneration)
    assert info["missing_keys"] == {"output_layer.weight"}
    for name, weight in model.model.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight)
        assert torch.equal(whole.model.state_dict()[name], weight)
    auto_maps = [json.loads((tmp_path / at / "config.json").read_text())["auto_map"] for at in ("whole", "base")]
    assert auto_maps[0].keys() == auto_maps[1].keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}


def names(folder: Path) -> set[str]:
    """Of the weights of first layers, and of all that is in no layer."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name for name in file.keys() if ".layers.1." not in name}  # noqa: SIM118


LANGUAGE = {
    "language_model.embedding.word_embeddings.weight",
    "language_model.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
    "language_model.decoder.layers.0.self_attention.linear_qkv.weight",
    "language_model.decoder.layers.0.self_attention.linear_proj.weight",
    "language_model.decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
    "language_model.decoder.layers.0.mlp.linear_fc1.weight",
    "language_model.decoder.layers.0.mlp.linear_fc2.weight",
    "language_model.decoder.final_layernorm.weight",
    "language_model.output_layer.weight",
}


def both(*modules: str) -> set[str]:
    return {f"{module}{kind}" for module in modules for kind in ("weight", "bias")}


def test_names_on_disk_are_those_of_megatron(tmp_path: Path) -> None:
    tiny_llava("clip").save_pretrained(tmp_path)
    layer = "vision_model.decoder.layers.0."
    assert names(tmp_path) == LANGUAGE | both(
        "vision_model.ln_pre.",
        f"{layer}self_attention.linear_qkv.layer_norm_",
        f"{layer}self_attention.linear_qkv.",
        f"{layer}self_attention.linear_proj.",
        f"{layer}mlp.linear_fc1.layer_norm_",
        f"{layer}mlp.linear_fc1.",
        f"{layer}mlp.linear_fc2.",
    ) | {
        "vision_model.class_token",
        "vision_model.conv1.weight",
        "vision_model.position_embeddings.weight",
        "vision_projection.encoder.linear_fc1.weight",
        "vision_projection.encoder.linear_fc2.weight",
    }


def test_norms_that_are_modules_of_their_own_keep_their_names(tmp_path: Path) -> None:
    tiny_llava("internvit").save_pretrained(tmp_path)
    layer = "vision_model.decoder.layers.0."
    assert names(tmp_path) == LANGUAGE | both(
        "vision_model.conv1.",
        f"{layer}self_attention.linear_proj.",
        f"{layer}mlp.linear_fc1.",
        f"{layer}mlp.linear_fc2.",
    ) | {
        "vision_model.class_token",
        "vision_model.position_embeddings.weight",
        f"{layer}input_layernorm.weight",
        f"{layer}self_attention.linear_qkv.weight",
        f"{layer}self_attention.q_layernorm.weight",
        f"{layer}self_attention.k_layernorm.weight",
        f"{layer}pre_mlp_layernorm.weight",
        f"{layer}ls1",
        f"{layer}ls2",
        "vision_projection.encoder.linear_fc1.layer_norm_weight",
        "vision_projection.encoder.linear_fc1.weight",
        "vision_projection.encoder.linear_fc2.weight",
    }
