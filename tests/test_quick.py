"""The short way of a call is the general one: the same bits, the same masks, the same errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import longshort
from longshort import calls, kernels, quick
from recurrent import flat, same, seeded

pytestmark = pytest.mark.skipif(not calls.TARGETS, reason="there are no native kernels")


@contextmanager
def one_way(quickly: bool) -> Iterator[list[bool]]:
    """Let calls go the short way, or the general one; what is yielded says of each whether it went the short way."""
    taken: list[bool] = []
    call = quick.Quick.__call__

    def spy(self: Any, *arguments: Any) -> Any:
        found = call(self, *arguments)
        taken.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        if not quickly:
            patch.setattr(kernels, "quick_target", lambda: None)
        patch.setattr(quick.Quick, "__call__", spy)
        yield taken


def a_layer(data: st.DataObject) -> Any:
    """Draw a layer that has a short way."""
    kind = data.draw(st.sampled_from([longshort.RNN, longshort.GRU, longshort.LSTM]))
    arguments: dict[str, Any] = {
        "num_layers": data.draw(st.integers(1, 3)),
        "bias": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
        "bidirectional": data.draw(st.booleans()),
        "layer_norm": data.draw(st.booleans()),
        **{name: data.draw(st.sampled_from([0.0, 0.4])) for name in ("recurrent_dropout", "zoneout")},
    }
    if arguments["num_layers"] > 1:
        arguments |= {"dropout": data.draw(st.sampled_from([0.0, 0.3])), "residual": data.draw(st.booleans())}
    if kind is longshort.LSTM:
        arguments |= {name: data.draw(st.booleans()) for name in ("peephole", "coupled_gates")}
        arguments["proj_size"] = data.draw(st.sampled_from([0, 3]))
        if arguments["bias"]:
            arguments["forget_bias"] = data.draw(st.sampled_from([None, 1.0]))
    return kind(data.draw(st.integers(1, 4)), data.draw(st.integers(4, 6)), **arguments)


@settings(max_examples=150)
@given(data=st.data())
def test_every_call_has_the_bits_of_the_general_way(data: st.DataObject) -> None:
    layer, threads = a_layer(data), torch.get_num_threads()
    layer.train(data.draw(st.booleans()))
    T, B = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    grad = data.draw(st.booleans())
    x = torch.randn(*((B, T) if layer.batch_first else (T, B)), layer.input_size, requires_grad=grad)
    entries = layer.num_layers * (1 + layer.bidirectional)
    widths = [layer.proj_size or layer.hidden_size, layer.hidden_size][: 1 + (layer.cell == "lstm")]
    state: Any = tuple(torch.randn(entries, B, width, requires_grad=grad) for width in widths)
    inputs = [x, *state]
    hx = data.draw(st.sampled_from([None, state if len(state) == 2 else state[0]]))
    arguments: dict[str, Any] = {}
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
        arguments["lengths"] = data.draw(st.sampled_from([lengths, torch.tensor(lengths), None]))
    found = []
    torch.set_num_threads(data.draw(st.sampled_from([1, 2])))
    for quickly in (True, False):
        torch.manual_seed(0)
        with one_way(quickly) as taken, torch.set_grad_enabled(grad):
            results = flat(layer(x, hx, **arguments))
        assert taken == [True] * quickly
        after = torch.get_rng_state()
        gradients: list[Tensor | None] = []
        if grad:
            loss = torch.stack([part.sin().sum() for part in results]).sum()
            wanted = [*inputs, *layer.parameters()]
            gradients = [*torch.autograd.grad(loss, wanted, allow_unused=True)]
        found.append(([*results, *gradients], after))
    torch.set_num_threads(threads)
    (ours, drawn), (general, drawn_too) = found
    assert torch.equal(drawn, drawn_too)
    for a, b in zip(ours, general, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def both_ways(call: Any) -> tuple[Any, Any]:
    """Return what `call` gives by the short way and by the general one, with the same random numbers."""
    found = []
    for quickly in (True, False):
        torch.manual_seed(0)
        with one_way(quickly) as taken:
            found.append(call())
        assert (any(taken), all(taken)) == (quickly, True)
    return found[0], found[1]


def total(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.sin().sum() for tensor in tensors]).sum()


def same_bits(ours: Any, general: Any) -> bool:
    pairs = zip(ours, general, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


DEEP: dict[str, Any] = {"num_layers": 3, "bidirectional": True, "dropout": 0.4}


@pytest.mark.parametrize("frozen", ["", "l0", "l0,l1", "l1", "l2", "bias", "reverse", "l0,l1,l2"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("results", [slice(0, 1), slice(1, 2), slice(2, 3), slice(0, 3)])
def test_gradients_that_nobody_wants(frozen: str, residual: bool, results: slice) -> None:
    layer = longshort.LSTM(3, 4, residual=residual, **DEEP)
    for name, weight in layer.named_parameters():
        weight.requires_grad_(not any(part in name for part in frozen.split(",") if part))
    for x in (torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 3)):
        inputs = [tensor for tensor in (x, *layer.parameters()) if tensor.requires_grad]

        def call(x: Tensor = x, inputs: list[Tensor] = inputs) -> Any:
            found = flat(layer(x, lengths=[4, 5]))
            if not inputs:
                return found
            return torch.autograd.grad(total(found[results]), inputs, allow_unused=True)

        assert same_bits(*both_ways(call))


@pytest.mark.parametrize("residual", [False, True])
def test_outputs_that_are_changed_and_hooks_of_saved_tensors(residual: bool) -> None:
    layer, x = longshort.GRU(3, 4, residual=residual, **DEEP), torch.randn(5, 2, 3, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def changed() -> Any:
        y, h_n = layer(x)
        y += h_n.sum()
        return torch.autograd.grad(y.sin().sum(), inputs)

    def hooked() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            y, h_n = layer(x)
        return torch.autograd.grad(y.sin().sum() + h_n.sum(), inputs)

    def checkpointed() -> Any:
        y, h_n = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
        return torch.autograd.grad(y.sin().sum() + h_n.sum(), inputs)

    def plain() -> Any:
        y, h_n = layer(x)
        return torch.autograd.grad(y.sin().sum() + h_n.sum(), inputs)

    for call in (changed, hooked, checkpointed):
        ours, general = both_ways(call)
        torch.testing.assert_close(ours, general)
        assert call is changed or same_bits(ours, both_ways(plain)[0])


def test_many_gradients_at_once_where_memory_has_another_order() -> None:
    """Where a weight's memory has another order since the forward pass, what was kept is put in order first."""
    layer, x = longshort.GRU(3, 4, batch_first=True, **DEEP), torch.randn(5, 2, 3, requires_grad=True)
    many = torch.randn(3, 2, 5, 8)

    def call() -> Any:
        y, _ = layer(x.transpose(0, 1))
        each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many]
        weight: Any = layer.weight_hh_l0
        weight.data = weight.data.mT.contiguous().mT
        at_once = torch.autograd.grad(y, x, many, is_grads_batched=True)[0]
        weight.data = weight.data.contiguous()
        torch.testing.assert_close(at_once, torch.stack(each))
        return at_once

    torch.testing.assert_close(*both_ways(call))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("lengths", [None, [5, 2]])
def test_gradients_of_gradients(residual: bool, lengths: Any) -> None:
    layer, x = longshort.LSTM(3, 4, residual=residual, zoneout=0.2, **DEEP), torch.randn(5, 2, 3, requires_grad=True)
    inputs = [x, *layer.parameters()]

    def call() -> Any:
        y, (h_n, c_n) = layer(x, lengths=lengths)
        first = torch.autograd.grad(y.sin().sum() + (h_n * c_n).sum(), inputs, create_graph=True)
        return torch.autograd.grad(total(first), inputs, allow_unused=True)

    torch.testing.assert_close(*both_ways(call))


def test_outputs_of_layers_below_are_not_held_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, held = quick.Quick.forward, []

    def spy(self: Any, *arguments: Any) -> Any:
        found = forward(self, *arguments)
        held.append(len(found[1]))
        return found

    monkeypatch.setattr(quick.Quick, "forward", spy)
    layer, x = longshort.GRU(3, 4, num_layers=3), torch.randn(5, 2, 3)
    with torch.no_grad():
        layer(x)
    layer(x)
    assert held == [0, 6]


def test_masks_are_drawn_once_where_the_short_way_is_left() -> None:
    with torch.inference_mode():  # whose weights are not kept packed
        layer, x = longshort.LSTM(3, 4, recurrent_dropout=0.5, zoneout=0.3), torch.randn(5, 2, 3)
        found = seeded(0, layer, x)
        with kernels.use("reference"):
            same(found, seeded(0, layer, x))


def test_what_has_changed_since_is_seen() -> None:
    layer, x = longshort.LSTM(3, 4, num_layers=2, dropout=0.5, bidirectional=True), torch.randn(5, 2, 3)
    with one_way(quickly=True) as taken:
        y, _ = layer(x)
        assert not torch.equal(layer(x)[0], y)  # dropout
        layer.dropout = 0.0
        y, _ = layer(x)
        assert torch.equal(layer(x)[0], y)
        layer.dropout = 0.5
        layer.eval()
        assert torch.equal(layer(x)[0], y)
        weight: Any = layer.weight_hh_l1_reverse
        with torch.no_grad():
            kept = layer(x)[0]
            weight[0, 0] += 1
            changed = layer(x)[0]
            assert not torch.equal(changed, kept)
        layer.batch_first = True
        assert torch.equal(layer(x.transpose(0, 1))[0].transpose(0, 1), changed)
    assert taken
    assert all(taken)


@pytest.mark.parametrize("spoil", ["shape", "type", "layer", "hx", "lengths"])
def test_what_does_not_fit_goes_the_general_way_and_fails_there(spoil: str) -> None:
    layer, x, given = longshort.GRU(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3), {}
    hx: Any = torch.zeros(4, 2, 4)
    wanted: tuple[type[Exception], ...] = (RuntimeError, ValueError)
    if spoil == "shape":
        layer.weight_hh_l1_reverse = torch.nn.Parameter(torch.zeros(12, 3))
    elif spoil == "type":
        layer.bias_ih_l1 = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64))
    elif spoil == "layer":
        x = torch.randn(5, 2, 8)
    elif spoil == "hx":
        hx = torch.zeros(2, 2, 4)
    else:
        given = {"lengths": [2, 2**63 - 1]}
    with one_way(quickly=True) as taken, pytest.raises(wanted):
        layer(x, hx, **given)
    assert not any(taken)
    for lengths in ([-1, 2], torch.tensor([-(2**63), 2]), torch.tensor([6, 2]), [1], torch.tensor([1.0, 2.0])):
        with pytest.raises((ValueError, TypeError), match="lengths: Expected"):
            longshort.GRU(3, 4, num_layers=2, bidirectional=True)(torch.randn(5, 2, 3), lengths=lengths)
