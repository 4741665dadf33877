"""`bench kernels`: every implementation that can run a layer on this machine, in turns, and how exact each is.

`auto` decides by what processors of a kind are known for; a machine's owner may know better after this.
"""

from __future__ import annotations

import copy
import gc
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longshort import kernels, machine, native
from longshort.bench import ledger, peers
from longshort.bench.grids import CELLS, MODES, Case
from longshort.bench.timing import spread, take_turns
from longshort.errors import UsageError

TORCH_NN = "torch.nn"
"""What PyTorch's own layer is called in a row."""
MOST_STEPS = 35
"""Of the comparison in float64: the error of a long sequence tells more of the weights than of the kernel."""


class Shape(NamedTuple):
    """T, B and H of a case."""

    steps: int
    rows: int
    units: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SHAPES = (Shape(1, 1, 256), Shape(35, 1, 256), Shape(35, 20, 256), Shape(35, 64, 256))
"""What is measured if nothing is named."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One implementation in one case.

    Attributes:
        cell: as all up to `threads`, of the case.
        mode: `train` or `infer`.
        T: steps.
        B: rows.
        H: hidden units, and the width of the input.
        threads: of PyTorch and of ours.
        kernel: a name that `kernels.use` takes, or `TORCH_NN`.
        seconds: of a call, median over the blocks.
        spread: distance of the quartiles of the blocks, divided by their median.
        error: largest difference from the equations in float64 of outputs, and in training of gradients, each as a
            share of the tensor's largest value.
        auto: whether it is what runs where nothing is forced.
        blocks: seconds a call, of each block.
    """

    cell: str
    mode: str
    T: int
    B: int
    H: int
    threads: int
    kernel: str
    seconds: float
    spread: float
    error: float
    auto: bool
    blocks: list[float]


def read_shape(words: str) -> Shape:
    """Return a shape from steps, rows and units with an `x` between them, as `35x20x256`.

    Raises:
        UsageError: it is something else.
    """
    parts = words.split("x")
    if len(parts) != 3 or not all(part.isascii() and part.isdigit() and 0 < int(part) <= 1 << 20 for part in parts):
        raise UsageError(f"--shapes takes steps, rows and units such as 35x20x256, not {words!r}.")
    return Shape(*map(int, parts))


def names() -> tuple[str, ...]:
    """Return what `kernels.use` can force here: native targets, those of fewer digits too, and the others."""
    lower = (name for name in native.supported() if name in native.LOWER)
    return (*native.targets(), *lower, *(name for name in kernels.available() if name not in native.targets()))


def result(
    *,
    cells: Sequence[str] = ("lstm",),
    modes: Sequence[str] = MODES,
    shapes: Sequence[Shape] = SHAPES,
    threads: int = 2,
    report: Callable[[Case, str, int, int], None] = lambda case, fastest, done, cases: None,
) -> dict[str, Any]:
    """Measure all implementations in every case and return everything that `bench kernels --json` prints.

    Args:
        cells: some of `grids.CELLS`.
        modes: some of `grids.MODES`.
        shapes: to be measured.
        threads: of PyTorch and of ours.
        report: called after each case with it, the fastest implementation, the number of cases done, and of all.

    Raises:
        UsageError: a name is unknown.
    """
    for kind, chosen, known in (("cell", cells, CELLS), ("mode", modes, MODES)):
        if wrong := [name for name in chosen if name not in known]:
            raise UsageError(f"There is no {kind} {wrong[0]!r}; there are {', '.join(known)}.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows: list[Row] = []
    cases = [Case(cell, mode, *shape, threads=threads) for cell, mode, shape in product(cells, modes, shapes)]
    try:
        for number, case in enumerate(cases, 1):
            found = _measure(case)
            rows += found
            report(case, min(found, key=lambda row: row.seconds).kernel, number, len(cases))
    finally:
        torch.set_num_threads(before)
    words = ["longshort", "bench", "kernels", "--cells", ",".join(cells), "--modes", ",".join(modes)]
    words += ["--shapes", ",".join(map(str, shapes)), "--threads", str(threads)]
    return {
        "benchmark": "kernels",
        "command": shlex.join(words),
        "threads": threads,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.description(),
        "library": ledger.library(),
        "torch_code": torch.backends.cpu.get_cpu_capability(),
        "rows": [asdict(row) for row in rows],
    }


def _measure(case: Case) -> list[Row]:
    gc.collect()
    _, peer, auto = peers.contestants(case)
    # A layer for each: one would pack its weights anew in every turn.
    sides = {name: peers.contestants(case, name)[0] for name in names()} | {TORCH_NN: peer}
    sides = {name: replace(side, within=partial(_forced, name, case)) for name, side in sides.items()}
    errors = _errors(case)
    return [
        Row(
            **{name: getattr(case, name) for name in ("cell", "mode", "T", "B", "H", "threads")},
            kernel=name,
            seconds=statistics.median(blocks),
            spread=spread(blocks),
            error=errors[name],
            auto=name == auto,
            blocks=blocks,
        )
        for name, blocks in zip(sides, take_turns(list(sides.values())), strict=True)
    ]


@contextmanager
def _forced(name: str, case: Case) -> Iterator[None]:
    with kernels.use("auto" if name == TORCH_NN else name), peers.gradients(case):
        yield


def _errors(case: Case) -> dict[str, float]:
    """Return the error of each implementation, as `Row` says."""
    T, train = min(case.T, MOST_STEPS), case.mode == "train"
    torch.manual_seed(0)
    layer = peers.our_layer(case)
    x_TBI, dy_TBH = torch.randn(T, case.B, case.H), torch.randn(T, case.B, case.H)
    with _forced("reference", case):
        exact = _results(copy.deepcopy(layer).double(), x_TBI.double(), dy_TBH.double(), train)

    def error(name: str, layer: nn.Module) -> float:
        with _forced(name, case):
            found = _results(layer, x_TBI, dy_TBH, train)
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))

    return {name: error(name, layer) for name in names()} | {TORCH_NN: error(TORCH_NN, peers.peer_of(case, layer))}


def _results(layer: nn.Module, x_TBI: Tensor, dy_TBH: Tensor, train: bool) -> list[Tensor]:
    x_TBI = x_TBI.clone().requires_grad_(train)
    y_TBH = layer(x_TBI)[0]
    if not train:
        return [y_TBH]
    return [y_TBH.detach(), *torch.autograd.grad(y_TBH, [x_TBI, *layer.parameters()], dy_TBH)]
