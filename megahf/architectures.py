"""Which classes a converted model is loaded with, by what its config describes; importing neither torch nor them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .cuts import Config
from .rows import is_bert, is_hybrid, is_llava, language

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
    "mcore_bert": {
        "AutoConfig": "configuration_mcore_bert.McoreBertConfig",
        "AutoModel": "modeling_mcore_bert.McoreBertModel",
        "AutoModelForPreTraining": "modeling_mcore_bert.McoreBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_mcore_bert.McoreBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mcore_bert.McoreBertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_bert.McoreBertForTokenClassification",
    },
    "mcore_llava": {
        "AutoConfig": "configuration_mcore_llava.McoreLlavaConfig",
        "AutoModel": "modeling_mcore_llava.McoreLlavaModel",
        "AutoModelForImageTextToText": "modeling_mcore_llava.McoreLlavaForConditionalGeneration",
    },
}
ENCODER = "mcore_vision"  # the type of a LLaVA's image encoder, which is no model by itself


def model_type(config: Config) -> str:
    if is_llava(config):
        return "mcore_llava"
    if is_bert(config):
        return "mcore_bert"
    return "mcore_hybrid" if is_hybrid(config) else "mcore_gpt"


def main(config: Config) -> str:
    """The Auto class that finds the class which holds every weight of the model."""
    if is_llava(config):
        return "AutoModelForImageTextToText"
    if is_bert(config):
        return "AutoModelForPreTraining" if config.add_binary_head else "AutoModelForMaskedLM"
    return "AutoModelForCausalLM"


def auto_map(config: Config) -> dict[str, str]:
    return AUTO_MAPS[model_type(config)]


def fields(config: Config) -> dict[str, Any]:
    """`config` as its class takes it and config.json has it; the configs of a LLaVA's parts say their types."""
    made = dict(vars(config))
    if is_llava(config):
        made["text_config"] = {"model_type": model_type(language(config)), **vars(language(config))}
        made["vision_config"] = {"model_type": ENCODER, **vars(config.vision_config)}
    return made


def model_file(config: Config) -> str:
    """The module of the model's classes, in `megahf/models`."""
    return auto_map(config)["AutoModel"].partition(".")[0]


def class_name(config: Config) -> str:
    """The name of the class that holds every weight of the model."""
    return auto_map(config)[main(config)].partition(".")[2]


def load_class(config: Config, auto: str = "") -> Any:
    """The class itself; by default the one that holds every weight."""
    module, _, name = auto_map(config)[auto or main(config)].partition(".")
    return getattr(import_module(f"megahf.models.{module}"), name)
