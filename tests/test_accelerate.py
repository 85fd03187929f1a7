"""Promise: the model may be spread over memory and disk, or compiled, and says the same.

Without a GPU: layers on the CPU and on disk, weights brought from the CPU when they are needed, `torch.compile`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model, infer_auto_device_map
from tiny import LLAMA, MIXTURES, VARIANTS, tiny, tiny_hybrid, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel, StaticCache

import megahf

megahf.register()

SPREAD = {
    "model.embedding": "cpu",
    "model.rotary_pos_emb": "cpu",
    "model.decoder.layers.0": "disk",
    "model.decoder.layers.1": "cpu",
    "model.decoder.final_layernorm": "cpu",
    "output_layer": "cpu",
}
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize("variant", ["gpt2", "llama", "window and sinks"])
@torch.no_grad()
def test_layers_on_disk_change_nothing(variant: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    model = tiny(**VARIANTS[variant])
    model.save_pretrained(tmp_path / "model")
    places = {name: place for name, place in SPREAD.items() if variant != "gpt2" or name != "model.rotary_pos_emb"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=disk)
    layers = spread.model.decoder.layers
    assert {parameter.device.type for parameter in layers[0].parameters()} == {"meta"}
    assert {parameter.device.type for parameter in layers[1].parameters()} == {"cpu"}
    assert torch.equal(spread(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert torch.equal(spread.generate(tokens(2, 9), **GREEDY), model.generate(tokens(2, 9), **GREEDY))


MODELS = {**VARIANTS, **MIXTURES}
SPREAD_TOO = ["latents", *MIXTURES, "hybrid everything", "hybrid latents", "hybrid mamba 1"]


def build(name: str) -> PreTrainedModel:
    """The model, with biases of experts' scores that make a difference."""
    hybrid = name.removeprefix("hybrid ")
    model = tiny(**MODELS[name]) if hybrid == name else tiny_hybrid(hybrid)
    for buffer, values in model.named_buffers():
        if buffer.endswith("expert_bias"):
            values.copy_(torch.linspace(-0.3, 0.3, len(values)))
    return model


@pytest.mark.parametrize("name", SPREAD_TOO)
@torch.no_grad()
def test_experts_latents_and_mixers_on_disk_change_nothing(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    whole = ["embedding", "rotary_pos_emb", "decoder.final_layernorm", "decoder.final_norm"]
    places = {"output_layer": "cpu", "model.mtp": "disk", **{f"model.{part}": "cpu" for part in whole}}
    places |= {f"model.decoder.layers.{layer}": "disk" for layer in range(model.config.num_layers)}
    places = {part: place for part, place in places.items() if part in dict(model.named_modules())}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert all(parameter.is_meta for parameter in spread.model.decoder.layers.parameters())
    assert torch.equal(spread(tokens(2, 9)).logits, model(tokens(2, 9)).logits)
    assert torch.equal(spread.generate(tokens(2, 9), **GREEDY), model.generate(tokens(2, 9), **GREEDY))
    spread.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SPREAD_TOO)
@torch.no_grad()
def test_each_module_alone_asks_for_its_weights(name: str) -> None:
    expected, offloaded = build(name)(tokens(2, 9)).logits, build(name)
    cpu_offload(offloaded, execution_device="cpu", offload_buffers=True)  # weights are there while a module is called
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(offloaded(tokens(2, 9)).logits, expected)


@torch.no_grad()
def test_a_map_made_for_little_memory_splits_no_layer(tmp_path: Path) -> None:
    model = tiny(**VARIANTS["window and sinks"], num_layers=6)
    expected, size = model(tokens(2, 9)).logits, sum(x.numel() * x.element_size() for x in model.parameters())
    memory = {"cpu": int(0.7 * size)}
    places = infer_auto_device_map(model, memory, no_split_module_classes=list(model._no_split_modules))
    split = {name for name in places if name.startswith("model.decoder.layers.") and name.count(".") > 3}
    assert not split and {"cpu", "disk"} == {str(place) for place in places.values()}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "disk")
    assert torch.equal(spread(tokens(2, 9)).logits, expected)


@torch.no_grad()
def test_an_automatic_map_loads_a_saved_folder(tmp_path: Path) -> None:
    model = tiny(**LLAMA, num_layers=6)
    model.save_pretrained(tmp_path / "model")
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(spread(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


@pytest.mark.parametrize("variant", MIXTURES)
@torch.no_grad()
def test_experts_and_latents_are_one_graph(variant: str) -> None:
    model = tiny(**MIXTURES[variant])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens(2, 9)).logits, model(tokens(2, 9)).logits, rtol=1e-4, atol=1e-5)


COMPILED = {"llama": LLAMA, "latents and experts": {**MIXTURES["latents and experts"], "mtp_num_layers": None}}


@pytest.mark.parametrize("variant", COMPILED)
@torch.no_grad()
def test_compiled_decoding_says_the_same(variant: str, inductor: None) -> None:
    model, whole = tiny(**COMPILED[variant], num_layers=1).double(), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16)
    model(whole[:, :8], past_key_values=cache)
    for end in range(9, 13):
        found = compiled(whole[:, end - 1 : end], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(found, model(whole[:, :end]).logits[:, -1], rtol=1e-4, atol=1e-5)
