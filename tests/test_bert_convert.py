"""Promise: BERT goes to Megatron's formats and back, to transformers' MegatronBert and back, or it is said why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import change, config_of, refusal, stored
from test_bert import batch, theirs, tiny
from tiny import BERTS, LLAMA, tokens
from tiny import tiny as tiny_gpt

import megahf
from megahf import bert, convert
from megahf.arguments import arguments_of, config
from megahf.checkpoint import open_checkpoint
from megahf.command_lines import command_line
from megahf.errors import Refused
from megahf.families import FAMILIES
from megahf.plan import build
from megahf.run_arguments import run_arguments
from megahf.target import Target

megahf.register()

VARIANTS: dict[str, dict[str, Any]] = {
    **BERTS,
    "untied": {"tie_word_embeddings": False},
    "types alone": {"add_binary_head": False, "num_tokentypes": 3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"tp": 2, "pp": 2, "format": "torch"},
    "pp2_local": {"pp": 2, "format": "torch", "engine": False},
    "tp2_distributed": {"tp": 2, "format": "torch_dist"},
    "tp2_pp2_distributed_local": {"tp": 2, "pp": 2, "format": "torch_dist", "engine": False},
}


def saved(folder: Path, variant: str) -> Path:
    changes = VARIANTS[variant]
    auto = "AutoModelForPreTraining" if changes.get("add_binary_head", True) else "AutoModelForMaskedLM"
    tiny(auto, **changes).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_comes_back_from_megatron_byte_for_byte(variant: str, layout: str, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", variant)
    convert(first, tmp_path / "there", to="megatron", divisible_by=16, **LAYOUTS[layout])
    megahf.verify(first, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    assert stored(tmp_path / "back") == stored(first)
    differing = {
        name for name, value in config_of(first).items() if config_of(tmp_path / "back").get(name, value) != value
    }
    assert differing <= {"pad_token_id"}  # which a tokenizer says
    assert not (tmp_path / "back" / "generation_config.json").exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_args_say_every_field_or_the_weights_do(variant: str) -> None:
    made = tiny("AutoModelForPreTraining", **VARIANTS[variant]).config
    args = arguments_of(made)
    assert args[bert.MARK]
    read = config(args, 61)
    differing = {name for name, value in vars(read).items() if getattr(made, name) != value}
    assert differing <= {"softmax_scale", "num_tokentypes"}


def test_what_is_written_is_megatrons_own_and_says_how_it_is_loaded() -> None:
    made = tiny("AutoModelForMaskedLM", **BERTS["masked words"]).config
    for engine, spec in ((True, None), (False, ["local"])):
        target = Target.of(made, tp=2, format="torch_dist", engine=engine)
        args = run_arguments(made, target, source_args=None, dtype="bfloat16", iteration=1)
        assert bert.MARK not in args and args["spec"] == spec and args["bert_binary_head"] is False
        assert ("--spec local" in command_line(args, "x")) != engine
        assert "--bert-no-binary-head" in command_line(args, "x")


def test_what_the_script_does_not_heed_is_said(tmp_path: Path) -> None:
    convert(saved(tmp_path / "rope", "rope and sinks"), tmp_path / "there", to="megatron", format="torch")
    plan = build(open_checkpoint(tmp_path / "there"))
    assert plan.config.position_embedding_type == "rope" and plan.config.rotary_base == 10000
    assert any("learned positions" in line for line in bert.unsaid(plan.config))
    checkpoint = open_checkpoint(tmp_path / "there")
    checkpoint.args["qk_layernorm"] = True
    plan = build(checkpoint)
    assert plan.config.qk_layernorm is False
    assert any(line.startswith("qk_layernorm has no effect") for line in plan.notes)


def test_learned_positions_in_the_weights_count_whatever_the_args_say(tmp_path: Path) -> None:
    convert(saved(tmp_path / "first", "both heads"), tmp_path / "there", to="megatron", format="torch")
    checkpoint = open_checkpoint(tmp_path / "there")
    checkpoint.args["position_embedding_type"] = "rope"
    plan = build(checkpoint)
    assert plan.config.position_embedding_type == "learned_absolute"
    assert any("positions are learned" in line for line in plan.notes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_experts": 4}, "--num-experts 4 is experts, which is not built for BERT"),
        ({"multi_latent_attention": True}, "multi-latent attention"),
        ({"window_size": (4, 0)}, "a window"),
        ({"use_mup": True}, "muP"),
        ({"spec": ["my", "layers"]}, "--spec ['my', 'layers'] is layers from a module of your own"),
    ],
)
def test_args_of_what_is_not_built_are_refused_by_name(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    convert(saved(tmp_path / "first", "both heads"), tmp_path / "there", to="megatron", format="torch")
    checkpoint = open_checkpoint(tmp_path / "there")
    checkpoint.args.update(changes)
    with pytest.raises(Refused) as error:
        build(checkpoint)
    assert why in str(error.value)


@pytest.mark.parametrize("name", ["MegatronBertForPreTraining", "MegatronBertForMaskedLM"])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_own_comes_and_goes_byte_for_byte(name: str, tied: bool, tmp_path: Path) -> None:
    model = theirs(name, tie_word_embeddings=tied)
    model.cls.predictions.decoder.bias.data.copy_(model.cls.predictions.bias.data)  # untied, one that is not added
    model.save_pretrained(tmp_path / "new")
    again = type(model).from_pretrained(tmp_path / "new")
    again.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    main = getattr(T, "AutoModelForPreTraining" if name.endswith("PreTraining") else "AutoModelForMaskedLM")
    ours, said = main.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(said.values()), said
    kept = batch()["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**batch())[0][kept], model(**batch())[0][kept], atol=1e-5, rtol=1e-5)
    convert(tmp_path / "ours", tmp_path / "back", to="megatron-bert")
    megahf.verify(tmp_path / "ours", tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "theirs")
    assert config_of(tmp_path / "back")["architectures"] == [name]
    lowered, said = type(model).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(said.values()), said
    with torch.no_grad():
        assert torch.equal(lowered.eval()(**batch())[0], model(**batch())[0])


def test_a_model_without_token_types_is_lowered_with_one_of_zeros(tmp_path: Path) -> None:
    first = saved(tmp_path / "first", "masked words")
    convert(first, tmp_path / "lowered", to="megatron-bert")
    megahf.verify(first, tmp_path / "lowered")
    lowered = T.MegatronBertForMaskedLM.from_pretrained(tmp_path / "lowered").eval()
    assert lowered.config.type_vocab_size == 1
    ids = tokens(2, 11)
    with torch.no_grad():
        expected = T.AutoModelForMaskedLM.from_pretrained(first).eval()(ids).logits
        torch.testing.assert_close(lowered(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_every_setting_of_transformers_own_is_read_or_known_to_do_nothing() -> None:
    assert set(T.MegatronBertConfig().to_dict()) <= FAMILIES["megatron-bert"].keys


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"activation_func": "gelu_tanh"}, "activation_func is 'gelu_tanh' and the head's gelu exact"),
        ({"position_embedding_type": "rope"}, "position_embedding_type is 'rope', in MegatronBertForPreTraining"),
        (LLAMA, "normalization is 'RMSNorm'"),
        ({"kv_channels": 12}, "kv_channels is 12"),
        ({"softmax_type": "learnable"}, "softmax_type is 'learnable'"),
        ({"attention_output_gate": True}, "attention_output_gate is True"),
    ],
)
def test_what_transformers_own_cannot_compute_is_not_lowered(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    tiny(**changes).save_pretrained(tmp_path / "ours")
    assert why in refusal(tmp_path / "ours", tmp_path / "back", "megatron-bert")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden_act": "relu"}, "hidden_act: it is 'relu', also of the head before the words"),
        ({"is_decoder": True}, "is_decoder: it is True, built is False"),
        ({"architectures": ["MegatronBertForCausalLM"]}, "architectures: it is 'MegatronBertForCausalLM'"),
        ({"model_type": "bert"}, "norms after each sum and after the embedding"),
        ({"model_type": "roberta"}, "norms after each sum and after the embedding"),
    ],
)
def test_what_is_no_bert_of_megatrons_is_refused(changes: dict[str, Any], why: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path / "theirs")
    assert why in refusal(change(tmp_path / "theirs", **changes), tmp_path / "ours")


def test_berts_and_gpts_are_not_lowered_to_one_another(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "bert")
    tiny_gpt().save_pretrained(tmp_path / "gpt")
    assert "norms after each sum" in refusal(tmp_path / "bert", tmp_path / "back", "bert")
    assert "it is a BERT" in refusal(tmp_path / "bert", tmp_path / "back", "llama")
    assert "MegatronBertForPreTraining is a BERT" in refusal(tmp_path / "gpt", tmp_path / "back", "megatron-bert")


def test_a_folder_says_what_it_is_for(tmp_path: Path) -> None:
    convert(saved(tmp_path / "first", "both heads"), tmp_path / "there", to="megatron")
    convert(tmp_path / "there", tmp_path / "hf", to="hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card and "# A BERT of" in card
    assert "AutoModelForPreTraining.from_pretrained(name, revision=revision, trust_remote_code=True)" in card
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert told["architectures"] == ["McoreBertForPreTraining"] and told["use_cache"] is False
