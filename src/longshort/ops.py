"""The native kernels as PyTorch operations: tensors in and out, gradients, packed weights that are kept.

    T  steps   B  rows   N  steps of all rows   I  input width   H  hidden units   G  gates times H   D  directions
    P  width of h: H, or what it is projected to

A call runs one layer after the other, each direction of a layer by one call of the library (`csrc/longshort.h`). Eager
calls go straight to it; under torch.compile and torch.export the layer is the registered operation
`longshort::layer`, one node in the graph. `kernels` decides what comes here: float32 on a CPU, checked before.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor, unwrap_if_dead
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.profiler import record_function

from longshort import backends, buffers, cells, native, precision
from longshort.cells import VECTORS, Options, Readings, Sequences, Stack, State
from longshort.native_model import LossArgs

CAN = frozenset(
    {"packed", "lengths", "resets", "return_gates", "proj_size"}
    | {"recurrent_dropout", "zoneout", "layer_norm", "peephole", "coupled_gates"}
)
"""What a call may have beyond a plain layer."""

# The library's structures, written by one call: ctypes fields cost 60 ns each, and there are forty.
_SHAPE, _OPTIONS = "5q3P4i", "PPfi8P"
FORWARD = struct.Struct(f"@{_SHAPE}{_OPTIONS}Pqq9Pqq3PPPq")
BACKWARD = struct.Struct(f"@{_SHAPE}{_OPTIONS}Pqq6PqqPPqq4Pqq14PiiPPqP")
_WEIGHTS = struct.Struct("@3q2i5P")
_SHAPE_ALONE = struct.Struct(f"@{_SHAPE}")


def _load() -> Any:
    library = native.library()
    if library is not None and library.ls_set_threading(1):
        library.ls_set_threading(0)  # a PyTorch without OpenMP
    return library


library = _load()
TARGETS = {name: number for number, name in enumerate(native.built_targets())}
"""The library's number of each target; empty without a library."""
SUPPORTED = native.targets()
"""The targets that this processor can run, best first."""


def resolved(target: int, steps: int, rows: int, units: int) -> int:
    """Return `target`; of those below 0 what PyTorch's switches allow for T, B and H, else -1, the active one."""
    name = None if target >= 0 else precision.target(steps, rows, units)
    return max(target, -1) if name is None else TARGETS[name]


class Call(NamedTuple):
    """What one layer's forward and backward pass have in common, beside tensors.

    With `ids` the layer reads symbols, and a table takes the place of x everywhere: what each symbol gives the gates
    without biases, (V + 1, G). The first of the weights is then empty.
    """

    cell: str
    """One of `native.LAYER_CELLS`."""
    H: int
    directions: int
    bias: bool
    batch_first: bool
    sequences: Sequences | None
    options: Sequence[Options]
    target: int
    """Number of the target, below 0 for the active one; see `resolved`."""
    vectors: tuple[str, ...] = ()
    """Those of `cells.VECTORS` that follow each direction's weights, in their order."""
    ids: Tensor | None = None
    """(T, B), int64, contiguous."""
    shows: bool = False
    """Whether the gates are wanted too."""
    projected: int = 0
    """P, where an LSTM projects h; 0 where it does not."""

    def size(self, x: Tensor) -> tuple[int, int]:
        """Return T and B."""
        if self.ids is not None:
            return self.ids.shape[0], self.ids.shape[1]
        if self.sequences is not None:
            return len(self.sequences.counts), self.sequences.batch_size
        return (x.shape[1], x.shape[0]) if self.batch_first else (x.shape[0], x.shape[1])

    def resolved(self, x: Tensor) -> Call:
        """Return the call with the number of the target that it has now, where it has none."""
        if self.target >= 0:
            return self
        number = resolved(-1, *self.size(x), self.H)
        return self._replace(target=library.ls_active_target() if number < 0 else number)

    def strides(self, x: Tensor) -> tuple[int, int]:
        """Return the floats from one step to the next, and from one row to the next."""
        if x.dim() == 2:
            return 0, x.stride(0)
        return (x.stride(1), x.stride(0)) if self.batch_first else (x.stride(0), x.stride(1))

    def shape(self, x: Tensor, direction: int) -> tuple[int, ...]:
        """Return the fields of `ls_shape`."""
        T, B = self.size(x)
        sequences, counts, starts, order = self.sequences, 0, 0, 0
        if sequences is not None:
            counts = sequences.counts.data_ptr()
            order = 0 if sequences.order is None else sequences.order.data_ptr()
            starts = sequences.starts.data_ptr() if sequences.packed else 0
        code, threads = native.LAYER_CELLS[self.cell], torch.get_num_threads()
        I = 0 if self.ids is not None else x.shape[-1]
        return T, B, I, self.H, self.projected, counts, starts, order, code, direction, threads, self.target

    def tokens(self, table: Tensor) -> tuple[int, int, int]:
        """Return the fields of `ls_tokens`."""
        return (0, 0, 0) if self.ids is None else (table.data_ptr(), self.ids.data_ptr(), len(table) - 1)

    @property
    def num_plain(self) -> int:
        """Return the number of a direction's weights, without the vectors that may follow them."""
        return (4 if self.bias else 2) + (self.projected > 0)

    @property
    def P(self) -> int:
        """Return the width of h."""
        return self.projected or self.H

    @property
    def num_states(self) -> int:
        """Return the number of tensors that the state has."""
        return native.STATES[self.cell]

    @property
    def layer_norm(self) -> bool:
        """Return whether the layer is normalised."""
        return "gamma_ih" in self.vectors

    def option_fields(self, direction: int, weights: Sequence[Tensor]) -> tuple[float, ...]:
        """Return the fields of `ls_options`; the tensors are contiguous and live as long as this call."""
        vectors = vector_fields(self.vectors, weights[self.num_plain :])
        if not self.options:
            return 0, 0, 0.0, 0, 0, *vectors
        options = self.options[direction]
        masks = (options.h_mask_BH, options.zoneout_mask_TBH, options.resets_TB)
        h_mask, zoneout_mask, resets = (0 if mask is None else mask.data_ptr() for mask in masks)
        return h_mask, zoneout_mask, options.zoneout, 0, resets, *vectors


def address(tensor: Tensor | None) -> int:
    """Return where a tensor's memory is, as the library takes it: 0 of None."""
    return 0 if tensor is None else tensor.data_ptr()


NO_VECTORS = (0,) * len(VECTORS)
"""What `vector_fields` returns where there are none."""


def weight_fields(bias: bool, places: Sequence[int]) -> Sequence[int]:
    """Return where weight_ih, weight_hh, bias_ih, bias_hh and weight_hr lie; 0 of those that there are not.

    Args:
        bias: whether there are biases.
        places: of those that there are, in PyTorch's order, which is this one.
    """
    if not bias:
        places = (*places[:2], 0, 0, *places[2:])
    return places if len(places) == 5 else (*places, 0)


def vector_fields(names: Sequence[str], tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    """Return where the tensors of these names lie, in the order of `cells.VECTORS`; 0 of those that there are not."""
    if not names:
        return NO_VECTORS
    places = dict(zip(names, map(address, tensors), strict=True))
    return tuple(places.get(name, 0) for name in VECTORS)


def check(status: int) -> None:
    """Raise what the status that a function of the library returned stands for."""
    if status == native.OUT_OF_MEMORY:
        raise MemoryError("The native kernels could not get memory for a layer. Smaller batches need less.")
    if status:
        raise RuntimeError(f"The native kernels refused a layer's arguments (status {status}): please report this.")


def run(function: Any, argument: Any, cell: str, part: str = "") -> None:
    """Call a function of the library and raise what its status stands for; a profiler sees `longshort::{cell}{part}`.

    Args:
        function: of the library, with one argument.
        argument: of the function.
        cell: what the function computes.
        part: of it, as a suffix.
    """
    if torch._C._autograd._profiler_enabled():
        with record_function(f"longshort::{cell}{part}"):
            status = function(argument)
    else:
        status = function(argument)
    check(status)


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` with its numbers one after the other, as they are: some views are to be read as negative."""
    return tensor.contiguous().resolve_neg()


def rows(x: Tensor) -> Tensor:
    """Return `x` with its last dimension as of `dense`."""
    return x.resolve_neg() if x.stride(-1) == 1 or x.shape[-1] == 1 else dense(x)


@functools.cache
def saved_floats_a_row(cell: str, H: int, target: int, layer_norm: bool) -> int:
    """Return the floats that the forward pass saves for one row of one step in one direction."""
    shape = _SHAPE_ALONE.pack(1, 1, 1, H, 0, 0, 0, 0, native.LAYER_CELLS[cell], 0, 1, target)
    return int(library.ls_saved_floats(shape, layer_norm))


class _Packed(NamedTuple):
    """Packed weights, and what they were packed from."""

    key: tuple[object, ...]
    weights: bytes
    """As `ls_weights` has them."""
    sample: int
    tensor: Tensor
    held: tuple[Tensor, ...]
    """The weights' memory: what is computed anew must not come to lie where they were."""


_packed: dict[int, _Packed] = {}
_watched: dict[int, weakref.finalize[..., Tensor]] = {}
"""Who waits for the end of a weight, by its id, to call `_forget`."""


def _forget(owner: int) -> None:
    _packed.pop(owner, None)
    _watched.pop(owner, None)


def unwatch(weights: Iterable[Tensor]) -> None:
    """Forget packed weights, and no longer refer to these weakly: PyTorch exchanges only tensors that nobody does."""
    for weight in weights:
        if (watch := _watched.get(id(weight))) is not None:
            watch.detach()
            _forget(id(weight))


def invalidate() -> None:
    """Forget all packed weights.

    Calls without gradients keep the weights as the kernels read them, until a weight is changed. PyTorch tells of
    changes by its operations, also in place, and of steps of its optimizers. Of what changes behind its back, through
    `.data` or NumPy, samples of the values are looked at: whoever changes less than all so calls this afterwards.
    """
    _packed.clear()


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):  # which change weights without a new version
        invalidate()


register_optimizer_step_post_hook(_after_step)


def pack(call: Call, weights: Sequence[Tensor], I: int) -> Tensor | None:
    """Return the packed weights of one direction, kept from an earlier call where nothing has changed."""
    owner, places, versions = weights[1], [], []
    for weight in weights[: call.num_plain]:
        place = weight.data_ptr()
        if weight.is_inference() or not place:
            return None  # they do not tell of changes, or there is nothing to be packed
        places.append(place)
        versions.append(weight._version)
    target = library.ls_active_target() if call.target < 0 else call.target
    key = (target, call.cell, I, call.H, call.projected, places, versions)
    found = _packed.get(id(owner))
    if found is not None and found.key == key and library.ls_sample(found.weights) == found.sample:
        return found.tensor
    code, places_of_all = native.LAYER_CELLS[call.cell], weight_fields(call.bias, places)
    given = _WEIGHTS.pack(I, call.H, call.projected, code, 0, *places_of_all)
    packed = buffers.large(library.ls_packed_floats(code, I, call.H, call.projected, target))
    sample = library.ls_sample(given)
    check(library.ls_pack(given, target, packed.data_ptr()))
    if id(owner) not in _watched:
        _watched[id(owner)] = weakref.finalize(owner, _forget, id(owner))
    held = tuple(weight.detach() for weight in weights[: call.num_plain])
    _packed[id(owner)] = _Packed(key, given, sample, packed, held)
    return packed


def saved_floats(call: Call, x: Tensor) -> int:
    """Return the floats that a forward pass saves in one direction."""
    return int(library.ls_saved_floats(_SHAPE_ALONE.pack(*call.shape(x, 0)), call.layer_norm))


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
    for d in range(D):
        own = weights[d * per_direction : (d + 1) * per_direction]
        shape = call.shape(x, d)
        packed = pack(call, own, x.shape[-1]) if keep_packed else None
        of_h, of_c = 4 * d * B * P, 4 * d * B * H
        fields = FORWARD.pack(
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
        run(library.ls_forward, fields, call.cell)
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

    for d in range(D):
        own = weights[d * per_direction : (d + 1) * per_direction]
        down = dweights[d * per_direction : (d + 1) * per_direction]
        of_h, of_c = 4 * d * B * P, 4 * d * B * H
        of_weights = weight_fields(call.bias, list(map(address, down[: call.num_plain])))
        fields = BACKWARD.pack(
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
        run(library.ls_backward, fields, call.cell, "_backward")
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
        shape = _SHAPE_ALONE.pack(*call.shape(x, d))
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
    run(library.ls_loss, ctypes.byref(args), "cross_entropy")
    return float(nats_N.numpy().sum()), (dh_NH, dweights[0], dweights[1])


class _LongshortLayer(torch.autograd.Function):  # by its name `grad_fn` and anomalies show it
    """One layer with gradients. Gradients of gradients go through the equations of `cells`."""

    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
        num_states = call.num_states
        state, weights = rest[:num_states], rest[num_states:]
        given = None if state[0] is None else state
        saved = [buffers.Saved(saved_floats(call, x)) for _ in range(call.directions)]
        y, after = forward(call, x, given, weights, [each.tensor for each in saved])  # type: ignore[arg-type]
        ctx.call, ctx.num_states = call, num_states
        buffers.keep(ctx, (x, *rest), y, saved)
        ctx.set_materialize_grads(False)
        return (y, *after, *(show(call, x, [each.tensor for each in saved]) if call.shows else ()))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *after: Tensor | None) -> tuple[Any, ...]:
        (x, *rest), y, saved = buffers.kept(ctx)
        state, weights = tuple(rest[: ctx.num_states]), rest[ctx.num_states :]
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not all(map(is_readable, (dy, *after))):
            return (None, *by_equations(ctx.call, x, state, weights, (dy, *after), wanted))
        given = None if state[0] is None else state
        if y is None:
            again = [torch.empty_like(each) for each in saved]
            y, _ = forward(ctx.call, x, given, weights, again)
        dstate, dgates = after[: ctx.num_states], after[ctx.num_states :]
        found = backward(ctx.call, x, given, weights, y, saved, dy, dstate, wanted, dgates)
        buffers.release(ctx)
        return (None, *found)


def is_readable(gradient: Tensor | None) -> bool:
    """Whether a gradient's numbers lie in memory; else, and where somebody will differentiate once more, equations do.

    They do not where `is_grads_batched` stands for many gradients, and in tensors that only stand for others.
    """
    if gradient is None:
        return True
    return not is_legacy_batchedtensor(gradient) and bool(gradient.data_ptr() or not gradient.numel())


def by_equations(
    call: Call,
    x: Tensor,
    state: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return what `backward` returns, differentiable once more where gradients are enabled.

    Args:
        call: the layer.
        x: as in `forward`.
        state: h_0, and for the LSTM c_0; None where there is none.
        weights: as in `forward`.
        gradients: of y, h_n, for the LSTM c_n, and of what `show` gave; None: zeros.
        wanted: as in `backward`.
    """
    given: Any = None if state[0] is None else tuple(state)
    plain, options = part_vectors(call, weights)
    again = torch.is_grad_enabled()
    # The user may have put autocast around the backward pass.
    with torch.autocast("cpu", enabled=False), torch.enable_grad():
        readings: list[Readings] | None = [] if call.shows else None
        if call.ids is not None:
            first = F.embedding(call.ids, x) + plain[2]
            cell = cells.get_cell(call.cell)
            given = given or tuple(x.new_zeros(1, call.ids.shape[1], call.H) for _ in cell.states)
            output, after = cells.run_stack(
                cell, first, given, [plain], bias=True, first_is_gates=True, sequences=call.sequences
            )
        else:
            coupled = call.cell == native.COUPLED
            cell_name = "lstm" if coupled else call.cell
            stack = Stack(cell_name, x.shape[-1], call.H, 1, call.bias, call.directions == 2, call.projected, coupled)
            output, after = backends.run_reference(
                stack,
                x,
                given,
                plain,
                batch_first=call.batch_first,
                sequences=call.sequences,
                options=options,
                readings=readings,
            )
        shown = (torch.stack([seen[name] for name in native.SHOWN[call.cell]]) for seen in readings or ())
        outputs = (output, *after, *shown)
    pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if grad is not None]
    inputs = [tensor for tensor, want in zip((x, *state, *weights), wanted, strict=True) if want and tensor is not None]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            [grad for _, grad in pairs],
            retain_graph=True,
            create_graph=again,
            allow_unused=True,
        )
    )
    return [next(found) if want else None for want in wanted]


def cell_of(stack: Stack) -> str:
    """Return the name of the layers' cell in `native.LAYER_CELLS`."""
    return native.COUPLED if stack.coupled else stack.cell


def join_vectors(
    directions: int, weights: Sequence[Tensor], options: Sequence[Options]
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Return a layer's weights, each direction's followed by its options' vectors, and the names of these."""
    vectors = [having.vectors for having in options]
    names = tuple(vectors[0]) if vectors else ()
    if names:
        n = len(weights) // directions
        joined = ((*weights[d * n : (d + 1) * n], *own.values()) for d, own in enumerate(vectors))
        weights = [tensor for own in joined for tensor in own]
    return list(map(dense, weights)), names


def part_vectors(call: Call, weights: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Options]]:
    """Return a layer's weights without vectors, and its options with them."""
    if not call.vectors:
        return list(weights), call.options
    n = len(weights) // call.directions
    plain: list[Tensor] = []
    options = []
    for d in range(call.directions):
        own = weights[d * n : (d + 1) * n]
        plain += own[: call.num_plain]
        vectors: dict[str, Any] = dict(zip(call.vectors, own[call.num_plain :], strict=True))
        options.append(replace(call.options[d] if call.options else Options(), **vectors))
    return plain, options


def run_native(
    stack: Stack,
    x: Tensor,
    state: State | None,
    weights: Sequence[Tensor],
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    sequences: Sequences | None = None,
    options: Sequence[Options] = (),
    readings: list[Readings] | None = None,
    target: int = -1,
    grad: bool = False,
    ids: Tensor | None = None,
) -> tuple[Tensor, State]:
    """Run a stack of layers by the native kernels.

    Arguments as in `backends`; `target` is the number of the target that runs, -1 for what PyTorch's switches allow or
    else the active one, and `grad` says whether gradients are wanted. With `ids` (T, B), int64, the first layer reads
    symbols; `x` is its table then, as `Call` says, and the first of the weights is empty.
    """
    D = 2 if stack.bidirectional else 1
    layers, per_layer = stack.num_layers, len(weights) // stack.num_layers
    cell = cell_of(stack)
    shows = readings is not None and bool(native.SHOWN[cell])
    x = unwrap_if_dead(x)  # what has left a transform of torch.func that is over
    if state is not None:
        state = tuple(dense(unwrap_if_dead(tensor)) for tensor in state)
    after: list[State] = []
    for layer in range(layers):
        having = tuple(each.contiguous() for each in options[layer * D : (layer + 1) * D])
        own, vectors = join_vectors(D, weights[layer * per_layer : (layer + 1) * per_layer], having)
        symbols = None if layer or ids is None else ids.contiguous()
        plain = (cell, stack.hidden_size, D, stack.bias, batch_first, sequences, having, target)
        call = Call(*plain, vectors, symbols, shows, stack.proj_size).resolved(x)
        x = rows(x) if symbols is None else dense(x)
        before = state if state is None or layers == 1 else tuple(t[layer * D : (layer + 1) * D] for t in state)
        num_states = len(stack.state_sizes)
        shown: tuple[Tensor, ...] = ()
        if grad:
            x, *rest = _LongshortLayer.apply(call, x, *(before or (None,) * num_states), *own)  # type: ignore[no-untyped-call]
            last, shown = tuple(rest[:num_states]), tuple(rest[num_states:])
        else:
            saved = [buffers.Saved(saved_floats(call, x)) for _ in range(D if shows else 0)]
            y, last = forward(call, x, before, own, [each.tensor for each in saved], keep_packed=symbols is None)
            shown, x = show(call, x, [each.tensor for each in saved]), y
        after.append(last)
        if readings is not None:
            y_TBH = x.transpose(0, 1) if batch_first else x
            readings += [_reading(stack, h, gates, sequences) for h, gates in zip_longest(y_TBH.chunk(D, -1), shown)]
        if dropout and training and layer + 1 < layers:
            x = backends.drop_between(x, dropout, batch_first, sequences)
    if layers == 1:
        return x, after[0]
    return x, tuple(torch.cat(tensors) for tensors in zip(*after, strict=True))


def _reading(stack: Stack, h_TBH: Tensor, shown: Tensor | None, sequences: Sequences | None) -> Readings:
    """Return what one direction had at every step by name, in the order of `cells`."""
    values = dict(zip(native.SHOWN[cell_of(stack)], () if shown is None else shown.unbind(), strict=True), h=h_TBH)
    if stack.coupled:
        i_TBH = 1 - values["f"]
        values["i"] = i_TBH if sequences is None else i_TBH.masked_fill(~sequences.valid_TB.unsqueeze(-1), 0)
    known = cells.get_cell(stack.cell)
    return {name: values[name] for name in (*known.gates, *known.states)}


def step_native(run: Any, cell: str, x_BI: Tensor, state: State, weights: Sequence[Tensor | None]) -> State:
    """Run one step by `run`, which runs native layers; the weights as in `backends.step_reference`."""
    H = weights[1].shape[1]  # type: ignore[union-attr]
    stack = Stack(cell, x_BI.shape[1], H, 1, weights[2] is not None)
    given = tuple(tensor.unsqueeze(0) for tensor in state)
    flat = [weight for weight in weights if weight is not None]
    _, after = run(stack, x_BI.unsqueeze(0), given, flat)
    return tuple(tensor.squeeze(0) for tensor in after)
