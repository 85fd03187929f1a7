"""The small files of a Hub-ready folder: config, generation config, code, tokenizer, and where it all came from.

Written without transformers, and what transformers itself would write from the same model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, dtypes
from .architectures import auto_map, class_name, fields, model_file, model_type
from .cards import card
from .families import FAMILIES
from .jsonfile import as_json
from .plan import Plan
from .processors import CODE, processor_files
from .rows import is_bert, is_llava
from .saved_tokenizer import special_tokens, tokenizer_files

MODELS = Path(__file__).with_name("models")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def small_files(plan: Plan, digests: Mapping[str, str], tokenizer: Path | None) -> dict[str, bytes]:
    """Every file of the folder but the weights and their index."""
    special = {**plan.special, **(special_tokens(tokenizer) if tokenizer else {})}
    files = tokenizer_files(tokenizer)
    modules = [model_file(plan.config)]
    if is_llava(plan.config):
        files |= processor_files(plan.config, plan.checkpoint.args, tokenizer)
        modules += CODE
    files |= {path.name: path.read_bytes() for module in modules for path in code(module)}
    files["config.json"] = as_json(config_json(plan, special))
    if not is_bert(plan.config):
        files.setdefault("generation_config.json", as_json(generation_json(special)))
    origin = provenance(plan, digests)
    files["megahf.json"] = as_json(origin)
    files["README.md"] = card(plan, origin, tokenizer=tokenizer is not None)
    return files


def family_files(
    plan: Plan, theirs: Mapping[str, Any], digests: Mapping[str, str], tokenizer: Path | None
) -> dict[str, bytes]:
    """Every file of the folder of a family's model but the weights and their index."""
    special = special_tokens(tokenizer) if tokenizer else {}
    files = tokenizer_files(tokenizer)
    config: dict[str, Any] = {"dtype": dtypes.TORCH_NAME[plan.dtype], "transformers_version": transformers_version()}
    config |= {**dict.fromkeys(SPECIAL), **theirs}  # none: else a class has those of the model it was made for
    files["config.json"] = as_json({**config, **special})
    if not is_bert(plan.config):
        files.setdefault("generation_config.json", as_json(generation_json({**plan.special, **special})))
    origin = provenance(plan, digests)
    files["megahf.json"] = as_json(origin)
    files["README.md"] = card(plan, origin, tokenizer=tokenizer is not None, family=FAMILIES[theirs["model_type"]])
    return files


@cache
def code(module: str) -> tuple[Path, ...]:
    """The modeling file and all that it imports from beside it."""
    wanted, seen = [module], {}
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen[name] = MODELS / f"{name}.py"
            wanted += re.findall(r"^\s*from\s+\.(\w+)\s+import", seen[name].read_text(), re.MULTILINE)
    return tuple(sorted(seen.values()))


def config_json(plan: Plan, special: Mapping[str, int]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "architectures": [class_name(plan.config)],
        "auto_map": auto_map(plan.config),
        "model_type": model_type(plan.config),
        "dtype": dtypes.TORCH_NAME[plan.dtype],
        "transformers_version": transformers_version(),
        **fields(plan.config),
    }
    of_text = made["text_config"] if is_llava(plan.config) else made
    defaults = {"use_cache": not is_bert(plan.config), **dict.fromkeys((*SPECIAL, "loss_chunk_size"))}
    of_text |= {**defaults, **of_text, **special}
    return made


def generation_json(special: Mapping[str, int]) -> dict[str, Any]:
    return {
        "_from_model_config": True,
        "output_attentions": False,
        "output_hidden_states": False,
        "transformers_version": transformers_version(),
        "use_cache": True,
        **special,
    }


@cache
def transformers_version() -> str:
    return metadata.version("transformers")


def provenance(plan: Plan, digests: Mapping[str, str]) -> dict[str, Any]:
    """`megahf.json`: what was converted, by what, and a digest of every weight."""
    checkpoint = plan.checkpoint
    return {
        "megahf": __version__,
        "source": {
            "name": checkpoint.path.name,
            "format": checkpoint.format,
            "iteration": checkpoint.iteration,
            "checkpoint_version": checkpoint.version,
            "layout": {name: value for name, value in asdict(plan.grid).items() if value is not None},
        },
        "vocabulary": {"size": plan.config.vocab_size, "padding_left_out": plan.padding, "size_known": plan.vocabulary},
        "left_out": plan.left_out,
        "unknown_arguments": plan.unknown_arguments,
        "notes": plan.notes,
        "digest": "blake3 of each weight's bytes",
        "weights": dict(sorted(digests.items())),
    }
