"""Promise: a layer of experts computes what megatron-core's own does: output, gradients, auxiliary losses, in order.

One process with the real Megatron runs all cases; ours get its weights. In float32 they agree to rounding, in bfloat16
the sequence of experts (`eager`) bit by bit.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LLAMA, tiny_config
from torch import Tensor

from megahf.models.moe import MoELayer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed")

SCRIPT = Path(__file__).with_name("megatron_moe.py")
MOE: dict[str, Any] = {**LLAMA, "num_layers": 1, "num_experts": 8, "moe_ffn_hidden_size": 24}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_topk": 4}
BIASED = {**SIGMOID, "moe_router_enable_expert_bias": True}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4}
SWITCH = {"moe_router_topk": 1, "moe_router_pre_softmax": True}
DROPS = {"moe_expert_capacity_factor": 0.7}
NO_GATE = {"gated_linear_unit": False, "activation_func": "squared_relu"}
OSS = {"activation_func": "quick_gelu", "activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0}
BIASES = {"add_bias_linear": True, "moe_router_bias": True}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn"}
SHARED = {"moe_shared_expert_intermediate_size": 40}
ALL_LOSSES = {
    "moe_router_load_balancing_type": ["global_aux_loss", "aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.3, 0.1, 0.2],
    "moe_z_loss_coeff": 0.05,
}
CASES: dict[str, dict[str, Any]] = {
    "post-softmax": {},
    "pre-softmax": {"moe_router_pre_softmax": True},
    "pre-softmax, one expert a token": SWITCH,
    "scaled": {"moe_router_topk_scaling_factor": 2.5},
    "sigmoid": SIGMOID,
    "sigmoid, one expert a token": {**SIGMOID, "moe_router_topk": 1},
    "sigmoid with expert bias": BIASED,
    "groups": GROUPS,
    "groups, pre-softmax": {**GROUPS, "moe_router_pre_softmax": True},
    "groups, sigmoid with expert bias": {**BIASED, **GROUPS},
    "router in float32": {"moe_router_dtype": "fp32"},
    "router in float64": {"moe_router_dtype": "fp64", **BIASED},
    "biases": BIASES,
    "biases, probabilities on the input": {**BIASES, **SWITCH, "moe_apply_probs_on_input": True},
    "probabilities on the input": {**SWITCH, "moe_apply_probs_on_input": True},
    "no gate": NO_GATE,
    "gpt-oss": {**OSS, **BIASES},
    "shared experts": SHARED,
    "gated shared experts": {**SHARED, "moe_shared_expert_gate": True},
    "drops by probability": DROPS,
    "drops by position": {**DROPS, "moe_token_drop_policy": "position"},
    "drops, probabilities on the input": {**DROPS, **SWITCH, **BIASES, "moe_apply_probs_on_input": True},
    "capacity for all": {"moe_expert_capacity_factor": 6.0},
    "sinkhorn": SINKHORN,
    "sinkhorn, one expert a token": {**SINKHORN, "moe_router_topk": 1},
}
LOSSES: dict[str, dict[str, Any]] = {
    "aux_loss": {"moe_aux_loss_coeff": 0.1},
    "aux_loss, sigmoid": {**SIGMOID, "moe_aux_loss_coeff": 0.1},
    "aux_loss, drops": {**DROPS, "moe_aux_loss_coeff": 0.1},
    "seq_aux_loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    "global_aux_loss": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
    "z_loss": {"moe_z_loss_coeff": 0.1},
    "all": ALL_LOSSES,
    "all, sigmoid in groups": {**ALL_LOSSES, **SIGMOID, **GROUPS},
    "sinkhorn": SINKHORN,
}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (case, {}) for name, case in CASES.items()},
    **{f"bfloat16: {name}": (case, {"dtype": torch.bfloat16}) for name, case in CASES.items()},
    **{f"training: {name}": (case, {"training": True}) for name, case in LOSSES.items()},
    **{f"padded: {name}": (case, {"training": True, "padded": True}) for name, case in LOSSES.items()},
}
THEIR_NAMES = {"num_experts": "num_moe_experts"}
NOT_THEIRS = (*(set(LLAMA) - {"activation_func", "gated_linear_unit", "add_bias_linear"}), "moe_router_bias")
LOSS_NAMES = {  # on Megatron's tracker, and the coefficient that it is without
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "seq_aux_loss",
    "global_load_balancing_loss": "global_aux_loss",
    "z_loss": "z_loss",
}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("megatron_moe")
    cases = {}
    for name, (case, run) in RUNS.items():
        fields = {THEIR_NAMES.get(key, key): value for key, value in {**MOE, **case}.items() if key not in NOT_THEIRS}
        cases[name] = {**fields, "dtype": torch.float32, "training": False, "padded": False, **run}
    torch.save(cases, folder / "cases.pt")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


def ours(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or their gradients, by our names: one tensor for all experts."""
    named = {name: x for name, x in theirs.items() if ".local_experts." not in name and "_extra_state" not in name}
    for matrix, mine in (("linear_fc1", "gate_up_proj"), ("linear_fc2", "down_proj")):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            each = [theirs.get(f"experts.local_experts.{expert}.{matrix}.{kind}") for expert in range(8)]
            if each[0] is not None:
                named[f"experts.{mine}{suffix}"] = torch.stack(each)
    return named


def layer_of(name: str, run: dict[str, Any], implementation: str) -> MoELayer:
    config = tiny_config(**{**MOE, **RUNS[name][0]})
    config._experts_implementation = implementation
    layer = MoELayer(config).to(run["x"].dtype).train(RUNS[name][1].get("training", False))
    layer.load_state_dict(ours(run["weights"]))
    return layer


def close(got: Tensor, expected: Tensor, name: str, rtol: float = 1e-5) -> None:
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(got, expected, atol=rtol * scale, rtol=rtol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("implementation", ["megahf", "eager"])
@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("bfloat16")])
def test_outputs_losses_and_gradients_are_those_of_megatron(
    megatron: dict[str, Any], name: str, implementation: str
) -> None:
    run = megatron[name]
    layer = layer_of(name, run, implementation)
    x = run["x"].contiguous().requires_grad_()
    out = layer(x, None if run["padding"] is None else ~run["padding"])
    total = x.new_zeros(())
    if isinstance(out, tuple):
        out, statistics = out
        total = layer.router.auxiliary_loss(statistics)
    coefficients = layer.router.coefficients
    expected = sum(coefficients[LOSS_NAMES[key]] * value for key, value in run["losses"].items())
    assert set(coefficients) == {LOSS_NAMES[key] for key in run["losses"]}
    close(total.detach(), torch.as_tensor(expected, dtype=torch.float32), "loss")
    close(out, run["out"], "output")
    if not run["differentiable"]:
        return
    names, parameters = zip(*layer.named_parameters(), strict=True)
    objective = (out * run["upstream"]).sum() + total
    gradients = torch.autograd.grad(objective, (x, *parameters))
    close(gradients[0], run["x_grad"], "gradient of the input")
    theirs = ours(run["gradients"])
    for weight, gradient in zip(names, gradients[1:], strict=True):
        close(gradient, theirs[weight], weight)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("bfloat16")])
def test_in_bfloat16_the_sequence_of_experts_is_megatrons_to_the_last_bit(megatron: dict[str, Any], name: str) -> None:
    run = megatron[name]
    with torch.no_grad():
        out = layer_of(name, run, "eager")(run["x"].contiguous())
        at_once = layer_of(name, run, "megahf")(run["x"].contiguous())
    assert torch.equal(out, run["out"])
    close(at_once, run["out"], "all experts at once", rtol=2e-2)
