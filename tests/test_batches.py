from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longshort.errors import ConfigError, TextError
from longshort.text.batches import IGNORED, SAMPLERS, Batch, ConsecutiveLanes, Lines, RandomWindows, Sampler
from longshort.text.encoding import cut_of
from longshort.text.permutation import Permutation
from longshort.text.tokenizers import Ids

# Every id is its own position, so that a batch tells where it was read.
sizes = st.integers(2, 300)
batch_sizes = st.integers(1, 12)
lengths = st.integers(1, 40)
seeds = st.integers(0, 2**63 - 1)


def positions(n: int) -> Ids:
    return np.arange(n, dtype=np.int32)


def pairs(batch: Batch) -> list[tuple[int, int]]:
    counted = batch.targets_TB != IGNORED
    return list(zip(batch.inputs_TB[counted].tolist(), batch.targets_TB[counted].tolist(), strict=True))


@given(n=sizes, batch_size=batch_sizes, seq_len=lengths, seed=seeds, name=st.sampled_from(sorted(SAMPLERS)))
def test_each_epoch_uses_every_pair_once(n: int, batch_size: int, seq_len: int, seed: int, name: str) -> None:
    sampler = SAMPLERS[name](positions(n), batch_size, seq_len, seed)
    for epoch in (0, 3):
        first = epoch * sampler.steps_per_epoch
        batches = [sampler.batch(step) for step in range(first, first + sampler.steps_per_epoch)]
        read = Counter(pair for batch in batches for pair in pairs(batch))
        assert read == Counter((i, i + 1) for i in range(n - 1))
        assert all(batch.epoch == epoch and batch.tokens == len(pairs(batch)) for batch in batches)


@given(n=sizes, batch_size=batch_sizes, seq_len=lengths, seed=seeds)
def test_lanes_continue_row_by_row(n: int, batch_size: int, seq_len: int, seed: int) -> None:
    sampler = ConsecutiveLanes(positions(n), batch_size, seq_len, seed)
    before = None
    for step in range(2 * sampler.steps_per_epoch):
        batch = sampler.batch(step)
        assert batch.starts_fresh == (step % sampler.steps_per_epoch == 0)
        if before is not None and not batch.starts_fresh:
            following = (before.inputs_TB[-1] + 1) % (n - 1)
            assert np.array_equal(batch.inputs_TB[0], following)
        before = batch


@given(n=sizes, batch_size=batch_sizes, seq_len=lengths, seed=seeds)
def test_random_windows_are_stretches_of_text_from_a_zero_state(
    n: int, batch_size: int, seq_len: int, seed: int
) -> None:
    sampler = RandomWindows(positions(n), batch_size, seq_len, seed)
    for step in range(sampler.steps_per_epoch):
        batch = sampler.batch(step)
        assert batch.starts_fresh
        assert batch.inputs_TB.shape == (min(seq_len, n - 1), batch_size)
        for column in range(batch_size):
            counted = batch.targets_TB[:, column] != IGNORED
            read = batch.inputs_TB[counted, column]
            assert np.array_equal(np.diff(read) % (n - 1), np.ones(max(len(read) - 1, 0)) % (n - 1))


@given(
    n=sizes,
    rows=st.integers(1, 4),
    world_size=st.integers(1, 4),
    seq_len=lengths,
    seed=seeds,
    name=st.sampled_from(sorted(SAMPLERS)),
    step=st.integers(0, 50),
)
def test_processes_share_the_rows_of_one_batch(
    n: int, rows: int, world_size: int, seq_len: int, seed: int, name: str, step: int
) -> None:
    whole = SAMPLERS[name](positions(n), rows * world_size, seq_len, seed).batch(step)
    parts = [
        SAMPLERS[name](positions(n), rows * world_size, seq_len, seed, rank, world_size).batch(step)
        for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate([p.inputs_TB for p in parts], axis=1), whole.inputs_TB)
    assert np.array_equal(np.concatenate([p.targets_TB for p in parts], axis=1), whole.targets_TB)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_what_a_step_reads_depends_on_seed_and_epoch_alone(name: str) -> None:
    def read(seed: int, step: int) -> list[int]:
        return SAMPLERS[name](positions(1000), 4, 10, seed).batch(step).inputs_TB.ravel().tolist()

    per_epoch = SAMPLERS[name](positions(1000), 4, 10).steps_per_epoch
    assert read(0, 7) == read(0, 7)
    assert read(0, 7) != read(1, 7)
    assert read(0, 0) != read(0, per_epoch)


def test_the_lecture_makes_eight_updates_of_whole_windows() -> None:
    sampler = ConsecutiveLanes(positions(10_000), 32, 35, drop_incomplete=True)
    assert sampler.steps_per_epoch == 8
    offsets = set()
    for epoch in range(200):
        batches = [sampler.batch(8 * epoch + window) for window in range(8)]
        assert all(batch.tokens == 32 * 35 for batch in batches)
        offset = int(batches[0].inputs_TB[0, 0])
        offsets.add(offset)
        lanes = np.concatenate([batch.inputs_TB for batch in batches])
        assert np.array_equal(lanes, offset + np.arange(280)[:, None] + 311 * np.arange(32))
        assert np.array_equal(batches[-1].targets_TB, batches[-1].inputs_TB + 1)
    assert offsets == set(range(35))


@given(size=st.integers(2, 200), heldout=st.floats(0.0, 0.99))
def test_what_is_held_out_is_the_tail(size: int, heldout: float) -> None:
    try:
        cut = cut_of(size, heldout)
    except TextError:
        assert size * heldout < 2 or size * (1 - heldout) < 3
        return
    assert cut == (int(size * (1 - heldout)) if heldout else size)


def test_the_last_tenth_is_the_published_split() -> None:
    assert cut_of(1_115_394, 0.1) == 1_003_854


def _sampler(**changes: Any) -> Sampler:
    arguments: dict[str, Any] = {"ids": positions(100), "batch_size": 4, "seq_len": 5}
    return ConsecutiveLanes(**(arguments | changes))


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(TextError, match="at least 2 tokens"):
        _sampler(ids=positions(1))
    with pytest.raises(ConfigError, match="at least 1"):
        _sampler(batch_size=0)
    with pytest.raises(ConfigError, match="at least 1"):
        _sampler(seq_len=-3)
    with pytest.raises(ConfigError, match="divided over 3"):
        _sampler(world_size=3)
    with pytest.raises(TextError, match="whole windows"):
        _sampler(seq_len=40, drop_incomplete=True)
    with pytest.raises(TextError, match="1 character:"):
        cut_of(1, 0.1)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError):
            cut_of(100, share)


# ------------------------------------------------------------------------------------------------------ lines


def lines_of(line_lengths: list[int], *arguments: int, **more: Any) -> Lines:
    """Lines whose ids are their own places in the text, newlines included."""
    breaks = np.cumsum([0, *(length + 1 for length in line_lengths)]).astype(np.uint64)
    return Lines(positions(int(breaks[-1]) + 1), *arguments, breaks=breaks, **more)


line_lengths = st.lists(st.integers(0, 30), min_size=1, max_size=300)


@given(line_lengths=line_lengths, batch_size=batch_sizes, seed=seeds)
def test_each_epoch_reads_every_line_once_and_whole(line_lengths: list[int], batch_size: int, seed: int) -> None:
    sampler = lines_of(line_lengths, batch_size, 8, seed)
    starts = sampler.breaks[:-1].astype(int).tolist()
    for epoch in (0, 2):
        first = epoch * sampler.steps_per_epoch
        read: list[int] = []
        for batch in (sampler.batch(first + step) for step in range(sampler.steps_per_epoch)):
            assert batch.starts_fresh
            assert batch.epoch == epoch
            sizes_B = (batch.targets_TB != IGNORED).sum(axis=0)
            assert np.array_equal(sizes_B, np.sort(sizes_B)[::-1])
            assert len(batch.inputs_TB) == sizes_B[0]
            for row, size in enumerate(sizes_B[sizes_B > 0]):
                assert np.array_equal(np.diff(batch.inputs_TB[:size, row]), np.ones(size - 1))
                assert np.array_equal(batch.targets_TB[:size, row], batch.inputs_TB[:size, row] + 1)
                assert np.all(batch.targets_TB[size:, row] == IGNORED)
                start = int(batch.inputs_TB[0, row])
                assert size == line_lengths[starts.index(start)] + 1
                read.append(start)
        assert sorted(read) == starts


def test_lines_of_similar_length_share_a_batch() -> None:
    lengths_ = np.random.default_rng(0).integers(0, 200, size=64 * 32 * 3).tolist()
    sampler = lines_of(lengths_, 32, 64)
    batches = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    padded = sum(batch.inputs_TB.size for batch in batches)
    assert sum(batch.tokens for batch in batches) / padded > 0.97
    longest = [len(batch.inputs_TB) for batch in batches[:64]]
    assert longest != sorted(longest), "the order of lengths is the order of reading"


@given(
    line_lengths=line_lengths, rows=st.integers(1, 4), world_size=st.integers(1, 4), seed=seeds, step=st.integers(0, 9)
)
def test_processes_share_the_lines_of_one_batch(
    line_lengths: list[int], rows: int, world_size: int, seed: int, step: int
) -> None:
    whole = lines_of(line_lengths, rows * world_size, 8, seed).batch(step)
    parts = [
        lines_of(line_lengths, rows * world_size, 8, seed, rank, world_size).batch(step) for rank in range(world_size)
    ]
    assert np.array_equal(np.concatenate([p.inputs_TB for p in parts], axis=1), whole.inputs_TB)
    assert np.array_equal(np.concatenate([p.targets_TB for p in parts], axis=1), whole.targets_TB)


@pytest.mark.parametrize("name", [*sorted(SAMPLERS), "lines"])
def test_what_is_unknown_is_read_but_is_no_target(name: str) -> None:
    ids = np.array([0, 1, 2, 9, 0, 9, 9, 1, 0], dtype=np.uint8)
    arguments: dict[str, Any] = {"unknown": 9}
    if name == "lines":
        sampler: Sampler = Lines(ids, 2, 4, breaks=np.array([0, 4, 8], dtype=np.uint64), **arguments)
    else:
        sampler = SAMPLERS[name](ids, 2, 4, **arguments)
    batches = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    read = Counter(pair for batch in batches for pair in pairs(batch))
    known = Counter((int(a), int(b)) for a, b in pairwise(ids) if b != 9)
    assert read == known
    assert any((batch.inputs_TB == 9).any() for batch in batches)


@given(n=st.integers(1, 3000), seed=seeds)
def test_a_permutation_has_every_place_once(n: int, seed: int) -> None:
    order = Permutation(n, np.random.Generator(np.random.Philox(key=[seed, 0])))[np.arange(n)]
    assert np.array_equal(np.sort(order), np.arange(n))


def test_permutations_look_like_chance() -> None:
    """Each of 24 orders of four about equally often; in a long one, no trace of the places."""
    orders: Counter[tuple[int, ...]] = Counter()
    for seed in range(4800):
        order = Permutation(4, np.random.Generator(np.random.Philox(key=[seed, 1])))
        orders[tuple(order[np.arange(4)].tolist())] += 1
    chi_square = sum((orders[o] - 200) ** 2 / 200 for o in orders) + 200 * (24 - len(orders))
    assert chi_square < 49.7  # p = 0.001 with 23 degrees of freedom
    long = Permutation(100_003, np.random.Generator(np.random.Philox(key=[0, 2])))[np.arange(100_003)]
    assert abs(np.corrcoef(np.arange(100_003), long)[0, 1]) < 0.015
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.015
