"""`verify` between every pair of forms that `convert` turns into one another; a flipped byte is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
from small import megahf, write_torch
from small_experts import Run, write_experts
from small_hybrid import write_hybrid

import megahf as package
from megahf import convert
from megahf.checkpoint import Files
from megahf.checkpoint.safetensors import stored
from megahf.errors import Refused


class Pair(NamedTuple):
    """A source and what it is made.

    Args:
        source: by its name in `sources`.
        options: of `convert`.
        weights: how many the target has, which are compared.
    """

    source: str
    options: dict[str, Any]
    weights: int = 27


MEGATRON: dict[str, Any] = {"to": "megatron"}
PAIRS: dict[str, Pair] = {
    "Megatron to ours": Pair("megatron", {"to": "hf"}),
    "Megatron to torch": Pair("megatron", {**MEGATRON, "format": "torch", "tp": 4, "pp": 2, "vpp": 2}),
    "Megatron to torch_dist": Pair("megatron", {**MEGATRON, "tp": 2, "first": 1, "pp": 2}),
    "Megatron to torch_dist, bf16": Pair("megatron", {**MEGATRON, "dtype": "bf16"}),
    "Megatron to torch, fp16": Pair("megatron", {**MEGATRON, "dtype": "fp16", "format": "torch"}),
    "Megatron to torch, local": Pair("megatron", {**MEGATRON, "format": "torch", "engine": False}),
    "Megatron to fewer rows": Pair("megatron", {**MEGATRON, "true_vocab_size": 40, "divisible_by": 8}),
    "Megatron to a family": Pair("megatron", {"to": "llama"}, 39),
    "Megatron to a family, fp16": Pair("megatron", {"to": "llama", "dtype": "fp16", "max_shard_size": "40KB"}, 39),
    "folded gammas to a family": Pair("folded", {"to": "llama"}, 39),
    "folded gammas to torch": Pair("folded", {**MEGATRON, "format": "torch"}),
    "ours to torch_dist": Pair("ours", {**MEGATRON, "tp": 2}),
    "ours to a family": Pair("ours", {"to": "mistral"}, 39),
    "a family to torch": Pair("llama", {**MEGATRON, "format": "torch", "tp": 2}),
    "a family to torch_dist, bf16": Pair("llama", {**MEGATRON, "dtype": "bf16"}),
    "a family to ours": Pair("llama", {"to": "hf"}),
    "a family to another": Pair("llama", {"to": "mistral"}, 39),
    "experts to torch": Pair("experts", {**MEGATRON, "format": "torch", "ep": 4, "experts": "sequential"}, 17),
    "experts to torch_dist": Pair("experts", {**MEGATRON, "ep": 2, "etp": 2, "tp": 2}, 17),
    "a hybrid to torch": Pair("hybrid", {**MEGATRON, "format": "torch", "tp": 2, "pp": 2, "layout": "M*-|M"}),
    "a hybrid to torch_dist": Pair("hybrid", {**MEGATRON, "tp": 4}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_torch(folder / "megatron", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    write_torch(folder / "folded", layernorm_zero_centered_gamma=True)
    write_experts(folder / "experts", "sequential", Run(tensor=2, expert=2))
    write_hybrid(folder / "hybrid", "M*-M")
    convert(folder / "megatron", folder / "ours")
    convert(folder / "ours", folder / "llama", to="llama")
    return folder


@pytest.fixture(params=PAIRS, scope="module")
def made(
    request: pytest.FixtureRequest, sources: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Pair]:
    pair, target = PAIRS[request.param], tmp_path_factory.mktemp("made") / "out"
    convert(sources / pair.source, target, **pair.options)
    return sources / pair.source, target, pair


def test_what_convert_made_is_equal(made: tuple[Path, Path, Pair]) -> None:
    source, target, pair = made
    result = megahf("verify", source, target)
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"{pair.weights} weights, ")
    assert result.output.endswith(": equal bit for bit\n")


def test_progress_counts_the_bytes_of_the_target(made: tuple[Path, Path, Pair]) -> None:
    seen: list[int] = []
    verified = package.verify(made[0], made[1], progress=seen.append)
    assert sum(seen) == verified.nbytes


def test_a_flipped_byte_is_found_and_its_weight_named(made: tuple[Path, Path, Pair]) -> None:
    source, target, _ = made
    file, offset, name = place(target)
    data = file.read_bytes()
    damaged = bytearray(data)
    damaged[offset] ^= 4
    file.write_bytes(damaged)
    try:
        result = megahf("verify", source, target)
    finally:
        file.write_bytes(data)
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: weights that differ from the ")
    assert name in result.stderr
    assert len(result.stderr.splitlines()) == 1


def place(target: Path) -> tuple[Path, int, str]:
    """The file, a byte in the middle of a matrix of it, and that weight's name."""
    if (target / "config.json").exists():
        name, written = max(stored(target, Files()).items(), key=lambda item: (item[1].nbytes, item[0]))
        return written.file.path, written.offset + written.nbytes // 2, name
    plan = package.export.plan_for(target)
    copy = max(plan.copies, key=lambda copy: (copy.array.nbytes, copy.name))
    view = copy.array.tiles[len(copy.array.tiles) // 2].view
    file, offset = plan.checkpoint.files.locate(view)
    return file.path, offset + view[0].nbytes // 2, copy.name


def test_a_flipped_byte_in_the_padding_is_found(sources: Path, tmp_path: Path) -> None:
    """No weight has it, but its storage's checksum does."""
    convert(sources / "llama", tmp_path / "out", to="megatron", format="torch")
    (file,) = tmp_path.rglob("*.pt")
    plan = package.export.plan_for(tmp_path / "out", keep_padding=True)
    words = plan.copies[0].array
    assert words.shape == (128, 32)
    _, offset = plan.checkpoint.files.locate(words.tiles[0].view)
    data = bytearray(file.read_bytes())
    data[offset + 100 * 32 * 4] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match=r"CRC-32 of embedding.word_embeddings.weight is wrong \(.*model_optim_rng.pt\)"):
        package.verify(sources / "llama", tmp_path / "out")


def test_another_model_is_not_taken_for_the_source(sources: Path, tmp_path: Path) -> None:
    write_torch(tmp_path / "other", rotary_base=500000, seed=1)
    convert(tmp_path / "other", tmp_path / "out", to="megatron")
    with pytest.raises(Refused, match="the target's args say rotary_base 500000"):
        package.verify(sources / "llama", tmp_path / "out")


def test_a_checkpoint_of_another_size_is_said_weight_by_weight(sources: Path, tmp_path: Path) -> None:
    write_torch(tmp_path / "other", num_layers=2, ffn_hidden_size=40, stages=[[0, 1]])
    convert(tmp_path / "other", tmp_path / "out", to="megatron")
    with pytest.raises(Refused) as refused:
        package.verify(sources / "llama", tmp_path / "out")
    said = str(refused.value)
    for words in ("num_layers 2, the source 4", "weights missing from the target (decoder.layers.2.", "[32, 40], not"):
        assert words in said


def test_a_tokenizer_given_to_convert_does_not_make_a_difference(sources: Path, tmp_path: Path) -> None:
    """Its special tokens stand in config.json in the place of the source's."""
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text('{"model": {"vocab": {"<s>": 0, "</s>": 1}}}')
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    convert(sources / "megatron", tmp_path / "a", to="llama", tokenizer=tmp_path / "words")
    (tmp_path / "words" / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    convert(tmp_path / "a", tmp_path / "b", to="mistral", tokenizer=tmp_path / "words")
    assert package.verify(tmp_path / "a", tmp_path / "b").weights == 39
