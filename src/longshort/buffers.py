"""Memory that goes from one call of a layer to the next: fresh pages cost as much as the arithmetic of a few rows."""

from __future__ import annotations

import functools
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor

from longshort import native

_uses: Any = getattr(torch._C, "_storage_Use_Count", None)
"""How many have a storage, by its address: what PyTorch keeps for itself, so `_alone` makes sure of it."""

Kept = tuple[Tensor, int, torch.UntypedStorage]
"""Memory as a tensor; where it lies; and the one object that stands for it in Python."""


def _holders(kept: Kept) -> tuple[int, int]:
    """Return how many have that memory in C++, whom every tensor is among, and how many its object in Python."""
    storage = kept[2]
    return _uses(storage._cdata), sys.getrefcount(storage)


def _keep(tensor: Tensor) -> Kept:
    return tensor, tensor.data_ptr(), tensor.untyped_storage()


@functools.cache
def _alone() -> tuple[int, int] | None:
    """Return what `_holders` gives for memory that nobody else has; None where it does not tell that from the rest."""
    if _uses is None:
        return None
    kept = _keep(torch.empty(1, device="cpu"))
    counts = [_holders(kept)]
    tensor = kept[0].data
    counts.append(_holders(kept))
    storage = tensor.untyped_storage()
    del tensor
    counts.append(_holders(kept))
    del storage
    counts.append(_holders(kept))
    (uses, objects) = one = counts[0]
    return one if counts[1:] == [(uses + 1, objects), (uses, objects + 1), one] else None


def prefer_large_pages(tensor: Tensor) -> Tensor:
    """Return memory that is about to be written as a whole, in large pages where it is large."""
    library = native.library()
    if tensor.nbytes >= 4 << 20 and library is not None:
        library.ls_prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def large(floats: int) -> Tensor:
    """Return new memory for `floats`."""
    return prefer_large_pages(torch.empty(floats, dtype=torch.float32, device="cpu"))


class Saved:
    """What a forward pass keeps for its backward pass: memory that goes to the next forward pass afterwards."""

    _free: ClassVar[list[Tensor]] = []
    MOST = 8

    def __init__(self, floats: int) -> None:
        fitting = [t for t in self._free if floats <= t.numel() <= 2 * floats + 4096]
        self.tensor = min(fitting, key=Tensor.numel) if fitting else large(floats)
        if fitting:
            self._free[:] = [t for t in self._free if t is not self.tensor]

    def __del__(self) -> None:
        if len(self._free) < self.MOST:
            self._free.append(self.tensor)


class Gradients:
    """Gradients of weights, in memory that earlier ones had: a training loop drops them all before the next step.

    Whoever has such a gradient, or a tensor or array that shares its memory, keeps that memory from being used again.
    """

    MOST_BYTES = 256 << 20
    """What all of them take; with more, none is kept."""
    MOST_OF_A_SHAPE = 32
    LEAST = 1 << 15
    """Numbers of those that are kept: less than 128 KB the C library does not get from the system each time."""

    _kept: ClassVar[dict[tuple[torch.Size, torch.dtype], list[Kept]]] = {}
    """By shape and type."""
    _bytes: ClassVar[int] = 0

    @classmethod
    def like(cls, weight: Tensor) -> Tensor:
        """Return a tensor like `weight`, which is contiguous, that is about to be written as a whole."""
        if weight.numel() < cls.LEAST:
            return torch.empty_like(weight)
        kept = cls._kept.get((weight.shape, weight.dtype), [])
        for _ in range(len(kept)):
            try:
                entry = kept.pop(0)  # from now on no other thread sees it
            except IndexError:
                break
            if entry[0].data_ptr() != entry[1]:  # somebody has moved it
                cls._bytes -= entry[0].nbytes
                continue
            gradient = entry[0].data if _holders(entry) == _alone() else None
            kept.append(entry)
            if gradient is not None:
                return gradient
        return cls._new(weight)

    @classmethod
    def _new(cls, weight: Tensor) -> Tensor:
        tensor = prefer_large_pages(torch.empty_like(weight))
        size = tensor.nbytes
        if _alone() is None or size > cls.MOST_BYTES or torch.is_inference_mode_enabled():
            return tensor
        if cls._bytes + size > cls.MOST_BYTES:
            cls.drop()
        kept = cls._kept.setdefault((tensor.shape, tensor.dtype), [])
        if len(kept) < cls.MOST_OF_A_SHAPE:
            kept.append(_keep(tensor))
            cls._bytes += size
            tensor = tensor.data
        return tensor

    @classmethod
    def drop(cls) -> None:
        """Forget all memory that is kept."""
        cls._kept, cls._bytes = {}, 0
