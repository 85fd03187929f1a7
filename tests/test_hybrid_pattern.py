"""The pattern of a hybrid's layers is what Megatron makes of the same arguments."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahf.errors import Refused
from megahf.hybrid import Pattern, from_ratios, parsed, pattern_of


@given(st.integers(1, 120), st.floats(0, 1), st.floats(0, 1))
def test_ratios_make_the_pattern_that_megatron_makes(layers: int, attention: float, mlp: float) -> None:
    from megatron.core.ssm.mamba_hybrid_layer_allocation import _allocate_auto

    mlp = min(mlp, 1 - attention)
    assert from_ratios(layers, attention, mlp) == "".join(_allocate_auto(layers, attention, mlp))


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("M-M*", Pattern("M-M*")),
        ("M-M-|M-M*-/MM/MM", Pattern("M-M-M-M*-", (4, 5), "MM", 2)),
        ("M||M", Pattern("MM", (1, 0, 1))),
        ("M*/", Pattern("M*")),
    ],
)
def test_stages_and_heads_are_told_from_layers(text: str, pattern: Pattern) -> None:
    assert parsed(text) == pattern


@pytest.mark.parametrize(
    "args, pattern",
    [
        ({"num_layers": 4}, None),
        ({"num_layers": 4, "hybrid_override_pattern": None, "hybrid_attention_ratio": 0.0}, None),
        ({"num_layers": 4, "is_hybrid_model": True}, Pattern("MMMM")),
        ({"num_layers": 4, "hybrid_override_pattern": "M*-E"}, Pattern("M*-E")),
        ({"num_layers": 9, "hybrid_layer_pattern": "M|*"}, Pattern("M*", (1, 1))),  # Megatron goes by the pattern
        ({"num_layers": 10, "hybrid_attention_ratio": 0.2}, Pattern("MMM*MM*MMM")),
        (
            {"num_layers": 2, "hybrid_layer_pattern": "M*", "mtp_num_layers": 1, "mtp_hybrid_override_pattern": "*M"},
            Pattern("M*", (), "*M", 1),
        ),
    ],
)
def test_arguments_of_all_versions_are_read(args: dict[str, Any], pattern: Pattern | None) -> None:
    assert pattern_of(args) == pattern


@pytest.mark.parametrize(
    "args, said",
    [
        ({"num_layers": 2, "hybrid_layer_pattern": "MG"}, "'G': gated delta nets, which are not supported"),
        ({"num_layers": 2, "hybrid_layer_pattern": "MD"}, "'D': DeepSeek's sparse attention"),
        ({"num_layers": 2, "hybrid_layer_pattern": "Mx"}, "'x': no symbol of Megatron's"),
        ({"num_layers": 3, "hybrid_override_pattern": "M*"}, "has 2 layers, the args say 3"),
        ({"num_layers": 2, "hybrid_layer_pattern": "*+"}, "mixes attention and multi-latent attention"),
        ({"num_layers": 2, "hybrid_layer_pattern": "M*/M/*"}, "differ from one another"),
        ({"num_layers": 2, "hybrid_layer_pattern": 7}, "is 7, not a text"),
    ],
)
def test_what_is_no_pattern_or_not_built_is_refused_by_name(args: dict[str, Any], said: str) -> None:
    with pytest.raises(Refused, match=said):
        pattern_of(args)
