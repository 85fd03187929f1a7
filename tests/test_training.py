"""Promise: the model trains as transformers' models do: Trainer, accumulated losses, checkpointing, right gradients.

The oracle of gradients is transformers' own Llama on the same weights, packed into Megatron's layout by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_model_vs_transformers import HF_LLAMA, pack_llama
from tiny import LLAMA, MIXTURES, VARIANTS, randomise, tiny, tiny_hybrid, tokens
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import megahf

megahf.register()

Rows = list[dict[str, list[int]]]


def rows(lengths: list[int]) -> Rows:
    """Rows of random tokens padded to the longest; padding counts in no loss."""
    whole, longest = tokens(len(lengths), max(lengths)), max(lengths)
    return [
        {
            "input_ids": [*row[:length], *[0] * (longest - length)],
            "attention_mask": [1] * length + [0] * (longest - length),
            "labels": [*row[:length], *[-100] * (longest - length)],
        }
        for row, length in zip(whole.tolist(), lengths, strict=True)
    ]


def trainer(model: PreTrainedModel, data: Rows, folder: Path, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return Trainer(model, arguments, train_dataset=data)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("mixed", [False, True], ids=["bfloat16 weights", "float32 weights, bfloat16 autocast"])
def test_trainer_fine_tunes_a_saved_folder(mixed: bool, tmp_path: Path) -> None:
    tiny(**LLAMA).save_pretrained(tmp_path / "start")
    dtype = torch.float32 if mixed else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start", dtype=dtype)
    run = trainer(model, rows([12] * 8), tmp_path / "run", max_steps=20, bf16=mixed)
    run.train()
    logged = losses(run)
    assert len(logged) == 20
    assert sum(logged[-4:]) < 0.7 * sum(logged[:4]), logged
    run.save_model(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert again.dtype == dtype
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


RESUMED = {"llama": LLAMA, "experts": MIXTURES["experts"], "latents and experts": MIXTURES["latents and experts"]}


@pytest.mark.parametrize("variant", RESUMED)
def test_a_run_that_stops_goes_on_as_if_it_had_not(variant: str, tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 1}
    whole = trainer(tiny(**RESUMED[variant]), rows([12] * 8), tmp_path, **options)
    whole.train()
    resumed = trainer(tiny(**RESUMED[variant]), rows([12] * 8), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trainer_balances_experts(tmp_path: Path) -> None:
    options = {**MIXTURES["experts"], "moe_layer_freq": 1, "moe_router_load_balancing_type": "aux_loss"}
    auxiliary = []
    for coefficient in (0.0, 1.0):
        model = tiny(**{**options, "moe_aux_loss_coeff": coefficient, "moe_z_loss_coeff": None})
        trainer(model, rows([12] * 8), tmp_path, max_steps=8).train()
        for layer in model.model.decoder.layers:  # a measure of balance for both
            layer.mlp.router.coefficients = {"aux_loss": 1.0}
        ids = tokens(8, 12)
        auxiliary.append(model.train()(ids, labels=ids).aux_loss.item())
    assert auxiliary[1] < auxiliary[0] - 0.01, auxiliary  # 2 layers of experts: 2 is perfect balance


def test_accumulated_batches_of_unequal_length_train_as_one_batch(tmp_path: Path) -> None:
    data, tuned, logged = rows([3, 12, 7, 10]), [], []
    for batch, steps in ((4, 1), (1, 4)):
        set_seed(0)
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "optim": "sgd"}
        run = trainer(tiny(**LLAMA), data, tmp_path, max_steps=2, **options, learning_rate=0.1)
        run.train()
        tuned.append(dict(run.model.named_parameters()))
        logged.append(losses(run))
    torch.testing.assert_close(logged[0], logged[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tuned[0], tuned[1], rtol=1e-4, atol=1e-6)
    start = dict(tiny(**LLAMA).named_parameters())
    assert any((start[name] - parameter).abs().max() > 1e-3 for name, parameter in tuned[0].items())


def test_gradients_equal_those_of_llama() -> None:
    hf = randomise(LlamaForCausalLM(LlamaConfig(**HF_LLAMA, rms_norm_eps=1e-5))).train()
    ours = tiny(**LLAMA).train()
    head = {"output_layer.weight": hf.lm_head.weight.detach()}
    packed = {f"model.{name}": weight for name, weight in pack_llama(hf.state_dict()).items()}
    ours.load_state_dict({**packed, **head})

    ids, labels = tokens(3, 11), tokens(3, 11, seed=2)
    mask = torch.ones_like(ids)
    mask[0, :4], labels[0, :5] = 0, -100  # the first token is foretold by padding, of which models make what they like
    for model in (hf, ours):
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = pack_llama({name: parameter.grad for name, parameter in hf.named_parameters()})
    expected = {f"model.{name}": gradient for name, gradient in expected.items()}
    expected["output_layer.weight"] = hf.lm_head.weight.grad
    found = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert all(gradient.abs().max() > 1e-4 for gradient in found.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


CHECKPOINTED = {
    **{name: VARIANTS[name] for name in ("gpt2", "llama", "window and sinks", "gate and norms")},
    **MIXTURES,
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", [*CHECKPOINTED, "hybrid"])
def test_gradients_are_the_same_with_checkpointing_and_padding(variant: str, reentrant: bool) -> None:
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = (tiny_hybrid("everything") if variant == "hybrid" else tiny(**CHECKPOINTED[variant])).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_dropout_draws_anew_each_time_and_only_in_training() -> None:
    model, ids = tiny(attention_dropout=0.3, hidden_dropout=0.3), tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.allclose(model(ids).logits, model(ids).logits)
