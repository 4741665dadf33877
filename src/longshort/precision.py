"""How exact products of float32 have to be: PyTorch's own switches, which our layers follow as PyTorch's do.

    torch.set_float32_matmul_precision("high")             "tf32" for matrix products, "medium" is "bf16"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"   matrix products on a CPU
    torch.backends.mkldnn.rnn.fp32_precision = "bf16"      recurrent layers on a CPU; goes before the one of products
    torch.backends.fp32_precision = "bf16"                 what none of them sets

"bf16" allows factors of bfloat16, 8 bits; "tf32" factors of 11 bits, or of two numbers of bfloat16 (16 bits), which is
what our kernels have: `torch.set_float32_matmul_precision` describes both. Each is taken where the processor has it
and it was measured faster, else the next more exact one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from longshort import machine, native

EXACT = "ieee"
"""What the switches say where products of float32 are to have all digits."""

_read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
"""What is behind the switches' properties, which take ten times as long to read."""


def allowed() -> str:
    """Return what the switches allow for recurrent layers on a CPU: `bf16`, `tf32`, or else `EXACT`."""
    if _read is None:
        return EXACT
    found: str = _read("mkldnn", "rnn")
    if found == "none":
        found = _read("mkldnn", "matmul")
    return EXACT if found == "none" else found


def target(steps: int, rows: int, units: int) -> str | None:
    """Return the target that a call has by what the switches allow; None where it is that of float32.

    Args:
        steps: T.
        rows: of the batch.
        units: H.
    """
    found = allowed()
    if found == EXACT or not _is_open():
        return None
    if found == "bf16" and (name := _fast_bfloat16()):
        return name
    # A matrix unit takes as long for one row as for 16, and narrow matrices as long as vectors do: docs/log.md.
    many = rows >= (12 if steps > 1 else 48) and units >= 128
    return native.HALVES if many and native.HALVES in native.supported() else None


def _is_open() -> bool:
    """Whether nobody has chosen a target for the process: what is chosen is also how exact it is to be."""
    return bool(native.library()) and native.active_target() == native.supported()[0]


def _fast_bfloat16() -> str | None:
    """Return our target with products of bfloat16, where they are faster than those of float32."""
    name = native.bfloat16()
    return name if name == native.BFLOAT16[0] or _vectors_are_fast() else None


@functools.cache
def _vectors_are_fast() -> bool:
    """Whether vectors multiply bfloat16 faster than float32, which they do on AMD's processors, not on Intel's."""
    return "AMD" in machine.processor()
