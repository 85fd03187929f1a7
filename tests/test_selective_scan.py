"""The selective scan of Mamba-1 is the recurrence, in outputs, states and gradients, at memory linear in the length.

The oracle is the recurrence as it is written down, token by token in float64.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ssd import Inputs, Sizes, double, error, weighed
from torch import Tensor

from megahf.models.selective_scan import selective_scan, selective_update

CHANNELS, STATE = 6, 5
RUNNING = ("u", "dt", "B", "C", "z")


def inputs(length: int, rows: int = 2) -> Inputs:
    """Random arguments of `selective_scan`; decay rates and time steps as state-spaces initialises them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    steps = torch.exp(torch.rand(CHANNELS, generator=generator) * 4.6 - 6.9)
    return {
        "u": normal(rows, length, CHANNELS),
        "dt": normal(rows, length, CHANNELS),
        "A": -torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1),
        "B": normal(rows, length, STATE),
        "C": normal(rows, length, STATE),
        "D": normal(CHANNELS),
        "z": normal(rows, length, CHANNELS),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
        "state": normal(rows, CHANNELS, STATE),
    }


def recurrence(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle."""
    dt = torch.log1p(torch.exp(dt + dt_bias))
    outs = []
    for t in range(u.shape[1]):
        state = torch.exp(dt[:, t, :, None] * A) * state + torch.einsum("bd,bd,bn->bdn", dt[:, t], u[:, t], B[:, t])
        outs.append(torch.einsum("bdn,bn->bd", state, C[:, t]) + D * u[:, t])
    return torch.stack(outs, dim=1) * z * torch.sigmoid(z), state


@cache
def expected(length: int) -> tuple[Tensor, Tensor, Inputs]:
    """The oracle's outputs and state, and the gradients of a random weighing of both."""
    arguments = double(inputs(length), grad=True)
    out, state = recurrence(**arguments)
    weighed(out, state).backward()
    return out.detach(), state.detach(), {name: tensor.grad for name, tensor in arguments.items()}


def cut(arguments: Inputs, tokens: slice | Tensor) -> Inputs:
    return {name: tensor[:, tokens] if name in RUNNING else tensor for name, tensor in arguments.items()}


@pytest.mark.parametrize("chunk_size", [16, 100])
@pytest.mark.parametrize("length", [1, 3, 63, 64, 65, 1000])
def test_outputs_state_and_every_gradient_are_the_recurrences(length: int, chunk_size: int) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in inputs(length).items()}
    out, state = selective_scan(**arguments, chunk_size=chunk_size)
    wanted, last, gradients = expected(length)
    assert error(out, wanted) < 1e-6 and error(state, last) < 1e-6
    weighed(out, state).backward()
    for name, gradient in gradients.items():
        assert error(arguments[name].grad, gradient) < 1e-5, name


def test_float64_stays_float64_and_its_gradients_are_the_numerical_ones() -> None:
    arguments = inputs(5, rows=1)
    tensors = [tensor.double().requires_grad_() for tensor in arguments.values()]

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(arguments, tensors, strict=True)), chunk_size=2)

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_sequence_cut_anywhere_and_gone_on_from_its_state_is_the_whole(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    arguments = inputs(length)
    whole, last = selective_scan(**arguments, chunk_size=16)
    outs, state = [], arguments["state"]
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        out, state = selective_scan(**{**cut(arguments, slice(start, end)), "state": state}, chunk_size=16)
        outs.append(out)
    assert error(torch.cat(outs, dim=1), whole) < 1e-6
    assert error(state, last) < 1e-6


def test_steps_of_one_token_are_the_scan() -> None:
    arguments = inputs(20)
    whole, last = selective_scan(**arguments)
    state, outs = arguments.pop("state").clone(), []
    for t in range(20):
        token = {name: arguments[name][:, t] for name in RUNNING}
        outs.append(selective_update(state, **{**arguments, **token}))
    assert error(torch.stack(outs, dim=1), whole) < 1e-6
    assert error(state, last) < 1e-6


def test_packed_documents_are_each_by_itself() -> None:
    arguments, lengths = inputs(40), (7, 1, 16, 16)
    fresh = arguments.pop("state")
    documents = torch.arange(4).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed, last = selective_scan(**arguments, state=fresh, seq_idx=documents, chunk_size=8)
    start = 0
    for length in lengths:
        tokens = slice(start, start + length)
        alone, state = selective_scan(**cut(arguments, tokens), state=None if start else fresh)
        assert error(packed[:, tokens], alone) < 1e-6
        start += length
    assert error(last, state) < 1e-6


def test_padding_leaves_tokens_and_state_as_they_are_without_it() -> None:
    arguments = inputs(30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, [0, 1, 12, 29]] = False
    out, state = selective_scan(**arguments, mask=mask, chunk_size=8)
    alone, last = selective_scan(**cut(arguments, mask[1]))
    assert error(out[1, mask[1]], alone[1]) < 1e-6
    assert error(state[1], last[1]) < 1e-6


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_that_is_made_grows_faster_than_the_sequence(backward: bool) -> None:
    def largest(length: int) -> int:
        with Sizes() as made, torch.set_grad_enabled(backward):
            out, _ = selective_scan(**{name: t.requires_grad_(backward) for name, t in inputs(length, rows=1).items()})
            if backward:
                out.sum().backward()
        return max(shape.numel() for shape in made.shapes)

    assert largest(2 * 1024) <= 2.2 * largest(1024)
    assert largest(1024) <= 1024 * CHANNELS * 2  # and no state a token


def test_it_compiles_to_one_graph() -> None:
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out, state = compiled(**inputs(40))
    wanted, last = recurrence(**double(inputs(40)))
    assert error(out, wanted) < 1e-6 and error(state, last) < 1e-6
