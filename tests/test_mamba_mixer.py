"""The Mamba mixers are Megatron's and transformers', and the same by any path: cache, cuts, padding, packing, offload.

The oracle is a mixer written down token by token in float64, with none of our functions.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import randomise
from torch import Tensor, nn
from transformers import BambaConfig, DynamicCache, Mamba2Config, MambaConfig, NemotronHConfig
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer as HFMamba1Mixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from megahf.models import state_space
from megahf.models.mamba import MambaMixer
from megahf.models.mamba1 import Mamba1Mixer
from megahf.models.state_space import Rows, rows_of

HIDDEN = 32
KINDS = {
    "plain": (MambaMixer, {}),
    "heads given": (MambaMixer, {"mamba_num_heads": 12, "mamba_num_groups": 4}),
    "one group": (MambaMixer, {"mamba_num_groups": 1}),
    "D a channel": (MambaMixer, {"mamba_d_has_hdim": True}),
    "no gated norm": (MambaMixer, {"mamba_rms_norm": False}),
    "LayerNorm, zero-centred": (MambaMixer, {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True}),
    "biases": (MambaMixer, {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_conv": 3}),
    "Mamba-1": (Mamba1Mixer, {}),
    "Mamba-1, biases": (Mamba1Mixer, {"mamba_proj_bias": True, "mamba_dt_rank": 5, "mamba_conv_bias": False}),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def config(**changes: Any) -> SimpleNamespace:
    """Eight heads of eight channels in two groups."""
    settings = {
        "hidden_size": HIDDEN,
        "layernorm_epsilon": 1e-3,
        "normalization": "RMSNorm",
        "layernorm_zero_centered_gamma": False,
        "mamba_state_dim": 16,
        "mamba_head_dim": 8,
        "mamba_num_heads": None,
        "mamba_num_groups": 2,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "mamba_proj_bias": False,
        "mamba_conv_bias": True,
        "mamba_d_has_hdim": False,
        "mamba_rms_norm": True,
        "mamba_dt_rank": None,
    }
    return SimpleNamespace(**{**settings, **changes})


def build(kind: str, **changes: Any) -> nn.Module:
    mixer, options = KINDS[kind]
    torch.manual_seed(0)  # `randomise` keeps the size of what was initialised
    return randomise(mixer(config(**{**options, **changes}), layer_idx=0)).eval()


def stream(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def fresh_cache() -> DynamicCache:
    """transformers' cache of one layer with a convolution's and a recurrence's state."""
    return DynamicCache(config=Mamba2Config(num_hidden_layers=1, hidden_size=HIDDEN, num_heads=8, head_dim=8))


def written_down(mixer: nn.Module, hidden: Tensor) -> Tensor:
    """The oracle: `hidden` `[s, h]` to the same, token by token."""
    c = {name: parameter.double() for name, parameter in mixer.named_parameters()}
    norm = mixer.in_proj_layernorm
    x = hidden.double()
    if "in_proj_layernorm.bias" in c:
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    x = x * (c["in_proj_layernorm.weight"] + norm.zero_centered) + c.get("in_proj_layernorm.bias", 0)
    packed = x @ c["in_proj.weight"].T + c.get("in_proj.bias", 0)
    mix = mamba2_written_down if isinstance(mixer, MambaMixer) else mamba1_written_down
    return mix(mixer, c, packed) @ c["out_proj.weight"].T + c.get("out_proj.bias", 0)


def convolved(c: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = c["conv1d.weight"][:, 0]
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    out = sum(weight[:, tap] * padded[tap : tap + len(x)] for tap in range(weight.shape[1]))
    return silu(out + c.get("conv1d.bias", 0))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def mamba2_written_down(mixer: nn.Module, c: dict[str, Tensor], packed: Tensor) -> Tensor:
    heads, groups, state_dim = len(c["A_log"]), mixer.groups, 16
    width = heads * 8
    z, dt = packed[:, :width], packed[:, -heads:]
    xBC = convolved(c, packed[:, width:-heads])
    x = xBC[:, :width].view(-1, heads, 8)
    B, C = (t.view(-1, groups, state_dim) for t in xBC[:, width:].chunk(2, dim=-1))
    dt = torch.log1p(torch.exp(dt + c["dt_bias"]))
    outs, state = [], torch.zeros(heads, 8, state_dim, dtype=torch.float64)
    for t in range(len(x)):
        y = []
        for h in range(heads):
            g = h // (heads // groups)
            state[h] = torch.exp(-dt[t, h] * torch.exp(c["A_log"][h])) * state[h] + dt[t, h] * x[t, h].outer(B[t, g])
            y.append(state[h] @ C[t, g] + c["D"].view(heads, -1)[h] * x[t, h])
        outs.append(torch.cat(y))
    y = torch.stack(outs) * silu(z)
    if "norm.weight" not in c:
        return y
    grouped = y.view(len(y), groups, -1)
    return (grouped / (grouped.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * c["norm.weight"]


def mamba1_written_down(mixer: nn.Module, c: dict[str, Tensor], packed: Tensor) -> Tensor:
    x, z = packed.chunk(2, dim=-1)
    x = convolved(c, x)
    rank = c["dt_proj.weight"].shape[1]
    dt, B, C = (x @ c["x_proj.weight"].T).split([rank, 16, 16], dim=-1)
    dt = torch.log1p(torch.exp(dt @ c["dt_proj.weight"].T + c["dt_proj.bias"]))
    outs, state = [], torch.zeros_like(c["A_log"])
    for t in range(len(x)):
        state = torch.exp(-dt[t, :, None] * torch.exp(c["A_log"])) * state + (dt[t] * x[t]).outer(B[t])
        outs.append(state @ C[t] + c["D"] * x[t])
    return torch.stack(outs) * silu(z)


@kinds
@torch.no_grad()
def test_it_is_the_mixer_written_down(kind: str) -> None:
    mixer, hidden = build(kind), stream(2, 70)
    wanted = torch.stack([written_down(mixer, row) for row in hidden])
    torch.testing.assert_close(mixer(hidden).double(), wanted, rtol=1e-5, atol=1e-5)


@kinds
def test_every_gradient_is_the_one_in_float64(kind: str) -> None:
    gradients = []
    for dtype in (torch.float32, torch.float64):
        mixer, hidden = build(kind).to(dtype), stream(2, 70).to(dtype).requires_grad_()
        mixer(hidden).square().sum().backward()
        gradients.append([hidden.grad, *(parameter.grad for parameter in mixer.parameters())])
    for low, high in zip(*gradients, strict=True):
        assert (low - high).abs().max() < 1e-4 * high.abs().max()


@kinds
@torch.no_grad()
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_chunks_through_the_cache_are_one_pass(kind: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 40))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=6)))
    mixer, hidden, cache = build(kind), stream(2, length), fresh_cache()
    ends = zip([0, *cuts], [*cuts, length], strict=True)
    out = torch.cat([mixer(hidden[:, start:end], past_key_values=cache) for start, end in ends], dim=1)
    torch.testing.assert_close(out, mixer(hidden), rtol=1e-5, atol=1e-5)


@kinds
@torch.no_grad()
def test_steps_after_a_prefill_are_one_pass(kind: str) -> None:
    mixer, hidden, cache = build(kind), stream(2, 30), fresh_cache()
    pieces = [hidden[:, :20], *hidden[:, 20:].split(1, dim=1)]
    out = torch.cat([mixer(piece, past_key_values=cache) for piece in pieces], dim=1)
    torch.testing.assert_close(out, mixer(hidden), rtol=1e-5, atol=1e-5)


@kinds
def test_gradients_through_the_cache_are_those_of_one_pass(kind: str) -> None:
    gradients = []
    for cuts in ([30], [11, 1, 18]):
        mixer, hidden, cache = build(kind), stream(2, 30).requires_grad_(), fresh_cache()
        out = torch.cat([mixer(piece, past_key_values=cache) for piece in hidden.split(cuts, dim=1)], dim=1)
        out.square().sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@kinds
@torch.no_grad()
def test_a_long_input_goes_through_in_spans(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, hidden = build(kind), stream(2, 50)
    documents = (torch.arange(50) >= 14).long().expand(2, -1)  # starts where a span does
    whole = [mixer(hidden), mixer(hidden, rows=Rows(seq_idx=documents))]
    monkeypatch.setattr(state_space, "CPU_SPAN", 7)
    torch.testing.assert_close(mixer(hidden), whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixer(hidden, rows=Rows(seq_idx=documents)), whole[1], rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("padding", [range(6), range(24, 30), [0, 5, 6, 29]], ids=["left", "right", "holes"])
@torch.no_grad()
def test_padding_changes_nothing_then_or_in_what_follows(
    kind: str, padding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, hidden, more = build(kind), stream(3, 30), stream(3, 4, seed=2)
    mask = torch.ones(3, 30, dtype=torch.long)
    mask[1, list(padding)] = 0
    monkeypatch.setattr(state_space, "CPU_SPAN", 8)
    cache = fresh_cache()
    rows = rows_of(mask, None, hidden, fresh=True)
    outs = [mixer(hidden, past_key_values=cache, rows=rows)]
    outs += [mixer(token, past_key_values=cache) for token in more.split(1, dim=1)]
    kept = mask.bool()
    for row in range(3):
        tokens = torch.cat((hidden[row, kept[row]], more[row]))
        got = torch.cat((outs[0][row, kept[row]], *(out[row] for out in outs[1:])))
        torch.testing.assert_close(got, mixer(tokens[None])[0], rtol=1e-5, atol=1e-5)


@kinds
@torch.no_grad()
def test_padding_that_is_a_span_by_itself_changes_nothing_in_what_follows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, hidden, token, mask = build(kind), stream(2, 9), stream(2, 1, seed=2), torch.ones(2, 9, dtype=torch.long)
    mask[1, 8] = 0
    monkeypatch.setattr(state_space, "CPU_SPAN", 8)
    cache = fresh_cache()
    mixer(hidden, past_key_values=cache, rows=rows_of(mask, None, hidden, fresh=True))
    alone = mixer(torch.cat((hidden[1:, :8], token[1:]), dim=1))[:, 8:]
    torch.testing.assert_close(mixer(token, past_key_values=cache)[1:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_inside_a_later_chunk_changes_nothing_either() -> None:
    mixer, first, second, cache = build("plain"), stream(2, 10), stream(2, 6, seed=2), fresh_cache()
    mixer(first, past_key_values=cache)
    mask = torch.ones(2, 16, dtype=torch.long)  # as generate gives it: of all tokens so far
    mask[0, 10:13] = 0
    out = mixer(second, past_key_values=cache, rows=rows_of(mask, None, second, fresh=False))
    alone = mixer(torch.cat((first[:1], second[:1, 3:]), dim=1))
    torch.testing.assert_close(out[:1, 3:], alone[:, 10:], rtol=1e-5, atol=1e-5)


@kinds
@torch.no_grad()
def test_packed_documents_are_each_by_itself(kind: str) -> None:
    mixer, hidden, lengths = build(kind), stream(1, 40), [11, 1, 28]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    out = mixer(hidden, rows=rows_of(None, positions, hidden, fresh=True))
    alone = torch.cat([mixer(document) for document in hidden.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)


def test_rows_are_looked_at_only_where_there_is_something_to_see() -> None:
    hidden = stream(2, 5)
    full, places = torch.ones(2, 5), torch.arange(5)[None]
    assert rows_of(None, None, hidden, fresh=True) == Rows()
    assert rows_of(full, places, hidden, fresh=True) == Rows()
    assert rows_of(None, 0 * places, hidden, fresh=False) == Rows()  # goes on from a cache: no new document
    assert rows_of(full, None, hidden[:, :1], fresh=False) == Rows()  # a step of decoding
    with pytest.raises(ValueError, match=r"padding, \(2, 5\)"):
        rows_of(full[:, None, None], None, hidden, fresh=True)


@torch.no_grad()
def test_a_compiled_graph_takes_padding_and_documents_without_looking() -> None:
    mixer, hidden, mask = build("plain"), stream(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4, 5, 6]]).expand(2, -1)

    def call(mask: Tensor | None, positions: Tensor | None) -> Tensor:
        return mixer(hidden, rows=rows_of(mask, positions, hidden, fresh=True))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(mask, None)[0], call(mask, None)[0])
    torch.testing.assert_close(compiled(mask, None)[1, 4:], call(mask, None)[1, 4:])
    torch.testing.assert_close(compiled(None, positions), call(None, positions))


@torch.no_grad()
def test_the_states_are_float32_in_a_bfloat16_model_and_beams_can_be_reordered() -> None:
    mixer, hidden, cache = build("plain").bfloat16(), stream(2, 20).bfloat16(), fresh_cache()
    mixer(hidden[:, :19], past_key_values=cache)
    conv_state, state = state_space.recall(cache, 0)
    assert state.shape == (2, 8, 8, 16) and conv_state.shape == (2, 128, 4)
    assert {state.dtype, conv_state.dtype} == {torch.float32}
    cache.reorder_cache(torch.tensor([1, 1]))
    out = mixer(hidden[1:, 19:].expand(2, -1, -1), past_key_values=cache)
    torch.testing.assert_close(out, mixer(hidden[1:])[:, 19:].expand(2, -1, -1))


@kinds
@torch.no_grad()
def test_offloaded_weights_give_the_same(kind: str, tmp_path: Path) -> None:
    hidden = stream(2, 20)
    wanted = build(kind)(hidden)
    on_disk = disk_offload(build(kind), str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(on_disk(hidden), wanted)
    in_memory = cpu_offload(build(kind), execution_device=torch.device("cpu"))
    assert torch.equal(in_memory(hidden), wanted)


@kinds
def test_it_starts_as_megatron_does(kind: str) -> None:
    torch.manual_seed(0)
    mixer = KINDS[kind][0](config(**KINDS[kind][1]), layer_idx=0)
    bias = mixer.dt_bias if hasattr(mixer, "dt_bias") else mixer.dt_proj.bias
    steps = F.softplus(bias)
    assert steps.min() > 9e-4 and steps.max() < 0.11
    assert mixer.A_log.min() >= 0 and mixer.A_log.max() <= torch.tensor(16.0).log() + 1e-6
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    assert mixer.conv1d.weight.abs().max() <= mixer.conv1d.weight.shape[-1] ** -0.5


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="mamba_num_heads 9 is not a multiple of mamba_num_groups 2"):
        MambaMixer(config(mamba_num_heads=9), layer_idx=0)
    with pytest.raises(ValueError, match=r"2 x hidden_size 32 .* mamba_head_dim 7; give mamba_num_heads"):
        MambaMixer(config(mamba_head_dim=7), layer_idx=0)


def transformers_mixer(which: str, groups: int) -> nn.Module:
    """A mixer of transformers of the same sizes as `config`."""
    if which == "Mamba2":
        sizes = {"hidden_size": HIDDEN, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": groups}
        return Mamba2Mixer(Mamba2Config(**sizes, layer_norm_epsilon=1e-5, chunk_size=16), 0)
    if which == "Bamba":
        sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": groups}
        return BambaMixer(BambaConfig(hidden_size=HIDDEN, **sizes, rms_norm_eps=1e-5, mamba_chunk_size=16), 0)
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": groups}
    # transformers clamps time steps of a prefill from below; Megatron does not
    options = {"layers_block_type": ["mamba"], "time_step_min": 1e-30, "layer_norm_epsilon": 1e-5}
    return NemotronHMamba2Mixer(NemotronHConfig(hidden_size=HIDDEN, **sizes, **options, use_bias=False), 0)


def same_as_transformers(ours: nn.Module, theirs: nn.Module) -> None:
    ours.in_proj_layernorm = nn.Identity()  # transformers' is in the layer
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not missing and not unexpected
    caches, hidden = (fresh_cache(), fresh_cache()), stream(2, 75)
    for piece in (hidden[:, :70], *hidden[:, 70:].split(1, dim=1)):
        wanted = theirs(piece, cache_params=caches[1])
        torch.testing.assert_close(ours(piece, past_key_values=caches[0]), wanted, rtol=1e-5, atol=1e-5)
    states = [state_space.recall(cache, 0) for cache in caches]
    for state, wanted in zip(*states, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("which", ["Mamba2", "Bamba", "NemotronH"])
@torch.no_grad()
def test_it_is_transformers_mixer_with_the_same_weights(which: str, groups: int) -> None:
    same_as_transformers(build("plain", mamba_num_groups=groups), transformers_mixer(which, groups).eval())


@torch.no_grad()
def test_mamba_1_is_transformers_mixer_with_the_same_weights() -> None:
    theirs = HFMamba1Mixer(MambaConfig(hidden_size=HIDDEN, state_size=16, expand=2, use_mambapy=False), 0)
    same_as_transformers(build("Mamba-1"), theirs.eval())
