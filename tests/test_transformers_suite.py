"""Promise: transformers' own tests for models pass on ours: what upstream's Llama passes, these classes pass.

The tests come from transformers' source distribution (`fetch_transformers_tests.py`), in the installed version.
PipelineTesterMixin is left out: all its tests load tiny models from the Hub, which knows none of this architecture
(tests/test_pipeline.py is ours). What is skipped the suite skips itself, as for Llama: what needs a GPU, more than two
cores or a package that is not installed, and what asks after parts that a decoder of text has not. None is overridden.
"""

from __future__ import annotations

import inspect
import re
import sys
import unittest
from pathlib import Path
from typing import Any, ClassVar, Unpack
from unittest.mock import patch

import torch
import transformers
from tiny import LLAMA, MIXTURES, tiny_config
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import modeling_auto
from transformers.utils import TransformersKwargs

from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.modeling_mcore import McorePreTrainedModel
from megahf.models.modeling_mcore_gpt import (
    McoreGPTForCausalLM,
    McoreGPTForQuestionAnswering,
    McoreGPTForSequenceClassification,
    McoreGPTForTokenClassification,
    McoreGPTModel,
)

FETCHED = Path(__file__).parent.parent / ".cache" / "transformers-tests"
SUITE = FETCHED / transformers.__version__
if not SUITE.is_dir():
    raise FileNotFoundError(
        f"transformers' own tests, version {transformers.__version__}, are not here. Fetch them with:\n"
        f"  {sys.executable} tests/fetch_transformers_tests.py {FETCHED} {transformers.__version__}"
    )
sys.path.insert(0, str(SUITE))

from transformers_tests import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    GenerationTesterMixin,
    ModelTesterMixin,
    ids_tensor,
)
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# The suite looks up by name what a class is for; these are the tables of transformers' own architectures.
TABLES = {
    "MODEL_MAPPING_NAMES": McoreGPTModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": McoreGPTForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": McoreGPTForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": McoreGPTForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": McoreGPTForQuestionAnswering,
}


class TinyModel:
    """The tiny model and inputs that the suite asks for; attributes have the suite's names."""

    causal_lm_class = McoreGPTForCausalLM
    batch_size, seq_length, is_training, num_labels = 3, 7, True, 3
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def get_config(self) -> McoreGPTConfig:
        sizes = {"vocab_size": self.vocab_size, "num_labels": self.num_labels, "max_position_embeddings": 512}
        return tiny_config(**{**sizes, "bos_token_id": 1, "eos_token_id": 2, **self.options})

    def prepare_config_and_inputs_for_common(self) -> tuple[McoreGPTConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


class Suite(ModelTesterMixin, GenerationTesterMixin):
    """What every kind of model goes through."""

    options: ClassVar[dict[str, Any]]
    test_can_init_all_missing_weights_before_2023 = True  # else asked of files with a newer copyright line only
    all_model_classes = (
        McoreGPTModel,
        McoreGPTForCausalLM,
        McoreGPTForSequenceClassification,
        McoreGPTForTokenClassification,
        McoreGPTForQuestionAnswering,
    )

    model_tester: TinyModel

    def setUp(self) -> None:
        self.model_tester = TinyModel(self.options)
        self.config_tester = ConfigTester(self, config_class=McoreGPTConfig, hidden_size=32, num_attention_heads=4)
        for table, model in TABLES.items():
            names = patch.dict(getattr(modeling_auto, table), {"mcore_gpt": model.__name__})
            names.start()
            self.addCleanup(names.stop)
        self.ask_for_own_parts()
        # The suite asks for attention weights where the annotation of **kwargs names them as an object, not in words.
        for model in self.all_model_classes:
            annotations = inspect.unwrap(model.forward).__annotations__
            kwargs = patch.dict(annotations, {"kwargs": Unpack[TransformersKwargs]})
            kwargs.start()
            self.addCleanup(kwargs.stop)

    def ask_for_own_parts(self) -> None:
        """Has the suite look for the parts that the options have: it takes every model of a class to be made alike."""
        config = self.model_tester.get_config()
        experts, biased = any(config.moe_layers), config.moe_router_enable_expert_bias
        for patched in (
            patch.object(McorePreTrainedModel, "_can_set_experts_implementation", classmethod(lambda cls: experts)),
            patch.object(McorePreTrainedModel, "_keep_in_fp32_modules_strict", ["expert_bias"] if biased else []),
            patch.object(test_modeling_common, "get_model_conversion_mapping", own_renamings),
        ):
            patched.start()
            self.addCleanup(patched.stop)


def own_renamings(model: PreTrainedModel, **options: Any) -> list[WeightRenaming]:
    """The renamings between disk and run time of what this model has."""
    renamings, names = get_model_conversion_mapping(model, **options), list(model.state_dict())
    return [one for one in renamings if any(re.search(one.target_patterns[0], name) for name in names)]


class TestLlamaLike(Suite, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase):
    """RoPE, RMSNorm, a gated MLP, grouped queries, an output matrix of its own."""

    options = LLAMA
    model_tester = None  # abstract in three of the mixins

    def setUp(self) -> None:
        super().setUp()
        # The suite runs its distributed tests for a few architectures of transformers' own; None: for any.
        for module, name in (
            (test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES"),
            (test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES"),
        ):
            types = patch.object(module, name, None)
            types.start()
            self.addCleanup(types.stop)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class TestGPT2Like(Suite, unittest.TestCase):
    """Learned positions, LayerNorm, biases, tied embeddings."""

    options: ClassVar[dict[str, Any]] = {"attention_dropout": 0.1, "hidden_dropout": 0.1}


class TestTheRest(Suite, unittest.TestCase):
    """A sliding window on every second layer, learned sinks, gates, norms of queries and keys, zero-centred gamma."""

    options: ClassVar[dict[str, Any]] = {
        **LLAMA,
        "window_size": [3, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
        "attention_output_gate": True,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "fp32_residual_connection": True,
        "mup_embedding_mult": 3.0,
        "mup_output_mult": 0.5,
    }


class TestExperts(Suite, unittest.TestCase):
    """Experts on every second layer, shared ones with a gate, biases, auxiliary losses."""

    options: ClassVar[dict[str, Any]] = {**MIXTURES["experts"], "add_bias_linear": True, "moe_router_bias": True}


class TestLatentsAndExperts(Suite, unittest.TestCase):
    """Multi-latent attention, experts chosen in groups with a bias, and a head for a further token."""

    options: ClassVar[dict[str, Any]] = MIXTURES["latents and experts"]
