"""A shuffled order of any length that takes no memory: place i is computed when it is asked for.

A Feistel network over 2b bits is a bijection whatever its rounds compute; places that fall outside of 0 .. n-1 are
sent through it again until they fall inside (cycle walking; Black and Rogaway 2002, *Ciphers with arbitrary finite
domains*).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Permutation:
    """A permutation of 0 .. n-1.

    Args:
        n: how many, at least 1.
        generator: decides which permutation.
    """

    def __init__(self, n: int, generator: np.random.Generator) -> None:
        self.n = n
        bits = max((n - 1).bit_length() + 1, 2) // 2
        self._bits, self._mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        self._keys = generator.integers(0, 1 << 63, size=_ROUNDS, dtype=np.uint64)

    def __getitem__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what stands at each of `places`."""
        found = self._mix(np.asarray(places).astype(np.uint64))
        while (outside := found >= self.n).any():
            found[outside] = self._mix(found[outside])
        return found.astype(np.int64)

    def _mix(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._bits, numbers & self._mask
        for key in self._keys:
            hashed = (right ^ key) * _MULTIPLIER  # wraps
            hashed = (hashed ^ hashed >> np.uint64(29)) * _MULTIPLIER
            left, right = right, left ^ hashed >> np.uint64(32) & self._mask
        return left << self._bits | right
