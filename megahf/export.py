"""`convert`: a model, in whichever form it lies, becomes a folder or a checkpoint of another; no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import hf_folder
from .checkpoint import open_checkpoint
from .checkpoint.output import Output
from .checkpoint.safetensors import INDEX, index, parse_size, shards
from .errors import refuse
from .execute import Checks
from .folder import family_files, small_files
from .image_tokens import tell
from .llava import NO_TOKEN, UNKNOWN_IMAGE_TOKEN, refuse_untold
from .lowering import buffers, lower
from .plan import Copy, Plan, build
from .processors import added_tokens
from .rows import is_llava
from .saved_tokenizer import has_tokenizer, tokenizer_size
from .stock_processors import stock_processor
from .weights import weights
from .writing import Digests, Job, Progress, carry_out

MAX_SHARD_SIZE = "5GB"
OURS, MEGATRON = "hf", "megatron"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    to: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    true_vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    refuse_nonfinite: bool = False,
    checksums: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda size: None,
    **layout: Any,
) -> Plan:
    """Converts the checkpoint or folder at `source` into `target`; gives the plan that was carried out.

    Args:
        to: `hf`, `megatron`, or a family of transformers' own such as `llama`; by default a Megatron checkpoint
            becomes `hf` and any other folder `megatron`.
        dtype: `bf16`, `fp16` or `fp32` for the weights; as stored by default.
        max_shard_size: of a safetensors file, like `300MB`; 5GB by default.
        true_vocab_size: rows of the vocabulary to keep; else the tokenizer's size, else what the args say.
        tokenizer: a folder with a saved tokenizer, whose files go along.
        strict: refuse arguments that are not known to leave the function as it is.
        refuse_nonfinite: refuse NaN and infinity.
        checksums: check the source's CRCs and digest every weight.
        overwrite: replace `target`.
        progress: called with the number of bytes each time some were written.
        layout: of a Megatron checkpoint: what `Target.of` takes (`tp`, `pp`, `vpp`, `ep`, `etp`, `format`, ..).

    Raises:
        Refused: with every reason found; nothing is left behind.
    """
    to = to or direction(source)
    plan = plan_for(source, dtype, true_vocab_size, tokenizer, strict, keep_padding=to == MEGATRON)
    job = job_for(plan, to, max_shard_size, tokenizer, **layout)
    carry_out(plan, job, Path(target), Checks(checksums, refuse_nonfinite), overwrite, progress)
    return plan


def direction(source: str | Path) -> str:
    """What a source is converted to where nothing else is asked for."""
    return MEGATRON if hf_folder.is_hf_folder(Path(source)) else OURS


def plan_for(
    source: str | Path,
    dtype: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    keep_padding: bool = False,
) -> Plan:
    """Every weight of the model at `source`, whole, before a byte moves.

    Args:
        keep_padding: of a Megatron checkpoint, rows beyond the true vocabulary stay where they can.
    """
    if hf_folder.is_hf_folder(Path(source)):
        plan = hf_folder.build(Path(source), dtype=dtype)
        if true_vocab_size not in (None, rows := plan.config.vocab_size):
            what = f"a vocabulary of {true_vocab_size} is asked for, config.json says {rows}, which has no padding"
            raise refuse(what, source, "leave --true-vocab-size out")
    else:
        checkpoint = open_checkpoint(source)
        size = tokenizer_size(Path(tokenizer), added_tokens(checkpoint.args)) if tokenizer else None
        if size is not None and true_vocab_size is not None and true_vocab_size < size:
            what = f"the tokenizer has ids up to {size - 1}, {true_vocab_size} rows are asked for"
            raise refuse(what, str(tokenizer), f"leave --true-vocab-size out, or give at least {size}")
        plan = build(
            checkpoint, dtype=dtype, true_vocab_size=true_vocab_size, tokenizer_size=size, keep_padding=keep_padding
        )
        if tokenizer and is_llava(plan.config):
            tell(plan.config, plan.checkpoint.args, Path(tokenizer))
    if strict and plan.unknown_arguments:
        raise refuse(
            f"{len(plan.unknown_arguments)} arguments are not known to leave the function as it is",
            ", ".join(plan.unknown_arguments),
            "leave --strict out to have them only reported",
        )
    return plan


def job_for(
    plan: Plan,
    to: str = OURS,
    max_shard_size: str | int | None = None,
    tokenizer: str | Path | None = None,
    **layout: Any,
) -> Job:
    """What to write of `plan`, and under which names."""
    refuse_idle(plan, to, max_shard_size, tokenizer, layout)
    if to == MEGATRON:
        from .megatron import megatron_job
        from .target import Target

        return megatron_job(plan, Target.of(plan.config, **{"format": "torch_dist", **layout}))
    place = Path(tokenizer) if tokenizer else None
    if place is None and has_tokenizer(plan.checkpoint.path):
        place = plan.checkpoint.path
    if to == OURS:
        return folder_job(plan, max_shard_size, place)
    theirs, copies, said = lower(plan, to)
    beside, more = stock_processor(plan.config, plan.checkpoint.args, theirs, place)
    plan.notes.extend([*said, *more])
    files = outputs(copies, max_shard_size)

    def small(digests: Digests) -> dict[str, bytes]:
        return family_files(plan, theirs, flat(digests), place) | beside | indexed(files, buffers(plan, to))

    return Job(files, small)


def refuse_idle(
    plan: Plan, to: str, max_shard_size: str | int | None, tokenizer: str | Path | None, layout: Mapping[str, Any]
) -> None:
    """Refuses options that would do nothing."""
    if to != MEGATRON:
        if layout:
            what = f"{', '.join(sorted(layout))}: options of Megatron checkpoints alone"
            raise refuse(what, f"--to {to}", "give --to megatron, or leave them out")
        return
    idle = {
        "--max-shard-size": (max_shard_size, "the ranks say how a Megatron checkpoint is shared out"),
        "--experts": (layout.get("experts") if not plan.config.num_experts else None, "the model has no experts"),
        "--tokenizer": (None if plan.checkpoint.holdings else tokenizer, "a Megatron checkpoint holds no tokenizer"),
    }
    for option, (given, why) in idle.items():
        if given is not None:
            raise refuse(f"{option} {given} would do nothing: {why}", f"--to {to}", f"leave {option} out")


def folder_job(plan: Plan, max_shard_size: str | int | None, tokenizer: Path | None) -> Job:
    """A folder of our own classes."""
    refuse_untold(plan.config, plan.checkpoint.args)
    if is_llava(plan.config) and plan.config.image_token_id == UNKNOWN_IMAGE_TOKEN:
        plan.notes.append(NO_TOKEN)
    files = outputs(plan.copies, max_shard_size)

    def small(digests: Digests) -> dict[str, bytes]:
        buffers = {weight.name for weight in weights(plan.config) if weight.row.float32}
        return small_files(plan, flat(digests), tokenizer) | indexed(files, buffers)

    return Job(files, small)


def outputs(copies: list[Copy], max_shard_size: str | int | None) -> list[Output[Copy]]:
    """The safetensors files, as `save_pretrained` would share the weights out."""
    size = parse_size(MAX_SHARD_SIZE if max_shard_size is None else max_shard_size)
    return shards(sorted(copies, key=lambda copy: natural(copy.runtime)), size)


def indexed(files: list[Output[Copy]], buffers: set[str]) -> dict[str, bytes]:
    return {INDEX: index(files, buffers)} if len(files) > 1 else {}


def flat(digests: Digests) -> dict[str, str]:
    """Digests by weight, where no two files have one of the same name."""
    return {name: digest for names in digests.values() for name, digest in names.items()}


def natural(name: str) -> list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]]:
    """Sort key that puts layer 2 before layer 10: the order of `save_pretrained` (transformers' `dot_natural_key`)."""
    return [natural_part(part) for part in name.split(".")]


def natural_part(part: str) -> tuple[int, int] | tuple[int, str] | tuple[int, str, int]:
    if part.isdigit():
        return 0, int(part)
    text = part.rstrip("0123456789")
    return (1, text, int(part[len(text) :])) if text != part else (1, text)
