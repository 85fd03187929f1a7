"""The arguments that say how a run's ranks were arranged, read into a `Grid` and written of one.

Follows `validate_args` (megatron/training/arguments.py) of Megatron-LM, 2026 and core_v0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import hybrid
from .errors import refuse
from .layouts import Grid, layers, stage_count
from .llava_types import is_hybrid_type
from .rows import is_hybrid

Args = Mapping[str, Any]
DAMAGED = "the args are damaged, or not Megatron's own"


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def grid(args: Args, chunks: int | None = None) -> Grid:
    """The writer's ranks. `chunks`: model chunks seen in a file, which settles what old args leave open."""
    tensor, pipeline = size(args, "tensor_model_parallel_size"), size(args, "pipeline_model_parallel_size")
    layout = (hybrid.layout(args) or args.get("pipeline_model_parallel_layout")) if pipeline > 1 else None
    if layout is not None and not isinstance(layout, str):
        raise refuse(f"pipeline_model_parallel_layout {layout!r:.60} is no layout string", "args", DAMAGED)
    virtual = size(args, "virtual_pipeline_model_parallel_size")
    if args.get("encoder_pipeline_model_parallel_size"):
        return with_encoder(args, tensor, pipeline)
    return Grid(
        tensor=tensor,
        pipeline=pipeline,
        virtual=chunks or (stage_count(layout) // pipeline if layout else virtual),
        expert=size(args, "expert_model_parallel_size"),
        expert_tensor=size(args, "expert_tensor_parallel_size", tensor),
        first=0 if args.get("standalone_embedding_stage") else given(args, "first", pipeline),
        last=given(args, "last", pipeline),
        embedding=bool(args.get("account_for_embedding_in_pipeline_split")) and pipeline > 1,
        loss=bool(args.get("account_for_loss_in_pipeline_split")) and pipeline > 1,
        layout=layout,
    )


def with_encoder(args: Args, tensor: int, pipeline: int) -> Grid:
    """The ranks of Megatron 0.9 to 0.13 where an image encoder has a stage of its own, before the language model's.

    `initialize_model_parallel` counts it among the pipeline's ranks and gives it tensor-parallel ranks of its own; the
    language model's layers are shared out evenly over the others (core_v0.12.0: parallel_state.py, training.py).

    Raises:
        Refused: two stages of an encoder, virtual or uneven ones, hybrids: it had none, or their rule is not known.
    """
    stages, own = args["encoder_pipeline_model_parallel_size"], args.get("encoder_tensor_model_parallel_size")
    others = ("virtual_pipeline_model_parallel_size", "decoder_first_pipeline_num_layers",
              "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split",
              "account_for_loss_in_pipeline_split", "pipeline_model_parallel_layout")  # fmt: skip
    given = [name for name in others if args.get(name)]
    given += ["a hybrid"] if is_hybrid_type(str(args.get("language_model_type"))) else []
    if stages != 1 or given:
        what = f"encoder_pipeline_model_parallel_size {stages}" + (f" beside {', '.join(given)}" if given else "")
        remedy = "save it again with that Megatron, as torch_dist or without --encoder-pipeline-model-parallel-size"
        raise refuse(f"{what}: which stage holds which layers is not known", "args", remedy)
    expert = size(args, "expert_model_parallel_size")
    shards = size(args, "expert_tensor_parallel_size", tensor)
    return Grid(tensor, pipeline + 1, 1, expert, shards, first=0, encoder=own or tensor)


def size(args: Args, name: str, default: int = 1) -> int:
    """A parallel size; old files leave out those their Megatron did not have."""
    value: int = default if args.get(name) is None else args[name]
    if not is_count(value):
        raise refuse(f"{name} is {value!r:.60}, not a number of at least 1", "args", DAMAGED)
    return value


def given(args: Args, end: str, pipeline: int) -> int | None:
    """Layers of the first or last stage, when set by hand; a stage may hold none."""
    name = f"decoder_{end}_pipeline_num_layers"
    value: int | None = args.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise refuse(f"{name} is {value!r:.60}, not a number of layers", "args", DAMAGED)
    return value if pipeline > 1 else None


def grid_arguments(ranks: Grid, config: Any) -> dict[str, Any]:
    """The arguments of a run of `config` on `ranks`: `grid` of them places every layer as `ranks` do.

    Raises:
        Refused: stages that no arguments say, or that do not hold the model's layers.
    """
    held = layers(ranks, config.num_layers)
    made: dict[str, Any] = {
        "tensor_model_parallel_size": ranks.tensor,
        "pipeline_model_parallel_size": ranks.pipeline,
        "expert_model_parallel_size": ranks.expert,
        "expert_tensor_parallel_size": ranks.expert_tensor if config.num_experts else ranks.tensor,
        "virtual_pipeline_model_parallel_size": ranks.virtual if ranks.virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "pipeline_model_parallel_layout": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
    }
    if is_hybrid(config):
        made |= hybrid_stages(ranks, config, [len(stage) for stage in held.values()])
    else:
        made |= stages(ranks, config.num_layers)
    if layers(grid(made), config.num_layers) != held:
        raise refuse(f"no arguments of Megatron's say the pipeline stages of {ranks}", "the target's layout")
    return made


def stages(ranks: Grid, num_layers: int) -> dict[str, Any]:
    """A GPT's stages. Megatron takes one of the three ways to say virtual ones, and that only with a pipeline.

    Where stages are even it is layers a stage, which every Megatron has, and alone restores from a checkpoint.
    """
    if ranks.layout is not None:
        return {"pipeline_model_parallel_layout": ranks.layout}
    made: dict[str, Any] = {
        "decoder_first_pipeline_num_layers": ranks.first,
        "decoder_last_pipeline_num_layers": ranks.last,
        "account_for_embedding_in_pipeline_split": ranks.embedding,
        "account_for_loss_in_pipeline_split": ranks.loss,
    }
    if ranks.virtual == 1:
        return made
    if ranks.first is None and ranks.last is None:
        counted = num_layers + ranks.embedding + ranks.loss
        return {**made, "num_layers_per_virtual_pipeline_stage": counted // (ranks.pipeline * ranks.virtual)}
    return {**made, "num_virtual_stages_per_pipeline_rank": ranks.virtual}


def hybrid_stages(ranks: Grid, config: Any, counts: list[int]) -> dict[str, Any]:
    """A hybrid's stages: even ones, a first and a last as all Megatrons have them, all others by `|` of 2026's."""
    if ranks.layout or ranks.virtual > 1 or ranks.embedding or ranks.loss:
        return hybrid.patterns(config, counts)
    made = {"decoder_first_pipeline_num_layers": ranks.first, "decoder_last_pipeline_num_layers": ranks.last}
    return {**hybrid.patterns(config), **made}
