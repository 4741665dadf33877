"""Keras's recurrent layers as ours, and the weights of ours in Keras's order: `from_keras` and `keras_weights`.

Keras multiplies a row by a matrix from the right: its matrices are (in, gates x H), PyTorch's (gates x H, in).

           PyTorch's gates   Keras's gates   Keras's biases
    RNN                                      one; PyTorch's second is zero
    LSTM   i f g o           i f c o         one; PyTorch's second is zero
    GRU    r z n             z r h           two, of x and of h (`reset_after=True`, the default)

The equations are the same: Keras's h' = z h + (1 - z) hh is PyTorch's (1 - z) n + z h. Keras is not imported: its
layers are asked for their configuration and their arrays, whatever its back end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longshort.errors import UsageError
from longshort.layers import GRU, LSTM, RNN
from longshort.recurrent import RecurrentLayer
from longshort.standins import StandIn

Floats = NDArray[np.floating[Any]]

ORDERS: dict[str, tuple[int, ...]] = {"SimpleRNN": (0,), "LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2)}
"""By Keras's class, where each of PyTorch's gates stands among Keras's. Each of these orders undoes itself."""

_KERAS = {"RNN_TANH": "SimpleRNN", "RNN_RELU": "SimpleRNN", "LSTM": "LSTM", "GRU": "GRU"}
"""Keras's class by the `mode` of a layer of PyTorch's."""


@dataclass(frozen=True)
class _Form:
    """What the layers of one stack have in common."""

    kind: str
    activation: str
    bias: bool
    directions: int


def from_keras(*layers: Any, without_dropout: bool = False) -> RecurrentLayer:
    """Return Keras's layers as one of ours, with copies of their weights.

    Several layers, each of which reads the whole output of the one before, become one of as many layers. How Keras
    calls them (`return_sequences`, `return_state`, `stateful`) is not kept: ours always return the output (B, T, D x H)
    and the states (L x D, B, H), and take the states they are given.

    Args:
        layers: `keras.layers.SimpleRNN`, `GRU`, `LSTM`, or `Bidirectional` of one; each has been built or called.
        without_dropout: leave out `dropout` and `recurrent_dropout`, which are for training alone: Keras draws a mask
            for each gate, as our layers do not. Without it layers that drop are refused.

    Returns:
        `RNN`, `GRU` or `LSTM` with `batch_first=True`, as Keras lays its input; float32, or float64 as the weights.

    Raises:
        UsageError: a layer of another class, or with a setting, that ours do not have; no weights yet; layers that do
            not go together. The message names it.
    """
    if not layers:
        raise UsageError("from_keras was given no layer.", "Wanted: SimpleRNN, GRU, LSTM, or Bidirectional of one.")
    forms, arrays = zip(*(_read(layer, without_dropout) for layer in layers), strict=True)
    form, (kernel, recurrent, *_) = forms[0], arrays[0][0]
    hidden_size = len(recurrent)
    for number, (other, each) in enumerate(zip(forms, arrays, strict=True), 1):
        width = len(kernel) if number == 1 else form.directions * hidden_size
        if other != form or (len(each[0][0]), len(each[0][1])) != (width, hidden_size):
            raise UsageError(
                f"Layer {number} of {len(layers)} does not go with the first: it is {_described(other, each[0])},"
                f" where {_described(form, arrays[0][0])} is.",
                "Layers that become one are of one kind and size. Call from_keras for each.",
            )
    shape = {
        "num_layers": len(layers),
        "bias": form.bias,
        "batch_first": True,
        "bidirectional": form.directions == 2,
        "dtype": torch.float64 if kernel.dtype == np.float64 else torch.float32,
    }
    made: RecurrentLayer
    if form.kind == "SimpleRNN":
        made = RNN(len(kernel), hidden_size, nonlinearity=form.activation, **shape)
    else:
        made = (LSTM if form.kind == "LSTM" else GRU)(len(kernel), hidden_size, **shape)
    with torch.no_grad():
        for own, given in zip(made.all_weights, (of for each in arrays for of in each), strict=True):
            for parameter, array in zip(own, _as_torch(form.kind, given), strict=True):
                parameter.copy_(torch.from_numpy(array))
    return made


def keras_weights(layer: nn.Module) -> list[list[Floats]]:
    """Return the weights of a layer of ours or PyTorch's as `set_weights` of Keras's takes them, a list for each layer.

    A layer in both directions has the arrays of `Bidirectional`: those of the forward layer, then of the backward one.

    Args:
        layer: RNN, GRU or LSTM, on any device, of any number of layers.

    Returns:
        For each layer and direction kernel (I, gates x H), recurrent kernel (H, gates x H) and, with biases, bias
        (gates x H), of a GRU (2, 3 x H); copies, float64 where the layer's are, or float32.

    Raises:
        UsageError: not such a layer, or one with a projection or options that Keras's lack; the message names them.
    """
    if not isinstance(layer, nn.RNNBase):
        raise UsageError(f"keras_weights takes RNN, GRU or LSTM, ours or PyTorch's, not {type(layer).__name__}.")
    lacking = set(layer.lacking()) if isinstance(layer, StandIn) else set()
    if layer.proj_size:
        lacking.add("proj_size")
    if lacking:
        raise UsageError(f"Keras's layers do not do what this one does with {', '.join(sorted(lacking))}.")
    kind, directions = _KERAS[layer.mode], 2 if layer.bidirectional else 1
    made = [_as_keras(kind, weights) for weights in layer.all_weights]
    return [[*chain(*made[at : at + directions])] for at in range(0, len(made), directions)]


def _read(layer: Any, without_dropout: bool) -> tuple[_Form, list[list[Floats]]]:
    """Return the form of a layer, and the arrays of each of its directions."""
    if type(layer).__name__ == "Bidirectional":
        if layer.merge_mode != "concat":
            raise UsageError(f"Our layers put directions side by side (merge_mode='concat'), not {layer.merge_mode!r}.")
        sides = [layer.forward_layer, layer.backward_layer]
    else:
        sides = [layer]
    forms = []
    for side, backward in zip(sides, (False, True), strict=False):
        kind, config = type(side).__name__, side.get_config()
        if kind not in ORDERS:
            raise UsageError(f"from_keras takes {', '.join(ORDERS)} and Bidirectional of one, not {kind}.")
        if config["go_backwards"] is not backward:
            raise UsageError("A layer that goes backwards alone is none of ours.", "Turn its input around instead.")
        if not config.get("reset_after", True):
            raise UsageError(
                "Our GRU, as PyTorch's, multiplies by r after W_hh h (reset_after=True); this one does so before."
            )
        activations = ("tanh", "relu") if kind == "SimpleRNN" else ("tanh",)
        if config["activation"] not in activations:
            raise UsageError(f"{kind}: activation is {config['activation']!r}; ours has {' or '.join(activations)}.")
        if config.get("recurrent_activation", "sigmoid") != "sigmoid":
            raise UsageError(f"{kind}: recurrent_activation is {config['recurrent_activation']!r}; ours has sigmoid.")
        drops = [name for name in ("dropout", "recurrent_dropout") if config[name]]
        if drops and not without_dropout:
            raise UsageError(
                f"{kind} has {' and '.join(drops)} of Keras's kind, a mask for each gate, which our layers have not.",
                "To leave them out, as evaluation does: from_keras(..., without_dropout=True).",
            )
        forms.append(_Form(kind, config["activation"], config["use_bias"], len(sides)))
    arrays = [[_plain(array) for array in side.get_weights()] for side in sides]
    if not all(arrays):
        raise UsageError("The Keras layer has no weights yet.", "Call it on an input first, or its build method.")
    one, other = _described(forms[0], arrays[0]), _described(forms[-1], arrays[-1])
    if one != other:
        raise UsageError(f"The two directions differ: forward {one}, backward {other}.")
    return forms[0], arrays


def _plain(array: Any) -> Floats:
    return np.asarray(array, np.float64 if array.dtype == np.float64 else np.float32)


def _described(form: _Form, arrays: Sequence[Floats]) -> str:
    kernel, recurrent = arrays[:2]
    words = [form.kind, f"{len(kernel)} -> {len(recurrent)}", form.activation, "with" if form.bias else "without"]
    return f"{' '.join(words)} bias, {'both directions' if form.directions == 2 else 'one direction'}"


def _turned(kind: str, array: Floats) -> Floats:
    """Return an array with its gates, which lie along the last axis, in the other's order."""
    gates = np.split(array, len(ORDERS[kind]), axis=-1)
    return np.concatenate([gates[at] for at in ORDERS[kind]], axis=-1)


def _as_torch(kind: str, arrays: Sequence[Floats]) -> list[Floats]:
    kernel, recurrent, *biases = (_turned(kind, array) for array in arrays)
    if biases and kind != "GRU":
        biases = [biases[0], np.zeros_like(biases[0])]
    elif biases:
        biases = list(biases[0])
    return [kernel.T, recurrent.T, *biases]


def _as_keras(kind: str, weights: Sequence[Tensor]) -> list[Floats]:
    double = weights[0].dtype == torch.float64
    plain = (weight.detach().to("cpu", torch.float64 if double else torch.float32).numpy() for weight in weights)
    weight_ih, weight_hh, *biases = plain
    if biases:
        biases = [np.stack(biases) if kind == "GRU" else biases[0] + biases[1]]
    return [np.ascontiguousarray(_turned(kind, array)) for array in (weight_ih.T, weight_hh.T, *biases)]
