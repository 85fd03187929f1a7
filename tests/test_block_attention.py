"""Promise: attention over blocks is the softmax over all of a query's keys at once, in its outputs and its gradients.

The oracle is the softmax as it is written, over a mask, in float64.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megahf.models import block_attention
from megahf.models.block_attention import Block, attend_blocks, causal_blocks

SCALING = 0.37


def shown(blocks: list[Block], queries: int, keys: int) -> Tensor:
    """How often a query `[s]` sees a key `[s_k]`."""
    seen = torch.zeros(queries, keys, dtype=torch.long)
    for block in blocks:
        part = torch.ones(block.queries.stop - block.queries.start, block.keys.stop - block.keys.start).long()
        if block.causal:
            part = part.triu() if block.mirrored else part.tril()
        seen[block.queries, block.keys] += part
    return seen


def written(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax(q k') v over what is seen, `[b, s, n, v]`."""
    per_group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(per_group, 1), value.repeat_interleave(per_group, 1)
    scores = (query @ key.mT * SCALING).masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2)


def inputs(queries: int, keys: int, dtype: torch.dtype, width: int = 5, sinks: bool = True) -> list[Tensor]:
    """Four query heads in two groups, and values of a width of their own."""
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    shapes = [(2, 4, queries, 6), (2, 2, keys, 6), (2, 2, keys, width), *([(4,)] if sinks else [])]
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes]


def compare(blocks: list[Block], queries: int, keys: int, dtype: torch.dtype, atol: float, **options: object) -> None:
    given = [x.requires_grad_() for x in inputs(queries, keys, dtype, **options)]
    exact = [x.detach().double().requires_grad_() for x in given]
    sinks = [x[3] if len(x) > 3 else None for x in (given, exact)]
    out = attend_blocks(*given[:3], blocks, SCALING, sinks[0])
    expected = written(*exact[:3], shown(blocks, queries, keys).bool(), sinks[1])
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out * weights.to(dtype)).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=atol)
    for ours, theirs in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=atol, rtol=atol)


@st.composite
def pieces(draw: st.DrawFn) -> tuple[list[Block], int, int]:
    """Blocks of any shapes over bands of queries; every query sees something, no key twice."""
    blocks: list[Block] = []
    queries, widest = 0, 1
    for _ in range(draw(st.integers(1, 3))):
        rows, keys = draw(st.integers(1, 9)), 0
        band = slice(queries, queries + rows)
        for kind in draw(st.lists(st.sampled_from(["all", "causal", "mirrored"]), min_size=1, max_size=3)):
            columns = draw(st.integers(1, 9)) if kind == "all" else rows
            blocks.append(Block(band, slice(keys, keys + columns), kind != "all", kind == "mirrored"))
            keys += columns
        queries, widest = queries + rows, max(widest, keys)
    return blocks, queries, widest


@settings(max_examples=40, deadline=None)
@given(pieces())
def test_any_blocks_are_one_softmax(case: tuple[list[Block], int, int]) -> None:
    compare(*case, torch.float64, 1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_causal_blocks_show_every_visible_key_once_and_no_other(length: int, past: int, window: int | None) -> None:
    seen = shown(causal_blocks(0, length, past, window), length, past + length)
    places, keys = past + torch.arange(length)[:, None], torch.arange(past + length)
    expected = (keys <= places) & (keys > places - (window or past + length))
    assert torch.equal(seen, expected.long())


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("window", [None, 7])
def test_a_chunk_after_a_past_in_every_type(dtype: torch.dtype, atol: float, window: int | None) -> None:
    compare(causal_blocks(0, 20, 13, window), 20, 33, dtype, atol)


@pytest.mark.parametrize("width, sinks", [(5, False), (6, True), (14, True)])
def test_values_narrower_as_wide_and_wider_than_keys(width: int, sinks: bool) -> None:
    compare(causal_blocks(0, 11, 4), 11, 15, torch.float64, 1e-12, width=width, sinks=sinks)


@pytest.mark.parametrize("window", [None, 5])
def test_without_a_fused_kernel_it_is_the_same_in_tiles(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_attention, "kernel_for", lambda query: block_attention.PLAIN)
    monkeypatch.setattr(block_attention, "TILE", 4)
    compare(causal_blocks(0, 19, 10, window), 19, 29, torch.float64, 1e-12)
    compare(causal_blocks(0, 19, 10, window), 19, 29, torch.bfloat16, 4e-2)


def test_tensors_that_lie_otherwise_in_memory_are_read_right() -> None:
    query, key, value, sinks = inputs(9, 12, torch.float64)
    blocks = causal_blocks(0, 9, 3)
    strange = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value)]
    assert torch.equal(
        attend_blocks(*strange, blocks, SCALING, sinks), attend_blocks(query, key, value, blocks, SCALING, sinks)
    )


def test_autocast_is_as_it_is_for_torchs_attention() -> None:
    query, key, value = inputs(9, 9, torch.float32, width=6, sinks=False)
    spread = [x.repeat_interleave(2, 1) for x in (key, value)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_blocks(query, key, value.bfloat16(), causal_blocks(0, 9, 0), SCALING)
        expected = F.scaled_dot_product_attention(query, *spread, is_causal=True, scale=SCALING)
    assert out.dtype == torch.bfloat16 and torch.equal(out.transpose(1, 2), expected)


def test_a_query_without_keys_gives_zeros_and_no_gradient() -> None:
    query, key, value = (x.requires_grad_() for x in inputs(5, 5, torch.float64, sinks=False))
    out = attend_blocks(query, key, value, [Block(slice(2, 5), slice(0, 3), True)], SCALING)
    out.square().sum().backward()
    assert not out[:, :2].any() and not query.grad[:, :, :2].any() and query.grad[:, :, 3:].any()
    assert torch.isfinite(key.grad).all()


@pytest.mark.parametrize(
    "block",
    [
        Block(slice(0, 4), slice(0, 5), True),
        Block(slice(0, 4), slice(0, 5), False, mirrored=True),
        Block(slice(0, 6), slice(0, 5), False),
        Block(slice(0, 4), slice(0, 0), False),
    ],
)
def test_blocks_that_cannot_be_are_refused(block: Block) -> None:
    with pytest.raises(ValueError, match="block"):
        attend_blocks(*inputs(5, 5, torch.float64, sinks=False), [block], SCALING)
