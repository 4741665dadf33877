"""Whether the cost is linear in T: one call of T=4096 against eight of T=512, in turns, H=256, for us and torch.nn.

`ratio` is the time of the long call divided by that of the eight short ones: 1 is linear.

python benchmarks/linear_in_time.py
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from datetime import UTC, datetime

import torch

from longshort import machine
from longshort.bench import peers
from longshort.bench.grids import CELLS, MODES, Case
from longshort.bench.timing import Side, interleave

SHORT, LONG, H = 512, 4096, 256


def main() -> None:
    rows = []
    torch.set_num_threads(2)
    for cell in CELLS:
        for mode in MODES:
            for B in (1, 20):
                short = Case(cell, mode, SHORT, B, H, threads=2)
                sides = [peers.contestants(case)[:2] for case in (replace(short, T=LONG), short)]
                with peers.gradients(short):
                    for library, long_side, short_side in zip(("longshort", "torch.nn"), *sides, strict=True):
                        timed = interleave(long_side, repeated(short_side, LONG // SHORT), peers.gemm())
                        ratio = statistics.median(timed.ours) / statistics.median(timed.peer)
                        row = {"library": library, "cell": cell, "mode": mode, "B": B, "H": H}
                        seconds = {"long_seconds": timed.ours, "short_seconds": timed.peer}
                        rows.append({**row, "ratio": round(ratio, 3), **seconds})
    where = {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    print(json.dumps({"format_version": 1, "benchmark": "linear in time", **where, "rows": rows}, indent=2))


def repeated(side: Side, times: int) -> Side:
    """Return `side`, called several times in a row; gradients add up, as those of a sequence cut into pieces do."""

    def call() -> None:
        for _ in range(times):
            side.call()

    return Side(call, side.prepare)


if __name__ == "__main__":
    main()
