"""Series of numbers: what is predicted, in which units, from what; against known noise and least squares."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longshort
from conftest import ROOT
from longshort import plots, series
from longshort.errors import ConfigError, LongshortError, TrainingError
from longshort.series import LastValue, LinearAutoregression, SequenceRegressor, errors_by_horizon, fit

RESULT = json.loads((ROOT / "benchmarks" / "results" / "2026-11-25-series.json").read_text(encoding="utf-8"))


def made(**given: Any) -> SequenceRegressor:
    torch.manual_seed(0)
    return SequenceRegressor(**({"inputs": 1, "hidden": 16} | given))


@pytest.mark.parametrize(("make", "known", "noise"), [(series.noisy_sine, 600, None), (series.correlated, 1500, 0.1)])
def test_one_step_ahead_it_is_within_a_tenth_of_the_noise(make: Any, known: int, noise: float | None) -> None:
    whole = make(seed=1)
    model = made(inputs=whole.shape[1], hidden=32)
    fit(model, whole[:known])
    if noise is None:
        truth = np.sin(0.01 * np.arange(known + 1, len(whole) + 1))
        noise = float(np.sqrt(np.mean((whole[known:, 0] - truth) ** 2)))
    error = np.sqrt(np.square(model.predict(whole[:-1])[known - 1 :] - whole[known:]).mean())
    assert 0.95 * noise < error < 1.1 * noise
    last = np.sqrt(np.mean(errors_by_horizon(LastValue(), whole, known, 1) ** 2))
    assert error < 0.85 * last


@settings(max_examples=20)
@given(
    cell=st.sampled_from(["lstm", "gru", "rnn"]),
    layers=st.integers(1, 2),
    T=st.integers(1, 12),
    steps=st.integers(1, 6),
    shift=st.floats(-50, 50),
)
def test_a_forecast_is_predictions_of_predictions(cell: str, layers: int, T: int, steps: int, shift: float) -> None:
    model = made(inputs=2, cell=cell, layers=layers)
    model.mean_I.fill_(shift)
    model.mean_O.fill_(shift)
    known = (np.random.default_rng(T).normal(size=(T, 2)) + shift).astype(np.float32)
    found = model.forecast(known, steps)
    grown = known
    for _ in range(steps):
        grown = np.concatenate([grown, model.predict(grown)[-1:]])
    np.testing.assert_allclose(found, grown[T:], atol=1e-4)


def test_the_units_are_the_series_own() -> None:
    """A series in other units gives the same predictions, in those."""
    sine = series.noisy_sine(400)
    first, second = made(), made()
    fit(first, sine, steps=20)
    fit(second, 1000 + 50 * sine, steps=20)
    ours, theirs = first.predict(sine), second.predict(1000 + 50 * sine)
    np.testing.assert_allclose(1000 + 50 * ours, theirs, atol=0.05)


def test_targets_of_their_own_and_several_series() -> None:
    """The sum of the last two inputs, from three series of different lengths."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(length, 2)).astype(np.float32) for length in (300, 120, 220)]
    targets = [
        x.sum(1, keepdims=True) + np.concatenate([np.zeros((1, 1)), x[:-1].sum(1, keepdims=True)]) for x in inputs
    ]
    model = made(inputs=2, outputs=1, hidden=24)
    losses: list[float] = []
    fit(
        model,
        inputs,
        targets,
        seq_len=40,
        steps=300,
        lr=1e-2,
        weight_decay=0.0,
        report=lambda _, loss: losses.append(loss),
    )
    assert len(losses) == 300
    new = rng.normal(size=(200, 2)).astype(np.float32)
    wanted = new.sum(1)[1:] + new.sum(1)[:-1]
    assert np.sqrt(np.mean((model.predict(new)[1:, 0] - wanted) ** 2)) < 0.2 * wanted.std()
    with pytest.raises(ConfigError, match="outputs = inputs"):
        model.forecast(new, 2)


def test_a_short_series_does_not_cut_the_windows_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = made(inputs=2), np.random.default_rng(0)
    given = [rng.normal(size=(length, 2)).astype(np.float32) for length in (41, 4, 26)]
    read: list[Any] = []
    forward = model.forward

    def recorded(x_TBI: Any, lengths: Any) -> Any:
        y_TBO, state = forward(x_TBI, lengths=lengths)
        read.append((x_TBI, lengths, y_TBO.detach(), model.scale_O.clone()))
        return y_TBO, state

    monkeypatch.setattr(model, "forward", recorded)
    losses: list[float] = []
    fit(model, given, seq_len=25, batch_size=40, steps=3, report=lambda _, loss: losses.append(loss))
    for (x_TBI, lengths, y_TBO, scale_O), found in zip(read, losses, strict=True):
        assert len(x_TBI) == 25
        assert set(lengths.tolist()) == {25, 3}
        squares = []
        for row, length in enumerate(lengths.tolist()):
            window, following = x_TBI[:length, row].numpy(), []
            for each in given:  # the window is part of exactly one series, and what follows it is known
                starts = [t for t in range(len(each) - length) if np.array_equal(each[t : t + length], window)]
                following += [each[t + 1 : t + 1 + length] for t in starts]
            (target,) = following
            squares.append(((y_TBO[:length, row].numpy() - target) / scale_O.numpy()) ** 2)
        assert found == pytest.approx(float(np.concatenate(squares).mean()), rel=1e-5)


def test_rows_of_several_lengths_are_read_side_by_side() -> None:
    model = made(inputs=2, layers=2).eval()
    rows = [torch.randn(length, 2) for length in (5, 0, 3)]
    padded = torch.full((5, 3, 2), torch.nan)
    for number, row in enumerate(rows):
        padded[: len(row), number] = row
    y_TBO, _ = model(padded, lengths=[5, 0, 3])
    for number, row in enumerate(rows):
        if len(row):
            torch.testing.assert_close(y_TBO[: len(row), number], model(row.unsqueeze(1))[0][:, 0])


def test_the_same_seed_gives_the_same_model() -> None:
    models = [made(layers=2, dropout=0.3) for _ in range(2)]
    for model in models:
        fit(model, series.noisy_sine(100), steps=5, seed=3)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_who_predicts_in_a_report_does_not_disturb_the_training() -> None:
    watched, alone = made(layers=2, dropout=0.3), made(layers=2, dropout=0.3)
    sine = series.noisy_sine(100)
    modes: list[bool] = []

    def look(step: int, loss: float) -> None:
        assert np.array_equal(watched.predict(sine), watched.predict(sine))  # without dropout
        watched.forecast(sine, 3)
        modes.append(watched.training)

    fit(watched, sine, steps=5, report=look)
    fit(alone, sine, steps=5)
    assert modes == [True] * 5
    assert not watched.training
    for a, b in zip(watched.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------- baselines


def test_a_linear_series_is_found_exactly() -> None:
    x = np.zeros((60, 2))
    x[:2] = np.array([[1, 2], [0.5, -1]])
    for t in range(2, 60):
        x[t, 0] = 0.6 * x[t - 1, 0] - 0.3 * x[t - 2, 1] + 0.1
        x[t, 1] = 0.5 * x[t - 1, 1] + 0.2 * x[t - 2, 0]
    model = LinearAutoregression(x[:40], 2)
    np.testing.assert_allclose(model.forecast(x[:40], 20), x[40:], atol=1e-4)
    assert model.forecast(x, 0).shape == (0, 2)


def test_errors_by_horizon_look_at_what_follows_and_at_nothing_before() -> None:
    seen = []

    class Spy:
        def forecast(self, known: Any, steps: int) -> Any:
            seen.append(len(known))
            return np.zeros((steps, 1), np.float32)

    x = np.arange(10, dtype=np.float32)[:, None]
    errors = errors_by_horizon(Spy(), x, first=4, horizon=3, every=2)
    assert seen == [4, 6]
    np.testing.assert_allclose(errors[:, 0], [np.sqrt((16 + 36) / 2), np.sqrt((25 + 49) / 2), np.sqrt((36 + 64) / 2)])
    np.testing.assert_allclose(LastValue().forecast(x, 2), [[9], [9]])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: made(cell="lstmm"), "no cell 'lstmm'"),
        (lambda: made(hidden=0), "at least 1"),
        (lambda: fit(made(), np.zeros((5, 2))), r"shapes \(T, 1\)"),
        (lambda: fit(made(), np.zeros(5)), r"shape \(T, I\)"),
        (lambda: fit(made(), np.zeros((1, 1))), "shapes"),
        (lambda: fit(made(), np.full((9, 1), np.nan)), "not finite"),
        (lambda: fit(made(), [np.zeros((9, 1))], [np.zeros((9, 1))] * 2), "1 series and 2 of targets"),
        (lambda: fit(made(), np.zeros((9, 1)), np.zeros((8, 1))), "are wanted"),
        (lambda: fit(made(), np.zeros((9, 1)), lr=-1.0), "lr must be"),
        (lambda: fit(made(), np.zeros((9, 1)), steps=0), "at least 1"),
        (lambda: fit(made(), np.zeros((9, 1)), clip=-1.0), "clip must be above 0 .* not -1.0"),
        (lambda: fit(made(), np.zeros((9, 1)), clip=float("nan")), "clip must be above 0"),
        (lambda: fit(made(), np.zeros((9, 1)), weight_decay=-1.0), "weight_decay at least 0"),
        (lambda: made(dropout=1.5), "dropout must be at least 0 and below 1, not 1.5"),
        (lambda: made(dropout=-0.1), "dropout must be"),
        (lambda: made(layers=2, dropout=1.0), "dropout must be"),
        (lambda: LinearAutoregression(np.zeros((4, 1)), 4), "4 lags need"),
        (lambda: errors_by_horizon(LastValue(), np.zeros((9, 1)), 5, 6), "no forecast of 6"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Any, words: str) -> None:
    with pytest.raises(LongshortError, match=words):
        call()


def test_a_training_that_diverges_says_so() -> None:
    with pytest.raises(TrainingError, match="Try an lr below"):
        fit(made(cell="rnn"), 1e3 * series.noisy_sine(50), lr=9e5, steps=60, clip=1e30, weight_decay=9e5)


# ------------------------------------------------------------------------------------------------------ page


def test_the_pages_program_runs_and_its_table_is_the_result_file() -> None:
    page = (ROOT / "docs" / "series.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for row in RESULT["rows"]:
        if "model" in row:
            figures = " | ".join(f"{value:.3f}" for value in row["rmse"].values())
            assert f"| {row['series']}: {row['model']} | {figures} |" in page
        else:
            assert f"{row['one_step_over_noise']:.2f} times" in page
            assert row["one_step_over_noise"] < 1.1
    assert longshort.SequenceRegressor is SequenceRegressor


def test_the_picture_can_be_drawn(tmp_path: Any) -> None:
    plots.forecasts(RESULT, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
