"""Promise: transformers' own tests for models pass on LLaVA too.

As tests/test_transformers_suite.py, which says what is fetched and what is left out; the mixins for several processes
are left out as well. Rows have one image each, as the suite's own for models of images and text.
"""

from __future__ import annotations

import inspect
import unittest
from typing import Any, ClassVar, Unpack
from unittest.mock import patch

import torch
from test_transformers_suite import (
    ConfigTester,
    GenerationTesterMixin,
    ModelTesterMixin,
    TrainingTesterMixin,
    ids_tensor,
    modeling_auto,
    own_renamings,
    test_modeling_common,
)
from tiny_llava import HYBRID, TEXT, tiny_llava_config
from transformers.utils import TransformersKwargs

from megahf.models.configuration_mcore_llava import McoreLlavaConfig
from megahf.models.modeling_mcore import McorePreTrainedModel
from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration, McoreLlavaModel

TABLES = {
    "MODEL_MAPPING_NAMES": McoreLlavaModel,
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": McoreLlavaForConditionalGeneration,
}


class TinyLlava:
    """The tiny LLaVA and inputs that the suite asks for; attributes have the suite's names."""

    conditional_generation_class = causal_lm_class = McoreLlavaForConditionalGeneration
    batch_size, is_training = 7, True  # one of the suite's tests makes rows up where there are fewer
    hidden_size, num_attention_heads, vocab_size = 32, 4, 99
    image_token_id = 6  # among the words that stay when the suite takes some away
    vision_config: ClassVar[dict[str, int]] = {"num_hidden_layers": 2}

    def __init__(self, variant: str, text: dict[str, Any]) -> None:
        self.variant, self.text = variant, text
        self.num_hidden_layers = self.get_config().text_config.num_layers
        self.seq_length = 7 + self.get_config().img_seq_len

    def get_config(self) -> McoreLlavaConfig:
        words = {"vocab_size": self.vocab_size, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
        changes = {"text_config": {**self.text, **words}, "image_token_id": self.image_token_id}
        return tiny_llava_config(self.variant, **changes)

    def prepare_config_and_inputs_for_common(self) -> tuple[McoreLlavaConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        ids[ids == self.image_token_id] += 1
        ids[:, 1 : 1 + config.img_seq_len] = self.image_token_id
        pixels = torch.rand(self.batch_size, 3, config.vision_config.img_h, config.vision_config.img_w)
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class LlavaSuite(ModelTesterMixin, GenerationTesterMixin):
    """What every kind of LLaVA goes through."""

    variant: ClassVar[str]
    text: ClassVar[dict[str, Any]] = TEXT
    test_can_init_all_missing_weights_before_2023 = True  # else asked of files with a newer copyright line only
    all_model_classes = tuple(TABLES.values())
    _is_composite = True
    additional_model_inputs: ClassVar[list[str]] = ["pixel_values"]

    model_tester: TinyLlava

    def setUp(self) -> None:
        self.model_tester = TinyLlava(self.variant, self.text)
        self.config_tester = ConfigTester(self, config_class=McoreLlavaConfig, has_text_modality=False)
        for table, model in TABLES.items():
            names = patch.dict(getattr(modeling_auto, table), {"mcore_llava": model.__name__})
            names.start()
            self.addCleanup(names.stop)
        # The suite asks for attention weights where the annotation of **kwargs names them as an object, not in words.
        for model in self.all_model_classes:
            annotations = inspect.unwrap(model.forward).__annotations__
            kwargs = patch.dict(annotations, {"kwargs": Unpack[TransformersKwargs]})
            kwargs.start()
            self.addCleanup(kwargs.stop)
        for patched in (
            patch.object(test_modeling_common, "get_model_conversion_mapping", own_renamings),
            # The suite takes every model of a class to be made alike; these have no experts.
            patch.object(McorePreTrainedModel, "_can_set_experts_implementation", classmethod(lambda cls: False)),
            patch.object(McorePreTrainedModel, "_keep_in_fp32_modules_strict", []),
        ):
            patched.start()
            self.addCleanup(patched.stop)


class TestClip(LlavaSuite, TrainingTesterMixin, unittest.TestCase):
    """CLIP with its class token, in front of a dense GPT."""

    variant = "clip"
    model_tester = None  # abstract in one of the mixins

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_training_overfit(self) -> None:
        self.model_tester.image_token_id = -200  # it trains on random words without images: none stands for one
        super().test_training_overfit()


class TestRadioAndHybrid(LlavaSuite, unittest.TestCase):
    """RADIO in front of a hybrid."""

    variant = "radio, gate"
    text = HYBRID

    def test_attention_outputs(self) -> None:
        self.model_tester.num_hidden_layers = HYBRID["hybrid_layer_pattern"].count("*")  # that have weights
        super().test_attention_outputs()

    def test_num_layers_is_small(self) -> None:
        self.assertLessEqual(self.model_tester.num_hidden_layers, 3)  # one of each kind
