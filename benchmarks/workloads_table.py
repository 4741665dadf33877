"""Print a table of the README from files that `longshort bench train`, `generate` and `score` wrote.

python benchmarks/workloads_table.py benchmarks/results/2026-11-28-{generate,score}-int8.json

Of files that were measured with `--precision` the rows of one workload, beside PyTorch in float32 and in the same
precision, become one.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def lines(paths: Sequence[Path]) -> list[str]:
    """Return the table, line by line."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    rows = [row for result in results for row in result["rows"]]
    (precision,) = {result.get("precision", "float32") for result in results}
    if precision == "float32":
        head = ["| | ours | beside | ratio | of the machine's GEMM rate |", "|---|---|---|---|---|"]
        return head + [
            f"| {row['name']} | {_ours(row)} | {row['peer']} | {row['ratio']:.2f} | {_share(row)} |" for row in rows
        ]
    found = [f"| | ours, {precision} | beside | PyTorch's float32 | PyTorch's {precision} |", "|---|---|---|---|---|"]
    for (name, peer), group in itertools.groupby(rows, lambda row: (row["name"], row["peer"].partition(",")[0])):
        exact, rounded = group
        found.append(f"| {name} | {_ours(exact)} | {peer} | {exact['ratio']:.2f} | {rounded['ratio']:.2f} |")
    return found


def _ours(row: dict[str, Any]) -> str:
    speed = row["ours_per_second"]
    return f"{speed:,.0f} {row['unit']}/s" if speed >= 10 else f"{speed:.1f} {row['unit']}/s"


def _share(row: dict[str, Any]) -> str:
    return f"{row['gemm_share']:.0%}" if row["gemm_share"] else "-"


if __name__ == "__main__":
    print("\n".join(lines([Path(path) for path in sys.argv[1:]])))
