"""C++'s names of dtypes."""

from __future__ import annotations

CPP_TYPES = {
    "f32": "float",
    "f64": "double",
    "bf16": "bf16",
    "f16": "f16",
    "i32": "int32_t",
    "i8": "int8_t",
    "u8": "uint8_t",
}
