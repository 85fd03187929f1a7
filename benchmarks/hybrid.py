"""A hybrid on the CPU: `McoreHybridForCausalLM` against transformers' NemotronH (torch path) with the same weights.

120 million parameters: Mamba-2 mixers, MLPs and an attention. Tokens per second of prefill and decode, in one process,
the two models taking turns. With `--memory` instead the peak memory of one forward, of which the last position's
logits are kept, each in a process of its own: of a small hybrid at 32,768 and 65,536 tokens. Prints a table and writes
`results/hybrid_<hardware>_<date>.{csv,md}` (`hybrid_memory_...`).

    python benchmarks/hybrid.py [--rounds 3] [--memory] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
import mirror
from measure import decode, in_child, peak, prefill, prompt, turns
from record import command, machine, markdown, versions, write

VOCABULARY = 49152
PROMPT = 128  # tokens before those that are decoded
AGREE = 1e-4  # float32 logits, of about 1
LARGE = ("M-M-M*-M-M-", 768)  # layers and hidden size
SMALL = ("M-M*-", 512)
COLUMNS = ("what", "dtype", "NemotronH", "mcore", "ratio", "unit")
RUNS = ("what", "dtype", "who", "round", "tokens/s")
MEMORY = ("peak of a forward", "NemotronH", "mcore", "unit")


def nemotron(pattern: str, width: int, dtype: torch.dtype) -> PreTrainedModel:
    """NemotronH with random weights, whose time steps are drawn as its default is, 0.001 to 0.1.

    It holds those of a prefill above `time_step_min` too, which neither Megatron does nor its own decoding.
    """
    config = NemotronHConfig(
        hybrid_override_pattern=pattern, vocab_size=VOCABULARY, hidden_size=width, intermediate_size=4 * width,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, head_dim=64, mamba_num_heads=width // 32,
        mamba_head_dim=64, n_groups=1, max_position_embeddings=2**17,
    )  # fmt: skip
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).to(dtype).eval()
    for layer, symbol in zip(model.model.layers, pattern, strict=True):
        if symbol == "M":
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


@torch.no_grad()
def agree(theirs: PreTrainedModel, ours: PreTrainedModel) -> float:
    """The largest difference of logits; ends the run where the models are not the same."""
    tokens = prompt(300, VOCABULARY)
    difference = (theirs(tokens).logits - ours(tokens).logits).abs().max().item()
    if theirs.dtype == torch.float32 and difference > AGREE:
        sys.exit(f"the logits differ by {difference:.1e}: these are not the same model")
    return difference


def measured(task: str, model: PreTrainedModel, size: int) -> float:
    """Tokens per second: of `size` of a prompt, or of the median of `size` steps after one."""
    if task == "prefill":
        return size / prefill(model, prompt(size, VOCABULARY))
    return 1 / statistics.median(decode(model, prompt(PROMPT, VOCABULARY), size))


@torch.no_grad()
def speed(dtype: torch.dtype, tasks: list[tuple[str, int, int]]) -> tuple[list[Any], list[Any]]:
    """Rows of the table and all runs; the fastest of each side's rounds: others only slow it down."""
    theirs = nemotron(*LARGE, dtype)
    ours = mirror.hybrid(theirs)
    print(f"{ours.num_parameters() / 1e6:.0f}e6 parameters, {dtype}: largest difference of logits "
          f"{agree(theirs, ours):.1e}", flush=True)  # fmt: skip
    rows, runs = [], []
    for task, size, rounds in tasks:
        calls = {"NemotronH": partial(measured, task, theirs, size), "mcore": partial(measured, task, ours, size)}
        speeds = turns(calls, rounds)
        label = (f"prefill {size}" if task == "prefill" else f"decode {size} after {PROMPT}", str(dtype)[6:])
        runs += [(*label, who, turn, round(x, 2)) for who, xs in speeds.items() for turn, x in enumerate(xs)]
        slow, fast = (max(speeds[who]) for who in ("NemotronH", "mcore"))
        rows.append((*label, round(slow, 1), round(fast, 1), round(fast / slow, 3), "tokens/s"))
        print(*rows[-1], flush=True)
    return rows, runs


@torch.no_grad()
def memory_of(which: str, length: int) -> None:
    """Child process: MiB that a forward takes at its peak."""
    model = nemotron(*SMALL, torch.float32)
    if which == "mcore":
        model = mirror.hybrid(model)
    model(prompt(300, VOCABULARY), logits_to_keep=1)
    tokens = prompt(length, VOCABULARY)
    print(peak(lambda: model(tokens, logits_to_keep=1)))


def memory(length: int) -> list[tuple[object, ...]]:
    """The peaks at a length and at twice that, NemotronH's at the first alone, and the ratio of the two."""
    theirs, ours, twice = in_child("nemotron", length), in_child("mcore", length), in_child("mcore", 2 * length)
    if ours is None or twice is None:
        sys.exit("a measurement did not end well")
    rows: list[tuple[object, ...]] = [
        (f"{length} tokens", "-" if theirs is None else theirs, ours, "MiB"),
        (f"{2 * length} tokens", "-", twice, "MiB"),
        ("ratio", "-", round(twice / ours, 3), ""),
    ]
    for row in rows:
        print(*row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="the peak memory of a small one instead")
    parser.add_argument("--quick", action="store_true", help="short, and nothing written: to see that it runs")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory_of(options.child[0], int(options.child[1]))
        return
    if options.memory:
        what, columns = "hybrid_memory", MEMORY
        rows = memory(1024 if options.quick else 32768)
        table = [MEMORY, *rows]
    else:
        what, columns = "hybrid", COLUMNS
        short, long, steps = (256, 512, 8) if options.quick else (4096, 32768, 64)
        both = [("prefill", short, options.rounds), ("decode", steps, options.rounds)]
        rows, runs = speed(torch.float32, [*both, ("prefill", long, 1)])
        more = speed(torch.bfloat16, [("prefill", short // 4, options.rounds), both[1]])
        rows, table = rows + more[0], [RUNS, *runs, *more[1]]
    if options.quick:
        return
    title = "# A hybrid on the CPU: McoreHybridForCausalLM and transformers' NemotronH, same weights"
    rounds = f"; the fastest of {options.rounds} rounds, taking turns, of the longest prefill of one"
    facts = (
        f"command: `{command()}`",
        f"threads: {torch.get_num_threads()}{'' if options.memory else rounds}",
        f"hardware: {machine()}",
        f"versions: {versions('megahf', 'torch', 'transformers')}",
    )
    page = f"{title}\n\n{markdown(columns, rows)}"
    print(f"wrote {write(what, table, page, facts)}")


if __name__ == "__main__":
    main()
