"""What the ranks of the tests of context parallelism do: one process imports, then forks into them.

Run as `python context_ranks.py FOLDER`, with the cases in `FOLDER/cases.pt`; rank r leaves `FOLDER/r.pt`: what each
case gave by name, for groups of two and for all four.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import tiny, tiny_bert_config, tiny_hybrid, tokens
from tiny_llava import IMAGE, pixels, row, tiny_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, TrainingArguments

import megahf
from megahf import demo
from megahf.context_parallel_data import slices_of
from megahf.context_parallel_trainer import ContextParallelTrainer
from megahf.models.context_attention import context_attention
from megahf.models.context_parallel import context_parallel, sum_gradients
from megahf.models.modeling_mcore_bert import McoreBertForPreTraining
from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration
from megahf.models.zigzag import split

WORLD = 4
LENGTH = 48
TIMEOUT = timedelta(seconds=60)
PATIENCE = timedelta(seconds=3)  # of ranks whose other fails
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "max_steps": 20,
}


def build(case: dict[str, Any]) -> PreTrainedModel:
    """The model of a case in training, the same in every process."""
    kind, changes = case["model"]
    makers: dict[str | None, Callable[..., PreTrainedModel]]
    makers = {None: tiny, "llava": tiny_llava, "bert": bert, "sample": sample}
    model = makers[kind](**changes) if kind in makers else tiny_hybrid(kind, **changes)
    return model.train().to(case.get("dtype", torch.float32))


def bert() -> PreTrainedModel:
    return McoreBertForPreTraining(tiny_bert_config())


def batch(masked: str, model: PreTrainedModel | None = None) -> tuple[Tensor, Tensor]:
    """Tokens and their labels `[2, LENGTH]`; which labels do not count, `masked` says. With images where `model` sees:
    of two tiles, up to the end of a slice (and of four ranks the first has none of it); and of one, from a border on.
    """
    ids = tokens(2, LENGTH)
    if isinstance(model, McoreLlavaForConditionalGeneration):
        end, start, each = LENGTH * 7 // 8, LENGTH // 2, model.config.img_seq_len
        first = row(model.config, end - 2 * each, -2, LENGTH - end)
        ids = torch.cat((first, row(model.config, start, -1, LENGTH - start - each)))
    labels = ids.clone()
    if masked == "unevenly":
        labels[0, 6:32] = -100
        labels[1, ::3] = -100
    if masked == "all of one rank":  # the second of two; of four the last too
        labels[:, LENGTH // 4 : 3 * LENGTH // 4 + 1] = -100
    return ids, labels


def images(case: dict[str, Any]) -> dict[str, Tensor]:
    """What a model that sees is given beside the tokens, whole on every rank."""
    if case["model"][0] != "llava" or case.get("blind"):
        return {}
    return {"pixel_values": pixels(3), "num_tiles": torch.tensor([2, 1])}


def rows(count: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """A data set of what the hybrid sample has said, some of whose labels do not count."""
    _, said = demo.load_spoken(demo.HYBRID / "spoken.safetensors")
    ids = torch.from_numpy(said.input_ids).unfold(0, LENGTH, 3)[:count] % vocabulary  # [count, LENGTH]
    labels = batch("unevenly")[1].repeat(count // 2, 1)
    labels = torch.where(labels < 0, labels, ids)
    return [{"input_ids": row.tolist(), "labels": of.tolist()} for row, of in zip(ids, labels, strict=True)]


def sample() -> PreTrainedModel:
    """The hybrid that comes with megahf, of every kind of layer, as real Megatron left it."""
    return megahf.from_megatron(demo.HYBRID, dtype=torch.float32)


def learn(model: PreTrainedModel, case: dict[str, Any], cut: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
    """A model's output over what `cut` leaves of the batch, and its loss."""
    ids, labels = batch(case["masked"], None if case.get("blind") else model)
    if case.get("blind"):
        ids %= IMAGE
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    given = {"labels": cut(labels), **({} if case.get("unshifted") else {"shift_labels": cut(shifted)})}
    call = {**images(case), **case.get("call", {})}
    if case.get("own loss"):
        out = model(cut(ids), **call)
        return out, out.logits.square().mean() * cut(ids).numel()
    out = model(cut(ids), **given, **call)
    return out, out.loss


def found(model: PreTrainedModel, out: Any, loss: Tensor) -> dict[str, Any]:
    """What a step left, as it is compared."""
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    logits = None if out.logits is None else out.logits.detach()
    return {"logits": logits, "loss": loss.detach(), "gradients": gradients}


def step(group: Any, case: dict[str, Any]) -> dict[str, Any]:
    """One step of a model over this rank's slices, the backward outside of the context."""
    model = build(case)
    if "reentrant" in case:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": case["reentrant"]})
    for _ in range(case.get("steps", 1)):
        with context_parallel(group, **case["options"]) as context:
            out, loss = learn(model, case, context.split)
        loss.backward()
    if case["options"].get("gradients") == "parts":
        sum_gradients(model.parameters(), group)
    return {**found(model, out, loss), "states": context.states}


def padded() -> dict[str, Tensor]:
    """A batch whose rows end before it does."""
    ids, labels = (x[:, :-5] for x in batch("unevenly"))
    mask = torch.ones_like(ids)
    mask[1, LENGTH // 2 :] = 0
    return {"input_ids": ids, "labels": labels.masked_fill(mask == 0, -100), "attention_mask": mask}


def pad(group: Any, case: dict[str, Any]) -> dict[str, Any]:
    """A step of a model over a padded batch as the collator cuts it."""
    model = build(case)
    with context_parallel(group):
        out = model(**slices_of(padded(), dist.get_world_size(group), dist.get_rank(group), pad_token_id=7))
    out.loss.backward()
    return found(model, out, out.loss)


@torch.no_grad()
def say(group: Any, case: dict[str, Any]) -> Tensor:
    """A model's logits in evaluation."""
    ids = split(batch("nowhere")[0], dist.get_world_size(group), dist.get_rank(group))
    with context_parallel(group, **case["options"]):
        return build(case).eval()(ids).logits


def attempt(group: Any, case: dict[str, Any]) -> str:
    """The words in which a call is refused."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    model = build(case).train(case.get("training", True))
    ids = split(batch("nowhere", model)[0], size, rank)
    odd = rank in case.get("ranks", range(size))  # has what is refused
    call = {**images(case), **(case["call"] if odd else {})}
    ids = ids[: call.pop("rows", None), : call.pop("length", None)]
    try:
        with context_parallel(group, **(case["options"] if odd else {})):
            model(ids, **call)
    except ValueError as error:
        return str(error)
    return "went through"


class Longest(TorchDispatchMode):
    """The longest dimension of any tensor made, and the largest number of its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.length = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.length = max([self.length, *(size for leaf in made for size in leaf.shape)])
        self.elements = max([self.elements, *(leaf.numel() for leaf in made)])
        return out


def measure(group: Any, case: dict[str, Any]) -> tuple[int, int]:
    """Longest dimension and most elements of a tensor in attention and its backward."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    whole = [torch.randn(1, heads, 512, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2)]
    query, key, value = (split(x, size, rank, 2).requires_grad_() for x in whole)
    with Longest() as seen:
        context_attention(query, key, value, group, case["ring"], 0.3, case["window"]).sum().backward()
    return seen.length, seen.elements


def train(group: Any, case: dict[str, Any]) -> dict[str, list[float]]:
    """Losses of 20 steps of pairs of ranks, each pair with its part of a batch."""
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    arguments = TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=1, **TRAINING, **case["training"])
    model = build(case)
    data = rows(48, model.config.vocab_size)
    trainer = ContextParallelTrainer(model, arguments, train_dataset=data, eval_dataset=data[:8], cp_size=2)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": logged, "evaluation": [trainer.evaluate()["eval_loss"]]}


TASKS = {"step": step, "pad": pad, "say": say, "attempt": attempt, "measure": measure, "train": train}


def start(rank: int, folder: Path, world: int, timeout: timedelta) -> None:
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def run(rank: int, folder: Path, world: int = WORLD) -> None:
    """Every case, one after the other."""
    start(rank, folder, world, TIMEOUT)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    results: dict[str, Any] = {}
    for case in torch.load(folder / "cases.pt", weights_only=False):
        for size in case["sizes"]:
            group = pairs[rank // 2] if size == 2 else dist.group.WORLD
            results[f"{case['name']} on {size}"] = TASKS[case["task"]](group, case)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def fail(rank: int, folder: Path) -> None:
    """Of two ranks the second fails between two forwards, in a way the folder's name says; what the first meets, and
    after how many seconds, is left there."""
    folder.mkdir(exist_ok=True)
    start(rank, folder, 2, PATIENCE)
    model, ids = tiny().train(), split(tokens(2, LENGTH), 2, rank)
    with context_parallel(dist.group.WORLD):
        model(ids)
        if rank == 1 and folder.name == "dies":
            os._exit(9)
        if rank == 1 and folder.name == "hangs":
            time.sleep(2 * PATIENCE.total_seconds())
        if rank == 1:
            raise KeyError("a bad batch")
        began = time.monotonic()
        try:
            model(ids).logits.sum().backward()
        except RuntimeError as error:
            (folder / "met").write_text(f"{time.monotonic() - began:.1f} {error}")


def forked(job: Callable[..., None], *arguments: Any) -> int:
    """A process that does the job, its id."""
    child = os.fork()
    if child:
        return child
    try:
        job(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # gloo's threads sometimes make a signal of the ordinary way out


def main(folder: Path, ways: list[str]) -> None:
    """The cases on four ranks, those in `FOLDER/pair` on two more, and two ranks for each way to fail."""
    ranks = [forked(run, rank, folder) for rank in range(WORLD)]
    if (folder / "pair").exists():
        ranks += [forked(run, rank, folder / "pair", 2) for rank in range(2)]
    failing = [forked(fail, rank, folder / way) for way in ways for rank in range(2)]
    codes = [os.waitpid(child, 0)[1] for child in (*failing, *ranks)][len(failing) :]
    sys.exit(any(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
