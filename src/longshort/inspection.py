"""What a model has inside while it reads a text: every gate and state, how long it remembers, what its units follow.

    T  symbols   H  units of a layer   L  layers

Karpathy, Johnson and Li (2015), arXiv:1506.02078, found units of character models that follow quotation marks, the
length of a line, brackets: `Inspection.following` looks for such units by itself. It chooses a unit on the first half
of the text, and says how well that unit does on the second.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort import durable
from longshort.errors import TextError
from longshort.evaluation import Model, read
from longshort.text.aspects import ASPECTS, LASTING
from longshort.text.tokenizers import Tokenizer

Array = NDArray[np.float32]
Readings = Mapping[str, Array]
"""What one layer had at every step: each gate and each tensor of the state by name, (T, H)."""

SHUT, OPEN = 0.1, 0.9
KEEPS = {"lstm": "f", "gru": "z"}
"""The gate that says how much of the state stays, where the cell has one."""
_PLACES = 2000
"""Of a text from which half-lives are counted."""
_FEWEST = 10
"""Times that an aspect must be there, and be missing, in either half of a text."""


class Readable(Model, Protocol):
    """A model that can be looked into: the torch-free decoder and `LanguageModel` both can."""

    def readings(self, ids_T: NDArray[np.int64]) -> list[dict[str, Array]]:
        """Read symbols from a zero state; return what each layer had at every step, by name and (T, H)."""


class Gate(NamedTuple):
    """How one gate, or one tensor of the state, of one layer behaves over a text and all units."""

    layer: int
    name: str
    mean: float
    """Of a gate from 0 to 1; of others the mean of their size."""
    shut: float | None
    """Share of values below 0.1; None of what is not from 0 to 1."""
    open: float
    """Share of values above 0.9; of what is not from 0 to 1, of a size above 0.9."""


class Memory(NamedTuple):
    """How long the units of one layer keep what they hold."""

    layer: int
    gate: str
    """Whose values say so: f of an LSTM, z of a GRU."""
    half_life: Array
    """(H): symbols after which less than half is left of what a unit held: the median over places in the text."""

    def quantiles(self) -> dict[str, float]:
        """Return the half-lives that 10, 50, 90 and 100 % of the units do not exceed."""
        return {str(share): float(np.quantile(self.half_life, share)) for share in (0.1, 0.5, 0.9, 1.0)}


class Following(NamedTuple):
    """The unit that follows an aspect of the text the closest."""

    aspect: str
    layer: int
    unit: int
    value: str
    """What of the unit: `tanh c` of an LSTM, else `h`."""
    chosen: float
    """Correlation on the first half of the text, by which the unit was chosen from all."""
    correlation: float
    """The same on the second half."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found."""

    cell: str
    symbols: list[str]
    """(T): the text of each symbol."""
    nats: NDArray[np.float64]
    """(T): -log p of each symbol, given all before it; NaN where nothing could be predicted."""
    layers: list[Readings]
    """Of each layer each gate and each tensor of the state after the step, (T, H): LSTM `i f g o h c`, GRU `r z n h`,
    RNN `h`."""
    aspects: Mapping[str, Array] = field(repr=False)
    """(T): what `text.aspects` says of the last character of each symbol."""

    @property
    def value(self) -> str:
        """What `unit` shows where nothing else is asked for."""
        return "tanh c" if "c" in self.layers[0] else "h"

    def unit(self, layer: int, unit: int, name: str | None = None) -> Array:
        """Return what one unit had at every step, (T).

        Args:
            layer: from 0.
            unit: from 0.
            name: of a gate or a tensor of the state, or `tanh c`; `value` if None.
        """
        return self._of(layer, name or self.value)[:, unit]

    def _of(self, layer: int, name: str) -> Array:
        readings = self.layers[layer]
        return np.tanh(readings["c"]) if name == "tanh c" else readings[name]

    @property
    def nats_per_token(self) -> float | None:
        """The mean of `nats`; None where nothing could be predicted."""
        predicted = self.nats[~np.isnan(self.nats)]
        return float(predicted.mean()) if len(predicted) else None

    def gates(self) -> list[Gate]:
        """Return how each gate and each tensor of the state of each layer behaves."""
        found = []
        for layer, readings in enumerate(self.layers):
            for name, value_TH in readings.items():
                size_TH = np.abs(value_TH)
                is_gate = bool(value_TH.min() >= 0 and value_TH.max() <= 1)
                shut = float((value_TH < SHUT).mean()) if is_gate else None
                found.append(Gate(layer, name, float(size_TH.mean()), shut, float((size_TH > OPEN).mean())))
        return found

    def memories(self) -> list[Memory]:
        """Return how long the units of each layer remember; nothing where no gate says so."""
        gate = KEEPS.get(self.cell)
        if gate is None:
            return []
        found = []
        for layer, readings in enumerate(self.layers):
            found.append(Memory(layer, gate, _half_lives(readings[gate])))
        return found

    def following(self) -> list[Following]:
        """Return the unit that follows each aspect of the text, the closest first.

        A text that is short, or says little of an aspect, has no answer for it: it must be there ten times and be
        missing ten times in either half.
        """
        return list(self._following)

    @cached_property
    def _following(self) -> list[Following]:
        middle, found = len(self.symbols) // 2, list[Following]()
        if middle < 2 * _FEWEST:
            return found
        units = np.concatenate([self._of(layer, self.value) for layer in range(len(self.layers))], axis=1)
        H = self.layers[0]["h"].shape[1]
        first, second = _standardised(units[:middle]), _standardised(units[middle:])
        for aspect, values in self.aspects.items():
            halves = values[:middle], values[middle:]
            if min(min(np.count_nonzero(half), np.count_nonzero(half == 0)) for half in halves) < _FEWEST:
                continue
            on_first, on_second = (_standardised(half[:, None])[:, 0] for half in halves)
            chosen = on_first @ first / len(first)
            best = int(np.abs(chosen).argmax())
            correlation = float(on_second @ second[:, best] / len(second))
            found.append(Following(aspect, best // H, best % H, self.value, float(chosen[best]), correlation))
        return sorted(found, key=lambda each: -abs(each.correlation))

    def example(self) -> tuple[Following, int]:
        """Return one of `following`, which must not be empty, and the first place of the second half with its aspect.

        It is the closest of those that the network must remember, if there is one.
        """
        following, middle = self.following(), len(self.symbols) // 2
        best = next((each for each in following if each.aspect in LASTING), following[0])
        return best, middle + int((self.aspects[best.aspect][middle:] != 0).argmax())

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON can hold them; without the values of single units."""
        return {
            "cell": self.cell,
            "layers": len(self.layers),
            "hidden": int(self.layers[0]["h"].shape[1]),
            "tokens": len(self.symbols),
            "nats_per_token": self.nats_per_token,
            "gates": [gate._asdict() for gate in self.gates()],
            "memory": [
                {"layer": memory.layer, "gate": memory.gate, "half_life": memory.quantiles()}
                for memory in self.memories()
            ],
            "following": [each._asdict() for each in self.following()],
            "symbols": self.symbols,
            "nats": [None if np.isnan(nats) else float(nats) for nats in self.nats],
        }

    def save(self, path: str | Path) -> None:
        """Write everything as arrays that `numpy.load` reads: `symbols`, `nats`, and of each layer `i_l0` and so on.

        Raises:
            OutputError: the file cannot be written.
        """
        arrays: dict[str, Any] = {"symbols": np.array(self.symbols), "nats": self.nats}
        for layer, readings in enumerate(self.layers):
            arrays |= {f"{name}_l{layer}": value for name, value in readings.items()}
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        durable.write_file(Path(path), packed.getvalue())


def inspect(model: Readable, tokenizer: Tokenizer, text: str) -> Inspection:
    """Read a text from a zero state, and keep everything that the model has inside on the way.

    A model of lines is in a zero state before each newline, as it was in training, and reads one before the text.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        text: what to read. All is held in memory: 4 bytes for each unit, gate and symbol.

    Raises:
        TextError: there is nothing to read.
    """
    lines, size = model.config.lines, tokenizer.size
    if lines:
        added = not text.endswith("\n")  # `encode_lines` takes lines that end; an end that was added is not read
        ids = tokenizer.encode_lines(text + "\n" * added)
        ids = ids[: len(ids) - added]
    else:
        ids = tokenizer.encode(text)
    if not len(ids):
        raise TextError("There is nothing to read: the text has no symbols.")
    starts = [0]
    if lines:
        ids = np.concatenate([[tokenizer.newline], ids])
        starts = [int(place) for place in np.flatnonzero(ids == tokenizer.newline)]
    parts: list[list[dict[str, Array]]] = []
    nats: NDArray[np.float64] = np.full(len(ids), np.nan)
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        parts.append(model.readings(ids[start:end].astype(np.int64)))
        last = min(end, len(ids) - 1)  # the newline that ends a line is predicted too
        if last > start:
            pairs = read(model, size, ids, np.array([start]), np.array([last]))
            nats[start + 1 : last + 1] = np.concatenate(
                [np.where(counted_TB, nats_TB, np.nan)[:, 0] for nats_TB, counted_TB in pairs]
            )
    of_layers = [
        {name: np.concatenate([part[layer][name] for part in parts]) for name in parts[0][layer]}
        for layer in range(len(parts[0]))
    ]
    ends = np.cumsum(tokenizer.lengths(text, ids[lines:])[0])
    begins = np.append(0, ends[:-1])
    symbols = [text[begin:end] for begin, end in zip(begins, ends, strict=True)]
    places = np.maximum(ends - 1, 0)
    return Inspection(
        cell=model.config.cell,
        symbols=symbols,
        nats=nats[int(lines) :],
        layers=[{name: value[int(lines) :] for name, value in readings.items()} for readings in of_layers],
        aspects={name: say(text)[places] for name, say in ASPECTS.items()},
    )


def _half_lives(kept_TH: Array) -> Array:
    """Return the median over t of the steps after which the product of what is kept from t on is below a half.

    Where the text ends before that, its end counts.
    """
    T = len(kept_TH)
    lost_TH = np.cumsum(-np.log(np.maximum(kept_TH.astype(np.float64), 1e-30)), axis=0)
    places = np.unique(np.linspace(0, T - 1, min(T, _PLACES)).astype(np.int64))
    halves = [np.searchsorted(lost_T, lost_T[places] + math.log(2), side="right") for lost_T in lost_TH.T]
    return np.array([np.median(np.minimum(ends, T - 1) - places) for ends in halves], dtype=np.float32)


def _standardised(value_TN: Array) -> Array:
    """Return columns of mean 0 and variance 1; of what does not vary zeros."""
    centred = value_TN - value_TN.mean(0)
    deviation = centred.std(0)
    standardised: Array = centred / np.where(deviation > 0, deviation, 1)
    return standardised
