"""What there is to say about each character of a text: what a unit of a network may have learned to follow.

Each is known once the character has been read, and needs nothing that comes after it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float32]
"""One for each character."""


def _is(matches: Callable[[str], bool]) -> Callable[[str], Values]:
    def mark(text: str) -> Values:
        return np.array([matches(character) for character in text], dtype=np.float32)

    return mark


def _since(begins: Callable[[str], bool]) -> Callable[[str], Values]:
    """Return what counts the characters since the last one that `begins` holds of, which itself is 0."""

    def count(text: str) -> Values:
        found, run = [], 0
        for character in text:
            run = 0 if begins(character) else run + 1
            found.append(run)
        return np.array(found, dtype=np.float32)

    return count


def _in_quotes(text: str) -> Values:
    """1 from an opening double quotation mark to the one that closes it; an empty line ends what was left open."""
    found, inside, before = [], False, ""
    for character in text:
        if character == '"':
            inside = not inside
        elif character in "\N{LEFT DOUBLE QUOTATION MARK}\N{RIGHT DOUBLE QUOTATION MARK}":
            inside = character == "\N{LEFT DOUBLE QUOTATION MARK}"
        elif character == before == "\n":
            inside = False
        found.append(inside)
        before = character
    return np.array(found, dtype=np.float32)


def _in_brackets(text: str) -> Values:
    """1 between round, square or curly brackets; an empty line ends what was left open."""
    found, depth, before = [], 0, ""
    for character in text:
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(depth - 1, 0)
        elif character == before == "\n":
            depth = 0
        found.append(depth > 0)
        before = character
    return np.array(found, dtype=np.float32)


ASPECTS: dict[str, Callable[[str], Values]] = {
    "inside quotation marks": _in_quotes,
    "inside brackets": _in_brackets,
    "characters since the line began": _since("\n".__eq__),
    "characters since the sentence ended": _since(lambda character: character in ".!?"),
    "letters since the word began": _since(lambda character: not character.isalnum()),
    "a capital letter": _is(str.isupper),
    "a vowel": _is(lambda character: character.lower() in "aeiou"),
    "a digit": _is(str.isdigit),
    "a space": _is(" ".__eq__),
    "the end of a line": _is("\n".__eq__),
    "a punctuation mark": _is(lambda character: not (character.isalnum() or character.isspace())),
}
"""Each aspect by what it says of a character, and the function that says it of each character of a text."""
LASTING = frozenset(aspect for aspect in ASPECTS if aspect.startswith("inside") or "since" in aspect)
"""Those that a network has to remember: the character that was read last does not tell."""
