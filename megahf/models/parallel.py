"""What transformers leaves to a model that several processes share: shares that fit, and tied weights saved once."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from .attention import SelfAttention
from .mla import MLASelfAttention
from .moe import Experts


class SharedModel(PreTrainedModel):
    """A model that refuses, in words, to be shared out where it cannot be, and is saved as one process saves it."""

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, *args: Any) -> Any:
        """As transformers', which `from_pretrained` calls before it loads weights; with a look at what it cut.

        Raises:
            ValueError: heads or experts do not share out evenly; or the processes are to be stages.
        """
        stages = getattr(distributed_config, "pp_size", None) or 1
        if stages > 1:
            raise ValueError(
                f"pp_size is {stages}: transformers' pipeline stages go by names of modules that Megatron's models "
                f"have not; tp_size, fsdp_size and ep_size share the model out, device_map spreads its layers"
            )
        model = super().maybe_distribute_model(model, distributed_config, *args)
        for module in model.modules():
            check_share(module)
        return model

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As transformers', with this model's code and name: FSDP2 has put a class of torch's in front of its own."""
        front = type(self)
        own = next(x for x in front.__mro__ if issubclass(x, SharedModel) and not x.__module__.startswith("torch."))
        front.__module__, front.__name__ = own.__module__, own.__name__
        super().save_pretrained(*args, **kwargs)

    def gather_sharded_state_dict_for_save(self, model_to_save: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', without the copies of tied weights: it knows those by their memory, which is gone then."""
        gathered = super().gather_sharded_state_dict_for_save(model_to_save, state_dict, *args, **kwargs)
        if gathered is state_dict:
            return gathered
        tied = model_to_save.all_tied_weights_keys
        return {name: tensor for name, tensor in gathered.items() if name not in tied}


def check_share(module: nn.Module) -> None:
    """Each process has whole heads; and, where experts have biases, equal parts of each expert (see `Experts`)."""
    if isinstance(module, SelfAttention):
        check_even("num_query_groups", module.config.num_query_groups, module.linear_qkv.weight)
    elif isinstance(module, MLASelfAttention):
        check_even("num_attention_heads", module.config.num_attention_heads, module.linear_kv_up_proj.weight)
    elif isinstance(module, Experts) and module.has_bias:
        check_even("moe_ffn_hidden_size", module.config.moe_ffn_hidden_size, module.down_proj)


def check_even(name: str, number: int, weight: Tensor) -> None:
    ways = parts(weight)
    if number % ways:
        raise ValueError(
            f"tp_size is {ways}, but the model's {name}, {number}, does not share out over {ways} processes evenly: "
            f"tp_size must divide it; fsdp_size and ep_size need not"
        )


def parts(weight: Any) -> int:
    """How many processes of tensor parallelism hold a part of `weight`; 1 if each holds it whole."""
    mesh = getattr(weight, "device_mesh", None)
    if mesh is None:
        return 1
    names = mesh.mesh_dim_names or ("tp",)  # transformers 5.17 gives its mesh no name
    return math.prod(
        mesh.size(dim)
        for dim, (name, placement) in enumerate(zip(names, weight.placements, strict=True))
        if name == "tp" and not placement.is_replicate()
    )
