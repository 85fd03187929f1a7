"""Bytes move through buffers of a fixed size, and what is wrong with them is seen as they pass."""

from __future__ import annotations

import json
import math
import os
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from megahf import execute, reading
from megahf.checkpoint.mapped import Entry, Files
from megahf.cuts import deinterleaved, from_weight1, from_weight2
from megahf.errors import Refused
from megahf.execute import Checks, Ledger, boxes, memory_bound, run, settle
from megahf.plan import Copy
from megahf.tiles import Tile, Tiled, join


class Source:
    """Arrays laid end to end in one file, each a stored run with its CRC."""

    def __init__(self, folder: Path, *arrays: np.ndarray) -> None:
        self.path, self.files, self.arrays = folder / "source", Files(), []
        self.path.write_bytes(b"head" + b"".join(array.tobytes() for array in arrays))
        file, at = self.files.open(self.path), 4
        for number, array in enumerate(arrays):
            file.note(Entry(str(number), at, array.nbytes, zlib.crc32(array.tobytes())))
            self.arrays.append(file.view(at, array.shape, array.dtype))
            at += array.nbytes

    def run(self, *copies: Copy, checks: Checks | None = None) -> tuple[dict[str, bytes], dict[str, str]]:
        """Runs the copies with a small buffer; the bytes of each weight, and the digests."""
        written = {copy.name: bytearray(copy.nbytes) for copy in copies}

        def sink(copy: Copy, offset: int, data: np.ndarray) -> None:
            written[copy.name][offset : offset + data.nbytes] = data.tobytes()

        ledger, checks = Ledger(), checks or Checks()
        digests = run(copies, self.files, sink, checks, ledger)
        if checks.checksums:
            settle(self.files, copies, ledger)
        return {name: bytes(data) for name, data in written.items()}, digests


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "BUFFER", 64)
    monkeypatch.setattr(execute, "PANEL", 400)
    monkeypatch.setattr(reading, "BLOCK", 3)
    monkeypatch.setattr(boxes, "__defaults__", (64,))


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def copy(array: Tiled, dtype: type | None = None, *same: tuple[str, Tiled]) -> Copy:
    return Copy("weight", array, np.dtype(dtype) if dtype else array.dtype, same)


@given(st.lists(st.integers(1, 9), max_size=4), st.sampled_from([1, 2, 4]), st.integers(1, 200))
def test_boxes_cover_an_array_once_in_the_order_of_its_bytes(shape: list[int], itemsize: int, size: int) -> None:
    whole = np.arange(math.prod(shape)).reshape(shape)
    seen = []
    for box in boxes(tuple(shape), itemsize, size):
        part = whole[tuple(slice(start, start + length) for start, length in box)]
        assert part.nbytes // whole.itemsize * itemsize <= max(size, itemsize)
        seen += part.ravel().tolist()
    assert seen == whole.ravel().tolist()


WAYS: dict[str, Callable[[list[Tiled]], Tiled]] = {
    "whole": lambda parts: parts[0],
    "ranks joined by rows": lambda parts: join(parts, 0),
    "ranks joined by columns": lambda parts: join(parts, 1),
    "transposed": lambda parts: parts[0].swapaxes(0, 1),
    "gate | up of two ranks": lambda parts: join(
        [half for turn in range(2) for half in (part.split([6, 6], 0)[turn] for part in parts)], 0
    ),
    "one layer of a stack": lambda parts: parts[1].unflatten(0, (3, 4)).take(1),
    "columns of a window": lambda parts: parts[0].narrow(1, 3, 5),
    "packed the other way": lambda parts: parts[1].unflatten(0, (4, 3)).swapaxes(0, 1).flatten(0),
    "experts of a legacy weight1": lambda parts: from_weight1(parts[0], None, 4),
    "a tensor-parallel rank's, joined": lambda parts: join([from_weight1(part, None, 2) for part in parts], 1),
    "experts of a legacy weight2": lambda parts: from_weight2(parts[1], None, 3),
    "gate and up by turns": lambda parts: deinterleaved(parts[0], 0, 3),
    "a vector": lambda parts: parts[0].take(3),
    "a scalar": lambda parts: parts[0].take(3).take(2),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("checksums", [True, False])
def test_every_way_a_weight_can_lie_arrives_as_numpy_has_it(
    tmp_path: Path, way: Callable[[list[Tiled]], Tiled], checksums: bool
) -> None:
    source = Source(tmp_path, numbers(12, 20), numbers(12, 20, seed=1))
    array = way([Tiled.of(part) for part in source.arrays])
    written, digests = source.run(copy(array), checks=Checks(checksums))
    wanted = np.ascontiguousarray(array.numpy()).tobytes()
    assert written["weight"] == wanted
    assert digests == ({"weight": blake3(wanted).hexdigest()} if checksums else {})


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 6), st.integers(1, 300))
def test_any_buffer_gives_the_same_bytes_and_the_crc_holds(rows: int, columns: int, ranks: int, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes, "__defaults__", (size,))
        source = Source(Path(folder), *(numbers(rows, columns, seed=rank) for rank in range(ranks)))
        array = join([Tiled.of(part) for part in source.arrays], 1)
        written, _ = source.run(copy(array))  # settles the CRCs
        assert written["weight"] == array.numpy().tobytes()


@given(
    st.integers(1, 4), st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.integers(1, 700),
    st.integers(1, 9), st.sampled_from([np.float16, np.float32]),
)  # fmt: skip
def test_transposed_experts_arrive_as_numpy_has_them_whatever_the_panel(
    experts: int, rows: int, columns: int, ranks: int, panel: int, block: int, dtype: type
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "PANEL", panel)
        patch.setattr(reading, "BLOCK", block)
        patch.setattr(reading, "LONG", panel)
        weights = [numbers(rows, experts * columns, seed=rank).astype(dtype) for rank in range(ranks)]
        source = Source(Path(folder), *weights)
        array = join([from_weight1(Tiled.of(part), None, experts) for part in source.arrays], 1)
        written, digests = source.run(copy(array))  # settles the CRCs
        wanted = np.concatenate([w.reshape(experts, rows, columns).swapaxes(1, 2) for w in weights], 1).tobytes()
        assert written["weight"] == wanted
        assert digests["weight"] == blake3(wanted).hexdigest()


def test_scattered_bytes_are_read_in_order_once_and_none_is_left_for_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(tmp_path, numbers(40, 60))
    weight, ledger = copy(from_weight1(Tiled.of(source.arrays[0]), None, 3)), Ledger()
    run([weight], source.files, lambda *_: None, Checks(), ledger)

    def no_more(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(execute, "pread", no_more)
    settle(source.files, [weight], ledger)


DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_casts_are_rounded_as_torch_rounds(tmp_path: Path, stored: type, wanted: type) -> None:
    import torch

    array = np.concatenate([numbers(50), [0.0, -0.0, 60000.0, 6e-8, 1 / 3]]).astype(stored)
    name = {ml_dtypes.bfloat16: torch.bfloat16, np.float16: torch.float16, np.float64: torch.float64}
    source = Source(tmp_path, array)
    written, _ = source.run(copy(Tiled.of(source.arrays[0]), wanted))
    tensor = torch.from_numpy(array.astype(np.float64)).to(name.get(stored, torch.float32))
    assert written["weight"] == tensor.to(name.get(wanted, torch.float32)).view(torch.uint8).numpy().tobytes()


def test_a_number_that_does_not_fit_is_refused_with_its_size(tmp_path: Path) -> None:
    array = numbers(40)
    array[33] = -70000
    source = Source(tmp_path, array)
    with pytest.raises(Refused, match=r"70000 does not fit float16 \(weight\); convert with --dtype bf16 or fp32"):
        source.run(copy(Tiled.of(source.arrays[0]), np.float16))


def test_a_nan_beside_it_hides_no_number_that_does_not_fit(tmp_path: Path) -> None:
    source = Source(tmp_path, np.array([np.nan, 70000, np.inf], np.float32))
    with pytest.raises(Refused, match="70000 does not fit float16"):
        source.run(copy(Tiled.of(source.arrays[0]), np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nan_and_infinity_are_kept_unless_they_are_to_be_refused(tmp_path: Path, dtype: type) -> None:
    array = numbers(40)
    array[[3, 39]] = [np.nan, np.inf]
    source = Source(tmp_path, array)
    weight = copy(Tiled.of(source.arrays[0]), dtype)
    written, _ = source.run(weight)
    kept = np.frombuffer(written["weight"], dtype).astype(np.float32)
    assert np.isnan(kept[3])
    assert np.isinf(kept[39])
    with pytest.raises(Refused, match=r"numbers are NaN or infinite \(weight\)"):
        source.run(weight, checks=Checks(refuse_nonfinite=True))


def test_numbers_that_are_no_floats_are_never_looked_at_for_nan(tmp_path: Path) -> None:
    source = Source(tmp_path, np.arange(40))
    written, _ = source.run(copy(Tiled.of(source.arrays[0])), checks=Checks(refuse_nonfinite=True))
    assert written["weight"] == np.arange(40).tobytes()


def test_copies_that_are_equal_bit_for_bit_pass_and_others_are_named(tmp_path: Path) -> None:
    array = numbers(5, 20)
    array[0, 0] = 0.0
    other = array.copy()
    other[0, 0] = -0.0  # equal as a number, not as bits
    source = Source(tmp_path, array, array, other)
    first, second, third = (Tiled.of(part) for part in source.arrays)
    source.run(copy(first, None, ("rank 1", second)))
    with pytest.raises(Refused, match=r"stored twice and not equal \(weight, also in rank 2\)"):
        source.run(copy(first, None, ("rank 1", second), ("rank 2", third)))


def test_all_unequal_copies_are_said_at_once(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(20), numbers(20, seed=1))
    first, second = (Tiled.of(part) for part in source.arrays)
    copies = [Copy(name, first, first.dtype, (("rank 1", second),)) for name in ("a", "b", "c")]
    with pytest.raises(Refused) as error:
        source.run(*copies)
    assert all(f"{name}, also in rank 1" in str(error.value) for name in "abc")


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("at", [4, 333, 4 + 12 * 20 * 4 - 1])
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_a_flipped_byte_is_found_by_the_crc_also_where_no_weight_takes_it(
    tmp_path: Path, way: Callable[[list[Tiled]], Tiled], at: int
) -> None:
    source = Source(tmp_path, numbers(12, 20), numbers(12, 20, seed=1))
    weight = copy(way([Tiled.of(source.arrays[0])] * 2))
    damage(source.path, at)
    with pytest.raises(Refused, match=r"CRC-32 of weight is wrong \(0 in .*source\); the file is damaged"):
        source.run(weight)
    source.run(weight, checks=Checks(checksums=False))  # trusted: nobody looks


def test_padding_that_no_weight_takes_is_read_for_the_crc(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(30, 4))
    weight = copy(Tiled.of(source.arrays[0]).narrow(0, 3, 20))
    source.run(weight)
    damage(source.path, 4 + 29 * 16)
    with pytest.raises(Refused, match="CRC-32"):
        source.run(weight)


def test_a_ledger_survives_being_written_down(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(30, 4))
    weight, ledger = copy(Tiled.of(source.arrays[0]).narrow(0, 3, 20)), Ledger()
    run([weight], source.files, lambda *_: None, Checks(), ledger)
    again = Ledger()
    again.load(json.loads(json.dumps(ledger.dump())))
    assert again.read == ledger.read
    settle(source.files, [weight], again)
    pieces = next(iter(again.read.values()))
    size, crc = pieces[min(pieces)]
    pieces[min(pieces)] = (size, crc ^ 1)
    with pytest.raises(Refused, match="CRC-32"):
        settle(source.files, [weight], again)


def test_a_file_that_is_cut_short_while_it_is_read_is_refused(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(30, 4))
    file = source.files.open(source.path)
    file.fileno()
    os.truncate(source.path, 100)
    with pytest.raises(Refused, match="the file ends at byte 100"):
        source.run(copy(Tiled.of(source.arrays[0])))


def test_a_file_that_changed_since_it_was_opened_is_refused(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(30, 4))
    source.path.touch()
    with pytest.raises(Refused, match="the file changed while it was read"):
        source.run(copy(Tiled.of(source.arrays[0])))


def test_after_a_failure_no_thread_takes_another_weight(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(16))
    taken = []

    def sink(copy: Copy, offset: int, data: np.ndarray) -> None:
        taken.append(copy.name)
        raise OSError(28, "No space left on device")

    copies = [Copy(str(number), Tiled.of(source.arrays[0]), np.dtype(np.float32)) for number in range(500)]
    with pytest.raises(OSError, match="No space"):
        run(copies, source.files, sink, Checks(), Ledger())
    assert len(taken) < 10


def test_memory_stays_within_the_bound_whatever_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "BUFFER", 1 << 16)
    monkeypatch.setattr(boxes, "__defaults__", (1 << 16,))
    source = Source(tmp_path, numbers(2000, 500), numbers(2000, 500, seed=1))  # 8 MB
    parts = [Tiled.of(part) for part in source.arrays]
    copies = [copy(join(parts, 1), np.float16), copy(join(parts, 0)), copy(parts[0].unflatten(0, (2, 1000)).flatten(0))]
    tracemalloc.start()
    run(copies, source.files, lambda *_: None, Checks(), Ledger())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory_bound(copies) + 300_000 < 1_500_000


def test_memory_of_transposed_experts_does_not_grow_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "BUFFER", 1 << 16)
    monkeypatch.setattr(execute, "PANEL", 1 << 17)
    monkeypatch.setattr(reading, "BLOCK", 64)
    source = Source(tmp_path, numbers(1000, 2000))  # two experts of 4 MB
    weight = copy(from_weight1(Tiled.of(source.arrays[0]), None, 2))
    tracemalloc.start()
    run([weight], source.files, lambda *_: None, Checks(), Ledger())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < memory_bound([weight]) + 300_000 < 1_700_000


def test_progress_counts_every_byte_of_the_target(tmp_path: Path) -> None:
    source = Source(tmp_path, numbers(30, 4))
    moved: list[int] = []
    weight = copy(Tiled.of(source.arrays[0]), np.float16)
    run([weight], source.files, lambda *_: None, Checks(), Ledger(), moved.append)
    assert sum(moved) == weight.nbytes == 240
    assert len(moved) > 1


def test_a_tile_in_memory_is_no_source() -> None:
    weight = Copy("weight", Tiled((2,), np.dtype(np.float32), (Tile((0,), numbers(2)),)), np.dtype(np.float32))
    with pytest.raises(LookupError):
        run([weight], Files(), lambda *_: None, Checks(), Ledger())
