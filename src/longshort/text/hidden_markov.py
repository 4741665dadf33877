"""Made-up sequences with tags, for which the best possible accuracy is known: hidden Markov models.

T  steps   K  tags   V  words

A chain of tags that nobody sees goes on from each to the next with the probabilities of a table, and each tag says a
word with those of another. So p(words) and p(tag at t | words) are exact sums (Rabiner 1989, *A tutorial on hidden
Markov models*): no model can label such sequences more often rightly than one that takes the likeliest, given

    all words           the bound of a tagger that reads in both directions
    words up to t       the bound of one that reads forward
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longshort.errors import ConfigError

Floats = NDArray[np.float64]


class HiddenMarkov:
    """A grammar of tags and words.

    Args:
        start_K: probability of each first tag.
        next_KK: of each tag after each.
        says_KV: of each word, said by each tag.

    Raises:
        ConfigError: these are no probabilities, or do not go together.
    """

    def __init__(self, start_K: Floats, next_KK: Floats, says_KV: Floats) -> None:
        self.start_K, self.next_KK, self.says_KV = (np.asarray(p, np.float64) for p in (start_K, next_KK, says_KV))
        K = len(self.start_K)
        if self.next_KK.shape != (K, K) or self.says_KV.shape[:1] != (K,) or self.says_KV.ndim != 2:
            raise ConfigError(f"Tables of shapes (K), (K, K), (K, V) are wanted; K is {K}.")
        for table in (self.start_K, self.next_KK, self.says_KV):
            if table.min() < 0 or not np.allclose(table.sum(-1), 1):
                raise ConfigError("Every row of a table must hold probabilities that come to 1.")

    @classmethod
    def drawn(cls, tags: int, words: int, seed: int, sharpness: float = 0.3) -> HiddenMarkov:
        """Return a grammar with tables drawn from Dirichlet distributions: the sharper, the lower `sharpness`."""
        generator = np.random.default_rng(seed)
        start = np.full(tags, 1 / tags)
        return cls(
            start,
            generator.dirichlet(np.full(tags, sharpness), size=tags),
            generator.dirichlet(np.full(words, sharpness), size=tags),
        )

    def sample(self, length: int, generator: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return `length` words and their tags."""
        next_KK, says_KV = self.next_KK.cumsum(1), self.says_KV.cumsum(1)
        tags, words = np.zeros(length, np.int64), np.zeros(length, np.int64)
        chances, row_K = generator.random((length, 2)), self.start_K.cumsum()
        for t in range(length):
            tags[t] = _pick(row_K, chances[t, 0])
            words[t] = _pick(says_KV[tags[t]], chances[t, 1])
            row_K = next_KK[tags[t]]
        return words, tags

    def log_likelihood(self, words_T: NDArray[np.int64]) -> float:
        """Return log p of the words, in nats."""
        return float(self._forward(words_T)[1])

    def posterior(self, words_T: NDArray[np.int64], *, forward_only: bool = False) -> Floats:
        """Return p(tag | words), (T, K): of all words, or with `forward_only` of those up to each step."""
        alpha_TK, _ = self._forward(words_T)
        if forward_only:
            return alpha_TK
        beta_K = np.ones(len(self.start_K))
        found_TK = alpha_TK.copy()
        for t in range(len(words_T) - 2, -1, -1):
            beta_K = self.next_KK @ (self.says_KV[:, words_T[t + 1]] * beta_K)
            beta_K /= beta_K.sum()
            found_TK[t] *= beta_K
        posterior_TK: Floats = found_TK / found_TK.sum(1, keepdims=True)
        return posterior_TK

    def _forward(self, words_T: NDArray[np.int64]) -> tuple[Floats, float]:
        alpha_TK, nats, row_K = np.zeros((len(words_T), len(self.start_K))), 0.0, self.start_K
        for t, word in enumerate(words_T):
            alpha_TK[t] = row_K * self.says_KV[:, word]
            scale = alpha_TK[t].sum()
            if scale == 0:  # the grammar never says this
                return alpha_TK, -np.inf
            alpha_TK[t] /= scale
            nats += float(np.log(scale))
            row_K = alpha_TK[t] @ self.next_KK
        return alpha_TK, nats


def _pick(sums_K: Floats, chance: float) -> int:
    """Return the first place whose sum is above `chance`; rounding may leave the last sum below 1."""
    return min(int(np.searchsorted(sums_K, chance, side="right")), len(sums_K) - 1)
