"""Which classes a converted model is loaded with, by what its config describes; importing neither torch nor them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .cuts import Config
from .rows import is_hybrid

# model_type -> what the Auto classes find in the folder; the model classes say the same when they save.
AUTO_MAPS = {
    "mcore_gpt": {
        "AutoConfig": "configuration_mcore.McoreGPTConfig",
        "AutoModel": "modeling_mcore_gpt.McoreGPTModel",
        "AutoModelForCausalLM": "modeling_mcore_gpt.McoreGPTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mcore_gpt.McoreGPTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_gpt.McoreGPTForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_mcore_gpt.McoreGPTForQuestionAnswering",
    },
    "mcore_hybrid": {
        "AutoConfig": "configuration_mcore_hybrid.McoreHybridConfig",
        "AutoModel": "modeling_mcore_hybrid.McoreHybridModel",
        "AutoModelForCausalLM": "modeling_mcore_hybrid.McoreHybridForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mcore_hybrid.McoreHybridForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_hybrid.McoreHybridForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_mcore_hybrid.McoreHybridForQuestionAnswering",
    },
}


def model_type(config: Config) -> str:
    return "mcore_hybrid" if is_hybrid(config) else "mcore_gpt"


def auto_map(config: Config) -> dict[str, str]:
    return AUTO_MAPS[model_type(config)]


def model_file(config: Config) -> str:
    """The module of the model's classes, in `megahf/models`."""
    return auto_map(config)["AutoModelForCausalLM"].partition(".")[0]


def load_class(config: Config, auto: str = "AutoModelForCausalLM") -> Any:
    """The class itself."""
    module, _, name = auto_map(config)[auto].partition(".")
    return getattr(import_module(f"megahf.models.{module}"), name)
