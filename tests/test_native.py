"""The kernel library against float64 NumPy, a target at a time: numbers, gradients, bits, and refused arguments.

T  steps   B  rows   I  input width   H  hidden units   W  lanes of a vector
"""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import ROOT
from longshort import native, native_layers
from longshort.errors import NativeWarning, UsageError
from longshort.native_layers import (
    BackwardArgs,
    ForwardArgs,
    Gains,
    Gradients,
    LayerOptions,
    Options,
    Output,
    Peepholes,
    Sequences,
    Shape,
    Weights,
)

Array = NDArray[Any]
TARGETS = ("avx512", "avx2", "baseline")
LANES = {"avx512": 16, "avx2": 8, "baseline": 4}
CELLS = tuple(native.LAYER_CELLS)
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
    if name not in native.supported():
        pytest.skip(f"this processor lacks {name}")
    before = native.active_target()
    assert before is not None
    native.set_target(name)
    yield name
    assert native.active_target() == name
    native.set_target(before)


# ------------------------------------------------------------------------------------------------- the reference


def sigmoid(x: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * x))


def normal(v: Array) -> tuple[Array, Any]:
    """Return v of mean 0 and variance 1, and by how much it was scaled."""
    scale = 1 / np.sqrt(((v - v.mean()) ** 2).mean() + 1e-5)
    return (v - v.mean()) * scale, scale


def through(d: Array, v_hat: Array, scale: Any) -> Array:
    """Return the gradient of v from `d`, that of v_hat."""
    back: Array = scale * (d - d.mean() - v_hat * (d * v_hat).mean())
    return back


class Reference:
    """One layer in one direction, row by row and step by step, in the precision of what it is given.

    Shares no code with the kernels: the equations of `csrc/longshort.h`, and their derivatives by hand.
    """

    def __init__(
        self,
        cell: str,
        x_TBI: Array,
        weights: Sequence[Array],
        state: Sequence[Array],
        lengths: Sequence[int],
        reverse: bool = False,
        h_mask: Array | None = None,
        zoneout: Array | None = None,
        resets: Array | None = None,
        gains: Sequence[Array] = (),
        peepholes: Sequence[Array] = (),
    ) -> None:
        T, B, _ = x_TBI.shape
        H, P = weights[0].shape[0] // native.GATES[cell], weights[1].shape[1]
        kind = np.result_type(x_TBI, *weights, *state)
        self.cell, self.x, self.weights, self.reverse, self.lengths = cell, x_TBI, weights, reverse, lengths
        self.h_mask = np.ones((B, P)) if h_mask is None else h_mask
        self.zoneout = np.zeros((T, B, P)) if zoneout is None else zoneout
        self.resets = np.zeros((T, B), bool) if resets is None else resets
        self.gains, self.peepholes = gains, peepholes
        self.looks = peepholes or [np.zeros(H)] * (native.GATES[cell] - 1)
        self.y = np.zeros((T, B, P), kind)
        self.shown = {name: np.zeros((T, B, H), kind) for name in native.SHOWN[cell]}
        self.after = [np.array(s, kind) for s in state]
        self.tape: dict[tuple[int, int], tuple[Any, ...]] = {}
        for b in range(B):
            now = tuple(s[b] for s in state)
            for t in self.steps(b):
                if self.resets[t, b]:
                    now = tuple(np.zeros(len(part)) for part in now)
                now = self.step(t, b, now)
                self.y[t, b] = now[0]
            for whole, part in zip(self.after, now, strict=True):
                whole[b] = part

    def steps(self, b: int) -> list[int]:
        steps = list(range(self.lengths[b]))
        return steps[::-1] if self.reverse else steps

    def step(self, t: int, b: int, now: tuple[Array, ...]) -> tuple[Array, ...]:
        weight_ih, weight_hh, bias_ih, bias_hh, *weight_hr = self.weights
        h, read = now[0], now[0] * self.h_mask[b]
        x_G, h_G = weight_ih @ self.x[t, b], weight_hh @ read
        hats: list[tuple[Array, Any]] = []
        if self.gains:
            hats = [normal(x_G), normal(h_G)]
            x_G, h_G = (gain * hat for gain, (hat, _) in zip(self.gains, hats, strict=False))
        x_G, h_G = x_G + bias_ih, h_G + bias_hh
        gates: tuple[Array, ...]
        c: tuple[Array, ...] = ()
        if self.cell == "gru":
            (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(x_G, 3), np.split(h_G, 3)
            r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)
            n = np.tanh(x_n + r * h_n)
            new, gates = (1 - z) * n + z * h, (r, z, n, h_n)
        elif native.STATES[self.cell] == 2:
            *of_i, f, g, o = np.split(x_G + h_G, native.GATES[self.cell])
            *look_i, look_f, look_o = self.looks
            f, g = sigmoid(f + look_f * now[1]), np.tanh(g)
            i = sigmoid(of_i[0] + look_i[0] * now[1]) if of_i else 1 - f
            c = (f * now[1] + i * g,)
            o = sigmoid(o + look_o * c[0])
            shown = c[0]
            if self.gains:
                hats.append(normal(c[0]))
                shown = self.gains[2] * hats[2][0] + self.gains[3]
            new, gates = o * np.tanh(shown), (i, f, g, o, shown)
            if weight_hr:
                new = weight_hr[0] @ new
        else:
            total = x_G + h_G
            new = np.tanh(total) if self.cell == "rnn" else np.where(total.real > 0, total, 0)
            gates = (new,)
        self.tape[t, b] = (now, read, gates, hats)
        values = dict(zip("ifgoc" if c else "rzn", (*gates[: 4 if c else 3], *c), strict=False))
        for name, shown in self.shown.items():
            shown[t, b] = values[name]
        mask = self.zoneout[t, b]
        return (new + mask * (h - new), *c)

    def gradients(self, dy: Array, dstate: Sequence[Array], dgates: Mapping[str, Array]) -> list[Array]:
        """Return the gradients of x, the weights, the states, the gains and the peepholes."""
        weight_ih, weight_hh, _, _, *weight_hr = self.weights
        dx, *dweights = (np.zeros(w.shape) for w in (self.x, *self.weights))
        dbefore = [np.array(d, np.float64) for d in dstate]
        dgains, dpeepholes = ([np.zeros(v.shape) for v in vectors] for vectors in (self.gains, self.peepholes))
        for b in range(self.x.shape[1]):
            dh, *dc = (d[b] for d in dstate)
            for t in self.steps(b)[::-1]:
                now, read, gates, hats = self.tape[t, b]
                dh, mask = dh + dy[t, b], self.zoneout[t, b]
                dnew, dh = dh * (1 - mask), dh * mask
                d = {name: gradient[t, b] for name, gradient in dgates.items()}
                if self.cell == "gru":
                    r, z, n, h_n = gates
                    dn = (dnew * (1 - z) + d["n"]) * (1 - n * n)
                    dz = (dnew * (now[0] - n) + d["z"]) * z * (1 - z)
                    dr = (dn * h_n + d["r"]) * r * (1 - r)
                    dh = dh + dnew * z
                    dx_G, dh_G = np.concatenate([dr, dz, dn]), np.concatenate([dr, dz, dn * r])
                elif native.STATES[self.cell] == 2:
                    i, f, g, o, shown = gates
                    if weight_hr:
                        dweights[4] += np.outer(dnew, o * np.tanh(shown))
                        dnew = weight_hr[0].T @ dnew
                    *look_i, look_f, look_o = self.looks
                    do = (dnew * np.tanh(shown) + d["o"]) * o * (1 - o)
                    dshown = dnew * o * (1 - np.tanh(shown) ** 2)
                    if hats:
                        dgains[2] += dshown * hats[2][0]
                        dgains[3] += dshown
                        dshown = through(dshown * self.gains[2], *hats[2])
                    dc_now = dc[0] + dshown + d["c"] + do * look_o
                    dg = (dc_now * i + d["g"]) * (1 - g * g)
                    if look_i:
                        di = [(dc_now * g + d["i"]) * i * (1 - i)]
                        df = (dc_now * now[1] + d["f"]) * f * (1 - f)
                    else:
                        di, df = [], (dc_now * (now[1] - g) + d["f"]) * f * (1 - f)
                    dc = [dc_now * f + df * look_f + sum(each * look for each, look in zip(di, look_i, strict=True))]
                    of_c = [each * now[1] for each in (*di, df)] + [do * (f * now[1] + i * g)]
                    for whole, part in zip(dpeepholes, of_c, strict=False):
                        whole += part
                    dx_G = dh_G = np.concatenate([*di, df, dg, do])
                else:
                    (new,) = gates
                    dx_G = dh_G = dnew * ((1 - new * new) if self.cell == "rnn" else (new > 0))
                dweights[2] += dx_G
                dweights[3] += dh_G
                if hats:
                    dgains[0] += dx_G * hats[0][0]
                    dgains[1] += dh_G * hats[1][0]
                    dx_G, dh_G = through(dx_G * self.gains[0], *hats[0]), through(dh_G * self.gains[1], *hats[1])
                dweights[0] += np.outer(dx_G, self.x[t, b])
                dweights[1] += np.outer(dh_G, read)
                dx[t, b] = weight_ih.T @ dx_G
                dh = dh + (weight_hh.T @ dh_G) * self.h_mask[b]
                if self.resets[t, b]:
                    dh, dc = np.zeros_like(dh), [np.zeros_like(d) for d in dc]
            for whole, part in zip(dbefore, (dh, *dc), strict=True):
                whole[b] = part
        return [dx, *dweights, *dbefore, *dgains, *dpeepholes]


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


# ------------------------------------------------------------------------------------------------- cases


def placed(shape: tuple[int, ...], offset: int) -> Array:
    """Return an array of NaN that begins `offset` floats after a multiple of 64 bytes."""
    room = np.full(int(np.prod(shape)) + 16 + offset, np.nan, np.float32)
    begin = -room.ctypes.data % 64 // 4 + offset
    return room[begin : begin + int(np.prod(shape))].reshape(shape)


class Case:
    """A layer, its input and what it may have, in float32, at addresses `offset` floats from a multiple of 64 bytes."""

    def __init__(
        self,
        rng: np.random.Generator,
        cell: str,
        *,
        T: int,
        B: int,
        I: int,
        H: int,
        P: int = 0,
        lengths: Sequence[int] | None = None,
        everything: bool = False,
        layer_norm: bool = False,
        peepholes: bool = False,
        bias: bool = True,
        offset: int = 0,
    ) -> None:
        def draw(*shape: int, scale: float = 1.0) -> Array:
            array = placed(shape, offset)
            array[...] = rng.normal(size=shape) * scale
            return array

        G = native.GATES[cell] * H
        self.cell, self.T, self.B, self.I, self.H, self.P = cell, T, B, I, H, P or H
        self.x = draw(T, B, I)
        biases = (draw(G, scale=0.5), draw(G, scale=0.5)) if bias else (None, None)
        of_h, projection = draw(G, self.P, scale=self.P**-0.5), draw(P, H, scale=H**-0.5) if P else None
        self.weights = Weights(draw(G, I, scale=(I + 1) ** -0.5), of_h, biases[0], biases[1], projection)
        self.state = tuple(draw(B, width) for width in (self.P, H)[: native.STATES[cell]])
        lstm = native.STATES[cell] == 2
        self.ragged = lengths is not None
        self.lengths = [T] * B if lengths is None else list(lengths)
        vectors: dict[str, Any] = {}
        if layer_norm:
            of_c = (1 + draw(H, scale=0.3), draw(H, scale=0.3)) if lstm else (None, None)
            vectors["gains"] = Gains(1 + draw(G, scale=0.3), 1 + draw(G, scale=0.3), *of_c)
        if lstm and (peepholes or everything):
            vectors["peepholes"] = Peepholes(None if cell == native.COUPLED else draw(H), draw(H), draw(H))
        self.options = Options(**vectors)
        if everything:
            self.options = Options(
                **vectors,
                h_mask=(rng.random((B, self.P)) < 0.7).astype(np.float32) / np.float32(0.7),
                zoneout_mask=(rng.random((T, B, self.P)) < 0.3).astype(np.float32),
                resets=rng.random((T, B)) < 0.3,
            )

    def filled_weights(self) -> list[Array]:
        *weights, weight_hr = self.weights
        found = [np.zeros(len(self.weights.weight_hh), np.float32) if w is None else w for w in weights]
        return found if weight_hr is None else [*found, weight_hr]

    def reference_options(self) -> dict[str, Any]:
        zoneout = self.options.zoneout_mask
        if zoneout is None:
            zoneout = np.full((self.T, self.B, self.P), self.options.zoneout)
        options = {"h_mask": self.options.h_mask, "zoneout": zoneout, "resets": self.options.resets}
        vectors = {"gains": self.gains(), "peepholes": self.peepholes()}
        return options | {name: [each.astype(np.float64) for each in found] for name, found in vectors.items()}

    def gains(self) -> list[Array]:
        return [gain for gain in self.options.gains or () if gain is not None]

    def peepholes(self) -> list[Array]:
        return [weight for weight in self.options.peepholes or () if weight is not None]

    def sequences(self, reverse: bool) -> Sequences:
        if not self.ragged:
            return Sequences(reverse=reverse)
        lengths = np.array(self.lengths, np.int64)
        order = np.argsort(-lengths, kind="stable")
        counts = (lengths[None] > np.arange(self.T)[:, None]).sum(1)
        return Sequences(counts=counts, order=order, reverse=reverse)

    def reference(self, reverse: bool, dtype: Any = np.float64) -> Reference:
        x, weights, state = self.x.astype(dtype), self.filled_weights(), [part.astype(dtype) for part in self.state]
        given = (x, [weight.astype(dtype) for weight in weights], state, self.lengths, reverse)
        return Reference(self.cell, *given, **self.reference_options())

    def forward(self, reverse: bool = False, **more: Any) -> Output:
        more = {"sequences": self.sequences(reverse), "options": self.options, "state": self.state, **more}
        return native_layers.forward(self.cell, self.x, self.weights, **more)

    def check(self, target: str, reverse: bool = False, threads: int = 1, **more: Any) -> None:
        """Compare outputs and gradients of this target with the reference."""
        rng = np.random.default_rng(1)
        sequences = self.sequences(reverse)
        plain = self.forward(reverse, threads=threads, target=target, **more)
        output = self.forward(reverse, threads=threads, target=target, save=True, **more)
        expected = self.reference(reverse)
        dy = rng.normal(size=output.y.shape).astype(np.float32)
        dstate = [rng.normal(size=s.shape).astype(np.float32) for s in self.state]
        of_units = (self.T, self.B, self.H)
        dgates = {name: rng.normal(size=of_units).astype(np.float32) for name in native.SHOWN[self.cell]}
        wanted = expected.gradients(dy, dstate, dgates)
        forward, backward = [1e-5] * (1 + len(self.state)), [1e-4] * len(wanted)
        if self.options.gains is not None:
            # Where a row's values lie close together, the normalised ones lose digits, whoever computes them.
            single = self.reference(reverse, np.float32)
            values = zip((single.y, *single.after), (expected.y, *expected.after), strict=True)
            forward = [max(1e-5, 3 * error(*pair)) for pair in values]
            pairs = zip(single.gradients(dy, dstate, dgates), wanted, strict=True)
            backward = [max(1e-4, 3 * error(*pair)) for pair in pairs]
        for found in (plain, output):
            for name, value, tolerance in zip(
                ("y", "h_n", "c_n"), (expected.y, *expected.after), forward, strict=False
            ):
                close(getattr(found, name), value, tolerance, name)
        settings: dict[str, Any] = {"target": target, "sequences": sequences, "options": self.options}
        assert output.saved is not None
        shown = native_layers.gates(self.cell, self.x, self.weights, output.saved, **settings)
        assert list(shown) == list(dgates)
        for name, gate in shown.items():
            close(gate, expected.shown[name], max(forward), name)
        arguments = (self.cell, self.x, self.weights, output, dy, self.state, dstate, dgates)
        settings["threads"] = threads
        gradients = native_layers.backward(*arguments, **settings)
        names = [*Gradients._fields[:6], *Gradients._fields[6 : 6 + len(self.state)]]
        found_of = {name: getattr(gradients, name) for name in names}
        assert (found_of["weight_hr"] is None) == (self.weights.weight_hr is None)
        present = [(name, gradient) for name, gradient in found_of.items() if gradient is not None]
        for vectors in (gradients.gains, gradients.peepholes):
            present += [(n, v) for n, v in ({} if vectors is None else vectors._asdict()).items() if v is not None]
        assert len(present) == len(wanted)
        for (name, gradient), value, tolerance in zip(present, wanted, backward, strict=True):
            close(gradient, value, tolerance, f"gradient of {name}")
        begun = rng.normal(size=self.x.shape).astype(np.float32)
        added = native_layers.backward(*arguments, **settings, dx=begun.copy())
        close(added.x, wanted[0] + begun, backward[0], "accumulated gradient of x")


def same(a: Array | None, b: Array | None) -> bool:
    """Return whether two arrays have the same values, or are both missing."""
    return a is b is None or (a is not None and b is not None and np.array_equal(a, b))


def close(found: Array | None, wanted: Array, tolerance: float, name: str) -> None:
    """Hold an array to another: largest difference over largest value."""
    assert found is not None
    assert found.shape == wanted.shape, name
    assert error(found, wanted) <= tolerance, f"{name}: {error(found, wanted):.2e}"


def error(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)) if found.size else 0.0


LARGER = [(9, 2, 40, 200), (6, 33, 64, 64), (5, 20, 30, 130)]

# ------------------------------------------------------------------------------------------------- functions

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


@pytest.mark.parametrize("function", list(native.FUNCTIONS))
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


def test_a_function_does_not_depend_on_its_neighbours(target: str) -> None:
    x = np.random.default_rng(0).normal(size=3 * LANES[target]).astype(np.float32)
    for function in native.FUNCTIONS:
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
    for T, B, I, H in LARGER:
        for threads in (1, 3):
            Case(rng, cell, T=T, B=B, I=I, H=H, layer_norm=True).check(target, reverse, threads)
    for T, B in ((0, 3), (2, 0)):
        Case(rng, cell, T=T, B=B, I=2, H=5, layer_norm=True).check(target, reverse)


@DIRECTIONS
@pytest.mark.parametrize("cell", ["lstm", native.COUPLED])
def test_peepholes(target: str, cell: str, reverse: bool) -> None:
    rng, W = np.random.default_rng(0), LANES[target]
    for T, B, I, H in ((1, 1, 3, 5), (3, 2, 4, 2 * W), (4, 5, 6, W - 1), (4, W + 3, 3, 3 * W + 2), *LARGER):
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
    shapes += [(T, B, I, H, P) for (T, B, I, H), P in zip(LARGER, (2 * W + 3, 24, 5), strict=True)]
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
    for T, B, I, H in LARGER:
        for threads in (1, 2, 3):
            Case(rng, cell, T=T, B=B, I=I, H=H).check(target, reverse, threads)
        lengths = [int(n) for n in rng.integers(0, T + 1, size=B)]
        Case(rng, cell, T=T, B=B, I=I, H=H, lengths=lengths, everything=True).check(target, reverse, 2)


@DIRECTIONS
@EVERY_CELL
def test_threads_that_divide_rows(target: str, cell: str, reverse: bool) -> None:
    """So many rows, and all as long, that threads divide them: each has its own sums of the weights' gradients."""
    rng = np.random.default_rng(0)
    P = 11 if native.STATES[cell] == 2 else 0
    for T, B, layer_norm in ((9, 34, False), (40, 17, True)):
        case = Case(rng, cell, T=T, B=B, I=13, H=39, P=P, everything=True, layer_norm=layer_norm, offset=1)
        for threads in (2, 5):
            case.check(target, reverse, threads)


@pytest.mark.parametrize("target", [*TARGETS, *native.BFLOAT16], indirect=True)
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
from longshort import native, native_layers, ops
rng = np.random.default_rng(0)
draw = lambda *shape: rng.normal(size=shape).astype("f4")
x, weights, dy = draw(20, 34, 24), native_layers.Weights(draw(156, 24), draw(156, 39)), draw(20, 34, 39)
gains = native_layers.Options(gains=native_layers.Gains(draw(156), draw(156), draw(39), draw(39)))
def run(threads):
    found = []
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


# ------------------------------------------------------------------------------------------------- refused arguments


def arguments_of(case: Case, output: Output) -> tuple[ForwardArgs, BackwardArgs, dict[str, Array]]:
    """Return a forward and a backward call that are right, and the arrays that they point to."""
    T, B, I, H = case.T, case.B, case.I, case.H
    G = native.GATES[case.cell] * H
    assert output.saved is not None
    arrays = {"y": output.y, "saved": output.saved, "x": case.x}
    arrays |= {"dy": np.ones_like(output.y), "dx": np.zeros_like(case.x)}
    arrays |= dict(zip(native_layers.Weights._fields, case.filled_weights(), strict=False))
    arrays |= {name: np.zeros((B, H), np.float32) for name in ("h0", "c0", "h_n", "c_n", "dh0", "dc0", "dh_n", "dc_n")}
    arrays |= {"dweight_ih": np.zeros((G, I), np.float32), "dweight_hh": np.zeros((G, H), np.float32)}
    arrays |= {name: np.zeros(G, np.float32) for name in ("dbias_ih", "dbias_hh")}
    forward, backward = ForwardArgs(), BackwardArgs()
    for args in (forward, backward):
        args.shape = Shape(T, B, I, H, 0, None, None, None, native.LAYER_CELLS[case.cell], 0, 1, -1)
        for name, kind, *_ in args._fields_:
            if name in arrays and kind is ctypes.c_void_p:
                setattr(args, name, arrays[name].ctypes.data)
            elif name.endswith(("_step", "_row")):
                width = arrays[name.split("_")[0]].shape[-1]
                setattr(args, name, B * width if name.endswith("_step") else width)
    return forward, backward, arrays


@needs_library
@EVERY_CELL
def test_arguments_that_cannot_be_are_refused(cell: str) -> None:
    library = native.library()
    assert library is not None
    case = Case(np.random.default_rng(0), cell, T=3, B=2, I=4, H=5)
    output = case.forward(save=True)
    indices = {
        "counts": ([1, 2, 2], [3, 2, 1], [2, 1, -1]),  # rising, above B, negative
        "order": ([0, 2], [-1, 0]),
    }
    held = {name: [np.array(v, np.int64) for v in lists] for name, lists in indices.items()}
    largest = 2**31 - 1
    bad: list[dict[str, Any]] = [
        *({name: value} for name in "TBI" for value in (-1, largest + 1, -(2**63))),
        *({"H": value} for value in (0, -1, largest + 1)),
        *({"P": value} for value in (-1, largest + 1, *((3,) if native.STATES[cell] == 1 else ()))),
        *({"cell": value} for value in (-1, 5)),
        *({"target": value} for value in (-2, library.ls_num_targets(), 1000)),
        *({name: array.ctypes.data} for name, arrays in held.items() for array in arrays),
        *({name: None} for name in ("x", "weight_ih", "weight_hh", "y")),
        {"T": largest, "B": largest},
        dict.fromkeys("TBIH", largest),
    ]
    for changes in bad:
        forward, backward, _arrays = arguments_of(case, output)
        for args in (forward, backward):
            for name, value in changes.items():
                setattr(args if hasattr(args, name) else args.shape, name, value)
        assert library.ls_forward(ctypes.byref(forward)) == native.BAD_ARGUMENT, changes
        assert library.ls_backward(ctypes.byref(backward)) == native.BAD_ARGUMENT, changes
    vector = output.h_n.ctypes.data
    names = ("weight_ci", "weight_cf", "weight_co")
    every = names[1:] if cell == native.COUPLED else names if native.STATES[cell] == 2 else ()
    for given in itertools.chain(*(itertools.combinations(names, n) for n in (1, 2, 3))):
        forward, backward, _arrays = arguments_of(case, output)
        for name in given:
            setattr(forward.options, name, vector)
        wanted = native.OK if given == every else native.BAD_ARGUMENT
        assert library.ls_forward(ctypes.byref(forward)) == wanted, given
    forward, backward, _arrays = arguments_of(case, output)
    if native.STATES[cell] == 2:  # a projection without its weights
        forward.shape.P = backward.shape.P = 5
        assert library.ls_forward(ctypes.byref(forward)) == native.BAD_ARGUMENT
        assert library.ls_backward(ctypes.byref(backward)) == native.BAD_ARGUMENT
    forward, backward, _arrays = arguments_of(case, output)
    saved, backward.saved = backward.saved, None
    assert library.ls_backward(ctypes.byref(backward)) == native.BAD_ARGUMENT
    backward.saved = saved
    shape, gates = ctypes.byref(forward.shape), np.empty((5, 3, 2, 5), np.float32).ctypes.data
    for pointers in ((None, gates), (saved, None)):
        assert library.ls_gates(shape, 0, *pointers) == (native.BAD_ARGUMENT if native.SHOWN[cell] else native.OK)
    assert library.ls_gates(None, 0, saved, gates) == native.BAD_ARGUMENT
    assert library.ls_gates(shape, 0, saved, gates) == native.OK
    assert library.ls_forward(ctypes.byref(forward)) == native.OK
    assert library.ls_backward(ctypes.byref(backward)) == native.OK
    assert library.ls_forward(None) == library.ls_backward(None) == native.BAD_ARGUMENT


@needs_library
def test_sizes_and_names_that_cannot_be_are_refused() -> None:
    library = native.library()
    assert library is not None
    good = Shape(3, 2, 4, 5, 0, None, None, None, 3, 0, 1, -1)
    assert library.ls_saved_floats(ctypes.byref(good), 0) > 0
    assert library.ls_saved_floats(ctypes.byref(good), 1) > library.ls_saved_floats(ctypes.byref(good), 0)
    for name, value in (("T", -1), ("H", 0), ("cell", 9), ("target", 99)):
        shape = Shape(3, 2, 4, 5, 0, None, None, None, 3, 0, 1, -1)
        setattr(shape, name, value)
        assert library.ls_saved_floats(ctypes.byref(shape), 0) == -1
    assert library.ls_saved_floats(None, 0) == -1
    assert library.ls_packed_floats(3, 4, 5, 2, -1) > library.ls_packed_floats(3, 4, 2, 0, -1) > 0
    widths = ((3, -1, 5, 0, -1), (3, 4, 0, 0, -1), (3, 4, 2**40, 0, -1), (3, 4, 5, -1, -1), (2, 4, 5, 3, -1))
    for bad in ((5, 4, 5, 0, -1), *widths, (3, 4, 5, 0, 99)):
        assert library.ls_packed_floats(*bad) == -1
        assert library.ls_pack(*bad, None, None, None, None, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(3, -1, 0, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, 99, 0, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, -1, -1, None, None) == native.BAD_ARGUMENT
    assert library.ls_apply(0, -1, 0, None, None) == native.OK
    for target in (-1, library.ls_num_targets()):
        assert library.ls_set_target(target) == native.BAD_ARGUMENT
        assert not library.ls_target_supported(target)
        assert library.ls_target_name(target) is None
    library.ls_trim()


@needs_library
def test_arrays_that_do_not_fit_are_refused() -> None:
    case = Case(np.random.default_rng(0), "lstm", T=3, B=2, I=4, H=5)
    run = native_layers.forward
    x, weights, state = case.x, case.weights, case.state
    out = np.zeros((3, 2, 5), np.float32)
    read_only = out.copy()
    read_only.flags.writeable = False
    gain, of_gru = np.ones(15, np.float32), Weights(weights.weight_ih[:15], weights.weight_hh[:15])
    short = Options(gains=Gains(np.ones(20, np.float32), np.ones(20, np.float32)))
    long = Options(gains=Gains(gain, gain, gain[:5], gain[:5]))
    looks, wide = Peepholes(None, gain[:5], gain[:5]), Peepholes(None, gain, gain[:5])
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(99, np.float32), (3, 2, 5), (4, 4, 4))
    turned_out = np.zeros((3, 5, 2), np.float32).swapaxes(1, 2)
    ones: Any = np.ones(3)
    zeros: Any = np.zeros((3, 2))
    listed: Any = [[1.0]]
    double: Any = x.astype(np.float64)
    bad: list[tuple[str, Callable[[], object]]] = [
        ("cell must be one of", lambda: run("lsmt", x, weights)),
        ("x must be a float32 array, not float64", lambda: run("lstm", double, weights)),
        ("x must be a float32 array, not list", lambda: run("lstm", listed, weights)),
        (r"x must have the shape \(any, any, 4\), not \(3, 2, 5\)", lambda: run("lstm", out, weights)),
        ("weight_hh must have the shape", lambda: run("gru", x, weights)),
        ("bias_ih must have the shape", lambda: run("lstm", x, weights._replace(bias_ih=np.zeros(3, np.float32)))),
        ("state must hold 2 arrays", lambda: run("lstm", x, weights, state[:1])),
        (r"state\[1\] must have the shape \(2, 5\)", lambda: run("lstm", x, weights, (state[0], out[0, :1]))),
        ("threads must be at least 1", lambda: run("lstm", x, weights, threads=0)),
        ("must be writable", lambda: run("lstm", x, weights, out=read_only)),
        ("must not overlap itself", lambda: run("lstm", x, weights, out=overlapping)),
        ("contiguous in its last axis", lambda: run("lstm", x, weights, out=turned_out)),
        ("packed must have the shape", lambda: run("lstm", x, weights, packed=np.zeros(3, np.float32))),
        ("counts must fall", lambda: run("lstm", x, weights, sequences=Sequences(counts=np.array([1, 2, 2])))),
        ("counts must be a list of integers", lambda: run("lstm", x, weights, sequences=Sequences(counts=ones))),
        ("counts must have the shape", lambda: run("lstm", x, weights, sequences=Sequences(counts=np.array([2])))),
        ("order must be a permutation", lambda: run("lstm", x, weights, sequences=Sequences(order=np.array([0, 0])))),
        ("zoneout must be from 0 to 1", lambda: run("lstm", x, weights, options=Options(zoneout=2.0))),
        ("resets must be a bool array", lambda: run("lstm", x, weights, options=Options(resets=zeros))),
        ("layer normalisation of an LSTM needs gamma_c", lambda: run("lstm", x, weights, options=short)),
        ("gamma_c and beta_c are the LSTM's", lambda: run("gru", x, of_gru, options=long)),
        ("gamma_hh must have the shape", lambda: run("gru", x, of_gru, options=Options(gains=Gains(gain, gain[1:])))),
        ("weight_hr is the LSTM's", lambda: run("gru", x, of_gru._replace(weight_hr=np.ones((5, 5), np.float32)))),
        (
            "weight_hr must have the shape",
            lambda: run("lstm", x, weights._replace(weight_hr=np.ones((5, 4), np.float32))),
        ),
        ("peepholes are the LSTM's, not the gru's", lambda: run("gru", x, of_gru, options=Options(peepholes=looks))),
        ("weight_ci is of the gate i", lambda: run("lstm", x, weights, options=Options(peepholes=looks))),
        ("weight_cf must have the shape", lambda: run("lstm_coupled", x, of_gru, options=Options(peepholes=wide))),
        ("h_mask must have the shape", lambda: run("lstm", x, weights, options=Options(h_mask=out[0, :1]))),
        ("function must be one of", lambda: native_layers.apply("cosh", x)),
        ("save=True", lambda: native_layers.backward("lstm", x, weights, run("lstm", x, weights), None)),
    ]
    starts = Sequences(counts=np.array([2, 2]), starts=np.array([0, 2]))
    bad.append(("must lie inside of the 3 rows", lambda: run("lstm", x[:, 0], weights, sequences=starts)))
    for words, call in bad:
        with pytest.raises(ValueError, match=words):
            call()
    # Arrays that lie in memory in ways that the library does not read are copied.
    turned = np.ascontiguousarray(x.transpose(2, 1, 0)).transpose(2, 1, 0)
    assert np.array_equal(run("lstm", turned, weights).y, run("lstm", x, weights).y)
    assert np.array_equal(run("lstm", x[::-1], weights).y, run("lstm", x[::-1].copy(), weights).y)


# ------------------------------------------------------------------------------------------------- the door


@needs_library
def test_structures_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    structures = {
        "ls_shape": Shape,
        "ls_options": LayerOptions,
        "ls_forward_args": ForwardArgs,
        "ls_backward_args": BackwardArgs,
    }
    lines, wanted = [], []
    for name, structure in structures.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        wanted.append(ctypes.sizeof(structure))
        for field, *_ in structure._fields_:
            lines.append(f'printf("%zu\\n", offsetof({name}, {field}));')
            wanted.append(getattr(structure, field).offset)
    lines.append('printf("%d\\n", LS_ABI_VERSION);')
    wanted.append(native.ABI_VERSION)
    source = tmp_path / "sizes.c"
    body = "\n".join(lines)
    source.write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <longshort.h>\nint main(void) {{\n{body}\n}}\n"
    )
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "csrc")]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "sizes")], check=True)
    found = subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout
    assert [int(line) for line in found.split()] == wanted


@needs_library
def test_the_library_needs_only_the_system_and_shows_only_its_interface() -> None:
    readelf, nm = shutil.which("readelf"), shutil.which("nm")
    if not (readelf and nm and native.PATH.is_file()):
        pytest.skip("readelf, nm and the package's own library are needed")

    def show(*command: str) -> str:
        return subprocess.run([*command, str(native.PATH)], check=True, capture_output=True, text=True).stdout

    needed = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.*?)\]", show(readelf, "-d"))}
    assert needed <= {"libc", "libm", "libdl", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}
    symbols = {line.split()[-1] for line in show(nm, "-D", "--defined-only").splitlines()}
    assert symbols == set(native._SIGNATURES)


@needs_library
def test_targets_are_listed_best_first_and_forced() -> None:
    assert set(native.targets()) <= set(native.built_targets()) <= {*TARGETS, *native.BFLOAT16}
    assert native.targets()[-1] == "baseline"
    assert native.built_targets()[-1] in ("baseline", *native.BFLOAT16), "it is never the one that runs unasked"
    assert native.threading() in ("own", "openmp")
    before = native.active_target()
    with pytest.raises(UsageError, match=r"There is no target 'avx521'; there are .*\nDid you mean 'avx512'"):
        native.set_target("avx521")
    assert native.active_target() == before


def test_other_targets_are_other_code() -> None:
    """Fused multiplications round once: what a forced target computes shows which it was."""
    if not {"baseline", "avx2"} <= set(native.targets()):
        pytest.skip("there are not two targets here")
    x = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    assert not np.array_equal(native_layers.apply("sigmoid", x, "baseline"), native_layers.apply("sigmoid", x, "avx2"))


class OldProcessor:
    """A library whose second target this processor lacks."""

    def ls_num_targets(self) -> int:
        return 2

    def ls_target_name(self, i: int) -> bytes:
        return (b"baseline", b"avx2")[i]

    def ls_target_supported(self, i: int) -> int:
        return int(i == 0)


def test_a_target_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", native._Loaded(OldProcessor(), ""))  # type: ignore[arg-type]
    assert native.targets() == ("baseline",)
    with pytest.raises(UsageError, match="This processor cannot run the target 'avx2'; it can run baseline"):
        native.set_target("avx2")


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, check=False
    )


@needs_library
def test_the_environment_forces_target_and_library() -> None:
    for name in native.targets():
        done = python("from longshort import native; print(native.active_target())", LONGSHORT_TARGET=name)
        assert done.stdout == f"{name}\n", done.stderr
    doctor = "from longshort.cli import main; import sys; sys.exit(main(['doctor']))"
    done = python(doctor, LONGSHORT_TARGET="avx3")
    assert (done.returncode, "LONGSHORT_TARGET" in done.stderr, "Did you mean" in done.stderr) == (2, True, True)
    done = python(doctor, LONGSHORT_LIBRARY="/nowhere/lib.so")
    assert done.returncode == 2
    assert "LONGSHORT_LIBRARY cannot be used: there is no file /nowhere/lib.so" in done.stderr


def test_it_is_loaded_when_it_is_needed() -> None:
    program = (
        "import sys, longshort; assert 'longshort.native' not in sys.modules\n"
        "from longshort import native; assert native._loaded is None and 'numpy' not in sys.modules"
    )
    assert python(program).returncode == 0


def test_without_a_library_everything_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LONGSHORT_LIBRARY", raising=False)
    for content, why in ((None, "was not built"), ("text", "file too short|invalid ELF header|not a mach-o")):
        path = tmp_path / "a" / "b" / "c" / "liblongshort.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is not None:
            path.write_text(content)
        monkeypatch.setattr(native, "PATH", path)
        monkeypatch.setattr(native, "_loaded", None)
        monkeypatch.setattr(native, "_warned", False)
        assert native.library() is None
        assert re.search(f"^There are no native kernels: .*({why})", native.reason())
        assert "LONGSHORT_REQUIRE_NATIVE=1 pip install" in native.reason()
        assert native.targets() == native.built_targets() == ()
        assert native.active_target() is native.threading() is None
        with pytest.warns(NativeWarning, match="There are no native kernels"):
            assert not native.ready()
        assert not native.ready()  # says it once
        with pytest.raises(UsageError, match="There are no native kernels"):
            native_layers.apply("exp", np.zeros(1, np.float32))
