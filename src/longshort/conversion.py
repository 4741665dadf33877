"""A whole model's PyTorch layers exchanged for ours, and back: `convert` and `to_torch`.

A module changes its class and nothing else: it stays the same object with the same parameters, buffers, hooks,
parametrizations and place in the model, so an optimizer, a shared layer or a hook goes on as before.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from longshort.cell_layers import GRUCell, LSTMCell, RNNCell
from longshort.errors import UsageError
from longshort.layers import GRU, LSTM, RNN
from longshort.standins import OWN_ATTRIBUTES, StandIn

Module = TypeVar("Module", bound=nn.Module)

_OURS: dict[type[nn.Module], type[nn.Module]] = {
    kind.torch_type: kind for kind in (RNN, GRU, LSTM, RNNCell, GRUCell, LSTMCell)
}
_TORCHS = {ours: torchs for torchs, ours in _OURS.items()}


def convert(module: Module) -> Module:
    """Put longshort's layers and cells in the place of PyTorch's, in `module` and all modules in it.

    `nn.RNN`, `GRU`, `LSTM`, `RNNCell`, `GRUCell` and `LSTMCell` are exchanged; classes derived from them are left.

    Args:
        module: a model, or such a layer itself. It is changed in place.

    Returns:
        `module`.
    """
    for each in module.modules():
        if (ours := _OURS.get(_kind(each))) is not None:
            _become(each, ours)
    return module


def to_torch(module: Module) -> Module:
    """Put PyTorch's layers and cells in the place of longshort's, in `module` and all modules in it.

    Args:
        module: a model, or such a layer itself. It is changed in place.

    Returns:
        `module`.

    Raises:
        UsageError: a layer has options that PyTorch's lacks; the message names both, and nothing was changed.
    """
    found = {name: each for name, each in module.named_modules() if _kind(each) in _TORCHS}
    lacking = {name: each.lacking() for name, each in found.items() if isinstance(each, StandIn)}
    if refused := [f"{name or type(module).__name__}: {', '.join(sorted(it))}" for name, it in lacking.items() if it]:
        raise UsageError(
            f"PyTorch's layers lack options of these layers: {'; '.join(refused)}.", "Nothing was changed."
        )
    for each in found.values():
        _become(each, _TORCHS[_kind(each)])
        for name in OWN_ATTRIBUTES:
            each.__dict__.pop(name, None)
    return module


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, beneath the one that its parametrizations made for it alone."""
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    if parametrize.is_parametrized(module):
        made = type(module)
        own = {name: value for name, value in vars(made).items() if name not in ("__dict__", "__weakref__")}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind
    if isinstance(module, StandIn):
        module.prepare()
