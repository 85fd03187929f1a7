"""A model of ours as one of a Hugging Face family: config and weights in their words, or the reasons why it is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .cuts import Config
from .errors import Problems, refuse
from .families import FAMILIES
from .families.composite import write_parts
from .families.family import Family, Line
from .families.megatron_bert import OTHERS
from .families.sameness import roundings
from .families.translation import FOLDED, read_config, write_config
from .llava import refuse_untold
from .plan import Copy, Plan
from .rows import LANGUAGE, PROJECTION, Row, language
from .tiles import zeros
from .weights import Weight, weights


def lower(plan: Plan, name: str) -> tuple[dict[str, Any], list[Copy], list[str]]:
    """The config.json and the weights of `plan`'s model as one of the family `name`, and what is worth saying.

    Raises:
        Refused: the architecture cannot compute the same function: with every reason.
    """
    if name in OTHERS:
        raise refuse(f"--to {name}: {OTHERS[name]}", plan.checkpoint.path)
    if name not in FAMILIES:
        raise refuse(f"{name!r} is not a family", "--to", f"one of hf, megatron, {', '.join(sorted(FAMILIES))}")
    refuse_untold(plan.config, plan.checkpoint.args)
    theirs, family = described(plan.config, FAMILIES[name])
    copies = list(lowered(plan, family))
    said = family.remarks(theirs)
    if moved := [copy for copy in copies if copy.plus]:
        here, there, done = ("zero", "one", "added") if moved[0].plus > 0 else ("one", "zero", "taken away")
        said.append(
            f"the norms' scales are about {here}, {family.architecture} has them about {there}: 1 was {done}, and "
            f"rounded to {moved[0].dtype.name}; the way back may not give the same bits"
        )
    text = language(plan.config)
    again, _ = read_config(theirs.get("text_config", theirs), family.text or family, "config.json")
    for field, mine, other in roundings(text, again):
        said.append(f"{field} is {mine!r}, in {family.architecture} {other!r}: rounded so, tokens may choose otherwise")
    return {**theirs, **plan.special}, copies, said


def described(config: Config, family: Family) -> tuple[dict[str, Any], Family]:
    """The config.json of `family` for the model that `config` describes, and `family` with all that is settled."""
    return write_parts(config, family) if family.vision else (write_config(config, family), family)


def lowered(plan: Plan, family: Family) -> Iterator[Copy]:
    """Each weight as theirs."""
    lines, copies = {line.ours: line for line in family.lines}, {copy.name: copy for copy in plan.copies}
    problems = Problems()
    for weight in weights(plan.config):
        line = lines.get(weight.row.name)
        if line is None:
            problems.add(f"{family.architecture} has no place for it", weight.name, "keep it a Megatron model")
            continue
        plus = fold(weight.row, plan.config, family) if line.joint.gamma else 0.0
        yield from parts(copies[weight.name], weight, line, weight.row.of(plan.config), plus)
    for name, shape in family.blank(plan.config).items():
        yield Copy(name, zeros(shape, plan.dtype), plan.dtype, runtime=name)
    problems.raise_if_any()


def fold(row: Row, config: Config, family: Family) -> float:
    """What is added to a norm's scale: 1 where it is about zero here and about one there, -1 the other way round."""
    here = getattr(row.of(config), f"projection_{FOLDED}" if row.part == PROJECTION else FOLDED)
    there = row.part in ("", LANGUAGE) and (family.text or family).fixed.get(FOLDED, False)
    return float(here) - float(there)


def buffers(plan: Plan, name: str) -> set[str]:
    """The names in the family `name` of what is no parameter."""
    lines = {line.ours: line for line in described(plan.config, FAMILIES[name])[1].lines}
    rows = ((weight, lines.get(weight.row.name)) for weight in weights(plan.config) if weight.row.float32)
    return {stored for weight, line in rows if line for stored in line.names(weight.layer, weight.row.of(plan.config))}


def parts(copy: Copy, weight: Weight, line: Line, config: Config, plus: float) -> Iterator[Copy]:
    """One weight of ours as those of theirs that hold it."""
    names = line.names(weight.layer, config)
    arrays = line.joint.write(copy.array, config)
    others = [(where, line.joint.write(array, config)) for where, array in copy.same]
    for number, (name, array) in enumerate(zip(names, arrays, strict=True)):
        same = tuple((where, other[number]) for where, other in others)
        yield replace(copy, name=name, array=array, same=same, runtime=name, plus=plus)
    for name in line.again(config):
        yield replace(copy, name=name, array=arrays[0], same=(), runtime=name, plus=plus)
