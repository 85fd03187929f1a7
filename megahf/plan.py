"""What goes where, before a byte moves: every weight of the target as tiles of the source files.

`build` walks the table over what a checkpoint holds. Each stored key is recognised, given its global layer number,
merged over tensor-parallel ranks and checked for shape; what is stored more than once is kept as a copy to compare.
A key that no row names, or a row that no key fills, is a refusal. The plan knows all sizes, so a dry run, the time left
and the peak memory come from it; it is deterministic, so it has a digest, and a killed run resumes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from . import dtypes
from .arguments import config as config_of
from .arguments import grid, notes, unknown, vocabulary
from .checkpoint import Checkpoint, Holding
from .errors import Problems, refuse
from .layouts import Chunk, Grid, layers
from .tiles import Tiled, join
from .weights import HEAD, WORDS, Config, Found, Row, Weight, foreign, ignored, recognise, weights


@dataclass(frozen=True)
class Copy:
    """One weight of the target and where its bytes come from."""

    name: str
    array: Tiled  # the source, in the target's shape
    dtype: np.dtype  # of the target
    same: tuple[tuple[str, Tiled], ...] = ()  # (where, array): stored again, and must be equal bit for bit
    runtime: str = ""  # the parameter's name in the model

    @property
    def nbytes(self) -> int:
        """Bytes of the target."""
        return self.array.nbytes // self.array.dtype.itemsize * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


@dataclass
class Plan:
    """Everything a conversion will do."""

    checkpoint: Checkpoint
    config: Config
    grid: Grid
    copies: list[Copy]
    padding: int  # vocabulary rows left out
    vocabulary: str  # how the true size is known
    left_out: dict[str, int]  # reason -> stored keys
    unknown_arguments: list[str]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        return sum(copy.nbytes for copy in self.copies)

    @property
    def dtype(self) -> np.dtype:
        """The number format that most of the bytes are in."""
        sizes: dict[np.dtype, int] = defaultdict(int)
        for copy in self.copies:
            sizes[copy.dtype] += copy.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def summary(self) -> str:
        """The plan in a few lines."""
        checkpoint, padding = self.checkpoint, f", {self.padding} rows of padding left out" if self.padding else ""
        iteration = "release" if checkpoint.iteration is None else f"iteration {checkpoint.iteration}"
        lines = [
            f"{checkpoint.format}, {iteration}, {self.grid}: {len(self.copies)} weights, {amount(self.nbytes)}",
            f"vocabulary of {self.config.vocab_size} ({self.vocabulary}){padding}",
            *self.notes,
        ]
        if self.unknown_arguments:
            lines.append(f"arguments megahf does not know: {', '.join(self.unknown_arguments)}")
        return "\n".join(lines)

    @cached_property
    def digest(self) -> str:
        """The same for the same source files and the same target, different for any other."""
        text = hashlib.sha256(repr(vars(self.config)).encode())
        for file in self.checkpoint.files:
            text.update(repr((file.path.name, file.size, file.mtime_ns)).encode())
        for copy in self.copies:
            text.update(repr((copy.name, copy.shape, copy.dtype.name)).encode())
            for start, view in copy.array.tiles:
                file, offset = self.checkpoint.files.locate(view)
                text.update(repr((file.path.name, start, view.shape, view.strides, offset)).encode())
        return text.hexdigest()


@dataclass
class Stored:
    """One weight as it lies in one pipeline chunk: block part -> tensor-parallel rank -> copies (where, array)."""

    chunk: Chunk
    sharded: bool  # by tensor-parallel ranks, as legacy files are
    parts: dict[int, dict[int, list[tuple[str, Tiled]]]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, part: int, rank: int, where: str, array: Tiled) -> None:
        self.parts[part].setdefault(rank, []).append((where, array))


Places = dict[str, dict[Chunk, Stored]]  # canonical name -> chunk -> what it holds


def build(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer_size: int | None = None,
) -> Plan:
    """The plan that turns `checkpoint` into one whole model.

    Args:
        dtype: `bf16`, `fp16`, `fp32` or torch's names for the target's floats; as stored by default.
        true_vocab_size: rows of the vocabulary to keep; else the tokenizer's, else the args' say so.

    Raises:
        Refused: unknown, missing, misshapen or unequal weights, and arguments that are not built; all at once.
    """
    args = checkpoint.args
    config = config_of(args, 0)
    chunks = 1 + max((holding.chunk for holding in checkpoint.holdings), default=0)
    ranks = grid(args, chunks if checkpoint.format == "torch" else None)
    places, left_out = locate(checkpoint, config, ranks)
    rows = vocabulary_rows(places, ranks)
    config.vocab_size, source = vocabulary(args, rows, true_vocab_size, tokenizer_size)
    copies = assemble(places, config, ranks, target_dtype(dtype))
    return Plan(
        checkpoint, config, ranks, copies, rows - config.vocab_size, source, left_out, unknown(args), notes(args)
    )


def target_dtype(name: str | None) -> np.dtype | None:
    if name is None:
        return None
    known = dtypes.BY_TORCH.get(dtypes.SHORT.get(name, name))
    if known is None or not dtypes.is_float(known):
        raise refuse(f"{name!r} is not a number format for weights", "--dtype", f"one of {', '.join(dtypes.SHORT)}")
    return known


def locate(checkpoint: Checkpoint, config: Config, ranks: Grid) -> tuple[Places, dict[str, int]]:
    """Every stored key under its canonical name, and how many keys were left out for what reason."""
    places: Places = defaultdict(dict)
    left_out: dict[str, int] = defaultdict(int)
    strange, held = Problems(), layers(ranks, config.num_layers)
    for holding in checkpoint.holdings:
        for key in (*holding.shapes, *holding.objects):
            if reason := ignored(key):
                left_out[reason] += 1
            elif (found := recognise(key)) is None:
                kind = foreign(key)
                what = f"these weights belong to {kind}, which is not supported yet" if kind else "unknown weights"
                strange.add(
                    what, f"{key} in {holding.where}", "" if kind else "every key must be in a row of weights.py"
                )
            elif key in holding.objects:
                strange.add(f"a weight that is no tensor but {holding.objects[key]}", f"{key} in {holding.where}")
            else:
                for name, array in read(holding, key, found, held, config, strange):
                    chunk = (holding.rank.pipeline, holding.chunk) if holding.rank else (0, 0)
                    stored = places[name].setdefault(chunk, Stored(chunk, holding.rank is not None))
                    stored.add(found.part, holding.rank.tensor if holding.rank else 0, holding.where, array)
    strange.raise_if_any()
    return places, dict(left_out)


def read(
    holding: Holding, key: str, found: Found, held: Mapping[Chunk, range], config: Config, problems: Problems
) -> Iterable[tuple[str, Tiled]]:
    """The canonical name and array of each weight that `key` stores: one, or one a layer where they are stacked."""
    where = f"{key} in {holding.where}"
    if found.stacked:
        layers_stored = holding.shapes[key][0][0]
        if layers_stored != config.num_layers:
            problems.add(f"{layers_stored} layers are stacked, the args say {config.num_layers}", where)
            return []
        stacked = holding.read(key)
        return [(found.row.name.format(l=layer), stacked.take(layer)) for layer in range(layers_stored)]
    if found.layer is None:
        return [(found.row.name, holding.read(key))]
    mine = held[holding.rank.pipeline, holding.chunk] if holding.rank else range(config.num_layers)
    if found.layer >= len(mine):
        problems.add(f"layer {found.layer} of a stage that the args give {len(mine)} layers", where)
        return []
    return [(found.row.name.format(l=mine[found.layer]), holding.read(key))]


def vocabulary_rows(places: Places, ranks: Grid) -> int:
    """Rows of the word embedding over all ranks, padding included."""
    if WORDS not in places:
        raise refuse("the word embedding is not in this checkpoint", WORDS, "is the first pipeline stage missing?")
    stored = next(iter(places[WORDS].values()))
    if absent := sorted(set(range(ranks.tensor if stored.sharded else 1)) - set(stored.parts[0])):
        raise refuse(f"missing on tensor-parallel ranks {absent} of {ranks.tensor}", WORDS, "are ranks mixed up?")
    return sum(copies[0][1].shape[0] for copies in stored.parts[0].values())


def assemble(places: Places, config: Config, ranks: Grid, dtype: np.dtype | None) -> list[Copy]:
    """One copy for each weight of the model; what is missing, left over or misshapen is refused together."""
    problems, copies = Problems(), []
    expected = {weight.name: weight for weight in weights(config)}
    tied = tied_copies(places, expected, problems)
    for name, weight in expected.items():
        if name not in places:
            problems.add("missing weights", name, "the checkpoint is incomplete, or its args are another model's")
            continue
        stored = [*places[name].values(), *(places[tied[name]].values() if name in tied else ())]
        wholes = [whole for chunk in stored for whole in merged(weight, chunk, config, ranks, problems)]
        if wholes:
            source = wholes[0][1].dtype
            target = dtype if dtype is not None and dtypes.is_float(source) else source
            copies.append(Copy(name, wholes[0][1], target, tuple(wholes[1:]), runtime(weight)))
    problems.raise_if_any()
    return copies


def runtime(weight: Weight) -> str:
    """The parameter's name in the causal language model."""
    name = weight.row.runtime.format(l=weight.layer)
    return name if weight.row.name in HEAD else f"model.{name}"


def tied_copies(places: Places, expected: Mapping[str, Weight], problems: Problems) -> dict[str, str]:
    """Weights that are stored though the model has them only as another one's tie: the kept name -> the copy's."""
    tied = {}
    for name in places:
        if name in expected:
            continue
        found = recognise(name)
        if found and found.row.tied in expected:
            tied[found.row.tied] = name
        else:
            needs = f"they exist only with {found.row.when}" if found else ""
            problems.add("weights of a model that the args do not describe", name, needs)
    return tied


def merged(weight: Weight, stored: Stored, config: Config, ranks: Grid, problems: Problems) -> list[tuple[str, Tiled]]:
    """(where, whole array) for each time that one chunk stores a weight."""
    parts, cut = [stored.parts[part] for part in sorted(stored.parts)], weight.row.cut
    wanted = ranks.tensor if stored.sharded else 1
    if absent := sorted(set(range(wanted)) - set(range(wanted)).intersection(*parts)):
        problems.add(f"missing on tensor-parallel ranks {absent} of {wanted}", weight.name)
        return []
    try:
        if cut.dim is None:
            wholes = [copy for rank in parts[0].values() for copy in rank]
        else:
            turns = max(len(copies) for part in parts for copies in part.values())
            wholes = [whole(weight.row, parts, turn, config) for turn in range(turns)]
        return [(where, fitted(weight, array)) for where, array in wholes]
    except ValueError as error:
        problems.add(f"shapes do not fit: {error}", weight.name, "were these ranks written by one run?")
        return []


def whole(row: Row, parts: list[dict[int, list[tuple[str, Tiled]]]], turn: int, config: Config) -> tuple[str, Tiled]:
    """A cut weight over its ranks; `turn` picks among several files that hold the same rank."""
    chosen = [[part[rank][min(turn, len(part[rank]) - 1)] for rank in sorted(part)] for part in parts]
    arrays = [[array for _, array in part] for part in chosen]
    where, dim = chosen[0][0][0], row.cut.dim or 0
    if len(parts) == 1:
        return where, row.cut.merge(arrays[0], config)
    return where, join([join(part, dim) for part in arrays], dim)


def fitted(weight: Weight, array: Tiled) -> Tiled:
    """`array` without vocabulary padding; its shape must be what the config says."""
    if weight.row.cut.padded and array.shape[0] >= weight.shape[0]:
        array = array.narrow(0, 0, weight.shape[0])
    if array.shape != weight.shape:
        letters = weight.row.shape.replace(" ", " x ")
        raise ValueError(f"stored {list(array.shape)}, the args say {list(weight.shape)} ({letters})")
    return array


def amount(size: int) -> str:
    """Bytes in words."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
