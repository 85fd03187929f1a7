"""Promise: angles of positions are those of the papers and of Megatron, in every form and precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import LLAMA, tiny, tiny_config, tokens

from megahf.models.rope import RotaryEmbedding, rotate

LLAMA_31 = {"rotary_base": 500000.0, "kv_channels": 128, "use_rope_scaling": True}
GPT_OSS = {
    "position_embedding_type": "yarn",
    "rotary_base": 150000.0,
    "kv_channels": 64,
    "yarn_rotary_scaling_factor": 32.0,
    "yarn_correction_range_round_to_int": False,
    "yarn_mscale": None,
}


def embedding(**changes: Any) -> RotaryEmbedding:
    return RotaryEmbedding(tiny_config(**{**LLAMA, **changes}))


def by_definition(
    x: torch.Tensor, positions: torch.Tensor, frequencies: list[float], interleaved: bool
) -> torch.Tensor:
    """Each pair of channels as a complex number, multiplied by e^(i position frequency), in float64."""
    out, half = x.double().clone(), len(frequencies)
    for pair, frequency in enumerate(frequencies):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        turn = torch.polar(torch.ones(len(positions), dtype=torch.float64), positions.double() * frequency)[
            :, None, None
        ]
        turned = torch.complex(x[..., first].double(), x[..., second].double()) * turn
        out[..., first], out[..., second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent", [1.0, 0.5, 0.25])
def test_pairs_are_turned_as_complex_numbers(percent: float, interleaved: bool) -> None:
    x, positions = torch.randn(2, 9, 3, 2, 16), torch.arange(9) + 50
    cos, sin = embedding(kv_channels=16, rotary_percent=percent)(positions[None], x.dtype)
    channels = 2 * cos.shape[-1]
    expected = by_definition(x, positions, [10000.0 ** (-i / channels) for i in range(0, channels, 2)], interleaved)
    torch.testing.assert_close(rotate(x, cos, sin, interleaved).double(), expected, atol=1e-5, rtol=1e-5)


def test_interpolation_divides_positions() -> None:
    stretched = embedding(rotary_seq_len_interpolation_factor=4.0)(torch.tensor([[8]]), torch.float32)
    torch.testing.assert_close(stretched, embedding()(torch.tensor([[2]]), torch.float32))


def test_llama_31_slows_only_the_slow_pairs() -> None:
    scaled, plain = embedding(**LLAMA_31).inv_freq, embedding(**{**LLAMA_31, "use_rope_scaling": False}).inv_freq
    turns = 8192 * plain / (2 * math.pi)  # in the original context
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    middle = (turns > 1) & (turns < 4)
    share = (turns[middle] - 1) / 3
    torch.testing.assert_close(scaled[middle], plain[middle] * ((1 - share) / 8 + share))
    assert middle.any()


def test_llama_31_takes_the_factor_it_is_given() -> None:
    assert embedding(**LLAMA_31, rope_scaling_factor=32.0).inv_freq[-1] == embedding(**LLAMA_31).inv_freq[-1] / 4


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    rope = embedding(**GPT_OSS)
    plain = embedding(**{**GPT_OSS, "position_embedding_type": "rope"}).inv_freq
    turns = 4096 * plain / (2 * math.pi)
    torch.testing.assert_close(rope.inv_freq[turns > 32], plain[turns > 32])
    torch.testing.assert_close(rope.inv_freq[turns < 1], plain[turns < 1] / 32)
    assert rope.concentration == pytest.approx(0.1 * math.log(32) + 1)


@pytest.mark.parametrize(
    "mscale, all_dim, expected",
    [(1.0, 0.0, 0.1 * math.log(32) + 1), (0.7, 0.7, 1.0), (None, 1.0, 0.1 * math.log(32) + 1)],
)
def test_yarn_concentration(mscale: float | None, all_dim: float, expected: float) -> None:
    options = {**GPT_OSS, "yarn_mscale": mscale, "yarn_mscale_all_dim": all_dim}
    assert embedding(**options).concentration == pytest.approx(expected)


def test_yarn_rotates_every_channel_whatever_the_percentage() -> None:
    assert torch.equal(embedding(**GPT_OSS, rotary_percent=0.5).inv_freq, embedding(**GPT_OSS).inv_freq)


@pytest.mark.parametrize(
    "move", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("meta").to_empty(device="cpu")]
)
def test_moving_or_casting_a_model_never_rounds_the_frequencies(move: Any) -> None:
    rope = embedding(**LLAMA_31)
    assert torch.equal(move(embedding(**LLAMA_31)).inv_freq, rope.inv_freq)


def test_a_model_made_under_meta_has_its_frequencies() -> None:
    with torch.device("meta"):
        rope = embedding(**LLAMA_31)
    assert torch.equal(rope.inv_freq, embedding(**LLAMA_31).inv_freq)


def test_cosines_are_cast_to_the_dtype_of_the_activations() -> None:
    positions = torch.tensor([[70000]])
    cos, _ = embedding(**LLAMA_31)(positions, torch.bfloat16)
    exact, _ = embedding(**LLAMA_31)(positions, torch.float32)
    assert cos.dtype == torch.bfloat16
    assert torch.equal(cos, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    "frequency, rotary", [(2, [True, False, True, False]), ([1, 0, 0, 1], [False, True, True, False])]
)
@torch.no_grad()
def test_layers_without_rope_do_not_feel_positions(frequency: int | list[int], rotary: list[bool]) -> None:
    model = tiny(**LLAMA, num_layers=4, no_rope_freq=frequency)
    assert [layer.self_attention.rotary for layer in model.model.decoder.layers] == rotary
    blind = tiny(**LLAMA, num_layers=2, no_rope_freq=[1, 1])
    ids = tokens(1, 6)
    stretched = torch.arange(6)[None] * 7 + 1
    torch.testing.assert_close(blind(ids, position_ids=stretched).logits, blind(ids).logits)
    assert not torch.allclose(model(ids, position_ids=stretched).logits, model(ids).logits, atol=1e-3)
