"""Which ways from one checkpoint to another are run: kind x (layout, format, layers) -> (layout, format, layers).

Chosen as in `cases.py`: every pair of values that could go wrong together is met by some journey.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import cases_hybrid
from cases import ALL_KINDS, ALL_LAYOUTS, ALL_SPECS, Case, covering, refused
from cases_hybrid import HybridCase

# Some of every make: the whole matrix has all kinds.
TRAVELLED = (
    "gpt2", "llama_zero_centered", "llama_two_groups", "qwen2", "gpt_oss_dense", "output_gate", "mixtral", "qwen2_moe",
    "moe_swiglu_biases", "moe_list", "latent_experts", "deepseek_v2", "mla_biases_layernorm", "mla_no_q_lora",
    "mtp_tied", "mtp_mixtral", "deepseek_v3_mtp",
)  # fmt: skip
HYBRIDS = ("mamba2", "nemotron_h", "nemotron3_latent", "heads_given", "hybrid_swiglu", "hybrid_latent_attention")
SOURCES = ("tp2", "pp2_vpp2", "tp2_ep2_etp1", "string_pp2_vpp2_mtp")
HYBRID_SOURCES = ("tp1", "tp2", "tp2_pp2_last1", "tp2_ep2_etp1")
FORMATS, DTYPES = ("torch", "torch_dist"), ("fp32", "bf16")

# Megatron's argument -> the keyword that `megahf.convert` has for it.
KEYWORDS = {
    "tensor_model_parallel_size": "tp",
    "pipeline_model_parallel_size": "pp",
    "virtual_pipeline_model_parallel_size": "vpp",
    "expert_model_parallel_size": "ep",
    "expert_tensor_parallel_size": "etp",
    "decoder_first_pipeline_num_layers": "first",
    "decoder_last_pipeline_num_layers": "last",
    "account_for_embedding_in_pipeline_split": "account_for_embedding",
    "account_for_loss_in_pipeline_split": "account_for_loss",
    "pipeline_model_parallel_layout": "layout",
}
EXPERTS = {"local_grouped": "legacy-grouped", "te_grouped": "te-grouped"}

EVERYDAY = (
    ("kind", "cut"),
    ("kind", "to distributed"),
    ("to layout", "cut"),
    ("to spec", "to format"),
    ("spec", "to spec"),
    ("format", "to format"),
    ("dtype", "to format"),
)
THOROUGH = (
    *EVERYDAY,
    ("to layout", "to format"),
    ("kind", "to format"),
    ("kind", "to spec"),
    ("kind", "format"),
)


class Journey(NamedTuple):
    source: Case
    layout: str
    format: str
    spec: str

    def __str__(self) -> str:
        return f"{self.source}-to-{self.layout}-{self.format}-{self.spec}"

    @property
    def arrival(self) -> Case:
        """The case that Megatron itself would write."""
        return self.source._replace(layout=self.layout, format=self.format, spec=self.spec)

    @property
    def options(self) -> dict[str, Any]:
        """What `megahf.convert` is told."""
        layouts = cases_hybrid.ALL_LAYOUTS if isinstance(self.source, HybridCase) else ALL_LAYOUTS
        told = {KEYWORDS[name]: value for name, value in layouts[self.layout].items() if name in KEYWORDS}
        told = {name: value for name, value in told.items() if value is not None}
        experts = EXPERTS.get(self.spec, "sequential")
        if isinstance(self.source, HybridCase):
            if self.layout in cases_hybrid.STAGES:
                told["layout"] = self.arrival.arguments["hybrid_layer_pattern"]
            experts = "sequential" if self.spec == "local" else "te-grouped"
        if self.source.arguments.get("num_experts"):
            told["experts"] = experts
        divisible_by = self.source.arguments.get("make_vocab_size_divisible_by", 128)
        return {**told, "format": self.format, "engine": self.spec.startswith("te"), "divisible_by": divisible_by}

    @property
    def features(self) -> dict[str, Any]:
        return self.source.features | {
            "to layout": self.layout,
            "to format": self.format,
            "to spec": self.spec,
            "to distributed": self.format != "torch",
            "cut": self.options.get("tp", 1) > 1,
        }


def possible(case: Case) -> bool:
    return cases_hybrid.possible(case) if isinstance(case, HybridCase) else not refused(case.arguments, case.format)


def possible_journeys(kinds: tuple[str, ...], hybrids: tuple[str, ...]) -> Iterator[Journey]:
    specs = [spec for spec in ALL_SPECS if spec != "te_bytes"]
    for start in filter(possible, map(Case._make, product(kinds, SOURCES, FORMATS, specs, DTYPES))):
        yield from onward(start, tuple(ALL_LAYOUTS), specs)
    named = map(HybridCase._make, product(hybrids, HYBRID_SOURCES, FORMATS, ("local", "te"), DTYPES))
    for start in filter(possible, named):
        yield from onward(start, tuple(cases_hybrid.ALL_LAYOUTS), ["local", "te"])


def onward(start: Case, layouts: tuple[str, ...], specs: list[str]) -> Iterator[Journey]:
    for layout, format, spec in product(layouts, FORMATS, specs):
        if "_dp" not in layout and possible((journey := Journey(start, layout, format, spec)).arrival):
            yield journey


@cache
def everyday() -> list[Journey]:
    return covering(possible_journeys(TRAVELLED, HYBRIDS), EVERYDAY)


def thorough() -> list[Journey]:
    return covering(possible_journeys(tuple(ALL_KINDS), tuple(cases_hybrid.KINDS)), THOROUGH)
