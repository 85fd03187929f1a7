"""megahf: Megatron checkpoints as Hugging Face models."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .export import convert
    from .load import from_megatron
    from .models.configuration_mcore import McoreGPTConfig
    from .models.configuration_mcore_bert import McoreBertConfig
    from .models.configuration_mcore_hybrid import McoreHybridConfig
    from .models.modeling_mcore_bert import McoreBertForMaskedLM, McoreBertForPreTraining, McoreBertModel
    from .models.modeling_mcore_gpt import McoreGPTForCausalLM, McoreGPTModel
    from .models.modeling_mcore_hybrid import McoreHybridForCausalLM, McoreHybridModel
    from .verification import verify

# Public names and the module that has each: imported when first asked for, so that the command line starts at once.
PUBLIC = {
    "convert": "export",
    "verify": "verification",
    "from_megatron": "load",
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
}

__all__ = [
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
    "__version__",
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
    """Makes transformers' Auto classes know the models, so that no code of a repository is run.

    Done at `import megahf` where transformers is imported already, else when a class or `from_megatron` is first used.
    """
    import transformers

    from .models.modeling_mcore_bert import McoreBertModel
    from .models.modeling_mcore_gpt import McoreGPTModel
    from .models.modeling_mcore_hybrid import McoreHybridModel

    for base in (McoreGPTModel, McoreHybridModel, McoreBertModel):
        config = base.config_class
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, place in base.auto_map.items():
            if auto != "AutoConfig":
                model = getattr(sys.modules[base.__module__], place.split(".")[1])
                getattr(transformers, auto).register(config, model, exist_ok=True)


if "transformers" in sys.modules:
    register()
