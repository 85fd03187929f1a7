"""Promise: on the same weights a LLaVA gives the logits of transformers' own models, to 1e-5.

transformers' Llava (with CLIP), InternVL (in both forms of InternViT) and SigLIP are built small with random weights;
these are packed into Megatron's layout here, by hand and not by the project's tables.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from test_model_vs_transformers import HF_LLAMA, pack_llama, pack_qkv
from tiny import randomise
from tiny_llava import IMAGE, SHUFFLED, VISION, batch, pixels, tiny_llava_config, tiny_vision_config
from torch import Tensor

from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration
from megahf.models.vision import CLIPViTModel

Weights = dict[str, Tensor]
THEIRS: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
SQUARE = {**THEIRS, "image_size": 16, "patch_size": 4}
CLIP = {
    "embeddings.class_embedding": "class_token",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding": "position_embeddings",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "self_attn.out_proj": "self_attention.linear_proj",
    "layer_norm1": "self_attention.linear_qkv_layernorm",
    "layer_norm2": "mlp.linear_fc1_layernorm",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
    "self_attn.": "self_attention.",
}
INTERN = {
    "embeddings.cls_token": "class_token",
    "embeddings.patch_embeddings.projection": "conv1",
    "embeddings.position_embeddings": "position_embeddings.weight",
    "attention.projection_layer": "self_attention.linear_proj",
    "attention.q_norm": "self_attention.q_layernorm",
    "attention.k_norm": "self_attention.k_layernorm",
    "layernorm_before": "input_layernorm",
    "layernorm_after": "pre_mlp_layernorm",
    "lambda_": "ls",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
    "attention.": "self_attention.",
}


def pack_encoder(theirs: Weights, names: dict[str, str], heads: int = 3) -> Weights:
    """An encoder's weights by our names, queries, keys and values head by head in one matrix."""
    ours: Weights = {}
    for name, weight in theirs.items():
        name = name.removeprefix("vision_model.")
        for old, new in names.items():
            if old in name:
                name = name.replace(old, new)
                break
        name = name.replace("encoder.layers.", "decoder.layers.").replace("encoder.layer.", "decoder.layers.")
        ours[name] = weight
    for name in [name for name in ours if ".q_proj." in name]:
        query, key, value = (ours.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv")
        ours[name.replace("q_proj", "linear_qkv")] = pack_qkv(query, key, value, groups=heads)
    if "class_token" in ours:
        ours["class_token"] = ours["class_token"].view(1, 1, -1)
    ours["position_embeddings.weight"] = ours["position_embeddings.weight"].flatten(0, -2)
    return ours


def pack(model: T.PreTrainedModel, names: dict[str, str], projector: dict[str, str], **options: Any) -> Weights:
    """All weights of Llava or InternVL by our run time names."""
    theirs = model.state_dict()

    def part(prefix: str) -> Weights:
        return {name.removeprefix(prefix): x for name, x in theirs.items() if name.startswith(prefix)}

    ours = {
        f"model.vision_model.{k}": x for k, x in pack_encoder(part("model.vision_tower."), names, **options).items()
    }
    for kind in ("weight", "bias"):
        ours.pop(f"model.vision_model.ln_post.{kind}", None)  # CLIP's, which Llava never runs
    for name, weight in part("model.multi_modal_projector.").items():
        module, kind = name.rsplit(".", 1)
        ours[f"model.vision_projection.encoder.{projector[module]}.{kind}"] = weight
    language = pack_llama(part("model.language_model."), prefix="")
    ours |= {f"model.language_model.{name}": weight for name, weight in language.items()}
    return {**ours, "output_layer.weight": theirs["lm_head.weight"]}


PROJECTOR = {"linear_1": "linear_fc1", "linear_2": "linear_fc2", "layer_norm": "linear_fc1_layernorm"}
COMMON: dict[str, Any] = {"projection_ffn_hidden_size": 32, "projection_add_bias_linear": True}


def same_logits(theirs: T.PreTrainedModel, weights: Weights, config: Any) -> None:
    """A batch of rows with several images, one and none; padding's logits are nobody's."""
    model = McoreLlavaForConditionalGeneration(config).eval()
    model.load_state_dict(weights, strict=True)
    inputs = batch(config)
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = model(**inputs).logits[kept]
        inputs.pop("num_tiles")
        expected = theirs(**inputs).logits[kept]
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def text_config() -> T.LlamaConfig:
    return T.LlamaConfig(**HF_LLAMA, rms_norm_eps=1e-5, tie_word_embeddings=False)


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_llava_with_the_class_token_and_without(strategy: str) -> None:
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**SQUARE, hidden_act="quick_gelu"),
        text_config=text_config(),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    theirs = randomise(T.LlavaForConditionalGeneration(config)).eval()
    ours = tiny_llava_config("clip", **COMMON, drop_vision_class_token=strategy == "default")
    same_logits(theirs, pack(theirs, CLIP, PROJECTOR), ours)


@pytest.mark.parametrize("form", ["internvit300M", "internvit"])
def test_internvl_in_both_forms_of_its_encoder(form: str) -> None:
    large = form == "internvit"
    vision = T.InternVLVisionConfig(
        **{**SQUARE, "image_size": [16, 16], "patch_size": [4, 4]},
        use_qk_norm=large,
        attention_bias=not large,
        norm_type="rms_norm" if large else "layer_norm",
        layer_norm_eps=1e-6,
    )
    config = T.InternVLConfig(
        vision_config=vision, text_config=text_config(), image_token_id=IMAGE, tie_word_embeddings=False
    )
    theirs = randomise(T.InternVLForConditionalGeneration(config)).eval()
    normed = {
        "projection_normalization": "LayerNorm",
        "vision_config": tiny_vision_config(form, **VISION, layernorm_epsilon=1e-6),
    }
    ours = tiny_llava_config(form, **{**COMMON, **SHUFFLED, **normed})
    same_logits(theirs, pack(theirs, INTERN, PROJECTOR), ours)


@torch.no_grad()
def test_siglip_with_its_last_norm() -> None:
    theirs = randomise(T.SiglipVisionModel(T.SiglipVisionConfig(**SQUARE, vision_use_head=False))).eval()
    ours = CLIPViTModel(tiny_vision_config("siglip")).eval()
    ours.load_state_dict(pack_encoder(theirs.state_dict(), CLIP), strict=True)
    expected, found = (model(pixel_values=pixels(3)).last_hidden_state for model in (theirs, ours))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
