"""Promise: transformers' own tests for models pass on the hybrid too.

As tests/test_transformers_suite.py, which says what is fetched and what is left out. Overridden is what takes every
layer for attention, every model for one of two layers, and every row of the table of names for one of every model.
"""

from __future__ import annotations

import inspect
import re
import unittest
from typing import Any, ClassVar, Unpack
from unittest.mock import patch

from test_transformers_suite import (
    ConfigTester,
    FSDPTesterMixin,
    Suite,
    TensorParallelTesterMixin,
    TinyModel,
    TrainingTesterMixin,
    modeling_auto,
    test_fsdp_mixin,
    test_tensor_parallel_mixin,
)
from tiny import EXPERTS, MIXER, tiny_hybrid_config
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs
from transformers_tests import test_modeling_common

from megahf.models.configuration_mcore_hybrid import McoreHybridConfig
from megahf.models.modeling_mcore_hybrid import (
    McoreHybridForCausalLM,
    McoreHybridForQuestionAnswering,
    McoreHybridForSequenceClassification,
    McoreHybridForTokenClassification,
    McoreHybridModel,
)

TABLES = {
    "MODEL_MAPPING_NAMES": McoreHybridModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": McoreHybridForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": McoreHybridForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": McoreHybridForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": McoreHybridForQuestionAnswering,
}


class TinyHybrid(TinyModel):
    """The tiny hybrid that the suite asks for; attributes have the suite's names."""

    causal_lm_class = McoreHybridForCausalLM

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.num_hidden_layers = len(options["hybrid_layer_pattern"])

    def get_config(self) -> McoreHybridConfig:
        sizes = {"vocab_size": self.vocab_size, "num_labels": self.num_labels, "max_position_embeddings": 512}
        return tiny_hybrid_config("mamba", **{**sizes, "bos_token_id": 1, "eos_token_id": 2, **self.options})


class HybridSuite(Suite):
    """What every kind of hybrid goes through."""

    all_model_classes = tuple(TABLES.values())

    def setUp(self) -> None:
        self.model_tester = TinyHybrid(self.options)
        own = {"hidden_size": 32, "num_attention_heads": 4, **MIXER, **self.options}
        self.config_tester = ConfigTester(self, config_class=McoreHybridConfig, **own)
        for table, model in TABLES.items():
            names = patch.dict(getattr(modeling_auto, table), {"mcore_hybrid": model.__name__})
            names.start()
            self.addCleanup(names.stop)
        for model in self.all_model_classes:
            annotations = inspect.unwrap(model.forward).__annotations__
            kwargs = patch.dict(annotations, {"kwargs": Unpack[TransformersKwargs]})
            kwargs.start()
            self.addCleanup(kwargs.stop)

    def test_attention_outputs(self) -> None:
        self.model_tester.num_hidden_layers = self.options["hybrid_layer_pattern"].count("*")  # that have weights
        super().test_attention_outputs()

    def test_reverse_loading_mapping(self) -> None:
        every = test_modeling_common.get_model_conversion_mapping

        def of_this_kind(model: PreTrainedModel, **kwargs: Any) -> list[Any]:
            """The rows of the table of names, which serves every kind of model, that name what this one has."""
            rows, names = every(model, **kwargs), model.state_dict()
            return [row for row in rows if any(re.search(row.target_patterns[0], name) for name in names)]

        with patch.object(test_modeling_common, "get_model_conversion_mapping", of_this_kind):
            super().test_reverse_loading_mapping()

    def test_num_layers_is_small(self) -> None:
        self.assertLessEqual(self.model_tester.num_hidden_layers, 4)  # one of each kind


class TestEverything(HybridSuite, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    """A layer of each kind."""

    options: ClassVar[dict[str, Any]] = {
        **EXPERTS,
        "hybrid_layer_pattern": "M*-E",
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }
    model_tester = None  # abstract in three of the mixins

    def setUp(self) -> None:
        super().setUp()
        for module, name in (
            (test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES"),
            (test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES"),
        ):
            types = patch.object(module, name, None)
            types.start()
            self.addCleanup(types.stop)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestMamba(HybridSuite, unittest.TestCase):
    """Mixers alone."""

    options: ClassVar[dict[str, Any]] = {"hybrid_layer_pattern": "MM"}
    has_attentions = False

    def setUp(self) -> None:
        super().setUp()
        for name, value in (
            ("_can_set_experts_implementation", lambda: False),  # there are no experts
            ("_keep_in_fp32_modules_strict", []),
        ):
            for model in self.all_model_classes:
                attribute = patch.object(model, name, value)
                attribute.start()
                self.addCleanup(attribute.stop)
