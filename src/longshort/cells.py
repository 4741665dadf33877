"""The reference equations of every cell: pure tensor functions that work in any precision and differentiate twice.

    T  steps   B  rows   I  input width   H  hidden units   G  gates times H, the rows of one gate after the other

A cell is one step: the input's share of the gates, the state and the hidden weights give the next state. The order
of the gates, the names and the shapes of the weights are PyTorch's, so one `state_dict` serves both.

    RNN   h' = tanh(x + W h + b)                            Elman (1990)
    GRU   r, z = sigmoid(x + W h + b)                       Cho et al. (2014), arXiv:1406.1078v1, in cuDNN's form:
          n = tanh(x_n + r * (W_n h + b_n))                 the reset gate acts on the product
          h' = (1 - z) * n + z * h
    LSTM  i, f, o = sigmoid(x + W h + b)                    Hochreiter and Schmidhuber (1997); forget gate of
          g = tanh(x_g + W_g h + b_g)                       Gers, Schmidhuber and Cummins (2000)
          c' = f * c + i * g
          h' = o * tanh(c')

A new cell is a step and an entry in `CELLS`; CONTRIBUTING.md walks through one.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort.errors import UsageError

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor | None], State]
LayerWeights = Sequence[Tensor]
"""Of one layer and direction, as PyTorch orders them: weight_ih (G, I), weight_hh (G, H), then bias_ih (G) and
bias_hh (G) if there are biases, then weight_hr (P, H) if the LSTM projects its output to P."""


def rnn_tanh_step(x_BG: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
    """Plain recurrent network with tanh."""
    (h_BH,) = state
    return (torch.tanh(x_BG + F.linear(h_BH, weight_hh, bias_hh)),)


def rnn_relu_step(x_BG: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
    """Plain recurrent network with the rectifier."""
    (h_BH,) = state
    return (torch.relu(x_BG + F.linear(h_BH, weight_hh, bias_hh)),)


def gru_step(x_BG: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
    """Gated recurrent unit; gates in the order r, z, n."""
    (h_BH,) = state
    x_r, x_z, x_n = x_BG.chunk(3, dim=-1)
    h_r, h_z, h_n = F.linear(h_BH, weight_hh, bias_hh).chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h_BH,)


def lstm_step(x_BG: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor | None) -> State:
    """Long short-term memory; gates in the order i, f, g, o."""
    h_BH, c_BH = state
    i, f, g, o = (x_BG + F.linear(h_BH, weight_hh, bias_hh)).chunk(4, dim=-1)
    c_BH = torch.sigmoid(f) * c_BH + torch.sigmoid(i) * torch.tanh(g)
    return (torch.sigmoid(o) * torch.tanh(c_BH), c_BH)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        step: `step(x_BG, state, weight_hh, bias_hh) -> state`; `x_BG` holds W_ih x + b_ih already.
        gates: names of the row blocks of `weight_ih` and `weight_hh`, H rows each, in their order.
        states: names of the tensors of the state; the first is what the layer puts out.
    """

    step: Step
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)


CELLS: dict[str, Cell] = {
    "rnn": Cell(rnn_tanh_step, gates=("h",)),
    "rnn_relu": Cell(rnn_relu_step, gates=("h",)),
    "gru": Cell(gru_step, gates=("r", "z", "n")),
    "lstm": Cell(lstm_step, gates=("i", "f", "g", "o"), states=("h", "c")),
}


def get_cell(name: str) -> Cell:
    """Return the cell called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name not in CELLS:
        close = difflib.get_close_matches(name.lower(), CELLS, n=1)
        raise UsageError(
            f"There is no cell called {name!r}; there are {', '.join(CELLS)}.",
            f"Did you mean {close[0]!r}?" if close else "CONTRIBUTING.md shows how to add one.",
        )
    return CELLS[name]


def unroll(
    cell: Cell, x_TBG: Tensor, state: State, weights: LayerWeights, *, bias: bool, reverse: bool = False
) -> tuple[Tensor, State]:
    """Run one layer in one direction over a sequence.

    Args:
        cell: the equations.
        x_TBG: the input's share of the gates, W_ih x + b_ih.
        state: before the first step, each tensor (B, H), the first (B, P) where the layer projects.
        weights: of this layer and direction; `weight_ih` and `bias_ih` are not used here.
        bias: whether `weights` has biases.
        reverse: run from the last step to the first.

    Returns:
        The outputs (T, B, H or P), in the order of the input, and the state after the last step that was run.
    """
    weight_hh, bias_hh = weights[1], weights[3] if bias else None
    weight_hr = weights[-1] if len(weights) == (5 if bias else 3) else None
    # One unbind, and not a slice a step: each slice's gradient would be a zero tensor of the whole sequence's size.
    steps = x_TBG.unbind(0)
    outputs = []
    for x_BG in reversed(steps) if reverse else steps:
        state = cell.step(x_BG, state, weight_hh, bias_hh)
        if weight_hr is not None:
            state = (F.linear(state[0], weight_hr), *state[1:])
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def run_stack(
    cell: Cell,
    first: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    bias: bool,
    dropout: float = 0.0,
    bidirectional: bool = False,
    first_is_gates: bool = False,
) -> tuple[Tensor, State]:
    """Run layers, one above the other, over a sequence.

    Args:
        cell: the equations.
        first: input (T, B, I), or with `first_is_gates` the first layer's share of the gates (T, B, G).
        state: each tensor (layers * directions, B, H), as `torch.nn.LSTM` orders them.
        weights: one entry a layer and direction, forward before backward.
        bias: whether the weights have biases.
        dropout: share of each layer's output, except the last's, that is dropped.
        bidirectional: whether every layer has a backward direction too.
        first_is_gates: see `first`; for one direction only.

    Returns:
        The last layer's outputs (T, B, directions * H) and the state after, shaped as the state before.
    """
    directions = 2 if bidirectional else 1
    x_TBI, after = first, []
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            layer_weights = weights[index]
            if first_is_gates and layer == 0:
                x_TBG = x_TBI
            else:
                x_TBG = F.linear(x_TBI, layer_weights[0], layer_weights[2] if bias else None)
            before = tuple(tensor[index] for tensor in state)
            output, last = unroll(cell, x_TBG, before, layer_weights, bias=bias, reverse=direction == 1)
            outputs.append(output)
            after.append(last)
        x_TBI = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
        if dropout and layer + 1 < len(weights) // directions:
            x_TBI = F.dropout(x_TBI, dropout)
    return x_TBI, tuple(torch.stack(tensors) for tensors in zip(*after, strict=True))
