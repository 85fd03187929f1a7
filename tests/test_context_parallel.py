"""Promise: processes that share a sequence say what one process says, and learn what it learns.

Four processes over gloo hold slices of one batch, two and four of them together. Everything is compared with the same
model in one process on the whole batch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from context_ranks import TRAINING, WORLD, batch, build, found, learn, padded, rows
from tiny import LLAMA, MIXTURES, MLA, VARIANTS
from tiny_llava import tiny_vision_config
from transformers import DynamicCache, Trainer, TrainingArguments

from megahf.models.zigzag import join, split


def seeing(variant: str, encoder: str) -> tuple[str, dict[str, Any]]:
    """A LLaVA whose positions are the same in training as else."""
    return "llava", {"variant": variant, "vision_config": tiny_vision_config(encoder, force_cpe_eval_mode=True)}


MODELS: dict[str, tuple[str | None, dict[str, Any]]] = {
    **{name: (None, VARIANTS[name]) for name in ("gpt2", "llama", "sinks", "off by one", "gate and norms")},
    "window": (None, VARIANTS["window and sinks"]),  # within a slice; the next reaches over several
    "long window": (None, {**LLAMA, "window_size": [19, 0]}),
    "latents": (None, MLA),
    "latents, window and sinks": (None, VARIANTS["latents, window and sinks"]),
    "experts": (None, MIXTURES["experts"]),
    "latents and experts": (None, {**MIXTURES["latents and experts"], "mtp_num_layers": None}),
    "hybrid": ("everything", {}),
    "hybrid of latents": ("latents", {}),
    "mixers": ("mamba", {}),
    "hybrid without norm": ("no norm, D a channel", {}),
    "mamba 1": ("mamba 1", {}),
    "the sample": ("sample", {}),
    "images": seeing("clip", "clip"),
    "images of a hybrid": seeing("radio-g, hybrid", "radio-g"),
    "images and tags": seeing("cradio-g, tags", "cradio-g"),
}
RING, HEADS = {"attention": "ring"}, {"mamba": "heads"}
Case = dict[str, Any]


def case(name: str, model: str | None = None, **more: Any) -> Case:
    """A step with a model of `MODELS` on groups of two and of four."""
    usual = {"task": "step", "sizes": (2, 4), "masked": "unevenly", "options": {}}
    return {**usual, "name": name, "model": MODELS[model or name], **more}


def one(name: str, model: str, **more: Any) -> Case:
    """On a group of two alone."""
    return case(name, model, sizes=(2,), **more)


CASES = [
    *(case(name) for name in MODELS if name not in ("the sample", "images")),
    *(case(f"{name} in a ring", name, options=RING) for name in ("sinks", "latents", "long window", "hybrid")),
    *(case(f"{name} by heads", name, options=HEADS) for name in ("mixers", "hybrid without norm")),
    one("labels as they are", "llama", unshifted=True),
    case("images", masked="nowhere"),
    case("labels of images as they are", "images", sizes=(4,), masked="nowhere", unshifted=True),
    one("no images", "images", blind=True),
    case("a rank without labels", "hybrid", masked="all of one rank"),
    one("a part of a step", "experts", masked="all of one rank", call={"num_items_in_batch": 200}),
    one("the loss in chunks", "experts", call={"skip_logits": True}),
    one("a loss of one's own", "experts", **{"own loss": True}),
    one("layers computed again", "hybrid", reentrant=False),
    one("layers computed again, reentrantly", "hybrid", reentrant=True, options=RING),
    one("two batches a step", "hybrid", steps=2),
    one("gradients added up by hand", "llama", options={"gradients": "parts"}),
]
TIGHT = [
    case(f"{name} in float64", name, dtype=torch.float64, **{"own loss": True}) for name in ("long window", "mixers")
]
AVERAGED = one("averaged", "experts", options={"gradients": "averaged"})
MEANS = case("mean of ranks", "llama", options={"mean_of_ranks": True})
SAID = [case(f"{name} says", name, task="say") for name in ("window", "hybrid")]
PADDED = [case(f"{name}, padded", name, task="pad") for name in ("experts", "hybrid")]
MEASURED = [
    case(f"measured {ring} {window}", "llama", task="measure", ring=ring, window=window)
    for ring, window in ((True, None), (False, None), (False, 33))
]
TRAINED = case("trained", "hybrid", task="train", sizes=(4,), training={"gradient_accumulation_steps": 2})
SAMPLE = one("the sample trained", "the sample", task="train", training={})  # two processes are the world
ALL = [*CASES, *TIGHT, AVERAGED, MEANS, *PADDED, *SAID, *MEASURED, TRAINED]


class Ranks:
    """What every rank gave for every case."""

    def __init__(self, folder: Path, world: int = WORLD) -> None:
        self.given = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]

    def of(self, case: Case, size: int) -> list[Any]:
        return [given[f"{case['name']} on {size}"] for given in self.given[:size]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "pair").mkdir()
    torch.save(ALL, folder / "cases.pt")
    torch.save([SAMPLE], folder / "pair" / "cases.pt")
    code, log = launch(folder)
    assert code == 0, log
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    return Ranks(folder)


def launch(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and end of the log of the ranks."""
    command = [sys.executable, str(Path(__file__).parent / "context_ranks.py"), str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = run.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            code = run.wait()
    return code, (folder / "log").read_text()[-6000:]


@cache
def alone(name: str) -> dict[str, Any]:
    """What one process finds in a case."""
    case = next(case for case in ALL if case["name"] == name)
    model = build(case)
    for _ in range(case.get("steps", 1)):
        out, loss = learn(model, case, lambda x: x)
        loss.backward()
    return found(model, out, loss)


def pairs(cases: list[Case]) -> Any:
    each = [(case, size) for case in cases for size in case["sizes"]]
    return pytest.mark.parametrize(("case", "size"), each, ids=[f"{case['name']} on {size}" for case, size in each])


def same_gradients(ours: dict[str, Any], theirs: dict[str, Any], within: float) -> None:
    """Equal to so small a part of each one's largest entry."""
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        largest = max(gradient.abs().max().item(), 1e-2)
        assert (ours[name] - gradient).abs().max() <= within * largest, name


@pairs([*CASES, *TIGHT])
def test_ranks_say_and_learn_what_one_process_does(case: Case, size: int, ranks: Ranks) -> None:
    expected, results = alone(case["name"]), ranks.of(case, size)
    within = 1e-10 if case in TIGHT else 1e-5
    if expected["logits"] is not None:
        together = join([result["logits"] for result in results])
        torch.testing.assert_close(together, expected["logits"], rtol=within, atol=within)
    for result in results:
        if "own loss" not in case:
            torch.testing.assert_close(result["loss"], expected["loss"], rtol=within, atol=within)
        same_gradients(result["gradients"], expected["gradients"], within)


def test_the_places_of_images_count_in_no_loss_whoever_shifts_its_labels() -> None:
    torch.testing.assert_close(alone("images")["loss"], alone("labels of images as they are")["loss"])


@pairs([case for case in CASES if case["options"] == HEADS and case["name"] == "mixers by heads"])
def test_mixers_that_share_out_heads_compute_bit_for_bit_what_one_process_does(
    case: Case, size: int, ranks: Ranks
) -> None:
    assert torch.equal(join([result["logits"] for result in ranks.of(case, size)]), alone(case["name"])["logits"])


@pairs([case for case in CASES if case["model"][0] not in (None, "llava") and "reentrant" not in case])
def test_every_rank_has_the_states_after_the_whole_sequence(case: Case, size: int, ranks: Ranks) -> None:
    model, cache = build(case), DynamicCache(config=build(case).config)
    with torch.no_grad():
        model(batch("nowhere")[0], past_key_values=cache)
    results = [result["states"] for result in ranks.of(case, size)]
    mixers = {at for at, kind in enumerate(model.config.hybrid_layer_pattern) if kind == "M"}
    assert all(result.keys() == mixers for result in results)
    for layer in mixers:
        held = cache.layers[layer].conv_states, cache.layers[layer].recurrent_states
        for place, states in enumerate(held):
            expected = states[0] if isinstance(states, dict) else states
            mine = [result[layer][place] for result in results]
            assert all(torch.equal(mine[0], other) for other in mine)
            torch.testing.assert_close(mine[0], expected.to(mine[0].dtype), rtol=1e-5, atol=1e-5)


@pairs(PADDED)
def test_padding_on_the_right_is_in_no_loss_and_no_gradient(case: Case, size: int, ranks: Ranks) -> None:
    model, whole = build(case), padded()
    loss = model(**whole).loss
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for result in ranks.of(case, size):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
        same_gradients(result["gradients"], expected, 1e-5)


@pairs(SAID)
def test_ranks_say_in_evaluation_what_one_process_does(case: Case, size: int, ranks: Ranks) -> None:
    with torch.no_grad():
        expected = build(case).eval()(batch("nowhere")[0]).logits
    torch.testing.assert_close(join(ranks.of(case, size)), expected, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_to_be_averaged_average_to_those_of_one_process(ranks: Ranks) -> None:
    expected, results = alone("averaged"), ranks.of(AVERAGED, 2)
    mean = {name: sum(result["gradients"][name] for result in results) / 2 for name in expected["gradients"]}
    same_gradients(mean, expected["gradients"], 1e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_the_mean_of_ranks_means_is_a_mean_of_the_means_of_their_slices(size: int, ranks: Ranks) -> None:
    model, (ids, labels) = build(MEANS), batch("unevenly")
    losses = F.cross_entropy(model(ids).logits[:, :-1].mT, labels[:, 1:], reduction="none")  # 0 where not counted
    losses, counted = (F.pad(x, (0, 1)) for x in (losses, (labels[:, 1:] != -100).float()))
    loss = sum(split(losses, size, rank).sum() / split(counted, size, rank).sum() for rank in range(size)) / size
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert abs(loss - alone("llama")["loss"]) > 1e-3  # another mean than that of all tokens
    for result in ranks.of(MEANS, size):
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
        same_gradients(result["gradients"], expected, 1e-5)


def test_keys_that_go_round_are_never_all_on_one_rank(ranks: Ranks) -> None:
    ring, gathered, windowed = (ranks.of(case, 4)[0] for case in MEASURED)
    assert gathered[0] == 512
    assert ring[0] == 128 and windowed[0] < 256  # two slices of 64; and their two windows


def test_trainer_on_two_pairs_of_ranks_follows_one_process(ranks: Ranks, tmp_path: Path) -> None:
    follows(ranks.of(TRAINED, 4)[0], TRAINED, 2, tmp_path)


def test_trainer_on_two_ranks_follows_one_process_on_the_sample_that_megatron_saved(
    folder: Path, tmp_path: Path
) -> None:
    follows(Ranks(folder / "pair", 2).of(SAMPLE, 2)[0], SAMPLE, 1, tmp_path)


def follows(results: dict[str, list[float]], case: Case, rows_a_step: int, folder: Path) -> None:
    """The losses of 20 steps are those of one process, with all rows of the ranks in each of its batches."""
    options = TrainingArguments(str(folder), per_device_train_batch_size=rows_a_step, **TRAINING, **case["training"])
    model = build(case)
    data = rows(48, model.config.vocab_size)
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data[:8])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and losses[-1] < losses[0]
    torch.testing.assert_close(results["losses"], losses, rtol=0, atol=1e-4)
    torch.testing.assert_close(results["evaluation"], [trainer.evaluate()["eval_loss"]], rtol=0, atol=1e-4)
