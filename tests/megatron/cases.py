"""Which combinations are run: few enough to run often, and every pair that could go wrong together is among them.

A case is (kind, layout, format, spec, dtype). Not every pair of values is worth a case (kinds x layouts alone are some
two thousand), so a case has coarser features as well, and the pairs to be met are listed. Kinds of `kinds_moe.py` have
more layouts and layer specs than others, and lists of their own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain, product
from typing import Any, NamedTuple
from zlib import crc32

from kinds import KINDS
from kinds_moe import KINDS as MIXTURES
from layouts import EXPERT_LAYOUTS, LAYOUTS, MTP_LAYOUTS

FORMATS = ("torch", "torch_dist", "torch_dist:layers", "torch_dist:singleton", "torch_dist:main", "torch_dcp")
LOCAL, ENGINE = {"transformer_impl": "local"}, {"transformer_impl": "transformer_engine"}
GROUPED = {"moe_grouped_gemm": True}
SPECS: dict[str, dict[str, Any]] = {"local": LOCAL, "te": ENGINE, "te_bytes": ENGINE}  # te_bytes: TE before 1.11
GROUPED_SPECS: dict[str, dict[str, Any]] = {"local_grouped": {**LOCAL, **GROUPED}, "te_grouped": {**ENGINE, **GROUPED}}
DTYPES: dict[str, dict[str, bool]] = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}

ALL_KINDS = {**KINDS, **MIXTURES}
ALL_LAYOUTS = {**LAYOUTS, **EXPERT_LAYOUTS, **MTP_LAYOUTS}
ALL_SPECS = {**SPECS, **GROUPED_SPECS}

EVERYDAY = (
    ("kind", "tensor parallel"),
    ("kind", "distributed"),
    ("kind", "TE"),
    ("layout", "distributed"),
    ("layout", "TE"),
    ("format", "spec"),
    ("format", "dtype"),
    ("spec", "dtype"),
)
THOROUGH = (
    *EVERYDAY,
    ("kind", "pipelined"),
    ("kind", "layout"),
    ("kind", "format"),
    ("kind", "dtype"),
    ("layout", "format"),
)
EVERYDAY_MIXTURES = (
    ("kind", "tensor parallel"),
    ("kind", "distributed"),
    ("layout", "distributed"),
    ("layout", "grouped"),
    ("format", "spec"),
    ("format", "dtype"),
    ("spec", "dtype"),
)
THOROUGH_MIXTURES = (
    *EVERYDAY_MIXTURES,
    ("kind", "expert parallel"),
    ("kind", "grouped"),
    ("layout", "TE"),
    ("kind", "layout"),
    ("kind", "format"),
    ("kind", "spec"),
    ("kind", "dtype"),
    ("layout", "format"),
    ("layout", "spec"),
)


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
        return {**ALL_KINDS[self.kind], **ALL_LAYOUTS[self.layout], **ALL_SPECS[self.spec], **DTYPES[self.dtype]}

    @property
    def extra_state(self) -> str:
        """What TE modules store beside their weights."""
        return "bytes" if self.spec == "te_bytes" else "tensor"

    @property
    def features(self) -> dict[str, Any]:
        """Its values, and coarser ones of them."""
        coarse = {"distributed": self.format != "torch", "TE": self.spec.startswith("te")}
        return self._asdict() | coarse | {"grouped": self.spec in GROUPED_SPECS} | parallel(self.layout)


@cache
def parallel(layout: str) -> dict[str, bool]:
    """What the layout cuts."""
    sizes = ALL_LAYOUTS[layout]
    return {
        "tensor parallel": sizes["tensor_model_parallel_size"] > 1,
        "pipelined": sizes["pipeline_model_parallel_size"] > 1,
        "expert parallel": sizes.get("expert_model_parallel_size", 1) > 1,
    }


# What no pair says: more ranks than query groups, so that a rank holds a part of one; files of some (tensor, expert)
# ranks alone; a world of eight.
PINNED = (
    Case("llama_two_groups", "tp4"),
    Case("llama_two_groups", "tp4", "torch_dist", "te"),
    Case("deepseek_v3_mtp", "tp4_ep2_etp1"),
    Case("deepseek_v3_mtp", "tp2_ep2_etp1", "torch", "te_grouped", "bf16"),
    Case("deepseek_moe", "tp2_pp2_ep2", "torch", "local_grouped"),
)


@cache
def everyday() -> list[Case]:
    """The cases of the test suite."""
    mixtures = covering(possible_mixtures(), EVERYDAY_MIXTURES)
    return list(dict.fromkeys((*PINNED, *covering(possible_cases(), EVERYDAY), *mixtures)))


def thorough() -> list[Case]:
    """The cases of the whole matrix."""
    mixtures = covering(possible_mixtures(), THOROUGH_MIXTURES)
    return sorted({*PINNED, *covering(possible_cases(), THOROUGH), *mixtures})


def possible(case: Case) -> bool:
    """What Megatron can run at all."""
    return not refused(case.arguments, case.format)


def refused(arguments: dict[str, Any], format: str) -> str:
    """Why Megatron cannot run or save it; empty if it can."""
    get = arguments.get
    return (
        refused_for_all(arguments, format)
        or (refused_for_experts(arguments) if get("num_experts") else refused_without_experts(arguments))
        or (refused_for_legacy_experts(arguments, format) if legacy_grouped(arguments) else "")
    )


def refused_for_all(arguments: dict[str, Any], format: str) -> str:
    get = arguments.get
    if get("transformer_impl") == "local" and get("layernorm_zero_centered_gamma"):
        return "zero_centered_gamma not supported by torch LayerNorm"
    if get("fp32_residual_connection") and not (get("bf16") or get("fp16")):
        return "residual connection in fp32 only supported when using fp16 or bf16"
    sizes = [get(f"{axis}_model_parallel_size") or 1 for axis in ("tensor", "pipeline", "expert")]
    if format == "torch_dcp" and sizes != [1, 1, 1]:
        return "FSDP2 goes with data parallelism alone"
    if (layout := get("pipeline_model_parallel_layout")) and layout.count("m") != (get("mtp_num_layers") or 0):
        return "Number of mtp layers in layout must match mtp_num_layers"
    if get("mtp_num_layers") and sizes[1] > 1:
        return refused_for_further_heads(arguments)
    return ""


def refused_for_further_heads(arguments: dict[str, Any]) -> str:
    """The last stage has a copy of the embedding, which 0.16.1 cannot give a place in a distributed checkpoint."""
    if not arguments.get("untie_embeddings_and_output_weights"):
        return "assert output_layer_weight_key not in sharded_state_dict"
    learned = arguments.get("position_embedding_type", "learned_absolute") == "learned_absolute"
    return "Invalid access pattern for ShardedTensor(key='embedding.position_embeddings.weight'" if learned else ""


def refused_for_experts(arguments: dict[str, Any]) -> str:
    get = arguments.get
    cut = get("expert_tensor_parallel_size") or arguments["tensor_model_parallel_size"]
    return "Bias in Moe is only supported when ETP==1" if get("add_bias_linear", True) and cut > 1 else ""


def refused_without_experts(arguments: dict[str, Any]) -> str:
    if arguments.get("expert_model_parallel_size", 1) > 1 or arguments.get("expert_tensor_parallel_size"):
        return "num_moe_experts must be non None to use expert-parallel"
    return "no experts to group" if arguments.get("moe_grouped_gemm") else ""


def legacy_grouped(arguments: dict[str, Any]) -> bool:
    return bool(arguments.get("moe_grouped_gemm")) and arguments["transformer_impl"] == "local"


def refused_for_legacy_experts(arguments: dict[str, Any], format: str) -> str:
    get = arguments.get
    if get("add_bias_linear", True):
        return "bias not supported in Grouped GEMM yet"
    if get("moe_latent_size"):
        return "MoE latent projection not supported in GroupedMLP yet"
    if get("quick_geglu"):
        return "Activation function must be silu or gelu when using GroupedMLP"
    if format == "torch_dist:singleton" and arguments["pipeline_model_parallel_size"] > 1:
        return "GroupedMLP names its experts by the layer's number in the stage, which the other names do not have"
    return ""


def possible_cases() -> Iterator[Case]:
    """Of dense models with plain attention."""
    return filter(possible, map(Case._make, product(KINDS, LAYOUTS, FORMATS, SPECS, DTYPES)))


def possible_mixtures() -> Iterator[Case]:
    """Of all others."""
    experts = [kind for kind in MIXTURES if MIXTURES[kind].get("num_experts")]
    others = [kind for kind in MIXTURES if kind not in experts]
    cases = chain(
        product(experts, ALL_LAYOUTS, FORMATS, ALL_SPECS, DTYPES),
        product(others, {**LAYOUTS, **MTP_LAYOUTS}, FORMATS, SPECS, DTYPES),
    )
    return filter(possible, map(Case._make, cases))


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
