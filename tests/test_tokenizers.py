from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer

from longshort.errors import CheckpointError, TextError, UsageError
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer, from_json, train_tokenizer

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
    assert tokenizer.characters(tokenizer.encode(text)) == len(text)


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


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(TextError):
        CharTokenizer("")
    with pytest.raises(UsageError, match="sentencepiece"):
        train_tokenizer("sentencepiece", "abc")
