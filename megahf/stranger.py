"""A process that knows neither megahf nor Megatron: it loads a folder, answers, and writes what it computed.

Run as a file of its own, `python -I stranger.py FOLDER OUT NEW_TOKENS QUESTION...`: nothing is imported from beside it.
"""

from __future__ import annotations

import importlib
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


def main(folder: str, out: str, new_tokens: str, *questions: str) -> None:
    """Answers `questions` greedily, in fp32, on the terminal, and writes what was said to the first to the file `out`.

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
    said = [answer(model, tokenizer, question, int(new_tokens)) for question in questions]
    input_ids, prompt = said[0]
    with torch.inference_mode():
        logits = model(input_ids).logits[0, prompt - 1 : -1]
    save_file({"input_ids": input_ids[0], "logits": logits.contiguous()}, out, {"prompt": str(prompt)})


def answer(model: Any, tokenizer: Any, question: str, new_tokens: int) -> tuple[Any, int]:
    """Streams the answer; gives the tokens `[1, s]` of the question and the answer, and how many are the question's."""
    from transformers import TextStreamer

    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    print(f"    > {question}\n    ", end="", flush=True)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, streamer=streamer)
    return output, inputs["input_ids"].shape[1]


if __name__ == "__main__":
    hide()
    main(*sys.argv[1:])
