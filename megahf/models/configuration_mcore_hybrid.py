"""Configuration of Megatron-core's hybrid models: a stack of Mamba, attention, MLP and expert layers in any order."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict

from .checks import at_least_one
from .configuration_mcore import McoreGPTConfig

ATTENTION = "*+"  # self-attention; multi-latent self-attention
SYMBOLS = "M-E" + ATTENTION  # Mamba; MLP; mixture of experts
NOT_RUN = {"G": "Gated DeltaNet", "D": "DeepSeek sparse attention"}
LAYERS = 12  # Megatron's number of layers where none is given


@strict
class McoreHybridConfig(McoreGPTConfig):
    """A Megatron-core hybrid. A layer is one thing: a Mamba mixer, an attention, an MLP or a mixture of experts.

    Everything that a GPT's configuration says of attention, MLPs and experts holds here too, and `layer` in it counts
    symbols of the pattern. Sizes of the mixer are Megatron's defaults; those its args do not carry are read off the
    weights at conversion.
    """

    model_type = "mcore_hybrid"
    attribute_map = {**McoreGPTConfig.attribute_map, "mamba_rms_norm": "mamba_rmsnorm"}  # noqa: RUF012
    base_model_fsdp_plan = {  # noqa: RUF012
        "embedding.word_embeddings": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
        "decoder.final_norm": "keep_full_weight",
    }

    num_layers: int = 0  # follows from the pattern
    hybrid_layer_pattern: str = ""  # a symbol a layer: M * - E +; "": Mamba alone, as in Megatron without a pattern
    mtp_layer_pattern: str | None = None  # of each head that predicts further tokens

    mamba_version: int = 2
    mamba_state_dim: int = 128
    mamba_head_dim: int = 64
    mamba_num_heads: int | None = None  # None: mamba_expand hidden_size / mamba_head_dim
    mamba_num_groups: int = 8  # heads of a group share B and C
    mamba_d_conv: int = 4  # tokens that the causal convolution sees
    mamba_expand: int = 2  # channels of the mixer for each of hidden_size, where mamba_num_heads does not say
    mamba_chunk_size: int = 128  # tokens scanned at once: a matter of speed
    mamba_d_has_hdim: bool = False  # D for each channel, else for each head
    mamba_rmsnorm: bool = True  # a grouped norm after the gate
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False  # of the matrices in and out
    mamba_dt_rank: int | None = None  # of Mamba-1; None: hidden_size / 16, rounded up

    def __post_init__(self, **kwargs: Any) -> None:
        self.hybrid_layer_pattern = self.hybrid_layer_pattern or "M" * (self.num_layers or LAYERS)
        self.num_layers = self.num_layers or len(self.hybrid_layer_pattern)
        heads, rest = divmod(self.mamba_expand * self.hidden_size, max(self.mamba_head_dim, 1))
        if self.mamba_version == 2 and self.mamba_num_heads is None and not rest:
            self.mamba_num_heads = heads
        if self.mamba_version == 1 and self.mamba_dt_rank is None:
            self.mamba_dt_rank = -(-self.hidden_size // 16)
        super().__post_init__(**kwargs)

    @property
    def layer_parts(self) -> set[str]:
        """What there is in the layers, for plans: `self_attention`, `mlp`, `experts`; mixers are in no plan."""
        parts = {"-": "mlp", "E": "experts", **dict.fromkeys(ATTENTION, "self_attention")}
        return {parts[symbol] for symbol in self.hybrid_layer_pattern if symbol in parts}

    @property
    def layer_types(self) -> list[str]:
        """What each layer caches, in transformers' words; `moe` is its word for nothing, of any MLP.

        Where no layer is attention, the first mixer's cache is `hybrid`: beside its states it has room for keys, which
        are one zero a token and count the tokens, as transformers has nothing else count them.
        """
        attention = super().layer_types
        kinds = {"M": "linear_attention", "-": "moe", "E": "moe"}
        types = [kinds.get(symbol, kind) for symbol, kind in zip(self.hybrid_layer_pattern, attention, strict=False)]
        if self.counting_layer is not None:
            types[self.counting_layer] = "hybrid"
        return types

    @property
    def counting_layer(self) -> int | None:
        """The mixer whose cache counts the tokens; None where an attention layer's does."""
        mixers = [layer for layer, symbol in enumerate(self.hybrid_layer_pattern) if symbol == "M"]
        attention = any(symbol in ATTENTION for symbol in self.hybrid_layer_pattern)
        return mixers[0] if mixers and not attention else None

    @property
    def moe_layers(self) -> list[bool]:
        """Whether each layer is a mixture of experts."""
        return [symbol == "E" for symbol in self.hybrid_layer_pattern]

    def validate_layer_type(self) -> None:
        """Symbols of layers there are, as many as layers, with what they need; transformers' types follow from them."""
        check_pattern(self, "hybrid_layer_pattern", self.hybrid_layer_pattern)
        if len(self.hybrid_layer_pattern) != self.num_layers:
            raise ValueError(
                f"hybrid_layer_pattern {self.hybrid_layer_pattern} has {len(self.hybrid_layer_pattern)} layers, "
                f"num_layers is {self.num_layers}"
            )
        if not any(symbol in "M*+" for symbol in self.hybrid_layer_pattern):
            raise ValueError(
                f"hybrid_layer_pattern {self.hybrid_layer_pattern}: without M, * or + no token sees another"
            )

    def validate_heads(self) -> None:
        """Heads for further tokens have a pattern."""
        if self.mtp_num_layers and not self.mtp_layer_pattern:
            raise ValueError(
                f"mtp_num_layers is {self.mtp_num_layers}, but mtp_layer_pattern does not say of which layers a head is"
            )
        if self.mtp_num_layers:
            check_pattern(self, "mtp_layer_pattern", self.mtp_layer_pattern or "")

    def validate_mamba(self) -> None:
        """A mixer's heads share out over its groups."""
        if "M" not in self.hybrid_layer_pattern + (self.mtp_layer_pattern or ""):
            return
        if self.mamba_version not in (1, 2):
            raise ValueError(f"mamba_version is {self.mamba_version}: it must be 1 or 2")
        for name in ("mamba_state_dim", "mamba_d_conv", "mamba_expand", "mamba_chunk_size"):
            at_least_one(name, getattr(self, name))
        if self.mamba_version == 1:
            return
        if self.mamba_num_heads is None:
            raise ValueError(
                f"{self.mamba_expand} times hidden_size {self.hidden_size} are no whole heads of {self.mamba_head_dim} "
                f"channels: give mamba_num_heads"
            )
        for name in ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups"):
            at_least_one(name, getattr(self, name))
        if self.mamba_num_heads % self.mamba_num_groups:
            raise ValueError(
                f"{self.mamba_num_heads} Mamba heads cannot be shared out over {self.mamba_num_groups} groups: "
                f"mamba_num_heads must be a multiple of mamba_num_groups"
            )


def check_pattern(config: McoreHybridConfig, name: str, pattern: str) -> None:
    """Refuses symbols that are not run or no layers, and layers without what they need."""
    for symbol in dict.fromkeys(pattern):
        if symbol in NOT_RUN:
            raise ValueError(f"{name} {pattern}: {symbol} is a layer of {NOT_RUN[symbol]}, not run here")
        if symbol not in SYMBOLS:
            raise ValueError(
                f"{name} {pattern}: {symbol!r} is no layer; layers are M (Mamba), * (attention), + (multi-latent "
                f"attention), - (MLP) and E (experts), without | between stages or / before heads for further tokens"
            )
    if "*" in pattern and config.multi_latent_attention:
        raise ValueError(f"{name} {pattern}: with multi_latent_attention an attention layer is +, not *")
    if "+" in pattern and not config.multi_latent_attention:
        raise ValueError(f"{name} {pattern}: + needs multi_latent_attention")
    if "E" in pattern and not config.num_experts:
        raise ValueError(f"{name} {pattern}: E needs num_experts")


McoreHybridConfig.register_for_auto_class()
