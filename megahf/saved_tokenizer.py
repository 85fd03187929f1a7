"""A tokenizer as it is saved in a folder: its files and its tokens, read without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import refuse
from .jsonfile import read_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt", "generation_config.json",
)  # fmt: skip


def tokenizer_files(folder: Path | None) -> dict[str, bytes]:
    """The files of the tokenizer saved in `folder`."""
    if folder is None:
        return {}
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").is_file()


def tokenizer_size(folder: Path, added: Sequence[str] = ()) -> int:
    """One more than the largest token id of the tokenizer saved in `folder`, once the tokens `added` are."""
    return 1 + max(ids_with(folder, added).values())


def ids_with(folder: Path, added: Sequence[str]) -> dict[str, int]:
    """Every token and its id, once the tokens `added` are; those there already stay."""
    ids = token_ids(folder)
    for token in added:
        ids.setdefault(token, 1 + max(ids.values()))
    return ids


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
