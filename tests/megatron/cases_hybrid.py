"""Which combinations of hybrids are run. As `cases.py`, with layouts for six layers and a format more: main's names.

What 0.16.1 has not, and main only stores differently, is told in main's words: stages by `|`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from cases import DTYPES, ENGINE, GROUPED, LOCAL, Case, covering, refused
from kinds_hybrid import KINDS
from layouts import experts, grid

from megahf.judge.hybrid import MEGATRON

FORMATS = ("torch", "torch:main", "torch_dist", "torch_dist:main")
SPECS: dict[str, dict[str, Any]] = {"local": LOCAL, "te": ENGINE, "te_bytes": ENGINE}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": grid(),
    "tp2": grid(2),
    "tp4": grid(4),
    "tp2_dp2": grid(2, data_parallel_size=2),
    "pp2": grid(1, 2),
    "tp2_pp2": grid(2, 2),
    "pp2_first2": grid(1, 2, decoder_first_pipeline_num_layers=2),  # 2, 4
    "tp2_pp2_last1": grid(2, 2, decoder_last_pipeline_num_layers=1),  # 5, 1
    "pp4_first3_last1": grid(
        1, 4, decoder_first_pipeline_num_layers=3, decoder_last_pipeline_num_layers=1
    ),  # 3, 1, 1, 1
}
# Layers of each stage where `|` ends it; a stage may be empty, and on two ranks four stages are two chunks each.
STAGES: dict[str, tuple[int, ...]] = {
    "pp2_bars": (1, 5),
    "pp4_bars_empty": (2, 0, 3, 1),
    "pp2_vpp2_bars": (1, 2, 2, 1),
    "tp2_pp2_vpp2_bars": (2, 1, 0, 3),
}
LAYOUTS |= {
    "pp2_bars": grid(1, 2),
    "pp4_bars_empty": grid(1, 4),
    "pp2_vpp2_bars": grid(1, 2, 2),
    "tp2_pp2_vpp2_bars": grid(2, 2, 2),
}
EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": grid(**experts(2)),
    "ep4": grid(**experts(4)),
    "tp2_ep2": grid(2, **experts(2)),
    "tp2_ep2_etp1": grid(2, **experts(2, 1)),
    "pp2_ep2": grid(1, 2, **experts(2)),
    "pp2_bars_ep2": grid(1, 2, **experts(2)),
    "tp2_pp2_ep2_etp1": grid(2, 2, **experts(2, 1)),
}
STAGES["pp2_bars_ep2"] = (4, 2)
ALL_LAYOUTS = {**LAYOUTS, **EXPERT_LAYOUTS}

EVERYDAY = (
    ("kind", "tensor parallel"),
    ("kind", "distributed"),
    ("kind", "TE"),
    ("kind", "main"),
    ("layout", "distributed"),
    ("layout", "TE"),
    ("format", "spec"),
)
SIXTEEN_BITS = (("format", "dtype"), ("spec", "dtype"))
THOROUGH = (
    *EVERYDAY,
    *SIXTEEN_BITS,
    ("kind", "layout"),
    ("kind", "format"),
    ("kind", "spec"),
    ("kind", "dtype"),
    ("layout", "format"),
)


class HybridCase(Case):
    """A case whose kind and layout are of hybrids."""

    __slots__ = ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments for it; the fused spec groups experts."""
        kind, stages = KINDS[self.kind], STAGES.get(self.layout)
        grouped = GROUPED if self.spec != "local" and kind.get("num_experts") else {}
        made = {**kind, **ALL_LAYOUTS[self.layout], **SPECS[self.spec], **DTYPES[self.dtype], **grouped}
        return cut(made, stages) if stages else made

    @property
    def features(self) -> dict[str, Any]:
        """Its values, and coarser ones of them."""
        sizes = ALL_LAYOUTS[self.layout]
        return self._asdict() | {
            "tensor parallel": sizes["tensor_model_parallel_size"] > 1,
            "distributed": self.format.startswith("torch_dist"),
            "TE": self.spec != "local",
            "main": self.format.endswith(":main"),
        }


def cut(arguments: dict[str, Any], stages: tuple[int, ...]) -> dict[str, Any]:
    """The same model in main's words, `|` after each stage's layers."""
    rest = {name: value for name, value in arguments.items() if name != "hybrid_override_pattern"}
    symbols = iter(pattern(arguments))
    return {**rest, "hybrid_layer_pattern": "|".join("".join(next(symbols) for _ in range(count)) for count in stages)}


def pattern(arguments: dict[str, Any]) -> str:
    """Empty for pure Mamba and for ratios, which main has no argument for."""
    return str(arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern") or "")


def possible(case: HybridCase) -> bool:
    """What Megatron can run at all."""
    kind, layout = KINDS[case.kind], ALL_LAYOUTS[case.layout]
    if case.layout in STAGES and not pattern(kind):
        return False
    if (case.layout in STAGES or case.format.endswith(":main")) and ignored(kind):
        return False
    if kind["mamba_num_groups"] % layout["tensor_model_parallel_size"] and "M" in (pattern(kind) or "M"):
        return False  # "ngroups must be evenly divisible by tp_size"
    if case.spec == "local" and "layernorm_epsilon" in kind and not case.format.endswith(":main"):
        return False  # 0.16.1's own unfused norm takes no epsilon, the judge's does: megahf refuses such files
    return not refused(case.arguments, case.format)


def ignored(kind: dict[str, Any]) -> bool:
    """Whether main's spec heeds what 0.16.1's does not."""
    return bool(kind.get("qk_layernorm")) and kind["spec"] == MEGATRON


def possible_cases() -> Iterator[HybridCase]:
    experts = [kind for kind in KINDS if KINDS[kind].get("num_experts")]
    for kinds, layouts in ((KINDS, LAYOUTS), (experts, EXPERT_LAYOUTS)):
        yield from filter(possible, map(HybridCase._make, product(kinds, layouts, FORMATS, SPECS, DTYPES)))


# What no pair says: files of some (tensor, expert) ranks alone; the founding story, a mixer between tensor ranks.
PINNED = (
    HybridCase("nemotron3", "tp2_ep2_etp1", "torch", "te", "bf16"),
    HybridCase("heads_given", "tp4", "torch", "te"),
    HybridCase("heads_given", "tp4", "torch_dist:main", "te"),
)


@cache
def everyday() -> list[HybridCase]:
    """The cases of the test suite; few in sixteen bits, since each dtype of a kind takes a reference of its own."""
    single = covering((case for case in possible_cases() if case.dtype == "fp32"), EVERYDAY)
    return list(dict.fromkeys((*PINNED, *single, *covering(possible_cases(), SIXTEEN_BITS))))


def thorough() -> list[HybridCase]:
    """The cases of the whole matrix."""
    return sorted({*PINNED, *covering(possible_cases(), THOROUGH)})
