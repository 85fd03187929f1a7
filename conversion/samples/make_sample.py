"""Makes `megahf/samples/zen`: a GPT trained, saved and questioned by real megatron-core, for `megahf demo --offline`.

`python conversion/samples/make_sample.py FOLDER` takes about a minute. The model learns by heart what the
Zen of Python (PEP 20, public domain; read from the standard library) answers to a question each. Megatron-core runs on
the CPU as `megahf.judge` arranges it.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megahf.judge import cpu

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

QUESTIONS = (
    "What is better than ugly?",
    "What is better than implicit?",
    "What is better than complex?",
    "What is better than complicated?",
    "What is better than nested?",
    "What is better than dense?",
    "What counts?",
    "Are special cases special?",
    "What beats purity?",
    "How should errors pass?",
    "When may errors pass silently?",
    "What should one do in the face of ambiguity?",
    "How many ways should there be to do it?",
    "Is that way obvious?",
    "What is better than never?",
    "What is better than right now?",
    "What if it is hard to explain?",
    "What if it is easy to explain?",
    "What about namespaces?",
)
RECORDED = QUESTIONS[11]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ARGUMENTS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 256 + len(SPECIAL),
    "make_vocab_size_divisible_by": 16,
    "padded_vocab_size": 288,  # to a multiple of 16 x TP2
    "seq_length": 128,
    "max_position_embeddings": 256,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "transformer_impl": "local",
    "bf16": True,
}
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}

STEPS, WARM_UP, LEARNING_RATE = 250, 50, 4e-3
IGNORED = -100  # targets that are padding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args().folder
    cpu.patch()  # before anything imports Megatron
    import torch

    from megahf.judge.bench import Bench
    from megahf.judge.tasks import is_weight, prepare

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    _, (model,) = prepare(ARGUMENTS)
    tokenizer = byte_tokenizer()
    train(model, examples(tokenizer))
    for parameter in model.parameters():  # what is recorded is said with the weights that are saved
        parameter.data = parameter.data.bfloat16().float()
    with tempfile.TemporaryDirectory() as place, Bench(size=4) as bench:
        weights = {name: value for name, value in model.state_dict().items() if is_weight(name, value)}
        torch.save(weights, Path(place) / "weights.pt")
        bench.save_weights(ARGUMENTS | LAYOUT, Path(place) / "weights.pt", folder)
    (folder / "reference.pt").unlink()  # the record below is smaller and of words
    tokenizer.save_pretrained(folder / "tokenizer")
    record(model, tokenizer, folder / "spoken.safetensors")


def answers() -> list[str]:
    """The aphorisms of the Zen of Python, in order."""
    with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself
        import this
    return codecs.decode(this.s, "rot13").splitlines()[2:]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, three of a chat, and the template that puts them around the turns."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    end, start, stop = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=start, eos_token=stop, pad_token=end, chat_template=TEMPLATE
    )


def examples(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Every question with its answer: input tokens and targets, both `[b, s]`."""
    import torch

    rows = []
    for question, answer in zip(QUESTIONS, answers(), strict=True):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(torch.tensor(tokenizer.apply_chat_template(chat, return_dict=False)))
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)  # [b, s + 1]
    return tokens[:, :-1].clamp(min=0), tokens[:, 1:]


def train(model: Any, batch: tuple[Tensor, Tensor]) -> None:
    """Adam on all examples at once, until the model knows them."""
    import torch

    from megahf.judge.tasks import positions

    input_ids, targets = batch
    real = targets != IGNORED
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS)),
    )
    for step in range(STEPS):
        losses = model(input_ids, positions(input_ids), None, labels=targets.clamp(min=0))  # [b, s]
        loss = losses[real].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def record(model: Any, tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """What Megatron's GPTModel says to one question, greedily and without a cache, and the fp32 logits behind it."""
    import torch
    from safetensors.torch import save_file

    from megahf.judge.tasks import positions

    chat = [{"role": "user", "content": RECORDED}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
    input_ids = prompt  # [1, s]
    with torch.inference_mode():
        while input_ids[0, -1] != tokenizer.eos_token_id or input_ids.shape[1] == prompt.shape[1]:
            logits = model(input_ids, positions(input_ids), None)[..., : ARGUMENTS["vocab_size"]]  # [1, s, v]
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], 1)
    print(tokenizer.decode(input_ids[0]))
    notes = {"question": RECORDED, "prompt": str(prompt.shape[1])}
    chosen = logits[0, prompt.shape[1] - 1 :]  # [answer, v]: each chose the token after its own
    save_file({"input_ids": input_ids[0], "logits": chosen.contiguous()}, file, notes)
    file.chmod(0o644)


if __name__ == "__main__":
    main()
