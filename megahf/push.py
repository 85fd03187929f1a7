"""`push`: a converted folder becomes a repository of the Hugging Face Hub, in one commit.

The large files go first, each by its digest; the commit that names them comes last. So a push that was cut off leaves
the repository as it was, and the next one sends only what has not arrived.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from . import __version__
from .checkpoint.mapped import Files
from .checkpoint.safetensors import INDEX, stored
from .errors import Problems, Refused, refuse
from .jsonfile import read_json
from .plan import amount
from .staging import CONFIG, NOTES

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

Result = TypeVar("Result")

WAITS = (1, 2, 4)  # seconds before a step is tried again; huggingface_hub itself tries each upload six times
COMMIT = re.compile(r"[0-9a-f]{40}")
WEIGHTS = re.compile(rf"model(-\d+-of-\d+)?\.safetensors|{re.escape(INDEX)}")
CONVERT = "give the folder that `megahf convert` wrote"
AGAIN = "run the same command again: what has arrived is not sent again"


@dataclass(frozen=True)
class Parcel:
    """What of a folder is sent.

    Attributes:
        files: path in the repository -> bytes.
        left_out: hidden files, and what Python compiled.
    """

    folder: Path
    files: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


class Pushed(NamedTuple):
    """Where a folder is now."""

    repo: str  # with its namespace
    commit: str
    url: str
    changed: bool  # False: all of it was there already
    private: bool


def parcel(folder: str | Path) -> Parcel:
    """The files of a converted folder.

    Raises:
        Refused: it is none, or not whole: config, code or weights are missing or cut short.
    """
    folder = Path(folder)
    check_folder(folder)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    hidden = tuple(name for name in names if any(part[0] == "." or part == "__pycache__" for part in name.split("/")))
    return Parcel(folder, {name: size for name, size in names.items() if name not in hidden}, hidden)


def check_folder(folder: Path) -> None:
    """Refuses what would not load."""
    if not folder.is_dir():
        raise refuse("there is no such folder", folder, CONVERT)
    if folder.resolve().name.endswith(".partial") or (folder / NOTES).exists():
        raise refuse("the conversion into this folder has not ended", folder, "run the same `megahf convert` again")
    if not (folder / CONFIG).exists() or not any(folder.glob("*.safetensors")):
        raise refuse(f"not a converted folder: it needs {CONFIG} and safetensors files", folder, CONVERT)
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        named = set(map(str, places.values())) if isinstance(places, dict) else set()
        if absent := sorted(name for name in named if not (folder / name).exists()):
            raise refuse("the index names files that are not there", ", ".join(absent), "convert again")
    elif not (folder / "model.safetensors").exists():
        raise refuse("the index is missing, without which shards are not found", folder / INDEX, "convert again")
    files = Files()
    stored(folder, files)
    files.close()
    check_code(folder)


def check_code(folder: Path) -> None:
    """Refuses a folder whose config names modules that are not there, or that import such."""
    classes = read_json(folder / CONFIG).get("auto_map") or {}
    places = [place for place in classes.values() if isinstance(place, str) and "--" not in place]  # --: elsewhere
    wanted, seen, problems = sorted({place.partition(".")[0] for place in places}), set[str](), Problems()
    while wanted:
        module = wanted.pop()
        if module in seen:
            continue
        seen.add(module)
        path = folder / f"{module}.py"
        if path.exists():
            wanted += re.findall(r"^\s*from\s+\.(\w+)\s+import", path.read_text(encoding="utf-8"), re.MULTILINE)
        else:
            problems.add("the model's code is not all there", path.name, "convert again")
    problems.raise_if_any()


def endpoint() -> str:
    """The Hub that is pushed to: `HF_ENDPOINT`, or huggingface.co."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def check_target(repo: str, revision: str | None) -> None:
    """Refuses names that no repository or branch can have."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise refuse(f"not the name of a repository: {error}", repo, "write it like ORG/NAME") from error
    if revision is not None and COMMIT.fullmatch(revision):
        raise refuse("this is a commit, and only a branch can be pushed to", revision, "name a branch")


def page(sent: Parcel, repo: str, revision: str | None, private: bool) -> str:
    """What would be sent where, a line a file."""
    check_target(repo, revision)
    kind = "which must be private" if private else "private or public as it is, or as its namespace makes new ones"
    lines = [f"would push to {repo} at {endpoint()}, branch {revision or 'main'}, {kind}"]
    lines += [f"{amount(size):>12}  {name}" for name, size in sent.files.items()]
    if sent.left_out:
        lines.append(f"left out, hidden or compiled: {', '.join(sent.left_out)}")
    return "\n".join([*lines, f"{len(sent.files)} files, {amount(sent.nbytes)}, in one commit"])


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Pushed:
    """Makes the repository `repo` hold `folder`, by one commit; the repository and the branch are made where missing.

    Weights of an earlier push that are not among the folder's are removed by the same commit; all else stays.

    Args:
        private: the repository must be a private one.
        revision: a branch; `main` by default.

    Raises:
        Refused: the folder is not whole, or the Hub does not take it.
    """
    sent = parcel(folder)
    check_target(repo, revision)
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise refuse("not logged in to the Hub", endpoint(), "`hf auth login`, or set HF_TOKEN")
    with explained(repo):
        api = HfApi(library_name="megahf", library_version=__version__)
        repo = persistently(lambda: api.create_repo(repo, private=private or None, exist_ok=True)).repo_id
        secret = bool(persistently(lambda: api.repo_info(repo)).private)
        if private and not secret:
            raise refuse("the repository is there already, and public", repo, "make it private first, or leave it so")
        before = persistently(lambda: head(api, repo, revision))
        words = message or f"Pushed by megahf {__version__}"
        done = persistently(lambda: commit(api, repo, revision, sent, words))
        check_arrived(api, repo, done.oid, sent)
    return Pushed(repo, done.oid, done.commit_url, done.oid != before, secret)


def head(api: HfApi, repo: str, revision: str | None) -> str | None:
    """The last commit of the branch, which is made where it is missing."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.repo_info(repo, revision=revision).sha
    except RevisionNotFoundError:
        if revision is None:
            raise
        api.create_branch(repo, branch=revision, exist_ok=True)
        return api.repo_info(repo, revision=revision).sha


def commit(api: HfApi, repo: str, revision: str | None, sent: Parcel, message: str) -> CommitInfo:
    """One commit with all of the folder. Asks anew what the Hub has, so that trying again makes no second one."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo, revision=revision)
    stale = [name for name in there if WEIGHTS.fullmatch(name) and name not in sent.files]
    added = [CommitOperationAdd(name, str(sent.folder / name)) for name in sent.files]
    removed = [CommitOperationDelete(name) for name in stale]
    return api.create_commit(repo, [*added, *removed], commit_message=message, revision=revision)


def check_arrived(api: HfApi, repo: str, oid: str, sent: Parcel) -> None:
    """Refuses a commit that lacks files of the folder: the repository's .gitignore may have held them back."""
    from huggingface_hub.hf_api import RepoFile

    tree = persistently(lambda: list(api.list_repo_tree(repo, recursive=True, revision=oid)))
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    problems = Problems()
    for name, size in sent.files.items():
        if sizes.get(name) != size:
            problems.add("files that did not arrive", name, f"look at .gitignore of {repo}")
    problems.raise_if_any()


def persistently(step: Callable[[], Result]) -> Result:
    """What `step` gives, which is tried again when the connection broke or the Hub was busy."""
    for wait in WAITS:
        try:
            return step()
        except Exception as error:
            if not passes(error):
                raise
            time.sleep(wait)
    return step()


def passes(error: BaseException) -> bool:
    """Whether it may be gone in a moment."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    cause = root(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return False
    status = status_of(cause)
    return isinstance(cause, (HTTPError, ConnectionError)) if status is None else status in (408, 429) or status >= 500


def root(error: BaseException) -> BaseException:
    """The first error of the Hub's or of the network's that led to `error`, else itself."""
    from huggingface_hub.errors import HTTPError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (HTTPError, OSError)):
        cause = cause.__cause__
    return cause or error


def status_of(error: BaseException) -> int | None:
    """The status of the answer that was an error; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def explained(repo: str) -> Iterator[None]:
    """What goes wrong with the Hub, as refusals."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise reason(root(error), repo) from error


def reason(error: BaseException, repo: str) -> Refused:
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    status = status_of(error)
    said = (getattr(error, "server_message", None) or str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OfflineModeIsEnabled):
        return refuse("HF_HUB_OFFLINE is set, so nothing can be sent", repo, "unset it and run the same command again")
    if isinstance(error, RevisionNotFoundError):
        return refuse("the repository has no such branch", repo, "name another with --revision")
    if status == 401:
        return refuse("the Hub does not accept the token", endpoint(), "`hf auth login`, or set HF_TOKEN anew")
    if status == 403:
        return refuse(f"no permission to write: {said}", repo, "use a token that may, or another name")
    if status == 404:
        return refuse("the repository is not there, or the token may not see it", repo, "check the name and the token")
    if status is None and isinstance(error, (HTTPError, ConnectionError)):
        return refuse(f"the connection to the Hub failed: {said}", endpoint(), AGAIN)
    return refuse(f"the Hub says {said}" if status else f"the upload failed: {said}", repo, AGAIN)
