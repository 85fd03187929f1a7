"""What is BERT's own between Megatron's arguments and the config.

No argument says that a run was BERT's: the script that started it does (`pretrain_bert.py`), and the names of the
weights do. `MARK` stands for that beside the arguments, in memory alone. The rules follow `model_provider` of
examples/bert/pretrain_bert.py in Megatron-LM, which passes few arguments on, and megatron/core/models/bert of 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import Problems

MARK = "is_bert_model"
LOCAL_SPEC = ["local"]  # what `--spec` is for Megatron's own layers; Transformer Engine's need none

# Arguments that change what layers there are; BERT's spec has nothing of them, or a mask that they do not fit.
REFUSED = {
    "num_experts": "experts",
    "multi_latent_attention": "multi-latent attention",
    "mtp_num_layers": "heads for further tokens",
    "window_size": "a window",
    "use_mup": "muP",
}
DISCOVERED = frozenset(("num_tokentypes",))  # read off the weights
# What the builder passes no argument on for, and the spec builds without asking: fields of the config.
BUILT: dict[str, Any] = {
    "use_rope_scaling": False,
    "rotary_base": 10000.0,
    "qk_layernorm": False,
    "qk_l2_norm": False,
}


def is_marked(args: Mapping[str, Any]) -> bool:
    return bool(args.get(MARK))


def fields(args: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that only BERT has, and those that its builder sets; none for other models.

    Raises:
        Refused: what Megatron's BERT cannot be.
    """
    if not is_marked(args):
        return {}
    problems, binary = Problems(), bool(args.get("bert_binary_head", True))
    for name, meaning in REFUSED.items():
        if args.get(name):
            problems.add(f"--{name.replace('_', '-')} {args[name]} is {meaning}, which is not built for BERT", "args")
    problems.raise_if_any()
    return {"add_binary_head": binary, "num_tokentypes": 2 if binary else 0, **BUILT}


def arguments(config: Any) -> dict[str, Any]:
    """The arguments, and the mark, that `fields` reads BERT's own fields from."""
    return {MARK: True, "bert_binary_head": config.add_binary_head}


def notes(args: Mapping[str, Any]) -> list[str]:
    """What is worth saying about how BERT's arguments were read."""
    if not is_marked(args):
        return []
    ignored = [name for name in ("qk_layernorm", "qk_l2_norm", "use_rope_scaling") if args.get(name)]
    return [f"{name} has no effect: Megatron's BERT is built without" for name in ignored]


def unsaid(config: Any) -> list[str]:
    """What the arguments do not say, and what Megatron's script builds whatever they say."""
    said = ["no argument says that it is a BERT: examples/bert/pretrain_bert.py loads it"]
    if config.position_embedding_type != "learned_absolute":
        kind = config.position_embedding_type
        said.append(f"that script builds learned positions: give its BertModel position_embedding_type={kind!r}")
    if config.num_tokentypes != (2 if config.add_binary_head else 0):
        said.append(f"that script builds other token types: give its BertModel num_tokentypes={config.num_tokentypes}")
    return said
