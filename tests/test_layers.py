"""The layers take the place of `torch.nn`'s: same values, weights, shapes and errors, whatever the kernel."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import longshort
from longshort import kernels
from longshort.errors import UsageError

PAIRS = [(longshort.RNN, nn.RNN), (longshort.GRU, nn.GRU), (longshort.LSTM, nn.LSTM)]
CELL_PAIRS = [(longshort.RNNCell, nn.RNNCell), (longshort.GRUCell, nn.GRUCell), (longshort.LSTMCell, nn.LSTMCell)]


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


def same(ours: Any, theirs: Any) -> None:
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=25)
@given(data=st.data())
def test_drop_in(ours: Any, theirs: Any, kernel: str, data: st.DataObject) -> None:
    arguments: dict[str, Any] = {
        "input_size": data.draw(st.integers(1, 5)),
        "hidden_size": data.draw(st.integers(2, 6)),
        "num_layers": data.draw(st.integers(1, 3)),
        "bias": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
        "bidirectional": data.draw(st.booleans()),
        "dtype": torch.float64,
    }
    if theirs is nn.LSTM:
        arguments["proj_size"] = data.draw(st.integers(0, arguments["hidden_size"] - 1))
    if theirs is nn.RNN:
        arguments["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    layer, peer = ours(**arguments), theirs(**arguments)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    layer.load_state_dict(peer.state_dict())

    T, B = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    batched = data.draw(st.booleans())
    shape = ((B, T) if arguments["batch_first"] else (T, B)) if batched else (T,)
    x = torch.randn(*shape, arguments["input_size"], dtype=torch.float64, requires_grad=True)
    hx = None
    if data.draw(st.booleans()):
        rows = arguments["num_layers"] * (2 if arguments["bidirectional"] else 1)
        widths = [arguments.get("proj_size") or arguments["hidden_size"], arguments["hidden_size"]]
        made = [torch.randn(rows, *([B] if batched else []), w, dtype=torch.float64) for w in widths]
        hx = (made[0], made[1]) if theirs is nn.LSTM else made[0]
    with kernels.use(kernel):
        assert kernels.explain(layer, x).name == kernel
        found = layer(x, hx)
    expected = peer(x, hx)
    same(found, expected)

    loss, peer_loss = found[0].square().sum(), expected[0].square().sum()
    gradients = torch.autograd.grad(loss, [x, *layer.parameters()])
    same(list(gradients), list(torch.autograd.grad(peer_loss, [x, *peer.parameters()])))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_state_dict_goes_both_ways_and_copies_are_whole(ours: Any, theirs: Any) -> None:
    layer, peer = ours(3, 4, 2, bidirectional=True), theirs(3, 4, 2, bidirectional=True)
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(5, 2, 3)
    same(layer(x), peer(x))
    same(copy.deepcopy(layer)(x), peer(x))
    same(pickle.loads(pickle.dumps(layer))(x), peer(x))
    same(layer.double()(x.double()), peer.double()(x.double()))
    assert repr(layer) == repr(peer)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_initial_weights(ours: Any, theirs: Any) -> None:
    torch.manual_seed(3)
    layer = ours(3, 4, 2)
    torch.manual_seed(3)
    peer = theirs(3, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), peer.parameters(), strict=True))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_packed_sequences(ours: Any, theirs: Any) -> None:
    layer, peer = ours(3, 4, dtype=torch.float64), theirs(3, 4, dtype=torch.float64)
    layer.load_state_dict(peer.state_dict())
    packed = pack_padded_sequence(torch.randn(6, 3, 3, dtype=torch.float64), [2, 6, 4], enforce_sorted=False)
    found, expected = layer(packed), peer(packed)
    same(found[0].data, expected[0].data)
    same(found[1], expected[1])
    with kernels.use("reference"), pytest.raises(UsageError, match="PackedSequence"):
        layer(packed)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_wrong_shapes_fail_as_in_torch(ours: Any, theirs: Any, kernel: str) -> None:
    layer, peer = ours(3, 4), theirs(3, 4)
    state = torch.zeros(1, 5, 4)
    hx = (state, state) if theirs is nn.LSTM else state
    for x, given_state in ((torch.zeros(2, 3, 7), None), (torch.zeros(2), None), (torch.zeros(2, 3, 3), hx)):
        with pytest.raises((RuntimeError, ValueError)) as expected:
            peer(x, given_state)
        with kernels.use(kernel), pytest.raises(type(expected.value)):
            layer(x, given_state)


@pytest.mark.parametrize("kernel", kernels.available())
def test_dropout_acts_in_training_between_layers_alone(kernel: str) -> None:
    x = torch.randn(4, 2, 3)
    for layer in (longshort.LSTM(3, 64, 2, dropout=0.5), longshort.GRU(3, 64, 2, dropout=0.5)):
        with kernels.use(kernel):
            assert not torch.equal(layer(x)[0], layer(x)[0])
            layer.eval()
            assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_cells_are_drop_in(ours: Any, theirs: Any, bias: bool, batched: bool, with_state: bool, kernel: str) -> None:
    cell, peer = ours(3, 4, bias=bias, dtype=torch.float64), theirs(3, 4, bias=bias, dtype=torch.float64)
    cell.load_state_dict(peer.state_dict())
    x = torch.randn(*([2] if batched else []), 3, dtype=torch.float64)
    state = torch.randn(*([2] if batched else []), 4, dtype=torch.float64)
    hx = ((state, state + 1) if theirs is nn.LSTMCell else state) if with_state else None
    with kernels.use(kernel):
        same(cell(x, hx), peer(x, hx))


def test_a_state_of_other_dimensions_is_an_exception_and_not_a_crash() -> None:
    with pytest.raises(ValueError, match="1D like the input, got 3D"):
        longshort.LSTMCell(3, 3)(torch.randn(3), (torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)))
    with pytest.raises(ValueError, match="state of 2 tensors, got 1"):
        longshort.LSTMCell(3, 3)(torch.randn(3), torch.zeros(2, 3, 3))


@pytest.mark.parametrize("kernel", kernels.available())
def test_cells_check_shapes_before_any_kernel_sees_them(kernel: str) -> None:
    cell = longshort.GRUCell(3, 4)
    wrong: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [
        ((5, 3), (1, 4)),
        ((5, 3), (5, 5)),
        ((5, 2), None),
        ((2, 5, 3), None),
        ((3,), (1, 4)),
    ]
    for shape, state in wrong:
        with kernels.use(kernel), pytest.raises((RuntimeError, ValueError), match="GRUCell"):
            cell(torch.zeros(shape), None if state is None else torch.zeros(state))
    with kernels.use(kernel), pytest.raises((RuntimeError, IndexError)):  # PyTorch's own is an IndexError
        longshort.LSTM(3, 4)(torch.zeros(5, 2, 3), torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="nonlinearity"):
        longshort.RNNCell(3, 4, nonlinearity="sigmoid")


def test_relu_cells() -> None:
    cell, peer = longshort.RNNCell(3, 4, nonlinearity="relu"), nn.RNNCell(3, 4, nonlinearity="relu")
    cell.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3)
    for kernel in kernels.available():
        with kernels.use(kernel):
            torch.testing.assert_close(cell(x), peer(x))
    with pytest.raises(ValueError, match="nonlinearity"):
        longshort.RNN(3, 4, nonlinearity="gelu")


def test_kernels_are_listed_forced_and_explained() -> None:
    layer = longshort.LSTM(3, 4)
    assert kernels.active() == "auto"
    with kernels.use("reference"):
        assert kernels.active() == "reference"
        with kernels.use("auto"):
            assert kernels.explain(layer).name == "torch"
        assert str(kernels.explain(layer)) == "reference: forced by kernels.use"
    assert kernels.active() == "auto"
    with pytest.raises(RuntimeError), kernels.use("reference"):
        raise RuntimeError
    assert kernels.active() == "auto"
    with pytest.raises(UsageError, match="Did you mean 'reference'"), kernels.use("refrence"):
        pass
