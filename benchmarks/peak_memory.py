"""How far the first call of a layer raises the peak of resident memory: T=512, B=64, H=512, each in a fresh process.

python benchmarks/peak_memory.py [lstm|gru|rnn]
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from datetime import UTC, datetime

from longshort import machine

T, B, H = 512, 64, 512


def main(cell: str) -> None:
    rows = []
    for mode in ("train", "infer"):
        rise = {}
        for library in ("longshort", "torch.nn"):
            command = [sys.executable, __file__, cell, mode, library]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rise[library] = int(done.stdout)
        ratio = rise["longshort"] / rise["torch.nn"]
        rows.append({"cell": cell, "mode": mode, "T": T, "B": B, "H": H, "rise_bytes": rise, "ratio": round(ratio, 3)})
    where = {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    print(json.dumps({"format_version": 1, "benchmark": "peak memory", **where, "rows": rows}, indent=2))


def measure(cell: str, mode: str, library: str) -> None:
    """Print the rise in bytes. Input, state and what comes from above exist before; gradients and outputs do not."""
    import torch

    import longshort

    name = cell.upper()
    layer = getattr(longshort if library == "longshort" else torch.nn, name)(H, H)
    x_TBI, dy_TBH = torch.randn(T, B, H, requires_grad=mode == "train"), torch.randn(T, B, H)
    state = tuple(torch.zeros(1, B, H) for _ in range(2)) if cell == "lstm" else torch.zeros(1, B, H)
    layer.train(mode == "train")
    before = peak()
    if mode == "train":
        layer(x_TBI, state)[0].backward(dy_TBH)
    else:
        with torch.inference_mode():
            layer(x_TBI, state)
    print(peak() - before)


def peak() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(*sys.argv[1:])
    else:
        main(sys.argv[1] if len(sys.argv) > 1 else "lstm")
