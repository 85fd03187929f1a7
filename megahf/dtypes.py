"""Number formats by all their names: torch's, safetensors', torch storages' and NumPy's (through ml_dtypes)."""

from __future__ import annotations

import ml_dtypes
import numpy as np

# torch name, safetensors name, torch storage class, NumPy type
ROWS = (
    ("float64", "F64", "DoubleStorage", np.float64),
    ("float32", "F32", "FloatStorage", np.float32),
    ("float16", "F16", "HalfStorage", np.float16),
    ("bfloat16", "BF16", "BFloat16Storage", ml_dtypes.bfloat16),
    ("float8_e4m3fn", "F8_E4M3", None, ml_dtypes.float8_e4m3fn),
    ("float8_e5m2", "F8_E5M2", None, ml_dtypes.float8_e5m2),
    ("int64", "I64", "LongStorage", np.int64),
    ("int32", "I32", "IntStorage", np.int32),
    ("int16", "I16", "ShortStorage", np.int16),
    ("int8", "I8", "CharStorage", np.int8),
    ("uint64", "U64", None, np.uint64),
    ("uint32", "U32", None, np.uint32),
    ("uint16", "U16", None, np.uint16),
    ("uint8", "U8", "ByteStorage", np.uint8),
    ("bool", "BOOL", "BoolStorage", np.bool_),
    ("complex64", "C64", "ComplexFloatStorage", np.complex64),
    ("complex128", "C128", "ComplexDoubleStorage", np.complex128),
)  # fmt: skip

BY_TORCH = {torch: np.dtype(numpy) for torch, _, _, numpy in ROWS}
BY_STORAGE = {storage: np.dtype(numpy) for _, _, storage, numpy in ROWS if storage}
BY_SAFETENSORS = {name: np.dtype(numpy) for _, name, _, numpy in ROWS}
TORCH_NAME = {np.dtype(numpy): torch for torch, _, _, numpy in ROWS}
SAFETENSORS_NAME = {np.dtype(numpy): name for _, name, _, numpy in ROWS}
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # as `--dtype` takes them


def is_float(dtype: np.dtype) -> bool:
    """Whether NaN and infinity exist in `dtype` (ml_dtypes' types have kind 'V', so NumPy's own test misses them)."""
    return TORCH_NAME[dtype].startswith(("float", "bfloat", "complex"))
