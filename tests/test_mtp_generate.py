"""Promise: `generate(use_mtp=True)`, drafts by a model's own heads, says what the model alone says, in fewer steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import LLAMA, VARIANTS, randomise, tiny, tiny_config, tokens
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from megahf.models import mtp_generation
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

GREEDY: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
MOE: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24}

pytestmark = pytest.mark.skipif(not hasattr(GenerationConfig(), "use_mtp"), reason="this transformers has no use_mtp")


class Steps:
    """How often a model ran, and over how many tokens."""

    def __init__(self, model: McoreGPTForCausalLM) -> None:
        self.lengths: list[int] = []
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: self.lengths.append(args[0].shape[1]), with_kwargs=True
        )


def trained(**changes: Any) -> McoreGPTForCausalLM:
    """A model with three heads that has learned rows of seven tokens over and over, and foretells them mostly."""
    torch.manual_seed(0)
    model = randomise(McoreGPTForCausalLM(tiny_config(**{**LLAMA, "mtp_num_layers": 3, **changes}))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        ids = tokens(8, 7, seed=step % 4).repeat(1, 4)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def skilled() -> McoreGPTForCausalLM:
    return trained()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_heads_change_no_token(variant: str, implementation: str) -> None:
    model = tiny(**{**VARIANTS[variant], "num_layers": 3, "mtp_num_layers": 3})
    model.set_attn_implementation(implementation)
    for length in (1, 9):
        alone = model.generate(tokens(1, length), **GREEDY)
        assert torch.equal(model.generate(tokens(1, length), **GREEDY, use_mtp=True), alone)


@pytest.mark.parametrize("changes", [{"mtp_num_layers": 1}, {"mtp_use_repeated_layer": True}, MOE])
def test_heads_of_every_kind_change_no_token(changes: dict[str, Any]) -> None:
    model = tiny(**{**LLAMA, "mtp_num_layers": 3, **changes})
    alone = model.generate(tokens(1, 5), **GREEDY)
    assert torch.equal(model.generate(tokens(1, 5), **GREEDY, use_mtp=True), alone)


def test_skilled_heads_change_no_token_and_save_steps(skilled: McoreGPTForCausalLM) -> None:
    steps = Steps(skilled)
    for seed in (0, 3, 9):
        ids = tokens(1, 7, seed=seed).repeat(1, 2)[:, : 14 - seed]
        alone = skilled.generate(ids, **GREEDY)
        steps.lengths.clear()
        assert torch.equal(skilled.generate(ids, **GREEDY, use_mtp=True), alone)
        assert len(steps.lengths) < 24
        if seed < 9:  # a row it has learned: nearly four tokens a step
            assert len(steps.lengths) <= 12, steps.lengths


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Compares every draft with what its head says of the whole sequence at once; lists drafts a round."""
    draft, rounds = mtp_generation.MTPCandidateGenerator.draft, []

    def compared(self: Any, ids: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, logits = draft(self, ids, *arguments)
        known = ids.shape[1]
        for head in range(logits.shape[1]):
            whole = self.model(out[:, : known + head], output_mtp_logits=True).mtp_logits[head]
            torch.testing.assert_close(logits[:, head], whole[:, known - 2], rtol=1e-4, atol=1e-4)
        rounds.append(logits.shape[1])
        return out, logits

    monkeypatch.setattr(mtp_generation.MTPCandidateGenerator, "draft", compared)
    yield rounds


@pytest.mark.parametrize("variant", ["gpt2", "window and sinks", "latents", "skilled"])
def test_drafts_are_what_heads_say_of_the_whole_sequence(
    variant: str, checked: list[int], skilled: McoreGPTForCausalLM
) -> None:
    model = skilled if variant == "skilled" else tiny(**{**VARIANTS[variant], "num_layers": 3, "mtp_num_layers": 3})
    for length in (1, 2, 12):
        model.generate(tokens(1, length, seed=2), **GREEDY, use_mtp=True)
    assert len(checked) > 15 and set(checked) > {1, 3}, "the last round has room for fewer drafts"


def test_it_ends_where_the_model_alone_ends(skilled: McoreGPTForCausalLM) -> None:
    ids = tokens(1, 7).repeat(1, 2)
    whole = skilled.generate(ids, **GREEDY)
    for place in range(14, 20):
        end = int(whole[0, place])
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": end}
        alone = skilled.generate(ids, **options)
        assert torch.equal(skilled.generate(ids, **options, use_mtp=True), alone)
    for new in range(1, 9):
        assert skilled.generate(ids, max_new_tokens=new, do_sample=False, use_mtp=True).shape[1] == 14 + new


def test_it_goes_up_to_the_last_learned_position() -> None:
    model = tiny(mtp_num_layers=3, tie_word_embeddings=False)
    alone = model.generate(tokens(1, 80), max_length=97, min_length=97, do_sample=False)
    found = model.generate(tokens(1, 80), max_length=97, min_length=97, do_sample=False, use_mtp=True)
    assert found.shape[1] == 97 and torch.equal(found, alone)


def test_padding_and_processors_and_scores_are_the_models(skilled: McoreGPTForCausalLM) -> None:
    ids, mask = tokens(1, 14), torch.ones(1, 14, dtype=torch.long)
    ids[:, :5], mask[:, :5] = 0, 0
    options = {**GREEDY, "attention_mask": mask, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    alone, found = skilled.generate(ids, **options), skilled.generate(ids, **options, use_mtp=True)
    assert torch.equal(found.sequences, alone.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(alone.scores), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_sampling_keeps_the_distribution() -> None:
    """Three tokens by chance, the last two drafted: pairs of neighbours come as often as the model has them."""
    model = tiny(**{**LLAMA, "vocab_size": 5, "mtp_num_layers": 2, "pad_token_id": None})
    ids, triples = tokens(1, 3, vocabulary=5), torch.cartesian_prod(*[torch.arange(5)] * 3)
    rows = torch.cat((ids.expand(125, -1), triples), dim=1)
    chances = (model(rows).logits[:, 2:5] / 2).softmax(-1).gather(-1, triples[..., None]).prod(1).view(5, 5, 5)
    torch.manual_seed(0)
    draws, counts = 600, torch.zeros(5, 5, 5)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": True, "temperature": 2.0, "top_k": 0}
    for _ in range(draws):
        counts[tuple(model.generate(ids, **options, use_mtp=True)[0, 3:])] += 1
    for other in (0, 2):
        seen, due = counts.sum(other), chances.sum(other) * draws
        assert ((seen - due).square() / due).sum() < 56  # chi-square of 24 degrees: one in 5000 is above


def test_what_it_cannot_do_is_refused_in_words() -> None:
    model, ids = tiny(**LLAMA, mtp_num_layers=2), tokens(1, 5)
    with pytest.raises(ValueError, match="no heads for further tokens, mtp_num_layers is None"):
        tiny(**LLAMA).generate(ids, max_new_tokens=4, use_mtp=True)
    with pytest.raises(ValueError, match="batch_size = 1"):
        model.generate(tokens(2, 5), max_new_tokens=4, use_mtp=True)
    with pytest.raises(ValueError, match="Static cache"):
        model.generate(ids, max_new_tokens=4, use_mtp=True, cache_implementation="static")
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"past_key_values holds 5 tokens, .*: leave it out"):
        model.generate(torch.cat((ids, ids), 1), max_new_tokens=4, use_mtp=True, past_key_values=cache)
    with pytest.raises(ValueError, match="inputs_embeds does not tell: give input_ids"):
        vectors = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=vectors, max_new_tokens=4, use_mtp=True)


def test_a_cache_that_cannot_be_rolled_back_is_refused_by_name() -> None:
    class RoundedLayer(DynamicLayer):
        """As quantized caches', which take further packages: `crop`, inherited, passes over what it has rounded."""

    cache = DynamicCache()
    cache.layers.append(RoundedLayer())
    with pytest.raises(ValueError, match="a RoundedLayer cannot be cropped: leave cache_implementation"):
        tiny(**LLAMA, mtp_num_layers=2).generate(tokens(1, 5), max_new_tokens=4, use_mtp=True, past_key_values=cache)
