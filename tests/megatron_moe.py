"""Runs Megatron-core's own MoE layer in a process of its own: `python megatron_moe.py CASES RESULTS`.

CASES is a torch file: for each name the fields of a configuration that differ from BASE, by Megatron's names, and
`dtype`, `training`, `padded`. RESULTS holds for each name weights, input, padding, output, gradients and losses.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megahf.judge import cpu

LENGTH, ROWS = 7, 3
BASE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 24,
    "add_bias_linear": False,
    "gated_linear_unit": True,
    "bias_activation_fusion": False,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_topk": 2,
    "use_cpu_initialization": True,
}


def build(options: dict[str, Any], dtype: torch.dtype) -> Any:
    """Megatron's layer with random weights; imported here, once the process is patched."""
    from megatron.core import activations
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {"silu": F.silu, "quick_gelu": activations.quick_gelu, "squared_relu": activations.squared_relu}
    options["activation_func"] = known[options["activation_func"]]
    config = TransformerConfig(**{**BASE, **options, "params_dtype": dtype})
    spec = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts, moe_grouped_gemm=False)
    layer = build_module(spec, config=config, layer_number=1).to(dtype)
    layer.set_layer_number(1)
    return layer


def run(options: dict[str, Any]) -> dict[str, Any]:
    from megatron.core.transformer.moe import moe_utils

    dtype, training, padded = options.pop("dtype"), options.pop("training"), options.pop("padded")
    layer = build(options, dtype).train(training)
    config = layer.config
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.copy_(torch.randn(config.num_moe_experts, generator=generator))
    x = torch.randn(LENGTH, ROWS, config.hidden_size, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    padding = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4], [2]]) if padded else None  # [b, s], True: padding
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    differentiable = not config.add_bias_linear  # it adds the bias in place, which autograd refuses on one process
    with torch.set_grad_enabled(differentiable):
        out, _ = layer(x, padding_mask=padding)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    wanted = (x, *parameters)
    gradients = torch.autograd.grad(out, wanted, upstream, allow_unused=True) if differentiable else [x] * len(wanted)
    tracked = moe_utils.get_moe_layer_wise_logging_tracker()
    return {
        "weights": dict(layer.state_dict()),
        "x": x.detach().transpose(0, 1),
        "upstream": upstream.transpose(0, 1),
        "padding": padding,
        "out": out.detach().transpose(0, 1),
        "differentiable": differentiable,
        "x_grad": gradients[0].transpose(0, 1),
        "gradients": dict(zip(names, gradients[1:], strict=True)),
        "losses": {name: entry["values"].sum() for name, entry in tracked.items()},
    }


if __name__ == "__main__":
    cpu.patch()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    torch.manual_seed(1234)
    torch.save({name: run(case) for name, case in torch.load(sys.argv[1], weights_only=False).items()}, sys.argv[2])
