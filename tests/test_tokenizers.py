from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import models, pre_tokenizers, trainers

from longshort.errors import CheckpointError, MissingExtraError, TextError, UsageError
from longshort.text import grammar, words
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer, from_json, train_tokenizer
from longshort.text.words import WHITE, BpeTokenizer, WordTokenizer, whole_pieces

# Surrogates cannot stand in a UTF-8 file, and HF takes no text that holds one.
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]))


@given(text=texts.filter(bool))
def test_char_round_trips_any_text(text: str) -> None:
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert len(ids) == len(text)
    assert set(ids.tolist()) == set(range(tokenizer.size))


@given(trained=texts.filter(bool), read=texts)
def test_char_gives_unknown_exactly_to_what_training_never_saw(trained: str, read: str) -> None:
    tokenizer = CharTokenizer.train(trained)
    known = sorted(set(trained))
    expected = [known.index(c) if c in known else len(known) for c in read]
    assert tokenizer.encode(read).tolist() == expected


def test_symbols_outside_the_vocabulary_are_those_of_the_tokenizer() -> None:
    char, word = CharTokenizer("ab "), WordTokenizer.train("the cat sat")
    assert char.unknown_symbols("a\tzb\nzé") == ["\t", "z", "\n", "é"]
    assert word.unknown_symbols("zebra the\xa0 yak\ncat  zebra \t") == ["zebra", "yak", "\n"]
    for tokenizer in (char, word, ByteTokenizer()):
        assert tokenizer.unknown_symbols("") == []
    assert ByteTokenizer().unknown_symbols("é") == []


@given(trained=texts.filter(str.split), read=texts)
def test_symbols_that_are_unknown_are_named_once_in_their_order(trained: str, read: str) -> None:
    seen, words_read = set(trained), [word for word in re.split(f"[{WHITE}]+", read.replace("\n", " ")) if word]
    expected = list(dict.fromkeys(c for c in read if c not in seen))
    assert CharTokenizer.train(trained).unknown_symbols(read) == expected
    known = set(re.split(f"[{WHITE}]+", trained.replace("\n", " ")))
    found = WordTokenizer.train(f"{trained}\n").unknown_symbols(read)
    # Of those that Python alone takes for white space, U+001C to U+001F, a word is shown without.
    expected = list(dict.fromkeys(word.strip() or word for word in words_read if word not in known))
    assert [word.strip() for word in found] == [word.strip() for word in expected]


def test_char_vocabulary_is_sorted_and_does_not_count_unknown() -> None:
    tokenizer = CharTokenizer.train("banana\n")
    assert tokenizer.symbols == ["\n", "a", "b", "n"]
    assert tokenizer.size == 4
    assert tokenizer.encode("nz").tolist() == [3, 4]
    assert tokenizer.decode([3, 4, -1]) == "n\ufffd\ufffd"


@given(st.binary())
def test_byte_round_trips_any_bytes(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_bytes(data)
    assert ids.tolist() == list(data)
    assert tokenizer.decode_bytes(ids) == data


@given(texts)
def test_byte_counts_characters(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    characters, sizes = tokenizer.lengths(text, tokenizer.encode(text))
    assert (characters.sum(), sizes.sum()) == (len(text), len(text.encode()))


@given(trained=texts.filter(bool), read=texts)
def test_char_json_encodes_the_same_in_hugging_face(trained: str, read: str) -> None:
    tokenizer = CharTokenizer.train(trained)
    other = HuggingFaceTokenizer.from_str(tokenizer.to_json())
    assert other.encode(read).ids == tokenizer.encode(read).tolist()
    assert other.decode(tokenizer.encode(trained).tolist()) == trained


@given(read=texts)
def test_byte_json_encodes_the_same_in_hugging_face(read: str) -> None:
    tokenizer = ByteTokenizer()
    other = HuggingFaceTokenizer.from_str(tokenizer.to_json())
    assert other.encode(read).ids == tokenizer.encode(read).tolist()
    assert other.decode(tokenizer.encode(read).tolist()) == read


@given(trained=texts.filter(bool), read=texts)
def test_json_round_trips(trained: str, read: str) -> None:
    for tokenizer in (CharTokenizer.train(trained), ByteTokenizer()):
        again = from_json(tokenizer.to_json())
        assert again.name == tokenizer.name
        assert again.sha256 == tokenizer.sha256
        assert np.array_equal(again.encode(read), tokenizer.encode(read))


def _changed(change: str) -> str:
    content = json.loads(CharTokenizer("abc").to_json())
    exec(change, {"t": content})
    return json.dumps(content)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        "{}",
        "not json",
        '{"model": 3}',
        "[" * 100_000,
        _changed("t['model']['vocab']['a'] = 7"),
        _changed("t['model']['vocab']['ab'] = 3"),
        _changed("t['model']['vocab'] = {}"),
        _changed("t['model']['type'] = 'Unigram'"),
        _changed("t['pre_tokenizer']['pattern']['Regex'] = '(a+)+$'"),
        _changed("t['normalizer'] = {'type': 'Lowercase'}"),
    ],
)
def test_a_tokenizer_of_another_make_is_refused(content: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        from_json(content)


# ------------------------------------------------------------------------------------------------ word and bpe

# Much white space, and what Python takes for white space but Unicode does not.
wordy = st.text(alphabet=st.sampled_from([*"ab<>eosunk12é€😀", *"   \n\n", *WHITE, *"\x1c\x1f\u200b"]))
GENERATED = grammar.generate(30_000, seed=3)


@pytest.fixture(scope="module")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train(GENERATED, 400)


@given(trained=wordy, read=wordy, min_freq=st.integers(1, 3))
def test_word_encodes_the_same_in_hugging_face(trained: str, read: str, min_freq: int) -> None:
    try:
        tokenizer = WordTokenizer.train(trained, min_freq)
    except TextError:
        assert not any(trained.split().count(word) >= min_freq for word in trained.split())
        return
    other = HuggingFaceTokenizer.from_str(tokenizer.to_json())
    assert other.encode(read).ids == tokenizer.encode(read).tolist()
    again = from_json(tokenizer.to_json())
    assert again.sha256 == tokenizer.sha256
    assert np.array_equal(again.encode(read), tokenizer.encode(read))


def test_words_are_ordered_by_frequency_and_rare_ones_unknown() -> None:
    tokenizer = WordTokenizer.train("the cat\nthe dog  the\tdog\n", min_freq=2)
    assert tokenizer.words == ["the", "<eos>", "dog"]
    assert tokenizer.encode("dog cat\nthe ").tolist() == [2, 3, 1, 0]
    assert tokenizer.newline == 1
    assert tokenizer.decode([0, 2, 1, 1, 0, 2, 9]) == "the dog\n\nthe dog \ufffd"
    with pytest.raises(TextError, match="No word of the text occurs 9 times"):
        WordTokenizer.train("a b a", min_freq=9)


def test_a_text_that_marks_its_own_unknown_words_keeps_them() -> None:
    """In a text such as the Penn Treebank's, `<unk>` is a word as any other, and is predicted."""
    tokenizer = WordTokenizer.train("the <unk> the\n")
    assert tokenizer.encode("<unk>").tolist() != [tokenizer.size]
    assert tokenizer.encode("never").tolist() == [tokenizer.size]
    other = HuggingFaceTokenizer.from_str(tokenizer.to_json())
    assert other.encode("<unk> never").ids == tokenizer.encode("<unk> never").tolist()


@given(text=wordy)
def test_words_stand_for_all_characters_but_the_white_space_at_the_end(text: str) -> None:
    tokenizer = WordTokenizer(["a", "<eos>"])
    characters, sizes = tokenizer.lengths(text, tokenizer.encode(text))
    assert len(characters) == len(tokenizer.encode(text))
    stripped = text.rstrip("".join(set(WHITE) - {"\n"}))
    assert (characters.sum(), sizes.sum()) == (len(stripped), len(stripped.encode()))


@given(text=wordy)
def test_bpe_encodes_the_same_in_hugging_face(bpe: BpeTokenizer, text: str) -> None:
    other = HuggingFaceTokenizer.from_str(bpe.to_json())
    assert other.encode(text).ids == bpe.encode(text).tolist()
    assert bpe.decode(bpe.encode(text).tolist()) == text
    characters, sizes = bpe.lengths(text, bpe.encode(text))
    assert (characters.sum(), sizes.sum()) == (len(text), len(text.encode()))


def test_bpe_is_what_hugging_face_trains_on_the_same_file(bpe: BpeTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(GENERATED, encoding="utf-8")
    other = HuggingFaceTokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train([str(path)], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    assert other.get_vocab() == {symbol: i for i, symbol in enumerate(bpe.symbols)}
    assert other.encode(GENERATED).ids == bpe.encode(GENERATED).tolist()
    assert len(bpe.encode(GENERATED)) < len(GENERATED) / 2


@given(text=wordy)
def test_bpe_reads_lines_one_by_one(bpe: BpeTokenizer, text: str) -> None:
    lines = text.split("\n")
    expected = [i for line in lines for i in [*bpe.encode(line).tolist(), bpe.newline]]
    assert bpe.encode_lines(text + "\n").tolist() == expected
    assert bpe.decode([bpe.newline]) == "\n"


@given(contents=st.lists(wordy, max_size=8), longest=st.integers(1, 12), sizes=st.lists(st.integers(1, 9), min_size=1))
def test_where_a_text_is_cut_depends_on_the_text_alone(contents: list[str], longest: int, sizes: list[int]) -> None:
    text = "".join(contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "LONGEST_PIECE", longest)
        whole = list(whole_pieces([text]))
        assert list(whole_pieces(contents)) == whole
        assert list(whole_pieces(text)) == whole
    assert "".join(whole) == text
    assert all(len(piece) <= longest for piece in whole)


def test_bpe_lines_have_a_question_mark_for_half_a_surrogate_pair(bpe: BpeTokenizer) -> None:
    assert bpe.encode_lines("a\ud800b\n").tolist() == bpe.encode_lines("a?b\n").tolist()


@given(text=wordy)
def test_pieces_encode_as_the_whole_does(bpe: BpeTokenizer, text: str) -> None:
    text = text.replace("  ", " a") + " "  # some place to cut in every stretch
    tokenizers: list[Tokenizer] = [bpe, WordTokenizer(["a", "b", "<eos>"])]
    for tokenizer in tokenizers:
        whole = tokenizer.encode(text).tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(words, "LONGEST_PIECE", 30)
            pieces = list(tokenizer.whole([text]))
            cut_by_force = any(len(piece) == 30 for piece in pieces)
            patch.undo()
            joined = [i for piece in pieces for i in tokenizer.encode(piece).tolist()]
        assert joined == whole or cut_by_force


def test_a_text_of_white_space_or_without_any_takes_no_time() -> None:
    for text in (" " * 3_000_000, "x" * 3_000_000):
        assert [len(piece) for piece in whole_pieces([text])] == [1 << 20, 1 << 20, 3_000_000 - (2 << 20)]
    tokenizer = WordTokenizer(["x"])
    assert len(tokenizer.encode("x" * 3_000_000)) == 3
    assert tokenizer.lengths("x" * 3_000_000, tokenizer.encode("x"))[0].sum() == 3_000_000


def test_written_text_is_the_decoded_text(bpe: BpeTokenizer) -> None:
    text = "x é€😀 the\n\ncat the "
    made: list[Tokenizer] = [bpe, ByteTokenizer(), CharTokenizer.train(text), WordTokenizer.train(text)]
    for tokenizer in made:
        writer = tokenizer.writer()
        ids = tokenizer.encode(text).tolist()
        assert "".join([*map(writer.write, ids), writer.close()]) == tokenizer.decode(ids)
    word = WordTokenizer(["cat", "<eos>"])
    for before, after in (("the", " cat"), ("the ", "cat"), ("", "cat"), ("the\n", "cat")):
        assert word.writer(before).write(0) == after
    half = bpe.writer()
    assert half.write(bpe.encode("€").tolist()[0]) == ""
    assert half.close() == "\ufffd"


def test_ids_take_no_more_bytes_than_they_need(bpe: BpeTokenizer) -> None:
    assert bpe.dtype == np.uint16
    assert ByteTokenizer().dtype == np.uint8
    assert CharTokenizer(map(chr, range(255))).dtype == np.uint8
    assert CharTokenizer(map(chr, range(256))).dtype == np.uint16  # 256 stands for the unknown character
    assert WordTokenizer([f"w{i}" for i in range(70_000)]).dtype == np.uint32


def test_without_hugging_face_bpe_says_what_to_install(bpe: BpeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bpe.to_json()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'longshort\[bpe\]'"):
        train_tokenizer("bpe", "text")
    with pytest.raises(MissingExtraError, match=r"pip install 'longshort\[bpe\]'"):
        from_json(content)
    assert train_tokenizer("word", "some text").size == 2


@pytest.mark.parametrize(
    "change",
    [
        "t['model']['merges'][0] = ['Ġ', 'nonsense']",
        "t['model']['merges'] = [['a']]",
        "t['model']['merges'] = 7",
        "t['model']['vocab'].pop('!')",
        "t['model']['vocab']['!'] = 99999",
        "t['model']['vocab'] = ['!']",
        "t['model']['dropout'] = 0.5",
        "t['pre_tokenizer'] = {'type': 'Split', 'pattern': {'Regex': '(a+)+$'}, 'behavior': 'Isolated'}",
        "t['added_tokens'] = [{'id': 400, 'content': 'x'}]",
    ],
)
def test_a_changed_bpe_or_word_tokenizer_is_refused(bpe: BpeTokenizer, change: str) -> None:
    for tokenizer in (bpe, WordTokenizer.train("a ! b")):
        content = json.loads(tokenizer.to_json())
        try:
            exec(change, {"t": content})
        except KeyError:
            continue
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            from_json(json.dumps(content))


def test_too_many_words_are_refused_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    with pytest.raises(TextError, match="4 different words; at most 3") as caught:
        WordTokenizer.train("a b c d")
    assert "--min-freq 2" in str(caught.value)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(TextError):
        CharTokenizer("")
    with pytest.raises(UsageError, match="sentencepiece"):
        train_tokenizer("sentencepiece", "abc")
