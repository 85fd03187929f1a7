"""Folders whose weights are quantised, which are refused with the way to one whose weights are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import refuse
from ..tiles import Tiled
from .family import Theirs

AGAIN = "load it with transformers' `quantization_config={}(dequantize=True)` and save it with save_pretrained"
REMEDIES = {"mxfp4": AGAIN.format("Mxfp4Config"), "fp8": AGAIN.format("FineGrainedFP8Config")}
# How names of weights that belong to quantised ones end.
SCALES = {"_blocks": "mxfp4", "weight_scale_inv": "fp8", "weight_scale": "fp8"}


def refuse_quantised(theirs: Theirs, found: Mapping[str, Tiled], folder: Path) -> None:
    """Raises Refused where config.json or the weights say that they are quantised."""
    told = theirs.get("quantization_config") or theirs.get("compression_config") or {}
    method = told.get("quant_method") or (told and "some method")
    scaled = [(SCALES[end], name) for name in found for end in SCALES if name.endswith(end)]
    narrow = [("fp8", name) for name, array in found.items() if array.dtype.name.startswith("float8")]
    for kind, name in (*scaled, *narrow):
        method = method or kind
        raise refuse(f"the weights are quantised with {method}", f"{name} in {folder}", remedy(method))
    if method:
        raise refuse(f"the weights are quantised with {method}", folder / "config.json", remedy(method))


def remedy(method: str) -> str:
    return REMEDIES.get(method, "convert it to bfloat16 with the tool that quantised it, or take the original weights")
