"""One step of a recurrent layer, in the place of `torch.nn.RNNCell`, `GRUCell` and `LSTMCell`.

B  rows   I  input width   H  hidden units
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from longshort import calls, kernels, native
from longshort.cells import State
from longshort.kernels import Choice
from longshort.standins import StandIn


class _CellLayer(StandIn, nn.RNNCellBase):
    """What the three cells share: shapes are checked before any kernel sees them."""

    cell: str
    _num_states = 1

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Run one step.

        Args:
            input: (B, I), or (I) unbatched.
            hx: state, (B, H) or (H); for the LSTM a pair. Zeros if None.

        Returns:
            The next state, shaped as `hx`.

        Raises:
            RuntimeError, ValueError, TypeError: as PyTorch's cell, for shapes and types that do not fit; ValueError
                also where the state has another number of dimensions than the input, which can end the process there.
        """
        if kernels.exporting():
            return self.torch_type.forward(self, input, hx)
        if isinstance(input, fx.Proxy):
            return self.as_node(input, hx)
        pair = self._num_states == 2
        state = () if hx is None else tuple(hx) if pair and isinstance(hx, tuple | list) else (hx,)
        weights = self._weights()
        if not self._fits(input, state, weights):
            return self._complain(input, hx, state)
        unbatched = input.dim() == 1
        if unbatched:
            input, state = input.unsqueeze(0), tuple(tensor.unsqueeze(0) for tensor in state)
        if not state:
            state = (input.new_zeros(input.shape[0], self.hidden_size),) * self._num_states
        after = kernels.run_step(self.choose(input, weights, state), self.cell, input, state, weights)
        if unbatched:
            after = tuple(tensor.squeeze(0) for tensor in after)
        return after if pair else after[0]

    def _weights(self) -> tuple[Tensor | None, ...]:
        """Return the weights as they are now: they may have been exchanged or be computed."""
        names, parameters = ("weight_ih", "weight_hh", "bias_ih", "bias_hh"), self._parameters
        try:
            return tuple([parameters[name] for name in names])
        except KeyError:
            return tuple([getattr(self, name) for name in names])

    def _fits(self, x: Tensor, state: State, weights: tuple[Tensor | None, ...]) -> bool:
        """Whether all shapes and types are right; where they are not, PyTorch's cell is to say what is wrong."""
        I, H, dims, dtype, cpu = self.input_size, self.hidden_size, x.dim(), x.dtype, x.is_cpu
        G = native.GATES[self.cell] * H
        if dims not in (1, 2) or x.shape[-1] != I or (state and len(state) != self._num_states):
            return False
        casts = torch._C._is_any_autocast_enabled()
        shape = (H,) if dims == 1 else (x.shape[0], H)
        expected = [*zip(weights, ((G, I), (G, H), (G,), (G,)), strict=True), *((tensor, shape) for tensor in state)]
        return all(
            tensor is None or (tensor.shape == shape and tensor.is_cpu is cpu and (tensor.dtype is dtype or casts))
            for tensor, shape in expected
        )

    def _complain(self, input: Tensor, hx: Any, state: State) -> Any:
        """Raise what PyTorch's cell raises for arguments that do not fit; return what it gives if it takes them."""
        if input.dim() in (1, 2):
            for index, tensor in enumerate(state):
                name = f"hx[{index}]" if self._num_states == 2 else "hidden"
                if tensor.dim() not in (1, 2):
                    raise ValueError(
                        f"{type(self).__name__}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead"
                    )
                if tensor.dim() != input.dim() and isinstance(hx, tuple | list) is (self._num_states == 2):
                    raise ValueError(
                        f"{type(self).__name__}: Expected {name} to be {input.dim()}D like the input, "
                        f"got {tensor.dim()}D instead"
                    )
        return self.torch_type.forward(self, input, hx)

    def choose(self, x: Any = None, weights: Any = None, state: State = ()) -> Choice:
        """Return the implementation that a step from `x` would run: what `kernels.explain` tells."""
        others = (*(self.parameters() if weights is None else weights), *state)
        grad = calls.differentiates(x, *others)
        size = None if x is None else (1, len(x) if x.dim() == 2 else 1, self.hidden_size)
        return kernels.choose(self.cell, x=x, size=size, grad=grad, others=others)


class RNNCell(_CellLayer):
    """One step of the plain recurrent network, in the place of `torch.nn.RNNCell`."""

    torch_type = nn.RNNCell

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

    torch_type = nn.GRUCell
    cell = "gru"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)


class LSTMCell(_CellLayer):
    """One step of long short-term memory, in the place of `torch.nn.LSTMCell`."""

    torch_type = nn.LSTMCell
    cell = "lstm"
    _num_states = 2

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
