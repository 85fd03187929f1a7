"""A family's config.json in our fields, and back; what is not the same function there is refused by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .. import arguments, bert
from ..cuts import Config
from ..errors import Problems, Refused, refuse
from ..models.checks import check_experts
from ..rows import is_bert, is_hybrid, is_llava
from .family import MISSING, Family, Field, Theirs
from .megatron_bert import OTHERS
from .sameness import differences

REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings")
EVALUATED = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
FOLDED = "layernorm_zero_centered_gamma"
KEEP = "keep it a Megatron model: `--to hf`"


def read_config(theirs: Theirs, family: Family, where: str | Path) -> tuple[Config, list[str]]:
    """Our config of a model of `family`, and the names of settings nobody knows.

    Raises:
        Refused: settings that are missing, or make another function than is computed here; all at once.
    """
    made = completed(read_settings(theirs, family, where), family, theirs)
    try:
        check_experts(made)  # as the model class will
    except ValueError as error:
        raise refuse(str(error), where, "such a model cannot be built") from error
    return made, sorted(set(theirs) - family.keys)


def read_settings(theirs: Theirs, family: Family, where: str | Path) -> dict[str, Any]:
    """The fields of ours that a config.json of `family` says."""
    problems, ours = Problems(), dict[str, Any](family.fixed)
    for key, values in family.constants.items():
        if key in theirs and theirs[key] not in values:
            built = " or ".join(map(repr, values))
            problems.add(f"{key} is {theirs[key]!r}; built for {family.name} is {built}", where)
    for row in family.fields:
        try:
            ours[row.ours] = row.read(value_of(row, theirs))
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            problems.add(f"{row.theirs} cannot be read: {error}", where)
    for settings in family.settings:
        try:
            ours |= settings.read(theirs)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            problems.add(f"{', '.join(settings.keys)}: {error}", where)
    problems.raise_if_any()
    return ours


def value_of(row: Field, theirs: Theirs) -> Any:
    value = theirs.get(row.theirs, row.default)
    if value is MISSING:
        raise LookupError("it is not there")
    return value


def completed(ours: dict[str, Any], family: Family, theirs: Theirs) -> Config:
    """All fields of a config: what the family does not say is as in a Megatron run that is not told otherwise."""
    sizes = {name: ours.get(name, 1) for name in REQUIRED}
    hybrid = {"hybrid_override_pattern": family.pattern(theirs), "is_hybrid_model": True} if family.pattern else {}
    base = arguments.config({**sizes, **hybrid, bert.MARK: family.bert}, ours["vocab_size"])
    for name, value in {**EVALUATED, **ours}.items():
        setattr(base, name, value)
    base.num_query_groups = ours.get("num_query_groups") or base.num_attention_heads
    base.kv_channels = ours.get("kv_channels") or base.hidden_size // base.num_attention_heads
    base.ffn_hidden_size = base.ffn_hidden_size or 4 * base.hidden_size
    base.moe_ffn_hidden_size = ours.get("moe_ffn_hidden_size") or base.ffn_hidden_size
    base.add_qkv_bias = base.add_qkv_bias or base.add_bias_linear
    return base


def write_config(config: Config, family: Family) -> dict[str, Any]:
    """The config.json of `family` for the model that `config` describes.

    Raises:
        Refused: with everything that the architecture cannot compute.
    """
    check_kind(config, family)
    model = SimpleNamespace(**{**vars(config), FOLDED: family.fixed.get(FOLDED, False)})  # folded into the weights
    theirs, problems = write_settings(model, family, f"--to {family.name}")
    theirs = {"architectures": [family.architecture], "model_type": family.name, **theirs}
    try:
        again, _ = read_config(theirs, family, "config.json")
    except Refused as error:
        if not problems:  # which leave settings out
            problems.add(str(error), f"--to {family.name}", KEEP)
    else:
        for name, mine, other in differences(model, again):
            problems.add(f"{name} is {mine!r}, in {family.architecture} {other!r}", f"--to {family.name}", KEEP)
    problems.raise_if_any()
    return theirs


def write_settings(model: Config, family: Family, where: str) -> tuple[dict[str, Any], Problems]:
    """The settings of `family` that say what `model` is, and what they cannot say."""
    theirs: dict[str, Any] = {key: values[0] for key, values in family.constants.items()}
    problems = Problems()
    for row in family.fields:
        theirs[row.theirs] = row.write(getattr(model, row.ours, None))
    for settings in family.settings:
        try:
            theirs |= settings.write(model)
        except ValueError as error:
            problems.add(str(error), where, KEEP)
    return theirs, problems


def check_kind(config: Config, family: Family) -> None:
    """Refuses a GPT as a family of hybrids, a BERT as either, and the other ways round: they have nothing in common."""
    if is_llava(config) != bool(family.vision):
        kinds = {True: "one that takes images", False: "a model of text alone"}
        fact = f"it is {kinds[is_llava(config)]}, {family.architecture} is {kinds[bool(family.vision)]}"
    elif family.vision:
        return  # its language model's family is asked this by itself
    elif is_bert(config) != family.bert:
        kinds = {True: "a BERT, whose tokens see both ways", False: "a model that goes on with a text"}
        fact = f"it is {kinds[is_bert(config)]}, {family.architecture} is {kinds[family.bert]}"
    elif is_hybrid(config) and not family.pattern:
        fact = f"it is a hybrid whose layers are {config.hybrid_layer_pattern}, {family.architecture} is a GPT"
    elif family.pattern and not is_hybrid(config):
        fact = f"it is a GPT, layers of {family.architecture} are of several kinds"
    else:
        return
    raise refuse(fact, f"--to {family.name}", KEEP)


def family_of(theirs: Theirs, families: dict[str, Family], where: Path) -> Family:
    """The family that a config.json is of."""
    kind = theirs.get("model_type")
    if kind is None and "ssm_cfg" in theirs:
        remedy = "give a model that is converted for transformers; on the Hub such end in -hf"
        raise refuse("this is a folder of state-spaces' own, for their package mamba_ssm", where, remedy)
    if kind in OTHERS:
        raise refuse(f"model_type is {kind!r}: {OTHERS[str(kind)]}", where)
    if kind not in families:
        built = ", ".join(sorted(families))
        raise refuse(f"model_type {kind!r} is not among the families", where, f"built are {built}")
    return families[str(kind)]
