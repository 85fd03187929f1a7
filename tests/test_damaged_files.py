"""The promise: damage to a file is refused or has no effect; nothing but Refused is ever raised.

Streams and `.metadata` carry no checksum, so that there damage may also change data: no reader can help that.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import arguments, state, write_rank, write_torch_dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megahf.checkpoint import open_checkpoint
from megahf.errors import Refused


def everything(root: Path) -> dict[str, bytes]:
    """All that is read, once every checksum that was noted has been compared."""
    checkpoint = open_checkpoint(root)
    found = {
        "args": repr(checkpoint.args).encode(),
        "iteration": repr((checkpoint.iteration, checkpoint.version)).encode(),
    }
    for holding in checkpoint.holdings:
        found |= {key: kind.encode() for key, kind in holding.objects.items()}
        for key in holding.shapes:
            whole = holding.read(key)
            for _, view in whole.tiles:
                file, offset = checkpoint.files.locate(view)
                entry = file.entry_at(offset)
                if entry is not None and entry.crc is not None:
                    stored = file.map[entry.offset : entry.offset + entry.size]
                    if zlib.crc32(stored) != entry.crc:
                        raise Refused
            found[key] = repr((whole.shape, whole.dtype)).encode() + whole.numpy().tobytes()
    return found


def write_zip(root: Path) -> Path:
    write_rank(root / "mp_rank_00", arguments(), {"model": state()})
    return root / "mp_rank_00" / "model_optim_rng.pt"


def write_stream(root: Path) -> Path:
    (root / "mp_rank_00").mkdir()
    content = {"args": arguments(), "checkpoint_version": 3.0, "iteration": 10, "model": state()}
    torch.save(content, root / "mp_rank_00" / "model_optim_rng.pt", _use_new_zipfile_serialization=False)
    return root / "mp_rank_00" / "model_optim_rng.pt"


def write_metadata(root: Path) -> Path:
    write_torch_dist(root)
    return root / ".metadata"


def write_data(root: Path) -> Path:
    write_torch_dist(root)
    return next(root.glob("*.distcp"))


Change = tuple[str, float, bytes]
CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "cut"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, changes: list[Change]) -> bytes:
    for kind, share, noise in changes:
        at = int(share * max(len(data) - 1, 0))
        if kind == "flip":
            data = data[:at] + noise + data[at + len(noise) :]
        elif kind == "insert":
            data = data[:at] + noise + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + len(noise) :]
        else:
            data = data[:at]
    return data


@pytest.mark.parametrize("write", [write_zip, write_stream, write_metadata, write_data])
def test_damage_is_refused_or_without_effect(tmp_path: Path, write: Any) -> None:
    """Streams and .metadata have no checksum: damage may change their data, but raises nothing else than Refused."""
    path = write(tmp_path)
    whole, wanted = path.read_bytes(), everything(tmp_path)
    seen = {"same": 0, "refused": 0, "other": 0}

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None)
    @given(CHANGES)
    def damage(changes: list[Change]) -> None:
        path.unlink()  # a mapped file must not shrink under its mapping
        path.write_bytes(damaged(whole, changes))
        try:
            seen["same" if everything(tmp_path) == wanted else "other"] += 1
        except Refused:
            seen["refused"] += 1

    damage()
    assert seen["refused"] > 50
    assert seen["other"] == 0 or write in (write_stream, write_metadata)
