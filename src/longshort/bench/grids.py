"""Which cases `bench layers` measures, the bands they are summed up in, and the marks to be reached.

    T  steps   B  rows   H  hidden units, and the width of the input

A ratio is the peer's time divided by ours: above 1 we are faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import Any

CELLS = ("lstm", "gru", "rnn")
MODES = ("train", "infer")
OPTIONS = ("layer_norm", "recurrent_dropout", "zoneout", "lengths", "peephole", "coupled_gates")
PROJECTION, DIRECTIONS, DEPTH = SHARED = ("proj_size", "bidirectional", "num_layers")
"""Options that PyTorch's layer has too: h projected to H / 2, both directions, two layers."""
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


@dataclass(frozen=True)
class Case:
    """One thing to measure: our layer against one peer.

    Attributes:
        cell: `lstm`, `gru` or `rnn` (with tanh).
        mode: `train`, forward and backward, or `infer`, forward without gradients.
        T: steps.
        B: rows.
        H: hidden units, and the width of the input.
        threads: of PyTorch and of ours.
        option: of our layer, one of `OPTIONS`, `SHARED` or `none`.
        peer: `torch.nn`; for one of `OPTIONS` `plain`, our layer without it, or a loop of steps, `eager` or
            `torchscript`.
    """

    cell: str
    mode: str
    T: int
    B: int
    H: int
    threads: int
    option: str = "none"
    peer: str = "torch.nn"

    def __str__(self) -> str:
        what = f"{self.cell} {self.mode} T={self.T} B={self.B} H={self.H} threads={self.threads}"
        return what if self.option == "none" else f"{what} {self.option} against {self.peer}"

    def lengths(self) -> list[int]:
        """Return the steps of each row: T, but with the option `lengths` from T / 2 to T, the longest last."""
        if self.option != "lengths":
            return [self.T] * self.B
        return [self.T - (self.B - 1 - row) * (self.T // 2) // max(self.B - 1, 1) for row in range(self.B)]

    @property
    def width(self) -> int:
        """Return the width of h."""
        return self.H // 2 if self.option == PROJECTION else self.H

    @property
    def entries(self) -> int:
        """Return the layers and directions that there are."""
        return 2 if self.option in (DIRECTIONS, DEPTH) else 1

    @property
    def output_width(self) -> int:
        """Return the width of what the layer puts out."""
        return self.width * (self.entries if self.option == DIRECTIONS else 1)

    def operations(self) -> int:
        """Return the multiplications and additions of the matrix products; training takes three times the forward's."""
        gates = GATES[self.cell] - (self.option == "coupled_gates")
        of_gates, of_h = gates * self.H * (self.H + self.width), self.H * self.width * (self.option == PROJECTION)
        forward = 2 * sum(self.lengths()) * (of_gates + of_h) * self.entries
        return forward * (3 if self.mode == "train" else 1)


Band = Callable[[Case], bool]
_BY_SHAPE: dict[str, Band] = {
    "T >= 35, B <= 3": lambda case: case.T >= 35 and case.B <= 3,
    "T >= 35, B 20-32": lambda case: case.T >= 35 and 20 <= case.B <= 32,
    "T >= 35, B = 64": lambda case: case.T >= 35 and case.B == 64,
    "T = 1": lambda case: case.T == 1,
}
_OF_OPTIONS: dict[str, Band] = {"all": lambda _: True, "B = 1, H <= 256": lambda case: case.B == 1 and case.H <= 256}
_MARKS = {
    ("T >= 35, B <= 3", "torch.nn"): {"lstm": (2.5, 2.5), "gru": (6.0, 3.0), "rnn": (5.0, 3.0)},
    ("T >= 35, B 20-32", "torch.nn"): {"lstm": (1.5, 1.4), "gru": (2.5, 2.2), "rnn": (2.6, 2.2)},
    ("T >= 35, B = 64", "torch.nn"): {"lstm": (1.35, 1.2), "gru": (1.7, 1.5), "rnn": (1.7, 1.5)},
    ("T = 1", "torch.nn"): {"lstm": (3.0, 3.0), "gru": (2.0, 2.0), "rnn": (2.0, 2.0)},
}
_MARKS_OF_OPTIONS = {
    ("all", "plain"): {"lstm": (1 / 1.5, 1 / 1.5)},
    ("all", "eager"): {"lstm": (4.0, 2.5)},
    ("B = 1, H <= 256", "eager"): {"lstm": (10.0, 10.0)},
}


@dataclass(frozen=True)
class Grid:
    """A set of cases with the bands and marks that go with it.

    Attributes:
        shapes: (T, B, H) of every case.
        threads: numbers of threads, each with every shape.
        cells: that are measured if none are named.
        options: of our layer.
        peers: what our layer is measured against.
        bands: names, and which cases belong to them.
        marks: by band and peer, then by cell: ratios to be reached in training and in inference.
    """

    shapes: tuple[tuple[int, int, int], ...]
    threads: tuple[int, ...] = (2,)
    cells: tuple[str, ...] = CELLS
    options: tuple[str, ...] = ("none",)
    peers: tuple[str, ...] = ("torch.nn",)
    bands: Mapping[str, Band] = field(default_factory=lambda: _BY_SHAPE)
    marks: Mapping[tuple[str, str], Mapping[str, tuple[float, float]]] = field(default_factory=dict)

    def mark(self, band: str, case: Case) -> float | None:
        """Return the ratio that the geometric mean of `band` is to reach for cases like `case`, if one is set."""
        found = self.marks.get((band, case.peer), {}).get(case.cell)
        return found[MODES.index(case.mode)] if found and case.threads in self.threads else None


def _every(T: Iterable[int], B: Iterable[int], H: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    return tuple(product(T, B, H))


GRIDS = {
    "quick": Grid(((1, 1, 256), (35, 1, 256), (35, 20, 256), (35, 64, 256), (35, 20, 650))),
    "marks": Grid(_every((1, 35, 128), (1, 3, 20, 64), (64, 256, 650, 1024)), marks=_MARKS),
    "full": Grid(
        _every((1, 35, 128, 512), (1, 3, 20, 32, 64), (64, 100, 256, 512, 650, 1024)),
        threads=(1, 2),
    ),
    "options": Grid(
        _every((35,), (1, 20, 64), (64, 256, 650)),
        cells=("lstm",),
        options=OPTIONS,
        peers=("plain", "eager", "torchscript"),
        bands=_OF_OPTIONS,
        marks=_MARKS_OF_OPTIONS,
    ),
    "projection": Grid(
        _every((1, 35, 128), (1, 3, 20, 64), (64, 256, 650)),
        cells=("lstm",),
        options=(PROJECTION,),
    ),
    "stacks": Grid(_every((1, 35), (1, 3, 20, 64), (64, 256, 650)), options=(DIRECTIONS, DEPTH)),
}


def summary(grid: Grid, ratios: Mapping[Case, float]) -> list[dict[str, Any]]:
    """Sum up by threads, cell, option, peer and mode: geometric mean of each band, worst case, number below 1 and 0.9.

    Args:
        grid: has the bands and the marks.
        ratios: of every case that was measured.

    Returns:
        JSON objects. A band without cases is left out.
    """
    common = ("threads", "cell", "option", "peer", "mode")

    def kind(case: Case) -> tuple[Any, ...]:
        return tuple(getattr(case, name) for name in common)

    # Sorting is stable and by first appearance, so that the summary has the order of the grid.
    first = {kind(case): number for number, case in reversed(list(enumerate(ratios)))}
    found = []
    for key, members in groupby(sorted(ratios, key=lambda case: first[kind(case)]), key=kind):
        cases = list(members)
        worst = min(cases, key=lambda case: ratios[case])
        bands = []
        for name, belongs in grid.bands.items():
            logs = [math.log(ratios[case]) for case in cases if belongs(case)]
            if logs:
                mean = math.exp(math.fsum(logs) / len(logs))
                bands.append({"band": name, "cases": len(logs), "ratio": mean, "mark": grid.mark(name, cases[0])})
        found.append(
            {
                **dict(zip(common, key, strict=True)),
                "cases": len(cases),
                "bands": bands,
                "worst": {"ratio": ratios[worst], **{name: getattr(worst, name) for name in "TBH"}},
                "below_1": sum(ratios[case] < 1 for case in cases),
                "below_0.9": sum(ratios[case] < 0.9 for case in cases),
            }
        )
    return found
