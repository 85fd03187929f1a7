"""Small checkpoints of mixtures of experts, latent attention and further heads, in Megatron's formats.

As in small.py names and cuts stand here by hand once more, after Megatron's modules and not after megahf's table.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from small import State, arguments, spelled
from torch import Tensor

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "kv_channels": 4}
MIXTRAL: dict[str, Any] = {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 12}
SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": 8, "moe_shared_expert_gate": True}
BIASED: dict[str, Any] = {"add_bias_linear": True, "normalization": "LayerNorm"}
SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
LATENT_EXPERTS: dict[str, Any] = {"moe_latent_size": 8}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "group_query_attention": False,
    "num_query_groups": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
    "qk_layernorm": True,
}

# Axis that tensor-parallel ranks share out; of experts, the ranks that share an expert.
AXES = {
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "self_attention.linear_q_proj.weight": 0,
    "self_attention.linear_q_up_proj.weight": 0,
    "self_attention.linear_kv_up_proj.weight": 0,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc1.bias": 0,
    "mlp.linear_fc2.weight": 1,
    "mlp.shared_experts.linear_fc1.weight": 0,
    "mlp.shared_experts.linear_fc2.weight": 1,
    "mlp.experts.linear_fc1.weight": 1,
    "mlp.experts.linear_fc1.bias": 1,
    "mlp.experts.linear_fc2.weight": 2,
    "eh_proj.weight": 0,
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
}
DOWN = ("self_attention.linear_q_down_proj.weight", "self_attention.linear_kv_down_proj.weight")
GATED = ("linear_fc1.weight", "linear_fc1.bias")
EXPERTS = "mlp.experts."
WORDS = ("embedding.word_embeddings.weight", "output_layer.weight")


def experts_arguments(**changes: Any) -> dict[str, Any]:
    """Megatron's arguments of a small Mixtral with `changes`."""
    return arguments(**{**SIZES, **MIXTRAL, **changes})


def is_moe(args: dict[str, Any], layer: int) -> bool:
    frequency = args["moe_layer_freq"]
    return bool(args["num_experts"]) and (
        layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])
    )


def attention(args: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, n, d, groups = (args[name] for name in ("hidden_size", "num_attention_heads", "kv_channels", "num_query_groups"))
    at = "self_attention"
    if not args["multi_latent_attention"]:
        yield f"{at}.linear_qkv.layer_norm_weight", (h,)
        yield f"{at}.linear_qkv.weight", ((n + 2 * groups) * d, h)
        yield f"{at}.linear_proj.weight", (h, n * d)
        if args["add_bias_linear"]:
            yield f"{at}.linear_qkv.layer_norm_bias", (h,)
            yield f"{at}.linear_qkv.bias", ((n + 2 * groups) * d,)
            yield f"{at}.linear_proj.bias", (h,)
        return
    q, kv, rope = args["q_lora_rank"], args["kv_lora_rank"], args["qk_pos_emb_head_dim"]
    still, value = args["qk_head_dim"], args["v_head_dim"]
    yield "input_layernorm.weight", (h,)
    if q is None:
        yield f"{at}.linear_q_proj.weight", (n * (still + rope), h)
    else:
        yield f"{at}.linear_q_down_proj.weight", (q, h)
        yield f"{at}.linear_q_up_proj.weight", (n * (still + rope), q)
        if args["qk_layernorm"]:
            yield f"{at}.linear_q_up_proj.layer_norm_weight", (q,)
    yield f"{at}.linear_kv_down_proj.weight", (kv + rope, h)
    yield f"{at}.linear_kv_up_proj.weight", (n * (still + value), kv)
    if args["qk_layernorm"]:
        yield f"{at}.linear_kv_up_proj.layer_norm_weight", (kv,)
    yield f"{at}.linear_proj.weight", (h, n * value)


def mlp(args: dict[str, Any], moe: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    h, f, gate, bias = args["hidden_size"], args["ffn_hidden_size"], 1 + bool(args["swiglu"]), args["add_bias_linear"]
    if not moe:
        yield "mlp.linear_fc1.layer_norm_weight", (h,)
        yield "mlp.linear_fc1.weight", (gate * f, h)
        yield "mlp.linear_fc2.weight", (h, f)
        if bias:
            yield "mlp.linear_fc1.layer_norm_bias", (h,)
            yield "mlp.linear_fc1.bias", (gate * f,)
            yield "mlp.linear_fc2.bias", (h,)
        return
    experts, width, shared = (
        args["num_experts"],
        args["moe_ffn_hidden_size"],
        args["moe_shared_expert_intermediate_size"],
    )
    inner = args["moe_latent_size"] or h
    yield "pre_mlp_layernorm.weight", (h,)
    yield "mlp.router.weight", (experts, h)
    yield f"{EXPERTS}linear_fc1.weight", (experts, gate * width, inner)
    yield f"{EXPERTS}linear_fc2.weight", (experts, inner, width)
    if bias:
        yield "pre_mlp_layernorm.bias", (h,)
        yield "mlp.router.bias", (experts,)
        yield f"{EXPERTS}linear_fc1.bias", (experts, gate * width)
        yield f"{EXPERTS}linear_fc2.bias", (experts, inner)
    if args["moe_router_enable_expert_bias"]:
        yield "mlp.router.expert_bias", (experts,)
    if args["moe_latent_size"]:
        yield "mlp.fc1_latent_proj.weight", (inner, h)
        yield "mlp.fc2_latent_proj.weight", (h, inner)
    if shared := args["moe_shared_expert_intermediate_size"]:
        yield "mlp.shared_experts.linear_fc1.weight", (gate * shared, h)
        yield "mlp.shared_experts.linear_fc2.weight", (h, shared)
    if args["moe_shared_expert_gate"]:
        yield "mlp.shared_experts.gate_weight", (1, h)


def shapes(args: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight in canonical names."""
    h, layers = args["hidden_size"], args["num_layers"]
    norms = ("weight", "bias") if args["normalization"] == "LayerNorm" else ("weight",)
    yield "embedding.word_embeddings.weight", (args["padded_vocab_size"], h)
    for layer in range(layers):
        for name, shape in (*attention(args), *mlp(args, is_moe(args, layer))):
            yield f"decoder.layers.{layer}.{name}", shape
    yield from ((f"decoder.final_layernorm.{kind}", (h,)) for kind in norms)
    for head in range(1 if args["mtp_use_repeated_layer"] else args["mtp_num_layers"] or 0):
        for norm in ("enorm", "hnorm", "final_layernorm"):
            yield from ((f"mtp.layers.{head}.{norm}.{kind}", (h,)) for kind in norms)
        yield f"mtp.layers.{head}.eh_proj.weight", (h, 2 * h)
        for name, shape in (*attention(args), *mlp(args, is_moe(args, layers - 1))):
            yield f"mtp.layers.{head}.transformer_layer.{name}", shape
    if args["untie_embeddings_and_output_weights"]:
        yield "output_layer.weight", (args["padded_vocab_size"], h)


def whole(args: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Random weights; biases of the choice of experts are float32 in every model."""
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes(args)}
    return {name: value if name.endswith("expert_bias") else value.to(dtype) for name, value in state.items()}


def leaf(name: str) -> str:
    """A weight's name inside its layer."""
    parts = name.split(".")
    if parts[0] == "decoder" and parts[1] == "layers":
        return ".".join(parts[3:])
    return ".".join(parts[4:] if "transformer_layer" in parts else parts[3:]) if parts[0] == "mtp" else name


def cut(value: Tensor, axis: int, rank: int, ranks: int, gated: bool) -> Tensor:
    """A rank's share; of gate | up, its share of each."""
    blocks = value.chunk(2, axis) if gated else (value,)
    return torch.cat([block.chunk(ranks, axis)[rank] for block in blocks], axis)


def by_turns(value: Tensor, axis: int, size: int) -> Tensor:
    """gate | up as `size` gates, `size` ups, and so on."""
    gate, up = (half.split(size, axis) for half in value.chunk(2, axis))
    return torch.cat([block for pair in zip(gate, up, strict=True) for block in pair], axis)


@dataclass(frozen=True)
class Run:
    """How a run was laid out.

    `shards` is the expert-tensor size; `stages` are the layers of each chunk in the order they run.
    """

    tensor: int = 1
    expert: int = 1
    shards: int | None = None
    pipeline: int = 1
    stages: tuple[tuple[int, ...], ...] = ((0, 1),)

    @property
    def cuts(self) -> int:
        return self.shards or self.tensor

    def ranks(self) -> Iterator[tuple[int, int, int]]:
        """Tensor, expert-tensor and expert rank of every process of a stage that writes a file."""
        for rank in range(max(self.tensor, self.cuts * self.expert)):
            yield rank % self.tensor, rank % self.cuts, rank // self.cuts % self.expert

    def arguments(self) -> dict[str, Any]:
        virtual = len(self.stages) // self.pipeline
        return {
            "tensor_model_parallel_size": self.tensor,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.shards,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        }


def write_experts(
    path: Path, layout: str = "sequential", run: Run | None = None, seed: int = 0, dtype: torch.dtype = torch.float32,
    down_cut: bool = False, fused_down: bool = False, local: bool = False, mtp: str = "transformer_layer",
    **changes: Any,
) -> State:  # fmt: skip
    """A `--ckpt-format torch` checkpoint; gives what converting it must give.

    Args:
        layout: of the experts: sequential, te-grouped, packed or legacy-grouped.
        down_cut: latent down projections cut over tensor ranks, as some versions have them.
        fused_down: both as one matrix, with the norm in front inside.
        local: spell the norms as Megatron's local layers do.
        mtp: what the layer inside a further head is called.
    """
    run = run or Run()
    args = {**experts_arguments(**changes), **run.arguments()}
    args["moe_grouped_gemm"] = layout != "sequential"
    state = whole(args, seed, dtype)
    for p in range(run.pipeline):
        for t, s, e in run.ranks():
            content: dict[str, Any] = {"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}
            for v in range(virtual := len(run.stages) // run.pipeline):
                turn = v * run.pipeline + p
                held = held_by(state, args, run, turn, (t, s, e), layout, down_cut)
                held = fused(held) if fused_down else held
                held = {(spelled(key) if local else key).replace("transformer_layer", mtp): held[key] for key in held}
                content[f"model{v}" if virtual > 1 else "model"] = held
            name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (run.pipeline > 1) + f"_{e:03d}" * (run.expert > 1)
            (path / "iter_0000007" / name).mkdir(parents=True, exist_ok=True)
            torch.save(content, path / "iter_0000007" / name / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return {name: value[: args["vocab_size"]] if name in WORDS else value for name, value in state.items()}


def held_by(
    state: State, args: dict[str, Any], run: Run, turn: int, rank: tuple[int, int, int], layout: str, down_cut: bool
) -> dict[str, Any]:
    """What one rank's chunk holds, in its own names."""
    tensor, shard, expert = rank
    layers, last = run.stages[turn], turn == len(run.stages) - 1
    held: dict[str, Any] = {}
    for name, value in state.items():
        key = name
        if name.startswith("decoder.layers."):
            number = int(name.split(".")[2])
            if number not in layers:
                continue
            key = name.replace(f"layers.{number}.", f"layers.{layers.index(number)}.", 1)
        elif not (turn == 0 if name.startswith("embedding.") else last) and not (last and on_last(name, args)):
            continue
        kind, axis = leaf(name), AXES.get(leaf(name))
        if kind in DOWN and down_cut:
            axis = 0
        gated = args["swiglu"] and kind.endswith(GATED)
        if kind.startswith(EXPERTS):
            mine = value.chunk(run.expert)[expert]
            share = mine if axis is None else cut(mine, axis, shard, run.cuts, gated)
            if gated and layout in ("te-grouped", "packed") and args["moe_mlp_glu_interleave_size"]:
                share = by_turns(share, 1, args["moe_mlp_glu_interleave_size"])
            held |= named(key, share.clone(), layout)
        else:
            share = value if axis is None else cut(value, axis, tensor, run.tensor, gated)
            if gated and "shared" in kind and args["moe_shared_expert_glu_interleave_size"]:
                share = by_turns(share, 0, args["moe_shared_expert_glu_interleave_size"])
            held[key] = share.clone()
    return held


def on_last(name: str, args: dict[str, Any]) -> bool:
    """Further heads bring a copy of the word embedding to the last stage."""
    return name == WORDS[0] and bool(args["mtp_num_layers"])


def named(key: str, share: Tensor, layout: str) -> dict[str, Tensor]:
    """A rank's experts `[experts, ..]` under the keys of a layout."""
    at, matrix, kind = key.rsplit(".", 2)
    if layout == "packed":
        return {key: share}
    if layout == "legacy-grouped":
        flat = share.transpose(1, 2).contiguous()  # x @ weight: [in, out]
        if matrix == "linear_fc1":
            return {f"{at}.weight1": flat.reshape(flat.shape[1], -1)}
        return {f"{at}.weight2": flat.reshape(-1, flat.shape[2])}
    forms = {"sequential": f"{at}.local_experts.%d.{matrix}.{kind}", "te-grouped": f"{at}.{matrix}.{kind}%d"}
    return {forms[layout] % number: value.clone() for number, value in enumerate(share)}


def fused(held: dict[str, Any]) -> dict[str, Any]:
    """Both down projections of latents as one matrix, which takes the norm in front of it along."""
    made = dict(held)
    for key in held:
        if key.endswith(DOWN[0]):
            at = key.removesuffix(DOWN[0])
            made[f"{at}self_attention.linear_qkv_down_proj.weight"] = torch.cat([made.pop(key), made.pop(at + DOWN[1])])
            made[f"{at}self_attention.linear_qkv_down_proj.layer_norm_weight"] = made.pop(f"{at}input_layernorm.weight")
    return made


def write_experts_dist(
    path: Path, stacked: bool = True, singleton: bool = False, local: bool = False, cuts: int = 1, seed: int = 0,
    dtype: torch.dtype = torch.float32, **changes: Any,
) -> State:  # fmt: skip
    """A `--ckpt-format torch_dist` checkpoint of one rank.

    Args:
        stacked: layers along a first axis; else one by one, as with a list of `moe_layer_freq`.
        singleton: every expert for itself, gate and up apart.
        local: the norm before the experts under the name it has in dense layers.
        cuts: expert-tensor ranks that saw gate and up by turns.
    """
    from torch.distributed.checkpoint import FileSystemWriter, save

    args = experts_arguments(**changes, expert_tensor_parallel_size=cuts, moe_grouped_gemm=True)
    state = whole(args, seed, dtype)
    stored: dict[str, Tensor] = {}
    for name, value in state.items():
        kind, gated = leaf(name), args["swiglu"] and leaf(name).endswith(GATED)
        if kind.startswith(EXPERTS) and gated and (size := args["moe_mlp_glu_interleave_size"]):
            shares = [by_turns(cut(value, 1, rank, cuts, True), 1, size).chunk(2, 1) for rank in range(cuts)]
            value = torch.cat([share[half] for half in range(2) for share in shares], 1)
        stored |= named_dist(name, value, singleton, gated)
    if local:
        stored = {key.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): stored[key] for key in stored}
    if stacked:
        stored = stack_layers(stored, args["num_layers"])
    folder = path / "iter_0000007"
    folder.mkdir(parents=True)
    save(stored, storage_writer=FileSystemWriter(folder), no_dist=True)
    torch.save({"args": Namespace(**args), "iteration": 7, "checkpoint_version": 3.0}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (path / "latest_checkpointed_iteration.txt").write_text("7")
    return {name: value[: args["vocab_size"]] if name in WORDS else value for name, value in state.items()}


def named_dist(name: str, value: Tensor, singleton: bool, gated: bool) -> dict[str, Tensor]:
    """The keys of one weight in a distributed checkpoint."""
    of_experts = leaf(name).startswith(EXPERTS)
    key = name.replace(EXPERTS, f"{EXPERTS}experts.") if of_experts else name
    if not singleton:
        return {key: value.contiguous()}
    each = {key: value}
    if of_experts:
        each = {key.replace("experts.linear", f"experts.{e}.linear"): one for e, one in enumerate(value)}
    if not gated:
        return {key: one.contiguous() for key, one in each.items()}
    return {f"{key}_{half}": part for key, one in each.items() for half, part in zip("wv", one.chunk(2), strict=True)}


def stack_layers(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The decoder's layers along a first axis."""
    made = {key: value for key, value in stored.items() if not key.startswith("decoder.layers.")}
    for key in stored:
        if key.startswith("decoder.layers.0."):
            rest = key.removeprefix("decoder.layers.0.")
            made[f"decoder.layers.{rest}"] = torch.stack([stored[f"decoder.layers.{n}.{rest}"] for n in range(layers)])
    return made
