"""A Hugging Face Hub on the loopback: the calls that `huggingface_hub` makes to push a model and to fetch it again.

After the Hub's API as huggingface_hub speaks it: repositories, branches, preupload, LFS batch and upload, commit, tree,
resolve. Commits are whole sets of files; nothing is kept on disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER, READER = "hf_writer", "hf_reader"  # the tokens it knows
Fault = Callable[["Answer"], bool]  # does something wrong with a request and says whether that was all


@dataclass
class Commit:
    """One commit: all files of the repository then, and what the commit itself said."""

    message: str
    files: dict[str, bytes]
    operations: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)  # oid -> commit, in order
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        oid = hashlib.sha1(f"{branch} {len(self.commits)} {commit.message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = commit, oid
        return oid

    def at(self, revision: str) -> str | None:
        """The commit that a branch, or a commit's own hash, names."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        repos: by `namespace/name`.
        objects: large files by sha256.
        uploads: sha256 of each large file, every time it was sent whole.
        faults: (method, pattern of the path, fault): each is met once.
        seen: method and path of every request.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.faults: list[tuple[str, str, Fault]] = []
        self.seen: list[str] = []
        self.lock = Lock()

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Variables of a process for which this is the Hub, with an empty cache in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**kept, **ours, **quiet, **({"HF_TOKEN": token} if token else {})}

    def create(self, name: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """A repository as it is after its creation, or with `files`."""
        repo = self.repos[name] = Repo(private)
        repo.add("main", Commit("initial commit", files or {".gitattributes": b"*.safetensors filter=lfs\n"}))
        return repo


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub for as long as the block runs."""
    hub = Hub()
    Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def drop_halfway(answer: Answer) -> bool:
    """Takes half of the body, then the connection is gone."""
    answer.rfile.read(int(answer.headers["Content-Length"]) // 2)
    return hang_up(answer)


def hang_up(answer: Answer) -> bool:
    answer.connection.shutdown(socket.SHUT_RDWR)
    answer.close_connection = True
    return True


def busy(answer: Answer) -> bool:
    answer.say(503, {"error": "the Hub is busy"})
    return True


def lose_the_answer(answer: Answer) -> bool:
    """Does what is asked; the answer does not arrive."""
    answer.mute = True
    return False


class Answer(BaseHTTPRequestHandler):
    """One request."""

    server: Hub
    protocol_version = "HTTP/1.1"
    mute = False

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        self.path, self.query = unquote(urlsplit(self.path).path), urlsplit(self.path).query
        self.mute = False
        with self.server.lock:
            self.server.seen.append(f"{self.command} {self.path}")
            fault = next((one for one in self.server.faults if self.meets(one)), None)
            if fault:
                self.server.faults.remove(fault)
        if fault and fault[2](self):
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        for method, pattern, handle in ROUTES:
            if self.command in method and (match := re.fullmatch(pattern, self.path)):
                with self.server.lock:
                    handle(self, *match.groups())
                return
        self.say(404, {"error": f"nothing at {self.path}"})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def meets(self, fault: tuple[str, str, Fault]) -> bool:
        return self.command == fault[0] and re.fullmatch(fault[1], self.path) is not None

    def say(self, status: int, value: Any = None, data: bytes = b"", **headers: str) -> None:
        if self.mute:
            hang_up(self)
            return
        data = data if value is None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self, name: str | None = None, writing: bool = False, revision: str | None = None) -> bool:
        """Whether the token, the repository or the revision ended it."""
        token, repo = (
            (self.headers.get("Authorization") or "").removeprefix("Bearer "),
            self.server.repos.get(name or ""),
        )
        if token not in (WRITER, READER) and (writing or token):
            self.say(
                401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials in Authorization header"
            )
        elif writing and token == READER:
            self.say(403, {"error": "you need write rights"})
        elif name and (repo is None or (repo.private and not token)):
            self.say(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif repo and revision is not None and repo.at(revision) is None:
            self.say(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return False
        return True


def create(self: Answer) -> None:
    asked = json.loads(self.body)
    name = f"{asked['organization'] or 'someone'}/{asked['name']}"
    if self.refused(writing=True):
        return
    told = {"url": f"{self.server.url}/{name}", "name": name}
    if name in self.server.repos:
        self.say(409, {**told, "error": "You already created this model repo"})
        return
    self.server.create(name, private=asked.get("visibility") == "private" or asked.get("private") is True)
    self.say(200, told)


def info(self: Answer, name: str, revision: str | None = None) -> None:
    if not self.refused(name, revision=revision or "main"):
        repo = self.server.repos[name]
        oid = repo.at(revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[oid].files]
        self.say(200, {"id": name, "sha": oid, "private": repo.private, "siblings": siblings})


def branch(self: Answer, name: str, new: str) -> None:
    if not self.refused(name, writing=True):
        repo = self.server.repos[name]
        repo.branches[new] = repo.branches["main"]
        self.say(200, {})


def preupload(self: Answer, name: str, revision: str) -> None:
    if not self.refused(name, writing=True, revision=revision):
        repo = self.server.repos[name]
        there = repo.commits[repo.at(revision)].files
        ignored = there.get(".gitignore", b"").decode().split()
        files = [one["path"] for one in json.loads(self.body)["files"]]
        told = [
            {"path": path, "uploadMode": "lfs" if large(path) else "regular", "shouldIgnore": path in ignored}
            | ({"oid": oid_of(path, there[path])} if path in there else {})
            for path in files
        ]
        self.say(200, {"files": told})


def batch(self: Answer, name: str) -> None:
    if not self.refused(name, writing=True):
        objects = [
            one
            if one["oid"] in self.server.objects
            else {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
            for one in json.loads(self.body)["objects"]
        ]
        self.say(200, {"transfer": "basic", "objects": objects})


def upload(self: Answer, oid: str) -> None:
    if hashlib.sha256(self.body).hexdigest() != oid:
        self.say(400, {"error": "the bytes are others"})
        return
    self.server.objects[oid] = self.body
    self.server.uploads.append(oid)
    self.say(200)


def commit(self: Answer, name: str, revision: str) -> None:
    if self.refused(name, writing=True, revision=revision):
        return
    repo = self.server.repos[name]
    first, *operations = [json.loads(line) for line in self.body.splitlines()]
    files = dict(repo.commits[repo.at(revision)].files)
    for one in operations:
        value = one["value"]
        if one["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif one["key"] == "lfsFile":
            files[value["path"]] = self.server.objects[value["oid"]]
        else:
            del files[value["path"]]
    oid = repo.add(revision, Commit(first["value"]["summary"], files, operations))
    self.say(200, {"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid, "pullRequestUrl": None})


def tree(self: Answer, name: str, revision: str) -> None:
    if not self.refused(name, revision=revision):
        repo = self.server.repos[name]
        entries = []
        for path, data in repo.commits[repo.at(revision)].files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if large(path):
                entry["lfs"] = {"oid": oid_of(path, data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self.say(200, entries)


def resolve(self: Answer, name: str, revision: str, path: str) -> None:
    if self.refused(name, revision=revision):
        return
    repo = self.server.repos[name]
    oid = repo.at(revision)
    data = repo.commits[oid].files.get(path)
    if data is None:
        self.say(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
    else:
        self.say(200, data=data, ETag=f'"{oid_of(path, data)}"', X_Repo_Commit=oid)


def validate(self: Answer) -> None:
    """As the Hub's own check: the front matter must be YAML, with tags as a list of words."""
    front = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
    fine = isinstance(front, dict) and all(isinstance(tag, str) for tag in front.get("tags", []))
    self.say(200 if fine else 400, {"errors": [] if fine else ["metadata"], "warnings": []})


def large(path: str) -> bool:
    return path.endswith(".safetensors")


def oid_of(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if large(path) else git_hash(data)


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = "([^/]+/[^/]+)"
ROUTES: tuple[tuple[tuple[str, ...], str, Callable[..., None]], ...] = (
    (("POST",), "/api/repos/create", create),
    (("POST",), "/api/validate-yaml", validate),
    (("GET",), f"/api/models/{REPO}", info),
    (("GET",), f"/api/models/{REPO}/revision/(.+)", info),
    (("POST",), f"/api/models/{REPO}/branch/(.+)", branch),
    (("POST",), f"/api/models/{REPO}/preupload/(.+)", preupload),
    (("POST",), f"/{REPO}\\.git/info/lfs/objects/batch", batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", upload),
    (("POST",), f"/api/models/{REPO}/commit/(.+)", commit),
    (("GET",), f"/api/models/{REPO}/tree/([^/]+)", tree),
    (("GET", "HEAD"), f"/{REPO}/resolve/([^/]+)/(.+)", resolve),
)
