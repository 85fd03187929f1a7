"""Fills the tables of the pages beside it from the rows of `megahf/weights.py`: `python model_cards/pages.py`.

What stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is written here, all else by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megahf.architectures import AUTO_MAPS
from megahf.cuts import WHOLE
from megahf.rows import LANGUAGE, Row
from megahf.weights import LLAVA, TABLE

HERE = Path(__file__).parent
# Model type -> the condition that holds for all of its models.
KINDS = {"mcore_gpt": "GPT", "mcore_hybrid": "hybrid", "mcore_bert": "BERT", "mcore_llava": "LLaVA"}
# The stacks they can have, and conditions that hold for none of them.
STACKS = {"GPT": {"decoder", "mtp"}, "hybrid": {"decoder", "mtp", "heads"}, "BERT": {"encoder"}}
BERTS = {"BERT", "binary head", "token types"}
ELSEWHERE = {
    "GPT": {"hybrid", "mixer", "mixer 1", *BERTS},
    "hybrid": {"GPT", *BERTS},
    "BERT": {
        "GPT", "hybrid", "latents", "qk_layernorm", "experts", "router bias", "expert bias", "shared experts",
        "shared gate", "latent experts",
    },
}  # fmt: skip

# Where the weights are; those of one place can be the rows of another once more.
LAYERS = "decoder.layers.{l}."
PLACES = (
    "mtp.layers.{k}.mtp_model_layer.layers.{l}.", "mtp.layers.{l}.transformer_layer.", "mtp.layers.{l}.", LAYERS,
    "encoder.layers.{l}.", "vision_model.decoder.layers.{l}.", "vision_model.", "vision_projection.",
)  # fmt: skip
AGAIN = {
    "mtp.layers.{l}.transformer_layer.": "as the last layer of the decoder has them",
    "mtp.layers.{k}.mtp_model_layer.layers.{l}.": "by the head's own pattern, `mtp_layer_pattern`",
}

# The letters of the shapes, in fields of the config and the `mixer`'s width, and the blocks that make one up.
LETTERS: dict[str, tuple[str, str]] = {
    "V": ("vocab_size", ""),
    "S": ("max_position_embeddings", ""),
    "h": ("hidden_size", ""),
    "2h": ("2 * hidden_size", ""),
    "2": ("2", ""),
    "T": ("num_tokentypes", ""),
    "d": ("kv_channels", ""),
    "n": ("num_attention_heads", ""),
    "nd": ("num_attention_heads * kv_channels", ""),
    "qkv": (
        "(num_attention_heads * (1 + attention_output_gate) + 2 * num_query_groups) * kv_channels",
        "for each query group its queries, their gates, its key, its value",
    ),
    "f": ("ffn_hidden_size", ""),
    "fc1": ("ffn_hidden_size * (1 + gated_linear_unit)", "gate, up"),
    "E": ("num_experts", ""),
    "fe": ("moe_ffn_hidden_size", ""),
    "fe1": ("moe_ffn_hidden_size * (1 + gated_linear_unit)", "gate, up"),
    "fs": ("moe_shared_expert_intermediate_size", ""),
    "fs1": ("moe_shared_expert_intermediate_size * (1 + gated_linear_unit)", "gate, up"),
    "lat": ("moe_latent_size", ""),
    "he": ("moe_latent_size or hidden_size", ""),
    "lq": ("q_lora_rank", ""),
    "lkv": ("kv_lora_rank", ""),
    "lkvr": ("kv_lora_rank + qk_pos_emb_head_dim", "latent, rotating key"),
    "nq": ("num_attention_heads * (qk_head_dim + qk_pos_emb_head_dim)", "for each head: still, rotating"),
    "nkv": ("num_attention_heads * (qk_head_dim + v_head_dim)", "for each head: key, value"),
    "nv": ("num_attention_heads * v_head_dim", ""),
    "1": ("1", ""),
    "mi": ("mixer", ""),
    "mz": (
        "2 * mixer + (2 * mamba_num_groups * mamba_state_dim + mamba_num_heads) * (mamba_version - 1)",
        "z, x, B, C, dt; of Mamba-1 x, z",
    ),
    "mc": ("mixer + 2 * mamba_num_groups * mamba_state_dim * (mamba_version - 1)", "x, B, C; of Mamba-1 x"),
    "mk": ("mamba_d_conv", ""),
    "mh": ("mamba_num_heads", ""),
    "mD": ("mixer if mamba_d_has_hdim else mamba_num_heads", ""),
    "mN": ("mamba_state_dim", ""),
    "mr": ("mamba_dt_rank", ""),
    "mrBC": ("mamba_dt_rank + 2 * mamba_state_dim", "dt, B, C"),
    # of the vision_config's
    "3": ("3", ""),
    "p": ("patch_dim", ""),
    "3pp": ("3 * patch_dim**2", "for each colour the rows of a patch"),
    "c": ("class_token_len", ""),
    "c+n": ("class_token_len + (img_h // patch_dim) * (img_w // patch_dim)", ""),
    "N": ("(max_img_h // patch_dim) * (max_img_w // patch_dim)", ""),
    "3nd": ("3 * num_attention_heads * kv_channels", "for each head its query, its key, its value"),
    # of a LLaVA's own
    "hi": ("vision_config.hidden_size * (4 if pixel_shuffle else 1)", ""),
    "ht": ("text_config.hidden_size", ""),
    "fp": ("projection_ffn_hidden_size", ""),
    "fp1": ("projection_ffn_hidden_size * (1 + projection_gated_linear_unit)", "gate, up"),
}
CONDITIONS: dict[str, str] = {
    "always": "",
    "LayerNorm": "`normalization` is `LayerNorm`",
    "add_bias_linear": "`add_bias_linear`",
    "add_qkv_bias": "`add_qkv_bias` or `add_bias_linear`",
    "qk_layernorm": "`qk_layernorm`, and not `qk_l2_norm`",
    "softmax_type learnable": "`softmax_type` is `learnable`",
    "learned positions": "`position_embedding_type` is `learned_absolute`",
    "binary head": "`add_binary_head`",
    "token types": "`num_tokentypes` is above 0",
    "untied": "not `tie_word_embeddings`",
    "attention": "the layer has attention",
    "heads": "the layer has attention, and not `multi_latent_attention`",
    "latents": "the layer has attention, and `multi_latent_attention`",
    "latent queries": "`q_lora_rank` is given",
    "straight queries": "`q_lora_rank` is not given",
    "qk norms": "`qk_layernorm`",
    "dense": "the layer has an MLP and no experts",
    "mixer": "the layer is a Mamba-2 mixer",
    "mixer 1": "the layer is a Mamba-1 mixer",
    "gated norm": "`mamba_rmsnorm`",
    "convolution bias": "`mamba_conv_bias`",
    "experts": "the layer has experts",
    "router bias": "`moe_router_bias`",
    "expert bias": "`moe_router_enable_expert_bias`",
    "shared experts": "`moe_shared_expert_intermediate_size` is given",
    "shared gate": "`moe_shared_expert_gate`",
    "latent experts": "`moe_latent_size` is given",
    "convolution": "the encoder is clip, siglip, internvit or internvit300M",
    "patch matrix": "the encoder is radio, radio-g or cradio-g",
    "patch bias": "the encoder is siglip, internvit, internvit300M or radio-g",
    "class tokens": "`class_token_len` is above 0",
    "heads' bias": "`add_qkv_bias`",
    "mask token": "the encoder is radio-g",
    "norm before": "the encoder is clip",
    "norm after": "the encoder is siglip or radio-g",
    "joined norms": "the encoder is clip, siglip, radio or cradio-g",
    "plain norms": "the encoder is internvit, internvit300M or radio-g",
    "mlp": "`vision_projection_type` is `mlp`",
    "affine": "`vision_projection_type` is `affine`",
    "projection bias": "`projection_add_bias_linear`",
    "projection norm": "`projection_normalization` is given",
    "projection LayerNorm": "`projection_normalization` is `LayerNorm`",
}


def rows_of(kind: str) -> list[Row]:
    """The rows that models of a kind can have; conditions that always hold there are left out.

    Those of a LLaVA's language model are on the pages of GPTs and hybrids.
    """
    if kind == "LLaVA":
        return [row for row in LLAVA if row.part != LANGUAGE]
    found = []
    for row in TABLE:
        conditions = row.when.split(", ")
        if row.stack in ("", *STACKS[kind]) and not ELSEWHERE[kind].intersection(conditions):
            found.append(replace(row, when=", ".join(word for word in conditions if word != kind)))
    return found


def place_of(row: Row) -> str:
    return next((place for place in PLACES if row.name.startswith(place)), "")


def placed(kind: str) -> dict[str, list[Row]]:
    """The rows of a kind by their places, in the table's order."""
    found: dict[str, list[Row]] = {}
    for row in rows_of(kind):
        found.setdefault(place_of(row), []).append(row)
    return found


def classes(kind: str) -> str:
    """What the Auto classes find."""
    (model_type,) = (name for name, one in KINDS.items() if one == kind)
    lines = [f"| `{auto}` | `{place.partition('.')[2]}` |" for auto, place in AUTO_MAPS[model_type].items()]
    return "\n".join(["| Auto class | class |", "|---|---|", *lines])


def weights(kind: str) -> str:
    """A table for each place."""
    sections, places = [], placed(kind)
    for place, rows in places.items():
        if place in AGAIN:
            if [cells(row, place) for row in rows] != [cells(row, LAYERS) for row in places[LAYERS]]:
                raise ValueError(f"{place} is not {LAYERS} once more")
            sections.append(f"`{place}` has the rows of `{LAYERS}` once more, {AGAIN[place]}.")
            continue
        title = f"`{place}`" if place else "Once in the model"
        lines = [f"| {' | '.join(cells(row, place))} |" for row in rows]
        sections.append("\n".join([title, "", "| weight | shape | cut | exists if |", "|---|---|---|---|", *lines]))
    return "\n\n".join(sections)


def cells(row: Row, place: str) -> tuple[str, ...]:
    shape = f"`[{', '.join(row.shape.split())}]`{', float32' if row.float32 else ''}"
    words = [] if row.when in ("", "always") else row.when.split(", ")
    return f"`{row.name.removeprefix(place)}`", shape, cut(row), ", ".join(words)


def cut(row: Row) -> str:
    """How ranks share out a weight."""
    parts = ["experts over EP"] if row.experts else []
    if row.cut.dim is not None:
        ranks = f"axis {row.cut.dim} over {'ETP' if row.experts else 'TP'}"
        blocks = ", block by block" if row.cut.blocks is not WHOLE.blocks else ""
        version = ", or whole, by Megatron's version" if row.cut.by_version else ""
        version += ", by heads" if row.cut.heads else ""
        parts.append(ranks + blocks + version + (", padded" if row.cut.padded else ""))
    return "; ".join(parts) or "whole on every rank"


def letters(kind: str) -> str:
    """What the letters of these shapes mean."""
    used = dict.fromkeys(letter for row in rows_of(kind) for letter in row.shape.split())
    lines = [
        f"| `{letter}` | `{LETTERS[letter][0]}` | {LETTERS[letter][1]} |" for letter in used if letter not in "123"
    ]
    return "\n".join(["| letter | in fields of the config | blocks, in this order |", "|---|---|---|", *lines])


def conditions(kind: str) -> str:
    """What the conditions mean."""
    used = dict.fromkeys(word for row in rows_of(kind) for word in row.when.split(", ") if word not in ("", "always"))
    return "\n".join(["| condition | means |", "|---|---|", *(f"| {word} | {CONDITIONS[word]} |" for word in used)])


def spellings(kind: str) -> str:
    """Other keys that are read as the weights, and other names in the modules."""
    found = [spelled(row, place) for place, rows in placed(kind).items() if place not in AGAIN for row in rows]
    return "\n".join(dict.fromkeys(filter(None, found)))


def spelled(row: Row, place: str) -> str:
    keys: dict[str, list[str]] = {}
    for one in row.spellings:
        if one.key != row.name and one.key.startswith(place):
            keys.setdefault(one.layout, []).append(f"`{one.key.removeprefix(place)}`")
    said = [", ".join(names) + (f" ({layout})" if layout else "") for layout, names in keys.items()]
    if any(one.key == row.name and one.layout for one in row.spellings):
        said.insert(0, "packed under its own name")
    if row.parameter:
        said.append(f"in the model `{row.parameter.removeprefix(place)}`")
    return f"- `{row.name.removeprefix(place)}`: {'; '.join(said)}" if said else ""


TABLES: dict[str, Callable[[str], str]] = {
    "classes": classes,
    "weights": weights,
    "letters": letters,
    "conditions": conditions,
    "spellings": spellings,
}


def filled(page: str, kind: str) -> str:
    """`page` with its tables written anew; KeyError for one that is not known."""
    return re.sub(
        r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)",
        lambda match: f"{match[1]}{TABLES[match[2]](kind)}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for model_type, model_kind in KINDS.items():
        path = HERE / f"{model_type}.md"
        path.write_text(filled(path.read_text(encoding="utf-8"), model_kind), encoding="utf-8")
