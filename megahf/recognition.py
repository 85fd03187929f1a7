"""What a stored key is: a weight of the table in one of its spellings, something left out on purpose, or unknown."""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from .rows import IMAGES, LANGUAGE, LAYERS, PROJECTION, VISION, Row, Spelling
from .weights import LLAVA, TABLE

# Stored beside the weights and left out on purpose, with the reason.
IGNORED = {
    r".*\._?extra_state(/.*|\d+)?": "bookkeeping of layers, for fp8",
    r"(.*\.)?rotary_pos_emb\.inv_freq": "computed from the config",
    r".*\.router\.(local_tokens_per_expert|global_tokens_per_expert|ga_steps)": "counts of the training loop",
    r"(chained_\d+\.)?optimizer\..*": "optimizer state",
    r"optimizer_state_dict\..*|opt_param_scheduler\..*": "optimizer state",
    r"rng_state(/.*|\..*)?": "random number state",
    r"rerun_state_machine_state(/.*|\..*)?": "state of the training loop",
    r"common_state(/.*)?|args|iteration|checkpoint_version|num_floating_point_operations_so_far": "read as arguments",
    r"content_metadata(/.*|\..*)?": "read as arguments",
}

# Weights of models that are not built yet, to say more than "unknown".
FOREIGN = {
    r".*\.router\.qb_beta": "quantile balancing of experts",
    r"vision_model\.video_embedder\..*": "an encoder of videos",
    r"(vision_model|language_model)\.model\..*": "transformers' own models inside Megatron's LLaVA",
    r"vision_model\.(patch_embed|merger|rope)\..*": "an image encoder of Megatron's that is not built",
    r"sound_model\..*|sound_projection\..*": "a LLaVA that hears",
    r".*\.(pre_)?cross_attn.*|.*\.cross_attention.*|lm_head\.output_layer\.bias": "T5",
}

PREFIX = r"(?:module\.|model\.)*"  # wrappers that some writers leave on
WRAPPERS = re.compile(f"^{PREFIX}")
PART = re.compile(rf"{PREFIX}({VISION}|{PROJECTION}|{LANGUAGE})\.")  # of a LLaVA
NUMBERS = re.compile(r"(?<=\.)\d+(?=\.)|(?:(?<=linear_fc[12]\.weight)|(?<=linear_fc[12]\.bias))\d+(?=$|_[wv]$)")


class Found(NamedTuple):
    """A stored key as the table reads it."""

    row: Row
    spelling: Spelling
    layer: int | None  # as numbered in the key; None: no layer in it
    stacked: bool  # every layer of the row along a first axis
    expert: int | None  # as numbered in the key
    head: int | None = None  # as numbered in the key


Candidate = tuple[re.Pattern[str], Row, Spelling, bool]  # the last: stacked, where the layer has no number


@cache
def spellings(llava: bool) -> dict[str, list[Candidate]]:
    """Every way a row is stored, one by one and stacked, by the form of its keys; of a LLaVA, or of other models."""
    ways: dict[str, list[Candidate]] = {}
    for row in LLAVA if llava else TABLE:
        for spelling in row.spellings:
            together = {spelling.key.replace(".{l}", ""): True} if row.stack in (*LAYERS, IMAGES) else {}
            keys = {spelling.key: False} | together
            for key, stacked in keys.items():
                ways.setdefault(form(key.format(l=0, e=0, k=0)), []).append((pattern(key), row, spelling, stacked))
    return ways


def pattern(key: str) -> re.Pattern[str]:
    numbered = (
        re.escape(key)
        .replace(r"\{l\}", r"(?P<l>\d+)")
        .replace(r"\{e\}", r"(?P<e>\d+)")
        .replace(r"\{k\}", r"(?P<k>\d+)")
    )
    return re.compile(PREFIX + numbered)


def form(key: str) -> str:
    """`key` without wrappers and with its numbers aside: what all layers and experts have in common."""
    return NUMBERS.sub("0", WRAPPERS.sub("", key))


@cache
def recognise(key: str) -> tuple[Found, ...]:
    """What `key` may be a spelling of: which of them it is, the config decides, layer by layer; empty if unknown.

    Several weights may share a key: a norm is spelled alike in layers with and without experts, and a fused matrix
    holds two. Files of ranks hold the same keys over and over, so it is asked once for each.
    """
    found = []
    for matcher, row, spelling, every in spellings(PART.match(key) is not None).get(form(key), ()):
        if match := matcher.fullmatch(key):
            numbers = match.groupdict()
            layer, expert, head = (int(numbers[name]) if name in numbers else None for name in "lek")
            found.append(Found(row, spelling, layer, every, expert, head))
    return tuple(found)


def ignored(key: str) -> str | None:
    """Why `key` is left out on purpose, or None."""
    return reason(form(key))


@cache
def reason(of: str) -> str | None:
    return next((why for pattern, why in IGNORED.items() if re.fullmatch(PREFIX + pattern, of)), None)


def foreign(key: str) -> str | None:
    """The kind of model that `key` belongs to, when it is one that is not built yet."""
    return next((kind for pattern, kind in FOREIGN.items() if re.fullmatch(PREFIX + pattern, key)), None)
