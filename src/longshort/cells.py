"""The reference equations of every cell: pure tensor functions that work in any precision and differentiate twice.

    T  steps   B  rows   I  input width   H  hidden units   G  gates times H, the rows of one gate after the other

A cell is one step: the input's and the state's share of the gates, and the state, give the next state. The order of
the gates, the names and the shapes of the weights are PyTorch's, so one `state_dict` serves both.

    RNN   h' = tanh(x + W h + b)                            Elman (1990)
    GRU   r, z = sigmoid(x + W h + b)                       Cho et al. (2014), arXiv:1406.1078v1, in cuDNN's form:
          n = tanh(x_n + r * (W_n h + b_n))                 the reset gate acts on the product
          h' = (1 - z) * n + z * h
    LSTM  i, f, o = sigmoid(x + W h + b)                    Hochreiter and Schmidhuber (1997); forget gate of
          g = tanh(x_g + W_g h + b_g)                       Gers, Schmidhuber and Cummins (2000)
          c' = f * c + i * g
          h' = o * tanh(c')

A new cell is a step and an entry in `CELLS`; CONTRIBUTING.md walks through one. What a direction may have beside its
weights is in `Options`, which rows have which steps in `Sequences`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from longshort import masks
from longshort.config import is_own_cell
from longshort.errors import UsageError

State = tuple[Tensor, ...]
Gates = tuple[Tensor, ...]
Step = Callable[..., tuple[State, Gates]]
LayerWeights = Sequence[Tensor]
"""Of one layer and direction, as PyTorch orders them: weight_ih (G, I), weight_hh (G, H), then bias_ih (G) and
bias_hh (G) if there are biases, then weight_hr (P, H) if the LSTM projects its output to P, or the
cell's vectors (H)."""
Readings = dict[str, Tensor]
"""What one layer and direction had at every step: each gate and each tensor of the state by name, (T, B, H)."""


def rnn_tanh_step(x_BG: Tensor, h_BG: Tensor, state: State) -> tuple[State, Gates]:
    """Plain recurrent network with tanh."""
    h_BH = torch.tanh(x_BG + h_BG)
    return (h_BH,), (h_BH,)


def rnn_relu_step(x_BG: Tensor, h_BG: Tensor, state: State) -> tuple[State, Gates]:
    """Plain recurrent network with the rectifier."""
    h_BH = torch.relu(x_BG + h_BG)
    return (h_BH,), (h_BH,)


def gru_step(x_BG: Tensor, h_BG: Tensor, state: State) -> tuple[State, Gates]:
    """Gated recurrent unit; gates in the order r, z, n."""
    (h_BH,) = state
    x_r, x_z, x_n = x_BG.chunk(3, dim=-1)
    h_r, h_z, h_n = h_BG.chunk(3, dim=-1)
    r = torch.sigmoid(x_r + h_r)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * h_BH,), (r, z, n)


def lstm_step(x_BG: Tensor, h_BG: Tensor, state: State) -> tuple[State, Gates]:
    """Long short-term memory; gates in the order i, f, g, o."""
    _, c_BH = state
    i, f, g, o = (x_BG + h_BG).chunk(4, dim=-1)
    i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
    c_BH = f * c_BH + i * g
    return (o * torch.tanh(c_BH), c_BH), (i, f, g, o)


def lstm_variant_step(x_BG: Tensor, h_BG: Tensor, state: State, options: Options) -> tuple[State, Gates]:
    """Long short-term memory with peepholes, coupled gates or a normalised cell state, each where `options` has it."""
    _, c_BH = state
    gates = (x_BG + h_BG).chunk(3 if options.coupled else 4, dim=-1)
    f, g, o = gates[-3:]
    if options.weight_cf is not None:
        f = f + options.weight_cf * c_BH
    f = torch.sigmoid(f)
    if options.coupled:
        i = 1 - f
    else:
        i = torch.sigmoid(gates[0] if options.weight_ci is None else gates[0] + options.weight_ci * c_BH)
    g = torch.tanh(g)
    c_BH = f * c_BH + i * g
    o = torch.sigmoid(o if options.weight_co is None else o + options.weight_co * c_BH)
    normal_BH = c_BH if options.gamma_c is None else normalise(c_BH, options.gamma_c, options.beta_c)
    return (o * torch.tanh(normal_BH), c_BH), (i, f, g, o)


def normalise(x_BN: Tensor, gamma_N: Tensor, beta_N: Tensor | None = None) -> Tensor:
    """Layer normalisation over the last dimension: Ba, Kiros and Hinton (2016), arXiv:1607.06450."""
    return F.layer_norm(x_BN, x_BN.shape[-1:], gamma_N, beta_N, eps=1e-5)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell.

    Attributes:
        step: `step(x_BG, h_BG, state) -> (state, gates)`; `x_BG` is W_ih x + b_ih, `h_BG` is W_hh h + b_hh.
        gates: names of the gates, H rows of `weight_ih` and `weight_hh` each, in their order.
        states: names of the tensors of the state; the first is what the layer puts out.
        vectors: names of further parameters, (H) each, such as peepholes; the step gets them by name in a dict as its
            fourth argument.
    """

    step: Step
    gates: tuple[str, ...]
    states: tuple[str, ...] = ("h",)
    vectors: tuple[str, ...] = ()

    def stepping(self, vectors: Sequence[Tensor]) -> Step:
        """Return the step with these vectors, in the order of their names, as a function of the other three."""
        return partial(self.step, vectors=dict(zip(self.vectors, vectors, strict=True))) if self.vectors else self.step


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
        if is_own_cell(name):
            raise UsageError(
                f"The cell {name} is one of a user's own, whose file has not been named.",
                f"If you trust it, add: --cell PATH/{name}",
            )
        raise UsageError(
            f"There is no cell called {name!r}; there are {', '.join(CELLS)}.",
            f"Did you mean {close[0]!r}?" if close else "CONTRIBUTING.md shows how to add one.",
        )
    return CELLS[name]


@dataclass(frozen=True)
class Stack:
    """Layers, one above the other: what stays the same from call to call.

    Attributes:
        cell: name of the cell.
        input_size: I.
        hidden_size: H.
        num_layers: number of layers.
        bias: whether the weights have biases.
        bidirectional: whether every layer has a backward direction too.
        proj_size: P, the width that the LSTM's output is projected to; 0 for none.
        coupled: whether the weights lack the rows of the LSTM's i (see `Options`).
        residual: whether every layer but the first adds what it reads to what it puts out; the state is without it.
        num_directions: entries of `options`, of the state and of the grouped weights: one a layer and direction.
        output_size: width of one direction's output, P or H.
        gate_size: G.
        state_sizes: width of each tensor of the state.
        weight_shapes: shapes of all weights, flat, in PyTorch's order.
    """

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    proj_size: int = 0
    coupled: bool = False
    residual: bool = False
    num_directions: int = field(init=False, repr=False, compare=False)
    output_size: int = field(init=False, repr=False, compare=False)
    gate_size: int = field(init=False, repr=False, compare=False)
    state_sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    weight_shapes: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        H, P, D = self.hidden_size, self.proj_size or self.hidden_size, 2 if self.bidirectional else 1
        cell = get_cell(self.cell)
        G = (len(cell.gates) - self.coupled) * H
        shapes: list[tuple[int, ...]] = []
        for index in range(self.num_layers * D):
            shapes += [(G, self.input_size if index < D else D * P), (G, P), *[(G,)] * (2 * self.bias)]
            shapes += [(P, H)] if self.proj_size else []
            shapes += [(H,)] * len(cell.vectors)
        derived = {
            "num_directions": self.num_layers * D,
            "output_size": P,
            "gate_size": G,
            "state_sizes": (P, H)[: len(cell.states)],
            "weight_shapes": tuple(shapes),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def group(self, weights: Sequence[Tensor]) -> list[LayerWeights]:
        """Return flat weights by layer and direction."""
        n = len(self.weight_shapes) // self.num_directions
        return [weights[i : i + n] for i in range(0, len(weights), n)]


@dataclass(frozen=True)
class Sequences:
    """Which rows have which steps, where not every row has every step.

    Attributes:
        counts: (T), int64 on the CPU: how many rows have step t; it never rises.
        order: (B), int64 on the CPU: the rows by falling length, those of equal length as they lie; None where they
            lie by falling length already.
        batch_size: B; more than counts[0] where there are rows of no steps.
        packed: whether input and output hold the steps that there are and no others, (sum of counts, I), all of step
            0 first, as in a `PackedSequence`; else (T, B, I), and the output is 0 where there is no step.
    """

    counts: Tensor
    order: Tensor | None
    batch_size: int
    packed: bool = False

    @property
    def valid_TB(self) -> Tensor:
        """Whether row b has step t: bool (T, B) on the CPU."""
        rank_B = torch.arange(self.batch_size, device="cpu") if self.order is None else self.order.argsort()
        return rank_B < self.counts.unsqueeze(1)

    @cached_property
    def starts(self) -> Tensor:
        """Where the rows of each step begin in packed input: (T), int64 on the CPU."""
        return self.counts.cumsum(0) - self.counts

    @property
    def packed_index(self) -> Tensor:
        """Where in (T * B) the rows of packed input lie: int64 on the CPU."""
        return self.valid_TB.flatten().nonzero().squeeze(1)


GAINS = ("gamma_ih", "gamma_hh", "gamma_c", "beta_c")
"""The fields of `Options` that layer normalisation has, the last two for the LSTM alone."""
VECTORS = (*GAINS, "weight_ci", "weight_cf", "weight_co")
"""The fields of `Options` that are parameters, in the order of the kernel library's `ls_options`."""


@dataclass(frozen=True)
class Options:
    """What one layer and direction has beside its weights, in one call.

    Attributes:
        h_mask_BH: what h is multiplied by where W_hh reads it: recurrent dropout, one mask for the whole sequence (Gal
            and Ghahramani 2016, arXiv:1512.05287).
        zoneout_mask_TBH: where 1, h keeps its value in that step: h' + mask * (h - h') (Krueger et al. 2017,
            arXiv:1606.01305).
        zoneout: the same share of every unit and step, from 0 to 1: the mask's expectation, for evaluation.
        resets_TB: bool, where the state is zero before the step.
        gamma_ih, gamma_hh: (G), gains of the normalised W_ih x and W_hh h; biases are added afterwards.
        gamma_c, beta_c: (H), gain and bias of the normalised c that the LSTM's output reads.
        weight_ci, weight_cf, weight_co: (H), peepholes from c into i and f, from c' into o: Gers and Schmidhuber
            (2000).
        coupled: whether the LSTM's i is 1 - f, and its weights have the rows of f, g and o alone: Greff et al.
            (2017), arXiv:1503.04069.
    """

    h_mask_BH: Tensor | None = None
    zoneout_mask_TBH: Tensor | None = None
    zoneout: float = 0.0
    resets_TB: Tensor | None = None
    gamma_ih: Tensor | None = None
    gamma_hh: Tensor | None = None
    gamma_c: Tensor | None = None
    beta_c: Tensor | None = None
    weight_ci: Tensor | None = None
    weight_cf: Tensor | None = None
    weight_co: Tensor | None = None
    coupled: bool = False

    def contiguous(self) -> Options:
        """Return the same with contiguous masks and resets."""
        names = ("h_mask_BH", "zoneout_mask_TBH", "resets_TB")
        given = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if all(tensor.is_contiguous() for tensor in given.values()):
            return self
        return replace(self, **{name: tensor.contiguous() for name, tensor in given.items()})

    def in_float32(self) -> Options:
        """Return the same with masks and parameters of float32."""
        given = {name: getattr(self, name) for name in ("h_mask_BH", "zoneout_mask_TBH", *VECTORS)}
        return replace(self, **{name: tensor.float() for name, tensor in given.items() if tensor is not None})

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The parameters that there are, by name, in the order of `VECTORS`."""
        return {name: tensor for name in VECTORS if (tensor := getattr(self, name)) is not None}

    def step_of(self, cell: Cell) -> Step:
        """Return the step of `cell` with these options."""
        if self.coupled or self.weight_cf is not None or self.gamma_c is not None:
            return partial(lstm_variant_step, options=self)
        return cell.step

    def read(self, h_BH: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
        """Return the state's share of the gates, W_hh h + b_hh."""
        if self.h_mask_BH is not None:
            h_BH = h_BH * self.h_mask_BH
        return _affine(h_BH, weight_hh, bias_hh, self.gamma_hh)

    def keep(self, t: int, h_BH: Tensor, new_BH: Tensor) -> Tensor:
        """Return h after step t, from h before it and what the cell made of it."""
        if self.zoneout_mask_TBH is not None:
            return new_BH + self.zoneout_mask_TBH[t] * (h_BH - new_BH)
        return new_BH + self.zoneout * (h_BH - new_BH) if self.zoneout else new_BH


NO_OPTIONS = Options()


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None) -> Tensor:
    """Return W x + b, W x normalised if there is a gain."""
    if gamma is None:
        return F.linear(x, weight, bias)
    x = normalise(F.linear(x, weight), gamma)
    return x if bias is None else x + bias


def unroll(
    cell: Cell,
    x_TBG: Tensor,
    state: State,
    weights: LayerWeights,
    *,
    bias: bool,
    reverse: bool = False,
    sequences: Sequences | None = None,
    options: Options = NO_OPTIONS,
    readings: Readings | None = None,
) -> tuple[Tensor, State]:
    """Run one layer in one direction over a sequence.

    Args:
        cell: the equations.
        x_TBG: the input's share of the gates, W_ih x + b_ih.
        state: before the first step, each tensor (B, H), the first (B, P) where the layer projects.
        weights: of this layer and direction; `weight_ih` and `bias_ih` are not used here.
        bias: whether `weights` has biases.
        reverse: run from each row's last step to its first.
        sequences: which rows have which steps; all if None.
        options: what the direction has beside its weights.
        readings: a dict to be filled with every gate and state.

    Returns:
        The outputs (T, B, H or P), in the order of the input, and the state after each row's last step that was run.
    """
    weight_hh, bias_hh = weights[1], weights[3] if bias else None
    further = weights[4 if bias else 2 :]
    weight_hr = further[0] if further and not cell.vectors else None
    step = cell.stepping(further) if cell.vectors else options.step_of(cell)
    valid_TB1 = None if sequences is None else sequences.valid_TB.to(x_TBG.device).unsqueeze(-1)
    resets_TB1 = None if options.resets_TB is None else options.resets_TB.unsqueeze(-1)
    # One unbind, and not a slice a step: each slice's gradient would be a zero tensor of the whole sequence's size.
    steps = x_TBG.unbind(0)
    outputs, seen = [], []
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        before = state
        if resets_TB1 is not None:
            before = tuple(tensor.masked_fill(resets_TB1[t], 0) for tensor in before)
        after, gates = step(steps[t], options.read(before[0], weight_hh, bias_hh), before)
        new_BH = after[0] if weight_hr is None else F.linear(after[0], weight_hr)
        after = (options.keep(t, before[0], new_BH), *after[1:])
        outputs.append(after[0])
        if valid_TB1 is None:
            state = after
        else:  # a row without this step keeps its state and puts out 0
            state = tuple(torch.where(valid_TB1[t], *pair) for pair in zip(after, state, strict=True))
            outputs[-1] = after[0].masked_fill(~valid_TB1[t], 0)
        if readings is not None:
            seen.append((*gates, *after))
    if readings is not None:
        for name, values in zip((*cell.gates, *cell.states), zip(*seen, strict=True), strict=True):
            value_TBH = torch.stack(values[::-1] if reverse else values)
            readings[name] = value_TBH if valid_TB1 is None else value_TBH.masked_fill(~valid_TB1, 0)
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
    sequences: Sequences | None = None,
    options: Sequence[Options] = (),
    readings: list[Readings] | None = None,
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
        sequences: which rows have which steps, not packed; all if None.
        options: one entry a layer and direction, as `weights`; none has any if empty.
        readings: a list to be filled with an entry a layer and direction.

    Returns:
        The last layer's outputs (T, B, directions * H) and the state after, shaped as the state before.
    """
    directions = 2 if bidirectional else 1
    x_TBI, after = first, []
    if sequences is not None:  # what lies where there is no step must reach neither value nor gradient
        x_TBI = x_TBI.masked_fill(~sequences.valid_TB.to(first.device).unsqueeze(-1), 0)
    for layer in range(len(weights) // directions):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            layer_weights = weights[index]
            having = options[index] if options else NO_OPTIONS
            if first_is_gates and layer == 0:
                x_TBG = x_TBI
            else:
                x_TBG = _affine(x_TBI, layer_weights[0], layer_weights[2] if bias else None, having.gamma_ih)
            seen: Readings | None = None if readings is None else {}
            output, last = unroll(
                cell,
                x_TBG,
                tuple(tensor[index] for tensor in state),
                layer_weights,
                bias=bias,
                reverse=direction == 1,
                sequences=sequences,
                options=having,
                readings=seen,
            )
            outputs.append(output)
            after.append(last)
            if readings is not None and seen is not None:
                readings.append(seen)
        x_TBI = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
        if dropout and layer + 1 < len(weights) // directions:
            x_TBI = masks.dropout(x_TBI, dropout)
    return x_TBI, tuple(torch.stack(tensors) for tensors in zip(*after, strict=True))
