"""YaRN in `rope_parameters`: the stretch of rotary positions to a context some times as long."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..cuts import Config


def mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def concentration(config: Config) -> float:
    """What Megatron multiplies cosines and sines by."""
    factor = config.yarn_rotary_scaling_factor
    if config.yarn_mscale is None or config.yarn_mscale_all_dim is None:
        return mscale(factor, 1.0)
    return mscale(factor, config.yarn_mscale) / mscale(factor, config.yarn_mscale_all_dim)


def read(rope: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Our fields; `length` is the context where the rope does not say from which one it stretches.

    transformers takes an `mscale` or `mscale_all_dim` of 0 for none, and then neither counts for cosines and sines.
    """
    if rope.get("factor") is None:
        raise ValueError("YaRN without a factor")
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    ours = {
        "yarn_rotary_scaling_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": int(rope.get("original_max_position_embeddings") or length),
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": float(rope["mscale"]) if both else 1.0,
        "yarn_mscale_all_dim": float(rope["mscale_all_dim"]) if both else 0.0,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
    }
    weight, over = ours["yarn_mscale"], ours["yarn_mscale_all_dim"]
    own = mscale(ours["yarn_rotary_scaling_factor"], weight) / mscale(ours["yarn_rotary_scaling_factor"], over)
    asked = rope.get("attention_factor")
    if asked is not None and not math.isclose(asked, own, rel_tol=1e-6):
        raise ValueError(f"attention_factor {asked} is not the {own:g} that Megatron computes")
    return ours


def write(config: Config) -> dict[str, Any]:
    """Their words; without `mscale` where cosines and sines have the factor that YaRN has by itself."""
    theirs: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": config.rotary_base,
        "factor": config.yarn_rotary_scaling_factor,
        "original_max_position_embeddings": config.yarn_original_max_position_embeddings,
        "beta_fast": config.yarn_beta_fast,
        "beta_slow": config.yarn_beta_slow,
    }
    plain = config.yarn_mscale is None or config.yarn_mscale_all_dim is None
    if config.multi_latent_attention or not (plain or (config.yarn_mscale, config.yarn_mscale_all_dim) == (1, 0)):
        theirs |= {"mscale": config.yarn_mscale, "mscale_all_dim": config.yarn_mscale_all_dim}
    if not config.yarn_correction_range_round_to_int and not config.multi_latent_attention:
        theirs["truncate"] = False
    return theirs
