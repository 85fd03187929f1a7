"""GPT-NeoX, whose attention and MLP follow one another, as in RedPajama-INCITE: Megatron's own packing of heads.

Pythia and GPT-NeoX-20B, where both read the same hidden states (`use_parallel_residual`), are other functions.
"""

from __future__ import annotations

from .activations import activation
from .family import GAMMA, ONE, Family, Field, Line, only, pair
from .gpt2 import LAYER_NORM
from .llama import AT, MLP
from .rope import rope

THEIRS = "gpt_neox.layers.{l}."
LINES = (
    Line("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",), ONE),
    Line("output_layer.weight", ("embed_out.weight",), ONE),
    *pair("decoder.final_layernorm.", "gpt_neox.final_layer_norm.", GAMMA, ONE),
    *pair(f"{AT}linear_qkv.layer_norm_", f"{THEIRS}input_layernorm.", GAMMA, ONE),
    *pair(f"{AT}linear_qkv.", f"{THEIRS}attention.query_key_value.", ONE, ONE),  # for each head: q | k | v
    *pair(f"{AT}linear_proj.", f"{THEIRS}attention.dense.", ONE, ONE),
    *pair(f"{MLP}linear_fc1.layer_norm_", f"{THEIRS}post_attention_layernorm.", GAMMA, ONE),
    *pair(f"{MLP}linear_fc1.", f"{THEIRS}mlp.dense_h_to_4h.", ONE, ONE),
    *pair(f"{MLP}linear_fc2.", f"{THEIRS}mlp.dense_4h_to_h.", ONE, ONE),
)

GPT_NEOX = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("num_hidden_layers", "num_layers"),
        Field("hidden_size", "hidden_size"),
        Field("num_attention_heads", "num_attention_heads"),
        Field("intermediate_size", "ffn_hidden_size"),
        Field("max_position_embeddings", "max_position_embeddings", 2048),
        Field("layer_norm_eps", "layernorm_epsilon", 1e-5),
        Field("tie_word_embeddings", "tie_word_embeddings", False),
        activation("hidden_act", "gelu"),
    ),
    lines=LINES,
    settings=(
        rope(part=0.25, names=("rotary_emb_base", "rotary_pct")),
        only("use_parallel_residual", False, True),
    ),
    fixed=LAYER_NORM,
    constants={"attention_bias": (True,)},
    harmless=frozenset(("classifier_dropout",)),
    ignored={
        r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias": "the causal mask",
        r"gpt_neox\.layers\.\d+\.attention\.rotary_emb\.inv_freq": "frequencies, computed anew",
    },
    base="gpt_neox.",
)
