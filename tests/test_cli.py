"""The command: light to start, exit codes that mean something, words for people and JSON for programs."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from small import LLAMA, SIZES, fingerprint, megahf, write_torch, write_torch_dist

import megahf as package
from megahf.cli import main

# Runs a command and says which heavy packages it imported, and the seconds of processor time it took.
WATCHED = """
import sys
from megahf.cli import main
main(sys.argv[1:], standalone_mode=False)
print(sorted({"torch", "transformers", "safetensors", "accelerate"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_torch(tmp_path / "ckpt", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    return tmp_path / "ckpt"


def run(*command: object) -> tuple[subprocess.CompletedProcess[str], float]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", WATCHED, *map(str, command)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize("command", [["inspect"], ["inspect", "--json"], ["convert"], ["verify"]])
@pytest.mark.parametrize("form", ["torch", "torch_dist"])
def test_neither_torch_nor_transformers_is_imported(tmp_path: Path, command: list[str], form: str) -> None:
    (write_torch if form == "torch" else write_torch_dist)(tmp_path / "ckpt")
    folder = [tmp_path / "hf"] if command[0] != "inspect" else []
    if command[0] == "verify":
        megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    done, _ = run(*command, tmp_path / "ckpt", *folder)
    assert done.stderr.splitlines()[-1] == "[]"


def test_inspect_prints_at_once(checkpoint: Path) -> None:
    """Half a second of a processor on the machines this was made for; the bound leaves room for slower ones."""
    assert min(run("inspect", checkpoint)[1] for _ in range(3)) < 1.0


def test_the_page_says_what_one_wants_to_know(checkpoint: Path) -> None:
    result = megahf("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    for words in (
        "torch, iteration 7, written by TP2 PP2: 4 files",
        "0.0 M parameters",
        "4 layers, hidden 32, 4 heads of 8 (2 query groups), MLP 48 gated silu",
        "RMSNorm, rope (base 10000), 40 positions, untied embeddings, no biases",
        "vocabulary of 61 (from the args), 3 rows of padding left out",
        "stages: pp0 0-1 | pp1 2-3",
        "decoder.layers.{l}.self_attention.linear_qkv.weight 64 x 32 by rows float32 4 32.77 KB",
        "left out: 8 keys, bookkeeping of layers, for fp8",
        "nothing stands in the way of `megahf convert`",
    ):
        assert words in said


def test_json_is_json_and_complete(checkpoint: Path) -> None:
    report = json.loads(megahf("inspect", checkpoint, "--json").output)
    assert (report["format"], report["iteration"], report["written_by"], report["files"]) == ("torch", 7, "TP2 PP2", 4)
    assert report["refused"] == []
    assert report["vocabulary"] == {"size": 61, "padding": 3, "known": "from the args"}
    assert report["config"]["num_query_groups"] == LLAMA["num_query_groups"]
    assert report["config"]["hidden_size"] == SIZES["hidden_size"]
    assert report["stages"][1] == {"pipeline": 1, "chunk": 0, "layers": [2, 4]}
    assert sum(row["bytes"] for row in report["weights"]) == 4 * report["parameters"]
    assert report["bytes_on_disk"] == sum(file.stat().st_size for file in checkpoint.rglob("*.pt"))


def test_json_of_a_refused_checkpoint_is_json_with_the_reasons(checkpoint: Path) -> None:
    result = megahf("inspect", checkpoint, "--json", "--true-vocab-size", "99")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert report["format"] == "torch"
    assert ["a vocabulary of 99" in reason for reason in report["refused"]] == [True]


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(checkpoint: Path) -> None:
    before = fingerprint(checkpoint.parent)
    result = megahf("convert", checkpoint, checkpoint.parent / "hf", "--dry-run")
    assert result.exit_code == 0
    assert "27 weights" in result.output
    assert "would write" in result.output
    assert fingerprint(checkpoint.parent) == before


def test_a_dry_run_refuses_what_the_run_would_refuse(checkpoint: Path) -> None:
    target = checkpoint.parent / "hf"
    assert megahf("convert", checkpoint, target).exit_code == 0
    for options in ([], ["--max-shard-size", "big"], ["--true-vocab-size", "99"]):
        place = target if not options else target.with_name("new")
        assert megahf("convert", checkpoint, place, "--dry-run", *options).exit_code == 1, options


def test_verify_says_how_much_is_equal(checkpoint: Path) -> None:
    megahf("convert", checkpoint, checkpoint.parent / "hf")
    result = megahf("verify", checkpoint, checkpoint.parent / "hf")
    assert result.exit_code == 0, result.output
    assert result.output == "27 weights, 139.65 KB: equal bit for bit\n"


def test_no_checksums_is_said(checkpoint: Path) -> None:
    result = megahf("convert", checkpoint, checkpoint.parent / "hf", "--no-checksums")
    assert result.exit_code == 0
    assert "the source's integrity was not checked" in result.output


@pytest.mark.parametrize("name", list(main.commands))
def test_every_command_explains_itself(name: str) -> None:
    result = megahf(name, "--help")
    assert result.exit_code == 0
    command = main.commands[name]
    for parameter in command.params:
        said = parameter.opts[0] if parameter.param_type_name == "option" else parameter.human_readable_name
        assert said in result.output
        assert parameter.param_type_name == "argument" or parameter.help, f"{parameter.name} of {name} has no help"


def test_the_help_names_every_command() -> None:
    result = megahf("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in ("inspect", "convert", "verify", "demo"))
    assert megahf("-h").output == result.output


def test_the_version_is_the_packages() -> None:
    assert megahf("--version").output == f"megahf, version {package.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["convert"],
        ["convert", "a"],
        ["convert", "a", "b", "c"],
        ["convert", "a", "b", "--dtype", "int3"],
        ["convert", "a", "b", "--true-vocab-size", "many"],
        ["convert", "a", "b", "--unknown-option"],
        ["inspect"],
        ["verify", "a"],
    ],
)
def test_wrong_usage_is_exit_code_2(command: list[str]) -> None:
    result = megahf(*command)
    assert result.exit_code == 2
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("command", [["inspect", "nowhere"], ["convert", "nowhere", "b"]])
def test_a_refusal_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = megahf(*command)
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: there is nothing there (nowhere)")


def test_the_installed_command_is_this_one(checkpoint: Path) -> None:
    command = Path(sys.executable).with_name("megahf")
    done = subprocess.run([command, "inspect", checkpoint, "--json"], capture_output=True, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["iteration"] == 7
