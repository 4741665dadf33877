"""Text of exactly known entropy, generated from a small probabilistic grammar of English-like sentences.

A model of such a text can be judged in absolute terms: on average no model can use fewer bits a character
than the text's entropy, and one that has learned the grammar uses no more. Learning it takes memory: verbs
agree with their subject across a relative clause, and brackets nest to any depth.

    Every heron that greets many robins sings. These millers claim (some king knows (a river shines)).

**Entropy of a sentence.** A sentence is derived from the start symbol by replacing every symbol by one of
its alternatives, chosen with its probability and independently of everything else. So the entropy h(A) in
bits of what is derived from symbol A, and its expected length n(A) in characters, follow one pattern:

    h(A) = sum over alternatives a of A of  p(a) * (-log2 p(a)    + sum over symbols B in a of h(B))
    n(A) = sum over alternatives a of A of  p(a) * (characters(a) + sum over symbols B in a of n(B))

Both are linear. With M[A, B] the expected number of B in what replaces A, they are `(I - M)^-1` times their
parts without h and n, and finite because all eigenvalues of M are below 1.

**From derivations to text.** If two derivations gave the same text, the text would have less entropy than
its derivation. Here that cannot happen. No alternative is empty, and no string that one alternative of a
symbol can begin with is the beginning of a string that another can begin with. So a reader knows at every
symbol, from the characters that follow, which alternative was taken: each text has exactly one derivation,
and its probability. For the same reason it is known where each sentence ends and the next one begins.

**Entropy per character.** Sentences are independent and alike, so by the law of large numbers the bits of
the first k sentences divided by their characters tend to `h(start) / n(start)`, the entropy rate.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Mapping
from itertools import accumulate

import numpy as np

from longshort.errors import ConfigError

# For each symbol its alternatives: a probability, and the symbols and strings to put for the symbol.
# What is no key of the grammar is a string of the text itself. The first symbol is the start symbol.
Alternatives = tuple[tuple[float, tuple[str, ...]], ...]
Grammar = Mapping[str, Alternatives]


def _words(words: str, prefix: str = " ", suffix: str = "") -> Alternatives:
    """An alternative for each word; as in natural text, the k-th is chosen in proportion to 1/k."""
    shares = [1 / rank for rank in range(1, len(words.split()) + 1)]
    return tuple(
        (share / sum(shares), (f"{prefix}{word}{suffix}",)) for share, word in zip(shares, words.split(), strict=True)
    )


def _clauses(number: str, determiners: str, noun_suffix: str, verb_suffix: str) -> dict[str, Alternatives]:
    """The symbols of clauses in the singular or in the plural, where all verbs agree with the subject."""
    nouns = "river heron king robin lantern miller clock raven garden sailor violin badger tower wizard baker"
    capitals = determiners.title()
    symbols: dict[str, Alternatives] = {
        "<Clause>": ((1.0, ("<Determiner>", "<thing>", "<predicate>")),),
        "<clause>": ((1.0, ("<determiner>", "<thing>", "<predicate>")),),
        "<object>": ((1.0, ("<determiner>", "<thing>")),),
        "<Determiner>": _words(capitals, prefix=""),
        "<determiner>": _words(determiners, prefix=""),
        "<thing>": ((0.7, ("<noun>",)), (0.3, ("<adjective>", "<thing>"))),
        "<noun>": _words(nouns, suffix=noun_suffix),
        "<predicate>": ((0.75, ("<act>",)), (0.25, (" that", "<act>", "<act>"))),
        "<act>": (
            (0.30, ("<rests>",)),
            (0.35, ("<does>", " ", "<any object>")),
            (0.20, ("<says>", " (", "<any clause>", ")")),
            (0.15, ("<adverb>", "<act>")),
        ),
        "<rests>": _words("sleep sing wait shine dance", suffix=verb_suffix),
        "<does>": _words("see follow greet remember guard paint", suffix=verb_suffix),
        "<says>": _words("know claim hope whisper", suffix=verb_suffix),
    }
    # Every symbol made here carries the number in its name; those of the whole grammar do not.
    names = {symbol: symbol.replace(">", f" {number}>") for symbol in symbols}
    return {
        names[symbol]: tuple((p, tuple(names.get(part, part) for part in parts)) for p, parts in alternatives)
        for symbol, alternatives in symbols.items()
    }


GRAMMAR: Grammar = {
    "<sentence>": (
        (0.6, ("<Clause singular>", "<ending>")),
        (0.4, ("<Clause plural>", "<ending>")),
    ),
    "<ending>": (
        (0.70, (". ",)),
        (0.15, (".\n",)),
        (0.15, (", and ", "<any clause>", "<ending>")),
    ),
    "<any clause>": ((0.6, ("<clause singular>",)), (0.4, ("<clause plural>",))),
    "<any object>": ((0.6, ("<object singular>",)), (0.4, ("<object plural>",))),
    "<adjective>": _words("small young quiet clever tall golden pale famous"),
    "<adverb>": _words("often never gladly secretly"),
    **_clauses("singular", "a every this one", noun_suffix="", verb_suffix="s"),
    **_clauses("plural", "some many these few", noun_suffix="s", verb_suffix=""),
}


def generate(characters: int, seed: int) -> str:
    """The first `characters` characters of the text with this seed; the same in every Python version.

    The last sentence is cut off where the length asks for it, so a shorter text is the beginning of a
    longer one with the same seed.

    Raises:
        ConfigError: `characters` or `seed` below 0.
    """
    if characters < 0 or seed < 0:
        raise ConfigError(f"characters and seed must be 0 or more, not {characters} and {seed}.")
    numbers = random.Random(seed)
    choices = {
        # Without the last sum, which rounding may leave below 1, `bisect` always finds an alternative.
        symbol: (list(accumulate(p for p, _ in alternatives))[:-1], [parts[::-1] for _, parts in alternatives])
        for symbol, alternatives in GRAMMAR.items()
    }
    start = next(iter(GRAMMAR))
    pieces: list[str] = []
    length = 0
    stack: list[str] = []
    while length < characters:
        symbol = stack.pop() if stack else start
        if symbol in choices:
            sums, reversed_parts = choices[symbol]
            stack.extend(reversed_parts[bisect(sums, numbers.random())])
        else:
            pieces.append(symbol)
            length += len(symbol)
    return "".join(pieces)[:characters]


def entropy_bits_per_character(grammar: Grammar = GRAMMAR) -> float:
    """The entropy rate of the text of `generate`, exact up to rounding (the module says how and why).

    Args:
        grammar: another grammar, for which the same must hold: unique derivations, finite lengths.
    """
    row = {symbol: i for i, symbol in enumerate(grammar)}
    expected = np.zeros((len(row), len(row)))  # M: how many of each symbol replace one symbol
    own = np.zeros((len(row), 2))  # bits of the choice itself, and characters of the literal strings
    for symbol, alternatives in grammar.items():
        for p, parts in alternatives:
            own[row[symbol], 0] -= p * math.log2(p)
            for part in parts:
                if part in row:
                    expected[row[symbol], row[part]] += p
                else:
                    own[row[symbol], 1] += p * len(part)
    bits, characters = np.linalg.solve(np.eye(len(row)) - expected, own)[0]
    return float(bits / characters)
