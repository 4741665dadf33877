"""The only door to the kernel library of `csrc/`: finds it, loads it, chooses its target. Needs no PyTorch.

The library is loaded when it is first asked for. What its functions mean is written in `csrc/longshort.h`;
`native_layers.py` and `native_model.py` call them on NumPy arrays, `ops.py` on tensors. Environment:

    LONGSHORT_TARGET=avx2       the build of the kernels that runs instead of the best this processor has; amx, and
                                those with products of bfloat16, run only where they are asked for
    LONGSHORT_LIBRARY=PATH      another library than the package's own, such as one with sanitizers
"""

from __future__ import annotations

import ctypes
import difflib
import functools
import os
import threading as _threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from longshort.errors import NativeWarning, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

ABI_VERSION = 12
OK, OUT_OF_MEMORY, BAD_ARGUMENT = 0, 1, 2
CELLS = {"rnn": 0, "rnn_relu": 1, "gru": 2, "lstm": 3}
"""Each cell of models that has native kernels, and its number in the library."""
COUPLED = "lstm_coupled"
"""The LSTM whose i is 1 - f: a cell of layers alone."""
LAYER_CELLS = {**CELLS, COUPLED: 4}
"""Each cell of layers that has native kernels, and its number in the library."""
GATES = {"rnn": 1, "rnn_relu": 1, "gru": 3, "lstm": 4, COUPLED: 3}
STATES = {"rnn": 1, "rnn_relu": 1, "gru": 1, "lstm": 2, COUPLED: 2}
"""How many tensors a cell's state has: h, of an LSTM also c."""
SHOWN = {
    "rnn": (),
    "rnn_relu": (),
    "gru": ("r", "z", "n"),
    "lstm": ("i", "f", "g", "o", "c"),
    COUPLED: ("f", "g", "o", "c"),
}
"""What a forward pass can show beside h, in the library's order."""

BFLOAT16 = ("amx_bf16", "avx512_bf16")
"""The targets whose products have factors of bfloat16, best first: about 3 digits; sums and all else are float32."""
HALVES = "amx_bf16x3"
"""The target whose products have factors of two numbers of bfloat16, three products each: about 5 digits."""
LOWER = (HALVES, *BFLOAT16)
"""The targets whose products are less exact than those of float32."""
FUNCTIONS = {"exp": 0, "tanh": 1, "sigmoid": 2, "weight": 3, "rest of weight": 4}
PATH = Path(__file__).parent / "_lib" / "liblongshort.so"
"""Where the build puts the library."""


def gain_sizes(cell: str, G: int, H: int) -> dict[str, int]:
    """Return the vectors that layer normalisation adds to a direction of a layer, G gates wide: names and sizes."""
    of_state = {"gamma_c": H, "beta_c": H} if STATES.get(cell) == 2 else {}  # a cell of a user's own is not here
    return {"gamma_ih": G, "gamma_hh": G, **of_state}


_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ls_abi_version": (_i32, ()),
    "ls_num_targets": (_i32, ()),
    "ls_target_name": (ctypes.c_char_p, (_i32,)),
    "ls_target_supported": (_i32, (_i32,)),
    "ls_active_target": (_i32, ()),
    "ls_set_target": (_i32, (_i32,)),
    "ls_set_threading": (_i32, (_i32,)),
    "ls_threading": (_i32, ()),
    "ls_handover": (ctypes.c_double, ()),
    "ls_saved_floats": (_i64, (_pointer, _i32)),
    "ls_packed_floats": (_i64, (_i32, _i64, _i64, _i64, _i32)),
    "ls_pack": (_i32, (_pointer, _i32, _pointer)),
    "ls_sample": (ctypes.c_uint64, (_pointer,)),
    "ls_forward": (_i32, (_pointer, _i32)),
    "ls_backward": (_i32, (_pointer, _i32)),
    "ls_gates": (_i32, (_pointer, _i32, _pointer, _pointer)),
    "ls_decode": (_i32, (_pointer,)),
    "ls_read": (_i32, (_pointer,)),
    "ls_read_tree": (_i32, (_pointer,)),
    "ls_table_floats": (_i64, (_i32, _i64, _i64, _i32)),
    "ls_head_floats": (_i64, (_i64, _i64, _i32)),
    "ls_rounded_floats": (_i64, (_i32, _i64, _i64, _i32)),
    "ls_round": (_i32, (_i32, _i64, _i64, _i32, _pointer, _pointer)),
    "ls_pack_table": (_i32, (_i32, _i64, _i64, _i32, _pointer, _pointer)),
    "ls_pack_head": (_i32, (_i64, _i64, _i32, _pointer, _pointer, _pointer)),
    "ls_loss": (_i32, (_pointer,)),
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
    """Return the targets that the library was built for, best first, then those that nobody gets unasked."""
    found = library()
    return _names(found) if found else ()


def targets() -> tuple[str, ...]:
    """Return the targets of float32 that this processor can run, best first, then `amx`; none without a library."""
    return tuple(name for name in supported() if name not in LOWER)


def bfloat16() -> str | None:
    """Return the best of the targets `BFLOAT16` that this processor can run; None where there is none."""
    return next((name for name in supported() if name in BFLOAT16), None)


def need_bfloat16() -> str:
    """Return the same; UsageError where there is none, with what could run it."""
    found = bfloat16()
    if found is None:
        raise UsageError(
            f"This machine's kernels have no products of bfloat16. {reason()}".rstrip(),
            "They need a processor with AVX512-BF16 (AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, or later).",
        )
    return found


def supported() -> tuple[str, ...]:
    """Return all targets that this processor can run: `targets`, then those of `LOWER`."""
    found = library()
    return _supported(found) if found else ()


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


def handover() -> float | None:
    """Return the seconds that a line of the cache takes from one thread to another just now.

    Some 3e-8 where their cores share a cache, several times that where they do not, as in a virtual machine that is
    moved about. None without a library, or where no second thread came in time.
    """
    found = library()
    return (found.ls_handover() or None) if found else None


@functools.cache
def _supported(found: ctypes.CDLL) -> tuple[str, ...]:
    return tuple(name for i, name in enumerate(_names(found)) if found.ls_target_supported(i))


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


# ------------------------------------------------------------------------------------------------- arrays


def float32(name: str, array: Array) -> Array:
    """Return the same array, which must be float32; ValueError otherwise."""
    import numpy as np

    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or not array.dtype.isnative:
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{name} must be a float32 array, not {kind}")
    return array


def require_shape(name: str, array: Any, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError where an array has another shape; None is any size."""
    if array.ndim != len(shape) or any(w is not None and w != s for w, s in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have the shape ({wanted}), not {array.shape}")


def float_array(name: str, array: Array, shape: tuple[int | None, ...]) -> Array:
    """Return a float32 array of this shape as a contiguous one; None is any size."""
    import numpy as np

    require_shape(name, float32(name, array), shape)
    return np.require(array, requirements=("C", "A"))


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
