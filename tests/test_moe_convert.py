"""Mixtures of experts, latent attention and further heads convert to one and the same folder from every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import State, assert_same, fingerprint, megahf, rewrite, tensors
from small_experts import BIASED, LATENT_EXPERTS, MLA, SHARED, SIGMOID, Run, write_experts, write_experts_dist

from megahf import convert
from megahf.plan import Plan

AT = "decoder.layers"

RUNS = {
    "one rank": Run(),
    "EP2": Run(expert=2),
    "EP8": Run(expert=8),
    "TP2 EP2": Run(tensor=2, expert=2),
    "TP4 EP2 ETP1": Run(tensor=4, expert=2, shards=1),
    "TP2 EP2 ETP1": Run(tensor=2, expert=2, shards=1),
    "TP2 ETP1": Run(tensor=2, shards=1),
    "TP4 EP2 ETP2": Run(tensor=4, expert=2, shards=2),
    "TP2 PP2 EP2": Run(tensor=2, pipeline=2, expert=2, stages=((0,), (1,))),
    "PP2 EP2": Run(pipeline=2, expert=2, stages=((0,), (1,))),
}
LAYOUTS = ("sequential", "te-grouped", "packed", "legacy-grouped")
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "ungated": {"swiglu": False},
    "bf16": {"dtype": torch.bfloat16},
    "shared experts": SHARED,
    "expert bias in bf16": {**SIGMOID, "dtype": torch.bfloat16},
    "latent experts": LATENT_EXPERTS,
    "every second layer": {"moe_layer_freq": 2},
    "layers by list": {"moe_layer_freq": [0, 1]},
    "MTP": {"mtp_num_layers": 2},
    "MTP, one for all": {"mtp_num_layers": 3, "mtp_use_repeated_layer": True},
    "MLA": MLA,
    "MLA, straight queries": {**MLA, "q_lora_rank": None},
    "MLA, no norms, MTP, dense first": {**MLA, "qk_layernorm": False, "mtp_num_layers": 1, "moe_layer_freq": [0, 1]},
}


def weights_and_config(folder: Path) -> dict[str, str]:
    return {name: value for name, value in fingerprint(folder).items() if name not in ("megahf.json", "README.md")}


def converted(tmp_path: Path, name: str, write: Any, *args: Any, **changes: Any) -> dict[str, str]:
    """The files of the folder that a checkpoint becomes, by the hash of their bytes."""
    write(tmp_path / name, *args, **changes)
    convert(tmp_path / name, tmp_path / f"{name}_hf")
    return weights_and_config(tmp_path / f"{name}_hf")


def arrives(tmp_path: Path, wanted: State, **options: Any) -> Plan:
    """Converts `ckpt` and compares every weight bit for bit."""
    plan = convert(tmp_path / "ckpt", tmp_path / "hf", **options)
    assert_same(tensors(tmp_path / "hf"), wanted)
    return plan


@pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_arrives_from_every_layout_and_arrangement_of_ranks(tmp_path: Path, layout: str, run: Run) -> None:
    arrives(tmp_path, write_experts(tmp_path / "ckpt", layout, run, **SHARED, **SIGMOID))


def test_a_layout_string_may_put_the_heads_into_a_stage_of_their_own(tmp_path: Path) -> None:
    run = Run(pipeline=2, expert=2, stages=((0,), (1,), (), ()))
    layout = {"pipeline_model_parallel_layout": "Et|t||mL", "mtp_num_layers": 1}
    arrives(tmp_path, write_experts(tmp_path / "ckpt", "te-grouped", run, **layout))


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("run", ["one rank", "TP2 EP2", "TP2 EP2 ETP1"])
def test_every_kind_of_model_arrives(tmp_path: Path, kind: dict[str, Any], run: str) -> None:
    arrives(tmp_path, write_experts(tmp_path / "ckpt", "te-grouped", RUNS[run], **kind))


@pytest.mark.parametrize("kind", [{}, SHARED | SIGMOID | {"mtp_num_layers": 1}], ids=["mixtral", "more"])
def test_the_layouts_and_the_formats_give_the_same_folder_byte_for_byte(tmp_path: Path, kind: dict[str, Any]) -> None:
    wanted = converted(tmp_path, "dist", write_experts_dist, **kind)
    for layout in LAYOUTS:
        for number, run in enumerate(RUNS.values()):
            assert converted(tmp_path, f"{layout}{number}", write_experts, layout, run, **kind) == wanted, (layout, run)
    assert converted(tmp_path, "single", write_experts_dist, stacked=False, singleton=True, **kind) == wanted


@pytest.mark.parametrize("layout", ["sequential", "te-grouped", "packed"])
@pytest.mark.parametrize("run", ["EP2", "TP2 EP2 ETP1", "TP4 EP2 ETP2"])
def test_experts_with_biases_arrive(tmp_path: Path, layout: str, run: str) -> None:
    arrives(tmp_path, write_experts(tmp_path / "ckpt", layout, RUNS[run], **BIASED))


def test_packed_experts_may_lie_end_to_end(tmp_path: Path) -> None:
    wanted = write_experts(tmp_path / "ckpt", "packed", **BIASED)

    def flatten(content: dict[str, Any]) -> None:
        for key, value in content["model"].items():
            if ".experts." in key:
                content["model"][key] = value.flatten(0, 1)

    rewrite(tmp_path / "ckpt", flatten)
    arrives(tmp_path, wanted)


def test_not_every_pair_of_ranks_has_a_file(tmp_path: Path) -> None:
    write_experts(tmp_path / "ckpt", run=RUNS["TP4 EP2 ETP1"])
    names = sorted(path.name for path in (tmp_path / "ckpt" / "iter_0000007").iterdir())
    assert names == ["mp_rank_00_000", "mp_rank_01_001", "mp_rank_02_000", "mp_rank_03_001"]


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "layer by layer"])
@pytest.mark.parametrize("local", [True, False], ids=["local norms", "norms of Transformer Engine"])
@pytest.mark.parametrize("kind", ["mixtral", "MTP", "MLA", "shared experts", "latent experts"])
def test_every_weight_of_a_distributed_checkpoint_arrives(
    tmp_path: Path, stacked: bool, local: bool, kind: str
) -> None:
    arrives(tmp_path, write_experts_dist(tmp_path / "ckpt", stacked, local=local, **KINDS[kind]))


def test_layers_of_two_kinds_arrive_from_a_distributed_checkpoint(tmp_path: Path) -> None:
    arrives(tmp_path, write_experts_dist(tmp_path / "ckpt", stacked=False, local=True, moe_layer_freq=[0, 1]))


@pytest.mark.parametrize("down", [{}, {"down_cut": True}], ids=["whole", "cut"])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_latent_down_projections_arrive_whole_or_cut_apart_or_fused(
    tmp_path: Path, down: dict[str, bool], fused: bool
) -> None:
    run = RUNS["TP4 EP2 ETP2"]
    arrives(tmp_path, write_experts(tmp_path / "ckpt", "te-grouped", run, fused_down=fused, **down, **MLA))


@pytest.mark.parametrize("inner", ["transformer_layer", "mtp_model_layer"])
def test_the_layer_inside_a_head_has_two_names(tmp_path: Path, inner: str) -> None:
    run = RUNS["TP2 PP2 EP2"]
    arrives(tmp_path, write_experts(tmp_path / "ckpt", run=run, mtp=inner, local=True, mtp_num_layers=2))


BY_TURNS = {"moe_mlp_glu_interleave_size": 3}


@pytest.mark.parametrize("layout", ["te-grouped", "packed"])
@pytest.mark.parametrize("run", ["EP2", "TP2 EP2", "TP4 EP2 ETP2"])
def test_gate_and_up_by_turns_are_put_in_order(tmp_path: Path, layout: str, run: str) -> None:
    arrives(tmp_path, write_experts(tmp_path / "ckpt", layout, RUNS[run], **BY_TURNS, **BIASED))


@pytest.mark.parametrize("cuts", [1, 2])
@pytest.mark.parametrize("singleton", [False, True])
def test_gate_and_up_by_turns_are_put_in_order_as_the_ranks_saw_them(
    tmp_path: Path, cuts: int, singleton: bool
) -> None:
    wanted = write_experts_dist(tmp_path / "ckpt", False, singleton, cuts=cuts, **BY_TURNS)
    arrives(tmp_path, wanted)


def test_experts_one_by_one_have_no_turns_whatever_the_argument_says(tmp_path: Path) -> None:
    arrives(tmp_path, write_experts(tmp_path / "ckpt", "sequential", RUNS["TP2 EP2"], **BY_TURNS))


def test_shared_experts_have_turns_where_their_gemm_is_grouped(tmp_path: Path) -> None:
    turns = {"use_grouped_gemm_for_shared_expert": True, "moe_shared_expert_glu_interleave_size": 2}
    arrives(tmp_path, write_experts(tmp_path / "ckpt", "te-grouped", RUNS["TP2 EP2"], **SHARED, **turns))


def test_the_bias_of_the_choice_stays_float32_in_every_number_format(tmp_path: Path) -> None:
    wanted = write_experts(tmp_path / "ckpt", run=RUNS["EP2"], **SIGMOID)
    cast = {name: v if name.endswith("expert_bias") else v.to(torch.bfloat16) for name, v in wanted.items()}
    arrives(tmp_path, cast, dtype="bf16")


def test_routers_without_a_bias_are_those_of_an_older_megatron(tmp_path: Path) -> None:
    wanted = write_experts(tmp_path / "ckpt", **BIASED)
    rewrite(tmp_path / "ckpt", lambda content: [content["model"].pop(f"{AT}.{n}.mlp.router.bias") for n in (0, 1)])
    plan = arrives(tmp_path, {name: value for name, value in wanted.items() if "router.bias" not in name})
    assert not plan.config.moe_router_bias
    assert any("no router.bias" in note for note in plan.notes)


FILLED = {
    "mixtral": {},
    "biases": BIASED,
    "more": {**SHARED, **SIGMOID, **LATENT_EXPERTS, "mtp_num_layers": 1, "moe_layer_freq": [0, 1]},
    "latents": {**MLA, "mtp_num_layers": 1},
}


@pytest.mark.parametrize("kind", FILLED.values(), ids=list(FILLED))
@pytest.mark.parametrize("shard", ["5GB", "8KB"])
def test_a_model_filled_and_saved_gives_the_same_folder(tmp_path: Path, kind: dict[str, Any], shard: str) -> None:
    import megahf

    write_experts(tmp_path / "ckpt", run=RUNS["TP2 EP2 ETP1"], dtype=torch.bfloat16, **kind)
    convert(tmp_path / "ckpt", tmp_path / "a", max_shard_size=shard)
    megahf.from_megatron(tmp_path / "ckpt").save_pretrained(tmp_path / "b", max_shard_size=shard)
    assert weights_and_config(tmp_path / "b") == weights_and_config(tmp_path / "a")


def test_a_model_filled_has_its_float32_bias_and_its_canonical_names(tmp_path: Path) -> None:
    import megahf
    from megahf.load import canonical_state

    wanted = write_experts(tmp_path / "ckpt", run=RUNS["EP2"], **SIGMOID)
    model = megahf.from_megatron(tmp_path / "ckpt", dtype=torch.bfloat16)
    cast = {name: v if name.endswith("expert_bias") else v.to(torch.bfloat16) for name, v in wanted.items()}
    assert_same(canonical_state(model), cast)


def test_verify_and_inspect_know_experts(tmp_path: Path) -> None:
    write_experts(tmp_path / "ckpt", "legacy-grouped", RUNS["TP4 EP2 ETP2"], **SHARED, **SIGMOID)
    assert megahf("convert", tmp_path / "ckpt", tmp_path / "hf").exit_code == 0
    assert megahf("verify", tmp_path / "ckpt", tmp_path / "hf").exit_code == 0
    page = megahf("inspect", tmp_path / "ckpt").output
    assert "written by TP4 EP2 ETP2" in page
    assert "experts: legacy-grouped, 8 on 2 expert-parallel ranks" in page
