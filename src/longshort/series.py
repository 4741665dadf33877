"""Series of numbers: a recurrent net that predicts vectors, and the baselines that it has to beat.

    T  steps   B  rows   I  numbers that come in at a step   O  numbers that are predicted   K  steps ahead

A model that predicts the next vector of a series forecasts further by reading its own predictions, so its error grows
with the horizon. `errors_by_horizon` measures that, for the net and the baselines alike, from many points of a series.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort import masks
from longshort.errors import ConfigError, TrainingError
from longshort.layers import GRU, LSTM, RNN

Array = NDArray[np.float32]
CELLS: dict[str, Any] = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


class Forecaster(Protocol):
    """What a net and the baselines have in common."""

    def forecast(self, series_TI: Any, steps: int) -> Array:
        """Return the `steps` vectors that follow the series, (K, I)."""


class SequenceRegressor(nn.Module):
    """Reads vectors and predicts a vector after each.

    Args:
        inputs: I.
        outputs: O; as many as `inputs` if None, as a forecast needs.
        hidden: units of each layer.
        cell: lstm, gru or rnn.
        layers: one above the other.
        dropout: share of each layer's outputs that training drops.

    Inputs and outputs are brought to mean 0 and deviation 1 inside, by what `fit` has seen; what goes in and comes out
    has the series' own units.
    """

    mean_I: Tensor
    scale_I: Tensor
    mean_O: Tensor
    scale_O: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        hidden: int = 32,
        *,
        cell: str = "lstm",
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ConfigError(f"There is no cell {cell!r} for a SequenceRegressor; there are {', '.join(CELLS)}.")
        outputs = inputs if outputs is None else outputs
        if min(inputs, outputs, hidden, layers) < 1:
            raise ConfigError("inputs, outputs, hidden and layers must be at least 1.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout must be at least 0 and below 1, not {dropout}.")
        self.recurrent = CELLS[cell](inputs, hidden, layers, dropout=dropout if layers > 1 else 0.0)
        self.dropout = dropout
        self.output = nn.Linear(hidden, outputs)
        for name, size in (("I", inputs), ("O", outputs)):
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"scale_{name}", torch.ones(size))

    def forward(
        self, x_TBI: Tensor, state: Any = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Any]:
        """Predict a vector after each that is read.

        Args:
            x_TBI: the series, side by side.
            state: before the first step, as this function gave it; zeros if None.
            lengths: of rows of several lengths, padded at their ends.

        Returns:
            Predictions (T, B, O), and the state after the last step. Beyond a row's end they mean nothing.
        """
        given: dict[str, Any] = {} if lengths is None else {"lengths": lengths}
        h_TBH, state = self.recurrent((x_TBI - self.mean_I) / self.scale_I, state, **given)
        h_TBH = masks.dropout(h_TBH, self.dropout, self.training)
        return self.output(h_TBH) * self.scale_O + self.mean_O, state

    @torch.no_grad()
    def predict(self, series_TI: Any) -> Array:
        """Return what the model expects after each vector of a series, having read all up to it: (T, O)."""
        with masks.evaluating(self):
            y_TBO, _ = self(_tensor(series_TI).unsqueeze(1))
        return cast(Array, y_TBO[:, 0].numpy())

    @torch.no_grad()
    def forecast(self, series_TI: Any, steps: int) -> Array:
        """Return the `steps` vectors that follow the series, (K, I): each is read before the next is predicted.

        Raises:
            ConfigError: it predicts other numbers than it reads.
        """
        if self.recurrent.input_size != self.output.out_features:
            raise ConfigError("Only a model that predicts what it reads (outputs = inputs) can forecast.")
        with masks.evaluating(self):
            y_TBI, state = self(_tensor(series_TI).unsqueeze(1))
            found = [y_TBI[-1:]]
            while len(found) < steps:
                y_TBI, state = self(found[-1], state)
                found.append(y_TBI)
        return cast(Array, torch.cat(found)[:steps, 0].numpy())


def fit(
    model: SequenceRegressor,
    inputs: Any,
    targets: Any = None,
    *,
    seq_len: int = 200,
    batch_size: int = 16,
    steps: int = 400,
    lr: float = 2e-3,
    weight_decay: float = 1.0,
    clip: float = 1.0,
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train on windows of one or of several series, by the squared error, each number divided by its deviation.

    Args:
        model: to be trained.
        inputs: a series (T, I), or a list of them.
        targets: what follows each step, (T, O) or a list; if None, the series itself a step later.
        seq_len: steps of a window at most; each begins from a zero state, at a random place. Shorter series are whole
            windows.
        batch_size: windows of a step.
        steps: updates.
        lr: highest learning rate (AdamW); it falls to zero as a cosine.
        weight_decay: of AdamW, times the rate. Much, since series are short and noisy: docs/log.md has what less gives.
        clip: most that the norm of the gradients may be.
        seed: decides the windows and the dropout; the model's own numbers were drawn when it was made.
        report: called after each update with its number (1, 2, ...) and its loss.

    Raises:
        ConfigError: series that do not go with the model or with each other, or are shorter than two steps; a number
            outside its range.
        TrainingError: the loss is no longer finite.
    """
    given = inputs if isinstance(inputs, list) else [inputs]
    series = [_tensor(each) for each in given]
    if targets is None:
        pairs = [(each[:-1], each[1:]) for each in series]
    else:
        wanted = targets if isinstance(targets, list) else [targets]
        if len(wanted) != len(series):
            raise ConfigError(f"There are {len(series)} series and {len(wanted)} of targets.")
        pairs = [(x, _tensor(y)) for x, y in zip(series, wanted, strict=True)]
    I, O = model.recurrent.input_size, model.output.out_features
    if not 0 < lr < 1e6 or min(seq_len, batch_size, steps) < 1:
        raise ConfigError("lr must be above 0 and no more than a million; seq_len, batch_size and steps at least 1.")
    if not clip > 0 or not weight_decay >= 0:
        raise ConfigError(f"clip must be above 0 and weight_decay at least 0, not {clip} and {weight_decay}.")
    for x, y in pairs:
        if x.shape != (len(y), I) or y.shape != (len(x), O) or not len(x):
            raise ConfigError(
                f"Series of the shapes (T, {I}) and targets (T, {O}) are wanted, not {x.shape} and {y.shape}."
            )
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ConfigError("A series holds numbers that are not finite.", "Fill the gaps first.")
    for name, part in (("I", 0), ("O", 1)):
        whole = torch.cat([pair[part] for pair in pairs])
        getattr(model, f"mean_{name}").copy_(whole.mean(0))
        getattr(model, f"scale_{name}").copy_(whole.std(0, correction=0).clamp(min=1e-6))
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    chances = np.array([len(x) for x, _ in pairs], np.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for step in range(1, steps + 1):
        windows = []
        for number in generator.choice(len(pairs), size=batch_size, p=chances / chances.sum()):
            x, y = pairs[number]
            first = int(generator.integers(max(len(x) - seq_len, 0) + 1))
            windows.append((x[first : first + seq_len], y[first : first + seq_len]))
        x_TBI, y_TBO = (nn.utils.rnn.pad_sequence(list(parts)) for parts in zip(*windows, strict=True))
        lengths_B = torch.tensor([len(x) for x, _ in windows])
        has_TB = torch.arange(len(x_TBI)).unsqueeze(1) < lengths_B
        predicted_TBO, _ = model(x_TBI, lengths=None if bool(has_TB.all()) else lengths_B)
        loss = ((predicted_TBO - y_TBO) / model.scale_O)[has_TB].square().mean()
        if not bool(loss.isfinite()):
            raise TrainingError(
                f"Training diverged at step {step}: the loss is {loss.item()}.", f"Try an lr below {lr:g}."
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        report(step, loss.item())
    model.eval()


def errors_by_horizon(
    model: Forecaster, series_TI: Any, first: int, horizon: int, every: int = 1
) -> NDArray[np.float64]:
    """Return the root of the mean squared error of forecasts 1, 2, ... `horizon` steps ahead, of each number: (K, I).

    Args:
        model: forecasts from the series up to each origin, never from what comes after it.
        series_TI: the series.
        first: the first origin: so many vectors are read before the first forecast.
        horizon: K.
        every: steps from one origin to the next.
    """
    series = np.asarray(series_TI, np.float32)
    origins = range(first, len(series) - horizon + 1, every)
    if first < 1 or horizon < 1 or not len(origins):
        raise ConfigError(f"A series of {len(series)} steps has no forecast of {horizon} from step {first} on.")
    squares = [
        np.square(model.forecast(series[:t], horizon) - series[t : t + horizon], dtype=np.float64) for t in origins
    ]
    return cast("NDArray[np.float64]", np.sqrt(np.mean(squares, axis=0)))


class LastValue:
    """A baseline: everything stays as it is."""

    def forecast(self, series_TI: Any, steps: int) -> Array:
        """Return the last vector, `steps` times."""
        return np.repeat(np.asarray(series_TI, np.float32)[-1:], steps, axis=0)


class LinearAutoregression:
    """A baseline: each vector is a linear function of the `lags` vectors before it, found by least squares.

    Args:
        series_TI: what it is fitted to.
        lags: how many vectors it reads.
    """

    def __init__(self, series_TI: Any, lags: int) -> None:
        series = np.asarray(series_TI, np.float64)
        if not 1 <= lags < len(series):
            raise ConfigError(f"{lags} lags need a series of more than {lags} steps; this one has {len(series)}.")
        self.lags = lags
        rows = np.stack([series[t - lags : t].ravel() for t in range(lags, len(series))])
        rows = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
        self._weights = np.linalg.lstsq(rows, series[lags:], rcond=None)[0]

    def forecast(self, series_TI: Any, steps: int) -> Array:
        """Return the `steps` vectors that follow, each read before the next is predicted."""
        known = list(np.asarray(series_TI, np.float64)[-self.lags :])
        for _ in range(steps):
            known.append(np.concatenate([*known[-self.lags :], [1.0]]) @ self._weights)
        return np.asarray(known[-steps:], np.float32) if steps else np.empty((0, len(known[0])), np.float32)


def noisy_sine(steps: int = 1000, noise: float = 0.2, seed: int = 0) -> Array:
    """Return the course's series, (T, 1): sin(0.01 t), and normal noise."""
    t = np.arange(1, steps + 1)
    x = np.sin(0.01 * t) + noise * np.random.default_rng(seed).normal(size=steps)
    return cast(Array, x.astype(np.float32)[:, None])


def correlated(steps: int = 2000, noise: float = 0.1, seed: int = 0) -> Array:
    """Return three series that drive each other, (T, 3), with normal noise that nothing can foretell.

    x(t) = A tanh(2 x(t - 1)) + 0.3 x(t - 2) + noise, where A turns the three slowly into each other.
    """
    turn = np.array([[0.35, -0.45, 0.0], [0.45, 0.35, 0.15], [-0.15, 0.1, 0.5]])
    generator, x = np.random.default_rng(seed), np.zeros((steps + 100, 3))
    for t in range(2, len(x)):
        x[t] = turn @ np.tanh(2 * x[t - 1]) + 0.3 * x[t - 2] + noise * generator.normal(size=3)
    return cast(Array, x[100:].astype(np.float32))


def _tensor(series_TI: Any) -> Tensor:
    """Return a series as a float32 tensor of two dimensions; ConfigError where it has others or no step."""
    tensor = torch.as_tensor(np.asarray(series_TI, np.float32))
    if tensor.dim() != 2 or not len(tensor):
        raise ConfigError(f"A series has the shape (T, I), a row a step; not {tuple(tensor.shape)}.")
    return tensor
