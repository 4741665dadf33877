"""The native kernels on tensors: a layer forward and backward, what it had at every step, the loss.

    T  steps   B  rows   N  steps of all rows   I  input width   H  hidden units   D  directions
    P  width of h: H, or what it is projected to

Each layer is one call of the library (`csrc/longshort.h`). Nothing here is differentiated by PyTorch:
`native_backend` does that for eager calls, and `graph` for compiled ones. float32 on a CPU, checked before.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from longshort import buffers, native
from longshort.calls import (
    BACKWARD,
    FORWARD,
    SHAPE,
    Call,
    address,
    check,
    dense,
    library,
    resolved,
    rows,
    run,
    vector_fields,
    weight_fields,
)
from longshort.cells import State
from longshort.packing import pack
from longshort.structures import LossArgs


def forward(
    call: Call,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    saved: Sequence[Tensor] = (),
    keep_packed: bool = False,
) -> tuple[Tensor, State]:
    """Run one layer in all its directions.

    Args:
        call: the layer.
        x: (T, B, I), (B, T, I) or packed (N, I); or a table, as `Call` says.
        state: h_0 (D, B, P) and for the LSTM c_0 (D, B, H), contiguous; zeros if None.
        weights: of each direction weight_ih, weight_hh, and if there are any the biases, weight_hr and the call's
            vectors, contiguous.
        saved: filled with what `backward` needs: `saved_floats` for each direction; nothing is saved if there are none.
        keep_packed: whether the weights may be packed for later calls too.

    Returns:
        y, (T, B, D P) or as `x`, and the state after.
    """
    D, H, P = call.directions, call.H, call.P
    T, B = call.size(x)
    y = buffers.prefer_large_pages(x.new_empty((T, B, D * P) if call.ids is not None else (*x.shape[:-1], D * P)))
    h_n = x.new_empty(D, B, P)
    c_n = x.new_empty(D, B, H) if call.num_states == 2 else None
    per_direction = len(weights) // D
    x_step, x_row = (0, 0) if call.ids is not None else call.strides(x)
    y_step, y_row = call.strides(y)
    fields, kept = b"", []  # what is packed must live as long as the call
    for d in range(D):
        own = weights[d * per_direction : (d + 1) * per_direction]
        shape = call.shape(x, d)
        packed = pack(call, own, x.shape[-1]) if keep_packed else None
        kept.append(packed)
        of_h, of_c = 4 * d * B * P, 4 * d * B * H
        fields += FORWARD.pack(
            *shape,
            *call.option_fields(d, own),
            x.data_ptr(),
            x_step,
            x_row,
            *weight_fields(call.bias, [weight.data_ptr() for weight in own[: call.num_plain]]),
            0 if packed is None else packed.data_ptr(),
            0 if state is None else state[0].data_ptr() + of_h,
            0 if state is None or c_n is None else state[1].data_ptr() + of_c,
            y.data_ptr() + 4 * d * P,
            y_step,
            y_row,
            h_n.data_ptr() + of_h,
            0 if c_n is None else c_n.data_ptr() + of_c,
            saved[d].data_ptr() if saved else 0,
            *call.tokens(x),
        )
    run(library.ls_forward, (fields, D), call.cell)
    return y, (h_n,) if c_n is None else (h_n, c_n)


def backward(
    call: Call,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Sequence[Tensor],
    dy: Tensor | None,
    dstate: Sequence[Tensor | None],
    wanted: Sequence[bool],
    dgates: Sequence[Tensor | None] = (),
) -> list[Tensor | None]:
    """Return the gradients of x, of h_0 (and c_0), and of the weights, those that are `wanted`; the others None.

    Args:
        call: the layer.
        x: as in `forward`.
        state: as in `forward`.
        weights: as in `forward`.
        y: as `forward` gave it.
        saved: as `forward` filled it.
        dy: gradient of y; zeros if None.
        dstate: of h_n and for the LSTM c_n.
        wanted: one entry for each gradient, in the order in which they are returned.
        dgates: of what `show` gave, an entry a direction; zeros if there are none.
    """
    D, H, P = call.directions, call.H, call.P
    _, B = call.size(x)
    num_states = call.num_states
    lstm = num_states == 2
    given = buffers.prefer_large_pages(x.new_empty(x.shape)) if wanted[0] else None
    dx, dtable = (given, None) if call.ids is None else (None, given)
    dbefore = [x.new_empty(D, B, width) if wanted[1 + i] else None for i, width in enumerate((P, H)[:num_states])]
    dweights = [
        buffers.Gradients.like(w) if want else None for w, want in zip(weights, wanted[1 + num_states :], strict=True)
    ]
    dy = None if dy is None else rows(dy)
    dstate = [None if gradient is None else dense(gradient) for gradient in dstate]
    dgates = [None if gradient is None else dense(gradient) for gradient in dgates or (None,) * D]
    per_direction = len(weights) // D
    x_step, x_row = (0, 0) if call.ids is not None else call.strides(x)
    y_step, y_row = call.strides(y)
    dy_step, dy_row = (0, 0) if dy is None else call.strides(dy)
    dx_step, dx_row = (0, 0) if dx is None else call.strides(dx)

    def part(tensor: Tensor | None, offset: int) -> int:
        return 0 if tensor is None else tensor.data_ptr() + offset

    fields = b""
    for d in range(D):
        own = weights[d * per_direction : (d + 1) * per_direction]
        down = dweights[d * per_direction : (d + 1) * per_direction]
        of_h, of_c = 4 * d * B * P, 4 * d * B * H
        of_weights = weight_fields(call.bias, list(map(address, down[: call.num_plain])))
        fields += BACKWARD.pack(
            *call.shape(x, d),
            *call.option_fields(d, own),
            x.data_ptr(),
            x_step,
            x_row,
            own[0].data_ptr(),
            own[1].data_ptr(),
            own[call.num_plain - 1].data_ptr() if call.projected else 0,
            0 if state is None else state[0].data_ptr() + of_h,
            0 if state is None or not lstm else state[1].data_ptr() + of_c,
            y.data_ptr() + 4 * d * P,
            y_step,
            y_row,
            saved[d].data_ptr(),
            part(dy, 4 * d * P),
            dy_step,
            dy_row,
            part(dstate[0], of_h),
            part(dstate[1], of_c) if lstm else 0,
            address(dgates[d]),
            address(dx),
            dx_step,
            dx_row,
            *of_weights,
            part(dbefore[0], of_h),
            part(dbefore[1], of_c) if lstm else 0,
            *vector_fields(call.vectors, down[call.num_plain :]),
            int(d > 0),
            0,
            *call.tokens(x),
            address(dtable),
        )
    run(library.ls_backward, (fields, D), call.cell, "_backward")
    return [given, *dbefore, *dweights]


def show(call: Call, x: Tensor, saved: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return of each direction what `forward` had at every step beside h: `native.SHOWN`, (gates, T, B, H).

    Args:
        call: the layer.
        x: as in `forward`.
        saved: as `forward` filled it.
    """
    T, B = call.size(x)
    shown = [saved[0].new_empty(len(native.SHOWN[call.cell]), T, B, call.H) for _ in saved]
    for d, (own, gates) in enumerate(zip(saved, shown, strict=True)):
        shape = SHAPE.pack(*call.shape(x, d))
        check(library.ls_gates(shape, call.layer_norm, own.data_ptr(), gates.data_ptr()))
    return tuple(shown)


def cross_entropy(
    h_NH: Tensor, weight_VH: Tensor, bias_V: Tensor, targets_N: Tensor, scale: float, target: int = -1
) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Return the sum of -log p of the targets in nats, and `scale` times its gradients for h, weight and bias.

    Args:
        h_NH: what the output layer reads.
        weight_VH: of the output layer.
        bias_V: of the output layer.
        targets_N: int64; below 0 where there is nothing to predict.
        scale: of the gradients.
        target: number of the target that runs, -1 for what PyTorch's switches allow or else the active one.

    Raises:
        ValueError: not a target for each row.
    """
    if targets_N.dtype is not torch.int64 or targets_N.shape != h_NH.shape[:1]:
        raise ValueError(f"Targets must be int64 ({len(h_NH)}), not {targets_N.dtype} {tuple(targets_N.shape)}")
    given = [dense(tensor.detach()) for tensor in (h_NH, weight_VH, bias_V, targets_N)]
    dh_NH, *dweights = given[0].new_empty(h_NH.shape), *map(buffers.Gradients.like, given[1:3])
    nats_N = dh_NH.new_empty(len(h_NH), dtype=torch.float64)
    places = [tensor.data_ptr() for tensor in (*given, nats_N, dh_NH, *dweights)]
    target = resolved(target, 2, *h_NH.shape)  # as many rows as of a batch that is read at once
    args = LossArgs(len(h_NH), *weight_VH.shape, target, torch.get_num_threads(), *places, scale)
    run(library.ls_loss, (ctypes.byref(args),), "cross_entropy")
    return float(nats_N.numpy().sum()), (dh_NH, dweights[0], dweights[1])
