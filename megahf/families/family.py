"""A Hugging Face architecture as rows: its settings and its weights, each with the way in and the way back.

A family says nothing of what it lacks: what cannot be said in its words does not survive the way there and back, and
that is how lowering finds its reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cuts import Config
from ..tiles import Tiled, join, stack, unstack

Theirs = Mapping[str, Any]  # a config.json
MISSING = object()


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Field:
    """One setting: their key, our field, and the two ways between the values."""

    theirs: str
    ours: str
    default: Any = MISSING  # where their config.json does not have it; MISSING: then it is refused
    read: Callable[[Any], Any] = same
    write: Callable[[Any], Any] = same


@dataclass(frozen=True)
class Settings:
    """Several settings that only make sense together."""

    keys: tuple[str, ...]  # theirs
    read: Callable[[Theirs], dict[str, Any]]  # our fields; ValueError says what is not computed here
    write: Callable[[Config], dict[str, Any]]  # their keys; ValueError says what cannot be said


@dataclass(frozen=True)
class Joint:
    """How several of their arrays make one weight of ours, and back."""

    read: Callable[[Sequence[Tiled], Config], Tiled]
    write: Callable[[Tiled, Config], list[Tiled]]
    gamma: bool = False  # a norm's scale: one about zero is folded into it


@dataclass(frozen=True)
class Line:
    """One weight of ours by their names."""

    ours: str  # a row's name
    theirs: tuple[str, ...]  # `{l}`: their layer; `{e}`: one of each for every expert, expert by expert
    joint: Joint
    layer: Callable[[int, Config], int] = lambda layer, config: layer  # our layer -> theirs
    again: Callable[[Config], Sequence[str]] = lambda config: ()  # names under which the same is stored once more

    def names(self, layer: int | None, config: Config) -> list[str]:
        """Their names, in the order of the joint's arrays."""
        number = 0 if layer is None else self.layer(layer, config)
        each = any("{e}" in name for name in self.theirs)
        experts = range(config.num_experts or 0) if each else range(1)
        return [name.format(l=number, e=expert) for expert in experts for name in self.theirs]


@dataclass(frozen=True)
class Family:
    """An architecture of transformers' own.

    Attributes:
        name: their `model_type`, and what `--to` takes.
        architecture: the class of the causal language model.
        fixed: our fields that every model of the family has so.
        constants: their settings of which only some values are computed here; the first is written.
        harmless: their settings that leave the function as it is.
        remarks: what is worth saying of a model with such a config, coming in or going back.
        pattern: for hybrids, our pattern of layers from their config.
        ignored: stored names that are no weights, as regular expressions, and why.
        seen: sets what the stored names alone tell in our config, and gives what is worth saying of it.
        once: names that some versions stored weights under, as regular expressions, and what stands there today.
        base: what the names of a causal model's weights begin with, and those of its base model saved alone do not.
        bert: whether it is a BERT, all others being GPTs and hybrids.
        blank: shapes of arrays of zeros that theirs has where a model of ours has nothing, by their names.
        vision, text: the families of its image encoder and its language model, whose config.json are parts of its own;
            which language model `composite.py` settles.
    """

    name: str
    architecture: str
    fields: tuple[Field, ...]
    lines: tuple[Line, ...]
    settings: tuple[Settings, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    harmless: frozenset[str] = frozenset()
    remarks: Callable[[Theirs], list[str]] = lambda theirs: []
    pattern: Callable[[Theirs], str] | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    seen: Callable[[Config, Collection[str]], list[str]] = lambda config, names: []
    once: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    bert: bool = False
    blank: Callable[[Config], Mapping[str, tuple[int, ...]]] = lambda config: {}
    vision: Family | None = None
    text: Family | None = None

    @property
    def keys(self) -> set[str]:
        """Their settings that are looked at, or known to do nothing."""
        grouped = {key for settings in self.settings for key in settings.keys}
        return {row.theirs for row in self.fields} | grouped | set(self.constants) | self.harmless | COMMON


def pair(ours: str, theirs: str, weight: Joint, bias: Joint) -> tuple[Line, Line]:
    """A weight and its bias: `ours` and `theirs` are the names up to these words."""
    return Line(f"{ours}weight", (f"{theirs}weight",), weight), Line(f"{ours}bias", (f"{theirs}bias",), bias)


# Settings of any model that say nothing of its function.
COMMON = frozenset((
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "return_dict",
    "output_hidden_states", "output_attentions", "output_router_logits", "initializer_range", "attention_dropout",
    "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "router_aux_loss_coef", "name_or_path",
    "_name_or_path", "id2label", "label2id", "num_labels", "problem_type", "is_encoder_decoder",
    "chunk_size_feed_forward", "pretraining_tp", "_attn_implementation", "tokenizer_class", "torchscript",
    "bad_words_ids", "finetuning_task", "is_decoder",
))  # fmt: skip


def only(key: str, value: Any, default: Any) -> Settings:
    """A setting of which only `value` is built; `default` is transformers' where config.json does not say."""

    def read(theirs: Theirs) -> dict[str, Any]:
        found = theirs.get(key, default)
        if found != value:
            raise ValueError(f"it is {found!r}, built is {value!r}")
        return {}

    return Settings((key,), read, lambda config: {key: value})


def one(arrays: Sequence[Tiled], config: Config) -> Tiled:
    (array,) = arrays
    return array


def as_one(whole: Tiled, config: Config) -> list[Tiled]:
    return [whole]


def turned(arrays: Sequence[Tiled], config: Config) -> Tiled:
    (array,) = arrays
    return array.swapaxes(0, 1)


def as_turned(whole: Tiled, config: Config) -> list[Tiled]:
    return [whole.swapaxes(0, 1)]


def end_to_end(arrays: Sequence[Tiled], config: Config) -> Tiled:
    return join(arrays, 0)


def as_halves(whole: Tiled, config: Config) -> list[Tiled]:
    half = whole.shape[0] // 2
    return whole.split([half, half], 0)


def by_groups(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """q, k and v as Megatron's linear_qkv: for each group its queries, its key, its value."""
    return join([array.unflatten(0, (config.num_query_groups, -1)) for array in arrays], 1).flatten(0)


def as_q_k_v(whole: Tiled, config: Config) -> list[Tiled]:
    heads, groups, channels = config.num_attention_heads, config.num_query_groups, config.kv_channels
    sizes = [heads // groups * channels, channels, channels]
    return [part.flatten(0) for part in whole.unflatten(0, (groups, sum(sizes))).split(sizes, 1)]


def from_fused(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """One array q | k | v."""
    (array,) = arrays
    channels = config.kv_channels
    sizes = [heads * channels for heads in (config.num_attention_heads, *(config.num_query_groups,) * 2)]
    return by_groups(array.split(sizes, 0), config)


def as_fused(whole: Tiled, config: Config) -> list[Tiled]:
    return [join(as_q_k_v(whole, config), 0)]


def each_expert(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """One array an expert as `[experts, ..]`."""
    return stack(arrays)


def as_experts(whole: Tiled, config: Config) -> list[Tiled]:
    return unstack(whole)


def each_gated_expert(arrays: Sequence[Tiled], config: Config) -> Tiled:
    """Gate and up of each expert as `[experts, gate | up, ..]`."""
    return stack([join(arrays[at : at + 2], 0) for at in range(0, len(arrays), 2)])


def as_gated_experts(whole: Tiled, config: Config) -> list[Tiled]:
    return [half for expert in unstack(whole) for half in as_halves(expert, config)]


ONE, GAMMA = Joint(one, as_one), Joint(one, as_one, gamma=True)
TURNED = Joint(turned, as_turned)  # `[in, out]`, as GPT-2's Conv1D has it
GATED = Joint(end_to_end, as_halves)  # gate, up
QKV = Joint(by_groups, as_q_k_v)
FUSED_QKV = Joint(from_fused, as_fused)  # q | k | v
EXPERTS, GATED_EXPERTS = Joint(each_expert, as_experts), Joint(each_gated_expert, as_gated_experts)
