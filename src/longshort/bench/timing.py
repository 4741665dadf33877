"""Two things timed side by side on a machine that may be disturbed, and what disturbed it.

    ours ours ... | peer peer ... | matrix product | peer ... | ours ... | matrix product | ...        five blocks

Both sides of a block see the same machine, so what slows it for minutes leaves their ratio alone; the order within a
block alternates, and the median over the blocks forgets a single disturbed one. All times are in seconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from longshort import native

BLOCKS = 5
BLOCK_SECONDS = 0.05
"""A side repeats its call for about so long in each block, once at least."""
_WARM_UPS = 3
_LONG_CALL = 0.5
"""Two calls of so many seconds are warm-up enough."""

Clock = Callable[[], float]
Ticks = tuple[float, float]


@dataclass(frozen=True)
class Side:
    """One of the two things that are compared.

    Attributes:
        call: what is timed.
        prepare: runs before every call, outside the clock.
        within: gives the context of a block's calls, outside the clock.
    """

    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    within: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class Timing:
    """What was measured.

    Attributes:
        ours: of each block, the median of its calls.
        peer: the same.
        gemm: the matrix product, before the first block and after each.
        repetitions: calls of ours and of the peer in a block.
        stolen: share of all processor time that the host took from this machine meanwhile.
        handovers: what `native.handover` gave after each product, where it gave something. On some machines it goes
            from 3e-8 to 2e-7 seconds and back within a minute, and threads that wait for each other with it.
    """

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    gemm: list[float] = field(default_factory=list)
    repetitions: tuple[int, int] = (0, 0)
    stolen: float = 0.0
    handovers: list[float] = field(default_factory=list)

    @property
    def handover_seconds(self) -> float:
        """Return the median of `handovers`; 0 if there are none."""
        return statistics.median(self.handovers or [0.0])


def interleave(
    ours: Side,
    peer: Side,
    gemm: Side,
    *,
    blocks: int = BLOCKS,
    block_seconds: float | None = None,
    clock: Clock = time.perf_counter,
    ticks: Callable[[], Ticks] | None = None,
) -> Timing:
    """Time `ours` and `peer` in turns, and `gemm` between the blocks, after warming all of them up.

    Args:
        ours: one side.
        peer: the other side.
        gemm: what tells how fast the machine is just now.
        blocks: how many.
        block_seconds: about how long a side takes in a block, preparation included; `BLOCK_SECONDS` if None.
        clock: in seconds.
        ticks: stolen and total processor time so far; `stolen_ticks` if None.
    """
    ticks = ticks or stolen_ticks
    block_seconds = BLOCK_SECONDS if block_seconds is None else block_seconds
    ours_calls, peer_calls = (_calls_of_block(side, block_seconds, clock) for side in (ours, peer))
    _one(gemm, clock)
    before = ticks()
    timing = Timing(repetitions=(ours_calls, peer_calls))
    turns = [(ours, ours_calls, timing.ours), (peer, peer_calls, timing.peer)]
    _look_at_machine(gemm, clock, timing)
    for number in range(blocks):
        _take_turns(turns, number, clock)
        _look_at_machine(gemm, clock, timing)
    stolen, total = (now - then for now, then in zip(ticks(), before, strict=True))
    timing.stolen = stolen / total if total > 0 else 0.0
    return timing


def take_turns(
    sides: Sequence[Side],
    *,
    blocks: int = BLOCKS,
    block_seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> list[list[float]]:
    """Time any number of things in turns after warming all of them up; arguments as of `interleave`.

    Returns:
        Of each side what `Timing.ours` is.
    """
    block_seconds = BLOCK_SECONDS if block_seconds is None else block_seconds
    turns: list[Turn] = [(side, _calls_of_block(side, block_seconds, clock), []) for side in sides]
    for number in range(blocks):
        _take_turns(turns, number, clock)
    return [figures for _, _, figures in turns]


def spread(figures: Sequence[float]) -> float:
    """Return the distance of the quartiles, divided by the median: half of the figures lie that close together."""
    low, middle, high = statistics.quantiles(figures, n=4, method="inclusive")
    return (high - low) / middle


def stolen_ticks() -> Ticks:
    """Return the processor time that the host gave to others, and all there was, since the start; (0, 0) if untold."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as file:
            figures = [float(word) for word in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return 0.0, 0.0
    return (figures[7], sum(figures)) if len(figures) == 8 else (0.0, 0.0)


@contextmanager
def busy_neighbour() -> Iterator[int]:
    """Run a process that keeps one processor core busy while the context lasts, and give its id.

    It stays on the last core that this process may use, and ends by itself should this process be killed.
    """
    program = (
        "import os\n"
        "if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        f"while os.getppid() == {os.getpid()}: sum(range(100_000))\n"
    )
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stdin=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


Turn = tuple[Side, int, list[float]]
"""A side, its calls in a block, and what they gave so far."""


def _take_turns(turns: Sequence[Turn], number: int, clock: Clock) -> None:
    """Run the block of this number: every side's turn, the last first where the number is odd."""
    for side, calls, figures in reversed(turns) if number % 2 else turns:
        with side.within():
            figures.append(statistics.median(_one(side, clock) for _ in range(calls)))


def _look_at_machine(gemm: Side, clock: Clock, timing: Timing) -> None:
    timing.gemm.append(_one(gemm, clock))
    if (seconds := native.handover()) is not None:
        timing.handovers.append(seconds)


def _calls_of_block(side: Side, block_seconds: float, clock: Clock) -> int:
    with side.within():
        return max(1, round(block_seconds / _warm_up(side, clock)))


def _one(side: Side, clock: Clock) -> float:
    side.prepare()
    start = clock()
    side.call()
    return clock() - start


def _warm_up(side: Side, clock: Clock) -> float:
    """Call a few times, and return the seconds of the quickest call with its preparation."""
    seconds: list[float] = []
    # Two at least: a first call that builds a kernel says nothing about the next.
    while len(seconds) < 2 or (len(seconds) < _WARM_UPS and seconds[-1] < _LONG_CALL):
        start = clock()
        side.prepare()
        side.call()
        seconds.append(clock() - start)
    return max(min(seconds), 1e-7)
