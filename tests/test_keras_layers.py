"""Keras's layers and ours, with the same weights, give the same; what ours do not have is refused by name."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import longshort
from longshort.errors import UsageError

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("KERAS_HOME", tempfile.mkdtemp())  # it writes a file of settings when it is imported
keras = pytest.importorskip("keras")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # between Keras and NumPy

KINDS = {"SimpleRNN": (longshort.RNN, nn.RNN), "GRU": (longshort.GRU, nn.GRU), "LSTM": (longshort.LSTM, nn.LSTM)}
B, T, I, H = 3, 7, 5, 4


def near(found: Any, expected: Any) -> None:
    # In float64 too: Keras keeps the states of some of these layers in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def drawn(layer: Any, width: int) -> Any:
    """Return a Keras layer that has been built, with weights drawn anew: Keras's own biases are zero."""
    layer.build((B, T, width))
    random = np.random.default_rng(width)
    layer.set_weights([random.normal(0, 0.5, array.shape) for array in layer.get_weights()])
    return layer


def made(kind: str, units: int = H, both: bool = False, **settings: Any) -> Any:
    settings = {"dtype": "float64", "return_sequences": True, "return_state": True, **settings}
    layer = getattr(keras.layers, kind)(units, **settings)
    return keras.layers.Bidirectional(layer, dtype=settings["dtype"]) if both else layer


def results(kind: str, layers: list[Any], x: Any) -> tuple[Any, list[Any]]:
    """Return the last layer's output, and the states of all layers and directions: h, and of LSTMs then c."""
    states: list[Any] = []
    for layer in layers:
        x, *after = layer(x)
        states += after
    if kind == "LSTM":
        states = states[0::2] + states[1::2]
    return x, states


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_the_same_results_and_weights_there_and_back(kind: str, both: bool, bias: bool, num_layers: int) -> None:
    directions = 2 if both else 1
    widths = [I, *[directions * H] * (num_layers - 1)]
    theirs = [drawn(made(kind, both=both, use_bias=bias), width) for width in widths]
    ours = longshort.from_keras(*theirs)
    assert type(ours) is KINDS[kind][0]
    assert (ours.num_layers, ours.bidirectional, ours.bias, ours.batch_first) == (num_layers, both, bias, True)

    x = torch.randn(B, T, I, dtype=torch.float64)
    expected, states = results(kind, theirs, x)
    output, after = ours(x)
    near(output, expected)
    found = [*after[0], *after[1]] if kind == "LSTM" else [*after]
    assert len(found) == len(states)
    for own, keras_own in zip(found, states, strict=True):
        near(own, keras_own)

    for layer, weights in zip(theirs, longshort.keras_weights(ours), strict=True):
        for own, given in zip(weights, layer.get_weights(), strict=True):
            np.testing.assert_array_equal(own, given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", [0, 1])
def test_weights_of_ours_and_of_torchs_in_keras(kind: str, which: int) -> None:
    """Whose two biases are both drawn."""
    layer = KINDS[kind][which](I, H, 2, batch_first=True, bidirectional=True)
    x = torch.randn(B, T, I)
    theirs = [drawn(made(kind, both=True, dtype="float32"), width) for width in (I, 2 * H)]
    for to, weights in zip(theirs, longshort.keras_weights(layer), strict=True):
        to.set_weights(weights)
    near(layer(x)[0], results(kind, theirs, x)[0])


def test_it_copies() -> None:
    theirs = drawn(made("LSTM", dtype="float32"), I)
    ours = longshort.from_keras(theirs)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    before = [array.copy() for array in theirs.get_weights()]
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    for array, kept in zip(theirs.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, kept)
    (weights,) = longshort.keras_weights(ours)
    weights[0] += 1
    np.testing.assert_array_equal(longshort.keras_weights(ours)[0][0] + 1, weights[0])


def test_relu_and_half() -> None:
    theirs = drawn(made("SimpleRNN", activation="relu"), I)
    ours = longshort.from_keras(theirs)
    assert ours.nonlinearity == "relu"
    x = torch.randn(B, T, I, dtype=torch.float64)
    near(ours(x)[0], theirs(x)[0])
    half = longshort.from_keras(drawn(made("GRU", dtype="float16", recurrent_initializer="zeros"), I))
    assert half.weight_ih_l0.dtype == torch.float32


def test_dropout_is_left_out_only_where_it_is_said() -> None:
    theirs = drawn(made("LSTM", dropout=0.2, recurrent_dropout=0.1), I)
    with pytest.raises(UsageError, match="dropout and recurrent_dropout of Keras's kind") as refused:
        longshort.from_keras(theirs)
    assert "without_dropout=True" in refused.value.hint
    x = torch.randn(B, T, I, dtype=torch.float64)
    ours = longshort.from_keras(theirs, without_dropout=True)
    near(ours(x)[0], theirs(x, training=False)[0])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (list, "no layer"),
        (lambda: [made("LSTM")], "no weights yet"),
        (lambda: [drawn(keras.layers.Dense(3), I)], "not Dense"),
        (lambda: [drawn(keras.layers.Bidirectional(made("GRU"), merge_mode="sum"), I)], "not 'sum'"),
        (lambda: [drawn(made("GRU", reset_after=False), I)], "reset_after=True"),
        (lambda: [drawn(made("GRU", go_backwards=True), I)], "goes backwards alone"),
        (lambda: [drawn(made("LSTM", activation="relu"), I)], "LSTM: activation is 'relu'; ours has tanh"),
        (lambda: [drawn(made("SimpleRNN", activation="linear"), I)], "'linear'; ours has tanh or relu"),
        (
            lambda: [drawn(made("GRU", recurrent_activation="hard_sigmoid"), I)],
            "recurrent_activation is 'hard_sigmoid'",
        ),
        (lambda: [drawn(made("LSTM"), I), drawn(made("GRU"), H)], "Layer 2 of 2 does not go with the first: it is GRU"),
        (
            lambda: [drawn(made("LSTM"), I), drawn(made("LSTM", units=6), H)],
            "LSTM 4 -> 6 tanh with bias, one direction",
        ),
        (lambda: [drawn(made("LSTM"), I), drawn(made("LSTM"), I)], "it is LSTM 5 -> 4"),
        (lambda: [drawn(made("LSTM"), I), drawn(made("LSTM", use_bias=False), H)], "without bias"),
        (
            lambda: [
                drawn(
                    keras.layers.Bidirectional(
                        made("LSTM"), backward_layer=made("LSTM", use_bias=False, go_backwards=True), dtype="float64"
                    ),
                    I,
                )
            ],
            "forward LSTM 5 -> 4 tanh with bias, both directions, backward LSTM 5 -> 4 tanh without bias",
        ),
        (
            lambda: [
                drawn(
                    keras.layers.Bidirectional(
                        made("GRU"), backward_layer=made("GRU", units=6, go_backwards=True), dtype="float64"
                    ),
                    I,
                )
            ],
            "backward GRU 5 -> 6",
        ),
    ],
)
def test_what_ours_do_not_have_is_refused_by_name(layers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        longshort.from_keras(*layers())
    assert len(str(refused.value).splitlines()) <= 3


def test_weights_of_few_digits() -> None:
    layer = longshort.GRU(I, H).bfloat16()
    (weights,) = longshort.keras_weights(layer)
    assert {array.dtype for array in weights} == {np.dtype(np.float32)}
    theirs = drawn(made("GRU", dtype="float32"), I)
    theirs.set_weights(weights)
    near(longshort.from_keras(theirs).weight_hh_l0, layer.weight_hh_l0.float())


def test_what_keras_does_not_have_is_refused_by_name() -> None:
    for layer, message in (
        (longshort.LSTM(I, H, proj_size=2, peephole=True), "does with peephole, proj_size"),
        (nn.LSTM(I, H, proj_size=2), "does with proj_size"),
        (longshort.GRU(I, H, layer_norm=True), "does with layer_norm"),
        (nn.Linear(I, H), "not Linear"),
    ):
        with pytest.raises(UsageError, match=message):
            longshort.keras_weights(layer)
