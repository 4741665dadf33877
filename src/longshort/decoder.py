"""Runs a trained model without PyTorch: on the native kernels or on NumPy; rnn, gru and lstm.

    T  steps   B  rows   V  symbols   E  width of the embedding   H  hidden units   G  gates times H   L  layers

The native kernels, where there are any, read and write many symbols in one call. The first layer reads a table of V + 1
rows, the product of embedding and input weights with the bias added; the last row is the unknown symbol's. All in
float32, probabilities in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from longshort import checkpoint, machine, native, native_layers
from longshort.config import SHRINKAGE, ModelConfig, adaptive_cutoffs
from longshort.errors import CheckpointError, UsageError
from longshort.model_files import Saved
from longshort.native_layers import Weights
from longshort.native_model import Draw, NativeModel, normalise, product
from longshort.prefixes import nats_of_lines
from longshort.text import tokenizers
from longshort.text.tokenizers import Tokenizer

Array = NDArray[np.float32]
State = tuple[Array, ...]
"""Each tensor (L, B, H)."""
Gates = tuple[Array, ...]
"""Each (B, H)."""
Step = Callable[[Array, Array, State], tuple[State, Gates]]
"""`step(x_BG, h_BG, state) -> (state, gates)`: the input's and the state's shares of the gates, biases added."""
Readings = dict[str, Array]
"""What one layer had at every step: each gate and each tensor of the state by name, (T, H)."""


def _sigmoid(x: Array) -> Array:
    # By tanh, which cannot overflow.
    y: Array = np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * x))
    return y


def _rnn_step(x_BG: Array, h_BG: Array, state: State) -> tuple[State, Gates]:
    h = np.tanh(x_BG + h_BG)
    return (h,), (h,)


def _rnn_relu_step(x_BG: Array, h_BG: Array, state: State) -> tuple[State, Gates]:
    h = np.maximum(x_BG + h_BG, np.float32(0))
    return (h,), (h,)


def _gru_step(x_BG: Array, h_BG: Array, state: State) -> tuple[State, Gates]:
    H = x_BG.shape[1] // 3
    r_z = _sigmoid(x_BG[:, : 2 * H] + h_BG[:, : 2 * H])
    r, z = r_z[:, :H], r_z[:, H:]
    n = np.tanh(x_BG[:, 2 * H :] + r * h_BG[:, 2 * H :])
    return (n + z * (state[0] - n),), (r, z, n)


def _lstm_step(x_BG: Array, h_BG: Array, state: State) -> tuple[State, Gates]:
    return _lstm_normal_step(x_BG, h_BG, state, None)


def _lstm_normal_step(
    x_BG: Array, h_BG: Array, state: State, normal_c: tuple[Array, Array] | None
) -> tuple[State, Gates]:
    """The LSTM's step; `normal_c` is gain and bias of the normalised c that the output reads, if it is normalised."""
    gates_BG = x_BG + h_BG
    H = x_BG.shape[1] // 4
    i_f, o = _sigmoid(gates_BG[:, : 2 * H]), _sigmoid(gates_BG[:, 3 * H :])
    i, f, g = i_f[:, :H], i_f[:, H:], np.tanh(gates_BG[:, 2 * H : 3 * H])
    c = f * state[1] + i * g
    seen = c if normal_c is None else normalise(c, normal_c[0]) + normal_c[1]
    return (o * np.tanh(seen), c), (i, f, g, o)


class ArrayCell(NamedTuple):
    """A cell of `cells.py` once more, on arrays."""

    step: Step
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)


LAYER_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
"""Names of the weights of a model's layer, which has biases and no projection."""
CELLS = {
    "rnn": ArrayCell(_rnn_step, ("h",)),
    "rnn_relu": ArrayCell(_rnn_relu_step, ("h",)),
    "gru": ArrayCell(_gru_step, ("r", "z", "n")),
    "lstm": ArrayCell(_lstm_step, ("i", "f", "g", "o"), ("h", "c")),
}


PRECISIONS = ("float32", "bfloat16", "int8")


class Decoder:
    """A trained model that reads and predicts.

    Args:
        config: what the model is.
        weights: its weights by name, as `LanguageModel.weights` gives them.
        tokenizer: of the text it was trained on.
        precision: of the factors of products: float32, int8 (a scale for each unit's weights and for each row that
            they are multiplied by), or where the processor multiplies that bfloat16. `generation.cost_in_bits` says
            what that costs.

    Raises:
        UsageError: a cell that only PyTorch can run, or a precision that cannot be had.
        CheckpointError: a weight is missing, is one too many, or has another shape than `config` says.
    """

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Array], tokenizer: Tokenizer, precision: str = "float32"
    ) -> None:
        if config.cell not in CELLS or config.adaptive_softmax:
            what = "An adaptive softmax" if config.cell in CELLS else f"The cell {config.cell!r}"
            others = "" if config.cell in CELLS else f"; without it {', '.join(CELLS)} can be run"
            hint = "Install PyTorch: pip install 'longshort[train]'"
            if machine.version_of("torch") is not None:
                hint = "In Python longshort.load(PATH, train=True); from the command line float32, without --weights."
            raise UsageError(f"{what} runs with PyTorch only{others}.", hint)
        if precision not in PRECISIONS:
            raise UsageError(f"Weights can be {', '.join(PRECISIONS)}; not {precision!r}.")
        self.config = config
        self.tokenizer = tokenizer
        self._cell = CELLS[config.cell]
        shapes = check_weights(config, len(self._cell.gates), weights)
        self._weights = {name: np.asarray(weights[name], dtype=np.float32) for name in shapes}
        w = self._weights
        self.threads = machine.cores()
        """At most so many are used."""
        weight_VH = w["embedding.weight" if config.tied else "output.weight"]
        self._native: NativeModel | None = None
        if runs_natively(config) and native.ready():
            layers = [self._layer_weights(layer) for layer in range(config.layers)]
            rows = w["embedding.weight"] if config.embedding else np.eye(config.vocab_size, dtype=np.float32)
            self._native = NativeModel(
                config.cell,
                layers,
                with_unknown(rows),
                (weight_VH, w["output.bias"]),
                int8=precision == "int8",
                residual=config.residual,
                gains=[self._gains(layer) for layer in range(config.layers)] if config.layer_norm else (),
                target=native.need_bfloat16() if precision == "bfloat16" else None,
            )
        elif precision != "float32":
            raise UsageError(f"Weights of {precision} need native kernels. {native.reason()}")
        self._output = weight_VH.T

    def _layer_weights(self, layer: int) -> Weights:
        """Return a layer's weights as the native kernels take them."""
        return Weights(*(self._weights[f"recurrent.{name}_l{layer}"] for name in LAYER_WEIGHTS))

    def _gains(self, layer: int) -> list[Array]:
        """Return a layer's gains of layer normalisation, as `NativeModel` takes them."""
        return [self._weights[f"recurrent.{name}_l{layer}"] for name in native.gain_sizes(self.config.cell, 0, 0)]

    @cached_property
    def _table(self) -> Array:
        """What each symbol gives the gates of the first layer, (V + 1, G), for NumPy."""
        table_VG = self._weights["recurrent.weight_ih_l0"].T
        if self.config.embedding:
            table_VG = product(self._weights["embedding.weight"], table_VG)
        return normalised(self._weights, "ih_l0", with_unknown(table_VG)) + self._weights["recurrent.bias_ih_l0"]

    def _start(self, batch_size: int, state: State | None) -> State:
        """Return a state that may be overwritten."""
        if state is None:
            return self._zero_state(batch_size)
        return tuple(np.array(tensor, dtype=np.float32, order="C") for tensor in state)

    def _zero_state(self, batch_size: int) -> State:
        shape = (self.config.layers, batch_size, self.config.hidden)
        return tuple(np.zeros(shape, dtype=np.float32) for _ in self._cell.states)

    def _run(
        self, ids_TB: NDArray[np.int64], state: State | None, readings: list[Readings] | None = None
    ) -> tuple[Array, State]:
        """Return the last layer's outputs (T, B, H) and the state after the last step, by NumPy.

        `readings`, of one row, is filled with what each layer had at every step.
        """
        before = self._zero_state(ids_TB.shape[1]) if state is None else state
        w, (T, B) = self._weights, ids_TB.shape
        after: list[State] = []
        x_TBH: Array = np.empty(0, dtype=np.float32)
        for layer in range(self.config.layers):
            if layer == 0:
                x_TBG = self._table[ids_TB]
            else:
                x_TBG = normalised(w, f"ih_l{layer}", product(x_TBH, w[f"recurrent.weight_ih_l{layer}"].T))
                x_TBG += w[f"recurrent.bias_ih_l{layer}"]
            weight_hh, bias_hh = w[f"recurrent.weight_hh_l{layer}"], w[f"recurrent.bias_hh_l{layer}"]
            now = tuple(tensor[layer] for tensor in before)
            h_TBH, step = np.empty((T, B, self.config.hidden), dtype=np.float32), step_of(self._cell, w, f"l{layer}")
            seen: list[Gates] = []
            for t in range(T):
                # (G, H) times a column is BLAS's fast product for one row; the transposed one is, for several.
                h_BG = product(weight_hh, now[0][0])[None] if B == 1 else product(now[0], weight_hh.T)
                now, gates = step(x_TBG[t], normalised(w, f"hh_l{layer}", h_BG) + bias_hh, now)
                h_TBH[t] = now[0]
                if readings is not None:
                    seen.append((*gates, *now))
            after.append(now)
            if readings is not None:
                names = (*self._cell.gates, *self._cell.states)
                values = (np.concatenate(of_name) for of_name in zip(*seen, strict=True))
                readings.append(dict(zip(names, values, strict=True)))
            x_TBH = x_TBH + h_TBH if layer and self.config.residual else h_TBH
        return x_TBH, tuple(np.stack(tensors) for tensors in zip(*after, strict=True))

    def nats(
        self, inputs_TB: NDArray[np.int64], targets_TB: NDArray[np.int64], state: State | None
    ) -> tuple[NDArray[np.float64], State]:
        """Return -log p of each target in nats, float64 (T, B), and the state after the last input."""
        if self._native:
            after = self._start(inputs_TB.shape[1], state)
            nats_TB, _ = self._native.read(inputs_TB, after, targets_TB, threads=self.threads)
            return cast("NDArray[np.float64]", nats_TB), after
        h_TBH, state = self._run(inputs_TB, state)
        logits_TBV = (product(h_TBH, self._output) + self._weights["output.bias"]).astype(np.float64)
        largest_TB1 = logits_TBV.max(axis=-1, keepdims=True)
        log_sum_TB = np.log(np.exp(logits_TBV - largest_TB1).sum(axis=-1)) + largest_TB1[..., 0]
        target_logits_TB = np.take_along_axis(logits_TBV, targets_TB[..., None], axis=-1)[..., 0]
        return log_sum_TB - target_logits_TB, state

    def nats_of_lines(
        self,
        ids: NDArray[np.integer],
        starts_B: NDArray[np.int64],
        stops_B: NDArray[np.int64],
        pause: Callable[[], None] = lambda: None,
    ) -> NDArray[np.float64]:
        """Read lines from a zero state, what they begin with in common once, by native kernels only.

        Each symbol has the bits that `nats` gives it, and 0 where it is outside the vocabulary; order and arguments are
        those of `prefixes.nats_of_lines`.

        Raises:
            UsageError: there are no native kernels.
        """
        if self._native is None:
            raise UsageError("Without native kernels there is no `nats_of_lines`; evaluation.read works.")
        # So many states and logits have all threads together, or those of 64 lines.
        of_all = min(2**20 // (self.config.layers * self.config.hidden), 2**22 // self.config.vocab_size)
        most = max(min(1024, max(of_all, 64) // self.threads), 1)
        how: dict[str, Any] = {"most": most, "threads": self.threads, "pause": pause}
        return nats_of_lines(self._native.read_tree, ids, starts_B, stops_B, **how)

    def logits(self, ids_T: NDArray[np.int64], state: State | None) -> tuple[Array, State]:
        """Read `ids_T` and return the logits (V) of the symbol after the last, and the state there."""
        if self._native:
            after = self._start(1, state)
            return self._native.read(ids_T[:, None], after, threads=self.threads)[1][0], after
        h_TBH, state = self._run(ids_T[:, None], state)
        return product(h_TBH[-1, 0], self._output) + self._weights["output.bias"], state

    def step(self, ids_B: NDArray[np.int64], state: State) -> tuple[Array, State]:
        """Read a symbol of each of B texts; return the logits (B, V) of the next ones, and the state after.

        Args:
            ids_B: the symbols; V for one outside the vocabulary.
            state: each tensor (L, B, H), which stays as it is.
        """
        if self._native:
            after = self._start(len(ids_B), state)
            return self._native.read(ids_B[None], after, threads=self.threads)[1], after
        h_TBH, state = self._run(ids_B[None], state)
        return product(h_TBH[-1], self._output) + self._weights["output.bias"], state

    def readings(self, ids_T: NDArray[np.int64]) -> list[Readings]:
        """Read `ids_T` from a zero state and return what each layer had at every step, in float32 weights.

        Returns:
            Of each layer, by name and (T, H): each gate, and each tensor of the state after the step. LSTM
            `i f g o h c`, GRU `r z n h`, RNN `h`.
        """
        config, found = self.config, list[Readings]()
        if self._native is None or not config.embedding:  # one-hot input is a look-up for NumPy, and a product there
            self._run(ids_T[:, None], None, found)
            return found
        x_TBI = look_up(self._weights["embedding.weight"], ids_T[:, None])
        for layer in range(config.layers):
            weights = self._layer_weights(layer)
            gains = native_layers.Gains(*self._gains(layer)) if config.layer_norm else None
            options = native_layers.Options(gains=gains)
            done = native_layers.forward(config.cell, x_TBI, weights, options=options, save=True, threads=self.threads)
            assert done.saved is not None
            shown = native_layers.gates(config.cell, x_TBI, weights, done.saved, options=options) | {"h": done.y}
            found.append({name: shown[name][:, 0] for name in (*self._cell.gates, *self._cell.states)})
            x_TBI = x_TBI + done.y if layer and config.residual else done.y
        return found

    def weights(self) -> dict[str, Array]:
        """Return the weights by name, as they were given."""
        return dict(self._weights)

    def rounded(self, precision: str) -> Decoder:
        """Return the same model with weights of another precision."""
        return Decoder(self.config, self._weights, self.tokenizer, precision)

    @property
    def writes(self) -> bool:
        """Whether `write` can be called: there are native kernels."""
        return self._native is not None

    def write(
        self, logits_BV: Array, state: State, draws: Sequence[Draw], steps: int, *, newline: int | None = None
    ) -> NDArray[np.int64]:
        """Choose and read `steps` symbols for each of B texts and return them, (steps, B).

        Each text is the same alone and in any batch, in one call and in several.

        Args:
            logits_BV: of the symbol after what has been read, as `logits` gives them; overwritten with those after.
            state: each tensor (L, B, H), contiguous; overwritten with the state after.
            draws: how each text's symbols are chosen.
            steps: how many are chosen.
            newline: a symbol before which the state becomes zero, for models of lines.

        Raises:
            UsageError: there are no native kernels.
        """
        if self._native is None:
            raise UsageError("Without native kernels there is no `write`; generation.generate works.")
        return self._native.write(logits_BV, state, draws, steps, newline=newline, threads=self.threads)


def normalised(weights: Mapping[str, Array], of: str, share_BG: Array) -> Array:
    """Return the input's or the state's share of the gates (`of` is such as `ih_l0`), normalised if there is a gain."""
    gamma_G = weights.get(f"recurrent.gamma_{of}")
    return share_BG if gamma_G is None else normalise(share_BG, gamma_G)


def step_of(cell: ArrayCell, weights: Mapping[str, Array], of: str) -> Step:
    """Return the step of a cell in one layer and direction, such as `l0_reverse`."""
    gamma_H = weights.get(f"recurrent.gamma_c_{of}")
    if gamma_H is None:
        return cell.step
    return partial(_lstm_normal_step, normal_c=(gamma_H, weights[f"recurrent.beta_c_{of}"]))


def runs_natively(config: ModelConfig) -> bool:
    """Return whether the native kernels can read and write with such a model, where there are any."""
    return config.cell in native.CELLS and not config.adaptive_softmax


def with_unknown(rows: Array) -> Array:
    """Return `rows` with one of zeros below: the unknown symbol's."""
    return np.concatenate([rows, np.zeros((1, rows.shape[1]), dtype=np.float32)])


def look_up(rows: Array, ids: NDArray[np.int64]) -> Array:
    """Return the row of each symbol; zeros of the unknown one. The rows themselves are not copied."""
    found: Array = rows[np.minimum(ids, len(rows) - 1)]
    found[ids == len(rows)] = 0
    return found


def weight_shapes(config: ModelConfig, num_gates: int, vectors: Sequence[str] = ()) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight of a model whose cell has so many gates, and vectors of these names."""
    V, H, G, cell = config.vocab_size, config.hidden, num_gates * config.hidden, config.cell
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (V, config.embedding)} if config.embedding else {}
    for layer in range(config.layers):
        width = H if layer else config.embedding or V
        shapes |= {
            f"recurrent.weight_ih_l{layer}": (G, width),
            f"recurrent.weight_hh_l{layer}": (G, H),
            f"recurrent.bias_ih_l{layer}": (G,),
            f"recurrent.bias_hh_l{layer}": (G,),
            **{f"recurrent.{name}_l{layer}": (H,) for name in vectors},
        }
        if config.layer_norm:
            gains = native.gain_sizes(cell, G, H)
            shapes |= {f"recurrent.{name}_l{layer}": (size,) for name, size in gains.items()}
    if config.adaptive_softmax:
        cutoffs = adaptive_cutoffs(V)
        size = cutoffs[0] + len(cutoffs)
        shapes |= {"output.head.weight": (size, H), "output.head.bias": (size,)}
        for number, (first, last) in enumerate(zip(cutoffs, [*cutoffs[1:], V], strict=True)):
            width = H // SHRINKAGE ** (number + 1)
            shapes[f"output.tail.{number}.0.weight"] = (width, H)
            shapes[f"output.tail.{number}.1.weight"] = (last - first, width)
        return shapes
    if not config.tied:
        shapes["output.weight"] = (V, H)
    return {**shapes, "output.bias": (V,)}


def check_weights(
    config: ModelConfig, num_gates: int, weights: Mapping[str, Array], vectors: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every weight, having found each in `weights` and nothing else.

    Raises:
        CheckpointError: a weight is missing, is one too many, or has another shape than `config` says.
    """
    shapes = weight_shapes(config, num_gates, vectors)
    for name in {**shapes, **weights}:
        wanted = shapes.get(name, "nothing")
        found = weights[name].shape if name in weights else "nothing"
        if found != wanted:
            raise CheckpointError(
                f"The model's weight {name} should have the shape {wanted}; the file has {found}.",
                "The files belong to different models: restore the directory from where it was made.",
            )
    return shapes


def load_decoder(path: str | Path, precision: str = "float32") -> Decoder:
    """Return the model saved at `path`, a run or a model directory.

    Args:
        path: where it is.
        precision: of the weights in use, as of `Decoder`.

    Raises:
        UsageError: there is nothing at `path`, or only PyTorch can run the model, or not with that precision.
        CheckpointError: it is damaged, or the files do not belong together.
    """
    return from_saved(checkpoint.load_model(path), precision)


def from_saved(saved: Saved, precision: str = "float32") -> Decoder:
    """Return the decoder of a model that was read; arguments and errors as of `load_decoder`."""
    config = ModelConfig.from_dict(saved.model, f"{saved.path}/config.json")
    return Decoder(config, saved.weights, tokenizers.from_json(saved.tokenizer_json), precision)
