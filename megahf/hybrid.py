"""Which layer of a hybrid model is what: the pattern, from Megatron's arguments of all versions.

`M` Mamba, `*` attention, `-` MLP, `E` mixture of experts, `+` multi-latent attention, `G` gated delta net, `D` sparse
attention; `|` between pipeline stages, `/` before what each head for further tokens repeats. Follows
megatron/core/ssm/mamba_hybrid_layer_allocation.py (0.16.1) and megatron/core/models/hybrid/hybrid_layer_allocation.py
(2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from .errors import refuse
from .rows import is_hybrid

# Config fields of the mixers that args record, in those that have them, and Megatron's numbers before.
MIXER = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_num_heads": None}
# And those that only a spec sets: as Megatron's own spec does, until the weights say otherwise.
UNRECORDED = {
    "mamba_version": 2, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 128, "mamba_d_has_hdim": False,
    "mamba_rmsnorm": True, "mamba_conv_bias": True, "mamba_proj_bias": False, "mamba_dt_rank": None,
}  # fmt: skip
DISCOVERED = frozenset(UNRECORDED) - {"mamba_proj_bias"}  # read off the weights; or, of chunks, a matter of speed
RATIOS = ("hybrid_attention_ratio", "hybrid_mlp_ratio")
PATTERNS = ("hybrid_layer_pattern", "hybrid_override_pattern", "mtp_hybrid_override_pattern", "is_hybrid_model")
ARGUMENTS = frozenset((*MIXER, *RATIOS, *PATTERNS))
MEGATRONS = ("mamba_layer_specs", "hybrid_layer_specs")  # modules of Megatron's own specs
SPEC = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]  # by this name in 0.16.1 and in 2026

BUILT = "M*-E+"
MOST = 100_000  # layers that are made of ratios
OTHERS = {"G": "gated delta nets", "D": "DeepSeek's sparse attention"}


class Pattern(NamedTuple):
    """A hybrid model's layers."""

    layers: str  # a symbol a layer
    stages: tuple[int, ...] = ()  # layers of each pipeline stage, in the order they run; empty: not said
    heads: str = ""  # layers of each head for further tokens
    depth: int = 0  # such heads


def pattern_of(args: Mapping[str, Any]) -> Pattern | None:
    """The pattern that `args` stand for; None if they are a GPT's.

    Raises:
        Refused: symbols that are not built or not Megatron's, and arguments that contradict one another.
    """
    text = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    ratios = {name: args.get(name) or 0.0 for name in RATIOS}
    if text is None and not args.get("is_hybrid_model") and not any(ratios.values()):
        return None
    if text is None:
        text = from_ratios(*countable(args, ratios))
    if not isinstance(text, str):
        raise refuse(f"the pattern of layers is {text!r:.60}, not a text", "args")
    pattern = parsed(text)
    if any(ratios.values()) and args.get("hybrid_layer_pattern") is None:
        check_ratios(pattern.layers, from_ratios(*countable(args, ratios)), ratios)
    if pattern.depth == 0 and args.get("mtp_num_layers") and args.get("mtp_hybrid_override_pattern"):
        pattern = pattern._replace(heads=str(args["mtp_hybrid_override_pattern"]), depth=args["mtp_num_layers"])
    check(pattern, text, args)
    return pattern


def fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that only hybrids have; none for a GPT."""
    pattern = pattern_of(args)
    if pattern is None:
        return {}
    recorded = {name: default if args.get(name) is None else args[name] for name, default in MIXER.items()}
    for name, value in recorded.items():
        if value is not None and (type(value) is not int or value < 1):
            raise refuse(f"{name} is {value!r:.60}, not a number of at least 1", "args")
    built = {"use_rope_scaling": False}  # which no builder of hybrids passes on
    layers = {"hybrid_layer_pattern": pattern.layers, "num_layers": len(pattern.layers)}
    heads = {"mtp_layer_pattern": pattern.heads or None, "mtp_num_layers": pattern.depth or None}
    return {**layers, **heads, **recorded, **UNRECORDED, **built}


def arguments(config: Any) -> dict[str, Any]:
    """The arguments that `fields` reads a hybrid's own fields from."""
    recorded = {name: getattr(config, name) for name in MIXER}
    return {**patterns(config), **recorded, "is_hybrid_model": True, "spec": SPEC}


def patterns(config: Any, stages: Sequence[int] = ()) -> dict[str, Any]:
    """The pattern as 2026 reads it, and as 0.16.1 does where it can: it knows no stages, no heads and no `+`.

    Args:
        stages: layers of each pipeline stage, in the order they run; empty: not said.

    A checkpoint may hold both, as Megatron of 2026 looks at its own first; its command line takes one.
    """
    layers = config.hybrid_layer_pattern
    ends = list(accumulate(stages)) or [len(layers)]
    main = "|".join(layers[start:end] for start, end in zip([0, *ends], ends, strict=False))
    heads = f"/{config.mtp_layer_pattern}" * (config.mtp_num_layers or 0)
    old = not stages and not heads and "+" not in layers
    return {
        "hybrid_layer_pattern": main + heads,
        "hybrid_override_pattern": layers if old else None,
        "mtp_hybrid_override_pattern": None,
    }


def unsaid(config: Any) -> list[str]:
    """What is a matter of the spec in Megatron, and is not as its own spec has it: one sentence each.

    All but `mamba_proj_bias` are read off the weights again, so the weights may be written: they are whole, and right
    for the spec they were trained with. But no argument records that spec, and with Megatron's own they do not load.
    """
    if not is_hybrid(config) or "M" not in config.hybrid_layer_pattern + (config.mtp_layer_pattern or ""):
        return []
    said = []
    for name in sorted(DISCOVERED):
        value, default = getattr(config, name), UNRECORDED[name]
        if value == default or name == "mamba_dt_rank" or (name == "mamba_expand" and config.mamba_num_heads):
            continue  # the rank goes with version 1; a number of heads, which args record, says the width
        if name == "mamba_chunk_size":
            said.append(f"mamba_chunk_size {value} is not recorded: Megatron scans {default} tokens at once, as well")
        else:
            said.append(f"no argument of Megatron's records {name} {value}: give --spec with layers that have it")
    if config.qk_layernorm and "*" in config.hybrid_layer_pattern:
        said.append("Megatron before 0.17 has no q and k norms in hybrids and cannot load them")
    return said


def layout(args: Mapping[str, Any]) -> str | None:
    """The stages that `|` in the pattern says, as a layout string: `t` a layer."""
    pattern = pattern_of(args)
    return "|".join("t" * layers for layers in pattern.stages) if pattern and pattern.stages else None


def notes(args: Mapping[str, Any]) -> list[str]:
    """What is worth saying about a hybrid's arguments."""
    spec = args.get("spec")
    names = " ".join(spec) if isinstance(spec, (list, tuple)) else str(spec or "")
    if pattern_of(args) is None or not names or any(module in names for module in MEGATRONS):
        return []
    return [f"layers are from {names}: sizes are read off the weights, its code is taken for Megatron's own"]


def countable(args: Mapping[str, Any], ratios: Mapping[str, Any]) -> tuple[int, float, float]:
    """The number of layers, and the shares of attention and MLP layers among them."""
    layers = args.get("num_layers")
    if type(layers) is not int or not 0 < layers <= MOST:
        raise refuse(f"num_layers is {layers!r:.60}, not a number of layers", "args")
    for name, share in ratios.items():
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise refuse(f"{name} is {share!r:.60}, not a share from 0 to 1", "args")
    attention, mlp = ratios.values()
    if attention + mlp > 1:
        raise refuse(f"shares of {attention} and {mlp} are more than all layers", "args")
    return layers, attention, mlp


def check_ratios(layers: str, shared: str, ratios: Mapping[str, Any]) -> None:
    """Megatron takes a pattern beside ratios only where it has as many layers of each kind."""
    for symbol in "M*-":
        if layers.count(symbol) != shared.count(symbol):
            said = ", ".join(f"{name} {share}" for name, share in ratios.items())
            raise refuse(
                f"the pattern {layers!r} has {layers.count(symbol)} layers {symbol!r}, {said} make it "
                f"{shared.count(symbol)}",
                "args",
            )


def parsed(text: str) -> Pattern:
    """`"M-M-|M-M*-/MM/MM"` as layers, stages and heads."""
    main, *heads = text.split("/")
    stages = main.split("|")
    if len(set(heads)) > 1:
        raise refuse(f"the heads of {text!r} differ from one another", "args")
    lengths = tuple(map(len, stages)) if len(stages) > 1 else ()
    return Pattern("".join(stages), lengths, heads[0] if heads else "", len(heads) if heads and heads[0] else 0)


def check(pattern: Pattern, text: str, args: Mapping[str, Any]) -> None:
    """Refuses symbols that are not built or unknown, and a length that the args contradict."""
    for symbol in sorted(set(pattern.layers + pattern.heads) - set(BUILT)):
        meaning = f"{OTHERS[symbol]}, which are not supported" if symbol in OTHERS else "no symbol of Megatron's"
        raise refuse(f"the pattern {text!r} has {symbol!r}: {meaning}", "args", f"known are {' '.join(BUILT)}")
    said = args.get("num_layers")
    if said is not None and said != len(pattern.layers) and args.get("hybrid_layer_pattern") is None:
        raise refuse(f"the pattern {text!r} has {len(pattern.layers)} layers, the args say {said}", "args")
    if {"*", "+"} <= set(pattern.layers):
        raise refuse(f"the pattern {text!r} mixes attention and multi-latent attention", "args")
    if not set(pattern.layers) & set("M*+"):
        raise refuse(f"the pattern {text!r} has no layer in which a token sees another", "args", "one of M * +")
    if "*" in pattern.layers + pattern.heads and args.get("multi_latent_attention"):
        raise refuse(f"the pattern {text!r} has '*' where multi_latent_attention makes attention '+'", "args")


def from_ratios(layers: int, attention: float, mlp: float) -> str:
    """The pattern Megatron makes of shares of attention and MLP layers: evenly spaced, from Mamba to Mamba."""
    symbols = ["M"] * layers
    heads = round(layers * attention)
    spread(symbols, "*", (layers - heads) / (heads + 1))
    dense = round(layers * mlp)
    if dense:
        spread(symbols, "-", (layers - heads - dense) / dense)
    return "".join(symbols)


def spread(symbols: list[str], symbol: str, between: float) -> None:
    """Turns Mamba layers into `symbol` wherever `between` of them have passed."""
    left = between
    for place, there in enumerate(symbols):
        if there != "M":
            continue
        if left < 0.5:
            symbols[place] = symbol
            left += between
        else:
            left -= 1
