"""Calls with random shapes, types, states and lengths: an exception or the right answer, never the end of the process.

`python tests/test_malformed.py CALLS SEED` makes as many calls as it is told; the test makes a few thousand.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import longshort
from longshort import kernels

SIZES = (0, 1, 2, 3, 5, 17)


def call(pick: random.Random) -> bool:
    """Make one call, forward and backward; return whether it was taken, having compared it with the truth."""
    name = pick.choice(["LSTM", "GRU", "RNN"])
    given: dict[str, Any] = {"num_layers": pick.choice([1, 1, 2]), "bidirectional": pick.random() < 0.3}
    given |= {"batch_first": pick.random() < 0.3, "bias": pick.random() < 0.8}
    I, H = pick.choice([1, 2, 3, 17]), pick.choice([1, 4, 17])
    options: dict[str, Any] = {}
    if pick.random() < 0.3:
        of_lstm: list[dict[str, Any]] = [
            {"peephole": True},
            {"coupled_gates": True},
            {"coupled_gates": True, "peephole": True, "layer_norm": H > 1},
        ]
        every: list[dict[str, Any]] = [{"layer_norm": H > 1}, {"zoneout": 0.2}, {"recurrent_dropout": 0.2}]
        options = pick.choice(every + (of_lstm if name == "LSTM" else []))
    if name == "LSTM" and H > 1 and pick.random() < 0.3:
        given["proj_size"] = pick.randrange(1, H)
    layer = getattr(longshort, name)(I, H, **given, **options)
    shape = [pick.choice(SIZES) for _ in range(pick.choice([1, 2, 3, 3, 3, 3, 4]))]
    if pick.random() < 0.8:
        shape[-1] = I
    x = torch.randn(shape, dtype=pick.choice([torch.float32] * 6 + [torch.float64, torch.float16]))
    if pick.random() < 0.3 and x.dim() > 1:
        x = x.transpose(0, 1)
    if pick.random() < 0.2:
        x = x[..., ::2]
    hx: Any = None
    if pick.random() < 0.4:
        L, B = given["num_layers"] * (1 + given["bidirectional"]), x.shape[0 if given["batch_first"] else 1 % x.dim()]
        widths = (given.get("proj_size", H), H)
        sizes = [([L, L, L, 1], [B, B, B, 2], [width, width, 5]) for width in widths]
        states = [torch.randn([pick.choice(each) for each in of_state]) for of_state in sizes]
        hx = pick.choice([tuple(states), states[0], states, (states[0],), 5])
    beyond: dict[str, Any] = {}
    if pick.random() < 0.3:
        beyond["lengths"] = [pick.choice([-1, 0, 1, 2, 3, 9]) for _ in range(pick.choice([*x.shape[:2], 2]))]
    if pick.random() < 0.2:
        beyond["resets"] = torch.rand(pick.choice(SIZES), pick.choice(SIZES)) < 0.5
    if pick.random() < 0.2:
        beyond["return_gates"] = True
    seed = pick.randrange(1 << 30)
    try:
        torch.manual_seed(seed)
        found = outputs(layer(x, hx, **beyond))
        total: Any = torch.stack([output.sum() for output in found])
        total.sum().backward()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, longshort.LongshortError):
        return False
    if options or beyond:
        torch.manual_seed(seed)
        with kernels.use("reference"):
            expected = outputs(layer(x, hx, **beyond))
    else:
        peer = getattr(nn, name)(I, H, **given)
        peer.load_state_dict(layer.state_dict())
        expected = outputs(peer(x, hx))
    # One number in a normalised row of few loses digits, whoever computes it.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3 if "layer_norm" in options else 1e-5)
    return True


def outputs(result: Any) -> list[Tensor]:
    """Return a layer's output, and every gate and state at every step if the call asked for them."""
    readings = result[2] if len(result) > 2 else []
    return [result[0], *(value for reading in readings for value in reading.values())]


def main(calls: int, seed: int) -> None:
    """Make `calls` calls and print how many were taken."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    print(calls, sum(call(pick) for _ in range(calls)))


def test_malformed_calls_are_exceptions_or_right_answers() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), "3000", "0"], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    calls, taken = map(int, done.stdout.split())
    assert 0.02 * calls < taken < 0.98 * calls  # both ends of the promise were tried


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
