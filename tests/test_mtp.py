"""Promise: heads for further tokens (MTP) say and learn what Megatron's do, travel with the model, may be left out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from test_remote_code import digests, load_fresh
from tiny import LLAMA, VARIANTS, randomise, tiny, tiny_config, tokens
from torch import Tensor

from megahf.models import modeling_mcore_gpt as gpt
from megahf.models.mtp import MultiTokenPredictionLayer, head_layer_type

HEADS: dict[str, Any] = {**LLAMA, "mtp_num_layers": 2}
MOE: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_aux_loss_coeff": 0.3}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def layer(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    """A decoder layer of `LLAMA`, one row `[s, h]`, head by head and written down as plainly as it can be."""
    length, d = len(x), 8
    normed = norm(x, w[f"{at}self_attention.linear_qkv_layernorm.weight"])
    packed = normed @ w[f"{at}self_attention.linear_qkv.weight"].T
    angles = torch.arange(length, dtype=x.dtype)[:, None] / 10000.0 ** (torch.arange(0, d, 2, dtype=x.dtype) / d)

    def turned(y: Tensor) -> Tensor:
        a, b = y.chunk(2, dim=-1)
        return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)

    heads = []
    for group in packed.unflatten(-1, (2, 4, d)).unbind(1):  # two query heads, their key, their value
        for query in (group[:, 0], group[:, 1]):
            scores = turned(query) @ turned(group[:, 2]).T / d**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ group[:, 3])
    x = x + torch.cat(heads, dim=-1) @ w[f"{at}self_attention.linear_proj.weight"].T
    gate, up = (norm(x, w[f"{at}mlp.linear_fc1_layernorm.weight"]) @ w[f"{at}mlp.linear_fc1.weight"].T).chunk(2, dim=-1)
    return x + (F.silu(gate) * up) @ w[f"{at}mlp.linear_fc2.weight"].T


def plain_heads(w: dict[str, Tensor], ids: Tensor, heads: int, own: int) -> list[Tensor]:
    """Logits `[s, V]` of each head for one row of tokens `[s]`: token i + k's vector comes in front of the states."""
    words = w["model.embedding.word_embeddings.weight"]
    x = words[ids]
    for number in range(2):
        x = layer(x, w, f"model.decoder.layers.{number}.")
    x, logits = norm(x, w["model.decoder.final_layernorm.weight"]), []
    for head in range(heads):
        at = f"model.mtp.layers.{min(head, own - 1)}."
        further = words[torch.cat((ids[head + 1 :], ids.new_zeros(head + 1)))]
        both = torch.cat((norm(further, w[f"{at}enorm.weight"]), norm(x, w[f"{at}hnorm.weight"])), dim=-1)
        x = layer(both @ w[f"{at}eh_proj.weight"].T, w, f"{at}transformer_layer.")
        x = norm(x, w[f"{at}final_layernorm.weight"])
        logits.append(x @ w["output_layer.weight"].T)
    return logits


@pytest.mark.parametrize("repeated", [False, True])
@torch.no_grad()
def test_heads_say_what_is_written_down_plainly(repeated: bool) -> None:
    model, ids = tiny(**{**HEADS, "mtp_num_layers": 3, "mtp_use_repeated_layer": repeated}).double(), tokens(2, 9)
    own = 1 if repeated else 3
    assert len(model.model.mtp.layers) == own
    found = model(ids, output_mtp_logits=True).mtp_logits
    for row in range(2):
        for head, expected in enumerate(plain_heads(dict(model.named_parameters()), ids[row], 3, own)):
            torch.testing.assert_close(found[head][row], expected, rtol=1e-4, atol=1e-5)  # cosines are of float32


@torch.no_grad()
def test_the_models_own_logits_know_nothing_of_heads() -> None:
    model, ids = tiny(**HEADS), tokens(2, 9)
    without = gpt.McoreGPTForCausalLM(tiny_config(**LLAMA)).eval()
    without.load_state_dict({name: x for name, x in model.state_dict().items() if ".mtp." not in name})
    assert torch.equal(model(ids, output_mtp_logits=True).logits, without(ids).logits)
    assert torch.equal(model.train()(ids, labels=ids).logits, without(ids).logits)


def means(labels: Tensor, *logits: Tensor) -> list[Tensor]:
    """The model's mean loss over what it foretells, then each head's over what it does, token by token."""
    parts = []
    for head, predicted in enumerate(logits):
        nats = [
            -predicted[row, place].log_softmax(-1)[labels[row, place + head + 1]]
            for row in range(len(labels))
            for place in range(labels.shape[1] - head - 1)
            if labels[row, place + head + 1] != -100
        ]
        parts.append(torch.stack(nats).mean())
    return parts


def test_the_loss_in_training_is_the_models_and_a_share_of_the_heads_mean() -> None:
    model, ids = tiny(**HEADS, mtp_loss_scaling_factor=0.3).train(), tokens(2, 9)
    labels = ids.clone()
    labels[0, :4], labels[1, 7:] = -100, -100
    out = model(ids, labels=labels, output_mtp_logits=True)
    language, *heads = means(labels, out.logits, *out.mtp_logits)
    torch.testing.assert_close(out.mtp_loss, torch.stack(heads))
    torch.testing.assert_close(out.loss, language + 0.3 * sum(heads) / 2)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, labels=labels, shift_labels=shifted).loss, out.loss)
    out.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_in_evaluation_heads_do_not_run_unless_asked() -> None:
    model, ids, ran = tiny(**HEADS), tokens(2, 9), []
    for head in model.model.mtp.layers:
        head.register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad():
        out = model(ids, labels=ids)
        model.generate(ids, max_new_tokens=3)
    assert ran == [] and not hasattr(out, "mtp_loss")
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    model.train().config.mtp_loss_scaling_factor = 0.0
    torch.testing.assert_close(model(ids, labels=ids).loss, out.loss)
    assert ran == []


def test_parts_of_a_step_add_up_to_the_step() -> None:
    model, ids = tiny(**HEADS).train(), tokens(4, 9)
    whole = model(ids, labels=ids).loss
    halves = [model(half, labels=half, num_items_in_batch=torch.tensor(32)).loss for half in ids.chunk(2)]
    torch.testing.assert_close(sum(halves), whole)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_says_nothing_and_learns_nothing(side: str) -> None:
    model, ids = tiny(**HEADS).train(), tokens(1, 7)
    alone = model(ids, labels=ids, output_mtp_logits=True)
    at = slice(4, None) if side == "left" else slice(0, 7)
    batch, mask = torch.zeros(1, 11, dtype=torch.long), torch.zeros(1, 11, dtype=torch.long)
    batch[:, at], mask[:, at] = ids, 1
    padded = model(batch, attention_mask=mask, labels=batch.masked_fill(mask == 0, -100), output_mtp_logits=True)
    torch.testing.assert_close(padded.mtp_loss, alone.mtp_loss)
    for head in range(2):
        found = padded.mtp_logits[head][:, at][:, : 6 - head]
        torch.testing.assert_close(found, alone.mtp_logits[head][:, : 6 - head])


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_packed_documents_are_each_alone(variant: str) -> None:
    model, ids = tiny(**VARIANTS[variant], mtp_num_layers=2).train(), tokens(1, 12)
    labels, positions = ids.clone(), torch.cat((torch.arange(5), torch.arange(7)))[None]
    labels[0, 5] = -100  # as transformers' collator marks a document's first token
    packed = model(ids, position_ids=positions, labels=labels, output_mtp_logits=True)
    parts = [model(part, labels=part, output_mtp_logits=True) for part in (ids[:, :5], ids[:, 5:])]
    for head in range(2):
        torch.testing.assert_close(packed.mtp_logits[head], torch.cat([part.mtp_logits[head] for part in parts], dim=1))
        counts = (5 - head - 2, 7 - head - 2)
        mean = sum(count * part.mtp_loss[head] for count, part in zip(counts, parts, strict=True)) / sum(counts)
        torch.testing.assert_close(packed.mtp_loss[head], mean)


def test_a_row_too_short_for_a_head_adds_nothing() -> None:
    model, ids = tiny(**HEADS).train(), tokens(1, 3)
    assert model(ids, labels=ids).mtp_loss[1] == 0
    model(tokens(1, 2), labels=tokens(1, 2)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_word_vectors_do_as_well_as_tokens() -> None:
    model, ids = tiny(**{**HEADS, "mup_embedding_mult": 2.0, "mup_output_mult": 0.5}), tokens(2, 9)
    found = model(inputs_embeds=model.get_input_embeddings()(ids), output_mtp_logits=True)
    torch.testing.assert_close(found.mtp_logits, model(ids, output_mtp_logits=True).mtp_logits)


def test_what_heads_cannot_do_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="no heads for further tokens, mtp_num_layers is None"):
        tiny(**LLAMA)(tokens(1, 4), output_mtp_logits=True)
    model = tiny(**HEADS)
    cache = model(tokens(1, 4)).past_key_values
    with pytest.raises(ValueError, match="past_key_values holds tokens already: leave it out, or train without"):
        model(tokens(1, 2), past_key_values=cache, output_mtp_logits=True)
    with pytest.raises(Exception, match="mtp_num_layers is 0: at least 1"):
        tiny_config(mtp_num_layers=0)
    with pytest.raises(Exception, match=r"mtp_loss_scaling_factor is -1\.0"):
        tiny_config(mtp_num_layers=1, mtp_loss_scaling_factor=-1.0)
    with pytest.raises(Exception, match=r"layers of 3 heads .* num_layers is 2"):
        tiny_config(**HEADS | {"mtp_num_layers": 3, "no_rope_freq": [0, 1]})


@pytest.mark.parametrize(
    "layers, skip, kinds",
    [(4, None, "ssss"), (4, 2, "sfsf"), (3, 2, "fsfs"), (5, 3, "fssf"), (4, [0, 1, 1, 0], "fssf")],
)
def test_a_heads_window_goes_by_megatrons_count(layers: int, skip: Any, kinds: str) -> None:
    """0.16.1: layer number + heads before, full where the frequency divides it; for lists its main: from the first."""
    config = tiny_config(**LLAMA, num_layers=layers, window_size=[3, 0], window_attn_skip_freq=skip)
    assert "".join(head_layer_type(config, head)[0] for head in range(len(kinds))) == kinds
    model = tiny(**HEADS, num_layers=layers, window_size=[3, 0], window_attn_skip_freq=skip)
    windows = [head.transformer_layer.self_attention.sliding_window for head in model.model.mtp.layers]
    assert windows == [4 if kind == "s" else None for kind in kinds[:2]]


def test_a_heads_layer_is_of_the_last_layers_kind() -> None:
    for frequency, is_moe in (([1, 0], False), ([0, 1], True)):
        model = gpt.McoreGPTForCausalLM(tiny_config(**HEADS, **MOE, moe_layer_freq=frequency))
        assert [head.transformer_layer.is_moe for head in model.model.mtp.layers] == [is_moe] * 2
    model = tiny(**{**HEADS, "no_rope_freq": [0, 1]})
    assert [head.transformer_layer.self_attention.rotary for head in model.model.mtp.layers] == [True, False]


def test_routers_of_heads_are_balanced_too() -> None:
    model, ids = tiny(**HEADS, **MOE).train(), tokens(2, 9)
    out = model(ids, labels=ids)
    balanced = gpt.McoreGPTModel.forward(model.model, ids).aux_loss
    assert out.aux_loss > balanced + 0.1
    language = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, language + 0.1 * out.mtp_loss.mean() + out.aux_loss)


@torch.no_grad()
def test_what_is_set_on_the_model_is_set_on_its_heads() -> None:
    model, ids = tiny(**{**VARIANTS["window and sinks"], "mtp_num_layers": 2}), tokens(2, 9)
    expected = model(ids, output_mtp_logits=True)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    assert twin.model.mtp.layers[1].transformer_layer.self_attention.config._attn_implementation == "eager"
    assert model.model.mtp.layers[1].transformer_layer.self_attention.config._attn_implementation == "sdpa"
    torch.testing.assert_close(twin(ids, output_mtp_logits=True).mtp_logits, expected.mtp_logits)
    out = twin.train()(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert (len(out.hidden_states), len(out.attentions)) == (3, 2), "the model's own layers alone"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("experts", [{}, MOE])
def test_gradients_are_the_same_with_checkpointing(experts: dict[str, Any], reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny(**HEADS, **experts).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("changes", [HEADS, {"mtp_num_layers": 1}, {**HEADS, **MOE, "mtp_use_repeated_layer": True}])
def test_heads_travel_with_the_model(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(**changes)
    model.save_pretrained(tmp_path / "first")
    kept = {name for name in names(tmp_path / "first") if name.startswith("mtp.")}
    own = 1 if changes.get("mtp_use_repeated_layer") else changes["mtp_num_layers"]
    assert {name.split(".")[2] for name in kept} == {str(head) for head in range(own)}
    assert {"mtp.layers.0.eh_proj.weight", "mtp.layers.0.transformer_layer.self_attention.linear_proj.weight"} <= kept
    out = load_fresh(tmp_path / "first", "AutoModelForCausalLM", tmp_path / "second")
    assert out["missing"] == out["unexpected"] == []
    assert digests(tmp_path / "first") == digests(tmp_path / "second")
    again = gpt.McoreGPTForCausalLM.from_pretrained(tmp_path / "second")
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.parametrize("auto", ["AutoModel", "AutoModelForSequenceClassification"])
def test_classes_without_a_use_for_heads_leave_them_out(auto: str, tmp_path: Path) -> None:
    tiny(**HEADS).save_pretrained(tmp_path / "causal")
    out = load_fresh(tmp_path / "causal", auto, tmp_path / "again")
    assert out["unexpected"] == ["output_layer.weight"]
    assert not {name for name in names(tmp_path / "again") if "mtp" in name}


def test_heads_can_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny(**HEADS)
    model.save_pretrained(tmp_path / "with")
    without, info = gpt.McoreGPTForCausalLM.from_pretrained(
        tmp_path / "with", mtp_num_layers=None, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not caplog.records
    assert without.model.mtp is None
    without.save_pretrained(tmp_path / "without")
    assert names(tmp_path / "without") == {name for name in names(tmp_path / "with") if not name.startswith("mtp.")}
    again, info = gpt.McoreGPTForCausalLM.from_pretrained(tmp_path / "without", output_loading_info=True)
    assert again.config.mtp_num_layers is None and not info["missing_keys"]
    with torch.no_grad():
        assert torch.equal(again(tokens(2, 9)).logits, model(tokens(2, 9)).logits)


def test_new_heads_can_be_begun_on_a_model_without(tmp_path: Path) -> None:
    tiny(**LLAMA).save_pretrained(tmp_path)
    model, info = gpt.McoreGPTForCausalLM.from_pretrained(tmp_path, mtp_num_layers=1, output_loading_info=True)
    assert info["missing_keys"] and all(name.startswith("model.mtp.layers.0.") for name in info["missing_keys"])
    layer = model.model.mtp.layers[0]
    assert 0.015 < layer.eh_proj.weight.std() < 0.025 and (layer.enorm.weight == 1).all()
    assert 0.007 < layer.transformer_layer.mlp.linear_fc2.weight.std() < 0.013, "narrower into the residual stream"
    model.train()(tokens(2, 9), labels=tokens(2, 9)).loss.backward()


@pytest.mark.parametrize("places", [{"model.mtp": "disk"}, {"model.mtp.layers.0": "disk", "model.mtp.layers.1": "cpu"}])
@torch.no_grad()
def test_heads_may_lie_on_the_disk(places: dict[str, str], tmp_path: Path) -> None:
    model, ids = tiny(**HEADS), tokens(2, 9)
    expected = model(ids, output_mtp_logits=True)
    model.save_pretrained(tmp_path / "model")
    places = {
        "model.embedding": "cpu",
        "model.rotary_pos_emb": "cpu",
        "model.decoder": "cpu",
        "output_layer": "cpu",
    } | places
    spread = gpt.McoreGPTForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    )
    assert {parameter.device.type for parameter in spread.model.mtp.layers[0].parameters()} == {"meta"}
    torch.testing.assert_close(spread(ids, output_mtp_logits=True).mtp_logits, expected.mtp_logits, rtol=0, atol=0)
    assert MultiTokenPredictionLayer.__name__ in model._no_split_modules


def test_training_compiles_without_a_break() -> None:
    model, ids, mask = tiny(**HEADS).train(), tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(ids, attention_mask=mask, labels=ids)
    found = compiled(ids, attention_mask=mask, labels=ids, use_cache=False)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.mtp_loss, expected.mtp_loss)


def test_parallel_plans_cut_heads_as_the_models_layers() -> None:
    plain, plan = tiny(**LLAMA).tp_plan, tiny(**HEADS).tp_plan
    layers = {name.split("layers.*.")[1]: style for name, style in plain.items() if "decoder.layers" in name}
    heads = {name.split("transformer_layer.")[1]: style for name, style in plan.items() if "mtp" in name}
    assert heads == layers and "self_attention.linear_qkv" in heads
    assert "model.mtp.layers.*" in tiny(**HEADS).fsdp_plan and not [name for name in plain if "mtp" in name]


def test_heads_learn() -> None:
    model, ids = randomise(gpt.McoreGPTForCausalLM(tiny_config(**HEADS))).train(), tokens(4, 12)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.mtp_loss.detach())
    assert (losses[-1] < 0.5 * losses[0]).all(), losses
