"""What a worker can be asked to do; every function runs on all ranks of the case's process group.

A case is a dict of Megatron arguments: the model, its layout, its dtype and layer implementation are all in there.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megahf.judge import cpu, model, transformer_engine
from megahf.judge.load import LOADERS, load_dist, put, save_weights
from megahf.judge.namespace import namespace, plain
from megahf.judge.save import save as write

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

TOLERANCE = 1e-5  # of the largest logit: fp32 sums in another order; a misplaced row of a weight is off by far more


def prepare(arguments: Mapping[str, Any]) -> tuple[Namespace, list[GPTModel]]:
    """This rank's part of the model that `arguments` describe."""
    args = namespace(arguments)
    os.environ["NVTE_APPLY_QK_LAYER_SCALING"] = str(int(args.apply_query_key_layer_scaling))  # how TE is told of it
    cpu.start(
        args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.virtual_pipeline_model_parallel_size
    )
    return args, model.chunks(args)


def positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1]).expand_as(input_ids).contiguous()


def reference(arguments: Mapping[str, Any], out: Path, weights: Path | None, seed: int, shape: tuple[int, int]) -> None:
    """One process: tokens, fp32 logits and TP1 state dict as `out/reference.pt`, and `out/weights` to shard from.

    Args:
        weights: a file with a whole state dict in this model's names; None draws every parameter at random.
        shape: batch and length of the tokens.
    """
    args, (whole,) = prepare(arguments)
    if weights is None:
        draw(whole, seed)
    else:
        put(whole, torch.load(weights, weights_only=True, mmap=True))
    for parameter in whole.parameters():  # what a sixteen-bit file holds exactly
        parameter.data.copy_(parameter.data.to(args.params_dtype))
    generator = torch.Generator().manual_seed(seed + 1)
    input_ids = torch.randint(0, args.vocab_size, shape, generator=generator)  # [b, s]
    out.mkdir(parents=True)
    save_weights([whole], out / "weights")
    told = {
        "input_ids": input_ids,
        "position_ids": positions(input_ids),
        "logits": model.logits(args, [whole], input_ids, positions(input_ids)),
        "args": plain(args),
    }
    if weights is None:
        told["state_dict"] = {key: value for key, value in whole.state_dict().items() if is_weight(key, value)}
    torch.save(told, out / "reference.pt")


def draw(whole: GPTModel, seed: int) -> None:
    """Random values for every parameter, none of them one under which a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in whole.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:  # norms around their one (or zero), biases and sinks around zero
            around = 0.0 if parameter.data.max() == 0 else 1.0
            value = around + 0.2 * value
        else:
            value *= 0.1 if "embedding" in name or "output_layer" in name else 1.2 / parameter.shape[1] ** 0.5
        parameter.data.copy_(value)


def is_weight(key: str, value: object) -> bool:
    return torch.is_tensor(value) and not key.endswith("_extra_state")


def save(arguments: Mapping[str, Any], source: Path, out: Path, format: str, extra_state: str) -> float | None:
    """Megatron shards `source/weights` to the case's layout, must give the logits of the reference, and saves to `out`.

    Returns:
        The largest difference of the logits to the single process, on ranks of the last stage; None elsewhere.
    """
    from megatron.core import parallel_state

    transformer_engine.extra_state = extra_state
    args, models = prepare(arguments)
    load_dist(args, models, source / "weights")
    known = torch.load(source / "reference.pt", weights_only=True, mmap=True)
    found = model.logits(args, models, known["input_ids"], known["position_ids"])
    difference = None if found is None else (found - known["logits"]).abs().max().item()
    if difference is not None and not difference <= TOLERANCE * max(10.0, known["logits"].abs().max().item()):
        raise ArithmeticError(f"logits of the sharded model are {difference:.2e} off those of one process")
    for chunk in models:
        chunk.to(args.params_dtype)
    write(args, models, out, format)
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    if difference is not None and ranks == (0, 0):
        torch.save(known | {"args": plain(args), "difference": difference}, out / "reference.pt")
    return difference


def logits(arguments: Mapping[str, Any], checkpoint: Path, format: str, input_ids: np.ndarray) -> np.ndarray | None:
    """fp32 logits `[b, s, padded vocabulary]` of a checkpoint that Megatron opens; None but on the last stage."""
    args, models = prepare(arguments)
    LOADERS[format](args, models, checkpoint)
    tokens = torch.from_numpy(input_ids)
    found = model.logits(args, models, tokens, positions(tokens))
    return None if found is None else found.numpy()  # a pipe takes arrays whole, tensors by shared memory


TASKS: dict[str, Callable[..., Any]] = {"reference": reference, "save": save, "logits": logits}
