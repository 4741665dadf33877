"""The rows of a benchmark, and the file that holds them and can be continued.

The file is one JSON object, written whole after every row: whatever stops the program, it holds all rows so far.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longshort import durable, native
from longshort.bench.grids import Case
from longshort.bench.timing import Timing, spread
from longshort.errors import LongshortError, UsageError

MOST_GEMM_SPREAD = 0.1
"""A row is noisy if the quartiles of its matrix products lie further apart than this share of the median ..."""
MOST_STOLEN = 0.02
"""... or if the host took more than this share of the processor time."""
FIXED = ("benchmark", "settings", "machine", "library", "environment", "torch_code")
"""What all rows of a file have in common: with another of these, a measurement is another one."""


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """One case, measured.

    Attributes:
        kernel: the implementation that ran ours.
        ours_seconds: of a call, median over the blocks; a block's figure is the median of its calls.
        peer_seconds: the same.
        ratio: `peer_seconds` / `ours_seconds`: above 1 we are faster.
        ours_spread: distance of the quartiles of the blocks, divided by their median.
        peer_spread: the same.
        gflops: 10^9 multiplications and additions a second in our matrix products.
        gemm_gflops: the same in a single product of 2048 x 2048 matrices, median of those between the blocks.
        gemm_share: `gflops` / `gemm_gflops`.
        gemm_spread: as `ours_spread`.
        stolen: share of the processor time that the host gave to others meanwhile.
        handover_seconds: of a line of the cache from core to core, median of those between the blocks; 0 if unknown.
        noisy: whether `gemm_spread` or `stolen` is so large that the row should not be trusted.
        attempts: how often it was measured.
        ours_blocks: seconds of each block.
        peer_blocks: the same.
        repetitions: calls of ours and of the peer in a block.
    """

    kernel: str
    ours_seconds: float
    peer_seconds: float
    ratio: float
    ours_spread: float
    peer_spread: float
    gflops: float
    gemm_gflops: float
    gemm_share: float
    gemm_spread: float
    stolen: float
    noisy: bool
    attempts: int
    ours_blocks: list[float]
    peer_blocks: list[float]
    repetitions: list[int]
    handover_seconds: float = 0.0

    @property
    def case(self) -> Case:
        """The row's case alone."""
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})

    @classmethod
    def of(
        cls,
        case: Case,
        timing: Timing,
        *,
        kernel: str,
        attempts: int,
        gemm_size: int,
        most_gemm_spread: float = MOST_GEMM_SPREAD,
    ) -> Row:
        """Return the row of a case that was timed."""
        ours, peer, gemm = (statistics.median(figures) for figures in (timing.ours, timing.peer, timing.gemm))
        gflops, gemm_gflops = case.operations() / ours / 1e9, 2 * gemm_size**3 / gemm / 1e9
        gemm_spread = spread(timing.gemm)
        return cls(
            **asdict(case),
            kernel=kernel,
            ours_seconds=ours,
            peer_seconds=peer,
            ratio=peer / ours,
            ours_spread=spread(timing.ours),
            peer_spread=spread(timing.peer),
            gflops=gflops,
            gemm_gflops=gemm_gflops,
            gemm_share=gflops / gemm_gflops,
            gemm_spread=gemm_spread,
            stolen=timing.stolen,
            noisy=gemm_spread > most_gemm_spread or timing.stolen > MOST_STOLEN,
            attempts=attempts,
            ours_blocks=timing.ours,
            peer_blocks=timing.peer,
            repetitions=list(timing.repetitions),
            handover_seconds=timing.handover_seconds,
        )


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as the file `path`, whole or not at all."""
    text = json.dumps({"format_version": 1, **content}, indent=1, allow_nan=False)
    durable.write_file(path, text.encode("utf-8") + b"\n")


def read(path: Path, head: Mapping[str, Any]) -> tuple[dict[Case, Row], str]:
    """Return the rows of the file `path`, and the date of the first.

    Args:
        path: what `write` wrote.
        head: has the names in `FIXED`, of the measurement that is to continue.

    Raises:
        LongshortError: the file is something else.
        UsageError: it belongs to another measurement; the message names the first difference.
    """
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**entry) for entry in saved["rows"]]
        date = str(saved["date"])
        there = _flat({name: saved[name] for name in FIXED})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LongshortError(f"{path} is not a benchmark that can be continued.", "Choose another --out.") from error
    here = _flat({name: head[name] for name in FIXED})
    for name in sorted({*here, *there}):
        if here.get(name) != there.get(name):
            raise UsageError(
                f"{path} was measured with another {name}: {there.get(name)} there, {here.get(name)} here.",
                "Choose another --out, or remove the file.",
            )
    return {row.case: row for row in rows}, date


def library() -> dict[str, str | None]:
    """Return which kernel library runs: start of its SHA-256, target, whose threads. Empty without one."""
    found = native.library()
    if found is None:
        return {}
    content = Path(found._name).read_bytes()
    return {
        "sha256": hashlib.sha256(content).hexdigest()[:12],
        "target": native.active_target(),
        "threads": native.threading(),
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects by their dotted names; lists are leaves."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
