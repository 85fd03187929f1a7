"""`benchmarks/gpu.py` runs whole, in small sizes, where there is no GPU; a side that does not run is named."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import record


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.setattr(gpu, "VOCABULARY", 64)
    monkeypatch.setattr("hybrid.VOCABULARY", 64)
    monkeypatch.setattr(gpu, "DRY", dataclasses.replace(gpu.DRY, prefills=(9,), prompt=5, steps=1, trained=6))
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    return monkeypatch


@pytest.mark.usefixtures("small")
def test_models_are_measured_with_kernels_without_and_beside_transformers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    gpu.main(["models", "--dry"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    tasks = ["prefill 9", "decode after 5", "training step of 6"]
    assert [row[0].split(",")[0] for row in rows] == ["hybrid"] * 3 + ["mixture"] * 3
    assert [row[1] for row in rows] == 2 * tasks
    assert all(float(value) > 0 for row in rows for value in (*row[2:5], *row[6:]))
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.mark.usefixtures("small")
def test_long_prefills_are_measured_with_kernels_and_the_first_without(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["context", "--dry"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [["40", gpu.KERNELS], ["40", gpu.TWINS], ["80", gpu.KERNELS]]
    assert all(float(row[2]) > 0 for row in rows)


@pytest.mark.usefixtures("small")
def test_a_checkpoint_is_loaded_beside_copies_of_as_many_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(["load", "--dry"])
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()]
    assert rows[:3] == ["copy of pinned memory", "copy of pageable memory", "from_megatron"] and len(rows) == 4


def test_a_side_that_does_not_run_is_named_and_the_others_are_measured() -> None:
    models: dict[str, Any] = {"ours": nn.Linear(1, 1), "theirs": nn.Linear(1, 1)}

    def task(model: nn.Module) -> float:
        if model is models["theirs"]:
            raise torch.OutOfMemoryError
        return 3.0

    found = gpu.measured(models, task, 2)
    assert found == {gpu.KERNELS: [3.0] * 2, gpu.TWINS: [3.0] * 2, gpu.THEIRS: "does not run: OutOfMemoryError"}
    assert gpu.quotient(3.0, "does not run: OutOfMemoryError") == "-" and gpu.quotient(3.0, 2.0) == 1.5


def test_a_prefill_that_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "prefilled", refuse)
    assert gpu.long_prefill(nn.Linear(1, 1), 4, torch.device("cpu")) == ("not enough memory", "-")


def test_a_record_names_the_gpu_and_the_command(small: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    small.setattr(sys, "argv", ["gpu.py", "load", "--checkpoint", "/somewhere"])
    small.setattr(gpu, "versions", lambda *packages: "these")
    path = gpu.recorded("load", gpu.LOADED, [("x", 1, 2, 3)], [gpu.LOADED, ("x", 1, 2, 3)], [])
    page = path.with_suffix(".md").read_text()
    assert "GPU: A GPU" in page and "`python benchmarks/gpu.py load`" in page and "| x | 1 | 2 | 3 |" in page


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="give --dry"):
        gpu.main(["load"])
