"""Lines that begin alike, read once as far as they do.

Lines share how they begin: names their first letters, lines of a log the date, all of them the newline before the
first symbol. In the order of a dictionary lines that begin alike lie side by side, and what a line has in common with
the one before need not be read again. Those lines are a tree of prefixes (a trie), which the kernel library reads level
by level: as many rows at a time as there are different prefixes of that length.

    U  different lines   S  symbols of the longest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.native_model import Tree

Ids = NDArray[np.int64]
Nats = NDArray[np.float64]

_SYMBOLS_A_TREE = 1 << 11, 1 << 13
"""So many at least and at most, two trees a thread."""
_PLACES_A_TREE = 1 << 17
"""Most lines times symbols of the longest: what is laid out at a time."""


class ReadTree(Protocol):
    """Reads a tree, as `NativeModel.read_tree`."""

    def __call__(self, tree: Tree, *, threads: int) -> Nats:
        """Return the nats of the tree's nodes."""


def nats_of_lines(
    read_tree: ReadTree,
    ids: NDArray[np.integer],
    starts_B: Ids,
    stops_B: Ids,
    *,
    most: int,
    threads: int,
    pause: Callable[[], None] = lambda: None,
) -> Nats:
    """Return -log p of all symbols of lines but each one's first, line after line.

    Args:
        read_tree: reads a tree.
        ids: symbols.
        starts_B: place of each line's first symbol, which is only read, from a zero state.
        stops_B: place of its last, which is only predicted.
        most: lines that are read side by side at most.
        threads: they have a tree each; where there is only one, it has them all.
        pause: called between trees; it may raise.
    """
    lengths_B = stops_B - starts_B
    data = ids.astype(">u4").tobytes()  # in this order of bytes they compare as the symbols do
    numbers: dict[bytes, int] = {}
    places = zip((4 * starts_B).tolist(), (4 * stops_B + 4).tolist(), strict=True)
    line_B = np.array([numbers.setdefault(data[start:stop], len(numbers)) for start, stop in places], np.int64)
    keys = list(numbers)
    order_U = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    first_U = np.empty(len(keys), np.int64)
    first_U[line_B[::-1]] = np.arange(len(line_B))[::-1]
    starts_U, lengths_U = (of_lines[first_U[order_U]] for of_lines in (starts_B, lengths_B + 1))

    def read(group: slice) -> Nats:
        tree, nodes = tree_of(ids, starts_U[group], lengths_U[group])
        return read_tree(tree, threads=threads if len(groups) == 1 else 1)[nodes]

    fewest, enough = _SYMBOLS_A_TREE
    symbols = max(fewest, min(enough, int(lengths_U.sum()) // (2 * threads)))
    groups = _groups(lengths_U, most, symbols)
    pieces = []
    with ThreadPoolExecutor(threads) as pool:
        all_found: Iterator[Nats] = map(read, groups)
        if len(groups) > 1 < threads:
            with suppress(RuntimeError):  # no thread can be had any more while the interpreter ends
                all_found = pool.map(read, groups)
        for found in all_found:
            pause()
            pieces.append(found)
    places_U = np.empty(len(keys), np.int64)
    places_U[order_U] = np.cumsum(lengths_U - 1) - lengths_U + 1
    shifts_B = places_U[line_B] - (np.cumsum(lengths_B) - lengths_B)
    nats: Nats = np.concatenate(pieces)[np.repeat(shifts_B, lengths_B) + np.arange(lengths_B.sum())]
    return nats


def _groups(lengths_U: Ids, most: int, enough: int) -> list[slice]:
    """Return lines that follow each other in groups that become a tree each, of at most `enough` symbols if several."""
    groups, begin, longest, symbols = [], 0, 0, 0
    for i, length in enumerate(lengths_U.tolist()):
        longest, symbols = max(longest, length), symbols + length
        full = i - begin >= most or symbols > enough or longest * (i + 1 - begin) > _PLACES_A_TREE
        if full and i > begin:
            groups.append(slice(begin, i))
            begin, longest, symbols = i, length, length
    return [*groups, slice(begin, len(lengths_U))]


def tree_of(ids: NDArray[np.integer], starts_U: Ids, lengths_U: Ids) -> tuple[Tree, Ids]:
    """Return the tree of lines, and of each line's symbols but its first the node, line after line.

    Args:
        ids: symbols.
        starts_U: places where different lines begin, in the order of a dictionary.
        lengths_U: how many symbols each has, at least one.
    """
    level_S = np.arange(lengths_U.max())
    inside_US = level_S < lengths_U[:, None]
    symbol_US = np.where(inside_US, ids[np.where(inside_US, starts_U[:, None] + level_S, 0)], -1)
    shared_U = np.zeros(len(lengths_U), np.int64)  # with the line before
    shared_U[1:] = (symbol_US[1:] != symbol_US[:-1]).argmax(axis=1)
    new_US = inside_US & (level_S >= shared_U[:, None])
    continued_U = np.append(shared_U[1:] == lengths_U[:-1], False)  # by the line after, which begins with all of it
    last_US = new_US & (level_S == lengths_U[:, None] - 1) & ~continued_U[:, None]
    read_US = new_US & ~last_US
    # The nodes of a level in the order of the lines, those that are read first. Where a line has no node of its own,
    # its node is that of the last line above that has one, and is read.
    reads_S, nodes_S = read_US.sum(axis=0), new_US.sum(axis=0)
    read_number_US = read_US.cumsum(axis=0) - 1
    number_US = np.where(last_US, reads_S + last_US.cumsum(axis=0) - 1, read_number_US)
    node_US = np.cumsum(nodes_S) - nodes_S + number_US
    of_nodes = np.empty((2, int(nodes_S.sum())), np.int64)
    above_US = np.pad(read_number_US[:, :-1], ((0, 0), (1, 0)))
    of_nodes[:, node_US[new_US]] = symbol_US[new_US], above_US[new_US]
    return Tree(nodes_S, reads_S, of_nodes[0], of_nodes[1]), node_US[:, 1:][inside_US[:, 1:]]
