"""The built-in text: about 2 MB of English that ships inside every Python, so that nothing is downloaded.

It is made of the language reference behind `help("topics")` and of the docstrings of the standard library,
which are read with `ast`: no module is imported. It is the same in every run on one Python installation,
but differs from one Python version to the next, so a figure measured on it belongs with its SHA-256.

Many paragraphs occur several times. Each is kept once, before anything is split into training and held-out
parts, for otherwise the held-out part would hold text from training.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from longshort.errors import CorpusError
from longshort.text import grammar
from longshort.text.corpus import Text, cache_directory

ALGORITHM = 1  # to be raised with every change that alters the text: caches of older versions are left alone
MINIMUM = 100_000  # characters; a Python that was stripped of docstrings has less
FALLBACK = 2_000_000  # characters of the generated text that takes the place of one too small

# Tests, programs rather than libraries, tables of characters, and what is not of the standard library.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "__pycache__"}
_SKIPPED |= {"site-packages", "dist-packages"}
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Typographic signs of the language reference. Of the rest so little is not ASCII that it is left out.
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "..."})

Documents = Mapping[str, str]  # name -> text


@cache
def builtin() -> Text:
    """The built-in text, named `builtin`.

    Parsing takes some seconds, so the text is kept in the cache directory; one that cannot be written is no
    error. A Python without docstrings and language reference gets a generated text (see `grammar.py`),
    which is then named `builtin-grammar`.
    """
    library = Path(sysconfig.get_path("stdlib"))
    key = _hash(f"{ALGORITHM}\n{sys.version}\n{library}").hex()
    try:
        path = cache_directory() / f"builtin-{key[:16]}.txt"
    except CorpusError:  # no home directory: do without
        path = None
    content = _cached(path) if path else None
    if content is None:
        content = compose(_topics(), _docstrings(library))
        if len(content) < MINIMUM:
            return Text.of(grammar.generate(FALLBACK, seed=0), "builtin-grammar")
        if path:
            _keep(path, content)
    return Text.of(content, "builtin")


def kept(sha256: str) -> Text | None:
    """The built-in text of this hash from the cache directory, where another Python may have left it, or None."""
    with contextlib.suppress(OSError, CorpusError):
        for path in cache_directory().glob("builtin-*.txt"):
            content = _cached(path)
            if content is not None and (text := Text.of(content, "builtin")).sha256 == sha256:
                return text
    return None


def compose(*kinds: Documents) -> str:
    """All documents as one text: every paragraph once, printable ASCII only, the kinds evenly mixed.

    The held-out part is the last tenth and must be the same kind of text as the rest. So each kind of
    document is put in an order of no meaning, by the hash of the names, and then the kinds are interleaved
    so that each has its share of every part of the text. Documents stay whole.
    """
    seen: set[str] = set()
    placed: list[tuple[float, str, str]] = []
    for kind in kinds:
        documents = {name: _clean(kind[name], seen) for name in sorted(kind, key=_hash)}
        total = sum(map(len, documents.values()))
        before = 0
        for name, text in documents.items():
            if text:  # where the document would have its middle, if its kind filled the whole text
                placed.append(((before + len(text) / 2) / total, name, text))
            before += len(text)
    return "\n\n".join(text for _, _, text in sorted(placed)) + "\n" if placed else ""


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


def _clean(text: str, seen: set[str]) -> str:
    """The paragraphs of a document that are printable and not yet in `seen`, to which they are added."""
    kept = []
    lines = [line.rstrip() for line in inspect.cleandoc(text).translate(_PLAIN).split("\n")]
    for paragraph in re.split("\n\n+", "\n".join(lines).strip("\n")):
        words = " ".join(paragraph.split())
        printable = paragraph.isascii() and paragraph.replace("\n", "").isprintable()
        if words and printable and words not in seen:
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _topics() -> Documents:
    """The language reference, which Python carries as one dictionary."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out of some small distributions
        return {}
    return topics


def _docstrings(library: Path) -> Documents:
    """The docstrings of each Python file below `library`, in their order in the file."""
    documents = {}
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        for path in [Path(folder) / name for name in names if name.endswith(".py")]:
            try:
                with warnings.catch_warnings():  # of invalid escapes and the like
                    warnings.simplefilter("ignore")
                    tree = ast.parse(path.read_bytes())
            except (OSError, SyntaxError, ValueError, RecursionError):
                continue
            nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
            nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line number
            docstrings = [ast.get_docstring(node) or "" for node in nodes]
            documents[path.relative_to(library).as_posix()] = "\n\n".join(docstrings)
    return documents


def _cached(path: Path) -> str | None:
    """The text in a cache file, whose first line is the SHA-256 of the rest; None if it is not whole."""
    try:
        sha256, _, data = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return data.decode("ascii") if hashlib.sha256(data).hexdigest().encode() == sha256 else None


def _keep(path: Path, content: str) -> None:
    """Write a cache file, under another name first: a process killed half-way leaves no half file there."""
    data = content.encode("ascii")
    with contextlib.suppress(OSError):  # no room, or not ours to write: the next run parses again
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
            Path(name).replace(path)
        finally:
            Path(name).unlink(missing_ok=True)  # there only where something went wrong
