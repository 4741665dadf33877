"""Recurrent layers and cells that take the place of `torch.nn.RNN`, `GRU`, `LSTM` and their cells.

Same arguments, same defaults, same parameter names, shapes and initial ranges, same `state_dict`; the forward pass
runs what `kernels` chooses. They derive from `torch.nn.RNNBase` and `RNNCellBase`, as PyTorch's own do, not from
`torch.nn.LSTM` itself, so `isinstance(layer, torch.nn.LSTM)` is False.

    T  steps   B  rows   I  input width   H  hidden units   P  projected width   L  layers   D  directions
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from longshort import cells, kernels
from longshort.cells import State


class _Layer(nn.RNNBase):
    """What the three layers share: the choice of the kernel, and the reference path."""

    _torch_layer: type[nn.RNNBase]

    @property
    def cell(self) -> str:
        """Name of the cell in `cells.CELLS`."""
        return {"RNN_TANH": "rnn", "RNN_RELU": "rnn_relu"}.get(self.mode, self.mode.lower())

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Run the layer over a sequence.

        Args:
            input: (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, or a `PackedSequence`.
            hx: state before the first step, (L * D, B, H) or unbatched (L * D, H); for the LSTM a pair of these,
                the first P wide where it projects. Zeros if None.

        Returns:
            The outputs, shaped as the input and D * H (or D * P) wide, and the state after the last step.

        Raises:
            RuntimeError, ValueError: as PyTorch's layer, for shapes and types that do not fit.
        """
        choice = kernels.choose(self.cell, packed=isinstance(input, PackedSequence))
        if choice.name == "torch":
            return self._torch_layer.forward(self, input, hx)
        return self._reference(input, hx)

    def _reference(self, input: Tensor, hx: Any) -> Any:
        if input.dim() not in (2, 3):
            raise ValueError(f"{type(self).__name__}: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        x_TBI = (input.transpose(0, 1) if self.batch_first else input) if batched else input.unsqueeze(1)
        self.check_input(x_TBI, None)
        cell = cells.get_cell(self.cell)
        num_layers_directions = self.num_layers * (2 if self.bidirectional else 1)
        widths = [self.proj_size or self.hidden_size, self.hidden_size][: len(cell.states)]
        state: State
        if hx is None:
            state = tuple(x_TBI.new_zeros(num_layers_directions, x_TBI.shape[1], width) for width in widths)
        else:
            state = tuple(hx) if isinstance(hx, tuple | list) else (hx,)
            if len(state) != len(widths):
                raise RuntimeError(
                    f"{type(self).__name__}: Expected a state of {len(widths)} tensors, got {len(state)}"
                )
            if not batched:
                state = tuple(tensor.unsqueeze(1) for tensor in state)
            for tensor, width in zip(state, widths, strict=True):
                expected = (num_layers_directions, x_TBI.shape[1], width)
                self.check_hidden_size(tensor, expected)
        dropout = self.dropout if self.training else 0.0
        output, state = cells.run_stack(
            cell,
            x_TBI,
            state,
            self.all_weights,
            bias=self.bias,
            dropout=dropout,
            bidirectional=self.bidirectional,
        )
        if not batched:
            output, state = output.squeeze(1), tuple(tensor.squeeze(1) for tensor in state)
        elif self.batch_first:
            output = output.transpose(0, 1)
        return output, state if len(state) > 1 else state[0]


class RNN(_Layer):
    """Plain recurrent layers, in the place of `torch.nn.RNN`.

    Args:
        input_size: I.
        hidden_size: H.
        num_layers: L.
        nonlinearity: `tanh` or `relu`.
        bias: whether there are the biases b_ih and b_hh.
        batch_first: whether batched input and output are (B, T, ...).
        dropout: share of every layer's output, except the last's, that is dropped in training.
        bidirectional: whether each layer also runs backward.
        device: of the parameters.
        dtype: of the parameters.
    """

    _torch_layer = nn.RNN

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.nonlinearity = nonlinearity


class GRU(_Layer):
    """Gated recurrent layers, in the place of `torch.nn.GRU`; arguments as `RNN`, without `nonlinearity`."""

    _torch_layer = nn.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )


class LSTM(_Layer):
    """Long short-term memory, in the place of `torch.nn.LSTM`; arguments as `GRU`, and `proj_size`.

    Args:
        proj_size: P, the width that the output is projected to; 0 for none.
    """

    _torch_layer = nn.LSTM

    # The parts of torch.nn.LSTM that differ from RNNBase's because its state is a pair.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args: Any = nn.LSTM.check_forward_args
    permute_hidden: Any = nn.LSTM.permute_hidden

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )


class _CellLayer(nn.RNNCellBase):
    """What the three cells share: shapes are checked before any kernel sees them."""

    _torch_cell: type[nn.RNNCellBase]
    cell: str

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step.

        Args:
            input: (B, I), or (I) unbatched.
            hx: state, (B, H) or (H); for the LSTM a pair. Zeros if None.

        Returns:
            The next state, shaped as `hx`.

        Raises:
            ValueError: the state has another number of dimensions than the input. (PyTorch's LSTMCell ends the
                process on some of these.)
        """
        name, cell = type(self).__name__, cells.get_cell(self.cell)
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"{name}: input has {input.shape[-1]} features, expected {self.input_size}")
        states = () if hx is None else tuple(hx) if isinstance(hx, tuple | list) else (hx,)
        if states and len(states) != len(cell.states):
            raise ValueError(f"{name}: Expected a state of {len(cell.states)} tensors, got {len(states)}")
        expected = (*input.shape[:-1], self.hidden_size)
        for tensor in states:
            if tensor.dim() != input.dim():
                raise ValueError(f"{name}: Expected hx to be {input.dim()}D like the input, got {tensor.dim()}D")
            if tensor.shape != expected:
                raise RuntimeError(f"{name}: hx has the shape {tuple(tensor.shape)}, expected {expected}")
        if kernels.choose(self.cell).name == "torch":
            return self._torch_cell.forward(self, input, hx)
        x_BI = input if input.dim() == 2 else input.unsqueeze(0)
        if not states:
            states = tuple(x_BI.new_zeros(x_BI.shape[0], self.hidden_size) for _ in cell.states)
        elif input.dim() == 1:
            states = tuple(tensor.unsqueeze(0) for tensor in states)
        after = cell.step(
            nn.functional.linear(x_BI, self.weight_ih, self.bias_ih), states, self.weight_hh, self.bias_hh
        )
        if input.dim() == 1:
            after = tuple(tensor.squeeze(0) for tensor in after)
        return after if len(after) > 1 else after[0]


class RNNCell(_CellLayer):
    """One step of the plain recurrent network, in the place of `torch.nn.RNNCell`."""

    _torch_cell = nn.RNNCell

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    @property
    def cell(self) -> str:  # type: ignore[override]
        """Name of the cell in `cells.CELLS`."""
        return "rnn" if self.nonlinearity == "tanh" else "rnn_relu"


class GRUCell(_CellLayer):
    """One step of the gated recurrent unit, in the place of `torch.nn.GRUCell`."""

    _torch_cell = nn.GRUCell
    cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)


class LSTMCell(_CellLayer):
    """One step of long short-term memory, in the place of `torch.nn.LSTMCell`."""

    _torch_cell = nn.LSTMCell
    cell = "lstm"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)


class CellStack(nn.Module):
    """The parameters of a stack of any cell in `cells.CELLS`, named, shaped and drawn as PyTorch does.

    `LanguageModel` runs it through `kernels.run_tokens`, as it runs the weights of RNN, GRU and LSTM.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, num_layers: int = 1) -> None:
        super().__init__()
        self.cell = cell
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        gates = len(cells.get_cell(cell).gates) * hidden_size
        bound = 1 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            shapes: dict[str, tuple[int, ...]]
            shapes = {"weight_ih": (gates, width), "weight_hh": (gates, hidden_size)}
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)}
            for name, shape in shapes.items():
                tensor = torch.empty(shape).uniform_(-bound, bound)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(tensor))

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer, in PyTorch's order."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return [[getattr(self, f"{name}_l{layer}") for name in names] for layer in range(self.num_layers)]
