"""Text from a model: warm the state on a prompt, then sample one symbol after the other.

Sampling is repeatable on any machine: the uniform number of each symbol comes from the counter-based generator
Philox4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*) with key = seed and counter =
(stream, position), and is turned into a symbol by the inverse cumulative distribution in the order of ids, in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longshort.config import Options, option
from longshort.continuation import TAIL, Continuation
from longshort.decoder import Decoder
from longshort.errors import ConfigError, VocabularyError
from longshort.evaluation import Model
from longshort.native_model import Draw
from longshort.text.tokenizers import Tokenizer, Writer

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How the next symbol is chosen from the model's probabilities.

    Args:
        temperature: from 0 to 100: below 1 more conservative, above 1 more random; 0 is greedy.
        top_k: sample from the k most probable symbols only; from all if None.
        top_p: sample from the fewest symbols that hold this probability, above 0 and at most 1; from all if None.
        seed: decides what is sampled.
    """

    temperature: float = option(0.8, "Below 1 more conservative, above 1 more random; 0 is greedy.", least=0, most=100)
    top_k: int | None = option(None, "Sample from the K most probable symbols only.", least=1)
    top_p: float | None = option(None, "Sample from the fewest symbols that hold this probability.", above=0, most=1)
    seed: int = option(0, "Decides what is sampled.", least=0, most=2**64 - 1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to be written."""

    prompt: str = ""
    """Read before the first symbol is sampled; if empty, a newline (or the first symbol) is read instead."""
    length: int = 500
    """Number of symbols to sample."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these that would be complete in it."""
    stream: int = 0
    """Number of this text among those of one seed; each has its own random numbers."""
    after: Continuation | None = None
    """The text that this one goes on with, as if both were one; with it, an empty prompt reads nothing."""

    def __post_init__(self) -> None:
        if self.length < 0:
            raise ConfigError(f"length must be at least 0, not {self.length}.")
        if isinstance(self.stop, str) or not all(isinstance(word, str) and word for word in self.stop):
            raise ConfigError(f"stop must be a tuple of texts that are not empty, not {self.stop!r}.")


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    sampling: Sampling | None = None,
    *,
    stop: Sequence[str] = (),
    stream: int = 0,
    after: Continuation | None = None,
) -> Iterator[str]:
    """Yield text that continues `prompt`, piece by piece; their concatenation is the whole.

    A model that was trained on lines begins each line, also one that the prompt began, as it learned to: from a zero
    state after a newline.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        prompt: read before the first symbol is sampled; if empty, a newline (or the first symbol) is read instead.
        length: number of symbols to sample.
        sampling: temperature, top-k, top-p, seed; `Sampling()` if None.
        stop: the text ends before the first of these that would be complete in it.
        stream: number of this text among those of one seed; each has its own random numbers.
        after: the text that this one goes on with, as if both were one; with it, an empty prompt reads nothing.

    Raises:
        ConfigError: a value outside its range.
        VocabularyError: the prompt holds a symbol that the model never saw, and none that it did.
    """
    rest: dict[str, Any] = {"sampling": sampling or Sampling(), "stop": tuple(stop), "stream": stream, "after": after}
    for _, piece in generate_many(model, tokenizer, [Request(prompt=prompt, length=length, **rest)]):
        yield piece


def generate_many(
    model: Model,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    ends: dict[int, Continuation] | None = None,
) -> Iterator[tuple[int, str]]:
    """Yield (number of the request, piece) as the texts grow side by side; each is the one that `generate` gives.

    Args:
        model: a decoder, which on the native kernels reads its weights once a step for all texts; or a
            `LanguageModel`, which writes one text after the other.
        tokenizer: the model's.
        requests: what to write.
        ends: if given, filled with where each text ends, by number, so that another can go on with it; a character
            whose last bytes are not written yet is then left to that one.

    Raises:
        VocabularyError: as `generate`.
    """
    writing = Writing(model, tokenizer, goes_on=ends is not None)
    for request in requests:
        writing.add(request)
    while writing.numbers:
        yield from writing.advance(ends)


class Writing:
    """Texts that grow side by side; others may join them, and leave, between two calls of `advance`.

    Args:
        model: a decoder, which on the native kernels reads its weights once a step for all texts; on NumPy, or as a
            `LanguageModel`, it writes a symbol of one text after the other.
        tokenizer: the model's.
        goes_on: whether the end of each text is asked for.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, *, goes_on: bool = False) -> None:
        self._model, self._tokenizer, self._goes_on = model, tokenizer, goes_on
        self._newline = newline_of(model, tokenizer)
        self._native = model if isinstance(model, Decoder) and model.writes else None
        self._texts: dict[int, _Text] = {}
        self._rows: list[_Text] = []  # whose states lie side by side, in `_logits_BV` and `_state`
        self._next, self._steps = 0, 1
        self.ended: list[tuple[int, bool]] = []
        """Of the last call of `advance`: the texts that came to their end, and whether a stop was the reason."""

    @property
    def numbers(self) -> list[int]:
        """The texts that are not at their end."""
        return list(self._texts)

    def add(self, request: Request) -> int:
        """Read a prompt and return the number of the text, from 0 in the order in which they come.

        Raises:
            VocabularyError: as `generate`.
        """
        number = self._next
        text = _Text(number, request, self._model, self._tokenizer, self._newline, self._goes_on)
        self._next, self._texts[number] = number + 1, text
        return number

    def drop(self, number: int) -> None:
        """Write no more of a text; nothing happens where it is at its end."""
        self._texts.pop(number, None)

    def advance(self, ends: dict[int, Continuation] | None = None) -> Iterator[tuple[int, str]]:
        """Write on for about a thirtieth of a second; yield (number, piece) of what has become certain.

        Args:
            ends: filled with where the texts end that have come to their end.
        """
        texts = [text for text in self._texts.values() if text.left]
        if self._native is None:
            for text in texts:
                yield from self._advance_one(text)
        elif texts:
            ids_TB = self._write(self._native, texts)
            for row, text in enumerate(texts):
                yield from text.take(ids_TB[:, row].tolist())
        ended = [text for text in self._texts.values() if not text.left]
        self.ended = [(text.number, text.stopped) for text in ended]
        if ended:
            self._part()
        for text in ended:
            del self._texts[text.number]
            if ends is not None:
                ends[text.number] = text.end()

    def _advance_one(self, text: _Text) -> Iterator[tuple[int, str]]:
        sampling, stream = text.request.sampling, text.request.stream
        chosen = choose(text.logits_V, sampling, uniform(sampling.seed, stream, text.position))
        yield from text.take([chosen])
        if text.left or self._goes_on:
            state = None if chosen == self._newline else text.state
            text.logits_V, text.state = self._model.logits(np.array([chosen]), state)

    def _write(self, model: Decoder, texts: list[_Text]) -> NDArray[np.int64]:
        """Write all texts, the native loop making many steps in a call."""
        if texts != self._rows:
            self._part()
            self._logits_BV = np.stack([text.logits_V for text in texts])
            states = zip(*(text.state for text in texts), strict=True)
            self._state = tuple(np.concatenate(tensors, axis=1) for tensors in states)
            self._rows = texts
        steps = min(self._steps, *(text.left for text in texts), 4096)
        begin = time.perf_counter()
        draws = [text.draw() for text in texts]
        ids_TB = model.write(self._logits_BV, self._state, draws, steps, newline=self._newline)
        seconds = time.perf_counter() - begin
        if seconds > _SECONDS_A_CALL:
            self._steps = max(steps // 2, 1)
        elif seconds < _SECONDS_A_CALL / 2 and steps == self._steps:
            self._steps *= 2
        return ids_TB

    def _part(self) -> None:
        """Give each text its own state back."""
        for row, text in enumerate(self._rows):
            text.logits_V = self._logits_BV[row]
            text.state = tuple(tensor[:, row : row + 1] for tensor in self._state)
        self._rows = []


def cost_in_bits(exact: Decoder, other: Decoder, *, texts: int = 16, length: int = 256) -> float:
    """Return what `other` loses against `exact` in bits a character, on text that `exact` writes at temperature 1.

    That is the Kullback-Leibler divergence of the two, estimated from texts x length symbols, each with its
    r - 1 - log r, where r is the ratio of both probabilities: of the same mean as -log r, never negative, hardly noisy.

    Args:
        exact: with float32 weights, on native kernels.
        other: the same model with others.
        texts: how many are written.
        length: symbols of each.

    Raises:
        UsageError: `exact` has no native kernels.
    """
    newline = newline_of(exact, exact.tokenizer)
    first = int(prompt_ids(exact.tokenizer, "\n" if newline is not None else "")[0])
    logits_V, state = exact.logits(np.array([first]), None)
    logits_BV = np.repeat(logits_V[None], texts, axis=0)
    state = tuple(np.repeat(tensor, texts, axis=1) for tensor in state)
    draws = [Draw(1.0, None, None, 0, stream, 0) for stream in range(texts)]
    ids_TB = exact.write(logits_BV, state, draws, length)
    inputs_TB = np.concatenate([np.full((1, texts), first), ids_TB[:-1]])
    log_r_TB = exact.nats(inputs_TB, ids_TB, None)[0] - other.nats(inputs_TB, ids_TB, None)[0]
    nats = float((np.expm1(log_r_TB) - log_r_TB).sum())
    characters = sum(len(exact.tokenizer.decode(ids)) for ids in ids_TB.T.tolist())
    return nats / math.log(2) / max(characters, 1)


_SECONDS_A_CALL = 0.03
"""Texts come in pieces of about this time: often enough to be watched, and to be interrupted."""


class _Text:
    """A text that is being written: where its model is, and what of it has not been given out."""

    def __init__(
        self,
        number: int,
        request: Request,
        model: Model,
        tokenizer: Tokenizer,
        newline: int | None,
        goes_on: bool,
    ) -> None:
        self.number, self.request = number, request
        self.left = request.length
        self._model, self._tokenizer, self._newline, self._goes_on = model, tokenizer, newline, goes_on
        after, prompt = request.after, request.prompt
        self.position = after.position if after else 0
        self._prompted = read_prompt(model, tokenizer, newline, prompt, after)
        self.logits_V, self.state = self._prompted.logits_V, self._prompted.state
        self._tail: list[int] = self._prompted.tail.tolist()
        self._writer = writer_after(tokenizer, prompt, after)
        self._held = self._given = self._stop = ""

    def end(self) -> Continuation:
        """Return where the text ends, which is before a stop."""
        if self._stop:
            # The model has read on, how far depends on the time it took: what was given out is read once more.
            read = read_prompt(self._model, self._tokenizer, self._newline, self._given, self._prompted)
            position = read.position + len(self._tokenizer.encode(self._given + self._stop))
            return replace(read, state=arrays(read.state), position=position)
        return Continuation(arrays(self.state), np.array(self.logits_V), np.array(self._tail, np.int64), self.position)

    @property
    def stopped(self) -> bool:
        """Whether one of its stops has come."""
        return bool(self._stop)

    def draw(self) -> Draw:
        """Return how the next symbols are chosen."""
        s = self.request.sampling
        return Draw(s.temperature, s.top_k, s.top_p, s.seed, self.request.stream, self.position)

    def take(self, ids: list[int]) -> Iterator[tuple[int, str]]:
        """Take the next symbols and yield what of the text is certain; `left` is 0 at its end."""
        self.position += len(ids)
        self.left -= len(ids)
        self._tail = (self._tail + ids)[-TAIL:]
        text = self._held + "".join(map(self._writer.write, ids))
        if not self.left and not self._goes_on:
            text += self._writer.close()
        if place := first_stop(text, self.request.stop):
            begin, end = place
            self._stop, self.left, text, self._held = text[begin:end], 0, text[:begin], ""
        elif self.left and self.request.stop:
            # The beginning of a stop may stand at the end.
            longest = max(map(len, self.request.stop)) - 1
            begun = next(
                (
                    n
                    for n in range(min(longest, len(text)), 0, -1)
                    if any(s.startswith(text[-n:]) for s in self.request.stop)
                ),
                0,
            )
            text, self._held = text[: len(text) - begun], text[len(text) - begun :]
        else:
            self._held = ""
        if text:
            if self._goes_on:
                self._given += text
            yield self.number, text


def newline_of(model: Model, tokenizer: Tokenizer) -> int | None:
    """Return the symbol before which the state is zero, of a model of lines; None of any other."""
    return tokenizer.newline if model.config.lines else None


def writer_after(tokenizer: Tokenizer, prompt: str, after: Continuation | None) -> Writer:
    """Return what writes symbols as text that goes on where the prompt ends, or the text before it."""
    writer = tokenizer.writer(prompt)
    if after and not prompt:
        for symbol in after.tail.tolist():
            writer.write(symbol)
    return writer


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Return beginning and end of the stop that is complete first in `text`, however many came at once."""
    places = [(place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0]
    if not places:
        return None
    end, begin = min(places)
    return begin, end


def read_prompt(
    model: Model, tokenizer: Tokenizer, newline: int | None, text: str, after: Continuation | None
) -> Continuation:
    """Return where a model is when it has read `text` after another, or from a zero state."""
    if newline is not None and not (after and "\n" not in text):
        ids, state = np.append(newline, _known_ids(tokenizer, text.rpartition("\n")[2])), None
    elif after:
        ids, state = _known_ids(tokenizer, text), after.state
        if not len(ids):  # white space alone is no symbol of a model of words
            return after
    else:
        ids, state = prompt_ids(tokenizer, text), None
    logits_V, state = model.logits(ids, state)
    return Continuation(state, np.array(logits_V), ids[-TAIL:], after.position if after else 0)


def arrays(state: Any) -> tuple[NDArray[np.float32], ...]:
    """Return a state, of a decoder or of PyTorch on any device, as arrays."""
    return tuple(np.array(tensor if isinstance(tensor, np.ndarray) else tensor.cpu().numpy()) for tensor in state)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> NDArray[np.int64]:
    """Return the ids that warm the state, at least one.

    Raises:
        VocabularyError: the prompt has symbols, but the model knows none of them.
    """
    ids = _known_ids(tokenizer, prompt)
    if len(ids):
        return ids
    newline = tokenizer.encode("\n").astype(np.int64)
    return newline if newline[0] < tokenizer.size else np.zeros(1, dtype=np.int64)


def _known_ids(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    """Return the ids of `text`, none where it has no symbol; errors as of `prompt_ids`."""
    ids = tokenizer.encode(text).astype(np.int64)
    if len(ids) and (ids == tokenizer.size).all():
        symbol = "word" if tokenizer.name == "word" else "character"
        raise VocabularyError(
            f"The model never saw any {symbol} of the prompt {text!r:.80}.",
            "Give a prompt in the language and script of the text it was trained on.",
        )
    return ids


def choose(logits_V: NDArray[np.float32], sampling: Sampling, u: float) -> int:
    """Return the id that the uniform number `u` in [0, 1) selects.

    Temperature 0 takes the largest logit, the lower id on a tie. Otherwise p = softmax(logits / temperature), cut
    down to the `top_k` largest (the lower id on a tie), then to the fewest whose sum reaches `top_p`, made to sum
    to one again, and the first id whose cumulative probability is above `u` is chosen.
    """
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    scaled = (logits_V.astype(np.float64) - float(np.max(logits_V))) / sampling.temperature
    p = np.exp(scaled)
    p /= p.sum()
    if sampling.top_k is not None or sampling.top_p is not None:
        order = np.argsort(-logits_V, kind="stable")
        keep = len(p) if sampling.top_k is None else min(sampling.top_k, len(p))
        if sampling.top_p is not None:
            reached = np.cumsum(p[order[:keep]] / p[order[:keep]].sum())
            keep = min(int(np.searchsorted(reached, sampling.top_p)) + 1, keep)
        p[order[keep:]] = 0.0
    cumulative = np.cumsum(p)
    chosen = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # Rounding may carry u past the last probable symbol; take that one then.
    return min(chosen, int(np.flatnonzero(p)[-1]))


def uniform(seed: int, stream: int, position: int) -> float:
    """Return the random number in [0, 1) of one symbol: the upper 53 of the first 64 bits that Philox gives."""
    counter = (position & _MASK, position >> 32 & _MASK, stream & _MASK, stream >> 32 & _MASK)
    word_0, word_1, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return float((word_1 << 32 | word_0) >> 11) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return four random 32-bit words: Philox4x32 with 10 rounds."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = product_1 >> 32 ^ c1 ^ k0, product_1 & _MASK, product_0 >> 32 ^ c3 ^ k1, product_0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3
