"""Promise: what a sequence shared out cannot have is refused on every rank in the same words; nobody waits for ever.

Four processes over gloo; where one of them alone sees the fault, the others say it too. Beside them pairs of which one
process fails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from context_ranks import LENGTH, PATIENCE
from test_context_parallel import MODELS, Ranks, case, launch
from tiny import LLAMA, MIXTURES, VARIANTS, tiny, tiny_hybrid
from tiny_llava import pixels, tiny_vision_config
from transformers import DynamicCache

from megahf.models.context_parallel import context_parallel, whole_rows_only
from megahf.models.modeling_mcore_gpt import McoreGPTForSequenceClassification
from megahf.models.zigzag import split

HERE = LENGTH // 4  # tokens of a rank
PADDED = torch.cat((torch.zeros(2, 3), torch.ones(2, HERE - 3)), dim=1).long()
EXPERTS = MIXTURES["experts"]
Refusal = tuple[Any, dict[str, Any], dict[str, Any], str]


def of(**changes: Any) -> tuple[None, dict[str, Any]]:
    return None, changes


# Name: the model, the call, the context's options, what is said. "On rank 2" alone, where the name has it.
REFUSED: dict[str, Refusal] = {
    "padding on rank 2": (MODELS["llama"], {"attention_mask": PADDED}, {}, r"attention_mask: .* \(rank 2\)"),
    "a square mask": (MODELS["llama"], {"attention_mask": torch.ones(2, 1, HERE, HERE)}, {}, "attention_mask: "),
    "other positions on rank 2": (
        MODELS["llama"],
        {"position_ids": torch.arange(HERE)[None]},
        {},
        r"position_ids are not those of this rank's slices.* \(rank 2\)",
    ),
    "an odd length": (MODELS["llama"], {"length": HERE - 1}, {}, f"{HERE - 1} tokens on a rank"),
    "other lengths on rank 2": (MODELS["hybrid"], {"length": HERE - 2}, {}, "the ranks' tokens differ: 12, 12, 10, 12"),
    "other rows on rank 2": (MODELS["llama"], {"rows": 1}, {}, "the ranks' rows differ: 2, 2, 1, 2"),
    "other options on rank 2": (MODELS["llama"], {}, {"attention": "ring"}, "the ranks' choices differ"),
    "a cache on rank 2": (MODELS["llama"], {"past_key_values": DynamicCache()}, {}, r"past_key_values: .* \(rank 2\)"),
    "a cache asked for": (MODELS["llama"], {"use_cache": True}, {}, "use_cache: "),
    "attention weights": (MODELS["llama"], {"output_attentions": True}, {}, "output_attentions: "),
    "dropout": (of(**LLAMA, attention_dropout=0.1, hidden_dropout=0.2), {}, {}, "attention_dropout is 0.1.*hidden_dr"),
    "jitter": (of(**{**EXPERTS, "moe_input_jitter_eps": 0.1}), {}, {}, "moe_input_jitter_eps is 0.1"),
    "capacity": (of(**{**EXPERTS, "moe_expert_capacity_factor": 1.0}), {}, {}, "moe_expert_capacity_factor"),
    "learned positions": (of(max_position_embeddings=40), {}, {}, "48 tokens on 4 ranks, but the model has learned 40"),
    "heads of Mamba-1": (MODELS["mamba 1"], {}, {"mamba": "heads"}, "Mamba-1 has no heads"),
    "three heads": (
        ("mamba", {"mamba_num_heads": 6}),
        {},
        {"mamba": "heads"},
        "6 heads in 2 groups do not share out over 4 ranks",
    ),
    "heads for further tokens": (
        of(**VARIANTS["further tokens"]),
        {"labels": torch.ones(2, HERE, dtype=torch.long)},
        {},
        "mtp_loss_scaling_factor 0",
    ),
    "fewer tiles than places": (MODELS["images"], {"pixel_values": pixels(2)}, {}, "51 image tokens .* 2 tiles"),
    "no tiles": (MODELS["images"], {"pixel_values": None}, {}, "51 image tokens .* 0 tiles"),
    "fewer tiles on rank 2": (
        MODELS["images"],
        {"pixel_values": pixels(2), "num_tiles": torch.tensor([2])},
        {},
        "the ranks' tiles differ: 3, 3, 2, 3.*; the ranks' num_tiles differ: 2, 2, 1, 2",
    ),
    "other lengths and images": (MODELS["images"], {"length": HERE - 1}, {}, f"{HERE - 1} tokens on a rank"),
    "random positions of patches": (("llava", {"variant": "radio-g, hybrid"}), {}, {}, "set force_cpe_eval_mode"),
    "dropout of an encoder": (
        ("llava", {"vision_config": tiny_vision_config("clip", hidden_dropout=0.1)}),
        {},
        {},
        "hidden_dropout of vision_config is 0.1",
    ),
    "a BERT": (("bert", {}), {}, {}, "McoreBertModel reads whole sequences"),
}
PASSING = {"ones for a mask": {"attention_mask": torch.ones(2, HERE)}, "no cache": {"use_cache": False}}
ATTEMPTS = [
    {**case(name, "llama", task="attempt", sizes=(4,), call=call, options=options), "model": model}
    | ({"ranks": [2]} if name.endswith("on rank 2") else {})
    for name, (model, call, options, _) in REFUSED.items()
]
ATTEMPTS += [case(name, "llama", task="attempt", sizes=(4,), call=call) for name, call in PASSING.items()]
WAYS = ["dies", "raises", "hangs"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(ATTEMPTS, folder / "cases.pt")
    code, log = launch(folder, *WAYS)
    assert code == 0, log
    return folder


@pytest.mark.parametrize("name", [attempt["name"] for attempt in ATTEMPTS])
def test_every_rank_says_the_same_and_the_next_call_is_in_step(name: str, folder: Path) -> None:
    attempt = next(attempt for attempt in ATTEMPTS if attempt["name"] == name)
    said = Ranks(folder).of(attempt, 4)
    assert len(set(said)) == 1, said
    assert re.search(REFUSED[name][3] if name in REFUSED else "went through", said[0]), said[0]


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_fails_ends_the_other_within_the_timeout(way: str, folder: Path) -> None:
    seconds = float((folder / way / "met").read_text().split()[0])
    assert seconds < PATIENCE.total_seconds() * 1.6 if way == "hangs" else seconds < PATIENCE.total_seconds()


def test_a_length_that_is_no_multiple_is_refused_with_the_next_that_is() -> None:
    with pytest.raises(ValueError, match=r"a sequence of 50 over 4 ranks.*pad it on the right to 56"):
        split(torch.zeros(1, 50), 4, 0)


@pytest.mark.parametrize("options", [{"attention": "rings"}, {"mamba": "head"}, {"gradients": "sum"}])
def test_unknown_options_are_refused_with_the_known(options: dict[str, str]) -> None:
    name = next(iter(options))
    with (
        pytest.raises(ValueError, match=f"{name} is '{options[name]}'; it is one of"),
        context_parallel(None, **options),
    ):
        pass


def test_models_that_read_whole_sequences_carry_the_hook_that_refuses() -> None:
    model = McoreGPTForSequenceClassification(tiny(**LLAMA).config)
    assert whole_rows_only in model._forward_pre_hooks.values()
    assert whole_rows_only not in tiny_hybrid("mamba")._forward_pre_hooks.values()
