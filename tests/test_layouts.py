"""Which layers a pipeline stage holds is what Megatron's own functions say, for every grid they accept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from megatron.core import parallel_state
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megahf.arguments import grid
from megahf.errors import Refused
from megahf.layouts import Grid, layers, stage_count

Held = dict[tuple[int, int], range]


def megatrons(num_layers: int, ours: Grid) -> Held:
    """The layers of every chunk by Megatron's count and offset; AssertionError where it refuses the grid."""
    config: Any = SimpleNamespace(
        num_layers=num_layers,
        pipeline_model_parallel_size=ours.pipeline,
        virtual_pipeline_model_parallel_size=ours.virtual if ours.virtual > 1 else None,
        num_layers_in_first_pipeline_stage=ours.first,
        num_layers_in_last_pipeline_stage=ours.last,
        account_for_embedding_in_pipeline_split=ours.embedding,
        account_for_loss_in_pipeline_split=ours.loss,
        pipeline_model_parallel_layout=None,
    )
    held = {}
    for rank, chunk in itertools.product(range(ours.pipeline), range(ours.virtual)):
        stage = chunk if ours.virtual > 1 else None
        start = get_transformer_layer_offset(config, stage, rank)
        held[rank, chunk] = range(start, start + get_num_layers_to_build(config, stage, rank))
    assert sorted(layer for numbers in held.values() for layer in numbers) == list(range(num_layers))
    return held


def grids() -> Iterator[tuple[int, Grid]]:
    """Thousands of grids, most of which no model fits."""
    for count, pipeline, virtual in itertools.product(range(1, 13), (1, 2, 3, 4), (1, 2, 3)):
        if pipeline == 1 and virtual > 1:
            continue
        for embedding, loss in itertools.product((False, True), repeat=2) if pipeline > 1 else [(False, False)]:
            yield count, Grid(pipeline=pipeline, virtual=virtual, embedding=embedding, loss=loss)
        for first, last in itertools.product((None, 0, 1, 2, 4), repeat=2) if pipeline > 1 else []:
            if first is not None or last is not None:
                yield count, Grid(pipeline=pipeline, virtual=virtual, first=first, last=last)


def test_every_grid_holds_the_layers_megatron_gives_it_or_is_refused_as_there() -> None:
    accepted = refused = 0
    for count, ours in grids():
        try:
            wanted = megatrons(count, ours)
        except ZeroDivisionError:  # no middle stage to divide by: Megatron crashes, so nothing was ever saved so
            continue
        except AssertionError:
            refused += 1
            with pytest.raises(Refused):
                layers(ours, count)
        else:
            accepted += 1
            held = layers(ours, count)
            assert {chunk: list(numbers) for chunk, numbers in held.items()} == {
                chunk: list(numbers) for chunk, numbers in wanted.items()
            }, (count, ours)
    assert accepted > 200
    assert refused > 200


LAYOUTS = [
    ("Et|t|tt|L", 2, 4),
    ("Et|t|tt|L", 4, 4),
    ("Ettt|(tt|)*3,tL", 5, 10),
    ("E|t*4|t|(t|)*2L", 3, 7),
    ("Et*3|(tt|)*29L", 31, 61),
    ("E,t,t|t,t,L", 2, 4),
    ("E||tt|L", 2, 2),
]


@pytest.mark.parametrize("layout, pipeline, count", LAYOUTS)
def test_a_layout_string_means_what_megatron_reads_in_it(
    monkeypatch: pytest.MonkeyPatch, layout: str, pipeline: int, count: int
) -> None:
    theirs = PipelineParallelLayerLayout(layout, pipeline)
    virtual = theirs.virtual_pipeline_model_parallel_size
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", virtual)
    assert stage_count(layout) == pipeline * virtual == PipelineParallelLayerLayout.get_num_stages_from_str(layout)
    held = layers(Grid(pipeline=pipeline, virtual=virtual, layout=layout), count)
    for (rank, chunk), numbers in held.items():
        assert list(numbers) == theirs.get_layer_id_list(vp_stage=chunk, pp_rank=rank)


def test_chunks_come_in_the_order_their_layers_run() -> None:
    held = layers(Grid(pipeline=2, virtual=2), 8)
    assert list(held.items()) == [
        ((0, 0), range(0, 2)),
        ((1, 0), range(2, 4)),
        ((0, 1), range(4, 6)),
        ((1, 1), range(6, 8)),
    ]


@pytest.mark.parametrize(
    "ours, count, says",
    [
        (Grid(pipeline=3), 4, "4 layers do not divide over 3 pipeline stages"),
        (Grid(pipeline=3, first=1), 4, "3 layers do not divide over 2 pipeline stages"),
        (Grid(pipeline=2, first=1, last=1), 4, "2 layers do not divide over 0 pipeline stages"),
        (Grid(pipeline=2, virtual=3), 8, "stages of [4, 4] layers do not divide into 3 virtual chunks"),
        (Grid(pipeline=2, layout="Et|t|L"), 2, "layout 'Et|t|L' has 3 stages for 2 ranks x 1 chunks"),
        (Grid(pipeline=2, layout="Et|tx"), 2, "layout 'Et|tx' has ['x']"),
        (Grid(pipeline=2, layout="Ett|tL"), 4, "the pipeline stages of TP1 PP2 hold 3 layers, the model has 4"),
        (Grid(pipeline=2, first=5), 4, "stages of [5, -1] layers"),
    ],
)
def test_what_does_not_add_up_is_refused_with_its_numbers(ours: Grid, count: int, says: str) -> None:
    with pytest.raises(Refused) as error:
        layers(ours, count)
    assert says in str(error.value)


def test_the_grid_of_the_args() -> None:
    args = {
        "tensor_model_parallel_size": 4,
        "pipeline_model_parallel_size": 3,
        "virtual_pipeline_model_parallel_size": 2,
        "decoder_first_pipeline_num_layers": 2,
        "decoder_last_pipeline_num_layers": None,
        "expert_tensor_parallel_size": None,
    }
    assert grid(args) == Grid(tensor=4, pipeline=3, virtual=2, expert_tensor=4, first=2)
    assert str(grid(args)) == "TP4 PP3 VPP2"


def test_a_layout_string_settles_the_chunks_that_the_args_leave_open() -> None:
    args = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|t|tt|L"}
    assert grid(args).virtual == 2


def test_a_single_stage_has_no_first_and_last() -> None:
    args = {"pipeline_model_parallel_size": 1, "decoder_first_pipeline_num_layers": 2}
    args |= {"account_for_embedding_in_pipeline_split": True, "pipeline_model_parallel_layout": "EttL"}
    assert grid(args) == Grid()


@pytest.mark.parametrize("layout", [[["E", "t"], ["t", "L"]], {"a": 1}, 4])
def test_a_layout_that_is_no_string_is_refused_and_not_passed_over(layout: object) -> None:
    with pytest.raises(Refused, match="pipeline_model_parallel_layout"):
        grid({"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": layout})


@pytest.mark.parametrize("size", ["2", 0, -1, 2.0, True, [2]])
def test_a_parallel_size_that_is_no_count_is_refused(size: object) -> None:
    with pytest.raises(Refused, match="tensor_model_parallel_size"):
        grid({"tensor_model_parallel_size": size})
