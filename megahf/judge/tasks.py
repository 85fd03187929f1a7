"""What a worker can be asked to do; every function runs on all ranks of the case's process group.

A case is a dict of Megatron arguments: the model, its layout, its dtype and layer implementation are all in there.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from megahf.judge import bert, cpu, hybrid, llava, model, training, transformer_engine
from megahf.judge.load import LOADERS, load_weights, put, save_weights
from megahf.judge.multimodal import is_llava
from megahf.judge.namespace import namespace, plain
from megahf.judge.save import save as write

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

TOLERANCE = 1e-5  # of the largest logit: fp32 sums in another order; a misplaced row of a weight is off by far more

# Standard deviations. The logits are small enough for the last bits of fp32, which layers amplify, to stay below 1e-5.
NARROW = {"embedding": 0.1, "output_layer": 0.05}


def prepare(arguments: Mapping[str, Any]) -> tuple[Namespace, list[GPTModel]]:
    """This rank's part of the model that `arguments` describe."""
    args = namespace(arguments)
    os.environ["NVTE_APPLY_QK_LAYER_SCALING"] = str(int(args.apply_query_key_layer_scaling))  # how TE is told of it
    cpu.start(args)
    return args, model.chunks(args)


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
    input_ids = draw_tokens(args, shape, generator)
    out.mkdir(parents=True)
    save_weights([whole], out / "weights")
    told = known(args, whole, input_ids) | {
        "position_ids": model.positions(input_ids),
        "prompts": {name: known(args, whole, **prompt) for name, prompt in prompts(args, generator).items()},
        "args": plain(args),
    }
    if weights is None:
        told["state_dict"] = {key: value for key, value in whole.state_dict().items() if is_weight(key, value)}
    torch.save(told, out / "reference.pt")


def draw_tokens(args: Namespace, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Random tokens `[b, s]`; for BERT pairs of sentences, some of them padded; for LLaVA with images among them."""
    if bert.is_bert(args):
        return bert.tokens(args.vocab_size, shape, generator)
    if is_llava(args):
        return llava.tokens(args, generator, llava.mixed(args))
    return torch.randint(0, args.vocab_size, shape, generator=generator)


def known(args: Namespace, whole: GPTModel, input_ids: Tensor, **more: Tensor) -> dict[str, Tensor]:
    """Tokens `[b, s]` with one process's logits `[b, s, v]` and those of its heads `[d, b, s, v]`."""
    heads = cast("Tensor", model.logits(args, [whole], input_ids))  # the one stage is the last
    told = {"input_ids": input_ids, "logits": heads[0].contiguous()}
    return told | ({"mtp_logits": heads[1:].contiguous()} if len(heads) > 1 else {}) | more


def prompts(args: Namespace, generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """More tokens for models with experts, latent attention or heads for further tokens.

    `repeated`: one token all along, which sends all of them to the same experts in each layer where no position is in
    the embedding. `padded`: sequences of three lengths with padding at the right, which Megatron takes for tokens.
    For LLaVA: images otherwise among the tokens, and none.
    """
    if is_llava(args):
        return llava.prompts(args, generator)
    if not (args.num_experts or args.multi_latent_attention or args.mtp_num_layers):
        return {}
    length = args.seq_length
    told = {"repeated": {"input_ids": torch.tensor([5, 50])[:, None].repeat(1, length)}}
    if args.moe_expert_capacity_factor and args.moe_token_drop_policy == "probs":
        del told["repeated"]  # equal tokens are equally probable: which of them go is not defined
    mask = torch.arange(length) < torch.tensor([length, length // 2, 3])[:, None]  # [3, s]
    input_ids = torch.randint(0, args.vocab_size, mask.shape, generator=generator) * mask
    return told | {"padded": {"input_ids": input_ids, "attention_mask": mask.long()}}


def draw(whole: GPTModel, seed: int) -> None:
    """Random values for every weight, none of them one under which a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    weights = {key: value for key, value in whole.state_dict(keep_vars=True).items() if is_weight(key, value)}
    for name, weight in weights.items():
        value = torch.randn(weight.shape, generator=generator)
        if weight.dim() == 1:  # norms around their one (or zero), biases and sinks around zero
            value = float(weight.data.min() == weight.data.max() == 1) + 0.2 * value
        else:
            value *= next((std for part, std in NARROW.items() if part in name), 1.2 / weight.shape[1] ** 0.5)
        weight.data.copy_(value)
    hybrid.draw(weights, generator)
    llava.draw(weights)


def is_weight(key: str, value: object) -> bool:
    return torch.is_tensor(value) and "._extra_state" not in key


def save(arguments: Mapping[str, Any], source: Path, out: Path, format: str, extra_state: str) -> float | None:
    """Megatron shards `source/weights` to the case's layout, must give the logits of the reference, and saves to `out`.

    Returns:
        The largest difference of the logits to the single process, on ranks of the last stage; None elsewhere.
    """
    from megatron.core import parallel_state

    transformer_engine.extra_state = extra_state
    args, models = prepare(arguments)
    load_weights(models, source / "weights")
    told = torch.load(source / "reference.pt", weights_only=True, mmap=True)
    expected = torch.cat([told["logits"][None], told.get("mtp_logits", torch.empty(0, *told["logits"].shape))])
    found = model.logits(args, models, told["input_ids"])
    difference = None if found is None else (found - expected).abs().max().item()
    if difference is not None and not difference <= TOLERANCE * max(10.0, expected.abs().max().item()):
        raise ArithmeticError(f"logits of the sharded model are {difference:.2e} off those of one process")
    for parameter in (parameter for chunk in models for parameter in chunk.parameters()):
        parameter.data = parameter.data.to(args.params_dtype)  # expert biases, which are buffers, stay in fp32
    write(args, models, out, format)
    ranks = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
    if difference is not None and ranks == (0, 0):
        torch.save(told | {"args": plain(args), "difference": difference}, out / "reference.pt")
    return difference


def logits(arguments: Mapping[str, Any], checkpoint: Path, format: str, input_ids: np.ndarray) -> np.ndarray | None:
    """fp32 logits `[b, s, padded vocabulary]` of a checkpoint that Megatron opens; None but on the last stage."""
    args, models = prepare(arguments)
    LOADERS[format](args, models, checkpoint)
    found = model.logits(args, models, torch.from_numpy(input_ids))
    return None if found is None else found[0].numpy()  # a pipe takes arrays whole, tensors by shared memory


def step(arguments: Mapping[str, Any], source: Path, out: Path) -> None:
    """One training step from the weights and on the tokens of the reference in `source`, in one process.

    `out` gets what the reference says, losses, and gradients in the names of the layer spec of `arguments`.
    """
    _args, models = prepare(arguments)
    load_weights(models, source / "weights")
    told = torch.load(source / "reference.pt", weights_only=True, mmap=True)
    losses, gradients = training.step(models[0], told["input_ids"])
    torch.save(told | {"losses": losses, "gradients": gradients}, out)


TASKS: dict[str, Callable[..., Any]] = {"reference": reference, "save": save, "logits": logits, "step": step}
