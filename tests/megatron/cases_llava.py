"""Which combinations of LLaVA are run, and which ways back: as `cases.py`, with pipelines of equal stages alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from cases import ALL_SPECS, DTYPES, Case, covering
from journeys import Journey
from kinds_llava import KINDS
from layouts import EXPERT_LAYOUTS, grid
from layouts import LAYOUTS as ALL

from megahf.judge.llava import HYBRID, HYBRID_OF_MAIN

FORMATS = ("torch", "torch_dist")
MORE_FORMATS = (*FORMATS, "torch_dist:main")
LAYOUTS = {name: ALL[name] for name in ("tp1", "tp2", "tp2_pp2")}
WIDE = {"tp8": grid(8)}  # NVLM's, of whose 32 heads the encoder has 25: on the last rank there is none
EXPERTS = {name: EXPERT_LAYOUTS[name] for name in ("tp2_ep2_etp1",)}
SPECS = ("local", "te", "te_grouped")

EVERYDAY = (
    ("kind", "tensor parallel"),
    ("kind", "distributed"),
    ("layout", "format"),
    ("layout", "TE"),
    ("format", "dtype"),
)
JOURNEYS = (
    ("kind", "cut"),
    ("to layout", "to format"),
    ("to spec", "to format"),
    ("format", "to format"),
)
THOROUGH_JOURNEYS = (*JOURNEYS, ("kind", "to layout"), ("kind", "to format"), ("kind", "to spec"))


class LlavaCase(Case):
    """A case whose kind is a LLaVA's."""

    __slots__ = ()

    @property
    def arguments(self) -> dict[str, Any]:
        layout = {**LAYOUTS, **EXPERTS, **WIDE}[self.layout]
        return {**KINDS[self.kind], **layout, **ALL_SPECS[self.spec], **DTYPES[self.dtype]}

    @property
    def is_hybrid(self) -> bool:
        return bool(KINDS[self.kind]["language_model_type"].startswith((HYBRID, HYBRID_OF_MAIN)))


def possible(case: LlavaCase) -> bool:
    """What Megatron can run at all."""
    kind = KINDS[case.kind]
    if case.spec == "local" and kind.get("layernorm_zero_centered_gamma"):
        return False  # "zero_centered_gamma not supported by torch LayerNorm"
    if case.spec == "local" and (kind.get("num_experts") or case.is_hybrid):
        return False  # the script has no such layers
    if case.spec != "local" and kind.get("vision_projection_type") == "affine":
        return False  # "Transformer Engine linear layers do not support gather_output = True"
    return bool(kind.get("num_experts")) or (case.spec != "te_grouped" and case.layout not in EXPERTS)


def possible_cases(dtypes: tuple[str, ...] = tuple(DTYPES)) -> Iterator[LlavaCase]:
    every = product(KINDS, (*LAYOUTS, *EXPERTS), MORE_FORMATS, SPECS, dtypes)
    return filter(possible, map(LlavaCase._make, every))


PINNED = (LlavaCase("intern_6b_kept", "tp8", "torch", "te"), LlavaCase("intern_6b_kept", "tp8", "torch_dist"))


@cache
def everyday() -> list[LlavaCase]:
    """The cases of the test suite; few in sixteen bits, since each dtype of a kind takes a reference of its own."""
    single = covering(possible_cases(("fp32",)), EVERYDAY[:-1])
    return list(dict.fromkeys((PINNED[0], *single, *covering(possible_cases(("bf16",)), EVERYDAY[-1:]))))


def thorough() -> list[LlavaCase]:
    """The cases of the whole matrix: every kind in every layout, format and spec, and some in sixteen bits."""
    return sorted({*PINNED, *possible_cases(("fp32",)), *covering(possible_cases(), (("kind", "dtype"), *EVERYDAY))})


def possible_journeys() -> Iterator[Journey]:
    for start in possible_cases(("fp32",)):
        for layout, format, spec in product(LAYOUTS, FORMATS, ("local", "te")):
            if start.format in FORMATS and possible(start._replace(layout=layout, format=format, spec=spec)):
                yield Journey(start, layout, format, spec)


@cache
def everyday_journeys() -> list[Journey]:
    return covering(possible_journeys(), JOURNEYS)


def thorough_journeys() -> list[Journey]:
    return covering(possible_journeys(), THOROUGH_JOURNEYS)
