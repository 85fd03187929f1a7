"""The `megahf` command: one thin function a verb. Exit code 0: done; 1: refused, with the reason; 2: usage."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import Refused

Progress = Callable[[int], None]

checkpoint = click.argument("checkpoint", type=click.Path(path_type=Path))
dtype = click.option(
    "--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Number format of the weights; as stored by default."
)
vocabulary = click.option(
    "--true-vocab-size", type=int, metavar="N", help="Rows of the vocabulary to keep; the rest is padding."
)
tokenizer = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A saved tokenizer: its size counts and its files go along.",
)


# How a Megatron checkpoint is written: option, keyword of `Target.of`, type, what it is.
LAYOUT: tuple[tuple[str, str, Any, str], ...] = (
    ("--tp", "tp", int, "Tensor-parallel ranks."),
    ("--pp", "pp", int, "Pipeline stages."),
    ("--vpp", "vpp", int, "Chunks of layers that each stage holds."),
    ("--ep", "ep", int, "Ranks that share out the experts."),
    ("--etp", "etp", int, "Tensor-parallel ranks of the experts; as --tp by default."),
    ("--first", "first", int, "Layers of the first stage."),
    ("--last", "last", int, "Layers of the last stage."),
    ("--layout", "layout", str, "The layers of every stage: Et|t|tt|L; of a hybrid, its pattern with | between."),
    ("--format", "format", click.Choice(["torch", "torch_dist"]), "Of the files; torch_dist by default."),
    ("--experts", "experts", click.Choice(["sequential", "te-grouped", "legacy-grouped"]), "How experts are stored."),
    ("--te/--local", "engine", None, "Whose layers: Transformer Engine's, as by default, or Megatron's own."),
    ("--make-vocab-size-divisible-by", "divisible_by", int, "Times --tp: rows of the vocabulary; 128 by default."),
)


def layout_options(command: Callable[..., None]) -> Callable[..., None]:
    for option, keyword, kind, words in reversed(LAYOUT):
        command = click.option(option, keyword, type=kind, default=None, help=f"[megatron] {words}")(command)
    return command


class Commands(click.Group):
    """Refusals as one line each and exit code 1; an interrupted run as exit code 130."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except Refused as error:
            click.echo(f"refused: {error}", err=True)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command takes up where this one stopped", err=True)
            sys.exit(130)
        sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="megahf")
def main() -> None:
    """Megatron checkpoints as Hugging Face models, without Megatron, Transformer Engine or a GPU."""


@main.command()
@checkpoint
@vocabulary
@click.option("--context", type=int, metavar="N", help="Also say what a sequence of N tokens takes of each GPU.")
@click.option("--gpus", type=int, default=1, metavar="G", help="How many there are for --context; 1 by default.")
@click.option("--gpu-memory", type=float, default=80.0, metavar="GB", help="Of each; 80 by default.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(
    checkpoint: Path, true_vocab_size: int | None, context: int | None, gpus: int, gpu_memory: float, as_json: bool
) -> None:
    """Show what CHECKPOINT holds: format, ranks, config, weights by layer, and what would be refused.

    With --context also which context parallel size fits GPUs, to run the model and to train it, and Megatron's options.
    """
    from .inspection import inspect, page

    budget = None if context is None else {"context": context, "gpus": gpus, "memory": int(gpu_memory * 10**9)}
    report = inspect(checkpoint, true_vocab_size, budget)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        page(report)
    if report["refused"]:
        sys.exit(1)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--to", metavar="KIND", help="hf, megatron, or an architecture of transformers' own, such as llama.")
@dtype
@click.option("--max-shard-size", metavar="SIZE", help="Of a safetensors file; 5GB by default.")
@vocabulary
@tokenizer
@click.option("--strict", is_flag=True, help="Refuse arguments that are not known to leave the function as it is.")
@click.option("--refuse-nonfinite", is_flag=True, help="Refuse NaN and infinity in the weights.")
@click.option("--no-checksums", is_flag=True, help="Trust the source: check no CRC, digest no weight.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and that it can be.")
@layout_options
def convert(
    source: Path,
    target: Path,
    to: str | None,
    dtype: str | None,
    max_shard_size: str | None,
    true_vocab_size: int | None,
    tokenizer: Path | None,
    strict: bool,
    refuse_nonfinite: bool,
    no_checksums: bool,
    overwrite: bool,
    dry_run: bool,
    **layout: Any,
) -> None:
    """Convert SOURCE into TARGET.

    A Megatron checkpoint becomes a folder for transformers' Auto classes, or with --to one of transformers' own
    architectures, or a Megatron checkpoint of another layout. A Hugging Face folder becomes a Megatron checkpoint.
    """
    from .execute import Checks, memory_bound
    from .export import direction, job_for, plan_for
    from .plan import amount
    from .writing import carry_out, check

    to = to or direction(source)
    plan = plan_for(source, dtype, true_vocab_size, tokenizer, strict, keep_padding=to == "megatron")
    given = {name: value for name, value in layout.items() if value is not None}
    job = job_for(plan, to, max_shard_size, tokenizer, **given)
    click.echo(plan.summary())
    if dry_run:
        check(plan, target, overwrite)
        buffers = amount(memory_bound(plan.copies))
        files = f"{len(job.outputs)} file{'s' * (len(job.outputs) > 1)}"
        click.echo(f"would write {amount(job.nbytes)} in {files} to {target}, with at most {buffers} in memory")
        return
    with bar("converting", sum(copy.nbytes for output in job.outputs for copy in output.weights)) as progress:
        carry_out(plan, job, target, Checks(not no_checksums, refuse_nonfinite), overwrite, progress)
    click.echo(f"wrote {target}: {len(plan.copies)} weights, {amount(job.nbytes)}")
    for line in job.afterwards(target):
        click.echo(line)
    if no_checksums:
        click.echo("the source's integrity was not checked (--no-checksums)")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--logits",
    is_flag=True,
    help="Also compare logits with megatron-core's, which unpickles SOURCE: only for one you trust.",
)
def verify(source: Path, target: Path, logits: bool) -> None:
    """Compare every weight of TARGET, which `convert` wrote, with SOURCE bit for bit."""
    from .plan import amount
    from .verification import size_of, verify, verify_logits

    with bar("verifying", size_of(target)) as progress:
        result = verify(source, target, progress=progress)
    click.echo(f"{result.weights} weights, {amount(result.nbytes)}: equal bit for bit")
    if logits:
        click.echo(f"largest difference of fp32 logits from megatron-core's: {verify_logits(source, target):.2e}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="The repository must be a private one.")
@click.option("--revision", metavar="BRANCH", help="Push to this branch, which is made where it is missing.")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent; nothing is asked of the Hub.")
def push(folder: Path, repo: str, private: bool, revision: str | None, message: str | None, dry_run: bool) -> None:
    """Upload FOLDER, which `convert` wrote, to the repository REPO of the Hugging Face Hub, in one commit."""
    from .push import page, parcel, push

    if dry_run:
        click.echo(page(parcel(folder), repo, revision, private))
        return
    done = push(folder, repo, private=private, revision=revision, message=message)
    click.echo(f"{done.url}{'' if done.changed else ': all of it was there already'}")
    click.echo(f'load it with from_pretrained("{done.repo}", revision="{done.commit}", trust_remote_code=True)')


@main.command()
@click.option(
    "--offline", "which", flag_value="offline", help="A small GPT that comes with megahf; no download, no Megatron."
)
@click.option("--hybrid", "which", flag_value="hybrid", help="The same with a hybrid: Mamba, attention and experts.")
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the checkpoint and the folder there."
)
@click.option("--prompt", help="Ask something else.")
def demo(which: str | None, keep: Path | None, prompt: str | None) -> None:
    """Take a real model through real Megatron and back; then it answers."""
    from .demo import demo

    demo(which, keep, prompt)


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Progress]:
    """A progress bar in bytes, with GB/s and the time left; only where someone is looking."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


if __name__ == "__main__":
    main()
