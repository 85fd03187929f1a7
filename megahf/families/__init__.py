"""Hugging Face architectures that Megatron models come from and are lowered to."""

from __future__ import annotations

from .bamba import BAMBA
from .deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from .family import Family
from .glm import ERNIE, GLM, HELIUM
from .glm_moe import DOTS1, GLM4_MOE
from .gpt2 import GPT2, GPT_BIGCODE
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .granite import GRANITE
from .llama import ARCEE, LLAMA, SEED_OSS
from .llava import INTERN_VL, LLAVA
from .mamba import MAMBA, MAMBA2
from .megatron_bert import MEGATRON_BERT
from .mistral import MINISTRAL, MISTRAL
from .mixtral import MIXTRAL
from .nemotron import NEMOTRON
from .nemotron_h import NEMOTRON_H
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

ALL = (
    ARCEE,
    BAMBA,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DOTS1,
    ERNIE,
    GLM,
    GLM4_MOE,
    GPT2,
    GPT_BIGCODE,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    HELIUM,
    INTERN_VL,
    LLAMA,
    LLAVA,
    MAMBA,
    MAMBA2,
    MEGATRON_BERT,
    MINISTRAL,
    MISTRAL,
    MIXTRAL,
    NEMOTRON,
    NEMOTRON_H,
    PHI3,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    SEED_OSS,
    SMOLLM3,
    STABLELM,
    STARCODER2,
)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}
