"""Promise: a LLaVA that cannot be, or images that do not fit its tokens, are refused with the numbers and a remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_llava import (
    HYBRID,
    IMAGE,
    SHUFFLED,
    TAGS,
    TEXT,
    pixels,
    row,
    tiny_llava,
    tiny_llava_config,
    tiny_vision_config,
)

CONFIGURATIONS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "merging encoder": ({"conv_merging": True}, ["conv_merging", "clip does not", "must be false"]),
    "projection": ({"vision_projection_type": "qformer"}, ["'qformer'", "mlp, affine"]),
    "norm": ({"projection_normalization": "BatchNorm"}, ["'BatchNorm'", "LayerNorm, RMSNorm"]),
    "language model": ({"text_config": {"model_type": "llama"}}, ["'llama'", "mcore_gpt, mcore_hybrid"]),
    "learned positions": (
        {"text_config": {**TEXT, "position_embedding_type": "learned_absolute"}},
        ["learned_absolute", "one learned position", "rope or yarn or none"],
    ),
    "further tokens": ({"text_config": {**TEXT, "mtp_num_layers": 1}}, ["mtp_num_layers", "must be None"]),
    "multiplier": ({"text_config": {**HYBRID, "mup_embedding_mult": 2.0}}, ["mup_embedding_mult", "must be 1.0"]),
    "tying": ({"tie_word_embeddings": True}, ["is True", "is False", "the same"]),
    "shuffled class token": ({"pixel_shuffle": True}, ["1 class tokens", "drop_vision_class_token must be true"]),
    "odd patches": (
        {**SHUFFLED, "vision_config": tiny_vision_config("clip", img_h=12, img_w=12)},
        ["two by two", "3 x 3 patches"],
    ),
    "oblong": (
        {**SHUFFLED, "vision_config": tiny_vision_config("clip", img_h=8)},
        ["square", "2 x 4 patches"],
    ),
    "tags of several lengths": ({"tile_tags": [[1, 2], [3]]}, ["lists of [1, 2] tokens", "as many tokens"]),
    "thumbnail's tag alone": ({"tile_tags": [[1, 2]]}, ["1 lists", "one for the thumbnail"]),
    "tag outside the vocabulary": ({"tile_tags": [[1], [61]]}, ["token 61", "vocabulary 61"]),
}
ENCODERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "transformers' own": ({"vision_model_type": "hf://google/siglip"}, ["hf://google/siglip", "clip, siglip"]),
    "another of Megatron's": ({"vision_model_type": "pixtral-vit"}, ["'pixtral-vit'", "not built here", "radio-g"]),
    "unknown": ({"vision_model_type": "vit"}, ["'vit'", "no encoder of Megatron's", "internvit300M"]),
    "size": ({"img_h": 18}, ["img_h is 18", "multiple of patch_dim 4"]),
    "class tokens": ({"class_token_len": 2}, ["class_token_len is 2", "clip", "must be 1"]),
    "table of positions": ({"vision_model_type": "radio", "max_img_h": 2}, ["max_img_h is 2", "at least one patch"]),
    "groups": ({"num_query_groups": 1}, ["num_query_groups is 1", "must be 3"]),
    "norms of heads": ({"qk_layernorm": True}, ["qk_layernorm is True", "clip", "False"]),
    "activation": ({"activation_func": "tanh"}, ["'tanh'", "quick_gelu"]),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_a_configuration_without_a_model_is_refused(case: str) -> None:
    changes, words = CONFIGURATIONS[case]
    with pytest.raises((ValueError, StrictDataclassError)) as refusal:
        tiny_llava_config(**changes)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_that_there_is_not_is_refused(case: str) -> None:
    changes, words = ENCODERS[case]
    with pytest.raises((ValueError, StrictDataclassError)) as refusal:
        tiny_vision_config("clip", **changes)
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize(("places", "tiles"), [(17, 2), (34, 1), (16, 1), (0, 1), (17, 0)])
def test_places_that_are_not_those_of_the_tiles_are_refused(places: int, tiles: int) -> None:
    ids = torch.cat((row(tiny_llava_config(), 3), torch.full((1, places), IMAGE)), dim=1)
    images = {"pixel_values": pixels(tiles)} if tiles else {}
    with pytest.raises(
        ValueError, match=rf"{places} image tokens \(60\), but {tiles} tiles .* {tiles} x 17 = {17 * tiles} "
    ):
        tiny_llava()(ids, **images)


@pytest.mark.parametrize("shape", [(1, 3, 16, 20), (1, 3, 32, 32), (1, 1, 16, 16), (3, 16, 16)])
@pytest.mark.parametrize("variant", ["clip", "radio, gate"])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...], variant: str) -> None:
    with pytest.raises(ValueError) as refusal:
        tiny_llava(variant).get_image_features(torch.zeros(shape))
    for word in (str(list(shape)), "[tiles, 3, 16, 16]", "16 x 16 pixels"):
        assert word in str(refusal.value)


@pytest.mark.parametrize("num_tiles", [[1, 1], [4], [0, 3], [2, 2]])
def test_numbers_of_tiles_that_are_not_the_images_are_refused(num_tiles: list[int]) -> None:
    model = tiny_llava("cradio-g, tags")
    with pytest.raises(ValueError) as refusal:
        model.get_image_features(pixels(3 if num_tiles != [4] else 4), num_tiles)
    assert str(num_tiles) in str(refusal.value)
    assert f"1 to {len(TAGS)} an image" in str(refusal.value)


def test_tags_need_numbers_of_tiles() -> None:
    with pytest.raises(ValueError, match="num_tiles is needed for 3 tiles"):
        tiny_llava("cradio-g, tags").get_image_features(pixels(3))


def test_vectors_cannot_say_where_an_image_token_without_a_vector_is() -> None:
    model = tiny_llava(image_token_id=-200)
    with pytest.raises(ValueError, match=r"image_token_id -200 .* images need input_ids"):
        model(inputs_embeds=torch.zeros(1, 17, 32), pixel_values=pixels(1))
