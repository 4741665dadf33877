"""Depth against width: stacks of several layers beside one layer with as many weights, trained for as many seconds.

Every stack reads the same text in the same order. Its hidden units are those that bring its number of weights nearest
to that of one layer of `hidden` units, and it is trained for the same time by the clock: the learning rate falls with
its share of the time. All are trained in turns, a few seconds each, so what slows the machine slows all of them.

    plain        layers, one above the other
    residual     each layer but the first adds what it reads to what it puts out
    layer_norm   layer normalisation inside each layer
    both         both
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from longshort import machine, training
from longshort.cells import get_cell
from longshort.config import ModelConfig, TrainConfig
from longshort.decoder import weight_shapes
from longshort.errors import TrainingError, UsageError
from longshort.evaluation import evaluate
from longshort.training import Prepared

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "residual": {"residual": True},
    "layer_norm": {"layer_norm": True},
    "both": {"residual": True, "layer_norm": True},
}
LOOKS = 8
"""At so many equal shares of the time each stack is held against the held-out text."""
_SLICE = 3.0
"""Seconds of one turn, at most."""


@dataclass
class Row:
    """One stack."""

    cell: str
    kind: str
    layers: int
    hidden: int
    parameters: int
    seed: int
    steps: int = 0
    seconds: float = 0.0
    """Of training, without looks."""
    tokens_per_second: float = 0.0
    bits_per_character: float = math.nan
    """Of the held-out text, at the end."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of training, and bits a character of the beginning of the held-out text."""


def result(prepared: Prepared, *, threads: int, seconds: float, **chosen: Any) -> dict[str, Any]:
    """Return everything that `compare --recipe depth --json` prints.

    Args:
        prepared: a text, something of it held out.
        threads: of PyTorch, to be named.
        seconds: of training, for each stack.
        chosen: further arguments of `run`.
    """
    text = prepared.text
    rows = [asdict(row) for row in run(prepared, seconds=seconds, threads=threads, **chosen)]
    about = {"name": text.name, "sha256": text.sha256, "characters": text.characters}
    about |= {"symbols": prepared.tokenizer.size, "heldout_tokens": prepared.heldout_tokens}
    date, where = datetime.now(UTC).date().isoformat(), machine.description()
    found: dict[str, Any] = {"recipe": "depth", "text": about, "seconds": seconds, "threads": threads}
    found["command"] = f"longshort compare {text.name} --recipe depth --seconds {seconds:g}" + "".join(
        f" --{name} {','.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in chosen.items()
        if name != "report"
    )
    return {**found, "seeds": chosen.get("seeds", 1), "date": date, "machine": where, "rows": rows}


def run(
    prepared: Prepared,
    *,
    cells: Sequence[str] = ("lstm",),
    layers: Sequence[int] = (1, 2, 4),
    kinds: Sequence[str] = tuple(KINDS),
    hidden: int = 256,
    seconds: float = 60.0,
    seeds: int = 1,
    threads: int = 1,
    report: Callable[[Row, int], None] = lambda row, percent: None,
) -> Iterator[Row]:
    """Train all stacks in turns and yield a row each.

    Args:
        prepared: the text, cut into characters.
        cells: names of cells.
        layers: depths.
        kinds: of `KINDS`. One layer has nothing to add up, so it is plain or normalised.
        hidden: units of the one layer whose number of weights all have.
        seconds: of training, for each stack.
        seeds: how many; 0, 1, ... are used.
        threads: of PyTorch.
        report: called after each turn with the row so far and its share of the time in percent.

    Raises:
        UsageError: an unknown kind, or nothing held out.
        ConfigError: a depth below 1.
        TrainingError: a loss that is not finite.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"There is no kind of stack called {unknown[0]!r}; there are {', '.join(KINDS)}.")
    if not prepared.heldout_tokens:
        raise UsageError("The text is too short to hold a tenth of it out.", "Give a longer text.")
    for seed in range(seeds):
        wanted = [(cell, depth, kind) for cell in cells for depth in layers for kind in kinds]
        runs = [
            _Run(prepared, cell, depth, kind, hidden, seed, threads, seconds)
            for cell, depth, kind in wanted
            if depth > 1 or not KINDS[kind].get("residual")
        ]
        while waiting := [each for each in runs if each.row.seconds < seconds]:
            for each in waiting:
                each.turn()
                report(each.row, round(100 * min(each.row.seconds / seconds, 1.0)))
        for each in runs:
            each.finish()
            yield each.row


def equal_width(config: ModelConfig, parameters: int) -> int:
    """Return the number of hidden units that brings a model of these layers nearest to so many weights."""
    low, high = 1, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _count(config, middle) <= parameters else (low, middle)
    return min((low, high), key=lambda hidden: abs(_count(config, hidden) - parameters))


def _count(config: ModelConfig, hidden: int) -> int:
    cell, sized = get_cell(config.cell), dataclasses.replace(config, hidden=max(hidden, 2))
    return sum(math.prod(shape) for shape in weight_shapes(sized, len(cell.gates), cell.vectors).values())


class _Run:
    """One stack in training."""

    def __init__(
        self,
        prepared: Prepared,
        cell: str,
        depth: int,
        kind: str,
        hidden: int,
        seed: int,
        threads: int,
        seconds: float,
    ) -> None:
        self.prepared, self.seconds = prepared, seconds
        one = TrainConfig(cell=cell, hidden=hidden, seed=seed, threads=threads)
        wanted = _count(one.model(prepared.tokenizer.size), hidden)
        config = dataclasses.replace(one, layers=depth, **KINDS[kind])
        width = equal_width(config.model(prepared.tokenizer.size), wanted)
        config = dataclasses.replace(config, hidden=width)
        self.sampler = prepared.sampler(config)
        self.model = training.make_model(config, prepared.tokenizer)
        self.stepper = training.TextStepper(self.model, config, 1 << 30)
        self.row = Row(cell, kind, depth, width, self.model.num_parameters, seed)
        self.tokens = 0

    def turn(self) -> None:
        """Train for one slice of the time, and look at the held-out text where it is time to."""
        row, looked = self.row, len(self.row.curve)
        until = min(row.seconds + _SLICE, self.seconds * (looked + 1) / LOOKS)
        while row.seconds < until:
            begin = time.perf_counter()
            # The rate of a step goes by its share of all; how many there will be, the clock decides.
            self.stepper.steps = max(row.steps + 1, round(row.steps * self.seconds / max(row.seconds, 1e-9)))
            batch = self.sampler.batch(row.steps)
            nats, norm, _ = self.stepper.step(row.steps, batch)
            if not (math.isfinite(nats) and math.isfinite(norm)):
                raise TrainingError(f"{row.kind}, {row.layers} layers: the loss is {nats} at step {row.steps}.")
            row.steps += 1
            self.tokens += batch.tokens
            row.seconds += time.perf_counter() - begin
        row.tokens_per_second = self.tokens / row.seconds
        if row.seconds >= self.seconds * (looked + 1) / LOOKS:
            found = evaluate(self.model.reader(), self.prepared.tokenizer, self.prepared.look)
            row.curve.append((row.seconds, found.bits_per_character))

    def finish(self) -> None:
        """Take the last figure, of all held-out text."""
        found = evaluate(self.model.reader(), self.prepared.tokenizer, self.prepared.heldout)
        self.row.bits_per_character = found.bits_per_character
