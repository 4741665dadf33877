"""What RNN, GRU and LSTM have beyond PyTorch's: the layers' keyword arguments, checked, and made ready for a call.

    T  steps   B  rows   H  hidden units   P  output width of a direction   G  gates times H

Masks are drawn here and not inside the steps, with PyTorch's generator and in one fixed order, so that every
implementation has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from longshort import masks, native
from longshort.cells import Options, Sequences, Stack
from longshort.errors import ConfigError


class OptionArguments(TypedDict, total=False):
    """The keyword arguments, for type checkers; `LayerOptions` says what they mean."""

    layer_norm: bool
    recurrent_dropout: float
    zoneout: float
    weight_drop: float
    forget_bias: float | None
    learn_initial_state: bool
    peephole: bool
    coupled_gates: bool
    residual: bool


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """The options of a layer.

    Attributes:
        layer_norm: normalise W_ih x and W_hh h (with gains, before the biases) and the c that the LSTM's output reads:
            Ba, Kiros and Hinton (2016), arXiv:1607.06450, as haste has it.
        recurrent_dropout: share of h that is dropped, in training, where W_hh reads it; one mask a sequence: Gal and
            Ghahramani (2016), arXiv:1512.05287.
        zoneout: share of h that keeps its value in a step: drawn for every unit and step in training, its expectation
            in evaluation: Krueger et al. (2017), arXiv:1606.01305.
        weight_drop: share of W_hh that is dropped, in training, drawn once a call: DropConnect, as AWD-LSTM has it:
            Merity, Keskar and Socher (2018), arXiv:1708.02182.
        forget_bias: first value of the forget gate's bias, in `bias_ih`; that in `bias_hh` is 0: Jozefowicz, Zaremba
            and Sutskever (2015). None: drawn as the others. LSTM only.
        learn_initial_state: train the state that the layer starts from where none is given.
        peephole: let the gates see c: Gers and Schmidhuber (2000). LSTM only.
        coupled_gates: i is 1 - f and has no weights: Greff et al. (2017), arXiv:1503.04069. LSTM only.
        residual: every layer but the first adds what it reads to what it puts out: Wu et al. (2016), arXiv:1609.08144,
            section 3.1.
    """

    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    zoneout: float = 0.0
    weight_drop: float = 0.0
    forget_bias: float | None = None
    learn_initial_state: bool = False
    peephole: bool = False
    coupled_gates: bool = False
    residual: bool = False

    @cached_property
    def given(self) -> dict[str, bool | float]:
        """Those that differ from the default, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def check(self, layer: str, *, hidden_size: int, num_layers: int, bias: bool) -> None:
        """Refuse values and combinations that make no sense.

        Raises:
            ConfigError: one of them; the message names it.
        """
        for name in ("layer_norm", "learn_initial_state", "peephole", "coupled_gates", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{layer}: {name} must be True or False, got {getattr(self, name)!r}.")
        for name in ("recurrent_dropout", "zoneout", "weight_drop"):
            share = getattr(self, name)
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
                raise ConfigError(f"{layer}: {name} must be a number from 0 to below 1, got {share!r}.")
        if self.forget_bias is not None:
            if isinstance(self.forget_bias, bool) or not isinstance(self.forget_bias, int | float):
                raise ConfigError(f"{layer}: forget_bias must be a number or None, got {self.forget_bias!r}.")
            if not bias and layer == "LSTM":
                raise ConfigError("LSTM: forget_bias is the value of a bias, and bias=False gives none.")
        for name in ("forget_bias", "peephole", "coupled_gates"):
            if name in self.given and layer != "LSTM":
                raise ConfigError(f"{layer} has no {name}: it acts on gates that only LSTM has.")
        if self.residual and num_layers < 2:
            raise ConfigError(f"{layer}: residual adds up from the second layer on; num_layers is {num_layers}.")
        if self.layer_norm and hidden_size < 2:
            raise ConfigError(f"{layer}: layer_norm needs a hidden_size of at least 2: one number normalised is 0.")

    def needs(self, training: bool) -> frozenset[str]:
        """Return the names of those that a kernel must know of; the others act on weights or states alone."""
        names = {"layer_norm", "zoneout", "peephole", "coupled_gates"} | ({"recurrent_dropout"} if training else set())
        # PyTorch's compiler, before 2.12, knows no set less or with the keys of a dictionary.
        return frozenset(name for name in names if name in self.given)

    def parameter_sizes(self, stack: Stack) -> dict[str, int]:
        """Return the names, without layer and direction, and the sizes of the parameters that they add."""
        G, H = stack.gate_size, stack.hidden_size
        sizes: dict[str, int] = {}
        if self.layer_norm:
            sizes |= native.gain_sizes(stack.cell, G, H)
        if self.peephole:
            sizes |= {} if self.coupled_gates else {"weight_ci": H}
            sizes |= {"weight_cf": H, "weight_co": H}
        if self.learn_initial_state:
            sizes |= dict(zip(("h_0", "c_0"), stack.state_sizes, strict=False))
        return sizes

    def initialise(self, stack: Stack, parameters: Mapping[str, Tensor]) -> None:
        """Set the first values of the parameters of one layer and direction; the usual weights have theirs."""
        bound = 1 / math.sqrt(stack.hidden_size)
        for name in self.parameter_sizes(stack):
            if name.startswith("weight"):
                nn.init.uniform_(parameters[name], -bound, bound)
            else:
                nn.init.constant_(parameters[name], 1.0 if name.startswith("gamma") else 0.0)
        if self.forget_bias is not None:
            forget = 0 if self.coupled_gates else stack.hidden_size
            with torch.no_grad():
                parameters["bias_ih"][forget : forget + stack.hidden_size].fill_(self.forget_bias)
                parameters["bias_hh"][forget : forget + stack.hidden_size].zero_()

    def drop_weights(self, stack: Stack, weights: list[Tensor], training: bool) -> list[Tensor]:
        """Return the flat weights with those of W_hh dropped."""
        if not (self.weight_drop and training):
            return weights
        weights, each = list(weights), len(weights) // stack.num_directions
        for i in range(1, len(weights), each):
            weights[i] = masks.dropout(weights[i], self.weight_drop)
        return weights

    def for_direction(
        self,
        stack: Stack,
        parameters: Mapping[str, Tensor],
        x: Tensor,
        steps: int,
        rows: int,
        *,
        training: bool,
        resets_TB: Tensor | None,
    ) -> Options:
        """Return what a layer and direction has in one call; its masks are drawn.

        Args:
            stack: the layers.
            parameters: those of `parameter_sizes`.
            x: input, for type and device.
            steps: T.
            rows: B.
            training: whether to drop and draw.
            resets_TB: bool, where the state is zero before the step.
        """
        P = stack.output_size
        h_mask_BH = zoneout_mask_TBH = None
        if self.recurrent_dropout and training:
            h_mask_BH = masks.dropout_mask((rows, P), self.recurrent_dropout, x)
        if self.zoneout and training:
            zoneout_mask_TBH = masks.bernoulli((steps, rows, P), self.zoneout, x)
        return Options(
            h_mask_BH=h_mask_BH,
            zoneout_mask_TBH=zoneout_mask_TBH,
            zoneout=0.0 if training else self.zoneout,
            resets_TB=resets_TB,
            coupled=self.coupled_gates,
            **{name: tensor for name, tensor in parameters.items() if name not in ("h_0", "c_0")},
        )


def read_lengths(lengths: Tensor | Sequence[int], steps: int, rows: int) -> Sequences | None:
    """Return which rows have which steps, or None where all have all.

    Args:
        lengths: of the rows, in any order, 0 to `steps` each.
        steps: T.
        rows: B.

    Raises:
        TypeError: they are not integers.
        ValueError: they are not as many as there are rows, or one is out of range; the message says which.
    """
    lengths_B = torch.as_tensor(lengths, device="cpu").detach()
    kind = lengths_B.dtype
    if (kind.is_floating_point or kind.is_complex or kind is torch.bool) and lengths_B.numel():
        raise TypeError(f"lengths: Expected integers, got {kind}")  # (an empty list is made a tensor of floats)
    if lengths_B.shape != (rows,):
        raise ValueError(f"lengths: Expected {rows}, one for each row of the batch, got shape {tuple(lengths_B.shape)}")
    lengths_B = lengths_B.long()
    if torch.compiler.is_compiling():
        order = lengths_B.argsort(descending=True, stable=True)
        return Sequences((torch.arange(steps, device="cpu").unsqueeze(1) < lengths_B).sum(1), order, rows)
    array = lengths_B.numpy()  # PyTorch's operations take longer on so few numbers
    falling = (~array).argsort(kind="stable")  # of -array one number overflows
    longest, shortest = (int(array[falling[0]]), int(array[falling[-1]])) if rows else (steps, steps)
    if shortest < 0 or longest > steps:
        b = int(((array < 0) | (array > steps)).argmax())
        raise ValueError(f"lengths: Expected 0 to {steps}, got {array[b]} for row {b}")
    if shortest == steps:
        return None
    counts = rows - np.bincount(array, minlength=steps + 1).cumsum()[:steps]
    return Sequences(torch.from_numpy(counts), torch.from_numpy(falling), rows)


def read_resets(resets: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `resets`, checked.

    Raises:
        TypeError: they are not a bool tensor.
        ValueError: they have another shape than `shape`.
    """
    if not isinstance(resets, Tensor) or resets.dtype is not torch.bool:
        raise TypeError(f"resets: Expected a bool tensor, got {getattr(resets, 'dtype', type(resets).__name__)}")
    if resets.shape != shape:
        raise ValueError(f"resets: Expected the shape {shape}, got {tuple(resets.shape)}")
    return resets


def reverse_resets(resets_TB: Tensor, sequences: Sequences | None) -> Tensor:
    """Return where the backward direction's state is zero before the step.

    A reset is a border between a step and the one before it, whichever way it is crossed; there is none beyond a
    row's last step.
    """
    if sequences is not None:
        resets_TB = resets_TB & sequences.valid_TB.to(resets_TB.device)
    return torch.cat([resets_TB[1:], torch.zeros_like(resets_TB[:1])])
