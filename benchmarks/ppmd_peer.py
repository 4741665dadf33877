"""What PPMd, an adaptive n-gram coder, needs for the last tenth of a text after it has read the rest.

pip install pyppmd
python benchmarks/ppmd_peer.py tinyshakespeare.txt
"""

from __future__ import annotations

import json
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pyppmd


def main(path: str) -> None:
    data = Path(path).read_bytes()
    head = data[: int(len(data) * 0.9)]
    found = []
    for order in (4, 5, 6, 8):
        start = time.perf_counter()
        sizes = []
        for part in (head, data):
            encoder = pyppmd.Ppmd7Encoder(order, 256 << 20)
            sizes.append(len(encoder.encode(part)) + len(encoder.flush()))
        nats = (sizes[1] - sizes[0]) * 8 * math.log(2) / (len(data) - len(head))
        found.append(
            {"order": order, "nats_per_byte": round(nats, 4), "seconds": round(time.perf_counter() - start, 2)}
        )
    print(json.dumps({"format_version": 1, "coder": f"PPMd7, pyppmd {version('pyppmd')}", "rows": found}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1])
