"""Beam search beside all texts that there are, greedy search and the equations' own probabilities."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import native
from longshort.beams import MOST_BEAMS, Found, beam_search
from longshort.config import ModelConfig, TrainConfig
from longshort.continuation import Continuation
from longshort.decoder import Decoder
from longshort.errors import CheckpointError, ConfigError, VocabularyError
from longshort.generation import Request, Sampling, generate, generate_many
from longshort.model import LanguageModel
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from longshort.text.words import WordTokenizer
from longshort.training import make_model

TOKENIZER = CharTokenizer("abc\n")
SYMBOLS = "\nabc"
RUNS = ["torch", "numpy", *(["native"] if native.targets() else [])]
CELLS = ["lstm", "gru", "rnn"]


@cache
def model_of(runs: str, tokenizer: Tokenizer = TOKENIZER, **options: Any) -> LanguageModel | Decoder:
    """Return a model that has preferences."""
    torch.manual_seed(5)
    model = make_model(TrainConfig(**{"hidden": 12, "embedding": 5, "seed": 5} | options), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    if runs == "torch":
        return model
    with pytest.MonkeyPatch.context() as patch:
        if runs == "numpy":
            patch.setattr(native, "ready", lambda: False)
        return Decoder(model.config, model.weights(), tokenizer)


def nats_of(cell: str, prompt: str, text: str, lines: bool) -> float:
    """Return -log p of `text` after `prompt`, by PyTorch's model: symbol by symbol, from the whole text before each."""
    model, total = model_of("torch", cell=cell, lines=lines), 0.0
    whole = ("\n" if lines or not prompt else "") + prompt + text
    ids = TOKENIZER.encode(whole).astype(np.int64)
    for place in range(len(whole) - len(text), len(whole)):
        begin = whole.rindex("\n", 0, place) if lines else 0
        logits_V, _ = model.logits(ids[begin:place], None)
        logits_V = logits_V.astype(np.float64)
        total += float(np.logaddexp.reduce(logits_V) - logits_V[ids[place]])
    return total


def ends(text: str, stops: tuple[str, ...]) -> bool:
    return any(stop in text for stop in stops)


def cut(text: str, stops: tuple[str, ...]) -> str:
    return text[: min((text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text)[1]]


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("stops", [(), ("b",), ("ca", "\n")])
def test_with_enough_beams_every_text_is_found(runs: str, cell: str, lines: bool, stops: tuple[str, ...]) -> None:
    texts = {"".join(symbols) for symbols in itertools.product(SYMBOLS, repeat=4)}
    wanted = set()
    for text in texts:
        end = next((n for n in range(1, 4) if ends(text[:n], stops)), 4)
        wanted.add(text[:end])
    model = model_of(runs, cell=cell, lines=lines)
    found = beam_search(model, TOKENIZER, "cab", 4, 256, stop=stops, length_penalty=0.5)
    assert len(found) == len(wanted)
    assert math.isclose(sum(math.exp(-each.nats) for each in found), 1, rel_tol=1e-5)
    nats = {text: nats_of(cell, "cab", text, lines) for text in wanted}
    best = sorted(wanted, key=lambda text: nats[text] / math.sqrt(len(text)))
    assert [each.nats for each in found] == pytest.approx([nats[text] for text in best], rel=1e-4, abs=1e-5)
    assert [each.symbols for each in found] == [len(text) for text in best]
    given_out = sorted(cut(text, stops) if ends(text, stops) else text for text in wanted)
    assert sorted(each.text for each in found) == given_out


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(RUNS),
    st.sampled_from(CELLS),
    st.text(SYMBOLS, max_size=5),
    st.integers(0, 7),
    st.integers(1, 9),
    st.lists(st.text(SYMBOLS, min_size=1, max_size=2), max_size=2).map(tuple),
)
def test_the_beams_are_those_of_a_search_by_hand(
    runs: str, cell: str, prompt: str, length: int, beams: int, stops: tuple[str, ...]
) -> None:
    """Of models of running text: of lines, each order is as probable as another, and rounding would decide."""
    live, done = [("", 0.0)], list[tuple[str, float]]()
    for _ in range(length):
        longer = [
            (text + symbol, nats_of(cell, prompt, text + symbol, lines=False)) for text, _ in live for symbol in SYMBOLS
        ]
        longer = sorted(longer, key=lambda pair: pair[1])[: beams - len(done)]
        done += [pair for pair in longer if ends(pair[0], stops)]
        live = [pair for pair in longer if not ends(pair[0], stops)]
    wanted = sorted(live + done, key=lambda pair: pair[1] / max(len(pair[0]), 1) ** 0.75)
    found = beam_search(model_of(runs, cell=cell, lines=False), TOKENIZER, prompt, length, beams, stop=stops)
    assert [each.text for each in found] == [cut(text, stops) if ends(text, stops) else text for text, _ in wanted]
    assert [each.nats for each in found] == pytest.approx([nats for _, nats in wanted], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(
    "tokenizer",
    [
        TOKENIZER,
        ByteTokenizer(),
        WordTokenizer.train("the cat sat on a mat .\nwhy , said he .\n"),
    ],
)
def test_one_beam_is_greedy_search(runs: str, tokenizer: Tokenizer) -> None:
    model = model_of(runs, tokenizer, cell="lstm")
    for prompt in ("", "a", "a "):
        greedy = "".join(generate(model, tokenizer, prompt, 30, Sampling(temperature=0)))
        (found,) = beam_search(model, tokenizer, prompt, 30, 1)
        assert (found.text, found.symbols) == (greedy, 30)


@pytest.mark.parametrize("runs", RUNS)
def test_a_search_goes_on_where_a_text_ended(runs: str) -> None:
    model, kept = model_of(runs, cell="lstm"), dict[int, Continuation]()
    text = "".join(piece for _, piece in generate_many(model, TOKENIZER, [Request(prompt="ab", length=9)], kept))
    whole = beam_search(model, TOKENIZER, "ab" + text, 6, 5)
    after = beam_search(model, TOKENIZER, length=6, beams=5, after=kept[0])
    assert [found.text for found in after] == [found.text for found in whole]
    assert [found.nats for found in after] == pytest.approx([found.nats for found in whole], rel=1e-4)


def test_words_go_on_after_a_text_with_their_space() -> None:
    tokenizer = WordTokenizer.train("the cat sat on a mat .\n")
    model, kept = model_of("torch", tokenizer), dict[int, Continuation]()
    list(generate_many(model, tokenizer, [Request(prompt="the cat", length=1)], kept))
    (found,) = beam_search(model, tokenizer, length=3, beams=1, after=kept[0])
    assert found.text == "".join(generate(model, tokenizer, "", 3, Sampling(temperature=0), after=kept[0]))


def test_of_equal_texts_the_first_symbols_win() -> None:
    with torch.no_grad():
        model = make_model(TrainConfig(cell="gru", hidden=3, embedding=2), TOKENIZER).eval()
        for parameter in model.parameters():
            parameter.zero_()
    found = beam_search(model, TOKENIZER, "a", 2, 5)
    assert [each.text for each in found] == ["\n\n", "\na", "\nb", "\nc", "a\n"]
    assert [each.nats for each in found] == pytest.approx([2 * math.log(4)] * 5)


def test_what_makes_no_sense_is_refused() -> None:
    model = model_of("torch")
    for words, options in (
        ("beams must be from 1 to", {"beams": 0}),
        ("beams must be from 1 to", {"beams": MOST_BEAMS + 1}),
        ("length must be at least 0", {"length": -1}),
        ("length_penalty must be from 0 to 1, not nan", {"length_penalty": math.nan}),
        ("length_penalty must be from 0 to 1", {"length_penalty": 1.01}),
        ("stop must be a tuple of texts", {"stop": ("",)}),
    ):
        with pytest.raises(ConfigError, match=words):
            beam_search(model, TOKENIZER, "a", **options)
    with pytest.raises(VocabularyError, match="never saw any character"):
        beam_search(model, TOKENIZER, "xyz")
    assert beam_search(model, TOKENIZER, "a", 0) == [Found("", 0.0, 0)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_is_damaged_is_refused(value: float) -> None:
    healthy = model_of("torch")
    assert isinstance(healthy, LanguageModel)
    weights = {name: weight.copy() for name, weight in healthy.weights().items()}
    weights["output.bias"][1] = value
    with pytest.raises(CheckpointError, match="logits are not finite"):
        beam_search(Decoder(healthy.config, weights, TOKENIZER), TOKENIZER, "a")


@pytest.mark.parametrize(("stop", "symbols"), [("é☃", 5), ("ü", 12), ("\N{REPLACEMENT CHARACTER}", 13)])
def test_a_stop_of_several_bytes_ends_a_text(stop: str, symbols: int) -> None:
    """Beams look for a stop in their last symbols, which may begin inside a character."""
    script = "é☃é☃ü".encode() + b"\xffu" * 9

    class Scripted:
        config = ModelConfig(vocab_size=256)

        def logits(self, ids_T: Any, state: Any) -> Any:
            return self._at(0), (np.zeros((1, 1, 1), np.float32),)

        def step(self, ids_B: Any, state: Any) -> Any:
            return np.stack([self._at(int(n)) for n in state[0][0, :, 0] + 1]), (state[0] + 1,)

        def _at(self, position: int) -> Any:
            logits_V = np.full(256, -50, np.float32)
            logits_V[script[position]] = 0
            return logits_V

        def nats(self, *_: Any) -> Any:
            raise AssertionError("a search does not score")

    (found,) = beam_search(Scripted(), ByteTokenizer(), "a", len(script), 1, stop=(stop,))
    whole = script.decode(errors="replace")
    assert (found.text, found.symbols) == (whole[: whole.index(stop)], symbols)
