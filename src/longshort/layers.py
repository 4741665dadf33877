"""Recurrent layers that take the place of `torch.nn.RNN`, `GRU` and `LSTM`, with options that those lack.

Same arguments, same defaults, same parameter names, shapes and initial ranges, same `state_dict`, same errors; the
forward pass runs what `kernels` chooses. They derive from `torch.nn.RNNBase`, as PyTorch's own do, not from
`torch.nn.LSTM` itself, so `isinstance(layer, torch.nn.LSTM)` is False.
"""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from longshort import backends, cells
from longshort.cells import Options, Stack
from longshort.options import LayerOptions, OptionArguments
from longshort.recurrent import RecurrentLayer
from longshort.standins import deep_copy


class RNN(RecurrentLayer):
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
        proj_size: of LSTM alone; here because PyTorch's layer has this place among its arguments.
        device: of the parameters.
        dtype: of the parameters.
        options: what PyTorch's layer lacks, by keyword: `LayerOptions` says what each means.

    Raises:
        ValueError, TypeError: as PyTorch's layer.
        ConfigError: an option, or options together, that make no sense; the message names them.
    """

    torch_type = nn.RNN

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
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        **options: Unpack[OptionArguments],
    ) -> None:
        _refuse_projection(proj_size)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(f"RNN_{nonlinearity.upper()}", *shape, device=device, dtype=dtype, options=options)
        self.nonlinearity = nonlinearity


class GRU(RecurrentLayer):
    """Gated recurrent layers, in the place of `torch.nn.GRU`; arguments as `RNN`, without `nonlinearity`."""

    torch_type = nn.GRU

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
        **options: Unpack[OptionArguments],
    ) -> None:
        _refuse_projection(proj_size)
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__("GRU", *shape, device=device, dtype=dtype, options=options)


class LSTM(RecurrentLayer):
    """Long short-term memory, in the place of `torch.nn.LSTM`; arguments as `GRU`, and `proj_size`.

    Args:
        proj_size: P, the width that the output is projected to; 0 for none.
    """

    torch_type = nn.LSTM

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
        **options: Unpack[OptionArguments],
    ) -> None:
        shape = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        super().__init__("LSTM", *shape, device=device, dtype=dtype, options=options)


def _refuse_projection(proj_size: int) -> None:
    if proj_size:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")


class CellStack(nn.Module):
    """The parameters of a stack of any cell in `cells.CELLS`, named, shaped and drawn as PyTorch does.

    `LanguageModel` runs it through `symbols.run`, as it runs the weights of RNN, GRU and LSTM.
    """

    apart = False
    """Whether one layer is run after the other, since there is dropout between them or they are residual."""

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        layer_norm: bool = False,
        apart: bool = False,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.apart = apart
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.vectors = cells.get_cell(cell).vectors
        gates = len(cells.get_cell(cell).gates) * hidden_size
        bound = 1 / math.sqrt(hidden_size)
        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            shapes: dict[str, tuple[int, ...]]
            shapes = {"weight_ih": (gates, width), "weight_hh": (gates, hidden_size)}
            shapes |= {"bias_ih": (gates,), "bias_hh": (gates,), **dict.fromkeys(self.vectors, (hidden_size,))}
            for name, shape in shapes.items():
                tensor = torch.empty(shape).uniform_(-bound, bound)
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(tensor))
        having = LayerOptions(layer_norm=layer_norm)
        having.check(f"The cell {cell}", hidden_size=hidden_size, num_layers=num_layers, bias=True)
        self._gains = having.parameter_sizes(Stack(cell, input_size, hidden_size, num_layers))
        for layer in range(num_layers):
            gains = {name: nn.Parameter(torch.empty(size)) for name, size in self._gains.items()}
            for name, gain in gains.items():
                self.register_parameter(f"{name}_l{layer}", gain)
            having.initialise(Stack(cell, input_size, hidden_size), gains)
        self.flatten_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.flatten_parameters()
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deep_copy(self, memo)

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN, where it can run them."""
        weights = [weight for own in self.all_weights for weight in own]
        stack = Stack(self.cell, weights[0].shape[1], self.hidden_size, self.num_layers)
        backends.lay_for_cudnn(stack, weights, self.apart)

    @property
    def options(self) -> list[Options]:
        """What each layer has beside its weights, where it has anything."""
        layers = range(self.num_layers) if self._gains else ()
        return [Options(**{name: getattr(self, f"{name}_l{layer}") for name in self._gains}) for layer in layers]

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer, in PyTorch's order."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *self.vectors)
        return [[getattr(self, f"{name}_l{layer}") for name in names] for layer in range(self.num_layers)]
