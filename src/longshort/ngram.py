"""Models that only count: what a recurrent network has to beat.

`counted_perplexity` scores a text by the frequencies of that same text: how much of a training perplexity is mere
memory of short contexts. `NGram.perplexity` scores text that was not counted, smoothed after Witten and Bell (1991): a
context c of n - 1 symbols that was seen N(c) times, followed by D(c) different symbols, gives

    p(s | c) = (count(c s) + D(c) p(s | c shortened by one)) / (N(c) + D(c))

down to the uniform distribution over the vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter


def counted_perplexity(text: str, order: int) -> float:
    """Return the perplexity of `text` under its own conditional frequencies of `order` symbols."""
    grams = Counter(text[i : i + order] for i in range(len(text) - order + 1))
    contexts: Counter[str] = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    total = sum(grams.values())
    nats = -sum(count * math.log(count / contexts[gram[:-1]]) for gram, count in grams.items())
    return math.exp(nats / total)


class NGram:
    """An n-gram model with Witten-Bell smoothing.

    Args:
        text: what is counted.
        order: n, the symbols of a context and the one that follows it.
    """

    def __init__(self, text: str, order: int) -> None:
        self.order = order
        self.vocabulary = set(text)
        self._counts: list[Counter[str]] = []
        self._totals: list[Counter[str]] = []
        self._kinds: list[Counter[str]] = []
        for n in range(1, order + 1):
            counts = Counter(text[i : i + n] for i in range(len(text) - n + 1))
            totals: Counter[str] = Counter()
            kinds: Counter[str] = Counter()
            for gram, count in counts.items():
                totals[gram[:-1]] += count
                kinds[gram[:-1]] += 1
            self._counts.append(counts)
            self._totals.append(totals)
            self._kinds.append(kinds)

    def probability(self, context: str, symbol: str) -> float:
        """Return p(symbol | context); the last n - 1 symbols of the context count."""
        p = 1 / len(self.vocabulary)
        for n in range(1, self.order + 1):
            if len(context) < n - 1:
                break
            seen = context[len(context) - n + 1 :]
            total, kinds = self._totals[n - 1][seen], self._kinds[n - 1][seen]
            if total:
                p = (self._counts[n - 1][seen + symbol] + kinds * p) / (total + kinds)
        return p

    def perplexity(self, text: str) -> float:
        """Return the perplexity of `text` after its first symbol; symbols that were never counted are skipped."""
        places = [i for i in range(1, len(text)) if text[i] in self.vocabulary]
        nats = -sum(math.log(self.probability(text[max(i - self.order + 1, 0) : i], text[i])) for i in places)
        return math.exp(nats / len(places))
