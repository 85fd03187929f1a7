"""Makes `megahf/samples/globe`: a hybrid of Mamba, attention, MLPs and experts, for `megahf demo --hybrid`.

`python conversion/samples/make_hybrid_sample.py TEXT FOLDER` takes about a quarter of an hour on one core. TEXT was a
megabyte of Shakespeare's plays, which are in the public domain: the collection known as tinyshakespeare
(`data/tinyshakespeare/input.txt` of github.com/karpathy/char-rnn). megahf's own class learns it, a byte a token; real
megatron-core takes the weights into its MambaModel, saves them at TP2 and says what the record holds. It runs on the
CPU as `megahf.judge` arranges it.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel, PreTrainedTokenizerFast

from megahf.architectures import load_class
from megahf.arguments import config
from megahf.demo import SAMPLES
from megahf.judge.bench import Bench
from megahf.judge.load import SHARED
from megahf.load import canonical_state

END = "<|endoftext|>"
PROMPT, HOW = "ROMEO:\n", SAMPLES["hybrid"].first

ARGUMENTS: dict[str, Any] = {
    "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"],
    "is_hybrid_model": True,
    "hybrid_override_pattern": "MEM*-MEM*-",
    "num_layers": 10,
    "hidden_size": 128,
    "ffn_hidden_size": 256,
    "mamba_head_dim": 32,
    "mamba_state_dim": 32,
    "mamba_num_groups": 2,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 32,
    "num_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 128,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    "vocab_size": 257,
    "make_vocab_size_divisible_by": 16,
    "padded_vocab_size": 288,  # to a multiple of 16 x TP2
    "seq_length": 256,
    "max_position_embeddings": 1024,
    "position_embedding_type": "none",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "transformer_impl": "transformer_engine",
    "bf16": True,
}
LAYOUT = {"tensor_model_parallel_size": 2}
FORMAT = "torch_dist"

BATCH, LENGTH, STEPS, WARM_UP, LEARNING_RATE = 8, 193, 600, 40, 4e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, help="what to learn")
    parser.add_argument("folder", type=Path, help="a new folder, relative: its files name it")
    given = parser.parse_args()
    tokenizer = byte_tokenizer()
    model = train(torch.tensor(tokenizer(given.text.read_text(encoding="utf-8"))["input_ids"]))
    publish(model, tokenizer, given.folder)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and one for padding and the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def train(text: Tensor) -> PreTrainedModel:
    """A model that has seen as many pieces of the tokens `text` `[n]` as fit into `STEPS` batches."""
    torch.manual_seed(0)
    settings = config(ARGUMENTS, ARGUMENTS["vocab_size"])
    model = load_class(settings)(load_class(settings, "AutoConfig")(**vars(settings))).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    started = time.monotonic()
    for step in range(STEPS):
        pieces = torch.randint(len(text) - LENGTH + 1, (BATCH, 1)) + torch.arange(LENGTH)
        loss = model(text[pieces], labels=text[pieces], use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    for parameter in model.parameters():  # what is recorded is said with the weights that are saved
        parameter.data = parameter.data.bfloat16().float()
    return model.eval()


def publish(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Megatron saves the weights to `folder`, opens what it saved, and says what the record beside it holds."""
    with tempfile.TemporaryDirectory() as place, Bench(size=2) as bench:
        torch.save(megatron_state(model), Path(place) / "weights.pt")
        bench.save_weights(ARGUMENTS | LAYOUT, Path(place) / "weights.pt", folder, FORMAT)
        (folder / "reference.pt").unlink()  # the record is smaller and of words
        tokenizer.save_pretrained(folder / "tokenizer")
        prompt = tokenizer(PROMPT, return_tensors="pt")
        said = model.generate(**prompt, **HOW)  # [1, s]
        saved = next(folder.glob("iter_*"))
        logits = bench.logits(ARGUMENTS | LAYOUT, saved, FORMAT, said.numpy())  # [1, s, padded vocabulary]
    print(tokenizer.decode(said[0]))
    record(said[0], prompt["input_ids"].shape[1], torch.from_numpy(logits[0]), folder / "spoken.safetensors")


def megatron_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights as Megatron's local layers name them: norms of their own, experts one by one, padded vocabulary."""
    state = {}
    for name, value in canonical_state(model).items():
        for theirs, common in SHARED:
            name = name.replace(theirs, common)
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            value = torch.nn.functional.pad(value, (0, 0, 0, ARGUMENTS["padded_vocab_size"] - len(value)))
        if ".experts." in name:
            for expert, one in enumerate(value):
                state[name.replace(".experts.", f".experts.local_experts.{expert}.")] = one.clone()
        else:
            state[name] = value
    return state


def record(said: Tensor, prompt: int, logits: Tensor, file: Path) -> None:
    """What Megatron's MambaModel writes after the prompt, and the fp32 logits behind it.

    Args:
        said: the prompt and what our class went on with, `[s]`.
        prompt: how many of the tokens are the prompt's.
        logits: Megatron's for them, `[s, padded vocabulary]`.
    """
    chosen = logits[prompt - 1 : -1, : ARGUMENTS["vocab_size"]].contiguous()  # [answer, v]: each chose the next token
    banned, leads = NoRepeatNGramLogitsProcessor(HOW["no_repeat_ngram_size"]), []
    for place, row in enumerate(chosen, start=prompt):
        best = banned(said[None, :place], row[None].clone())[0].topk(2)
        leads.append((best.values[0] - best.values[1]).item())
        if best.indices[0] != said[place]:
            raise ArithmeticError(f"at {place} Megatron goes on with {best.indices[0]}, our class with {said[place]}")
    print(f"each token is ahead of the second best by {min(leads):.4f} or more")
    save_file({"input_ids": said, "logits": chosen}, file, {"question": PROMPT, "prompt": str(prompt)})
    file.chmod(0o644)


if __name__ == "__main__":
    main()
