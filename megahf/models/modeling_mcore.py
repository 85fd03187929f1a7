"""What every Megatron-core model here shares: initialisation, names on disk, saving, the door from Megatron.

On disk weights carry Megatron's names as Transformer Engine spells them, without a `model.` prefix. At run time the
norm in front of a matrix is a module of its own beside it, so that every matrix is a plain `nn.Linear`, and the experts
carry the names that transformers' experts interface asks for.
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

from .attention import CoreAttention
from .context_parallel import unknown_to_torchs, whole_rows_only
from .mlp import ResidualLinear
from .moe import EXPERTS_IMPLEMENTATION, Experts, SharedExperts
from .norm import LayerNorm, RMSNorm
from .parallel import SharedModel
from .rope import RotaryEmbedding
from .router import TopKRouter

# on disk -> at run time
NORMS = (
    (r"\.linear_qkv\.layer_norm_", r"\.linear_qkv_layernorm\."),
    (r"\.linear_q_up_proj\.layer_norm_", r"\.linear_q_up_proj_layernorm\."),
    (r"\.linear_kv_up_proj\.layer_norm_", r"\.linear_kv_up_proj_layernorm\."),
    (r"\.linear_fc1\.layer_norm_", r"\.linear_fc1_layernorm\."),
    (r"\.in_proj\.layer_norm_", r"\.in_proj_layernorm\."),
)
EXPERTS = (  # "(?!_)": not the bias; an end of line ("$") would stay in the names that the newer transformers saves
    (r"\.experts\.linear_fc1\.weight", r"\.experts\.gate_up_proj(?!_)"),
    (r"\.experts\.linear_fc1\.bias", r"\.experts\.gate_up_proj_bias"),
    (r"\.experts\.linear_fc2\.weight", r"\.experts\.down_proj(?!_)"),
    (r"\.experts\.linear_fc2\.bias", r"\.experts\.down_proj_bias"),
)
PREFIXES = tuple((f"^{part}\\.", f"^model\\.{part}\\.") for part in ("embedding", "decoder", "mtp"))


def register_names(model: str, *renamings: tuple[str, str]) -> None:
    """Gives a class or model type its renamings between disk and run time, both ways."""
    mapping = [WeightRenaming(disk, runtime) for disk, runtime in renamings]
    register_checkpoint_conversion_mapping(model, mapping, overwrite=True)


class McorePreTrainedModel(SharedModel):
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
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias"]
    _supports_context_parallel = True

    @property
    def supports_context_parallel(self) -> bool:
        """Whether torch's own context parallelism, which accelerate's `cp_size` is, is right of this model."""
        whole = any(whole_rows_only in module._forward_pre_hooks.values() for module in self.modules())
        return self._supports_context_parallel and not whole and not unknown_to_torchs(self)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Always: transformers looks for its decorator in this file, while the experts are in one of their own."""
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As transformers', with another default than its own."""
        return super().get_correct_experts_implementation(requested_experts or EXPERTS_IMPLEMENTATION)

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

    def get_output_embeddings(self) -> nn.Module | None:
        """The matrix to the vocabulary's logits, by Megatron's name; None in classes without one."""
        return getattr(self, "output_layer", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output_layer = new_embeddings

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
        elif isinstance(module, TopKRouter):
            for weight in (module.weight, module.bias):
                if weight is not None:
                    init.normal_(weight, mean=0.0, std=std)
            if module.expert_bias is not None:
                init.zeros_(module.expert_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std / math.sqrt(2.0 * self.config.num_layers))
            if module.gate_up_proj_bias is not None and module.down_proj_bias is not None:
                init.zeros_(module.gate_up_proj_bias)
                init.zeros_(module.down_proj_bias)
        elif isinstance(module, SharedExperts):
            if module.gate_weight is not None:
                init.normal_(module.gate_weight, mean=0.0, std=std)
        elif isinstance(module, ResidualLinear):
            init.normal_(module.weight, mean=0.0, std=std / math.sqrt(2.0 * self.config.num_layers))
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)
