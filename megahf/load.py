"""`from_megatron`: a Megatron checkpoint straight into a model's parameters, with no whole copy on the way."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import dtypes
from .architectures import fields, load_class, model_type
from .errors import refuse
from .execute import BUFFER, Checks, Ledger, run, settle
from .export import plan_for
from .llava import refuse_untold
from .plan import Copy, Plan
from .weights import weights
from .writing import Progress

IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # chosen when a model is made, not in its config
DeviceMap = str | int | torch.device | Mapping[str, Any] | None


def from_megatron(
    checkpoint: str | Path,
    model_class: type[PreTrainedModel] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: DeviceMap = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    true_vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    checksums: bool = True,
    progress: Progress = lambda size: None,
    **config: Any,
) -> Any:
    """The model that the Megatron checkpoint at `checkpoint` holds, in evaluation mode.

    Args:
        model_class: what to build, the one that holds every weight by default; a base model without its head leaves the
            head's weights out.
        dtype: of the parameters: a torch dtype or `bf16`, `fp16`, `fp32`; as stored by default.
        device_map: `"cpu"` (default), `"cuda"` or another device, `"auto"` or a map for accelerate, `"meta"` to look.
        true_vocab_size, tokenizer, strict, checksums, progress: as for `megahf.convert`.
        config: fields of the config to set, such as `attn_implementation` or `bos_token_id`.

    Raises:
        Refused: with every reason found.
    """
    plan = plan_for(checkpoint, dtype_name(dtype), true_vocab_size, tokenizer, strict)
    stored = dtypes.TORCH_NAME[plan.dtype]
    chosen = {name: config.pop(name) for name in IMPLEMENTATIONS if name in config}
    refuse_untold(plan.config, plan.checkpoint.args)
    settings = load_class(plan.config, "AutoConfig")(**{**fields(plan.config), "dtype": stored, **config})
    with torch.device("meta"):
        model = fitting(model_class, plan)._from_config(settings, dtype=getattr(torch, stored), **chosen)
    if device_map == "meta":
        return model.eval()
    devices = place(model, device_map, max_memory)
    fill(model, plan, devices, Checks(checksums), progress)
    return dispatch(model.eval(), devices)


def fitting(asked: type[PreTrainedModel] | None, plan: Plan) -> type[PreTrainedModel]:
    """The class to build; refuses one of another kind of model."""
    main: type[PreTrainedModel] = load_class(plan.config)
    kind = asked.config_class.model_type if asked and asked.config_class else None
    if asked and kind != model_type(plan.config):
        raise refuse(
            f"the checkpoint holds a {main.__name__}, not a {asked.__name__}",
            plan.checkpoint.path,
            f"use {main.__name__}.from_megatron, or megahf.from_megatron, which picks the class",
        )
    return asked or main


def dtype_name(dtype: torch.dtype | str | None) -> str | None:
    return str(dtype).removeprefix("torch.") if dtype is not None else None


def place(
    model: PreTrainedModel, device_map: DeviceMap, max_memory: Mapping[int | str, int | str] | None
) -> dict[str, Any]:
    """Module name -> device, as accelerate has it; the whole model under the empty name."""
    if isinstance(device_map, Mapping):
        devices = dict(device_map)
    elif device_map in ("auto", "balanced", "sequential"):
        from accelerate import infer_auto_device_map

        devices = dict(
            infer_auto_device_map(
                model,
                max_memory=dict(max_memory) if max_memory else None,
                no_split_module_classes=list(model._no_split_modules or ()),
            )
        )
    else:
        devices = {"": torch.device(device_map if device_map is not None else "cpu")}
    if "disk" in devices.values():
        raise refuse(
            "the model does not fit into the memory of this machine",
            f"device_map={device_map!r}",
            "run `megahf convert`, then from_pretrained with device_map='auto' and an offload_folder",
        )
    return devices


def fill(model: PreTrainedModel, plan: Plan, devices: Mapping[str, Any], checks: Checks, progress: Progress) -> None:
    """Gives every weight memory on its device and runs the plan into it; computes what is not stored."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
    stored = {copy.runtime: copy for copy in plan.copies}
    parameters: dict[str, Tensor] = {}
    for name, weight in saved(model):
        if name in tied:
            continue
        if (copy := stored.get(prefix + name)) is None:
            remedy = "run `megahf convert`, then from_pretrained, which initialises what is new"
            raise refuse("the model class has weights that the checkpoint has not", name, remedy)
        dtype = getattr(torch, dtypes.TORCH_NAME[copy.dtype])
        memory = torch.empty(copy.shape, dtype=dtype, device=device_of(name, devices))
        replace(model, name, memory, weight)
        parameters[prefix + name] = memory
    copies = [copy for copy in plan.copies if copy.runtime in parameters]
    ledger = Ledger()
    run(copies, plan.checkpoint.files, sink(parameters), checks, ledger, progress)
    if checks.checksums:
        settle(plan.checkpoint.files, copies, ledger)
    place_buffers(model, devices)
    model.tie_weights()


def saved(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters, and the buffers that are saved with them: the bias that balances experts."""
    state = model.state_dict()
    return [*model.named_parameters(), *((name, value) for name, value in model.named_buffers() if name in state)]


def sink(parameters: Mapping[str, Tensor]) -> Any:
    """Writes into parameters; by way of pinned memory where they are on a GPU."""
    local = threading.local()

    def write(copy: Copy, offset: int, data: np.ndarray) -> None:
        memory = parameters[copy.runtime]
        target = memory.detach().view(-1).view(torch.uint8)[offset : offset + data.nbytes]
        source = torch.from_numpy(data)
        if memory.is_cuda:
            if getattr(local, "pinned", None) is None or local.pinned.numel() < data.nbytes:
                local.pinned = torch.empty(max(BUFFER, data.nbytes), dtype=torch.uint8, pin_memory=True)
            source = local.pinned[: data.nbytes].copy_(source)
            target.copy_(source, non_blocking=True)
            torch.cuda.current_stream(memory.device).synchronize()
        else:
            target.copy_(source)

    return write


def device_of(name: str, devices: Mapping[str, Any]) -> Any:
    """The device of the longest module name in the map that `name` is under."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        if (module := ".".join(parts[:length])) in devices:
            return devices[module]
    raise refuse("the device map has no place for a weight", name, "add it, or give device_map='auto'")


def replace(model: nn.Module, name: str, memory: Tensor, weight: Tensor) -> None:
    """Puts `memory` in the place of the parameter or buffer `weight`."""
    module, _, leaf = name.rpartition(".")
    parameter = isinstance(weight, nn.Parameter)
    value = nn.Parameter(memory, requires_grad=weight.requires_grad) if parameter else memory
    setattr(model.get_submodule(module), leaf, value)


def place_buffers(model: PreTrainedModel, devices: Mapping[str, Any]) -> None:
    """Other buffers are computed from the config when a module is made; they only move."""
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device_of(f"{name}.{key}", devices))


def dispatch(model: PreTrainedModel, devices: Mapping[str, Any]) -> PreTrainedModel:
    if len(set(map(str, devices.values()))) == 1:
        return model
    from accelerate import dispatch_model

    dispatched: PreTrainedModel = dispatch_model(model, device_map=dict(devices))
    return dispatched


def canonical_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights under their canonical names, as they go to disk."""
    state = model.state_dict()
    prefix = "model." if hasattr(model, model.base_model_prefix) else ""
    named = {}
    for weight in weights(model.config):
        runtime = weight.parameter
        key = next(key for key in (prefix + runtime, runtime) if key in state)
        named[weight.name] = state[key]
    return named
