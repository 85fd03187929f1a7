# mypy: disable-error-code="no-untyped-def"
"""One token more of the scan of `ssd.py` as a Triton kernel, which reads and writes a state once, in place.

A state is all there is to move, so a program takes some channels of a head: enough programs for a GPU at one row, too.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .kernel_choice import architecture, jit, launch, operator, tl
from .kernel_table import Options, options_for
from .triton_conv import dense, rowwise, strides
from .triton_ssd import block, softplus

UPDATE: Options = {"channels": 16, "warps": 4}


@jit
def update_kernel(
    state, x, dt, A, B, C, D, z, bias, indices, out,
    heads, per_group, state_row, state_head, state_channel, state_place, x_row, x_head, dt_row, dt_head, B_row, B_group,
    C_row, C_group, D_head, D_place, z_row, z_head, index_step,
    P: tl.constexpr, N: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`BP` channels of a head of a row."""
    across: tl.constexpr = tl.cdiv(P, BP)
    rp, rn = tl.program_id(0) % across * BP + tl.arange(0, BP), tl.arange(0, BN)
    program = tl.program_id(0) // across
    h, row = (program % heads).to(tl.int64), (program // heads).to(tl.int64)
    group, held = h // per_group, row
    if indices is not None:
        held = tl.load(indices + row * index_step).to(tl.int64)
    real = (rp < P) & (held >= 0)
    here = real[:, None] & (rn < N)[None, :]
    place = state + tl.maximum(held, 0) * state_row + h * state_head + rp[:, None] * state_channel
    place += rn[None, :] * state_place
    step = tl.load(dt + row * dt_row + h * dt_head).to(tl.float32)
    if bias is not None:
        step += tl.load(bias + h).to(tl.float32)
    step = softplus(step)
    kept = tl.exp2(tl.minimum(step * tl.load(A + h).to(tl.float32) * 1.4426950408889634, 0.0))
    value = tl.load(x + row * x_row + h * x_head + rp, mask=real, other=0).to(tl.float32)
    key = tl.load(B + row * B_row + group * B_group + rn, mask=rn < N, other=0).to(tl.float32)
    query = tl.load(C + row * C_row + group * C_group + rn, mask=rn < N, other=0).to(tl.float32)
    new = tl.load(place, mask=here, other=0).to(tl.float32) * kept + (value * step)[:, None] * key[None, :]
    tl.store(place, new.to(state.dtype.element_ty), mask=here)
    y = tl.sum(new * query[None, :], 1)
    if D is not None:
        y += value * tl.load(D + h * D_head + rp * D_place, mask=real, other=0).to(tl.float32)
    if z is not None:
        gate = tl.load(z + row * z_row + h * z_head + rp, mask=real, other=0).to(tl.float32)
        y *= gate * tl.sigmoid(gate)
    tl.store(out + (row * heads + h) * P + rp, tl.where(real, y, 0.0).to(out.dtype.element_ty), mask=rp < P)


def ssd_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, indices: Tensor | None,
) -> Tensor:  # fmt: skip
    x, B, C, z, bias = rowwise(x), rowwise(B), rowwise(C), z if z is None else rowwise(z), dense(bias)
    rows, heads, channels = x.shape
    size = B.shape[-1]
    skip = (0, 0) if D is None else (*D.stride(), 0)[:2]
    steps = (*x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *skip, *strides(z, 0, 1))
    numbers = (heads, heads // B.shape[1], *state.stride(), *steps, *strides(indices, 0))

    def run(options: Options, state: Tensor) -> Tensor:
        out, BP = x.new_empty(x.shape), min(options["channels"], block(channels))
        # No number in two threads, of which one might read what the other has changed.
        warps = min(options["warps"], BP * block(size) // 128)
        sizes: dict[str, Any] = {"P": channels, "N": size, "BP": BP, "BN": block(size), "num_warps": warps}
        tensors = (state, x, dt, A.contiguous(), B, C, D, z, bias, indices, out)
        launch(update_kernel, (rows * heads * -(-channels // BP),), *tensors, *numbers, **sizes)
        return out

    key = "ssd_update", architecture(x.device), f"{str(state.dtype)[6:]} {channels} {size} {(rows - 1).bit_length()}"
    return run(options_for(key, UPDATE, run=lambda options: run(options, state.clone())), state)


update = operator(
    ssd_update,
    "(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, "
    "Tensor? indices) -> Tensor",
    lambda state, x, *rest: x.new_empty(x.shape),
)


def triton_ssd_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    indices: Tensor | None = None,
) -> Tensor:
    """`ssd_update` of `ssd.py`, arguments and results."""
    return update(state, x, dt, A, B, C, D, z, dt_bias, indices)
