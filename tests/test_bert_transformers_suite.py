"""Promise: transformers' own tests for models pass on BERT too.

As tests/test_transformers_suite.py, which says what is fetched and what is left out; BERT generates nothing, so that
GenerationTesterMixin is left out as well, and so are the mixins for several processes. Inputs are the suite's own for
encoders, with token types.
"""

from __future__ import annotations

import inspect
import unittest
from typing import Any, ClassVar, Unpack
from unittest.mock import patch

import torch
from test_transformers_suite import (
    ConfigTester,
    ModelTesterMixin,
    TrainingTesterMixin,
    ids_tensor,
    modeling_auto,
    own_renamings,
    test_modeling_common,
)
from tiny import BERTS, tiny_bert_config
from transformers.utils import TransformersKwargs

from megahf.models.configuration_mcore_bert import McoreBertConfig
from megahf.models.modeling_mcore_bert import (
    McoreBertForMaskedLM,
    McoreBertForPreTraining,
    McoreBertForSequenceClassification,
    McoreBertForTokenClassification,
    McoreBertModel,
)

TABLES = {
    "MODEL_MAPPING_NAMES": McoreBertModel,
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES": McoreBertForPreTraining,
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": McoreBertForMaskedLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": McoreBertForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": McoreBertForTokenClassification,
}


class TinyBert:
    """The tiny BERT and inputs that the suite asks for; attributes have the suite's names."""

    causal_lm_class = McoreBertForMaskedLM  # which the mixin for training takes
    batch_size, seq_length, is_training, num_labels = 3, 7, True, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def get_config(self) -> McoreBertConfig:
        sizes = {"vocab_size": self.vocab_size, "num_labels": self.num_labels, "max_position_embeddings": 512}
        return tiny_bert_config(**{**sizes, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[McoreBertConfig, dict[str, torch.Tensor]]:
        config, ids = self.get_config(), ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        inputs = {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}
        if config.num_tokentypes:
            inputs["token_type_ids"] = ids_tensor([self.batch_size, self.seq_length], config.num_tokentypes)
        return config, inputs


class BertSuite(ModelTesterMixin):
    """What every kind of BERT goes through."""

    options: ClassVar[dict[str, Any]]
    test_can_init_all_missing_weights_before_2023 = True  # else asked of files with a newer copyright line only
    all_model_classes = tuple(TABLES.values())

    model_tester: TinyBert

    def setUp(self) -> None:
        self.model_tester = TinyBert(self.options)
        self.config_tester = ConfigTester(self, config_class=McoreBertConfig, hidden_size=32, num_attention_heads=4)
        for table, model in TABLES.items():
            names = patch.dict(getattr(modeling_auto, table), {"mcore_bert": model.__name__})
            names.start()
            self.addCleanup(names.stop)
        # The suite asks for attention weights where the annotation of **kwargs names them as an object, not in words.
        for model in self.all_model_classes:
            annotations = inspect.unwrap(model.forward).__annotations__
            kwargs = patch.dict(annotations, {"kwargs": Unpack[TransformersKwargs]})
            kwargs.start()
            self.addCleanup(kwargs.stop)
        without = property(lambda config: None, lambda config, tokens: None)
        for patched in (
            patch.object(test_modeling_common, "get_model_conversion_mapping", own_renamings),
            # The suite gives a window to every model that has a word for it; this one refuses it, whatever it is.
            patch.object(McoreBertConfig, "sliding_window", without),
        ):
            patched.start()
            self.addCleanup(patched.stop)

    def _prepare_for_class(
        self, inputs: dict[str, torch.Tensor], model: type, return_labels: bool = False
    ) -> dict[str, torch.Tensor]:
        """As the suite's, which knows the labels of transformers' own classes for pre-training alone."""
        prepared: dict[str, torch.Tensor] = super()._prepare_for_class(inputs, model, return_labels=return_labels)
        if return_labels and model is McoreBertForPreTraining:
            prepared["labels"] = torch.zeros_like(inputs["input_ids"])
            prepared["next_sentence_label"] = torch.zeros(len(inputs["input_ids"]), dtype=torch.long)
        return prepared


class TestBothHeads(BertSuite, TrainingTesterMixin, unittest.TestCase):
    """Masked words and pairs of sentences, learned positions."""

    options = BERTS["both heads"]
    model_tester = None  # abstract in one of the mixins

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestMaskedWords(BertSuite, unittest.TestCase):
    """No binary head and no token types."""

    options = BERTS["masked words"]


class TestRopeAndSinks(BertSuite, unittest.TestCase):
    """RoPE, RMSNorm, a gated MLP, learned sinks."""

    options = BERTS["rope and sinks"]
