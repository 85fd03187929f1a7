"""Promise: every way to run the experts gives the same outputs and gradients; auxiliary losses reach the gradient once.

What Megatron's own layer computes is held in test_moe_vs_megatron.py; here is what transformers adds to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import LLAMA, randomise, tiny, tiny_config, tokens
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from megahf.models import moe
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.moe import Experts, MoELayer

IMPLEMENTATIONS = ["megahf", "batched_mm", "grouped_mm"]  # beside eager, which they are held to
MOE: dict[str, Any] = {**LLAMA, "num_experts": 8, "moe_ffn_hidden_size": 24}
BIASES = {"add_bias_linear": True, "moe_router_bias": True}
NO_GATE = {"gated_linear_unit": False, "activation_func": "squared_relu"}
LAYERS: dict[str, dict[str, Any]] = {
    "gated": {},
    "gated with biases": BIASES,
    "without a gate": NO_GATE,
    "without a gate, with biases": {**NO_GATE, **BIASES},
    "clamped": {
        "activation_func": "quick_gelu",
        "activation_func_clamp_value": 0.5,
        "glu_linear_offset": 1.0,
        **BIASES,
    },
    "latent": {"moe_latent_size": 16, "moe_shared_expert_intermediate_size": 40},
    "latent with biases": {"moe_latent_size": 16, **BIASES},
    "probabilities on the input": {
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_apply_probs_on_input": True,
    },
    "tokens dropped": {"moe_expert_capacity_factor": 0.6, **BIASES},
}
LOSSES = {"moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.05}


def layer(implementation: str | None = None, **options: Any) -> MoELayer:
    config = tiny_config(**{**MOE, **options})
    config._experts_implementation = implementation
    return randomise(MoELayer(config)).eval()


def outcome(made: torch.nn.Module, hidden: Tensor, *rest: Tensor) -> list[Tensor]:
    """The output, and gradients of the input and of every parameter."""
    hidden = hidden.clone().requires_grad_()
    out = made(hidden, *rest)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, (hidden, *made.parameters()), upstream)]


def hidden_states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_implementation_agrees_with_the_sequence_of_experts(kind: str, implementation: str) -> None:
    hidden = hidden_states(2, 13, 32)
    got, expected = (outcome(layer(name, **LAYERS[kind]), hidden) for name in (implementation, "eager"))
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gated", "clamped", "tokens dropped"])
def test_experts_in_blocks_are_as_good_as_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = hidden_states(2, 13, 32)
    expected = outcome(layer("eager", **LAYERS[kind]), hidden)
    for numbers in (1, 48 * 9, 48 * 20):  # of an expert each; of some together
        monkeypatch.setattr(moe, "BLOCK", numbers)
        for mine, plain in zip(outcome(layer("megahf", **LAYERS[kind]), hidden), expected, strict=True):
            torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-5)


def test_widths_that_no_kernel_takes_are_as_good_as_others() -> None:
    hidden = hidden_states(2, 13, 32)
    got, expected = (outcome(layer(name, moe_ffn_hidden_size=7), hidden) for name in ("megahf", "eager"))
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", *IMPLEMENTATIONS])
def test_all_tokens_may_go_to_the_same_experts_and_none_to_others(implementation: str) -> None:
    made = layer(implementation, **BIASES)
    with torch.no_grad():
        made.router.bias[:] = torch.tensor([0, 0, 0, 50.0, 0, 60.0, 0, 0])
    out = outcome(made, hidden_states(2, 13, 32))
    expected = outcome(layer_with(made, "eager"), hidden_states(2, 13, 32))
    named = dict(zip(["out", "input", *(name for name, _ in made.named_parameters())], out, strict=True))
    for got, want in zip(out, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    for name in ("experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias", "experts.down_proj_bias"):
        busy = named[name].flatten(1).abs().amax(dim=1) > 0
        assert busy.tolist() == [expert in (3, 5) for expert in range(8)]


def layer_with(made: MoELayer, implementation: str) -> MoELayer:
    """The same weights, run another way."""
    config = made.experts.config
    config._experts_implementation = implementation
    other = MoELayer(config).eval()
    other.load_state_dict(made.state_dict())
    return other


def test_no_token_at_all_is_no_error() -> None:
    out = outcome(layer(**BIASES), torch.zeros(2, 0, 32))
    assert out[0].shape == (2, 0, 32)
    assert all(not gradient.any() for gradient in out[1:])


@pytest.mark.parametrize("implementation", ["eager", *IMPLEMENTATIONS])
@pytest.mark.parametrize("kind", ["gated", "gated with biases", "without a gate, with biases"])
def test_two_processes_with_half_the_experts_each_add_up_to_all(kind: str, implementation: str) -> None:
    """Numbers beyond a process's experts stand for another's, as transformers' expert parallelism hands them in."""
    whole = randomise(Experts(tiny_config(**{**MOE, **LAYERS[kind]})))
    whole.config._experts_implementation = "eager"
    hidden, weights = hidden_states(11, 32), torch.rand(11, 2)
    numbers = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(row))[:2] for row in range(11)])
    expected = outcome(whole, hidden, numbers, weights)
    sums = [torch.zeros_like(x) for x in expected]
    whole.config._experts_implementation = implementation
    for process in range(2):
        mine = slice(4 * process, 4 * process + 4)
        half = Experts(whole.config)
        for name, parameter in whole.named_parameters():
            setattr(half, name, torch.nn.Parameter(parameter[mine].detach().clone()))
        half.num_experts, half._is_expert_parallel = 4, True
        held = numbers // 4 == process
        out, input_grad, *rest = outcome(half, hidden, torch.where(held, numbers % 4, 4), weights * held)
        for total, part in zip(sums[:2], (out, input_grad), strict=True):
            total += part
        for total, part in zip(sums[2:], rest, strict=True):
            total[mine] = part
    for got, want in zip(sums, expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gated", "clamped", "latent", "tokens dropped"])
@pytest.mark.parametrize("training", [False, True])
def test_a_compiled_graph_holds_the_whole_layer(kind: str, training: bool) -> None:
    made = layer(**LAYERS[kind], **LOSSES).train(training)
    hidden = hidden_states(2, 6, 32)

    def run(function: Any) -> list[Tensor]:
        out = function(hidden)
        parts = out if isinstance(out, tuple) else (out,)
        return [*parts, *torch.autograd.grad(sum(part.square().sum() for part in parts), made.parameters())]

    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(made), strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_the_default_runs_all_experts_at_once_and_any_other_can_be_asked_for(tmp_path: Path) -> None:
    model = tiny(**MOE)
    assert model.config._experts_implementation == "megahf"
    model.save_pretrained(tmp_path)
    assert McoreGPTForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "megahf"
    again = McoreGPTForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert again.config._experts_implementation == "batched_mm"
    again.set_experts_implementation("eager")
    assert again.model.decoder.layers[0].mlp.experts.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match="fastest"):
        again.set_experts_implementation("fastest")


def test_experts_are_one_tensor_a_matrix_on_disk_by_megatrons_names(tmp_path: Path) -> None:
    options = {"num_layers": 1, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    model = tiny(**{**MOE, **options, **BIASES, "normalization": "RMSNorm", "moe_shared_expert_intermediate_size": 40})
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys() if "mlp" in name}  # noqa: SIM118
    prefix = "decoder.layers.0."
    assert shapes == {
        f"{prefix}pre_mlp_layernorm.weight": (32,),
        f"{prefix}mlp.router.weight": (8, 32),
        f"{prefix}mlp.router.bias": (8,),
        f"{prefix}mlp.router.expert_bias": (8,),
        f"{prefix}mlp.experts.linear_fc1.weight": (8, 48, 32),
        f"{prefix}mlp.experts.linear_fc1.bias": (8, 48),
        f"{prefix}mlp.experts.linear_fc2.weight": (8, 32, 24),
        f"{prefix}mlp.experts.linear_fc2.bias": (8, 32),
        f"{prefix}mlp.shared_experts.linear_fc1.weight": (80, 32),
        f"{prefix}mlp.shared_experts.linear_fc2.weight": (32, 40),
    }
    again = McoreGPTForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def test_weights_start_as_megatron_starts_them() -> None:
    options = {"num_layers": 2, "hidden_size": 128, "init_method_std": 0.1, "moe_shared_expert_gate": True}
    shared = {"moe_shared_expert_intermediate_size": 512, "moe_latent_size": 64}
    config = tiny_config(**{**MOE, **options, **BIASES, **shared, "moe_ffn_hidden_size": 128})
    mlp = McoreGPTForCausalLM(config).model.decoder.layers[0].mlp
    wide = (mlp.router.weight, mlp.experts.gate_up_proj, mlp.fc1_latent_proj.weight, mlp.shared_experts.gate_weight)
    for weight in (*wide, mlp.shared_experts.linear_fc1.weight):
        assert weight.std().item() == pytest.approx(0.1, rel=0.25)
    for weight in (mlp.experts.down_proj, mlp.fc2_latent_proj.weight, mlp.shared_experts.linear_fc2.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.1)
    assert not mlp.experts.gate_up_proj_bias.any()
    assert not mlp.experts.down_proj_bias.any()
    assert mlp.router.bias.std() > 0.01


def test_padding_leaves_the_tokens_of_other_rows_alone() -> None:
    model, ids = tiny(**MOE), tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, :5] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(together[0], model(ids[:1]).logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together[1, :7], model(ids[1:2, :7]).logits[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(together[2, 5:], model(ids[2:, 5:]).logits[0], atol=2e-5, rtol=1e-4)


def test_a_mixture_returns_what_transformers_mixtures_do_and_a_dense_model_what_it_did() -> None:
    ids = tokens(2, 6)
    mixture, dense = tiny(**MOE, **LOSSES), tiny(**LLAMA)
    assert type(mixture(ids)) is MoeCausalLMOutputWithPast
    assert isinstance(mixture.model(ids), MoeModelOutputWithPast)
    assert type(dense(ids)) is CausalLMOutputWithPast


def losses_of(model: McoreGPTForCausalLM, ids: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out = model(ids, labels=ids, **options)
    assert out.aux_loss is not None
    return out.loss, out.aux_loss


def test_auxiliary_losses_are_part_of_the_loss_in_training_alone() -> None:
    model, ids = tiny(**MOE, **LOSSES), tokens(2, 12)
    evaluated = model(ids, labels=ids)
    assert evaluated.aux_loss is None
    loss, aux_loss = losses_of(model.train(), ids)
    assert aux_loss > 0
    torch.testing.assert_close(loss, evaluated.loss + aux_loss)
    assert tiny(**MOE).train()(ids, labels=ids).aux_loss is None


def test_tokens_that_pad_are_not_counted() -> None:
    model, ids = tiny(**MOE, **LOSSES).train(), tokens(1, 12)
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, 8:] = 0
    torch.testing.assert_close(losses_of(model, ids, attention_mask=mask)[1], losses_of(model, ids[:, :8])[1])


def gradients(model: McoreGPTForCausalLM) -> dict[str, Tensor]:
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "global_aux_loss"])
def test_gradient_checkpointing_changes_nothing(kind: str, reentrant: bool) -> None:
    model, ids = tiny(**MOE, **LOSSES, moe_router_load_balancing_type=kind).train(), tokens(2, 12)
    loss, _ = losses_of(model, ids)
    loss.backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again, _ = losses_of(model, ids, use_cache=False)
    again.backward()
    assert torch.equal(again, loss)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_a_step_in_parts_is_the_mean_of_its_parts() -> None:
    """Trainer divides by the tokens of all parts, which it tells the model; the auxiliary losses count by theirs."""
    model, parts = tiny(**MOE, **LOSSES).train(), [tokens(2, 12, seed=1), tokens(2, 12, seed=2)]
    for part in parts:
        (losses_of(model, part)[0] / 2).backward()
    expected = gradients(model)
    for part in parts:
        losses_of(model, part, num_items_in_batch=2 * 2 * 11)[0].backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_the_global_loss_counts_on_until_the_optimizer_steps() -> None:
    made = layer(
        moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=1.0, num_experts=2, moe_router_topk=1
    )
    router = made.router
    statistics = [torch.tensor([[2.0, 2.0, *chosen, 0.0]]) for chosen in ((4.0, 0.0), (0.0, 4.0), (4.0, 0.0))]
    alone = [router.auxiliary_loss(x).item() for x in statistics]  # no gradient yet: each begins a step
    assert alone == [1.0, 1.0, 1.0]
    unequal = torch.tensor([[3.0, 1.0, 4.0, 0.0, 0.0]])
    assert router.auxiliary_loss(unequal).item() == pytest.approx(1.5)
    router.weight.grad = torch.zeros_like(router.weight)  # the second part of a step, now evenly chosen on the whole
    assert router.auxiliary_loss(torch.tensor([[3.0, 1.0, 0.0, 4.0, 0.0]])).item() == pytest.approx(1.0)
