"""`convert` and `to_torch` exchange the layers of a whole model in place and lose nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

import longshort
from longshort.errors import UsageError
from recurrent import CELL_PAIRS, PAIRS, same


class Tagger(nn.Module):
    """A model with layers at several depths, one of them shared, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.encoder = nn.ModuleDict({"words": nn.GRU(4, 3, bidirectional=True), "deep": nn.Sequential(nn.RNN(6, 6))})
        self.top = nn.LSTM(6, 6, 2, dropout=0.5)
        self.again = self.top
        self.last = nn.LSTMCell(6, 4)

    def forward(self, ids_TB: Tensor) -> Tensor:
        x, _ = self.encoder["words"](self.embedding(ids_TB))
        x, _ = self.encoder["deep"](x)
        x, state = self.top(x)
        x, _ = self.again(x, state)
        return self.last(x[-1])[0]  # type: ignore[no-any-return]


def kinds(model: nn.Module) -> set[type[nn.Module]]:
    """Return the classes of all recurrent modules."""
    return {type(each) for each in model.modules() if isinstance(each, nn.RNNBase | nn.RNNCellBase)}


def test_a_nested_model_there_and_back() -> None:
    model, ids = Tagger(), torch.randint(7, (5, 3))
    model.eval()
    expected = model(ids)
    names, layers = [name for name, _ in model.named_modules()], dict(model.named_modules())
    parameters, text = list(model.parameters()), repr(model)
    attributes = {name: set(vars(each)) for name, each in model.named_modules()}

    assert longshort.convert(model) is model
    assert kinds(model) == {longshort.GRU, longshort.RNN, longshort.LSTM, longshort.LSTMCell}
    same(model(ids), expected)
    assert [name for name, _ in model.named_modules()] == names
    assert all(each is layers[name] for name, each in model.named_modules())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.again is model.top
    assert not model.top.training
    assert repr(model) == text
    same(copy.deepcopy(model)(ids), expected)

    assert longshort.to_torch(model) is model
    assert kinds(model) == {nn.GRU, nn.RNN, nn.LSTM, nn.LSTMCell}
    same(model(ids), expected)
    assert {name: set(vars(each)) for name, each in model.named_modules()} == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_an_optimizer_goes_on_as_if_nothing_had_happened() -> None:
    ids, results = torch.randint(7, (5, 3)), []
    for exchanged in (False, True):
        torch.manual_seed(0)
        model = Tagger()
        model.top.dropout = 0.0
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if exchanged and step == 2:
                longshort.convert(model)
            optimizer.zero_grad()
            model(ids).square().sum().backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    same(results[1], results[0], 1e-3)


@pytest.mark.parametrize(("ours", "theirs"), [*PAIRS, *CELL_PAIRS])
def test_a_layer_itself(ours: Any, theirs: Any) -> None:
    layer = theirs(3, 4)
    x = torch.randn(2, 3)
    expected = layer(x)
    assert longshort.convert(layer) is layer
    assert type(layer) is ours
    same(layer(x), expected)
    same(longshort.to_torch(layer)(x), expected)
    assert type(layer) is theirs


def test_hooks_go_on_and_can_be_removed() -> None:
    layer: Any = nn.GRU(3, 4)
    calls: list[tuple[str, type[nn.Module]]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module)))),
        layer.register_forward_hook(lambda module, args, out: calls.append(("post", type(module)))),
        layer.register_full_backward_hook(lambda module, down, up: calls.append(("backward", type(module)))),
        layer.register_state_dict_pre_hook(lambda module, prefix, keep: calls.append(("save", type(module)))),
        layer.register_load_state_dict_post_hook(lambda module, keys: calls.append(("load", type(module)))),
    ]
    layer.register_buffer("extra", torch.ones(2))
    longshort.convert(layer)

    def use() -> None:
        layer(torch.randn(2, 3, 3, requires_grad=True))[0].sum().backward()
        layer.load_state_dict(layer.state_dict())

    use()
    assert calls == [(name, longshort.GRU) for name in ("pre", "post", "backward", "save", "load")]
    assert "extra" in layer.state_dict()
    for handle in handles:
        handle.remove()
    calls.clear()
    use()
    assert calls == []


@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_are_copied_as_pytorchs_are(name: str, norm: Any) -> None:
    layer = norm(getattr(longshort, name)(6, 9, num_layers=2, layer_norm=True), "weight_hh_l0").eval()
    x = torch.randn(4, 3, 6)
    for copied in (copy.deepcopy(layer), AveragedModel(layer).module):
        same(copied(x), layer(x))
        before = copied(x)[0]
        with torch.no_grad():
            next(layer.parametrizations.weight_hh_l0.parameters())[0].add_(1)
        same(copied(x)[0], before)
        assert (layer(x)[0] - before).abs().max() > 1e-3
        with torch.no_grad():
            next(layer.parametrizations.weight_hh_l0.parameters())[0].sub_(1)


def test_parametrizations_and_weight_norm_go_on() -> None:
    x = torch.randn(5, 2, 3)
    layer: Any = nn.LSTM(3, 4)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    other: Any = nn.LSTM(3, 4)
    parametrizations.orthogonal(other, "weight_hh_l0")
    expected, others = layer(x), other(x)
    longshort.convert(layer)
    assert longshort.LSTM in type(layer).__mro__
    assert parametrize.is_parametrized(layer, "weight_hh_l0")
    same(layer(x), expected)
    same(other(x), others)  # PyTorch makes a class for each parametrized module; theirs is not touched
    assert longshort.LSTM not in type(other).__mro__
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l0.original0.grad is not None
    longshort.to_torch(layer)
    assert nn.LSTM in type(layer).__mro__
    same(layer(x), expected)
    longshort.convert(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert type(layer) is longshort.LSTM
    same(layer(x), expected)

    with pytest.warns(FutureWarning, match="weight_norm"):
        old: Any = torch.nn.utils.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    expected = old(x)
    longshort.convert(old)
    same(old(x), expected)
    with torch.no_grad():
        old.weight_hh_l0_g.mul_(2)
    with pytest.raises(AssertionError):
        same(old(x), expected)


def test_derived_classes_and_other_modules_are_left() -> None:
    class Mine(nn.LSTM):
        pass

    class Ours(longshort.LSTM):
        pass

    model = nn.Sequential(Mine(3, 4), Ours(4, 4), nn.Linear(4, 4))
    longshort.convert(model)
    assert [type(each) for each in model] == [Mine, Ours, nn.Linear]
    longshort.to_torch(model)
    assert [type(each) for each in model] == [Mine, Ours, nn.Linear]


def test_options_that_torch_lacks_are_refused_before_anything_is_changed() -> None:
    model = nn.ModuleDict(
        {
            "plain": longshort.LSTM(3, 4),
            "rich": longshort.LSTM(3, 4, layer_norm=True, zoneout=0.1),
            "started": longshort.LSTM(3, 4, forget_bias=1.0),
        }
    )
    with pytest.raises(UsageError, match="rich: layer_norm, zoneout"):
        longshort.to_torch(model)
    assert kinds(model) == {longshort.LSTM}
    del model["rich"]
    longshort.to_torch(model)
    assert kinds(model) == {nn.LSTM}
    with pytest.raises(UsageError, match="GRU: weight_drop"):
        longshort.to_torch(longshort.GRU(3, 4, weight_drop=0.5))
