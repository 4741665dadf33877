"""Layers by the native kernels, with as little Python as can be.

    T  steps   B  rows   I  input width   H  hidden units   G  gates times H   L  layers   D  directions
    P  width of h: H, or what it is projected to

A step from Python costs more in checks than in arithmetic. What is written out here is what `ops` does for the usual
call: float32 on a CPU, rows of one length or of several, no gates and no resets asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

from longshort import backends, calls, native, native_backend, packing
from longshort.buffers import LARGE, Gradients, Saved, keep, kept, prefer_large_pages, release
from longshort.calls import BACKWARD, FORWARD, Call, address, library
from longshort.cells import Options, Sequences, Stack
from longshort.options import LayerOptions, read_lengths


class Quick:
    """The short way of a stack of layers: makes the usual call, and leaves every other to the general path.

    Args:
        stack: the layers.
        names: of each layer and direction, those of its weights among the module's parameters, and of its options'
            vectors.
        batch_first: as in the layer.
        options: of the layers: those that a kernel must know of, and `residual`.
        training: whether they act as in training.
    """

    def __init__(
        self, stack: Stack, names: Sequence[Sequence[str]], batch_first: bool, options: LayerOptions, training: bool
    ) -> None:
        self.batch_first = batch_first
        self._stack, self._options = stack, options
        self._L, self._D, self._I = stack.num_layers, 1 + stack.bidirectional, stack.input_size
        self._H, self._P, self._lstm = stack.hidden_size, stack.output_size, len(stack.state_sizes) == 2
        self._draws = training and bool(options.recurrent_dropout or options.zoneout)
        fixed = Options(zoneout=0.0 if training else options.zoneout, coupled=stack.coupled)
        self._fixed = [fixed] * stack.num_directions
        self._having: dict[int, list[_Having]] = {}
        vectors = options.parameter_sizes(stack)
        self._layers = [
            _Layer(
                replace(
                    stack,
                    input_size=self._D * stack.output_size if layer else stack.input_size,
                    num_layers=1,
                    residual=False,
                ),
                tuple(vectors),
                batch_first,
                fixed,
            )
            for layer in range(self._L)
        ]
        plain = iter(stack.weight_shapes)
        of_vectors = [(size,) for size in vectors.values()]
        self._weights = tuple(
            (name, shape)
            for own in names
            for name, shape in zip(own, [*(next(plain) for _ in own[len(of_vectors) :]), *of_vectors], strict=True)
        )
        self._each = len(self._weights) // self._L

    def __call__(
        self, parameters: Mapping[str, Tensor | None], x: Any, hx: Any, target: int, lengths: Any, dropout: float
    ) -> Any:
        """Return what the layers return, or None where this is not the usual call.

        Args:
            parameters: of the module.
            x: its input.
            hx: its state before the first step.
            target: number of the target that is forced, or -1.
            lengths: of the rows; None: all have all steps.
            dropout: between layers.
        """
        L, D, float32 = self._L, self._D, torch.float32
        if type(x) is not Tensor or x.dtype is not float32 or x.dim() != 3 or not x.is_cpu or x.stride(2) != 1:
            return None
        if x.is_neg() or is_functorch_wrapped_tensor(x) or not x.data_ptr():
            return None
        T, B, I = x.shape
        if self.batch_first:
            T, B = B, T
        if not T or not B or self._I != I:
            return None
        state = (None, None) if hx is None else self._state(hx, B)
        if state is None:
            return None
        weights = []
        for name, shape in self._weights:
            weight = parameters.get(name)
            if type(weight) is not Parameter or weight.dtype is not float32 or weight.shape != shape:
                return None
            if not (weight.is_cpu and weight.is_contiguous()) or weight.is_neg():
                return None
            weights.append(weight)
        grad = torch.is_grad_enabled() and (
            weights[0].requires_grad
            or any(tensor.requires_grad for tensor in (x, *state, *weights) if tensor is not None)
        )
        if grad and not all(map(Tensor.data_ptr, weights)):  # they only stand for others; `pack` asks too
            return None
        target = calls.resolved(target, T, B, self._H)
        if grad and target < 0:  # the backward pass has to know what the forward pass was
            target = library.ls_active_target()
        layers, n = self._layers, self._each
        if L == 1:
            of_layers, packed = [weights], [None if grad else layers[0].pack(target, weights)]
        else:
            of_layers = [weights[k * n : (k + 1) * n] for k in range(L)]
            packed = [None if grad else layers[k].pack(target, of_layers[k]) for k in range(L)]
        if not grad and None in packed:
            return None
        having = self._having.get(target)
        if having is None or lengths is not None or self._draws:
            having = self._have(target, x, T, B, lengths)
        after = []
        for k, layer in enumerate(layers):
            h_0, c_0 = state
            if L > 1:
                h_0, c_0 = [tensor if tensor is None else tensor[k * D : (k + 1) * D] for tensor in state]
            if grad:
                found = _apply(layer, having[k], x, h_0, c_0, *of_layers[k])
            else:
                found = layer.forward(having[k], x, h_0, c_0, of_layers[k], packed[k], None)
            if L == 1:
                return (found[0], found[1:]) if self._lstm else found
            after.append(found[1:])
            x = calls.rows(x + found[0]) if k and self._stack.residual else found[0]
            if dropout and k < L - 1:
                x = calls.rows(backends.drop_between(x, dropout, self.batch_first, having[k].sequences))
        states = tuple([torch.cat(tensors) for tensors in zip(*after, strict=True)])
        return x, states if self._lstm else states[0]

    def _state(self, hx: Any, B: int) -> tuple[Any, Any] | None:
        """Return h_0 and c_0, None of a cell that has none; None where they are not the usual ones."""
        state = hx if self._lstm else (hx,)
        if type(state) is not tuple or len(state) != 1 + self._lstm:
            return None
        width, entries, float32 = self._P, self._L * self._D, torch.float32
        for tensor in state:
            if type(tensor) is not Tensor or tensor.dtype is not float32 or tensor.shape != (entries, B, width):
                return None
            if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_neg():
                return None
            if is_functorch_wrapped_tensor(tensor) or not tensor.data_ptr():
                return None
            width = self._H
        return state if self._lstm else (hx, None)

    def _have(self, target: int, x: Tensor, T: int, B: int, lengths: Any) -> list[_Having]:
        """Return what each layer has in a call, with new masks; what has nothing of its own is kept for the next."""
        sequences = None if lengths is None else read_lengths(lengths, T, B)
        options, stack, D = self._options, self._stack, self._D
        each = self._fixed
        if self._draws:
            each = [
                options.for_direction(stack, {}, x, T, B, training=True, resets_TB=None)
                for _ in range(stack.num_directions)
            ]
        having = [_Having(target, (*each[k : k + D],), sequences) for k in range(0, len(each), D)]
        if sequences is None and not self._draws:
            self._having[target] = having
        return having


_UNREAD = (0,) * 5
"""Where weights lie that nobody reads, since they are packed."""


class _Having(NamedTuple):
    """What one call of a layer has beside tensors."""

    target: int
    """Number of the target, below 0 for the active one."""
    options: Sequence[Options]
    """Of each direction."""
    sequences: Sequences | None


class _Layer:
    """One layer in its directions."""

    def __init__(self, stack: Stack, vectors: tuple[str, ...], batch_first: bool, fixed: Options) -> None:
        self.batch_first, self._fixed, self._vectors = batch_first, fixed, vectors
        self._cell, self._I, self._H, self._bias = calls.cell_of(stack), stack.input_size, stack.hidden_size, stack.bias
        self._code, self._lstm = native.LAYER_CELLS[self._cell], native.STATES[self._cell] == 2
        self._P, self._projected, self._D = stack.output_size, stack.proj_size, 1 + stack.bidirectional
        self._num_plain = len(stack.weight_shapes) // self._D
        self._each = self._num_plain + len(vectors)
        self._fixed_fields = (0, 0, fixed.zoneout, 0, 0, *calls.NO_VECTORS)
        plain = (self._cell, self._H, self._D, stack.bias, batch_first, None, (fixed,) * self._D, -1, vectors)
        self._call = Call(*plain, projected=stack.proj_size)
        self._normalised = self._call.layer_norm

    def pack(self, target: int, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the packed weights of each direction; None where they cannot be kept."""
        call, n = self._call if target < 0 else self._call._replace(target=target), self._each
        if self._D == 1:
            alone = packing.pack(call, weights, self._I)
            return None if alone is None else [alone]
        found = []
        for d in range(self._D):
            packed = packing.pack(call, weights[d * n : (d + 1) * n], self._I)
            if packed is None:
                return None
            found.append(packed)
        return found

    def _shape(self, having: _Having, T: int, B: int, d: int, weights: Sequence[Tensor]) -> tuple[float, ...]:
        """Return the fields of `ls_shape` and `ls_options` of a direction."""
        sequences, counts, order = having.sequences, 0, 0
        if sequences is not None:
            counts, order = sequences.counts.data_ptr(), address(sequences.order)
        threads = torch.get_num_threads()
        sizes = (T, B, self._I, self._H, self._projected, counts, 0, order, self._code, d, threads, having.target)
        options = having.options[d]
        if options is self._fixed and not self._vectors:
            return *sizes, *self._fixed_fields
        masks = address(options.h_mask_BH), address(options.zoneout_mask_TBH)
        vectors = calls.vector_fields(self._vectors, weights[self._num_plain :])
        return *sizes, *masks, options.zoneout, 0, 0, *vectors

    def _places(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return where a tensor laid as the input lies, and the floats from step to step and from row to row."""
        first, second, _ = tensor.stride()
        return (tensor.data_ptr(), second, first) if self.batch_first else (tensor.data_ptr(), first, second)

    def forward(
        self,
        having: _Having,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        packed: Sequence[Tensor] | None,
        saved: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """Return y, h_n and of an LSTM c_n."""
        first, second, _ = x.shape
        T, B = (second, first) if self.batch_first else (first, second)
        H, P, D, n = self._H, self._P, self._D, self._each
        width = D * P
        y, h_n = x.new_empty(first, second, width), x.new_empty(D, B, P)
        if T * B * width >= LARGE:  # asked here too: most are small, and a call costs more than the question
            prefer_large_pages(y)
        c_n = x.new_empty(D, B, H) if self._lstm else None
        of_x, place_y, place_h = self._places(x), y.data_ptr(), h_n.data_ptr()
        y_step, y_row = (width, second * width) if self.batch_first else (second * width, width)
        fields = b""
        for d in range(D):
            own = weights if D == 1 else weights[d * n : (d + 1) * n]
            of_h, of_c = 4 * d * B * P, 4 * d * B * H
            fields += FORWARD.pack(
                *self._shape(having, T, B, d, own),
                *of_x,
                *(
                    _UNREAD
                    if packed
                    else calls.weight_fields(self._bias, list(map(Tensor.data_ptr, own[: self._num_plain])))
                ),
                packed[d].data_ptr() if packed else 0,
                0 if h_0 is None else h_0.data_ptr() + of_h,
                0 if c_0 is None else c_0.data_ptr() + of_c,
                place_y + 4 * d * P,
                y_step,
                y_row,
                place_h + of_h,
                0 if c_n is None else c_n.data_ptr() + of_c,
                0 if saved is None else saved[d].data_ptr(),
                *(0, 0, 0),
            )
        calls.run(library.ls_forward, (fields, D), self._cell)
        return (y, h_n) if c_n is None else (y, h_n, c_n)

    def backward(
        self,
        having: _Having,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        y: Tensor,
        saved: Sequence[Tensor],
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h_0, c_0 and the weights, those that are `wanted`; the others None."""
        first, second, I = x.shape
        T, B = (second, first) if self.batch_first else (first, second)
        H, P, D, n = self._H, self._P, self._D, self._each
        dx = x.new_empty(first, second, I) if wanted[0] else None
        if dx is not None and T * B * I >= LARGE:
            prefer_large_pages(dx)
        dh_0 = x.new_empty(D, B, P) if wanted[1] else None
        dc_0 = x.new_empty(D, B, H) if wanted[2] else None
        dweights = [Gradients.like(w) if want else None for w, want in zip(weights, wanted[3:], strict=True)]
        dh_n = None if dh_n is None else calls.dense(dh_n)
        dc_n = None if dc_n is None else calls.dense(dc_n)
        of_x, of_dx = self._places(x), (0, 0, 0) if dx is None else self._places(dx)
        place_y, y_step, y_row = self._places(y)
        place_dy, dy_step, dy_row = 0, 0, 0
        if dy is not None:
            dy = calls.rows(dy)
            place_dy, dy_step, dy_row = self._places(dy)
        fields = b""
        for d in range(D):
            own, down = (weights, dweights) if D == 1 else (weights[d * n : (d + 1) * n], dweights[d * n : (d + 1) * n])
            of_y, of_h, of_c = 4 * d * P, 4 * d * B * P, 4 * d * B * H
            fields += BACKWARD.pack(
                *self._shape(having, T, B, d, own),
                *of_x,
                own[0].data_ptr(),
                own[1].data_ptr(),
                own[self._num_plain - 1].data_ptr() if self._projected else 0,
                0 if h_0 is None else h_0.data_ptr() + of_h,
                0 if c_0 is None else c_0.data_ptr() + of_c,
                place_y + of_y,
                y_step,
                y_row,
                saved[d].data_ptr(),
                0 if dy is None else place_dy + of_y,
                dy_step,
                dy_row,
                0 if dh_n is None else dh_n.data_ptr() + of_h,
                0 if dc_n is None else dc_n.data_ptr() + of_c,
                0,
                *of_dx,
                *calls.weight_fields(self._bias, list(map(address, down[: self._num_plain]))),
                0 if dh_0 is None else dh_0.data_ptr() + of_h,
                0 if dc_0 is None else dc_0.data_ptr() + of_c,
                *calls.vector_fields(self._vectors, down[self._num_plain :]),
                *(d, 0, 0, 0, 0, 0),
            )
        calls.run(library.ls_backward, (fields, D), self._cell, "_backward")
        return dx, dh_0, dc_0, *dweights

    def by_equations(
        self,
        having: _Having,
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
        call = self._call._replace(target=having.target, options=having.options, sequences=having.sequences)
        found = native_backend.by_equations(call, x, (h_0, c_0)[:n], weights, gradients[: 1 + n], asked)
        return *found[: 1 + n], *[None] * (2 - n), *found[1 + n :]

    def saved_floats(self, having: _Having, x: Tensor) -> int:
        """Return the floats that the forward pass saves in each direction."""
        rows = x.shape[0] * x.shape[1]
        if having.sequences is not None:
            rows = int(having.sequences.counts.numpy().sum())  # PyTorch's sum takes twice as long
        each = calls.saved_floats_a_row(self._cell, self._H, having.target, self._normalised)
        return rows * each + calls.SAVED_OF_ALL


class _LongshortQuickLayer(torch.autograd.Function):  # by its name `grad_fn` and anomalies show it
    """The usual call with gradients. Gradients of gradients go through the equations of `cells`."""

    @staticmethod
    def forward(
        ctx: Any, layer: _Layer, having: _Having, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        floats = layer.saved_floats(having, x)
        saved = [Saved(floats) for _ in having.options]
        found = layer.forward(having, x, h_0, c_0, weights, None, [each.tensor for each in saved])
        ctx.layer, ctx.having = layer, having
        keep(ctx, (x, h_0, c_0, *weights), found[0], saved)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None = None) -> tuple[Any, ...]:
        (x, h_0, c_0, *weights), y, saved = kept(ctx)
        layer, having, wanted = ctx.layer, ctx.having, ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or not all(map(calls.is_readable, (dy, dh_n, dc_n))):
            found = layer.by_equations(having, x, h_0, c_0, weights, (dy, dh_n, dc_n), wanted)
        else:
            if y is None:
                again = [torch.empty_like(each) for each in saved]
                y, *_ = layer.forward(having, x, h_0, c_0, weights, None, again)
            found = layer.backward(having, x, h_0, c_0, weights, y, saved, dy, dh_n, dc_n, wanted)
            release(ctx)
        return None, None, *found


_apply: Any = super(torch.autograd.Function, _LongshortQuickLayer).apply
"""`apply` without a look at each argument for transforms of torch.func: calls under these are not made here."""
