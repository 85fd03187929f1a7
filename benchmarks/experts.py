"""Mixtures of experts on the CPU: `McoreGPTForCausalLM` against transformers' own models with the same weights.

0.6 billion parameters in Mixtral's shape (8 experts, 2 a token) and in Qwen3-MoE's (128 small experts, 8 a token).
Tokens per second of prefill and decode, in one process, all taking turns: ours as it comes, theirs with each of its
implementations of experts, of which the quickest counts. Prints a table and writes
`results/experts_<hardware>_<date>.{csv,md}`.

    python benchmarks/experts.py [--rounds 3] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import mirror
from measure import decode, prefill, prompt, turns
from record import command, machine, markdown, versions, write

PROMPT = 128  # tokens before those that are decoded
AGREE = 1e-4  # float32 logits, of about 1
HOPELESS = 1.3  # times slower than the quickest of theirs in the first round: out of the others
# batched_mm copies a matrix for every token and expert: 90 GB of them at 2048 tokens.
THEIRS = {"prefill": ("grouped_mm", "eager"), "decode": ("grouped_mm", "batched_mm", "eager")}
COLUMNS = ("model", "what", "dtype", "transformers", "its best", "mcore", "ratio", "unit")
RUNS = ("model", "what", "dtype", "who", "round", "tokens/s")
COMMON = {"vocab_size": 16384, "tie_word_embeddings": False, "max_position_embeddings": 4096}


def mixtral(layers: int) -> PreTrainedModel:
    sizes = {
        "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 4,
        "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    }  # fmt: skip
    return MixtralForCausalLM(MixtralConfig(**COMMON, **sizes, num_hidden_layers=layers)).eval()


def qwen3(layers: int) -> PreTrainedModel:
    sizes = {
        "hidden_size": 768, "moe_intermediate_size": 256, "num_attention_heads": 12, "num_key_value_heads": 2,
        "head_dim": 64, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **sizes, num_hidden_layers=layers)).eval()


MODELS: dict[str, tuple[Callable[[int], PreTrainedModel], int]] = {  # layers for 0.6 billion parameters
    "Mixtral: 8 experts of 3584, 2 a token": (mixtral, 6),
    "Qwen3-MoE: 128 experts of 256, 8 a token": (qwen3, 8),
}


def measured(task: str, model: PreTrainedModel, size: int, implementation: str | None) -> float:
    """Tokens per second: of `size` of a prompt, or of the median of `size` steps after one."""
    if implementation is not None:
        model.set_experts_implementation(implementation)
    if task == "prefill":
        return size / prefill(model, prompt(size, COMMON["vocab_size"]))
    return 1 / statistics.median(decode(model, prompt(PROMPT, COMMON["vocab_size"]), size))


def compare(
    theirs: PreTrainedModel, ours: PreTrainedModel, task: str, size: int, rounds: int
) -> dict[str, list[float]]:
    """Tokens per second of ours and of each of their implementations: a round to warm up and to choose, then those."""
    calls: dict[str, Callable[[], float]] = {"mcore": partial(measured, task, ours, size, None)}
    calls |= {name: partial(measured, task, theirs, size, name) for name in THEIRS[task]}
    first = {name: speeds[0] for name, speeds in turns(calls, 1).items()}
    least = max(first[name] for name in THEIRS[task]) / HOPELESS
    return turns({name: call for name, call in calls.items() if name == "mcore" or first[name] >= least}, rounds)


@torch.no_grad()
def agree(theirs: PreTrainedModel, ours: PreTrainedModel) -> float:
    """The largest difference of logits; ends the run where the models are not the same."""
    tokens = prompt(64, COMMON["vocab_size"])
    difference = (theirs(tokens).logits - ours(tokens).logits).abs().max().item()
    if theirs.dtype == torch.float32 and difference > AGREE:
        sys.exit(f"the logits differ by {difference:.1e}: these are not the same model")
    return difference


@torch.no_grad()
def speed(name: str, layers: int | None, tasks: list[tuple[str, int]], rounds: int) -> tuple[list[Any], list[Any]]:
    """Rows of the table and all runs, of one model; the fastest of every side's rounds: others only slow it down."""
    make, depth = MODELS[name]
    torch.manual_seed(0)
    theirs = make(layers or depth)
    rows, runs = [], []
    for dtype in (torch.float32, torch.bfloat16):
        theirs = theirs.to(dtype)
        ours = mirror.gpt(theirs)
        print(f"{name}, {ours.num_parameters() / 1e9:.2f}e9 parameters, {dtype}: largest difference of logits "
              f"{agree(theirs, ours):.1e}", flush=True)  # fmt: skip
        for task, size in tasks:
            speeds = compare(theirs, ours, task, size, rounds)
            what = f"prefill {size}" if task == "prefill" else f"decode {size} after {PROMPT}"
            label = (name, what, str(dtype)[6:])
            runs += [(*label, who, turn, round(x, 2)) for who, xs in speeds.items() for turn, x in enumerate(xs)]
            fastest = {who: max(xs) for who, xs in speeds.items()}
            mcore = fastest.pop("mcore")
            best = max(fastest, key=lambda who: fastest[who])
            ratio = round(mcore / fastest[best], 3)
            rows.append((*label, round(fastest[best], 1), best, round(mcore, 1), ratio, "tokens/s"))
            print(*rows[-1], flush=True)
    return rows, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="short, and nothing written: to see that it runs")
    options = parser.parse_args()
    tasks = [("prefill", 512), ("prefill", 2048), ("decode", 64)]
    rows, runs = [], []
    for name in MODELS:
        if options.quick:
            speed(name, 1, [("prefill", 128), ("decode", 4)], 1)
            continue
        more = speed(name, None, tasks, options.rounds)
        rows, runs = rows + more[0], runs + more[1]
    if options.quick:
        return
    title = "# Mixtures of experts on the CPU: McoreGPTForCausalLM and transformers' own models, same weights"
    facts = (
        f"command: `{command()}`",
        f"threads: {torch.get_num_threads()}; the fastest of {options.rounds} rounds, taking turns; every round is in "
        f"the csv",
        f"hardware: {machine()}",
        f"versions: {versions('megahf', 'torch', 'transformers')}",
    )
    page = f"{title}\n\n{markdown(COLUMNS, rows)}"
    print(f"wrote {write('experts', [RUNS, *runs], page, facts)}")


if __name__ == "__main__":
    main()
