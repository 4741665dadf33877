"""Where a model is in a text, kept in a file and picked up later.

All that a recurrent model remembers of what it has read is its state: a few kilobytes, however long the text was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort import documents, durable
from longshort.errors import CheckpointError, UsageError
from longshort.model_files import decode_arrays, encode_arrays

_LIMIT = 1 << 30
TAIL = 8
"""Symbols at the end of a text that tell how it goes on: of a character's bytes, or whether a word needs a space."""


@dataclass(frozen=True, eq=False)
class Continuation:
    """A text so far, as its model knows it."""

    state: tuple[NDArray[np.float32], ...]
    """After the last symbol: each tensor (L, 1, H)."""
    logits_V: NDArray[np.float32]
    """Of the symbol that comes next."""
    tail: NDArray[np.int64]
    """The last symbols, at most `TAIL`."""
    position: int = 0
    """How many symbols were sampled: where the random numbers go on."""

    def save(self, path: str | Path, model: Any) -> None:
        """Write it as the file `path`, whole or not at all.

        Args:
            path: where.
            model: the decoder or `LanguageModel` that it is of.

        Raises:
            OutputError: it cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {f"state.{i}": tensor for i, tensor in enumerate(self.state)}
        arrays |= {"logits": self.logits_V, "tail": self.tail.astype(np.int64), "model": _digest_of_model(model)}
        arrays["position"] = np.array([self.position], np.int64)
        durable.write_file(Path(path), encode_arrays({**arrays, "sha256": _digest(arrays)}))

    @classmethod
    def load(cls, path: str | Path, model: Any) -> Continuation:
        """Return what `save` wrote.

        Raises:
            CheckpointError: the file is damaged, or cannot be read.
            UsageError: it is of another model.
        """
        try:
            return cls._load(Path(path), model)
        except CheckpointError as error:
            raise CheckpointError(error.what, "Name a file that was left by a text, or a new one.") from error

    @classmethod
    def _load(cls, path: Path, model: Any) -> Continuation:
        kinds = (np.float32, np.int64, np.uint8)
        arrays = decode_arrays(documents.read(path, _LIMIT), path, kinds)
        sealed = arrays.pop("sha256", None)
        if sealed is None or not np.array_equal(sealed, _digest(arrays)):
            documents.refuse(path, "its content does not have the checksum that it names")
        if not np.array_equal(arrays.get("model", 0), _digest_of_model(model)):
            raise UsageError(f"{path} was left by another model, or by this one before it was trained further.")
        count = sum(name.startswith("state.") for name in arrays)
        try:
            state = tuple(arrays[f"state.{i}"] for i in range(count))
            return cls(state, arrays["logits"], arrays["tail"], int(arrays["position"][0]))
        except (KeyError, IndexError) as error:  # sealed, but not by us
            documents.refuse(path, f"it has no {error}", error)


def _digest(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return np.frombuffer(digest.digest(), np.uint8)


def _digest_of_model(model: Any) -> NDArray[np.uint8]:
    """Return what tells this model, with these weights and this vocabulary, from every other."""
    symbols = np.frombuffer(model.tokenizer.sha256.encode(), np.uint8)
    return _digest({**model.weights(), " tokenizer": symbols, " cell": np.frombuffer(model.config.cell.encode(), "u1")})
