"""Weights as the native kernels read them, kept from one call without gradients to the next."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from longshort import buffers, native
from longshort.calls import WEIGHTS, Call, check, library, weight_fields


class _Packed(NamedTuple):
    """Packed weights, and what they were packed from."""

    key: tuple[object, ...]
    weights: bytes
    """As `ls_weights` has them."""
    sample: int
    tensor: Tensor
    held: tuple[Tensor, ...]
    """The weights' memory: what is computed anew must not come to lie where they were."""


_packed: dict[int, _Packed] = {}
_watched: dict[int, weakref.finalize[..., Tensor]] = {}
"""Who waits for the end of a weight, by its id, to call `_forget`."""


def _forget(owner: int) -> None:
    _packed.pop(owner, None)
    _watched.pop(owner, None)


def unwatch(weights: Iterable[Tensor]) -> None:
    """Forget packed weights, and no longer refer to these weakly: PyTorch exchanges only tensors that nobody does."""
    for weight in weights:
        if (watch := _watched.get(id(weight))) is not None:
            watch.detach()
            _forget(id(weight))


def invalidate() -> None:
    """Forget all packed weights.

    Calls without gradients keep the weights as the kernels read them, until a weight is changed. PyTorch tells of
    changes by its operations, also in place, and of steps of its optimizers. A change behind its back, through `.data`
    or NumPy, is noticed by a sample of the values alone: call this after changing some of them that way.
    """
    _packed.clear()


def _after_step(optimizer: Optimizer, *_: Any) -> None:
    if any(group.get("fused") for group in optimizer.param_groups):  # which change weights without a new version
        invalidate()


register_optimizer_step_post_hook(_after_step)


def pack(call: Call, weights: Sequence[Tensor], I: int) -> Tensor | None:
    """Return the packed weights of one direction, kept from an earlier call where nothing has changed."""
    plain = weights[: call.num_plain]
    try:
        versions = [weight._version for weight in plain]
    except RuntimeError:  # those of inference mode do not tell of changes
        return None
    owner, places = weights[1], list(map(Tensor.data_ptr, plain))
    if 0 in places:  # they only stand for others
        return None
    target = library.ls_active_target() if call.target < 0 else call.target
    key = (target, call.cell, I, call.H, call.projected, places, versions)
    found = _packed.get(id(owner))
    if found is not None and found.key == key and library.ls_sample(found.weights) == found.sample:
        return found.tensor
    code, places_of_all = native.LAYER_CELLS[call.cell], weight_fields(call.bias, places)
    given = WEIGHTS.pack(I, call.H, call.projected, code, 0, *places_of_all)
    packed = buffers.large(library.ls_packed_floats(code, I, call.H, call.projected, target))
    sample = library.ls_sample(given)
    check(library.ls_pack(given, target, packed.data_ptr()))
    if id(owner) not in _watched:
        _watched[id(owner)] = weakref.finalize(owner, _forget, id(owner))
    held = tuple(weight.detach() for weight in plain)
    _packed[id(owner)] = _Packed(key, given, sample, packed, held)
    return packed
