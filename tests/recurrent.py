"""What the tests of layers and cells share: pairs with PyTorch's, and how closely an implementation must agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import longshort

PAIRS = [(longshort.RNN, nn.RNN), (longshort.GRU, nn.GRU), (longshort.LSTM, nn.LSTM)]
CELL_PAIRS = [(longshort.RNNCell, nn.RNNCell), (longshort.GRUCell, nn.GRUCell), (longshort.LSTMCell, nn.LSTMCell)]


def dtype_of(kernel: str) -> torch.dtype:
    """Return the widest type that an implementation runs."""
    return torch.float64 if kernel in ("torch", "reference", "auto") else torch.float32


def flat(result: Any) -> list[Tensor]:
    """Return every tensor in nested tuples and lists, of packed sequences the data."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for part in result for tensor in flat(part)]


def same(ours: Any, theirs: Any, tolerance: float | None = None) -> None:
    """Check that each tensor differs by a share of the largest value at most: 1e-10 in float64, 1e-5 in float32."""
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert a.shape == b.shape
        share = tolerance or (1e-10 if a.dtype is torch.float64 else 1e-5)
        size = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=share * size)


def seeded(seed: int, make: Any, *arguments: Any, **keywords: Any) -> Any:
    """Call `make` with PyTorch's generator at `seed`."""
    torch.manual_seed(seed)
    return make(*arguments, **keywords)
