"""Promise: a push makes the repository hold the folder, by one commit, whatever the network does meanwhile.

The Hub is a server on the loopback (hub.py), and each push a process of its own for which that is the Hub.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub
import pytest
from hub import Hub
from small import fingerprint, write_torch

import megahf
from megahf import convert
from megahf.errors import Refused
from megahf.push import parcel

REPO = "org/model"
# Loads the repository by transformers alone, and says what the model computes.
LOAD = """
import sys
sys.modules["megahf"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=sys.argv[2] or None, trust_remote_code=True)
with torch.no_grad():
    print(model(torch.arange(1, 9)[None]).logits.double().sum().item())
"""
FETCH = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2]))
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder in several shards."""
    place = tmp_path_factory.mktemp("converted")
    write_torch(place / "ckpt", tensor=2)
    convert(place / "ckpt", place / "hf", max_shard_size="40KB")
    assert len(list((place / "hf").glob("*.safetensors"))) > 2
    return place / "hf"


@pytest.fixture
def here() -> Iterator[Hub]:
    with hub.running() as server:
        yield server


def run(command: list[object], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    package = {"PYTHONPATH": str(Path(megahf.__file__).parents[1])}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, env={**environment, **package}, capture_output=True, text=True, timeout=300)


def push(
    here: Hub, folder: Path, home: Path, *options: str, token: str | None = hub.WRITER
) -> subprocess.CompletedProcess[str]:
    return run(["-m", "megahf.cli", "push", folder, REPO, *options], here.environment(home, token))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(here: Hub, branch: str = "main") -> hub.Commit:
    """The last commit, which must be the only one after that which made the repository."""
    repo = here.repos[REPO]
    assert len(repo.commits) == 2
    return repo.commits[repo.branches[branch]]


FAULTS = {
    "nothing goes wrong": [],
    "an upload is cut off, and the next one refused": [
        ("PUT", "/lfs/.*", hub.drop_halfway),
        ("PUT", "/lfs/.*", hub.busy),
    ],
    "the Hub is busy at every step": [
        ("POST", "/api/repos/create", hub.busy),
        ("POST", ".*/preupload/main", hub.busy),
        ("POST", ".*/objects/batch", hub.busy),
        ("POST", ".*/commit/main", hub.busy),
    ],
    "the answer to the commit is lost": [("POST", ".*/commit/main", hub.lose_the_answer)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=list(FAULTS))
def test_one_commit_has_exactly_the_files_of_the_folder(
    here: Hub, converted: Path, tmp_path: Path, faults: list[tuple[str, str, hub.Fault]]
) -> None:
    here.faults += faults
    done = push(here, converted, tmp_path)
    assert done.returncode == 0, done.stderr
    assert here.faults == []
    files, commit = contents(converted), pushed(here)
    assert {one["value"]["path"] for one in commit.operations} == set(files)
    assert {name: commit.files[name] for name in files} == files
    assert set(commit.files) - set(files) == {".gitattributes"}  # of the Hub's own making
    assert sorted(here.uploads) == sorted(set(here.uploads))  # no file was sent twice
    assert f"/{REPO}/commit/{here.repos[REPO].branches['main']}" in done.stdout


def test_what_was_pushed_is_fetched_again_and_loads(here: Hub, converted: Path, tmp_path: Path) -> None:
    assert push(here, converted, tmp_path / "a").returncode == 0
    revision = here.repos[REPO].branches["main"]
    fetched = run(["-c", FETCH, REPO, revision], here.environment(tmp_path / "b", None))
    assert fetched.returncode == 0, fetched.stderr
    wanted, found = contents(converted), contents(Path(fetched.stdout.strip()))
    assert {name: found[name] for name in wanted} == wanted
    theirs = run(["-c", LOAD, REPO, revision], here.environment(tmp_path / "c", None))
    assert theirs.returncode == 0, theirs.stderr
    offline = {**here.environment(tmp_path / "d"), "HF_HUB_OFFLINE": "1"}
    ours = run(["-c", LOAD, converted, ""], offline)
    assert theirs.stdout == ours.stdout != ""


def test_hf_download_gives_the_same_bytes(here: Hub, converted: Path, tmp_path: Path) -> None:
    assert push(here, converted, tmp_path / "a").returncode == 0
    command = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
    words = ["-c", command, "download", REPO, "--local-dir", tmp_path / "there"]
    done = run(words, here.environment(tmp_path / "b", None))
    assert done.returncode == 0, done.stderr
    wanted = fingerprint(converted)
    found = fingerprint(tmp_path / "there")
    assert {name: found[name] for name in wanted} == wanted


def test_a_push_that_failed_is_taken_up_where_it_stopped(here: Hub, converted: Path, tmp_path: Path) -> None:
    here.faults += [("POST", ".*/commit/main", refuse_the_commit)]
    failed = push(here, converted, tmp_path)
    assert failed.returncode == 1
    assert "refused: the Hub says" in failed.stderr
    assert "no room" in failed.stderr
    assert len(here.repos[REPO].commits) == 1
    sent = list(here.uploads)
    assert push(here, converted, tmp_path).returncode == 0
    assert here.uploads == sent
    assert {name: pushed(here).files[name] for name in contents(converted)} == contents(converted)


def refuse_the_commit(answer: hub.Answer) -> bool:
    answer.rfile.read(int(answer.headers["Content-Length"]))
    answer.say(413, {"error": "there is no room"})
    return True


def test_pushing_twice_makes_one_commit(here: Hub, converted: Path, tmp_path: Path) -> None:
    assert push(here, converted, tmp_path).returncode == 0
    again = push(here, converted, tmp_path)
    assert again.returncode == 0, again.stderr
    assert "all of it was there already" in again.stdout
    pushed(here)


def test_weights_of_an_earlier_push_go_and_other_files_stay(here: Hub, converted: Path, tmp_path: Path) -> None:
    before = {"model.safetensors": b"old", "LICENSE": b"mine", "adapter_model.safetensors": b"an adapter"}
    here.create(REPO, before)
    assert push(here, converted, tmp_path).returncode == 0
    left = set(pushed(here).files) - set(contents(converted))
    assert left == {"LICENSE", "adapter_model.safetensors"}


def test_a_branch_is_made_where_it_is_missing_and_main_stays(here: Hub, converted: Path, tmp_path: Path) -> None:
    done = push(here, converted, tmp_path, "--revision", "iter-7", "--message", "At iteration 7")
    assert done.returncode == 0, done.stderr
    commit = pushed(here, "iter-7")
    assert commit.message == "At iteration 7"
    assert set(contents(converted)) <= set(commit.files)
    assert set(here.repos[REPO].commits[here.repos[REPO].branches["main"]].files) == {".gitattributes"}


def test_a_private_push_makes_a_private_repository(here: Hub, converted: Path, tmp_path: Path) -> None:
    assert push(here, converted, tmp_path, "--private").returncode == 0
    assert here.repos[REPO].private


def public_already(here: Hub) -> None:
    here.create(REPO)


def ignoring(here: Hub) -> None:
    here.create(REPO, {".gitignore": b"config.json"})


REFUSALS: dict[str, tuple[Callable[[Hub], None], tuple[str, ...], str | None, dict[str, str], str]] = {
    "no token": (lambda here: None, (), None, {}, "not logged in to the Hub"),
    "a token that is none": (lambda here: None, (), "hf_stranger", {}, "the Hub does not accept the token"),
    "a token that may only read": (public_already, (), hub.READER, {}, "no permission to write"),
    "offline": (lambda here: None, (), hub.WRITER, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    "public, and should be private": (public_already, ("--private",), hub.WRITER, {}, "there already, and public"),
    "a .gitignore holds files back": (ignoring, (), hub.WRITER, {}, "files that did not arrive (config.json)"),
    "nobody there": (lambda here: None, (), hub.WRITER, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "to the Hub failed"),
    "a commit": (lambda here: None, ("--revision", "0" * 40), hub.WRITER, {}, "only a branch can be pushed to"),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=list(REFUSALS))
def test_what_the_hub_does_not_take_is_refused_by_name(
    here: Hub,
    converted: Path,
    tmp_path: Path,
    case: tuple[Callable[[Hub], None], tuple[str, ...], str | None, dict[str, str], str],
) -> None:
    prepare, options, token, changes, words = case
    prepare(here)
    environment = {**here.environment(tmp_path, token), **changes}
    done = run(["-m", "megahf.cli", "push", converted, REPO, *options], environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("refused: ")
    assert words in done.stderr


def test_a_dry_run_says_all_of_it_and_asks_the_hub_nothing(here: Hub, converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "hf")
    (folder / ".secret").write_text("mine")
    done = push(here, folder, tmp_path, "--dry-run", "--private", "--revision", "iter-7", token=None)
    assert done.returncode == 0, done.stderr
    assert here.seen == []
    for name in contents(converted):
        assert name in done.stdout
    for words in (REPO, here.url, "iter-7", "private", "left out, hidden or compiled: .secret"):
        assert words in done.stdout
    total = sum(map(len, contents(converted).values()))
    assert f"{len(contents(converted))} files, {total / 1000:.2f} KB" in done.stdout


def cut_short(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def rename_partial(folder: Path) -> None:
    os.rename(folder, folder.with_name("hf.partial"))
    folder.symlink_to("hf.partial")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "not a converted folder"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("*.safetensors")], "not a converted folder"),
    "a missing shard": (lambda folder: min(folder.glob("*.safetensors")).unlink(), "names files that are not there"),
    "a shard cut short": (cut_short, "cut short"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "the index is missing"),
    "no code": (lambda folder: (folder / "modeling_mcore_gpt.py").unlink(), "code is not all there"),
    "a part of the code": (lambda folder: (folder / "attention.py").unlink(), "code is not all there"),
    "an unfinished folder": (rename_partial, "has not ended"),
    "a run's notes": (lambda folder: (folder / ".megahf").mkdir(), "has not ended"),
    "nothing": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_folder_that_would_not_load_is_not_sent(
    converted: Path, tmp_path: Path, damage: tuple[Callable[[Path], object], str]
) -> None:
    folder = shutil.copytree(converted, tmp_path / "hf")
    assert set(parcel(folder).files) == set(contents(converted))
    damage[0](folder)
    with pytest.raises(Refused, match=damage[1]):
        parcel(folder)


def test_a_checkpoint_of_megatron_is_not_sent(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    with pytest.raises(Refused, match="not a converted folder"):
        parcel(tmp_path / "ckpt")


def test_code_that_lies_elsewhere_need_not_be_here(converted: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(converted, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "org/code--configuration_elsewhere.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json" in parcel(folder).files
