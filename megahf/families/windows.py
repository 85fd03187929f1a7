"""Sliding windows of attention: how many tokens a query sees, and in which layers.

transformers hides the keys up to `query - sliding_window`, Megatron those before `query - window_size[0]`: that is the
same with `window_size` `[sliding_window - 1, 0]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..cuts import Config
from .family import Settings, Theirs

SLIDING, FULL = "sliding_attention", "full_attention"


def window(tokens: int | None) -> list[int] | None:
    """`window_size` of a query that sees `tokens`, itself included."""
    return None if tokens is None else [tokens - 1, 0]


def tokens(window_size: Sequence[int] | None) -> int | None:
    return None if window_size is None or window_size[0] < 0 else window_size[0] + 1


def flags(config: Config) -> list[bool]:
    """Whether each layer has the window."""
    layers, frequency = range(config.num_layers), config.window_attn_skip_freq
    if tokens(config.window_size) is None:
        return [False for _ in layers]
    if not frequency:
        return [True for _ in layers]
    return [(n + 1) % frequency != 0 if isinstance(frequency, int) else bool(frequency[n]) for n in layers]


def read(size: int | None, kinds: Sequence[str], layers: int) -> dict[str, Any]:
    """Our fields of a window of `size` tokens in the layers of the kind `sliding_attention`."""
    if len(kinds) != layers or (strange := set(kinds) - {SLIDING, FULL}):
        what = f"{len(kinds)} for {layers} layers" if len(kinds) != layers else f"{sorted(strange)}"
        raise ValueError(f"layer_types: {what}; built are {SLIDING} and {FULL}, one a layer")
    slides = [kind == SLIDING for kind in kinds]
    if not any(slides):
        return {"window_size": None, "window_attn_skip_freq": None}
    if not size:
        raise ValueError("there are layers of sliding_attention, and no sliding_window")
    return {"window_size": window(size), "window_attn_skip_freq": frequency(slides)}


def frequency(slides: Sequence[bool]) -> int | list[int] | None:
    """None where all layers have the window, n where every n-th has not, else a flag a layer."""
    if all(slides):
        return None
    every = slides.index(False) + 1
    regular = all(slide == ((n + 1) % every != 0) for n, slide in enumerate(slides))
    return every if regular and every > 1 else [int(slide) for slide in slides]


def write(config: Config) -> dict[str, Any]:
    """`sliding_window` and `layer_types`."""
    kinds = [SLIDING if slides else FULL for slides in flags(config)]
    return {"sliding_window": tokens(config.window_size), "layer_types": kinds}


def everywhere(default: int | None) -> Settings:
    """`sliding_window` of every layer; `default` where config.json does not say."""

    def ours(theirs: Theirs) -> dict[str, Any]:
        size, layers = theirs.get("sliding_window", default), int(theirs["num_hidden_layers"])
        kind = FULL if size is None else SLIDING
        if other := sorted(set(theirs.get("layer_types") or ()) - {kind}):
            raise ValueError(f"{', '.join(other)} in layer_types; the architecture has {kind} in every layer")
        return read(size, [kind] * layers, layers)

    def back(config: Config) -> dict[str, Any]:
        return {"sliding_window": tokens(config.window_size)}

    return Settings(("sliding_window", "layer_types"), ours, back)


def by_layer(
    default: int | None, usual: Callable[[Theirs], list[bool]], switched: bool = True, needed: bool = False
) -> Settings:
    """`layer_types` of each layer.

    Args:
        default: `sliding_window` where config.json does not say.
        usual: which layers have the window, if there is one, where config.json has no `layer_types`.
        switched: a window counts only with `use_sliding_window`.
        needed: transformers' class does not run without a window.
    """

    def ours(theirs: Theirs) -> dict[str, Any]:
        on, layers = theirs.get("use_sliding_window", False) or not switched, int(theirs["num_hidden_layers"])
        size, kinds = theirs.get("sliding_window", default) if on else None, theirs.get("layer_types")
        if kinds is None:
            slides = usual(theirs) if size is not None else [False] * layers
            kinds = [SLIDING if slide else FULL for slide in slides]
        return read(size, kinds, layers)

    def back(config: Config) -> dict[str, Any]:
        theirs = write(config)
        if needed and theirs["sliding_window"] is None:
            raise ValueError("there is no window: the architecture does not run without one")
        return {**theirs, "use_sliding_window": SLIDING in theirs["layer_types"]} if switched else theirs

    return Settings(("sliding_window", "layer_types", "use_sliding_window")[: 2 + switched], ours, back)
