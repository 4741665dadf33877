"""Word vectors in files: word2vec's text and binary formats, GloVe's, and fastText's `.vec`.

    word2vec text, fastText    a line `N E`, then N lines `word x1 ... xE`
    GloVe                      the same without the first line
    word2vec binary            a line `N E`, then for each word its UTF-8, a space, E little-endian float32, and in some
                               writers' files a newline

A file of gigabytes is read in a stream: of a vocabulary's words only those that it holds are kept.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from longshort import durable
from longshort.errors import TextError
from longshort.text.corpus import open_file

MOST_VALUES = 65_536
"""Of a vector; the widest that an embedding can be."""
_HINT = "Give a file of word vectors: word2vec's, GloVe's or fastText's."
_LONGEST_LINE = 1 << 24
_LONGEST_WORD = 1 << 16


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Words and their vectors."""

    words: list[str]
    """Each once."""
    matrix_NE: NDArray[np.float32]
    """The vector of each, in the same order."""


def read(path: str | Path, wanted: Collection[str] | None = None) -> Vectors:
    """Return the vectors in a file of any of the four formats, or of gzip of one.

    Args:
        path: the file.
        wanted: the words to keep; all if None. Of a word that comes twice the first vector counts, as in gensim.

    Raises:
        UsageError: there is no such file.
        TextError: it cannot be read, or is no file of vectors.
    """
    path = Path(path)
    with open_file(path, _HINT) as stream:
        source = _Source(stream, path)
        kept: dict[str, NDArray[np.float32]] = {}
        width = 0
        wanted = wanted if wanted is None else frozenset(wanted)
        for word, vector, width in source.vectors():
            if word not in kept and (wanted is None or word in wanted):
                kept[word] = source.numbers(vector, width)
    matrix_NE = np.stack(list(kept.values())) if kept else np.empty((0, width), np.float32)
    return Vectors(list(kept), matrix_NE)


def width(path: str | Path) -> int:
    """Return how many numbers a vector of the file has.

    Raises:
        UsageError, TextError: as `read`.
    """
    path = Path(path)
    with open_file(path, _HINT) as stream:
        for _, _, found in _Source(stream, path).vectors():
            return found
    raise AssertionError  # a file without vectors has been refused


def write(path: str | Path, vectors: Vectors) -> None:
    """Write vectors in word2vec's text format, each number with the digits that give it back exactly.

    Args:
        path: of the file, which is written whole or not at all.
        vectors: to be written. No word may hold white space: the format has no way to say so.

    Raises:
        TextError: a word that the format cannot hold.
        OutputError: the file cannot be written.
    """
    for word in vectors.words:
        if not word or word.split() != [word]:
            raise TextError(f"A file of vectors cannot hold the word {word!r}.", "Leave it out.")
    N, E = vectors.matrix_NE.shape
    lines = [f"{N} {E}"]
    for word, vector in zip(vectors.words, vectors.matrix_NE, strict=True):
        lines.append(" ".join([word, *map(str, vector)]))
    durable.write_file(Path(path), "\n".join([*lines, ""]).encode("utf-8"))


class _Source:
    """A file of vectors that is read from its beginning."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self._stream, self._path, self._line = stream, path, 0

    def refuse(self, reason: str) -> NoReturn:
        """Raise the TextError which says what is wrong with the file, and where."""
        where = f", line {self._line}" if self._line > 1 else ""
        raise TextError(
            f"{str(self._path)!r} is no file of word vectors: {reason}{where}.",
            "The formats are word2vec's (text or binary), GloVe's and fastText's .vec.",
        )

    def vectors(self) -> Iterator[tuple[str, bytes | list[bytes], int]]:
        """Yield each word, its numbers as they stand in the file, and how many they are."""
        first = self._read_line()
        fields = first.split()
        header = [int(field) for field in fields] if len(fields) == 2 and all(f.isdigit() for f in fields) else None
        if header is None:
            self._width = len(fields) - 1
            self._check_width()
            yield from self._text(None, first)
            return
        count, self._width = header
        self._check_width()
        if not count:
            self.refuse("it says that it holds none")
        second = self._stream.readline(_LONGEST_LINE)
        parts = second.rstrip(b"\r\n").rsplit(b" ", self._width)
        if len(parts) == self._width + 1 and all(map(_is_number, parts[1:])):
            self._line = 2
            yield from self._text(count, second)
        else:
            yield from self._binary(count, second)

    def numbers(self, vector: bytes | list[bytes], width: int) -> NDArray[np.float32]:
        """Return a vector's numbers; all of them are finite."""
        if isinstance(vector, bytes):
            found = np.frombuffer(vector, "<f4").astype(np.float32)
        else:
            try:
                with np.errstate(over="ignore"):
                    found = np.array([float(value) for value in vector], np.float64).astype(np.float32)
            except ValueError:
                self.refuse(f"a number was wanted, not {next(v for v in vector if not _is_number(v))!r:.40}")
        if not np.isfinite(found).all():
            self.refuse("a number is not finite")
        return found

    def _check_width(self) -> None:
        if not 1 <= self._width <= MOST_VALUES:
            self.refuse(f"a vector has 1 to {MOST_VALUES:,} numbers, not {max(self._width, 0)}")

    def _read_line(self) -> bytes:
        line = self._stream.readline(_LONGEST_LINE)
        self._line += 1
        if len(line) == _LONGEST_LINE:
            self.refuse("a line is too long")
        if not line.strip():
            self.refuse("it is empty" if self._line == 1 else "a line is empty")
        return line

    def _text(self, count: int | None, line: bytes) -> Iterator[tuple[str, list[bytes], int]]:
        number = 0
        while True:
            # From the right: GloVe's largest file has words with spaces.
            parts = line.rstrip(b" \r\n").rsplit(b" ", self._width)
            if len(parts) != self._width + 1 or not parts[0]:
                values = max(len(line.split()) - 1, 0)
                self.refuse(f"a word and {self._width} numbers were wanted, not {values} numbers")
            yield parts[0].decode("utf-8", "replace"), parts[1:], self._width
            number += 1
            if number == count:
                self._require_end()
                return
            line = self._stream.readline(_LONGEST_LINE)
            self._line += 1
            if not line:
                if count is not None:
                    self.refuse(f"it ends after {number:,} of {count:,} vectors")
                return

    def _require_end(self) -> None:
        if self._stream.read(1 << 16).strip():
            self.refuse("it holds more vectors than its first line says")

    def _binary(self, count: int, rest: bytes) -> Iterator[tuple[str, bytes, int]]:
        self._line = 0
        size = 4 * self._width
        for number in range(count):
            while b" " not in rest:
                more = self._stream.read(1 << 16)
                if not more or len(rest) > _LONGEST_WORD:
                    self.refuse(f"it ends after {number:,} of {count:,} vectors")
                rest += more
            word, _, rest = rest.partition(b" ")
            if len(rest) < size:
                rest += self._stream.read(max(size - len(rest), 1 << 20))
            if len(rest) < size:
                self.refuse(f"it ends after {number:,} of {count:,} vectors")
            yield word.lstrip(b"\n").decode("utf-8", "replace"), rest[:size], self._width
            rest = rest[size:]
        if rest.strip():
            self.refuse("it holds more vectors than its first line says")
        self._require_end()


def _is_number(value: bytes) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
