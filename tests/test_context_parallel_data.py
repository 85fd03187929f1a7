"""Promise: every process gets its slices of the same batch, labels shifted before they are cut, and never a mask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from context_ranks import build
from tiny import LLAMA, MIXTURES, VARIANTS, tiny, tokens
from tiny_llava import IMAGE
from torch.distributed.tensor.experimental import context_parallel as theirs
from transformers import TrainingArguments, default_data_collator

from megahf.context_parallel_data import ContextParallelCollator, slices_of
from megahf.context_parallel_trainer import ContextParallelTrainer
from megahf.errors import Refused
from megahf.models.context_parallel import active, context_parallel, group_of
from megahf.models.zigzag import join

IDS = tokens(2, 16)


def whole(batch: dict[str, Any], size: int, **options: Any) -> dict[str, Any]:
    """What the ranks have of a batch, put together."""
    parts = [slices_of(batch, size, rank, **options) for rank in range(size)]
    return {name: join([part[name] for part in parts]) for name in parts[0]}


def test_labels_are_shifted_over_the_edges_of_slices() -> None:
    found = whole({"input_ids": IDS, "labels": IDS}, 4)
    assert torch.equal(found["input_ids"], IDS) and torch.equal(found["labels"], IDS)
    assert torch.equal(found["shift_labels"][:, :-1], IDS[:, 1:])
    assert bool((found["shift_labels"][:, -1] == -100).all())
    assert torch.equal(found["position_ids"], torch.arange(16).expand(2, -1))


def test_images_stay_whole() -> None:
    batch = {"input_ids": IDS, "pixel_values": torch.ones(3, 3, 4, 4), "num_tiles": torch.tensor([2, 1])}
    for rank in range(2):
        found = slices_of(batch, 2, rank)
        assert found["pixel_values"] is batch["pixel_values"] and found["num_tiles"] is batch["num_tiles"]
        assert "expert_tokens" not in found


def test_labels_that_are_shifted_already_stay_as_they_are() -> None:
    assert torch.equal(whole({"input_ids": IDS, "shift_labels": IDS.flip(1)}, 2)["shift_labels"], IDS.flip(1))


def test_padding_on_the_right_leaves_no_mask_and_no_label() -> None:
    mask = torch.ones_like(IDS)
    mask[1, 10:] = 0
    found = whole({"input_ids": IDS, "labels": IDS, "attention_mask": mask}, 2)
    assert "attention_mask" not in found and torch.equal(found["expert_tokens"], mask)
    assert bool((found["labels"][1, 10:] == -100).all()) and bool((found["shift_labels"][1, 9:] == -100).all())
    assert torch.equal(found["shift_labels"][1, :9], IDS[1, 1:10]) and torch.equal(found["labels"][0], IDS[0])


def test_a_batch_is_padded_to_a_multiple_where_a_token_to_pad_with_is_given() -> None:
    found = whole({"input_ids": IDS, "labels": IDS}, 3, pad_token_id=7)
    assert found["input_ids"].shape == (2, 18)
    assert bool((found["input_ids"][:, 16:] == 7).all()) and bool((found["shift_labels"][:, 15:] == -100).all())
    embeds = whole({"inputs_embeds": torch.ones(2, 16, 4)}, 3, pad_token_id=7)["inputs_embeds"]
    assert embeds.shape == (2, 18, 4) and not embeds[:, 16:].any()
    assert found["expert_tokens"].tolist() == [[1] * 16 + [0] * 2] * 2


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)}, "padding before tokens"),
        ({"attention_mask": torch.ones(2, 1, 16, 16)}, "padding before tokens"),
        ({"position_ids": torch.arange(8).repeat(2)[None]}, "packed documents"),
        ({"token_type_ids": IDS}, "the batch has token_type_ids"),
    ],
)
def test_what_cannot_be_cut_is_refused(batch: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        slices_of({"input_ids": IDS, **batch}, 2, 0)


def test_a_length_that_is_no_multiple_is_refused_without_a_token_to_pad_with() -> None:
    with pytest.raises(ValueError, match="16 over 3 ranks"):
        slices_of({"input_ids": IDS}, 3, 0)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_collator_cuts_what_another_makes_and_one_rank_alone_is_no_special_case(group: Any) -> None:
    collator = ContextParallelCollator(default_data_collator, group, pad_token_id=0)
    batch = collator([{"input_ids": row, "labels": row} for row in IDS[:, :15].tolist()])
    assert batch["input_ids"].shape == (2, 16)
    model = tiny(**LLAMA).train()
    with context_parallel(group):
        loss = model(**batch).loss
    torch.testing.assert_close(loss, model(IDS[:, :15], labels=IDS[:, :15]).loss)


def test_contexts_end_where_they_end_and_meshes_give_their_group(group: Any) -> None:
    mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
    with pytest.raises(KeyError, match="inside"), context_parallel(mesh) as outer:
        assert active() is outer
        assert torch.equal(outer.join(outer.split(IDS)), IDS)
        with context_parallel(mesh["cp"]) as inner:
            assert active() is inner
        assert active() is outer
        raise KeyError("inside")
    assert active() is None
    with pytest.raises(ValueError, match=r"dimensions \('dp', 'tp'\)"):
        group_of(dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp")))


def test_a_copy_of_the_code_that_a_saved_model_brought_sees_the_context(group: Any) -> None:
    import importlib.util

    import megahf.models.context_parallel as ours

    place = importlib.util.spec_from_file_location("megahf.models.copied", ours.__file__)
    copy = importlib.util.module_from_spec(place)
    place.loader.exec_module(copy)
    with context_parallel(group) as context:
        assert copy.active() is context


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        (None, VARIANTS["sinks"], "attention sinks"),
        (None, VARIANTS["off by one"], "attention sinks"),
        (None, VARIANTS["window"], "windows"),
        (None, VARIANTS["latents"], "multi-latent attention"),
        (None, VARIANTS["further tokens"], "heads for further tokens"),
        (None, MIXTURES["experts"], "auxiliary losses"),
        ("attention", {}, "Mamba's states"),
        ("llava", {}, "McoreLlavaModel"),
        ("bert", {}, "McoreBertModel reads whole sequences"),
    ],
)
def test_torch_s_own_context_parallelism_is_refused_where_it_would_be_wrong(
    kind: str | None, changes: dict[str, Any], said: str, group: Any
) -> None:
    model, ids = build({"model": (kind, changes)}), IDS % IMAGE
    model(ids)
    mesh, buffers = dist.init_device_mesh("cpu", (1,)), [IDS.clone()]
    with theirs(mesh, buffers=buffers, buffer_seq_dims=[1]), pytest.raises(ValueError, match=said):
        model(ids)
    assert not model.supports_context_parallel
    model(ids)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [(None, LLAMA), (None, VARIANTS["gate and norms"]), (None, MIXTURES["experts on latents"]), ("gpt", {})],
)
def test_torch_s_own_context_parallelism_is_let_be_where_it_is_right(kind: str | None, changes: dict[str, Any]) -> None:
    assert build({"model": (kind, changes)}).supports_context_parallel


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoother"),
        ({}, "compute_metrics"),
        ({"cp": 3}, "there are 1 processes"),
    ],
)
def test_trainer_refuses_what_needs_whole_sequences(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    size = options.pop("cp", 2)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options)
    metrics = {"compute_metrics": lambda found: {}} if said == "compute_metrics" else {}
    with pytest.raises(Refused, match=said):
        ContextParallelTrainer(tiny(**LLAMA), arguments, cp_size=size, **metrics)
