"""Beam search: the most probable continuations of a prompt, where `generation` samples.

    K  beams   V  symbols   L  layers   H  hidden units

Each of the K most probable texts so far is continued by every symbol, and the K most probable of these K V texts are
kept (Lowerre 1976, *The Harpy speech recognition system*; *Dive into Deep Learning*, section 10.8). One beam is greedy
search. More of them find texts of more probability, not livelier ones: what a model finds most probable repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.continuation import Continuation
from longshort.errors import CheckpointError, ConfigError
from longshort.evaluation import Model
from longshort.generation import Request, arrays, first_stop, newline_of, read_prompt, writer_after
from longshort.text.tokenizers import Tokenizer

MOST_BEAMS = 1024


class Stepping(Model, Protocol):
    """What a search asks of a model: the torch-free decoder and `LanguageModel` both have it."""

    def step(self, ids_B: NDArray[np.int64], state: Any) -> tuple[Any, Any]:
        """Read a symbol of each of B texts; return the logits (B, V) of the next ones, and the state after."""


@dataclass(frozen=True, slots=True)
class Found:
    """A continuation, and how probable the model finds it."""

    text: str
    """What follows the prompt, up to a stop."""
    nats: float
    """-log p of its symbols after the prompt, and of those of the stop that ended it."""
    symbols: int
    """How many these are."""


@dataclass(frozen=True, slots=True)
class _Beam:
    """A text that may go on."""

    ids: tuple[int, ...] = ()
    nats: float = 0.0


def beam_search(
    model: Stepping,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 80,
    beams: int = 8,
    *,
    stop: Sequence[str] = (),
    length_penalty: float = 0.75,
    after: Continuation | None = None,
) -> list[Found]:
    """Return the most probable texts of `length` symbols that follow `prompt`, as far as the beams see, the best first.

    A text with a stop in it ends there and leaves the others one beam less, so that at most `beams` texts are found.
    They are ordered by nats / symbols ** `length_penalty`.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        prompt: as of `generation.generate`.
        length: number of symbols to find.
        beams: K, how many texts are kept, from 1 to `MOST_BEAMS`.
        stop: a text ends before the first of these that would be complete in it.
        length_penalty: from 0 to 1: with 0 texts that end early win, as each symbol more costs probability; 1 compares
            nats a symbol. Without `stop` all texts are of one length, and it makes no difference.
        after: as of `generation.generate`.

    Raises:
        ConfigError: a value outside its range.
        VocabularyError: the prompt holds a symbol that the model never saw, and none that it did.
        CheckpointError: what the model computes is not finite.
    """
    request = Request(prompt=prompt, length=length, stop=tuple(stop), after=after)
    if not 1 <= beams <= MOST_BEAMS:
        raise ConfigError(f"beams must be from 1 to {MOST_BEAMS}, not {beams}.")
    if not 0 <= length_penalty <= 1:
        raise ConfigError(f"length_penalty must be from 0 to 1, not {length_penalty}.")
    newline = newline_of(model, tokenizer)
    begun = read_prompt(model, tokenizer, newline, prompt, after)
    live, ended = [_Beam()], list[Found]()
    logits_KV, state = begun.logits_V[None], arrays(begun.state)
    for step in range(length):
        live, parents = _continued(live, logits_KV, beams - len(ended))
        going = []
        for number, beam in enumerate(live):
            found = _ended(request, tokenizer, beam)
            if found is None:
                going.append(number)
            else:
                ended.append(found)
        live, parents = [live[number] for number in going], parents[going]
        if not live or step + 1 == length:
            break
        state = tuple(tensor[:, parents] for tensor in state)
        ids_K = np.array([beam.ids[-1] for beam in live])
        if newline is not None:
            for tensor in state:
                tensor[:, ids_K == newline] = 0
        logits_KV, after_K = model.step(ids_K, state)
        state = arrays(after_K)
    whole = [Found(_text(request, tokenizer, beam.ids), beam.nats, len(beam.ids)) for beam in live]
    return sorted(ended + whole, key=lambda found: found.nats / max(found.symbols, 1) ** length_penalty)


def _continued(live: list[_Beam], logits_KV: NDArray[np.float32], most: int) -> tuple[list[_Beam], NDArray[np.intp]]:
    """Return the `most` most probable texts that are one symbol longer, and which of `live` each of them continues."""
    if not np.isfinite(logits_KV).all():
        raise CheckpointError("The model's logits are not finite.", "Its weights are damaged, or its training failed.")
    logits_KV = logits_KV.astype(np.float64)
    largest_K1 = logits_KV.max(axis=-1, keepdims=True)
    log_sum_K1 = np.log(np.exp(logits_KV - largest_K1).sum(axis=-1, keepdims=True)) + largest_K1
    nats_KV = np.array([[beam.nats] for beam in live]) + log_sum_K1 - logits_KV
    flat, V = nats_KV.ravel(), nats_KV.shape[1]
    most = min(most, len(flat))
    # All that are no worse than the last one kept, so that of equal ones the first are taken.
    candidates = np.flatnonzero(flat <= np.partition(flat, most - 1)[most - 1])
    best = candidates[np.argsort(flat[candidates], kind="stable")][:most]
    parents, chosen = np.divmod(best, V)
    pairs = zip(parents.tolist(), chosen.tolist(), flat[best].tolist(), strict=True)
    return [_Beam((*live[parent].ids, symbol), nats) for parent, symbol, nats in pairs], parents


def _text(request: Request, tokenizer: Tokenizer, ids: Sequence[int], *, whole: bool = True) -> str:
    """Return what symbols after the prompt stand for; if not `whole`, without a character that has only begun."""
    writer = writer_after(tokenizer, request.prompt, request.after)
    text = "".join(map(writer.write, ids))
    return text + writer.close() if whole else text


def _ended(request: Request, tokenizer: Tokenizer, beam: _Beam) -> Found | None:
    """Return a text that its last symbol has ended, by a stop; None of one that goes on."""
    if not request.stop:
        return None
    # A stop that is complete now is in the last symbols, of four to a character at most, and one that has begun before.
    last = 4 * (max(map(len, request.stop)) + 1)
    if first_stop("".join(map(tokenizer.writer().write, beam.ids[-last:])), request.stop) is None:
        return None
    text = _text(request, tokenizer, beam.ids, whole=False)
    place = first_stop(text, request.stop)
    return None if place is None else Found(text[: place[0]], beam.nats, len(beam.ids))
