"""The two directions of a layer in one call, side by side in half of the threads each: the bits of one after the other.

T  steps   B  rows   I  input width   H  hidden units   P  width of a projection
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from conftest import need_target
from longshort import native, native_layers
from longshort.native_layers import Options, Output, Weights
from longshort.structures import BackwardArgs, ForwardArgs, Shape
from native_reference import CELLS, TARGETS, Array, Case, close, same

EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
EVERY_TARGET = pytest.mark.parametrize("target", TARGETS)
SIZES = [(40, 4, 24, 48), (1, 1, 300, 200), (64, 1, 7, 40), (12, 9, 16, 33), (30, 20, 16, 32), (3, 2, 5, 4)]
"""Of which some run side by side in two threads, some in many, some never."""

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.reason())


def two(cell: str, size: Sequence[int], seed: int = 0, **more: Any) -> tuple[Case, Case]:
    """Return what two directions have: the same input and lengths, weights of their own."""
    T, B, I, H = size
    rng = np.random.default_rng(seed)
    first, second = (Case(rng, cell, T=T, B=B, I=I, H=H, **more) for _ in range(2))
    second.x = first.x
    return first, second


def lengths_of(size: Sequence[int]) -> list[int]:
    T, B = size[:2]
    return [T, *(int(n) for n in np.random.default_rng(7).integers(0, T + 1, size=B - 1))]


def having(cell: str, size: Sequence[int]) -> list[dict[str, Any]]:
    """Return a plain case, one with lengths, and of an LSTM one that projects."""
    return [{}, {"lengths": lengths_of(size)}, *({"P": 5} for _ in range(native.STATES[cell] - 1))]


@EVERY_TARGET
@EVERY_CELL
def test_both_have_the_bits_of_each(target: str, cell: str) -> None:
    need_target(target)
    for size in SIZES:
        everything = {"lengths": lengths_of(size), "layer_norm": True, "everything": True, "bias": False}
        for more in (*having(cell, size), everything):
            first, second = two(cell, size, **more)
            each = [case.forward(bool(d), state=(), target=target) for d, case in enumerate((first, second))]
            for threads in (1, 2, 3, 8):
                found = native_layers.forward_directions(
                    *(cell, first.x, [first.weights, second.weights], [first.options, second.options]),
                    sequences=first.sequences(False),
                    threads=threads,
                    target=target,
                )
                assert np.array_equal(found.y, np.concatenate([one.y for one in each], -1))
                assert np.array_equal(found.h_n, [one.h_n for one in each])
                assert found.c_n is None or all(map(same, found.c_n, [one.c_n for one in each]))
            alone = native_layers.forward_directions(
                *(cell, first.x, [first.weights], [first.options]), sequences=first.sequences(True), target=target
            )
            assert np.array_equal(alone.y, each[0].y)
            assert np.array_equal(alone.h_n, each[0].h_n[None])


class BackwardCalls:
    """Calls of the library for the gradients of two directions; dx is `shared` by both, or each has its own."""

    def __init__(
        self, cases: Sequence[Case], outputs: Sequence[Output], threads: int, target: str, shared: bool, adds: bool
    ) -> None:
        self.args = (BackwardArgs * 2)()
        self.found: list[Array] = []
        self.kept: list[Any] = [cases, outputs]
        rng = np.random.default_rng(3)
        steps, index = cases[0].sequences(False), native.index_of(native.need(), target)
        indices = [None if each is None else np.require(each, np.int64) for each in (steps.counts, None, steps.order)]
        for d, (case, output) in enumerate(zip(cases, outputs, strict=True)):
            args, (T, B, I, H, P) = self.args[d], (case.T, case.B, case.I, case.H, case.P)
            projected = 0 if case.weights.weight_hr is None else P
            code = native.LAYER_CELLS[case.cell]
            args.shape = Shape(T, B, I, H, projected, *map(native.address, indices), code, d, threads, index)
            weights = {name: w for name, w in case.weights._asdict().items() if w is not None}
            gradients = {f"d{name}": np.full_like(w, np.nan) for name, w in weights.items()}
            begun = np.random.default_rng(4).normal(size=case.x.shape).astype(np.float32)
            dx = self.found[0] if shared and d else begun
            self.found += [*([] if shared and d else [dx]), *gradients.values()]
            dy = rng.normal(size=(T, B, P)).astype(np.float32)
            arrays = {"x": case.x, "y": output.y, "saved": output.saved, "dy": dy, "dx": dx, **weights, **gradients}
            for name, array in arrays.items():
                if hasattr(args, name):  # it has no biases
                    setattr(args, name, native.address(array))
            for name, width in (("x", I), ("y", P), ("dy", P), ("dx", I)):
                setattr(args, f"{name}_step", B * width)
                setattr(args, f"{name}_row", width)
            args.accumulate_dx = int(adds or (shared and d == 1))
            self.kept += [arrays, indices]

    def together(self) -> list[Array]:
        assert native.need().ls_backward(self.args, 2) == native.OK
        return self.found

    def apart(self) -> list[Array]:
        for args in self.args:
            assert native.need().ls_backward(ctypes.byref(args), 1) == native.OK
        return self.found


@EVERY_TARGET
@EVERY_CELL
@pytest.mark.parametrize("shared", [True, False], ids=["one dx", "two dx"])
def test_gradients_of_both_are_those_of_each(target: str, cell: str, shared: bool) -> None:
    need_target(target)
    for size in SIZES:
        for more in having(cell, size):
            cases = two(cell, size, **more)
            for threads in (1, 2, 6):
                rest: dict[str, Any] = {"state": (), "save": True, "target": target, "threads": threads}
                outputs = [case.forward(bool(d), **rest) for d, case in enumerate(cases)]
                for adds in (False, True):
                    given = (cases, outputs, threads, target, shared, adds)
                    found, again = (BackwardCalls(*given).together() for _ in range(2))
                    for ours, theirs in zip(found, BackwardCalls(*given).apart(), strict=True):
                        close(ours, theirs, 1e-5, "gradient")
                    assert all(map(np.array_equal, found, again))


def test_rows_of_an_input_may_lie_apart() -> None:
    """Where steps begin far from each other, so that x has more rows than steps."""
    T, B, I, H, gap = 12, 4, 24, 48, 40
    cases = two("lstm", (T, B, I, H))
    rng, starts, counts = np.random.default_rng(0), np.arange(T) * gap, np.full(T, B)
    x, dy = (rng.normal(size=(T * gap, width)).astype(np.float32) for width in (I, H))
    sequences = [native_layers.Sequences(counts=counts, starts=starts, reverse=d == 1) for d in range(2)]
    found = []
    for together in (True, False):
        dx = np.zeros_like(x)
        native.need().ls_trim()  # so that no larger memory of an earlier call is taken
        args = (BackwardArgs * 2)()
        kept: list[Any] = []
        for d, (case, steps) in enumerate(zip(cases, sequences, strict=True)):
            output = native_layers.forward("lstm", x, case.weights, sequences=steps, save=True, threads=2)
            places = [native.address(steps.counts), native.address(steps.starts), None]
            args[d].shape = Shape(T, B, I, H, 0, *places, native.CELLS["lstm"], d, 2, -1)
            arrays = {"x": x, "y": output.y, "saved": output.saved, "dy": dy, "dx": dx}
            arrays |= {name: w for name, w in case.weights._asdict().items() if w is not None and "weight" in name}
            for name, array in arrays.items():
                setattr(args[d], name, native.address(array))
            for name, width in (("x", I), ("y", H), ("dy", H), ("dx", I)):
                setattr(args[d], f"{name}_row", width)
            args[d].accumulate_dx = 1
            kept.append((arrays, steps))
        if together:
            assert native.need().ls_backward(args, 2) == native.OK
        else:
            assert all(native.need().ls_backward(ctypes.byref(each), 1) == native.OK for each in args)
        found.append(dx)
    close(found[0], found[1], 1e-5, "gradient of x")


def test_subnormal_numbers_are_zero_where_gradients_are_added_up() -> None:
    cases = [Case(np.random.default_rng(d), "rnn", T=40, B=4, I=24, H=64) for d in range(2)]
    cases[1].x = cases[0].x
    for case in cases:
        for weight in case.weights:
            if weight is not None:
                weight[...] = 0
    outputs = [case.forward(bool(d), state=(), save=True, threads=2) for d, case in enumerate(cases)]
    target = native.active_target()
    assert target is not None
    for together in (True, False):
        calls = BackwardCalls(cases, outputs, 2, target, shared=True, adds=True)
        dx = calls.found[0]
        dx[...] = 1e-40
        calls.args[0].dx = None
        calls.together() if together else calls.apart()
        assert not dx.any()


def test_directions_that_are_not_of_one_layer_are_refused() -> None:
    library = native.need()
    cases = two("lstm", (3, 2, 4, 5))
    arrays = [np.zeros((3, 2, 5), np.float32) for _ in cases]

    def calls(**changes: Any) -> Any:
        args = (ForwardArgs * 2)()
        for d, (case, y) in enumerate(zip(cases, arrays, strict=True)):
            args[d].shape = Shape(3, 2, 4, 5, 0, None, None, None, native.CELLS["lstm"], d, 2, -1)
            args[d].x, args[d].x_step, args[d].x_row = native.address(case.x), 8, 4
            for name, weight in zip(Weights._fields, case.weights, strict=True):
                setattr(args[d], name, native.address(weight))
            args[d].y, args[d].y_step, args[d].y_row = native.address(y), 10, 5
        for name, value in changes.items():
            setattr(args[1] if hasattr(args[1], name) else args[1].shape, name, value)
        return args

    assert library.ls_forward(calls(), 2) == native.OK
    for count in (0, 3, -1, 2**31 - 1):
        assert library.ls_forward(calls(), count) == native.BAD_ARGUMENT
        assert library.ls_backward((BackwardArgs * 2)(), count) == native.BAD_ARGUMENT
    room = np.zeros(10_000, np.float32)
    steps = np.array([2, 1, 1])
    backward = (BackwardArgs * 2)()
    for d, args in enumerate(backward):
        args.shape = Shape(3, 2, 4, 5, 0, None, None, None, native.CELLS["lstm"], d, 2, -1)
        for name in ("x", "y", "saved", "weight_ih", "weight_hh", "dx"):
            setattr(args, name, native.address(room))
        args.saved = native.address(np.zeros(10_000, np.float32))
    assert library.ls_backward(backward, 2) == native.BAD_ARGUMENT  # both would write one dx
    bad_changes: list[dict[str, Any]] = [
        *({name: value} for name, value in {"T": 2, "B": 1, "I": 3, "H": 4, "P": 3, "cell": 2}.items()),
        *({name: value} for name, value in {"num_threads": 1, "target": 0, "y": None, "x": None}.items()),
        {"counts": native.address(steps)},
        {"packed": native.address(room)},
        {"saved": native.address(room)},
    ]
    for changes in bad_changes:
        assert library.ls_forward(calls(**changes), 2) == native.BAD_ARGUMENT, changes
    for bad, words in (
        ({"weights": []}, "one or two directions, not 0"),
        ({"weights": [cases[0].weights] * 3}, "one or two directions, not 3"),
        ({"weights": [cases[0].weights, two("lstm", (3, 2, 4, 6))[0].weights]}, "equally wide"),
        ({"weights": [cases[0].weights, two("lstm", (3, 2, 4, 5), P=5)[0].weights]}, "both projected"),
    ):
        weights = bad["weights"]
        with pytest.raises(ValueError, match=words):
            native_layers.forward_directions("lstm", cases[0].x, weights, [Options()] * len(weights))
