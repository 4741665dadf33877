"""The order in which training reads a text: the lecture's two samplers, and lines.

    T  steps of a window      B  rows of a batch (all processes together)      N  pairs (id, next id) of the text

Both see the text as a ring of N pairs that is turned by an offset drawn anew for each epoch and then cut, so
that every pair is used once an epoch and windows fall elsewhere in each. What step s reads is a pure
function of (seed, s, rank, world size): there is no position to save, and none to lose.

    consecutive lanes   the ring is cut into B lanes; row k of a batch continues row k of the batch before, so the
                        state is carried from step to step and zero at the start of an epoch
    random windows      the ring is cut into windows of T, which are read in random order from a zero state

The third sees the text as lines:

    lines               each from the newline before it to its own, from a zero state; lines of similar length share a
                        batch, the longest first, and what is padding counts nowhere

The ids may be memory-mapped and larger than the memory: a batch is all that is read, and no list of all windows or
lines is made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.errors import ConfigError, TextError
from longshort.text.encoding import Places
from longshort.text.permutation import Permutation

IGNORED = -1
"""Target of a place that holds no token; the loss leaves it out."""
BATCHES_TO_SORT = 64
"""Sequences of so many batches are sorted by length together."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one training step reads."""

    inputs_TB: NDArray[np.int64]
    targets_TB: NDArray[np.int64]
    """The id that follows each input, or `IGNORED`."""
    tokens: int
    """Number of targets that count, in the rows of all processes together."""
    epoch: int
    starts_fresh: bool
    """Whether the state is zero before this batch instead of carried from the one before."""


class Sampler(ABC):
    """Base of both samplers.

    Args:
        ids: the training text, at least two ids.
        batch_size: B, rows of all processes together; a multiple of `world_size`.
        seq_len: T.
        seed: decides every offset and order.
        rank: this process reads rows rank * B / world_size and following.
        world_size: number of processes.
        unknown: the id of what the vocabulary does not hold, which is never a target.

    Raises:
        TextError: the text has fewer than two ids.
        ConfigError: B or T is below one, or `world_size` does not divide B.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        unknown: int | None = None,
    ) -> None:
        if len(ids) < 2:
            raise TextError(f"Training needs a text of at least 2 tokens; this one has {len(ids)}.")
        if batch_size < 1 or seq_len < 1:
            raise ConfigError(f"batch_size and seq_len must be at least 1, not {batch_size} and {seq_len}.")
        if batch_size % world_size or not 0 <= rank < world_size:
            raise ConfigError(f"batch_size {batch_size} cannot be divided over {world_size} processes.")
        self.ids = ids
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.unknown = -1 if unknown is None else unknown
        self.num_pairs = len(ids) - 1
        rows = batch_size // world_size
        self.rows = slice(rank * rows, (rank + 1) * rows)
        self.steps_per_epoch = self._count_steps()

    carries_state = False
    """Whether rows go on where they stopped, from step to step of an epoch."""

    @abstractmethod
    def _count_steps(self) -> int: ...

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return what training step `step` (0, 1, ...) reads."""

    def _generator(self, epoch: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, epoch]))

    def starts_fresh(self, step: int) -> bool:
        """Return whether the state is zero before training step `step`."""
        return not self.carries_state or step % self.steps_per_epoch == 0

    def _batch(self, step: int, positions_TB: NDArray[np.int64], counts_TB: NDArray[np.bool_]) -> Batch:
        """Return the ids at these places and those that follow, where they count and can be predicted."""
        targets_TB = self.ids[positions_TB + 1].astype(np.int64)
        counted_TB = counts_TB & (targets_TB != self.unknown)
        inputs_TB = self.ids[positions_TB[:, self.rows]].astype(np.int64)
        targets_TB = np.where(counted_TB, targets_TB, IGNORED)[:, self.rows]
        tokens, epoch = int(np.count_nonzero(counted_TB)), step // self.steps_per_epoch
        return Batch(inputs_TB, targets_TB, tokens, epoch, self.starts_fresh(step))


class ConsecutiveLanes(Sampler):
    """Consecutive sampling: B lanes, read side by side in windows of T, the state carried.

    With `drop_incomplete` it is the lecture's own `data_iter_consecutive`: the offset is drawn from [0, T), what
    stands before it and the incomplete last window are left out. (The lecture: 8 updates an epoch.)
    """

    carries_state = True

    def __init__(
        self,
        ids: NDArray[Any],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        drop_incomplete: bool = False,
        *,
        unknown: int | None = None,
    ) -> None:
        self.drop_incomplete = drop_incomplete
        super().__init__(ids, batch_size, seq_len, seed, rank, world_size, unknown=unknown)

    def _count_steps(self) -> int:
        if not self.drop_incomplete:
            return -(-self._lane_length() // self.seq_len)
        steps = (self._lane_length() - 1) // self.seq_len
        if steps < 1:
            needed = self.batch_size * (self.seq_len + 1) + self.seq_len - 1
            raise TextError(
                f"{self.batch_size} lanes of whole windows of {self.seq_len} need a text of at least {needed} "
                f"tokens; this one has {len(self.ids)}.",
                "Give a longer text.",
            )
        return steps

    def _lane_length(self) -> int:
        """Return the pairs in the longest lane, or with `drop_incomplete` the ids in every lane."""
        if self.drop_incomplete:
            return (len(self.ids) - self.seq_len + 1) // self.batch_size
        return -(-self.num_pairs // self.batch_size)

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`; its last column in an epoch may hold ignored targets."""
        epoch, window = divmod(step, self.steps_per_epoch)
        if self.drop_incomplete:
            bounds = np.arange(self.batch_size + 1) * self._lane_length()
            offset = int(self._generator(epoch).integers(self.seq_len))
        else:
            bounds = np.arange(self.batch_size + 1) * self.num_pairs // self.batch_size
            offset = int(self._generator(epoch).integers(self.num_pairs))
        first = window * self.seq_len
        columns_T1 = np.arange(first, min(first + self.seq_len, self._lane_length()))[:, None]
        pairs_TB = offset + bounds[:-1] + columns_T1
        return self._batch(step, pairs_TB % self.num_pairs, columns_T1 < np.diff(bounds))


class RandomWindows(Sampler):
    """Random sampling: windows of T in random order, each from a zero state."""

    def _count_steps(self) -> int:
        return -(-self._num_windows() // self.batch_size)

    def _num_windows(self) -> int:
        return -(-self.num_pairs // self.seq_len)

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`; rows that an epoch's last batch does not need hold ignored targets."""
        epoch, number = divmod(step, self.steps_per_epoch)
        generator = self._generator(epoch)
        offset = int(generator.integers(self.num_pairs))
        windows = self._num_windows()
        order = Permutation(windows, generator)
        chosen = order[np.arange(number * self.batch_size, min((number + 1) * self.batch_size, windows))]
        # A row that is not needed starts past the last pair, where nothing counts.
        starts_B = np.full(self.batch_size, self.num_pairs)
        starts_B[: len(chosen)] = chosen * self.seq_len
        pairs_TB = starts_B + np.arange(min(self.seq_len, self.num_pairs))[:, None]
        return self._batch(step, (offset + pairs_TB) % self.num_pairs, pairs_TB < self.num_pairs)


class Lines(Sampler):
    """Lines of similar length side by side, each from a zero state.

    An epoch reads every line once, in a new order: the lines of `BATCHES_TO_SORT` batches in that order are sorted
    by length and cut into batches, which are read in random order.

    Args:
        ids, batch_size, seq_len, seed, rank, world_size, unknown: as of every sampler; here `seq_len` bounds what one
            product of a step sees, not the lines.
        breaks: places in `ids` of the newline before the first line and of that after each line.
    """

    def __init__(
        self,
        ids: NDArray[Any],
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        breaks: Places,
        unknown: int | None = None,
    ) -> None:
        self.breaks = breaks
        super().__init__(ids, batch_size, seq_len, seed, rank, world_size, unknown=unknown)

    def _count_steps(self) -> int:
        return -(-self.num_lines // self.batch_size)

    @property
    def num_lines(self) -> int:
        """Lines of the text."""
        return len(self.breaks) - 1

    def batch(self, step: int) -> Batch:
        """Return the batch of `step`: the longest line first; rows without a line hold ignored targets."""
        epoch, number = divmod(step, self.steps_per_epoch)

        def length(lines: NDArray[np.int64]) -> NDArray[np.int64]:
            return self.breaks[lines + 1].astype(np.int64) - self.breaks[lines].astype(np.int64)

        chosen_B = of_similar_length(self.num_lines, self.batch_size, number, length, self._generator(epoch))
        starts, lengths = self.breaks[chosen_B].astype(np.int64), length(chosen_B)
        starts_B, lengths_B = np.zeros(self.batch_size, dtype=np.int64), np.zeros(self.batch_size, dtype=np.int64)
        starts_B[: len(chosen_B)], lengths_B[: len(chosen_B)] = starts, lengths
        columns_T1 = np.arange(lengths_B.max())[:, None]
        counts_TB = columns_T1 < lengths_B
        return self._batch(step, np.where(counts_TB, starts_B + columns_T1, starts_B), counts_TB)


def of_similar_length(
    count: int,
    batch_size: int,
    number: int,
    length: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    generator: np.random.Generator,
) -> NDArray[np.int64]:
    """Return which sequences batch `number` (0, 1, ...) of an epoch reads, the longest first: `batch_size` or fewer.

    Args:
        count: of all sequences.
        batch_size: of them side by side.
        number: of the batch.
        length: gives the lengths of sequences by their numbers.
        generator: the epoch's, new.
    """
    order = Permutation(count, generator)
    stretch, place = divmod(number, BATCHES_TO_SORT)
    first = stretch * BATCHES_TO_SORT
    batches = min(BATCHES_TO_SORT, -(-count // batch_size) - first)
    sequences = order[np.arange(first * batch_size, min((first + batches) * batch_size, count))]
    # A stable sort, as equal lengths must come in the same order everywhere.
    by_length = np.argsort(-length(sequences), kind="stable")
    chosen = int(Permutation(batches, generator)[np.array([place])][0])
    return sequences[by_length[chosen * batch_size : (chosen + 1) * batch_size]]


SAMPLERS: dict[str, type[Sampler]] = {"consecutive": ConsecutiveLanes, "random": RandomWindows}
