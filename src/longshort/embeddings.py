"""The vectors that a model has for its symbols: taken out, compared, and filled from a file.

V  symbols   E  width of the embedding
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.errors import UsageError, VocabularyError
from longshort.text import vectors
from longshort.text.tokenizers import Tokenizer
from longshort.text.vectors import Vectors


def symbols_of(tokenizer: Tokenizer) -> list[str]:
    """Return what each id stands for, as text; bytes that are no character alone become U+FFFD."""
    words: Sequence[str] | None = getattr(tokenizer, "words", None)
    return list(words) if words is not None else [tokenizer.decode([i]) for i in range(tokenizer.size)]


def vectors_of(model: Any) -> Vectors:
    """Return the embedding of every symbol of `model`, a decoder or a `LanguageModel`.

    Raises:
        UsageError: its symbols are fed one-hot.
    """
    weights = model.weights()
    if "embedding.weight" not in weights:
        raise UsageError("The model has no vectors: its symbols are fed one-hot.", "Train one with --embedding.")
    return Vectors(symbols_of(model.tokenizer), weights["embedding.weight"])


def write_vectors(model: Any, path: str | Path) -> int:
    """Write the model's vectors in word2vec's text format, which gensim and most others read.

    Args:
        model: a decoder or a `LanguageModel`.
        path: of the file.

    Returns:
        How many were written: symbols that are or hold white space have no place in the format.

    Raises:
        UsageError: its symbols are fed one-hot.
        OutputError: the file cannot be written.
    """
    found = vectors_of(model)
    first = {word: i for i, word in reversed(list(enumerate(found.words)))}
    kept = [i for i, word in enumerate(found.words) if word.split() == [word] and first[word] == i]
    vectors.write(path, Vectors([found.words[i] for i in kept], found.matrix_NE[kept]))
    return len(kept)


def neighbours(model: Any, word: str, k: int = 10) -> list[tuple[str, float]]:
    """Return the `k` symbols whose vectors are most like that of `word`, each with the cosine of the angle between.

    Args:
        model: a decoder or a `LanguageModel`, or `Vectors`.
        word: one of its symbols, itself left out of the answer.
        k: at most so many.

    Raises:
        VocabularyError: the model has no such symbol.
        UsageError: its symbols are fed one-hot.
    """
    found = model if isinstance(model, Vectors) else vectors_of(model)
    if word not in found.words:
        close = difflib.get_close_matches(word, found.words, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}?" if close else "It may be rarer than --min-freq allows."
        raise VocabularyError(f"The model has no vector for {word!r}.", hint)
    matrix_NE = found.matrix_NE.astype(np.float64)
    matrix_NE /= np.maximum(np.linalg.norm(matrix_NE, axis=1, keepdims=True), 1e-30)
    own = found.words.index(word)
    cosines_N = matrix_NE @ matrix_NE[own]
    order = [i for i in np.argsort(-cosines_N, kind="stable").tolist() if i != own][: max(k, 0)]
    return [(found.words[i], float(cosines_N[i])) for i in order]


def fill(embedding_VE: NDArray[np.float32], tokenizer: Tokenizer, path: str | Path) -> int:
    """Put the vectors of a file in the place of those that an embedding was made with; return how many were found.

    Rows of symbols that the file lacks keep their direction and get the mean length of those found, so that they do not
    drown them.

    Args:
        embedding_VE: is changed.
        tokenizer: whose symbols the rows are.
        path: a file as `vectors.read` takes it.

    Raises:
        UsageError: its vectors have another width, or it has none of the symbols.
        TextError: it is no file of vectors.
    """
    number = {word: i for i, word in enumerate(symbols_of(tokenizer))}
    found = vectors.read(path, number)
    E, width = embedding_VE.shape[1], found.matrix_NE.shape[1]
    if width != E:
        raise UsageError(f"The vectors of {path} have {width} numbers, the embedding {E}.", f"Set --embedding {width}.")
    if not found.words:
        raise UsageError(
            f"{path} has a vector for none of the {tokenizer.size:,} symbols of the text.",
            "Vectors of words go with --tokenizer word; their spelling, upper and lower case, must be the text's.",
        )
    rows = np.array([number[word] for word in found.words])
    missing = np.setdiff1d(np.arange(len(embedding_VE)), rows)
    if len(missing):
        lengths = np.linalg.norm(embedding_VE[missing], axis=1)
        embedding_VE[missing] *= np.linalg.norm(found.matrix_NE, axis=1).mean() / max(float(lengths.mean()), 1e-30)
    embedding_VE[rows] = found.matrix_NE
    return len(rows)
