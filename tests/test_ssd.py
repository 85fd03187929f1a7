"""The chunked scan of Mamba-2 is the recurrence, in outputs, states and gradients, at memory linear in the length.

The oracle is the recurrence as it is written down, token by token in float64.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megahf.models import conv, ssd
from megahf.models.conv import causal_conv1d
from megahf.models.ssd import ssd_scan, ssd_update

HEADS, CHANNELS, STATE = 8, 4, 8
LENGTHS = (1, 3, 63, 64, 65, 1000)
GROUPS = (1, 2, 8)
CHUNKS = (16, 64, 100, 256)
Inputs = dict[str, Tensor]


def inputs(length: int, groups: int = 2, rows: int = 2, seed: int = 0) -> Inputs:
    """Random arguments of `ssd_scan`; decay rates and time steps as Megatron initialises them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    steps = torch.exp(torch.rand(HEADS, generator=generator) * 4.6 - 6.9)
    return {
        "x": normal(rows, length, HEADS, CHANNELS),
        "dt": normal(rows, length, HEADS),
        "A": -1 - 15 * torch.rand(HEADS, generator=generator),
        "B": normal(rows, length, groups, STATE),
        "C": normal(rows, length, groups, STATE),
        "D": normal(HEADS),
        "z": normal(rows, length, HEADS, CHANNELS),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),
        "state": normal(rows, HEADS, CHANNELS, STATE),
    }


def recurrence(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, dim=2), C.repeat_interleave(per_group, dim=2)
    dt = torch.log1p(torch.exp(dt + dt_bias))
    outs = []
    for t in range(x.shape[1]):
        added = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + added
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D.reshape(HEADS, -1) * x[:, t])
    return torch.stack(outs, dim=1) * z * torch.sigmoid(z), state


def double(arguments: Inputs, grad: bool = False) -> Inputs:
    return {name: tensor.double().requires_grad_(grad) for name, tensor in arguments.items()}


@cache
def expected(length: int, groups: int) -> tuple[Tensor, Tensor, Inputs]:
    """The oracle's outputs and state, and the gradients of a random weighing of both."""
    arguments = double(inputs(length, groups), grad=True)
    out, state = recurrence(**arguments)
    weighed(out, state).backward()
    return out.detach(), state.detach(), {name: tensor.grad for name, tensor in arguments.items()}


def weighed(out: Tensor, state: Tensor) -> Tensor:
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(7)).to(t.dtype) for t in (out, state)]
    return (out * weights[0]).sum() + (state * weights[1]).sum()


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def cut(arguments: Inputs, tokens: slice) -> Inputs:
    """Some tokens of what runs over the sequence."""
    running = ("x", "dt", "B", "C", "z", "seq_idx", "mask")
    return {name: tensor[:, tokens] if name in running else tensor for name, tensor in arguments.items()}


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_state_are_the_recurrences(length: int, groups: int, chunk_size: int) -> None:
    out, state = ssd_scan(**inputs(length, groups), chunk_size=chunk_size)
    wanted, last, _ = expected(length, groups)
    assert error(out, wanted) < 1e-6  # the promise is 1e-5
    assert error(state, last) < 1e-6


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_gradient_is_the_recurrences(length: int, groups: int, chunk_size: int) -> None:
    arguments = {name: tensor.requires_grad_() for name, tensor in inputs(length, groups).items()}
    weighed(*ssd_scan(**arguments, chunk_size=chunk_size)).backward()
    for name, wanted in expected(length, groups)[2].items():
        assert error(arguments[name].grad, wanted) < 1e-5, name  # the promise is 1e-4


def test_float64_stays_float64_and_its_gradients_are_the_numerical_ones() -> None:
    arguments = {**inputs(5, rows=1), "D": torch.randn(HEADS, CHANNELS)}
    names, tensors = list(arguments), [tensor.double().requires_grad_() for tensor in arguments.values()]

    def scan(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_scan(**dict(zip(names, tensors, strict=True)), chunk_size=2)

    assert torch.autograd.gradcheck(scan, tensors, fast_mode=True)


def test_an_output_does_not_depend_on_the_chunk_size_even_where_everything_decays_at_once() -> None:
    arguments = inputs(300)
    arguments["dt_bias"] += 8
    wanted, last = recurrence(**double(arguments))
    for chunk_size in (16, 256):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}
        out, state = ssd_scan(**leaves, chunk_size=chunk_size)
        assert error(out, wanted) < 1e-6
        assert error(state, last) < 1e-6
        weighed(out, state).backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves.values())


def test_the_skip_may_have_a_weight_a_channel() -> None:
    arguments = {**inputs(70), "D": torch.randn(HEADS, CHANNELS)}
    assert error(ssd_scan(**arguments)[0], recurrence(**double(arguments))[0]) < 1e-6


def test_what_is_not_given_is_not_there() -> None:
    arguments = inputs(70)
    out, _ = ssd_scan(*(arguments[name] for name in ("x", "dt", "A", "B", "C")))
    nothing = {"D": 0 * arguments["D"], "dt_bias": 0 * arguments["dt_bias"], "state": 0 * arguments["state"]}
    gate = 1.2784645427610738  # silu of it is 1
    wanted, _ = recurrence(**double({**arguments, **nothing, "z": torch.full_like(arguments["z"], gate)}))
    assert error(out, wanted) < 1e-6


def test_bfloat16_is_rounded_once_at_the_end() -> None:
    names = ("x", "dt", "B", "C", "z")
    low = {name: t.bfloat16() if name in names else t for name, t in inputs(200).items()}
    out, state = ssd_scan(**low)
    wanted, last = ssd_scan(**{name: tensor.float() for name, tensor in low.items()})
    assert out.dtype == torch.bfloat16 and torch.equal(out, wanted.bfloat16())
    assert state.dtype == torch.float32 and torch.equal(state, last)


def test_autocast_does_not_reach_the_sums() -> None:
    wanted, last = ssd_scan(**inputs(100))
    with torch.autocast("cpu", torch.bfloat16):
        out, state = ssd_scan(**inputs(100))
    assert torch.equal(out, wanted) and torch.equal(state, last)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_sequence_cut_anywhere_and_gone_on_from_its_state_is_the_whole(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 150))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=4)))
    arguments = inputs(length, groups=data.draw(st.sampled_from(GROUPS)))
    starts = data.draw(st.sets(st.integers(1, length - 1), max_size=3))
    arguments["seq_idx"] = torch.tensor([t in starts for t in range(length)]).cumsum(0).expand(2, -1)
    whole, last = ssd_scan(**arguments)
    outs, state, before = [], arguments["state"], 0
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        piece = cut(arguments, slice(start, end))
        same = int(piece["seq_idx"][0, 0]) == before  # the state of another document is not this one's
        out, state = ssd_scan(**{**piece, "state": state * same}, chunk_size=data.draw(st.sampled_from((8, 64))))
        before = int(piece["seq_idx"][0, -1])
        outs.append(out)
    assert error(torch.cat(outs, dim=1), whole) < 1e-6
    assert error(state, last) < 1e-6


def test_steps_of_one_token_are_the_scan() -> None:
    arguments = inputs(40)
    whole, last = ssd_scan(**arguments)
    state, outs = arguments.pop("state").clone(), []
    for t in range(40):
        token = {name: tensor[:, 0] for name, tensor in cut(arguments, slice(t, t + 1)).items() if tensor.dim() > 2}
        outs.append(ssd_update(state, **{**arguments, **token}))
    assert error(torch.stack(outs, dim=1), whole) < 1e-6
    assert error(state, last) < 1e-6


@pytest.mark.parametrize("lengths", [(1, 1, 64, 3), (16, 16, 32), (5, 100, 2)])
def test_packed_documents_are_each_by_itself(lengths: tuple[int, ...]) -> None:
    arguments = inputs(sum(lengths))
    fresh = arguments.pop("state")
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed, last = ssd_scan(**arguments, state=fresh, seq_idx=documents, chunk_size=16)
    start = 0
    for length in lengths:
        alone, state = ssd_scan(**cut(arguments, slice(start, start + length)), state=None if start else fresh)
        assert error(packed[:, start : start + length], alone) < 1e-6
        start += length
    assert error(last, state) < 1e-6


def test_packed_documents_have_the_gradients_of_each_by_itself() -> None:
    def gradients(documents: list[slice], seq_idx: Tensor | None) -> Inputs:
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs(90).items() if name != "state"}
        outs = [ssd_scan(**cut(leaves, tokens), seq_idx=seq_idx, chunk_size=16)[0] for tokens in documents]
        weighed(torch.cat(outs, dim=1), torch.zeros(())).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    apart = gradients([slice(0, 37), slice(37, 90)], None)
    packed = gradients([slice(0, 90)], (torch.arange(90) >= 37).long().expand(2, -1))
    for name, gradient in packed.items():
        assert error(gradient, apart[name]) < 1e-5, name


@pytest.mark.parametrize("padding", [[0, 1, 2, 3], [50, 51, 52], [0, 10, 11, 30, 52]], ids=["left", "right", "holes"])
def test_padding_leaves_tokens_and_state_as_they_are_without_it(padding: list[int]) -> None:
    arguments = inputs(53)
    mask = torch.ones(2, 53, dtype=torch.bool)
    mask[1, padding] = False
    out, state = ssd_scan(**arguments, mask=mask, chunk_size=16)
    kept = {name: t[1:, mask[1]] for name, t in arguments.items() if t.dim() > 2 and name != "state"}
    alone, last = ssd_scan(**{**arguments, **kept, "state": arguments["state"][1:]})
    assert error(out[1:, mask[1]], alone) < 1e-6
    assert error(state[1:], last) < 1e-6


class Sizes(TorchDispatchMode):
    """Notes the shape of everything that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes += [t.shape for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        return out


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_that_is_made_grows_faster_than_the_sequence(backward: bool) -> None:
    def largest(length: int) -> int:
        arguments = inputs(length, rows=1)
        arguments["seq_idx"] = torch.arange(length)[None] // 100
        with Sizes() as made, torch.set_grad_enabled(backward):
            out, _ = ssd_scan(**{n: t.requires_grad_(backward and t.is_floating_point()) for n, t in arguments.items()})
            if backward:
                out.sum().backward()
        assert not any(sum(size >= length // 64 for size in shape) > 1 for shape in made.shapes)  # of chunks: 64 is one
        return max(shape.numel() for shape in made.shapes)

    assert largest(2 * 8192) <= 2.2 * largest(8192)


def test_the_backward_pass_keeps_no_decays_of_token_pairs() -> None:
    length, kept = 2048, 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ssd_scan(**{name: tensor.requires_grad_() for name, tensor in inputs(length, rows=1).items()})
    assert kept < length * HEADS * 64  # the decays alone, of chunks of 64


@pytest.mark.parametrize("length", [1, 200])
def test_it_compiles_to_one_graph_with_its_gradients(length: int) -> None:
    compiled = torch.compile(ssd_scan, fullgraph=True, backend="aot_eager")
    arguments = {name: tensor.requires_grad_() for name, tensor in inputs(length).items()}
    weighed(*compiled(**arguments)).backward()
    wanted, last, gradients = (lambda a: (*recurrence(**a), a))(double(inputs(length), grad=True))
    weighed(wanted, last).backward()
    for name, tensor in arguments.items():
        assert error(tensor.grad, gradients[name].grad) < 1e-5, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 50])
def test_the_convolution_is_torchs(length: int, bias: bool) -> None:
    x, weight = torch.randn(2, length, 6), torch.randn(6, 1, 4)
    offset = torch.randn(6) if bias else None
    wanted = F.silu(F.conv1d(x.mT, weight, offset, padding=3, groups=6)[..., :length]).mT
    out, state = causal_conv1d(x, weight, offset)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(state, F.pad(x.mT, (4, 0))[..., -4:])


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_convolution_cut_anywhere_and_gone_on_from_its_state_is_the_whole(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 20))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    x, weight, bias = torch.randn(2, length, 6), torch.randn(6, 1, 4), torch.randn(6)
    whole, last = causal_conv1d(x, weight, bias)
    outs, state = [], None
    for start, end in zip([0, *cuts], [*cuts, length], strict=True):
        out, state = causal_conv1d(x[:, start:end], weight, bias, state=state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, dim=1), whole)
    assert torch.equal(state, last)


def test_the_convolution_does_not_look_into_another_document() -> None:
    x, weight, bias = torch.randn(1, 12, 6), torch.randn(6, 1, 4), torch.randn(6)
    documents = torch.tensor([[3] * 5 + [4] * 1 + [5] * 6])
    before = torch.randn(1, 6, 4)
    out, _ = causal_conv1d(x, weight, bias, state=before, seq_idx=documents)
    first, second, third = x.split([5, 1, 6], dim=1)
    alone = [
        causal_conv1d(first, weight, bias, state=before),
        *(causal_conv1d(t, weight, bias) for t in (second, third)),
    ]
    torch.testing.assert_close(out, torch.cat([piece for piece, _ in alone], dim=1))


def test_the_state_of_a_convolution_is_of_the_last_token_before_padding() -> None:
    x, weight = torch.randn(3, 6, 5), torch.randn(5, 1, 4)
    before = torch.randn(3, 5, 4)
    lengths = torch.tensor([6, 2, 0])
    _, state = causal_conv1d(x, weight, state=before, mask=torch.arange(6) < lengths[:, None])
    for row, length in enumerate(lengths):
        assert torch.equal(state[row], torch.cat((before[row], x[row, :length].T), dim=1)[:, -4:])


def test_a_convolution_in_bfloat16_is_rounded_once_at_the_end() -> None:
    x, weight, bias = torch.randn(2, 30, 6).bfloat16(), torch.randn(6, 1, 4).bfloat16(), torch.randn(6).bfloat16()
    assert torch.equal(
        causal_conv1d(x, weight, bias)[0], causal_conv1d(x.float(), weight.float(), bias.float())[0].bfloat16()
    )


def on_gpu(rows: int, length: int, stride: int, *rest: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A tensor's outside, as a view of a packed projection has it."""
    return SimpleNamespace(
        shape=(rows, length, *rest),
        is_cuda=True,
        dtype=dtype,
        stride=lambda dim: (length * stride, stride)[dim],
    )


@pytest.mark.parametrize(
    ("rows", "length", "dtype", "fits"),
    [
        (1, 61_000, torch.bfloat16, True),
        (1, 131_072, torch.bfloat16, False),  # 2.4e9 elements of the projection
        (4, 32_768, torch.bfloat16, False),
        (1, 4096, torch.float32, False),  # TF32
    ],
)
def test_mamba_ssm_is_left_alone_where_its_offsets_overflow(
    rows: int, length: int, dtype: torch.dtype, fits: bool
) -> None:
    width = 18560  # of a packed projection of 128 heads of 64 channels and 8 groups of 128
    x = on_gpu(rows, length, width, 128, 64, dtype=dtype)
    assert ssd.kernel_fits(x, on_gpu(rows, length, width, 8, 128)) is fits


def test_mamba_ssm_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    def combined(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **options: Any) -> Any:
        assert options.pop("return_final_states") and chunk_size == 128
        seq_idx = options.pop("seq_idx")
        assert seq_idx.dtype == torch.int32 and int(seq_idx[0, 0]) == 0  # the state's document
        state = options.pop("initial_states")
        raw = torch.log(torch.expm1(dt.double()))  # softplus undone: the oracle applies it
        arguments = double({"x": x, "A": A, "B": B, "C": C, **options, "state": state})
        return recurrence(**arguments, dt=raw, dt_bias=torch.zeros(HEADS))

    arguments = {**inputs(30), "seq_idx": torch.full((2, 30), 3)}
    wanted, last = ssd_scan(**arguments)
    monkeypatch.setattr(ssd, "mamba_chunk_scan_combined", combined)
    monkeypatch.setattr(ssd, "kernel_fits", lambda x, B: True)
    out, state = ssd_scan(**arguments)
    assert error(wanted, out) < 1e-6 and error(last, state) < 1e-6


def test_causal_conv1d_is_given_what_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor, activation: str) -> Tensor:
        assert activation == "silu" and seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
        assert x.stride(1) == 1  # channels last, which seq_idx needs
        return causal_conv1d(x.mT, weight[:, None], bias, seq_idx=seq_idx)[0].mT

    x, weight, bias = torch.randn(2, 12, 8), torch.randn(8, 1, 4), torch.randn(8)
    options = {"state": torch.randn(2, 8, 4), "seq_idx": torch.tensor([[1] * 5 + [2] * 7] * 2)}
    wanted, last = causal_conv1d(x, weight, bias, **options)
    real = [conv.kernel_fits, lambda window, width: True]
    monkeypatch.setattr(conv, "causal_conv1d_fn", fn)
    monkeypatch.setattr(conv, "kernel_fits", lambda *inputs: real.pop()(*inputs))  # the oracle inside takes torch's way
    out, state = causal_conv1d(x, weight, bias, **options)
    torch.testing.assert_close(out, wanted)
    assert torch.equal(state, last)
