"""JSON files: those that someone else may have written, and ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import refuse


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file at `path`; refused where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise refuse(f"there is no {path.name}", path.parent) from error
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"the file cannot be read: {error}", path) from error
    if not isinstance(value, dict):
        raise refuse("the file holds no JSON object", path)
    return value


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
