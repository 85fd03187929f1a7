"""What every Megatron-core model here shares: initialisation, names on disk, saving, the door from Megatron.

On disk weights carry Megatron's names as Transformer Engine spells them, without a `model.` prefix. At run time the
norms are modules of their own, as in Megatron's local spec, so that every matrix is a plain `nn.Linear`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_utils import PreTrainedModel

from .attention import CoreAttention
from .mlp import ResidualLinear
from .norm import LayerNorm, RMSNorm
from .rope import RotaryEmbedding

# on disk -> at run time
NORMS = (
    (r"\.self_attention\.linear_qkv\.layer_norm_", r"\.input_layernorm\."),
    (r"\.mlp\.linear_fc1\.layer_norm_", r"\.pre_mlp_layernorm\."),
)
PREFIXES = ((r"^embedding\.", r"^model\.embedding\."), (r"^decoder\.", r"^model\.decoder\."))


def register_names(model: str, *renamings: tuple[str, str]) -> None:
    """Gives a class or model type its renamings between disk and run time, both ways."""
    mapping = [WeightRenaming(disk, runtime) for disk, runtime in renamings]
    register_checkpoint_conversion_mapping(model, mapping, overwrite=True)


class McorePreTrainedModel(PreTrainedModel):
    """The base of all models: transformers' `PreTrainedModel` with Megatron's initialisation, names and door."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    auto_map: ClassVar[dict[str, str]] = {}  # every class the folder can be loaded as, whichever was saved
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def from_megatron(cls, path: str | Path, **options: Any) -> McorePreTrainedModel:
        """Loads a Megatron checkpoint directory of any parallel layout into this class; needs the megahf package.

        Args:
            path: the checkpoint's directory, or one iteration's inside it.
            options: as `megahf.from_megatron` takes them: `dtype`, `device_map` and others.
        """
        try:
            from megahf.load import from_megatron
        except ImportError as error:
            raise ImportError("Reading Megatron checkpoints needs the megahf package: pip install megahf") from error
        return from_megatron(path, model_class=cls, **options)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, max_shard_size: int | str = "5GB", **kwargs: Any
    ) -> None:
        """As transformers', in files of 5 GB, with code files and the auto_map of every class they hold."""
        self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **self.auto_map}
        super().save_pretrained(save_directory, *args, max_shard_size=max_shard_size, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As torch's, with names of run time or of disk: Trainer resumes with tensors as their file names them."""
        renamings = get_model_conversion_mapping(self, add_legacy=False)
        renamed = {}
        for name, tensor in state_dict.items():
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            renamed[name] = tensor
        return super().load_state_dict(renamed, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Megatron's initialisation: normal, narrower by sqrt(2 L) where a layer writes into the residual stream."""
        std = self.config.init_method_std
        if isinstance(module, (RMSNorm, LayerNorm)):
            init.constant_(module.weight, 0.0 if module.zero_centered else 1.0)
            if isinstance(module, LayerNorm):
                init.zeros_(module.bias)
        elif isinstance(module, RotaryEmbedding):
            init.copy_(module.inv_freq, module.frequencies())
        elif isinstance(module, CoreAttention):
            if module.softmax_offset is not None:
                init.normal_(module.softmax_offset, mean=0.0, std=std)
        elif isinstance(module, ResidualLinear):
            init.normal_(module.weight, mean=0.0, std=std / math.sqrt(2.0 * self.config.num_layers))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
