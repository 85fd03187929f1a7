"""A checkpoint becomes a folder: every weight bit for bit, and the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import GPT2, assert_same, fingerprint, megahf, rewrite, tensors, write_torch, write_torch_dist

from megahf import convert, execute
from megahf.errors import Refused

LAYOUTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2 PP2": {"tensor": 2, "pipeline": 2, "stages": [[0, 1], [2, 3]]},
    "TP2 PP2 VPP2": {"tensor": 2, "pipeline": 2, "stages": [[0], [1], [2], [3]]},
    "uneven first stage": {"pipeline": 2, "stages": [[0], [1, 2, 3]], "decoder_first_pipeline_num_layers": 1},
    "layout string": {
        "pipeline": 2,
        "stages": [[0], [1], [2, 3], []],
        "pipeline_model_parallel_layout": "Et|t|tt|L",
    },
    "local spelling": {"tensor": 2, "local": True},
    "bf16": {"tensor": 2, "dtype": torch.bfloat16},
    "gpt2, tied, TP2 PP2": {"tensor": 2, "pipeline": 2, "stages": [[0, 1], [2, 3]], **GPT2},
}
PLAIN = {
    "swiglu": False,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "position_embedding_type": "learned_absolute",
}
LAYOUTS["gpt2, tied, TP2 PP2"] |= PLAIN


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_weight_of_a_legacy_checkpoint_arrives(tmp_path: Path, layout: dict[str, Any]) -> None:
    wanted = write_torch(tmp_path / "ckpt", **layout)
    convert(tmp_path / "ckpt", tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), wanted)


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "layer by layer"])
def test_every_weight_of_a_distributed_checkpoint_arrives(tmp_path: Path, stacked: bool) -> None:
    wanted = write_torch_dist(tmp_path / "ckpt", stacked)
    convert(tmp_path / "ckpt", tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), wanted)


def test_the_formats_give_the_same_folder(tmp_path: Path) -> None:
    write_torch(tmp_path / "a", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    write_torch_dist(tmp_path / "b")
    for name in "ab":
        convert(tmp_path / name, tmp_path / f"{name}_hf")
    a, b = fingerprint(tmp_path / "a_hf"), fingerprint(tmp_path / "b_hf")
    assert {name for name in a if a[name] != b[name]} == {"megahf.json", "README.md"}  # which names its source


def test_an_iteration_can_be_given_itself(tmp_path: Path) -> None:
    wanted = write_torch(tmp_path / "ckpt")
    convert(tmp_path / "ckpt" / "iter_0000007", tmp_path / "hf")
    assert_same(tensors(tmp_path / "hf"), wanted)


def test_converting_twice_gives_the_same_bytes_whatever_the_threads_and_the_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torch(tmp_path / "ckpt", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    convert(tmp_path / "ckpt", tmp_path / "hf", max_shard_size="40KB")
    for threads, buffer in ((1, 4 << 20), (5, 300)):
        monkeypatch.setattr(execute, "THREADS", threads)
        monkeypatch.setattr(execute.boxes, "__defaults__", (buffer,))
        convert(tmp_path / "ckpt", tmp_path / f"hf{threads}", max_shard_size="40KB")
        assert fingerprint(tmp_path / f"hf{threads}") == fingerprint(tmp_path / "hf")


def test_shards_stay_under_their_size_and_the_index_names_them(tmp_path: Path) -> None:
    wanted = write_torch(tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "hf", max_shard_size="20KB")
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 20_000 + 2000 for file in files)  # the limit counts weights, not the header
    assert_same(tensors(tmp_path / "hf"), wanted)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(wanted)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_dtype_casts_as_torch_does(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    wanted = write_torch(tmp_path / "ckpt", tensor=2)
    convert(tmp_path / "ckpt", tmp_path / "hf", dtype=name)
    assert_same(tensors(tmp_path / "hf"), {key: value.to(dtype) for key, value in wanted.items()})
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_without_checksums_the_weights_are_the_same_and_no_digest_is_claimed(tmp_path: Path) -> None:
    wanted = write_torch(tmp_path / "ckpt", tensor=2)
    convert(tmp_path / "ckpt", tmp_path / "hf", checksums=False)
    assert_same(tensors(tmp_path / "hf"), wanted)
    assert json.loads((tmp_path / "hf" / "megahf.json").read_text())["weights"] == {}


def test_the_digests_recorded_are_those_of_the_bytes_written(tmp_path: Path) -> None:
    from blake3 import blake3

    write_torch(tmp_path / "ckpt", tensor=2)
    convert(tmp_path / "ckpt", tmp_path / "hf", dtype="bf16")
    recorded = json.loads((tmp_path / "hf" / "megahf.json").read_text())["weights"]
    written = tensors(tmp_path / "hf")
    assert recorded == {name: blake3(value.view(torch.uint8).numpy()).hexdigest() for name, value in written.items()}


def write_tokenizer(folder: Path, size: int) -> None:
    """A word tokenizer of `size` tokens, the last of them added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size - 1)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="<end>").save_pretrained(folder)


def test_a_tokenizer_settles_the_vocabulary_and_goes_along(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt", vocab_size=64)
    write_tokenizer(tmp_path / "tokenizer", 50)
    plan = convert(tmp_path / "ckpt", tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert (plan.config.vocab_size, plan.padding) == (50, 14)
    assert tensors(tmp_path / "hf")["output_layer.weight"].shape[0] == 50
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (50, 1, 49)

    from transformers import PreTrainedTokenizerFast

    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")("w3 w4 <end>")["input_ids"] == [3, 4, 49]


def test_a_tokenizer_of_more_tokens_than_rows_asked_for_is_refused(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt", vocab_size=64)
    write_tokenizer(tmp_path / "tokenizer", 50)
    with pytest.raises(Refused, match="the tokenizer has ids up to 49, 49 rows are asked for"):
        convert(tmp_path / "ckpt", tmp_path / "hf", tokenizer=tmp_path / "tokenizer", true_vocab_size=49)
    assert not (tmp_path / "hf").exists()


def test_a_vocabulary_that_was_asked_for_wins_over_the_args(tmp_path: Path) -> None:
    wanted = write_torch(tmp_path / "ckpt", tensor=2)
    plan = convert(tmp_path / "ckpt", tmp_path / "hf", true_vocab_size=31)  # all of it on the first rank
    assert (plan.config.vocab_size, plan.padding, plan.vocabulary) == (31, 33, "as asked for")
    assert torch.equal(tensors(tmp_path / "hf")["output_layer.weight"], wanted["output_layer.weight"][:31])


def test_an_unknown_vocabulary_is_kept_whole_and_said_to_be(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    rewrite(tmp_path / "ckpt", lambda content: setattr(content["args"], "vocab_size", None))
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    assert "vocabulary of 64 (unknown: all rows kept, padding included)" in result.output
    assert tensors(tmp_path / "hf")["output_layer.weight"].shape[0] == 64


def test_the_config_loads_in_transformers_with_every_field(tmp_path: Path) -> None:
    from megahf import McoreGPTConfig

    write_torch(tmp_path / "ckpt")
    plan = convert(tmp_path / "ckpt", tmp_path / "hf")
    config = McoreGPTConfig.from_pretrained(tmp_path / "hf")
    assert {name: getattr(config, name) for name in vars(plan.config)} == vars(plan.config)


@pytest.mark.parametrize("kind", [{}, {**GPT2, **PLAIN}, {"dtype": torch.bfloat16}], ids=["llama", "gpt2", "bf16"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_model_filled_and_saved_gives_the_same_folder(tmp_path: Path, kind: dict[str, Any], shard: str) -> None:
    import megahf

    write_torch(tmp_path / "ckpt", tensor=2, **kind)
    convert(tmp_path / "ckpt", tmp_path / "a", max_shard_size=shard)
    megahf.from_megatron(tmp_path / "ckpt").save_pretrained(tmp_path / "b", max_shard_size=shard)
    a, b = fingerprint(tmp_path / "a"), fingerprint(tmp_path / "b")
    assert {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)} == {"megahf.json", "README.md"}


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    assert result.exit_code == 0, result.output
    assert "vocabulary of 61 (from the args), 3 rows of padding left out" in result.output
    assert f"wrote {tmp_path / 'hf'}: 27 weights" in result.output
