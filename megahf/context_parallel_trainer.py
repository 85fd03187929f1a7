"""transformers' Trainer with sequences shared out over processes: Mamba's states, windows and sinks too, and on CPUs.

Over how many, `cp_size` says; or, where accelerate's `ParallelismConfig(cp_size=...)` may be used (FSDP2, GPUs), that.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import Trainer

from .context_parallel_data import slices_of
from .errors import refuse
from .models.context_parallel import active, context_parallel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


class ContextParallelMixin:
    """To be put in front of `Trainer` or a kin of it; batches are whole, and each rank cuts its slices from them.

    Ranks that share a sequence are neighbours and get the same batches. Gradients are averaged over all ranks, as
    without context parallelism, by DDP or FSDP.

    Args:
        cp_size: over how many processes a sequence is shared out; they number a multiple of it.
        context: options of `context_parallel`: `attention`, `mamba`, `mean_of_ranks`.
        pad_token_id: pads batches to a multiple of twice the ranks; None: they must have such lengths.
    """

    def __init__(
        self,
        *args: Any,
        cp_size: int | None = None,
        context: dict[str, Any] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.cp_size, self.context, self.pad_token_id = cp_size, context or {}, pad_token_id
        super().__init__(*args, **kwargs)
        configured = super().get_cp_size()  # type: ignore[misc]
        if cp_size is not None and configured not in (1, cp_size):
            raise refuse(f"cp_size is {cp_size}, but parallelism_config.cp_size {configured}", "", "give one of them")
        if self.get_cp_size() == 1:
            return
        for name in ("compute_loss_func", "label_smoother", "compute_metrics"):
            if getattr(self, name):
                raise refuse(
                    f"{name} is for logits of whole sequences, of which a rank has its slices", "", "leave it out"
                )
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        if configured == 1:  # accelerate deals out batches by the mesh
            accelerator.state.device_mesh = mesh_of(accelerator.device.type, self.get_cp_size())
        accelerator._prepare_cp = lambda *prepared: prepared  # its own, which refuses windows and Mamba

    def get_cp_size(self) -> int:
        """Over how many processes a sequence is shared out."""
        return self.cp_size or super().get_cp_size()  # type: ignore[misc]

    def _prepare_context_parallel_inputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """This rank's slices, and the context to run them in; called by `training_step` and `prediction_step`."""
        if self.get_cp_size() == 1:
            return super()._prepare_context_parallel_inputs(model, inputs)  # type: ignore[misc]
        mesh = self.accelerator.torch_device_mesh["cp"]  # type: ignore[attr-defined]
        sliced = slices_of(inputs, mesh.size(), mesh.get_local_rank(), self.pad_token_id)
        return partial(context_parallel, mesh, gradients="averaged", **self.context), sliced

    def compute_loss(self, *args: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """As Trainer's, which takes the loss for this rank's part and adds the parts up: so a part of it."""
        loss, outputs = super().compute_loss(*args, return_outputs=True, **kwargs)  # type: ignore[misc]
        context = active()
        loss = loss if context is None else loss / context.size
        return (loss, outputs) if return_outputs else loss


class ContextParallelTrainer(ContextParallelMixin, Trainer):
    """`ContextParallelMixin` on transformers' Trainer."""


def mesh_of(device: str, cp_size: int) -> Any:
    """All processes as data-parallel groups of `cp_size` neighbours."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % cp_size:
        raise refuse(f"cp_size is {cp_size}, but there are {world} processes", "", "start a multiple of cp_size")
    return init_device_mesh(device, (world // cp_size, cp_size), mesh_dim_names=("dp_replicate", "cp"))
