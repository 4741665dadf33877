"""JSON files of a run or a model: read within limits, as anyone may have made them, and refused where damaged.

A manifest vouches for the files of a checkpoint. A file that stands alone can be sealed instead: its last entry is the
SHA-256 of what the file would be without it.
"""

from __future__ import annotations

import hashlib
import json
import math
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from longshort.errors import CheckpointError

FORMAT_VERSION = 1
JSON_LIMIT = 1 << 20
"""The most bytes of JSON that are read."""
HINT = "Give another checkpoint, or the directory that `longshort train --out` wrote."
_SEAL = "sha256"


def sha256(data: bytes) -> str:
    """Return the hash of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def refuse(source: Path, reason: str, cause: BaseException | None = None) -> NoReturn:
    """Raise the CheckpointError which says that `source` is damaged, and how."""
    raise CheckpointError(f"{source} is damaged: {reason}.", HINT) from cause


def read(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: it is none, or cannot be read.
    """
    try:
        status = path.stat()  # before opening: a FIFO would wait for a writer, a huge file fill the memory
        if not stat.S_ISREG(status.st_mode):
            refuse(path, "it is not a regular file")
        if status.st_size > limit:
            refuse(path, f"it has {status.st_size} bytes, more than {limit}")
        with path.open("rb") as file:
            return file.read(status.st_size)
    except (OSError, MemoryError) as error:
        reason = (getattr(error, "strerror", None) or "it does not fit in memory").lower()
        raise CheckpointError(f"Cannot read {path}: {reason}.", HINT) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`; CheckpointError where there is none of the format read here."""
    return parse(read(path, JSON_LIMIT), path)


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file `path`, without its seal; CheckpointError where that is broken."""
    data = read(path, JSON_LIMIT)
    content = parse(data, path)
    content.pop(_SEAL, None)
    if data != seal(content):
        refuse(path, "it has changed since longshort wrote it, or something else wrote it")
    return content


def parse(data: bytes, source: Path) -> dict[str, Any]:
    """Return the JSON object in `data`, which anyone may have made, if it is of the format read here.

    Raises:
        CheckpointError: it is not, naming `source`.
    """
    try:
        content = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        refuse(source, "it is nested too deeply", error)
    except ValueError as error:
        refuse(source, f"{error!s:.200}", error)
    if not isinstance(content, dict):
        refuse(source, "it is not a JSON object")
    version = content.get("format_version")
    if type(version) is not int or version < 1:
        refuse(source, "it has no format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(f"{source} was made by a newer longshort.", "Upgrade with: pip install -U longshort")
    return content


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """Return a JSON file of `content`, `format_version` first; ValueError where it could not be read back."""
    versioned = {"format_version": FORMAT_VERSION, **content} | {"format_version": FORMAT_VERSION}
    data = (json.dumps(versioned, indent=2, allow_nan=False) + "\n").encode()
    if len(data) > JSON_LIMIT:
        raise ValueError(f"{len(data)} bytes of JSON, more than the {JSON_LIMIT} that are read back")
    return data


def seal(content: Mapping[str, Any]) -> bytes:
    """Return a JSON file of `content` that `read_sealed` takes; ValueError as `json_bytes`."""
    return json_bytes({**content, _SEAL: sha256(json_bytes(content))})


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return content


def _finite(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"{literal:.40} is not a finite number")
    return value
