"""Memory that goes from one call of a layer to the next: fresh pages are not for nothing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from longshort import machine, native

_uses: Any = getattr(torch._C, "_storage_Use_Count", None)
"""How many have a storage, by its address: what PyTorch keeps for itself, so `_alone` makes sure of it."""

_keeps_graph: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
"""Whether the backward pass that runs leaves the graph for another one: what PyTorch keeps for itself, too."""

T = TypeVar("T")
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


def _is_free(kept: Kept) -> bool:
    """Return whether nobody else has that memory, and nobody has moved it."""
    return kept[0].data_ptr() == kept[1] and _holders(kept) == _alone()


def _take(kept: list[T], fits: Callable[[T], bool]) -> T | None:
    """Take the first that fits out of a list, or None; no two threads take the same."""
    for _ in range(len(kept)):
        try:
            one = kept.pop(0)
        except IndexError:  # others have it
            break
        if fits(one):
            return one
        kept.append(one)
    return None


LARGE = 1 << 20
"""Numbers of what is large: such memory often comes anew from the system, page by page, and small pages are many."""


def prefer_large_pages(tensor: Tensor) -> Tensor:
    """Return memory that is about to be written as a whole, in large pages where it is large."""
    library = native.library()
    if tensor.numel() >= LARGE and library is not None:
        library.ls_prefer_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def large(floats: int) -> Tensor:
    """Return new memory for `floats`."""
    return prefer_large_pages(torch.empty(floats, dtype=torch.float32, device="cpu"))


class Saved:
    """What a forward pass keeps for its backward pass: memory that goes to the next forward pass afterwards.

    Where hooks see what PyTorch saves (activation checkpointing makes it anew, `save_on_cpu` has it elsewhere), they
    see this too: it is new memory then, which `keep` gives to PyTorch, and which waits for nobody.
    """

    MOST = 8
    MOST_BYTES = max(256 << 20, machine.memory() // 8)
    """What all that wait for their next forward pass take."""
    LEAST = LARGE
    """Numbers of those that are counted: many small ones are not worth it."""

    _free: ClassVar[list[Tensor]] = []

    def __init__(self, floats: int) -> None:
        self.hooked = True  # until there is memory that could wait
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        found = None
        if not hooked:
            found = _take(self._free, lambda tensor: floats <= tensor.numel() <= 2 * floats + 4096)
        self.tensor = large(floats) if found is None else found
        self.hooked = hooked

    def __del__(self) -> None:
        if self.hooked:
            return
        waiting, large = self._free, self.tensor.numel() >= self.LEAST
        waiting.append(self.tensor)
        while len(waiting) > self.MOST or (large and sum(each.nbytes for each in [*waiting]) > self.MOST_BYTES):
            try:
                del waiting[0]  # what has waited longest
            except IndexError:  # others have taken it
                break


def keep(ctx: Any, tensors: Sequence[Tensor | None], output: Tensor, saved: Sequence[Saved]) -> None:
    """Keep until the backward pass what it needs; `ctx` is that of an autograd function.

    Args:
        ctx: of the forward pass.
        tensors: inputs; None of those that there are not.
        output: y, which the caller may change in place, as that of PyTorch's GRU.
        saved: what the library filled, one at least.
    """
    ctx.num_hooked = len(saved) if saved[0].hooked else 0
    if ctx.num_hooked:
        tensors = (*tensors, output, *(each.tensor for each in saved))
    else:
        ctx.output, ctx.version, ctx.saved = output.detach(), output._version, saved
    ctx.sizes = [None if tensor is None else tensor.shape for tensor in tensors]
    ctx.save_for_backward(*tensors)


def kept(ctx: Any) -> tuple[Sequence[Any], Tensor | None, Sequence[Tensor]]:
    """Return the tensors that `keep` was given, the output, or None where it has been changed, and the memory.

    All are contiguous but the first, which is so in its last dimension.

    Raises:
        RuntimeError: a tensor has another shape, type or device now, or a hook gave back such a one.
    """
    tensors = ctx.saved_tensors  # first: it says where there has been a backward pass already
    first, apart = tensors[0], False
    for tensor, size in zip(tensors, ctx.sizes, strict=True):
        if tensor is None:
            continue
        if tensor.shape != size or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            what = "Input, state and weights of a layer must stay as they are until its backward pass"
            if ctx.num_hooked:
                what = "A hook of saved tensors must give back what it took"
            raise RuntimeError(
                f"{what}: {tuple(size)} of torch.float32 on the CPU, "
                f"not {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}."
            )
        if not tensor.is_contiguous() and (tensor is not first or tensor.stride(-1) != 1):
            apart = True
    if apart:
        with torch.enable_grad():  # equations may be run on them
            tensors = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    if not ctx.num_hooked:
        output = ctx.output if ctx.output._version == ctx.version else None
        return tensors, output, [each.tensor for each in ctx.saved]
    count = len(tensors) - ctx.num_hooked
    return tensors[: count - 1], tensors[count - 1], tensors[count:]


def release(ctx: Any) -> None:
    """Let go of the memory after a backward pass, as PyTorch does of tensors, unless another is to come.

    The graph can live longer: in a loop `loss` is the last step's until the next one has its own.
    """
    if not _keeps_graph():
        ctx.output, ctx.saved = None, ()


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
        found = _take(kept, _is_free)
        if found is None:
            return cls._new(weight)
        gradient = found[0].data
        kept.append(found)
        return gradient

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


def drop() -> None:
    """Forget all memory that waits for its next call."""
    Saved._free.clear()
    Gradients.drop()
