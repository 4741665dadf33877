"""What the kernel library's tests share: its layers in NumPy, in any precision, and cases to hold them against.

T  steps   B  rows   I  input width   H  hidden units   P  width of a projection
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort import native, native_layers
from longshort.native_layers import Gains, Gradients, Options, Output, Peepholes, Sequences, Weights

Array = NDArray[Any]
TARGETS = ("avx512", "avx2", "baseline", "amx")
CELLS = tuple(native.LAYER_CELLS)


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

    def check(self, target: str, reverse: bool = False, threads: int = 1, back: int | None = None, **more: Any) -> None:
        """Compare outputs and gradients of this target with the reference; `back`: the backward pass's threads."""
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
        settings["threads"] = threads if back is None else back
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
