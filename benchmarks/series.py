"""Forecasts of made-up series, a net beside baselines: the course's noisy sine, and three that drive each other.

python benchmarks/series.py [PICTURE.png] > FILE

Root mean squared error by steps ahead, from origins in the part that was not fitted; medians of five seeds of noise.
"""

from __future__ import annotations

import json
import statistics
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from longshort import machine, plots, series

SEEDS, AHEAD = range(5), (1, 4, 8, 16, 32, 64)


def models(known: Any, hidden: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = series.SequenceRegressor(known.shape[1], hidden=hidden)
    series.fit(net, known)
    return {
        f"LSTM, {hidden} units": net,
        "linear, 16 lags": series.LinearAutoregression(known, 16),
        "linear, 4 lags": series.LinearAutoregression(known, 4),
        "last value": series.LastValue(),
    }


def main(picture: str | None = None) -> None:
    torch.set_num_threads(1)
    rows = []
    for name, make, fitted, noise in (
        ("noisy sine", series.noisy_sine, 600, 0.2),
        ("three series", series.correlated, 1500, 0.1),
    ):
        found: dict[str, list[Any]] = {}
        floors = []
        for seed in SEEDS:
            whole = make(seed=seed)
            if name == "noisy sine":  # what the noise of these very steps is
                truth = np.sin(0.01 * np.arange(fitted + 1, len(whole) + 1))
                floors.append(float(np.sqrt(np.mean((whole[fitted:, 0] - truth) ** 2))))
            else:
                floors.append(noise)
            for model, forecaster in models(whole[:fitted], 32).items():
                errors = series.errors_by_horizon(forecaster, whole, fitted, max(AHEAD), every=2)
                found.setdefault(model, []).append(np.sqrt((errors**2).mean(1)))
                if model.startswith("LSTM"):
                    one = series.errors_by_horizon(forecaster, whole, fitted, 1)
                    found.setdefault("one step", []).append(float(np.sqrt((one**2).mean())) / floors[-1])
        ratios = found.pop("one step")
        for model, curves in found.items():
            curve = np.median(curves, axis=0)
            row: dict[str, Any] = {"series": name, "model": model, "rmse": {k: float(curve[k - 1]) for k in AHEAD}}
            rows.append({**row, "curve": curve.tolist()})
        rows.append(
            {"series": name, "noise": statistics.median(floors), "one_step_over_noise": statistics.median(ratios)}
        )
    head = {"format_version": 1, "benchmark": "forecasts of made-up series", "command": "python benchmarks/series.py"}
    head |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description(), "seeds": len(SEEDS)}
    result = {**head, "rows": rows}
    if picture:
        plots.forecasts(result, picture)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:2])
