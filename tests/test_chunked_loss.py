"""Promise: the loss in chunks is the plain loss, with its gradients, and no tensor holds the logits of all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention_masks import left
from tiny import LLAMA, MIXTURES, VARIANTS, tiny, tiny_hybrid, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from megahf.models.chunked_loss import chunked_loss

MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": LLAMA,
    "scaled logits": {**LLAMA, "mup_output_mult": 0.3},
    "further tokens": VARIANTS["further tokens"],
    "experts": MIXTURES["latents and experts"],
}
LABELS: dict[str, dict[str, Any]] = {
    "all": {},
    "a share of a step": {"num_items_in_batch": torch.tensor(50)},
    "shifted": {"shift_labels": tokens(2, 21).roll(-1, 1)},
}


def step(model: nn.Module, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    """The output, and every parameter's gradient of its loss."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Every gradient to a millionth of its largest number."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(got[name], gradient, atol=tolerance * max(scale, 1.0), rtol=0, msg=name)


def masked() -> dict[str, Tensor]:
    """Two rows, one padded; a third of the labels does not count."""
    ids, mask = tokens(2, 21), left([0, 6], 21)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | (ids % 3 == 0), -100)}


@pytest.mark.parametrize("chunk", [1, 8, 1024])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_the_plain_ones(model: str, labels: str, chunk: int) -> None:
    made = tiny(**MODELS[model]).train()
    expected, wanted = step(made, **masked(), **LABELS[labels])
    made.config.loss_chunk_size = chunk
    output, gradients = step(made, **masked(), **LABELS[labels])
    assert output.logits is None and expected.logits is not None
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    close(gradients, wanted)


def test_a_hybrid_with_further_heads_too() -> None:
    made = tiny_hybrid("attention", mtp_num_layers=1, mtp_layer_pattern="*").train()
    expected, wanted = step(made, **masked())
    output, gradients = step(made, **masked(), skip_logits=True)
    assert output.logits is None and torch.allclose(output.mtp_loss, expected.mtp_loss, atol=1e-6)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    close(gradients, wanted)


class Wrapped(nn.Module):
    """A matrix that is more than its weight, as an adapter makes it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.more = inner, nn.Linear(32, 61)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + 0.1 * self.more(hidden)


def test_a_matrix_that_is_more_than_its_weight_is_called() -> None:
    made = tiny(**LLAMA).train()
    torch.manual_seed(0)
    made.output_layer = Wrapped(made.output_layer)
    expected, wanted = step(made, **masked())
    made.config.loss_chunk_size = 8
    output, gradients = step(made, **masked())
    assert "output_layer.more.weight" in gradients
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-6, rtol=1e-6)
    close(gradients, wanted)


def test_bfloat16_sums_chunks_in_float32() -> None:
    """Many chunks' gradients of the matrix, each tiny beside their sum, keep what bfloat16 would lose."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(1, 2048, 16), torch.randint(7, (1, 2048))
    head = nn.Linear(16, 7, bias=False)
    exact = torch.autograd.grad(chunked_loss(head, hidden, labels, chunk=2048), head.weight)[0]
    half = nn.Linear(16, 7, bias=False, dtype=torch.bfloat16)
    half.load_state_dict(head.state_dict())
    got = torch.autograd.grad(chunked_loss(half, hidden.bfloat16(), labels, chunk=4), half.weight)[0]
    assert (got - exact).abs().max() < 0.01 * exact.abs().max()


def test_autocast_is_obeyed() -> None:
    made = tiny(**LLAMA).train()
    with torch.autocast("cpu", torch.bfloat16):
        expected, wanted = step(made, **masked())
        output, gradients = step(made, **masked(), skip_logits=True)
    torch.testing.assert_close(output.loss, expected.loss, atol=2e-3, rtol=0)
    close(gradients, wanted, 2e-2)


def test_the_mean_over_no_token_is_what_it_is_without_chunks() -> None:
    made, ids = tiny(**LLAMA).train(), tokens(1, 6)
    nothing = torch.full_like(ids, -100)
    assert made(ids, labels=nothing).loss.isnan() and made(ids, labels=nothing, skip_logits=True).loss.isnan()
    assert made(ids, labels=nothing, num_items_in_batch=4, skip_logits=True).loss == 0


class Widest(TorchDispatchMode):
    """Elements of the largest tensor that any op returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("wrapped", [False, True])
def test_no_tensor_holds_all_logits(wrapped: bool) -> None:
    words, length = 4096, 256
    made, ids = tiny(**{**LLAMA, "vocab_size": words, "max_position_embeddings": length}).train(), tokens(1, length)
    if wrapped:
        made.output_layer.register_forward_hook(lambda module, args, out: None)
    made.config.loss_chunk_size = 32
    with Widest() as chunked:
        step(made, input_ids=ids, labels=ids)
    with Widest() as plain:
        step(made, input_ids=ids, labels=ids, skip_logits=False)
    assert plain.largest == length * words, "the watch sees them where there are some"
    assert chunked.largest == 32 * words, "of a chunk, and as large here as the matrix"


def test_it_compiles_without_a_break() -> None:
    made, inputs = tiny(**LLAMA).train(), masked()
    made.config.loss_chunk_size = 16
    expected, wanted = step(made, **inputs)
    made.zero_grad()
    loss = torch.compile(made, fullgraph=True, backend="aot_eager")(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, expected.loss)
    close({name: p.grad for name, p in made.named_parameters() if p.grad is not None}, wanted, 1e-5)


def test_evaluation_returns_logits_unless_asked_not_to() -> None:
    made, ids = tiny(**LLAMA, loss_chunk_size=8), tokens(1, 9)
    assert made(ids, labels=ids).logits.shape == (1, 9, 61)
    assert made(ids, labels=ids, skip_logits=True).logits is None
    assert made.train()(ids).logits.shape == (1, 9, 61), "no labels, no loss: the logits are what is asked for"


def test_what_cannot_be_is_refused_in_words() -> None:
    made, ids = tiny(**LLAMA), tokens(1, 9)
    with pytest.raises(ValueError, match="give labels"):
        made(ids, skip_logits=True)
    made.loss_function = lambda logits, labels, **kwargs: logits.sum()
    with pytest.raises(ValueError, match="loss_function is another, which needs all logits"):
        made(ids, labels=ids, skip_logits=True)
    with pytest.raises(Exception, match="loss_chunk_size is 0: at least 1"):
        tiny(loss_chunk_size=0)


def test_trainer_follows_the_plain_curve(tmp_path: Any) -> None:
    rows = [{"input_ids": row, "labels": row} for row in tokens(16, 12)]
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    curves = []
    for chunk in (None, 5):
        arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, **options)
        trainer = Trainer(tiny(**LLAMA, loss_chunk_size=chunk), arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.evaluate()["eval_loss"] < curves[-1][0]
    torch.testing.assert_close(curves[0], curves[1], atol=1e-4, rtol=0)
