"""How well a model predicts a text, without training on it.

One function, `evaluate`, serves training and the command line. The first symbol of the text is read, not predicted.
Its protocols, named in each result:

    one lane       the state is carried through the whole text from a zero state: the default, and the exact figure
    N lanes        the text is cut into N parts that are read side by side, each from a zero state: quick, and a
                   little worse than one lane, for looks during training
    blocks of N    the state is zero at the start of every block of N symbols: how models with a limited context
                   are measured
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.errors import ConfigError, TextError
from longshort.text.tokenizers import Tokenizer

_TOKENS_A_CALL = 4096
_LOGITS_A_CALL = 2**22


class Model(Protocol):
    """What evaluation and generation ask of a model: the torch-free decoder and `LanguageModel` both have it."""

    def nats(self, inputs_TB: NDArray[np.int64], targets_TB: NDArray[np.int64], state: Any) -> tuple[Any, Any]:
        """Return -log p of each target (T, B) and the state after the last input; `state` None is zero."""

    def logits(self, ids_T: NDArray[np.int64], state: Any) -> tuple[Any, Any]:
        """Return the logits (V) of the symbol after `ids_T`, and the state there; `state` None is zero."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found."""

    tokens: int
    """Symbols that were predicted."""
    nats_per_token: float
    perplexity: float
    bits_per_character: float
    bits_per_byte: float
    characters: int
    """Characters of the text that the predicted symbols stand for."""
    bytes: int
    """The same in UTF-8 bytes."""
    skipped: int
    """Symbols outside the vocabulary: read, never predicted, in no figure."""
    protocol: str

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    text: str,
    *,
    lanes: int = 1,
    block: int | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure how well `model` predicts `text`.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        text: what to predict, at least two symbols.
        lanes: parts that are read side by side, state carried within each.
        block: if given, the state is zero at the start of every block of this many symbols.
        pause: called every few thousand symbols; it may raise, to end a long evaluation.

    Raises:
        TextError: nothing in the text can be predicted.
        ConfigError: `lanes` or `block` is below one, or both are given.
    """
    if lanes < 1 or (block is not None and block < 1) or (block is not None and lanes > 1):
        raise ConfigError(f"lanes and block must be at least 1 and not both be given; not {lanes} and {block}.")
    ids = tokenizer.encode(text).astype(np.int64)
    inputs, targets = ids[:-1], ids[1:]
    counted = targets < tokenizer.size
    if not counted.any():
        raise TextError(
            f"The text has {len(text)} characters and no symbol that this model can predict.",
            "Give at least two characters of the kind that the model was trained on.",
        )
    total = 0.0
    if block is not None:
        protocol = f"zero state at the start of every block of {block} tokens"
        for start in range(0, len(inputs), block * 64):
            part = slice(start, start + block * 64)
            total += _rows(model, tokenizer.size, inputs[part], targets[part], counted[part], block, pause)
    else:
        length = -(-len(inputs) // lanes)
        lanes = -(-len(inputs) // length)
        protocol = (
            "state carried through the text, one lane" if lanes == 1 else f"state carried in each of {lanes} lanes"
        )
        total = _rows(model, tokenizer.size, inputs, targets, counted, length, pause)
    predicted = targets[counted]
    characters = tokenizer.characters(predicted.astype(np.int32))
    num_bytes = len(tokenizer.decode(predicted.tolist()).encode("utf-8", "surrogatepass"))
    if tokenizer.name == "byte":
        num_bytes = len(predicted)
    bits = total / math.log(2)
    nats_per_token = total / len(predicted)
    return Evaluation(
        tokens=len(predicted),
        nats_per_token=nats_per_token,
        perplexity=math.exp(min(nats_per_token, 700.0)),
        bits_per_character=bits / max(characters, 1),
        bits_per_byte=bits / max(num_bytes, 1),
        characters=characters,
        bytes=num_bytes,
        skipped=int(len(targets) - len(predicted)),
        protocol=protocol,
    )


def _rows(
    model: Model,
    size: int,
    inputs: NDArray[np.int64],
    targets: NDArray[np.int64],
    counted: NDArray[np.bool_],
    length: int,
    pause: Callable[[], None],
) -> float:
    """Return the nats of all counted targets, the text being cut into rows of `length`, each from a zero state."""
    rows = -(-len(inputs) // length)
    padding = rows * length - len(inputs)
    inputs_TB = np.pad(inputs, (0, padding)).reshape(rows, length).T
    counted_TB = np.pad(counted, (0, padding)).reshape(rows, length).T
    targets_TB = np.where(counted_TB, np.pad(targets, (0, padding)).reshape(rows, length).T, 0)
    total, state = 0.0, None
    window = max(min(_TOKENS_A_CALL, _LOGITS_A_CALL // size) // rows, 1)
    for first in range(0, length, window):
        pause()
        part = slice(first, first + window)
        nats_TB, state = model.nats(
            np.ascontiguousarray(inputs_TB[part]), np.ascontiguousarray(targets_TB[part]), state
        )
        total += float(nats_TB[counted_TB[part]].sum())
    return total
