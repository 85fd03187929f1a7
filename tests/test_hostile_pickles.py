"""The promise: a hostile checkpoint is refused, or read as data; nothing it names is called or imported.

All files are opened in one fresh process under an audit hook, so that a call would be seen whoever made it. The files
are assembled from opcodes here, independently of the reader.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

CANARY = "canary-was-here"
COMMAND = f"touch {CANARY}"
SYSTEM = b"cposix\nsystem\n"

Parts = dict[str, bytes]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(integer(value) for value in values) + b"t"


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in values.items()) + b"u"


def tensor(
    shape: bytes,
    strides: bytes,
    offset: int = 0,
    key: str = "0",
    cls: bytes = b"ctorch\nFloatStorage\n",
    count: int = 6,
) -> bytes:
    storage = b"(" + text("storage") + cls + text(key) + text("cpu") + integer(count) + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + integer(offset) + shape + strides + b"\x89" + hooks + b"tR"
    )


GOOD_ARGS = b"cargparse\nNamespace\n)\x81" + mapping(hidden_size=integer(2)) + b"b"
GOOD_TENSOR = tensor(sizes(2, 3), sizes(3, 1))


def parts(args: bytes = GOOD_ARGS, weight: bytes = GOOD_TENSOR, storage: bytes = bytes(24)) -> Parts:
    content = mapping(args=args, iteration=integer(1), checkpoint_version=integer(3), model=mapping(weight=weight))
    return {
        "a/data.pkl": b"\x80\x02" + content + b".",
        "a/byteorder": b"little",
        "a/data/0": storage,
        "a/version": b"3\n",
    }


def zipped(path: Path, members: Parts, **options: int) -> None:
    with zipfile.ZipFile(path, "w", **options) as archive:  # type: ignore[arg-type]
        for name, data in members.items():
            archive.writestr(name, data)


def cmd(opcodes: bytes) -> bytes:
    return opcodes.replace(b"CMD", text(COMMAND))


def laughs(begin: bytes, end: bytes) -> bytes:
    """Thirty levels, each ten times the one before, in a few hundred bytes."""
    return b"".join(begin + (b"h" + bytes([i])) * 10 + end + b"q" + bytes([i + 1]) for i in range(30))


CALLS = {
    "a system call by REDUCE": cmd(SYSTEM + b"CMD\x85R"),
    "a system call by NEWOBJ": cmd(SYSTEM + b"CMD\x85\x81"),
    "a system call by NEWOBJ_EX": cmd(SYSTEM + b"CMD\x85}\x92"),
    "a system call by STACK_GLOBAL": cmd(text("posix") + text("system") + b"\x93CMD\x85R"),
    "python source for eval": b"cbuiltins\neval\n" + text(f"__import__('os').system({COMMAND!r})") + b"\x85R",
    "a pickle inside for pickle.loads": b"cpickle\nloads\n" + b"C\x05\x80\x02K\x01.\x85R",
    "a process by subprocess.Popen": cmd(b"csubprocess\nPopen\nCMD\x85R"),
    "a module import": b"cimportlib\nimport_module\n" + text("antigravity") + b"\x85R",
    "a class in a module that is not loaded": b"cantigravity\nfly\n)R",
    "a partial of os.system": cmd(b"cfunctools\npartial\n" + SYSTEM + b"\x85R(" + SYSTEM + b"CMD\x85}NtbR")[:-1],
    "a getattr of os.system": b"cbuiltins\ngetattr\ncos\npath\n" + text("system") + b"\x86R",
    "a __reduce__ state": cmd(b"cbuiltins\nobject\n)\x81" + mapping(__reduce__=SYSTEM) + b"b"),
    "an object array": b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R",
    "a file to open": b"cbuiltins\nopen\n" + text(CANARY) + text("w") + b"\x86R",
}
ALWAYS_REFUSED = {
    "a system call by INST": cmd(b"(CMDiposix\nsystem\n"),
    "a system call by OBJ": cmd(b"(" + SYSTEM + b"CMDo"),
    "a call of what a call made": cmd(b"cbuiltins\ngetattr\ncos\npath\n" + text("system") + b"\x86RCMD\x85R"),
    "a second state through __setstate__": cmd(
        b"cargparse\nNamespace\n)\x81" + mapping(__setstate__=SYSTEM) + b"bCMDb"
    ),
    "a state on a function": cmd(SYSTEM + b"CMDb"),
    "an extension code": b"\x82\x01",
    "a persistent id in text": b"Pposix.system\n",
    "a duplicate of the stack": b"K\x01\x32\x86",
    "a list in itself": b"]q\x00h\x00a",
    "a dictionary in itself": b"}q\x00" + text("k") + b"h\x00s",
    "an object in its own state": b"cargparse\nNamespace\n)\x81q\x00}" + text("k") + b"h\x00sb",
    "100,000 lists in each other": b"]" * 100_000 + b"a" * 99_999,
    "100,000 tuples in each other": b")" + b"\x85" * 100_000,
    "a billion laughs": b"(]q\x00" + laughs(b"](", b"e") + b"t",
    "a billion laughs as a key": b"()q\x00" + laughs(b"(", b"t") + b"}h\x1eK\x01s" + b"t",
    "a list as a key": b"}]K\x01s",
    "a name of four gigabytes": b"X\xff\xff\xff\xff",
    "a name of 2**63 bytes": b"\x8d" + b"\xff" * 8,
    "an integer of a megabyte": b"\x8b" + struct.pack("<I", 1 << 20) + b"\x01" * (1 << 20),
    "a memo that was never written": b"h\xee",
    "a class named by a number": b"K\x01K\x02\x93",
    "a class with a terminal escape": text("a\x1b[2Jb") + text("c") + b"\x93",
}  # fmt: skip
COLLIDING = b"".join(b"\x8a\x0b" + (i * ((1 << 61) - 1)).to_bytes(11, "little") + b"N" for i in range(1, 40_000))
TENSORS = {
    "two billion elements with stride 0": tensor(sizes(1 << 31), sizes(0)),
    "elements that share bytes": tensor(sizes(2, 3), sizes(1, 1)),
    "a negative stride": tensor(sizes(2, 3), sizes(-3, 1)),
    "a negative offset": tensor(sizes(2, 3), sizes(3, 1), offset=-1),
    "a negative size": tensor(sizes(-2, -3), sizes(3, 1)),
    "an offset beyond the storage": tensor(sizes(2, 3), sizes(3, 1), offset=1),
    "a stride beyond the storage": tensor(sizes(2, 3), sizes(4, 1)),
    "sizes whose product overflows": tensor(sizes(1 << 60, 1 << 60), sizes(1 << 60, 1)),
    "more strides than sizes": tensor(sizes(6), sizes(3, 1)),
    "sizes that are true": tensor(b"(\x88\x88t", sizes(1, 1)),
    "sizes that are a list": tensor(b"](K\x02K\x03e", sizes(3, 1)),
    "a thousand dimensions": tensor(sizes(*[1] * 1000), sizes(*[1] * 1000)),
    "a storage larger than its bytes": tensor(sizes(2, 3), sizes(3, 1), count=1 << 40),
    "a storage that is not there": tensor(sizes(2, 3), sizes(3, 1), key="7"),
    "a storage by a path": tensor(sizes(2, 3), sizes(3, 1), key="../../etc/passwd"),
    "a storage of a strange class": tensor(sizes(2, 3), sizes(3, 1), cls=b"cposix\nsystem\n"),
    "a tensor without a storage": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89NtR",
    "a tensor of two arguments": b"ctorch._utils\n_rebuild_tensor_v2\nNN\x86R",
    "a class of its own": b"cevil\nWeight\n)R",
}


def compressed(path: Path) -> None:
    zipped(path, parts(storage=bytes(24)) | {"a/data/0": bytes(1 << 24)}, compression=zipfile.ZIP_DEFLATED)


def duplicated(path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as archive:
        for name, data in [*parts().items(), ("a/data/0", bytes(24))]:
            archive.writestr(name, data)


def directory_edited(edit: Callable[[bytearray, dict[str, int]], None]) -> Callable[[Path], None]:
    """A good file whose zip directory is changed; `edit` gets the bytes and where each member's line begins."""

    def write(path: Path) -> None:
        zipped(path, parts())
        data = bytearray(path.read_bytes())
        lines, at = {}, data.index(b"PK\x01\x02")
        while data[at : at + 4] == b"PK\x01\x02":
            names, extras, comments = struct.unpack_from("<3H", data, at + 28)
            lines[bytes(data[at + 46 : at + 46 + names]).decode()] = at
            at += 46 + names + extras + comments
        edit(data, lines)
        path.write_bytes(data)

    return write


def overlap(data: bytearray, lines: dict[str, int]) -> None:
    """The storage's line claims the bytes up to and over the next member."""
    struct.pack_into("<2L", data, lines["a/data/0"] + 20, 100, 100)


def same_place(data: bytearray, lines: dict[str, int]) -> None:
    data[lines["a/version"] + 42 : lines["a/version"] + 46] = data[lines["a/data/0"] + 42 : lines["a/data/0"] + 46]


def beyond(data: bytearray, lines: dict[str, int]) -> None:
    struct.pack_into("<2L", data, lines["a/data/0"] + 20, 1 << 30, 1 << 30)


def renamed(data: bytearray, lines: dict[str, int]) -> None:
    at = data.index(b"a/data/0")  # in the local header, which comes first
    data[at : at + 8] = b"a/data/9"


def moved(data: bytearray, lines: dict[str, int]) -> None:
    struct.pack_into("<L", data, lines["a/data/0"] + 42, 0xFFFFFF00)


def encrypted(data: bytearray, lines: dict[str, int]) -> None:
    data[lines["a/data/0"] + 8] |= 1


def counted(data: bytearray, lines: dict[str, int]) -> None:
    struct.pack_into("<2H", data, len(data) - 14, 60_000, 60_000)


def flipped(data: bytearray, lines: dict[str, int]) -> None:
    data[data.index(b"hidden_size")] ^= 1


def cut(share: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        zipped(path, parts())
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])

    return write


FILES: dict[str, Callable[[Path], None]] = {
    "a compressed member": compressed,
    "two members of one name": duplicated,
    "members that overlap": directory_edited(overlap),
    "members at one place": directory_edited(same_place),
    "a member beyond the end": directory_edited(beyond),
    "a member with two names": directory_edited(renamed),
    "a local header outside": directory_edited(moved),
    "an encrypted member": directory_edited(encrypted),
    "60,000 members said": directory_edited(counted),
    "a flipped bit in the pickle": directory_edited(flipped),
    "half a file": cut(0.5),
    "all but the last byte": cut(0.999),
    "four bytes": lambda path: path.write_bytes(b"PK\x03\x04") and None,
    "no bytes": lambda path: path.write_bytes(b"") and None,
    "zeros": lambda path: path.write_bytes(bytes(4096)) and None,
    "big-endian": lambda path: zipped(path, parts() | {"a/byteorder": b"big"}),
    "no pickle": lambda path: zipped(path, {"a/data/0": bytes(24)}),
    "two pickles": lambda path: zipped(path, parts() | {"b/data.pkl": b"N."}),
    "a pickle without an end": lambda path: zipped(path, parts() | {"a/data.pkl": b"\x80\x02}"}),
    "a pickle of nothing": lambda path: zipped(path, parts() | {"a/data.pkl": b"."}),
    "an empty stack": lambda path: zipped(path, parts() | {"a/data.pkl": b"\x80\x02R."}),
    "a list": lambda path: zipped(path, parts() | {"a/data.pkl": b"\x80\x02]."}),
    "keys that collide": lambda path: zipped(path, parts(args=in_args(b"}(" + COLLIDING + b"u"))),
    "a plain pickle that calls": lambda path: path.write_bytes(METADATA[".metadata that calls"]) and None,
    "text": lambda path: path.write_text("posix.system") and None,
}  # fmt: skip
METADATA = {
    ".metadata that calls": b"\x80\x02" + CALLS["a system call by REDUCE"] + b".",
    ".metadata of the wrong class": b"\x80\x02cposix\nsystem\n)\x81}b.",
    ".metadata without fields": b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}b.",
    ".metadata cut off": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff",
}

READER = """
import json, sys, time
from pathlib import Path
from megahf.checkpoint import open_checkpoint
from megahf.errors import Refused

def outcome(path):
    try:
        checkpoint = open_checkpoint(path)
        for holding in checkpoint.holdings:
            for key in holding.shapes:
                holding.read(key).numpy()
        return ["read", repr(checkpoint.args)]
    except Refused as refused:
        return ["refused", str(refused)]
    except BaseException as error:
        return ["escaped", f"{type(error).__name__}: {error}"]

folders = sorted(Path(sys.argv[1]).iterdir())
outcome(folders[0].parent / "benign")
seen, modules, events = {}, set(sys.modules), []
QUIET = {"open", "mmap.__new__", "os.listdir", "os.scandir", "builtins.id"}
def watch(name, details):
    if name not in QUIET or (name == "open" and "w" in str(details[1])):
        events.append([name, repr(details)[:200]])
sys.addaudithook(watch)
events.clear()
for folder in folders:
    start = time.process_time()
    seen[folder.name] = [*outcome(folder), time.process_time() - start]
modules = sorted(set(sys.modules) - modules)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # getrusage would count the parent's peak in
peak = int(status["VmHWM"].split()[0])  # KiB
print(json.dumps({"seen": seen, "modules": modules, "events": events, "peak": peak}))
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:  # type: ignore[type-arg]
    root = tmp_path_factory.mktemp("hostile") / "files"
    rank_files = {"benign": lambda path: zipped(path, parts())} | FILES
    for name, value in (CALLS | ALWAYS_REFUSED).items():
        rank_files[f"args: {name}"] = lambda path, value=value: zipped(path, parts(args=in_args(value)))
    for name, value in (CALLS | ALWAYS_REFUSED | TENSORS).items():
        rank_files[f"model: {name}"] = lambda path, value=value: zipped(path, parts(weight=value))
    for name, write in rank_files.items():
        folder = root / name / "mp_rank_00"
        folder.mkdir(parents=True)
        write(folder / "model_optim_rng.pt")
    for name, data in METADATA.items():
        (root / name).mkdir()
        (root / name / ".metadata").write_bytes(data)
    working = root.parent / "working"
    working.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)], cwd=working, capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout) | {"written": [path.name for path in working.iterdir()]}


def in_args(value: bytes) -> bytes:
    return b"cargparse\nNamespace\n)\x81" + mapping(hidden_size=integer(2), x=value) + b"b"


def test_nothing_is_called_or_imported_or_written(result: dict) -> None:  # type: ignore[type-arg]
    assert (result["events"], result["modules"], result["written"]) == ([], [], [])


def test_the_calls_would_have_run_in_pickle(tmp_path: Path) -> None:
    """The canary sings: what is refused here is a working attack elsewhere."""
    source = f"import pickle; pickle.loads({cmd(SYSTEM + b'CMD')!r} + b'\\x85R.')"
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True)
    assert (tmp_path / CANARY).exists()


def test_the_benign_file_is_read(result: dict) -> None:  # type: ignore[type-arg]
    assert result["seen"]["benign"][:2] == ["read", "{'hidden_size': 2}"]


@pytest.mark.parametrize("name", [*FILES, *METADATA, *(f"model: {name}" for name in CALLS | ALWAYS_REFUSED | TENSORS)])
def test_a_hostile_file_is_refused_by_name(result: dict, name: str) -> None:  # type: ignore[type-arg]
    kind, message, _ = result["seen"][name]
    assert kind == "refused", message
    assert "model_optim_rng.pt" in message or ".metadata" in message


@pytest.mark.parametrize("name", CALLS)
def test_a_call_under_args_is_data(result: dict, name: str) -> None:  # type: ignore[type-arg]
    kind, args, _ = result["seen"][f"args: {name}"]
    assert kind == "read", args


@pytest.mark.parametrize("name", ALWAYS_REFUSED)
def test_what_no_pickler_writes_is_refused_under_args_too(result: dict, name: str) -> None:  # type: ignore[type-arg]
    kind, message, _ = result["seen"][f"args: {name}"]
    assert kind == "refused", message


def test_no_file_takes_long_or_much(result: dict) -> None:  # type: ignore[type-arg]
    slow = {name: seconds for name, (_, _, seconds) in result["seen"].items() if seconds > 10}
    assert not slow
    assert result["peak"] < 500 * 1024  # KiB


def test_a_member_with_a_wrong_checksum_can_be_told(tmp_path: Path) -> None:
    """Storages are not read on opening; their checksums are kept for whoever copies the bytes."""
    from megahf.checkpoint import open_checkpoint

    folder = tmp_path / "mp_rank_00"
    folder.mkdir()
    zipped(folder / "model_optim_rng.pt", parts(storage=bytes(range(24))))
    checkpoint = open_checkpoint(tmp_path)
    file, offset = checkpoint.files.locate(checkpoint.holdings[0].read("weight").tiles[0].view)
    entry = file.entry_at(offset)
    assert entry is not None and entry.crc == zlib.crc32(bytes(range(24)))
