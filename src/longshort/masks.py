"""What dropout and zoneout draw: four decisions from each number that PyTorch's generator gives.

`torch.nn.functional.dropout` draws a number for each, on one thread, for which a training step then waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = 1 << 16
"""Probabilities are rounded to one in so many."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; a model in training is in training afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def bernoulli(shape: Sequence[int], probability: float, like: Tensor) -> Tensor:
    """Return 1 with that probability, else 0, each number by itself.

    Args:
        shape: of the result.
        probability: 0 to 1.
        like: for type and device.
    """
    if not _draws_here(like):
        return torch.bernoulli(like.new_full(tuple(shape), probability))
    return _below(shape, round(probability * PARTS)).to(like.dtype)


def dropout_mask(shape: Sequence[int], share: float, like: Tensor) -> Tensor:
    """Return what inverted dropout multiplies with: 0 for that share, else what makes up for it.

    Args:
        shape: of the result.
        share: that is dropped, 0 to 1.
        like: for type and device.
    """
    if not _draws_here(like):
        return F.dropout(like.new_ones(tuple(shape)), share)
    kept = round((1.0 - share) * PARTS)
    return _below(shape, kept).to(like.dtype).mul_(PARTS / max(kept, 1))


def dropout(x: Tensor, share: float, training: bool = True) -> Tensor:
    """Return x with a share of its numbers dropped and the others scaled, in training; Srivastava et al. 2014."""
    if not training or share == 0.0:
        return x
    return x * dropout_mask(x.shape, share, x) if _draws_here(x) else F.dropout(x, share)


def _draws_here(like: Tensor) -> bool:
    """Whether numbers are drawn by us: transforms and compilers have their own ways, and GPUs their own generators."""
    transforms = torch._C._are_functorch_transforms_active()
    return like.is_cpu and not transforms and not torch.compiler.is_compiling()


def _below(shape: Sequence[int], parts: int) -> Tensor:
    """Return True with the probability of so many `PARTS`."""
    size = math.prod(shape)
    if not 0 < parts < PARTS:
        return torch.full(tuple(shape), parts > 0, dtype=torch.bool, device="cpu")
    drawn = torch.empty((size + 3) // 4, dtype=torch.int64, device="cpu").random_(-(1 << 63), None)
    return (drawn.view(torch.int16)[:size] < parts - PARTS // 2).view(tuple(shape))
