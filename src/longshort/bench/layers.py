"""`bench layers`: our layers against PyTorch's, case by case, in a file that grows and can be continued.

Rows that were disturbed are measured again after all others, `ATTEMPTS` times at most; the quieter row is kept.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from longshort import durable, kernels, machine, native
from longshort.bench import ledger, peers
from longshort.bench.grids import CELLS, GRIDS, MODES, OPTIONS, Case, Grid, summary
from longshort.bench.ledger import Row
from longshort.bench.timing import Side, Timing, busy_neighbour, interleave
from longshort.errors import UsageError

ATTEMPTS = 3
PRECISIONS = ("highest", "high", "medium")
ENVIRONMENT = (
    *machine.HELD_TO["avx2"],
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY"),
    *("KMP_BLOCKTIME", "KMP_AFFINITY", "MKL_NUM_THREADS"),
)
"""Variables that change what is measured."""

Measure = Callable[[Side, Side, Side], Timing]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, and how.

    Attributes:
        grid: name of one of `GRIDS`.
        cells: some of its cells; the grid's own if empty.
        modes: `train` and `infer`, or one of them.
        threads: numbers of threads; the grid's own if empty.
        options: some of the grid's options; all if empty.
        kernel: of ours, a name that `kernels.use` takes.
        isa: `avx2` where both sides are held to it.
        neighbour: whether another process keeps one core busy meanwhile.
        autocast: whether both sides run under autocast to bfloat16.
        matmul_precision: of both sides, as `torch.set_float32_matmul_precision` takes it.
    """

    grid: str = "quick"
    cells: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    kernel: str = "auto"
    isa: str | None = None
    neighbour: bool = False
    autocast: bool = False
    matmul_precision: str = "highest"

    def resolved(self) -> Settings:
        """Return the settings with what was left to the grid filled in.

        Raises:
            UsageError: a name is unknown, or an option is not there yet.
        """
        _check_names("grid", (self.grid,), tuple(GRIDS))
        grid = GRIDS[self.grid]
        if grid.options != OPTIONS and self.options:
            raise UsageError("--options goes with --grid options.")
        if self.autocast and grid.peers != ("torch.nn",):
            raise UsageError(f"--autocast is measured beside torch.nn, and --grid {self.grid} has other peers.")
        full = replace(
            self,
            cells=self.cells or grid.cells,
            modes=self.modes or MODES,
            threads=self.threads or grid.threads,
            options=self.options or grid.options,
        )
        cells = grid.cells if grid.options != ("none",) else CELLS
        for kind, chosen, known in (("cell", full.cells, cells), ("mode", full.modes, MODES)):
            _check_names(kind, chosen, known)
        _check_names("option", full.options, grid.options)
        _check_names("kernel", (full.kernel,), ("auto", *kernels.available(), kernels.BFLOAT16, *native.LOWER))
        _check_names("precision of products", (full.matmul_precision,), PRECISIONS)
        for number in full.threads:
            if not 1 <= number <= 1024:
                raise UsageError(f"--threads must be from 1 to 1024, not {number}.")
        for cell, option in product(full.cells, full.options):
            peers.check_option(cell, option)
        if full.isa == "avx2" and (found := torch.backends.cpu.get_cpu_capability()) != "AVX2":
            raise UsageError(
                f"PyTorch runs {found} code, not AVX2: it was loaded before --isa could act.",
                f"Set {' '.join(f'{k}={v}' for k, v in machine.HELD_TO['avx2'].items())} before Python starts.",
            )
        return full

    def cases(self) -> list[Case]:
        """Return what is to be measured, in order; call it on `resolved` settings."""
        grid = GRIDS[self.grid]
        return [
            Case(cell, mode, *shape, threads=threads, option=option, peer=peer)
            for threads, cell, option, peer, mode, shape in product(
                self.threads, self.cells, self.options, grid.peers, self.modes, grid.shapes
            )
        ]

    def command(self) -> str:
        """Return the command that measures this."""
        words = ["longshort", "bench", "layers"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value is True:
                words.append(f"--{field.name}")
            elif value != field.default:
                words += [
                    f"--{field.name.replace('_', '-')}",
                    ",".join(map(str, value)) if isinstance(value, tuple) else str(value),
                ]
        return shlex.join(words)


def result(
    settings: Settings,
    out: Path | None = None,
    report: Callable[[Row, int, int], None] = lambda row, done, cases: None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Measure every case and return everything that `bench --json` prints.

    Args:
        settings: what to measure.
        out: file that holds the result after every row. If it is there already, what it lacks is measured.
        report: called after each row with it, the number of cases that are done, and the number of all.
        measure: takes our side, the peer's and the matrix product; `interleave` if None.

    Raises:
        UsageError: settings that cannot be, or `out` was made with other settings, on another machine, or with
            other versions; the message names the first difference.
    """
    command, settings = settings.command(), settings.resolved()
    cases, grid = settings.cases(), GRIDS[settings.grid]
    head = _head(command, settings)
    rows: dict[Case, Row] = {}
    if out is not None:
        if out.exists():
            rows, head["date"] = ledger.read(out, head)
        durable.require_writable_directory(out.absolute().parent)
    threads_before = torch.get_num_threads()
    gemm = peers.gemm()
    try:
        with busy_neighbour() if settings.neighbour else contextlib.nullcontext():
            for attempt in range(1, ATTEMPTS + 1):
                for case in cases:
                    before = rows.get(case)
                    if before is not None and (before.attempts >= attempt or not before.noisy):
                        continue
                    row = _measure(case, settings, attempt, gemm, measure or interleave)
                    if before is not None and row.noisy:
                        row = replace(min(row, before, key=lambda row: row.gemm_spread + row.stolen), attempts=attempt)
                    rows[case] = row
                    report(row, len(rows), len(cases))
                    if out is not None:
                        ledger.write(out, _whole(head, grid, cases, rows))
    finally:
        torch.set_num_threads(threads_before)
    return _whole(head, grid, cases, rows)


def _measure(case: Case, settings: Settings, attempt: int, gemm: Side, measure: Measure) -> Row:
    torch.set_num_threads(case.threads)
    gc.collect()
    torch.set_float32_matmul_precision(settings.matmul_precision)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
            ours, peer, kernel = peers.contestants(case, settings.kernel)
            with kernels.use(settings.kernel), peers.gradients(case):
                timing = measure(ours, peer, replace(gemm, call=partial(_exactly, gemm.call, settings)))
    finally:
        torch.set_float32_matmul_precision("highest")
    # Beside a busy process the product is bound to vary; only what the host took is a disturbance then.
    most = {"most_gemm_spread": float("inf")} if settings.neighbour else {}
    return Row.of(case, timing, kernel=kernel, attempts=attempt, gemm_size=peers.GEMM_SIZE, **most)


def _exactly(call: Callable[[], Any], settings: Settings) -> Any:
    """Call what is the same in every benchmark: a product of float32."""
    torch.set_float32_matmul_precision("highest")
    found = call()
    torch.set_float32_matmul_precision(settings.matmul_precision)
    return found


def _head(command: str, settings: Settings) -> dict[str, Any]:
    return {
        "benchmark": "layers",
        "command": command,
        "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(settings).items()},
        "threads": list(settings.threads),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.description(),
        "library": ledger.library(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "torch_code": torch.backends.cpu.get_cpu_capability(),
    }


def _whole(head: Mapping[str, Any], grid: Grid, cases: list[Case], rows: Mapping[Case, Row]) -> dict[str, Any]:
    done = [rows[case] for case in cases if case in rows]
    return {
        **head,
        "missing": len(cases) - len(done),
        "noisy": sum(row.noisy for row in done),
        "summary": summary(grid, {row.case: row.ratio for row in done}),
        "rows": [asdict(row) for row in done],
    }


def _check_names(kind: str, chosen: tuple[str, ...], known: tuple[str, ...]) -> None:
    for name in chosen:
        if name not in known:
            raise UsageError(f"There is no {kind} called {name!r} here; there are {', '.join(known)}.")
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"A {kind} is named twice: {', '.join(chosen)}.")
