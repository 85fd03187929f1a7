"""The README.md of a converted folder: what it is, where it came from, how to load it, how to go back.

Its text is `card.md`, beside this file; `model_cards/` has a page on each class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from . import dtypes
from .architectures import class_name, fields, main, model_type
from .cuts import Config
from .inspection import architecture
from .layouts import Grid
from .pattern_drawing import counts, mixer
from .plan import Plan, amount
from .rows import is_hybrid
from .weights import weights

if TYPE_CHECKING:
    from .families.family import Family

TEMPLATE = Path(__file__).with_name("card.md")
TITLES = {"mcore_gpt": "A GPT", "mcore_hybrid": "A hybrid", "mcore_bert": "A BERT", "mcore_llava": "A LLaVA"}
# As the Hub calls it; of all others it is text-generation.
TASKS = {"mcore_bert": "fill-mask", "mcore_llava": "image-text-to-text"}
TAGS: dict[str, Callable[[Config], bool]] = {
    "megatron": lambda c: True,
    "megahf": lambda c: True,
    "custom_code": lambda c: True,
    "moe": lambda c: bool(c.num_experts),
    "mla": lambda c: c.multi_latent_attention,
    "mtp": lambda c: bool(c.mtp_num_layers),
    "mamba": lambda c: is_hybrid(c) and "M" in c.hybrid_layer_pattern and c.mamba_version == 1,
    "mamba2": lambda c: is_hybrid(c) and "M" in c.hybrid_layer_pattern and c.mamba_version == 2,
}
OWN = """
The class is laid out as Megatron-core lays out its modules, and the weights have Megatron-core's names; experts are
fused, `[experts, out, in]`.
"""
STOCK = """
The class is transformers' own: the model was lowered to an architecture that computes the same function.
"""
TRUST = """
`trust_remote_code=True` runs the Python files of this repository, which import torch and transformers and nothing else.
Give the hash of a commit as `revision`, so that the code that runs is the code you have looked at. Where megahf is
installed, its own classes do the same and no code of the repository is run:

```python
import megahf

megahf.register()
model = AUTO_CLASS.from_pretrained(name, revision=revision)
```
"""
VERIFY = """
```
megahf verify CHECKPOINT DIR    # derives every weight from the checkpoint again and compares it with this folder's
```
"""
PIN = """
Give the hash of a commit as `revision` to have these weights and no later ones.
"""


def card(
    plan: Plan,
    provenance: Mapping[str, Any],
    *,
    tokenizer: bool = False,
    base_model: str | None = None,
    family: Family | None = None,
) -> bytes:
    """The README.md of the folder that `plan` makes.

    Args:
        provenance: what `megahf.json` holds.
        tokenizer: whether the folder has one.
        base_model: the repository of the model that this one comes from, where it is known.
        family: the architecture of transformers' own that it was lowered to, if it was.
    """
    config, (total, active) = plan.config, parameters(plan)
    auto = main(config)
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        task=TASKS.get(model_type(config), "text-generation"),
        front=front_matter(config, base_model, family is not None),
        title=f"{TITLES[model_type(config)]} of {millions(total)} parameters",
        model=family.architecture if family else class_name(config),
        type=family.name if family else model_type(config),
        parameters=f"{total:,}" + (f", of which {active:,} take part in a token" if active < total else ""),
        weights=f"{amount(plan.nbytes)}, {formats(plan)}",
        architecture="<br>".join(shape_lines(config)),
        vocabulary=f"{config.vocab_size} ({plan.vocabulary})",
        kind=(STOCK if family else OWN).strip(),
        load=load_lines(auto, tokenizer, family is None),
        trust=PIN if family else TRUST.replace("AUTO_CLASS", auto),
        origin=listed(origin(provenance)),
        digests=", with a digest of every weight" if provenance["weights"] else "",
        verify=VERIFY if is_megatron(provenance) else "",
        layout=layout_options(plan.grid),
        limits=section("Limits", limits(config, provenance)),
    )
    return text.encode()


def front_matter(config: Config, base_model: str | None, stock: bool) -> str:
    """What depends on the model in the metadata that the Hub reads, as YAML."""
    tags = [tag for tag, holds in TAGS.items() if holds(config) and not (stock and tag == "custom_code")]
    base = f"base_model: {json.dumps(base_model)}\n" if base_model else ""
    return f"tags:\n{listed(tags)}\n{base}"


def load_lines(auto: str, tokenizer: bool, trust: bool) -> str:
    """The Python that loads the folder by transformers alone, with its class `auto`."""
    classes, run = [auto], ", trust_remote_code=True" if trust else ""
    lines = [f"model = {auto}.from_pretrained(name, revision=revision{run})"]
    if tokenizer:
        words = "Processor" if auto == "AutoModelForImageTextToText" else "Tokenizer"
        classes.append(f"Auto{words}")
        lines.append(f"{words.lower()} = Auto{words}.from_pretrained(name, revision=revision{run})")
    imports = f"from transformers import {', '.join(classes)}"
    return "\n".join([imports, "", 'name, revision = "ORG/NAME", "main"', *lines])


def parameters(plan: Plan) -> tuple[int, int]:
    """All parameters, and those that take part in a token: of the experts the chosen ones, of further heads none."""
    config, total, active = plan.config, 0, 0.0
    rows = {weight.name: weight.row for weight in weights(config)}
    for copy in plan.copies:
        row, size = rows[copy.name], math.prod(copy.shape)
        if row.float32:
            continue  # a buffer
        total += size
        if row.stack not in ("mtp", "heads"):
            active += size * config.moe_router_topk / config.num_experts if row.experts else size
    return total, round(active)


def millions(count: int) -> str:
    """A number of parameters in words."""
    for unit, factor in (("T", 10**12), ("B", 10**9)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count / 10**6:.1f} M"


def formats(plan: Plan) -> str:
    """The weights' number formats, and the source's where a weight changed its own."""
    written = dict.fromkeys(dtypes.TORCH_NAME[copy.dtype] for copy in plan.copies)
    before = dict.fromkeys(
        dtypes.TORCH_NAME[copy.array.dtype] for copy in plan.copies if copy.array.dtype != copy.dtype
    )
    return " and ".join(written) + (f" (from {' and '.join(before)})" if before else "")


def shape_lines(config: Config) -> list[str]:
    """The architecture in words, a line each."""
    lines = architecture(fields(config)).splitlines()
    if not is_hybrid(config):
        return lines
    symbols = config.hybrid_layer_pattern
    lines += [f"pattern `{symbols}`: " + ", ".join(f"{number} {kind}" for kind, number in counts(symbols).items())]
    if "M" in symbols:
        sizes = {name: size for name, size in mixer(config).items() if size is not None and name != "version"}
        said = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items())
        lines.append(f"Mamba-{config.mamba_version}: {said}")
    return lines


def origin(provenance: Mapping[str, Any]) -> list[str]:
    """What the source was, and what of it is not here."""
    source, vocabulary = provenance["source"], provenance["vocabulary"]
    said = [source["format"]]
    if is_megatron(provenance):
        said.append("a release" if source["iteration"] is None else f"iteration {source['iteration']}")
        said.append(f"written at {Grid(**source['layout'])}")
    lines = [f"{literal(source['name'])}: {', '.join(said)}"]
    if rows := vocabulary["padding_left_out"]:
        lines.append(f"{rows} rows of padding were left out of the vocabulary")
    lines += [f"{count} stored keys were left out: {reason}" for reason, count in provenance["left_out"].items()]
    return [*lines, f"converted by megahf {provenance['megahf']}"]


def is_megatron(provenance: Mapping[str, Any]) -> bool:
    """Whether the source was a Megatron checkpoint, and no Hugging Face folder."""
    return bool(provenance["source"]["format"].startswith("torch"))


def limits(config: Config, provenance: Mapping[str, Any]) -> list[str]:
    """What one should know before relying on it."""
    longest, kind = config.max_position_embeddings, config.position_embedding_type
    lines = [str(note) for note in provenance["notes"]]
    if kind == "learned_absolute":
        lines.append(f"positions are learned: a text has at most {longest} tokens")
    elif kind != "none":
        lines.append(f"the checkpoint's arguments speak of texts of at most {longest} tokens")
    if unknown := provenance["unknown_arguments"]:
        lines.append(
            "Megatron arguments that megahf does not know, taken to leave the function as it is: "
            + ", ".join(map(literal, unknown))
        )
    return lines


def section(title: str, lines: list[str]) -> str:
    """A list under its title; nothing where there is nothing to say."""
    return f"\n## {title}\n\n{listed(lines)}\n" if lines else ""


def listed(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def layout_options(grid: Grid) -> str:
    """The tensor and expert parallel sizes of the source, as options of `convert`."""
    return f"--tp {grid.tensor}" + (f" --ep {grid.expert}" if grid.expert > 1 else "")


def literal(name: object) -> str:
    """A name from elsewhere, as code in Markdown: nothing in it is markup."""
    return f"`{' '.join(str(name).replace('`', ' ').split())}`"
