"""Promise: BERT computes what transformers' MegatronBert does with the same weights, and is a model like any other.

Real Megatron is in tests/megatron/test_bert.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stranger
import torch
import transformers as T
from test_remote_code import digests, load_fresh
from tiny import BERTS, LLAMA, SIZES, randomise, tiny_bert_config, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import megahf
import megahf.models.modeling_mcore_bert as bert
from megahf import convert
from megahf.architectures import load_class
from megahf.plan import runtime
from megahf.weights import weights

megahf.register()

CLASSES = {
    "AutoModel": bert.McoreBertModel,
    "AutoModelForPreTraining": bert.McoreBertForPreTraining,
    "AutoModelForMaskedLM": bert.McoreBertForMaskedLM,
    "AutoModelForSequenceClassification": bert.McoreBertForSequenceClassification,
    "AutoModelForTokenClassification": bert.McoreBertForTokenClassification,
}
THEIRS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 96,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-3,
}


def tiny(auto: str = "AutoModelForPreTraining", **changes: Any) -> Any:
    """A model with random weights, in evaluation mode."""
    return randomise(CLASSES[auto](tiny_bert_config(**changes))).eval()


def theirs(name: str = "MegatronBertForPreTraining", **changes: Any) -> T.PreTrainedModel:
    """transformers' own, with random weights."""
    return randomise(getattr(T, name)(T.MegatronBertConfig(**{**THEIRS, **changes}))).eval()


def batch() -> dict[str, Tensor]:
    """Three rows of two sentences, two of them padded on the right."""
    ids = tokens(3, 20)
    mask = (torch.arange(20) < torch.tensor([20, 13, 7])[:, None]).long()
    types = (torch.arange(20) >= torch.tensor([11, 6, 3])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": types * mask}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[T.PreTrainedModel, Any]:
    """transformers' MegatronBert for pre-training, and ours with its weights."""
    folder, model = tmp_path_factory.mktemp("pair"), theirs()
    model.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours", to="hf")
    return model, T.AutoModelForPreTraining.from_pretrained(folder / "ours").eval()


VARIANTS: dict[str, dict[str, Any]] = {
    **BERTS,
    "untied": {"tie_word_embeddings": False},
    "types alone": {"add_binary_head": False, "num_tokentypes": 3},
    "no biases": {"add_bias_linear": False, "normalization": "RMSNorm"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=list(VARIANTS))
def test_the_models_parameters_are_the_rows_one_for_one(changes: dict[str, Any]) -> None:
    config = tiny_bert_config(**changes)
    model = load_class(config)(config)
    held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {runtime(weight): weight.shape for weight in weights(config)} == held


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_every_score_is_transformers_own(pair: tuple[Any, Any], implementation: str) -> None:
    model, ours = pair
    ours.set_attn_implementation(implementation)
    expected, found, kept = model(**batch()), ours(**batch()), batch()["attention_mask"].bool()
    assert expected.prediction_logits.abs().max() > 1
    for name in ("prediction_logits", "seq_relationship_logits"):
        a, b = (x[name][kept] if name[0] == "p" else x[name] for x in (found, expected))
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_losses_and_gradients_are_transformers_own(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    ours.set_attn_implementation("sdpa")
    inputs = batch()
    generator = torch.Generator().manual_seed(3)
    masked = (torch.rand(3, 20, generator=generator) < 0.3) & inputs["attention_mask"].bool()
    labels = inputs.pop("input_ids").masked_fill(~masked, -100)
    words = torch.randn(3, 20, 32, generator=generator)
    known = {"labels": labels, "next_sentence_label": torch.tensor([1, 0, 1])}
    told = []
    for one in (model, ours):
        one.zero_grad()
        given = words.clone().requires_grad_()
        loss = one(inputs_embeds=given, **inputs, **known).loss
        loss.backward()
        told.append((loss.detach(), given.grad, one.get_input_embeddings().weight.grad))
    torch.testing.assert_close(told[1], told[0], atol=1e-5, rtol=1e-4)
    pairs = (
        ("bert.embeddings.token_type_embeddings.weight", "model.embedding.tokentype_embeddings.weight"),
        ("bert.embeddings.position_embeddings.weight", "model.embedding.position_embeddings.weight"),
        ("bert.encoder.layer.1.output.dense.weight", "model.encoder.layers.1.mlp.linear_fc2.weight"),
        ("bert.encoder.layer.0.attention.ln.bias", "model.encoder.layers.0.self_attention.linear_qkv_layernorm.bias"),
        ("bert.encoder.ln.weight", "model.encoder.final_layernorm.weight"),
        ("bert.pooler.dense.weight", "model.pooler.dense.weight"),
        ("cls.predictions.transform.dense.weight", "lm_head.dense.weight"),
        ("cls.predictions.bias", "output_layer.bias"),
        ("cls.seq_relationship.weight", "binary_head.weight"),
    )  # fmt: skip
    for name, own in pairs:
        expected, found = model.get_parameter(name).grad, ours.get_parameter(own).grad
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_pair_whose_order_is_not_known_has_no_loss() -> None:
    model = tiny()
    known = model(**batch(), next_sentence_label=torch.tensor([1, 0, 1])).loss
    some = model(**batch(), next_sentence_label=torch.tensor([1, -1, -100])).loss
    first = {name: value[:1] for name, value in batch().items()}
    torch.testing.assert_close(some, model(**first, next_sentence_label=torch.tensor([1])).loss)
    assert not torch.isclose(some, known)


@pytest.mark.parametrize("variant", BERTS.values(), ids=list(BERTS))
@torch.no_grad()
def test_padding_changes_nothing_and_every_token_sees_both_ways(variant: dict[str, Any]) -> None:
    model, inputs = tiny("AutoModelForMaskedLM", **variant), batch()
    if not model.config.num_tokentypes:
        del inputs["token_type_ids"]
    kept, expected = inputs["attention_mask"].bool(), model(**inputs).logits
    other = {**inputs, "input_ids": torch.where(kept, inputs["input_ids"], 7)}
    assert torch.equal(model(**other).logits[kept], expected[kept])
    alone = model(**{name: value[1:2, :13] for name, value in inputs.items()}).logits
    torch.testing.assert_close(alone[0], expected[1, :13], atol=1e-5, rtol=1e-5)
    last = {**inputs, "input_ids": inputs["input_ids"].clone()}
    last["input_ids"][0, -1] += 1
    first = {**inputs, "input_ids": inputs["input_ids"].clone()}
    first["input_ids"][0, 0] += 1
    assert (model(**last).logits[0, 0] - expected[0, 0]).abs().max() > 1e-3
    assert (model(**first).logits[0, -1] - expected[0, -1]).abs().max() > 1e-3
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(**inputs).logits[kept], expected[kept], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_of_ones_own_and_attention_weights_and_hidden_states() -> None:
    model, inputs = tiny(), batch()
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert [weights.shape for weights in expected.attentions] == [(3, 4, 20, 20)] * 2
    assert (expected.attentions[0][1, :, :, 13:] == 0).all()
    assert [states.shape for states in expected.hidden_states] == [(3, 20, 32)] * 3
    model.set_attn_implementation("sdpa")
    own = inputs["attention_mask"].bool()[:, None, None, :].expand(-1, 1, 20, -1)
    found = model(**{**inputs, "attention_mask": own})
    torch.testing.assert_close(found.prediction_logits, expected.prediction_logits, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch(), labels=tokens(3, 20), next_sentence_label=torch.tensor([1, 0, 1])).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1])


def test_what_cannot_be_computed_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="97 tokens, but the model has learned 96 positions"):
        tiny()(tokens(1, 97))
    with pytest.raises(ValueError, match="token_type_ids are given, but the model has no token types"):
        tiny("AutoModelForMaskedLM", **BERTS["masked words"])(**batch())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny("AutoModel")(tokens(1, 4), inputs_embeds=torch.zeros(1, 4, 32))
    for changes, why in (
        ({"num_experts": 4}, "num_experts is 4: Megatron's BERT has none, it must be None"),
        ({"window_size": [4, 0]}, "window_size"),
        ({"qk_layernorm": True}, "qk_layernorm is True"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"num_tokentypes": -1}, "num_tokentypes is -1"),
    ):
        with pytest.raises(Exception, match=why):
            tiny_bert_config(**changes)


@torch.no_grad()
def test_zeros_for_token_types_are_none_and_those_not_given_are_zeros() -> None:
    model, ids = tiny("AutoModelForMaskedLM", **BERTS["masked words"]), tokens(2, 9)
    assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids)).logits, model(ids).logits)
    model = tiny("AutoModelForMaskedLM")
    assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("auto", CLASSES)
def test_each_class_loads_and_saves_the_same_bytes_without_megahf(auto: str, tmp_path: Path) -> None:
    model = tiny(auto, num_labels=3)
    model.save_pretrained(tmp_path / "first")
    out = load_fresh(tmp_path / "first", auto, tmp_path / "second")
    assert out["missing"] == out["unexpected"] == []
    with torch.no_grad():
        torch.testing.assert_close(out["outputs"], model(tokens(1, 7))[0], atol=0, rtol=0)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


def test_classes_load_one_anothers_folders(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    heads = {"classification_head.weight", "classification_head.bias"}
    for auto, missing in (
        ("AutoModelForMaskedLM", set[str]()),
        ("AutoModelForSequenceClassification", heads),
        ("AutoModelForTokenClassification", heads),
    ):
        model, said = getattr(T, auto).from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is CLASSES[auto] and set(said["missing_keys"]) == missing
        assert not {name for name in said["unexpected_keys"] if "pooler" in name}
    masked = T.AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(masked(**batch()).logits, tiny()(**batch()).prediction_logits)


@pytest.mark.parametrize(("labels", "kind"), [(torch.tensor([0, 2, 1]), None), (torch.rand(3, 3), "regression")])
def test_sequences_are_classified_by_the_pooler(labels: Tensor, kind: str | None) -> None:
    model = tiny("AutoModelForSequenceClassification", num_labels=3, problem_type=kind, add_binary_head=False)
    out = model(**batch(), labels=labels)
    assert out.logits.shape == (3, 3)
    out.loss.backward()
    assert model.model.pooler.dense.weight.grad.abs().max() > 0


LINES = ("the ship sails at dawn", "and the crew is still asleep")
WORDS = list(dict.fromkeys(["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *" ".join(LINES).split()]))


def tokenizer() -> T.PreTrainedTokenizerFast:
    built = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask", "unk")}
    return T.PreTrainedTokenizerFast(tokenizer_object=built, **names)


WITHOUT_MEGAHF = """
import sys
from transformers import pipeline
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
print(fill("the ship [MASK] at dawn")[0]["token_str"])
"""


def test_the_fill_mask_pipeline_says_the_word_with_megahf_and_without(tmp_path: Path) -> None:
    words = tokenizer()
    model = tiny(vocab_size=len(WORDS), pad_token_id=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = words(LINES, return_tensors="pt", padding=True)
    for step in range(60):
        masked = ids.input_ids.clone()
        masked[torch.arange(2), step % ids.attention_mask.sum(dim=1)] = words.mask_token_id
        model(masked, ids.attention_mask, labels=ids.input_ids.masked_fill(ids.input_ids == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    fill = T.pipeline("fill-mask", model=str(tmp_path / "model"))
    assert type(fill.model) is bert.McoreBertForMaskedLM
    said = fill(["the ship [MASK] at dawn", "and the crew is [MASK] asleep"], batch_size=2)
    assert [row[0]["token_str"] for row in said] == ["sails", "still"]
    done = stranger.run(WITHOUT_MEGAHF, tmp_path / "model", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "sails"


def test_sizes_and_rope_are_those_of_a_gpt() -> None:
    model = tiny("AutoModel", **LLAMA)
    assert model.rotary_pos_emb is not None and model.embedding.position_embeddings is None
    assert model.config.head_dim == SIZES["kv_channels"]
    assert "encoder.layers.*.self_attention.linear_qkv" in model.config.base_model_tp_plan
