"""The judge as a fixture: checkpoints that real Megatron-core writes, one pool of processes for the whole session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cases import Case

from megahf.judge.bench import Bench


class Judge:
    """Writes each checkpoint once; what it returns is shared and must not be altered (copy it first)."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self.bench = bench
        self.folder = folder
        self.saved: dict[Case, Path] = {}

    def save(
        self, kind: str, layout: str = "tp1", format: str = "torch", spec: str = "local", dtype: str = "fp32"
    ) -> Path:
        """A folder with a tracker file, `iter_0000010` and `reference.pt`.

        `reference.pt` holds input_ids and position_ids `[b, s]`, fp32 logits `[b, s, padded vocabulary]`, those of
        heads for further tokens as `mtp_logits` `[heads, b, s, padded vocabulary]`, more tokens with their logits as
        `prompts`, the TP1 state dict in Megatron's names and the args. The sharded model gave the logits of the
        tokens before it was saved.
        """
        return self.save_case(Case(kind, layout, format, spec, dtype))

    def save_case(self, case: Case) -> Path:
        if case not in self.saved:
            out = self.folder / str(case).replace(":", "_")
            self.bench.save(case.arguments, out, case.format, case.extra_state)
            self.saved[case] = out
        return self.saved[case]

    def reference(self, kind: str, dtype: str = "fp32", spec: str = "local") -> Path:
        """`reference.pt` of one process, without a checkpoint."""
        return self.bench.reference(Case(kind, "tp1", "torch", spec, dtype).arguments) / "reference.pt"


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    with Bench(size=8) as bench:
        yield Judge(bench, tmp_path_factory.mktemp("megatron"))
