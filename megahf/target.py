"""What a Megatron checkpoint is written for: the ranks of the run that will load it, and how its layers are made.

Layers of Transformer Engine and Megatron's own (`--transformer-impl local`) spell some weights differently, and experts
are held in several ways. What Megatron could not load is refused, every reason at once. The rules are those of
megatron-core 0.16.1: `TransformerConfig.__post_init__`, `PipelineParallelLayerLayout`, `MambaMixer`, `GroupedMLP`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, lcm

from .cuts import Config, padded_heads
from .errors import Problems, Refused, refuse
from .layouts import Grid, stage_count, unrolled
from .rows import CONDITIONS, DISTRIBUTED, ENGINE, LOCAL, MAPPED, is_hybrid, is_llava, language
from .stages import Stages
from .weights import heads, weights

FORMATS = ("torch", "torch_dist")
EXPERTS = ("te-grouped", "sequential", "legacy-grouped")
WHERE, OTHER_SIZES, OTHER_STAGES = "the target", "choose other parallel sizes", "choose other stages"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A checkpoint to be.

    Attributes:
        engine: layers are Transformer Engine's, not Megatron's own.
        experts: how the layers of `torch` checkpoints hold them: one of EXPERTS.
        vocabulary: rows of the word embedding, padding included.
    """

    grid: Grid
    format: str
    engine: bool = True
    experts: str = EXPERTS[0]
    vocabulary: int
    divisible_by: int = 128

    @classmethod
    def of(
        cls, config: Config, *, tp: int = 1, pp: int = 1, vpp: int | None = None, ep: int = 1, etp: int | None = None,
        first: int | None = None, last: int | None = None, account_for_embedding: bool = False,
        account_for_loss: bool = False, layout: str | None = None, format: str = "torch", engine: bool = True,
        experts: str | None = None, divisible_by: int = 128,
    ) -> Target:  # fmt: skip
        """The target that Megatron's options say, checked against `config`.

        Args:
            vpp: model chunks on each pipeline rank; as many as `layout` says by default.
            etp: ranks that share an expert; `tp` by default.
            first: layers of the first pipeline stage; `last`: of the last one.
            layout: `Et|tt|tL`; of a hybrid its pattern with `|` after each stage.
            experts: `te-grouped` by default, and `sequential` without Transformer Engine.
            divisible_by: of which number, times `tp`, the vocabulary is made a multiple.

        Raises:
            Refused: with every reason for which Megatron would not load it.
        """
        shards = tp if etp is None else etp
        refuse_sizes({"TP": tp, "PP": pp, "VPP": vpp, "EP": ep, "ETP": etp, "divisible_by": divisible_by})
        letters = stage_letters(config, layout) if layout else None
        virtual = vpp or (max(stage_count(letters) // pp, 1) if letters else 1)
        made = cls(
            grid=Grid(tp, pp, virtual, ep, shards, first, last, account_for_embedding, account_for_loss, letters),
            format=format,
            engine=engine,
            experts=experts or (EXPERTS[0] if engine else "sequential"),
            vocabulary=ceil(language(config).vocab_size / (divisible_by * tp)) * divisible_by * tp,
            divisible_by=divisible_by,
        )
        check(made, config)
        return made

    def specs(self, config: Config) -> tuple[str, ...]:
        """Whose spellings of the rows are written, in order of preference.

        Megatron's table of names, by which local layers take Transformer Engine's in distributed checkpoints, is only
        in the GPT's spec of plain attention (`sharded_state_dict_keys_map`).
        """
        if self.format == "torch":
            return (ENGINE if self.engine else LOCAL,)
        if self.engine:
            return (ENGINE, DISTRIBUTED)
        unmapped = is_llava(config) or is_hybrid(config) or config.multi_latent_attention
        return (LOCAL if unmapped else MAPPED, DISTRIBUTED)

    @property
    def stage_size(self) -> int:
        """Processes of a pipeline stage: the fewest that its tensor ranks and its experts' ranks both fit into."""
        return lcm(self.grid.tensor, self.grid.expert * self.grid.expert_tensor)

    @property
    def world_size(self) -> int:
        return self.stage_size * self.grid.pipeline


def refuse_sizes(sizes: Mapping[str, int | None]) -> None:
    """Refuses what is given and no number of at least 1."""
    found = Problems()
    for name, size in sizes.items():
        if size is not None and (type(size) is not int or size < 1):
            found.add(f"{name} is {size!r:.40}, not a number of at least 1", WHERE)
    found.raise_if_any()


def stage_letters(config: Config, layout: str) -> str:
    """A layout of a GPT as it is; of a hybrid's pattern with `|`, `t` for each layer."""
    if not is_hybrid(config):
        unrolled(layout, WHERE)  # refuses strange letters
        return layout
    pattern = config.hybrid_layer_pattern
    if layout.replace("|", "") != pattern:
        raise refuse(f"layout {layout!r} is not the pattern {pattern!r} with | after each stage", WHERE, OTHER_STAGES)
    return re.sub(r"[^|]", "t", layout)


def check(target: Target, config: Config) -> None:
    """Refuses what Megatron would not load, with every reason."""
    found, text = Problems(), language(config)
    for name, choice, known in (("format", target.format, FORMATS), ("experts", target.experts, EXPERTS)):
        if choice not in known:
            found.add(f"{name} is {choice!r:.40}, not one of {', '.join(known)}", WHERE)
    for where, what, count, ranks, among in uneven(target, config):
        found.add(f"{count} {what} do not divide over {ranks} {among} ranks", where, OTHER_SIZES)
    for reason in (*attention(target, text), *experts(target, text), *copied(target, text), *images(target, config)):
        found.add(reason, WHERE)
    for reason in (*stages(target.grid, text), *written_out(target.grid, text)):
        found.add(reason, WHERE, OTHER_STAGES)
    try:
        Stages.of(config, target.grid)
    except Refused as error:
        for problem in error.problems:
            found.add(problem.what, WHERE, OTHER_STAGES)
    found.raise_if_any()


def has(condition: str, config: Config) -> bool:
    """Whether some layer of the decoder is of a kind that the rows' conditions name."""
    return any(CONDITIONS[condition](config, layer) for layer in range(config.num_layers))


def shared_out(target: Target, config: Config) -> Iterator[tuple[str, int, int, str]]:
    """What ranks get whole: (name, count, ranks, kind of ranks)."""
    grid = target.grid
    if is_llava(config):
        heads = padded_heads(config.vision_config, grid.tensor)
        yield "heads of the image encoder", heads, grid.tensor, "tensor-parallel"
    config = language(config)
    if has("attention", config):
        yield "attention heads", config.num_attention_heads, grid.tensor, "tensor-parallel"
    if has("mixer", config):
        yield "Mamba heads", config.mamba_num_heads or 0, grid.tensor, "tensor-parallel"
        yield "Mamba groups", config.mamba_num_groups, grid.tensor, "tensor-parallel"
    yield "experts", config.num_experts or 0, grid.expert, "expert-parallel"


def uneven(target: Target, config: Config) -> Iterator[tuple[str, str, int, int, str]]:
    """What does not divide: (where, name, count, ranks, kind of ranks); what follows from another is not said."""
    said = [counted for counted in shared_out(target, config) if counted[1] % counted[2]]
    yield from ((WHERE, *counted) for counted in said)
    for where, count, ranks, among in cut(target, config):
        implied = any(count % whole == 0 for _, whole, _, kind in said if kind == among)
        if count % ranks and not implied:
            yield where, "places", count, ranks, among


def cut(target: Target, config: Config) -> Iterator[tuple[str, int, int, str]]:
    """The rows or columns of every weight that ranks cut, block by block, each kind of weight once."""
    seen = {weight.row: weight for weight in weights(config)}
    for row, weight in seen.items():
        if row.cut.dim is None or row.cut.padded or row.cut.heads or (row.cut.by_version and target.engine):
            continue
        ranks, among = target.grid.tensor, "tensor-parallel"
        if row.experts:
            ranks, among = target.grid.expert_tensor, "expert-tensor-parallel"
        blocks = row.cut.blocks(row.of(config))
        name = row.name.replace("{l}", "*").replace("{k}", "*")
        for block in dict.fromkeys(blocks):
            size = weight.shape[row.cut.dim] * block // sum(blocks)
            yield f"axis {row.cut.dim} of {name}", size, ranks, among


def attention(target: Target, config: Config) -> Iterator[str]:
    groups, tensor = config.num_query_groups, target.grid.tensor
    if has("heads", config) and groups % tensor and tensor % groups:
        yield f"{groups} query groups are neither a multiple nor a divisor of {tensor} tensor-parallel ranks"
    if config.layernorm_zero_centered_gamma and not target.engine:
        yield "layernorm_zero_centered_gamma is Transformer Engine's alone: Megatron's own layers do not have it"
    if has("mixer 1", config) and target.format == "torch_dist":
        yield "Mamba-1 mixers have no torch_dist form: the Megatrons that had them wrote --ckpt-format torch"


def images(target: Target, config: Config) -> Iterator[str]:
    """Of a LLaVA, what Megatron's modules and the script that builds them cannot do."""
    if not is_llava(config):
        return
    grid, text = target.grid, language(config)
    if grid.layout or grid.virtual > 1 or (grid.first, grid.last) != (None, None):
        yield "Megatron would build the image encoder by the text's stages: they can only be equal, and one a rank"
    if not target.engine and (text.num_experts or is_hybrid(text)):
        yield "Megatron's script builds experts and hybrids in LLaVA of Transformer Engine's layers alone: --use-te"
    if config.vision_projection_type != "affine":
        return
    if config.projection_add_bias_linear and target.grid.tensor > 1:
        yield "an affine projection's bias cannot be cut: Megatron adds a rank's share to what is of all ranks; TP is 1"
    if target.engine:
        yield "an affine projection is of Megatron's own layers: Transformer Engine's do not gather what they put out"


def experts(target: Target, config: Config) -> Iterator[str]:
    grid = target.grid
    if not config.num_experts:
        if grid.expert > 1:
            yield f"EP is {grid.expert}, but the model has no experts"
        if grid.expert_tensor != grid.tensor:
            yield f"ETP is {grid.expert_tensor} and TP {grid.tensor}, but the model has no experts"
        return
    if target.format == "torch" and grid.tensor % grid.expert_tensor:
        yield (
            f"experts cut over {grid.expert_tensor} ranks do not fit the torch format's files of {grid.tensor} tensor "
            f"ranks, in which ranks would write over each other: torch_dist has no such files"
        )
    alone = config.moe_router_topk == 1 and config.moe_router_score_function == "softmax"
    if alone and not config.moe_router_pre_softmax and config.moe_router_load_balancing_type != "sinkhorn":
        yield "one expert a token is always of weight 1: Megatron asks for a softmax over all of them before the choice"
    if config.add_bias_linear and grid.expert_tensor > 1:
        yield f"experts with biases are not cut: ETP is {grid.expert_tensor}, and must be 1"
    if target.experts == "te-grouped" and not target.engine:
        yield "te-grouped experts are Transformer Engine's: Megatron's own layers have them sequential"
    if target.experts == "legacy-grouped":
        lacks = {
            "biases": config.add_bias_linear,
            "a latent size": config.moe_latent_size,
            "gates other than silu and gelu": config.gated_linear_unit and config.activation_func == "quick_gelu",
        }
        yield from (f"legacy-grouped experts have no {what}" for what, asked in lacks.items() if asked)


def copied(target: Target, config: Config) -> Iterator[str]:
    """What `sharded_state_dict` of Megatron, 2026 included, has no place for: heads have a copy of the embedding."""
    if target.format != "torch_dist" or target.grid.pipeline == 1 or not heads(config):
        return
    for what, there in {
        "a tied output layer": config.tie_word_embeddings,
        "learned positions": config.position_embedding_type == "learned_absolute",
    }.items():
        if there:
            yield f"{what} and heads for further tokens on a later pipeline stage do not go together in torch_dist"


def stages(grid: Grid, config: Config) -> Iterator[str]:
    """What there cannot be with one pipeline rank, in hybrids, and beside a layout."""
    given = {"first": grid.first is not None, "last": grid.last is not None, "layout": grid.layout is not None}
    accounted = {"account_for_embedding": grid.embedding, "account_for_loss": grid.loss}
    if grid.pipeline == 1:
        asked = {**given, **accounted, "VPP": grid.virtual > 1}
        yield from (f"{name} is given, but there is one pipeline rank" for name, there in asked.items() if there)
    elif is_hybrid(config):
        yield from (f"hybrids have no {name}" for name, there in accounted.items() if there)
        if grid.virtual > 1 and not grid.layout:
            yield "hybrids have virtual chunks only by a pattern with | after each"
    if grid.layout and (grid.first is not None or grid.last is not None):
        yield "the layout says the stages already: first and last do not go with it"


def written_out(grid: Grid, config: Config) -> Iterator[str]:
    """What Megatron asks of a GPT's layout string."""
    if grid.layout is None or is_hybrid(config):
        return
    text, further = unrolled(grid.layout).replace("|", ""), config.mtp_num_layers or 0
    if not re.fullmatch("Et*m*L", text):
        yield f"layout {grid.layout!r} is not E, then t for each layer, m for each head for further tokens, and L"
    if text.count("m") != further:
        yield f"layout {grid.layout!r} has {text.count('m')} m, the model has {further} heads for further tokens"
    turns = [turn for turn, stage in enumerate(unrolled(grid.layout).split("|")) if "m" in stage]
    if len(turns) > 1 or any(turn // grid.pipeline != grid.virtual - 1 for turn in turns):
        yield f"layout {grid.layout!r} does not have all m in one stage, a last chunk of its rank"
