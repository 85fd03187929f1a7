"""Architectures of an image encoder, a projection and a language model: each part in the words of its own family.

Coming in, the language model's family is the one that its config.json names; going back, the first of `LANGUAGES` that
computes the same function.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ..cuts import Config
from ..errors import Problem, Problems, Refused, refuse
from ..llava import Llava, matters, vision
from ..rows import LANGUAGE, is_hybrid
from .family import Family, Line, Theirs
from .glm import ERNIE, GLM, HELIUM
from .llama import ARCEE, LLAMA, SEED_OSS
from .llava import USUAL_LAYER, used_layers
from .mistral import MINISTRAL, MISTRAL
from .mixtral import MIXTRAL
from .nemotron import NEMOTRON
from .phi3 import PHI3
from .qwen import QWEN2, QWEN3
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .sameness import NEUTRAL
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2
from .translation import FOLDED, KEEP, check_kind, read_config, read_settings, write_config, write_settings

# Language models whose logits are one matrix times what their base model gives: nothing else of their class is kept.
ORDER = (
    LLAMA, MISTRAL, QWEN2, QWEN3, MINISTRAL, NEMOTRON, PHI3, SMOLLM3, STARCODER2, STABLELM, GLM, ERNIE, HELIUM, ARCEE,
    SEED_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE,
)  # fmt: skip
LANGUAGES = {family.name: family for family in ORDER}
UNDER, HEAD = f"{LANGUAGE}.", f"{LANGUAGE}.lm_head.weight"
# What transformers 4 left out of a part's settings, where it was as it is in the class.
SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN = {**SIZES, "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
USUAL: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {**SIZES, "vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072},
    "qwen2": QWEN,
    "qwen3": QWEN,
}
USUAL_LANGUAGE = {"llava": "llama", "internvl": "qwen2"}
PREPARED = frozenset(("use_tiling", "max_num_tiles", "use_thumbnail"))  # of images, before the model has them
# A field, and what the names begin with that say nothing more where it differs.
DECIDING = {"vision_model_type": "", "vision_projection_type": "projection_"}
SHOWN = 2  # reasons against each family of a language model


def completed_parts(theirs: Theirs, family: Family, where: str | Path) -> tuple[dict[str, Any], Family]:
    """`theirs` with what it leaves to the classes' defaults, and `family` with its language model's inside."""
    for part in ("text_config", "vision_config"):
        if not isinstance(theirs.get(part), dict):
            raise refuse(f"{part} is {theirs.get(part)!r:.60}, no config", where)
    kind = theirs["text_config"].get("model_type", USUAL_LANGUAGE[family.name])
    if kind not in LANGUAGES:
        what = f"its language model is {kind!r:.60}, with which {family.name} is not built"
        raise refuse(what, where, f"built are {', '.join(LANGUAGES)}")
    encoder = cast(Family, family.vision)
    told = {"vision_feature_layer": USUAL_LAYER[family.name], **theirs}
    told["vision_config"] = {**{row.theirs: row.default for row in encoder.fields}, **theirs["vision_config"]}
    told["text_config"] = {**USUAL.get(kind, {}), **theirs["text_config"]}
    return told, with_language(family, LANGUAGES[kind], unused(told))


def unused(theirs: Theirs) -> dict[str, str]:
    """Names of layers after the one whose output is taken."""
    try:
        used, layers = used_layers(theirs)
    except ValueError:  # which reading the settings says
        return {}
    numbers = "|".join(map(str, range(used, layers)))
    return {rf"vision_tower\.encoder\.layers?\.({numbers})\..*": "a layer that is not used"} if numbers else {}


def with_language(family: Family, text: Family, ignored: Mapping[str, str] | None = None) -> Family:
    """`family` with all its parts' weights, those of the language model `text` under their prefix.

    Args:
        ignored: further names of weights that have no effect.
    """

    def placed(line: Line) -> Line:
        names, again = tuple(UNDER + name for name in line.theirs), line.again
        return replace(
            line, ours=UNDER + line.ours, theirs=names, again=lambda config: [UNDER + name for name in again(config)]
        )

    def seen(config: Config, names: Collection[str]) -> list[str]:
        said = text.seen(config.text_config, {name.removeprefix(UNDER) for name in names if name.startswith(UNDER)})
        if config.tie_word_embeddings and HEAD in names:  # as transformers has it, where they differ
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        return said

    inner = {re.escape(UNDER) + name: why for name, why in text.ignored.items()}
    return replace(
        family,
        text=text,
        lines=(*family.lines, *cast(Family, family.vision).lines, *map(placed, text.lines)),
        ignored={**family.ignored, **inner, **(ignored or {})},
        remarks=lambda theirs: [*family.remarks(theirs), *text.remarks(theirs["text_config"])],
        seen=seen,
    )


def read_parts(theirs: Theirs, family: Family, where: str | Path) -> tuple[Llava, list[str]]:
    """Our config of a model of `family`, and the names of settings nobody knows.

    Raises:
        Refused: settings of any part that are missing, or make another function; all at once.
    """
    encoder, text = cast(Family, family.vision), cast(Family, family.text)
    problems, unknown = Problems(), sorted(set(theirs) - family.keys)
    with gathered(problems):
        language, more = read_config(theirs["text_config"], text, f"{where}, text_config")
        unknown += [f"text_config.{name}" for name in more]
    with gathered(problems):
        images = encoder_of(read_settings(theirs["vision_config"], encoder, f"{where}, vision_config"))
        unknown += [f"vision_config.{name}" for name in sorted(set(theirs["vision_config"]) - encoder.keys)]
    with gathered(problems):
        own = read_settings(theirs, family, where)
    problems.raise_if_any()
    images.num_layers = own.pop("num_layers")
    language.tie_word_embeddings = own["tie_word_embeddings"] = (
        own["tie_word_embeddings"] or language.tie_word_embeddings
    )
    own["projection_ffn_hidden_size"] = language.hidden_size
    return Llava(**own, text_config=language, vision_config=images), unknown


@contextlib.contextmanager
def gathered(problems: Problems) -> Iterator[None]:
    """What is refused inside is kept for later."""
    try:
        yield
    except Refused as error:
        problems.extend(error.problems)


def encoder_of(told: dict[str, Any]) -> SimpleNamespace:
    """An image encoder's config from the fields that are told: the rest is as its type has it."""
    made = {**vars(vision(told, SimpleNamespace(**told))), **told}
    heads, hidden = told["num_attention_heads"], told["hidden_size"]
    made["kv_channels"] = hidden / heads if hidden % heads else hidden // heads
    return SimpleNamespace(**{**made, "num_query_groups": heads})


def write_parts(config: Config, family: Family) -> tuple[dict[str, Any], Family]:
    """The config.json of `family` for the model that `config` describes, and `family` with its language model's inside.

    Raises:
        Refused: with everything that the architecture cannot compute.
    """
    check_kind(config, family)
    encoder, where = cast(Family, family.vision), f"--to {family.name}"
    images = SimpleNamespace(**{**vars(config.vision_config), FOLDED: False})
    model = Llava(**{**vars(config), f"projection_{FOLDED}": False, "vision_config": images})
    theirs, problems = write_settings(model, family, where)
    theirs["vision_config"], others = write_settings(images, encoder, where)
    if not others:
        again = encoder_of(read_settings(theirs["vision_config"], encoder, where))
        others.extend(unlike(images, vars(again), encoder, model))
    problems.extend(others)
    own = {**read_settings(theirs, family, where), "projection_ffn_hidden_size": config.text_config.hidden_size}
    del own["num_layers"]  # of the encoder
    problems.extend(unlike(model, own, family, model))
    with gathered(problems):
        theirs["text_config"], text = write_language(config.text_config, family)
    problems.raise_if_any()
    return {"architectures": [family.architecture], "model_type": family.name, **theirs}, with_language(family, text)


def unlike(mine: Config, theirs: Mapping[str, Any], family: Family, model: Llava) -> Iterator[Problem]:
    """The fields of a part in which it is not what `family` makes of its settings."""
    skipped = tuple(under for name, under in DECIDING.items() if getattr(mine, name, None) != theirs.get(name))
    for name, value in theirs.items():
        there = getattr(mine, name, None)
        if name in NEUTRAL | PREPARED or there == value or not matters(name, model):
            continue
        if name in DECIDING or not (skipped and name.startswith(skipped)):
            yield Problem(f"{name} is {there!r}, in {family.architecture} {value!r}", f"--to {family.name}", KEEP)


def write_language(config: Config, family: Family) -> tuple[dict[str, Any], Family]:
    """The `text_config` for the language model that `config` describes, and the first family that computes the same.

    Raises:
        Refused: there is none, with some reasons against each.
    """
    where = f"--to {family.name}"
    if is_hybrid(config):
        what = f"its language model is a hybrid whose layers are {config.hybrid_layer_pattern}, those here are GPTs"
        raise refuse(what, where, KEEP)
    against = []
    for text in ORDER:
        try:
            theirs = write_config(config, text)
        except Refused as error:
            reasons = [problem.what for problem in error.problems]
            more = f"; and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else ""
            against.append(f"\n  {text.name}: {'; '.join(reasons[:SHOWN])}{more}")
        else:
            return {name: value for name, value in theirs.items() if name != "architectures"}, text
    raise refuse(f"its language model is none of those that it is built with:{''.join(against)}\n ", where, KEEP)
