"""Bits per character of each line: how odd a line is to a model.

    for scored in score(model, open("app.log")):
        print(scored.line, scored.bits_per_character)

Each line starts from a zero state after one newline; the line and the newline that closes it are predicted, and their
bits divided by the line's characters + 1. What the vocabulary does not hold costs `UNKNOWN_BITS`, what it takes to name
one of Unicode's code points: a symbol that training never saw is the oddest there is, and must not count as nothing.

Lines are read ahead in a bounded window, and what they begin with in common is read once. Results come in the order
of the lines. Whatever stands beside a line, the native kernels give it the same bits; without them, or by PyTorch,
they are the same to about 1e-6.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.errors import ConfigError
from longshort.evaluation import Model, read_lines
from longshort.text.tokenizers import Tokenizer
from longshort.text.words import LONGEST_PIECE

UNKNOWN_BITS = math.log2(0x110000)
LINES_AHEAD = 2048
CHARACTERS_AHEAD = 1 << 20


class LineModel(Model, Protocol):
    """A model with its tokenizer, as `longshort.load` gives it."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the text that the model was trained on."""


@dataclass(frozen=True, slots=True)
class LineScore:
    """What one line costs."""

    line: int
    """Number of the line, from 1."""
    text: str
    """Without its newline."""
    characters: int
    bits_per_character: float
    unknown: int
    """Symbols outside the vocabulary; each is in the bits with `UNKNOWN_BITS`."""
    symbol_bits: NDArray[np.float32]
    """Bits of each symbol, the closing newline's last."""
    symbol_characters: NDArray[np.int32]
    """How many characters each symbol stands for; their sum may be less than the line's where white space ends it."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures by name, as JSON can hold them; without the text."""
        figures = {"line": self.line, "characters": self.characters, "bits_per_character": self.bits_per_character}
        return figures | {"unknown": self.unknown}


def oddest(scored: Iterable[LineScore], number: int) -> list[LineScore]:
    """Return the `number` lines with the most bits per character, the oddest first; only so many are held."""
    return heapq.nlargest(number, scored, key=lambda found: (found.bits_per_character, -found.line))


def score(model: LineModel, lines: Iterable[str], *, ahead: int = LINES_AHEAD) -> Iterator[LineScore]:
    """Yield the score of each line, in order, holding at most `ahead` lines.

    Args:
        model: a decoder, or a `LanguageModel` with a tokenizer.
        lines: each with or without the newline that ends it, as a file gives them.
        ahead: most lines that are read before the first of them is given out.

    Raises:
        ConfigError: `ahead` is below one.
    """
    if ahead < 1:
        raise ConfigError(f"ahead must be at least 1, not {ahead}.")
    number, held, size = 1, list[str](), 0
    for line in lines:
        held.append(line.removesuffix("\n"))
        size += len(line)
        if len(held) >= ahead or size >= CHARACTERS_AHEAD:
            yield from _window(model, held, number)
            number, held, size = number + len(held), [], 0
    yield from _window(model, held, number)


def _window(model: LineModel, lines: list[str], number: int) -> Iterator[LineScore]:
    """Score some lines together; `number` is the first one's."""
    if not lines:
        return
    tokenizer = model.tokenizer
    encoded = [tokenizer.encode_lines(f"{line}\n") for line in lines]
    newline = np.array([tokenizer.newline], encoded[0].dtype)
    ids = np.concatenate([part for line in encoded for part in (newline, line)])
    stops_B = np.cumsum([len(line) + 1 for line in encoded]) - 1
    starts_B = np.append(0, stops_B[:-1] + 1)
    symbols = np.delete(ids, starts_B)
    nats = read_lines(model, tokenizer.size, ids, starts_B, stops_B)
    bits = np.where(symbols < tokenizer.size, nats / math.log(2), UNKNOWN_BITS).astype(np.float32)
    characters = _lengths(tokenizer, lines, encoded)
    end = 0
    for i, (line, own) in enumerate(zip(lines, encoded, strict=True)):
        begin, end = end, end + len(own)
        of_symbols = bits[begin:end].copy()  # a view would keep all lines'
        total = float(of_symbols.sum(dtype=np.float64)) / (len(line) + 1)
        unknown = int(np.count_nonzero(own >= tokenizer.size))
        yield LineScore(number + i, line, len(line), total, unknown, of_symbols, characters[begin:end].copy())


def _lengths(tokenizer: Tokenizer, lines: list[str], encoded: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    """Return how many characters each symbol of the lines stands for, line after line."""
    text = "".join(f"{line}\n" for line in lines)
    if len(text) <= LONGEST_PIECE:
        return tokenizer.lengths(text, np.concatenate(encoded))[0]
    # A longer text is cut into pieces, in other places than a line.
    return np.concatenate([tokenizer.lengths(f"{line}\n", ids)[0] for line, ids in zip(lines, encoded, strict=True)])


def odd_part(scored: LineScore) -> tuple[int, int]:
    """Return the stretch of a line that is odder than the rest, as places of characters (start, end).

    It is the stretch whose bits exceed twice the line's mean a symbol by the most in all; where even the closing
    newline alone is the oddest (a line that ends early), the stretch is empty and lies at the end.
    """
    bits, sizes = scored.symbol_bits.astype(np.float64), scored.symbol_characters
    excess = bits - 2 * bits.mean()
    best, best_range, start, running = -math.inf, (0, 0), 0, 0.0
    for i, value in enumerate(excess):  # the stretch of the largest sum (Kadane)
        if running <= 0:
            start, running = i, 0.0
        running += float(value)
        if running > best:
            best, best_range = running, (start, i + 1)
    ends = np.append(0, np.cumsum(sizes))
    length = len(scored.text)
    return min(int(ends[best_range[0]]), length), min(int(ends[best_range[1]]), length)
