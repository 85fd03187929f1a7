"""The judge: real megatron-core on CPUs, which writes checkpoints and says what their logits are.

megatron-core is an extra: nothing here imports it until a worker process starts, and all of it runs in worker
processes (`pool.Pool`), because it must be patched before it is imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from megahf.errors import refuse

MEGATRON = "megatron-core==0.16.1"
NEEDED = ("megatron.core", "einops")


def megatron_installed() -> bool:
    return all(map(found, NEEDED))


def require_megatron() -> None:
    """Refuses, with the command to run, where megatron-core or what it imports is missing."""
    missing = [name for name in NEEDED if not found(name)]
    if missing:
        packages = " ".join(MEGATRON if name == "megatron.core" else name for name in missing)
        raise refuse(f"{' and '.join(missing)} not installed", "", f"run: pip install --no-deps {packages}")


def found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the parent package of a dotted name
        return False
