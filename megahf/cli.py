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
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def inspect(checkpoint: Path, true_vocab_size: int | None, as_json: bool) -> None:
    """Show what CHECKPOINT holds: format, ranks, config, weights by layer, and what would be refused."""
    from .inspection import inspect, page

    report = inspect(checkpoint, true_vocab_size)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        page(report)
    if report["refused"]:
        sys.exit(1)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@dtype
@click.option("--max-shard-size", default="5GB", show_default=True, help="Size of a safetensors file.")
@vocabulary
@tokenizer
@click.option("--strict", is_flag=True, help="Refuse arguments that are not known to leave the function as it is.")
@click.option("--refuse-nonfinite", is_flag=True, help="Refuse NaN and infinity in the weights.")
@click.option("--no-checksums", is_flag=True, help="Trust the source: check no CRC, digest no weight.")
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and that it can be.")
def convert(source: Path, target: Path, dry_run: bool, no_checksums: bool, **options: Any) -> None:
    """Convert the Megatron checkpoint SOURCE into the folder TARGET, for AutoModelForCausalLM."""
    from .execute import Checks, memory_bound
    from .export import carry_out, dry_run_of, plan_for
    from .plan import amount

    plan = plan_for(source, options["dtype"], options["true_vocab_size"], options["tokenizer"], options["strict"])
    click.echo(plan.summary())
    if dry_run:
        dry_run_of(plan, target, options["max_shard_size"], options["overwrite"])
        buffers = amount(memory_bound(plan.copies))
        click.echo(f"would write {amount(plan.nbytes)} to {target}, with at most {buffers} in memory")
        return
    checks = Checks(not no_checksums, options["refuse_nonfinite"])
    with bar("converting", plan.nbytes) as progress:
        carry_out(plan, target, options["max_shard_size"], options["tokenizer"], checks, options["overwrite"], progress)
    click.echo(f"wrote {target}: {len(plan.copies)} weights, {amount(plan.nbytes)}")
    if no_checksums:
        click.echo("the source's integrity was not checked (--no-checksums)")


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--logits",
    is_flag=True,
    help="Also compare logits with megatron-core's, which unpickles SOURCE: only for one you trust.",
)
def verify(source: Path, folder: Path, logits: bool) -> None:
    """Derive every weight of FOLDER again from the checkpoint SOURCE and compare bit for bit."""
    from .plan import amount
    from .verification import folder_size, verify, verify_logits

    with bar("verifying", folder_size(folder)) as progress:
        result = verify(source, folder, progress=progress)
    click.echo(f"{result.weights} weights, {amount(result.nbytes)}: equal bit for bit")
    if logits:
        click.echo(f"largest difference of fp32 logits from megatron-core's: {verify_logits(source, folder):.2e}")


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
