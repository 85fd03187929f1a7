"""One training step in real Megatron: its losses and the gradient of every weight, on one process.

`loss_func` and `forward_step_calc_loss` of Megatron, for one microbatch of one rank: the language loss is the mean over
the tokens that have a next one; losses of the routers and of the heads for further tokens join in the backward pass,
by Megatron's own autoscalers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megahf.judge.model import positions

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def step(model: GPTModel, input_ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses by name and gradients by the weights' names; the model must be whole (one process).

    Losses: `language`; of routers `load_balancing_loss`, `seq_load_balancing_loss`, `global_load_balancing_loss` and
    `z_loss`, sums over the layers, each with its coefficient; `mtp`, the heads' mean times its scale. `total` is their
    sum: what the gradients are of.
    """
    prepare(model)
    labels = input_ids.roll(-1, dims=1)  # [b, s]; the last one has no meaning and no weight
    mask = torch.ones_like(input_ids, dtype=torch.float32)
    mask[:, -1] = 0
    masked = {"loss_mask": mask} if model.config.mtp_num_layers else {}  # for those heads; hybrids have none
    losses = model(input_ids, positions(input_ids), None, labels=labels, **masked)  # [b, s]
    language = (losses * mask).sum() / mask.sum()
    language.backward()
    told = {"language": language.detach()} | router_losses(model) | mtp_loss(model)
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return told | {"total": torch.stack(list(told.values())).sum()}, gradients


def prepare(model: GPTModel) -> None:
    """Training mode, and nothing left of a step before."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    MTPLossAutoScaler.set_loss_scale(torch.ones(1))
    get_moe_layer_wise_logging_tracker().clear()
    MTPLossLoggingHelper.tracker.clear()
    model.train()


def router_losses(model: GPTModel) -> dict[str, Tensor]:
    """What the routers logged, which is without the coefficients, with them."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    config = model.config
    types, given = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    kinds, numbers = (types, given) if isinstance(types, list) else ([types], [given])
    coefficients = {kind.replace("aux_loss", "load_balancing_loss"): n for kind, n in zip(kinds, numbers, strict=True)}
    coefficients["z_loss"] = config.moe_z_loss_coeff
    tracker = get_moe_layer_wise_logging_tracker()
    return {name: logged["values"].sum() * coefficients[name] for name, logged in tracker.items()}


def mtp_loss(model: GPTModel) -> dict[str, Tensor]:
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    values = MTPLossLoggingHelper.tracker.get("values")
    return {} if values is None else {"mtp": values.mean() * model.config.mtp_loss_scaling_factor}
