"""A model of ours as one of a Hugging Face family: config and weights in their words, or the reasons why it is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .cuts import Config
from .errors import Problems, refuse
from .families import FAMILIES
from .families.family import Family, Line
from .families.megatron_bert import OTHERS
from .families.sameness import roundings
from .families.translation import FOLDED, read_config, write_config
from .plan import Copy, Plan
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
    family = FAMILIES[name]
    theirs = write_config(plan.config, family)
    copies = list(lowered(plan, family))
    said = family.remarks(theirs)
    if moved := [copy for copy in copies if copy.plus]:
        here, there, done = ("zero", "one", "added") if moved[0].plus > 0 else ("one", "zero", "taken away")
        said.append(
            f"the norms' scales are about {here}, {family.architecture} has them about {there}: 1 was {done}, and "
            f"rounded to {moved[0].dtype.name}; the way back may not give the same bits"
        )
    for field, mine, other in roundings(plan.config, read_config(theirs, family, "config.json")[0]):
        said.append(f"{field} is {mine!r}, in {family.architecture} {other!r}: rounded so, tokens may choose otherwise")
    return {**theirs, **plan.special}, copies, said


def lowered(plan: Plan, family: Family) -> Iterator[Copy]:
    """Each weight as theirs."""
    lines, copies = {line.ours: line for line in family.lines}, {copy.name: copy for copy in plan.copies}
    folds = float(plan.config.layernorm_zero_centered_gamma) - float(family.fixed.get(FOLDED, False))
    problems = Problems()
    for weight in weights(plan.config):
        line = lines.get(weight.row.name)
        if line is None:
            problems.add(f"{family.architecture} has no place for it", weight.name, "keep it a Megatron model")
            continue
        plus = folds if line.joint.gamma else 0.0
        yield from parts(copies[weight.name], weight, line, plan.config, plus)
    for name, shape in family.blank(plan.config).items():
        yield Copy(name, zeros(shape, plan.dtype), plan.dtype, runtime=name)
    problems.raise_if_any()


def buffers(plan: Plan, name: str) -> set[str]:
    """The names in the family `name` of what is no parameter."""
    lines = {line.ours: line for line in FAMILIES[name].lines}
    rows = ((weight, lines.get(weight.row.name)) for weight in weights(plan.config) if weight.row.float32)
    return {stored for weight, line in rows if line for stored in line.names(weight.layer, plan.config)}


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
