"""Memory of one forward over a long context on the CPU: our GPT and hybrid, and transformers' Llama and NemotronH.

Peak memory above the weights, each point in a process of its own, of which the last position's logits are kept; rows
with five places of padding on the left, for which transformers builds a mask over the square of the sequence. The same
small models, with the same weights. A point that would not fit the machine's memory, by twice the growth of the two
before it, is not run, and said so. The exponent is that of the line through the points' logarithms. Prints a table and
writes `results/long_context_<hardware>_<date>.{csv,md}`.

    python benchmarks/long_context.py [--lengths 16384 32768 65536 131072] [--theirs 4096 8192 16384 32768] [--quick]
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
import mirror
from hybrid import nemotron
from measure import in_child, peak, prompt
from record import command, machine, markdown, versions, write

VOCABULARY = 49152
PADDING = 5  # places on the left
WIDTH, LAYERS = 128, 2
PATTERN = "M-M*-"  # of the hybrid
OURS, THEIRS = ("mcore GPT", "mcore hybrid"), ("Llama", "NemotronH")
CHUNKS = 4096  # tokens at once of the chunked prefill
MODES = ("whole", "padded", "chunks", "loss")
WORDS = {
    "whole": "no padding",
    "padded": f"{PADDING} padded on the left",
    "chunks": f"padded, after a cache by {CHUNKS}",
    "loss": "loss and gradients in chunks",
}
COLUMNS = ("model", "case", "tokens", "peak above weights", "unit")


def llama() -> PreTrainedModel:
    """A small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2**18, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def model_of(name: str) -> PreTrainedModel:
    theirs = llama() if name in ("Llama", "mcore GPT") else nemotron(PATTERN, 256, torch.float32)
    if name in THEIRS:
        return theirs
    return mirror.gpt(theirs) if name == "mcore GPT" else mirror.hybrid(theirs)


def run(model: PreTrainedModel, mode: str, length: int) -> None:
    """One forward over `[1, length]` tokens, or a training step's forward and backward."""
    ids = prompt(length, VOCABULARY)
    mask = None if mode == "whole" else (torch.arange(length) >= PADDING).long()[None]
    if mode == "loss":
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        return
    with torch.no_grad():
        if mode != "chunks":
            model(ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
            return
        cache = None
        for start in range(0, length, CHUNKS):
            end, seen = start + CHUNKS, None if mask is None else mask[:, : start + CHUNKS]
            out = model(ids[:, start:end], attention_mask=seen, past_key_values=cache, logits_to_keep=1, use_cache=True)
            cache = out.past_key_values


def memory_of(name: str, mode: str, length: int) -> None:
    """Child process: MiB that a run takes at its peak, what stays of a cache included."""
    model = model_of(name)
    if mode == "loss":
        model.config.loss_chunk_size = 1024
        for module in model.train().modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.0  # no CPU kernel drops: torch would make all scores
    run(model, mode, 300)
    model.zero_grad()
    print(peak(lambda: run(model, mode, length)))


def available() -> int:
    """MiB that the machine could give."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2**20


def points(name: str, mode: str, lengths: list[int]) -> list[tuple[int, int | None]]:
    """The peak at each length; None where it was not run, or its process died."""
    found: list[tuple[int, int | None]] = []
    for length in lengths:
        last = [size for _, size in found[-2:] if size is not None]
        growth = last[-1] / max(last[-2], 1) if len(last) == 2 else 4.0
        if found and (len(last) < min(2, len(found)) or last[-1] * growth * 1.25 > available()):
            found.append((length, None))
            print(f"{name}, {WORDS[mode]}: {length} tokens are not run, they would take more memory than there is")
            continue
        found.append((length, in_child(name, mode, length)))
        print(name, WORDS[mode], *found[-1], flush=True)
    return found


def exponent(found: list[tuple[int, int | None]]) -> float:
    """Of the least squares line through the logarithms of lengths and peaks."""
    xy = [(math.log(length), math.log(max(size, 1))) for length, size in found if size is not None]
    if len(xy) < 2:
        return math.nan
    x, y = (sum(values) / len(xy) for values in zip(*xy, strict=True))
    return sum((a - x) * (b - y) for a, b in xy) / sum((a - x) ** 2 for a, _ in xy)


def table(lengths: list[int], theirs: list[int]) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Rows of the page, a series each, and all points."""
    series = [(name, mode, theirs if mode == "loss" else lengths) for name in OURS for mode in MODES]
    series += [(name, "whole", lengths if name == "Llama" else theirs) for name in THEIRS]
    series += [(name, "padded", theirs) for name in THEIRS]
    rows: list[tuple[object, ...]] = []
    runs: list[tuple[object, ...]] = []
    for name, mode, sizes in series:
        found = points(name, mode, sizes)
        said = ", ".join(f"{length}: {'not run' if size is None else size}" for length, size in found)
        rows.append((name, WORDS[mode], said, f"{exponent(found):.2f}"))
        runs += [(name, WORDS[mode], length, "" if size is None else size, "MiB") for length, size in found]
    return rows, runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**14, 2**15, 2**16, 2**17])
    parser.add_argument(
        "--theirs", type=int, nargs="+", default=[2**12, 2**13, 2**14, 2**15], help="transformers' and training's"
    )
    parser.add_argument("--quick", action="store_true", help="short, and nothing written: to see that it runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory_of(options.child[0], options.child[1], int(options.child[2]))
        return
    short = [1024, 2048]
    rows, runs = table(*((short, short) if options.quick else (options.lengths, options.theirs)))
    if options.quick:
        return
    page = "# Memory of a long context on the CPU: our models and transformers', same weights\n\n" + markdown(
        ("model", "case", "MiB above the weights, by tokens", "exponent"), rows
    )
    facts = (
        f"command: `{command()}`",
        f"GPT and Llama: {LAYERS} layers of width {WIDTH}; hybrids: {PATTERN}, width 256; float32, batch 1",
        f"threads: {torch.get_num_threads()}",
        f"hardware: {machine()}",
        f"versions: {versions('megahf', 'torch', 'transformers')}",
    )
    print(f"wrote {write('long_context', [COLUMNS, *runs], page, facts)}")


if __name__ == "__main__":
    main()
