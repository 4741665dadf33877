"""How well, in how many seconds: three runs on tiny Shakespeare, the last tenth held out, scored when they have ended.

python benchmarks/shakespeare_record.py tinyshakespeare.txt > FILE
python benchmarks/shakespeare_record.py tinyshakespeare.txt bfloat16 > FILE

The settings were found on the slice from 80 to 90 % of the text, in float32 (docs/log.md); steps are such that the
first two runs take at most 100 and 300 seconds on two cores, from the command to the prompt, and the last about 900;
in bfloat16 about 100, 160 and 300.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from longshort import machine

RUNS = {
    "100 seconds": ["--hidden", "512", "--lr", "0.004", "--steps", "1000"],
    "300 seconds": [],
    "15 minutes": ["--steps", "5000", "--dropout", "0.3"],
}
RUNS_IN_BFLOAT16 = {
    "100 seconds": ["--hidden", "512", "--lr", "0.004", "--steps", "1650"],
    "160 seconds": ["--hidden", "512", "--lr", "0.004", "--steps", "2600"],
    "300 seconds": ["--steps", "2180", "--dropout", "0.2"],
}
PROTOCOLS = {
    "blocks of 256 from a zero state": ["--block", "256"],
    "state carried": ["--lanes", "1"],
    "dynamic evaluation, state carried": ["--dynamic"],
}


def call(*arguments: str) -> str:
    """Run longshort and return its standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "longshort", *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def main(text: str, precision: str = "float32") -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        runs = RUNS if precision == "float32" else RUNS_IN_BFLOAT16
        for name, flags in runs.items():
            flags = flags if precision == "float32" else [*flags, "--precision", precision]
            run = Path(place, name.replace(" ", "-"))
            begin = time.perf_counter()
            call("train", text, "--recipe", "shakespeare", *flags, "--threads", "2", "--out", str(run))
            seconds = time.perf_counter() - begin
            nats = {
                protocol: json.loads(call("eval", str(run), "--split", "valid", *how, "--json"))["nats_per_token"]
                for protocol, how in PROTOCOLS.items()
            }
            command = " ".join(["longshort train tinyshakespeare.txt --recipe shakespeare", *flags])
            rows.append({"run": name, "command": command, "seconds": round(seconds, 1), "nats": nats})
            print(rows[-1], file=sys.stderr, flush=True)
    head = {"format_version": 1, "benchmark": "tiny Shakespeare, last tenth held out"}
    head |= {"command": " ".join(["python benchmarks/shakespeare_record.py tinyshakespeare.txt", *sys.argv[2:]])}
    head |= {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    print(json.dumps({**head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
