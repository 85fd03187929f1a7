"""Every weight is one row: its canonical name, its shape, how tensor-parallel ranks cut it, its other spellings.

Everything else walks the rows: reading, writing, resharding, inspecting, verifying. Canonical names are Megatron-core's
with tensor parallel 1 and global layer numbers, in the spelling of Transformer Engine and of distributed checkpoints.
The order of the rows is the order of the modules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from .tiles import Tiled, join

Config = Any  # anything with McoreGPTConfig's fields: the class itself, or the namespace `arguments` makes


@dataclass(frozen=True)
class Cut:
    """How tensor-parallel ranks divide one weight along `dim`.

    A packed weight (gate | up) is `blocks` laid end to end, each cut on its own; column, row and gated are this one
    rule with other numbers. `linear_qkv` is a plain column cut: Megatron stores it group by group, also when there are
    more ranks than query groups.
    """

    dim: int | None = None  # None: every rank holds the whole weight
    blocks: Callable[[Config], int] = lambda config: 1
    padded: bool = False  # rows beyond the vocabulary fill up the last ranks

    def split(self, whole: Tiled, config: Config, ranks: int) -> list[Tiled]:
        """The whole weight as each of `ranks` holds it."""
        if self.dim is None:
            return [whole] * ranks
        count = self.blocks(config)
        shards = [even(block, ranks, self.dim) for block in even(whole, count, self.dim)]  # [block][rank]
        return [join(rank, self.dim) for rank in zip(*shards, strict=True)]

    def merge(self, ranks: Sequence[Tiled], config: Config) -> Tiled:
        """The whole weight from what each rank holds."""
        if self.dim is None:
            return ranks[0]
        count = self.blocks(config)
        shards = [even(rank, count, self.dim) for rank in ranks]  # [rank][block]
        return join([join(block, self.dim) for block in zip(*shards, strict=True)], self.dim)


def even(whole: Tiled, pieces: int, dim: int) -> list[Tiled]:
    """`whole` in equal pieces along `dim`."""
    size = whole.shape[dim]
    if size % pieces:
        raise ValueError(f"{size} places along axis {dim} do not divide by {pieces}")
    return whole.split([size // pieces] * pieces, dim)


WHOLE, COLUMN, ROW = Cut(), Cut(0), Cut(1)
VOCAB = Cut(0, padded=True)
FC1 = Cut(0, lambda config: 2 if config.gated_linear_unit else 1)  # gate | up, or just up


def sizes(config: Config) -> dict[str, int]:
    """What the letters of the shapes stand for."""
    queries = config.num_attention_heads * (2 if config.attention_output_gate else 1)
    return {
        "V": config.vocab_size,
        "S": config.max_position_embeddings,
        "h": config.hidden_size,
        "d": config.kv_channels,
        "n": config.num_attention_heads,
        "nd": config.num_attention_heads * config.kv_channels,
        "qkv": (queries + 2 * config.num_query_groups) * config.kv_channels,  # per group: q .. | gate .. | k | v
        "f": config.ffn_hidden_size,
        "fc1": config.ffn_hidden_size * FC1.blocks(config),
    }


# When a row exists. "always" has no condition.
CONDITIONS: dict[str, Callable[[Config], bool]] = {
    "always": lambda c: True,
    "LayerNorm": lambda c: c.normalization == "LayerNorm",
    "add_bias_linear": lambda c: c.add_bias_linear,
    "add_qkv_bias": lambda c: c.add_qkv_bias or c.add_bias_linear,
    "qk_layernorm": lambda c: c.qk_layernorm and not c.qk_l2_norm,
    "qk_layernorm, LayerNorm": lambda c: c.qk_layernorm and not c.qk_l2_norm and c.normalization == "LayerNorm",
    "softmax_type learnable": lambda c: c.softmax_type == "learnable",
    "learned positions": lambda c: c.position_embedding_type == "learned_absolute",
    "untied": lambda c: not c.tie_word_embeddings,
}


@dataclass(frozen=True)
class Row:
    """One weight, or one of each layer where the name has `{l}`."""

    name: str
    shape: str  # letters of `sizes`
    cut: Cut = WHOLE
    when: str = "always"  # key of CONDITIONS
    local: str = ""  # as Megatron's local layer spec spells it; the modules of our classes are named so, under `model.`
    fused: str = ""  # as Transformer Engine's operation fuser spells it (`--use-transformer-engine-op-fuser`)
    blocks: tuple[str, ...] = ()  # the blocks of the cut when they are stored one by one
    tied: str = ""  # when absent by `when`, a copy of this weight may be stored and must equal it

    @property
    def runtime(self) -> str:
        """The parameter's name in the base model's modules."""
        return self.local or self.name

    def dims(self, config: Config) -> tuple[int, ...]:
        return tuple(sizes(config)[letter] for letter in self.shape.split())


L = "decoder.layers.{l}"
QKV, PROJ = f"{L}.self_attention.linear_qkv", f"{L}.self_attention.linear_proj"
UP, DOWN = f"{L}.mlp.linear_fc1", f"{L}.mlp.linear_fc2"
F1, F2 = f"{L}.mlp.1.basic_ops", f"{L}.mlp.3.basic_ops"
WORDS = "embedding.word_embeddings.weight"

GPT = (
    Row(WORDS, "V h", VOCAB),
    Row("embedding.position_embeddings.weight", "S h", WHOLE, "learned positions"),
    Row(f"{QKV}.layer_norm_weight", "h", WHOLE, local=f"{L}.input_layernorm.weight"),
    Row(f"{QKV}.layer_norm_bias", "h", WHOLE, "LayerNorm", local=f"{L}.input_layernorm.bias"),
    Row(f"{L}.self_attention.core_attention.softmax_offset", "n", COLUMN, "softmax_type learnable"),
    Row(f"{PROJ}.weight", "h nd", ROW),
    Row(f"{PROJ}.bias", "h", WHOLE, "add_bias_linear"),
    Row(f"{QKV}.weight", "qkv h", COLUMN),
    Row(f"{QKV}.bias", "qkv", COLUMN, "add_qkv_bias"),
    Row(f"{L}.self_attention.q_layernorm.weight", "d", WHOLE, "qk_layernorm"),
    Row(f"{L}.self_attention.q_layernorm.bias", "d", WHOLE, "qk_layernorm, LayerNorm"),
    Row(f"{L}.self_attention.k_layernorm.weight", "d", WHOLE, "qk_layernorm"),
    Row(f"{L}.self_attention.k_layernorm.bias", "d", WHOLE, "qk_layernorm, LayerNorm"),
    Row(f"{UP}.layer_norm_weight", "h", WHOLE, local=f"{L}.pre_mlp_layernorm.weight", fused=f"{L}.mlp.0.weight"),
    Row(f"{UP}.layer_norm_bias", "h", WHOLE, "LayerNorm", local=f"{L}.pre_mlp_layernorm.bias", fused=f"{L}.mlp.0.bias"),
    Row(f"{UP}.weight", "fc1 h", FC1, fused=f"{F1}.0.weight", blocks=(f"{UP}.weight_w", f"{UP}.weight_v")),
    Row(f"{UP}.bias", "fc1", FC1, "add_bias_linear", fused=f"{F1}.1.bias", blocks=(f"{UP}.bias_w", f"{UP}.bias_v")),
    Row(f"{DOWN}.weight", "h f", ROW, fused=f"{F2}.0.weight"),
    Row(f"{DOWN}.bias", "h", WHOLE, "add_bias_linear", fused=f"{F2}.1.bias"),
    Row("decoder.final_layernorm.weight", "h"),
    Row("decoder.final_layernorm.bias", "h", WHOLE, "LayerNorm"),
    Row("output_layer.weight", "V h", VOCAB, "untied", tied=WORDS),
)  # fmt: skip

HEAD = ("output_layer.weight",)  # what the causal model has beside its base model

# Stored beside the weights and left out on purpose, with the reason.
IGNORED = {
    r".*\._?extra_state(/.*|\d+)?": "bookkeeping of layers, for fp8",
    r"(.*\.)?rotary_pos_emb\.inv_freq": "computed from the config",
    r"(chained_\d+\.)?optimizer\..*": "optimizer state",
    r"optimizer_state_dict\..*|opt_param_scheduler\..*": "optimizer state",
    r"rng_state(/.*|\..*)?": "random number state",
    r"rerun_state_machine_state(/.*|\..*)?": "state of the training loop",
    r"common_state(/.*)?|args|iteration|checkpoint_version|num_floating_point_operations_so_far": "read as arguments",
    r"content_metadata(/.*|\..*)?": "read as arguments",
}

# Weights of models that are not built yet, to say more than "unknown".
FOREIGN = {
    r".*\.mixer\..*|decoder\.final_norm\..*": "a hybrid Mamba model",
    r".*\.mlp\.(router|experts|shared_experts|fc[12]_latent_proj)\b.*": "a mixture of experts",
    r".*\.self_attention\.linear_(q|kv|q_down|q_up|kv_down|kv_up|qkv_down)_proj\..*": "multi-latent attention",
    r"mtp\..*": "multi-token prediction",
    r"vision_model\..*|vision_projection\..*|language_model\..*": "LLaVA",
    r"encoder\..*|lm_head\..*|pooler\..*|binary_head\..*|.*tokentype_embeddings.*": "BERT or T5",
}

PREFIX = r"(?:module\.|model\.)*"  # wrappers that some writers leave on


class Found(NamedTuple):
    """A stored key as the table reads it."""

    row: Row
    layer: int | None  # as numbered in the key; None: no layer in it
    stacked: bool  # every layer of the row along a first axis
    part: int  # which of `parts` blocks of the cut this key stores
    parts: int


@cache
def spellings() -> list[tuple[re.Pattern[str], Row, bool, int, int]]:
    """Every way a row is stored, as a pattern: one by one, and stacked where the layer has no number."""
    patterns = []
    for row in GPT:
        for parts in filter(any, ((row.name,), (row.local,), (row.fused,), row.blocks)):
            for part, template in enumerate(parts):
                one = re.escape(template).replace(r"\{l\}", r"(?P<l>\d+)")
                patterns.append((re.compile(PREFIX + one), row, False, part, len(parts)))
                if "{l}" in template:
                    every = re.escape(template.replace(".{l}", ""))
                    patterns.append((re.compile(PREFIX + every), row, True, part, len(parts)))
    return patterns


@cache
def candidates(form: str) -> list[tuple[re.Pattern[str], Row, bool, int, int]]:
    """The spellings that keys of one form (the numbers in them aside) match: one search for all layers."""
    return [spelling for spelling in spellings() if spelling[0].fullmatch(form)]


def recognise(key: str) -> Found | None:
    """The row that `key` is a spelling of, or None."""
    for pattern, row, stacked, part, parts in candidates(re.sub(r"\.\d+\.", ".0.", key)):
        if match := pattern.fullmatch(key):
            number = match.groupdict().get("l")
            return Found(row, None if number is None else int(number), stacked, part, parts)
    return None


def ignored(key: str) -> str | None:
    """Why `key` is left out on purpose, or None."""
    return next((reason for pattern, reason in IGNORED.items() if re.fullmatch(PREFIX + pattern, key)), None)


def foreign(key: str) -> str | None:
    """The kind of model that `key` belongs to, when it is one that is not built yet."""
    return next((kind for pattern, kind in FOREIGN.items() if re.fullmatch(PREFIX + pattern, key)), None)


class Weight(NamedTuple):
    """One weight of one model: a row with its numbers filled in."""

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]


def weights(config: Config) -> Iterator[Weight]:
    """Every weight of the model that `config` describes, in the order of its modules."""
    present = [row for row in GPT if CONDITIONS[row.when](config)]
    layered = [row for row in present if "{l}" in row.name]
    first = next(i for i, row in enumerate(present) if "{l}" in row.name)
    yield from (Weight(row.name, row, None, row.dims(config)) for row in present[:first])
    for layer in range(config.num_layers):
        yield from (Weight(row.name.format(l=layer), row, layer, row.dims(config)) for row in layered)
    after = [row for row in present[first:] if "{l}" not in row.name]
    yield from (Weight(row.name, row, None, row.dims(config)) for row in after)
