"""Print a table of the layers, as README and docs have them, from a file that `longshort bench layers` wrote.

python benchmarks/layers_table.py benchmarks/results/2026-11-24-layers-marks.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

STACKS = {"bidirectional": " in both directions", "num_layers": " of two layers"}
"""What a row says of an option that the table is not about as a whole."""


def lines(path: Path) -> list[str]:
    """Return the table, line by line."""
    groups = json.loads(path.read_text(encoding="utf-8"))["summary"]
    bands = [band["band"] for band in groups[0]["bands"]]
    found = [f"| | {' | '.join(bands)} | slowest case |", "|---" * (len(bands) + 2) + "|"]
    for group in groups:
        worst = group["worst"]
        where = f"{worst['ratio']:.2f} (T={worst['T']} B={worst['B']} H={worst['H']})"
        ratios = [f"{band['ratio']:.2f}" for band in group["bands"]]
        mode = {"train": "training", "infer": "inference"}[group["mode"]]
        what = group["cell"].upper() + STACKS.get(group["option"], "")
        found.append(f"| {what}, {mode} | {' | '.join(ratios)} | {where} |")
    return found


if __name__ == "__main__":
    print("\n".join(lines(Path(sys.argv[1]))))
