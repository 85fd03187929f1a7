"""The small files of a Hub-ready folder: config, generation config, code, tokenizer, and where it all came from.

Written without transformers, and what transformers itself would write from the same model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__, dtypes
from .architectures import auto_map, class_name, model_file, model_type
from .cards import card
from .errors import refuse
from .families import FAMILIES
from .jsonfile import read_json
from .plan import Plan
from .rows import is_bert

MODELS = Path(__file__).with_name("models")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def small_files(plan: Plan, digests: Mapping[str, str], tokenizer: Path | None) -> dict[str, bytes]:
    """Every file of the folder but the weights and their index."""
    special = {**plan.special, **(special_tokens(tokenizer) if tokenizer else {})}
    files = tokenizer_files(tokenizer)
    files |= {path.name: path.read_bytes() for path in code(model_file(plan.config))}
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


def tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    """The files of the tokenizer saved in `folder`."""
    if folder is None:
        return {}
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


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
    return {
        "architectures": [class_name(plan.config)],
        "auto_map": auto_map(plan.config),
        "model_type": model_type(plan.config),
        "dtype": dtypes.TORCH_NAME[plan.dtype],
        "transformers_version": transformers_version(),
        "use_cache": not is_bert(plan.config),
        **dict.fromkeys(SPECIAL),
        **vars(plan.config),
        **special,
    }


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


def tokenizer_size(folder: Path) -> int:
    """One more than the largest token id of the tokenizer saved in `folder`."""
    return 1 + max(token_ids(folder).values())


def token_ids(folder: Path) -> dict[str, int]:
    """Every token of the tokenizer saved in `folder`, and its id."""
    path, remedy = folder / "tokenizer.json", "save the tokenizer there with save_pretrained of a fast tokenizer"
    if not path.exists():
        raise refuse("there is no tokenizer.json", folder, remedy)
    tokenizer = read_json(path)
    try:
        vocab = tokenizer["model"]["vocab"]
        ids = dict(vocab) if isinstance(vocab, dict) else {entry[0]: i for i, entry in enumerate(vocab)}
        ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise refuse(f"the tokenizer cannot be read: {error!r}", path, remedy) from error
    if not ids or not all(type(number) is int for number in ids.values()):
        raise refuse("the tokenizer has no tokens with numbers", path, remedy)
    return ids


def special_tokens(folder: Path) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id` of the tokenizer saved in `folder`."""
    path = folder / "tokenizer_config.json"
    settings, ids = read_json(path) if path.exists() else {}, token_ids(folder)
    found = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in ids:
            found[f"{name}_id"] = ids[token]
    return found
