"""Single layers of the kernel library on NumPy arrays: forward, backward, what a forward pass shows. Needs no PyTorch.

    T  steps   B  rows   N  rows in all   I  input width   H  hidden units   P  width of h: H, unless it is projected
    G  gates: rnn and rnn_relu 1, gru and lstm_coupled 3, lstm 4

What the functions mean is written in `csrc/longshort.h`; here every shape and type is checked before a pointer is
passed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longshort.native import (
    COUPLED,
    FUNCTIONS,
    GATES,
    LAYER_CELLS,
    SHOWN,
    STATES,
    address,
    aligned,
    check_status,
    float32,
    float_array,
    index_of,
    need,
    require_shape,
)
from longshort.structures import BackwardArgs, ForwardArgs, LayerOptionsStructure, LayerWeightsStructure, Shape

Array = NDArray[np.float32]
Ints = NDArray[np.int64]

# ------------------------------------------------------------------------------------------------- layers


class Weights(NamedTuple):
    """Of one layer in one direction, float32, as `torch.nn` lays them out."""

    weight_ih: Array
    """(G H, I)."""
    weight_hh: Array
    """(G H, P)."""
    bias_ih: Array | None = None
    """(G H)."""
    bias_hh: Array | None = None
    """(G H)."""
    weight_hr: Array | None = None
    """(P, H), of an LSTM that projects h; None: it does not, and P is H."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Which steps of which rows there are, where not all rows have all steps."""

    counts: Ints | None = None
    """(T): how many rows each step has, never more than the step before; None: B."""
    order: Ints | None = None
    """(B): the rows in descending length, a permutation of 0 to B - 1; None: as they are."""
    starts: Ints | None = None
    """(T): where each step starts in an input (N, I) without padding; None: the input is (T, B, I)."""
    reverse: bool = False
    """Whether each row is read from its own last step to its first."""


class Gains(NamedTuple):
    """Of layer normalisation, which `csrc/longshort.h` describes."""

    gamma_ih: Array
    """(G H): of W_ih x."""
    gamma_hh: Array
    """(G H): of W_hh h."""
    gamma_c: Array | None = None
    """(H), of an LSTM: of the c that its output reads."""
    beta_c: Array | None = None
    """(H), of an LSTM: added to it."""


class Peepholes(NamedTuple):
    """What an LSTM's gates see of c, which `csrc/longshort.h` describes."""

    weight_ci: Array | None
    """(H); None where gates are coupled."""
    weight_cf: Array
    """(H)."""
    weight_co: Array
    """(H): of the c after the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a layer may have beside its weights."""

    h_mask: Array | None = None
    """(B, P): what h is multiplied by where W_hh reads it."""
    zoneout_mask: Array | None = None
    """(T, B, P): 1 keeps the old h, 0 takes the new one."""
    zoneout: float = 0.0
    """The same for every unit and step, from 0 to 1."""
    resets: NDArray[np.bool_] | None = None
    """(T, B): where a row's state is zero before the step."""
    gains: Gains | None = None
    """Of layer normalisation; None: nothing is normalised."""
    peepholes: Peepholes | None = None
    """None: no gate sees c."""


class Output(NamedTuple):
    """What `forward` returns."""

    y: Array
    """(T, B, P), or (N, P) where there are `starts`; 0 past the end of a row."""
    h_n: Array
    """(B, P)."""
    c_n: Array | None
    """(B, H) for an LSTM."""
    saved: Array | None
    """For `backward`, where asked for."""


class Gradients(NamedTuple):
    """What `backward` returns: shapes as those of what they are gradients of."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    weight_hr: Array | None
    """Where h is projected."""
    h0: Array
    c0: Array | None
    """For an LSTM."""
    gains: Gains | None
    """Where there are gains."""
    peepholes: Peepholes | None
    """Where there are peepholes."""


_EVERY_STEP = Sequences()
_PLAIN = Options()


def saved_floats(shape: Shape, layer_norm: bool = False) -> int:
    """Return how many floats the forward pass saves for the backward pass, without or with layer normalisation.

    Raises:
        ValueError: a size that cannot be.
    """
    count: int = need().ls_saved_floats(ctypes.byref(shape), layer_norm)
    if count < 0:
        raise ValueError(f"T, B, I, H cannot be {shape.T}, {shape.B}, {shape.I}, {shape.H}")
    return count


def packed_floats(cell: str, I: int, H: int, target: str | None = None, projected: int = 0) -> int:
    """Return how many floats `pack` makes of a layer's weights; `projected` is P where h is projected.

    Raises:
        ValueError: a size that cannot be.
        UsageError: there is no such target.
    """
    found = need()
    count: int = found.ls_packed_floats(_cell(cell), I, H, projected, index_of(found, target))
    if count < 0:
        raise ValueError(f"I, H, P cannot be {I}, {H}, {projected or H}")
    return count


def pack(cell: str, weights: Weights, target: str | None = None) -> Array:
    """Return the weights as the forward pass reads them: of use where the same weights serve many calls.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no such target.
    """
    found = need()
    checked, I, H, projected = _check_weights(cell, weights)
    packed = aligned(packed_floats(cell, I, H, target, projected))
    places = LayerWeightsStructure(I, H, projected, _cell(cell), 0, *map(address, checked))
    check_status(found.ls_pack(ctypes.byref(places), index_of(found, target), address(packed)))
    return packed


def apply(function: str, x: Array, target: str | None = None) -> Array:
    """Return a function of every element, as the kernels compute it.

    Args:
        function: `exp`, `tanh`, `sigmoid`; `weight`, which is exp in double of what is at most 0, as symbols are chosen
            by, rounded to float; or `rest of weight`, what that rounding leaves.
        x: float32.
        target: whose; of the active one if None.

    Raises:
        ValueError: `x` is not float32, or there is no such function.
        UsageError: there is no such target.
    """
    found = need()
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, not {function!r}")
    source = np.ascontiguousarray(float32("x", x))
    result = np.empty_like(source)
    index = index_of(found, target)
    check_status(found.ls_apply(FUNCTIONS[function], index, source.size, address(source), address(result)))
    return result.reshape(x.shape)


def forward(
    cell: str,
    x: Array,
    weights: Weights,
    state: Sequence[Array] = (),
    *,
    sequences: Sequences = _EVERY_STEP,
    options: Options = _PLAIN,
    packed: Array | None = None,
    save: bool = False,
    threads: int = 1,
    target: str | None = None,
    out: Array | None = None,
) -> Output:
    """Run one layer in one direction over a batch of sequences.

    Args:
        cell: one of `LAYER_CELLS`.
        x: (T, B, I), in any order in memory whose last axis is contiguous; (N, I) where there are `starts`.
        weights: of the layer.
        state: h0 (B, P), or h0 and c0 (B, H); empty: zeros.
        sequences: which steps there are.
        options: what the layer has beside its weights.
        packed: what `pack` made of the weights for this target.
        save: whether to save what `backward` needs.
        threads: at most so many.
        target: which build of the kernels; None: the active one.
        out: where to write y.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no such target, or no library.
    """
    found = need()
    call = _Call(cell, x, weights, state, sequences, options, threads, index_of(found, target))
    y = np.empty(call.y_shape, dtype=np.float32) if out is None else _writable("out", out, call.y_shape)
    h_n = np.empty((call.B, call.P), np.float32)
    c_n = np.empty((call.B, call.H), np.float32) if STATES[cell] == 2 else None
    saved = aligned(saved_floats(call.shape, options.gains is not None)) if save else None
    if packed is not None:
        wanted = packed_floats(cell, call.I, call.H, target, call.shape.P)
        packed = float_array("packed", packed, (wanted,))
    args = _forward_args(call, y, h_n, c_n, saved, packed)
    check_status(found.ls_forward(ctypes.byref(args), 1))
    return Output(y, h_n, c_n, saved)


def forward_directions(
    cell: str,
    x: Array,
    weights: Sequence[Weights],
    options: Sequence[Options],
    *,
    sequences: Sequences = _EVERY_STEP,
    threads: int = 1,
    target: str | None = None,
) -> Output:
    """Run one layer from zero states in its one or two directions, these side by side where that is faster.

    Args:
        cell: as in `forward`.
        x: as in `forward`.
        weights: of each direction, the second of which runs from each row's last step to its first.
        options: of each direction.
        sequences: as in `forward`; its `reverse` is not read.
        threads: at most so many.
        target: as in `forward`.

    Returns:
        y (T, B, D P) or (N, D P), h_n (D, B, P), c_n (D, B, H); nothing is saved.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no such target, or no library.
    """
    found = need()
    index, D = index_of(found, target), len(weights)
    if D not in (1, 2):
        raise ValueError(f"there are one or two directions, not {D}")
    given = {name: getattr(sequences, name) for name in ("counts", "order", "starts")}
    steps = {name: None if each is None else _integers(name, each) for name, each in given.items()}
    calls = [
        _Call(cell, x, own, (), Sequences(**steps, reverse=d == 1), having, threads, index)
        for d, (own, having) in enumerate(zip(weights, options, strict=True))
    ]
    B, H, P, rows = calls[0].B, calls[0].H, calls[0].P, calls[0].y_shape[:-1]
    if any((call.I, call.H, call.shape.P) != (calls[0].I, H, calls[0].shape.P) for call in calls):
        sizes = ", ".join(str((call.I, call.H, call.P)) for call in calls)
        raise ValueError(f"directions must be equally wide and both projected or not; I, H and P are {sizes}")
    y, h_n = np.empty((*rows, D * P), np.float32), np.empty((D, B, P), np.float32)
    c_n = np.empty((D, B, H), np.float32) if STATES[cell] == 2 else None
    args = [
        _forward_args(call, y[..., d * P : (d + 1) * P], h_n[d], None if c_n is None else c_n[d])
        for d, call in enumerate(calls)
    ]
    check_status(found.ls_forward((ForwardArgs * D)(*args), D))
    return Output(y, h_n, c_n, None)


def _forward_args(
    call: _Call, y: Array, h_n: Array, c_n: Array | None, saved: Array | None = None, packed: Array | None = None
) -> ForwardArgs:
    args = ForwardArgs(shape=call.shape, options=call.options)
    args.x, args.x_step, args.x_row = call.strided(call.x)
    args.weight_ih, args.weight_hh, args.bias_ih, args.bias_hh, args.weight_hr = map(address, call.weights)
    args.packed = address(packed)
    args.h0, args.c0 = map(address, call.state)
    args.y, args.y_step, args.y_row = call.strided(y)
    args.h_n, args.c_n, args.saved = address(h_n), address(c_n), address(saved)
    return args


def gates(
    cell: str,
    x: Array,
    weights: Weights,
    saved: Array,
    *,
    sequences: Sequences = _EVERY_STEP,
    options: Options = _PLAIN,
    target: str | None = None,
) -> dict[str, Array]:
    """Return what a call of `forward` with `save` had at every step: each of `SHOWN`, (T, B, H), 0 past a row's end.

    Args:
        cell: as in the forward call.
        x: as in the forward call.
        weights: as in the forward call.
        saved: what it saved.
        sequences: as in the forward call.
        options: as in the forward call.
        target: as in the forward call.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no such target, or no library.
    """
    found = need()
    call = _Call(cell, x, weights, (), sequences, options, 1, index_of(found, target))
    layer_norm = options.gains is not None
    saved = float_array("saved", saved, (saved_floats(call.shape, layer_norm),))
    shown = np.empty((len(SHOWN[cell]), call.T, call.B, call.H), np.float32)
    check_status(found.ls_gates(ctypes.byref(call.shape), layer_norm, address(saved), address(shown)))
    return dict(zip(SHOWN[cell], shown, strict=True))


def backward(
    cell: str,
    x: Array,
    weights: Weights,
    output: Output,
    dy: Array | None,
    state: Sequence[Array] = (),
    dstate: Sequence[Array | None] = (),
    dgates: Mapping[str, Array] | None = None,
    *,
    sequences: Sequences = _EVERY_STEP,
    options: Options = _PLAIN,
    threads: int = 1,
    target: str | None = None,
    dx: Array | None = None,
) -> Gradients:
    """Return the gradients of a call of `forward`, whose arguments are given once more.

    Args:
        cell: as in the forward call.
        x: as in the forward call.
        weights: as in the forward call.
        output: what it returned, with `save`.
        dy: gradient of y; None: zeros.
        state: as in the forward call.
        dstate: gradients of h_n, or of h_n and c_n, or None; empty: zeros.
        dgates: gradients of all that `gates` returned; None: zeros.
        sequences: as in the forward call.
        options: as in the forward call.
        threads: at most so many.
        target: as in the forward call.
        dx: to which the gradient of x is added; None: a new array.

    Raises:
        ValueError: shapes or types that do not fit, or nothing was saved.
        UsageError: there is no such target, or no library.
    """
    found = need()
    call = _Call(cell, x, weights, state, sequences, options, threads, index_of(found, target))
    y = _rows("output.y", output.y, call.y_shape)
    if output.saved is None:
        raise ValueError("output.saved is None: call forward with save=True")
    saved = float_array("output.saved", output.saved, (saved_floats(call.shape, options.gains is not None),))
    dy = None if dy is None else _rows("dy", dy, call.y_shape)
    dh_n, dc_n = call.states("dstate", dstate)
    shown: Array | None = None
    if dgates is not None and SHOWN[cell]:
        shape = (call.T, call.B, call.H)
        shown = np.stack([float_array(f"dgates[{name!r}]", dgates[name], shape) for name in SHOWN[cell]])
    accumulate = dx is not None
    dx = np.zeros(call.x.shape, np.float32) if dx is None else _writable("dx", dx, call.x.shape)
    G = GATES[cell] * call.H
    shapes = ((G, call.I), (G, call.P), (G,), (G,), (call.B, call.P))
    weight_ih, weight_hh, bias_ih, bias_hh, h0 = (np.empty(shape, np.float32) for shape in shapes)
    c0 = np.empty((call.B, call.H), np.float32) if STATES[cell] == 2 else None
    weight_hr = _like(call.weights[4])
    args = BackwardArgs(shape=call.shape, options=call.options, accumulate_dx=accumulate)
    args.x, args.x_step, args.x_row = call.strided(call.x)
    args.weight_ih, args.weight_hh, args.weight_hr = (address(call.weights[i]) for i in (0, 1, 4))
    args.h0, args.c0 = map(address, call.state)
    args.y, args.y_step, args.y_row = call.strided(y)
    args.saved = address(saved)
    if dy is not None:
        args.dy, args.dy_step, args.dy_row = call.strided(dy)
    args.dh_n, args.dc_n, args.dgates = address(dh_n), address(dc_n), address(shown)
    args.dx, args.dx_step, args.dx_row = call.strided(dx)
    args.dweight_ih, args.dweight_hh = address(weight_ih), address(weight_hh)
    args.dbias_ih, args.dbias_hh, args.dweight_hr = address(bias_ih), address(bias_hh), address(weight_hr)
    args.dh0, args.dc0 = address(h0), address(c0)
    gains: Gains | None = None
    if options.gains is not None:
        gains = Gains(*map(_like, call.gains))
        args.dgamma_ih, args.dgamma_hh, args.dgamma_c, args.dbeta_c = map(address, gains)
    peepholes: Peepholes | None = None
    if options.peepholes is not None:
        peepholes = Peepholes(*map(_like, call.peepholes))
        args.dweight_ci, args.dweight_cf, args.dweight_co = map(address, peepholes)
    check_status(found.ls_backward(ctypes.byref(args), 1))
    return Gradients(dx, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, h0, c0, gains, peepholes)


class _Call:
    """What forward and backward have in common, checked. Holds the arrays while their addresses are in use."""

    def __init__(
        self,
        cell: str,
        x: Array,
        weights: Weights,
        state: Sequence[Array],
        sequences: Sequences,
        options: Options,
        threads: int,
        target: int,
    ) -> None:
        self.cell = cell
        self.weights, self.I, self.H, projected = _check_weights(cell, weights)
        self.P = projected or self.H
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._place(x, sequences)
        self.state = self.states("state", state)
        B, P = self.B, self.P
        self._masks = (
            None if options.h_mask is None else float_array("h_mask", options.h_mask, (B, P)),
            None if options.zoneout_mask is None else float_array("zoneout_mask", options.zoneout_mask, (self.T, B, P)),
            None if options.resets is None else _resets(options.resets, (self.T, B)),
        )
        if not 0 <= options.zoneout <= 1:
            raise ValueError(f"zoneout must be from 0 to 1, not {options.zoneout}")
        self.gains = self._check_gains(options.gains)
        self.peepholes = self._check_peepholes(options.peepholes)
        h_mask, zoneout_mask, resets = map(address, self._masks)
        vectors = (*self.gains, *self.peepholes)
        self.options = LayerOptionsStructure(h_mask, zoneout_mask, options.zoneout, 0, resets, *map(address, vectors))
        sizes = (self.T, B, self.I, self.H, projected)
        self.shape = Shape(*sizes, *map(address, self._indices), _cell(cell), sequences.reverse)
        self.shape.num_threads, self.shape.target = min(threads, 2**31 - 1), target

    def _place(self, x: Array, sequences: Sequences) -> None:
        """Find T, B and the shape of y, and check that every row of every step lies inside of x."""
        counts, order, starts = (
            None if given is None else _integers(name, given)
            for name, given in (("counts", sequences.counts), ("order", sequences.order), ("starts", sequences.starts))
        )
        self._indices = (counts, starts, order)
        if starts is None:
            self.x = _rows("x", x, (None, None, self.I))
            self.T, self.B = self.x.shape[:2]
        else:
            self.x = _rows("x", x, (None, self.I))
            if counts is None:
                raise ValueError("starts need counts")
            self.T, self.B = starts.size, order.size if order is not None else int(counts[0]) if counts.size else 0
        if counts is not None:
            require_shape("counts", counts, (self.T,))
            if self.T and not (counts[-1] >= 0 and counts[0] <= self.B and (np.diff(counts) <= 0).all()):
                raise ValueError(f"counts must fall from at most {self.B} to at least 0")
        if order is not None and not np.array_equal(np.sort(order), np.arange(self.B)):
            raise ValueError(f"order must be a permutation of 0 to {self.B - 1}")
        if starts is not None and counts is not None and self.T:
            last = np.maximum.accumulate(order) if order is not None else np.arange(self.B)
            ends = starts + np.where(counts > 0, last[np.maximum(counts, 1) - 1] + 1, 0) if self.B else starts
            if starts.min() < 0 or ends.max() > len(self.x):
                raise ValueError(f"starts and counts must lie inside of the {len(self.x)} rows of x")
        self.y_shape = (*self.x.shape[:-1], self.P)

    def _check_gains(self, gains: Gains | None) -> tuple[Array | None, ...]:
        """Return the contiguous gains of layer normalisation, all None where there are none."""
        if gains is None:
            return (None,) * 4
        sizes = [GATES[self.cell] * self.H] * 2 + [self.H] * 2
        names = Gains._fields if STATES[self.cell] == 2 else Gains._fields[:2]
        found: list[Array | None] = []
        for name, gain, size in zip(names, gains, sizes, strict=False):
            if gain is None:
                raise ValueError(f"layer normalisation of an LSTM needs {name}")
            found.append(float_array(name, gain, (size,)))
        if any(gain is not None for gain in gains[len(found) :]):
            raise ValueError(f"gamma_c and beta_c are the LSTM's, not the {self.cell}'s")
        return (*found, None, None)[:4]

    def _check_peepholes(self, peepholes: Peepholes | None) -> tuple[Array | None, ...]:
        """Return the contiguous peepholes, all None where there are none."""
        if peepholes is None:
            return (None,) * 3
        if STATES[self.cell] != 2:
            raise ValueError(f"peepholes are the LSTM's, not the {self.cell}'s")
        if (peepholes.weight_ci is None) != (self.cell == COUPLED):
            raise ValueError("weight_ci is of the gate i: an lstm needs it, an lstm_coupled has none")
        pairs = zip(Peepholes._fields, peepholes, strict=True)
        return tuple(None if given is None else float_array(name, given, (self.H,)) for name, given in pairs)

    def states(self, name: str, given: Sequence[Array | None]) -> tuple[Array | None, Array | None]:
        """Return the two states or their gradients, (B, P) and (B, H) or None."""
        wanted = STATES[self.cell]
        if given and len(given) != wanted:
            raise ValueError(f"{name} must hold {wanted} arrays, not {len(given)}")
        found = [
            None if part is None else float_array(f"{name}[{i}]", part, (self.B, width))
            for i, (part, width) in enumerate(zip(given, (self.P, self.H), strict=False))
        ]
        h, c = (*found, None, None)[:2]
        return h, c

    def strided(self, array: Array) -> tuple[int, int, int]:
        """Return address, step and row of an array (T, B, ...) or (N, ...), in floats."""
        *step, row = (stride // 4 for stride in array.strides[:-1])
        return array.ctypes.data, step[0] if step else 0, row


# ------------------------------------------------------------------------------------------------- arrays


def _cell(name: str) -> int:
    if name not in LAYER_CELLS:
        raise ValueError(f"cell must be one of {', '.join(LAYER_CELLS)}, not {name!r}")
    return LAYER_CELLS[name]


def _like(array: Any) -> Any:
    """Return a new array for its gradient; of None None."""
    return None if array is None else np.empty_like(array)


def _check_weights(cell: str, weights: Weights) -> tuple[tuple[Array | None, ...], int, int, int]:
    """Return contiguous weights, I, H, and P where h is projected, else 0."""
    _cell(cell)
    rows, P = float_array("weight_hh", weights.weight_hh, (None, None)).shape
    H, projected = (P, 0) if weights.weight_hr is None else (rows // GATES[cell], P)
    if H < 1 or P < 1 or rows != GATES[cell] * H:
        raise ValueError(
            f"weight_hh must have the shape ({GATES[cell]} H, {'P' if projected else 'H'}), not {(rows, P)}"
        )
    if projected and STATES[cell] != 2:
        raise ValueError(f"weight_hr is the LSTM's, not the {cell}'s")
    checked = (
        float_array("weight_ih", weights.weight_ih, (rows, None)),
        float_array("weight_hh", weights.weight_hh, (rows, P)),
        None if weights.bias_ih is None else float_array("bias_ih", weights.bias_ih, (rows,)),
        None if weights.bias_hh is None else float_array("bias_hh", weights.bias_hh, (rows,)),
        None if weights.weight_hr is None else float_array("weight_hr", weights.weight_hr, (P, H)),
    )
    return checked, weights.weight_ih.shape[1], H, projected


def _rows(name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """Return a float32 array of this shape whose rows are contiguous, wherever they lie; None is any size."""
    require_shape(name, float32(name, array), shape)
    return array if _is_rows(array) else array.copy()


def _writable(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return the same array, into whose rows the library may write."""
    require_shape(name, float32(name, array), shape)
    if not _is_rows(array) or not array.flags.writeable:
        raise ValueError(f"{name} must be writable and contiguous in its last axis: strides {array.strides}")
    width = array.shape[-1] * 4
    apart = sorted((s, n) for s, n in zip(array.strides[:-1], array.shape[:-1], strict=True) if n > 1)
    for stride, size in apart:
        if stride < width and array.size:
            raise ValueError(f"{name} must not overlap itself: strides {array.strides}")
        width += stride * (size - 1)
    return np.asarray(array)


def _is_rows(array: Array) -> bool:
    if not array.size:
        return True
    contiguous = array.strides[-1] == 4 or array.shape[-1] == 1
    return contiguous and array.flags.aligned and all(stride >= 0 and stride % 4 == 0 for stride in array.strides)


def _integers(name: str, array: Ints) -> Ints:
    found = np.asarray(array)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integers, not {found.dtype} {found.shape}")
    return np.require(found, np.int64, ("C", "A"))


def _resets(array: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    found = np.asarray(array)
    if found.dtype != np.bool_:
        raise ValueError(f"resets must be a bool array, not {found.dtype}")
    require_shape("resets", found, shape)
    return np.require(found, requirements=("C", "A")).view(np.uint8)
