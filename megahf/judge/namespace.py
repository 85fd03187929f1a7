"""The `args` of a Megatron run: all of its 847 attributes, from the few that a model names."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from megahf import run_arguments
from megahf.arguments import defaults
from megahf.bert import MARK
from megahf.errors import refuse
from megahf.judge import bert, hybrid, llava, multimodal
from megahf.run_arguments import data_parallel_size

__all__ = ["data_parallel_size", "decoded", "defaults", "derive_run", "derive_sizes", "namespace", "plain", "recovered"]

RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}


def namespace(arguments: Mapping[str, Any]) -> Namespace:
    """`arguments` over the defaults, with what Megatron's `validate_args` derives from them.

    Raises:
        Refused: a name that no Megatron argument has.
    """
    unknown = sorted(set(arguments) - known())
    if unknown:
        raise refuse(f"not an argument of Megatron's: {', '.join(unknown)}", "", "see megahf/arguments.json")
    script = multimodal.defaults() if arguments.get("language_model_type") else {}
    args = Namespace(**{name: decoded(value) for name, value in {**defaults(), **script, **arguments}.items()})
    derive_sizes(args)
    derive_run(args)
    bert.derive(args)
    hybrid.derive(args)
    llava.derive(args)
    return args


def known() -> set[str]:
    """Names of arguments: of every run, of Megatron before, of its scripts, and what none of them says."""
    script = (*multimodal.ARGUMENTS, *multimodal.SIZES, multimodal.PROJECTION)
    return {*defaults(), *hybrid.BEFORE, *script, MARK}


def recovered(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What `namespace` takes of a stored Namespace: names of older Megatrons as they are now; foreign ones, and objects
    of classes that reading does not run, left out."""
    renamed = {RENAMED.get(name, name): value for name, value in stored.items()}
    names = known()
    return {name: value for name, value in renamed.items() if name in names and run_arguments.is_plain(value)}


def decoded(value: object) -> object:
    """A dtype or an enum from its full name, as a real Namespace holds it; None if this Megatron has no such enum."""
    if not isinstance(value, str) or not value.startswith(("torch.", "megatron.", "signal.")):
        return value
    owner, _, name = value.rpartition(".")
    module, _, holder = owner.rpartition(".") if "." in owner else (owner, "", "")
    found: Any = import_module(module)
    return getattr(getattr(found, holder, None) if holder else found, name, None)


def derive_sizes(args: Namespace) -> None:
    """Sizes that follow from other sizes where they are not given."""
    run_arguments.derive_sizes(vars(args))


def derive_run(args: Namespace) -> None:
    """Switches that follow from other switches, and the world this layout needs."""
    run_arguments.derive_run(vars(args))
    args.params_dtype = decoded(args.params_dtype)


def plain(args: Namespace) -> dict[str, Any]:
    """The Namespace as a dict of plain values; dtypes and enums as text."""
    kept = (int, float, str, bool, list, tuple, type(None))  # exactly: an enum may be an int as well
    return {name: value if type(value) in kept else str(value) for name, value in vars(args).items()}
