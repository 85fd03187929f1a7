"""What goes where, before a byte moves: every weight of the target as tiles of the source files.

`build` walks the table over what a checkpoint holds. Each stored key is recognised, given its global layer number,
merged over tensor-parallel ranks and checked for shape; what is stored more than once is kept as a copy to compare.
A key that no row names, or a row that no key fills, is a refusal. The plan knows all sizes, so a dry run, the time left
and the peak memory come from it; it is deterministic, so it has a digest, and a killed run resumes.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import dtypes
from .arguments import config as config_of
from .arguments import grid, notes, unknown, vocabulary
from .checkpoint import Checkpoint
from .cuts import Config, padded_heads
from .discovery import discover, marked, shapes_of
from .errors import Problems, refuse
from .layouts import Grid
from .rows import LANGUAGE, language
from .stored import Copies, Places, Source, Stored, check_shape, locate, versions
from .tiles import Tiled, join
from .weights import HEAD, WORDS, Weight, weights


@dataclass(frozen=True)
class Copy:
    """One weight of the target and where its bytes come from."""

    name: str
    array: Tiled  # the source, in the target's shape
    dtype: np.dtype  # of the target
    same: tuple[tuple[str, Tiled], ...] = ()  # (where, array): stored again, and must be equal bit for bit
    runtime: str = ""  # the parameter's name in the model
    plus: float = 0.0  # added to every number: a norm's scale about zero becomes one about one
    blank: tuple[tuple[str, Tiled], ...] = ()  # (where, array): left out, and must be zeros

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
    experts: str  # how they are stored, in a word; empty without experts
    left_out: dict[str, int]  # reason -> stored keys
    unknown_arguments: list[str]
    notes: list[str]
    special: dict[str, Any] = field(default_factory=dict)  # ids of special tokens that the source's config gives

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
        source = (
            f"{checkpoint.format}, {iteration}, {self.grid}" if checkpoint.holdings else f"a {checkpoint.format} folder"
        )
        lines = [
            f"{source}: {len(self.copies)} weights, {amount(self.nbytes)}",
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
            text.update(repr((copy.name, copy.shape, copy.dtype.name, copy.plus)).encode())
            for start, view in copy.array.tiles:
                file, offset = self.checkpoint.files.locate(view)
                text.update(repr((file.path.name, start, view.shape, view.strides, offset)).encode())
        return text.hexdigest()


def build(
    checkpoint: Checkpoint,
    *,
    dtype: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer_size: int | None = None,
    keep_padding: bool = False,
) -> Plan:
    """The plan that turns `checkpoint` into one whole model.

    Args:
        dtype: `bf16`, `fp16`, `fp32` or torch's names for the target's floats; as stored by default.
        true_vocab_size: rows of the vocabulary to keep; else the tokenizer's, else the args' say so.
        keep_padding: keep the rows beyond them too; `Plan.padding` counts them.

    Raises:
        Refused: unknown, missing, misshapen or unequal weights, and arguments that are not built; all at once.
    """
    shapes = shapes_of(checkpoint)
    args = marked(checkpoint.args, shapes)
    config = config_of(args, 0)
    chunks = 1 + max((holding.chunk for holding in checkpoint.holdings), default=0)
    ranks = grid(args, chunks if checkpoint.format == "torch" else None)
    said = notes(args)
    said += discover(config, args, shapes, ranks, checkpoint.format == "torch")
    source = Source.of(config, args, ranks)._replace(padding=keep_padding)
    places, left_out = locate(checkpoint, source)
    rows = vocabulary_rows(places, ranks)
    language(config).vocab_size, known = vocabulary(args, rows, true_vocab_size, tokenizer_size)
    copies = assemble(places, source, target_dtype(dtype))
    padding, experts = rows - config.vocab_size, expert_layout(places)
    return Plan(checkpoint, config, ranks, copies, padding, known, experts, left_out, unknown(args), said)


def target_dtype(name: str | None) -> np.dtype | None:
    if name is None:
        return None
    known = dtypes.BY_TORCH.get(dtypes.SHORT.get(name, name))
    if known is None or not dtypes.is_float(known):
        raise refuse(f"{name!r} is not a number format for weights", "--dtype", f"one of {', '.join(dtypes.SHORT)}")
    return known


def expert_layout(places: Places) -> str:
    """The layouts of experts that were found."""
    found = {name for chunks in places.values() for stored in chunks.values() for name in stored.layouts}
    return " and ".join(sorted(found - {""}))


def vocabulary_rows(places: Places, ranks: Grid) -> int:
    """Rows of the word embedding over all ranks, padding included."""
    words = next((name for name in (WORDS, f"{LANGUAGE}.{WORDS}") if name in places), None)
    if words is None:
        raise refuse("the word embedding is not in this checkpoint", WORDS, "is the first pipeline stage missing?")
    stored = next(iter(places[words].values()))
    (part,) = stored.runs[0].values()
    if absent := sorted(set(range(ranks.tensor if stored.sharded else 1)) - set(part)):
        raise refuse(f"missing on tensor-parallel ranks {absent} of {ranks.tensor}", words, "are ranks mixed up?")
    return sum(copies[0][1].shape[0] for copies in part.values())


def assemble(places: Places, source: Source, dtype: np.dtype | None) -> list[Copy]:
    """One copy for each weight of the model; what is missing, left over or misshapen is refused together."""
    problems, copies = Problems(), []
    expected = {weight.name: weight for weight in weights(source.config)}
    tied = tied_copies(places, expected, source.config, problems)
    for name, weight in expected.items():
        if name not in places:
            problems.add("missing weights", name, "the checkpoint is incomplete, or its args are another model's")
            continue
        stored = [*places[name].values(), *(places[tied[name]].values() if name in tied else ())]
        wholes = [whole for chunk in stored for whole in assembled(weight, chunk, source, problems)]
        if wholes:
            target = target_of(weight, wholes[0][1].dtype, dtype)
            blank = tuple(dummy for chunk in stored for dummy in dummies(weight, chunk, source))
            copies.append(Copy(name, wholes[0][1], target, tuple(wholes[1:]), runtime(weight), blank=blank))
    problems.raise_if_any()
    return copies


def target_of(weight: Weight, stored: np.dtype, asked: np.dtype | None) -> np.dtype:
    """The number format a weight is written in."""
    if weight.row.float32:
        return np.dtype(np.float32)
    return asked if asked is not None and dtypes.is_float(stored) else stored


def runtime(weight: Weight) -> str:
    """The parameter's name in the causal language model."""
    return weight.parameter if weight.row.name in HEAD else f"model.{weight.parameter}"


def tied_copies(places: Places, expected: Mapping[str, Weight], config: Config, problems: Problems) -> dict[str, str]:
    """Weights that are stored though the model has them only as another one's tie: the kept name -> the copy's."""
    tied = {}
    for name in places:
        if name in expected:
            continue
        stored = next(iter(places[name].values()))
        if stored.row.tied in expected:
            tied[stored.row.tied] = name
        else:
            missing = ", ".join(stored.row.unmet(config, stored.layer))
            problems.add("weights of a model that the args do not describe", name, f"they exist only with {missing}")
    return tied


def assembled(weight: Weight, stored: Stored, source: Source, problems: Problems) -> Copies:
    """(where, whole array) for each time that one chunk stores a weight."""
    row = weight.row
    wanted = source.tensor_ranks(row) if stored.sharded else 1
    for run in stored.runs.values():
        if absent := sorted(set(range(wanted)) - set(range(wanted)).intersection(*run.values())):
            problems.add(f"missing on tensor-parallel ranks {absent} of {wanted}", weight.name)
            return []
    try:
        runs = {first: versions(row, stored, run, weight.shape, source) for first, run in stored.runs.items()}
        if row.experts and (lacking := absent_experts(runs, weight.shape[0])):
            problems.add(
                f"experts {lacking} of {weight.shape[0]} are missing", weight.name, "is the file of a rank missing?"
            )
            return []
        wholes = [in_turn(runs, turn) for turn in range(max(map(len, runs.values())))]
        return [(where, fitted(weight, array, source)) for where, array in wholes]
    except ValueError as error:
        problems.add(f"shapes do not fit: {error}", weight.name, "were these ranks written by one run?")
        return []


def dummies(weight: Weight, stored: Stored, source: Source) -> Copies:
    """(where, array) of the dummy heads that a chunk stores of a matrix; what norms have of them scales zeros."""
    cut = weight.row.cut
    if not cut.heads or cut.dim is None or len(weight.shape) == 1:
        return []
    wholes, size = versions(weight.row, stored, stored.runs[0], weight.shape, source), weight.shape[cut.dim]
    rest = [(where, array.narrow(cut.dim, size, array.shape[cut.dim] - size)) for where, array in wholes]
    return [(where, array) for where, array in rest if array.nbytes]


def absent_experts(runs: Mapping[int, Copies], total: int) -> list[int]:
    """Experts that no run holds."""
    held = {first + number for first, copies in runs.items() for number in range(copies[0][1].shape[0])}
    return sorted(set(range(total)) - held)


def in_turn(runs: Mapping[int, Copies], turn: int) -> tuple[str, Tiled]:
    """All experts, from the `turn`-th copy of each run of them."""
    picked = [runs[first][min(turn, len(runs[first]) - 1)] for first in sorted(runs)]
    return picked[0][0], picked[0][1] if len(picked) == 1 else join([array for _, array in picked], 0)


def fitted(weight: Weight, array: Tiled, source: Source) -> Tiled:
    """`array` without vocabulary padding, if that is not kept, and without an encoder's dummy heads; its shape must be
    what the config says."""
    whole, cut = array, weight.row.cut
    if cut.padded and array.shape[0] >= weight.shape[0]:
        array = array.narrow(0, 0, weight.shape[0])
    if cut.heads and cut.dim is not None:
        config, size = weight.row.of(source.config), weight.shape[cut.dim]
        padded = padded_heads(config, source.ranks.encoder or source.ranks.tensor)
        if array.shape[cut.dim] == size // config.num_attention_heads * padded:
            array = array.narrow(cut.dim, 0, size)
    check_shape(weight.row, array.shape, weight.shape, source.config)
    return whole if source.padding and cut.padded else array


def amount(size: int) -> str:
    """Bytes in words."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
