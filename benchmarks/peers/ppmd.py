# /// script
# dependencies = ["pyppmd==1.3.1"]
# [tool.longshort]
# text = true
# ///
"""What PPMd, an adaptive n-gram coder, needs for the last tenth of a text after it has read the rest.

python benchmarks/peers/run.py --text tinyshakespeare.txt ppmd
"""

from __future__ import annotations

import json
import math
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pyppmd

from longshort import machine


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
    head_of_file = {
        "format_version": 1,
        "benchmark": "the last tenth of a text, after the rest",
        "text": Path(path).name,
    }
    head_of_file |= {"command": "make bench-peers TEXT=FILE", "date": datetime.now(UTC).date().isoformat()}
    head_of_file |= {"machine": machine.description(), "coder": f"PPMd7, pyppmd {version('pyppmd')}"}
    print(json.dumps({**head_of_file, "rows": found}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
