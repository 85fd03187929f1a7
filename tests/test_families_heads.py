"""Promise: heads for further tokens that DeepSeek-V3's and GLM's folders store after the last layer become ours.

transformers leaves them out of the model and out of what it saves; its `MtpModel`, which drafts with them, is the
oracle. The files are made here by hand, with the names they have on the Hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import change, config_of, logits, model_of, refusal, stored
from safetensors.torch import load_file, save_file
from test_families_experts import deepseek_v3, glm4
from tiny import randomise, tokens
from torch import Tensor
from transformers import modeling_layers

import megahf
from megahf import convert

LAYERS, HEADS = 3, 2
FAMILIES = {"deepseek_v3": deepseek_v3, "glm4_moe": glm4}


def drafter(main: T.PreTrainedModel) -> Any:
    """transformers' heads over `main`, with random weights."""
    if not hasattr(modeling_layers, "MtpModel"):
        pytest.skip("this version of transformers has no heads for further tokens")
    embedding, head = main.get_input_embeddings().weight.clone(), main.lm_head.weight.clone()
    model = randomise(modeling_layers.MtpModel(main, HEADS), seed=7).eval()
    with torch.no_grad():  # which are the model's own
        main.get_input_embeddings().weight.copy_(embedding)
        main.lm_head.weight.copy_(head)
    return model


def on_the_hub(main: T.PreTrainedModel, heads: Any) -> dict[str, Tensor]:
    """Their weights, with the embedding and the output layer once more in each."""
    found = {}
    for name, array in heads.state_dict().items():
        if not name.startswith("layers."):
            continue
        _, head, rest = name.split(".", 2)
        at = f"model.layers.{LAYERS + int(head)}."
        rest = rest.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if rest.endswith("experts.gate_up_proj"):
            for expert, matrix in enumerate(array):
                for half, rows in zip(("gate", "up"), matrix.chunk(2), strict=True):
                    found[f"{at}mlp.experts.{expert}.{half}_proj.weight"] = rows.clone()
        elif rest.endswith("experts.down_proj"):
            found |= {f"{at}mlp.experts.{expert}.down_proj.weight": one.clone() for expert, one in enumerate(array)}
        else:
            found[at + rest] = array.clone()
    for head in range(HEADS):
        at = f"model.layers.{LAYERS + head}."
        found[f"{at}embed_tokens.weight"] = main.get_input_embeddings().weight.detach().clone()
        found[f"{at}shared_head.head.weight"] = main.lm_head.weight.detach().clone()
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def main(family: str) -> T.PreTrainedModel:
    return model_of(FAMILIES[family](num_nextn_predict_layers=HEADS))


@pytest.fixture
def heads(main: T.PreTrainedModel) -> Any:
    return drafter(main)


@pytest.fixture
def folder(main: T.PreTrainedModel, heads: Any, tmp_path: Path) -> Path:
    """The model as transformers saves it, and its heads."""
    main.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    save_file({**load_file(path), **on_the_hub(main, heads)}, path, {"format": "pt"})
    return tmp_path / "theirs"


@torch.no_grad()
def drafted(main: T.PreTrainedModel, heads: Any, ids: Tensor) -> list[Tensor]:
    """Logits `[b, s - 1 - k, V]` of head k, over tokens that are known."""
    if not hasattr(heads, "forward_layer"):
        pytest.skip("in this version of transformers heads cannot be run one by one")
    hidden, found = main.model(ids).last_hidden_state, []
    for head in range(HEADS):
        following = ids[:, head + 1 :]
        positions = torch.arange(following.shape[1])[None]
        hidden = heads.forward_layer(head, hidden[:, :-1], positions, None, input_ids=following)
        found.append(main.lm_head(hidden))
    return found


def test_heads_say_what_they_say_in_transformers(
    main: T.PreTrainedModel, heads: Any, folder: Path, tmp_path: Path
) -> None:
    convert(folder, tmp_path / "ours", to="hf")
    megahf.register()
    ours = T.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        out = ours(ids, output_mtp_logits=True)
    torch.testing.assert_close(out.logits, main(ids).logits, atol=1e-5, rtol=1e-5)
    for head, expected in enumerate(drafted(main, heads, ids)):
        assert expected.abs().max() > 1
        torch.testing.assert_close(out.mtp_logits[head][:, : expected.shape[1]], expected, atol=1e-5, rtol=1e-5)


def test_heads_go_back_as_they_came(folder: Path, family: str, main: T.PreTrainedModel, tmp_path: Path) -> None:
    convert(folder, tmp_path / "ours", to="hf")
    convert(tmp_path / "ours", tmp_path / "back", to=family)
    assert stored(tmp_path / "back") == stored(folder)
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == HEADS
    again = T.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert torch.equal(logits(again), logits(main))


def test_heads_that_are_counted_and_not_stored_are_none(main: T.PreTrainedModel, family: str, tmp_path: Path) -> None:
    main.save_pretrained(tmp_path / "theirs")
    assert config_of(tmp_path / "theirs")["num_nextn_predict_layers"] == HEADS
    plan = convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    assert plan.config.mtp_num_layers is None
    assert any("no head for further tokens is stored" in note for note in plan.notes)
    convert(tmp_path / "ours", tmp_path / "back", to=family)
    assert config_of(tmp_path / "back")["num_nextn_predict_layers"] == 0


def test_an_embedding_of_a_head_that_is_not_the_models_is_refused(folder: Path, tmp_path: Path) -> None:
    path, name = folder / "model.safetensors", f"model.layers.{LAYERS + 1}.embed_tokens.weight"
    found = load_file(path)
    found[name][3, 3] += 1
    save_file(found, path, {"format": "pt"})
    said = refusal(folder, tmp_path / "ours")
    assert f"stored twice and not equal (embedding.word_embeddings.weight, also in {name})" in said


def test_heads_that_config_json_does_not_count_are_refused(folder: Path, tmp_path: Path) -> None:
    said = refusal(change(folder, num_nextn_predict_layers=0), tmp_path / "ours")
    assert "weights that" in said and f"model.layers.{LAYERS}." in said
