"""Print the README's table of the lecture from a file that `longshort compare --json` wrote.

python benchmarks/lecture_table.py benchmarks/results/2026-11-23-lecture-timemachine.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from longshort.cli.tables import summary


def main(path: str) -> None:
    result = json.loads(Path(path).read_text(encoding="utf-8"))
    print("| | epoch 40 | 80 | 120 | 160 | held-out | at its best (epoch) | s/epoch |")
    print("|---|---|---|---|---|---|---|---|")
    for group in summary(result["rows"]):
        figures = [f"{group['train_perplexity'][epoch]:.2f}" for epoch in ("40", "80", "120", "160")]
        figures += [
            f"{group['heldout_perplexity']:.1f}",
            f"{group['heldout_best']:.1f} ({group['heldout_best_epoch']})",
        ]
        figures += [f"{group['seconds_per_epoch']:.3f}"]
        print(f"| {group['cell'].upper()}, {group['implementation']} | {' | '.join(figures)} |")
    for cell, figures in result["lecture"].items():
        print(f"| {cell.upper()}, the lecture's own output | {' | '.join(figures)} | | | |")
    for baseline in result["baselines"]:
        counted = f"{baseline['train_perplexity']:.2f} | {baseline['heldout_perplexity']:.1f}"
        print(f"| {baseline['order']}-gram counts | | | | {counted} | | |")


if __name__ == "__main__":
    main(sys.argv[1])
