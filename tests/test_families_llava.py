"""Promise: transformers' Llava and InternVL come in with the same logits and go back with the same bytes.

And a LLaVA of ours is lowered to one of them where that is the same function; else every reason is said.
"""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from families import SIZES, change, config_of, refusal, stored
from pictures import picture, tokenizer
from safetensors.torch import load_file, save_file
from tiny import LLAMA, randomise, tiny
from tiny_llava import IMAGE, SHUFFLED, batch, tiny_llava, tiny_vision_config
from tiny_llava import TEXT as OURS_TEXT
from torch import Tensor

import megahf
from megahf import convert, verify
from megahf.families import FAMILIES
from megahf.families.composite import ORDER, USUAL
from megahf.models.image_processing_mcore_llava import McoreLlavaImageProcessor
from megahf.models.vision_kinds import STATISTICS

ENCODER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
SQUARE = {**ENCODER, "image_size": 16, "patch_size": 4}
PAIRS = {**ENCODER, "image_size": [16, 16], "patch_size": [4, 4]}
LARGE = {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False}


def llava(text: T.PretrainedConfig | None = None, layers: int = 2, **options: Any) -> T.LlavaConfig:
    vision = T.CLIPVisionConfig(**{**SQUARE, "num_hidden_layers": layers})
    text = text or T.LlamaConfig(**SIZES, tie_word_embeddings=False)
    usual = {"image_token_index": IMAGE, "vision_feature_layer": -1}
    return T.LlavaConfig(vision_config=vision, text_config=text, **{**usual, **options})


def intern_vl(text: T.PretrainedConfig | None = None, tied: bool = False, **vision: Any) -> T.InternVLConfig:
    encoder = T.InternVLVisionConfig(**{**PAIRS, "attention_bias": True, **vision})
    text = text or T.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    return T.InternVLConfig(vision_config=encoder, text_config=text, image_token_id=IMAGE, tie_word_embeddings=tied)


MODELS: dict[str, T.PretrainedConfig] = {
    "llava": llava(),
    "llava with the class token": llava(vision_feature_select_strategy="full", multimodal_projector_bias=False),
    "llava and qwen3, tied": llava(T.Qwen3Config(**SIZES, head_dim=12, tie_word_embeddings=True)),
    "internvl": intern_vl(),
    "internvl of 6B, tied": intern_vl(tied=True, **LARGE),
    "internvl and experts": intern_vl(
        T.Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    ),
}


@torch.no_grad()
def model_of(config: T.PretrainedConfig) -> T.PreTrainedModel:
    """transformers' model of `config`, random; zeros where Llava runs nothing."""
    model = T.AutoModelForImageTextToText.from_config(config, attn_implementation="eager", dtype=torch.float32)
    randomise(model)
    for name, parameter in model.named_parameters():
        if ".post_layernorm." in name:
            parameter.zero_()
    return model.eval()


def loaded(folder: Path) -> T.PreTrainedModel:
    """The model in `folder`, ours or transformers' own, without a word of complaint about its weights."""
    megahf.register()
    model, said = T.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(said.values()), said
    return model.eval()


@torch.no_grad()
def logits(model: T.PreTrainedModel) -> Tensor:
    """Logits of rows with several images, one and none, without those of padding."""
    kind = model.config.model_type
    if kind == "llava":
        places = 16 + (model.config.vision_feature_select_strategy == "full")
    else:
        places = 4 if kind == "internvl" else model.config.img_seq_len
    inputs = batch(SimpleNamespace(img_seq_len=places, image_token_id=IMAGE))
    del inputs["num_tiles"]
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def roundtrip(model: T.PreTrainedModel, tmp_path: Path, size: str = "5GB") -> Path:
    """Saves `model`, brings it into a folder of ours and lowers that again; gives the folder that it was saved in."""
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    model.save_pretrained(tmp_path / "new")
    loaded(tmp_path / "new").save_pretrained(theirs, max_shard_size=size)
    convert(theirs, ours, to="hf")
    expected = logits(model)
    assert expected.abs().max() > 1, "the logits are too small to tell a right model from a wrong one"
    torch.testing.assert_close(logits(loaded(ours)), expected, atol=1e-5, rtol=1e-5)
    convert(ours, back, to=model.config.model_type, max_shard_size=size)
    assert stored(back) == stored(theirs)
    again = loaded(back)
    assert type(again) is type(model)
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again), expected)
    return theirs


@pytest.mark.parametrize("case", MODELS)
def test_logits_and_bytes_survive_the_way_in_and_back(tmp_path: Path, case: str) -> None:
    roundtrip(model_of(MODELS[case]), tmp_path)


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_sharded_folders_go_both_ways(tmp_path: Path, kind: str) -> None:
    theirs = roundtrip(model_of(MODELS[kind]), tmp_path, "20KB")
    assert len(list(theirs.glob("*.safetensors"))) > 3


def test_the_names_of_every_version_are_read(tmp_path: Path) -> None:
    """transformers 5 has other names in memory than on disk, 4 had one more module in the image encoder."""
    model_of(MODELS["llava"]).save_pretrained(tmp_path / "today")
    weights = load_file(tmp_path / "today" / "model.safetensors")
    memory = {f"model.{name}".replace("language_model.model.", "language_model."): x for name, x in weights.items()}
    names = {
        "four": {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in weights.items()},
        "memory": {name.replace("model.language_model.lm_head", "lm_head"): x for name, x in memory.items()},
    }
    convert(tmp_path / "today", tmp_path / "ours", to="hf")
    for version, renamed in names.items():
        assert "vision_tower.embeddings.class_embedding" not in renamed
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.json").write_bytes((tmp_path / "today" / "config.json").read_bytes())
        save_file(renamed, tmp_path / version / "model.safetensors", metadata={"format": "pt"})
        loaded(tmp_path / version)
        convert(tmp_path / version, tmp_path / f"{version}_ours", to="hf")
        assert stored(tmp_path / f"{version}_ours") == stored(tmp_path / "ours")


@pytest.mark.parametrize("chosen", [-2, 2, [-2]])
def test_layers_after_the_one_whose_output_is_taken_are_left_out(tmp_path: Path, chosen: Any) -> None:
    """As with the published Llava, which takes that of the last but one."""
    model = model_of(llava(layers=3, vision_feature_layer=chosen))
    model.save_pretrained(tmp_path / "theirs")
    plan = convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    assert "of the encoder's 3 layers the output of layer 2 is taken: those after it are left out" in plan.notes
    ours = loaded(tmp_path / "ours")
    assert ours.config.vision_config.num_layers == 2
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", to="llava")
    torch.testing.assert_close(logits(loaded(tmp_path / "back")), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["llava", "internvl"])
def test_a_config_that_leaves_out_what_is_usual_means_the_same(tmp_path: Path, kind: str) -> None:
    config = llava(layers=3, vision_feature_layer=-2) if kind == "llava" else intern_vl()
    model_of(config).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "full", to="hf")
    said, usual = config_of(tmp_path / "theirs"), T.AutoConfig.for_model(kind).to_dict()
    for part in ("text_config", "vision_config"):
        default = T.AutoConfig.for_model(said[part]["model_type"]).to_dict()
        told = {
            key for key, value in said[part].items() if default.get(key, said) != value or key.endswith("_token_id")
        }
        said[part] = {key: said[part][key] for key in told}
    spare = {key for key, value in said.items() if usual.get(key, said) == value} - {"model_type", "dtype"}
    parts = {part: said[part] for part in ("text_config", "vision_config")}
    change(tmp_path / "theirs", *spare, **parts)
    assert "tie_word_embeddings" not in said["text_config"] and "vision_feature_layer" in spare
    convert(tmp_path / "theirs", tmp_path / "sparse", to="hf")
    assert config_of(tmp_path / "sparse") == config_of(tmp_path / "full")


def test_the_usual_sizes_are_those_of_transformers() -> None:
    for kind, sizes in USUAL.items():
        assert sizes.items() <= T.AutoConfig.for_model(kind).to_dict().items()


def test_output_embeddings_that_are_stored_are_not_tied(tmp_path: Path) -> None:
    """InternVL says nothing of them, which means tied; transformers unties what it finds to differ."""
    model = model_of(MODELS["internvl"])
    model.save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", "tie_word_embeddings")
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    ours = loaded(tmp_path / "ours")
    assert not ours.config.tie_word_embeddings
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-5, rtol=1e-5)


def test_every_setting_that_transformers_writes_is_known() -> None:
    for config in (llava(), intern_vl()):
        family = FAMILIES[config.model_type]
        assert set(config.to_dict()) <= family.keys
        assert set(config.vision_config.to_dict()) <= family.vision.keys


OF_64 = {"hidden_size": 128, "num_attention_heads": 2}  # Megatron's heads have 64 channels
TEXT = {**SIZES, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
THERE: dict[str, T.PretrainedConfig] = {
    "clip": T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**{**SQUARE, **OF_64}),
        text_config=T.LlamaConfig(**TEXT),
        image_token_index=8,
        vision_feature_layer=-1,
        multimodal_projector_bias=False,
    ),
    "internvit": T.InternVLConfig(
        vision_config=T.InternVLVisionConfig(**{**PAIRS, **OF_64}, attention_bias=True),
        text_config=T.Qwen2Config(**TEXT),
        image_token_id=8,
        tie_word_embeddings=False,
    ),
}


@pytest.mark.parametrize("case", THERE)
def test_megatron_is_written_and_read_back_to_the_bit(tmp_path: Path, case: str) -> None:
    model_of(THERE[case]).save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "words")
    convert(tmp_path / "theirs", tmp_path / "megatron", to="megatron", tp=2, divisible_by=16)
    told: dict[str, Any] = {"tokenizer": tmp_path / "words", "true_vocab_size": SIZES["vocab_size"]}
    convert(tmp_path / "megatron", tmp_path / "back", to=THERE[case].model_type, **told)
    assert stored(tmp_path / "back") == stored(tmp_path / "theirs")
    verify(tmp_path / "megatron", tmp_path / "back")


def test_what_megatron_has_no_type_for_is_refused_by_name(tmp_path: Path) -> None:
    config = llava()
    config.vision_config.layer_norm_eps = config.text_config.rms_norm_eps
    model_of(config).save_pretrained(tmp_path / "theirs")
    said = refusal(tmp_path / "theirs", tmp_path / "megatron", "megatron")
    assert "no --language-model-type of Megatron's is a language model of silu" in said
    assert "a projection of gelu with norm None and biases" in said


BIASED = {"projection_ffn_hidden_size": 32, "projection_add_bias_linear": True}
NORMED = {**BIASED, **SHUFFLED, "projection_normalization": "LayerNorm"}
QWEN = {**OURS_TEXT, "add_qkv_bias": True}
LOWERED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "clip and llama": ("llava", "clip", BIASED, "llama"),
    "internvit and qwen2": ("internvl", "internvit300M", {**NORMED, "text_config": QWEN}, "qwen2"),
    "scales about zero": (
        "internvl",
        "internvit300M",
        {
            **NORMED,
            "projection_layernorm_zero_centered_gamma": True,
            "text_config": {**OURS_TEXT, "layernorm_zero_centered_gamma": True},
        },
        "llama",
    ),
    "images in tiles": ("internvl", "internvit300M", {**NORMED, "use_tiling": True, "max_num_tiles": 4}, "llama"),
    "a window": ("llava", "clip", {**BIASED, "text_config": {**OURS_TEXT, "window_size": [5, 0]}}, "mistral"),
    "quick gelu": ("llava", "clip", {**BIASED, "projection_activation_func": "quick_gelu"}, "llama"),
}


@pytest.mark.parametrize("case", LOWERED)
def test_a_model_of_ours_is_lowered_to_the_same_function(tmp_path: Path, case: str) -> None:
    to, variant, options, language = LOWERED[case]
    model = tiny_llava(variant, **options)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", to=to)
    there = loaded(tmp_path / "theirs")
    assert type(there).__name__ == FAMILIES[to].architecture
    assert there.config.text_config.model_type == language
    torch.testing.assert_close(logits(there), logits(model), atol=1e-5, rtol=1e-5)


WIDE, SLIM = tiny_vision_config("clip", img_h=16, img_w=32), tiny_vision_config("clip", kv_channels=4)
LARGER = tiny_vision_config("internvit", num_attention_heads=3, layernorm_epsilon=1e-3)
NOBODYS = {**OURS_TEXT, "attention_output_gate": True, "qk_layernorm": True}
REFUSED_OUT: dict[str, tuple[str, str, dict[str, Any], tuple[str, ...]]] = {
    "another encoder": ("llava", "siglip, affine", {}, (
        "the encoder is siglip: it takes clip",
        "vision_projection_type is 'affine', in LlavaForConditionalGeneration 'mlp'",
    )),
    "a hybrid": ("internvl", "radio-g, hybrid", {}, (
        "the encoder is radio-g: it takes internvit300M or internvit",
        "its language model is a hybrid whose layers are",
        "projection_normalization is None, in InternVLForConditionalGeneration 'LayerNorm'",
        "projection_add_bias_linear is False, in InternVLForConditionalGeneration True",
        "pixel_shuffle is False, in InternVLForConditionalGeneration True",
    )),
    "a projection of another width": ("llava", "clip", {}, (
        "projection_ffn_hidden_size is 40, in LlavaForConditionalGeneration 32",
    )),
    "a gate, and patches joined": ("llava", "clip", {**BIASED, **SHUFFLED, "projection_gated_linear_unit": True}, (
        "projection_gated_linear_unit is True, in LlavaForConditionalGeneration False",
        "pixel_shuffle is True, in LlavaForConditionalGeneration False",
    )),
    "tags of tiles": ("llava", "clip", {**BIASED, "tile_tags": [[5, 6], [7, 8]]}, (
        "tile_tags is [[5, 6], [7, 8]], in LlavaForConditionalGeneration None",
    )),
    "another norm": ("internvl", "internvit300M", {**NORMED, "projection_normalization": "RMSNorm"}, (
        "projection_normalization is 'RMSNorm', in InternVLForConditionalGeneration 'LayerNorm'",
    )),
    "the larger form with another epsilon": ("internvl", "internvit", {**NORMED, "vision_config": LARGER}, (
        "norms have an epsilon of 0.001: those of queries and keys always have 1e-6 there",
    )),
    "no image token": ("llava", "clip", {**BIASED, "image_token_id": -200}, (
        "image_token_id is -200, and transformers looks it up among the 61 words",
    )),
    "images that are no squares": ("llava", "clip", {**BIASED, "vision_config": WIDE}, (
        "images are 16 x 32 pixels: transformers takes squares",
    )),
    "heads of their own size": ("llava", "clip", {**BIASED, "vision_config": SLIM}, (
        "kv_channels is 4, in CLIPVisionModel 8",
    )),
    "a language model of nobody's": (
        "llava", "clip", {**BIASED, "text_config": NOBODYS}, (
            "its language model is none of those that it is built with:",
            "\n  llama: attention_output_gate is True, in LlamaForCausalLM False; qk_layernorm is True, in",
            "\n  qwen3: attention_output_gate is True, in Qwen3ForCausalLM False\n",
            *(f"\n  {family.name}: " for family in ORDER),
        ),
    ),
    "a model of text": ("llama", "clip", {}, ("it is one that takes images, LlamaForCausalLM is a model of text",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_OUT)
def test_what_the_architecture_does_not_compute_is_refused_in_words(tmp_path: Path, case: str) -> None:
    to, variant, options, words = REFUSED_OUT[case]
    tiny_llava(variant, **options).save_pretrained(tmp_path / "ours")
    said = refusal(tmp_path / "ours", tmp_path / "theirs", to)
    assert [word for word in words if word not in said] == []


def test_a_model_of_text_does_not_become_one_that_takes_images(tmp_path: Path) -> None:
    tiny(**LLAMA).save_pretrained(tmp_path / "ours")
    said = refusal(tmp_path / "ours", tmp_path / "theirs", "internvl")
    assert "it is a model of text alone, InternVLForConditionalGeneration is one that takes images" in said


REFUSED_IN: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "another encoder": (
        "llava", {"vision_config": {"model_type": "siglip_vision_model"}},
        "model_type is 'siglip_vision_model'; built for clip_vision_model is 'clip_vision_model'",
    ),
    "another language model": (
        "llava", {"text_config": {"model_type": "gemma"}},
        "its language model is 'gemma', with which llava is not built",
    ),
    "no language model": ("llava", {"": {"text_config": None}}, "text_config is None, no config"),
    "several layers": (
        "llava", {"": {"vision_feature_layer": [-2, -1]}},
        "vision_feature_layer: it is [-2, -1] of an encoder of 2 layers; Megatron takes the output of one layer",
    ),
    "no layer": ("internvl", {"": {"vision_feature_layer": -3}}, "it is -3 of an encoder of 2 layers"),
    "a strategy": ("llava", {"": {"vision_feature_select_strategy": "cls"}}, "it is 'cls'; built are default and full"),
    "patches cut off": ("llava", {"vision_config": {"image_size": 18}}, "images of 18 pixels are no whole number of"),
    "rectangles": ("internvl", {"vision_config": {"image_size": [16, 32]}}, "[16, 32]; built are squares"),
    "half of the larger form": (
        "internvl", {"vision_config": {"use_qk_norm": True}},
        "{'use_qk_norm': True, 'norm_type': 'layer_norm', 'attention_bias': True}; built are",
    ),
    "the larger form with another epsilon": (
        "internvl", {"vision_config": {**LARGE, "layer_norm_eps": 1e-5}},
        "layer_norm_eps: norms have an epsilon of 1e-05: those of queries and keys always have 1e-6 there",
    ),
    "one more norm": (
        "internvl", {"vision_config": {"use_mean_pooling": False}},
        "use_mean_pooling is False; built for internvl_vision is True",
    ),
    "a ratio": ("internvl", {"": {"downsample_ratio": 0.25}}, "downsample_ratio is 0.25; built for internvl is 0.5"),
    "a language model's own": (
        "llava", {"text_config": {"hidden_act": "mish"}}, "hidden_act cannot be read: 'mish' is not built",
    ),
    "weights of another size": ("internvl", {"vision_config": {"intermediate_size": 44}}, "shapes do not fit"),
    "one layer more": ("llava", {"vision_config": {"num_hidden_layers": 3}}, "missing weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_IN)
def test_what_megatron_does_not_compute_is_refused_in_words(tmp_path: Path, saved: dict[str, Path], case: str) -> None:
    kind, changes, words = REFUSED_IN[case]
    theirs = copytree(saved[kind], tmp_path / "theirs")
    before = config_of(theirs)
    change(theirs, **changes.get("", {}), **{part: {**before[part], **told} for part, told in changes.items() if part})
    assert words in refusal(theirs, tmp_path / "ours")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, to be copied."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("llava", "internvl")}
    for kind, folder in folders.items():
        model_of(MODELS[kind]).save_pretrained(folder)
    return folders


def test_reasons_against_all_parts_are_given_at_once(tmp_path: Path, saved: dict[str, Path]) -> None:
    theirs = copytree(saved["llava"], tmp_path / "theirs")
    parts = {part: {**config_of(theirs)[part], "hidden_act": "mish"} for part in ("text_config", "vision_config")}
    said = refusal(change(theirs, **parts, projector_hidden_act="mish"), tmp_path / "ours")
    assert "config.json, text_config" in said and "config.json, vision_config" in said
    assert "projector_hidden_act cannot be read" in said


def test_llavas_processor_makes_the_pixels_and_tokens_that_ours_does(tmp_path: Path) -> None:
    config = {**BIASED, "image_token_id": 8, "drop_vision_class_token": True}
    tiny_llava("clip", **config).save_pretrained(tmp_path / "ours")
    tokenizer().save_pretrained(tmp_path / "words")
    convert(tmp_path / "ours", tmp_path / "theirs", to="llava", tokenizer=tmp_path / "words")
    mean, std = STATISTICS["clip"]
    own = McoreLlavaImageProcessor(size={"height": 16, "width": 16}, image_mean=mean, image_std=std)
    made = T.AutoProcessor.from_pretrained(tmp_path / "theirs", backend="pil")
    got = made(images=picture(), text="<image> what is this", return_tensors="pt")
    torch.testing.assert_close(got["pixel_values"], own(picture(), return_tensors="pt")["pixel_values"])
    assert (got["input_ids"] == 8).sum() == 16
    with torch.no_grad():
        expected, found = (loaded(tmp_path / place)(**got).logits for place in ("ours", "theirs"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("to", "variant", "options", "words"), [
    ("llava", "clip", {**BIASED, "use_tiling": True}, "images are cut into up to 1 tiles"),
    ("llava", "clip", BIASED, "<image> is token 8 of the tokenizer and 60 of the model"),
    ("internvl", "internvit300M", NORMED, "internvl's own puts tags around images"),
])  # fmt: skip
def test_where_a_processor_would_do_otherwise_there_is_none_and_it_is_said(
    tmp_path: Path, to: str, variant: str, options: dict[str, Any], words: str
) -> None:
    tiny_llava(variant, **options).save_pretrained(tmp_path / "ours")
    tokenizer().save_pretrained(tmp_path / "words")
    plan = convert(tmp_path / "ours", tmp_path / "theirs", to=to, tokenizer=tmp_path / "words")
    assert any(words in note for note in plan.notes)
    assert not (tmp_path / "theirs" / "processor_config.json").exists()
