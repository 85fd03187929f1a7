"""`megahf demo`: a real model goes through real Megatron and back, and answers where neither can be imported.

Online, the model is SmolLM2, which megahf writes for Megatron at two layouts, and the truth about it transformers' own
Llama; offline it is a sample that comes with
megahf, which real Megatron wrote, and the truth what Megatron's own model said when it was made.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from . import smollm2, stranger
from .errors import refuse
from .judge import megatron_installed

if TYPE_CHECKING:
    import numpy as np
    from transformers import LlamaForCausalLM

SAMPLE = Path(__file__).with_name("samples") / "zen"
HYBRID = SAMPLE.with_name("globe")
QUESTION = "What is gravity? Answer in one sentence."
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 100}
TAKEN_IN: dict[str, Any] = {"tp": 3, "pp": 2, "format": "torch_dist"}
RECUT: dict[str, Any] = {"tp": 1, "pp": 5, "vpp": 2, "format": "torch"}
TOLERANCE = 1e-4  # fp32 logits up to 40: Llama's own eager and sdpa differ by as much, a misplaced row by far more


class Spoken(NamedTuple):
    """What a model said to a question."""

    input_ids: np.ndarray  # [s]: the question in its chat template, then the answer
    prompt: int  # how many of them are the question's
    logits: np.ndarray  # [answer, vocabulary], fp32: those that chose the answer's tokens


class Subject(NamedTuple):
    """A Megatron checkpoint that the demo publishes, and how to know what its model says."""

    checkpoint: Path
    tokenizer: Path
    questions: list[str]  # the first is the one whose answer is compared
    authority: str
    truth: Callable[[Spoken], Spoken]  # what the authority says to the question of the given
    first: dict[str, Any] = GREEDY  # how `generate` answers the first question
    others: dict[str, Any] = GREEDY


class Sample(NamedTuple):
    """A checkpoint that comes with megahf: its folder, the step that takes it up, and how it is asked."""

    folder: Path
    title: str
    authority: str
    another: str = ""  # the question after the recorded one, where the user has none
    first: dict[str, Any] = GREEDY
    others: dict[str, Any] = GREEDY


SAMPLES = {
    "offline": Sample(
        SAMPLE,
        "a sample that megatron-core trained and saved, and what its GPTModel said",
        "megatron-core's GPTModel",
    ),
    "hybrid": Sample(
        HYBRID,
        "a hybrid that megatron-core saved at TP2, and what its MambaModel wrote, no seven bytes twice",
        "megatron-core's MambaModel",
        "KING RICHARD III:\n",
        {"do_sample": False, "max_new_tokens": 200, "no_repeat_ngram_size": 7},  # or it goes round in circles
        {"do_sample": True, "max_new_tokens": 300, "temperature": 0.5},
    ),
}


def demo(which: str | None, keep: Path | None, prompt: str | None) -> None:
    """Takes a model from Megatron's files to an answer, a line for each step.

    Args:
        which: a sample of `SAMPLES` instead of SmolLM2: no download, no Megatron.
        keep: a new folder for the checkpoint and the Hub folder; without one nothing is left.
        prompt: the question to ask.

    Raises:
        Refused: something is not installed, or the answer is not the one it should be.
    """
    started = time.monotonic()
    with workplace(keep) as place:
        subject = sample(prompt, which) if which else through_megatron(place, prompt)
        hub = publish(subject, place / "hub")
        compare(ask(subject, hub), subject)
    click.echo(f"{time.monotonic() - started:.0f} s altogether{f'; the model is in {hub}' if keep else ''}")


@contextlib.contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """The folder to work in, gone afterwards unless it is to be kept."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="megahf-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise refuse("the folder to keep the demo in is not empty", keep, "choose another")
    keep.mkdir(parents=True, exist_ok=True)
    yield keep


@contextlib.contextmanager
def step(what: str) -> Iterator[list[str]]:
    """One line: what is done, then what came of it (put into the list) and the seconds it took."""
    started, results = time.monotonic(), list[str]()
    click.echo(f"{what} ...", nl=False)
    sys.stdout.flush()  # a process of ours may write next
    try:
        yield results
        results.append(f"{time.monotonic() - started:.1f} s")
    finally:
        click.echo(f" {', '.join(results)}")


def sample(prompt: str | None, which: str = "offline") -> Subject:
    """A checkpoint that comes with megahf, and what Megatron's own model said when it was made."""
    folder, title, authority, another, first, others = SAMPLES[which]
    with step(title):
        question, record = load_spoken(folder / "spoken.safetensors")
    questions = [question, *filter(None, [prompt or another])]
    return Subject(folder, folder / "tokenizer", questions, authority, lambda spoken: record, first, others)


def through_megatron(place: Path, prompt: str | None) -> Subject:
    """SmolLM2 as a Megatron checkpoint at TP3 x PP2, and that again at PP5 with two chunks a stage."""
    from .export import convert

    file = smollm2.gguf_file()
    with step(f"transformers reads SmolLM2-135M-Instruct from {file.name}") as results:
        model, tokenizer = smollm2.load(file)
        smollm2.save(model, place / "smollm2")
        tokenizer.save_pretrained(place / "smollm2")
        results.append(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters")
    for source, target, layout in (("smollm2", "megatron", TAKEN_IN), ("megatron", "recut", RECUT)):
        sizes = " ".join(f"--{name} {value}" for name, value in layout.items())
        with step(f"megahf convert {source} {target} --to megatron {sizes}") as results:
            convert(place / source, place / target, to="megatron", **layout)
            results.append(f"{sum(1 for _ in (place / target).rglob('*.[dp]*t*'))} files")
    if megatron_installed():
        judged(place, model)
    else:
        click.echo("megatron-core is not installed: it is not asked whether it loads them")

    def truth(spoken: Spoken) -> Spoken:
        import torch

        with torch.inference_mode():
            question = torch.from_numpy(spoken.input_ids[None, : spoken.prompt])  # [1, s]
            said = model.generate(question, **GREEDY)
            logits = model(said).logits[0, spoken.prompt - 1 : -1]
            return Spoken(said[0].numpy(), spoken.prompt, logits.numpy())

    return Subject(place / "recut", place / "smollm2", [prompt or QUESTION], "transformers' own Llama", truth)


def judged(place: Path, model: LlamaForCausalLM) -> None:
    """Megatron makes its own checkpoint of the weights, and loads both of megahf's in every rank.

    Raises:
        Refused: weights that are not Megatron's to the bit, or logits that are not.
    """
    import torch

    from .judge import MEGATRON
    from .judge.bench import Bench
    from .verification import verify

    with Bench(size=6) as bench:
        with step(f"{MEGATRON} takes the weights into its GPTModel and saves them at TP3 x PP2 as torch_dist"):
            torch.save(smollm2.megatron_state(model), place / "weights.pt")
            sizes = {"tensor_model_parallel_size": 3, "pipeline_model_parallel_size": 2}
            bench.save_weights(smollm2.arguments(model.config) | sizes, place / "weights.pt", place / "judge")
            (place / "weights.pt").unlink()
        known = torch.load(place / "judge" / "reference.pt", weights_only=True)
        for name in ("megatron", "recut"):
            with step(f"{MEGATRON} loads {name} in each of its ranks") as results:
                verify(place / "judge", place / name)
                difference = bench.difference(place / name, known)
                if not difference <= TOLERANCE:
                    raise refuse(f"Megatron's logits of it are {difference:.1e} off", place / name)
                results.append(f"weights equal its own bit for bit, logits within {difference:.1e}")


def publish(subject: Subject, hub: Path) -> Path:
    """What `megahf inspect` and `megahf convert` do."""
    from .execute import Checks
    from .export import job_for, plan_for
    from .inspection import architecture
    from .writing import carry_out

    with step("megahf inspect"):
        plan = plan_for(subject.checkpoint, tokenizer=subject.tokenizer)
    for line in (*plan.summary().splitlines(), *architecture(dict(vars(plan.config))).splitlines()):
        click.echo(f"    {line}")
    with step("megahf convert") as results:
        job = job_for(plan, tokenizer=subject.tokenizer)
        carry_out(plan, job, hub, Checks(), False, lambda size: None)
        results.append(f"{plan.nbytes / 1e6:.1f} MB in {len(plan.copies)} weights, each digested")
    return hub


def ask(subject: Subject, hub: Path) -> Spoken:
    """The folder is loaded and asked in a process that can import neither megahf nor Megatron, nor reach the Hub."""
    title = "AutoModelForCausalLM in a process without megahf and without Megatron"
    with tempfile.TemporaryDirectory(prefix="megahf-demo-") as place, step(title) as results:
        click.echo()
        out = Path(place, "spoken.safetensors")
        # -I: no PYTHONPATH, no working directory. HF_HOME: no code of an earlier run, none left behind.
        how = json.dumps(subject.first), json.dumps(subject.others)
        command = [sys.executable, "-I", stranger.__file__, str(hub), str(out), *how, *subject.questions]
        alone = {"HF_HUB_OFFLINE": "1", "HF_HOME": place, "TOKENIZERS_PARALLELISM": "false"}
        ended = subprocess.run(command, env={**os.environ, **alone}, check=False)
        if ended.returncode:
            raise refuse(f"the process that loads the folder ended with {ended.returncode}", hub, "its reason is above")
        results.append("   loaded and answered")
        return load_spoken(out)[1]


def load_spoken(file: Path) -> tuple[str, Spoken]:
    """The question, as far as it is recorded, and what was said to it."""
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        notes = stored.metadata()
        spoken = Spoken(stored.get_tensor("input_ids"), int(notes["prompt"]), stored.get_tensor("logits"))
    return notes.get("question", ""), spoken


def compare(spoken: Spoken, subject: Subject) -> None:
    """Refuses an answer that is not the authority's, token for token and in the logits."""
    with step(f"against {subject.authority}") as results:
        expected = subject.truth(spoken)
        answers = [said.input_ids[said.prompt :].tolist() for said in (spoken, expected)]
        if answers[0] != answers[1]:
            raise refuse(f"greedy tokens {answers[0]}, {subject.authority} says {answers[1]}", subject.checkpoint)
        difference = abs(spoken.logits - expected.logits).max()
        if not difference <= TOLERANCE:
            raise refuse(f"fp32 logits are {difference:.1e} off those of {subject.authority}", subject.checkpoint)
        results.append(f"{len(answers[0])} greedy tokens equal, fp32 logits within {difference:.1e}")
