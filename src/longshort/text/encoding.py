"""A text as ids: read in a stream, split into training and held-out parts, memory-mapped where it is large.

    survey(source)                 one pass: SHA-256, characters, lines
    place_of_cut(...)              where the held-out part begins, in characters
    encode(source, ..., cut)       the ids of both parts, of the smallest integers that hold them

A text of at most `IN_MEMORY` characters is encoded anew each time. The ids of a longer one are files in the cache
directory (`corpus.cache_directory`), in a folder named by the SHA-256 of text, tokenizer, cut and kind; they are made
whole or not at all, checked by their SHA-256 when they are opened, and deleted when nobody has used them for 30 days.
Of the text itself never more than some pieces are held.

With lines, a part is what stands between the newline before its first line and the newline of its last:
`breaks` are the places of these newlines in `ids`, and line k is the pairs (id, next id) from break k to break k + 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort import durable
from longshort.errors import ConfigError, OutputError, TextError
from longshort.text.corpus import Source, Text, cache_directory, empty
from longshort.text.tokenizers import Tokenizer

IN_MEMORY = 1 << 24
LONGEST_LINE = 1 << 16
DAYS_UNUSED = 30
_FORMAT = 1  # part of the key: to be raised with every change of what the files hold

Places = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one reading of a text found."""

    name: str
    sha256: str
    characters: int
    lines: int
    """Newlines, and one more where the text does not end in one."""
    closed: bool
    """Whether it ends in a newline."""


@dataclass(frozen=True, slots=True)
class Part:
    """The ids of a stretch of text, which need not fit into memory, and how much text they stand for."""

    ids: NDArray[Any]
    known: int
    """Ids after the first that the vocabulary holds; with lines, all of the lines and their newlines."""
    characters: int
    """What these stand for, in characters and in UTF-8 bytes; not counted for a training part."""
    bytes: int
    breaks: Places | None = None
    """With lines: places in `ids` of the newline before the first line and of that after each line."""

    @property
    def tokens(self) -> int:
        """Ids that are to be predicted, unknown ones included."""
        if self.breaks is not None:
            return int(self.breaks[-1] - self.breaks[0])
        return max(len(self.ids) - 1, 0)

    def first(self, tokens: int) -> Part:
        """Return about the first `tokens` of this part, for a sample; the other counts are in proportion."""
        if tokens >= self.tokens:
            return self
        if self.breaks is None:
            kept = replace(self, ids=self.ids[: tokens + 1])
        else:
            lines = max(int(np.searchsorted(self.breaks, self.breaks[0] + np.uint64(tokens))), 1)
            kept = replace(self, breaks=self.breaks[: lines + 1])
        share = kept.tokens / self.tokens
        known, characters, num_bytes = (max(round(share * n), 1) for n in (self.known, self.characters, self.bytes))
        return replace(kept, known=known, characters=characters, bytes=num_bytes)


def survey(source: Source) -> Survey:
    """Read a text once. TextError where it has no character or is no text."""
    digest, characters, lines, last = hashlib.sha256(), 0, 0, ""
    for piece in source.pieces():
        digest.update(piece.encode())
        characters += len(piece)
        lines += piece.count("\n")
        last = piece[-1:] or last
    if not characters:
        raise empty(source)
    closed = last == "\n"
    return Survey(source.name, digest.hexdigest(), characters, lines + (not closed), closed)


def place_of_cut(source: Source, found: Survey, heldout: float, lines: bool) -> int:
    """Return how many characters stand before the held-out part.

    Args:
        source: the text.
        found: its survey.
        heldout: share at its end that is held out, 0 <= heldout < 1.
        lines: whether the share is of the lines, and no line is cut.

    Raises:
        ConfigError: `heldout` is outside its range.
        TextError: a part would be too short.
    """
    if not lines:
        return cut_of(found.characters, heldout)
    cut = cut_of(found.lines, heldout, least=1, unit="line")
    if cut == found.lines:
        return found.characters
    before = 0
    for piece in source.pieces():
        count = piece.count("\n")
        if count < cut:
            cut, before = cut - count, before + len(piece)
            continue
        place = -1
        for _ in range(cut):
            place = piece.index("\n", place + 1)
        return before + place + 1
    return before


def cut_of(size: int, heldout: float, least: int = 2, unit: str = "character") -> int:
    """Return how many of `size` characters or lines come before the held-out part; errors as `place_of_cut`."""
    if not 0 <= heldout < 1:
        raise ConfigError(f"The held-out share must be in [0, 1), not {heldout}.")
    cut = int(size * (1 - heldout)) if heldout else size
    if cut < least or (heldout and size - cut < least):
        raise TextError(
            f"The text has {size} {unit}{'s' if size != 1 else ''}: too few to train on "
            f"{1 - heldout:.0%} and hold out {heldout:.0%}.",
            "Give a longer text; a few thousand characters are the least that teaches a model anything.",
        )
    return cut


def head(pieces: Iterable[str], cut: int) -> Iterator[str]:
    """Yield the first `cut` characters."""
    for piece in pieces:
        if cut <= 0:
            return
        yield piece[:cut]
        cut -= len(piece)


def tail(pieces: Iterable[str], cut: int) -> Iterator[str]:
    """Yield what follows the first `cut` characters."""
    for piece in pieces:
        if len(piece) > cut:
            yield piece[max(cut, 0) :]
        cut -= len(piece)


def beginning(pieces: Iterable[str], characters: int, lines: bool) -> str:
    """Return about the first `characters` of a text; with lines, whole ones, at least one."""
    kept, size = [], 0
    for piece in pieces:
        kept.append(piece)
        size += len(piece)
        if size >= characters and (not lines or "\n" in piece):
            break
    text = "".join(kept)
    if not lines or len(text) <= characters:
        return text[:characters]
    end = text.rfind("\n", 0, characters) + 1 or text.find("\n") + 1
    return text[:end] if end else text


def closed(pieces: Iterable[str]) -> Iterator[str]:
    """Yield a text, and a newline where it does not end in one."""
    last = "\n"
    for piece in pieces:
        yield piece
        last = piece[-1:] or last
    if last != "\n":
        yield "\n"


def encode_text(tokenizer: Tokenizer, text: str, lines: bool = False) -> Part:
    """Return the ids of a text at hand; TextError for a line that is too long."""
    source = Text(text, "the text", "")
    return _from_memory(source, tokenizer, 0, lines)[1]


def encode(source: Source, found: Survey, tokenizer: Tokenizer, cut: int, lines: bool = False) -> tuple[Part, Part]:
    """Return the training part and the held-out part of a text as ids.

    Args:
        source: the text.
        found: its survey.
        tokenizer: text to ids.
        cut: characters before the held-out part.
        lines: whether each line is a sequence of its own.

    Raises:
        TextError: a line is too long to be a sequence.
        OutputError, CorpusError: the ids of a long text cannot be kept.
    """
    if found.characters <= IN_MEMORY:
        return _from_memory(source, tokenizer, cut, lines)
    key = "\n".join((str(_FORMAT), found.sha256, tokenizer.sha256, str(cut), str(lines)))
    folder = cache_directory() / "ids" / hashlib.sha256(key.encode()).hexdigest()[:32]
    parts = _from_files(folder)
    if parts is None:
        _delete_unused(folder.parent)
        if folder.exists():  # damaged
            shutil.rmtree(folder, ignore_errors=True)
        try:
            _write_files(folder, source, tokenizer, cut, lines)
        except OutputError as error:
            raise OutputError(
                error.what, "Free some space, or name another cache directory in LONGSHORT_CACHE."
            ) from error
        parts = _from_files(folder)
    if parts is None:
        raise OutputError(f"The ids that were written to {folder} cannot be read.", "Look at the disk.")
    return parts


class _Encoder:
    """Encodes both parts piece by piece, and counts.

    Args:
        put_ids, put_breaks: take the ids and the places of newlines as they come.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lines: bool,
        put_ids: Callable[[NDArray[Any]], object],
        put_breaks: Callable[[Places], object],
    ) -> None:
        self.tokenizer, self.lines, self.put_ids, self.put_breaks = tokenizer, lines, put_ids, put_breaks
        self.written = self.num_lines = 0
        if lines:
            self._put(np.array([tokenizer.newline]))
            put_breaks(np.zeros(1, dtype=np.uint64))

    def _put(self, ids: NDArray[Any]) -> None:
        self.put_ids(ids.astype(self.tokenizer.dtype))
        self.written += len(ids)

    def run(self, pieces: Iterable[str], measured: bool) -> dict[str, int]:
        """Encode a part and return its counts; of text only where it is `measured`."""
        start, counts = self.written, np.zeros(3, dtype=np.int64)
        lines_before, first = self.num_lines, not self.lines
        for piece in _whole_lines(pieces) if self.lines else self.tokenizer.whole(pieces):
            ids = self.tokenizer.encode_lines(piece) if self.lines else self.tokenizer.encode(piece)
            if not len(ids):
                continue
            if self.lines:
                places = np.flatnonzero(ids == self.tokenizer.newline).astype(np.uint64) + np.uint64(self.written)
                self.put_breaks(places)
                self.num_lines += len(places)
            known = ids < self.tokenizer.size
            known[0] &= not first
            counts[0] += np.count_nonzero(known)
            if measured:
                counts[1:] += [size[known].sum() for size in self.tokenizer.lengths(piece, ids)]
            self._put(ids)
            first = False
        counted = dict(zip(("known", "characters", "bytes"), counts.tolist(), strict=True))
        return {"tokens": self.written - start, "lines": self.num_lines - lines_before, **counted}


def _whole_lines(pieces: Iterable[str]) -> Iterator[str]:
    """Yield pieces that end where lines end; TextError for a line that is too long to be a sequence."""
    rest, number = "", 1
    for piece in closed(pieces):
        rest += piece
        end = rest.rfind("\n") + 1
        lines = rest[:end].split("\n")
        for place, line in enumerate([*lines[:-1], rest[end:]]):
            if len(line) > LONGEST_LINE:
                raise TextError(
                    f"Line {number + place} of this part of the text has more than {LONGEST_LINE:,} characters.",
                    "Such a text cannot be trained on by --lines: leave it out, or break the line.",
                )
        if end:
            yield rest[:end]
            number += len(lines) - 1
        rest = rest[end:]


def _both(encoder: _Encoder, source: Source, cut: int) -> dict[str, dict[str, int]]:
    train = encoder.run(head(source.pieces(), cut), measured=False)
    return {"train": train, "heldout": encoder.run(tail(source.pieces(), cut), measured=True)}


def _parts(ids: NDArray[Any], breaks: Places | None, counts: dict[str, dict[str, int]]) -> tuple[Part, Part]:
    """Return both parts as views of what was encoded."""
    found, place, line = [], 0, 0
    for count in (counts["train"], counts["heldout"]):
        tokens, lines = count["tokens"], count["lines"]
        sizes = (count["known"], count["characters"], count["bytes"])
        if breaks is None:
            found.append(Part(ids[place : place + tokens], *sizes))
        else:
            found.append(Part(ids, *sizes, breaks[line : line + lines + 1]))
        place, line = place + tokens, line + lines
    return found[0], found[1]


def _from_memory(source: Source, tokenizer: Tokenizer, cut: int, lines: bool) -> tuple[Part, Part]:
    ids: list[NDArray[Any]] = [np.empty(0, dtype=tokenizer.dtype)]
    breaks: list[Places] = []
    counts = _both(_Encoder(tokenizer, lines, ids.append, breaks.append), source, cut)
    return _parts(np.concatenate(ids), np.concatenate(breaks) if lines else None, counts)


_IDS, _BREAKS, _INDEX = "ids", "breaks", "index"


def _write_files(folder: Path, source: Source, tokenizer: Tokenizer, cut: int, lines: bool) -> None:
    with durable.new_directory(folder) as made:
        hashes = {name: hashlib.sha256() for name in (_IDS, _BREAKS)}
        with (made / _IDS).open("wb") as ids_file, (made / _BREAKS).open("wb") as breaks_file:

            def put_ids(ids: NDArray[Any]) -> None:
                hashes[_IDS].update(ids.data)
                ids_file.write(ids.data)

            def put_breaks(places: Places) -> None:
                hashes[_BREAKS].update(places.data)
                breaks_file.write(places.data)

            counts = _both(_Encoder(tokenizer, lines, put_ids, put_breaks), source, cut)
        index = {
            "format_version": _FORMAT,
            "dtype": tokenizer.dtype.name,
            "lines": lines,
            **counts,
            "sha256": {name: digest.hexdigest() for name, digest in hashes.items()},
        }
        content = json.dumps(index).encode()
        (made / _INDEX).write_bytes(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def _from_files(folder: Path) -> tuple[Part, Part] | None:
    """Return both parts, or None where the files are missing or not what was written."""
    try:
        digest, _, content = (folder / _INDEX).read_bytes().partition(b"\n")
        if hashlib.sha256(content).hexdigest().encode() != digest:
            return None
        index = json.loads(content)
        with suppress(OSError):  # used now; a cache that can only be read serves as well
            os.utime(folder)
        for name, sha256 in index["sha256"].items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return None
        ids = _mapped(folder / _IDS, index["dtype"])
        return _parts(ids, _mapped(folder / _BREAKS, "uint64") if index["lines"] else None, index)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _mapped(path: Path, dtype: str) -> NDArray[Any]:
    if not path.stat().st_size:  # which cannot be mapped
        return np.empty(0, dtype=dtype)
    # A plain array over the mapped memory: each use of a `memmap` itself makes an object more.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def _delete_unused(folder: Path) -> None:
    """Delete what nobody has used for some time, and what a killed process left of its work."""
    with suppress(OSError):
        for entry in folder.iterdir():
            with suppress(OSError):
                days = (time.time() - entry.stat().st_mtime) / 86_400
                if days > (1 if entry.name.startswith(".") else DAYS_UNUSED):
                    shutil.rmtree(entry, ignore_errors=True)
