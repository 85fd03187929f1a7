"""Configuration of Megatron-core models, in Megatron's own field names.

A field that Megatron's args carry has the args' name; transformers' names (`num_hidden_layers`, `head_dim` ...)
are aliases. What cannot be a model is refused here, in words, before a weight is allocated.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .checks import above_zero, at_least_one, check_experts, check_heads, check_layer_pattern, one_of
from .plans import expert_parallel_plan, tensor_parallel_plan

POSITION_EMBEDDINGS = ("learned_absolute", "rope", "yarn", "none")
NORMALIZATIONS = ("LayerNorm", "RMSNorm")
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu", "squared_relu")
SOFTMAX_TYPES = ("vanilla", "off-by-one", "learnable")
ROPE_TYPES = ("rope", "yarn")


@strict
class McoreGPTConfig(PreTrainedConfig):
    """A Megatron-core GPT, dense or a mixture of experts. Defaults are Megatron's own command line defaults.

    Fields are grouped as the model is: sizes, positions, norms, attention, MLP, experts, multipliers, training.
    """

    model_type = "mcore_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "qk_rope_head_dim": "qk_pos_emb_head_dim",  # by this name transformers' tensor parallelism asks for it
        "num_experts_per_tok": "moe_router_topk",
        "moe_intermediate_size": "moe_ffn_hidden_size",
        "initializer_range": "init_method_std",
        "rms_norm_eps": "layernorm_epsilon",
        "layer_norm_eps": "layernorm_epsilon",
    }
    stack = "decoder"  # the name of the layers' module
    base_model_fsdp_plan = {  # noqa: RUF012
        "embedding.word_embeddings": "free_full_weight",
        "decoder.layers.*": "free_full_weight",
        "decoder.final_layernorm": "keep_full_weight",
    }

    vocab_size: int = 50257  # rows of the embedding, without Megatron's padding
    num_layers: int = 12
    hidden_size: int = 768
    ffn_hidden_size: int = 0  # width of the MLP (of each half, if gated); 0: 4 hidden_size
    num_attention_heads: int = 12
    num_query_groups: int = 0  # key/value heads; 0: one a head
    kv_channels: int = 0  # channels of a head; 0: hidden_size / num_attention_heads
    max_position_embeddings: int = 1024

    position_embedding_type: str = "learned_absolute"
    rotary_base: float | int = 10000.0
    rotary_percent: float | int = 1.0  # share of a head's channels that rotate
    rotary_interleaved: bool = False  # pairs are (even, odd) channels, else (first half, second half)
    rotary_seq_len_interpolation_factor: float | int | None = None  # positions are divided by it
    use_rope_scaling: bool = False  # Llama 3.1's rule: low 1, high 4, original context 8192
    rope_scaling_factor: float | int = 8.0
    yarn_rotary_scaling_factor: float | int = 1.0
    yarn_original_max_position_embeddings: int = 4096
    yarn_beta_fast: float | int = 32.0
    yarn_beta_slow: float | int = 1.0
    yarn_mscale: float | int | None = 1.0
    yarn_mscale_all_dim: float | int | None = 0.0
    yarn_correction_range_round_to_int: bool = True
    no_rope_freq: int | list[int] | None = None  # every n-th layer, or 1 for each layer, without RoPE

    normalization: str = "LayerNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False  # the norm's scale is 1 + weight

    add_bias_linear: bool = True
    add_qkv_bias: bool = False  # always with add_bias_linear
    qk_layernorm: bool = False
    qk_l2_norm: bool = False
    attention_output_gate: bool = False
    softmax_type: str = "vanilla"  # off-by-one: one more logit of 0; learnable: one more logit a head, learned
    softmax_scale: float | int | None = None  # None: 1 / sqrt(kv_channels)
    window_size: list[int] | tuple[int, ...] | None = None  # [left, right] neighbours a token sees; left -1: all
    window_attn_skip_freq: int | list[int] | None = None  # every n-th layer full, or 1 for each layer with the window

    multi_latent_attention: bool = False  # queries, keys and values through low ranks; the sizes below are its own
    q_lora_rank: int | None = None  # None: queries straight from the hidden states
    kv_lora_rank: int = 32
    qk_head_dim: int = 128  # channels of a head without position
    qk_pos_emb_head_dim: int = 64  # and those that rotate; one key of them for all heads
    v_head_dim: int = 128
    rope_type: str = "yarn"  # of multi-latent attention: rope or yarn; the yarn_ fields above are its stretch

    activation_func: str = "gelu_tanh"
    gated_linear_unit: bool = False
    activation_func_clamp_value: float | int | None = None  # gate at most this, up within +- this
    glu_linear_offset: float | int = 0.0  # added to up

    num_experts: int | None = None  # None: every MLP is dense
    moe_layer_freq: int | list[int] = 1  # every n-th layer, the first one included, or 1 for each layer with experts
    moe_ffn_hidden_size: int = 0  # width of an expert; 0: ffn_hidden_size
    moe_shared_expert_intermediate_size: int | None = None  # width of all shared experts together
    moe_shared_expert_gate: bool = False
    moe_latent_size: int | None = None  # experts work in so many channels
    moe_router_topk: int = 2
    moe_router_score_function: str = "softmax"
    moe_router_pre_softmax: bool = False  # softmax over all experts, then the choice; else over those chosen
    moe_router_num_groups: int | None = None
    moe_router_group_topk: int | None = None
    moe_router_topk_scaling_factor: float | int | None = None
    moe_router_enable_expert_bias: bool = False  # added to the scores for the choice alone
    moe_router_bias: bool = False  # of the router's matrix
    moe_router_dtype: str | None = None  # fp32, fp64; None: the model's
    moe_router_load_balancing_type: str | list[str] = "aux_loss"
    moe_aux_loss_coeff: float | int | list[float] = 0.0  # one, or one a load balancing type
    moe_z_loss_coeff: float | int | None = None
    moe_input_jitter_eps: float | int | None = None  # the router's input times 1 +- this, also in evaluation
    moe_apply_probs_on_input: bool = False
    moe_expert_capacity_factor: float | int | None = None  # tokens an expert takes over its even share; None: all
    moe_token_drop_policy: str = "probs"  # which tokens beyond go: the least probable, or the last ("position")

    mtp_num_layers: int | None = None  # heads that predict further tokens
    mtp_use_repeated_layer: bool = False  # one head's weights for all of them
    mtp_loss_scaling_factor: float | int = 0.1

    tie_word_embeddings: bool = True
    fp32_residual_connection: bool = False
    mup_embedding_mult: float | int = 1.0
    mup_output_mult: float | int = 1.0

    attention_dropout: float | int = 0.1
    hidden_dropout: float | int = 0.1
    init_method_std: float | int = 0.02
    loss_chunk_size: int | None = None  # in training no logits but so many tokens' at once; None: all, and returned
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.ffn_hidden_size = self.ffn_hidden_size or 4 * self.hidden_size
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        self.kv_channels = self.kv_channels or self.hidden_size // self.num_attention_heads
        self.add_qkv_bias = self.add_qkv_bias or self.add_bias_linear
        self.moe_ffn_hidden_size = self.moe_ffn_hidden_size or self.ffn_hidden_size
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = tensor_parallel_plan(self)  # after transformers 5.17 would add names that are Llama's

    @property
    def sliding_window(self) -> int | None:
        """Tokens a query of a sliding layer sees, itself included; None without a window."""
        if self.window_size is None or self.window_size[0] < 0:
            return None
        return self.window_size[0] + 1

    @sliding_window.setter
    def sliding_window(self, tokens: int | None) -> None:
        self.window_size = None if tokens is None else [tokens - 1, 0]

    @property
    def layer_types(self) -> list[str]:
        """`sliding_attention` or `full_attention` for each layer, in transformers' words: its caches go by them."""
        if self.sliding_window is None:
            return ["full_attention"] * self.num_layers
        windowed = layer_pattern(self.window_attn_skip_freq, self.num_layers, every_nth=False)
        return ["sliding_attention" if window else "full_attention" for window in windowed]

    @property
    def rotary_type(self) -> str | None:
        """`rope`, `yarn` or None. Multi-latent attention has its own, whatever embedding of positions there is."""
        if self.multi_latent_attention:
            return self.rope_type
        return self.position_embedding_type if self.position_embedding_type in ROPE_TYPES else None

    @property
    def rotary_layers(self) -> list[bool]:
        """Whether each layer rotates its queries and keys. Multi-latent attention always does (as Megatron)."""
        if self.rotary_type is None:
            return [False] * self.num_layers
        if not self.no_rope_freq or self.multi_latent_attention:
            return [True] * self.num_layers
        return [not skip for skip in layer_pattern(self.no_rope_freq, self.num_layers, every_nth=True)]

    @property
    def moe_layers(self) -> list[bool]:
        """Whether the MLP of each layer is a mixture of experts."""
        if not self.num_experts:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return [layer % max(self.moe_layer_freq, 1) == 0 for layer in range(self.num_layers)]
        return [bool(flag) for flag in self.moe_layer_freq]

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """A property: transformers writes an attribute into config.json, and its reader's plan may be another."""
        return expert_parallel_plan(self)

    @property
    def layer_parts(self) -> set[str]:
        """What there is in the layers, for plans: `self_attention`, `mlp`, `experts`."""
        return {"self_attention", *("experts" if moe else "mlp" for moe in self.moe_layers)}

    def validate_architecture(self) -> None:
        """Sizes that fit together."""
        for name in ("vocab_size", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            at_least_one(name, getattr(self, name))
        for name in ("num_query_groups", "kv_channels", "max_position_embeddings"):
            at_least_one(name, getattr(self, name))
        if self.loss_chunk_size is not None:
            at_least_one("loss_chunk_size", self.loss_chunk_size)
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"{self.num_attention_heads} attention heads cannot be shared out over {self.num_query_groups} "
                f"query groups: num_attention_heads must be a multiple of num_query_groups"
            )
        for name in ("no_rope_freq", "window_attn_skip_freq", "moe_layer_freq"):
            check_layer_pattern(name, getattr(self, name), self.num_layers)

    def validate_choices(self) -> None:
        """Words that have a meaning."""
        one_of("position_embedding_type", self.position_embedding_type, POSITION_EMBEDDINGS)
        one_of("normalization", self.normalization, NORMALIZATIONS)
        one_of("activation_func", self.activation_func, ACTIVATIONS)
        one_of("softmax_type", self.softmax_type, SOFTMAX_TYPES)

    def validate_positions(self) -> None:
        """RoPE's channels pair up, and its stretches are stretches."""
        if self.rotary_type is None:
            return
        channels = self.rotary_channels
        name = "qk_pos_emb_head_dim" if self.multi_latent_attention else "kv_channels"
        head = getattr(self, name)
        if channels < 2 or channels % 2 or channels > head:
            raise ValueError(
                f"RoPE turns pairs of channels: {channels} channels ({name} {head}, rotary_percent "
                f"{self.rotary_percent}) must be an even number from 2 to {head}"
            )
        if self.position_embedding_type == "yarn" and self.rotary_interleaved:
            raise ValueError("YaRN has no interleaved form: rotary_interleaved must be false with it, as in Megatron")
        for name in ("rotary_base", "rope_scaling_factor", "yarn_rotary_scaling_factor"):
            above_zero(name, getattr(self, name))
        if self.rotary_seq_len_interpolation_factor is not None:
            above_zero("rotary_seq_len_interpolation_factor", self.rotary_seq_len_interpolation_factor)

    def validate_latents(self) -> None:
        """What multi-latent attention is made of; what Megatron cannot build with it is no model either."""
        if not self.multi_latent_attention:
            return
        for name in ("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"):
            at_least_one(name, getattr(self, name))
        if self.q_lora_rank is not None:
            at_least_one("q_lora_rank", self.q_lora_rank)
        one_of("rope_type", self.rope_type, ROPE_TYPES)
        for name in ("attention_output_gate", "qk_l2_norm", "rotary_interleaved"):
            if getattr(self, name):
                raise ValueError(f"{name} does not go with multi_latent_attention, as in Megatron: it must be false")
        if self.position_embedding_type == "yarn":
            raise ValueError(
                "position_embedding_type 'yarn' does not go with multi_latent_attention, which rotates by itself: "
                "its rope_type is to be 'yarn', position_embedding_type 'rope'"
            )
        if self.num_query_groups != self.num_attention_heads:
            raise ValueError(
                f"num_query_groups is {self.num_query_groups}, but multi_latent_attention makes a key and a value "
                f"for each of the {self.num_attention_heads} attention heads: it must be {self.num_attention_heads}"
            )
        for name in ("yarn_mscale", "yarn_mscale_all_dim"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is None: multi_latent_attention scales by it, 0 is for not at all")

    def validate_window(self) -> None:
        """A window looks back only: this is a causal model."""
        if self.window_size is None:
            return
        if len(self.window_size) != 2 or self.window_size[1] != 0 or self.window_size[0] < -1:
            raise ValueError(
                f"window_size {list(self.window_size)} must be [left, 0] with left >= 0, or -1 for no limit: "
                f"a causal model sees nothing to the right"
            )

    def validate_mlp(self) -> None:
        """A clamp and an offset belong to a gate."""
        if not self.gated_linear_unit and (self.activation_func_clamp_value is not None or self.glu_linear_offset):
            raise ValueError(
                f"activation_func_clamp_value {self.activation_func_clamp_value} and glu_linear_offset "
                f"{self.glu_linear_offset} act on a gated linear unit only: gated_linear_unit is false"
            )

    def validate_experts(self) -> None:
        """A mixture of experts whose sizes fit and whose words have a meaning."""
        check_experts(self)

    def validate_heads(self) -> None:
        """Heads for further tokens, of layers whose kind is known."""
        check_heads(self)

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that rotate. YaRN turns all of them, whatever rotary_percent says (as Megatron)."""
        head = self.qk_pos_emb_head_dim if self.multi_latent_attention else self.kv_channels
        whole = self.rotary_type == "yarn" or self.rotary_percent >= 1.0
        return head if whole else int(head * self.rotary_percent)


def layer_pattern(frequency: int | list[int] | None, layers: int, every_nth: bool) -> list[bool]:
    """A frequency as one flag a layer: a list is the flags, n sets every n-th layer (or every layer but those)."""
    if frequency is None:
        return [not every_nth] * layers
    if isinstance(frequency, int):
        return [(layer % frequency == 0) == every_nth for layer in range(1, layers + 1)]
    return [bool(flag) for flag in frequency]


McoreGPTConfig.register_for_auto_class()
