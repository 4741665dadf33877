"""Layers by the native kernels, with as little Python as can be.

    T  steps   B  rows   I  input width   H  hidden units   L  layers   D  directions   P  width of h: H, or what it is
    projected to

A step from Python costs more in checks than in arithmetic. What is written out here is what `native_backend` and `ops`
do for the usual call: float32 on a CPU, rows of one length or of several, no gates and no resets asked for. Layer k in
direction d is entry k D + d of weights, options and state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn import Parameter

from longshort import calls, masks, native, native_backend, packing, precision
from longshort.buffers import LARGE, Gradients, Saved, keep, kept, prefer_large_pages, release
from longshort.calls import BACKWARD, FORWARD, Call, address, library
from longshort.cells import Options, Sequences, Stack
from longshort.options import LayerOptions, read_lengths


class Having(NamedTuple):
    """What one call has beside tensors."""

    target: int
    """Number of the target, below 0 for the active one."""
    options: Sequence[Options]
    """Of each entry."""
    sequences: Sequences | None
    drops: Sequence[Tensor]
    """What the output of each layer but the last is multiplied by, laid as the input; empty: nothing is dropped."""


class Quick:
    """The short way of a stack of layers: makes the usual call, and leaves every other to the general path.

    Args:
        stack: the layers.
        names: of each entry, those of its weights among the module's parameters, and of its options' vectors.
        batch_first: as in the layer.
        options: of the layers: those that a kernel must know of, and `residual`.
        training: whether they act as in training.
    """

    def __init__(
        self, stack: Stack, names: Sequence[Sequence[str]], batch_first: bool, options: LayerOptions, training: bool
    ) -> None:
        self.batch_first, self.residual = batch_first, stack.residual
        self._stack, self._options, self._cell = stack, options, calls.cell_of(stack)
        self._code, self._lstm = native.LAYER_CELLS[self._cell], native.STATES[self._cell] == 2
        self._L, self._D, self._H = stack.num_layers, 1 + stack.bidirectional, stack.hidden_size
        self._P, self._projected, self._bias = stack.output_size, stack.proj_size, stack.bias
        vectors = options.parameter_sizes(stack)
        self._vectors = tuple(vectors)
        self._num_plain = len(stack.weight_shapes) // stack.num_directions
        each, D = self._num_plain + len(vectors), self._D
        self._layers = [
            (width, [(i, i % D, slice(i * each, (i + 1) * each)) for i in range(k * D, (k + 1) * D)])
            for k, width in enumerate([stack.input_size, *[D * self._P] * (self._L - 1)])
        ]
        """Of each layer the width of its input, and of its entries number, direction and which weights they have."""
        plain = iter(stack.weight_shapes)
        self._weights = tuple(
            (name, next(plain) if i < self._num_plain else (vectors[self._vectors[i - self._num_plain]],))
            for own in names
            for i, name in enumerate(own)
        )
        self._draws = training and bool(options.recurrent_dropout or options.zoneout)
        self._fixed = Options(zoneout=0.0 if training else options.zoneout, coupled=stack.coupled)
        self._fixed_fields = (0, 0, self._fixed.zoneout, 0, 0, *calls.NO_VECTORS)
        self._having: dict[int, Having] = {}
        """By target: what a call has that has nothing of its own."""
        fixed = (self._cell, self._H, self._D, stack.bias, batch_first, None, (self._fixed,) * self._D, -1)
        self._call = Call(*fixed, self._vectors, projected=stack.proj_size)
        self._normal = self._call.layer_norm

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
        float32 = torch.float32
        if type(x) is not Tensor or x.dtype is not float32 or x.dim() != 3 or not x.is_cpu or x.stride(2) != 1:
            return None
        if x.is_neg() or is_functorch_wrapped_tensor(x) or not x.data_ptr():
            return None
        T, B, I = x.shape
        if self.batch_first:
            T, B = B, T
        if not T or not B or self._stack.input_size != I:
            return None
        state = (None, None) if hx is None else self._state(hx, B)
        if state is None:
            return None
        h_0, c_0 = state
        weights = []
        for name, shape in self._weights:
            weight = parameters.get(name)
            if type(weight) is not Parameter or weight.dtype is not float32 or weight.shape != shape:
                return None
            if not (weight.is_cpu and weight.is_contiguous()) or weight.is_neg():
                return None
            weights.append(weight)
        grad = torch.is_grad_enabled() and (  # first what is true of most
            (weights[0].requires_grad and not torch.is_inference_mode_enabled())
            or calls.differentiates(x, *state, *weights)
        )
        if target < 0 and precision.allowed() != precision.EXACT:
            target = calls.resolved(target, T, B, self._H)
        if grad:
            if not all(map(Tensor.data_ptr, weights)):  # they only stand for others; `pack` asks too
                return None
            if target < 0:  # the backward pass has to know what the forward pass was
                target = library.ls_active_target()
            packed = None
        else:
            packed = self._pack(target, weights)
            if packed is None:
                return None
        having = self._having.get(target)
        if having is None or lengths is not None or self._draws or dropout:
            having = self._have(target, x, T, B, lengths, dropout)
        if grad:
            found = _apply(self, having, x, h_0, c_0, *weights)
        else:
            found, _ = self.forward(having, x, h_0, c_0, weights, packed, None)
        return (found[0], found[1:]) if self._lstm else found

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

    def _pack(self, target: int, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the packed weights of each entry; None where they cannot be kept."""
        call, found = self._call if target < 0 else self._call._replace(target=target), []
        for I, entries in self._layers:
            for _, _, part in entries:
                packed = packing.pack(call, weights[part], I)
                if packed is None:
                    return None
                found.append(packed)
        return found

    def _have(self, target: int, x: Tensor, T: int, B: int, lengths: Any, dropout: float) -> Having:
        """Return what a call has, with new masks, in the order in which the general path draws them."""
        sequences = None if lengths is None else read_lengths(lengths, T, B)
        stack, L, width = self._stack, self._L, self._D * self._P
        options = [self._fixed] * stack.num_directions
        if self._draws:
            draw = self._options.for_direction
            options = [draw(stack, {}, x, T, B, training=True, resets_TB=None) for _ in options]
        drops = [masks.dropout_mask((T, B, width), dropout, x) for _ in range(L - 1 if dropout else 0)]
        having = Having(target, options, sequences, [m.transpose(0, 1) for m in drops] if self.batch_first else drops)
        if sequences is None and not (self._draws or drops):
            self._having[target] = having
        return having

    def _shape(
        self, having: Having, T: int, B: int, I: int, i: int, d: int, weights: Sequence[Tensor]
    ) -> tuple[float, ...]:
        """Return the fields of `ls_shape` and `ls_options` of entry i, which is of direction d."""
        sequences, counts, order = having.sequences, 0, 0
        if sequences is not None:
            counts, order = sequences.counts.data_ptr(), address(sequences.order)
        fixed = (self._projected, counts, 0, order, self._code, d, torch.get_num_threads(), having.target)
        options = having.options[i]
        if options is self._fixed and not self._vectors:
            return T, B, I, self._H, *fixed, *self._fixed_fields
        drawn = address(options.h_mask_BH), address(options.zoneout_mask_TBH)
        vectors = calls.vector_fields(self._vectors, weights[self._num_plain :])
        return T, B, I, self._H, *fixed, *drawn, options.zoneout, 0, 0, *vectors

    def _places(self, tensor: Tensor) -> tuple[int, int, int]:
        """Return where a tensor laid as the input lies, and the floats from step to step and from row to row."""
        first, second, _ = tensor.stride()
        return (tensor.data_ptr(), second, first) if self.batch_first else (tensor.data_ptr(), first, second)

    def forward(
        self,
        having: Having,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        packed: Sequence[Tensor] | None,
        saved: Sequence[Tensor] | None,
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Run the layers.

        Args:
            having: what the call has.
            x: input.
            h_0: state before the first step; zeros if None.
            c_0: likewise, of an LSTM.
            weights: of each entry, with its vectors.
            packed: of each entry; None: they are packed in the call.
            saved: of each entry what `backward` needs, as `ops.forward` fills it; None: nothing is saved.

        Returns:
            The output, h_n and of an LSTM c_n; and, where anything is saved, of each layer what it read and what it put
            out, one after the other.
        """
        first, second, _ = x.shape
        T, B = (second, first) if self.batch_first else (first, second)
        H, P, D, plain = self._H, self._P, self._D, self._num_plain
        width, last = D * P, self._L - 1
        between: list[Tensor] = []
        h_n = x.new_empty(self._L * D, B, P)
        c_n = x.new_empty(self._L * D, B, H) if self._lstm else None
        place_h0 = 0 if h_0 is None else h_0.data_ptr()
        place_c0 = 0 if c_0 is None else c_0.data_ptr()
        place_c = 0 if c_n is None else c_n.data_ptr()
        place_h = h_n.data_ptr()
        size_h, size_c = 4 * B * P, 4 * B * H
        y_step, y_row = (width, second * width) if self.batch_first else (second * width, width)
        for k, (I, entries) in enumerate(self._layers):
            y = x.new_empty(first, second, width)
            if T * B * width >= LARGE:  # asked here too: most are small, and a call costs more than the question
                prefer_large_pages(y)
            of_x, place_y, fields = self._places(x), y.data_ptr(), b""
            for i, d, part in entries:
                own = weights[part]
                fields += FORWARD.pack(
                    *self._shape(having, T, B, I, i, d, own),
                    *of_x,
                    *(_UNREAD if packed else calls.weight_fields(self._bias, list(map(Tensor.data_ptr, own[:plain])))),
                    packed[i].data_ptr() if packed else 0,
                    place_h0 and place_h0 + i * size_h,
                    place_c0 and place_c0 + i * size_c,
                    place_y + 4 * d * P,
                    y_step,
                    y_row,
                    place_h + i * size_h,
                    place_c and place_c + i * size_c,
                    saved[i].data_ptr() if saved else 0,
                    *(0, 0, 0),
                )
            calls.run(library.ls_forward, (fields, D), self._cell)
            if saved:  # else each is let go of as soon as the next layer has read it
                between += (x, y)
            x = x + y if k and self.residual else y
            if k < last and having.drops:
                x = calls.rows(x * having.drops[k])
        return (x, h_n) if c_n is None else (x, h_n, c_n), between

    def backward(
        self,
        having: Having,
        between: Sequence[Tensor],
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        saved: Sequence[Tensor],
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, h_0, c_0 and the weights, those that are `wanted`; the others None.

        Args:
            having: as in `forward`.
            between: what it returned.
            h_0: as there.
            c_0: as there.
            weights: as there.
            saved: as it was filled.
            dy: gradient of the output; zeros if None.
            dh_n: of h_n.
            dc_n: of c_n.
            wanted: one entry for each gradient.
        """
        first, second, _ = between[0].shape
        T, B = (second, first) if self.batch_first else (first, second)
        P, D, plain, vectors = self._P, self._D, self._num_plain, self._vectors
        dh_0 = torch.empty_like(h_0) if h_0 is not None and wanted[1] else None
        dc_0 = torch.empty_like(c_0) if c_0 is not None and wanted[2] else None
        dweights = [Gradients.like(w) if want else None for w, want in zip(weights, wanted[3:], strict=True)]
        dh_n = None if dh_n is None else calls.dense(dh_n)
        dc_n = None if dc_n is None else calls.dense(dc_n)
        place_h0, place_c0, place_dh0, place_dc0 = address(h_0), address(c_0), address(dh_0), address(dc_0)
        place_dh, place_dc = address(dh_n), address(dc_n)
        size_h, size_c = 4 * B * P, 4 * B * self._H
        lowest, dx = self._lowest(wanted) if self._L > 1 else 0, None
        for k in range(self._L - 1, lowest - 1, -1):
            x, y = between[2 * k], between[2 * k + 1]
            I, entries = self._layers[k]
            dx = x.new_empty(first, second, I) if k > lowest or wanted[0] else None
            if dx is not None and T * B * I >= LARGE:
                prefer_large_pages(dx)
            of_x, of_dx = self._places(x), (0, 0, 0) if dx is None else self._places(dx)
            place_y, y_step, y_row = self._places(y)
            place_dy = dy_step = dy_row = 0
            if dy is not None:
                dy = calls.rows(dy)
                place_dy, dy_step, dy_row = self._places(dy)
            fields = b""
            for i, d, part in entries:
                own, down = weights[part], dweights[part]
                fields += BACKWARD.pack(
                    *self._shape(having, T, B, I, i, d, own),
                    *of_x,
                    own[0].data_ptr(),
                    own[1].data_ptr(),
                    own[plain - 1].data_ptr() if self._projected else 0,
                    place_h0 and place_h0 + i * size_h,
                    place_c0 and place_c0 + i * size_c,
                    place_y + 4 * d * P,
                    y_step,
                    y_row,
                    saved[i].data_ptr(),
                    place_dy and place_dy + 4 * d * P,
                    dy_step,
                    dy_row,
                    place_dh and place_dh + i * size_h,
                    place_dc and place_dc + i * size_c,
                    0,
                    *of_dx,
                    *calls.weight_fields(self._bias, list(map(address, down[:plain]))),
                    place_dh0 and place_dh0 + i * size_h,
                    place_dc0 and place_dc0 + i * size_c,
                    *(calls.vector_fields(vectors, down[plain:]) if vectors else calls.NO_VECTORS),
                    *(d, 0, 0, 0, 0, 0),
                )
            calls.run(library.ls_backward, (fields, D), self._cell, "_backward")
            if dx is not None and k:
                if self.residual and dy is not None:
                    dx.add_(dy)
                if having.drops:
                    dx.mul_(having.drops[k - 1])
            dy = dx
        return (dx if wanted[0] else None), dh_0, dc_0, *dweights

    def _lowest(self, wanted: Sequence[bool]) -> int:
        """Return the lowest layer that has a gradient which is wanted."""
        if any(wanted[:3]):
            return 0
        return (wanted.index(True, 3) - 3) * self._L // len(self._weights)

    def by_equations(
        self,
        having: Having,
        x: Tensor,
        h_0: Tensor | None,
        c_0: Tensor | None,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        wanted: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """Return what `backward` returns, differentiable once more; `gradients` are those of output, h_n and c_n."""
        after = []
        with native_backend.equations(x, h_0, c_0, *weights) as inputs:
            x, state, weights = inputs[0], [each for each in inputs[1:3] if each is not None], inputs[3:]
            for k, (_, entries) in enumerate(self._layers):
                here = slice(entries[0][0], entries[-1][0] + 1)
                call = self._call._replace(options=having.options[here], sequences=having.sequences)
                own = [weight for _, _, part in entries for weight in weights[part]]
                y, *last = native_backend.run_equations(call, x, [tensor[here] for tensor in state], own)
                after.append(last)
                x = x + y if k and self.residual else y
                x = x * having.drops[k] if having.drops and k + 1 < self._L else x
            outputs = (x, *map(torch.cat, zip(*after, strict=True)))
        return (*native_backend.differentiate(outputs, gradients[: len(outputs)], inputs, wanted),)

    def saved_floats(self, having: Having, x: Tensor) -> int:
        """Return the floats that the forward pass saves for each entry."""
        rows = x.shape[0] * x.shape[1]
        if having.sequences is not None:
            rows = int(having.sequences.counts.numpy().sum())  # PyTorch's sum takes twice as long
        return rows * calls.saved_floats_a_row(self._cell, self._H, having.target, self._normal) + calls.SAVED_OF_ALL


_UNREAD = (0,) * 5
"""Where weights lie that nobody reads, since they are packed."""


class _LongshortQuickLayer(torch.autograd.Function):  # by its name `grad_fn` and anomalies show it
    """The usual call with gradients. Gradients of gradients go through the equations of `cells`."""

    @staticmethod
    def forward(
        ctx: Any, quick: Quick, having: Having, x: Tensor, h_0: Tensor | None, c_0: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        floats = quick.saved_floats(having, x)
        saved = [Saved(floats) for _ in having.options]
        found, between = quick.forward(having, x, h_0, c_0, weights, None, [each.tensor for each in saved])
        ctx.quick, ctx.having = quick, having
        inner = between[1:-1] if having.drops or quick.residual else between[1:-1:2]  # what one reads the last has made
        keep(ctx, (x, h_0, c_0, *weights, *inner), between[-1], saved)
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None = None) -> tuple[Any, ...]:
        (x, h_0, c_0, *rest), y, saved = kept(ctx)
        quick, having, wanted = ctx.quick, ctx.having, ctx.needs_input_grad[2:]
        weights, between = rest, [x, y]
        if (count := len(wanted) - 3) < len(rest):
            weights, inner = rest[:count], rest[count:]
            between = [x, *(inner if having.drops or quick.residual else [each for each in inner for _ in range(2)]), y]
        if torch.is_grad_enabled() or not all(map(calls.is_readable, (dy, dh_n, dc_n))):
            found = quick.by_equations(having, x, h_0, c_0, weights, (dy, dh_n, dc_n), wanted)
        else:
            if y is None:
                again = [torch.empty_like(each) for each in saved]
                _, between = quick.forward(having, x, h_0, c_0, weights, None, again)
            found = quick.backward(having, between, h_0, c_0, weights, saved, dy, dh_n, dc_n, wanted)
            release(ctx)
        return None, None, *found


_apply: Any = super(torch.autograd.Function, _LongshortQuickLayer).apply
"""`apply` without a look at each argument for transforms of torch.func: calls under these are not made here."""
