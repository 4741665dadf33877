"""The generated text: its grammar is unambiguous, and its entropy is what the formula says."""

from __future__ import annotations

import hashlib
import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort.errors import ConfigError
from longshort.text.grammar import GRAMMAR, Grammar, entropy_bits_per_character, generate

START = next(iter(GRAMMAR))


def derivation_bits(sentence: str) -> list[float]:
    """-log2 probability of every derivation of `sentence`, found by trying all alternatives everywhere."""
    found = []
    states: list[tuple[tuple[str, ...], int, float]] = [((START,), 0, 0.0)]
    while states:
        symbols, at, bits = states.pop()
        if not symbols:
            if at == len(sentence):
                found.append(bits)
        elif symbols[0] in GRAMMAR:
            for p, parts in GRAMMAR[symbols[0]]:
                states.append((parts + symbols[1:], at, bits - math.log2(p)))
        elif sentence.startswith(symbols[0], at):
            states.append((symbols[1:], at + len(symbols[0]), bits))
    return found


def beginnings(symbol: str) -> set[str]:
    """The literal strings that what is derived from `symbol` can begin with."""
    if symbol not in GRAMMAR:
        return {symbol}
    return set().union(*(beginnings(parts[0]) for _, parts in GRAMMAR[symbol]))


def test_entropy_agrees_with_the_surprise_of_a_long_text() -> None:
    sentences = re.findall(r"[^.]*\.[ \n]", generate(400_000, seed=7))
    derivations = [derivation_bits(sentence) for sentence in sentences]
    assert all(len(found) == 1 for found in derivations), "a sentence without exactly one derivation"
    bits = np.array([found[0] for found in derivations])
    characters = np.array([len(sentence) for sentence in sentences])

    measured = bits.sum() / characters.sum()
    # Standard error of a ratio of two means over independent sentences.
    error = np.std(bits - measured * characters) / characters.mean() / math.sqrt(len(sentences))
    assert error < 0.005 * measured, "too few sentences to prove anything"
    assert abs(measured - entropy_bits_per_character()) < 4 * error


def test_another_entropy_would_be_noticed() -> None:
    # The same check must fail for a grammar that is only a little different.
    other = {**GRAMMAR, "<any clause>": ((0.8, ("<clause singular>",)), (0.2, ("<clause plural>",)))}
    assert abs(entropy_bits_per_character(other) - entropy_bits_per_character()) > 0.001


@pytest.mark.parametrize(
    ("grammar", "bits", "characters"),
    [
        ({"S": ((1.0, ("abc",)),)}, 0.0, 3.0),
        ({"S": ((0.5, ("a",)), (0.5, ("b",)))}, 1.0, 1.0),
        ({"S": ((0.5, ("a",)), (0.5, ("b", "S")))}, 2.0, 2.0),  # a geometric number of letters
        # Two independent choices of 1/4 to 3/4, then a full stop.
        (
            {"S": ((1.0, ("X", "X", ".")),), "X": ((0.25, ("a",)), (0.75, ("bc",)))},
            2 * (0.25 * 2 + 0.75 * math.log2(4 / 3)),
            1 + 2 * 1.75,
        ),
        # Brackets: with probability 1/4 around two more; 1 + 1/2 + 1/4 + ... = 2 expected symbols.
        (
            {"S": ((0.25, ("(", "S", "S", ")")), (0.75, ("x",)))},
            2 * (0.25 * 2 + 0.75 * math.log2(4 / 3)),
            2 * (0.25 * 2 + 0.75),
        ),
    ],
)
def test_entropy_of_grammars_worked_out_by_hand(grammar: Grammar, bits: float, characters: float) -> None:
    assert entropy_bits_per_character(grammar) == pytest.approx(bits / characters, rel=1e-12)


def test_probabilities_sum_to_one() -> None:
    for symbol, alternatives in GRAMMAR.items():
        assert math.fsum(p for p, _ in alternatives) == pytest.approx(1.0, abs=1e-12), symbol
        assert all(p > 0 for p, _ in alternatives), symbol


def test_no_alternative_is_empty_and_every_symbol_is_used() -> None:
    parts = {part for alternatives in GRAMMAR.values() for _, all_parts in alternatives for part in all_parts}
    assert "" not in parts
    assert all(all_parts for alternatives in GRAMMAR.values() for _, all_parts in alternatives)
    assert set(GRAMMAR) - parts == {START}
    assert not [part for part in parts - set(GRAMMAR) if "<" in part], "a symbol without alternatives"


def test_the_next_characters_decide_every_alternative() -> None:
    # What the uniqueness of derivations rests on.
    for symbol, alternatives in GRAMMAR.items():
        sets = [beginnings(parts[0]) for _, parts in alternatives]
        for first, second in itertools.combinations(sets, 2):
            for a, b in itertools.product(first, second):
                assert not a.startswith(b), (symbol, a, b)
                assert not b.startswith(a), (symbol, a, b)


def test_sentences_are_finite() -> None:
    row = {symbol: i for i, symbol in enumerate(GRAMMAR)}
    expected = np.zeros((len(row), len(row)))
    for symbol, alternatives in GRAMMAR.items():
        for p, parts in alternatives:
            for part in parts:
                if part in row:
                    expected[row[symbol], row[part]] += p
    assert np.abs(np.linalg.eigvals(expected)).max() < 0.9


def test_words_agree_and_brackets_match() -> None:
    text = generate(200_000, seed=1)
    # Looked at in the simplest sentences only: elsewhere an object can stand between subject and verb.
    verbs = "sleep|sing|wait|shine|dance"
    sentences = [sentence.strip() for sentence in text.split(".")]
    for determiner, wanted, wrong in [("Every", "s", ""), ("Many", "", "s")]:
        right = [s for s in sentences if re.fullmatch(rf"{determiner} \w+ ({verbs}){wanted}", s)]
        assert len(right) > 10
        assert not [s for s in sentences if re.fullmatch(rf"{determiner} \w+ ({verbs}){wrong}", s)]
    deepest = 0
    for sentence in re.findall(r"[^.]*\.", text):
        depths = list(itertools.accumulate({"(": 1, ")": -1}.get(c, 0) for c in sentence))
        assert min(depths) == 0 == depths[-1]
        deepest = max(deepest, *depths)
    assert deepest >= 3


def test_text_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(generate(100_000, seed=0).encode()).hexdigest()
    assert digest == "7fb70c58755f78d58d58edfb17e1d53d5b59a477c31d6b9f8a9f310397620201"
    assert entropy_bits_per_character() == pytest.approx(0.6240736741701054, rel=1e-12)


def test_seeds_differ() -> None:
    assert len({generate(200, seed) for seed in range(20)}) == 20


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 2**64))
def test_shorter_text_is_the_beginning_of_a_longer_one(short: int, more: int, seed: int) -> None:
    text = generate(short, seed)
    assert len(text) == short
    assert generate(short + more, seed)[:short] == text


@pytest.mark.parametrize(("characters", "seed"), [(-1, 0), (10, -1)])
def test_numbers_below_zero_are_refused(characters: int, seed: int) -> None:
    with pytest.raises(ConfigError, match=r"0 or more, not -?\d+ and -?\d+"):
        generate(characters, seed)
