"""Beam search: the most probable continuations of a prompt, where `generation` samples.

    K  beams   V  symbols   L  layers   H  hidden units

Each of the K most probable texts so far is continued by every symbol, and the K most probable of these K V texts are
kept (Lowerre 1976, *The Harpy speech recognition system*; *Dive into Deep Learning*, section 10.8). One beam is greedy
search. More of them find texts of more probability, not livelier ones: what a model finds most probable repeats itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longshort.continuation import Continuation
from longshort.decoder import Decoder
from longshort.errors import ConfigError
from longshort.evaluation import Model
from longshort.generation import Request, arrays, read_prompt
from longshort.text.tokenizers import Tokenizer

MOST_BEAMS = 1024


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
    model: Model,
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
        model: a decoder, which on the native kernels reads its weights once a step for all texts; or a
            `LanguageModel`, which reads one text after the other.
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
    """
    request = Request(prompt=prompt, length=length, stop=tuple(stop), after=after)
    if not 1 <= beams <= MOST_BEAMS:
        raise ConfigError(f"beams must be from 1 to {MOST_BEAMS}, not {beams}.")
    if not 0 <= length_penalty <= 1:
        raise ConfigError(f"length_penalty must be from 0 to 1, not {length_penalty}.")
    newline = tokenizer.newline if model.config.lines else None
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
        state = tuple(np.ascontiguousarray(tensor[:, parents]) for tensor in state)
        logits_KV, state = _read(model, np.array([beam.ids[-1] for beam in live]), state, newline)
    whole = [Found(_text(request, tokenizer, beam.ids), beam.nats, len(beam.ids)) for beam in live]
    return sorted(ended + whole, key=lambda found: found.nats / max(found.symbols, 1) ** length_penalty)


def _continued(live: list[_Beam], logits_KV: NDArray[np.float32], most: int) -> tuple[list[_Beam], NDArray[np.intp]]:
    """Return the `most` most probable texts that are one symbol longer, and which of `live` each of them continues."""
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


def _read(
    model: Model, ids_K: NDArray[np.int64], state: tuple[NDArray[np.float32], ...], newline: int | None
) -> tuple[NDArray[np.float32], tuple[NDArray[np.float32], ...]]:
    """Read a symbol of each text; return the logits (K, V) of the next ones, and the state after."""
    if newline is not None:
        for tensor in state:
            tensor[:, ids_K == newline] = 0
    if isinstance(model, Decoder):
        return model.step(ids_K, state)
    rows = [tuple(tensor[:, k : k + 1] for tensor in state) for k in range(len(ids_K))]
    found = [model.logits(ids_K[k : k + 1], row) for k, row in enumerate(rows)]
    after = zip(*(arrays(row) for _, row in found), strict=True)
    return np.stack([logits_V for logits_V, _ in found]), tuple(np.concatenate(tensors, axis=1) for tensors in after)


def _text(request: Request, tokenizer: Tokenizer, ids: Sequence[int], *, whole: bool = True) -> str:
    """Return what symbols after the prompt stand for; if not `whole`, without a character that has only begun."""
    writer = tokenizer.writer(request.prompt)
    if request.after and not request.prompt:
        for symbol in request.after.tail.tolist():
            writer.write(symbol)
    text = "".join(map(writer.write, ids))
    return text + writer.close() if whole else text


def _ended(request: Request, tokenizer: Tokenizer, beam: _Beam) -> Found | None:
    """Return a text that its last symbol has ended, by a stop; None of one that goes on."""
    if not request.stop:
        return None
    text = _text(request, tokenizer, beam.ids, whole=False)
    places = [(place + len(word), place) for word in request.stop if (place := text.find(word)) >= 0]
    return Found(text[: min(places)[1]], beam.nats, len(beam.ids)) if places else None
