"""`verify`: every weight of a converted folder, derived again from the checkpoint and compared bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from . import llava
from .architectures import fields
from .checkpoint import open_checkpoint
from .checkpoint.mapped import Files
from .checkpoint.safetensors import Written, stored
from .discovery import marked, shapes_of
from .errors import Problem, Problems, Refused, refuse
from .execute import Checks, Ledger, run, settle
from .export import plan_for
from .families import FAMILIES
from .families.llava import IMAGE_TOKENS
from .families.sameness import differences
from .jsonfile import read_json
from .lowering import lower
from .plan import Copy
from .reading import pread
from .rows import is_bert, is_llava, language
from .writing import Progress

THERE = " of the target"
TOLERANCE = 3e-5  # of fp32 logits, which Megatron's own parallel layouts differ by


class Verified(NamedTuple):
    """What was compared."""

    weights: int
    nbytes: int
    digests: Mapping[str, str]


def verify(source: str | Path, target: str | Path, *, progress: Progress = lambda size: None) -> Verified:
    """Compares what `convert` wrote with what it was made from.

    The weights of the target are read as they are stored, and those of the source are planned anew; a weight that is
    missing, extra, of another shape, number format or content is named, all at once.

    Raises:
        Refused: when anything differs.
    """
    folder = Path(target)
    if is_checkpoint(folder):
        return verify_checkpoint(source, target, progress)
    config, weights = read_config(folder), stored(folder, Files())
    plan, problems = plan_for(source, true_vocab_size=vocabulary(config)), Problems()
    copies = plan.copies
    if config.get("model_type") in FAMILIES:
        if is_llava(plan.config) and plan.config.image_token_id == llava.UNKNOWN_IMAGE_TOKEN:  # told by a tokenizer
            plan.config.image_token_id = next((config[key] for key in IMAGE_TOKENS if key in config), 0)
        theirs, copies, _ = lower(plan, config["model_type"])
        chosen = plan.special  # a tokenizer given to `convert` has its own
        others = {name: value for name, value in theirs.items() if name not in chosen and config.get(name) != value}
    else:
        others = other_fields(fields(plan.config), config)
    pairs = [pair(copy, weights, problems) for copy in copies]
    for name in sorted(set(weights) - {copy.name for copy in copies}):
        problems.add("weights that the source does not have", name)
    for name, value in others.items():
        said = at(config, name)
        problems.add(f"config.json says {name} {said!r}, the source {value!r}", folder / "config.json")
    problems.raise_if_any()
    return compare([p for p in pairs if p is not None], plan.checkpoint.files, folder, progress)


def verify_checkpoint(source: str | Path, target: str | Path, progress: Progress) -> Verified:
    """The weights of a Megatron checkpoint against those of the source, both whole and in their own form."""
    theirs, problems = plan_for(target), Problems()
    mine = plan_for(source, true_vocab_size=theirs.config.vocab_size)
    unlike = [*differences(language(mine.config), language(theirs.config))]
    if is_llava(mine.config) and is_llava(theirs.config):
        unlike += [(name, value, other) for name, value, other in llava.lost(theirs.config, mine.config)]
    for name, ours, other in unlike:
        problems.add(f"the target's args say {name} {other!r}, the source {ours!r}", target)
    found = {copy.name: copy for copy in theirs.copies}
    copies = []
    for copy in mine.copies:
        again = found.pop(copy.name, None)
        if again is None or again.shape != copy.shape:
            what = "weights missing from" if again is None else f"{list(again.shape)}, not {list(copy.shape)}, in"
            problems.add(f"{what} the target", copy.name)
        else:
            same = ((f"{copy.name}{THERE}", again.array), *((where + THERE, array) for where, array in again.same))
            copies.append(replace(copy, dtype=again.array.dtype, same=(*copy.same, *same)))
    for name in sorted(found):
        problems.add("weights that the source does not have", name)
    problems.raise_if_any()
    files, ledger = mine.checkpoint.files, Ledger()
    files.join(theirs.checkpoint.files)
    try:
        digests = run(copies, files, lambda copy, offset, data: None, Checks(), ledger, progress)
        settle(files, copies, ledger)
    except Refused as error:
        raise Refused(*(differing(problem) for problem in error.problems)) from error
    return Verified(len(copies), sum(copy.nbytes for copy in copies), digests)


def differing(problem: Problem) -> Problem:
    """A weight that is stored otherwise in the target, in words of its own."""
    if not problem.where.endswith(THERE):
        return problem
    return Problem("weights that differ from the source", problem.where.partition(",")[0], "convert again")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a folder that `convert` wrote."""
    config = read_json(folder / "config.json")
    if type(vocabulary(config)) is not int:
        raise refuse("not the config of a converted folder: there is no vocab_size", folder / "config.json")
    return config


def vocabulary(config: Mapping[str, Any]) -> Any:
    """The size that a config.json has, or a LLaVA's has for its language model."""
    text = config.get("text_config")
    return config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)


def other_fields(mine: Mapping[str, Any], theirs: Mapping[str, Any], of: str = "") -> dict[str, Any]:
    """What a config.json says otherwise, in its parts as well; but for what a tokenizer told it."""
    found: dict[str, Any] = {}
    for name, value in mine.items():
        there = theirs.get(name, value)
        if isinstance(value, dict) and isinstance(there, dict):
            found |= other_fields(value, there, f"{name}.")
        elif there != value and name not in llava.FROM_TOKENIZER:
            found[of + name] = value
    return found


def at(config: Mapping[str, Any], name: str) -> Any:
    """The field `name` of a config, or of a part of it: `vision_config.img_h`."""
    part, _, field = name.rpartition(".")
    return (config[part] if part else config).get(field)


def pair(copy: Copy, weights: Mapping[str, Written], problems: Problems) -> tuple[Copy, Written] | None:
    """A weight of the plan and what the folder has for it."""
    written = weights.get(copy.name)
    if written is None:
        problems.add("weights missing from the folder", copy.name)
    elif written.shape != copy.shape:
        problems.add(f"shape {list(written.shape)}, should be {list(copy.shape)}", copy.name)
    else:
        return replace(copy, dtype=written.dtype), written
    return None


def compare(pairs: list[tuple[Copy, Written]], here: Files, folder: Path, progress: Progress) -> Verified:
    """Runs the plan again, with the folder's bytes to compare with in place of a file to write."""
    places = {copy.name: written for copy, written in pairs}
    differing: set[str] = set()

    def sink(copy: Copy, offset: int, data: np.ndarray) -> None:
        place = places[copy.name]
        if not np.array_equal(pread(place.file, place.offset + offset, np.empty_like(data)), data):
            differing.add(copy.name)

    copies, ledger = [copy for copy, _ in pairs], Ledger()
    digests = run(copies, here, sink, Checks(), ledger, progress)
    settle(here, copies, ledger)
    problems = Problems()
    for name in sorted(differing):
        problems.add("weights that differ from the checkpoint", name, "convert again")
    recorded = read_json(folder / "megahf.json").get("weights") if (folder / "megahf.json").exists() else {}
    for name, digest in digests.items() if isinstance(recorded, dict) else ():
        if recorded and recorded.get(name) != digest and name not in differing:
            problems.add("weights whose digest in megahf.json is another", name)
    problems.raise_if_any()
    return Verified(len(copies), sum(copy.nbytes for copy in copies), digests)


def is_checkpoint(target: Path) -> bool:
    """Whether it is a Megatron checkpoint, and no folder of transformers' making."""
    return not (target / "config.json").exists() and not any(target.glob("*.safetensors"))


def size_of(target: Path) -> int:
    """Bytes of the weights in `target`, as the bar counts them."""
    if is_checkpoint(target):
        return plan_for(target).nbytes
    return sum(written.nbytes for written in stored(target, Files()).values())


def verify_logits(source: str | Path, folder: str | Path) -> float:
    """The largest difference between the fp32 logits of `folder`'s model and of real megatron-core's on `source`.

    Megatron loads the checkpoint itself, by unpickling: only for sources that are trusted.

    Raises:
        Refused: where megatron-core is not installed, or the difference is above 3e-5.
    """
    import torch

    from .architectures import load_class
    from .judge import bert
    from .judge import llava as images
    from .judge.bench import Bench, world
    from .judge.namespace import recovered

    checkpoint, config = open_checkpoint(source), read_config(Path(folder))
    marks, size = marked(checkpoint.args, shapes_of(checkpoint)), vocabulary(config)
    arguments = {**recovered(marks), "data_parallel_size": 1}  # as few processes as the files need
    tokens = torch.randint(size, (2, 16), generator=torch.Generator().manual_seed(0))
    whole = checkpoint.format != "torch"
    if llava.is_marked(marks):
        told = {name: config[name] for name in llava.FROM_TOKENIZER if name in config}
        settings = {**vars(plan_for(source, true_vocab_size=size).config), **told}
        arguments, tokens = images.asked(arguments, SimpleNamespace(**settings))
        whole = whole and not images.has_dummy_heads(arguments)
    with Bench(1 if whole else world(arguments)) as bench:
        theirs = bench.logits(arguments, checkpoint.path, checkpoint.format, tokens.numpy(), not whole)[..., :size]
    model = load_class(SimpleNamespace(**config)).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        if llava.is_marked(marks):
            ours = images.ours(model, SimpleNamespace(**arguments), tokens)
        else:
            ours = bert.ours(model, tokens) if is_bert(model.config) else model(tokens).logits
    difference = float(abs(ours.numpy() - theirs).max())
    if not difference <= TOLERANCE:
        raise refuse(f"fp32 logits differ from megatron-core's by {difference:.2e}, more than {TOLERANCE:g}", folder)
    return difference
