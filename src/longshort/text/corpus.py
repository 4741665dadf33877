"""Where a text comes from: the user's own files, the built-in text, or a named corpus.

    load(paths)                    any UTF-8 files, and folders of `*.txt` files; gzip is unpacked
    load(corpus="builtin")         English that ships inside Python; needs no network (see `builtin.py`)
    load(corpus="timemachine")     downloaded once, checked by SHA-256, kept in the cache directory
    load(corpus=..., data_dir=D)   the same file from a folder of the user's; never touches the network
    find(...)                      the same without reading files whole: a text that is read in pieces

Environment: `LONGSHORT_CACHE` names another cache directory, and `LONGSHORT_CORPUS_URL` another place to
download from (a mirror or a test server), to which `/timemachine.txt` or `/tinyshakespeare.txt` is added.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import logging
import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from longshort import durable
from longshort.errors import CorpusError, LongshortError, MissingExtraError, TextError, UsageError

_GITHUB = "https://raw.githubusercontent.com"
# Name of each downloaded corpus: its address at a fixed commit, and the SHA-256 of the file.
SOURCES = {
    "timemachine": (
        f"{_GITHUB}/d2l-ai/berkeley-stat-157/cfc1b921fe5825015c50a663e01a57c9a4a04a5b/slides/4_4/data/timemachine.txt",
        "8424dbd9532ac81f7e5f0b6add90e6952baea29158309d7d1bf3884f4e12c516",
    ),
    "tinyshakespeare": (
        f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
}
CORPORA = ("builtin", *SOURCES)
TIMEOUT = 20.0  # seconds to wait for a connection, and for each next piece of the file
PIECE = 1 << 20  # bytes of a file that are read at a time
STDIN = ("-", "/dev/stdin")
_GZIP = b"\x1f\x8b"
_TEXTS = "Give a text file, or a folder with *.txt files."
_ENDINGS = (".txt", ".txt.gz")  # of the files that a folder stands for

# English text in an encoding of wide characters: which of four neighbouring bytes are mostly zero.
_WIDE_PATTERNS = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}


@dataclass(frozen=True, slots=True)
class Text:
    """A text and where it came from.

    Args:
        content: the whole text.
        name: `builtin`, `timemachine`, or the names of the files joined by `+`.
        sha256: of the content as UTF-8, in hexadecimal.
    """

    content: str
    name: str
    sha256: str

    @classmethod
    def of(cls, content: str, name: str) -> Text:
        """The text `content` with its hash."""
        return cls(content, name, hashlib.sha256(content.encode("utf-8")).hexdigest())

    @property
    def characters(self) -> int:
        """Length in characters (Unicode code points)."""
        return len(self.content)

    def pieces(self) -> Iterator[str]:
        """Yield the content in pieces."""
        for start in range(0, len(self.content), PIECE):
            yield self.content[start : start + PIECE]


class Source(Protocol):
    """A text that can be read from its start as often as wanted, without ever being held whole."""

    @property
    def name(self) -> str:
        """Of a corpus, or of the files."""

    def pieces(self) -> Iterator[str]:
        """Yield the text in pieces, as they come."""


@dataclass(frozen=True, slots=True)
class Files:
    """UTF-8 files as one text, in the given order, every character as it stands in them.

    Args:
        files: regular files, some packed with gzip, each once.
        name: their names.
    """

    files: tuple[Path, ...]
    name: str

    def pieces(self) -> Iterator[str]:
        """Yield the text; TextError where a file cannot be read as text."""
        for file in self.files:
            with open_file(file) as stream:
                yield from _decode(_blocks(stream, file), file)


def load(paths: Sequence[str | Path] = (), corpus: str | None = None, data_dir: Path | None = None) -> Text:
    """The text that the user asked for: files, or else a named corpus.

    Args:
        paths: files and folders, read by `read_files`.
        corpus: one of `CORPORA`.
        data_dir: a folder that holds the file of a downloaded corpus; without use for anything else.

    Raises:
        UsageError: both or neither of files and corpus, or a name that is not a corpus.
        TextError: a file that cannot be read as text.
        CorpusError: a corpus that cannot be had.
        MissingExtraError: a download is needed and pooch is not installed.
    """
    found = find(paths, corpus, data_dir)
    if isinstance(found, Text):
        return found
    content = "".join(found.pieces())
    if not content:
        raise empty(found)
    return Text.of(content, found.name)


def find(paths: Sequence[str | Path] = (), corpus: str | None = None, data_dir: Path | None = None) -> Text | Files:
    """The text that `load` would give: a corpus, or files of which only the kind has been looked at.

    Raises:
        As `load`; what is wrong inside of files is noticed when they are read.
    """
    if data_dir is not None and corpus not in SOURCES:
        raise UsageError("A data directory holds named corpora.", f"It goes with --corpus {' or '.join(SOURCES)}.")
    if corpus is None:
        return _find_files(paths)
    if paths:
        raise UsageError("Both text files and a corpus were given.", "Give the files or --corpus, not both.")
    _check_name(corpus, CORPORA)
    if corpus in SOURCES:
        return download(corpus, data_dir)
    from longshort.text.builtin import builtin  # here, because `builtin.py` imports this module

    return builtin()


def read_files(paths: Sequence[str | Path]) -> Text:
    """UTF-8 files as one text, in the given order, every character as it stands in them.

    A folder stands for all `*.txt` and `*.txt.gz` files in it and below it, sorted by path. What begins as gzip
    does is unpacked, whatever its name. Line ends are kept; only a byte order mark at the start of a file is dropped.

    Raises:
        UsageError: no path, or one that does not exist.
        TextError: a path that is no UTF-8 text file, or nothing in all of them together.
    """
    return load(paths)


def keep_standard_input(paths: Sequence[str]) -> tuple[str, ...]:
    """Return `paths` with `-` replaced by a new file in the cache directory that holds what standard input gave.

    A text is read several times, and again when a run is resumed or evaluated, which a pipe does not allow. The
    file belongs to the run that is made of it; where none is, `standard_input_kept` deletes it.

    Raises:
        UsageError: `-` is given twice.
        TextError: standard input is closed, or no UTF-8 text.
        OutputError, CorpusError: it cannot be kept.
    """
    if sum(path in STDIN for path in paths) > 1:
        raise UsageError("Standard input is given twice.", "Give each text once.")
    return tuple(_kept(_standard_input()) if path in STDIN else path for path in paths)


@contextmanager
def standard_input_kept(paths: Sequence[str], needed: Callable[[], bool] = lambda: False) -> Iterator[tuple[str, ...]]:
    """Yield what `keep_standard_input` gives, and delete the file that it made when the block ends.

    Args:
        paths: as there, like what is raised.
        needed: asked at the end whether the file is to stay.
    """
    kept = keep_standard_input(paths)
    try:
        yield kept
    finally:
        if not needed():
            for path, given in zip(kept, paths, strict=True):
                if path != given:
                    shutil.rmtree(Path(path).parent, ignore_errors=True)


def _standard_input() -> BinaryIO:
    if sys.stdin is None:  # as Python has it where the descriptor is closed
        raise TextError("Standard input is closed.", "Pipe some text into it, or give a file.")
    return sys.stdin.buffer


def _kept(stream: BinaryIO) -> str:
    folder = cache_directory() / "stdin" / os.urandom(8).hex()

    def copied(file: BinaryIO) -> Iterator[bytes]:
        for block in _blocks(stream, Path("standard input")):
            file.write(block)
            yield block

    with durable.new_directory(folder) as made, (made / "stdin").open("wb") as file:
        # Decoded on the way, so that what is no text, such as a device that never ends, is refused at once.
        if not sum(len(piece) for piece in _decode(copied(file), Path("standard input"))):
            raise TextError("The text is empty: standard input.", "Pipe some text into it.")
    return str(folder / "stdin")


def lines(path: str) -> Iterator[str]:
    """Yield the lines of a file, or of standard input for `-`, as they come; only a newline ends a line.

    Raises:
        UsageError, TextError: as `read_files`.
    """
    yield from _lines(pieces(path))


def pieces(path: str) -> Iterator[str]:
    """Yield the text of a file, or of standard input for `-`, in pieces as they come; errors as of `lines`."""
    if path in STDIN:
        # A pipe gives what it has: a live log is answered when its lines come.
        descriptor = _standard_input().fileno()
        yield from _decode(iter(lambda: os.read(descriptor, PIECE), b""), Path("standard input"))
        return
    file = Path(path)
    if _kind(file) == stat.S_IFDIR:
        raise TextError(f"{_quoted(file)} is a folder.", "Give one file, or pipe several: cat FOLDER/*.txt | ... -")
    with open_file(file) as stream:
        yield from _decode(_blocks(stream, file), file)


def _lines(pieces: Iterable[str]) -> Iterator[str]:
    rest: list[str] = []
    for piece in pieces:
        *whole, last = piece.split("\n")
        if whole:
            yield "".join([*rest, whole[0]])
            yield from whole[1:]
            rest = []
        rest.append(last)
    if end := "".join(rest):
        yield end


def empty(source: Source) -> TextError:
    """The error to raise for a text that has no character."""
    name = _quoted(source.files[0]) if isinstance(source, Files) else source.name
    more = f" and {len(source.files) - 1} more" if isinstance(source, Files) and len(source.files) > 1 else ""
    return TextError(f"The text is empty: {name}{more}.", "Give a file with text in it.")


def _find_files(paths: Sequence[str | Path]) -> Files:
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise UsageError("No text was given.", f"Give text files or folders, or --corpus {'|'.join(CORPORA)}.")
    if "" in given:
        raise UsageError("One of the paths is empty.", "An unset shell variable looks like this.")
    files = [file for path in given for file in _files(Path(path))]
    _refuse_repeated(files)
    names = [Path(path).name or Path(path).resolve().name or "text" for path in given]
    name = "+".join(names) if len(names) <= 3 else f"{names[0]}+{len(names) - 1}-more"
    return Files(tuple(files), name if name.isprintable() else repr(name))


def _refuse_repeated(files: Sequence[Path]) -> None:
    """A file that is read twice would stand in the held-out tail and in the training part at once."""
    seen: set[Path] = set()
    for file in files:
        real = Path(os.path.realpath(file))
        if real in seen:
            raise UsageError(f"The file {_quoted(file)} is given twice.", "Give each text once.")
        seen.add(real)


def download(
    name: str, data_dir: Path | None = None, cache_dir: Path | None = None, base_url: str | None = None
) -> Text:
    """The named corpus from `data_dir`, from the cache, or from the network, checked by its SHA-256.

    Args:
        name: a key of `SOURCES`.
        data_dir: a folder that holds `<name>.txt`; nothing else is looked at then.
        cache_dir: where to keep the file; by default `cache_directory()`.
        base_url: where to download from, instead of `LONGSHORT_CORPUS_URL` and the corpus's own address.

    Raises:
        UsageError: no such corpus.
        CorpusError: no network, a transfer that fails, or a file that is not the right one.
        MissingExtraError: a download is needed and pooch is not installed.
    """
    _check_name(name, SOURCES)
    url, sha256 = SOURCES[name]
    if data_dir is not None:
        path = Path(data_dir) / f"{name}.txt"
        data = _read_exactly(path, sha256)
        if data is None:
            raise CorpusError(f"There is no {_quoted(path)} with SHA-256 {sha256}.", f"Download it from {url}")
        return Text.of("".join(_decode([data], path)), name)
    path = (cache_dir or cache_directory()) / f"{name}.txt"
    base_url = base_url or os.environ.get("LONGSHORT_CORPUS_URL")
    if base_url:
        url = f"{base_url.rstrip('/')}/{name}.txt"
    data = _read_exactly(path, sha256) or _fetch(name, url, sha256, path)
    return Text.of("".join(_decode([data], path)), name)


def cache_directory() -> Path:
    """`LONGSHORT_CACHE`, or the user's own cache: the same place as `pooch.os_cache("longshort")` on Linux.

    Worked out here, because the built-in text is kept there too and needs no pooch.

    Raises:
        CorpusError: a process without a home directory.
    """
    override = os.environ.get("LONGSHORT_CACHE")
    if override:
        return Path(override)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longshort"
    except RuntimeError as error:
        raise CorpusError("There is no home directory to keep a cache in.", "Set LONGSHORT_CACHE.") from error


def _check_name(name: str, names: Iterable[str]) -> None:
    names = list(names)
    if name not in names:
        close = difflib.get_close_matches(name.lower(), names, n=1)
        question = f"Did you mean {close[0]}? " if close else ""
        raise UsageError(f"There is no corpus named {name!r}.", f"{question}The corpora are {', '.join(names)}.")


def _quoted(path: str | Path) -> str:
    # `repr` also spells out control characters, which must not reach a terminal from a file's name.
    return repr(str(path))


def _refusal(path: Path, error: Exception, hint: str = _TEXTS) -> LongshortError:
    """The error to raise for a path that the system refused."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        reason = error.strerror if isinstance(error, OSError) else error
        return TextError(f"Cannot read {_quoted(path)}: {reason}.", "Check the path and its permissions.")
    if str(path) in CORPORA:
        hint = f"For the corpus of that name: --corpus {path}"
    elif path.is_symlink():
        hint = "It is a symbolic link to something that is not there."
    elif os.access(path.parent, os.R_OK) and path.parent.is_dir():
        close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
        hint = f"Did you mean {_quoted(path.parent / close[0])}?" if close else hint
    return UsageError(f"There is no file or folder {_quoted(path)}.", hint)


def _kind(path: Path, hint: str = _TEXTS) -> int:
    """What `path` is, as one of `stat.S_IFREG`, `stat.S_IFDIR` and so on."""
    try:
        return stat.S_IFMT(path.stat().st_mode)
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise _refusal(path, error, hint) from error


def _files(path: Path) -> list[Path]:
    """The file `path`, or all `*.txt` and `*.txt.gz` files of the folder `path`."""
    if _kind(path) != stat.S_IFDIR:
        return [path]

    def refuse(error: OSError) -> None:
        raise _refusal(Path(error.filename), error) from error

    # `os.walk` follows no symbolic links to folders, and unlike `rglob` passes over no folder silently.
    walk = os.walk(path, onerror=refuse)
    files = sorted(Path(folder) / name for folder, _, names in walk for name in names if name.endswith(_ENDINGS))
    if not files:
        raise TextError(f"There are no *.txt files in the folder {_quoted(path)}.", "Give the files by name.")
    return files


def open_file(path: Path, hint: str = _TEXTS) -> BinaryIO:
    """Open a regular file, unpacked if it is gzip.

    Args:
        path: of the file.
        hint: what to give where there is none.

    Raises:
        UsageError: there is none.
        TextError: it is no regular file, or cannot be read.
    """
    # Opening a pipe would wait for ever and a device may never end, so the kind is looked at first.
    if _kind(path, hint) != stat.S_IFREG:
        raise TextError(
            f"{_quoted(path)} is no regular file but a pipe, a socket or a device.",
            "Save the text to a file first, or pipe it in and give - as its name.",
        )
    try:
        file = path.open("rb")
        packed = file.peek(2).startswith(_GZIP)
    except OSError as error:
        raise _refusal(path, error) from error
    return cast(BinaryIO, _Unpacked(file)) if packed else file


class _Unpacked(gzip.GzipFile):
    """A gzip file that closes the file below it too."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(fileobj=file, mode="rb")
        self._below = file

    def close(self) -> None:
        super().close()
        self._below.close()


def _blocks(stream: BinaryIO, path: Path) -> Iterator[bytes]:
    try:
        while block := stream.read(PIECE):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TextError(f"{_quoted(path)} is a damaged gzip file: {error}.", "Pack it anew, or unpack it.") from error
    except OSError as error:
        raise _refusal(path, error) from error


def _read(path: Path) -> bytes:
    with open_file(path) as stream:
        return b"".join(_blocks(stream, path))


def _wide_encoding(data: bytes) -> str | None:
    """The name of the UTF-16 or UTF-32 encoding that `data` seems to be in."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    columns = [data[i:4096:4] for i in range(4)]
    a, b, c, d = (2 * column.count(0) > len(column) for column in columns)
    return _WIDE_PATTERNS.get((a, b, c, d))


def _decode(blocks: Iterable[bytes], path: Path) -> Iterator[str]:
    """Yield the text of a file that comes in blocks, the first of at least four bytes if it has so many."""
    convert = "Convert it first: iconv -f {} -t UTF-8 OLD.txt > NEW.txt"
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = lines = 0  # bytes and newlines in the blocks before
    for block in chain(blocks, [b""]):
        if not read and (wide := _wide_encoding(block)):
            raise TextError(f"{_quoted(path)} looks like {wide} text; UTF-8 is wanted.", convert.format(wide))
        if b"\0" in block:
            raise TextError(f"{_quoted(path)} looks like a binary file.", "Give a plain text file in UTF-8.")
        try:
            piece = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            start, data = error.start, error.object  # of a character that was cut, and the block
            line = lines + data.count(b"\n", 0, start) + 1
            offset = read + len(block) - len(data) + start
            raise TextError(
                f"{_quoted(path)} is not UTF-8: byte 0x{data[start]:02x} at offset {offset}, line {line}.",
                convert.format("WINDOWS-1252") + " (or whatever its encoding is)",
            ) from error
        yield piece if read else piece.removeprefix("\ufeff")
        read += len(block)
        lines += block.count(b"\n")


def _read_exactly(path: Path, sha256: str) -> bytes | None:
    """The bytes of `path`, or None where it cannot be read or is another file than wanted."""
    try:
        data = _read(path)
    except LongshortError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _fetch(name: str, url: str, sha256: str, path: Path) -> bytes:
    """Download `url`; pooch moves the file to `path` only when it is whole and has the right hash."""
    try:
        import pooch
        import requests
    except ImportError as error:
        raise MissingExtraError("pooch", "train", f"Downloading the corpus {name}") from error

    def transfer(url: str, output: str | Path, _: object) -> None:
        # Not `pooch.HTTPDownloader`: after an error it leaves the connection open.
        with requests.get(url, stream=True, timeout=TIMEOUT) as response, Path(output).open("wb") as file:
            response.raise_for_status()
            for piece in response.iter_content(2**16):
                file.write(piece)

    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        pooch.retrieve(url, f"sha256:{sha256}", fname=path.name, path=path.parent, downloader=transfer)
        return path.read_bytes()
    except (requests.RequestException, ValueError) as error:
        if not isinstance(error, requests.RequestException):
            reason = "the file that came has another SHA-256 than expected"
        elif error.response is not None:
            reason = f"the server answered {error.response.status_code}"
        elif isinstance(error, requests.exceptions.ChunkedEncodingError):
            reason = "the transfer was cut off"
        else:
            reason = "no answer"
        raise CorpusError(
            f"Cannot download the corpus {name}: {reason}.\nThe address was {url!r}.",
            f"Without a network, put {path.name} into a folder and name the folder with --data-dir.",
        ) from error
    except OSError as error:
        raise CorpusError(
            f"Cannot keep the corpus {name} at {_quoted(path)}: {error.strerror or type(error).__name__}.",
            "Name another cache directory in LONGSHORT_CACHE, or give the file's folder with --data-dir.",
        ) from error
    finally:
        logger.setLevel(level)
