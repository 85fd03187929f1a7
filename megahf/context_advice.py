"""`inspect --context`: what a long context takes of each GPU's memory, which context parallel size fits, which flags.

Weights, keys and values and states follow from the config to the byte. Activations are an estimate, in sixteen bits
with fused attention and no mask: the inputs of each layer's matrices, kept for the backward or, recomputed, those of
one layer. Training counts as Megatron's does: gradients and a copy of the weights in fp32, two moments, the optimizer
distributed. What a framework, its buffers and fragments of memory take is in none of it: `MARGIN` leaves room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd, prod
from typing import Any

from .cuts import Config, convolved, in_proj, mixer_width
from .errors import refuse
from .families.windows import flags, tokens
from .rows import has_attention, has_mixer, is_bert, is_dense, is_hybrid, is_moe, language
from .tensor_sizes import even_ranks
from .weights import weights

Report = dict[str, Any]
HALF, FULL = 2, 4  # bytes of a number in sixteen bits, in float32
MARGIN = 0.9  # of a GPU's memory that is planned with
MODES = ("run", "train")
OPTIMIZER = 12  # bytes a weight: its copy in fp32, two moments
LOGITS = HALF + 2 * FULL  # bytes a logit: itself, in fp32, its gradient
NO_MASK = "--no-create-attention-mask-in-dataloader"
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


def advise(config: Config, context: int, gpus: int = 1, memory: int = 80 * 10**9) -> Report:
    """What `inspect --context --json` says under `context`: plain data, sizes in bytes.

    Args:
        config: of the whole model.
        context: tokens of one sequence.
        gpus: how many there are; tensor and context parallel ranks together divide them.
        memory: bytes of each.

    Raises:
        Refused: a context that the model cannot have.
    """
    check(config, context, gpus)
    model, notes = language(config), []
    splits = []
    for cp in (size for size in range(1, gpus + 1) if gpus % size == 0):
        reasons = [obstacle(model, context, cp, tp) for tp in even_ranks(config) if gpus % (cp * tp) == 0]
        if reasons and all(reasons):
            notes.append(f"context parallel size {cp}: {reasons[0]}")
        splits += [
            split(config, context, gpus, memory, cp, tp)
            for tp in even_ranks(config)
            if gpus % (cp * tp) == 0 and not obstacle(model, context, cp, tp)
        ]
    best = {mode: smallest(splits, mode) for mode in MODES}
    return {
        "tokens": context,
        "gpus": gpus,
        "gpu_memory": memory,
        "kv_bytes_per_token": sum(cached(model, layer) for layer in range(model.num_layers)),
        "state_bytes": states(model),
        "splits": splits,
        **{mode: chosen and {name: chosen[name] for name in ("cp", "tp", "ep")} for mode, chosen in best.items()},
        "flags": {mode: megatron_flags(model, context, best[mode], mode) for mode in MODES},
        "notes": [*notes, *remarks(model, context)],
    }


def check(config: Config, context: int, gpus: int) -> None:
    model = language(config)
    if is_bert(config):
        raise refuse("BERT has no long context: Megatron's has no context parallelism", "--context", "leave it out")
    if context < 1 or gpus < 1:
        raise refuse(f"{context} tokens on {gpus} GPUs", "--context, --gpus", "both are at least 1")
    limit = model.max_position_embeddings
    if model.position_embedding_type == "learned_absolute" and context > limit:
        what = f"{context} tokens, but the model has learned {limit} positions"
        raise refuse(what, "--context", f"at most {limit}, or train with more")


def obstacle(config: Config, context: int, cp: int, tp: int) -> str:
    """Why Megatron cannot have so many context parallel ranks; empty if it can."""
    if cp > 1 and context % (2 * cp):
        return f"{context} tokens are not divisible by {2 * cp} (two slices a rank)"
    if cp > 1 and has_sinks(config):
        heads, groups = (max(1, n // tp) for n in (config.num_attention_heads, config.num_query_groups))
        if heads % cp or groups % cp:
            return f"attention sinks have ranks share out heads, and {heads} with {groups} keys do not over {cp}"
    if not is_hybrid(config) or "M" not in config.hybrid_layer_pattern or config.mamba_version != 2 or cp == 1:
        return ""
    heads, groups = config.mamba_num_heads // tp, config.mamba_num_groups // tp
    if heads % cp:
        return f"{heads} Mamba heads do not share out over {cp}"
    return "" if groups % cp == 0 or cp % groups == 0 else f"{groups} Mamba groups and {cp} do not divide one another"


def split(config: Config, context: int, gpus: int, memory: int, cp: int, tp: int) -> Report:
    """What each GPU holds with so many context and tensor parallel ranks."""
    model, ep = language(config), gcd(language(config).num_experts or 1, cp * tp)
    here = -(-context // cp)  # tokens of a rank
    window = tokens(model.window_size)
    keys = 0
    for layer, slides in enumerate(flags(model)):
        held = min(here, window) if slides and window else here
        keys += held * cached(model, layer) // (1 if model.multi_latent_attention else min(tp, model.num_query_groups))
    common = {
        "weights": HALF * sum(size for size, _ in shares(config, tp, ep)),
        "kv": keys,
        "states": states(model) // tp,
    }
    kept = [HALF * stored(model, layer) for layer in range(model.num_layers)]
    stream = HALF * model.hidden_size
    run = {**common, "activations": here * (2 * stream + max(kept) // tp)}
    # The optimizer is distributed over all ranks that have the same weights.
    train = {
        "weights": common["weights"],
        "gradients": FULL * sum(size for size, _ in shares(config, tp, ep)),
        "optimizer": OPTIMIZER * sum(size * ranks // gpus for size, ranks in shares(config, tp, ep)),
        "logits": here * LOGITS * model.vocab_size // tp,
        "activations": here * sum(kept) // tp,
    }
    room = int(memory * MARGIN)
    if recompute := sum(train.values()) > room:
        train["activations"] = here * (stream * model.num_layers + max(kept)) // tp
    sizes: dict[str, Any] = {"run": run, "train": train}
    for made in sizes.values():
        made["total"] = sum(made.values())
        made["fits"] = made["total"] <= room
    train["recompute"] = recompute
    return {"cp": cp, "tp": tp, "ep": ep, "dp": gpus // (cp * tp), "tokens_per_gpu": here, **sizes}


def shares(config: Config, tp: int, ep: int) -> Iterator[tuple[int, int]]:
    """Of each weight the numbers that a rank holds, and over how many ranks different parts of it lie."""
    for weight in weights(config):
        ranks = ep if weight.row.experts else tp if weight.row.cut.dim is not None else 1
        yield prod(weight.shape) // ranks, ranks


def cached(config: Config, layer: int) -> int:
    """Bytes of a token's keys and values in one layer; of multi-latent attention its latent and its one key."""
    if not has_attention(config, layer):
        return 0
    if config.multi_latent_attention:
        return HALF * (config.kv_lora_rank + config.qk_pos_emb_head_dim)
    return 2 * HALF * config.num_query_groups * config.kv_channels


def states(config: Config) -> int:
    """Bytes of a sequence's states in all mixers, whatever its length: the convolutions' last inputs, the sums."""
    if not is_hybrid(config):
        return 0
    one = FULL * (sum(convolved(config)) * config.mamba_d_conv + mixer_width(config) * config.mamba_state_dim)
    return one * config.hybrid_layer_pattern.count("M")


def stored(config: Config, layer: int) -> int:
    """Numbers a token that one layer's backward needs: inputs of its norms, matrices and activation functions."""
    h, gated = config.hidden_size, 2 if config.gated_linear_unit else 1
    kinds: list[tuple[Callable[[Config, int], bool], Callable[[], int]]] = [
        (has_attention, lambda: 2 * h + attended(config)),
        (is_dense, lambda: 2 * h + (gated + 1) * config.ffn_hidden_size),
        (is_moe, lambda: 2 * h + routed(config, gated)),
        (lambda c, n: has_mixer(1)(c, n) or has_mixer(2)(c, n), lambda: 2 * h + mixed(config)),
    ]
    return sum(count() for has, count in kinds if has(config, layer))


def attended(config: Config) -> int:
    """Queries, keys, values and what they find."""
    if config.multi_latent_attention:
        wide = config.qk_head_dim + config.qk_pos_emb_head_dim
        low = (config.q_lora_rank or 0) + config.kv_lora_rank + config.qk_pos_emb_head_dim
        return low + config.num_attention_heads * (2 * wide + 2 * config.v_head_dim)
    return 2 * config.kv_channels * (config.num_attention_heads + config.num_query_groups)


def routed(config: Config, gated: int) -> int:
    """Of a token's experts, with a copy of the token for each, and of the shared ones."""
    each = config.hidden_size + (gated + 1) * config.moe_ffn_hidden_size
    return config.moe_router_topk * each + (gated + 1) * (config.moe_shared_expert_intermediate_size or 0)


def mixed(config: Config) -> int:
    """What comes out of the first matrix and of the convolution, the scan's output, and that normed."""
    return sum(in_proj(config)) + sum(convolved(config)) + 2 * mixer_width(config)


def smallest(splits: list[Report], mode: str) -> Report | None:
    """The split that fits with the fewest ranks, and of those the fewest tensor parallel ones."""
    fitting = [split for split in splits if split[mode]["fits"]]
    key: Callable[[Report], Any] = lambda s: (s["cp"] * s["tp"], s[mode].get("recompute", False), s["tp"])  # noqa: E731
    return min(fitting, key=key, default=None)


def megatron_flags(config: Config, context: int, best: Report | None, mode: str) -> list[str]:
    """Megatron's options for a split; none if nothing fits."""
    if best is None:
        return []
    cp, tp, ep = best["cp"], best["tp"], best["ep"]
    words = [
        "--seq-length",
        str(context),
        "--max-position-embeddings",
        str(max(context, config.max_position_embeddings)),
    ]
    words += [NO_MASK, "--tensor-model-parallel-size", str(tp), "--context-parallel-size", str(cp)]
    words += ["--sequence-parallel"] if tp > 1 else []
    words += ["--transformer-impl", "transformer_engine"] if cp > 1 else []
    words += ["--cp-comm-type", *exchange(config)] if cp > 1 and exchange(config) else []
    words += (
        ["--expert-model-parallel-size", str(ep), "--expert-tensor-parallel-size", "1"] if config.num_experts else []
    )
    if mode == "train":
        words += ["--use-distributed-optimizer", *(RECOMPUTE if best["train"]["recompute"] else [])]
    return words


def has_sinks(config: Config) -> bool:
    """Whether attention layers have one more logit in their softmax."""
    return config.softmax_type != "vanilla" and any(has_attention(config, layer) for layer in range(config.num_layers))


def exchange(config: Config) -> list[str]:
    """How ranks exchange keys where Megatron's usual ring (p2p) refuses to.

    Source: `attn_forward_func_with_cp` of Transformer Engine's pytorch/attention/dot_product_attention.
    """
    return ["a2a"] if has_sinks(config) else ["all_gather"] if any(flags(config)) else []


def remarks(config: Config, context: int) -> list[str]:
    """What the numbers do not say."""
    lines = [f"{NO_MASK}: without it Megatron's loader builds a mask of {amount_of_mask(context)} for each sequence"]
    if config.position_embedding_type != "none" and context > config.max_position_embeddings:
        lines.append(f"trained for {config.max_position_embeddings} positions: {context} are beyond what it has seen")
    lines.append("activations are of a prefill at once: generate(prefill_chunk_size=...) makes them those of a chunk")
    if has_sinks(config):
        lines.append("attention sinks go with Transformer Engine's a2a alone, and its fused attention (cuDNN)")
    elif any(flags(config)):
        lines.append("a sliding window goes with Transformer Engine's all_gather and a2a, not with its ring (p2p)")
    return lines


def amount_of_mask(context: int) -> str:
    """Of `tril(ones(s, s))` in float32, as `GPTDataset._get_ltor_masks_and_position_ids` makes it."""
    return f"{FULL * context * context / 2**30:,.1f} GiB"


def lines(advice: Report) -> Iterator[str]:
    """The advice in words, for the page."""
    gb = 1e9
    yield (
        f"a context of {advice['tokens']:,} tokens on {advice['gpus']} GPUs of {advice['gpu_memory'] / gb:.0f} GB: "
        f"{advice['kv_bytes_per_token']:,} bytes of keys and values a token, {advice['state_bytes']:,} of states"
    )
    for split in advice["splits"]:
        run, train = split["run"], split["train"]
        names = (("weights", "weights"), ("kv", "KV"), ("states", "states"), ("activations", "activations about"))
        parts = ", ".join(f"{words} {run[name] / gb:.2f}" for name, words in names)
        again = ", recomputed" if train["recompute"] else ""
        yield f"  cp {split['cp']} tp {split['tp']}: {parts}: {verdict(run)}; training{again}: {verdict(train)}"
    for mode, words in (("run", "to run it"), ("train", "to train it")):
        best = advice[mode]
        yield f"{words}: " + (
            f"cp {best['cp']}, tp {best['tp']}: {' '.join(advice['flags'][mode])}"
            if best
            else "no split fits; more GPUs, or larger ones"
        )
    yield from (f"note: {note}" for note in advice["notes"])


def verdict(sizes: Report) -> str:
    return f"{sizes['total'] / 1e9:.1f} GB, {'fits' if sizes['fits'] else 'too much'}"
