"""Labelled sequences: what a classifier or a tagger learns from, checked and put side by side.

T  steps   B  rows   I  width of a vector

A sequence is a text, a list of words, an array of ids or an array of vectors; it has one label, or one for each step.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.config import LabelModelConfig, LabelTrainConfig
from longshort.errors import ConfigError, TextError, UsageError
from longshort.text.batches import IGNORED
from longshort.text.tokenizers import Tokenizer, train_tokenizer
from longshort.text.words import WordTokenizer

NO_TOKENIZER = "null\n"
"""The `tokenizer.json` of a model that reads ids or vectors."""


class Examples:
    """Sequences and their labels.

    Args:
        sequences: all of one kind: texts (`str`); lists of words; arrays of ids (T,), from 0 on; or arrays of vectors
            (T, I). Any of them may be empty.
        labels: a text for each sequence; or for each a list of texts, one a step, which a tagger learns from.

    Raises:
        ConfigError: sequences of several kinds, or labels that do not go with them.
    """

    def __init__(self, sequences: Iterable[Any], labels: Iterable[Any]) -> None:
        given, named = list(sequences), list(labels)
        if not given or len(given) != len(named):
            raise ConfigError(f"There are {len(given)} sequences and {len(named)} labels; as many of both are wanted.")
        self.reads = _kind(given)
        """`text`, `words`, `ids` or `vectors`."""
        self.sequences = checked(given, self.reads)
        self.per_step = not isinstance(named[0], str)
        """Whether each step has a label."""
        pairs = zip(self.sequences, named, strict=True)
        self.labels: list[Any] = [self._label(number, *pair) for number, pair in enumerate(pairs)]

    def _label(self, number: int, sequence: Any, given: Any) -> Any:
        """Return the label of a sequence as it is kept: a text, or a list of one for each step."""
        label = list(given) if self.per_step and isinstance(given, Iterable) else given
        if isinstance(given, str) is self.per_step or not isinstance(label, str | list):
            raise ConfigError(
                f"Labels are texts, or for each sequence a list of texts; that of sequence {number} is {given!r:.80}.",
                "Give all sequences one kind. Numbers become texts by str.",
            )
        if not self.per_step:
            return label
        if self.reads == "text":
            raise ConfigError(
                "A text has no steps before it is cut, so it cannot have a label a step.",
                "Give lists of words, or arrays of ids.",
            )
        if len(label) != len(sequence) or not all(isinstance(each, str) for each in label):
            raise ConfigError(
                f"Sequence {number} has {len(sequence)} steps, so as many texts are wanted as labels.",
                f"It has {len(label)}: {label!r:.80}",
            )
        return label

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.sequences)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each label occurs."""
        return Counter(each for label in self.labels for each in (label if self.per_step else [label]))

    @property
    def names(self) -> tuple[str, ...]:
        """The different labels, sorted."""
        return tuple(sorted(self.counts))

    def balanced_weights(self) -> tuple[float, ...]:
        """Return for each of `names` a weight that lets all labels count the same in sum: n / (labels x n of it)."""
        total = self.counts.total()
        return tuple(total / (len(self.names) * self.counts[name]) for name in self.names)

    def split(self, share: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
        """Return two parts, the second with a `share` of the sequences, at least one; which is drawn by `seed`.

        Raises:
            ConfigError: a share that leaves one of the two empty.
        """
        second = max(1, round(share * len(self)))
        if not 0 < share < 1 or second == len(self):
            raise ConfigError(f"A share of {share} of {len(self)} sequences leaves one of the two parts empty.")
        order = np.random.default_rng(seed).permutation(len(self))
        return self._part(np.sort(order[second:])), self._part(np.sort(order[:second]))

    def _part(self, numbers: NDArray[Any]) -> Examples:
        return Examples([self.sequences[i] for i in numbers], [self.labels[i] for i in numbers])

    @cached_property
    def sha256(self) -> str:
        """Hash of all sequences and labels in their order."""
        found = hashlib.sha256(json.dumps([self.reads, self.labels]).encode())
        for sequence in self.sequences:
            if isinstance(sequence, np.ndarray):
                found.update(f"{sequence.dtype.str} {sequence.shape}\n".encode() + sequence.tobytes())
            else:
                found.update(json.dumps(sequence).encode() + b"\n")
        return found.hexdigest()

    def model(self, config: LabelTrainConfig) -> tuple[LabelModelConfig, Tokenizer | None]:
        """Return the model that `config` makes of these examples, and the tokenizer of what it reads, if it needs one.

        Raises:
            ConfigError, TextError: there is nothing to learn: one label alone, or no symbol.
        """
        if len(self.names) < 2:
            raise ConfigError(f"Two labels at least are wanted; the examples have {', '.join(self.names) or 'none'}.")
        if config.class_weights and len(config.class_weights) != len(self.names):
            raise ConfigError(
                f"class_weights are wanted for {len(self.names)} labels, in the order {', '.join(self.names)!s:.200}.",
                f"There are {len(config.class_weights)}. Examples.balanced_weights() gives some.",
            )
        if self.reads != "text" and config.tokenizer != "char":
            raise ConfigError(f"tokenizer {config.tokenizer} is for texts; these sequences are {self.reads}.")
        if config.min_freq is not None and self.reads != "words" and config.tokenizer != "word":
            raise ConfigError("min_freq is for words.", "Leave it out, or set tokenizer to word.")
        if self.reads == "vectors" and config.embedding != type(config)().embedding:
            raise ConfigError("embedding is the width that symbols get; these sequences are vectors.", "Leave it out.")
        tokenizer, vocab_size, inputs = self._tokenizer(config), 0, 0
        if tokenizer is not None:
            vocab_size = tokenizer.size
        elif self.reads == "vectors":
            inputs = self.sequences[0].shape[1]
        else:
            vocab_size = 1 + max((int(ids.max()) for ids in self.sequences if len(ids)), default=0)
        found = {"labels": self.names, "per_step": self.per_step, "reads": self.reads}
        return config.model(**found, vocab_size=vocab_size, inputs=inputs), tokenizer

    def _tokenizer(self, config: LabelTrainConfig) -> Tokenizer | None:
        if self.reads == "words":
            counts = Counter(word for words in self.sequences for word in words)
            try:
                return WordTokenizer.of_counts(counts, config.min_freq or 1)
            except ValueError as error:
                raise ConfigError(
                    "A word is empty or holds white space.", "Cut the texts at white space: text.split()"
                ) from error
        if self.reads == "text":
            # Where symbols are longer than a character, none may reach from one text into the next.
            apart = "" if config.tokenizer in ("char", "byte") else " "
            texts = [text + apart for text in self.sequences]
            return train_tokenizer(config.tokenizer, texts, min_freq=config.min_freq)
        return None


def _kind(sequences: list[Any]) -> str:
    """Return what a list of sequences holds; ConfigError where that is nothing that can be read."""
    if any(isinstance(sequence, str) for sequence in sequences):
        return "text"
    first: Any = None
    try:
        for first in sequences:
            if len(first):
                break
        else:
            first = sequences[0]
        if len(first) and isinstance(first[0], str):
            return "words"
        array = np.asarray(first)
        if array.ndim == 1 and (array.dtype.kind in "iu" or not len(array)):
            return "ids"
        if array.ndim == 2 and array.dtype.kind in "iuf":
            return "vectors"
        found = f"The first one that is not empty is of the shape {array.shape} and of the type {array.dtype}."
    except (TypeError, KeyError, ValueError):  # such as a number, a `dict`, lists of several lengths in one
        found = f"One of these is {first!r:.80}."
    raise ConfigError("Sequences are texts, lists of words, arrays of ids (T,) or arrays of vectors (T, I).", found)


def checked(sequences: Sequence[Any], reads: str) -> list[Any]:
    """Return sequences of the kind `reads` as that kind is kept: `str`, lists of `str`, int32 or float32 arrays.

    Raises:
        ConfigError: one of them is something else.
    """
    width = next(filter(None, map(_width, sequences)), 0) if reads == "vectors" else 0
    return [_checked(number, sequence, reads, width) for number, sequence in enumerate(sequences)]


def _width(sequence: Any) -> int:
    """Return the width of an array of vectors; 0 where it has no vector, or is none."""
    try:
        shape = np.shape(sequence)
    except ValueError:  # lists of several lengths
        return 0
    return shape[1] if len(shape) == 2 and shape[0] else 0


def _as_text(sequence: Any, width: int) -> Any:
    return sequence if isinstance(sequence, str) else None


def _as_words(sequence: Any, width: int) -> Any:
    words = [sequence[place] for place in range(len(sequence))]  # by place, which a `set` or a `dict` does not have
    return words if not isinstance(sequence, str) and all(isinstance(word, str) for word in words) else None


def _as_ids(sequence: Any, width: int) -> Any:
    array = np.asarray(sequence)
    if not len(array):
        return array.astype(np.int32) if array.ndim == 1 else None
    whole = array.ndim == 1 and array.dtype.kind in "iu"
    return array.astype(np.int32) if whole and array.min() >= 0 and array.max() < 2**31 else None


def _as_vectors(sequence: Any, width: int) -> Any:
    array = np.asarray(sequence)
    if len(array) and (array.ndim != 2 or array.shape[1] != width):
        return None
    vectors = array.astype(np.float32).reshape(len(array), width)
    return vectors if np.isfinite(vectors).all() else None


_KINDS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "text": (_as_text, "a text"),
    "words": (_as_words, "a list of words"),
    "ids": (_as_ids, "an array (T,) of whole numbers from 0 on"),
    "vectors": (_as_vectors, "an array (T, {width}) of finite numbers"),
}
"""Of each kind of sequence what gives it as it is kept, None where it is none, and what is wanted in words."""


def _checked(number: int, sequence: Any, reads: str, width: int) -> Any:
    convert, wanted = _KINDS[reads]
    try:
        found = convert(sequence, width)
    except (TypeError, KeyError, ValueError):
        found = None
    if found is None:
        what = wanted.format(width=width)
        raise ConfigError(f"Sequence {number} must be {what}, as the others are, not {sequence!r:.80}.")
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences side by side."""

    inputs: NDArray[Any]
    """Ids (T, B), int64, or vectors (T, B, I), float32; zeros beyond a row's end."""
    lengths_B: NDArray[np.int64]
    targets: NDArray[np.int64]
    """Numbers of labels: (B,), or (T, B) where each step has one, and there `IGNORED` beyond a row's end."""

    @property
    def tokens(self) -> int:
        """Labels that are to be predicted."""
        return int(np.count_nonzero(self.targets != IGNORED))


class Encoded:
    """Sequences as a model reads them, and their labels as it gives them.

    Args:
        config: of the model.
        tokenizer: the model's, if it has one.
        sequences: of the kind that it reads.
        labels: theirs, as of `Examples`; none are known if None.

    Raises:
        ConfigError: they are of another kind, or have another width.
        UsageError: a label that the model does not know.
    """

    def __init__(
        self,
        config: LabelModelConfig,
        tokenizer: Tokenizer | None,
        sequences: Sequence[Any],
        labels: Sequence[Any] | None = None,
    ) -> None:
        self.per_step = config.per_step
        self.arrays = _arrays(config, tokenizer, checked(sequences, config.reads))
        self.lengths = np.array([len(array) for array in self.arrays], dtype=np.int64)
        number_of = {name: number for number, name in enumerate(config.labels)}

        def numbers(label: Any) -> list[int]:
            try:
                return [number_of[each] for each in (label if self.per_step else [label])]
            except KeyError as error:
                raise UsageError(
                    f"The model does not know the label {error.args[0]!r:.80}.", f"It gives {', '.join(config.labels)}."
                ) from error

        if labels is None:
            counts = self.lengths if self.per_step else np.ones(len(self.arrays), np.int64)
            self.targets = [np.full(count, IGNORED, np.int64) for count in counts]
        else:
            self.targets = [np.array(numbers(each), np.int64) for each in labels]

    def __len__(self) -> int:
        """Return the number of sequences."""
        return len(self.arrays)

    def lengths_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the lengths of sequences by their numbers."""
        lengths: NDArray[np.int64] = self.lengths[numbers]
        return lengths

    def batch(self, numbers: NDArray[np.int64]) -> Batch:
        """Return the sequences of these numbers side by side."""
        lengths_B = self.lengths[numbers]
        # Where all sequences are empty there is one step of padding, as no layer runs without a step.
        T, B = max(int(lengths_B.max()), 1), len(numbers)
        first = self.arrays[numbers[0]]
        inputs = np.zeros((T, B, *first.shape[1:]), np.int64 if first.ndim == 1 else np.float32)
        targets = np.full((T if self.per_step else 1, B), IGNORED, np.int64)
        for row, number in enumerate(numbers):
            inputs[: self.lengths[number], row] = self.arrays[number]
            targets[: len(self.targets[number]), row] = self.targets[number]
        return Batch(inputs, lengths_B, targets if self.per_step else targets[0])


def _arrays(config: LabelModelConfig, tokenizer: Tokenizer | None, sequences: list[Any]) -> list[NDArray[Any]]:
    encode: Callable[[Any], NDArray[Any]] | None = None
    if isinstance(tokenizer, WordTokenizer) and config.reads == "words":
        encode = tokenizer.encode_words
    elif tokenizer is not None:
        encode = tokenizer.encode
    elif config.reads in ("text", "words"):
        raise TextError(f"A model that reads {config.reads} needs the tokenizer that it was trained with.")
    arrays = [encode(sequence) for sequence in sequences] if encode is not None else sequences
    if config.reads == "vectors":
        if wrong := [array.shape for array in arrays if len(array) and array.shape[1] != config.inputs]:
            raise ConfigError(f"The model reads vectors of {config.inputs} numbers, not of {wrong[0][1]}.")
        return [array.reshape(len(array), config.inputs) for array in arrays]
    # What the vocabulary does not hold has the id V and is embedded as zero.
    return [np.minimum(array, config.vocab_size) for array in arrays]
