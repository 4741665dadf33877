"""The structures of the kernel library, as `csrc/longshort.h` declares and explains them.

Tests hold them to the header, and to what `calls` packs.
"""

from __future__ import annotations

import ctypes

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Shape(ctypes.Structure):
    """`ls_shape`."""

    _fields_ = (
        *((name, _i64) for name in ("T", "B", "I", "H", "P")),
        *((name, _pointer) for name in ("counts", "starts", "order")),
        *((name, _i32) for name in ("cell", "reverse", "num_threads", "target")),
    )


class LayerWeightsStructure(ctypes.Structure):
    """`ls_weights`."""

    _fields_ = (
        *((name, _i64) for name in ("I", "H", "P")),
        *((name, _i32) for name in ("cell", "reserved")),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")),
    )


class LayerOptionsStructure(ctypes.Structure):
    """`ls_options`."""

    _fields_ = (
        ("h_mask", _pointer),
        ("zoneout_mask", _pointer),
        ("zoneout", ctypes.c_float),
        ("reserved", _i32),
        *((name, _pointer) for name in ("resets", "gamma_ih", "gamma_hh", "gamma_c", "beta_c")),
        *((name, _pointer) for name in ("weight_ci", "weight_cf", "weight_co")),
    )


class Tokens(ctypes.Structure):
    """`ls_tokens`."""

    _fields_ = (("table", _pointer), ("ids", _pointer), ("V", _i64))


class ForwardArgs(ctypes.Structure):
    """`ls_forward_args`."""

    _fields_ = (
        ("shape", Shape),
        ("options", LayerOptionsStructure),
        ("x", _pointer),
        ("x_step", _i64),
        ("x_row", _i64),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")),
        *((name, _pointer) for name in ("packed", "h0", "c0", "y")),
        ("y_step", _i64),
        ("y_row", _i64),
        *((name, _pointer) for name in ("h_n", "c_n", "saved")),
        ("tokens", Tokens),
    )


class BackwardArgs(ctypes.Structure):
    """`ls_backward_args`."""

    _fields_ = (
        ("shape", Shape),
        ("options", LayerOptionsStructure),
        ("x", _pointer),
        ("x_step", _i64),
        ("x_row", _i64),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "weight_hr", "h0", "c0", "y")),
        ("y_step", _i64),
        ("y_row", _i64),
        ("saved", _pointer),
        ("dy", _pointer),
        ("dy_step", _i64),
        ("dy_row", _i64),
        *((name, _pointer) for name in ("dh_n", "dc_n", "dgates")),
        ("dx", _pointer),
        ("dx_step", _i64),
        ("dx_row", _i64),
        *(
            (name, _pointer)
            for name in ("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dweight_hr", "dh0", "dc0")
        ),
        *((name, _pointer) for name in ("dgamma_ih", "dgamma_hh", "dgamma_c", "dbeta_c")),
        *((name, _pointer) for name in ("dweight_ci", "dweight_cf", "dweight_co")),
        ("accumulate_dx", _i32),
        ("reserved", _i32),
        ("tokens", Tokens),
        ("dtable", _pointer),
    )


class ModelStructure(ctypes.Structure):
    """`ls_model`."""

    _fields_ = (
        *((name, _i64) for name in ("V", "E", "H", "layers")),
        *((name, _i32) for name in ("cell", "target", "int8", "residual")),
        *((name, _pointer) for name in ("table", "embedding", "packed", "head", "gains")),
    )


class SamplingStructure(ctypes.Structure):
    """`ls_sampling`."""

    _fields_ = (
        *((name, ctypes.c_double) for name in ("temperature", "top_p")),
        ("top_k", _i64),
        *((name, ctypes.c_uint64) for name in ("seed", "stream")),
        ("position", _i64),
    )


class DecodeArgs(ctypes.Structure):
    """`ls_decode_args`."""

    _fields_ = (
        ("model", ModelStructure),
        *((name, _i64) for name in ("B", "steps")),
        *((name, _pointer) for name in ("sampling", "logits", "h", "c", "ids")),
        ("newline", _i64),
        *((name, _i32) for name in ("num_threads", "reserved")),
    )


class ReadArgs(ctypes.Structure):
    """`ls_read_args`."""

    _fields_ = (
        ("model", ModelStructure),
        *((name, _i64) for name in ("T", "B")),
        *((name, _pointer) for name in ("ids", "targets", "h", "c", "nats", "logits")),
        *((name, _i32) for name in ("num_threads", "reserved")),
    )


class TreeArgs(ctypes.Structure):
    """`ls_tree_args`."""

    _fields_ = (
        ("model", ModelStructure),
        ("levels", _i64),
        *((name, _pointer) for name in ("nodes", "reads", "ids", "parents", "nats")),
        *((name, _i32) for name in ("num_threads", "reserved")),
    )


class LossArgs(ctypes.Structure):
    """`ls_loss_args`."""

    _fields_ = (
        *((name, _i64) for name in ("N", "V", "H")),
        *((name, _i32) for name in ("target", "num_threads")),
        *((name, _pointer) for name in ("h", "weight", "bias", "targets", "nats", "dh", "dweight", "dbias")),
        ("scale", ctypes.c_float),
        ("reserved", _i32),
    )
