"""What products of bfloat16 cost and gain in training: three seeds in both precisions on tiny Shakespeare, in turns.

python benchmarks/precision_curves.py tinyshakespeare.txt > FILE

LSTM 1 x 512, embedding 256, 1,000 steps of 32 x 64 on the first 80 % of the text; nats a character of the slice from
80 to 90 %, which is read ten times on the way (in lanes, as every run does it). The last tenth is not looked at.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longshort import machine

MODEL = ["--hidden", "512", "--embedding", "256", "--batch-size", "32", "--seq-len", "64", "--lr", "0.004"]
TRAINING = ["--steps", "1000", "--validate-every", "100", "--heldout", str(1 / 9), "--threads", "2"]


def measured(run: Path) -> dict[str, Any]:
    """Return the curve of a run, its last figure and its speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = {line["step"]: line["heldout_nats_per_token"] for line in lines if "heldout_nats_per_token" in line}
    speeds = [json.loads(line) for line in (run / "timing.jsonl").read_text(encoding="utf-8").splitlines()]
    last = json.loads((run / "result.json").read_text(encoding="utf-8"))["heldout"]["nats_per_token"]
    return {
        "nats": last,
        "nats_by_step": curve,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in speeds),
    }


def main(text: str) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        whole, part = Path(text).read_text(encoding="utf-8"), Path(place, "text.txt")
        part.write_text(whole[: len(whole) * 9 // 10], encoding="utf-8")
        for seed in range(3):
            for precision in ("float32", "bfloat16"):
                run = Path(place, f"{precision}-{seed}")
                how = ["--precision", precision, "--seed", str(seed), "--out", str(run)]
                command = [sys.executable, "-m", "longshort", "train", str(part), *MODEL, *TRAINING, *how]
                subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
                rows.append({"precision": precision, "seed": seed, **measured(run)})
                print(rows[-1], file=sys.stderr, flush=True)
    head = {"format_version": 1, "benchmark": "training in float32 and in bfloat16"}
    head |= {"command": "python benchmarks/precision_curves.py tinyshakespeare.txt"}
    head |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    print(json.dumps({**head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
