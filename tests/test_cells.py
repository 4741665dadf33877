"""The textbook, the reference equations and `torch.nn` agree in float64 to 1e-10, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from longshort import cells, scratch
from longshort.errors import UsageError

TORCH_LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
# Gates of the textbook (in the order of its parameters) among those of PyTorch.
SCRATCH_GATES = {"rnn": ("h",), "gru": ("r", "z", "n"), "lstm": ("i", "f", "o", "g")}


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def gradient_of(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def double_stack(cell: str, x_TBI: Tensor, layer: nn.RNNBase) -> tuple[Tensor, cells.State]:
    """Run the reference equations with the weights of a PyTorch layer."""
    definition = cells.CELLS[cell]
    shape = (layer.num_layers, x_TBI.shape[1], layer.hidden_size)
    state = tuple(torch.zeros(shape, dtype=x_TBI.dtype) for _ in definition.states)
    return cells.run_stack(definition, x_TBI, state, layer.all_weights, bias=layer.bias)


@pytest.mark.parametrize("cell", sorted(TORCH_LAYERS))
@settings(max_examples=15)
@given(T=st.integers(1, 9), B=st.integers(1, 4), V=st.integers(1, 6), H=st.integers(1, 7), seed=st.integers(0, 99))
def test_textbook_reference_and_torch_agree(cell: str, T: int, B: int, V: int, H: int, seed: int) -> None:
    torch.manual_seed(seed)
    ids_TB = torch.randint(V + 1, (T, B))  # the symbol V is unknown
    params = [torch.randn(p.shape, dtype=torch.float64) for p in scratch.get_params(cell, V, H)]
    for param in params:
        param.requires_grad_()

    # The textbook.
    step = scratch.CELLS[cell].step
    state: tuple[Tensor, ...] = tuple(torch.zeros(B, H, dtype=torch.float64) for _ in cells.CELLS[cell].states)
    x_TBV = scratch.one_hot(ids_TB, V).double()
    outputs = []
    for X in x_TBV:
        state = step(X, state, params[:-2])
        outputs.append(state[0])
    scratch_output = torch.stack(outputs)

    # The same weights as PyTorch lays them out: gates in another order, transposed, and b_hh = 0.
    blocks = {gate: params[3 * i : 3 * i + 3] for i, gate in enumerate(SCRATCH_GATES[cell])}
    order = [blocks[gate] for gate in cells.CELLS[cell].gates]
    layer = TORCH_LAYERS[cell](V, H, dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat([block[0].T for block in order]))
        layer.weight_hh_l0.copy_(torch.cat([block[1].T for block in order]))
        layer.bias_ih_l0.copy_(torch.cat([block[2] for block in order]))
        layer.bias_hh_l0.zero_()
    torch_output, torch_state = layer(x_TBV)
    reference_output, reference_state = double_stack(cell, x_TBV, layer)

    close(scratch_output, torch_output)
    close(reference_output, torch_output)
    torch_states = torch_state if isinstance(torch_state, tuple) else (torch_state,)
    for ours, reference, theirs in zip(state, reference_state, torch_states, strict=True):
        close(ours, theirs[0])
        close(reference, theirs)

    # Gradients of a loss that weighs every output differently.
    weights = torch.randn_like(torch_output)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0")
    (scratch_output * weights).sum().backward()  # type: ignore[no-untyped-call]
    expected = torch.autograd.grad((torch_output * weights).sum(), [getattr(layer, name) for name in names])
    found = torch.autograd.grad((reference_output * weights).sum(), [getattr(layer, name) for name in names])
    for i, (theirs, reference) in enumerate(zip(expected, found, strict=True)):
        close(reference, theirs)
        gradients = [gradient_of(block[i]) for block in order]
        ours = torch.cat([gradient.T for gradient in gradients] if i < 2 else gradients)
        close(ours, theirs)


@pytest.mark.parametrize("cell", sorted(cells.CELLS))
def test_reference_gradients_match_finite_differences_twice(cell: str) -> None:
    torch.manual_seed(0)
    definition = cells.CELLS[cell]
    T, B, inputs, H = 3, 2, 2, 3
    G = len(definition.gates) * H
    shapes = [(T, B, inputs), *[(1, B, H)] * len(definition.states), (G, inputs), (G, H), (G,), (G,)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def run(x_TBI: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, weights = rest[: len(definition.states)], rest[len(definition.states) :]
        output, after = cells.run_stack(definition, x_TBI, state, [weights], bias=True)
        return (output, *after)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_no_quadratic_cost_in_the_number_of_steps() -> None:
    """The backward pass over T steps writes about T times as much as over one, not T squared times."""

    def bytes_written(T: int) -> int:
        x_TBG = torch.randn(T, 1, 32, requires_grad=True)
        state = (torch.zeros(1, 8), torch.zeros(1, 8))
        weights = [torch.zeros(32, 8), torch.randn(32, 8)]
        with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            output, _ = cells.unroll(cells.CELLS["lstm"], x_TBG, state, weights, bias=False)
            output.sum().backward()  # type: ignore[no-untyped-call]
        events = profile.events()
        assert events is not None
        return sum(max(event.self_cpu_memory_usage, 0) for event in events)

    assert bytes_written(256) < 6 * bytes_written(64)


def test_an_unknown_cell_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean 'lstm'"):
        cells.get_cell("lsmt")
