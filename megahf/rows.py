"""What a row of the table says of a weight: shape, cut, when it exists, how it is spelled.

The letters of shapes and the words of conditions are defined here, once; the rows themselves are in `weights.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .cuts import ONE_EXPERT, PACKED, PLAIN, WHOLE, Config, Cut, Pack, convolved, gates, in_proj, mixer_width
from .models.vision_kinds import vision_kind


def sizes(config: Config) -> dict[str, int]:
    """What the letters of the shapes stand for; 0 for what a model does not have."""
    heads, queries = config.num_attention_heads, config.num_attention_heads * (2 if config.attention_output_gate else 1)
    latent, shared = config.moe_latent_size, config.moe_shared_expert_intermediate_size or 0
    return {
        "V": config.vocab_size,
        "S": config.max_position_embeddings,
        "h": config.hidden_size,
        "2h": 2 * config.hidden_size,
        "2": 2,
        "T": getattr(config, "num_tokentypes", 0),
        "d": config.kv_channels,
        "n": heads,
        "nd": heads * config.kv_channels,
        "qkv": (queries + 2 * config.num_query_groups) * config.kv_channels,  # per group: q .. | gate .. | k | v
        "f": config.ffn_hidden_size,
        "fc1": config.ffn_hidden_size * gates(config),
        "E": config.num_experts or 0,
        "fe": config.moe_ffn_hidden_size,
        "fe1": config.moe_ffn_hidden_size * gates(config),
        "fs": shared,
        "fs1": shared * gates(config),
        "lat": latent or 0,
        "he": latent or config.hidden_size,  # channels that the experts see
        "lq": config.q_lora_rank or 0,
        "lkv": config.kv_lora_rank,
        "lkvr": config.kv_lora_rank + config.qk_pos_emb_head_dim,  # latent | rotating key
        "nq": heads * (config.qk_head_dim + config.qk_pos_emb_head_dim),  # per head: still | rotating
        "nkv": heads * (config.qk_head_dim + config.v_head_dim),  # per head: key | value
        "nv": heads * config.v_head_dim,
        "1": 1,
        **(mixer_sizes(config) if is_hybrid(config) else {}),
    }


def image_sizes(config: Config) -> dict[str, int]:
    """What the letters of an image encoder's shapes stand for; `config` is its own."""
    patches = (config.img_h // config.patch_dim) * (config.img_w // config.patch_dim)
    return {
        "h": config.hidden_size,
        "3": 3,
        "p": config.patch_dim,
        "3pp": 3 * config.patch_dim**2,  # per colour its rows
        "c": config.class_token_len,
        "c+n": config.class_token_len + patches,
        "N": (config.max_img_h // config.patch_dim) * (config.max_img_w // config.patch_dim),
        "nd": config.num_attention_heads * config.kv_channels,
        "3nd": 3 * config.num_attention_heads * config.kv_channels,  # per head: q | k | v
        "f": config.ffn_hidden_size,
        "fc1": config.ffn_hidden_size * gates(config),
        "1": 1,
    }


def projection_sizes(config: Config) -> dict[str, int]:
    """What the letters of a projection's shapes stand for; `config` is the LLaVA's."""
    return {
        "hi": config.vision_config.hidden_size * (4 if config.pixel_shuffle else 1),
        "ht": config.text_config.hidden_size,
        "fp": config.projection_ffn_hidden_size,
        "fp1": config.projection_ffn_hidden_size * (2 if config.projection_gated_linear_unit else 1),
    }


def mixer_sizes(config: Config) -> dict[str, int]:
    """What the letters of a Mamba mixer's shapes stand for."""
    heads, width, rank = config.mamba_num_heads or 0, mixer_width(config), config.mamba_dt_rank or 0
    return {
        "mi": width,
        "mz": sum(in_proj(config)),
        "mc": sum(convolved(config)),
        "mk": config.mamba_d_conv,
        "mh": heads,
        "mD": width if config.mamba_d_has_hdim else heads,
        "mN": config.mamba_state_dim,
        "mr": rank,
        "mrBC": rank + 2 * config.mamba_state_dim,  # dt | B | C
    }


def is_hybrid(config: Config) -> bool:
    return getattr(config, "hybrid_layer_pattern", None) is not None


def is_bert(config: Config) -> bool:
    return getattr(config, "add_binary_head", None) is not None


def is_llava(config: Config) -> bool:
    return getattr(config, "vision_config", None) is not None


def language(config: Config) -> Config:
    """The config of the model that predicts tokens: a LLaVA's own is beside those of its parts."""
    return config.text_config if is_llava(config) else config


# Parts of a LLaVA, by which its weights' names begin: whose config their rows ask, and what the letters stand for.
VISION, PROJECTION, LANGUAGE = "vision_model", "vision_projection", "language_model"
PARTS: dict[str, tuple[Callable[[Config], Config], Callable[[Config], dict[str, int]]]] = {
    "": (lambda c: c, sizes),
    VISION: (lambda c: c.vision_config, image_sizes),
    PROJECTION: (lambda c: c, projection_sizes),
    LANGUAGE: (lambda c: c.text_config, sizes),
}


def is_kind(symbols: str, config: Config, layer: int) -> bool:
    """Whether a hybrid's layer is one of `symbols`."""
    return config.hybrid_layer_pattern[layer] in symbols


def has_attention(config: Config, layer: int) -> bool:
    return not is_hybrid(config) or is_kind("*+", config, layer)


def is_dense(config: Config, layer: int) -> bool:
    """Whether layer `layer` (from 0) has an MLP of its own."""
    return is_kind("-", config, layer) if is_hybrid(config) else not is_moe(config, layer)


def has_mixer(version: int) -> Callable[[Config, int], bool]:
    return lambda c, n: is_hybrid(c) and is_kind("M", c, n) and c.mamba_version == version


def is_moe(config: Config, layer: int) -> bool:
    """Whether layer `layer` (from 0) has experts."""
    if is_hybrid(config):
        return is_kind("E", config, layer)
    if not config.num_experts:
        return False
    frequency = config.moe_layer_freq
    return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])


# When a row exists, of a config and a layer (0 where there is none). A row may name several: all must hold.
CONDITIONS: dict[str, Callable[[Config, int], bool]] = {
    "always": lambda c, _: True,
    "LayerNorm": lambda c, _: c.normalization == "LayerNorm",
    "add_bias_linear": lambda c, _: c.add_bias_linear,
    "add_qkv_bias": lambda c, _: c.add_qkv_bias or c.add_bias_linear,
    "qk_layernorm": lambda c, _: c.qk_layernorm and not c.qk_l2_norm,
    "softmax_type learnable": lambda c, _: c.softmax_type == "learnable",
    "learned positions": lambda c, _: c.position_embedding_type == "learned_absolute",
    "untied": lambda c, _: not c.tie_word_embeddings,
    "GPT": lambda c, _: not is_hybrid(c) and not is_bert(c),
    "hybrid": lambda c, _: is_hybrid(c),
    "BERT": lambda c, _: is_bert(c),
    "binary head": lambda c, _: is_bert(c) and c.add_binary_head,
    "token types": lambda c, _: is_bert(c) and c.num_tokentypes > 0,
    "attention": has_attention,
    "heads": lambda c, n: has_attention(c, n) and not c.multi_latent_attention,
    "latents": lambda c, n: has_attention(c, n) and c.multi_latent_attention,
    "latent queries": lambda c, _: c.q_lora_rank is not None,
    "straight queries": lambda c, _: c.q_lora_rank is None,
    "qk norms": lambda c, _: c.qk_layernorm,
    "dense": is_dense,
    "mixer": has_mixer(2),
    "mixer 1": has_mixer(1),
    "gated norm": lambda c, _: is_hybrid(c) and c.mamba_rmsnorm,
    "convolution bias": lambda c, _: is_hybrid(c) and c.mamba_conv_bias,
    "experts": is_moe,
    "router bias": lambda c, n: is_moe(c, n) and c.moe_router_bias,
    "expert bias": lambda c, n: is_moe(c, n) and c.moe_router_enable_expert_bias,
    "shared experts": lambda c, n: is_moe(c, n) and bool(c.moe_shared_expert_intermediate_size),
    "shared gate": lambda c, n: is_moe(c, n) and c.moe_shared_expert_gate,
    "latent experts": lambda c, n: is_moe(c, n) and c.moe_latent_size is not None,
    # of image encoders
    "convolution": lambda c, _: vision_kind(c.vision_model_type).tower == "clip",
    "patch matrix": lambda c, _: vision_kind(c.vision_model_type).tower == "radio",
    "patch bias": lambda c, _: vision_kind(c.vision_model_type).patch_bias,
    "class tokens": lambda c, _: c.class_token_len > 0,
    "heads' bias": lambda c, _: c.add_qkv_bias,
    "mask token": lambda c, _: vision_kind(c.vision_model_type).mask_token,
    "norm before": lambda c, _: vision_kind(c.vision_model_type).ln_pre,
    "norm after": lambda c, _: vision_kind(c.vision_model_type).ln_post,
    "joined norms": lambda c, _: not vision_kind(c.vision_model_type).plain_norms,
    "plain norms": lambda c, _: vision_kind(c.vision_model_type).plain_norms,
    # of projections
    "mlp": lambda c, _: c.vision_projection_type == "mlp",
    "affine": lambda c, _: c.vision_projection_type == "affine",
    "projection bias": lambda c, _: c.projection_add_bias_linear,
    "projection norm": lambda c, _: c.projection_normalization is not None,
    "projection LayerNorm": lambda c, _: c.projection_normalization == "LayerNorm",
}  # fmt: skip


class Heads:
    """A hybrid's config as the layers of its heads see it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hybrid_layer_pattern = getattr(config, "mtp_layer_pattern", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.config, name)


# Who writes a weight under another key than its own name. Local layers have their norms beside the matrices; in
# distributed checkpoints they take the names of Transformer Engine's, where Megatron has a table for that.
LOCAL, MAPPED, ENGINE, DISTRIBUTED, READ_ONLY = SPECS = (
    "local", "local distributed", "engine", "distributed", "read only",
)  # fmt: skip

# The stacks that are a model's own layers; it has one of them.
LAYERS = "decoder", "encoder"
IMAGES = "images"  # an image encoder's layers, all on one stage

# Pipeline stages of what is in no stack: an image encoder's, the embedding's, the final norm's, the output's.
STAGES = IMAGES, "embedding", "norm", "output"


@dataclass(frozen=True)
class Spelling:
    """A key under which a weight, or a part of it, is stored."""

    key: str  # `{l}`: layer; `{k}`: head; `{e}`: one expert, counted from the rank's first
    part: int = 0  # which of `parts` blocks of the cut
    parts: int = 1
    pack: Pack = PLAIN
    layout: str = ""  # the layout of experts that it belongs to
    spec: str = ""  # one of SPECS; empty: written only where it is the row's own name


@dataclass(frozen=True)
class Row:
    """One weight, or one of each layer where the name has `{l}`."""

    name: str
    shape: str  # letters of `sizes`
    cut: Cut = WHOLE
    when: str = "always"  # keys of CONDITIONS
    also: tuple[Spelling, ...] = ()  # other spellings
    parameter: str = ""  # its name in our modules, where that is another
    tied: str = ""  # when absent by `when`, a copy of this weight may be stored and must equal it
    experts: bool = False  # the first axis is experts, which expert-parallel ranks share out
    float32: bool = False  # whatever number format the others are in; a buffer at run time
    interleave: str = ""  # the arguments that store gate and up in blocks by turns: the size, and the switch
    stack: str = ""  # the stack of layers it is repeated in
    stage: str = ""  # the pipeline stage it is in, where it is in no stack: one of STAGES
    part: str = ""  # of a LLaVA that it is in: one of PARTS

    @property
    def spellings(self) -> tuple[Spelling, ...]:
        own = () if any(spelling.key == self.name for spelling in self.also) else (Spelling(self.name),)
        return (*own, *self.also)

    def written(self, specs: Sequence[str]) -> list[Spelling]:
        """The keys under which the first of `specs` that has its own writes it; its name if there are none."""
        for spec in specs:
            if found := [spelling for spelling in self.spellings if spelling.spec == spec]:
                return found
        return [next(spelling for spelling in self.spellings if spelling.key == self.name)]

    @property
    def runtime(self) -> str:
        """The parameter's name in the base model's modules."""
        return self.parameter or self.name

    def of(self, config: Config) -> Config:
        """The config of the part that it is in."""
        return PARTS[self.part][0](config)

    def unmet(self, config: Config, layer: int | None) -> list[str]:
        """The conditions for it that do not hold in layer `layer` of its stack."""
        if is_llava(config) != bool(self.part):
            return ["LLaVA" if self.part else "no LLaVA"]
        model, place = self.seen(config, layer)
        return [condition for condition in self.when.split(", ") if not CONDITIONS[condition](model, place)]

    def exists(self, config: Config, layer: int | None) -> bool:
        """Whether the model has it in layer `layer` of its stack."""
        if is_llava(config) != bool(self.part):
            return False
        model, place = self.seen(config, layer)
        return all(CONDITIONS[condition](model, place) for condition in self.when.split(", "))

    def seen(self, config: Config, layer: int | None) -> tuple[Config, int]:
        """The config and the layer that conditions ask about: a GPT's head for further tokens is like its last layer,
        a hybrid's is a stack with a pattern of its own."""
        own = self.of(config)
        if self.stack == "heads":
            return Heads(own), layer or 0
        return own, own.num_layers - 1 if self.stack == "mtp" else layer or 0

    def dims(self, config: Config) -> tuple[int, ...]:
        of, letters = PARTS[self.part]
        known = letters(of(config))
        return tuple(known[letter] for letter in self.shape.split())


def keys(*names: str, spec: str = "") -> tuple[Spelling, ...]:
    return tuple(Spelling(name, spec=spec) for name in names)


def local(name: str) -> tuple[Spelling, ...]:
    """The key in layers without Transformer Engine."""
    return keys(name, spec=LOCAL)


def blocks(*names: str, spec: str = "") -> tuple[Spelling, ...]:
    """One key for each block of the cut."""
    return tuple(Spelling(name, part, len(names), spec=spec) for part, name in enumerate(names))


def components(name: str, parts: str) -> tuple[Spelling, ...]:
    """The keys of a mixer's packed weight in distributed checkpoints."""
    return blocks(*(f"{name}.{part}" for part in parts.split()), spec=DISTRIBUTED)


def experts(matrix: str, kind: str, *whole: Spelling) -> tuple[Spelling, ...]:
    """Every layout of the experts' `matrix.kind`; `whole` are further ones. Megatron-FSDP splits gate from up."""
    at = "mlp.experts"
    one_each = {
        "sequential": f"{at}.local_experts.{{e}}.{matrix}.{kind}",
        "te-grouped": f"{at}.{matrix}.{kind}{{e}}",
        "singleton": f"{at}.experts.{{e}}.{matrix}.{kind}",
    }
    halves = [(key + half, part, layout) for layout, key in one_each.items() for part, half in enumerate(("_w", "_v"))]
    return (
        Spelling(f"{at}.{matrix}.{kind}", pack=PACKED, layout="packed"),
        Spelling(f"{at}.experts.{matrix}.{kind}", layout="distributed"),
        *(Spelling(key, pack=ONE_EXPERT, layout=layout) for layout, key in one_each.items()),
        *(Spelling(key, part, 2, ONE_EXPERT, layout) for key, part, layout in halves if matrix == "linear_fc1"),
        *whole,
    )


def stacked(rows: tuple[Row, ...], stack: str, under: str, *others: str, when: str = "") -> tuple[Row, ...]:
    """`rows` as those of each layer of a stack, under its prefix.

    Args:
        others: further spellings of the prefix, which are read and not written.
        when: one more condition for all of them.
    """

    def place(row: Row) -> Row:
        spelled = [replace(one, key=under + one.key) for one in row.spellings]
        spelled += [replace(one, key=at + one.key, spec=READ_ONLY) for at in others for one in row.spellings]
        parameter = under + row.parameter if row.parameter else ""
        exists = f"{when}, {row.when}" if when else row.when
        return replace(row, name=under + row.name, also=tuple(spelled), parameter=parameter, stack=stack, when=exists)

    return tuple(map(place, rows))


def inside(rows: tuple[Row, ...], part: str) -> tuple[Row, ...]:
    """`rows` as those of a LLaVA's part, whose name theirs begin with."""
    under = f"{part}."

    def place(row: Row) -> Row:
        spelled = tuple(replace(one, key=under + one.key) for one in row.spellings)
        tied = under + row.tied if row.tied else ""
        parameter = under + row.parameter if row.parameter else ""
        return replace(row, name=under + row.name, also=spelled, parameter=parameter, tied=tied, part=part)

    return tuple(map(place, rows))
