"""Hybrids convert to one and the same folder from every layout, format and spelling, and load as what they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small import assert_same, megahf, rewrite, tensors
from small_experts import Run
from small_hybrid import Mixer, write_hybrid, write_hybrid_dist
from test_moe_convert import arrives, weights_and_config
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from transformers import AutoModelForCausalLM

import megahf as package
from megahf import convert
from megahf.errors import Refused
from megahf.load import canonical_state

package.register()

EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_router_topk": 2}
LAYERS = "M*-ME-"


def pipeline(*counts: int, ranks: int = 2, **sizes: int) -> Run:
    """A run whose stages hold `counts` layers, in the order they run."""
    starts = [sum(counts[:turn]) for turn in range(len(counts))]
    stages = tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))
    return Run(pipeline=ranks, stages=stages, **sizes)


RUNS: dict[str, tuple[Run, dict[str, Any]]] = {
    "TP1": (Run(), {}),
    "TP2": (Run(tensor=2), {}),
    "TP4": (Run(tensor=4), {}),
    "PP2": (pipeline(3, 3), {}),
    "TP2 PP2": (pipeline(3, 3, tensor=2), {}),
    "uneven PP2": (pipeline(2, 4), {"decoder_first_pipeline_num_layers": 2}),
    "PP2, stages by bars": (pipeline(1, 5), {"hybrid_layer_pattern": "M|*-ME-"}),
    "TP2 PP2, two chunks each, one empty": (
        pipeline(2, 1, 0, 3, tensor=2),
        {"hybrid_layer_pattern": "M*|-||ME-"},
    ),
    "EP2": (Run(expert=2), {}),
    "TP2 EP2": (Run(tensor=2, expert=2), {}),
    "TP2 EP2 ETP1": (Run(tensor=2, expert=2, shards=1), {}),
    "PP2 EP2, stages by bars": (pipeline(4, 2, expert=2), {"hybrid_layer_pattern": "M*-M|E-"}),
}
MLA: dict[str, Any] = {
    "multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 12, "qk_head_dim": 6, "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
ONE = {"hybrid_override_pattern": None}
KINDS: dict[str, dict[str, Any]] = {
    "Mamba, attention, MLP": {"layers": "M*-M"},
    "Mamba alone, by its pattern": {"layers": "MM"},
    "Mamba alone, by its weights": {"layers": "MM", **ONE},
    "Mamba alone, as noted": {"layers": "MM", **ONE, "is_hybrid_model": True},
    "by ratios": {"layers": "MM*-M*M-", **ONE, "hybrid_attention_ratio": 0.25, "hybrid_mlp_ratio": 0.25},
    "D per channel": {"layers": "M*", "mixer": Mixer(channel_D=True)},
    "no gated norm": {"layers": "M*", "mixer": Mixer(norm=False)},
    "neither, a short convolution without bias": {
        "layers": "M-",
        "mixer": Mixer(channel_D=True, norm=False, bias=False, window=3),
    },
    "heads given": {"layers": "M*M", "mamba_num_heads": 12},
    "three channels for one": {"layers": "M*", "mixer": Mixer(expand=3)},
    "LayerNorm, biases, tied": {
        "layers": "M*-",
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": False,
    },
    "ungated MLP in bfloat16": {"layers": "M-*", "swiglu": False, "dtype": torch.bfloat16},
    "latent experts, shared ones, expert bias": {
        "layers": "ME*E",
        **EXPERTS,
        "moe_latent_size": 8,
        "moe_shared_expert_intermediate_size": 8,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
    "a GPT as a stack": {"layers": "*-*-"},
    "a GPT of experts as a stack": {"layers": "*E*E", **EXPERTS},
    "latent attention": {"layers": "M+-", **MLA},
    "heads for further tokens": {
        "layers": "M*-M-",
        "heads": "M*",
        "hybrid_override_pattern": None,
        "hybrid_layer_pattern": "M*-M-/M*/M*",
        "mtp_num_layers": 2,
    },
    "heads with experts": {
        "layers": "M*",
        "heads": "E*",
        **EXPERTS,
        "hybrid_override_pattern": None,
        "hybrid_layer_pattern": "M*/E*",
        "mtp_num_layers": 1,
    },
    "one head for all further tokens, in the older words": {
        "layers": "M*",
        "heads": "*-",
        "mtp_hybrid_override_pattern": "*-",
        "mtp_num_layers": 3,
        "mtp_use_repeated_layer": True,
    },
}
MAMBA_1 = {"layers": "MM", "mixer": Mixer(version=1), **ONE}


@pytest.mark.parametrize("spelling", ["te", "local", "main"])
@pytest.mark.parametrize("run", RUNS)
def test_every_weight_arrives_from_every_arrangement_of_ranks(tmp_path: Path, run: str, spelling: str) -> None:
    arrangement, changes = RUNS[run]
    bars = {"hybrid_override_pattern": None} if "hybrid_layer_pattern" in changes else {}
    arrives(tmp_path, write_hybrid(tmp_path / "ckpt", LAYERS, arrangement, spelling, **EXPERTS, **changes, **bars))


@pytest.mark.parametrize("run", [Run(), Run(tensor=2), Run(tensor=4)], ids=["TP1", "TP2", "TP4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_arrives_from_files_of_ranks(tmp_path: Path, kind: str, run: Run) -> None:
    arrives(tmp_path, write_hybrid(tmp_path / "ckpt", run=run, **KINDS[kind]))


@pytest.mark.parametrize("spelling", ["te", "local"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_arrives_from_a_distributed_checkpoint(tmp_path: Path, kind: str, spelling: str) -> None:
    arrives(tmp_path, write_hybrid_dist(tmp_path / "ckpt", spelling=spelling, **KINDS[kind]))


@pytest.mark.parametrize("changes", [{}, {"layers": "M*-M", "hybrid_override_pattern": "M*-M"}], ids=["alone", "mixed"])
@pytest.mark.parametrize("run", [Run(), Run(tensor=2), Run(tensor=4)], ids=["TP1", "TP2", "TP4"])
@pytest.mark.parametrize("spelling", ["te", "local"])
def test_mamba_1_arrives(tmp_path: Path, run: Run, spelling: str, changes: dict[str, Any]) -> None:
    plan = arrives(tmp_path, write_hybrid(tmp_path / "ckpt", run=run, spelling=spelling, **{**MAMBA_1, **changes}))
    assert (plan.config.mamba_version, plan.config.mamba_dt_rank, plan.config.mamba_state_dim) == (1, 3, 6)
    assert any("Mamba-1 mixers: 32 channels, time steps of rank 3" in note for note in plan.notes)


def test_the_layouts_and_the_formats_give_the_same_folder_byte_for_byte(tmp_path: Path) -> None:
    def converted(name: str) -> dict[str, str]:
        convert(tmp_path / name, tmp_path / f"{name}_hf")
        return weights_and_config(tmp_path / f"{name}_hf")

    write_hybrid_dist(tmp_path / "dist", LAYERS, **EXPERTS)
    wanted = converted("dist")
    for number, (run, changes) in enumerate(RUNS.values()):
        bars = {"hybrid_override_pattern": None} if "hybrid_layer_pattern" in changes else {}
        write_hybrid(tmp_path / str(number), LAYERS, run, **EXPERTS, **changes, **bars)
        assert converted(str(number)) == wanted, run


def test_what_only_shapes_tell_is_in_the_config(tmp_path: Path) -> None:
    mixer = Mixer(channel_D=True, norm=False, bias=False, window=3, expand=3)
    write_hybrid(tmp_path / "ckpt", "M*", Run(tensor=2), mixer=mixer)
    config = convert(tmp_path / "ckpt", tmp_path / "hf").config
    assert (config.mamba_num_heads, config.mamba_expand, config.mamba_d_conv) == (12, 3, 3)
    assert (config.mamba_d_has_hdim, config.mamba_rmsnorm, config.mamba_conv_bias) == (True, False, False)


LOADED = {**KINDS, "Mamba-1": MAMBA_1}


@pytest.mark.parametrize("kind", LOADED)
def test_a_folder_loads_as_a_hybrid_and_is_verified(tmp_path: Path, kind: str) -> None:
    wanted = write_hybrid(tmp_path / "ckpt", run=Run(tensor=2), **LOADED[kind])
    assert megahf("convert", tmp_path / "ckpt", tmp_path / "hf").exit_code == 0
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == "McoreHybridForCausalLM"
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = (
        {} if "output_layer.weight" in wanted else {"output_layer.weight": wanted["embedding.word_embeddings.weight"]}
    )
    found = canonical_state(model)
    assert_same({name: found[name] for name in {*found} - {*tied}}, wanted)
    assert model(torch.arange(9)[None]).logits.isfinite().all()
    verified = megahf("verify", tmp_path / "ckpt", tmp_path / "hf")
    assert verified.exit_code == 0, verified.output


@pytest.mark.parametrize("kind", LOADED)
def test_a_model_filled_and_saved_gives_the_same_folder(tmp_path: Path, kind: str) -> None:
    write_hybrid(tmp_path / "ckpt", run=Run(tensor=2), **LOADED[kind])
    convert(tmp_path / "ckpt", tmp_path / "a")
    package.from_megatron(tmp_path / "ckpt").save_pretrained(tmp_path / "b")
    assert weights_and_config(tmp_path / "b") == weights_and_config(tmp_path / "a")


def test_verify_sees_a_changed_weight_of_a_mixer(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "ckpt", "M*", Run(tensor=2))
    convert(tmp_path / "ckpt", tmp_path / "hf")
    name = "decoder.layers.0.mixer.A_log"
    rewrite(tmp_path / "ckpt", lambda content: content["model"][name].add_(1), "mp_rank_01")
    result = megahf("verify", tmp_path / "ckpt", tmp_path / "hf")
    assert result.exit_code == 1
    assert f"weights that differ from the checkpoint ({name})" in result.stderr
    assert name in tensors(tmp_path / "hf")


def test_norms_that_are_not_fused_are_taken_with_the_epsilon_of_the_args_where_those_may_mean_it(
    tmp_path: Path,
) -> None:
    bars = {"hybrid_override_pattern": None, "hybrid_layer_pattern": "M*"}
    write_hybrid(tmp_path / "ckpt", "M*", spelling="local", layernorm_epsilon=1e-6, **bars)
    plan = convert(tmp_path / "ckpt", tmp_path / "hf")
    assert plan.config.layernorm_epsilon == 1e-6
    assert any("not fused: Megatron ran them with 1e-5 until July 2026, then 1e-06" in note for note in plan.notes)


def test_fused_norms_have_the_epsilon_of_the_args(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "ckpt", "M*", layernorm_epsilon=1e-6)
    plan = convert(tmp_path / "ckpt", tmp_path / "hf")
    assert not any("epsilon" in note or "fused" in note for note in plan.notes)


def test_components_of_other_sizes_are_not_put_together(tmp_path: Path) -> None:
    """z with a row of x: as many rows as there should be, and each of them in another place."""
    write_hybrid_dist(tmp_path / "good", "M")
    content = stored(tmp_path / "good")
    z, x = (content[f"decoder.layers.0.mixer.in_proj.weight.{part}"] for part in "zx")
    content["decoder.layers.0.mixer.in_proj.weight.z"] = torch.cat([z, x[:1]])
    content["decoder.layers.0.mixer.in_proj.weight.x"] = x[1:].clone()
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    save(content, storage_writer=FileSystemWriter(tmp_path / "bad" / "iter_0000007"), no_dist=True)
    with pytest.raises(Refused, match=r"33 \+ 31 \+ 24 \+ 24 \+ 8 are stored, the args say 32 \+ 32 \+ 24"):
        convert(tmp_path / "bad", tmp_path / "hf")


def stored(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a distributed checkpoint, read by torch."""
    reader = FileSystemReader(path / "iter_0000007")
    metadata = reader.read_metadata().state_dict_metadata
    content = {key: torch.empty(item.size, dtype=item.properties.dtype) for key, item in metadata.items()}
    load(content, storage_reader=reader, no_dist=True)
    return content


def test_mixers_in_the_heads_alone_are_read_off_there(tmp_path: Path) -> None:
    words = {"hybrid_override_pattern": None, "hybrid_layer_pattern": "*-/M", "mtp_num_layers": 1}
    arrives(tmp_path, write_hybrid(tmp_path / "ckpt", "*-", heads="M", mixer=Mixer(expand=3), **words))
