"""The only door to the kernel library of `csrc/`: finds it, loads it, and runs it on NumPy arrays. Needs no PyTorch.

    T  steps   B  rows   I  input width   H  hidden units   G  gates: rnn and rnn_relu 1, gru 3, lstm 4   N  rows in all

The library is loaded when it is first asked for. What its functions mean is written in `csrc/longshort.h`; here the
structures are declared once more, and every shape and type is checked before a pointer is passed. Environment:

    LONGSHORT_TARGET=avx2       the build of the kernels that runs, instead of the best this processor has
    LONGSHORT_LIBRARY=PATH      another library than the package's own, such as one with sanitizers
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import os
import threading as _threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longshort.errors import NativeWarning, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Ints = NDArray[np.int64]

ABI_VERSION = 6
OK, OUT_OF_MEMORY, BAD_ARGUMENT = 0, 1, 2
CELLS = {"rnn": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
"""Each cell that has native kernels, and its number in the library."""
GATES = {"rnn": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}
SHOWN = {"rnn": (), "rnn_relu": (), "gru": ("r", "z", "n"), "lstm": ("i", "f", "g", "o", "c")}
"""What a forward pass can show beside h, in the library's order."""
FUNCTIONS = {"exp": 0, "tanh": 1, "sigmoid": 2}
PATH = Path(__file__).parent / "_lib" / "liblongshort.so"
"""Where the build puts the library."""

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


# ------------------------------------------------------------------------------------------------- structures


class Shape(ctypes.Structure):
    """`ls_shape`."""

    _fields_ = (
        *((name, _i64) for name in ("T", "B", "I", "H")),
        *((name, _pointer) for name in ("counts", "starts", "order")),
        *((name, _i32) for name in ("cell", "reverse", "num_threads", "target")),
    )


class LayerOptions(ctypes.Structure):
    """`ls_options`."""

    _fields_ = (
        ("h_mask", _pointer),
        ("zoneout_mask", _pointer),
        ("zoneout", ctypes.c_float),
        ("reserved", _i32),
        *((name, _pointer) for name in ("resets", "gamma_ih", "gamma_hh", "gamma_c", "beta_c")),
    )


class Tokens(ctypes.Structure):
    """`ls_tokens`."""

    _fields_ = (("table", _pointer), ("ids", _pointer), ("V", _i64))


class ForwardArgs(ctypes.Structure):
    """`ls_forward_args`."""

    _fields_ = (
        ("shape", Shape),
        ("options", LayerOptions),
        ("x", _pointer),
        ("x_step", _i64),
        ("x_row", _i64),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "packed", "h0", "c0", "y")),
        ("y_step", _i64),
        ("y_row", _i64),
        *((name, _pointer) for name in ("h_n", "c_n", "saved")),
        ("tokens", Tokens),
    )


class BackwardArgs(ctypes.Structure):
    """`ls_backward_args`."""

    _fields_ = (
        ("shape", Shape),
        ("options", LayerOptions),
        ("x", _pointer),
        ("x_step", _i64),
        ("x_row", _i64),
        *((name, _pointer) for name in ("weight_ih", "weight_hh", "h0", "c0", "y")),
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
        *((name, _pointer) for name in ("dweight_ih", "dweight_hh", "dbias_ih", "dbias_hh", "dh0", "dc0")),
        *((name, _pointer) for name in ("dgamma_ih", "dgamma_hh", "dgamma_c", "dbeta_c")),
        ("accumulate_dx", _i32),
        ("reserved", _i32),
        ("tokens", Tokens),
        ("dtable", _pointer),
    )


ARGUMENT_SIZES = (ctypes.sizeof(ForwardArgs), ctypes.sizeof(BackwardArgs))
"""For callers that write the structures by other means."""

_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ls_abi_version": (_i32, ()),
    "ls_num_targets": (_i32, ()),
    "ls_target_name": (ctypes.c_char_p, (_i32,)),
    "ls_target_supported": (_i32, (_i32,)),
    "ls_active_target": (_i32, ()),
    "ls_set_target": (_i32, (_i32,)),
    "ls_set_threading": (_i32, (_i32,)),
    "ls_threading": (_i32, ()),
    "ls_saved_floats": (_i64, (_pointer, _i32)),
    "ls_packed_floats": (_i64, (_i32, _i64, _i64, _i32)),
    "ls_pack": (_i32, (_i32, _i64, _i64, _i32, *[_pointer] * 5)),
    "ls_sample": (ctypes.c_uint64, (_i32, _i64, _i64, *[_pointer] * 4)),
    "ls_forward": (_i32, (_pointer,)),
    "ls_backward": (_i32, (_pointer,)),
    "ls_gates": (_i32, (_pointer, _i32, _pointer, _pointer)),
    "ls_decode": (_i32, (_pointer,)),
    "ls_read": (_i32, (_pointer,)),
    "ls_table_floats": (_i64, (_i32, _i64, _i64, _i32)),
    "ls_head_floats": (_i64, (_i64, _i64, _i32)),
    "ls_rounded_floats": (_i64, (_i32, _i64, _i64, _i32)),
    "ls_round": (_i32, (_i32, _i64, _i64, _i32, _pointer, _pointer)),
    "ls_pack_table": (_i32, (_i32, _i64, _i64, _i32, _pointer, _pointer)),
    "ls_pack_head": (_i32, (_i64, _i64, _i32, _pointer, _pointer, _pointer)),
    "ls_cross_entropy": (_i32, (_i32, _i64, _i64, _pointer, ctypes.c_float, _i32, _pointer, _pointer)),
    "ls_apply": (_i32, (_i32, _i32, _i64, _pointer, _pointer)),
    "ls_prefer_large_pages": (None, (_pointer, _i64)),
    "ls_trim": (None, ()),
}


# ------------------------------------------------------------------------------------------------- the library


class _Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str


_lock = _threading.Lock()
_loaded: _Loaded | None = None
_warned = False


def library() -> ctypes.CDLL | None:
    """Return the library, or None where there is none: `reason` says why.

    Raises:
        UsageError: LONGSHORT_LIBRARY or LONGSHORT_TARGET names what is not there.
    """
    return _load().library


def reason() -> str:
    """Return why there is no library, with what to do about it; empty where there is one.

    Raises:
        UsageError: as `library`.
    """
    return _load().reason


def ready() -> bool:
    """Return whether native kernels can run. The first time that they cannot, a `NativeWarning` says so.

    For callers that would have used them.
    """
    global _warned
    found = _load()
    if found.library is None and not _warned:
        _warned = True
        what, _, hint = found.reason.partition("\n")
        warnings.warn(f"{what} Something slower runs.\n{hint}", NativeWarning, stacklevel=3)
    return found.library is not None


def _load() -> _Loaded:
    global _loaded
    if _loaded is None:
        with _lock:
            if _loaded is None:
                _loaded = _open()
    return _loaded


def _open() -> _Loaded:
    given = os.environ.get("LONGSHORT_LIBRARY")
    path = Path(given) if given else PATH
    problem = ""
    try:
        if not path.is_file():
            problem = "the library was not built when longshort was installed"
        else:
            opened = ctypes.CDLL(str(path))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(opened, name)
                function.restype, function.argtypes = result, arguments
            if (version := opened.ls_abi_version()) != ABI_VERSION:
                problem = f"{path.name} is of version {version} of the interface, not {ABI_VERSION}"
    except (OSError, AttributeError) as error:  # not a library for this machine; one of another version
        problem = str(error)
    if problem and given:
        what = f"there is no file {given}" if not path.is_file() else problem
        raise UsageError(f"LONGSHORT_LIBRARY cannot be used: {what}.", "Unset it to use the package's own library.")
    if problem:
        return _Loaded(None, f"There are no native kernels: {problem}.\n{_advice()}")
    target = os.environ.get("LONGSHORT_TARGET")
    if target:
        _choose(opened, target, "LONGSHORT_TARGET: ")
    return _Loaded(opened, "")


def _advice() -> str:
    if os.name == "nt":
        return "There are no native kernels for Windows yet."
    if (PATH.parents[3] / "CMakeLists.txt").is_file():
        return "Install a C++ compiler and CMake, then run `make native`, which shows what the compiler says."
    return (
        "Install a C++ compiler, then see what it says: "
        "LONGSHORT_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps --no-binary longshort longshort"
    )


def need() -> ctypes.CDLL:
    """Return the library; UsageError where there is none."""
    found = _load()
    if found.library is None:
        what, _, hint = found.reason.partition("\n")
        raise UsageError(what, hint)
    return found.library


# ------------------------------------------------------------------------------------------------- targets


def built_targets() -> tuple[str, ...]:
    """Return the targets that the library was built for, best first; none without a library."""
    found = library()
    return _names(found) if found else ()


def targets() -> tuple[str, ...]:
    """Return the targets that this processor can run, best first; none without a library."""
    found = library()
    return tuple(name for i, name in enumerate(_names(found)) if found.ls_target_supported(i)) if found else ()


def active_target() -> str | None:
    """Return the target that runs where a call names none; None without a library."""
    found = library()
    return _names(found)[found.ls_active_target()] if found else None


def set_target(name: str) -> None:
    """Choose the target that runs in this process where a call names none.

    Raises:
        UsageError: there is no target of that name, this processor cannot run it, or there is no library.
    """
    _choose(need(), name)


def threading() -> str | None:
    """Return whose threads run the kernels: `own`, or `openmp`, the pool of the process; None without a library."""
    found = library()
    return ("own", "openmp")[found.ls_threading()] if found else None


@functools.cache
def _names(found: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(found.ls_target_name(i).decode() for i in range(found.ls_num_targets()))


def _choose(found: ctypes.CDLL, name: str, where: str = "") -> None:
    index = index_of(found, name, where)
    check_status(found.ls_set_target(index))


def index_of(found: ctypes.CDLL, name: str | None, where: str = "") -> int:
    """Return the number of a target that this processor has; -1, the active one, for None."""
    if name is None:
        return -1
    names = _names(found)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        raise UsageError(
            f"{where}There is no target {name!r}; there are {', '.join(names)}.",
            f"Did you mean {close[0]!r}?" if close else "",
        )
    index = names.index(name)
    if not found.ls_target_supported(index):
        able = ", ".join(n for i, n in enumerate(names) if found.ls_target_supported(i))
        raise UsageError(f"{where}This processor cannot run the target {name!r}; it can run {able}.")
    return index


# ------------------------------------------------------------------------------------------------- layers


class Weights(NamedTuple):
    """Of one layer in one direction, float32, as `torch.nn` lays them out."""

    weight_ih: Array
    """(G H, I)."""
    weight_hh: Array
    """(G H, H)."""
    bias_ih: Array | None = None
    """(G H)."""
    bias_hh: Array | None = None
    """(G H)."""


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
    """(H), lstm: of the c that its output reads."""
    beta_c: Array | None = None
    """(H), lstm: added to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a layer may have beside its weights."""

    h_mask: Array | None = None
    """(B, H): what h is multiplied by where W_hh reads it."""
    zoneout_mask: Array | None = None
    """(T, B, H): 1 keeps the old h, 0 takes the new one."""
    zoneout: float = 0.0
    """The same for every unit and step, from 0 to 1."""
    resets: NDArray[np.bool_] | None = None
    """(T, B): where a row's state is zero before the step."""
    gains: Gains | None = None
    """Of layer normalisation; None: nothing is normalised."""


class Output(NamedTuple):
    """What `forward` returns."""

    y: Array
    """(T, B, H), or (N, H) where there are `starts`; 0 past the end of a row."""
    h_n: Array
    """(B, H)."""
    c_n: Array | None
    """(B, H) for an lstm."""
    saved: Array | None
    """For `backward`, where asked for."""


class Gradients(NamedTuple):
    """What `backward` returns: shapes as those of what they are gradients of."""

    x: Array
    weight_ih: Array
    weight_hh: Array
    bias_ih: Array
    bias_hh: Array
    h0: Array
    c0: Array | None
    """For an lstm."""
    gains: Gains | None
    """Where there are gains."""


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


def packed_floats(cell: str, I: int, H: int, target: str | None = None) -> int:
    """Return how many floats `pack` makes of a layer's weights.

    Raises:
        ValueError: a size that cannot be.
        UsageError: there is no such target.
    """
    found = need()
    count: int = found.ls_packed_floats(_cell(cell), I, H, index_of(found, target))
    if count < 0:
        raise ValueError(f"I, H cannot be {I}, {H}")
    return count


def pack(cell: str, weights: Weights, target: str | None = None) -> Array:
    """Return the weights as the forward pass reads them: of use where the same weights serve many calls.

    Raises:
        ValueError: shapes or types that do not fit.
        UsageError: there is no such target.
    """
    found = need()
    checked, I, H = _check_weights(cell, weights)
    packed = aligned(packed_floats(cell, I, H, target))
    status = found.ls_pack(_cell(cell), I, H, index_of(found, target), *map(address, checked), address(packed))
    check_status(status)
    return packed


def apply(function: str, x: Array, target: str | None = None) -> Array:
    """Return exp, tanh or sigmoid of every element, as the kernels compute it.

    Raises:
        ValueError: `x` is not float32, or there is no such function.
        UsageError: there is no such target.
    """
    import numpy as np

    found = need()
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}, not {function!r}")
    source = np.ascontiguousarray(_float32("x", x))
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
        cell: one of `CELLS`.
        x: (T, B, I), in any order in memory whose last axis is contiguous; (N, I) where there are `starts`.
        weights: of the layer.
        state: h0, or h0 and c0, each (B, H); empty: zeros.
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
    import numpy as np

    found = need()
    call = _Call(cell, x, weights, state, sequences, options, threads, index_of(found, target))
    y = np.empty(call.y_shape, dtype=np.float32) if out is None else _writable("out", out, call.y_shape)
    h_n, c_n = np.empty((call.B, call.H), np.float32), None
    if cell == "lstm":
        c_n = np.empty_like(h_n)
    saved = aligned(saved_floats(call.shape, options.gains is not None)) if save else None
    if packed is not None:
        wanted = packed_floats(cell, call.I, call.H, target)
        packed = float_array("packed", packed, (wanted,))
    args = ForwardArgs(shape=call.shape, options=call.options)
    args.x, args.x_step, args.x_row = call.strided(call.x)
    args.weight_ih, args.weight_hh, args.bias_ih, args.bias_hh = map(address, call.weights)
    args.packed = address(packed)
    args.h0, args.c0 = map(address, call.state)
    args.y, args.y_step, args.y_row = call.strided(y)
    args.h_n, args.c_n, args.saved = address(h_n), address(c_n), address(saved)
    check_status(found.ls_forward(ctypes.byref(args)))
    return Output(y, h_n, c_n, saved)


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
    import numpy as np

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
        dstate: gradients of h_n, or of h_n and c_n, each (B, H) or None; empty: zeros.
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
    import numpy as np

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
    shapes = ((G, call.I), (G, call.H), (G,), (G,), (call.B, call.H))
    weight_ih, weight_hh, bias_ih, bias_hh, h0 = (np.empty(shape, np.float32) for shape in shapes)
    c0 = np.empty_like(h0) if cell == "lstm" else None
    args = BackwardArgs(shape=call.shape, options=call.options, accumulate_dx=accumulate)
    args.x, args.x_step, args.x_row = call.strided(call.x)
    args.weight_ih, args.weight_hh = map(address, call.weights[:2])
    args.h0, args.c0 = map(address, call.state)
    args.y, args.y_step, args.y_row = call.strided(y)
    args.saved = address(saved)
    if dy is not None:
        args.dy, args.dy_step, args.dy_row = call.strided(dy)
    args.dh_n, args.dc_n, args.dgates = address(dh_n), address(dc_n), address(shown)
    args.dx, args.dx_step, args.dx_row = call.strided(dx)
    args.dweight_ih, args.dweight_hh = address(weight_ih), address(weight_hh)
    args.dbias_ih, args.dbias_hh = address(bias_ih), address(bias_hh)
    args.dh0, args.dc0 = address(h0), address(c0)
    gains: Gains | None = None
    if options.gains is not None:
        gains = Gains(*(None if gain is None else np.empty_like(gain) for gain in call.gains))  # type: ignore[arg-type]
        args.dgamma_ih, args.dgamma_hh, args.dgamma_c, args.dbeta_c = map(address, gains)
    check_status(found.ls_backward(ctypes.byref(args)))
    return Gradients(dx, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, gains)


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
        self.weights, self.I, self.H = _check_weights(cell, weights)
        if threads < 1:
            raise ValueError(f"threads must be at least 1, not {threads}")
        self._place(x, sequences)
        self.state = self.states("state", state)
        B, H = self.B, self.H
        self._masks = (
            None if options.h_mask is None else float_array("h_mask", options.h_mask, (B, H)),
            None if options.zoneout_mask is None else float_array("zoneout_mask", options.zoneout_mask, (self.T, B, H)),
            None if options.resets is None else _resets(options.resets, (self.T, B)),
        )
        if not 0 <= options.zoneout <= 1:
            raise ValueError(f"zoneout must be from 0 to 1, not {options.zoneout}")
        self.gains = self._check_gains(options.gains)
        h_mask, zoneout_mask, resets = map(address, self._masks)
        self.options = LayerOptions(h_mask, zoneout_mask, options.zoneout, 0, resets, *map(address, self.gains))
        self.shape = Shape(self.T, B, self.I, H, *map(address, self._indices), _cell(cell), sequences.reverse)
        self.shape.num_threads, self.shape.target = min(threads, 2**31 - 1), target

    def _place(self, x: Array, sequences: Sequences) -> None:
        """Find T, B and the shape of y, and check that every row of every step lies inside of x."""
        import numpy as np

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
            _require_shape("counts", counts, (self.T,))
            if self.T and not (counts[-1] >= 0 and counts[0] <= self.B and (np.diff(counts) <= 0).all()):
                raise ValueError(f"counts must fall from at most {self.B} to at least 0")
        if order is not None and not np.array_equal(np.sort(order), np.arange(self.B)):
            raise ValueError(f"order must be a permutation of 0 to {self.B - 1}")
        if starts is not None and counts is not None and self.T:
            last = np.maximum.accumulate(order) if order is not None else np.arange(self.B)
            ends = starts + np.where(counts > 0, last[np.maximum(counts, 1) - 1] + 1, 0) if self.B else starts
            if starts.min() < 0 or ends.max() > len(self.x):
                raise ValueError(f"starts and counts must lie inside of the {len(self.x)} rows of x")
        self.y_shape = (*self.x.shape[:-1], self.H)

    def _check_gains(self, gains: Gains | None) -> tuple[Array | None, ...]:
        """Return the contiguous gains of layer normalisation, all None where there are none."""
        if gains is None:
            return (None,) * 4
        sizes = [GATES[self.cell] * self.H] * 2 + [self.H] * 2
        names = Gains._fields if self.cell == "lstm" else Gains._fields[:2]
        found: list[Array | None] = []
        for name, gain, size in zip(names, gains, sizes, strict=False):
            if gain is None:
                raise ValueError(f"layer normalisation of an lstm needs {name}")
            found.append(float_array(name, gain, (size,)))
        if any(gain is not None for gain in gains[len(found) :]):
            raise ValueError(f"gamma_c and beta_c are the lstm's, not the {self.cell}'s")
        return (*found, None, None)[:4]

    def states(self, name: str, given: Sequence[Array | None]) -> tuple[Array | None, Array | None]:
        """Return the two states or their gradients, each (B, H) or None."""
        wanted = 2 if self.cell == "lstm" else 1
        if given and len(given) != wanted:
            raise ValueError(f"{name} must hold {wanted} arrays, not {len(given)}")
        found = [None if s is None else float_array(f"{name}[{i}]", s, (self.B, self.H)) for i, s in enumerate(given)]
        h, c = (*found, None, None)[:2]
        return h, c

    def strided(self, array: Array) -> tuple[int, int, int]:
        """Return address, step and row of an array (T, B, ...) or (N, ...), in floats."""
        *step, row = (stride // 4 for stride in array.strides[:-1])
        return array.ctypes.data, step[0] if step else 0, row


# ------------------------------------------------------------------------------------------------- arrays


def _cell(name: str) -> int:
    if name not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, not {name!r}")
    return CELLS[name]


def _check_weights(cell: str, weights: Weights) -> tuple[tuple[Array | None, ...], int, int]:
    """Return contiguous weights, I and H."""
    _cell(cell)
    rows, H = float_array("weight_hh", weights.weight_hh, (None, None)).shape
    if H < 1 or rows != GATES[cell] * H:
        raise ValueError(f"weight_hh must have the shape ({GATES[cell]} H, H), not {(rows, H)}")
    checked = (
        float_array("weight_ih", weights.weight_ih, (rows, None)),
        float_array("weight_hh", weights.weight_hh, (rows, H)),
        None if weights.bias_ih is None else float_array("bias_ih", weights.bias_ih, (rows,)),
        None if weights.bias_hh is None else float_array("bias_hh", weights.bias_hh, (rows,)),
    )
    return checked, weights.weight_ih.shape[1], H


def _float32(name: str, array: Array) -> Array:
    import numpy as np

    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or not array.dtype.isnative:
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{name} must be a float32 array, not {kind}")
    return array


def _require_shape(name: str, array: Any, shape: tuple[int | None, ...]) -> None:
    if array.ndim != len(shape) or any(w is not None and w != s for w, s in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), not {array.shape}")


def float_array(name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """Return a float32 array of this shape as a contiguous one; None is any size."""
    import numpy as np

    _require_shape(name, _float32(name, array), shape)
    return np.require(array, requirements=("C", "A"))


def _rows(name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """Return a float32 array of this shape whose rows are contiguous, wherever they lie; None is any size."""
    _require_shape(name, _float32(name, array), shape)
    return array if _is_rows(array) else array.copy()


def _writable(name: str, array: Array, shape: tuple[int, ...]) -> Array:
    """Return the same array, into whose rows the library may write."""
    import numpy as np

    _require_shape(name, _float32(name, array), shape)
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
    import numpy as np

    found = np.asarray(array)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a list of integers, not {found.dtype} {found.shape}")
    return np.require(found, np.int64, ("C", "A"))


def _resets(array: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    import numpy as np

    found = np.asarray(array)
    if found.dtype != np.bool_:
        raise ValueError(f"resets must be a bool array, not {found.dtype}")
    _require_shape("resets", found, shape)
    return np.require(found, requirements=("C", "A")).view(np.uint8)


def aligned(count: int) -> Array:
    """Return `count` floats that begin at a multiple of 64 bytes."""
    import numpy as np

    room = np.empty(count + 16, np.float32)
    begin = -room.ctypes.data % 64 // 4
    return room[begin : begin + count]


def address(array: Any) -> int | None:
    """Return where an array's memory is, as a structure takes it; None of None."""
    return None if array is None else int(array.ctypes.data)


def check_status(status: int) -> None:
    """Raise what the status that a function of the library returned stands for."""
    if status == OUT_OF_MEMORY:
        raise MemoryError("the kernel library could not get memory")
    if status != OK:
        raise ValueError("the kernel library refused an argument")
