"""Kernels get the options of the table; tuning finds quicker ones, prints their row, and is not done unasked."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megahf.models import kernel_table
from megahf.models.kernel_table import Options, options_for

KEY = ("op", 90, "float32")
DEFAULT = {"TOKENS": 8, "num_warps": 4}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Options]]:
    """Tuning, where 32 tokens and one warp are the best, and more than 32 tokens do not fit."""
    tried: list[Options] = []

    def milliseconds(run: object, options: Options) -> float:
        tried.append(options)
        too_many = options["TOKENS"] > 32
        return float("inf") if too_many else abs(32 - options["TOKENS"]) + options["num_warps"]

    monkeypatch.setattr(kernel_table, "milliseconds", milliseconds)
    monkeypatch.setattr(kernel_table, "TABLE", {})
    monkeypatch.setattr(kernel_table, "TUNE", True)
    yield tried


def test_a_measured_row_comes_before_the_default(clock: list[Options], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_table, "TUNE", False)
    assert options_for(KEY, DEFAULT, run=print) == DEFAULT
    kernel_table.TABLE[KEY] = {"TOKENS": 2, "num_warps": 1}
    assert options_for(KEY, DEFAULT, run=print) == {"TOKENS": 2, "num_warps": 1}
    assert options_for(("op", 80, "float32"), DEFAULT) == DEFAULT and not clock


def test_tuning_goes_on_from_better_to_better_and_prints_the_row(
    clock: list[Options], capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"TOKENS": 32, "num_warps": 1}
    assert options_for(KEY, DEFAULT, run=print) == best
    assert eval("{" + capsys.readouterr().err + "}") == {KEY: best}
    tried = len(clock)
    assert options_for(KEY, DEFAULT, run=print) == best and len(clock) == tried  # once


def test_tuning_tries_what_it_is_told_to(clock: list[Options]) -> None:
    others = [{"TOKENS": 64, "num_warps": 1}, {"TOKENS": 16, "num_warps": 8}]
    assert options_for(KEY, DEFAULT, others, run=print) == others[1]
    assert clock == [DEFAULT, *others]


def test_what_may_not_be_repeated_is_not_tuned(clock: list[Options]) -> None:
    assert options_for(KEY, DEFAULT) == DEFAULT and not clock


def test_options_that_a_kernel_refuses_take_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, **options: call())

    def run(options: Options) -> float:
        return 3.0 / options["TOKENS"]

    assert kernel_table.milliseconds(run, {"TOKENS": 2}) == 1.5  # type: ignore[arg-type]
    assert kernel_table.milliseconds(run, {}) == float("inf")  # type: ignore[arg-type]
