"""The args of a written checkpoint are those of a run that would have written it, and so are the options to load it."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import pickle
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from every_kind import KINDS, config_of

from megahf.arguments import config, defaults, lost
from megahf.checkpoint.inert import Opaque
from megahf.checkpoint.opcodes import Global, Made, children
from megahf.checkpoint.pickling import pickled
from megahf.command_lines import OPTIONAL, REQUIRED, command_line, remarks
from megahf.errors import Refused
from megahf.grid_arguments import grid
from megahf.run_arguments import as_records, run_arguments
from megahf.target import Target
from megahf.tensor_sizes import sensible_tp

OPTIONS = json.loads(Path(__file__).with_name("megatron_options.json").read_text())  # by Megatron-LM's own parser
TARGETS: dict[str, dict[str, Any]] = {
    "tp2": {"tp": 2, "format": "torch_dist"},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2, "engine": False},
}


def run(kind: str, source_args: dict[str, Any] | None = None, **target: Any) -> dict[str, Any]:
    model = config_of(kind)
    made = Target.of(model, **target)
    return run_arguments(model, made, source_args=source_args, dtype="bfloat16", iteration=7)


def possible(kind: str) -> Iterator[tuple[dict[str, Any], Target]]:
    for sizes in ({}, *TARGETS.values()):
        try:
            target = Target.of(config_of(kind), **sizes)
        except Refused:  # no experts, too few layers, or no such layers outside of Transformer Engine
            continue
        yield run(kind, **sizes), target


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_and_the_ranks_are_read_back_off_the_args(kind: str) -> None:
    wanted = config_of(kind)
    for args, target in possible(kind):
        assert set(args) >= set(defaults())
        assert not lost(args, wanted)
        assert vars(config(args, wanted.vocab_size)) == vars(wanted)
        read = grid(args)
        assert (read.tensor, read.pipeline, read.virtual, read.expert, read.expert_tensor) == (
            target.grid.tensor, target.grid.pipeline, target.grid.virtual, target.grid.expert, target.grid.expert_tensor
        )  # fmt: skip


def test_the_args_say_layout_format_and_vocabulary_of_the_target() -> None:
    args = run("mixtral", tp=2, pp=2, vpp=2, ep=2, etp=1, format="torch_dist", divisible_by=16)
    said = {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 1, "num_virtual_stages_per_pipeline_rank": None,
        "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "world_size": 4, "data_parallel_size": 1,
        "transformer_pipeline_model_parallel_size": 2, "sequence_parallel": True, "moe_grouped_gemm": True,
        "transformer_impl": "transformer_engine", "ckpt_format": "torch_dist", "use_dist_ckpt": True,
        "vocab_size": 101, "padded_vocab_size": 128, "make_vocab_size_divisible_by": 16, "bf16": True, "fp16": False,
        "params_dtype": "torch.bfloat16", "iteration": 7, "consumed_train_samples": 0, "seq_length": 64,
        "encoder_seq_length": 64, "encoder_num_layers": 4, "no_save_optim": True, "no_save_rng": True,
    }  # fmt: skip
    assert {name: args[name] for name in said} == said


@pytest.mark.parametrize(
    "experts, engine, said",
    [
        ("te-grouped", True, (True, "transformer_engine", None)),
        ("sequential", True, (False, "transformer_engine", None)),
        ("sequential", False, (False, "local", None)),
        ("legacy-grouped", False, (True, "local", True)),
    ],
)
def test_the_args_say_how_experts_are_held(experts: str, engine: bool, said: tuple[Any, ...]) -> None:
    args = run("mixtral", experts=experts, engine=engine)
    assert (args["moe_grouped_gemm"], args["transformer_impl"], args.get("moe_use_legacy_grouped_gemm")) == said


def test_a_megatron_sources_own_args_are_kept_but_for_layout_format_and_vocabulary() -> None:
    own = {
        **KINDS["llama"], "norm_epsilon": 1e-5, "lr": 3e-4, "seed": 99, "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": "some/where", "consumed_train_samples": 4096, "swiglu": True, "seq_length": 24,
        "tensor_model_parallel_size": 4, "ckpt_format": "torch_dcp", "padded_vocab_size": 512, "iteration": 90,
        "my_own": 3, "attention_backend": Opaque("megatron.core.transformer.enums.AttnBackend", (1,)),
        "mla_down_proj_fusion": True, "moe_mlp_glu_interleave_size": 32, "init_method_std": 0.02,
    }  # fmt: skip
    args = run("llama", own, tp=2)
    kept = ("lr", "seed", "tokenizer_type", "tokenizer_model", "consumed_train_samples", "seq_length", "swiglu")
    assert {name: args[name] for name in kept} == {name: own[name] for name in kept}
    replaced = ("tensor_model_parallel_size", "ckpt_format", "padded_vocab_size", "iteration", "mla_down_proj_fusion")
    assert [args[name] for name in replaced] == [2, "torch", 256, 7, False]
    assert args["moe_mlp_glu_interleave_size"] is None
    assert not {"my_own", "norm_epsilon"} & set(args)
    assert args["attention_backend"] == defaults()["attention_backend"]


def test_args_of_an_older_source_become_those_of_today() -> None:
    old = {**KINDS["gpt_zero_centered"], "norm_epsilon": 1e-5, "apply_layernorm_1p": True, "lr": 0.5}
    del old["layernorm_zero_centered_gamma"]
    args = run("gpt_zero_centered", old)
    assert (args["layernorm_zero_centered_gamma"], args["lr"]) == (True, 0.5)


def test_a_hybrids_own_spec_is_kept() -> None:
    own = {**KINDS["nemotron_h"], "spec": ["my.module", "spec"]}
    assert run("nemotron_h", own)["spec"] == ["my.module", "spec"]
    assert run("nemotron_h")["spec"][1] == "mamba_stack_spec"


def test_a_field_that_no_argument_says_and_a_dtype_that_is_not_trained_in_are_refused() -> None:
    model = SimpleNamespace(**{**vars(config_of("llama")), "rope_scaling_factor": 4.0})
    with pytest.raises(Refused, match="rope_scaling_factor is 4"):
        run_arguments(model, Target.of(model), source_args=None, dtype="fp32", iteration=0)
    with pytest.raises(Refused, match="trains no weights in float64"):
        run_arguments(config_of("llama"), Target.of(config_of("llama")), source_args=None, dtype="float64", iteration=0)


def test_the_namespace_names_nothing_that_a_megatron_lacks() -> None:
    named, todo = set(), [as_records(run("llama"))]
    while todo:
        node: Any = todo.pop()
        if isinstance(node, (Made, Global)):
            named.add(node.cls if isinstance(node, Made) else node.name)
        todo += children(node)
    attention = "megatron.core.transformer.enums.AttnBackend"
    assert named == {"argparse.Namespace", "torch.bfloat16", "torch.float32", "signal.Signals", attention}


@pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="no megatron-core")
def test_python_unpickles_the_namespace_as_a_megatron_process_has_it() -> None:
    from megahf.judge.namespace import decoded

    args = run("nemotron_h")
    made = pickle.loads(pickled(as_records(args)))
    assert isinstance(made, argparse.Namespace)
    assert vars(made) == {name: decoded(value) for name, value in args.items()}
    assert made.params_dtype.is_floating_point and made.attention_backend.name == "auto"


def parser() -> argparse.ArgumentParser:
    """The options as Megatron's own parser has them: how each is spelled, what it sets, and to what."""
    types = {"int": int, "float": float, "str": str}
    made = argparse.ArgumentParser(allow_abbrev=False)
    for flag, (name, kind, nargs) in OPTIONS.items():
        if kind in ("true", "false"):
            made.add_argument(flag, dest=name, action=f"store_{kind}", default=defaults()[name])
        else:
            read = types.get(kind, ast.literal_eval)  # patterns and windows
            made.add_argument(flag, dest=name, type=read, nargs=nargs, default=defaults()[name])
    return made


def test_every_option_that_is_printed_is_one_of_megatrons() -> None:
    assert {name for name, *_ in OPTIONS.values()} == {*REQUIRED, *OPTIONAL, "load", "no_load_optim", "no_load_rng"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_options_say_the_same_model_and_ranks_as_the_args(kind: str) -> None:
    for args, _ in possible(kind):
        read = vars(parser().parse_args(shlex.split(" ".join(command_line(args, "/some where/else")))))
        assert read["load"] == "/some where/else"
        assert not lost(read, config_of(kind))
        sizes = ("expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size")
        ranks = {**read, **{name: args[name] for name in sizes}}  # which Megatron derives
        assert grid(ranks) == grid(args)
        same = ("padded_vocab_size", "bf16", "ckpt_format", "transformer_impl", "sequence_parallel", "moe_grouped_gemm")
        assert {name: read[name] for name in same} == {name: args[name] for name in same}


def test_options_that_megatrons_defaults_say_are_not_printed() -> None:
    lines = command_line(run("llama", tp=2, format="torch_dist"), "ckpt")
    assert "--swiglu" in lines and "--disable-bias-linear" in lines and "--tensor-model-parallel-size 2" in lines
    names = {line.split()[0] for line in lines}
    assert not names & {"--moe-layer-freq", "--kv-channels", "--rotary-base", "--no-bias-gelu-fusion", "--mscale"}
    assert len(lines) < 25


def test_remarks_say_what_options_cannot() -> None:
    assert any("a tokenizer is for you to name" in said for said in remarks(run("llama")))
    assert any("calls --hybrid-layer-pattern --hybrid-override-pattern" in said for said in remarks(run("nemotron_h")))
    assert any("clamps SwiGLU in experts alone" in said for said in remarks(run("llama_clamped")))
    assert any("heads for further tokens with rope and none" in said for said in remarks(run("mtp_gpt2")))
    half = SimpleNamespace(**{**vars(config_of("llama")), "rotary_base": 10000.5})
    args = run_arguments(half, Target.of(half), source_args=None, dtype="fp32", iteration=0)
    assert not any("rotary-base" in line for line in command_line(args, "x"))
    assert any("rotary_base is 10000.5" in said for said in remarks(args))


BIG = {"max_position_embeddings": 8192, "kv_channels": 128, "vocab_size": 128256}


@pytest.mark.parametrize(
    "kind, sizes, ranks",
    [
        ("llama", {}, 1),
        ("llama", {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32,
                   "num_query_groups": 8, **BIG}, 2),  # 8B
        ("llama", {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64,
                   "num_query_groups": 8, **BIG}, 8),  # 70B
        ("llama", {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64,
                   "num_query_groups": 2, **BIG}, 2),  # no more than query groups
        ("nemotron_h", {"mamba_num_groups": 1}, 1),
    ],
)  # fmt: skip
def test_the_rule_of_thumb_for_tensor_parallel_ranks(kind: str, sizes: dict[str, Any], ranks: int) -> None:
    assert sensible_tp(SimpleNamespace(**{**vars(config_of(kind)), **sizes})) == ranks
