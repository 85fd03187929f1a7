"""Which combinations are run: few enough to run often, and every pair that could go wrong together is among them.

A case is (kind, layout, format, spec, dtype). Not every pair of values is worth a case (kinds x layouts alone are some
six hundred), so a case has coarser features as well, and the pairs to be met are listed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple
from zlib import crc32

from kinds import KINDS
from layouts import LAYOUTS

FORMATS = ("torch", "torch_dist", "torch_dist:layers", "torch_dist:singleton", "torch_dist:main", "torch_dcp")
SPECS: dict[str, dict[str, str]] = {  # as arguments of `Bench.save`
    "local": {},
    "te": {"extra_state": "tensor"},
    "te_bytes": {"extra_state": "bytes"},
}
DTYPES: dict[str, dict[str, bool]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}

EVERYDAY = (
    ("kind", "tensor parallel"),
    ("kind", "pipelined"),
    ("kind", "distributed"),
    ("kind", "TE"),
    ("layout", "format"),
    ("layout", "TE"),
    ("format", "spec"),
    ("format", "dtype"),
    ("spec", "dtype"),
)
THOROUGH = (*EVERYDAY, ("kind", "layout"), ("kind", "format"), ("kind", "dtype"))


class Case(NamedTuple):
    kind: str
    layout: str
    format: str = "torch"
    spec: str = "local"
    dtype: str = "fp32"

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Megatron's arguments for it."""
        spec = "local" if self.spec == "local" else "transformer_engine"
        return {**KINDS[self.kind], **LAYOUTS[self.layout], **DTYPES[self.dtype], "transformer_impl": spec}

    @property
    def features(self) -> dict[str, Any]:
        """Its values, and coarser ones of them."""
        layout = LAYOUTS[self.layout]
        return {
            **self._asdict(),
            "tensor parallel": layout["tensor_model_parallel_size"] > 1,
            "pipelined": layout["pipeline_model_parallel_size"] > 1,
            "distributed": self.format != "torch",
            "TE": self.spec != "local",
        }


# What no pair says: more ranks than query groups, so that a rank holds a part of one.
PINNED = (Case("llama_two_groups", "tp4"), Case("llama_two_groups", "tp4", "torch_dist", "te"))


def everyday() -> list[Case]:
    """The cases of the test suite."""
    return list(dict.fromkeys((*PINNED, *covering(possible_cases(), EVERYDAY))))


def possible(case: Case) -> bool:
    """What Megatron can run at all."""
    kind, layout = KINDS[case.kind], LAYOUTS[case.layout]
    if case.spec == "local" and kind.get("layernorm_zero_centered_gamma"):
        return False  # "zero_centered_gamma not supported by torch LayerNorm"
    if case.dtype == "fp32" and kind.get("fp32_residual_connection"):
        return False  # "only supported when using fp16 or bf16"
    whole = layout["tensor_model_parallel_size"] == layout["pipeline_model_parallel_size"] == 1
    return whole or case.format != "torch_dcp"  # FSDP2 goes with data parallelism alone


def possible_cases() -> Iterator[Case]:
    return filter(possible, map(Case._make, product(KINDS, LAYOUTS, FORMATS, SPECS, DTYPES)))


def covering(cases: Iterable[Case], pairs: Iterable[tuple[str, str]]) -> list[Case]:
    """A small list out of `cases` in which every pair of values of `pairs` that some case has is met.

    Greedy: always the case with most pairs that are still open. What a case adds only shrinks, so a heap of what it
    added last time it was looked at is enough. Deterministic: ties go by checksum, which spreads the values evenly.
    """
    wanted = list(pairs)
    met = {case: met_by(case, wanted) for case in cases}
    heap = [(-len(has), crc32(str(case).encode()), case) for case, has in met.items()]
    heapq.heapify(heap)
    done: set[Any] = set()
    chosen = []
    while heap:
        promised, order, case = heapq.heappop(heap)
        adds = len(met[case] - done)
        if adds and adds < -promised:
            heapq.heappush(heap, (-adds, order, case))
        elif adds:
            chosen.append(case)
            done |= met[case]
    return chosen


def met_by(case: Case, pairs: Iterable[tuple[str, str]]) -> set[tuple[Any, ...]]:
    features = case.features
    return {(a, b, features[a], features[b]) for a, b in pairs}
