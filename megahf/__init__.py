"""megahf: Megatron checkpoints as Hugging Face models."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .context_parallel_data import ContextParallelCollator
    from .context_parallel_trainer import ContextParallelMixin, ContextParallelTrainer
    from .export import convert
    from .load import from_megatron
    from .models.configuration_mcore import McoreGPTConfig
    from .models.configuration_mcore_bert import McoreBertConfig
    from .models.configuration_mcore_hybrid import McoreHybridConfig
    from .models.configuration_mcore_llava import McoreLlavaConfig
    from .models.context_parallel import context_parallel
    from .models.image_processing_mcore_llava import McoreLlavaImageProcessor
    from .models.modeling_mcore_bert import McoreBertForMaskedLM, McoreBertForPreTraining, McoreBertModel
    from .models.modeling_mcore_gpt import McoreGPTForCausalLM, McoreGPTModel
    from .models.modeling_mcore_hybrid import McoreHybridForCausalLM, McoreHybridModel
    from .models.modeling_mcore_llava import McoreLlavaForConditionalGeneration, McoreLlavaModel
    from .models.processing_mcore_llava import McoreLlavaProcessor
    from .verification import verify

# Public names and the module that has each: imported when first asked for, so that the command line starts at once.
PUBLIC = {
    "convert": "export",
    "verify": "verification",
    "from_megatron": "load",
    "context_parallel": "models.context_parallel",
    "ContextParallelCollator": "context_parallel_data",
    "ContextParallelMixin": "context_parallel_trainer",
    "ContextParallelTrainer": "context_parallel_trainer",
    "McoreGPTConfig": "models.configuration_mcore",
    "McoreGPTModel": "models.modeling_mcore_gpt",
    "McoreGPTForCausalLM": "models.modeling_mcore_gpt",
    "McoreHybridConfig": "models.configuration_mcore_hybrid",
    "McoreHybridModel": "models.modeling_mcore_hybrid",
    "McoreHybridForCausalLM": "models.modeling_mcore_hybrid",
    "McoreBertConfig": "models.configuration_mcore_bert",
    "McoreBertModel": "models.modeling_mcore_bert",
    "McoreBertForMaskedLM": "models.modeling_mcore_bert",
    "McoreBertForPreTraining": "models.modeling_mcore_bert",
    "McoreLlavaConfig": "models.configuration_mcore_llava",
    "McoreLlavaModel": "models.modeling_mcore_llava",
    "McoreLlavaForConditionalGeneration": "models.modeling_mcore_llava",
    "McoreLlavaImageProcessor": "models.image_processing_mcore_llava",
    "McoreLlavaProcessor": "models.processing_mcore_llava",
}

__all__ = [
    "ContextParallelCollator",
    "ContextParallelMixin",
    "ContextParallelTrainer",
    "McoreBertConfig",
    "McoreBertForMaskedLM",
    "McoreBertForPreTraining",
    "McoreBertModel",
    "McoreGPTConfig",
    "McoreGPTForCausalLM",
    "McoreGPTModel",
    "McoreHybridConfig",
    "McoreHybridForCausalLM",
    "McoreHybridModel",
    "McoreLlavaConfig",
    "McoreLlavaForConditionalGeneration",
    "McoreLlavaImageProcessor",
    "McoreLlavaModel",
    "McoreLlavaProcessor",
    "__version__",
    "context_parallel",
    "convert",
    "from_megatron",
    "register",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'megahf' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{PUBLIC[name]}", __name__), name)
    if "transformers" in sys.modules:
        register()
    return value


def register() -> None:
    """Makes transformers' Auto classes know the models and processors, so that no code of a repository is run.

    Done at `import megahf` where transformers is imported already, else when a class or `from_megatron` is first used.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

    from .models.image_processing_mcore_llava import McoreLlavaImageProcessor
    from .models.modeling_mcore_bert import McoreBertModel
    from .models.modeling_mcore_gpt import McoreGPTModel
    from .models.modeling_mcore_hybrid import McoreHybridModel
    from .models.modeling_mcore_llava import McoreLlavaModel
    from .models.processing_mcore_llava import McoreLlavaProcessor

    for base in (McoreGPTModel, McoreHybridModel, McoreBertModel, McoreLlavaModel):
        config = base.config_class
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, place in base.auto_map.items():
            if auto != "AutoConfig":
                model = getattr(sys.modules[base.__module__], place.split(".")[1])
                getattr(transformers, auto).register(config, model, exist_ok=True)
    llava, images = McoreLlavaModel.config_class, {"pil": McoreLlavaImageProcessor}
    transformers.AutoProcessor.register(llava, McoreLlavaProcessor, exist_ok=True)
    IMAGE_PROCESSOR_MAPPING.register(llava, images, exist_ok=True)  # AutoImageProcessor asks for Pillow to be named


if "transformers" in sys.modules:
    register()
