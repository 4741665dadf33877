"""Texts written by the native loop: the model's own probabilities, the sampling as `generation.choose` has it."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import need_target
from longshort import native, native_layers, native_model, training
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.errors import ConfigError, UsageError
from longshort.generation import Request, Sampling, choose, cost_in_bits, generate, generate_many, uniform
from longshort.model import LanguageModel
from longshort.native_model import Draw, NativeModel
from longshort.structures import DecodeArgs, SamplingStructure
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer

pytestmark = pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
FLOAT32_TARGETS = [name for name in native.built_targets() if name not in native.LOWER]
TOKENIZER = CharTokenizer("abcdefgh \n")


def models(tokenizer: Tokenizer = TOKENIZER, seed: int = 1, **given: Any) -> tuple[Decoder, LanguageModel]:
    torch.manual_seed(seed)
    options = {"hidden": 20, "embedding": 7} | given
    model = training.make_model(TrainConfig(**options, seed=seed), tokenizer).eval()
    with torch.no_grad():  # the initial weights know too little to tell symbols apart
        for name, parameter in model.named_parameters():
            if "gamma" in name:  # large gains make a recurrence that no two roundings agree on for long
                parameter.uniform_(0.3, 0.8)
            else:
                parameter.mul_(1 if model.config.cell == "rnn_relu" else 3)
    return Decoder(model.config, model.weights(), tokenizer), model


def read(model: LanguageModel, ids: list[int]) -> tuple[Any, list[Any]]:
    """Return the logits after `ids` by PyTorch, and the states as arrays."""
    logits, state = model.logits(np.array(ids), None)
    return logits, [tensor.numpy() for tensor in state]


def start(model: LanguageModel, prompts: list[list[int]]) -> tuple[Any, tuple[Any, ...]]:
    """Return logits (B, V) and states (L, B, H) after the prompts."""
    found = [read(model, prompt) for prompt in prompts]
    state = tuple(np.ascontiguousarray(np.concatenate(s, axis=1)) for s in zip(*(f[1] for f in found), strict=True))
    return np.stack([f[0] for f in found]), state


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"layers": 3, "hidden": 33},
        {"layers": 4, "hidden": 33, "residual": True},
        {"layers": 2, "hidden": 41, "layer_norm": True},
        {"layers": 3, "residual": True, "layer_norm": True, "table": False},
        {"embedding": 0},
        {"hidden": 1, "embedding": 1},
        {"tied": True, "embedding": 20},
        {"layers": 2, "table": False},
    ],
)
def test_what_is_written_has_the_probabilities_of_the_model(
    cell: str, given: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_target(target)
    monkeypatch.setattr(native, "active_target", lambda: target)
    if not given.get("table", True):
        monkeypatch.setattr(native_model, "TABLE_BYTES", 0)
    decoder, model = models(cell=cell, **{name: value for name, value in given.items() if name != "table"})
    prompts = [[1, 2, 3], [9], [4, 10, 4, 4], [5, 5], [0], [1], [2, 3]]
    logits_BV, state = start(model, prompts)
    draws = [Draw(0.9, None, None, 5, row, 0) for row in range(len(prompts))]
    ids = decoder.write(logits_BV, state, draws, 30)
    for row, prompt in enumerate(prompts):
        logits, states = read(model, prompt + ids[:, row].tolist())
        scale = max(1.0, float(np.abs(logits).max()))
        np.testing.assert_allclose(logits_BV[row], logits, atol=1e-5 * scale)
        for ours, theirs in zip(state, states, strict=True):
            np.testing.assert_allclose(
                ours[:, row : row + 1], theirs, atol=1e-5 * max(1.0, float(np.abs(theirs).max()))
            )
    assert ids.min() >= 0
    assert ids.max() <= 9
    assert len(np.unique(ids)) > (1 if given.get("hidden") == 1 else 3)


@settings(max_examples=200)
@given(
    logits=st.lists(st.floats(-9, 9, width=32, allow_subnormal=False), min_size=1, max_size=40),
    temperature=st.just(0.0) | st.floats(0.05, 10),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.none() | st.floats(0.01, 1.0),
    seed=st.integers(0, 2**64 - 1),
    stream=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**62),
)
def test_a_symbol_is_chosen_as_python_chooses_it(
    logits: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stream: int,
    position: int,
) -> None:
    V = len(logits)
    weights = native_layers.Weights(np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32))
    output = np.zeros((V, 1), np.float32), np.zeros(V, np.float32)
    model = NativeModel("rnn", [weights], np.zeros((V + 1, 1), np.float32), output)
    logits_V = np.array(logits, np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    chosen = choose(logits_V, sampling, uniform(seed, stream, position))
    draw = Draw(temperature, top_k, top_p, seed, stream, position)
    (found,) = model.write(logits_V[None].copy(), [np.zeros((1, 1, 1), np.float32)], [draw], 1)[0]
    if top_p is not None and temperature:  # where rounding decides whether one symbol more belongs
        p = np.exp((logits_V.astype(np.float64) - logits_V.max()) / temperature)
        kept = -np.sort(-p)[: top_k or V]
        if (np.abs(np.cumsum(kept / kept.sum()) - top_p) < 1e-9).any():
            return
    assert found == chosen


def test_frequencies_follow_the_probabilities() -> None:
    """A model whose output bias alone decides: a chi-squared test with 4 degrees of freedom."""
    p = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    weights = native_layers.Weights(np.zeros((4, 1), np.float32), np.zeros((4, 1), np.float32))
    output = np.zeros((5, 1), np.float32), np.log(p).astype(np.float32)
    model = NativeModel("lstm", [weights], np.zeros((6, 1), np.float32), output)
    state = [np.zeros((1, 4, 1), np.float32) for _ in range(2)]
    draws = [Draw(1.0, None, None, 3, stream, 0) for stream in range(4)]
    ids = model.write(np.tile(output[1], (4, 1)), state, draws, 5_000)
    expected = 20_000 * p
    assert ((np.bincount(ids.ravel(), minlength=5) - expected) ** 2 / expected).sum() < 18.5  # p > 0.001


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_text_is_the_same_alone_in_a_batch_and_in_pieces(cell: str) -> None:
    decoder, model = models(cell=cell, layers=2, hidden=70)
    prompts = [[row % 10] for row in range(19)]
    draws = [Draw(0.8, None, None, 2, row, 3) for row in range(19)]
    logits_BV, state = start(model, prompts)
    together = decoder.write(logits_BV, state, draws, 40)
    for threads in (2, 3):
        decoder.threads = threads
        again, kept = start(model, prompts)
        assert np.array_equal(decoder.write(again, kept, draws, 40), together)
        assert again.tobytes() == logits_BV.tobytes()
        assert [s.tobytes() for s in kept] == [s.tobytes() for s in state]
    for row in (0, 7, 18):
        alone, own = start(model, [prompts[row]])
        pieces = []
        for first, steps in ((0, 1), (1, 0), (1, 25), (26, 14)):
            draw = draws[row]._replace(position=3 + first)
            pieces += decoder.write(alone, own, [draw], steps)[:, 0].tolist()
        assert pieces == together[:, row].tolist()
        assert alone[0].tobytes() == logits_BV[row].tobytes()
        assert [s[:, 0].tobytes() for s in own] == [s[:, row].tobytes() for s in state]


@pytest.mark.parametrize("newline", [1, None])
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_threads_that_share_a_text_give_the_same_bits(
    cell: str, table: bool, precision: str, newline: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few texts of a large model: a team's threads divide its units, and wait for each other after every layer."""
    if not table:
        monkeypatch.setattr(native_model, "TABLE_BYTES", 0)
    _, model = models(cell=cell, layers=3 if table else 2, hidden=530, residual=table, layer_norm=not table)
    decoder = Decoder(model.config, model.weights(), TOKENIZER, precision)
    for B in (1, 5, 23):  # one team, and of the last several
        found = []
        for threads in (1, 2, 3, 8):
            decoder.threads = threads
            logits_BV, state = start(model, [[row % 10, 3] for row in range(B)])
            draws = [Draw(0.9, None, None, 4, row, 0) for row in range(B)]
            ids = decoder.write(logits_BV, state, draws, 60, newline=newline)
            nats, after = decoder.nats(ids, ids, None)
            found.append((ids.tobytes(), logits_BV.tobytes(), nats.tobytes(), *(s.tobytes() for s in (*state, *after))))
        assert all(each == found[0] for each in found)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_what_is_read_has_the_same_bits_alone_and_in_any_batch(cell: str) -> None:
    decoder, model = models(cell=cell, layers=3, hidden=70, residual=True, layer_norm=True)
    rng = np.random.default_rng(3)
    ids_TB, targets_TB = rng.integers(11, size=(30, 19)), rng.integers(10, size=(30, 19))
    nats_TB, state = decoder.nats(ids_TB, targets_TB, None)
    theirs_TB, _ = model.nats(ids_TB, targets_TB, None)
    np.testing.assert_allclose(nats_TB, theirs_TB, atol=1e-5 * theirs_TB.max())
    for row, threads in ((0, 1), (11, 3), (18, 2)):
        decoder.threads = threads
        first, between = decoder.nats(ids_TB[:7, row : row + 1], targets_TB[:7, row : row + 1], None)
        kept = [tensor.tobytes() for tensor in between]
        second, after = decoder.nats(ids_TB[7:, [row, row]], targets_TB[7:, [row, row]], _twice(between))
        assert [tensor.tobytes() for tensor in between] == kept  # what was given is not written to
        assert np.concatenate([first[:, 0], second[:, 0]]).tobytes() == nats_TB[:, row].tobytes()
        assert [s[:, 0].tobytes() for s in after] == [s[:, row].tobytes() for s in state]
        logits_V, _ = decoder.logits(ids_TB[:, row], None)
        np.testing.assert_allclose(logits_V, model.logits(ids_TB[:, row], None)[0], atol=1e-4)


def _twice(state: Any) -> Any:
    return tuple(np.repeat(tensor, 2, axis=1) for tensor in state)


def test_the_state_is_zero_before_a_newline() -> None:
    decoder, model = models(layers=2)
    logits_BV, state = start(model, [[1, 2], [3]])
    ids = decoder.write(logits_BV, state, [Draw(3.0, None, None, 1, row, 0) for row in range(2)], 60, newline=1)
    for row in range(2):
        written = ids[:, row].tolist()
        last = len(written) - 1 - written[::-1].index(1)
        logits, states = read(model, written[last:])
        np.testing.assert_allclose(logits_BV[row], logits, atol=1e-5 * max(1, np.abs(logits).max()))
        np.testing.assert_allclose(state[1][:, row], states[1][:, 0], atol=1e-5)


# ------------------------------------------------------------------------------------------------ eight bits


def rounded(rows: Any) -> Any:
    """Return an array (..., K) with each row rounded to 127 steps to either side, as the kernels read it."""
    scales = np.abs(rows).max(axis=-1, keepdims=True).astype(np.float64) / 127
    return np.round(rows / np.where(scales > 0, scales, 1)) * scales


def in_eight_bits(
    model: LanguageModel, table: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Decoder, Decoder]:
    """Return a decoder of eight bits for a target, and NumPy's whose products are of rounded factors, in float64."""
    if not table:
        monkeypatch.setattr(native_model, "TABLE_BYTES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(native, "active_target", lambda: target)
        few = Decoder(model.config, model.weights(), TOKENIZER, "int8")
        patch.setattr(native, "ready", lambda: False)
        same = Decoder(model.config, model.weights(), TOKENIZER)
    if table:  # a table of gates is float32
        assert same._table is not None
    monkeypatch.setattr("longshort.decoder.product", lambda left, right: rounded(left) @ rounded(right.T).T)
    return few, same


@pytest.mark.parametrize("target", FLOAT32_TARGETS)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize("table", [True, False])
def test_eight_bits_are_products_of_rounded_numbers(
    cell: str, table: bool, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_target(target)
    _, model = models(cell=cell, layers=3, hidden=37, residual=table, layer_norm=not table)
    few, same = in_eight_bits(model, table, target, monkeypatch)
    rng = np.random.default_rng(5)
    ids_TB, targets_TB = rng.integers(11, size=(12, 9)), rng.integers(10, size=(12, 9))
    nats_TB, _ = few.nats(ids_TB, targets_TB, None)
    theirs_TB, _ = same.nats(ids_TB, targets_TB, None)
    errors_TB = np.abs(nats_TB - theirs_TB)
    assert (
        errors_TB < 1e-5
    ).mean() > 0.9  # a number just between two steps may be rounded otherwise, and what follows it
    assert errors_TB.max() < 0.1
    monkeypatch.undo()
    assert np.abs(nats_TB - same.nats(ids_TB, targets_TB, None)[0]).mean() > 1e-3  # of numbers that were not rounded
    for column in range(0, 9, 4):
        alone, _ = few.nats(ids_TB[:, column : column + 1], targets_TB[:, column : column + 1], None)
        assert alone[:, 0].tobytes() == nats_TB[:, column].tobytes()


@pytest.mark.parametrize("target", native.built_targets())
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_eight_bits_have_the_same_sums_without_an_instruction_for_them(
    cell: str, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_target(target)
    monkeypatch.setattr(native, "active_target", lambda: target)
    _, model = models(cell=cell, layers=2, hidden=150)
    few = Decoder(model.config, model.weights(), TOKENIZER, "int8")
    ids_TB = np.random.default_rng(7).integers(10, size=(8, 29))
    nats_TB, state = few.nats(ids_TB, ids_TB, None)
    assert few._native is not None
    few._native._structure.int8 = 2
    again_TB, after = few.nats(ids_TB, ids_TB, None)
    assert again_TB.tobytes() == nats_TB.tobytes()
    assert [s.tobytes() for s in after] == [s.tobytes() for s in state]


def test_eight_bits_of_a_state_that_is_not_finite_are_nan_in_its_text_alone() -> None:
    _, model = models(hidden=37)
    few = Decoder(model.config, model.weights(), TOKENIZER, "int8")
    ids_TB = np.zeros((3, 4), np.int64)
    expected_TB, state = few.nats(ids_TB, ids_TB, None)
    for value in (np.nan, np.inf, -np.inf):
        given = tuple(np.zeros_like(tensor) for tensor in state)
        given[0][0, 2, 5] = value
        nats_TB, _ = few.nats(ids_TB, ids_TB, given)
        assert np.isnan(nats_TB[:, 2]).all()
        assert nats_TB[:, [0, 1, 3]].tobytes() == expected_TB[:, [0, 1, 3]].tobytes()


@pytest.mark.parametrize("target", native.LOWER)
def test_eight_bits_of_many_rows_where_tiles_have_more_than_vectors(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_target(target)
    monkeypatch.setattr(native, "active_target", lambda: target)
    _, model = models(cell="lstm", layers=2, hidden=37)
    few, whole = (Decoder(model.config, model.weights(), TOKENIZER, name) for name in ("int8", "float32"))
    ids_TB = np.random.default_rng(5).integers(10, size=(9, 70))
    nats_TB, _ = few.nats(ids_TB, ids_TB, None)
    np.testing.assert_allclose(nats_TB, whole.nats(ids_TB, ids_TB, None)[0], atol=0.2)
    for row in (0, 15, 31, 69):
        alone, _ = few.nats(ids_TB[:, row : row + 1], ids_TB[:, row : row + 1], None)
        assert alone[:, 0].tobytes() == nats_TB[:, row].tobytes()


def test_eight_bits_of_weights_that_are_not_finite_are_nan() -> None:
    _, model = models(hidden=37)
    ids_TB = np.zeros((1, 1), np.int64)
    for value in (np.nan, np.inf):
        weights = model.weights()
        weights["output.weight"] = weights["output.weight"].copy()
        weights["output.weight"][3, 5] = value
        few = Decoder(model.config, weights, TOKENIZER, "int8")
        logits_V, _ = few.logits(ids_TB[:, 0], None)
        assert np.isnan(logits_V).tolist() == [i == 3 for i in range(10)]


@pytest.mark.parametrize(("weight", "x"), [(1e30, 1e-33), (1e-30, 1e37), (1.0, 1.0)])
def test_eight_bits_of_small_and_large_numbers(weight: float, x: float) -> None:
    """A row of four numbers that lie far from 1, by weights that do."""
    rows = np.array([[x, 0, -x / 2, 0], [0, 0, 0, 0]], np.float32)
    layer = native_layers.Weights(np.array([[weight, 0, 0, 0]], np.float32), np.zeros((1, 1), np.float32))
    output = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_model, "TABLE_BYTES", 0)
        model = NativeModel("rnn_relu", [layer], rows, output, int8=True)
    _, logits_BV = model.read(np.zeros((1, 1), np.int64), [np.zeros((1, 1, 1), np.float32)])
    assert logits_BV[0, 0] == pytest.approx(weight * x, rel=1e-5)


def test_a_model_too_wide_for_sums_of_eight_bits_is_refused() -> None:
    E = 2**17 + 1
    rows = np.ones((2, E), np.float32)
    layer = native_layers.Weights(np.ones((1, E), np.float32), np.zeros((1, 1), np.float32))
    output = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_model, "TABLE_BYTES", 0)
        with pytest.raises(UsageError, match="at most 131,072 numbers; the model has 131,073"):
            NativeModel("rnn_relu", [layer], rows, output, int8=True)
        exact = NativeModel(
            "rnn_relu", [layer._replace(weight_ih=layer.weight_ih[:, 1:])], rows[:, 1:], output, int8=True
        )
    _, logits_BV = exact.read(np.zeros((1, 1), np.int64), [np.zeros((1, 1, 1), np.float32)])
    assert logits_BV[0, 0] == pytest.approx(2**17, rel=1e-5)
    library = native.need()
    assert library.ls_rounded_floats(0, E, 8, -1) == -1
    assert library.ls_rounded_floats(-1, E, 8, -1) > 0
    assert library.ls_rounded_floats(-1, 8, E, -1) == -1


def test_what_eight_bits_cost_is_small_and_exact() -> None:
    decoder, model = models(hidden=64)
    few = Decoder(model.config, model.weights(), TOKENIZER, "int8")
    cost = cost_in_bits(decoder, few)
    assert 0 < cost < 0.03
    assert cost_in_bits(decoder, decoder) == 0
    # The divergence itself, where both have read the same: of all symbols, not of those that were written.
    exact = []
    logits_BV, state = start(model, [[9]] * 8)
    ids = decoder.write(logits_BV, state, [Draw(1.0, None, None, 0, row, 0) for row in range(8)], 150)
    for row in range(8):
        for end in range(0, 150, 5):
            read_ids = np.append(9, ids[:end, row])
            p, q = (
                np.exp(each - np.logaddexp.reduce(each))
                for each in (m.logits(read_ids, None)[0] for m in (decoder, few))
            )
            exact.append(float((p * np.log(p / q)).sum()) / np.log(2))
    assert cost == pytest.approx(np.mean(exact), rel=0.5)
    with pytest.raises(UsageError, match="float32, bfloat16, int8; not 'int4'"):
        Decoder(model.config, model.weights(), TOKENIZER, "int4")


def test_eight_bits_need_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = models()
    monkeypatch.setattr(native, "ready", lambda: False)
    with pytest.raises(UsageError, match="Weights of int8 need native kernels"):
        Decoder(model.config, model.weights(), TOKENIZER, "int8")


# ----------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, ByteTokenizer()])
def test_python_numpy_and_the_native_loop_write_the_same(
    lines: bool, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, model = models(tokenizer, lines=lines, layers=3, residual=True)
    requests = [
        Request(prompt="abc", length=120),
        Request(length=7, sampling=Sampling(temperature=1.5, top_k=4, seed=9), stream=3),
        Request(prompt="ab\ncd", length=90, sampling=Sampling(top_p=0.8), stop=("a", "gg"), stream=4),
        Request(prompt="h", length=0),
        Request(prompt="h", length=50, sampling=Sampling(temperature=0.0)),
    ]
    texts = [""] * len(requests)
    for number, piece in generate_many(decoder, tokenizer, requests):
        texts[number] += piece
    assert texts[3] == ""
    for request, text in zip(requests, texts, strict=True):
        rest = (request.prompt, request.length, request.sampling)
        assert "".join(generate(decoder, tokenizer, *rest, stop=request.stop, stream=request.stream)) == text
        assert "".join(generate(model, tokenizer, *rest, stop=request.stop, stream=request.stream)) == text
    with monkeypatch.context() as patch:
        patch.setattr(native, "ready", lambda: False)
        plain = Decoder(model.config, model.weights(), tokenizer)
    assert not plain.writes
    slow = [""] * len(requests)
    for number, piece in generate_many(plain, tokenizer, requests):
        slow[number] += piece
    assert slow == texts


@given(stop=st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3), seed=st.integers(0, 50))
@settings(max_examples=40)
def test_a_text_ends_before_the_first_stop(stop: list[str], seed: int) -> None:
    decoder, _ = CACHE.setdefault("models", models(CharTokenizer("ab \n")))
    sampling = Sampling(temperature=1.0, seed=seed)
    whole = "".join(generate(decoder, decoder.tokenizer, "a", 60, sampling))
    pieces = list(generate(decoder, decoder.tokenizer, "a", 60, sampling, stop=stop))
    expected = whole
    for end in range(1, len(whole) + 1):
        if complete := [word for word in stop if whole[:end].endswith(word)]:
            expected = whole[: end - max(map(len, complete))]
            break
    assert "".join(pieces) == expected
    assert all(pieces)


CACHE: dict[str, Any] = {}


@pytest.mark.parametrize("given", [{"length": -1}, {"stop": ("",)}, {"stop": "abc"}, {"stop": (1,)}])
def test_requests_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        Request(**given)


# ---------------------------------------------------------------------------------------------- the interface


def test_what_does_not_fit_is_refused_before_the_library_is_called() -> None:
    decoder, model = models()
    logits_BV, state = start(model, [[1], [2]])
    draws = [Draw(1.0, None, None, 0, row, 0) for row in range(2)]
    for wrong in (
        (logits_BV[:1], state, draws, 1),
        (logits_BV.astype(np.float64), state, draws, 1),
        (logits_BV[:, ::-1], state, draws, 1),
        (logits_BV, state[:1], draws, 1),
        (logits_BV, (state[0], state[1][:, :1]), draws, 1),
        (logits_BV, state, draws[:1], 1),
        (logits_BV, state, draws, -1),
        (logits_BV, state, [draws[0], draws[1]._replace(temperature=-1.0)], 1),
        (logits_BV, state, [draws[0], draws[1]._replace(temperature=float("nan"))], 1),
        (logits_BV, state, [draws[0], draws[1]._replace(top_p=1.5)], 1),
        (logits_BV, state, [draws[0], draws[1]._replace(position=-1)], 1),
    ):
        with pytest.raises(ValueError, match=r"shape|float32|contiguous|states|steps|refused"):
            decoder.write(*wrong)
    weights = native_layers.Weights(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32))
    with pytest.raises(ValueError, match="output weight"):
        NativeModel(
            "lstm", [weights], np.zeros((5, 2), np.float32), (np.zeros((3, 1), np.float32), np.zeros(4, np.float32))
        )
    rows, output = np.zeros((5, 2), np.float32), (np.zeros((4, 1), np.float32), np.zeros(4, np.float32))
    above = native_layers.Weights(np.zeros((4, 1), np.float32), np.zeros((4, 1), np.float32))
    of_two = native_layers.Weights(np.zeros((8, 1), np.float32), np.zeros((8, 2), np.float32))
    gains = [np.ones(4, np.float32)] * 2 + [np.ones(1, np.float32)] * 2
    NativeModel("lstm", [weights, above], rows, output, gains=[gains, gains])
    for layers, of_gains, named in (
        ([weights, of_two], (), "weight_ih of layer 1"),
        ([weights, weights], (), "weight_ih of layer 1"),
        ([above, above], (), "weight_ih of layer 0"),
        ([weights, above._replace(weight_hh=np.zeros((4, 2), np.float32))], (), "weight_hh of layer 1"),
        ([weights, above], [gains], "gains must be 4 arrays of each layer"),
        ([weights, above], [gains, gains[:2]], "gains must be 4 arrays of each layer"),
        ([weights, above], [gains, gains[::-1]], "gains must have the shape"),
    ):
        with pytest.raises(ValueError, match=named):
            NativeModel("lstm", layers, rows, output, gains=of_gains)


def test_the_library_refuses_what_it_can_see() -> None:
    decoder, model = models()
    assert decoder._native is not None
    library, structure = native.need(), decoder._native._structure
    logits_BV, state = start(model, [[1]])
    sampling = SamplingStructure(1.0, 0.0, 0, 0, 0, 0)
    ids = np.full(4, -7)

    def call(of_model: dict[str, Any] | None = None, **changes: Any) -> int:
        changed = type(structure).from_buffer_copy(structure)
        for name, value in (of_model or {}).items():
            setattr(changed, name, value)
        args = DecodeArgs(model=changed, B=1, steps=4, newline=-1, num_threads=1)
        args.sampling = ctypes.addressof(sampling)
        args.logits, args.h, args.c = (array.ctypes.data for array in (logits_BV, *state))
        args.ids = ids.ctypes.data
        for name, value in changes.items():
            setattr(args, name, value)
        return int(library.ls_decode(ctypes.byref(args)))

    wrong_models: list[dict[str, Any]] = [
        *({"V": value} for value in (0, -1, 2**40)),
        *({"H": value} for value in (0, 2**40)),
        *({"layers": value} for value in (0, -1, 2000)),
        *({name: None} for name in ("packed", "head", "table")),
        *({"E": -1}, {"cell": 9}, {"target": 99}),
    ]
    for wrong in wrong_models:
        assert call(wrong) == native.BAD_ARGUMENT, wrong
    wrong_calls: list[dict[str, Any]] = [
        *({"B": -1}, {"steps": -1}, {"steps": 2**60}, {"num_threads": 0}),
        *({name: None} for name in ("sampling", "logits", "h", "c", "ids")),
    ]
    for wrong in wrong_calls:
        assert call(**wrong) == native.BAD_ARGUMENT, wrong
    assert library.ls_decode(None) == native.BAD_ARGUMENT
    assert library.ls_table_floats(0, 0, 4, -1) == library.ls_head_floats(4, 0, -1) == -1
    assert library.ls_pack_head(4, 4, -1, None, None, None) == native.BAD_ARGUMENT
    assert library.ls_pack_table(3, 4, 4, -1, None, None) == native.BAD_ARGUMENT
    assert (ids == -7).all()
    assert call(steps=0) == call(B=0) == native.OK
    assert call() == native.OK
    assert (ids >= 0).all()


def test_logits_that_are_not_numbers_choose_a_symbol_all_the_same() -> None:
    decoder, model = models()
    for value in (np.nan, np.inf, -np.inf):
        logits_BV, state = start(model, [[1]] * 4)
        logits_BV[:] = value
        draws = [Draw(0.7, top_k, top_p, 1, 0, 0) for top_k in (None, 3) for top_p in (None, 0.5)]
        ids = decoder.write(logits_BV, state, draws, 3)
        assert ((ids >= 0) & (ids < 10)).all()
