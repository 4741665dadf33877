from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from longshort.config import ModelConfig, TrainConfig
from longshort.continuation import Continuation
from longshort.decoder import Decoder
from longshort.errors import ConfigError, VocabularyError
from longshort.generation import Request, Sampling, choose, generate, generate_many, philox4x32, prompt_ids, uniform
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer
from longshort.text.words import WordTokenizer
from longshort.training import make_model

logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(lambda v: np.array(v, dtype=np.float32))
units = st.floats(0, 1, exclude_max=True)


class Scripted:
    """A model that writes what it is told to, whatever it reads, and keeps what it read."""

    def __init__(self, script: list[int], size: int) -> None:
        self.script, self.size, self.read = script, size, list[int]()
        self.config = ModelConfig(vocab_size=size)

    def logits(self, ids_T: NDArray[np.int64], state: Any) -> tuple[NDArray[np.float32], int]:
        self.read += ids_T.tolist()
        position = 0 if state is None else state + 1
        one_hot = np.full(self.size, -100.0, dtype=np.float32)
        one_hot[self.script[position % len(self.script)]] = 100.0
        return one_hot, position

    def nats(self, *_: Any) -> Any:
        raise AssertionError("generation does not score")


def test_philox_gives_the_published_values() -> None:
    """Known answers of the authors' own test suite (Random123, philox4x32, 10 rounds)."""
    full = 0xFFFFFFFF
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((full,) * 4, (full, full)) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_uniform_numbers_are_uniform_and_differ_by_seed_stream_and_position() -> None:
    found = [uniform(s, t, p) for s, t, p in itertools.product(range(5), range(5), range(400))]
    assert len(set(found)) == 10_000
    counts, _ = np.histogram(found, bins=20, range=(0, 1))
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-squared with 19 degrees: p > 0.0007
    assert uniform(2**64 - 1, 2**64 - 1, 2**64 - 1) < 1.0


@given(
    logits_V=logits,
    u=units,
    temperature=st.floats(0.05, 10),
    k=st.none() | st.integers(1, 15),
    p=st.none() | st.floats(0.01, 1.0),
)
def test_a_symbol_is_chosen_by_the_inverse_cumulative_distribution(
    logits_V: NDArray[np.float32], u: float, temperature: float, k: int | None, p: float | None
) -> None:
    """Against the definition, written the slow way."""
    weights = [math.exp((float(x) - float(max(logits_V))) / temperature) for x in logits_V]
    ranked = sorted(range(len(weights)), key=lambda i: (-logits_V[i], i))
    kept = ranked[: k or len(ranked)]
    if p is not None:
        total, reached = math.fsum(weights[i] for i in kept), 0.0
        for count, i in enumerate(kept, start=1):
            reached += weights[i] / total
            if reached >= p * (1 - 1e-9):
                near = abs(reached - p) < 1e-9
                kept = kept[:count]
                break
        else:
            near = True
    else:
        near = False
    chosen = choose(logits_V, Sampling(temperature=temperature, top_k=k, top_p=p), u)
    if near:  # rounding decides whether one more symbol belongs
        return
    assert chosen in kept
    below = math.fsum(weights[i] for i in kept if i < chosen) / math.fsum(weights[i] for i in kept)
    upto = math.fsum(weights[i] for i in kept if i <= chosen) / math.fsum(weights[i] for i in kept)
    assert below - 1e-9 <= u <= upto + 1e-9


@given(logits_V=logits, u=units)
def test_greedy_takes_the_largest_and_the_lower_id_of_equals(logits_V: NDArray[np.float32], u: float) -> None:
    chosen = choose(logits_V, Sampling(temperature=0), u)
    assert chosen == min(i for i, x in enumerate(logits_V) if x == max(logits_V))
    assert choose(logits_V, Sampling(top_k=1), u) == chosen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.1, 0.2, 0.3, 0.4]),
        ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),  # p to the power 1 / temperature
        ({"temperature": 1.0, "top_k": 2}, [0, 0, 3 / 7, 4 / 7]),
        ({"temperature": 1.0, "top_p": 0.8}, [0, 2 / 9, 3 / 9, 4 / 9]),
    ],
)
def test_frequencies_follow_the_probabilities(settings: dict[str, Any], expected: list[float]) -> None:
    logits_V = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    n, sampling = 4000, Sampling(**settings)
    counts = np.bincount([choose(logits_V, sampling, uniform(1, 0, i)) for i in range(n)], minlength=4)
    possible = np.array(expected) > 0
    assert not counts[~possible].any()
    expected_counts = n * np.array(expected)[possible]
    assert ((counts[possible] - expected_counts) ** 2 / expected_counts).sum() < 16.3  # 3 degrees: p > 0.001


def test_a_model_reads_the_prompt_and_then_what_it_wrote() -> None:
    tokenizer = CharTokenizer("abc\n")
    model = Scripted([1, 2, 3], size=4)  # a, b, c
    assert "".join(generate(model, tokenizer, "ca?", 4)) == "abca"
    assert model.read == [3, 1, 4, 1, 2, 3]  # "?" is unknown


def test_without_a_prompt_a_newline_or_the_first_symbol_is_read() -> None:
    assert prompt_ids(CharTokenizer("b\na"), "").tolist() == [0]
    assert prompt_ids(CharTokenizer("ba"), "").tolist() == [0]
    assert prompt_ids(ByteTokenizer(), "").tolist() == [10]


def test_a_prompt_of_unknown_symbols_alone_is_refused() -> None:
    with pytest.raises(VocabularyError, match="never saw any character of the prompt 'é€'"):
        list(generate(Scripted([0], 2), CharTokenizer("ab"), "é€", 3))


def test_a_prompt_of_unknown_words_alone_is_refused() -> None:
    with pytest.raises(VocabularyError, match="never saw any word of the prompt 'yak gnu'"):
        list(generate(Scripted([0], 3), WordTokenizer(["the", "cat", "<eos>"]), "yak gnu", 3))


def words_model(lines: bool = False) -> Decoder:
    """Return a model of words with random weights."""
    torch.manual_seed(3)
    tokenizer = WordTokenizer.train("the cat sat on a mat .\nwhy , said he .\n")
    model = make_model(TrainConfig(hidden=12, embedding=5, lines=lines, tokenizer="word"), tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return Decoder(model.config, model.weights(), tokenizer)


def written(model: Decoder, request: Request) -> tuple[str, Continuation]:
    ends: dict[int, Continuation] = {}
    text = "".join(piece for _, piece in generate_many(model, model.tokenizer, [request], ends))
    return text, ends[0]


def assert_same(found: Continuation, wanted: Continuation) -> None:
    assert found.tail.tolist() == wanted.tail.tolist()
    for ours, theirs in zip((*found.state, found.logits_V), (*wanted.state, wanted.logits_V), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("lines", [False, True])
def test_white_space_alone_is_no_symbol_of_a_model_of_words(lines: bool) -> None:
    """Neither where a text goes on with it, nor where it is all that is written before a stop."""
    model = words_model(lines)
    _, end = written(model, Request(prompt="the cat", length=0))
    for space in (" ", "\t ", ""):
        assert_same(written(model, Request(prompt=space, length=0, after=end))[1], end)
        assert_same(written(model, Request(prompt=space, length=0))[1], written(model, Request(length=0))[1])
    greedy = Request(prompt="the cat", length=9, sampling=Sampling(temperature=0))
    first = written(model, replace(greedy, length=1))[0].strip()
    assert first
    text, stopped = written(model, replace(greedy, stop=(first,)))
    assert not text.strip()
    assert stopped.position == 1
    assert_same(stopped, end)


@given(st.text(min_size=1, max_size=20).filter(lambda t: "\ufffd" not in t and t.isprintable()))
def test_bytes_come_as_whole_characters(text: str) -> None:
    script = list(text.encode("utf-8"))
    pieces = list(generate(Scripted(script, 256), ByteTokenizer(), "", len(script)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    cut = "".join(generate(Scripted([0xE2, 0x82], 256), ByteTokenizer(), "", 2))
    assert cut == "\ufffd"


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_settings_outside_their_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        Sampling(**values)
