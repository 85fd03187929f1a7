"""Rotary positions in a config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cuts import Config
from . import yarn
from .family import Settings, Theirs

NAMES = ("rope_theta", "partial_rotary_factor")  # outside `rope_parameters`
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # Megatron's own
YARN = (
    "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor",
    "truncate",
)  # fmt: skip
# What each kind of frequencies is told; anything else is not known here.
KINDS = {"default": (), "linear": ("factor",), "llama3": ("factor", *LLAMA3), "yarn": ("factor", *YARN)}


def rope(
    theta: float = 10000.0,
    part: float | None = None,
    interleaved: bool = False,
    names: tuple[str, str] = NAMES,
    kinds: Sequence[str] = tuple(KINDS),
) -> Settings:
    """The settings of a family's rotary positions.

    Args:
        theta: the base where config.json does not say.
        part: likewise the share of a head's channels that rotate; None: the family rotates whole heads only.
        interleaved: pairs are (even, odd) channels.
        names: of the two outside `rope_parameters`.
        kinds: what `rope_type` can be there and here.
    """

    def read(theirs: Theirs) -> dict[str, Any]:
        told = parameters(theirs, names, (theta, 1.0 if part is None else part))
        if told["rope_type"] not in kinds:
            raise ValueError(f"rope_type {told['rope_type']!r}; built for it are {', '.join(kinds)}")
        share = told.pop("partial_rotary_factor")
        if part is None and share != 1.0:
            raise ValueError(f"partial_rotary_factor is {share}; the architecture rotates whole heads")
        if share != 1.0 and told["rope_type"] == "yarn":
            raise ValueError(f"partial_rotary_factor is {share}; with YaRN Megatron rotates whole heads")
        return {**frequencies(told, theirs), "rotary_percent": float(share), "rotary_interleaved": interleaved}

    def write(config: Config) -> dict[str, Any]:
        said = scaling(config) | {"rope_theta": config.rotary_base}
        if part is not None or config.rotary_percent != 1.0:
            said["partial_rotary_factor"] = config.rotary_percent
        alone = {name: said[key] for name, key in zip(names, NAMES, strict=True) if key in said}
        before = {"rope_scaling": said} if said["rope_type"] != "default" else {}  # transformers 4 and its kin
        return {"rope_parameters": said, **alone, **before}

    return Settings(("rope_parameters", "rope_scaling", *names), read, write)


def parameters(theirs: Theirs, names: tuple[str, str], defaults: tuple[float, float]) -> dict[str, Any]:
    """`rope_parameters` in whichever way they are written; `rope_scaling` goes first, as in transformers."""
    found = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    for key, name, default in zip(NAMES, names, defaults, strict=True):
        found.setdefault(key, theirs.get(name, default))
    return found


def frequencies(told: dict[str, Any], theirs: Theirs) -> dict[str, Any]:
    """Our fields for plain frequencies, linearly interpolated ones, Llama 3.1's and YaRN's."""
    kind, base = told.pop("rope_type"), float(told.pop("rope_theta"))
    if strange := sorted(set(told) - set(KINDS[kind])):
        raise ValueError(f"{', '.join(strange)} with rope_type {kind!r}, which is not known here")
    ours: dict[str, Any] = {"position_embedding_type": "yarn" if kind == "yarn" else "rope", "rotary_base": base}
    if kind == "linear":
        ours["rotary_seq_len_interpolation_factor"] = float(told["factor"])
    elif kind == "llama3":
        told.setdefault("original_max_position_embeddings", theirs.get("max_position_embeddings"))
        for name, value in LLAMA3.items():
            if told.get(name) != value:
                raise ValueError(f"{name} is {told.get(name)}, Megatron has {value} built in")
        ours |= {"use_rope_scaling": True, "rope_scaling_factor": float(told["factor"])}
    elif kind == "yarn":
        ours |= yarn.read(told, theirs.get("max_position_embeddings", 0))
    return ours


def scaling(config: Config) -> dict[str, Any]:
    """`rope_type` and what it is told."""
    if config.position_embedding_type == "yarn":
        return yarn.write(config)
    if config.use_rope_scaling:
        return {"rope_type": "llama3", "factor": config.rope_scaling_factor, **LLAMA3}
    if config.rotary_seq_len_interpolation_factor is not None:
        return {"rope_type": "linear", "factor": config.rotary_seq_len_interpolation_factor}
    return {"rope_type": "default"}


def unrotated(config: Config) -> list[bool]:
    """Whether each layer goes without rotary positions."""
    frequency, layers = config.no_rope_freq or 0, range(config.num_layers)
    if isinstance(frequency, int):
        return [frequency > 0 and (layer + 1) % frequency == 0 for layer in layers]
    return [bool(frequency[layer]) for layer in layers]


ROPE = rope()
