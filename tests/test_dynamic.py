"""Dynamic evaluation: every symbol is predicted before the model learns from it, and the model stays what it was."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import training
from longshort.config import TrainConfig
from longshort.dynamic import Learning, evaluate_dynamically
from longshort.errors import ConfigError, TextError
from longshort.evaluation import evaluate
from longshort.model import LanguageModel
from longshort.text.encoding import encode_text
from longshort.text.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abc \n")


def model_of(**given: Any) -> LanguageModel:
    return training.make_model(TrainConfig(**({"hidden": 9, "embedding": 4} | given)), TOKENIZER)


def by_hand(model: LanguageModel, text: str, learning: Learning) -> float:
    """Return the nats a token by the equations at the head of the file, in float64 and without an optimizer."""
    model = copy.deepcopy(model).double()
    weights, own = list(model.parameters()), [p.detach().clone() for p in model.parameters()]
    squares, state, total, counted = [torch.zeros_like(p) for p in weights], None, 0.0, 0
    ids = torch.from_numpy(TOKENIZER.encode(text).astype(np.int64))
    for number, first in enumerate(range(0, len(ids) - 1, learning.window), start=1):
        x = ids[first : first + learning.window][: len(ids) - 1 - first]
        y = ids[first + 1 : first + 1 + len(x)]
        logits, state = model(x[:, None], state)
        known = y < TOKENIZER.size
        log_p = logits[:, 0].log_softmax(-1)[known].gather(1, y[known, None])
        loss = -log_p.sum()
        total, counted = total + float(loss.detach()), counted + int(known.sum())
        gradients = torch.autograd.grad(loss / len(x), weights)
        with torch.no_grad():
            for w, w_0, v, g in zip(weights, own, squares, gradients, strict=True):
                v.mul_(0.999).add_(0.001 * g * g)
                w.sub_(learning.rate * g / ((v / (1 - 0.999**number)).sqrt() + 1e-8))
                w.add_(learning.decay * (w_0 - w))
        state = tuple(tensor.detach() for tensor in state)
    return total / counted


@settings(max_examples=15)
@given(
    text=st.text("abc ?", min_size=12, max_size=60).filter(lambda text: any(c in "abc " for c in text[1:])),
    window=st.integers(1, 20),
    rate=st.sampled_from([1e-3, 1e-2]),
    decay=st.sampled_from([0.0, 0.05, 1.0]),
    layers=st.integers(1, 2),
)
def test_it_is_the_equations(text: str, window: int, rate: float, decay: float, layers: int) -> None:
    model = model_of(cell="gru", layers=layers)
    learning = Learning(rate=rate, decay=decay, window=window)
    found = evaluate_dynamically(model, text, learning)
    assert found.nats_per_token == pytest.approx(by_hand(model, text, learning), rel=1e-3)
    assert found.tokens + found.skipped == len(text) - 1
    assert "dynamic" in found.protocol


def test_the_model_stays_what_it_was_and_nothing_is_learned_before_it_counts() -> None:
    model, text = model_of(dropout=0.5).train(), "abc " * 80
    before = copy.deepcopy(model.state_dict())
    whole = evaluate_dynamically(model, text, Learning(window=8, rate=0.01))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    # A longer text predicts its beginning just as well: what comes later has no part in it.
    first = evaluate_dynamically(model, text[:9], Learning(window=8, rate=0.01))
    assert first.nats_per_token == pytest.approx(evaluate(model, TOKENIZER, text[:9]).nats_per_token, rel=1e-5)
    # And what repeats is learned.
    assert whole.nats_per_token < 0.8 * evaluate(model, TOKENIZER, text).nats_per_token
    # Where every step is taken back, nothing is.
    back = evaluate_dynamically(model, text, Learning(window=8, rate=0.01, decay=1.0))
    assert back.nats_per_token == pytest.approx(evaluate(model, TOKENIZER, text).nats_per_token, rel=1e-5)


def test_lines_begin_from_a_zero_state_and_are_learned_from_all_the_same() -> None:
    model, text = model_of(lines=True), "abc abc\n" * 30
    static = evaluate(model, TOKENIZER, text)
    none = evaluate_dynamically(model, text, Learning(rate=1e-12, window=3))
    assert none.nats_per_token == pytest.approx(static.nats_per_token, rel=1e-5)
    assert none.tokens == static.tokens
    part = encode_text(TOKENIZER, text, True)
    found = evaluate_dynamically(model, part, Learning(rate=0.01))
    assert found.nats_per_token < 0.8 * static.nats_per_token
    assert "each line" in found.protocol


def test_what_cannot_be_measured_is_refused() -> None:
    model = model_of()
    with pytest.raises(TextError, match="no symbol"):
        evaluate_dynamically(model, "a?")
    with pytest.raises(ConfigError, match="rate"):
        Learning(rate=0.0)
    with torch.no_grad():
        model.get_parameter("output.bias").fill_(math.nan)
    with pytest.raises(ConfigError, match="diverged"):
        evaluate_dynamically(model, "abc")
