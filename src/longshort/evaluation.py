"""How well a model predicts a text, without training on it.

One function, `evaluate`, serves training and the command line. The first symbol of the text is read, not predicted.
Its protocols, named in each result:

    one lane       the state is carried through the whole text from a zero state: the exact figure
    N lanes        the text is cut into N parts that are read side by side, each from a zero state that far before its
                   part that the state is what it would be: the default for longer texts, within 0.001 nats of one lane
    blocks of N    the state is zero at the start of every block of N symbols: how models with a limited context
                   are measured
    lines          each line from a zero state, after a newline; the line and its own newline are predicted: what a
                   model trained on lines is measured by
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.config import ModelConfig
from longshort.decoder import Decoder
from longshort.errors import ConfigError, TextError
from longshort.text.encoding import Part, encode_text
from longshort.text.tokenizers import Tokenizer

OVERLAP = 256
"""Tokens that a lane reads before those it counts. docs/log.md has what lanes without them lose."""
_TOKENS_A_LANE, _MOST_LANES = 4096, 64
"""A text has a lane for every so many tokens, and at most so many lanes."""
_TOKENS_A_CALL, _LOGITS_A_CALL = 4096, 2**22
"""The most that one call of a model reads, in all rows together; so much waits between two calls of `pause`."""
LONG = 4096
"""A line of more symbols is read alone: beside it, short ones would be padding."""
_LINES_AT_A_TIME, _SYMBOLS_OF_LINES = 4096, 1 << 20
"""The most lines, and the most symbols of them unless one line has more, that are in memory at a time."""
_LINES_A_BATCH = 64


class Model(Protocol):
    """What evaluation and generation ask of a model: the torch-free decoder and `LanguageModel` both have it."""

    @property
    def config(self) -> ModelConfig:
        """What the model is."""

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
    """Mean of -log p of the predicted symbols."""
    perplexity: float
    """exp of that, at most exp(700)."""
    bits_per_character: float
    """-log2 p of all predicted symbols together, divided by `characters`."""
    bits_per_byte: float
    """The same, divided by `bytes`."""
    characters: int
    """Characters of the text that the predicted symbols stand for."""
    bytes: int
    """The same in UTF-8 bytes."""
    skipped: int
    """Symbols outside the vocabulary: read, never predicted, in no figure."""
    protocol: str
    """How the text was read, in words."""

    @property
    def loss(self) -> float:
        """What training looks at: the nats a token."""
        return self.nats_per_token

    def metrics(self) -> dict[str, Any]:
        """Return what the log of a run says of a look."""
        return {"heldout_nats_per_token": self.nats_per_token, "protocol": self.protocol}

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return asdict(self)


def lanes_for(tokens: int) -> int:
    """Return the number of lanes in which a text of `tokens` is read where nobody asks for another."""
    return max(1, min(tokens // _TOKENS_A_LANE, _MOST_LANES))


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    text: str | Part,
    *,
    lanes: int | None = None,
    block: int | None = None,
    lines: bool | None = None,
    pause: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Measure how well `model` predicts `text`.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        text: what to predict, at least two symbols; or its ids, which may be more than the memory holds.
        lanes: parts that are read side by side, each after the `OVERLAP` tokens before it; if None, as many as
            `lanes_for` gives.
        block: if given, the state is zero at the start of every block of this many symbols.
        lines: whether each line is read from a zero state; if None, whether the model was trained so. Of a text that
            is given as ids, whether they were made so.
        pause: called every few thousand symbols; it may raise, to end a long evaluation.

    Raises:
        TextError: nothing in the text can be predicted.
        ConfigError: `lanes` or `block` is below one, or several protocols are asked for.
    """
    for name, given in (("lanes", lanes), ("block", block)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} must be at least 1, not {given}.")
    if block is not None and lanes is not None:
        raise ConfigError("Blocks begin from a zero state: lanes do not go with them.", "Give lanes or block.")
    cut = block is not None or (lanes or 1) > 1
    part = part_of(model.config, tokenizer, text, False if cut and lines is None else lines)
    if part.breaks is not None and cut:
        raise ConfigError("Lines are read from a zero state each: lanes and block do not go with them.")
    size = tokenizer.size
    if part.breaks is not None:
        protocol = "each line from a zero state, after a newline"
        total = _lines(model, size, part.ids, part.breaks, pause)
    elif block is not None:
        protocol = f"zero state at the start of every block of {block} tokens"
        starts = range(0, part.tokens, block * 64)
        total = sum(_rows(model, size, part.ids[start : start + block * 64 + 1], block, 0, pause) for start in starts)
    else:
        length = -(-part.tokens // (lanes or lanes_for(part.tokens)))
        lanes = -(-part.tokens // length)
        protocol = (
            "state carried through the text, one lane"
            if lanes == 1
            else f"state carried in each of {lanes} lanes, which overlap by {OVERLAP} tokens"
        )
        total = _rows(model, size, part.ids, length, OVERLAP, pause)
    return summarise(part, total, protocol)


def part_of(config: ModelConfig, tokenizer: Tokenizer, text: str | Part, lines: bool | None = None) -> Part:
    """Return `text` as ids, if it is not yet: in lines, if asked for, or if the model was trained so and None is given.

    Raises:
        TextError: nothing in it can be predicted.
    """
    part = text
    if not isinstance(part, Part):
        part = encode_text(tokenizer, part, config.lines if lines is None else lines)
    if not part.known:
        raise TextError(
            f"A text of {part.tokens} symbols after the first holds no symbol that this model can predict.",
            "Give at least two characters of the kind that the model was trained on.",
        )
    return part


def summarise(part: Part, total: float, protocol: str) -> Evaluation:
    """Return what `total` nats for all symbols of `part` come to."""
    bits = total / math.log(2)
    nats_per_token = total / part.known
    return Evaluation(
        tokens=part.known,
        nats_per_token=nats_per_token,
        perplexity=math.exp(min(nats_per_token, 700.0)),
        bits_per_character=bits / max(part.characters, 1),
        bits_per_byte=bits / max(part.bytes, 1),
        characters=part.characters,
        bytes=part.bytes,
        skipped=part.tokens - part.known,
        protocol=protocol,
    )


def _rows(model: Model, size: int, ids: NDArray[Any], length: int, overlap: int, pause: Callable[[], None]) -> float:
    """Return the nats of all symbols but the first, read in rows of `length`, each `overlap` after a zero state."""
    num_pairs = len(ids) - 1
    starts_B = np.arange(0, num_pairs, length)
    ends_B = np.minimum(starts_B + length, num_pairs)
    total = 0.0
    for nats_TB, counted_TB in read(model, size, ids, np.maximum(starts_B - overlap, 0), ends_B, starts_B):
        pause()
        total += float(nats_TB[counted_TB].sum())
    return total


def _lines(model: Model, size: int, ids: NDArray[Any], breaks: NDArray[np.uint64], pause: Callable[[], None]) -> float:
    """Return the nats of all lines."""
    first, total = 0, 0.0
    while first < len(breaks) - 1:
        places = breaks[first : first + _LINES_AT_A_TIME + 1].astype(np.int64)
        count = max(int(np.searchsorted(places, places[0] + _SYMBOLS_OF_LINES, "right")) - 1, 1)
        of_lines, begins = ids[places[0] : places[count] + 1], places[: count + 1] - places[0]
        nats = read_lines(model, size, of_lines, begins[:-1], begins[1:], pause)
        total += float(nats[of_lines[1:] < size].sum())
        first += count
    return total


def read_lines(
    model: Model,
    size: int,
    ids: NDArray[Any],
    starts_B: NDArray[np.int64],
    stops_B: NDArray[np.int64],
    pause: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Return -log p in nats of every symbol of each line except its first, line after line.

    Args:
        model: reads.
        size: of the vocabulary.
        ids: symbols; those outside the vocabulary are `size`, and what they are given means nothing.
        starts_B: place of each line's first symbol, which is only read, from a zero state.
        stops_B: place of its last, which is only predicted.
        pause: called every few thousand symbols; it may raise.

    Returns:
        One number for each of `stops_B - starts_B` symbols of each line.
    """
    lengths_B = stops_B - starts_B
    places_B = np.cumsum(lengths_B) - lengths_B
    nats = np.zeros(lengths_B.sum())
    short_B = lengths_B <= LONG
    order = np.argsort(lengths_B, kind="stable")
    num_short = np.count_nonzero(short_B)
    batches = list(order[num_short:, None])
    if isinstance(model, Decoder) and model.writes:
        if num_short:
            nats[np.repeat(short_B, lengths_B)] = model.nats_of_lines(ids, starts_B[short_B], stops_B[short_B], pause)
    else:
        batches += [order[first:num_short][:_LINES_A_BATCH] for first in range(0, num_short, _LINES_A_BATCH)]
    for batch in batches:
        # Always as many rows: without the native kernels a product's last digits depend on how many it has.
        rows = np.resize(batch, _LINES_A_BATCH if short_B[batch[0]] else 1)
        found = []
        for nats_TB, _ in read(model, size, ids, starts_B[rows], stops_B[rows]):
            pause()
            found.append(nats_TB)
        nats_TB = np.concatenate(found)
        for row, line in enumerate(batch):
            nats[places_B[line] : places_B[line] + lengths_B[line]] = nats_TB[: lengths_B[line], row]
    return nats


def read(
    model: Model,
    size: int,
    ids: NDArray[Any],
    starts_B: NDArray[np.int64],
    ends_B: NDArray[np.int64],
    counted_from_B: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Predict stretches of a text side by side, each from a zero state, window by window.

    Args:
        model: reads.
        size: of the vocabulary.
        ids: the text, which may be memory-mapped.
        starts_B: place of each stretch's first id, which is only read.
        ends_B: place of each stretch's last id, which is predicted.
        counted_from_B: place of the id after which each stretch counts; at its start if None.

    Yields:
        -log p of each symbol in nats, and whether it counts: one of the stretch that the vocabulary holds, (T, B) both.
    """
    state = None
    longest = int((ends_B - starts_B).max())
    window = max(min(_TOKENS_A_CALL, _LOGITS_A_CALL // size) // len(starts_B), 1)
    for first in range(0, longest, window):
        positions_TB = starts_B + np.arange(first, min(first + window, longest))[:, None]
        inside_TB = positions_TB < ends_B
        counts_TB = inside_TB if counted_from_B is None else inside_TB & (positions_TB >= counted_from_B)
        positions_TB = np.where(inside_TB, positions_TB, starts_B)
        targets_TB = ids[positions_TB + 1].astype(np.int64)
        counted_TB = counts_TB & (targets_TB < size)
        inputs_TB = ids[positions_TB].astype(np.int64)
        nats_TB, state = model.nats(inputs_TB, np.where(counted_TB, targets_TB, 0), state)
        yield nats_TB, counted_TB
