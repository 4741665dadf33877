"""The recurrent part alone: its share of the machine's own matrix-product rate, at T=35 B=32 H=256 and H=512.

The layers have an input of no columns here, and no gradients of weights are asked for: the loop over the steps is all
that is left, 2 T B G H^2 operations in either direction. Packing W_hh is inside of the time in training.

python benchmarks/recurrent_share.py
"""

from __future__ import annotations

import json
import statistics
from datetime import UTC, datetime

import torch

from longshort import calls, machine, native, ops
from longshort.bench import peers
from longshort.bench.grids import CELLS, GATES
from longshort.bench.timing import Side, interleave

T, B = 35, 32


def main() -> None:
    rows = []
    torch.set_num_threads(2)
    for cell in CELLS:
        for H in (256, 512):
            inference, forward, backward = sides(cell, H)
            operations = 2 * T * B * GATES[cell] * H * H
            for names, pair in ((("inference", "forward"), (inference, forward)), (("backward",), (backward, forward))):
                timed = interleave(*pair, peers.gemm())
                rate = 2 * peers.GEMM_SIZE**3 / statistics.median(timed.gemm)
                for part, seconds in zip(names, (timed.ours, timed.peer), strict=False):
                    share = operations / statistics.median(seconds) / rate
                    figures = {"share": round(share, 3), "seconds": seconds, "gemm_gflops": round(rate / 1e9, 1)}
                    rows.append({"cell": cell, "part": part, "T": T, "B": B, "H": H, **figures})
    where = {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    print(json.dumps({"format_version": 1, "benchmark": "recurrent share", **where, "rows": rows}, indent=2))


def sides(cell: str, H: int) -> tuple[Side, Side, Side]:
    """Return the loop in inference, in training forward, and backward."""
    call = calls.Call(cell, H, 1, bias=True, batch_first=False, sequences=None, options=(), target=-1)
    G = native.GATES[cell] * H
    weights = [torch.randn(shape) / H**0.5 for shape in ((G, 0), (G, H), (G,), (G,))]
    x, dy = torch.empty(T, B, 0), torch.randn(T, B, H)
    state = tuple(torch.zeros(1, B, H) for _ in range(2 if cell == "lstm" else 1))
    saved = [torch.empty(calls.saved_floats(call, x))]
    y, _ = ops.forward(call, x, state, weights, saved)
    wanted = [False, *[True] * len(state), *[False] * len(weights)]
    return (
        Side(lambda: ops.forward(call, x, state, weights, keep_packed=True)),
        Side(lambda: ops.forward(call, x, state, weights, saved)),
        Side(lambda: ops.backward(call, x, state, weights, y, saved, dy, [None] * len(state), wanted)),
    )


if __name__ == "__main__":
    main()
