"""What RNN, GRU and LSTM share: a call is checked once, made ready and handed to `kernels`.

T  steps   B  rows   I  input width   H  hidden units   P  projected width   L  layers   D  directions
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from longshort import backends, calls, kernels
from longshort.cells import Options, Readings, Sequences, Stack, State
from longshort.errors import UsageError
from longshort.kernels import Choice
from longshort.options import LayerOptions, OptionArguments, read_lengths, read_resets, reverse_resets
from longshort.quick import Quick
from longshort.standins import CACHES, NoKernel, StandIn, deep_copy

_PLAIN = LayerOptions()


class CallArguments(TypedDict, total=False):
    """The keyword arguments of a call, for type checkers.

    `forward` takes them as `**arguments`: PyTorch's older ONNX exporter passes all that it finds named, by position.
    """

    lengths: Tensor | Sequence[int] | None
    return_gates: bool
    resets: Tensor | None


class RecurrentLayer(StandIn, nn.RNNBase):
    """The base of RNN, GRU and LSTM."""

    options: LayerOptions = _PLAIN

    def __init__(self, mode: str, *arguments: Any, options: OptionArguments, **factory: Any) -> None:
        checked = LayerOptions(**options)
        # With i coupled to f, the LSTM's weights have three blocks of rows, as the GRU's.
        super().__init__("GRU" if checked.coupled_gates else mode, *arguments, **factory)
        checked.check(
            self.torch_type.__name__, hidden_size=self.hidden_size, num_layers=self.num_layers, bias=self.bias
        )
        if checked.given:
            self.mode = mode
            self.options = checked
            for names in self._option_names:
                for name, full_name in names.items():
                    tensor = torch.empty(self._option_sizes[name], **factory)
                    self.register_parameter(full_name, nn.Parameter(tensor))
            self._initialise_options()
            self.flatten_parameters()
        self.prepare()

    @property
    def cell(self) -> str:
        """Name of the cell in `cells.CELLS`."""
        return self._stack.cell

    @cached_property
    def _stack(self) -> Stack:
        return self._make_stack()

    def _make_stack(self) -> Stack:
        return Stack(
            {"RNN_TANH": "rnn", "RNN_RELU": "rnn_relu"}.get(self.mode, self.mode.lower()),
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.bidirectional,
            self.proj_size,
            self.options.coupled_gates,
            self.options.residual,
        )

    @cached_property
    def _stock(self) -> bool:
        """Whether PyTorch's layer computes the same."""
        return not self.lacking()

    def lacking(self) -> frozenset[str]:
        """Return the names of the options that PyTorch's layer lacks; `forget_bias` is but a first value."""
        return frozenset(self.options.given.keys() - {"forget_bias"})

    @cached_property
    def _quick(self) -> tuple[Quick | None, Quick | None]:
        """The short way of the usual call to the native kernels, in evaluation and in training, where there is one."""
        options, given = self.options, self.options.given.keys()
        if not (calls.TARGETS and given <= options.needs(training=True) | {"forget_bias", "residual"}):
            return None, None
        each = len(self._flat_weights_names) // len(self._option_names)
        names = [
            [*self._flat_weights_names[i * each : (i + 1) * each], *vectors.values()]
            for i, vectors in enumerate(self._option_names)
        ]
        quick = Quick(self._stack, names, self.batch_first, options, training=False)
        draws = options.recurrent_dropout or options.zoneout
        return quick, Quick(self._stack, names, self.batch_first, options, training=True) if draws else quick

    @cached_property
    def _needs(self) -> tuple[frozenset[str], frozenset[str]]:
        """What `kernels.choose` must know of: in evaluation, and in training."""
        projects = frozenset({"proj_size"} if self.proj_size else ())
        return self.options.needs(False) | projects, self.options.needs(True) | projects

    @cached_property
    def _option_names(self) -> list[dict[str, str]]:
        """Names of the options' parameters, of each layer and direction, by the name without these."""
        suffixes = ("", "_reverse")[: 1 + self.bidirectional]
        return [
            {n: f"{n}_l{k}{suffix}" for n in self._option_sizes} for k in range(self.num_layers) for suffix in suffixes
        ]

    @cached_property
    def _option_sizes(self) -> dict[str, int]:
        return self.options.parameter_sizes(self._stack)

    def reset_parameters(self) -> None:
        """Draw or set the first values of all parameters."""
        super().reset_parameters()
        if self.options.given:
            self._initialise_options()

    def _initialise_options(self) -> None:
        for names, weights in zip(self._option_names, self.all_weights, strict=True):
            parameters = {name: getattr(self, full_name) for name, full_name in names.items()}
            if self.bias:
                parameters |= {"bias_ih": weights[2], "bias_hh": weights[3]}
            self.options.initialise(self._stack, parameters)

    def _weights(self) -> list[Tensor]:
        """Return the flat weights as they are now: they may have been exchanged or be computed."""
        parameters = self._parameters
        try:
            return [parameters[name] for name in self._flat_weights_names]  # type: ignore[misc]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]

    def forward(
        self,
        input: Any,
        hx: Any = None,
        **arguments: Unpack[CallArguments],
    ) -> Any:
        """Run the layer over a sequence.

        Args:
            input: (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, or a `PackedSequence`.
            hx: state before the first step, (L * D, B, H) or unbatched (L * D, H); for the LSTM a pair of these,
                the first P wide where it projects. If None, zeros or what `learn_initial_state` learned.
            lengths: of the rows of batched input, integers in any order, 0 to T. Outputs beyond a row's end are 0, its
                state after is that of its last step (of none: `hx`), and its backward direction starts at that step.
            return_gates: whether to return also what every layer and direction had at every step.
            resets: bool, (T, B), (B, T) with `batch_first`, or (T): where a new sequence begins inside a row. The state
                is zero before that step, and in the backward direction after it.

        Returns:
            The outputs, shaped as the input and D * H (or D * P) wide, and the state after the last step. With
            `return_gates` also a list with a dict for each layer and direction, in the order of the state: each gate
            and each tensor of the state by its name (`i`, `f`, `g`, `o`, `h`, `c`; `r`, `z`, `n`, `h`; `h`), shaped as
            the input and H wide.

        Raises:
            RuntimeError, ValueError, TypeError: shapes and types that do not fit; where PyTorch's layer takes the
                argument too, its exception.
            UsageError: arguments that do not go together.
        """
        quick = self._quick[int(self.training)]  # PyTorch's compiler, before 2.12, takes no bool for an index
        if quick is not None and quick.batch_first is not self.batch_first:  # set since then
            self.__dict__.pop("_quick", None)
            quick = self._quick[int(self.training)]
        target = None if quick is None else kernels.quick_target()
        if quick is not None and target is not None and (not arguments or [*arguments] == ["lengths"]):
            dropout = self.dropout if self.training else 0.0
            found = quick(self._parameters, input, hx, target, arguments.get("lengths"), dropout)
            if found is not None:
                return found
        return self._call(input, hx, **arguments)

    def _steps_and_rows(self, x: Tensor) -> tuple[int, int]:
        """Return T and B of batched input."""
        first, second = x.shape[:2]
        return (second, first) if self.batch_first else (first, second)

    def _call(
        self,
        input: Any,
        hx: Any,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        return_gates: bool = False,
        resets: Tensor | None = None,
    ) -> Any:
        if isinstance(input, fx.Proxy):
            return self.as_node(input, hx, lengths=lengths, return_gates=return_gates, resets=resets)
        plain = lengths is None and resets is None and not return_gates
        if plain and self._stock and kernels.exporting():
            return self.torch_type.forward(self, input, hx)
        if isinstance(input, PackedSequence):
            if not plain:
                raise UsageError("A PackedSequence goes with neither lengths, resets nor return_gates.")
            return self._forward_packed(input, hx)
        weights, state = self._weights(), self._state(hx)
        dims, batch_first = input.dim(), self.batch_first
        rows: Any = None  # unbatched input has none
        if dims == 3:
            steps, rows = self._steps_and_rows(input)
        else:
            steps = len(input) if dims == 2 else 0
        if dims in (2, 3) and not steps and not (plain and self._stock):
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # PyTorch's words
        if not (steps and self._fits(input, rows, state, weights)):
            return self._complain(input, hx, weights, plain)
        if dims == 2:
            if lengths is not None:
                raise UsageError("lengths are of the rows of a batch; this input is unbatched.")
            input = input.unsqueeze(0 if batch_first else 1)
            state = None if state is None else tuple(tensor.unsqueeze(1) for tensor in state)

        sequences = None if lengths is None else read_lengths(lengths, steps, rows)
        if resets is not None:
            shape = (steps,) if rows is None else (rows, steps) if batch_first else (steps, rows)
            resets = read_resets(resets, shape).view(input.shape[:2]).to(input.device)
            resets = resets.T if batch_first else resets
        readings: list[Readings] | None = [] if return_gates else None
        output, state = self._run(
            input, state, weights, steps, 1 if rows is None else rows, batch_first, sequences, resets, readings
        )
        if dims == 2:
            output, state = output.squeeze(0 if batch_first else 1), tuple(tensor.squeeze(1) for tensor in state)
        after = state if len(state) > 1 else state[0]
        if readings is None:
            return output, after
        return output, after, [{n: self._as_input(v, dims) for n, v in reading.items()} for reading in readings]

    def _as_input(self, value_TBH: Tensor, dims: int) -> Tensor:
        if dims == 2:
            return value_TBH.squeeze(1)
        return value_TBH.transpose(0, 1) if self.batch_first else value_TBH

    def _forward_packed(self, input: PackedSequence, hx: Any) -> Any:
        x, counts, order, original = input
        weights, state, sizes = self._weights(), self._state(hx), counts.tolist()
        if sum(sizes) != len(x) or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
            raise RuntimeError(f"The batch_sizes {sizes} of a PackedSequence must fall and sum up to its {len(x)} rows")
        if counts.dtype is not torch.int64 or x.dim() != 2 or not self._fits(x, sizes[0], state, weights):
            return self._complain(input, hx, weights, True)
        if state is not None and order is not None:
            state = tuple(tensor.index_select(1, order) for tensor in state)
        sequences = Sequences(counts.contiguous(), None, sizes[0], packed=True)
        output, state = self._run(x, state, weights, len(sizes), sizes[0], False, sequences, None, None)
        if original is not None:
            state = tuple(tensor.index_select(1, original) for tensor in state)
        return PackedSequence(output, counts, order, original), state if len(state) > 1 else state[0]

    def _run(
        self,
        x: Tensor,
        state: State | None,
        weights: list[Tensor],
        steps: int,
        rows: int,
        batch_first: bool,
        sequences: Sequences | None,
        resets_TB: Tensor | None,
        readings: list[Readings] | None,
    ) -> tuple[Tensor, State]:
        stack, training = self._stack, self.training
        needs = self._needs[int(training)]
        if sequences is not None or resets_TB is not None or readings is not None:
            needs = self._needs_of(
                packed=sequences is not None and sequences.packed,
                lengths=sequences is not None and not sequences.packed,
                resets=resets_TB is not None,
                return_gates=readings is not None,
            )
        having: list[Options] = []
        if self.options.given or resets_TB is not None:
            state, weights, having = self._with_options(x, state, weights, steps, rows, sequences, resets_TB)
        inputs = (x, *weights, *(state or ()), *(tensor for each in having for tensor in each.vectors.values()))
        grad = calls.differentiates(*inputs)
        size = steps, rows, stack.hidden_size
        choice = kernels.choose(stack.cell, needs, x=x, size=size, grad=grad, casts=True, others=inputs)
        return kernels.run_layers(
            choice,
            stack,
            x,
            state,
            weights,
            batch_first=batch_first,
            dropout=self.dropout,
            training=training,
            sequences=sequences,
            options=having,
            readings=readings,
        )

    def _needs_of(self, **arguments: bool) -> frozenset[str]:
        """Return what `kernels.choose` must know of a call that has these arguments."""
        used = [name for name, given in arguments.items() if given]
        needs = self._needs[int(self.training)]
        return needs.union(used) if used else needs

    def _with_options(
        self,
        x: Tensor,
        state: State | None,
        weights: list[Tensor],
        steps: int,
        rows: int,
        sequences: Sequences | None,
        resets_TB: Tensor | None,
    ) -> tuple[State | None, list[Tensor], list[Options]]:
        """Return the state to start from, the weights of this call and what each layer and direction has beside."""
        options, stack = self.options, self._stack
        parameters = [{n: getattr(self, full) for n, full in names.items()} for names in self._option_names]
        if state is None and options.learn_initial_state:
            if resets_TB is not None:
                raise UsageError("resets make the state zero, but learn_initial_state starts from a learned one.")
            names = ("h_0", "c_0")[: len(stack.state_sizes)]
            state = tuple(torch.stack([each[n] for each in parameters]).unsqueeze(1).repeat(1, rows, 1) for n in names)
        weights = options.drop_weights(stack, weights, self.training)
        both = [resets_TB] * stack.num_directions
        if resets_TB is not None and self.bidirectional:
            both[1::2] = [reverse_resets(resets_TB, sequences)] * stack.num_layers
        if not (options.needs(self.training) or resets_TB is not None):
            return state, weights, []
        return (
            state,
            weights,
            [
                options.for_direction(stack, each, x, steps, rows, training=self.training, resets_TB=resets)
                for each, resets in zip(parameters, both, strict=True)
            ],
        )

    def _state(self, hx: Any) -> State | None:
        if hx is None:
            return None
        return tuple(hx) if len(self._stack.state_sizes) > 1 else (hx,)

    def _fits(self, x: Tensor, rows: int | None, state: State | None, weights: list[Tensor]) -> bool:
        """Whether all shapes and types are right; where they are not, PyTorch's layer is to say what is wrong."""
        stack, dtype, cpu = self._stack, x.dtype, x.is_cpu
        casts = torch._C._is_any_autocast_enabled()
        for weight, shape in zip(weights, stack.weight_shapes, strict=True):
            if weight.shape != shape or weight.is_cpu is not cpu or (weight.dtype is not dtype and not casts):
                return False
        if state is not None:
            if len(state) != len(stack.state_sizes):
                return False
            for tensor, width in zip(state, stack.state_sizes, strict=True):
                shape = (stack.num_directions, width) if rows is None else (stack.num_directions, rows, width)
                if tensor.shape != shape or tensor.is_cpu is not cpu or (tensor.dtype is not dtype and not casts):
                    return False
        for names in self._option_names if self._option_sizes else ():
            for name, full_name in names.items():
                vector = getattr(self, full_name)
                if vector.shape != (self._option_sizes[name],) or vector.is_cpu is not cpu:
                    return False
                if vector.dtype is not dtype and not casts:
                    return False
        return x.shape[-1] == stack.input_size

    def _complain(self, input: Any, hx: Any, weights: list[Tensor], plain: bool) -> Any:
        """Raise what PyTorch's layer raises for arguments that do not fit; return what it gives if it takes them."""
        for name, weight, shape in zip(self._flat_weights_names, weights, self._stack.weight_shapes, strict=True):
            if weight.shape != shape:
                raise RuntimeError(f"{name} must have the shape {shape}, got {tuple(weight.shape)}")
        for names in self._option_names:
            for name, full_name in names.items():
                vector, like, size = getattr(self, full_name), weights[0], self._option_sizes[name]
                if vector.shape != (size,) or vector.dtype is not like.dtype or vector.device != like.device:
                    raise RuntimeError(
                        f"{full_name} must have the shape {(size,)}, of {like.dtype} on {like.device}, "
                        f"got {tuple(vector.shape)}, of {vector.dtype} on {vector.device}"
                    )
        with nullcontext() if plain and self._stock else NoKernel():
            return self.torch_type.forward(self, input, hx)

    def choose(self, x: Any = None, *, lengths: Any = None, return_gates: bool = False, resets: Any = None) -> Choice:
        """Return the implementation that a call with these arguments would run: what `kernels.explain` tells."""
        packed, size = isinstance(x, PackedSequence), None
        needs = self._needs_of(
            packed=packed, lengths=lengths is not None, resets=resets is not None, return_gates=return_gates
        )
        if packed:
            size = len(x.batch_sizes), int(x.batch_sizes[0]), self.hidden_size
            x = x.data
        elif x is not None and x.dim() in (2, 3):
            steps, rows = (len(x), 1) if x.dim() == 2 else self._steps_and_rows(x)
            size = steps, rows, self.hidden_size
        grad = calls.differentiates(*self.parameters())
        return kernels.choose(self.cell, needs, x=x, size=size, grad=grad, casts=True)

    def split_directions(self, state: Tensor) -> Tensor:
        """Return a tensor of the state by layer and direction: h_n, c_n, h_0 or c_0.

        Args:
            state: (L * D, B, H), or unbatched (L * D, H): layer 0 forward, layer 0 backward, layer 1 forward, ...

        Returns:
            A view, (L, D, B, H) or (L, D, H): `[-1, 0]` is the last layer's forward direction, `[-1, -1]` its backward
            one where there are two. Their outputs are the first and the second H numbers of the layer's output.

        Raises:
            UsageError: another number of layers and directions.
        """
        L, D = self.num_layers, 1 + self.bidirectional
        if state.dim() not in (2, 3) or len(state) != L * D:
            raise UsageError(
                f"The state of {L} layers in {D} directions has {L * D} entries, got {tuple(state.shape)}."
            )
        return state.view(L, D, *state.shape[1:])

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN, where it can run them."""
        apart = bool(self.options.residual or self.dropout)
        if not (apart or self.options.coupled_gates):
            super().flatten_parameters()
        elif all(isinstance(weight, Tensor) and weight.is_cuda for weight in self._flat_weights):
            backends.lay_for_cudnn(self._make_stack(), self._weights(), apart)

    def extra_repr(self) -> str:
        """Return the arguments as PyTorch's layer shows them, and the options."""
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in self.options.given.items())])

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {name: value for name, value in state.items() if name not in CACHES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.prepare()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deep_copy(self, memo)
