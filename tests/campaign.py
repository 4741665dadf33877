"""The long tests: each is a short test of `make test` with a larger count, which `make campaign` asks for.

    @campaign.long
    def test_kills(tmp_path: Path) -> None:
        with campaign.trials("kill -9 in a save", short=8, long=200) as trials:
            for number in trials:
                ...                             a trial that fails: trials.failed("what happened")

With LONGSHORT_CAMPAIGN=1 the count is the long one, and count, failures and seconds are printed and put into the table
of docs/campaign.md, in place of the row that was there. LONGSHORT_CAMPAIGN=0.1 asks for a tenth of it.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

SHARE = float(os.environ.get("LONGSHORT_CAMPAIGN", "0"))
PAGE = Path(__file__).parent.parent / "docs" / "campaign.md"
long = pytest.mark.campaign
HEAD = """# The campaign

The long tests. `make campaign` runs them and writes this table; `make test` runs the same code with smaller counts. A
row is replaced when its test is run again, so rows can be of different days.

| test | count | failures | seconds | date | where |
|---|---|---|---|---|---|
"""


class Trials:
    """A number of trials, numbered from 0, and what failed."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.failures: list[str] = []
        self.done = 0

    def __iter__(self) -> Iterator[int]:
        while self.done < self.count:
            self.done += 1
            yield self.done - 1

    def failed(self, what: str) -> None:
        """Note a failure; the trials go on."""
        self.failures.append(what)


@contextmanager
def trials(name: str, *, short: int, long: int) -> Iterator[Trials]:
    """Give the trials of a test, and report them at its end; an exception in one is a failure that ends them."""
    found = Trials(name, max(short, round(SHARE * long)) if SHARE else short)
    begin = time.monotonic()
    try:
        yield found
    except BaseException as error:
        found.failed(repr(error))
        raise
    finally:
        if SHARE:
            _report(found, time.monotonic() - begin)
    assert not found.failures, f"{len(found.failures)} of {found.done} failed, such as: {found.failures[:3]}"


def _report(found: Trials, seconds: float) -> None:
    print(f"\n{found.name}: {found.done:,} trials, {len(found.failures)} failures, {seconds:.0f} s", flush=True)
    for failure in found.failures[:40]:
        print(f"    {failure:.300}")
    rows = dict(re.findall(r"^(\| ([^|]+?) \|.*)$", PAGE.read_text("utf-8"), re.MULTILINE)) if PAGE.exists() else {}
    kept = {name: row for row, name in rows.items() if name not in ("test", "---")}
    where = f"Python {platform.python_version()}, {_torch()}, {len(os.sched_getaffinity(0))} cores"
    date = datetime.now(UTC).date().isoformat()
    kept[found.name] = f"| {found.name} | {found.done:,} | {len(found.failures)} | {seconds:.0f} | {date} | {where} |"
    PAGE.write_text(HEAD + "\n".join(kept.values()) + "\n", "utf-8")


def _torch() -> str:
    import torch

    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
