"""Processes that know transformers and not megahf: a script runs in one of its own, as on a machine without megahf.

Starting Python, torch and transformers takes seconds, what is tested a fraction of one. So one process loads them, with
megahf hidden, runs nothing, and is copied for each script.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

SERVER = """
import json, os, sys, traceback
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megahf":
            raise ModuleNotFoundError("No module named 'megahf'", name="megahf")
sys.meta_path.insert(0, Hidden())
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel, pipeline
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, name in ((0, os.devnull), (1, asked["out"]), (2, asked["error"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    status = 1
    try:
        os.chdir(asked["folder"])
        sys.argv = ["-c", *asked["words"]]
        exec(compile(asked["script"], "<script>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


class Said(NamedTuple):
    """How a script ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


@cache
def server() -> subprocess.Popen[str]:
    """The process that is copied, one for all tests of this one."""
    home = tempfile.TemporaryDirectory()
    environment = {**os.environ, "HF_HOME": home.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def end() -> None:
        process.kill()
        process.communicate()
        home.cleanup()

    atexit.register(end)
    return process


def run(script: str, *words: object, folder: Path) -> Said:
    """Runs `script` with `words` as its arguments, in `folder`, where no megahf is installed."""
    with tempfile.TemporaryDirectory() as written:
        out, error = Path(written) / "out", Path(written) / "error"
        asked = {"script": script, "words": list(map(str, words)), "folder": str(folder)}
        asked |= {"out": str(out), "error": str(error)}
        process = server()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        status = int(process.stdout.readline())
        return Said(status, out.read_text(), error.read_text())
