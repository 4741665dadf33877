"""The kernel library against float64 NumPy, a target at a time: numbers, gradients, bits.

T  steps   B  rows   I  input width   H  hidden units   W  lanes of a vector
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from conftest import need_target
from longshort import native, native_layers
from longshort.native_layers import Options, Sequences
from native_reference import CELLS, TARGETS, Array, Case, Reference, close, placed, same

LANES = {"amx": 16, "avx512": 16, "avx2": 8, "baseline": 4}
LARGER = [(9, 2, 40, 200), (6, 33, 64, 64), (5, 20, 30, 130), (1, 66, 64, 200)]
LARGEST = [(9, 31, 40, 260), (8, 33, 259, 257)]
"""Where matrix units multiply float32: the products of a chunk of steps; those of each step too."""


def larger(target: str) -> list[tuple[int, int, int, int]]:
    """Return larger sizes (T, B, I, H), with those that a target does something else for."""
    return [*LARGER, *(LARGEST if target == "amx" else [])]


DIRECTIONS = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
EVERY_CELL = pytest.mark.parametrize("cell", CELLS)
needs_library = pytest.mark.skipif(native.library() is None, reason=native.reason())


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force a target for one test, and hold the test to having run on it."""
    name: str = request.param
    if native.library() is None:
        pytest.skip(native.reason())
    if name not in native.built_targets():
        pytest.skip(f"{name} is not built for this kind of processor")
    need_target(name)
    before = native.active_target()
    assert before is not None
    native.set_target(name)
    yield name
    assert native.active_target() == name
    native.set_target(before)


@DIRECTIONS
@EVERY_CELL
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_reference_has_the_gradients_of_complex_steps(cell: str, reverse: bool, layer_norm: bool) -> None:
    rng = np.random.default_rng(0)
    P = 2 if native.STATES[cell] == 2 and not reverse else 0
    case = Case(rng, cell, T=4, B=3, I=2, H=3, P=P, lengths=(2, 4, 0), everything=True, layer_norm=layer_norm)
    inputs = (case.x, *case.filled_weights(), *case.state, *case.gains(), *case.peepholes())
    arrays = [a.astype(np.float64) for a in inputs]
    weights = 1 + len(case.filled_weights())
    after = weights + len(case.state)
    vectors = after + len(case.gains())
    dy, dstate = rng.normal(size=(4, 3, P or 3)), [rng.normal(size=s.shape) for s in case.state]
    dgates = {name: rng.normal(size=(4, 3, 3)) for name in native.SHOWN[cell]}

    def run(arrays: Sequence[Array]) -> Reference:
        settings = case.reference_options() | {"gains": arrays[after:vectors], "peepholes": arrays[vectors:]}
        return Reference(cell, arrays[0], arrays[1:weights], arrays[weights:after], case.lengths, reverse, **settings)

    gradients = run(arrays).gradients(dy, dstate, dgates)
    directions = [rng.normal(size=a.shape) for a in arrays]
    moved = run([a + 1e-30j * d for a, d in zip(arrays, directions, strict=True)])
    slope = (moved.y * dy).imag.sum() + sum((s * d).imag.sum() for s, d in zip(moved.after, dstate, strict=True))
    slope += sum((moved.shown[name] * d).imag.sum() for name, d in dgates.items())
    wanted = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert slope / 1e-30 == pytest.approx(wanted, rel=1e-10)


# ------------------------------------------------------------------------------------------------- functions

ACTIVATIONS = ("exp", "tanh", "sigmoid")
ULP_BOUND = 4
SMALLEST_NORMAL = 2.0**-126


def exact(function: str, x: Array) -> Array:
    x = x.astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        if function == "exp":
            return np.exp(x)
        if function == "tanh":
            return np.tanh(x)
        small = np.exp(-np.abs(x))
        return np.where(x < 0, small / (1 + small), 1 / (1 + small))


def sweep() -> Iterator[Array]:
    """Every 251st float of all, and all floats near where the functions change."""
    for begin in range(0, 2**32, 251 * 2**20):
        yield np.arange(begin, min(begin + 251 * 2**20, 2**32), 251, dtype=np.uint32).view(np.float32)
    turns = [0.0, 0.25, 0.34657359, 0.5, 1.0, 9.01, 9.1, 16.6, 17.3, 44.0, 87.3, 87.5, 88.0, 88.72, 89.0, 103.97, 104.0]
    for turn in turns:
        bits = np.float32(turn).view(np.uint32) + np.arange(-(2**15), 2**15)
        near = bits[bits >= 0].astype(np.uint32).view(np.float32)
        yield np.concatenate([near, -near])


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_functions_are_within_4_ulp(target: str, function: str) -> None:
    largest = float(np.finfo(np.float32).max)
    for x in sweep():
        x = x[np.isfinite(x)]
        y, wanted = native_layers.apply(function, x, target).astype(np.float64), exact(function, x)
        size = np.abs(wanted)
        normal = (size >= SMALLEST_NORMAL) & (size <= largest)
        ulp = np.exp2(np.floor(np.log2(np.where(normal, size, 1.0))) - 23)
        y = np.where(np.isinf(y), np.copysign(2.0**128, y), y)
        error = np.abs(y - np.clip(wanted, -(2.0**128), 2.0**128))
        off = np.where(normal, error / ulp, 0.0)
        assert off.max(initial=0) <= ULP_BOUND, f"{function}({x[off.argmax()]!r}): {off.max():.2f} ULP"
        tiny = np.where(size < SMALLEST_NORMAL, error, 0.0)
        assert tiny.max(initial=0) <= SMALLEST_NORMAL, f"{function}({x[tiny.argmax()]!r}): {tiny.max()}"
        huge = size > largest
        assert (y[huge] >= largest * (1 - ULP_BOUND * 2.0**-24)).all()


@pytest.mark.parametrize(
    ("function", "wanted"), [("exp", [np.inf, 0, 1, 1]), ("tanh", [1, -1, 0, 0]), ("sigmoid", [1, 0, 0.5, 0.5])]
)
def test_functions_at_the_ends(target: str, function: str, wanted: list[float]) -> None:
    x = np.array([np.inf, -np.inf, 0.0, -0.0], np.float32)
    assert native_layers.apply(function, x, target).tolist() == wanted
    nan = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(native_layers.apply(function, nan, target)).all()


def test_the_weights_that_symbols_are_chosen_by_are_exact_to_a_double(target: str) -> None:
    x = -np.concatenate([np.linspace(0, 60, 100_000), np.geomspace(1e-30, 1, 1000)]).astype(np.float32)
    found = sum(native_layers.apply(name, x, target).astype(np.float64) for name in ("weight", "rest of weight"))
    assert (np.abs(found / np.exp(x.astype(np.float64)) - 1) < 2.0**-47).all()  # two floats have as many digits
    ends = np.array([0.0, -709.0, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(native_layers.apply("weight", ends, target), [1, 0, 0, np.nan])


def test_a_function_does_not_depend_on_its_neighbours(target: str) -> None:
    x = np.random.default_rng(0).normal(size=3 * LANES[target]).astype(np.float32)
    for function in ACTIVATIONS:
        whole = native_layers.apply(function, x, target)
        for n in range(len(x)):
            assert np.array_equal(native_layers.apply(function, x[n:], target), whole[n:])
            assert np.array_equal(native_layers.apply(function, x[:n], target), whole[:n])


# ------------------------------------------------------------------------------------------------- layers


@DIRECTIONS
@EVERY_CELL
def test_sizes_up_to_two_lanes(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    for H in range(1, 2 * W + 2):
        case = Case(rng, cell, T=1 + H % 3, B=1 + H % 5, I=H * 7 % (2 * W + 2), H=H, bias=H % 4 > 0, offset=H % 3)
        case.check(target, reverse)
    for B, I in itertools.product((0, 1, 2, 2 * W + 1), (0, 1, W, W + 1, 2 * W + 1)):
        Case(rng, cell, T=2, B=B, I=I, H=W + 1, offset=1).check(target, reverse)
    Case(rng, cell, T=0, B=3, I=2, H=3).check(target, reverse)


@DIRECTIONS
@EVERY_CELL
def test_lengths_options_and_strides(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    for B, H in ((1, 3), (3, W), (5, W + 3), (W + 2, 2 * W + 1)):
        lengths = [int(n) for n in rng.integers(0, 7, size=B)]
        for everything in (False, True):
            Case(rng, cell, T=6, B=B, I=5, H=H, lengths=lengths, everything=everything, offset=1).check(target, reverse)
        Case(rng, cell, T=6, B=B, I=5, H=H, everything=True).check(target, reverse)
        case = Case(rng, cell, T=4, B=B, I=5, H=H, lengths=[min(n, 4) for n in lengths])
        case.options = Options(zoneout=0.25)
        case.check(target, reverse)
        # (B, T, ...) in memory, and rows apart: what lies between them is not touched.
        room, out = placed((B, 4, 9), 1), placed((B, 4, H + 3), 1)
        inner = room[:, :, :5].transpose(1, 0, 2)
        inner[...] = case.x
        case.x = inner
        case.check(target, reverse, out=out[:, :, :H].transpose(1, 0, 2))
        assert np.isnan(out[:, :, H:]).all()


@DIRECTIONS
@EVERY_CELL
def test_layer_normalisation(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    for T, B, I, H in ((1, 1, 3, 5), (1, 9, 4, W + 1), (3, 2, 4, 2 * W), (4, 5, 6, W - 1), (4, W + 3, 3, 3 * W + 2)):
        for offset, bias in ((0, False), (1, True)):
            Case(rng, cell, T=T, B=B, I=I, H=H, layer_norm=True, offset=offset, bias=bias).check(target, reverse)
        lengths = [int(n) for n in rng.integers(0, T + 1, size=B)]
        for everything in (False, True):
            case = Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths, layer_norm=True, everything=everything)
            case.check(target, reverse)
    for T, B, I, H in larger(target):
        for threads in (1, 3):
            Case(rng, cell, T=T, B=B, I=I, H=H, layer_norm=True).check(target, reverse, threads)
    for T, B in ((0, 3), (2, 0)):
        Case(rng, cell, T=T, B=B, I=2, H=5, layer_norm=True).check(target, reverse)


@DIRECTIONS
@pytest.mark.parametrize("cell", ["lstm", native.COUPLED])
def test_peepholes(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    for T, B, I, H in ((1, 1, 3, 5), (3, 2, 4, 2 * W), (4, 5, 6, W - 1), (4, W + 3, 3, 3 * W + 2), *larger(target)):
        threads = 1 + (B > 9)
        Case(rng, cell, T=T, B=B, I=I, H=H, peepholes=True, offset=1).check(target, reverse, threads)
        lengths = [int(n) for n in rng.integers(0, T + 1, size=B)]
        case = Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths, peepholes=True, layer_norm=True)
        case.check(target, reverse, threads)
    Case(rng, cell, T=0, B=3, I=2, H=5, peepholes=True).check(target, reverse)


@DIRECTIONS
@pytest.mark.parametrize("cell", ["lstm", native.COUPLED])
def test_projections(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    shapes = [(1, 1, 3, 5, 2), (2, 3, 4, 2 * W, W), (4, 5, 6, 2 * W - 1, W + 1), (3, W + 3, 3, 3 * W + 2, 2 * W + 1)]
    shapes += [(T, B, I, H, P) for (T, B, I, H), P in zip(LARGER, (2 * W + 3, 24, 5, 11), strict=True)]
    for (T, B, I, H, P), bias in zip(shapes, itertools.cycle((True, False)), strict=False):
        for threads in {1, 1 + (B > 9), 1 + 2 * (B > 30)}:
            Case(rng, cell, T=T, B=B, I=I, H=H, P=P, bias=bias, offset=1).check(target, reverse, threads)
        lengths = [int(n) for n in rng.integers(0, T + 1, size=B)]
        for everything, layer_norm in ((True, False), (False, True), (True, True)):
            case = Case(
                rng, cell, T=T, B=B, I=I, H=H, P=P, lengths=lengths, everything=everything, layer_norm=layer_norm
            )
            case.check(target, reverse, 1 + (B > 9))
    Case(rng, cell, T=3, B=12, I=2, H=1100, P=3).check(target, reverse)  # the product with W_hr in two parts
    for T, B, I, H in larger(target)[len(LARGER) :]:
        Case(rng, cell, T=T, B=B, I=I, H=H, P=225).check(target, reverse)
    for T, B in ((0, 3), (2, 0)):
        Case(rng, cell, T=T, B=B, I=2, H=5, P=3).check(target, reverse)


@DIRECTIONS
@EVERY_CELL
def test_packed_sequences_are_padded_ones(target: str, cell: str, reverse: bool) -> None:
    rng = np.random.default_rng(0)
    case = Case(rng, cell, T=5, B=4, I=3, H=LANES[target] + 1, lengths=[5, 3, 3, 1])
    padded = case.forward(reverse, target=target, save=True)
    counts = [4, 3, 3, 1, 1]
    starts = np.cumsum([0, *counts[:-1]])
    there = np.arange(5)[:, None] < np.array(case.lengths)
    sequences = Sequences(counts=np.array(counts), starts=starts, reverse=reverse)
    x = np.ascontiguousarray(case.x[there])
    settings: dict[str, Any] = {"sequences": sequences, "target": target}
    packed = native_layers.forward(cell, x, case.weights, case.state, **settings, save=True)
    assert np.array_equal(packed.y, padded.y[there])
    assert np.array_equal(packed.h_n, padded.h_n)
    dy = rng.normal(size=packed.y.shape).astype(np.float32)
    dy_TBH = np.zeros_like(padded.y)
    dy_TBH[there] = dy
    gradients = native_layers.backward(cell, x, case.weights, packed, dy, case.state, **settings)
    wanted = native_layers.backward(
        cell, case.x, case.weights, padded, dy_TBH, case.state, sequences=case.sequences(reverse), target=target
    )
    assert np.array_equal(gradients.x, wanted.x[there])
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "h0"):
        close(getattr(gradients, name), getattr(wanted, name), 1e-6, name)


@DIRECTIONS
@EVERY_CELL
def test_several_threads_and_larger_sizes(target: str, cell: str, reverse: bool) -> None:
    rng = np.random.default_rng(0)
    for T, B, I, H in larger(target):
        for threads in (1, 2, 3):
            Case(rng, cell, T=T, B=B, I=I, H=H).check(target, reverse, threads)
        lengths = [int(n) for n in rng.integers(0, T + 1, size=B)]
        Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths, everything=True).check(target, reverse, 2)


@DIRECTIONS
@EVERY_CELL
def test_threads_that_divide_rows(target: str, cell: str, reverse: bool) -> None:
    """So many rows that threads divide them: each has its own sums of the weights' gradients."""
    rng = np.random.default_rng(0)
    P = 11 if native.STATES[cell] == 2 else 0
    some = [0, 0, 40, *(int(n) for n in rng.integers(9, 41, size=31))]
    for T, B, layer_norm, lengths, most in (
        (9, 34, False, None, 5),
        (40, 17, True, None, 5),
        (40, 34, False, some, 2),
        (40, 34, True, some, 2),
    ):
        case = Case(
            rng, cell, T=T, B=B, I=13, H=39, P=P, lengths=lengths, everything=True, layer_norm=layer_norm, offset=1
        )
        for threads, back in ((2, 2), (5, 5), (5, 2), (2, 5), (1, 5), (5, 1)):
            case.check(target, reverse, threads, back)
        saved = case.forward(reverse, threads=most, target=target, save=True).saved
        assert saved is not None
        assert saved[-1] > 1  # what is saved lies in groups of rows, those of the forward pass's teams


@DIRECTIONS
@EVERY_CELL
def test_rows_of_several_lengths_are_shared_out_by_their_steps(target: str, cell: str, reverse: bool) -> None:
    """Few long rows and many short ones; one that has more steps than all others, which no thread can share."""
    rng = np.random.default_rng(0)
    long_and_short = [60] * 8 + [20] * 24
    for lengths, groups in ((long_and_short, 2), ([60] + [1] * 31, 1)):
        case = Case(rng, cell, T=60, B=32, I=7, H=24, lengths=lengths)
        case.check(target, reverse, 2)
        saved = case.forward(reverse, threads=2, target=target, save=True).saved
        assert saved is not None
        assert saved[-1] == groups
        alone, many = (case.forward(reverse, target=target, threads=threads) for threads in (1, 7))
        assert np.array_equal(many.y, alone.y)


@EVERY_CELL
def test_memory_that_no_forward_pass_has_filled(target: str, cell: str) -> None:
    """Gradients of nonsense are nonsense, but the number of groups, the last that is saved, is not believed."""
    rng = np.random.default_rng(0)
    for lengths in (None, [9, *(int(n) for n in rng.integers(0, 10, size=33))]):
        case = Case(rng, cell, T=9, B=34, I=13, H=39, lengths=lengths)
        output = case.forward(False, threads=2, target=target, save=True)
        assert output.saved is not None
        sequences, dy = case.sequences(False), np.ones_like(output.y)
        for value in (0.0, -3.0, 0.99, 2.5, 33.0, 256.0, 257.0, 1e30, np.inf, np.nan):
            saved = np.full_like(output.saved, value)
            given = output._replace(saved=saved)
            for threads in (1, 2, 5):
                found = native_layers.backward(
                    *(cell, case.x, case.weights, given, dy, case.state),
                    sequences=sequences,
                    threads=threads,
                    target=target,
                )
                assert found.x.shape == case.x.shape
            native_layers.gates(cell, case.x, case.weights, saved, sequences=sequences, target=target)


@DIRECTIONS
@EVERY_CELL
def test_teams_of_several_threads(target: str, cell: str, reverse: bool) -> None:
    """Many threads, and weights that are more than one should read: teams divide rows, and their threads units."""
    rng = np.random.default_rng(0)
    P = 11 if native.STATES[cell] == 2 else 0
    wide = Case(rng, cell, T=8, B=34, I=9, H=200)
    for threads in (4, 7, 16):
        wide.check(target, reverse, threads)
    assert np.array_equal(wide.forward(reverse, target=target, threads=16).y, wide.forward(reverse, target=target).y)
    for layer_norm in (False, True):
        case = Case(rng, cell, T=8, B=34, I=9, H=200, P=P, everything=True, layer_norm=layer_norm, offset=1)
        case.check(target, reverse, 16)


@pytest.mark.parametrize("target", [*TARGETS, *native.LOWER], indirect=True)
@DIRECTIONS
@EVERY_CELL
def test_inference_gives_the_same_bits_for_any_threads_and_batch(target: str, cell: str, reverse: bool) -> None:
    rng = np.random.default_rng(0)
    for T, B, I, H in [(3, 7, 5, 9), (6, 33, 64, 64), (5, 20, 30, 130), (4, 13, 128, 256)]:
        lengths = [T, *(int(n) for n in rng.integers(0, T + 1, size=B - 1))]
        for case in (
            Case(rng, cell, T=T, B=B, I=I, H=H),
            Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths),
            Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths, layer_norm=True, peepholes=True),
            *(Case(rng, cell, T=T, B=B, I=I, H=H, P=H // 2, lengths=lengths) for _ in range(native.STATES[cell] - 1)),
        ):
            whole = case.forward(reverse, target=target)
            packed = native_layers.pack(cell, case.weights, target)
            again = [
                case.forward(reverse, target=target, threads=n, packed=p) for n in (1, 2, 4) for p in (None, packed)
            ]
            for found in again:
                assert all(map(same, found[:3], whole[:3]))
            for b in {0, 1, B // 2, B - 1}:
                L = case.lengths[b]
                state = tuple(s[b : b + 1] for s in case.state)
                for threads in (1, 2):
                    alone = native_layers.forward(
                        cell,
                        case.x[:L, b : b + 1],
                        case.weights,
                        state,
                        sequences=Sequences(reverse=reverse),
                        options=case.options,
                        threads=threads,
                        target=target,
                    )
                    assert np.array_equal(alone.y[:, 0], whole.y[:L, b])
                    assert np.array_equal(alone.h_n[0], whole.h_n[b])


def test_parts_of_a_sequence_are_the_whole(target: str) -> None:
    case = Case(np.random.default_rng(0), "lstm", T=6, B=3, I=4, H=19)
    whole = case.forward(target=target)
    state: tuple[Array, ...] = case.state
    for t in range(6):
        step = native_layers.forward("lstm", case.x[t : t + 1], case.weights, state, target=target)
        assert step.c_n is not None
        state = (step.h_n, step.c_n)
        assert np.array_equal(step.y[0], whole.y[t])
    assert same(state[1], whole.c_n)


@EVERY_CELL
def test_no_state_and_no_gradient_are_zeros(target: str, cell: str) -> None:
    case = Case(np.random.default_rng(0), cell, T=3, B=2, I=3, H=5)
    case.state = tuple(np.zeros_like(s) for s in case.state)
    given, missing = case.forward(target=target, save=True), case.forward(target=target, save=True, state=())
    assert np.array_equal(given.y, missing.y)
    zeros, none = np.zeros_like(given.y), [np.zeros_like(s) for s in case.state]
    a = native_layers.backward(cell, case.x, case.weights, given, zeros, case.state, none, target=target)
    b = native_layers.backward(cell, case.x, case.weights, missing, None, target=target)
    assert a.gains is b.gains is None
    assert a.peepholes is b.peepholes is None
    for left, right in zip(a[:-2], b[:-2], strict=True):
        assert same(left, right)
        assert left is None or not left.any()


@EVERY_CELL
def test_nan_stays_in_its_row(target: str, cell: str) -> None:
    case = Case(np.random.default_rng(0), cell, T=3, B=LANES[target] + 3, I=5, H=7)
    clean = case.forward(target=target).y
    case.x[0, 1, 2] = np.nan
    found = case.forward(target=target, threads=2).y
    if cell != "rnn_relu":  # max(0, NaN) may be either
        assert np.isnan(found[:, 1]).all()
    others = [b for b in range(case.B) if b != 1]
    assert np.array_equal(found[:, others], clean[:, others])


@EVERY_CELL
@pytest.mark.parametrize(("T", "B", "I", "H"), [(3, 4, 5, 19), *LARGEST])
def test_gradients_keep_their_digits_at_any_size(target: str, cell: str, T: int, B: int, I: int, H: int) -> None:
    case = Case(np.random.default_rng(0), cell, T=T, B=B, I=I, H=H)
    output = case.forward(target=target, save=True)
    dy = np.random.default_rng(1).normal(size=output.y.shape).astype(np.float32)
    plain, small, large = (
        native_layers.backward(cell, case.x, case.weights, output, dy * np.float32(scale), case.state, target=target)
        for scale in (1.0, 2.0**-60, 2.0**60)
    )
    for name in ("x", "weight_ih", "weight_hh", "bias_ih", "h0"):
        wanted = getattr(plain, name)
        close(getattr(small, name) * np.float32(2.0**60), wanted, 1e-6, name)
        close(getattr(large, name) * np.float32(2.0**-60), wanted, 1e-6, name)


def test_subnormal_numbers_are_zero_inside_and_numbers_outside(target: str) -> None:
    case = Case(np.random.default_rng(0), "rnn_relu", T=2, B=2, I=3, H=5, bias=False)
    case.x[...] = 1e-42
    case.state = (np.full((2, 5), 1e-42, np.float32),)
    assert not case.forward(target=target, threads=2).y.any()
    assert (np.full(3, 1e-42, np.float32) * np.float32(1.0) > 0).all()


# ------------------------------------------------------------------------------------------------- threads


def test_callers_at_the_same_time_get_their_own_answers(target: str) -> None:
    rng = np.random.default_rng(0)
    cases = [Case(rng, cell, T=5, B=8, I=64, H=96) for cell in CELLS]
    wanted = [case.forward(target=target).y for case in cases]
    found: list[list[Array]] = [[] for _ in cases]

    def call(i: int) -> None:
        for _ in range(10):
            found[i].append(cases[i].forward(target=target, threads=2).y)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(cases))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for ys, y in zip(found, wanted, strict=True):
        assert len(ys) == 10
        assert all(np.array_equal(one, y) for one in ys)


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_can_go_on() -> None:
    program = """
import os, sys, signal, numpy as np
from longshort import native_layers
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype("f4")
x, weights = draw(5, 8, 64), native_layers.Weights(draw(384, 64), draw(384, 96))
before = native_layers.forward("lstm", x, weights, threads=2).y
child = os.fork()
signal.alarm(20)
after = native_layers.forward("lstm", x, weights, threads=2).y
if not child:
    os._exit(not np.array_equal(before, after))
status = os.waitpid(child, 0)[1]
sys.exit(status != 0 or not np.array_equal(before, after))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


@needs_library
def test_gradients_have_the_same_bits_where_one_thread_does_the_work_of_two() -> None:
    """As it does beside a busy neighbour, and in the child of a process that has used OpenMP's threads."""
    pytest.importorskip("torch")
    program = """
import os, sys, signal, numpy as np, torch
from longshort import calls, native, native_layers  # with calls, the threads are PyTorch's
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype("f4")
x, weights, dy = draw(20, 34, 24), native_layers.Weights(draw(156, 24), draw(156, 39)), draw(20, 34, 39)
gains = native_layers.Options(gains=native_layers.Gains(draw(156), draw(156), draw(39), draw(39)))
wide = native_layers.Weights(draw(768, 24), draw(768, 192))
all_y = draw(20, 34, 192)
gains_of_wide = native_layers.Options(gains=native_layers.Gains(draw(768), draw(768), draw(192), draw(192)))
def run(threads):
    found, many = [], 8 if threads > 1 else 1
    for options in (native_layers.Options(), gains_of_wide):  # rows divided among teams of several threads
        output = native_layers.forward("lstm", x, wide, options=options, save=True, threads=many)
        gradients = native_layers.backward("lstm", x, wide, output, all_y, options=options, threads=many)
        found.append(gradients.gains.gamma_hh if gradients.gains else gradients.weight_hh)
    for n, options in ((20, native_layers.Options()), (20, gains), (2, gains)):  # rows divided, and units
        output = native_layers.forward("lstm", x[:n], weights, options=options, save=True, threads=threads)
        gradients = native_layers.backward("lstm", x[:n], weights, output, dy[:n], options=options, threads=threads)
        found.append(gradients.gains.gamma_hh if gradients.gains else gradients.weight_hh)
    return found
in_two = run(2)
if native.threading() != "openmp" or any(map(np.array_equal, in_two, run(1))):
    sys.exit(3)  # nothing would be shown
child = os.fork()
signal.alarm(20)
if not child:
    os._exit(not all(map(np.array_equal, in_two, run(2))))
sys.exit(os.waitpid(child, 0)[1] != 0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
