"""Promise: a rank of context parallelism holds the slices that Megatron gives it, of tokens, labels and positions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.utils import get_batch_on_this_cp_rank

from megahf.context_parallel_data import slices_of
from megahf.models.zigzag import join, positions, split


class Group:
    """A process group as far as Megatron looks at it."""

    def __init__(self, size: int, rank: int) -> None:
        self.sizes = size, rank

    def size(self) -> int:
        return self.sizes[0]

    def rank(self) -> int:
        return self.sizes[1]


@pytest.mark.parametrize("size", range(1, 9))
def test_slices_are_those_of_megatron(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # else Megatron does not look at the group
    length = 6 * size  # two slices of three tokens a rank
    ids = torch.randint(1000, (2, length), generator=torch.Generator().manual_seed(size))
    following = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()  # what Megatron's data loader has for labels
    places = torch.arange(length).expand(2, -1).contiguous()
    for rank in range(size):
        whole = {"tokens": ids, "labels": following, "position_ids": places}
        expected = get_batch_on_this_cp_rank(whole, cp_group=Group(size, rank))
        found = slices_of({"input_ids": ids, "labels": ids}, size, rank)
        assert torch.equal(found["input_ids"], expected["tokens"])
        assert torch.equal(found["shift_labels"], expected["labels"])
        assert torch.equal(found["position_ids"], expected["position_ids"])
        assert torch.equal(positions(6, size, rank), expected["position_ids"][:1])


@pytest.mark.parametrize("size", range(1, 9))
def test_joined_slices_are_the_whole_again(size: int) -> None:
    whole = torch.arange(2 * 3 * 4 * size).view(2, 4 * size, 3)
    assert torch.equal(join([split(whole, size, rank) for rank in range(size)]), whole)
