"""A text of any size as ids: the same from memory and from files, and never more of it in memory than some pieces."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import campaign
from longshort.errors import OutputError, TextError
from longshort.text import corpus, encoding, grammar
from longshort.text.corpus import Text
from longshort.text.encoding import Part, encode, encode_text, place_of_cut, survey
from longshort.text.tokenizers import TOKENIZERS, ByteTokenizer, Tokenizer, train_tokenizer
from longshort.text.words import WordTokenizer

contents = st.text(alphabet=st.sampled_from([*"ab \n\n", "é", "€", "\r"]), min_size=1, max_size=120)
pieces = st.integers(1, 50)


@pytest.fixture
def from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every text counts as a long one; where the ids are kept."""
    monkeypatch.setattr(encoding, "IN_MEMORY", 0)
    monkeypatch.setenv("LONGSHORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ids"


def same(a: Part, b: Part) -> bool:
    if (a.breaks is None) != (b.breaks is None) or (a.known, a.characters, a.bytes) != (b.known, b.characters, b.bytes):
        return False
    if a.breaks is not None and b.breaks is not None and not np.array_equal(a.breaks, b.breaks):
        return False
    return np.array_equal(a.ids, b.ids) and a.ids.dtype == b.ids.dtype


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=contents, name=st.sampled_from(TOKENIZERS), lines=st.booleans(), piece=pieces, data=st.data())
def test_files_hold_what_memory_holds(
    from_files: Path, content: str, name: str, lines: bool, piece: int, data: st.DataObject
) -> None:
    source = Text.of(content, "text")
    places = [0, *(i + 1 for i, c in enumerate(content) if c == "\n")] if lines else range(len(content) + 1)
    cut = data.draw(st.sampled_from(places))
    try:
        tokenizer = train_tokenizer(name, content + "\n")
    except TextError:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "IN_MEMORY", 1 << 20)
        expected = encode(source, survey(source), tokenizer, cut, lines)
        patch.setattr(encoding, "IN_MEMORY", 0)
        patch.setattr(corpus, "PIECE", piece)
        for _ in range(2):  # written, then read
            found = encode(source, survey(source), tokenizer, cut, lines)
            assert all(map(same, found, expected))
            assert found[0].ids.dtype == tokenizer.dtype


@pytest.mark.parametrize("name", TOKENIZERS)
def test_parts_are_the_text_before_and_after_the_cut(name: str) -> None:
    content = grammar.generate(5000, seed=1) + "é€😀 end"
    source = Text.of(content, "text")
    tokenizer = train_tokenizer(name, content)
    cut = place_of_cut(source, survey(source), 0.1, lines=False)
    assert cut == int(0.9 * len(content))
    train, heldout = encode(source, survey(source), tokenizer, cut)
    assert train.ids.tolist() == tokenizer.encode(content[:cut]).tolist()
    assert heldout.ids.tolist() == tokenizer.encode(content[cut:]).tolist()
    first = tokenizer.lengths(content[cut:], tokenizer.encode(content[cut:]))
    assert heldout.known == heldout.tokens == len(heldout.ids) - 1
    assert heldout.characters == len(content) - cut - first[0][0]
    assert heldout.bytes == len(content[cut:].encode()) - first[1][0]


def test_unknown_symbols_stand_for_nothing() -> None:
    tokenizer = WordTokenizer(["the", "cat", "<eos>"])
    part = encode_text(tokenizer, "the  cat sät\nthe dog")
    assert (part.tokens, part.known) == (5, 3)
    assert part.characters == part.bytes == len("  cat" + "\n" + "the")
    part = encode_text(tokenizer, "the  cat sät\nthe dog", lines=True)
    assert (part.tokens, part.known) == (7, 5)
    assert part.characters == len("the  cat" + "\n" + "the" + "\n")


@given(content=contents, share=st.floats(0, 0.9))
def test_lines_are_cut_between_lines(content: str, share: float) -> None:
    source = Text.of(content, "text")
    found = survey(source)
    lines = content.removesuffix("\n").split("\n")
    assert found.lines == len(lines)
    kept = int(len(lines) * (1 - share)) if share else len(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 7)
        try:
            cut = place_of_cut(source, found, share, lines=True)
        except TextError:
            assert kept < 1 or (share and kept == len(lines))
            return
    assert content[:cut].count("\n") + (cut == len(content) and not content.endswith("\n")) == kept
    assert cut == len(content) or content[cut - 1] == "\n"
    tokenizer = ByteTokenizer()
    for part, expected in zip(encode(source, found, tokenizer, cut, True), (lines[:kept], lines[kept:]), strict=True):
        assert part.breaks is not None
        places = part.breaks.astype(int)
        assert set(part.ids[places].tolist()) == {10}
        read = [part.ids[a + 1 : b] for a, b in pairwise(places)]
        assert [ids.tobytes().decode() for ids in read] == expected
        assert part.tokens == sum(len(line.encode()) + 1 for line in expected)


def test_a_line_that_is_too_long_is_named() -> None:
    long = "x" * (encoding.LONGEST_LINE + 1)
    with pytest.raises(TextError, match=r"^Line 3 of this part .* 65,536 characters"):
        encode_text(ByteTokenizer(), f"a\nb\n{long}\nc\n", lines=True)
    with pytest.raises(TextError, match="Line 1 "):
        encode_text(ByteTokenizer(), "x" * 3_000_000, lines=True)
    assert encode_text(ByteTokenizer(), f"{long[1:]}\n", lines=True).tokens == encoding.LONGEST_LINE + 1


class Unread:
    """A source whose text must not be read any more."""

    name = "text"

    def pieces(self) -> Iterator[str]:
        raise AssertionError("read again")


def test_ids_that_are_kept_are_used_and_damaged_ones_made_anew(from_files: Path) -> None:
    source = Text.of("some text with lines\n" * 50, "text")
    found, tokenizer = survey(source), ByteTokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "IN_MEMORY", 5000)
        expected = encode(source, found, tokenizer, 500, True)
    assert all(map(same, encode(source, found, tokenizer, 500, True), expected))
    assert all(map(same, encode(Unread(), found, tokenizer, 500, True), expected))
    [folder] = from_files.iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["breaks", "ids", "index"]
    for name in names:
        for damage in (lambda data: data[:-1], lambda data: bytes([data[0] ^ 4]) + data[1:], lambda data: b""):
            (folder / name).write_bytes(damage((folder / name).read_bytes()))
            with pytest.raises(AssertionError, match="read again"):
                encode(Unread(), found, tokenizer, 500, True)
            assert all(map(same, encode(source, found, tokenizer, 500, True), expected))
    assert [path.name for path in from_files.iterdir()] == [folder.name]
    # Another tokenizer, cut or kind has ids of its own.
    others: list[tuple[Tokenizer, int, bool]] = [(WordTokenizer(["some"]), 500, True), (tokenizer, 501, True)]
    for other in [*others, (tokenizer, 500, False)]:
        with pytest.raises(AssertionError, match="read again"):
            encode(Unread(), found, *other)


def test_ids_in_a_cache_that_can_only_be_read_are_used(from_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Text.of("some text\n" * 50, "text")
    found, tokenizer = survey(source), ByteTokenizer()
    expected = encode(source, found, tokenizer, 10)

    def refuse(path: object) -> None:
        raise PermissionError("the cache is another's")

    monkeypatch.setattr(os, "utime", refuse)
    assert all(map(same, encode(Unread(), found, tokenizer, 10), expected))


def test_a_failure_leaves_nothing_and_what_nobody_uses_goes(from_files: Path) -> None:
    source = Text.of("some text\n" * 50, "text")
    found, tokenizer = survey(source), ByteTokenizer()
    with pytest.raises(AssertionError):
        encode(Unread(), found, tokenizer, 10, False)
    assert list(from_files.iterdir()) == []
    encode(source, found, tokenizer, 10, False)
    [folder] = from_files.iterdir()
    killed = from_files / ".abc.123.tmp"
    killed.mkdir()
    day = 86_400
    for age, left in ((0.5, 3), (2, 2), (29, 1), (31, 0)):
        os.utime(folder, (0, time.time() - age * day))
        os.utime(killed, (0, time.time() - age * day)) if killed.exists() else None
        encode(source, found, tokenizer, 11, False)  # to make room for new ones, what is old goes
        new = [path for path in from_files.iterdir() if path not in (folder, killed)]
        assert folder.exists() == (age < 30)
        assert killed.exists() == (age < 1)
        for path in new:
            path.rename(path.with_name(f"{path.name}-{left}"))


def test_a_cache_that_cannot_be_written_is_named(from_files: Path) -> None:
    from_files.parent.write_text("a file where the cache should be", encoding="utf-8")
    source = Text.of("some text", "text")
    with pytest.raises(OutputError, match=re.escape(str(from_files.parent))) as caught:
        encode(source, survey(source), ByteTokenizer(), 5)
    assert "LONGSHORT_CACHE" in str(caught.value)


# Prints the most anonymous memory of a process that trains, in megabytes: before, and while it trains.
TRAINS = """
import sys, threading, time
import longshort.training
from longshort import TrainConfig

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1000

most, over = 0.0, threading.Event()
def watch():
    global most
    while not over.wait(0.005):
        most = max(most, anonymous())

options = dict(word.split("=") for word in sys.argv[3:])
options = {name: int(value) if value.isdecimal() else value for name, value in options.items()}
options["lines"], options["heldout"] = bool(options.get("lines")), float(options["heldout"])
options |= dict(texts=(sys.argv[1],), out=sys.argv[2], hidden=8, embedding=8, threads=1)
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
try:
    for event in longshort.training.train(TrainConfig(**options)):
        pass
finally:
    over.set()
    watcher.join()
print(before, most)
"""


@campaign.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by /proc")
@pytest.mark.parametrize("options", ["steps=3", "steps=3 lines=1", "steps=3 sampler=random tokenizer=byte"])
def test_a_corpus_of_any_size_trains_in_little_memory(tmp_path: Path, options: str) -> None:
    name = f"a corpus of so many MB, in at most 600 MB of memory: {options}"
    with campaign.trials(name, short=30, long=10_000) as trials:
        path = tmp_path / "big.txt"
        block = grammar.generate(1_000_000, seed=1).encode()
        with path.open("wb") as file:
            for _ in trials:
                file.write(block)
        most = train_in_little_memory(tmp_path, path, trials.count, options)
        if most > 600:
            trials.failed(f"{most:.0f} MB")


def train_in_little_memory(tmp_path: Path, path: Path, megabytes: int, options: str) -> float:
    """Train on the text and return the most anonymous memory, in MB."""
    # Of 10 GB a tenth would be looked at for an hour.
    options = f"{options} heldout={min(0.1, 20 / megabytes)}"
    environment = {**os.environ, "LONGSHORT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", TRAINS, str(path), str(tmp_path / "run"), *options.split()]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    before, most = map(float, output.split())
    print(f"{megabytes} MB, {options}: {before:.0f} MB before, {most:.0f} MB at most, anonymous")
    ids = next((tmp_path / "cache" / "ids").glob("*/ids"))
    assert ids.stat().st_size >= 0.99 * megabytes * 1e6  # one byte a character, on disk
    # What depends on the text is a few pieces of it, with their code points and places.
    assert most - before < 200
    path.unlink()
    ids.unlink()
    return most
