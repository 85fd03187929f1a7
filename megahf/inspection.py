"""`inspect`: what a checkpoint holds, on one page; no weight is read and nothing is refused before it is shown."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import dtypes
from .architectures import AUTO_MAPS, fields
from .arguments import grid
from .checkpoint import Checkpoint, open_checkpoint
from .errors import Refused
from .hf_folder import CONFIG, is_hf_folder
from .image_drawing import image_lines
from .jsonfile import read_json
from .layouts import layers
from .pattern_drawing import drawing, pattern_lines
from .plan import Plan, amount, build
from .rows import Row, is_hybrid, is_llava
from .weights import weights

if TYPE_CHECKING:
    from rich.table import Table

Report = dict[str, Any]


def inspect(path: str | Path, true_vocab_size: int | None = None, budget: dict[str, int] | None = None) -> Report:
    """What `megahf inspect --json` prints: plain data; `refused` lists what stands in the way of a conversion.

    Args:
        budget: a context, and what there is for it, as `context_advice.advise` takes them.
    """
    if is_hf_folder(Path(path)):
        return inspect_folder(Path(path), true_vocab_size, budget)
    checkpoint = open_checkpoint(path)
    report = header(checkpoint)
    try:
        plan = build(checkpoint, true_vocab_size=true_vocab_size)
    except Refused as error:
        report["refused"] = str(error).splitlines()
        return report
    return report | contents(plan) | advice(plan, budget)


def advice(plan: Plan, budget: dict[str, int] | None) -> Report:
    """What a long context takes, if one is asked about."""
    if budget is None:
        return {}
    from .context_advice import advise  # it knows the families, whose start takes a while

    try:
        return {"context": advise(plan.config, **budget)}
    except Refused as error:
        return {"refused": str(error).splitlines()}


def header(checkpoint: Checkpoint) -> Report:
    """What is known before the table is walked."""
    ranks = grid(checkpoint.args)
    sizes = [path.stat().st_size for path in checkpoint.path.rglob("*") if path.is_file()]
    return {
        "checkpoint": str(checkpoint.path),
        "format": checkpoint.format,
        "iteration": checkpoint.iteration if checkpoint.iteration is not None else "release",
        "checkpoint_version": checkpoint.version,
        "written_by": str(ranks),
        "files": len(sizes),
        "bytes_on_disk": sum(sizes),
        "refused": [],
    }


def inspect_folder(folder: Path, true_vocab_size: int | None, budget: dict[str, int] | None = None) -> Report:
    """The same of a Hugging Face folder, which is converted to Megatron's."""
    from .export import MEGATRON, job_for, plan_for  # they know the card, which knows this module

    theirs, sizes = read_json(folder / CONFIG), [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    report: Report = {
        "checkpoint": str(folder),
        "format": "hf" if theirs.get("model_type") in AUTO_MAPS else theirs.get("model_type"),
        "architectures": theirs.get("architectures"),
        "written_by": f"transformers {theirs.get('transformers_version') or 'of a version not noted'}",
        "files": len(sizes),
        "bytes_on_disk": sum(sizes),
        "refused": [],
    }
    try:
        plan = plan_for(folder, true_vocab_size=true_vocab_size)
        report |= contents(plan)
        job_for(plan, MEGATRON)
        report |= advice(plan, budget)
    except Refused as error:
        report["refused"] = str(error).splitlines()
    return report


def contents(plan: Plan) -> Report:
    """The model: config, weights by row of the table, stages, what is left out."""
    sources = Counter({dtypes.TORCH_NAME[copy.array.dtype]: 0 for copy in plan.copies})
    for copy in plan.copies:
        sources[dtypes.TORCH_NAME[copy.array.dtype]] += copy.array.nbytes
    copies = {copy.name: copy for copy in plan.copies}
    rows: dict[str, Report] = {}
    for weight in weights(plan.config):
        row = rows.setdefault(weight.row.name, row_report(weight.row, weight.shape, copies[weight.name].array.dtype))
        row["count"] += 1
        row["bytes"] += copies[weight.name].array.nbytes
        row["stored_again"] += len(copies[weight.name].same)
    return {
        "parameters": sum(math.prod(copy.shape) for copy in plan.copies),
        "bytes": dict(sources),
        "config": fields(plan.config),
        "vocabulary": {"size": plan.config.vocab_size, "padding": plan.padding, "known": plan.vocabulary},
        "stages": stages(plan),
        "pattern": drawing(plan) if is_hybrid(plan.config) else None,
        "experts": {"layout": plan.experts, "ranks": plan.grid.expert} if plan.experts else None,
        "weights": list(rows.values()),
        "left_out": plan.left_out,
        "unknown_arguments": plan.unknown_arguments,
        "notes": plan.notes,
    }


def row_report(row: Row, shape: tuple[int, ...], dtype: Any) -> Report:
    return {
        "name": row.name,
        "shape": list(shape),
        "letters": row.shape,
        "cut": cut_words(row),
        "dtype": dtypes.TORCH_NAME[dtype],
        "count": 0,
        "bytes": 0,
        "stored_again": 0,
    }


def cut_words(row: Row) -> str:
    """Along what ranks share out a weight."""
    axes = ["rows", "columns"]
    if row.experts:
        return "by experts" if row.cut.dim is None else f"by experts and {axes[row.cut.dim - 1]}"
    if row.cut.dim is None:
        return "replicated"
    return f"by {axes[row.cut.dim]}{' or whole' if row.cut.by_version else ''}"


def stages(plan: Plan) -> list[Report]:
    """Which layers each pipeline rank's chunks hold."""
    held = layers(plan.grid, plan.config.num_layers)
    encoder = {"encoder": True} if is_llava(plan.config) else {}
    return [
        {"pipeline": rank, "chunk": chunk, "layers": [numbers.start, numbers.stop], **(encoder if first else {})}
        for (rank, chunk), numbers in sorted(held.items())
        for first in [(rank, chunk) == (0, 0)]
    ]


def page(report: Report) -> None:
    """Prints `report` as a page."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(f"[bold]{report['checkpoint']}[/bold]")
    kind = (
        f"{report['format']}, iteration {report['iteration']}"
        if "iteration" in report
        else ", ".join([f"a {report['format']} folder", *(report["architectures"] or ())])
    )
    size = f"{report['files']} files, {amount(report['bytes_on_disk'])}"
    console.print(f"{kind}, written by {report['written_by']}: {size}", markup=False)
    if "config" in report:
        model(console, report)
    if "context" in report:
        from .context_advice import lines

        for line in lines(report["context"]):
            console.print(line, markup=False, soft_wrap=True)
    for reason in report["refused"]:
        console.print("[red]refused:[/red]", end=" ")
        console.print(reason, markup=False)


def model(console: Any, report: Report) -> None:
    kinds = ", ".join(f"{amount(size)} {dtype}" for dtype, size in report["bytes"].items())
    console.print(f"\n[bold]{report['parameters'] / 1e6:,.1f} M parameters[/bold], {kinds}")
    console.print(architecture(report["config"]))
    vocabulary = report["vocabulary"]
    padding = f", {vocabulary['padding']} rows of padding left out" if vocabulary["padding"] else ""
    console.print(f"vocabulary of {vocabulary['size']} ({vocabulary['known']}){padding}")
    if pattern := report["pattern"]:
        console.print("\n".join(pattern_lines(pattern)), markup=False)
    else:
        console.print(stage_line(report["stages"]))
    if experts := report["experts"]:
        console.print(expert_line(experts, report["config"].get("text_config", report["config"])["num_experts"]))
    console.print()
    console.print(weight_table(report["weights"]))
    for reason, count in report["left_out"].items():
        console.print(f"left out: {count} keys, {reason}")
    for note in report["notes"]:
        console.print(f"note: {note}")
    if names := report["unknown_arguments"]:
        console.print(f"{len(names)} arguments megahf does not know: {', '.join(names)}")
    if not report["refused"]:
        console.print("[green]nothing stands in the way of `megahf convert`[/green]")


def architecture(config: Report) -> str:
    """The model in a few lines of words."""
    if "text_config" in config:
        return "\n".join([*image_lines(config), architecture(config["text_config"])])
    norm = config["normalization"] + (" (zero-centred)" if config["layernorm_zero_centered_gamma"] else "")
    options = [
        norm,
        positions(config),
        "tied embeddings" if config["tie_word_embeddings"] else "untied embeddings",
        "biases" if config["add_bias_linear"] else "QKV bias" if config["add_qkv_bias"] else "no biases",
        *(name.replace("_", " ") for name in ("qk_layernorm", "qk_l2_norm", "attention_output_gate") if config[name]),
        *([f"softmax {config['softmax_type']}"] if config["softmax_type"] != "vanilla" else []),
        *([f"window {config['window_size'][0] + 1}"] if config["window_size"] else []),
    ]
    return "\n".join([sizes(config), ", ".join(options), *extras(config)])


def sizes(config: Report) -> str:
    """Layers, attention and MLP; of a hybrid, what its pattern has."""
    symbols = config.get("hybrid_layer_pattern") or "*-"
    heads, groups = config["num_attention_heads"], config["num_query_groups"]
    kind = "multi-head" if heads == groups else f"{groups} query groups" if groups > 1 else "multi-query"
    gated = "gated " if config["gated_linear_unit"] else ""
    parts = [f"{config['num_layers']} layers", f"hidden {config['hidden_size']}"]
    if "*" in symbols:
        parts.append(f"{heads} heads of {config['kv_channels']} ({kind})")
    if "-" in symbols:
        parts.append(f"MLP {config['ffn_hidden_size']} {gated}{config['activation_func']}")
    return ", ".join(parts)


def extras(config: Report) -> list[str]:
    """A line each for experts, latent attention and further heads."""
    lines = []
    if config["num_experts"]:
        lines.append(mixture(config))
    if config["multi_latent_attention"]:
        queries = f"queries from {config['q_lora_rank']}" if config["q_lora_rank"] else "straight queries"
        heads = f"{config['qk_head_dim']} + {config['qk_pos_emb_head_dim']} ({config['rope_type']})"
        lines.append(
            f"latent attention: {queries}, keys and values from {config['kv_lora_rank']}, heads of {heads}, "
            f"values of {config['v_head_dim']}"
        )
    if heads := config["mtp_num_layers"]:
        shared = ", one layer for all" if config["mtp_use_repeated_layer"] else ""
        lines.append(f"{heads} head{'s' if heads > 1 else ''} for further tokens{shared}")
    return lines


def mixture(config: Report) -> str:
    frequency, layers, symbols = config["moe_layer_freq"], config["num_layers"], config.get("hybrid_layer_pattern")
    count = len(range(0, layers, frequency)) if isinstance(frequency, int) else sum(map(bool, frequency))
    count = count if symbols is None else symbols.count("E")
    score = config["moe_router_score_function"] + (" first" if config["moe_router_pre_softmax"] else "")
    parts = [
        f"{config['num_experts']} experts of {config['moe_ffn_hidden_size']} in {count} of {layers} layers",
        f"{config['moe_router_topk']} a token ({score}{' + bias' if config['moe_router_enable_expert_bias'] else ''})",
    ]
    if config["moe_router_group_topk"]:
        parts.append(f"from {config['moe_router_group_topk']} of {config['moe_router_num_groups']} groups")
    if shared := config["moe_shared_expert_intermediate_size"]:
        parts.append(f"shared experts of {shared}{' with a gate' if config['moe_shared_expert_gate'] else ''}")
    if latent := config["moe_latent_size"]:
        parts.append(f"in {latent} channels")
    return ", ".join(parts)


def expert_line(experts: Report, count: int) -> str:
    ranks = f" on {experts['ranks']} expert-parallel ranks" if experts["ranks"] > 1 else ""
    return f"experts: {experts['layout']}, {count}{ranks}"


def positions(config: Report) -> str:
    kind = config["position_embedding_type"]
    if kind in ("rope", "yarn"):
        part = f", {config['rotary_percent']:.0%} of the channels" if config["rotary_percent"] != 1 else ""
        scaled = ", llama3 scaling" if config["use_rope_scaling"] else ""
        return f"{kind} (base {config['rotary_base']:g}{part}{scaled}), {config['max_position_embeddings']} positions"
    if kind == "none":
        return "no positions"
    return f"{kind.replace('_', ' ')} positions ({config['max_position_embeddings']})"


def stage_line(stages: list[Report]) -> str:
    """`layers 0-7 | 8-15 | ..` in the order they run, with the pipeline rank where there are several."""
    if len(stages) == 1:
        return f"one stage with layers 0-{stages[0]['layers'][1] - 1}"
    ordered = sorted(stages, key=lambda stage: (stage["chunk"], stage["pipeline"]))
    return "stages: " + " | ".join(f"pp{stage['pipeline']} {held(stage)}" for stage in ordered)


def held(stage: Report) -> str:
    """What a stage has of the image encoder, and of the layers."""
    first, end = stage["layers"]
    layers = [f"{first}-{end - 1}"] if first < end else []
    return " + ".join((["the encoder"] if stage.get("encoder") else []) + layers) or "none"


def weight_table(rows: list[Report]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title, justify in (("weight", "left"), ("shape", "left"), ("cut", "left"), ("dtype", "left"), ("x", "right")):
        table.add_column(title, justify=justify, overflow="fold")  # type: ignore[arg-type]
    table.add_column("size", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        table.add_row(row["name"], shape, row["cut"], row["dtype"], str(row["count"]), amount(row["bytes"]))
    return table
