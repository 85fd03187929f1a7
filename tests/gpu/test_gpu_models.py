"""Promise: on a GPU whole models with our kernels are the models without them, and a checkpoint arrives bit for bit.

So do what fused kernels of torch's are used for there: attention over blocks, and the loss in chunks beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_block_attention as attention
import test_chunked_loss as chunked
import torch
from placed import moved, quick
from recurrence import error
from small_experts import Run
from small_hybrid import write_hybrid
from tiny import LLAMA, MIXTURES, tiny, tiny_hybrid, tokens
from torch import Tensor
from transformers import PreTrainedModel

import megahf
from megahf.models import block_attention
from megahf.models.block_attention import attend_blocks, causal_blocks
from megahf.models.kernel_choice import only

pytestmark = pytest.mark.gpu

MODELS: dict[str, Any] = {
    "hybrid": lambda: tiny_hybrid("attention"),
    "hybrid with experts": lambda: tiny_hybrid("everything"),
    "Mamba-1": lambda: tiny_hybrid("mamba 1"),
    "experts": lambda: tiny(**MIXTURES["experts"]),
    "experts, not gated": lambda: tiny(**MIXTURES["experts on latents"]),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def step(model: PreTrainedModel, ids: Tensor, mask: Tensor, *kernels: str) -> dict[str, Tensor]:
    """Logits of a forward, of a prefill and two steps after it, and every gradient of a training step."""
    with only(*kernels):
        found = {"logits": model(ids, attention_mask=mask, use_cache=False).logits}
        with torch.no_grad():
            out = model(ids[:, :-2], use_cache=True)
            for place in (-2, -1):
                out = model(ids[:, place:][:, :1], past_key_values=out.past_key_values, use_cache=True)
                found[f"decoded {place}"] = out.logits
        named = dict(model.named_parameters())
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return found | {name: t for name, t in zip(named, gradients, strict=True) if t is not None}


# Rounded otherwise, a token may choose other experts: in bfloat16 there is nothing to compare then.
PAIRS = [*((name, torch.float32) for name in MODELS), ("hybrid", torch.bfloat16), ("Mamba-1", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_a_model_is_the_same_with_kernels_and_without(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model = MODELS[name]().to(device, dtype)
    length = 70 if device.type == "cuda" else 12
    ids, mask = tokens(2, length).to(device), torch.ones(2, length, dtype=torch.long, device=device)
    mask[1, :5] = 0
    wanted = step(model, ids, mask)
    found = step(model, ids, mask, *quick(device))
    assert found.keys() == wanted.keys()
    errors = {key: error(found[key], wanted[key].double()) for key in wanted}
    assert max(errors.values()) < TOLERANCE[dtype], max(errors.items(), key=lambda pair: pair[1])


@pytest.mark.parametrize("name", ["hybrid", "Mamba-1"])
def test_a_model_under_autocast_trains_as_without_kernels(name: str, device: torch.device) -> None:
    model, ids = MODELS[name]().to(device).train(), tokens(2, 12).to(device)
    results = []
    for kernels in ((), quick(device)):
        with only(*kernels), torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        results.append([loss, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)])
    for want, got in zip(*results, strict=True):
        assert (got is None) == (want is None)
        assert got is None or error(got, want.double()) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_checkpoint_arrives_on_the_gpu_bit_for_bit(
    dtype: torch.dtype | None, device: torch.device, tmp_path: Path
) -> None:
    write_hybrid(tmp_path / "ckpt", "M*-ME-", Run(tensor=2, expert=2), num_experts=4, moe_router_topk=2)
    here = megahf.from_megatron(tmp_path / "ckpt", dtype=dtype)
    there = megahf.from_megatron(tmp_path / "ckpt", dtype=dtype, device_map=device)
    wanted, found = here.state_dict(), there.state_dict()
    assert found.keys() == wanted.keys() and {t.device.type for t in found.values()} == {device.type}
    assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)
    with only(), torch.no_grad():
        logits = there(tokens(1, 9).to(device)).logits
    assert logits.device.type == device.type and logits.isfinite().all()


ATTENDED = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", ATTENDED)
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("width", [5, 6, 14])
@pytest.mark.parametrize(
    ("length", "past", "window"), [(20, 13, 7), (1, 40, None), (300, 0, None), (300, 213, 128), (513, 600, 512)]
)
def test_attention_over_blocks_is_one_softmax(
    length: int, past: int, window: int | None, width: int, sinks: bool, dtype: torch.dtype, device: torch.device
) -> None:
    given = moved(attention.inputs(length, past + length, dtype, width=width, sinks=sinks), device)
    given = [x.requires_grad_() for x in given]
    exact = [x.detach().double().requires_grad_() for x in given]
    blocks = causal_blocks(0, length, past, window)
    if device.type == "cuda":
        fused = block_attention.kernel_for(given[0]) is block_attention.CUDA
        assert fused == (dtype != torch.float32)
    out = attend_blocks(*given[:3], blocks, attention.SCALING, given[3] if sinks else None)
    seen = attention.shown(blocks, length, past + length).bool().to(device)
    wanted = attention.written(*exact[:3], seen, exact[3] if sinks else None)
    upstream = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(dtype)
    pairs = [(out, wanted)]
    gradients = torch.autograd.grad(out, given, upstream), torch.autograd.grad(wanted, exact, upstream.double())
    pairs += zip(*gradients, strict=True)
    errors = [error(*pair) for pair in pairs]
    assert max(errors) < ATTENDED[dtype], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", chunked.MODELS)
def test_the_loss_in_chunks_is_the_plain_one(model: str, dtype: torch.dtype, device: torch.device) -> None:
    made, inputs = tiny(**chunked.MODELS[model]).to(device, dtype).train(), moved(chunked.masked(), device)
    expected, wanted = chunked.step(made, **inputs)
    made.config.loss_chunk_size = 8
    output, found = chunked.step(made, **inputs)
    assert output.logits is None and found.keys() == wanted.keys()
    assert error(output.loss, expected.loss.double()) < TOLERANCE[dtype]
    errors = {name: error(found[name], wanted[name].double()) for name in wanted}
    assert max(errors.values()) < TOLERANCE[dtype], max(errors.items(), key=lambda pair: pair[1])


@torch.no_grad()
def test_a_window_of_attention_in_a_model(device: torch.device) -> None:
    """Decoded in chunks with a cache, as over the whole."""
    model, ids = tiny(**LLAMA, window_size=[5, 0]).to(device), tokens(1, 60).to(device)
    cache, parts = None, []
    for piece in ids.split(20, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache, parts = out.past_key_values, [*parts, out.logits]
    assert error(torch.cat(parts, dim=1), model(ids).logits.double()) < TOLERANCE[torch.float32]
