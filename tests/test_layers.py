"""The layers take the place of `torch.nn`'s: same values, weights, shapes and errors, whatever the kernel."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import longshort
from longshort import kernels
from longshort.errors import UsageError
from recurrent import CELL_PAIRS, PAIRS, dtype_of, flat, same


def arguments_for(theirs: Any, data: st.DataObject, dtype: torch.dtype) -> dict[str, Any]:
    """Draw the arguments of a layer's constructor."""
    arguments: dict[str, Any] = {
        "input_size": data.draw(st.integers(1, 5)),
        "hidden_size": data.draw(st.integers(2, 6)),
        "num_layers": data.draw(st.integers(1, 3)),
        "bias": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
        "bidirectional": data.draw(st.booleans()),
        "dtype": dtype,
    }
    if theirs is nn.LSTM:
        arguments["proj_size"] = data.draw(st.integers(0, arguments["hidden_size"] - 1))
    if theirs is nn.RNN:
        arguments["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    return arguments


def state_for(theirs: Any, arguments: dict[str, Any], batch: list[int]) -> Any:
    """Return a state to start from."""
    rows = arguments["num_layers"] * (2 if arguments["bidirectional"] else 1)
    widths = [arguments.get("proj_size") or arguments["hidden_size"], arguments["hidden_size"]]
    made = [torch.randn(rows, *batch, width, dtype=arguments["dtype"], requires_grad=True) for width in widths]
    return (made[0], made[1]) if theirs is nn.LSTM else made[0]


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=25)
@given(data=st.data())
def test_drop_in(ours: Any, theirs: Any, kernel: str, data: st.DataObject) -> None:
    dtype = dtype_of(kernel)
    arguments = arguments_for(theirs, data, dtype)
    if dtype is torch.float32 and "proj_size" in arguments:
        arguments["proj_size"] = 0
    layer, peer = ours(**arguments), theirs(**arguments)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {k: v.shape for k, v in peer.state_dict().items()}
    layer.load_state_dict(peer.state_dict())

    T, B = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 4))
    batched = data.draw(st.booleans())
    shape = ((B, T) if arguments["batch_first"] else (T, B)) if batched else (T,)
    x = torch.randn(*shape, arguments["input_size"], dtype=dtype, requires_grad=True)
    hx = state_for(theirs, arguments, [B] if batched else []) if data.draw(st.booleans()) else None
    with kernels.use(kernel):
        assert kernels.explain(layer, x).name == kernel
        found = layer(x, hx)
    expected = peer(x, hx)
    same(found, expected)

    inputs = [x, *([] if hx is None else flat(hx))]
    weights = [torch.randn_like(part) for part in flat(expected)]
    gradients = []
    for result, module in ((found, layer), (expected, peer)):
        loss = torch.stack([(part * w).sum() for part, w in zip(flat(result), weights, strict=True)]).sum()
        gradients.append(torch.autograd.grad(loss, [*inputs, *module.parameters()]))
    same(gradients[0], gradients[1], 1e-4 if dtype is torch.float32 else None)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=25)
@given(data=st.data())
def test_lengths_are_those_of_separate_rows(ours: Any, theirs: Any, kernel: str, data: st.DataObject) -> None:
    """Each row of a padded batch is what PyTorch's layer makes of that row alone, whatever lies in the padding."""
    dtype = dtype_of(kernel)
    arguments = arguments_for(theirs, data, dtype)
    if dtype is torch.float32 and "proj_size" in arguments:
        arguments["proj_size"] = 0
    layer, peer = ours(**arguments), theirs(**arguments)
    layer.load_state_dict(peer.state_dict())
    T = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(0, T), min_size=1, max_size=4))
    B, batch_dim = len(lengths), 0 if arguments["batch_first"] else 1
    x = torch.randn((B, T) if batch_dim == 0 else (T, B), dtype=dtype).unsqueeze(-1) * torch.ones(
        arguments["input_size"], dtype=dtype
    )
    x = x + torch.randn_like(x)
    for b, length in enumerate(lengths):
        x.select(batch_dim, b)[length:] = float("nan")
    x.requires_grad_()
    hx = state_for(theirs, arguments, [B]) if data.draw(st.booleans()) else None
    forms: list[Any] = [list, tuple, torch.tensor, lambda x: torch.tensor(x).int()]
    given_lengths = data.draw(st.sampled_from(forms))(lengths)
    with kernels.use(kernel):
        output, state = layer(x, hx, lengths=given_lengths)
    assert kernels.explain(layer, x, lengths=lengths).name

    expected_output = torch.zeros(output.shape, dtype=dtype)
    zeros = torch.zeros_like(state) if isinstance(state, torch.Tensor) else tuple(torch.zeros_like(s) for s in state)
    expected_state = [part.clone() for part in flat(zeros if hx is None else hx)]
    for b, length in enumerate(lengths):
        if length:
            row = x.select(batch_dim, b)[:length]
            row_hx = None if hx is None else [part[:, b] for part in flat(hx)]
            got, after = peer(row, None if row_hx is None else tuple(row_hx) if len(row_hx) > 1 else row_hx[0])
            expected_output.select(batch_dim, b)[:length] = got
            for part, row_part in zip(expected_state, flat(after), strict=True):
                part[:, b] = row_part
    same(output, expected_output)
    same(flat(state), expected_state)

    inputs = [*([] if hx is None else flat(hx)), *layer.parameters()]
    weights = torch.randn_like(output)
    ours_loss = (output * weights).sum() + sum(part.square().sum() for part in flat(state))
    gradients = torch.autograd.grad(ours_loss, [x, *inputs], allow_unused=True, materialize_grads=True)
    peer_loss = (expected_output * weights).sum() + sum(part.square().sum() for part in expected_state)
    peer_loss = peer_loss + 0 * peer.weight_hh_l0.sum()  # where no row has a step
    peer_inputs = [x, *([] if hx is None else flat(hx)), *peer.parameters()]
    expected = torch.autograd.grad(peer_loss, peer_inputs, allow_unused=True, materialize_grads=True)
    same(gradients, expected, 1e-4 if dtype is torch.float32 else None)
    assert not any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_directions_of_the_state(ours: Any, theirs: Any) -> None:
    layer = ours(3, 4, 2, bidirectional=True)
    output, after = layer(torch.randn(5, 2, 3))
    h_n = after[0] if theirs is nn.LSTM else after
    by_direction = layer.split_directions(h_n)
    assert by_direction.shape == (2, 2, 2, 4)
    assert torch.equal(by_direction[-1, 0], output[-1, :, :4])
    assert torch.equal(by_direction[-1, 1], output[0, :, 4:])
    assert layer.split_directions(h_n[:, 0]).shape == (2, 2, 4)
    with pytest.raises(UsageError, match=r"2 layers in 2 directions has 4 entries, got \(2, 2, 4\)"):
        layer.split_directions(h_n[:2])


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("layers", [1, 2])
def test_batch_first_may_be_set_afterwards(ours: Any, theirs: Any, layers: int) -> None:
    layer, peer, x = ours(3, 4, layers), theirs(3, 4, layers), torch.randn(5, 2, 3)
    layer.load_state_dict(peer.state_dict())
    for batch_first in (True, False):
        layer.batch_first = peer.batch_first = batch_first
        same(layer(x), peer(x))
        with torch.no_grad():
            same(layer(x), peer(x))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_parameters_of_options_that_do_not_fit_are_refused(kernel: str) -> None:
    layer, x = longshort.LSTM(3, 8, layer_norm=True, learn_initial_state=True), torch.randn(5, 2, 3)
    for name, wrong in (
        ("gamma_ih_l0", torch.ones(4)),
        ("gamma_c_l0", torch.ones(8, dtype=torch.float64)),
        ("h_0_l0", torch.ones(2)),
    ):
        right = getattr(layer, name)
        setattr(layer, name, nn.Parameter(wrong))
        with kernels.use(kernel), pytest.raises(RuntimeError, match=f"{name} must have the shape"):
            layer(x)
        setattr(layer, name, right)
    layer(x)


@pytest.mark.parametrize(("arguments", "options"), [({"lengths": [0, 0]}, {}), ({}, {"zoneout": 0.1})])
def test_sequences_of_no_step_are_refused_in_pytorchs_words(arguments: Any, options: Any) -> None:
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        longshort.GRU(3, 4, **options)(torch.randn(0, 2, 3), **arguments)


def test_lengths_that_cannot_be_are_refused() -> None:
    layer, x = longshort.LSTM(3, 4), torch.zeros(5, 2, 3)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ([1, 2, 3], ValueError, r"Expected 2, one for each row of the batch, got shape \(3,\)"),
        ([[1, 2]], ValueError, r"got shape \(1, 2\)"),
        (3, ValueError, r"got shape \(\)"),
        ([], ValueError, r"got shape \(0,\)"),
        ([1, 6], ValueError, "Expected 0 to 5, got 6 for row 1"),
        ([-1, 2], ValueError, "Expected 0 to 5, got -1 for row 0"),
        ([1.0, 2.0], TypeError, "Expected integers, got torch.float32"),
        ([True, False], TypeError, "Expected integers, got torch.bool"),
        (torch.zeros(5, 2, 3), TypeError, "Expected integers"),
    ]
    for lengths, error, message in wrong:
        with pytest.raises(error, match=message):
            layer(x, lengths=lengths)
    with pytest.raises(UsageError, match="unbatched"):
        layer(x[:, 0], lengths=[3])
    for given_arguments in (
        {"lengths": [5, 5]},
        {"return_gates": True},
        {"resets": torch.zeros(5, 2, dtype=torch.bool)},
    ):
        with pytest.raises(UsageError, match="PackedSequence"):
            layer(pack_padded_sequence(x, torch.tensor([5, 5])), **given_arguments)
    with pytest.raises(TypeError, match="length"):
        layer(x, length=[3, 3])


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_half_precision(ours: Any, theirs: Any, dtype: torch.dtype) -> None:
    layer, peer = ours(3, 4, 2).to(dtype), theirs(3, 4, 2).to(dtype)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(5, 2, 3, dtype=dtype)
    for kernel in ("auto", "torch", "reference"):
        with kernels.use(kernel):
            same(layer(x), peer(x), 0.05)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_autocast(ours: Any, theirs: Any) -> None:
    layer, peer = ours(3, 4), theirs(3, 4)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(5, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16), kernels.use("torch"):
        same(layer(x), peer(x), 1e-6)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_same_initial_weights_also_by_position(ours: Any, theirs: Any) -> None:
    nonlinearity = ["relu"] if theirs is nn.RNN else []
    positions = [3, 4, 2, *nonlinearity, False, True, 0.5, True, 0, "cpu", torch.float64]
    for arguments in ([3, 4, 2], positions):
        torch.manual_seed(3)
        layer = ours(*arguments)
        torch.manual_seed(3)
        peer = theirs(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), peer.parameters(), strict=True))
        assert repr(layer) == repr(peer)
        for name in ("mode", "bias", "batch_first", "dropout", "bidirectional", "proj_size", "nonlinearity"):
            assert getattr(layer, name, None) == getattr(peer, name, None)


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_packed_sequences(ours: Any, theirs: Any, kernel: str, enforce_sorted: bool) -> None:
    dtype, lengths = dtype_of(kernel), [6, 4, 4, 1] if enforce_sorted else [2, 6, 1, 6]
    arguments = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
    layer, peer = ours(3, 4, **arguments), theirs(3, 4, **arguments)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(6, 4, 3, dtype=dtype, requires_grad=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
    for hx in (None, state_for(theirs, arguments | {"hidden_size": 4}, [4])):
        expected = peer(packed, hx)
        with kernels.use(kernel):
            assert kernels.explain(layer, packed).name == kernel
            found = layer(packed, hx)
        assert isinstance(found[0], PackedSequence)
        same(found[0].data, expected[0].data)
        same(found[1], expected[1])
        same(pad_packed_sequence(found[0])[0], pad_packed_sequence(expected[0])[0])
        gradients = [
            torch.autograd.grad(out.data.square().sum() + flat(after)[0].sum(), x, retain_graph=True)[0]
            for out, after in (found, expected)
        ]
        same(gradients[0], gradients[1], 1e-4 if dtype is torch.float32 else None)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_packed_sequences_of_directions_that_run_side_by_side(ours: Any, theirs: Any) -> None:
    layer, peer = ours(24, 48, bidirectional=True), theirs(24, 48, bidirectional=True)
    layer.load_state_dict(peer.state_dict())
    x = torch.randn(40, 4, 24, requires_grad=True)
    found = []
    for each in (layer, peer):
        y, after = each(pack_padded_sequence(x, torch.tensor([12, 40, 1, 33]), enforce_sorted=False))
        inputs = [x, *each.parameters()]
        found.append([y.data, *flat(after), *torch.autograd.grad(y.data.sin().sum() + flat(after)[0].sum(), inputs)])
    same(found[0], found[1], 1e-4)


def test_sizes_of_a_packed_sequence_may_lie_apart() -> None:
    layer, x = longshort.LSTM(3, 4), torch.randn(5, 3)
    apart = torch.tensor([3, 9, 1, 9, 1])[::2]
    expected = layer(PackedSequence(x, torch.tensor([3, 1, 1])))
    same(layer(PackedSequence(x, apart)), expected)
    with pytest.raises(RuntimeError, match="expected scalar type Long"):
        layer(PackedSequence(x, apart.int()))


def test_a_packed_sequence_that_does_not_add_up_is_refused() -> None:
    for sizes in ([2, 1, 2], [3, 3], [2, 2, 0], [2, 2, 2], [5, -1]):
        for layer in (longshort.LSTM(3, 4), longshort.GRU(3, 4)):
            with pytest.raises((RuntimeError, ValueError)):
                layer(PackedSequence(torch.zeros(4, 3), torch.tensor(sizes)))


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_wrong_arguments_fail_as_in_torch(ours: Any, theirs: Any, kernel: str) -> None:
    layer, peer = ours(3, 4), theirs(3, 4)

    def state(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
        made = torch.zeros(shape, dtype=dtype)
        return (made, made) if theirs is nn.LSTM else made

    wrong = [
        (torch.zeros(2, 3, 7), None),
        (torch.zeros(2), None),
        (torch.zeros(2, 2, 3, 3), None),
        (torch.zeros(0, 2, 3), None),
        (torch.zeros(2, 3, 3).double(), None),
        (torch.zeros(2, 3, 3).long(), None),
        (torch.zeros(2, 3, 3), state(1, 5, 4)),
        (torch.zeros(2, 3, 3), state(2, 3, 4)),
        (torch.zeros(2, 3, 3), state(1, 3, 5)),
        (torch.zeros(2, 3, 3), state(1, 4)),
        (torch.zeros(2, 3), state(1, 1, 4)),
        (torch.zeros(2, 3, 3), state(1, 3, 4, dtype=torch.float64)),
        (pack_padded_sequence(torch.zeros(2, 3, 7), torch.tensor([2, 2, 1])), None),
        (pack_padded_sequence(torch.zeros(2, 3, 3), torch.tensor([2, 2, 1])), state(1, 2, 4)),
        ([[1.0, 2.0, 3.0]], None),
        (None, None),
    ]
    if theirs is nn.LSTM:
        wrong += [(torch.zeros(2, 3, 3), (torch.zeros(1, 3, 4),)), (torch.zeros(2, 3, 3), torch.zeros(1, 3, 4))]
    for x, hx in wrong:
        with pytest.raises(Exception) as expected:
            peer(x, hx)
        with kernels.use(kernel), pytest.raises(type(expected.value)) as found:
            layer(x, hx)
        if "dim" not in str(expected.value):
            assert str(found.value) == str(expected.value)
    layer.weight_hh_l0 = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have the shape \(\d+, 4\), got \(2, 2\)"):
        layer(torch.zeros(2, 3, 3))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_wrong_constructors_fail_as_in_torch(ours: Any, theirs: Any) -> None:
    wrong: list[dict[str, Any]] = [
        {"hidden_size": 0},
        {"hidden_size": 2.5},
        {"input_size": -1},
        {"num_layers": 0},
        {"bias": 1},
        {"batch_first": "yes"},
        {"dropout": 1.5},
        {"dropout": True},
        {"proj_size": 4},
        {"proj_size": -1},
        {"nonsense": 3},
    ]
    wrong += [{"nonlinearity": "gelu"}] if theirs is nn.RNN else []
    for change in wrong:
        arguments = {"input_size": 3, "hidden_size": 4, **change}
        with pytest.raises((ValueError, TypeError, RuntimeError)) as expected:
            theirs(**arguments)
        with pytest.raises(type(expected.value)) as found:
            ours(**arguments)
        if "nonsense" not in change:
            assert str(found.value) == str(expected.value)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        ours(3, 4, dropout=0.5)


@pytest.mark.parametrize("kernel", kernels.available())
def test_dropout_acts_in_training_between_layers_alone(kernel: str) -> None:
    x = torch.randn(4, 2, 3)
    for layer in (longshort.LSTM(3, 64, 2, dropout=0.5), longshort.GRU(3, 64, 2, dropout=0.5)):
        with kernels.use(kernel):
            assert not torch.equal(layer(x)[0], layer(x)[0])
            layer.eval()
            assert torch.equal(layer(x)[0], layer(x)[0])
            layer.train()
            layer.dropout = 1.0
            assert torch.equal(layer(x)[0], layer(x + 1)[0])


@contextlib.contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    """What tensors are made of where nobody says."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device or "cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("others", [(torch.float64, None), (torch.float32, "meta")])
@pytest.mark.parametrize("having", [{}, {"bidirectional": True, "num_layers": 2}, {"layer_norm": True, "zoneout": 0.3}])
@pytest.mark.parametrize("ours", [longshort.RNN, longshort.GRU, longshort.LSTM])
@pytest.mark.parametrize("call", [{}, {"return_gates": True}, {"lengths": [3, 1]}])
def test_default_types_and_devices_do_not_matter(ours: Any, having: Any, call: Any, others: Any) -> None:
    layer = ours(3, 4, **having)
    x = torch.randn(3, 2, 3, requires_grad=True)

    def run() -> list[Tensor]:
        torch.manual_seed(0)  # of zoneout's masks
        output, state, *_ = layer(x, **call)
        with torch.no_grad():
            evaluated = flat(layer.eval()(x, **call)[:2])
        layer.train()
        gradients = torch.autograd.grad(output.sum() + flat(state)[0].sum(), [x, *layer.parameters()])
        return [output, *flat(state), *evaluated, *gradients]

    expected = run()
    with defaults(*others):
        found = run()
    assert {(tensor.dtype, tensor.device.type) for tensor in found} == {(torch.float32, "cpu")}
    same(found, expected)


def test_weights_that_are_exchanged_are_used() -> None:
    """By attribute, in place, by `functional_call`, by a parametrization and by PyTorch's older weight norm."""
    x = torch.randn(5, 2, 3)
    peer: Any = nn.GRU(3, 4)
    for kernel in kernels.available():
        layer: Any = longshort.GRU(3, 4)
        with kernels.use(kernel):
            layer(x)
            same(torch.func.functional_call(layer, dict(peer.named_parameters()), (x,)), peer(x))
            with torch.no_grad():
                for mine, theirs in zip(layer.parameters(), peer.parameters(), strict=True):
                    mine.copy_(theirs)
            same(layer(x), peer(x))
            layer.weight_hh_l0 = nn.Parameter(peer.weight_hh_l0 * 2)
            with pytest.raises(AssertionError):
                same(layer(x), peer(x))
            layer.weight_hh_l0 = peer.weight_hh_l0
            torch.nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
            same(layer(x), peer(x))
            layer(x)[0].sum().backward()
            assert layer.parametrizations.weight_hh_l0.original1.grad is not None


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [[2], [0], []])
@pytest.mark.parametrize("with_state", [True, False])
def test_cells_are_drop_in(ours: Any, theirs: Any, bias: bool, batch: list[int], with_state: bool, kernel: str) -> None:
    dtype = dtype_of(kernel)
    cell, peer = ours(3, 4, bias=bias, dtype=dtype), theirs(3, 4, bias=bias, dtype=dtype)
    cell.load_state_dict(peer.state_dict())
    assert repr(cell) == repr(peer)
    x = torch.randn(*batch, 3, dtype=dtype, requires_grad=True)
    state = torch.randn(*batch, 4, dtype=dtype)
    hx = ((state, state + 1) if theirs is nn.LSTMCell else state) if with_state else None
    with kernels.use(kernel):
        assert kernels.explain(cell, x).name == kernel
        found = cell(x, hx)
        same(pickle.loads(pickle.dumps(cell))(x, hx), found)
    expected = peer(x, hx)
    same(found, expected)
    gradients = torch.autograd.grad(flat(found)[-1].square().sum(), [x, *cell.parameters()], allow_unused=True)
    wanted = torch.autograd.grad(flat(expected)[-1].square().sum(), [x, *peer.parameters()], allow_unused=True)
    for mine, others in zip(gradients, wanted, strict=True):
        same(
            mine if others is not None else [],
            others if others is not None else [],
            1e-4 if dtype != torch.float64 else None,
        )


def test_a_state_of_other_dimensions_is_an_exception_and_not_a_crash() -> None:
    with pytest.raises(ValueError, match=r"hx\[0\] to be 1D or 2D, got 3D"):
        longshort.LSTMCell(3, 3)(torch.randn(3), (torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)))
    with pytest.raises(ValueError, match=r"hx\[0\] to be 1D like the input, got 2D"):
        longshort.LSTMCell(3, 3)(torch.randn(3), (torch.zeros(3, 3), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match=r"hx\[1\] to be 2D like the input, got 1D"):
        longshort.LSTMCell(3, 3)(torch.randn(3, 3), (torch.zeros(3, 3), torch.zeros(3)))
    with pytest.raises(ValueError, match="1D or 2D, got 3D"):
        longshort.LSTMCell(3, 3)(torch.randn(3), torch.zeros(2, 3, 3))
    with pytest.raises((ValueError, TypeError)):
        longshort.LSTMCell(3, 3)(torch.randn(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize(("ours", "theirs"), CELL_PAIRS)
def test_wrong_arguments_of_cells_fail_as_in_torch(ours: Any, theirs: Any, kernel: str) -> None:
    cell, peer = ours(3, 4), theirs(3, 4)
    wrong: list[tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype]] = [
        ((5, 3), (1, 4), torch.float32),
        ((5, 3), (5, 5), torch.float32),
        ((5, 2), None, torch.float32),
        ((2, 5, 3), None, torch.float32),
        ((), None, torch.float32),
        ((3,), (1, 1, 4), torch.float32),
        ((5, 3), (5, 4, 1, 1), torch.float32),
        ((5, 3), None, torch.float64),
    ]
    for shape, state, dtype in wrong:
        hx: Any = None if state is None else torch.zeros(state)
        if theirs is nn.LSTMCell and state is not None:
            hx = (hx, hx)
        x = torch.zeros(shape, dtype=dtype)
        with pytest.raises(Exception) as expected:
            peer(x, hx)
        with kernels.use(kernel), pytest.raises(type(expected.value)) as found:
            cell(x, hx)
        assert str(found.value) == str(expected.value)


def test_relu_cells() -> None:
    cell, peer = longshort.RNNCell(3, 4, nonlinearity="relu"), nn.RNNCell(3, 4, nonlinearity="relu")
    cell.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3)
    for kernel in kernels.available():
        with kernels.use(kernel):
            torch.testing.assert_close(cell(x), peer(x))
    with pytest.raises(ValueError, match="nonlinearity"):
        longshort.RNNCell(3, 4, nonlinearity="sigmoid")


def test_kernels_are_listed_forced_and_explained() -> None:
    layer = longshort.LSTM(3, 4, dtype=torch.float64)
    x = torch.zeros(2, 2, 3, dtype=torch.float64)
    assert kernels.active() == "auto"
    with kernels.use("reference"):
        assert kernels.active() == "reference"
        with kernels.use("auto"):
            assert kernels.explain(layer, x).name == "torch"
        assert str(kernels.explain(layer, x)) == "reference: forced by kernels.use"
    assert kernels.active() == "auto"
    with pytest.raises(RuntimeError), kernels.use("reference"):
        raise RuntimeError
    assert kernels.active() == "auto"
    with pytest.raises(UsageError, match="Did you mean 'reference'"), kernels.use("refrence"):
        pass


# What another library's tests expect of constant weights: the state after arange(B T I), forward and backward.
GOLDEN: dict[str, tuple[tuple[int, int, int], list[float], list[float]]] = {
    "RNN": ((2, 3, 4), [0.405432, 0.73605347], [0.11144729, 0.5528889]),
    "GRU": ((3, 6, 4), [0.5217289, 0.6371659, 0.39384964], [0.24406259, 0.611516, 0.3928808]),
    "LSTM": ((3, 6, 4), [0.6288687, 0.86899155, 0.9460773], []),
}


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("name", GOLDEN)
def test_figures_of_keras(name: str, kernel: str) -> None:
    shape, forward, backward = GOLDEN[name]
    hidden = 4 if name == "RNN" else 3
    layer = getattr(longshort, name)(4, hidden, batch_first=True, bidirectional=True)
    values = {"weight_ih": 0.01, "weight_hh": 0.02, "bias_ih": 0.03, "bias_hh": 0.03 if name == "GRU" else 0.0}
    for parameter_name, parameter in layer.named_parameters():
        nn.init.constant_(parameter, values[parameter_name.rpartition("_l0")[0]])
        if name == "LSTM" and "bias_ih" in parameter_name:  # the unit forget bias
            parameter.data[hidden : 2 * hidden] = 1.0
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    with kernels.use(kernel), torch.no_grad():
        h_n = flat(layer(x)[1])[0]
    for found, expected in zip(h_n, (forward, backward), strict=True):
        if expected:
            torch.testing.assert_close(
                found, torch.tensor(expected).unsqueeze(1).expand_as(found), rtol=1e-5, atol=1e-5
            )
