"""Configuration of Megatron-core's BERT: an encoder whose tokens see one another in both directions."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from .checks import one_of
from .configuration_mcore import McoreGPTConfig

POSITION_EMBEDDINGS = ("learned_absolute", "rope", "none")
# Fields of a GPT that Megatron's BERT has no use for: they must be as here.
WITHOUT: dict[str, Any] = {
    "multi_latent_attention": False,
    "num_experts": None,
    "mtp_num_layers": None,
    "window_size": None,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "mup_embedding_mult": 1.0,
    "mup_output_mult": 1.0,
}


@strict
class McoreBertConfig(McoreGPTConfig):
    """A Megatron-core BERT. Norms are in front of the matrices and after the last layer, none after the embedding.

    What a GPT's configuration says of sizes, positions, norms, attention and the MLP holds here too.
    """

    model_type = "mcore_bert"
    stack = "encoder"
    base_model_fsdp_plan = {  # noqa: RUF012
        "embedding.word_embeddings": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.final_layernorm": "keep_full_weight",
    }

    add_binary_head: bool = True  # which says whether the second sentence follows the first, and the pooler before it
    num_tokentypes: int = 2  # vectors for sentences: 0 for none, as Megatron has it without the binary head
    use_cache: bool = False

    def validate_choices(self) -> None:
        """Words that have a meaning, and a BERT's."""
        super().validate_choices()
        one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)

    def validate_bert(self) -> None:
        """Nothing of which Megatron's BERT has none."""
        if self.num_tokentypes < 0:
            raise ValueError(f"num_tokentypes is {self.num_tokentypes}: it must be 0 (no token types) or above")
        for name, value in WITHOUT.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)}: Megatron's BERT has none, it must be {value}")


McoreBertConfig.register_for_auto_class()
