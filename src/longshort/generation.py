"""Text from a model: warm the state on a prompt, then sample one symbol after the other.

Sampling is repeatable on any machine: the uniform number of each symbol comes from the counter-based generator
Philox4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*) with key = seed and counter =
(stream, position), and is turned into a symbol by the inverse cumulative distribution in the order of ids, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longshort.config import Options, option
from longshort.errors import VocabularyError
from longshort.evaluation import Model
from longshort.text.tokenizers import Tokenizer

_MASK = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How the next symbol is chosen from the model's probabilities."""

    temperature: float = option(0.8, "Below 1 more conservative, above 1 more random; 0 is greedy.", least=0, most=100)
    top_k: int | None = option(None, "Sample from the K most probable symbols only.", least=1)
    top_p: float | None = option(None, "Sample from the fewest symbols that hold this probability.", above=0, most=1)
    seed: int = option(0, "Decides what is sampled.", least=0, most=2**64 - 1)


def generate(
    model: Model,
    tokenizer: Tokenizer,
    prompt: str = "",
    length: int = 500,
    sampling: Sampling | None = None,
    *,
    stream: int = 0,
) -> Iterator[str]:
    """Yield text that continues `prompt`, piece by piece; their concatenation is the whole.

    A model that was trained on lines begins each line, also one that the prompt began, as it learned to: from a zero
    state after a newline.

    Args:
        model: a decoder or a `LanguageModel`.
        tokenizer: the model's.
        prompt: read before the first symbol is sampled; if empty, a newline (or the first symbol) is read instead.
        length: number of symbols to sample.
        sampling: temperature, top-k, top-p, seed.
        stream: number of this text among those of one seed; each has its own random numbers.

    Raises:
        VocabularyError: the prompt holds a symbol that the model never saw, and none that it did.
    """
    sampling = sampling or Sampling()
    newline = tokenizer.newline if model.config.lines else None
    if newline is None:
        logits_V, state = model.logits(prompt_ids(tokenizer, prompt), None)
    else:
        line = prompt.rpartition("\n")[2]
        begun = prompt_ids(tokenizer, line) if line else np.empty(0, dtype=np.int64)
        logits_V, state = model.logits(np.append(newline, begun), None)
    writer = tokenizer.writer(prompt)
    for position in range(length):
        chosen = choose(logits_V, sampling, uniform(sampling.seed, stream, position))
        if piece := writer.write(chosen):
            yield piece
        logits_V, state = model.logits(np.array([chosen]), None if chosen == newline else state)
    if rest := writer.close():
        yield rest


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> NDArray[np.int64]:
    """Return the ids that warm the state, at least one.

    Raises:
        VocabularyError: the prompt has symbols, but the model knows none of them.
    """
    ids = tokenizer.encode(prompt).astype(np.int64)
    if len(ids) == 0:
        newline = tokenizer.encode("\n").astype(np.int64)
        return newline if newline[0] < tokenizer.size else np.zeros(1, dtype=np.int64)
    if (ids == tokenizer.size).all():
        raise VocabularyError(
            f"The model never saw any character of the prompt {prompt!r}.",
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
