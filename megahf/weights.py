"""Every weight is one row: its canonical name, its shape, how tensor-parallel ranks cut it, its other spellings.

Everything else walks the rows: reading, writing, resharding, inspecting, verifying. Canonical names are Megatron-core's
with tensor parallel 1 and global layer numbers, in the spelling of Transformer Engine and of distributed checkpoints;
experts are fused, `[experts, out, in]`. The order of the rows is the order of the modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from .cuts import (
    COLUMN,
    CONV,
    EXPERTS_FC1,
    EXPERTS_FC2,
    FC1,
    FUSED_KV,
    FUSED_Q,
    HEAD_COLUMNS,
    HEAD_ROWS,
    IN_PROJ,
    LATENT,
    PROJECTION_FC1,
    ROW,
    VOCAB,
    WEIGHT1,
    WEIGHT2,
    WHOLE,
    Config,
)
from .rows import (
    ENGINE,
    IMAGES,
    LANGUAGE,
    LAYERS,
    MAPPED,
    PROJECTION,
    VISION,
    Row,
    Spelling,
    blocks,
    components,
    experts,
    inside,
    is_bert,
    is_hybrid,
    is_llava,
    keys,
    local,
    stacked,
)

WORDS = "embedding.word_embeddings.weight"
AT = "self_attention"
QKV, PROJ = f"{AT}.linear_qkv", f"{AT}.linear_proj"
Q, QD, QU = f"{AT}.linear_q_proj", f"{AT}.linear_q_down_proj", f"{AT}.linear_q_up_proj"
KVD, KVU, QKVD = f"{AT}.linear_kv_down_proj", f"{AT}.linear_kv_up_proj", f"{AT}.linear_qkv_down_proj"
UP, DOWN, F1, F2 = "mlp.linear_fc1", "mlp.linear_fc2", "mlp.1.basic_ops", "mlp.3.basic_ops"
SUP, SDOWN, EX = "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "mlp.experts"
BY_TURNS = "moe_mlp_glu_interleave_size moe_grouped_gemm"
SHARED_BY_TURNS = "moe_shared_expert_glu_interleave_size use_grouped_gemm_for_shared_expert"
DENSE_NORM = f"{UP}.layer_norm_weight", f"{UP}.layer_norm_bias"  # so local layers with experts store theirs, too

LAYER = (
    Row(f"{QKV}.layer_norm_weight", "h", WHOLE, "heads", local("input_layernorm.weight"), f"{QKV}_layernorm.weight"),
    Row(f"{QKV}.layer_norm_bias", "h", WHOLE, "heads, LayerNorm", local("input_layernorm.bias"),
        f"{QKV}_layernorm.bias"),
    Row("input_layernorm.weight", "h", WHOLE, "latents", keys(f"{QKVD}.layer_norm_weight")),
    Row("input_layernorm.bias", "h", WHOLE, "latents, LayerNorm", keys(f"{QKVD}.layer_norm_bias")),
    Row(f"{AT}.core_attention.softmax_offset", "n", COLUMN, "attention, softmax_type learnable"),
    Row(f"{PROJ}.weight", "h nd", ROW, "heads"),
    Row(f"{PROJ}.weight", "h nv", ROW, "latents"),
    Row(f"{PROJ}.bias", "h", WHOLE, "attention, add_bias_linear"),
    Row(f"{QKV}.weight", "qkv h", COLUMN, "heads"),
    Row(f"{QKV}.bias", "qkv", COLUMN, "heads, add_qkv_bias"),
    Row(f"{AT}.q_layernorm.weight", "d", WHOLE, "heads, qk_layernorm"),
    Row(f"{AT}.q_layernorm.bias", "d", WHOLE, "heads, qk_layernorm, LayerNorm"),
    Row(f"{AT}.k_layernorm.weight", "d", WHOLE, "heads, qk_layernorm"),
    Row(f"{AT}.k_layernorm.bias", "d", WHOLE, "heads, qk_layernorm, LayerNorm"),
    Row(f"{Q}.weight", "nq h", COLUMN, "latents, straight queries"),
    Row(f"{QD}.weight", "lq h", LATENT, "latents, latent queries", (Spelling(f"{QKVD}.weight", pack=FUSED_Q),)),
    Row(f"{QU}.layer_norm_weight", "lq", WHOLE, "latents, latent queries, qk norms", local(f"{AT}.q_layernorm.weight"),
        f"{QU}_layernorm.weight"),
    Row(f"{QU}.layer_norm_bias", "lq", WHOLE, "latents, latent queries, qk norms, LayerNorm",
        local(f"{AT}.q_layernorm.bias"), f"{QU}_layernorm.bias"),
    Row(f"{QU}.weight", "nq lq", COLUMN, "latents, latent queries"),
    Row(f"{KVD}.weight", "lkvr h", LATENT, "latents", (Spelling(f"{QKVD}.weight", pack=FUSED_KV),)),
    Row(f"{KVU}.layer_norm_weight", "lkv", WHOLE, "latents, qk norms", local(f"{AT}.kv_layernorm.weight"),
        f"{KVU}_layernorm.weight"),
    Row(f"{KVU}.layer_norm_bias", "lkv", WHOLE, "latents, qk norms, LayerNorm", local(f"{AT}.kv_layernorm.bias"),
        f"{KVU}_layernorm.bias"),
    Row(f"{KVU}.weight", "nkv lkv", COLUMN, "latents"),
    Row(f"{UP}.layer_norm_weight", "h", WHOLE, "dense", (*local("pre_mlp_layernorm.weight"), *keys("mlp.0.weight")),
        f"{UP}_layernorm.weight"),
    Row(f"{UP}.layer_norm_bias", "h", WHOLE, "dense, LayerNorm",
        (*local("pre_mlp_layernorm.bias"), *keys("mlp.0.bias")), f"{UP}_layernorm.bias"),
    Row(f"{UP}.weight", "fc1 h", FC1, "dense",
        (*keys(f"{F1}.0.weight"), *blocks(f"{UP}.weight_w", f"{UP}.weight_v"))),
    Row(f"{UP}.bias", "fc1", FC1, "dense, add_bias_linear",
        (*keys(f"{F1}.1.bias"), *blocks(f"{UP}.bias_w", f"{UP}.bias_v"))),
    Row(f"{DOWN}.weight", "h f", ROW, "dense", keys(f"{F2}.0.weight")),
    Row(f"{DOWN}.bias", "h", WHOLE, "dense, add_bias_linear", keys(f"{F2}.1.bias")),
    Row("pre_mlp_layernorm.weight", "h", WHOLE, "experts", keys(DENSE_NORM[0], spec=MAPPED)),
    Row("pre_mlp_layernorm.bias", "h", WHOLE, "experts, LayerNorm", keys(DENSE_NORM[1], spec=MAPPED)),
    Row("mlp.router.weight", "E h", WHOLE, "experts"),
    Row("mlp.router.bias", "E", WHOLE, "router bias"),
    Row("mlp.router.expert_bias", "E", WHOLE, "expert bias", float32=True),
    Row("mlp.fc1_latent_proj.weight", "lat h", WHOLE, "latent experts"),
    Row("mlp.fc1_latent_proj.bias", "lat", WHOLE, "latent experts, add_bias_linear"),
    Row("mlp.fc2_latent_proj.weight", "h lat", WHOLE, "latent experts"),
    Row("mlp.fc2_latent_proj.bias", "h", WHOLE, "latent experts, add_bias_linear"),
    Row(f"{EX}.linear_fc1.weight", "E fe1 he", EXPERTS_FC1, "experts",
        experts("linear_fc1", "weight", Spelling(f"{EX}.weight1", pack=WEIGHT1, layout="legacy-grouped")),
        f"{EX}.gate_up_proj", experts=True, interleave=BY_TURNS),
    Row(f"{EX}.linear_fc1.bias", "E fe1", EXPERTS_FC1, "experts, add_bias_linear", experts("linear_fc1", "bias"),
        f"{EX}.gate_up_proj_bias", experts=True, interleave=BY_TURNS),
    Row(f"{EX}.linear_fc2.weight", "E he fe", EXPERTS_FC2, "experts",
        experts("linear_fc2", "weight", Spelling(f"{EX}.weight2", pack=WEIGHT2, layout="legacy-grouped")),
        f"{EX}.down_proj", experts=True),
    Row(f"{EX}.linear_fc2.bias", "E he", WHOLE, "experts, add_bias_linear", experts("linear_fc2", "bias"),
        f"{EX}.down_proj_bias", experts=True),
    Row("mlp.shared_experts.gate_weight", "1 h", WHOLE, "shared gate"),
    Row(f"{SUP}.weight", "fs1 h", FC1, "shared experts", blocks(f"{SUP}.weight_w", f"{SUP}.weight_v"),
        interleave=SHARED_BY_TURNS),
    Row(f"{SDOWN}.weight", "h fs", ROW, "shared experts"),
)  # fmt: skip

IN, CONVOLUTION = "mixer.in_proj", "mixer.conv1d"

MIXER = (
    Row(f"{IN}.layer_norm_weight", "h", WHOLE, "mixer", local("norm.weight"), f"{IN}_layernorm.weight"),
    Row(f"{IN}.layer_norm_bias", "h", WHOLE, "mixer, LayerNorm", local("norm.bias"), f"{IN}_layernorm.bias"),
    Row(f"{IN}.weight", "mz h", IN_PROJ, "mixer", components(f"{IN}.weight", "z x B C dt")),
    Row(f"{CONVOLUTION}.weight", "mc 1 mk", CONV, "mixer",
        (*keys(f"{CONVOLUTION}_weight"), *components(f"{CONVOLUTION}.weight", "x B C"))),
    Row(f"{CONVOLUTION}.bias", "mc", CONV, "mixer, convolution bias",
        (*keys(f"{CONVOLUTION}_bias"), *components(f"{CONVOLUTION}.bias", "x B C"))),
    Row("mixer.A_log", "mh", COLUMN, "mixer"),
    Row("mixer.D", "mD", COLUMN, "mixer"),
    Row("mixer.dt_bias", "mh", COLUMN, "mixer"),
    Row("mixer.norm.weight", "mi", COLUMN, "mixer, gated norm"),
    Row("mixer.out_proj.weight", "h mi", ROW, "mixer"),
)  # fmt: skip

MIXER_1 = (  # of Megatron before Mamba-2
    Row(f"{IN}.layer_norm_weight", "h", WHOLE, "mixer 1", local("norm.weight"), f"{IN}_layernorm.weight"),
    Row(f"{IN}.layer_norm_bias", "h", WHOLE, "mixer 1, LayerNorm", local("norm.bias"), f"{IN}_layernorm.bias"),
    Row(f"{IN}.weight", "mz h", IN_PROJ, "mixer 1"),
    Row(f"{CONVOLUTION}.weight", "mc 1 mk", CONV, "mixer 1"),
    Row(f"{CONVOLUTION}.bias", "mc", CONV, "mixer 1, convolution bias"),
    Row("mixer.x_proj.weight", "mrBC mi", ROW, "mixer 1"),
    Row("mixer.dt_proj.weight", "mi mr", COLUMN, "mixer 1"),
    Row("mixer.dt_proj.bias", "mi", COLUMN, "mixer 1"),
    Row("mixer.A_log", "mi mN", COLUMN, "mixer 1"),
    Row("mixer.D", "mi", COLUMN, "mixer 1"),
    Row("mixer.out_proj.weight", "h mi", ROW, "mixer 1"),
)

MTP = (
    Row("enorm.weight", "h"),
    Row("enorm.bias", "h", WHOLE, "LayerNorm"),
    Row("hnorm.weight", "h"),
    Row("hnorm.bias", "h", WHOLE, "LayerNorm"),
    Row("eh_proj.weight", "h 2h", COLUMN),
    Row("final_layernorm.weight", "h"),
    Row("final_layernorm.bias", "h", WHOLE, "LayerNorm"),
)

BERT_HEADS = (  # beside the base model
    Row("lm_head.dense.weight", "h h", WHOLE, "BERT", stage="output"),
    Row("lm_head.dense.bias", "h", WHOLE, "BERT", stage="output"),
    Row("lm_head.layer_norm.weight", "h", WHOLE, "BERT", stage="output"),
    Row("lm_head.layer_norm.bias", "h", WHOLE, "BERT, LayerNorm", stage="output"),
    Row("output_layer.bias", "V", VOCAB, "BERT", stage="output"),
    Row("binary_head.weight", "2 h", WHOLE, "binary head", stage="output"),
    Row("binary_head.bias", "2", WHOLE, "binary head", stage="output"),
)

TABLE = (
    Row(WORDS, "V h", VOCAB, stage="embedding"),
    Row("embedding.position_embeddings.weight", "S h", WHOLE, "learned positions", stage="embedding"),
    Row("embedding.tokentype_embeddings.weight", "T h", WHOLE, "token types", stage="embedding"),
    *stacked((*MIXER, *MIXER_1, *LAYER), "decoder", "decoder.layers.{l}."),
    Row("decoder.final_layernorm.weight", "h", WHOLE, "GPT", stage="norm"),
    Row("decoder.final_layernorm.bias", "h", WHOLE, "GPT, LayerNorm", stage="norm"),
    Row("decoder.final_norm.weight", "h", WHOLE, "hybrid", stage="norm"),
    Row("decoder.final_norm.bias", "h", WHOLE, "hybrid, LayerNorm", stage="norm"),
    *stacked(LAYER, "encoder", "encoder.layers.{l}.", when="BERT"),
    Row("encoder.final_layernorm.weight", "h", WHOLE, "BERT", stage="norm"),
    Row("encoder.final_layernorm.bias", "h", WHOLE, "BERT, LayerNorm", stage="norm"),
    Row("pooler.dense.weight", "h h", WHOLE, "binary head", stage="output"),
    Row("pooler.dense.bias", "h", WHOLE, "binary head", stage="output"),
    *stacked(MTP, "mtp", "mtp.layers.{l}."),
    *stacked(LAYER, "mtp", "mtp.layers.{l}.transformer_layer.", "mtp.layers.{l}.mtp_model_layer.", when="GPT"),
    *stacked((*MIXER, *MIXER_1, *LAYER), "heads", "mtp.layers.{k}.mtp_model_layer.layers.{l}.", when="hybrid"),
    Row("output_layer.weight", "V h", VOCAB, "untied", tied=WORDS, stage="output"),
    *BERT_HEADS,
)

ENCODER_LAYER = (  # of images; Megatron joins norms with the matrices after them, in some layers not or not always
    Row(f"{QKV}.layer_norm_weight", "h", WHOLE, "joined norms", local("input_layernorm.weight"),
        f"{QKV}_layernorm.weight"),
    Row(f"{QKV}.layer_norm_bias", "h", WHOLE, "joined norms, LayerNorm", local("input_layernorm.bias"),
        f"{QKV}_layernorm.bias"),
    *(Row(f"{norm}.{kind}", "h", WHOLE, f"plain norms, {layer}{also}", joined)
      for norm, matrix in (("input_layernorm", QKV), ("pre_mlp_layernorm", UP))
      for kind, also in (("weight", ""), ("bias", ", LayerNorm"))
      for layer, joined in (("convolution", ()), ("patch matrix", keys(f"{matrix}.layer_norm_{kind}", spec=ENGINE)))),
    Row(f"{PROJ}.weight", "h nd", HEAD_COLUMNS),
    Row(f"{PROJ}.bias", "h", WHOLE, "add_bias_linear"),
    Row(f"{QKV}.weight", "3nd h", HEAD_ROWS),
    Row(f"{QKV}.bias", "3nd", HEAD_ROWS, "heads' bias"),
    Row(f"{AT}.q_layernorm.weight", "nd", HEAD_ROWS, "qk norms"),
    Row(f"{AT}.k_layernorm.weight", "nd", HEAD_ROWS, "qk norms"),
    Row(f"{UP}.layer_norm_weight", "h", WHOLE, "joined norms", local("pre_mlp_layernorm.weight"),
        f"{UP}_layernorm.weight"),
    Row(f"{UP}.layer_norm_bias", "h", WHOLE, "joined norms, LayerNorm", local("pre_mlp_layernorm.bias"),
        f"{UP}_layernorm.bias"),
    Row(f"{UP}.weight", "fc1 h", FC1),
    Row(f"{UP}.bias", "fc1", FC1, "add_bias_linear"),
    Row(f"{DOWN}.weight", "h f", ROW),
    Row(f"{DOWN}.bias", "h", WHOLE, "add_bias_linear"),
    Row("ls1", "h", WHOLE, "plain norms"),
    Row("ls2", "h", WHOLE, "plain norms"),
)  # fmt: skip

ENCODER = (
    Row("class_token", "1 c h", WHOLE, "convolution, class tokens", stage=IMAGES),
    Row("class_token", "c h", WHOLE, "patch matrix, class tokens", stage=IMAGES),
    Row("mask_token", "1 h", WHOLE, "mask token", stage=IMAGES),
    Row("position_embeddings.weight", "c+n h", WHOLE, "convolution", stage=IMAGES),
    Row("position_embeddings", "1 N h", WHOLE, "patch matrix", stage=IMAGES),
    Row("conv1.weight", "h 3 p p", WHOLE, "convolution", stage=IMAGES),
    Row("conv1.bias", "h", WHOLE, "convolution, patch bias", stage=IMAGES),
    Row("embedder.weight", "h 3pp", COLUMN, "patch matrix", stage=IMAGES),
    Row("embedder.bias", "h", COLUMN, "patch matrix, patch bias", stage=IMAGES),
    Row("ln_pre.weight", "h", WHOLE, "norm before", stage=IMAGES),
    Row("ln_pre.bias", "h", WHOLE, "norm before, LayerNorm", stage=IMAGES),
    Row("ln_post.weight", "h", WHOLE, "norm after", stage=IMAGES),
    Row("ln_post.bias", "h", WHOLE, "norm after, LayerNorm", stage=IMAGES),
    *stacked(ENCODER_LAYER, IMAGES, "decoder.layers.{l}."),
)

PROJECTOR = (
    Row("encoder.linear_fc1.layer_norm_weight", "hi", WHOLE, "mlp, projection norm",
        (), "encoder.linear_fc1_layernorm.weight", stage=IMAGES),
    Row("encoder.linear_fc1.layer_norm_bias", "hi", WHOLE, "mlp, projection LayerNorm",
        (), "encoder.linear_fc1_layernorm.bias", stage=IMAGES),
    Row("encoder.linear_fc1.weight", "fp1 hi", PROJECTION_FC1, "mlp", stage=IMAGES),
    Row("encoder.linear_fc1.bias", "fp1", PROJECTION_FC1, "mlp, projection bias", stage=IMAGES),
    Row("encoder.linear_fc2.weight", "ht fp", ROW, "mlp", stage=IMAGES),
    Row("encoder.linear_fc2.bias", "ht", WHOLE, "mlp, projection bias", stage=IMAGES),
    Row("encoder.weight", "ht hi", COLUMN, "affine", stage=IMAGES),
    Row("encoder.bias", "ht", COLUMN, "affine, projection bias", stage=IMAGES),
)  # fmt: skip

OUTPUT = "output_layer.weight"
# What a model that predicts tokens has beside its base model.
HEAD = (OUTPUT, *(row.name for row in BERT_HEADS), f"{LANGUAGE}.{OUTPUT}")

BERTS = {"BERT", "token types", "binary head"}
LANGUAGE_MODEL = inside(
    tuple(row for row in TABLE if row.stack in ("", "decoder") and not BERTS.intersection(row.when.split(", "))),
    LANGUAGE,
)
# A LLaVA: a GPT or a hybrid, beside what makes tokens of images.
LLAVA = (
    *inside(ENCODER, VISION),
    *inside(PROJECTOR, PROJECTION),
    *(replace(row, parameter=OUTPUT) if row.name in HEAD else row for row in LANGUAGE_MODEL),
)


def table_of(config: Config) -> tuple[Row, ...]:
    """The rows of which a model of `config` can have weights."""
    return LLAVA if is_llava(config) else TABLE


def heads(config: Config) -> int:
    """Heads for further tokens that have weights of their own."""
    count = config.mtp_num_layers or 0
    return min(count, 1) if config.mtp_use_repeated_layer else count


def depth(stack: str, config: Config) -> int:
    """Layers of a stack, or of each of its heads; `config` is that of the part it is in."""
    if stack == "heads":
        return len(config.mtp_layer_pattern or "") if is_hybrid(config) else 0
    if stack == "mtp":
        return heads(config)
    if stack in LAYERS:
        return config.num_layers if (stack == "encoder") == is_bert(config) else 0
    return config.num_layers if stack == IMAGES else 1


class Weight(NamedTuple):
    """One weight of one model: a row with its numbers filled in."""

    name: str
    row: Row
    layer: int | None
    shape: tuple[int, ...]
    parameter: str  # its name in the base model's modules
    head: int = 0  # of a hybrid's heads for further tokens


def weights(config: Config, table: Sequence[Row] = ()) -> Iterator[Weight]:
    """Every weight of the model that `config` describes, in the order of its modules; or what else a table is of."""
    for (_, stack), group in groupby(table or table_of(config), key=lambda row: (row.part, row.stack)):
        rows = list(group)
        own = rows[0].of(config)
        for head in range(heads(own) if stack == "heads" else 1):
            for layer in range(depth(stack, own)):
                numbers = {"l": layer, "k": head}
                for row in rows:
                    if row.exists(config, layer):
                        name, parameter = row.name.format(**numbers), row.runtime.format(**numbers)
                        yield Weight(name, row, layer if stack else None, row.dims(config), parameter, head)
