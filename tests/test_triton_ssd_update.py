"""One token more by a kernel is a step of the recurrence of Mamba-2; for a GPU it stays within its limits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from recurrence import Given, doubled, error, given, recurrence
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_ssd, triton_ssd_update
from megahf.models.kernel_choice import only
from megahf.models.ssd import ssd_update
from megahf.models.triton_ssd_backward import triton_ssd_scan
from megahf.models.triton_ssd_update import triton_ssd_update as update

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RUNNING = ("x", "dt", "B", "C", "z")


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with 16 channels a program, and memory that holds NaN until something is stored."""
    with interpreted(triton_ssd, triton_ssd_update) as patch, torch.no_grad():
        patch.setattr(triton_ssd_update, "UPDATE", {"channels": 16, "warps": 1})
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def steps(inputs: Given, start: int = 0) -> list[Given]:
    """Arguments of an update for each token from `start` on, without the state."""
    still = {name: inputs[name] for name in ("A", "D", "dt_bias")}
    moving = {name: t for name in RUNNING if (t := inputs[name]) is not None}
    length = moving["x"].shape[1]
    return [still | {name: t[:, at] for name, t in moving.items()} for at in range(start, length)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("options", "groups", "channels"), [("state", 1, 32), ("bias skip state", 2, 16), ("skip each gate state", 4, 20)]
)
@pytest.mark.usefixtures("small")
def test_token_by_token_it_is_the_recurrence(options: str, groups: int, channels: int, dtype: torch.dtype) -> None:
    inputs = given(3, 4, groups, options, dtype, rows=2, channels=channels, state=20)
    wanted, last = recurrence(**doubled(inputs))  # type: ignore[arg-type]
    state = inputs["state"].clone()  # type: ignore[union-attr]
    outs = [update(state, **step) for step in steps(inputs)]  # type: ignore[arg-type]
    assert error(torch.stack(outs, dim=1), wanted) < TOLERANCE[dtype] and outs[0].dtype == dtype
    assert error(state, last) < 2e-5


@pytest.mark.usefixtures("small")
def test_what_the_scan_leaves_it_goes_on_from() -> None:
    inputs = given(17, 2, 1, "bias skip")
    wanted, last = recurrence(**doubled(inputs))  # type: ignore[arg-type]
    first = inputs | {name: t[:, :14] for name in RUNNING if (t := inputs[name]) is not None}
    out, state = triton_ssd_scan(**first)  # type: ignore[arg-type]
    outs = [update(state, **step)[:, None] for step in steps(inputs, 14)]  # type: ignore[arg-type]
    assert error(torch.cat([out, *outs], dim=1), wanted) < 2e-5
    assert error(state, last) < 2e-5


@pytest.mark.parametrize("kinds", [("triton",), ()])
@pytest.mark.usefixtures("small")
def test_states_of_a_pool_are_found_and_the_others_left_alone(kinds: tuple[str, ...]) -> None:
    inputs = given(1, 2, 1, "state gate", rows=3)
    wanted, last = recurrence(**doubled(inputs))  # type: ignore[arg-type]
    pool = torch.full((6, 2, 16, 16), torch.nan)
    where = torch.tensor([4, -1, 2])
    rows = where >= 0
    pool[where[rows]] = inputs["state"][rows]  # type: ignore[index]
    pool[0] = 7  # not the state of the row that has none
    with only(*kinds):
        out = ssd_update(pool, **steps(inputs)[0], indices=where)  # type: ignore[arg-type]
    assert error(out[rows], wanted[rows, 0]) < 2e-5 and error(pool[where[rows]], last[rows]) < 2e-5
    assert out[1].eq(0).all() and pool[0].eq(7).all() and pool[[1, 3, 5]].isnan().all()


@pytest.mark.usefixtures("small")
def test_a_state_may_lie_anyhow_and_be_of_half_precision() -> None:
    inputs = given(1, 2, 1, "state", torch.bfloat16)
    _, last = recurrence(**doubled(inputs))  # type: ignore[arg-type]
    state = inputs["state"].mT.contiguous().bfloat16().mT  # type: ignore[union-attr]
    update(state, **steps(inputs)[0])  # type: ignore[arg-type]
    assert error(state, last) < TOLERANCE[torch.bfloat16]


@pytest.mark.usefixtures("small")
def test_large_decays_and_the_smallest_time_steps() -> None:
    for rate, raw in ((-60.0, 3.0), (-16.0, -18.0), (-1e-3, 30.0)):
        inputs = given(1, 2, 1, "state") | {"A": torch.full((2,), rate), "dt": torch.full((1, 1, 2), raw)}
        wanted, last = recurrence(**doubled(inputs))  # type: ignore[arg-type]
        state = inputs["state"].clone()
        out = update(state, **steps(inputs)[0])  # type: ignore[arg-type]
        assert error(out, wanted[:, 0]) < 2e-5 and error(state, last) < 2e-5


@torch.no_grad()
def test_offsets_may_pass_two_to_the_31() -> None:
    inputs = given(1, 1, 1, "state", rows=2)
    apart = 2**31 + 8  # elements from state to state; memory that nobody touches costs nothing
    far = torch.empty(apart + 256, dtype=torch.float16).as_strided((2, 1, 16, 16), (apart, 256, 16, 1))
    far.copy_(inputs["state"])  # type: ignore[arg-type]
    near = far.contiguous()
    with interpreted(triton_ssd, triton_ssd_update):
        outs = [update(state, **steps(inputs)[0]) for state in (far, near)]  # type: ignore[arg-type]
    assert torch.equal(*outs) and torch.equal(far, near)


@pytest.mark.usefixtures("small")
def test_a_compiled_graph_holds_it_whole() -> None:
    inputs = given(1, 2, 1, "bias state")
    states = [inputs["state"].clone() for _ in range(2)]  # type: ignore[union-attr]
    step = {name: t if t is None else t.detach() for name, t in steps(inputs)[0].items()}
    with only("triton"):
        graph = torch.compile(ssd_update, fullgraph=True, backend="aot_eager")
        outs: list[Tensor] = [call(state, **step) for call, state in zip((ssd_update, graph), states, strict=True)]
    torch.testing.assert_close(*outs)
    assert torch.equal(*states) and not torch.equal(states[0], inputs["state"])  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@torch.no_grad()
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    packed = torch.zeros(2, 18560, dtype=torch.bfloat16)  # of 128 heads of 64 channels and 8 groups of 128
    _, x, B, C, dt = packed.split([8192, 8192, 1024, 1024, 128], dim=-1)
    B, C, x = B.unflatten(-1, (8, 128)), C.unflatten(-1, (8, 128)), x.unflatten(-1, (128, 64))
    pool, numbers = torch.zeros(3, 128, 64, 128), torch.zeros(128)
    with compiled(architecture, triton_ssd_update) as launched:
        update(pool, x, dt, numbers, B, C, numbers, x, numbers, torch.tensor([2, -1]))
    (kernel,) = launched.values()
    assert kernel.name == "update_kernel" and kernel.fits, kernel
