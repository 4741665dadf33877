"""How well `longshort score` tells faulty lines of a log from usual ones, beside a character n-gram.

A generator writes a service's log: requests, queries, logins, cache and job lines, with fields that depend on each
other (a slow request is a warning, a table has rows of its own number, a job that fails an error). 20,000 lines train,
4,000 others are scored, one in twenty of them with a fault of one kind:

    typo       two neighbouring letters of a word change places
    foreign    a line of another program
    cut        the line ends early
    value      a number no field of that kind has: hour 31, status 711
    mismatch   every part is usual, but they do not go together: INFO for a request of nine seconds
    repeat     a part of the line stands twice

Area under the ROC curve of bits per character, and of the largest bits of one symbol, for a model of two minutes and
for n-grams (Witten-Bell) of several orders, each line after a newline.

python benchmarks/lines_auroc.py [MINUTES]
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

import longshort
from longshort import machine
from longshort.cli import main as run_verb
from longshort.ngram import NGram

TRAIN, TEST, EVERY = 20_000, 4_000, 20
KINDS = ("typo", "foreign", "cut", "value", "mismatch", "repeat")
ROWS = {"users": 900, "items": 40, "orders": 7}
FOREIGN = (
    "kernel: [{0}.{1}] usb 1-{2}: new high-speed device number {2}",
    "panic: runtime error: index out of range [{0}] with length {2}",
    "<{2}>cron[{0}]: (root) CMD (run-parts /etc/cron.hourly)",
)


def usual(pick: random.Random) -> str:
    """Return a line of the log."""
    stamp = f"{pick.randrange(24):02d}:{pick.randrange(60):02d}:{pick.randrange(60):02d}"
    kind = pick.choices(("http", "db", "auth", "cache", "job"), (50, 25, 12, 8, 5))[0]
    if kind == "http":
        ms = pick.randrange(5, 400) if pick.random() < 0.9 else pick.randrange(2_000, 9_999)
        method, status = pick.choice(("GET", "GET", "POST")), pick.choices((200, 304, 404, 500), (85, 8, 5, 2))[0]
        level = "ERROR" if status == 500 else "WARN" if ms >= 2_000 else "INFO"
        return f"{stamp} {level} http {method} /{pick.choice(list(ROWS))}/{pick.randrange(9999)} {status} {ms}ms"
    if kind == "db":
        table = pick.choice(list(ROWS))
        return f"{stamp} INFO db select {table} rows={pick.randrange(ROWS[table]) + 1}"
    if kind == "auth":
        address = f"10.0.{pick.randrange(4)}.{pick.randrange(255)}"
        return f"{stamp} INFO auth login user=u{pick.randrange(80):02d} from {address}"
    if kind == "cache":
        hit = pick.random() < 0.8
        return f"{stamp} {'INFO' if hit else 'WARN'} cache {'hit' if hit else 'miss'} item:{pick.randrange(9999)}"
    failed = pick.random() < 0.2
    return f"{stamp} {'ERROR' if failed else 'INFO'} job nightly {'failed code=2' if failed else 'done'}"


def faulty(kind: str, pick: random.Random) -> str:
    """Return a line with a fault of this kind."""
    while True:
        line = usual(pick)
        if kind == "typo":
            places = [i for i in range(9, len(line) - 1) if line[i : i + 2].isalpha() and line[i] != line[i + 1]]
            i = pick.choice(places)
            return line[:i] + line[i + 1] + line[i] + line[i + 2 :]
        if kind == "foreign":
            return pick.choice(FOREIGN).format(pick.randrange(9999), pick.randrange(999), pick.randrange(9))
        if kind == "cut":
            return line[: pick.randrange(10, len(line) - 4)]
        if kind == "value":
            if " http " in line and pick.random() < 0.5:
                return line.replace(" 200 ", f" {pick.randrange(600, 999)} ")
            return f"{pick.randrange(30, 99)}{line[2:]}"
        if kind == "mismatch":
            changed = line.replace("INFO", "WARN") if "INFO" in line else line.replace("WARN", "INFO")
            if " http " in line and changed != line:
                return changed
        elif kind == "repeat":
            words = line.split(" ")
            i = pick.randrange(1, len(words))
            return " ".join([*words[: i + 1], *words[i:]])


def auroc(scores: np.ndarray, faults: np.ndarray) -> float:
    """Return the probability that a faulty line scores higher than a usual one; a tie counts half."""
    order = np.unique(scores, return_inverse=True)[1]
    counts = np.bincount(order)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[order]
    num = int(faults.sum())
    return float((ranks[faults].sum() - num * (num + 1) / 2) / (num * (len(faults) - num)))


def table(scores: list[float], kinds: list[str]) -> dict[str, float]:
    """Return the area over all faults and of each kind."""
    values, names = np.array(scores), np.array(kinds)
    found = {"all": auroc(values, names != "")}
    for kind in KINDS:
        chosen = (names == "") | (names == kind)
        found[kind] = auroc(values[chosen], names[chosen] == kind)
    return {name: round(value, 4) for name, value in found.items()}


def main(minutes: float = 2.0) -> None:
    pick = random.Random(0)
    text = "".join(usual(pick) + "\n" for _ in range(TRAIN))
    kinds = [pick.choice(KINDS) if i % EVERY == 0 else "" for i in range(TEST)]
    lines = [faulty(kind, pick) if kind else usual(pick) for kind in kinds]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        log, run = Path(folder) / "app.log", Path(folder) / "run"
        log.write_text(text, encoding="utf-8")
        status = run_verb(["train", str(log), "--lines", "--minutes", str(minutes), "--out", str(run)])
        assert status == 0
        model = longshort.load(run)
        begin = time.perf_counter()
        scored = list(longshort.score(model, lines))
        seconds = time.perf_counter() - begin
        config = model.config
        what = {"model": f"{config.cell} {config.layers} x {config.hidden}", "minutes": minutes}
        rows.append({**what, "score": "bits per character", **table([s.bits_per_character for s in scored], kinds)})
        rows.append({**what, "score": "largest symbol", **table([float(s.symbol_bits.max()) for s in scored], kinds)})
    for order in (3, 4, 5, 6, 8):
        ngram = NGram("\n" + text, order)
        bits = [symbol_bits(ngram, line) for line in lines]
        mean = [sum(each) / len(each) for each in bits]
        rows.append({"model": f"{order}-gram", "score": "bits per character", **table(mean, kinds)})
        rows.append({"model": f"{order}-gram", "score": "largest symbol", **table([max(each) for each in bits], kinds)})
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine.description()}
    speed = {"lines_per_second": round(TEST / seconds)}
    print(json.dumps({"format_version": 1, "benchmark": "lines auroc", **head, **speed, "rows": rows}, indent=2))


def symbol_bits(ngram: NGram, line: str) -> list[float]:
    """Return the bits of each symbol of a line and of its newline; one that was never counted costs 20.1."""
    text = f"\n{line}\n"
    found = []
    for i in range(1, len(text)):
        known = text[i] in ngram.vocabulary
        p = ngram.probability(text[max(i - ngram.order + 1, 0) : i], text[i]) if known else 1 / 0x110000
        found.append(-math.log2(p))
    return found


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
