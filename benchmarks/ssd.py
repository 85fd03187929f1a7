"""The Mamba mixers on the CPU against transformers' torch path with the same weights, in one process, taking turns.

Prefill of 4,096 and 32,768 tokens into a cache, steps of decoding after it, a training step; and the peak memory of
a prefill, each in a process of its own. Mamba-2 against NemotronH's mixer, Mamba-1 against Mamba's. Prints a table
and writes `results/ssd_<hardware>_<date>.{csv,md}`.

    python benchmarks/ssd.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, MambaConfig, NemotronHConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.mamba.modeling_mamba import MambaMixer as TheirMamba1
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer as TheirMamba2

from megahf.models.mamba import MambaMixer
from megahf.models.mamba1 import Mamba1Mixer

sys.path.insert(0, str(Path(__file__).parent))
from measure import in_child, peak
from record import command, machine, markdown, versions, write

DECODE = 64  # tokens of a decode measurement
COLUMNS = ("mixer", "what", "transformers", "mcore", "ratio", "unit")
SIZES = {  # hidden size, heads, groups
    "Mamba-2 130M: 768, 24 heads, 1 group": (768, 24, 1),
    "Mamba-2: 2048, 64 heads, 8 groups": (2048, 64, 8),
    "Mamba-1 130M: 768": (768, None, None),
}
Pair = tuple[nn.Module, nn.Module, PreTrainedConfig]


def pair(size: str) -> Pair:
    """Theirs and ours with the same weights, and a configuration for the cache; without the norm before."""
    hidden, heads, groups = SIZES[size]
    torch.manual_seed(0)
    shared = {
        "hidden_size": hidden, "normalization": "RMSNorm", "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_proj_bias": False,
        "mamba_conv_bias": True,
    }  # fmt: skip
    ours: nn.Module
    if heads is None:
        ours = Mamba1Mixer(SimpleNamespace(**shared, mamba_state_dim=16, mamba_dt_rank=None), 0)
        config = MambaConfig(hidden_size=hidden, num_hidden_layers=1, use_mambapy=False)
        theirs = TheirMamba1(config, 0)
    else:
        sizes = {"mamba_state_dim": 128, "mamba_head_dim": 64, "mamba_num_heads": heads, "mamba_num_groups": groups}
        options = {"mamba_chunk_size": 128, "mamba_d_has_hdim": False, "mamba_rms_norm": True}
        ours = MambaMixer(SimpleNamespace(**shared, **sizes, **options), 0)
        config = NemotronHConfig(
            hidden_size=hidden, mamba_num_heads=heads, mamba_head_dim=64, ssm_state_size=128, n_groups=groups,
            layers_block_type=["mamba"], time_step_min=1e-30, layer_norm_epsilon=1e-5,
        )  # fmt: skip
        theirs = TheirMamba2(config, 0)
    ours.in_proj_layernorm = nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours, config


def call(mixer: nn.Module, hidden: Tensor, cache: DynamicCache | None) -> Tensor:
    name = "past_key_values" if isinstance(mixer, (MambaMixer, Mamba1Mixer)) else "cache_params"
    return mixer(hidden, **{name: cache})


@torch.no_grad()
def prefill(mixer: nn.Module, hidden: Tensor, config: PreTrainedConfig) -> float:
    """Seconds of `[1, s, h]` into an empty cache."""
    cache = DynamicCache(config=config)
    start = time.perf_counter()
    call(mixer, hidden, cache)
    return time.perf_counter() - start


@torch.no_grad()
def decode(mixer: nn.Module, hidden: Tensor, config: PreTrainedConfig) -> float:
    """Median seconds of a step after a short prefill."""
    cache, times = DynamicCache(config=config), []
    call(mixer, hidden[:, :64], cache)
    for _ in range(DECODE):
        start = time.perf_counter()
        call(mixer, hidden[:, :1], cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def train(mixer: nn.Module, hidden: Tensor, config: PreTrainedConfig) -> float:
    """Seconds of a forward and a backward."""
    start = time.perf_counter()
    call(mixer, hidden, None).sum().backward()
    return time.perf_counter() - start


def compare(size: str, tasks: list[tuple[str, Callable[..., float], int]], rounds: int) -> list[tuple[object, ...]]:
    """The least of every side's seconds: what others did on the machine meanwhile only adds."""
    theirs, ours, config = pair(size)
    hidden = torch.randn(1, 512, config.hidden_size)
    with torch.no_grad():
        difference = (call(theirs, hidden, None) - call(ours, hidden, None)).abs().max().item()
    print(f"{size}: largest difference {difference:.1e}", flush=True)
    rows: list[tuple[object, ...]] = []
    for what, measure, length in tasks:
        hidden = torch.randn(1, length, config.hidden_size)
        times = [(measure(theirs, hidden, config), measure(ours, hidden, config)) for _ in range(rounds)]
        slow, fast = (min(side) * 1000 for side in zip(*times, strict=True))
        rows.append((size, what, round(slow, 2), round(fast, 2), round(slow / fast, 2), "ms"))
        print(*rows[-1], flush=True)
    return rows


@torch.no_grad()
def memory_of(size: str, which: str, length: int) -> None:
    """Child process: MiB that a prefill takes at its peak."""
    theirs, ours, config = pair(size)
    mixer, hidden = ours if which == "mcore" else theirs, torch.randn(1, length, config.hidden_size)
    call(mixer, hidden[:, :256], None)
    print(peak(lambda: call(mixer, hidden, DynamicCache(config=config))))


def memory(size: str, length: int) -> list[tuple[object, ...]]:
    """The peaks at a length, and ours at twice that."""
    sides = (("transformers", length), ("mcore", length), ("mcore", 2 * length))
    theirs, ours, twice = (in_child(size, *side) for side in sides)
    if theirs is None or ours is None or twice is None:
        sys.exit("a measurement of memory did not end well")
    rows: list[tuple[object, ...]] = [
        (size, f"peak of a prefill of {length}", theirs, ours, round(theirs / ours, 2), "MiB"),
        (size, f"peak of a prefill of {2 * length}", "-", twice, "-", "MiB"),
    ]
    for row in rows:
        print(*row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="short, and nothing written: to see that it runs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        memory_of(options.child[0], options.child[1], int(options.child[2]))
        return
    small, large, old = SIZES
    lengths = [256, 512, 128] if options.quick else [4096, 32768, 1024]
    short, long, some = lengths
    both = [
        (f"prefill {short}", prefill, short),
        ("decode step", decode, 64),
        (f"training step of {some}", train, some),
    ]
    rows = compare(small, [*both, (f"prefill {long}", prefill, long)], options.rounds)
    rows += compare(large, both, options.rounds)
    rows += compare(old, both[:2], options.rounds)  # their backward takes the square of the tokens
    rows += memory(small, long)
    if options.quick:
        return
    title = "# Mamba mixers on the CPU: megahf's and transformers' torch path, same weights, float32"
    named = versions("megahf", "torch", "transformers")
    threads = f"threads: {torch.get_num_threads()}; the least of {options.rounds} rounds, taking turns"
    facts = (f"command: `{command()}`", threads, f"hardware: {machine()}", f"versions: {named}")
    page = f"{title}\n\n{markdown(COLUMNS, rows)}"
    print(f"wrote {write('ssd', [COLUMNS, *rows], page, facts)}")


if __name__ == "__main__":
    main()
