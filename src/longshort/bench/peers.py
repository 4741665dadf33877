"""Our layer and what it is measured against, built with the same weights and ready to be called.

    torch.nn      PyTorch's layer
    plain         our layer without the option
    eager         our layer on the reference equations: a loop of steps in Python
    torchscript   the same loop, compiled by TorchScript

Every call is given the state before its first step, as a program does that carries its state. A training call is the
forward pass and the gradient for x and all parameters from a given one for the outputs; before it, outside the clock,
gradients are dropped and every parameter of the layer is written in place, as an optimizer would.

    T  steps   B  rows   I  input width   H  hidden units   G  gates times H
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longshort import kernels, layers
from longshort.bench.grids import DEPTH, DIRECTIONS, PROJECTION, SHARED, Case
from longshort.bench.timing import Side
from longshort.errors import UsageError

Run = Callable[[Tensor], Tensor]
_OURS: dict[str, Any] = {"lstm": layers.LSTM, "gru": layers.GRU, "rnn": layers.RNN}
_TORCH: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_DROPOUT, _ZONEOUT = 0.25, 0.1
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "layer_norm": {"layer_norm": True},
    "recurrent_dropout": {"recurrent_dropout": _DROPOUT},
    "zoneout": {"zoneout": _ZONEOUT},
    "peephole": {"peephole": True},
    "coupled_gates": {"coupled_gates": True},
    DIRECTIONS: {"bidirectional": True},
    DEPTH: {"num_layers": 2},
}


def _arguments(case: Case) -> dict[str, Any]:
    """Return the keyword arguments of our layer."""
    return {PROJECTION: case.width} if case.option == PROJECTION else _ARGUMENTS.get(case.option, {})


GEMM_SIZE = 2048
"""Rows and columns of the matrices whose product tells the machine's rate."""


def gemm() -> Side:
    """Return the square matrix product whose rate stands for what this machine can do: 2 `GEMM_SIZE`^3 operations."""
    size = GEMM_SIZE
    a, b, out = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    return Side(lambda: torch.mm(a, b, out=out))


def check_option(cell: str, option: str) -> None:
    """Refuse an option that our layer does not take.

    Raises:
        UsageError: the message names layer and option.
    """
    layer = _OURS[cell]
    case = Case(cell, "infer", 1, 1, 2, threads=1, option=option)
    try:
        layer(2, 2, **_arguments(case))(torch.zeros(1, 1, 2), **_call_arguments(case))
    except TypeError:
        raise UsageError(
            f"longshort.{layer.__name__} has no option {option!r} yet.",
            "Name others with --options, or another --grid.",
        ) from None


def contestants(case: Case, kernel: str = "auto") -> tuple[Side, Side, str]:
    """Return our side, the peer's side, and the name of the implementation that runs ours.

    Args:
        case: what to build; its threads are set by the caller.
        kernel: of ours, a name that `kernels.use` takes.
    """
    torch.manual_seed(0)
    T, B, H = case.T, case.B, case.H
    x_TBI, dy_TBH = torch.randn(T, B, H), torch.randn(T, B, case.output_width)
    # Not one tensor twice: a kernel may treat that as a case of its own.
    widths = (case.width, H)[: 2 if case.cell == "lstm" else 1]
    states = [torch.randn(case.entries, B, width) * 0.1 for width in widths]
    hx: Any = tuple(states) if len(states) == 2 else states[0]
    given = _call_arguments(case)
    ours = our_layer(case)
    peer = peer_of(case, ours)
    runs = [_run(ours, hx, **given), _run(peer, hx, **(given if case.peer == "eager" else {}))]
    if case.peer == "eager":
        runs[1] = kernels.use("reference")(runs[1])
    if case.mode == "train":
        leaves = [x_TBI.clone().requires_grad_() for _ in runs]
        sides = [
            _training(run, layer.train().parameters(), leaf, dy_TBH)
            for run, layer, leaf in zip(runs, (ours, peer), leaves, strict=True)
        ]
    else:
        for layer in (ours, peer):
            layer.eval()
        sides = [Side(partial(run, x_TBI)) for run in runs]
    with kernels.use(kernel), gradients(case):
        name = kernels.explain(ours, x_TBI, **given).name
    return sides[0], sides[1], name


def gradients(case: Case) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which `case` is to be called."""
    if case.mode == "train":
        return contextlib.nullcontext()
    # TorchScript keeps a graph for gradients from training, which refuses inference tensors.
    return torch.no_grad() if case.peer == "torchscript" else torch.inference_mode()


def _call_arguments(case: Case) -> dict[str, Any]:
    return {"lengths": torch.tensor(case.lengths())} if case.option == "lengths" else {}


def our_layer(case: Case) -> nn.Module:
    """Return our layer, as it is made."""
    layer: nn.Module = _OURS[case.cell](case.H, case.H, **_arguments(case))
    return layer


def peer_of(case: Case, ours: nn.Module) -> nn.Module:
    """Return the layer that `ours` is measured against, with the weights of `ours`."""
    if case.peer == "eager":
        return copy.deepcopy(ours)
    peer: nn.Module
    if case.peer == "torchscript":
        peer = ScriptedLSTM(case.H, case.option, case.lengths())
    else:
        arguments = _arguments(case) if case.option in SHARED else {}
        peer = (_TORCH if case.peer == "torch.nn" else _OURS)[case.cell](case.H, case.H, **arguments)
    values, own = ours.state_dict(), peer.state_dict()
    shared = {name: values[name] for name in own.keys() & values.keys() if values[name].shape == own[name].shape}
    peer.load_state_dict(own | shared)
    return peer


def _run(layer: nn.Module, hx: Any, **given: Any) -> Run:
    def run(x_TBI: Tensor) -> Tensor:
        output: Tensor = layer(x_TBI, hx, **given)[0]
        return output

    return run


def _training(run: Run, parameters: Iterable[Tensor], x_TBI: Tensor, dy_TBH: Tensor) -> Side:
    weights = list(parameters)

    def prepare() -> None:
        x_TBI.grad = None
        for weight in weights:
            weight.grad = None
            weight.data.mul_(1)

    def call() -> None:
        run(x_TBI).backward(dy_TBH)  # type: ignore[no-untyped-call]

    return Side(call, prepare)


# ------------------------------------------------------------------------------------------- the TorchScript loop


class ScriptedLSTM(nn.RNNBase):
    """An LSTM layer written as users write one where `nn.LSTM` lacks an option: a compiled loop of steps.

    The product of the inputs is taken once for all steps, as a good loop does.

    Args:
        hidden_size: H, and the width of the input.
        option: one of `grids.OPTIONS`, or `none`.
        lengths: valid steps of each row, for the option `lengths`.
    """

    def __init__(self, hidden_size: int, option: str, lengths: list[int]) -> None:
        # Without i the weights have three blocks of rows, as the GRU's.
        super().__init__("GRU" if option == "coupled_gates" else "LSTM", hidden_size, hidden_size)
        self.option = option
        for gate in "ifo" if option == "peephole" else "":
            self.register_parameter(f"weight_c{gate}_l0", nn.Parameter(torch.zeros(hidden_size)))
        self.lengths = torch.tensor(lengths)
        # Of the input's and the state's share of the gates, which have biases already, and of the cell state.
        G = 4 * hidden_size
        norms = [nn.LayerNorm(G, bias=False), nn.LayerNorm(G, bias=False), nn.LayerNorm(hidden_size)]
        self.norms = nn.ModuleList(norms if option == "layer_norm" else [])

    def forward(self, x_TBI: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layer over a sequence (T, B, I) from a state of two tensors (1, B, H)."""
        loop = _compiled_loop()
        y_TBH, h_BH, c_BH = loop(
            x_TBI,
            state[0][0],
            state[1][0],
            self.all_weights[0],
            list(self.norms.parameters()),
            [self.weight_ci_l0, self.weight_cf_l0, self.weight_co_l0] if self.option == "peephole" else [],
            self.lengths if self.option == "lengths" else None,
            _DROPOUT if self.option == "recurrent_dropout" and self.training else 0.0,
            _ZONEOUT if self.option == "zoneout" else 0.0,
            self.training,
        )
        return y_TBH, (h_BH.unsqueeze(0), c_BH.unsqueeze(0))


@cache
def _compiled_loop() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates TorchScript, yet programs that use it are a peer
        compiled: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.jit.script(_loop)
    return compiled


def _loop(
    x_TBI: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    weights: list[Tensor],
    norms: list[Tensor],
    peepholes: list[Tensor],
    lengths_B: Tensor | None,
    drop: float,
    zoneout: float,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    G, H = weight_hh.size(0), weight_hh.size(1)
    normal, looks = len(norms) > 0, len(peepholes) > 0
    if normal:
        x_TBG = F.layer_norm(F.linear(x_TBI, weight_ih), [G], norms[0]) + bias_ih
    else:
        x_TBG = F.linear(x_TBI, weight_ih, bias_ih)
    mask_BH = F.dropout(torch.ones_like(h_BH), drop) if drop > 0 else h_BH
    outputs: list[Tensor] = []
    # One unbind, and not a slice a step: each slice's gradient would be a zero tensor of the whole sequence's size.
    for t, x_BG in enumerate(x_TBG.unbind(0)):
        kept_BH = h_BH * mask_BH if drop > 0 else h_BH
        if normal:
            h_BG = F.layer_norm(F.linear(kept_BH, weight_hh), [G], norms[1]) + bias_hh
        else:
            h_BG = F.linear(kept_BH, weight_hh, bias_hh)
        gates = (x_BG + h_BG).chunk(G // H, 1)
        f, g, o = gates[-3], gates[-2], gates[-1]
        if looks:
            f = f + peepholes[1] * c_BH
        f = torch.sigmoid(f)
        before_i = gates[0] + peepholes[0] * c_BH if looks else gates[0]
        i = 1 - f if len(gates) == 3 else torch.sigmoid(before_i)
        c_new = f * c_BH + i * torch.tanh(g)
        if looks:
            o = o + peepholes[2] * c_new
        shown = F.layer_norm(c_new, [H], norms[2], norms[3]) if normal else c_new
        h_new = torch.sigmoid(o) * torch.tanh(shown)
        if zoneout > 0:
            if training:
                h_new = torch.where(torch.rand_like(h_BH) < zoneout, h_BH, h_new)
            else:
                h_new = h_new + zoneout * (h_BH - h_new)
        y_BH = h_new
        if lengths_B is not None:
            valid_B1 = (lengths_B > t).unsqueeze(1)
            y_BH = torch.where(valid_B1, h_new, torch.zeros_like(h_new))
            h_new = torch.where(valid_B1, h_new, h_BH)
            c_new = torch.where(valid_B1, c_new, c_BH)
        outputs.append(y_BH)
        h_BH, c_BH = h_new, c_new
    return torch.stack(outputs), h_BH, c_BH
