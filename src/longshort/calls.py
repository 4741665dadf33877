"""A call of the kernel library for tensors: what it says of a layer, where things lie, what its answer stands for.

    T  steps   B  rows   I  input width   H  hidden units   D  directions   P  width of h: H, or what it is projected to

The library's structures are written as `csrc/longshort.h` has them. `ops` makes the calls, and `quick` the usual one.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.profiler import record_function

from longshort import native, precision
from longshort.cells import VECTORS, Options, Sequences, Stack

_SHAPE, _OPTIONS = "5q3P4i", "PPfi8P"
FORWARD = struct.Struct(f"@{_SHAPE}{_OPTIONS}Pqq9Pqq3PPPq")
BACKWARD = struct.Struct(f"@{_SHAPE}{_OPTIONS}Pqq6PqqPPqq4Pqq14PiiPPqP")
WEIGHTS = struct.Struct("@3q2i5P")
SHAPE = struct.Struct(f"@{_SHAPE}")


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


def cell_of(stack: Stack) -> str:
    """Return the name of the layers' cell in `native.LAYER_CELLS`."""
    return native.COUPLED if stack.coupled else stack.cell


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


_is_profiling: Any = torch._C._autograd._profiler_enabled


def run(function: Any, arguments: tuple[Any, ...], cell: str, part: str = "") -> None:
    """Call a function of the library and raise what its status stands for; a profiler sees `longshort::{cell}{part}`.

    Args:
        function: of the library.
        arguments: of the function.
        cell: what the function computes.
        part: of it, as a suffix.
    """
    if _is_profiling():
        with record_function(f"longshort::{cell}{part}"):
            status = function(*arguments)
    else:
        status = function(*arguments)
    if status:
        check(status)


def dense(tensor: Tensor) -> Tensor:
    """Return `tensor` with its numbers one after the other, as they are: some views are to be read as negative."""
    return tensor.contiguous().resolve_neg()


def rows(x: Tensor) -> Tensor:
    """Return `x` with its last dimension as of `dense`."""
    return x.resolve_neg() if x.stride(-1) == 1 or x.shape[-1] == 1 else dense(x)


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether a call that reads these is to have gradients."""
    if not torch.is_grad_enabled():
        return False
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():  # of which a compiler knows nothing
        return False
    return any(tensor.requires_grad for tensor in tensors if tensor is not None)


def is_readable(gradient: Tensor | None) -> bool:
    """Whether a gradient's numbers lie in memory; else, and where somebody will differentiate once more, equations do.

    They do not where `is_grads_batched` or a transform of torch.func stands for many gradients, and in tensors that
    only stand for others; a gradient that has a tangent is differentiated too.
    """
    if gradient is None:
        return True
    stands_for_others = is_legacy_batchedtensor(gradient) or is_functorch_wrapped_tensor(gradient)
    if stands_for_others or forward_ad._current_level >= 0:
        return False
    return bool(gradient.data_ptr() or not gradient.numel())


SAVED_OF_ALL = 1
"""Floats that the forward pass saves in one direction beside those of each row."""


@functools.cache
def saved_floats_a_row(cell: str, H: int, target: int, layer_norm: bool) -> int:
    """Return the floats that the forward pass saves for one row of one step in one direction."""

    def of_rows(rows: int) -> int:
        shape = SHAPE.pack(1, rows, 1, H, 0, 0, 0, 0, native.LAYER_CELLS[cell], 0, 1, target)
        return int(library.ls_saved_floats(shape, layer_norm))

    return of_rows(1) - of_rows(0)


def saved_floats(call: Call, x: Tensor) -> int:
    """Return the floats that a forward pass saves in one direction."""
    return int(library.ls_saved_floats(SHAPE.pack(*call.shape(x, 0)), call.layer_norm))
