"""What modules store beside their weights: an `_extra_state`, for fp8, and empty without it.

Megatron loads strictly, so a checkpoint holds the keys that its modules ask for, with None, which all of them take:
Megatron's own linears ignore it, and Transformer Engine's modules read it as nothing to restore. A row stands for a
state, its name for the key; as in `weights.py` experts have several spellings. Read off megatron-core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .cuts import Config
from .rows import IMAGES, LANGUAGE, PROJECTION, VISION, Row, Spelling, inside, is_llava, stacked
from .weights import Weight, weights

AT, EXPERTS = "self_attention", "mlp.experts"


def state(module: str, when: str = "always", stage: str = "") -> Row:
    return Row(f"{module}._extra_state", "", when=when, stage=stage)


def of_experts(matrix: str) -> Row:
    """Of the experts' `matrix`: one together or one each; legacy grouped experts have none of their own."""
    spelled = (
        Spelling(f"{EXPERTS}.{matrix}._extra_state", layout="te-grouped"),
        Spelling(f"{EXPERTS}.local_experts.{{e}}.{matrix}._extra_state", layout="sequential"),
        Spelling(f"{EXPERTS}.experts.{matrix}._extra_state", layout="distributed"),
    )
    return Row(f"{EXPERTS}.{matrix}._extra_state", "", when="experts", also=spelled, experts=True)


LINEARS = (  # of Transformer Engine and of Megatron's own
    state(f"{AT}.linear_proj", "attention"),
    state(f"{AT}.linear_qkv", "heads"),
    state(f"{AT}.linear_q_proj", "latents, straight queries"),
    state(f"{AT}.linear_q_down_proj", "latents, latent queries"),
    state(f"{AT}.linear_q_up_proj", "latents, latent queries"),
    state(f"{AT}.linear_kv_down_proj", "latents"),
    state(f"{AT}.linear_kv_up_proj", "latents"),
    state("mlp.linear_fc1", "dense"),
    state("mlp.linear_fc2", "dense"),
    of_experts("linear_fc1"),
    of_experts("linear_fc2"),
    state("mlp.shared_experts.linear_fc1", "shared experts"),
    state("mlp.shared_experts.linear_fc2", "shared experts"),
    state("mlp.fc1_latent_proj", "latent experts"),
    state("mlp.fc2_latent_proj", "latent experts"),
)
ENGINE = (  # of Transformer Engine alone; its norms have one since 2.0
    state("input_layernorm", "latents"),
    state(f"{AT}.q_layernorm", "heads, qk_layernorm"),
    state(f"{AT}.k_layernorm", "heads, qk_layernorm"),
    state("pre_mlp_layernorm", "experts"),
)
CORE = (state(f"{AT}.core_attention", "attention"),)
SINKS = (state(f"{AT}.core_attention", "attention, softmax_type learnable"),)
MIXER = (state("mixer.in_proj", "mixer"), state("mixer.out_proj", "mixer"))
HEAD_NORMS = (state("enorm"), state("hnorm"), state("final_layernorm"))
FINAL_NORM = (state("decoder.final_layernorm", "GPT", "norm"), state("encoder.final_layernorm", "BERT", "norm"))
FINAL_NORM_OF_HYBRIDS = (state("decoder.final_norm", "hybrid", "norm"),)  # Transformer Engine's with all layers
LAYER, HEAD = "mtp.layers.{l}.transformer_layer.", "mtp.layers.{k}.mtp_model_layer.layers.{l}."


def table(engine: bool, distributed: bool) -> tuple[Row, ...]:
    """The states of a checkpoint.

    In distributed ones attention has one only beside sinks (`TEDotProductAttention.sharded_state_dict`), though a
    GPT's heads keep it, and a GPT's output layer has none (`GPTModel.sharded_state_dict`).
    """
    core = ((SINKS if distributed else CORE), CORE) if engine else ((), ())
    modules = LINEARS + (ENGINE if engine else ())
    return (
        *stacked((*MIXER, *modules, *core[0]), "decoder", "decoder.layers.{l}."),
        *stacked((*modules, *core[0]), "encoder", "encoder.layers.{l}.", when="BERT"),
        *(FINAL_NORM if engine else ()),
        *FINAL_NORM_OF_HYBRIDS,
        *stacked((state("eh_proj"), *(HEAD_NORMS if engine else ())), "mtp", "mtp.layers.{l}."),
        *stacked((*modules, *core[1]), "mtp", LAYER, when="GPT"),
        *stacked((*MIXER, *modules, *core[0]), "heads", HEAD, when="hybrid"),
        *(state("output_layer", kind, "output") for kind in (("hybrid", "BERT") if distributed else ("always",))),
    )


def llava(engine: bool, distributed: bool) -> tuple[Row, ...]:
    """The states of a LLaVA: of norms Transformer Engine's have one, as those around the encoder are in any case."""
    core = CORE if engine and not distributed else ()
    norms = (state("ln_pre", "norm before", IMAGES), state("ln_post", "norm after", IMAGES))
    heads = tuple(state(f"{AT}.{name}") for name in ("linear_proj", "linear_qkv"))
    widths = (state("mlp.linear_fc1"), state("mlp.linear_fc2"))
    attention = tuple(replace(row, when="always") for row in core)
    encoder = (
        state("embedder", "patch matrix", IMAGES), *norms,
        *stacked((*heads, *widths, *attention), IMAGES, "decoder.layers.{l}."),
    )  # fmt: skip
    projection = (
        state("encoder.linear_fc1", "mlp", IMAGES), state("encoder.linear_fc2", "mlp", IMAGES),
        state("encoder", "affine", IMAGES),
    )  # fmt: skip
    text = tuple(row for row in table(engine, distributed) if row.stack in ("", "decoder") and "BERT" not in row.when)
    return (*inside(encoder, VISION), *inside(projection, PROJECTION), *inside(text, LANGUAGE))


def states(config: Config, engine: bool, distributed: bool) -> Iterator[Weight]:
    """Every state that the model's modules ask for."""
    return weights(config, (llava if is_llava(config) else table)(engine, distributed))
