"""Which combinations of BERT are run. As `cases.py`, with layouts and formats that hold everything BERT has."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from cases import DTYPES, SPECS, Case, covering
from kinds_bert import KINDS
from layouts import LAYOUTS as ALL

FORMATS = ("torch", "torch_dist", "torch_dist:main")
LAYOUTS = {name: ALL[name] for name in ("tp1", "tp2", "pp2", "tp2_pp2", "pp2_vpp2", "pp3_first1_last1")}
BOTH = ("bert", "bert_without_binary_head")
PAIRS = (
    ("kind", "tensor parallel"),
    ("kind", "distributed"),
    ("kind", "spec"),
    ("layout", "distributed"),
    ("layout", "TE"),
    ("format", "dtype"),
)


class BertCase(Case):
    """A case whose kind is BERT's."""

    __slots__ = ()

    @property
    def arguments(self) -> dict[str, Any]:
        return {**KINDS[self.kind], **LAYOUTS[self.layout], **SPECS[self.spec], **DTYPES[self.dtype]}


def possible_cases() -> Iterator[BertCase]:
    return map(BertCase._make, product(KINDS, LAYOUTS, FORMATS, SPECS, DTYPES))


@cache
def everyday() -> list[BertCase]:
    """With and without the binary head, every layout in both formats; of the other kinds what the pairs ask for."""
    layouts = ("tp1", "tp2", "pp2", "tp2_pp2")
    pinned = (BertCase(*case) for case in product(BOTH, layouts, ("torch", "torch_dist"), ("te",)))
    return list(dict.fromkeys((*pinned, *covering(possible_cases(), PAIRS))))
