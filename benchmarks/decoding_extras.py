"""What `bench generate` does not measure: the first character, what rounded weights cost and gain, and a neighbour.

python benchmarks/decoding_extras.py > FILE

A model of the built-in text (LSTM 1 x 256, 300 steps) is trained first. Seconds and rates are medians of nine turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import longshort
from longshort import machine, native
from longshort.bench import ledger
from longshort.generation import cost_in_bits
from longshort.native_model import Draw

TURNS, SYMBOLS = 9, 20_000


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def command(*arguments: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def first_character(run: str) -> float:
    """Seconds from the start of the command to its first character of text."""
    begin = time.perf_counter()
    arguments = [sys.executable, "-m", "longshort", "generate", run, "--length", "2000"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        found = time.perf_counter() - begin
        process.stdout.read()
    return found


def writes(decoder: Any) -> Callable[[], object]:
    logits_V, state = decoder.logits(np.array([1]), None)
    logits_BV = logits_V[None].copy()
    return lambda: decoder.write(logits_BV, state, [Draw(0.8, None, None, 0, 0, 0)], SYMBOLS)


def medians(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return the median of each, taken in turns; the first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(TURNS + 1):
        for name, call in calls.items():
            value = call()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        run = str(Path(place, "run"))
        flags = ["--corpus", "builtin", "--hidden", "256", "--embedding", "128", "--steps", "300", "--out", run]
        command("-m", "longshort", "train", *flags)()
        starts = medians(
            {
                "first character of `longshort generate`": lambda: first_character(run),
                "python -c 'import longshort'": lambda: seconds(command("-c", "import longshort")),
                "python -c ''": lambda: seconds(command("-c", "")),
            }
        )
        exact, names = longshort.load(run), ["int8", *(["bfloat16"] if native.bfloat16() else [])]
        decoders = {"float32": exact, **{name: longshort.load(run, weights=name) for name in names}}
        for decoder in decoders.values():
            decoder.threads = 1
        all_of_them = {name: writes(decoder) for name, decoder in decoders.items()}
        alone = medians({name: partial(seconds, call) for name, call in all_of_them.items()})
        exact.threads = machine.cores()
        quiet = medians({"float32": partial(seconds, all_of_them["float32"])})
        busy = [sys.executable, "-c", "while True: pass"]
        with subprocess.Popen(busy) as neighbour:
            beside = medians({"float32": partial(seconds, all_of_them["float32"])})
            neighbour.kill()
        rows: list[dict[str, Any]] = [{"name": name, "seconds": value} for name, value in starts.items()]
        rows += [
            {"name": f"1 text, LSTM 1 x 256, {name}, one thread", "characters_per_second": SYMBOLS / value}
            for name, value in alone.items()
        ]
        rows += [
            {"name": f"{name}: bits a character more", "bits": cost_in_bits(exact, decoders[name])} for name in names
        ]
        kept = quiet["float32"] / beside["float32"]
        rows.append({"name": "kept beside a process that keeps a core busy", "share": kept})
    head = {"format_version": 1, "benchmark": "the first character, rounded weights, a neighbour"}
    head |= {"command": "python benchmarks/decoding_extras.py", "date": datetime.now(UTC).date().isoformat()}
    head |= {"machine": machine.description(), "library": ledger.library(), "cpus": os.cpu_count()}
    print(json.dumps({**head, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
