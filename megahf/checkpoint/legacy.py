"""`--ckpt-format torch`: a directory of `mp_rank_*/model_optim_rng.pt`, one file for each model-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megahf.checkpoint import Checkpoint, Holding, Rank, iteration_in
from megahf.checkpoint.inert import OBJECTS, UNKNOWN, entries_of, plain, tensor_of, word
from megahf.checkpoint.mapped import Files
from megahf.checkpoint.opcodes import DAMAGED, malformed_is_refused
from megahf.checkpoint.torchfile import TorchFile, read_torch
from megahf.errors import Problems, refuse
from megahf.tiles import Tiled

FILE = "model_optim_rng.pt"
DIRECTORY = re.compile(r"mp_rank_(\d+)(?:_(\d+))?(?:_(\d+))?")
CHUNK = re.compile(r"model(\d*)")
PER_RANK = {"rank", "local_rank", "node_rank", "hostname"}  # arguments in which the ranks of one run differ
MISSING = "copy every mp_rank_* directory of the iteration"


class RankFile:
    """One rank's file: what it says about itself, and its model chunks as records.

    `numbers` are those of its directory's name: tensor rank first.
    """

    def __init__(self, directory: Path, files: Files) -> None:
        self.where = f"{directory.name}/{FILE}"
        self.numbers = [int(number) for number in re.findall(r"\d+", directory.name)]
        self.opened: TorchFile = read_torch(files.open(directory / FILE), self.where)
        content = entries_of(self.opened.root, "the file", self.where)
        if "args" not in content:
            raise refuse(
                "the file has no args", self.where, "megahf needs the arguments that Megatron saves with every model"
            )
        args = plain(content["args"], f"{self.where}: args")
        if not isinstance(args, dict):
            raise refuse(f"args is {word(content['args'])}", self.where, "save it with Megatron's own save_checkpoint")
        self.args: dict[str, object] = args
        self.iteration = plain(content.get("iteration"), self.where)
        self.version = plain(content.get("checkpoint_version"), self.where)
        self.chunks = {int(name[1] or 0): content[name[0]] for key in content if (name := CHUNK.fullmatch(key))}
        self.virtual = "model" not in content
        if not self.chunks:
            raise refuse(
                f"the file has no model: it holds {', '.join(list(content)[:8])}", self.where, "give the model's file"
            )
        if sorted(self.chunks) != list(range(len(self.chunks))) or (not self.virtual and "model0" in content):
            raise refuse(f"the file holds the model chunks {sorted(self.chunks)}", self.where, DAMAGED)

    def size(self, name: str, default: int = 1) -> int:
        """A parallel size from the arguments: the default where an old file has none."""
        value = self.args.get(name)
        if value is not None and type(value) is not int:
            raise refuse(f"args.{name} is {value!r:.40}", self.where, DAMAGED)
        return value or default


def open_legacy(directory: Path, files: Files) -> Checkpoint:
    """Opens every rank's file and checks that they are all there and of one run."""
    ranks = [RankFile(child, files) for child in rank_directories(directory)]
    first = ranks[0]
    placed = placed_ranks(ranks)
    problems = Problems()
    for other in ranks[1:]:
        compare(first, other, problems)
    problems.raise_if_any()
    holdings = [holding for rank, file in placed.items() for holding in holdings_of(rank, file)]
    iteration = None if directory.name == "release" else first.iteration
    if iteration is None and directory.name != "release":
        iteration = iteration_in(directory)
    return Checkpoint(
        path=directory,
        format="torch",
        iteration=iteration if isinstance(iteration, int) else None,
        version=float(first.version) if isinstance(first.version, (int, float)) else None,
        args=first.args,
        holdings=holdings,
        files=files,
    )


def rank_directories(directory: Path) -> list[Path]:
    found = [child for child in sorted(directory.iterdir()) if child.is_dir() and DIRECTORY.fullmatch(child.name)]
    if not found:
        names = ", ".join(sorted(child.name for child in directory.iterdir())[:8])
        raise refuse(
            f"this is no Megatron checkpoint: it holds {names}",
            directory,
            "give a directory with iter_*, mp_rank_* or .metadata",
        )
    lacking = [child.name for child in found if not (child / FILE).is_file()]
    if lacking:
        raise refuse(f"there is no {FILE}", ", ".join(lacking[:8]), MISSING)
    return found


def placed_ranks(files: list[RankFile]) -> dict[Rank, RankFile]:
    """Which rank each file is, by its directory's numbers and the sizes the arguments name; none missing, none extra.

    `mp_rank_00_001` is pipeline rank 1, or expert rank 1 of a run without pipelines.
    """
    first = files[0]
    tensor, pipeline, expert = (first.size(f"{kind}_model_parallel_size") for kind in ("tensor", "pipeline", "expert"))
    shards = first.size("expert_tensor_parallel_size", tensor) if first.args.get("num_experts") else 1
    refuse_unnamed(first, tensor, shards, expert)
    meant = f"tensor x pipeline x expert = {tensor} x {pipeline} x {expert}"
    encoders, own = (first.size(f"encoder_{kind}_model_parallel_size", 0) for kind in ("pipeline", "tensor"))
    pipeline += encoders  # of Megatron 0.9 to 0.13: stages before the others, of tensor ranks of their own
    meant += f" after {encoders} of an encoder" if encoders else ""
    placed: dict[Rank, RankFile] = {}
    problems = Problems()
    for file in files:
        rest = file.numbers[1:]
        if len(rest) != (pipeline > 1) + (expert > 1):
            problems.add(
                f"the directory's name does not fit args of {meant}", file.where, "give one run's directory, whole"
            )
            continue
        rank = Rank(file.numbers[0], rest[0] if pipeline > 1 else 0, rest[-1] if expert > 1 else 0)
        if rank.tensor >= tensor or rank.pipeline >= pipeline or rank.expert >= expert:
            problems.add(
                f"this rank is too many: the args say {meant}", file.where, "remove what is left of another run"
            )
        if rank in placed:
            both = f"{placed[rank].where} and {file.where}"
            problems.add("two files are of one rank", both, "remove what is left of another run")
        placed[rank] = file
    for what, where in () if encoders else strangers(placed, tensor):
        problems.add(what, where, "put every file back into the directory of its rank")
    for lacking in missing_ranks(set(placed), Rank(tensor, pipeline, expert), shards, encoders, own or tensor):
        problems.add(f"ranks are missing: the args say {meant}", lacking, MISSING)
    problems.raise_if_any()
    return placed


def strangers(placed: Mapping[Rank, RankFile], tensor: int) -> Iterator[tuple[str, str]]:
    """Files in another rank's directory, where the files say who wrote them: tensor ranks are counted fastest."""
    wrote = [(rank, file, file.args.get("rank")) for rank, file in placed.items()]
    if len({number for _, _, number in wrote}) != len(wrote):
        return  # all alike: this writer does not say
    for rank, file, number in wrote:
        if type(number) is int and number % tensor != rank.tensor:
            its = f"tensor rank {number % tensor}, not {rank.tensor}"
            yield f"rank {number} of the run wrote this file: {its}", file.where


def refuse_unnamed(file: RankFile, tensor: int, shards: int, expert: int) -> None:
    """Refuses cuts of experts that a file's name does not settle: it has no expert-tensor rank."""
    if tensor % shards:
        what = f"experts cut over {shards} ranks do not fit files of {tensor} tensor ranks: ranks wrote over each other"
        raise refuse(what, file.where, "save it with --ckpt-format torch_dist")
    if file.args.get("moe_extended_tp") and expert > 1:
        raise refuse("--moe-extended-tp cuts experts another way", file.where, "save it with --ckpt-format torch_dist")


def missing_ranks(
    there: set[Rank], sizes: Rank, shards: int, encoders: int = 0, encoder_tensor: int = 1
) -> Iterator[str]:
    """Of each stage Megatron writes every tensor rank and every shard of every expert rank, but not every pair.

    Args:
        sizes: how many ranks of each kind there are.
        shards: ranks that share an expert's matrices; they are the tensor ranks counted modulo this.
        encoders: stages of an encoder, which come first and have no experts; each is of `encoder_tensor` ranks.
    """
    dense = {(rank.tensor, rank.pipeline) for rank in there}
    experts = {(rank.tensor % shards, rank.pipeline, rank.expert) for rank in there}
    for stage in range(sizes.pipeline):
        staged = f", pipeline rank {stage}" if sizes.pipeline > 1 else ""
        tensor, expert = (encoder_tensor, 1) if stage < encoders else (sizes.tensor, sizes.expert)
        yield from (f"tensor rank {t}{staged}" for t in range(tensor) if (t, stage) not in dense)
        for e in range(expert if expert > 1 else 0):
            lacking = [t for t in range(shards) if (t, stage, e) not in experts]
            if len(lacking) == shards:
                yield f"expert rank {e}{staged}"
            else:
                yield from (f"expert rank {e}, tensor rank {t}{staged}" for t in lacking)


def compare(first: RankFile, other: RankFile, problems: Problems) -> None:
    """Ranks of one run agree on everything but who they are."""
    where, remedy = f"{first.where} and {other.where}", "give the files of one run's one iteration"
    for what, mine, its in (
        ("iteration", first.iteration, other.iteration),
        ("checkpoint_version", first.version, other.version),
        ("model chunks", sorted(first.chunks), sorted(other.chunks)),
    ):
        if mine != its:
            problems.add(f"ranks differ in {what}: {mine!r:.40} and {its!r:.40}", where, remedy)
    for name in sorted((first.args.keys() | other.args.keys()) - PER_RANK):
        mine, its = first.args.get(name), other.args.get(name)
        if mine != its:
            problems.add(f"ranks differ in args.{name}: {mine!r:.40} and {its!r:.40}", where, remedy)


def holdings_of(rank: Rank, file: RankFile) -> Iterator[Holding]:
    for chunk, records in sorted(file.chunks.items()):
        where = f"{file.where}: model{chunk if file.virtual else ''}"
        with malformed_is_refused(where):
            yield holding_of(rank, chunk, records, file.opened, where)


def holding_of(rank: Rank, chunk: int, records: object, opened: TorchFile, where: str) -> Holding:
    """A model's flat dictionary as tensors and objects; every tensor is checked now, none is read."""
    content = entries_of(records, "the model", where)
    if "language_model" in content:
        raise refuse(
            "this is a checkpoint from before megatron-core (model['language_model'])", where,
            "convert it with tools/checkpoint/convert.py of Megatron-LM core_v0.12.0: --loader legacy --saver core",
        )  # fmt: skip
    tensors, objects = {}, {}
    problems = Problems()
    for key, record in content.items():
        array = tensor_of(record, opened.storage, opened.file, f"{where} {key}")
        if array is not None:
            tensors[key] = array
        elif word(record) in OBJECTS:
            objects[key] = word(record)
        else:
            problems.add(f"the model holds a {word(record)}", f"{where} {key}", UNKNOWN)
    problems.raise_if_any()
    opened.file.forget()
    shapes = {key: (array.shape, array.dtype) for key, array in tensors.items()}
    return Holding(where, rank, chunk, shapes, objects, lambda key: Tiled.of(tensors[key]))
