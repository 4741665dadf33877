"""One layer in one direction by the native kernels, with as little Python as can be.

    T  steps   B  rows   I  input width   H  hidden units   G  gates times H
    P  width of h: H, or what it is projected to

A step from Python costs more in checks than in arithmetic. What is written out here is what `ops` does for the usual
call: one layer, one direction, float32 on a CPU, all rows of one length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

from longshort import calls, native, native_backend, packing
from longshort.buffers import LARGE, Gradients, Saved, keep, kept, prefer_large_pages, release
from longshort.calls import BACKWARD, FORWARD, Call, address, library
from longshort.cells import Options, Stack
from longshort.options import LayerOptions


class Quick:
    """The short way of one layer: makes the usual call, and leaves every other to the general path.

    Args:
        stack: one layer, one direction.
        names: of its weights among the module's parameters, and of its options' vectors.
        batch_first: as in the layer.
        options: of the layer: those that a kernel must know of, and no others.
        training: whether they act as in training.
    """

    def __init__(
        self, stack: Stack, names: Sequence[str], batch_first: bool, options: LayerOptions, training: bool
    ) -> None:
        self._stack, self.batch_first, self._options = stack, batch_first, options
        self._draws = training and bool(options.recurrent_dropout or options.zoneout)
        self._fixed = Options(zoneout=0.0 if training else options.zoneout, coupled=stack.coupled)
        self._fixed_fields = (0, 0, self._fixed.zoneout, 0, 0, *calls.NO_VECTORS)
        self._cell, self._I, self._H, self._bias = calls.cell_of(stack), stack.input_size, stack.hidden_size, stack.bias
        self._code, self._lstm = native.LAYER_CELLS[self._cell], native.STATES[self._cell] == 2
        vectors = options.parameter_sizes(stack)
        self._P, self._projected = stack.output_size, stack.proj_size
        self._num_plain, self._vectors = len(stack.weight_shapes), tuple(vectors)
        shapes = (*stack.weight_shapes, *((size,) for size in vectors.values()))
        self._weights = tuple(zip(names, shapes, strict=True))
        plain = (self._cell, self._H, 1, stack.bias, batch_first, None, (self._fixed,), -1, self._vectors)
        self._call = Call(*plain, projected=stack.proj_size)

    def __call__(self, parameters: Mapping[str, Tensor | None], x: Any, hx: Any, target: int) -> Any:
        """Return what the layer returns, or None where this is not the usual call."""
        H, P, float32 = self._H, self._P, torch.float32
        if type(x) is not Tensor or x.dtype is not float32 or x.dim() != 3 or not x.is_cpu or x.stride(2) != 1:
            return None
        if x.is_neg() or is_functorch_wrapped_tensor(x) or not x.data_ptr():
            return None
        T, B, I = x.shape
        if self.batch_first:
            T, B = B, T
        if not T or not B or self._I != I:
            return None
        state: tuple[Any, ...] = ()
        if hx is not None:
            state = hx if self._lstm else (hx,)
            if type(state) is not tuple or len(state) != 1 + self._lstm:
                return None
            width = P
            for tensor in state:
                if type(tensor) is not Tensor or tensor.dtype is not float32 or tensor.shape != (1, B, width):
                    return None
                if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                    return None
                if is_functorch_wrapped_tensor(tensor) or not tensor.data_ptr():
                    return None
                width = H
        weights = []
        for name, shape in self._weights:
            weight = parameters.get(name)
            if type(weight) is not Parameter or weight.dtype is not float32 or weight.shape != shape:
                return None
            if not (weight.is_cpu and weight.is_contiguous()) or weight.is_neg():
                return None
            weights.append(weight)
        h_0, c_0 = (*state, None, None)[:2]
        grad = torch.is_grad_enabled() and (
            weights[0].requires_grad or any(tensor.requires_grad for tensor in (x, *state, *weights))
        )
        target = calls.resolved(target, T, B, H)
        packed = None
        if grad:
            if not all(map(Tensor.data_ptr, weights)):  # they only stand for others; `pack` asks too
                return None
        else:
            packed = packing.pack(self._call if target < 0 else self._call._replace(target=target), weights, I)
            if packed is None:
                return None
        having = self._fixed
        if self._draws:  # last of all: a call that goes another way draws its own
            having = self._options.for_direction(self._stack, {}, x, T, B, training=True, resets_TB=None)
        if grad:
            y, *after = _apply(self, target, having, x, h_0, c_0, *weights)
            return y, tuple(after) if self._lstm else after[0]
        y, h_n, c_n = self.forward(target, having, x, h_0, c_0, weights, packed, None)
        return y, h_n if c_n is None else (h_n, c_n)

    def _shape(self, target: int, having: Options, T: int, B: int, weights: Sequence[Tensor]) -> tuple[float, ...]:
        """Return the fields of `ls_shape` and `ls_options`."""
        sizes = (T, B, self._I, self._H, self._projected, 0, 0, 0, self._code, 0, torch.get_num_threads(), target)
        if having is self._fixed and not self._vectors:
            return *sizes, *self._fixed_fields
        masks = address(having.h_mask_BH), address(having.zoneout_mask_TBH)
        vectors = calls.vector_fields(self._vectors, weights[self._num_plain :])
        return *sizes, *masks, having.zoneout, 0, 0, *vectors

    def _places(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return where a tensor laid as the input lies, and the floats from step to step and from row to row."""
        first, second, _ = tensor.stride()
        return (tensor.data_ptr(), second, first) if self.batch_first else (tensor.data_ptr(), first, second)

    def forward(
        self,
        target: int,
        having: Options,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        packed: Tensor | None,
        saved: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return y, h_n and of an LSTM c_n; arguments as of `ops.forward`, and checked before."""
        first, second, _ = x.shape
        T, B = (second, first) if self.batch_first else (first, second)
        H, P = self._H, self._P
        y, h_n = x.new_empty(first, second, P), x.new_empty(1, B, P)
        if T * B * P >= LARGE:  # asked here too: most are small, and a call costs more than the question
            prefer_large_pages(y)
        c_n = x.new_empty(1, B, H) if self._lstm else None
        fields = FORWARD.pack(
            *self._shape(target, having, T, B, weights),
            *self._places(x),
            *calls.weight_fields(self._bias, list(map(Tensor.data_ptr, weights[: self._num_plain]))),
            address(packed),
            address(h_0),
            address(c_0),
            *self._places(y),
            h_n.data_ptr(),
            address(c_n),
            address(saved),
            *(0, 0, 0),
        )
        calls.run(library.ls_forward, (fields, 1), self._cell)
        return y, h_n, c_n

    def backward(
        self,
        target: int,
        having: Options,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        y: Tensor,
        saved: Tensor,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h_0, c_0 and the weights, those that are `wanted`; the others None."""
        first, second, I = x.shape
        T, B = (second, first) if self.batch_first else (first, second)
        dx = x.new_empty(first, second, I) if wanted[0] else None
        if dx is not None and T * B * I >= LARGE:
            prefer_large_pages(dx)
        dh_0 = x.new_empty(1, B, self._P) if wanted[1] else None
        dc_0 = x.new_empty(1, B, self._H) if wanted[2] else None
        dweights = [Gradients.like(w) if want else None for w, want in zip(weights, wanted[3:], strict=True)]
        dy = None if dy is None else calls.rows(dy)
        dh_n = None if dh_n is None else calls.dense(dh_n)
        dc_n = None if dc_n is None else calls.dense(dc_n)
        fields = BACKWARD.pack(
            *self._shape(target, having, T, B, weights),
            *self._places(x),
            weights[0].data_ptr(),
            weights[1].data_ptr(),
            weights[self._num_plain - 1].data_ptr() if self._projected else 0,
            address(h_0),
            address(c_0),
            *self._places(y),
            saved.data_ptr(),
            *((0, 0, 0) if dy is None else self._places(dy)),
            address(dh_n),
            address(dc_n),
            0,
            *((0, 0, 0) if dx is None else self._places(dx)),
            *calls.weight_fields(self._bias, list(map(address, dweights[: self._num_plain]))),
            address(dh_0),
            address(dc_0),
            *calls.vector_fields(self._vectors, dweights[self._num_plain :]),
            *(0, 0, 0, 0, 0, 0),
        )
        calls.run(library.ls_backward, (fields, 1), self._cell, "_backward")
        return dx, dh_0, dc_0, *dweights

    def by_equations(
        self,
        target: int,
        having: Options,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return what `backward` returns, differentiable once more; `gradients` are those of y, h_n and c_n."""
        n = 1 + self._lstm
        asked = [*wanted[: 1 + n], *wanted[3:]]
        call = self._call._replace(target=target, options=(having,))
        found = native_backend.by_equations(call, x, (h_0, c_0)[:n], weights, gradients[: 1 + n], asked)
        return *found[: 1 + n], *[None] * (2 - n), *found[1 + n :]

    def saved_floats_a_row(self, target: int) -> int:
        """Return the floats that the forward pass saves for one row of one step."""
        return calls.saved_floats_a_row(self._cell, self._H, target, self._call.layer_norm)


class _LongshortQuickLayer(torch.autograd.Function):  # by its name `grad_fn` and anomalies show it
    """The usual call with gradients. Gradients of gradients go through the equations of `cells`."""

    @staticmethod
    def forward(
        ctx: Any,
        quick: Quick,
        target: int,
        having: Options,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        target = library.ls_active_target() if target < 0 else target
        saved = Saved(x.shape[0] * x.shape[1] * quick.saved_floats_a_row(target) + calls.SAVED_OF_ALL)
        y, h_n, c_n = quick.forward(target, having, x, h_0, c_0, weights, None, saved.tensor)
        ctx.quick, ctx.target, ctx.having = quick, target, having
        keep(ctx, (x, h_0, c_0, *weights), y, (saved,))
        ctx.set_materialize_grads(False)
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None = None) -> tuple[Any, ...]:
        (x, h_0, c_0, *weights), y, (saved,) = kept(ctx)
        quick, target, having, wanted = ctx.quick, ctx.target, ctx.having, ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not all(map(calls.is_readable, (dy, dh_n, dc_n))):
            found = quick.by_equations(target, having, x, h_0, c_0, weights, (dy, dh_n, dc_n), wanted)
        else:
            if y is None:
                y, _, _ = quick.forward(target, having, x, h_0, c_0, weights, None, torch.empty_like(saved))
            found = quick.backward(target, having, x, h_0, c_0, weights, y, saved, dy, dh_n, dc_n, wanted)
            release(ctx)
        return None, None, None, *found


_apply: Any = super(torch.autograd.Function, _LongshortQuickLayer).apply
"""`apply` without a look at each argument for transforms of torch.func: calls under these are not made here."""
