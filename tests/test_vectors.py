"""Files of word vectors: read as we or gensim wrote them; what is none is refused; models begin with them."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import longshort
from conftest import ROOT
from longshort import embeddings, plots, recipes, training
from longshort.cli import main
from longshort.config import ModelConfig, TrainConfig
from longshort.errors import ConfigError, LongshortError, TextError, UsageError, VocabularyError
from longshort.model import LanguageModel
from longshort.text import vectors
from longshort.text.tokenizers import CharTokenizer
from longshort.text.vectors import Vectors
from longshort.text.words import WordTokenizer

WORDS = st.text(min_size=1, max_size=8).filter(lambda w: w.split() == [w] and w.isprintable())


def made(words: list[str], E: int = 3, seed: int = 0) -> Vectors:
    return Vectors(words, np.random.default_rng(seed).normal(size=(len(words), E)).astype(np.float32))


def binary(given: Vectors, newlines: bool = True) -> bytes:
    """Return vectors as word2vec's own program writes them; others put no newline after each."""
    parts = [f"{len(given.words)} {given.matrix_NE.shape[1]}\n".encode()]
    for word, vector in zip(given.words, given.matrix_NE, strict=True):
        parts.append(word.encode() + b" " + vector.astype("<f4").tobytes() + (b"\n" if newlines else b""))
    return b"".join(parts)


def text(given: Vectors, header: bool) -> bytes:
    lines = [f"{len(given.words)} {given.matrix_NE.shape[1]}"] if header else []
    lines += [" ".join([w, *map(str, v)]) for w, v in zip(given.words, given.matrix_NE.tolist(), strict=True)]
    return "\n".join([*lines, ""]).encode()


def same(found: Vectors, given: Vectors) -> None:
    assert found.words == given.words
    np.testing.assert_array_equal(found.matrix_NE, given.matrix_NE)


@settings(max_examples=60)
@given(
    words=st.lists(WORDS, min_size=1, max_size=6, unique=True),
    E=st.integers(1, 9),
    kind=st.sampled_from(["text", "glove", "binary", "binary without newlines"]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_format_gives_back_what_was_written(
    words: list[str], E: int, kind: str, packed: bool, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if kind == "glove" and E == 1 and words[0].isdigit():
        return  # a first line that says nothing else than a number of vectors and their width
    given = made(words, E, seed)
    data = binary(given, kind == "binary") if "binary" in kind else text(given, kind == "text")
    path = tmp_path_factory.mktemp("v") / "file"
    path.write_bytes(gzip.compress(data) if packed else data)
    same(vectors.read(path), given)
    assert vectors.width(path) == E
    wanted = words[::2]
    found = vectors.read(path, [*wanted, "not there"])
    assert found.words == wanted
    np.testing.assert_array_equal(found.matrix_NE, given.matrix_NE[::2])


@given(words=st.lists(WORDS, min_size=1, max_size=6, unique=True), E=st.integers(1, 5), seed=st.integers(0, 99))
def test_what_we_write_we_read(words: list[str], E: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("v") / "file"
    given = made(words, E, seed)
    vectors.write(path, given)
    same(vectors.read(path), given)


def test_gensim_reads_ours_and_we_read_gensims(tmp_path: Path) -> None:
    from gensim.models.keyedvectors import KeyedVectors

    given = made(["the", "cat", "naïve", "日本"], 5)
    vectors.write(tmp_path / "ours", given)
    theirs = KeyedVectors.load_word2vec_format(str(tmp_path / "ours"))
    assert theirs.index_to_key == given.words
    np.testing.assert_array_equal(theirs.vectors, given.matrix_NE)
    for is_binary in (False, True):
        theirs.save_word2vec_format(str(tmp_path / "theirs"), binary=is_binary)
        found = vectors.read(tmp_path / "theirs")
        assert found.words == given.words
        np.testing.assert_allclose(found.matrix_NE, given.matrix_NE, rtol=1e-6)
    for ours, cosine in zip(embeddings.neighbours(given, "cat", 3), theirs.most_similar("cat", topn=3), strict=True):
        assert ours[0] == cosine[0]
        assert ours[1] == pytest.approx(cosine[1], abs=1e-6)


def test_words_with_spaces_and_repeated_words(tmp_path: Path) -> None:
    (tmp_path / "glove").write_text("a 1 2\n. . . 3 4\na 5 6\n", encoding="utf-8")
    found = vectors.read(tmp_path / "glove")
    assert found.words == ["a", ". . ."]
    assert found.matrix_NE.tolist() == [[1, 2], [3, 4]]


GOOD = binary(made(["ab", "cd"]))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (b"word\n", "a vector has 1 to 65,536 numbers, not 0"),
        (b"3 0\n", "a vector has 1 to 65,536 numbers, not 0"),
        (b"0 3\n", "says that it holds none"),
        (b"1 99999999999\n", "a vector has 1 to"),
        (b"a 1 2\nb 1\n", "a word and 2 numbers were wanted, not 1 numbers, line 2"),
        (b"a 1 2\nb 1 x\n", "a number was wanted, not b'x', line 2"),
        (b"a 1 2\n\nb 1 2\n", "2 numbers were wanted, not 0 numbers, line 2"),
        (b"a 1 nan\n", "not finite"),
        (b"a 1 1e99\n", "not finite"),
        (b"3 2\na 1 2\nb 1 2\n", "ends after 2 of 3 vectors"),
        (b"1 2\na 1 2\nb 1 2\n", "more vectors than its first line says"),
        (GOOD[:-6], "ends after 1 of 2 vectors"),
        (GOOD[:8], "ends after 0 of 2 vectors"),
        (GOOD + b"more", "more vectors than its first line says"),
        (b"9" * 50 + b" 3\n" + GOOD[4:], "ends after 2 of 99"),
        (b"x" * 300_000 + b" 1\ny 2\n" + b"z" * (1 << 24), "were wanted|too long"),
    ],
)
def test_what_is_no_file_of_vectors_is_refused(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(TextError) as caught:
        vectors.read(tmp_path / "file")
    assert any(word in str(caught.value) for word in words.split("|")), caught.value
    assert len(str(caught.value)) < 600


def test_no_bytes_end_in_anything_but_our_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    starts = [GOOD, text(made(["ab", "cd"]), True), text(made(["ab", "cd"]), False)]
    for number in range(600):
        data = bytearray(starts[number % 3])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        (tmp_path / "file").write_bytes(bytes(data[: int(rng.integers(1, len(data) + 1))]))
        try:
            found = vectors.read(tmp_path / "file")
            assert len(found.words) == len(found.matrix_NE)
            assert np.isfinite(found.matrix_NE).all()
        except TextError:
            pass
    with pytest.raises(UsageError):
        vectors.read(tmp_path / "nothing")
    with pytest.raises(TextError, match="cannot hold the word"):
        vectors.write(tmp_path / "x", made(["a b"]))


# ------------------------------------------------------------------------------------------------ in a model


def test_neighbours_by_cosine(tmp_path: Path) -> None:
    given = Vectors(["north", "also north", "east", "south"], np.array([[0, 1], [0, 9], [3, 0], [0, -2]], np.float32))
    assert embeddings.neighbours(given, "north") == [("also north", 1.0), ("east", 0.0), ("south", -1.0)]
    assert embeddings.neighbours(given, "north", 1) == [("also north", 1.0)]
    with pytest.raises(VocabularyError, match="Did you mean 'north'"):
        embeddings.neighbours(given, "nort")
    tokenizer = WordTokenizer.train("the cat sat on the mat")
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.size, hidden=4, embedding=6), tokenizer)
    found = longshort.neighbours(model, "cat", 2)
    assert len(found) == 2
    assert found[0][1] >= found[1][1]
    assert longshort.write_vectors(model, tmp_path / "v") == tokenizer.size
    same(vectors.read(tmp_path / "v"), embeddings.vectors_of(model))
    letters = LanguageModel(ModelConfig(vocab_size=4, hidden=4, embedding=6), CharTokenizer("ab \n"))
    assert longshort.write_vectors(letters, tmp_path / "v") == 2  # white space has no place
    with pytest.raises(UsageError, match="one-hot"):
        longshort.neighbours(
            LanguageModel(ModelConfig(vocab_size=4, hidden=4, embedding=0), CharTokenizer("abcd")), "a"
        )


TEXT = "the cat sat on the mat . the dog sat on the log .\n" * 60


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_begins_with_the_vectors_it_is_given(
    frozen: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    given = made(["cat", "dog", "unheard", "the"], 6)
    vectors.write(tmp_path / "v.txt", given)
    run = tmp_path / "run"
    flags = ["--tokenizer", "word", "--vectors", str(tmp_path / "v.txt"), "--hidden", "8", "--batch-size", "4"]
    flags += ["--freeze-embedding"] if frozen else []
    assert main(["train", str(tmp_path / "t.txt"), *flags, "--steps", "3", "--save-every", "1", "--out", str(run)]) == 0
    said = capsys.readouterr().err
    assert "3 of 9 symbols begin with a vector of" in said
    assert (", which stays" in said) == frozen
    saved = longshort.load(run)
    assert saved.config.embedding == 6
    found = embeddings.vectors_of(saved)
    for word in ("cat", "dog", "the"):
        ours, theirs = found.matrix_NE[found.words.index(word)], given.matrix_NE[given.words.index(word)]
        assert np.array_equal(ours, theirs) == frozen
        np.testing.assert_allclose(ours, theirs, atol=0.1)
    others = [i for i, word in enumerate(found.words) if word not in given.words]
    lengths = np.linalg.norm(found.matrix_NE[others], axis=1)
    assert lengths.mean() == pytest.approx(np.linalg.norm(given.matrix_NE[[0, 1, 3]], axis=1).mean(), rel=0.1)
    # What is resumed needs the file no more, and keeps what is frozen.
    (tmp_path / "v.txt").unlink()
    assert main(["resume", str(run), "--steps", "6"]) == 0
    later = embeddings.vectors_of(longshort.load(run))
    assert np.array_equal(later.matrix_NE, found.matrix_NE) == frozen
    assert json.loads((run / "config.json").read_text())["train"]["vectors"] == str(tmp_path / "v.txt")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"embedding": 0}, "one-hot"),
        ({"embedding": 7}, "have 6 numbers, the embedding 7"),
        ({"tokenizer": "char"}, "none of the"),
        ({"from_model": "x"}, "--from"),
        ({"freeze_embedding": True, "tied": True, "hidden": 6}, "freeze_embedding"),
        ({"vectors": "nowhere"}, "no file"),
    ],
)
def test_what_does_not_go_together_is_refused(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    vectors.write(tmp_path / "v.txt", made(["cat", "dog"], 6))
    base: dict[str, Any] = {
        "texts": (str(tmp_path / "t.txt"),),
        "tokenizer": "word",
        "vectors": str(tmp_path / "v.txt"),
    }
    base |= {"embedding": 6, "hidden": 8, "steps": 2, "out": str(tmp_path / "r")}
    with pytest.raises(LongshortError, match=words):
        list(training.train(TrainConfig(**(base | given))))
    assert not (tmp_path / "r").exists()


def test_the_width_of_the_file_is_the_embeddings(tmp_path: Path) -> None:
    vectors.write(tmp_path / "v.txt", made(["cat", "dog"], 6))
    assert recipes.combine({"vectors": str(tmp_path / "v.txt")})["embedding"] == 6
    assert recipes.combine({"vectors": str(tmp_path / "v.txt"), "tied": True})["hidden"] == 6
    assert recipes.combine({"vectors": str(tmp_path / "v.txt"), "embedding": 5})["embedding"] == 5
    with pytest.raises(ConfigError, match="freeze_embedding"):
        TrainConfig(embedding=0, freeze_embedding=True)


@pytest.mark.parametrize("line", ["vectors = 5", "from_model = 5", "vectors = ['a']", "from_model = true"])
def test_a_file_in_toml_is_named_by_a_text(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "c.toml").write_text(line, encoding="utf-8")
    assert main(["train", str(tmp_path / "t.txt"), "--config", str(tmp_path / "c.toml"), "--steps", "1"]) == 2
    assert f"{line.split()[0]} must be a text, not" in capsys.readouterr().err


def test_the_pages_programs_and_commands_run(
    tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-text.txt").write_text(TEXT + english, encoding="utf-8")
    page = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|sh)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "sh", "python"]
    for kind, block in blocks:
        if kind == "python":
            done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            continue
        for command in block.splitlines():
            program, *arguments = shlex.split(command)
            assert program == "longshort"
            arguments[arguments.index("--steps") + 1] = "3"
            assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "mine.txt").exists()


def test_the_pages_table_is_the_result_file() -> None:
    page = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks" / "results" / "2026-11-25-word-vectors.json"
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        assert f"| {row['name']} | {row['perplexity']:.1f} |" in page
        assert f"three: {', '.join(word for word, _ in row['neighbours']['three'][:3])} |" in page


def test_words_can_be_drawn(tmp_path: Path) -> None:
    groups = {"one": "numbers", "two": "numbers", "king": "people", "queen": "people"}
    plots.words(made(list(groups), 5).matrix_NE, groups, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_a_word_without_end_is_not_read_into_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"2 3\n\xff" + struct.pack("<f", 1.0) * (1 << 16))
    with pytest.raises(TextError, match="ends after 0 of 2"):
        vectors.read(tmp_path / "file")
