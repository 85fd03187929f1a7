"""Whole models on an NVIDIA GPU: with our kernels, without, and transformers' own with the same weights.

`models`: prefill, decode and a training step (forward, backward, AdamW) of a hybrid and of a fine-grained mixture of 2
billion parameters each, bfloat16, random weights. `context`: a prefill of 131,072 and of 1,048,576 tokens of the
hybrid, its tokens per second and the memory it takes above the weights. `load`: `from_megatron` onto the GPU, in GB/s,
beside plain copies of as many bytes, from pageable memory and from pinned. Each prints a table and writes
`results/gpu_<question>_<hardware>_<date>.{csv,md}`. `--dry` runs it all in small sizes wherever it is, and writes
nothing.

    python benchmarks/gpu.py models [--rounds 5]
    python benchmarks/gpu.py context [--lengths 131072 1048576]
    python benchmarks/gpu.py load [--gb 16] [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mirror
from convert import warm
from hybrid import VOCABULARY, nemotron
from measure import prompt
from record import RESULTS, command, machine, markdown, versions, write

import megahf
from megahf.models.kernel_choice import only

KERNELS, TWINS, THEIRS = "our kernels", "torch's ops", "transformers"
SIDES = {KERNELS: ("triton",), TWINS: (), THEIRS: ()}
COLUMNS = ("model", "what", *SIDES, "unit", "x torch's ops", "x transformers")
CONTEXT = ("tokens", "who", "tokens/s", "GiB above the weights")
LOADED = ("what", "GB", "seconds", "GB/s")
FAILED = "does not run"  # another's, of memory or of its compiler: its kind of exception stands beside it


@dataclass(frozen=True)
class Sizes:
    """What is run: of published models, or of none."""

    pattern: str = "M-M-M-M-M*-" * 4
    width: int = 2560
    experts: int = 128
    chosen: int = 8
    inner: int = 768
    moe_width: int = 2048
    moe_layers: int = 4
    prefills: tuple[int, ...] = (4096, 32768)
    prompt: int = 1024
    steps: int = 64
    trained: int = 4096


DRY = Sizes("M-*", 256, 4, 2, 16, 64, 1, (33,), 9, 2, 17)


def mixture(sizes: Sizes) -> PreTrainedModel:
    """A Qwen3-MoE of many small experts."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=sizes.moe_width, moe_intermediate_size=sizes.inner,
        intermediate_size=sizes.inner, num_hidden_layers=sizes.moe_layers, num_attention_heads=sizes.moe_width // 64,
        num_key_value_heads=4 if sizes.moe_width > 256 else 1, head_dim=64, num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")  # the quickest of theirs
    return model


def made(name: str, sizes: Sizes, device: torch.device) -> dict[str, PreTrainedModel]:
    """Theirs and ours, of the same tensors."""
    with device:
        if name == "hybrid":
            theirs = nemotron(sizes.pattern, sizes.width, torch.bfloat16)
            return {"ours": mirror.hybrid(theirs).to(device), "theirs": theirs}
        theirs = mixture(sizes)
        return {"ours": mirror.gpt(theirs).to(device), "theirs": theirs}


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call, to the end of what it asked of the GPU."""
    settle(device)
    start = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - start


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def prefilled(model: nn.Module, ids: Tensor) -> Any:
    return model(ids, logits_to_keep=1, use_cache=True)


def decoding(model: nn.Module, ids: Tensor, steps: int, device: torch.device) -> float:
    """Seconds of the median of greedy steps after a prompt."""
    out = prefilled(model, ids)

    @torch.no_grad()
    def step() -> None:
        nonlocal out
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)

    return statistics.median(seconds(step, device) for _ in range(steps))


def trained(model: nn.Module, ids: Tensor, device: torch.device) -> float:
    """Seconds of a forward, a backward and a step of AdamW, that changes no weight."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=device.type == "cuda")

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model.train()
    step()  # makes its moments
    found = seconds(step, device)
    model.eval()
    return found


def tasks(sizes: Sizes, device: torch.device) -> dict[str, Callable[[nn.Module], float]]:
    """By name what gives tokens per second of a model."""

    def of_prefill(size: int) -> Callable[[nn.Module], float]:
        ids = prompt(size, VOCABULARY).to(device)
        return lambda model: size / seconds(lambda: prefilled(model, ids), device)

    found = {f"prefill {size}": of_prefill(size) for size in sizes.prefills}
    before, whole = (prompt(size, VOCABULARY).to(device) for size in (sizes.prompt, sizes.trained))
    found[f"decode after {sizes.prompt}"] = lambda model: 1 / decoding(model, before, sizes.steps, device)
    found[f"training step of {sizes.trained}"] = lambda model: sizes.trained / trained(model, whole, device)
    return found


def measured(
    models: dict[str, PreTrainedModel], task: Callable[[nn.Module], float], rounds: int
) -> dict[str, list[float] | str]:
    """All rounds of each side, in turns after one to warm up; what did not run says why."""
    found: dict[str, Any] = {side: [] for side in SIDES}
    for turn in range(rounds + 1):
        for side, kernels in SIDES.items():
            if isinstance(found[side], str):
                continue
            try:
                with only(*kernels):
                    speed = task(models["theirs" if side == THEIRS else "ours"])
            except Exception as problem:  # said in the table
                found[side] = f"{FAILED}: {type(problem).__name__}"
                print(f"{side}: {problem}", file=sys.stderr)
                forget(models)
                continue
            if turn:
                found[side].append(speed)
    return found


def forget(models: dict[str, PreTrainedModel]) -> None:
    """What a measurement left that did not end."""
    for model in models.values():
        model.eval().zero_grad(set_to_none=True)
    torch.cuda.empty_cache()


def agree(models: dict[str, PreTrainedModel], device: torch.device) -> float:
    """The largest difference, relative to the norm, of our kernels' logits and transformers'."""
    ids = prompt(300, VOCABULARY).to(device)
    with torch.no_grad():
        wanted = models["theirs"](ids).logits.float()
        with only("triton"):
            found = models["ours"](ids).logits.float()
    return float((found - wanted).norm() / wanted.norm())


def model_rows(sizes: Sizes, device: torch.device, rounds: int) -> tuple[list[Any], list[Any]]:
    """Rows of the table, and all runs."""
    rows: list[Any] = []
    runs: list[Any] = []
    for name in ("hybrid", "mixture"):
        models = made(name, sizes, device)
        label = f"{name}, {models['ours'].num_parameters() / 1e9:.1f}e9"
        print(f"{label}: logits differ by {agree(models, device):.1e} of their norm", flush=True)
        for what, task in tasks(sizes, device).items():
            found = measured(models, task, rounds)
            runs += [(label, what, side, turn, round(x, 2)) for side, xs in found.items() if not isinstance(xs, str)
                     for turn, x in enumerate(xs)]  # fmt: skip
            best = {side: xs if isinstance(xs, str) else statistics.median(xs) for side, xs in found.items()}
            ratios = [quotient(best[KERNELS], best[side]) for side in (TWINS, THEIRS)]
            shown = [x if isinstance(x, str) else round(x, 1) for x in best.values()]
            rows.append((label, what, *shown, "tokens/s", *ratios))
            print(*rows[-1], sep=" | ", flush=True)
        del models
    return rows, runs


def quotient(a: float | str, b: float | str) -> float | str:
    return "-" if isinstance(a, str) or isinstance(b, str) else round(a / b, 2)


def context_rows(sizes: Sizes, device: torch.device, lengths: list[int]) -> list[Any]:
    """Prefills of the hybrid with our kernels, the first also without; a short one before loads and compiles."""
    model = made("hybrid", sizes, device)["ours"]
    rows = []
    for length in lengths:
        for side in (KERNELS, TWINS)[: 2 if length == lengths[0] else 1]:
            with only(*SIDES[side]):
                prefilled(model, prompt(300, VOCABULARY).to(device))
                rows.append((length, side, *long_prefill(model, length, device)))
            print(*rows[-1], sep=" | ", flush=True)
    return rows


def long_prefill(model: nn.Module, length: int, device: torch.device) -> tuple[float | str, float | str]:
    """Tokens per second, and GiB at the peak above what there was before; those are the GPU's, or 0."""
    ids = prompt(length, VOCABULARY).to(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        took = seconds(lambda: prefilled(model, ids), device)
    except torch.OutOfMemoryError:
        return "not enough memory", "-"
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0
    return round(length / took, 1), round(peak / 2**30, 2)


def load_rows(checkpoint: Path, device: torch.device, rounds: int) -> list[Any]:
    """`from_megatron` of a checkpoint that is in the page cache, and plain copies of its model's bytes."""
    warm(checkpoint)
    size = sum(t.numel() * t.element_size() for t in megahf.from_megatron(checkpoint, device_map=device).parameters())
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(1)
    sources = {"copy of pinned memory": pinned, "copy of pageable memory": torch.ones(size, dtype=torch.uint8)}
    target = torch.empty(size, dtype=torch.uint8, device=device)
    calls: dict[str, Callable[[], object]] = {
        name: lambda source=source: target.copy_(source) for name, source in sources.items()
    }
    for words, checked in (("", True), (", checksums=False", False)):
        calls[f"from_megatron{words}"] = lambda checked=checked: megahf.from_megatron(
            checkpoint, device_map=device, checksums=checked
        )
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    rows = [(name, round(size / 1e9, 2), round(min(took), 3), round(size / 1e9 / min(took), 2))
            for name, took in times.items()]  # fmt: skip
    for row in rows:
        print(*row, sep=" | ", flush=True)
    return rows


def load(options: argparse.Namespace, device: torch.device) -> list[Any]:
    """Of the checkpoint that is named, or one made for it; dry of a sample of ours."""
    if options.dry:
        sample = Path(megahf.__file__).parent / "samples/globe"
        return load_rows(options.checkpoint or sample, device, 1)
    if options.checkpoint:
        return load_rows(options.checkpoint, device, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        script, target = Path(__file__).with_name("make_checkpoint.py"), Path(folder) / "checkpoint"
        subprocess.run([sys.executable, str(script), str(target), "--gb", str(options.gb)], check=True)
        return load_rows(target, device, options.rounds)


def recorded(question: str, columns: tuple[str, ...], rows: list[Any], runs: list[Any], facts: list[str]) -> Path:
    facts = [f"command: `{command('--checkpoint')}`", f"GPU: {torch.cuda.get_device_name()}", *facts]
    facts += [f"hardware: {machine()}", f"versions: {versions('megahf', 'torch', 'transformers', 'triton')}"]
    page = f"# Whole models on a GPU: {question}\n\n{markdown(columns, rows)}"
    return write(f"gpu_{question}", runs, page, facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=("models", "context", "load"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**17, 2**20])
    parser.add_argument("--gb", type=float, default=16)
    parser.add_argument("--checkpoint", type=Path, help="one of yours, to load instead of one that is made")
    parser.add_argument("--dry", action="store_true", help="in small sizes, on any machine; nothing is written")
    options = parser.parse_args(arguments)
    if not options.dry and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device: give --dry to see that it runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = DRY if options.dry else Sizes()
    facts: list[str] = []
    if options.question == "models":
        columns, (rows, runs) = COLUMNS, model_rows(sizes, device, 1 if options.dry else options.rounds)
        runs = [("model", "what", "who", "round", "tokens/s"), *runs]
        facts = [f"medians of {options.rounds} rounds, taking turns, batch 1, bfloat16; every round is in the csv"]
    elif options.question == "context":
        columns, rows = CONTEXT, context_rows(sizes, device, [40, 80] if options.dry else options.lengths)
        runs, facts = [columns, *rows], [f"{sizes.pattern}, width {sizes.width}, bfloat16, batch 1, with its cache"]
    else:
        columns, rows = LOADED, load(options, device)
        runs, facts = [columns, *rows], [f"the least of {options.rounds} rounds; the checkpoint is in the page cache"]
    if not options.dry:
        print(f"wrote {recorded(options.question, columns, rows, runs, facts).relative_to(RESULTS.parent)}")


if __name__ == "__main__":
    main()
