"""A Hugging Face folder as a source: ours, whose weights are canonical, or one of a family, whose rows say how."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import arguments, bert, llava
from .architectures import AUTO_MAPS
from .checkpoint import Checkpoint, Files
from .checkpoint.safetensors import Written, stored
from .cuts import Config
from .errors import Problems, Refused, refuse
from .families import FAMILIES
from .families.composite import completed_parts, read_parts
from .families.family import Family, Line, Theirs
from .families.quantised import refuse_quantised
from .families.translation import REQUIRED, family_of, read_config
from .jsonfile import read_json
from .layouts import Grid
from .llava import Llava
from .models.vision_kinds import vision_kind
from .plan import Copy, Plan, runtime, target_dtype, target_of
from .stored import check_shape
from .tiles import Tiled
from .weights import Weight, table_of, weights

CONFIG, PATTERN = "config.json", "hybrid_layer_pattern"
DAMAGED = "load it with transformers and save it again with save_pretrained"


def is_hf_folder(path: Path) -> bool:
    """Whether `path` is a folder of transformers' making."""
    return (path / CONFIG).is_file() and any(path.glob("*.safetensors"))


def build(folder: Path, *, dtype: str | None = None) -> Plan:
    """The plan of the model in `folder`.

    Raises:
        Refused: an unknown architecture, settings that are not built, weights missing, unknown or misshapen.
    """
    theirs, files = read_json(folder / CONFIG), Files()
    found = {name: tiled(written) for name, written in stored(folder, files).items()}
    wanted = target_dtype(dtype)
    refuse_quantised(theirs, found, folder)
    if theirs.get("model_type") in AUTO_MAPS:
        with said_by(folder / CONFIG):
            config, unknown, notes, family = own_config(theirs, folder), list[str](), list[str](), "hf"
        copies = own_copies(config, found, wanted)
    else:
        kind = family_of(theirs, FAMILIES, folder / CONFIG)
        family, read = kind.name, read_config
        if kind.vision:
            (theirs, kind), read = completed_parts(theirs, kind, folder / CONFIG), read_parts
        with said_by(folder / CONFIG):
            config, unknown = read(theirs, kind, folder / CONFIG)
        found = dict(of_causal(found, kind))
        notes = [*kind.remarks(theirs), *kind.seen(config, found)]
        copies = family_copies(config, kind, found, wanted)
    source = Checkpoint(folder, family, None, None, {}, [], files)
    return Plan(source, config, Grid(), copies, 0, "the config's", "", {}, unknown, notes, special_of(theirs))


@contextlib.contextmanager
def said_by(path: Path) -> Iterator[None]:
    """Refusals of args as those of the file that says so here."""
    try:
        yield
    except Refused as error:
        mine = (
            replace(problem, where=str(path), remedy="the file is damaged, or not as it was saved")
            if problem.where == "args"
            else problem
            for problem in error.problems
        )
        raise Refused(*mine) from error


def special_of(theirs: Theirs) -> dict[str, Any]:
    """The ids of special tokens that a config.json gives."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    parts = (theirs.get("text_config") or {}, theirs)
    return {name: part[name] for part in parts for name in names if part.get(name) is not None}


def tiled(written: Written) -> Tiled:
    return Tiled.of(written.file.view(written.offset, written.shape, written.dtype))


def own_config(theirs: Theirs, folder: Path) -> Config:
    """The config of a folder that holds a model of ours."""
    if theirs.get("model_type") == "mcore_llava":
        return own_llava(theirs, folder)
    told = {name: theirs.get(name, 1) for name in REQUIRED}
    told |= {
        "hybrid_layer_pattern": theirs.get("hybrid_layer_pattern"),
        bert.MARK: theirs["model_type"] == "mcore_bert",
    }
    try:
        fields = vars(arguments.config(told, theirs["vocab_size"]))
    except KeyError as error:
        raise refuse(f"the config has no {error}", folder / CONFIG) from error
    if lacking := sorted(set(fields) - set(theirs)):
        raise refuse(f"the config does not say {', '.join(lacking)}", folder / CONFIG, DAMAGED)
    return SimpleNamespace(**{name: theirs[name] for name in fields})


def own_llava(theirs: Theirs, folder: Path) -> Llava:
    """The config of a folder that holds a LLaVA: a language model's in it, an encoder's, and fields of its own."""
    parts: dict[str, Theirs] = {}
    for name in ("text_config", "vision_config"):
        if not isinstance(part := theirs.get(name), dict):
            raise refuse(f"{name} is {part!r:.60}, no config", folder / CONFIG, DAMAGED)
        parts[name] = part
    if (kind := parts["text_config"].get("model_type")) not in ("mcore_gpt", "mcore_hybrid"):
        raise refuse(f"the language model is {kind!r:.60}, not mcore_gpt or mcore_hybrid", folder / CONFIG, DAMAGED)
    text, vision = own_config(parts["text_config"], folder), parts["vision_config"]
    if lacking := sorted((llava.OWN - set(theirs)) | (llava.ENCODER - set(vision))):
        raise refuse(f"the config does not say {', '.join(lacking)}", folder / CONFIG, DAMAGED)
    try:
        vision_kind(vision["vision_model_type"])
    except ValueError as error:
        raise refuse(str(error), folder / CONFIG, DAMAGED) from error
    own = {name: theirs[name] for name in sorted(llava.OWN)}
    encoder = SimpleNamespace(**{name: vision[name] for name in sorted(llava.ENCODER)})
    return Llava(**own, text_config=text, vision_config=encoder)


def own_copies(config: Config, found: Mapping[str, Tiled], wanted: np.dtype | None) -> list[Copy]:
    """The weights of a folder of ours, as they are."""
    problems, copies, left = Problems(), [], dict(found)
    for weight in weights(config):
        array = left.pop(weight.name, None)
        if array is None:
            problems.add("missing weights", weight.name, "the folder is incomplete, or its config another model's")
        elif fits(weight, array, config, problems):
            copies.append(Copy(weight.name, array, target_of(weight, array.dtype, wanted), (), runtime(weight)))
    for name in left:
        problems.add("weights that the config does not describe", name)
    problems.raise_if_any()
    return copies


def fits(weight: Weight, array: Tiled, config: Config, problems: Problems) -> bool:
    try:
        check_shape(weight.row, array.shape, weight.shape, config, f"{CONFIG} says")
    except ValueError as error:
        problems.add(f"shapes do not fit: {error}", weight.name, "config and weights are not one model's")
        return False
    return True


def family_copies(config: Config, family: Family, found: Mapping[str, Tiled], wanted: np.dtype | None) -> list[Copy]:
    """The weights of a family's folder, joined into ours."""
    lines, problems, copies, used = {line.ours: line for line in family.lines}, Problems(), [], set[str]()
    for weight in weights(config):
        line = lines.get(weight.row.name)
        if line is None:
            problems.add(f"{family.name} has nothing for it", weight.name, "config and family are not one model's")
            continue
        own = weight.row.of(config)
        names, again = line.names(weight.layer, own), [name for name in line.again(own) if name in found]
        used.update(names, again)
        array = joined(line, names, found, config, weight, problems)
        if array is not None and all(fits(weight, found[name], config, problems) for name in again):
            same = tuple((name, found[name]) for name in again)
            copies.append(Copy(weight.name, array, target_of(weight, array.dtype, wanted), same, runtime(weight)))
    left = {name: found[name] for name in found if name not in used}
    copies = tied(copies, left, lines, config)
    for name in left:
        if not any(re.fullmatch(pattern, name) for pattern in family.ignored):
            problems.add(f"weights that {family.name} does not have", name, "config and weights are not one model's")
    problems.raise_if_any()
    return copies


def of_causal(found: Mapping[str, Tiled], family: Family) -> Mapping[str, Tiled]:
    """`found` by today's names of the causal model, also where its base model was saved alone, as GPT-2 on the Hub."""
    for pattern, today in family.once.items():
        found = {re.sub(pattern, today, name): array for name, array in found.items()}
    if not family.base or any(name.startswith(family.base) for name in found):
        return found
    heads = {name for line in family.lines for name in line.theirs if not name.startswith(family.base)}
    return {name if name in heads else family.base + name: array for name, array in found.items()}


def joined(
    line: Line, names: list[str], found: Mapping[str, Tiled], config: Config, weight: Weight, problems: Problems
) -> Tiled | None:
    """One weight of ours from their arrays."""
    if absent := [name for name in names if name not in found]:
        problems.add("missing weights", ", ".join(absent[:4]), "the folder is incomplete, or its config another's")
        return None
    try:
        array = line.joint.read([found[name] for name in names], weight.row.of(config))
    except ValueError as error:
        problems.add(f"shapes do not fit: {error}", ", ".join(names[:4]), "config and weights are not one model's")
        return None
    return array if fits(weight, array, config, problems) else None


def tied(copies: list[Copy], left: dict[str, Tiled], lines: Mapping[str, Line], config: Config) -> list[Copy]:
    """`copies`, with what is stored of a tied weight to be compared; it is taken out of `left`."""
    for row in table_of(config):
        if not row.tied or row.exists(config, None) or row.name not in lines:
            continue
        (name,) = lines[row.name].names(None, config)
        if (array := left.pop(name, None)) is not None:
            copies = [
                replace(copy, same=(*copy.same, (f"{name}, which {CONFIG} ties to it", array)))
                if copy.name == row.tied
                else copy
                for copy in copies
            ]
    return copies
