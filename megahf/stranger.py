"""A process that knows neither megahf nor Megatron: it loads a folder, answers, and writes what it computed.

Run as a file of its own, `python -I stranger.py FOLDER OUT FIRST OTHERS QUESTION...`: nothing is imported from
beside it.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

HIDDEN = ("megahf", "megatron", "transformer_engine")


def hide() -> None:
    """Makes Python say of these packages, installed or not, that they are not there; and makes sure of it."""
    absent: Any = dict.fromkeys(HIDDEN)  # None: what `import` takes for "looked for and not found"
    sys.modules.update(absent)
    for name in HIDDEN:
        try:
            importlib.import_module(f"{name}.core")
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{name} can still be imported")


def main(folder: str, out: str, first: str, others: str, question: str, *further: str) -> None:
    """Answers questions in fp32, on the terminal, and writes what was said to the first to the file `out`.

    `first` and `others` are options of `generate` as JSON: for the first question, and for those after it.

    The file (safetensors) holds `input_ids` [s], question and answer, and the `logits` [answer, vocabulary] that chose
    the answer's tokens; its metadata says how many of the tokens are the `prompt`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    torch.manual_seed(0)
    input_ids, prompt = answer(model, tokenizer, question, json.loads(first))
    for other in further:
        answer(model, tokenizer, other, json.loads(others))
    with torch.inference_mode():
        logits = model(input_ids).logits[0, prompt - 1 : -1]
    save_file({"input_ids": input_ids[0], "logits": logits.contiguous()}, out, {"prompt": str(prompt)})


def answer(model: Any, tokenizer: Any, question: str, how: dict[str, Any]) -> tuple[Any, int]:
    """Streams the answer, or what comes after `question` in a model that knows no chat.

    Gives the tokens `[1, s]` of the question and the answer, and how many are the question's.
    """
    from transformers import TextStreamer

    class Indented(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(text.replace("\n", "\n    "), stream_end)

    if tokenizer.chat_template:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        inputs = tokenizer(question, return_tensors="pt")
    print(f"    > {question.rstrip()}\n    ", end="", flush=True)
    streamer = Indented(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, **how, streamer=streamer)
    return output, inputs["input_ids"].shape[1]


if __name__ == "__main__":
    hide()
    main(*sys.argv[1:])
