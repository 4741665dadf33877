"""The options of the layers against loops over rows and steps that share no code with them; refusals; masks."""

from __future__ import annotations

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
from longshort.errors import ConfigError, UsageError
from longshort.options import LayerOptions
from recurrent import dtype_of, flat, same, seeded

LAYERS = {"RNN": longshort.RNN, "GRU": longshort.GRU, "LSTM": longshort.LSTM}
COMMON: dict[str, Any] = {
    "layer_norm": True,
    "recurrent_dropout": 0.4,
    "zoneout": 0.3,
    "weight_drop": 0.5,
    "learn_initial_state": True,
    "residual": True,
}
LSTM_ONLY: dict[str, Any] = {"forget_bias": 1.5, "peephole": True, "coupled_gates": True}


class Recorded:
    """What a layer hands to `kernels.run_layers`: its masks and dropped weights."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.weights: list[Tensor] = []
        self.options: Any = ()
        run = kernels.run_layers

        def record(choice: Any, stack: Any, x: Any, state: Any, weights: Any, **arguments: Any) -> Any:
            self.weights, self.options = list(weights), arguments["options"]
            return run(choice, stack, x, state, weights, **arguments)

        patch.setattr(kernels, "run_layers", record)
        patch.setattr(kernels, "quick_target", lambda: None)  # the short way hands over nothing


def normal(v: Tensor) -> Tensor:
    return (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt()


def by_hand(
    layer: Any, recorded: Recorded, x_TBI: Tensor, state: list[Tensor], lengths: list[int], resets_TB: Tensor
) -> tuple[Tensor, list[Tensor], list[dict[str, Tensor]]]:
    """Run a layer number by number in float64: rows apart, no batched steps, no masks over time."""
    options, H, T, B = layer.options, layer.hidden_size, *x_TBI.shape[:2]
    x_TBI, state = x_TBI.double(), [part.double() for part in state]
    each = len(recorded.weights) // (layer.num_layers * (1 + layer.bidirectional))
    final = [part.clone() for part in state]
    readings = []
    for k in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + layer.bidirectional]):
            index = k * (1 + layer.bidirectional) + d
            weights = [weight.double() for weight in recorded.weights[index * each : (index + 1) * each]]

            def parameter(name: str, k: int = k, suffix: str = suffix) -> Any:
                return getattr(layer, f"{name}_l{k}{suffix}").double()

            W, U = weights[:2]
            b, a = weights[2:4] if layer.bias else (0, 0)
            masks: Any = recorded.options[index] if recorded.options else None
            P = layer.proj_size or H
            output = torch.zeros(T, B, P, dtype=x_TBI.dtype)
            seen: dict[str, Tensor] = {}
            for row in range(B):
                h, c = state[0][index, row], state[-1][index, row]
                steps = range(lengths[row])
                for t in reversed(steps) if d else steps:
                    border = t + 1 if d else t
                    if border < lengths[row] and resets_TB[border, row]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    heard = h
                    if options.recurrent_dropout and layer.training:
                        heard = h * masks.h_mask_BH[row]
                    wx, uh = W @ x_TBI[t, row], U @ heard
                    if options.layer_norm:
                        wx, uh = parameter("gamma_ih") * normal(wx), parameter("gamma_hh") * normal(uh)
                    wx, uh = wx + b, uh + a
                    gates = {}
                    if layer.mode == "GRU":
                        r = torch.sigmoid(wx[:H] + uh[:H])
                        z = torch.sigmoid(wx[H : 2 * H] + uh[H : 2 * H])
                        n = torch.tanh(wx[2 * H :] + r * uh[2 * H :])
                        new = (1 - z) * n + z * h
                        gates = {"r": r, "z": z, "n": n}
                    elif layer.mode == "LSTM":
                        parts = list(torch.split(wx + uh, H))
                        o, g, f = parts.pop(), parts.pop(), parts.pop()
                        if options.peephole:
                            f = f + parameter("weight_cf") * c
                        f = torch.sigmoid(f)
                        if options.coupled_gates:
                            i = 1 - f
                        else:
                            i = torch.sigmoid(parts.pop() + (parameter("weight_ci") * c if options.peephole else 0))
                        g = torch.tanh(g)
                        c = f * c + i * g
                        o = torch.sigmoid(o + (parameter("weight_co") * c if options.peephole else 0))
                        heart = parameter("gamma_c") * normal(c) + parameter("beta_c") if options.layer_norm else c
                        new = o * torch.tanh(heart)
                        gates = {"i": i, "f": f, "g": g, "o": o, "c": c}
                    else:
                        new = torch.tanh(wx + uh) if layer.nonlinearity == "tanh" else torch.relu(wx + uh)
                    if layer.proj_size:
                        new = weights[-1] @ new
                    if options.zoneout and layer.training:
                        new = torch.where(masks.zoneout_mask_TBH[t, row] > 0, h, new)
                    elif options.zoneout:
                        new = options.zoneout * h + (1 - options.zoneout) * new
                    h = new
                    output[t, row] = h
                    for name, value in {**gates, "h": h}.items():
                        seen.setdefault(name, torch.zeros(T, B, len(value), dtype=x_TBI.dtype))[t, row] = value
                final[0][index, row] = h
                final[-1][index, row] = c if len(final) > 1 else h
            outputs.append(output)
            readings.append(seen)
        y_TBI = torch.cat(outputs, dim=-1)
        x_TBI = x_TBI + y_TBI if options.residual and k else y_TBI
    return x_TBI, final, readings


def start_by_hand(layer: Any, B: int) -> list[Tensor]:
    """Return the state that a layer starts from where none is given."""
    suffixes = ["", "_reverse"][: 1 + layer.bidirectional]
    widths = {"h_0": layer.proj_size or layer.hidden_size, "c_0": layer.hidden_size}
    return [
        torch.stack(
            [
                getattr(layer, f"{name}_l{k}{suffix}", layer.weight_hh_l0.new_zeros(width)).expand(B, width)
                for k in range(layer.num_layers)
                for suffix in suffixes
            ]
        )
        for name, width in widths.items()
        if name == "h_0" or layer.mode == "LSTM"
    ]


def runs(layer: Any, x: Any, **call: Any) -> bool:
    """Whether the forced implementation can run a call."""
    try:
        return kernels.explain(layer, x, **call).name == kernels.active()
    except UsageError:
        return False


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=30)
@given(data=st.data())
def test_options_against_loops(name: str, kernel: str, data: st.DataObject) -> None:
    dtype = dtype_of(kernel)
    pool = COMMON | (LSTM_ONLY if name == "LSTM" else {})
    chosen = {option: pool[option] for option in data.draw(st.sets(st.sampled_from(sorted(pool)), max_size=5))}
    arguments: dict[str, Any] = {
        "num_layers": data.draw(st.integers(2 if "residual" in chosen else 1, 3 if "residual" in chosen else 2)),
        "bias": data.draw(st.booleans()) or "forget_bias" in chosen,
        "bidirectional": data.draw(st.booleans()),
        "batch_first": data.draw(st.booleans()),
        "dtype": dtype,
    }
    if name == "LSTM":
        arguments["proj_size"] = data.draw(st.sampled_from([0, 0, 5]))
    if name == "RNN":
        arguments["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    # 14 units: of 7, of which relu leaves a few, normalising magnifies rounding up to 4e-4, in the equations too
    layer: Any = seeded(data.draw(st.integers(0, 99)), LAYERS[name], 4, 14, **arguments, **chosen)
    for parameter in layer.parameters():  # gains other than 1, learned states other than 0
        nn.init.normal_(parameter, std=0.7)
    layer.train(data.draw(st.booleans()))

    T, B = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B)) if data.draw(st.booleans()) else None
    resets_TB = torch.rand(T, B) < 0.3
    given_resets = data.draw(st.booleans()) and "learn_initial_state" not in chosen
    if not given_resets:
        resets_TB = torch.zeros(T, B, dtype=torch.bool)
    return_gates = data.draw(st.booleans())
    call = {"lengths": lengths, "return_gates": return_gates, "resets": resets_TB if given_resets else None}
    x_TBI = torch.randn(T, B, 4, dtype=dtype, requires_grad=True)
    x = x_TBI.transpose(0, 1) if arguments["batch_first"] else x_TBI
    if arguments["batch_first"] and given_resets:
        call["resets"] = resets_TB.T
    with kernels.use(kernel), pytest.MonkeyPatch.context() as patch:
        recorded = Recorded(patch)
        if not runs(layer, x, **call):
            return
        output, state, *gates = layer(x, **call)
    if arguments["batch_first"]:
        output = output.transpose(0, 1)
    expected = by_hand(layer, recorded, x_TBI, start_by_hand(layer, B), lengths or [T] * B, resets_TB)
    same(output, expected[0])
    same(flat(state), expected[1])
    assert len(gates) == return_gates
    if return_gates:
        for found, wanted in zip(gates[0], expected[2], strict=True):
            assert not wanted or set(found) == set(wanted)
            for gate, value in wanted.items():
                same(found[gate].transpose(0, 1) if arguments["batch_first"] else found[gate], value)

    weights = torch.randn_like(output)
    inputs = [x_TBI, *layer.parameters()]

    def seen(readings: Any, swapped: bool) -> Tensor:
        """A number that all gates and states at every step have a part in."""
        pairs = zip(readings, expected[2], strict=True)
        values = [each[name].transpose(0, 1) if swapped else each[name] for each, known in pairs for name in known]
        return torch.stack([(value * weights[..., :1]).square().sum() for value in [x_TBI, *values]]).sum()

    losses = [
        (out * weights).sum() + flat(after)[-1].square().sum() + 0 * sum(p.sum() for p in layer.parameters())
        for out, after in ((output, state), expected[:2])
    ]
    if return_gates:
        losses[0] = losses[0] + seen(gates[0], arguments["batch_first"])
        losses[1] = losses[1] + seen(expected[2], False)
    gradients = [torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True) for loss in losses]
    same(gradients[0], gradients[1], 1e-4 if dtype is torch.float32 else 1e-9)


ALONE = [
    (name, {option: value})
    for name in LAYERS
    for option, value in (COMMON | (LSTM_ONLY if name == "LSTM" else {})).items()
    if option != "residual" or name == "GRU"  # which is between layers, whatever they are
]


TOGETHER = {option: value for option, value in COMMON.items() if option != "residual"}


@pytest.mark.parametrize(("name", "options"), [*ALONE, ("LSTM", TOGETHER | LSTM_ONLY), ("GRU", TOGETHER)])
def test_gradients_of_every_option_match_finite_differences_twice(name: str, options: dict[str, Any]) -> None:
    shape = {"num_layers": 2} if "residual" in options else {"bidirectional": True}
    layer: Any = seeded(0, LAYERS[name], 2, 3, **shape, dtype=torch.float64, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.7)
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # the same masks each time
        pairs = dict(zip(names, parameters, strict=True))
        return tuple(flat(torch.func.functional_call(layer, pairs, (x,), {"lengths": [2, 1]})))

    with kernels.use("reference"):
        assert torch.autograd.gradcheck(run, (x, *layer.parameters()))
        assert torch.autograd.gradgradcheck(run, (x, *layer.parameters()), fast_mode=True)  # in random directions


@pytest.mark.parametrize("name", LAYERS)
def test_resets_begin_a_new_sequence_in_both_directions(name: str) -> None:
    layer = LAYERS[name](2, 3, 2, bidirectional=True, dtype=torch.float64)
    first, second = torch.randn(4, 1, 2, dtype=torch.float64), torch.randn(3, 1, 2, dtype=torch.float64)
    resets = torch.zeros(7, 1, dtype=torch.bool)
    resets[4] = True
    output, _ = layer(torch.cat([first, second]), resets=resets)
    same(output, torch.cat([layer(first)[0], layer(second)[0]]))
    unbatched, _ = layer(torch.cat([first, second])[:, 0], resets=resets[:, 0])
    same(unbatched, output[:, 0])


def test_resets_that_cannot_be_are_refused() -> None:
    layer, x = longshort.GRU(2, 3, batch_first=True), torch.zeros(4, 5, 2)
    with pytest.raises(TypeError, match=r"Expected a bool tensor, got torch\.float32"):
        layer(x, resets=torch.zeros(4, 5))
    with pytest.raises(TypeError, match="Expected a bool tensor, got list"):
        layer(x, resets=[[True]])
    with pytest.raises(ValueError, match=r"Expected the shape \(4, 5\), got \(5, 4\)"):
        layer(x, resets=torch.zeros(5, 4, dtype=torch.bool))
    learner = longshort.GRU(2, 3, learn_initial_state=True)
    with pytest.raises(UsageError, match="learn_initial_state"):
        learner(x, resets=torch.zeros(4, 5, dtype=torch.bool))
    learner(x, torch.zeros(1, 5, 3), resets=torch.zeros(4, 5, dtype=torch.bool))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("GRU", {"forget_bias": 1.0}, "GRU has no forget_bias"),
    ("RNN", {"forget_bias": 1.0}, "RNN has no forget_bias"),
    ("GRU", {"peephole": True}, "GRU has no peephole"),
    ("RNN", {"coupled_gates": True}, "RNN has no coupled_gates"),
    ("LSTM", {"forget_bias": 1.0, "bias": False}, "forget_bias is the value of a bias, and bias=False"),
    ("LSTM", {"layer_norm": True, "hidden_size": 1}, "layer_norm needs a hidden_size of at least 2"),
    ("LSTM", {"zoneout": 1.0}, "zoneout must be a number from 0 to below 1, got 1.0"),
    ("LSTM", {"recurrent_dropout": -0.1}, "recurrent_dropout must be a number from 0 to below 1, got -0.1"),
    ("LSTM", {"weight_drop": True}, "weight_drop must be a number from 0 to below 1, got True"),
    ("LSTM", {"weight_drop": float("nan")}, "weight_drop must be a number from 0 to below 1, got nan"),
    ("LSTM", {"layer_norm": 1}, "layer_norm must be True or False, got 1"),
    ("LSTM", {"forget_bias": "high"}, "forget_bias must be a number or None, got 'high'"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LAYERS[name](**{"input_size": 2, "hidden_size": 4, **arguments})


def test_masks_are_drawn_as_promised() -> None:
    layer = seeded(0, longshort.LSTM, 2, 50, 2, recurrent_dropout=0.25, zoneout=0.1, weight_drop=0.5)
    x = torch.randn(8, 40, 2)
    with pytest.MonkeyPatch.context() as patch:
        recorded = Recorded(patch)
        layer(x)
        first, dropped = recorded.options, recorded.weights[1]
        layer(x)
        second = recorded.options
        layer.eval()
        layer(x)
        evaluated = recorded.options
    h_mask, zoneout_mask = first[0].h_mask_BH, first[0].zoneout_mask_TBH
    assert h_mask.shape == (40, 50)
    torch.testing.assert_close(h_mask.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert abs(h_mask.mean() - 1) < 0.05
    assert zoneout_mask.shape == (8, 40, 50)
    assert abs(zoneout_mask.mean() - 0.1) < 0.02
    for other in (first[1], second[0]):  # each layer and each call has its own
        assert not torch.equal(h_mask, other.h_mask_BH)
        assert not torch.equal(zoneout_mask, other.zoneout_mask_TBH)
    assert abs((dropped == 0).float().mean() - 0.5) < 0.05
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * layer.weight_hh_l0[kept])
    assert evaluated[0].h_mask_BH is evaluated[0].zoneout_mask_TBH is None
    assert evaluated[0].zoneout == 0.1


@pytest.mark.parametrize("kernel", kernels.available())
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_one_seed_gives_one_result_on_every_implementation(name: str, batch_first: bool, kernel: str) -> None:
    shares = {"dropout": 0.3, "recurrent_dropout": 0.25, "zoneout": 0.1, "weight_drop": 0.2}
    layer = LAYERS[name](2, 8, 2, batch_first=batch_first, bidirectional=True, **shares)
    x, lengths = torch.randn(5, 5, 2), [5, 4, 4, 1, 2]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False)
    for read, arguments in ((x, {}), (x, {"lengths": lengths}), (packed, {})):
        with kernels.use("reference"):
            expected = seeded(3, layer, read, **arguments)
        with kernels.use(kernel):
            if runs(layer, read, **arguments):
                same(seeded(3, layer, read, **arguments), expected)
            else:
                assert kernel == "torch"


@pytest.mark.parametrize("coupled", [False, True])
def test_forget_bias_fills_one_bias_of_every_layer_and_direction(coupled: bool) -> None:
    layer = longshort.LSTM(2, 3, 2, bidirectional=True, forget_bias=1.25, coupled_gates=coupled)
    block = slice(0, 3) if coupled else slice(3, 6)
    for _ in range(2):
        for k in range(2):
            for suffix in ("", "_reverse"):
                bias_ih, bias_hh = (getattr(layer, f"{name}_l{k}{suffix}") for name in ("bias_ih", "bias_hh"))
                assert bias_ih[block].eq(1.25).all()
                assert bias_hh[block].eq(0).all()
                assert bias_ih.ne(1.25).sum() == bias_hh.ne(0).sum() == len(bias_ih) - 3
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        layer.reset_parameters()


def test_parameters_names_copies_and_text() -> None:
    layer = longshort.LSTM(2, 3, 2, bidirectional=True, layer_norm=True, peephole=True, learn_initial_state=True)
    added = {"gamma_ih", "gamma_hh", "gamma_c", "beta_c", "weight_ci", "weight_cf", "weight_co", "h_0", "c_0"}
    plain = longshort.LSTM(2, 3, 2, bidirectional=True)
    names = {f"{name}_l{k}{suffix}" for name in added for k in range(2) for suffix in ("", "_reverse")}
    assert layer.state_dict().keys() - plain.state_dict().keys() == names
    assert layer.state_dict().keys() >= plain.state_dict().keys()
    assert repr(layer) == (
        "LSTM(2, 3, num_layers=2, bidirectional=True, layer_norm=True, learn_initial_state=True, peephole=True)"
    )
    x = torch.randn(4, 2, 2)
    same(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert longshort.LSTM(2, 3, coupled_gates=True).weight_ih_l0.shape == (9, 2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'zone_out'"):
        longshort.LSTM(2, 3, zone_out=0.1)  # type: ignore[call-arg]
    assert LayerOptions().given == {}
    half = longshort.GRU(2, 3, layer_norm=True, zoneout=0.1).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16))[0].dtype is torch.bfloat16


def test_a_learned_state_is_used_and_trained_where_none_is_given() -> None:
    layer: Any = longshort.GRU(2, 3, learn_initial_state=True)
    x = torch.randn(4, 2, 2)
    same(layer(x), layer(x, torch.zeros(1, 2, 3)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(x)[0].sum().backward()
    optimizer.step()
    assert layer.h_0_l0.ne(0).all()
    same(layer(x), layer(x, layer.h_0_l0.expand(1, 2, 3)))


def test_wrong_arguments_of_layers_with_options_fail_as_in_torch() -> None:
    layer, peer = longshort.LSTM(3, 4, layer_norm=True, coupled_gates=True), nn.LSTM(3, 4)
    state = torch.zeros(1, 2, 4)
    wrong: list[tuple[Tensor, Any]] = [
        (torch.zeros(5, 2, 7), None),
        (torch.zeros(5), None),
        (torch.zeros(5, 2, 3), (state, state[:, :1])),
        (torch.zeros(5, 2, 3, dtype=torch.float64), None),
        (torch.zeros(5, 2, 3), (state[0], state)),
        (torch.zeros(0, 2, 3), None),
    ]
    for x, hx in wrong:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            peer(x, hx)
        with pytest.raises(type(expected.value)) as found:
            layer(x, hx)
        assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="of one type and on one device"):
        layer(torch.zeros(5, 2, 3), (state.double(), state))
