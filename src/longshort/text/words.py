"""Tokenizers whose symbols are longer than a character: `word`, and `bpe` by Hugging Face `tokenizers`.

Texts that come in pieces are cut anew where white space begins: no symbol of either reaches across such a place, so the
ids of the pieces are the ids of the whole. A stretch of 2**20 characters without such a place is cut where it ends.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longshort.errors import MissingExtraError, TextError
from longshort.text.tokenizers import (
    UNKNOWN,
    BytesWriter,
    Ids,
    Tokenizer,
    Writer,
    as_pieces,
    byte_level_alphabet,
    tokenizer_json,
)

END_OF_LINE = "<eos>"
MOST_WORDS = 1_000_000
LONGEST_PIECE = 1 << 20
# Unicode's property White_Space, which Rust and so Hugging Face's splitter go by; Python counts U+001C to U+001F too.
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_WORDS = re.compile(f"[^{WHITE}]+")
_TOKENS = re.compile(f"\n|[^{WHITE}]+")
_NOT_WHITE_HERE = re.compile("[\x1c-\x1f]")


def whole_pieces(pieces: Iterable[str]) -> Iterator[str]:
    """Return the same text, cut where white space follows something else, or after `LONGEST_PIECE` characters.

    Where it is cut depends on the text alone, not on the pieces that it comes in.
    """
    rest = ""
    for piece in pieces:
        for start in range(0, len(piece), LONGEST_PIECE):
            rest += piece[start : start + LONGEST_PIECE]
            while len(rest) > LONGEST_PIECE:
                cut = _place_to_cut(rest)
                yield rest[:cut]
                rest = rest[cut:]
    if rest:
        yield rest


def _place_to_cut(text: str) -> int:
    place = max(text.rfind(" ", 0, LONGEST_PIECE + 1), text.rfind("\n", 0, LONGEST_PIECE + 1))
    return len(text[: max(place, 0)].rstrip(WHITE)) or LONGEST_PIECE


class WordTokenizer(Tokenizer):
    """One id a word: what stands between white space; each newline is the word `<eos>`.

    Args:
        words: the vocabulary in the order of ids.

    Literal `<unk>` and `<eos>` in a text are words as any other; `<eos>` then is the same symbol as a newline. The
    unknown word takes a name that no word has.
    """

    name = "word"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.size = len(self.words)
        self._id_of = {word: i for i, word in enumerate(self.words)}
        if not self.words:
            raise TextError("A vocabulary of words needs at least one; the text has none.")
        if len(self._id_of) != self.size or not all(isinstance(w, str) and _WORDS.fullmatch(w) for w in self.words):
            raise ValueError("words that are repeated, empty or hold white space")
        self.unknown = UNKNOWN
        while self.unknown in self._id_of:
            self.unknown = f"<{self.unknown}>"

    @classmethod
    def train(cls, text: str | Iterable[str], min_freq: int = 1) -> WordTokenizer:
        """Return the tokenizer of all words that occur `min_freq` times or more, the most frequent first."""
        counts: Counter[str] = Counter()
        for piece in whole_pieces(as_pieces(text)):
            counts.update(_split(piece))
        return cls.of_counts(counts, min_freq)

    @classmethod
    def of_counts(cls, counts: Counter[str], min_freq: int = 1) -> WordTokenizer:
        """Return the tokenizer of all words that were counted `min_freq` times or more, the most frequent first."""
        kept = [word for word, count in counts.items() if count >= min_freq or word == END_OF_LINE]
        if counts and not kept:
            raise TextError(f"No word of the text occurs {min_freq} times.", "Give a lower --min-freq.")
        if len(kept) > MOST_WORDS:
            raise TextError(
                f"The text has {len(kept):,} different words; at most {MOST_WORDS:,} can be symbols.",
                f"Leave out the rare ones with --min-freq {min_freq + 1} or more, or take --tokenizer bpe.",
            )
        return cls(sorted(kept, key=lambda word: (-counts[word], word)))

    def encode(self, text: str) -> Ids:
        """Return one id a word or newline."""
        get, unknown = self._id_of.get, self.size
        words = (word for piece in whole_pieces([text]) for word in _split(piece))
        return np.fromiter((get(word, unknown) for word in words), dtype=np.int32)

    def encode_words(self, words: Sequence[str]) -> Ids:
        """Return the ids of words that have been cut apart already."""
        return np.array([self._id_of.get(word, self.size) for word in words], dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words with a space between them, newlines without."""
        writer = self.writer()
        return "".join([writer.write(i) for i in ids])

    def lengths(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Return the length of each word or newline together with the white space before it."""
        characters, sizes = [], []
        for piece in whole_pieces([text]):
            start = 0
            for match in _TOKENS.finditer(piece):
                symbol, start = piece[start : match.end()], match.end()
                characters.append(len(symbol))
                sizes.append(len(symbol) if symbol.isascii() else len(symbol.encode("utf-8", "surrogatepass")))
        return np.array(characters, dtype=np.int32), np.array(sizes, dtype=np.int32)

    def writer(self, after: str = "") -> Writer:
        """Return what puts a space between words."""
        return _WordWriter(self.words, joined=not after or after[-1] in WHITE)

    def whole(self, pieces: Iterable[str]) -> Iterator[str]:
        """Return pieces that split no word."""
        return whole_pieces(pieces)

    def to_json(self) -> str:
        """Return a WordLevel model over words."""
        vocabulary = {word: i for i, word in enumerate([*self.words, self.unknown])}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": self.unknown}
        newlines = {"type": "Replace", "pattern": {"String": "\n"}, "content": f" {END_OF_LINE} "}
        return tokenizer_json({"type": "WhitespaceSplit"}, None, model, newlines)


def _split(text: str) -> list[str]:
    spaced = text.replace("\n", f" {END_OF_LINE} ")
    return _WORDS.findall(spaced) if _NOT_WHITE_HERE.search(text) else spaced.split()


class _WordWriter:
    def __init__(self, words: Sequence[str], joined: bool) -> None:
        self._words, self._joined = words, joined

    def write(self, symbol: int) -> str:
        word = self._words[symbol] if 0 <= symbol < len(self._words) else "\N{REPLACEMENT CHARACTER}"
        word = "\n" if word == END_OF_LINE else word
        space = "" if self._joined or word == "\n" else " "
        self._joined = word == "\n"
        return space + word

    def close(self) -> str:
        return ""


class BpeTokenizer(Tokenizer):
    """Byte pair encoding of UTF-8 bytes, by Hugging Face `tokenizers`. Nothing is ever unknown.

    Args:
        symbols: the vocabulary in the order of ids, in the alphabet of byte-level BPE.
        merges: pairs of symbols in the order in which they are joined.

    Raises:
        MissingExtraError: Hugging Face `tokenizers` is not installed.
        ValueError: they do not fit together.
    """

    name = "bpe"
    has_unknown = False

    def __init__(self, symbols: Sequence[str], merges: Sequence[tuple[str, str]]) -> None:
        self.symbols, self.merges, self.size = list(symbols), list(merges), len(symbols)
        alphabet = {symbol: byte for byte, symbol in enumerate(byte_level_alphabet())}
        known = set(self.symbols)
        fits = alphabet.keys() <= known and len(known) == self.size
        if not fits or not all(left in known and right in known and left + right in known for left, right in merges):
            raise ValueError("its merges do not make its vocabulary")
        self._bytes = [bytes([alphabet[c] for c in symbol]) for symbol in self.symbols]
        self._sizes = np.array([len(data) for data in self._bytes], dtype=np.int32)
        starts = [sum((byte & 0xC0) != 0x80 for byte in data) for data in self._bytes]
        self._starts = np.array(starts, dtype=np.int32)
        try:
            self._tokenizer = _library().Tokenizer.from_str(self.to_json())
        except MissingExtraError:
            raise
        except BaseException as error:  # a panic of the library is no `Exception`
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            raise ValueError(f"Hugging Face tokenizers refuses it: {error}") from error

    @classmethod
    def train(cls, text: str | Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Return the tokenizer that Hugging Face's trainer makes, of at most `vocab_size` symbols, 256 or more."""
        library = _library()
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = library.pre_tokenizers.ByteLevel.alphabet()
        trainer = library.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(whole_pieces(as_pieces(text)), trainer)
        vocabulary = tokenizer.get_vocab()
        merges = [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
        return cls(sorted(vocabulary, key=lambda symbol: vocabulary[symbol]), merges)

    def encode(self, text: str) -> Ids:
        """Return the ids of the pieces that the merges leave."""
        text = _readable(text)
        pieces = [self._tokenizer.encode(piece).ids for piece in whole_pieces([text])]
        return np.concatenate([np.array(ids, dtype=np.int32) for ids in pieces or [[]]])

    def encode_lines(self, text: str) -> Ids:
        """Return the ids of each line alone, and of the newline that ends it."""
        lines = _readable(text).removesuffix("\n").split("\n") if text else []
        newline = self.newline
        found: list[int] = []
        for encoded, line in zip(self._tokenizer.encode_batch(lines), lines, strict=True):
            found += encoded.ids if len(line) <= LONGEST_PIECE else self.encode(line).tolist()
            found.append(newline)
        return np.array(found, dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        size, replaced = self.size, "\N{REPLACEMENT CHARACTER}".encode()
        return b"".join(self._bytes[i] if 0 <= i < size else replaced for i in ids).decode("utf-8", "replace")

    def lengths(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Return how many characters begin in each symbol, and its bytes."""
        return self._starts[ids], self._sizes[ids]

    def writer(self, after: str = "") -> Writer:
        """Return what writes a character when its last byte has come."""
        return BytesWriter(self._bytes)

    def whole(self, pieces: Iterable[str]) -> Iterator[str]:
        """Return pieces that split no symbol."""
        return whole_pieces(pieces)

    def to_json(self) -> str:
        """Return a byte-level BPE model."""
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        vocabulary = {symbol: i for i, symbol in enumerate(self.symbols)}
        model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in self.merges]}
        return tokenizer_json(byte_level, byte_level, model)


def _readable(text: str) -> str:
    """Return the text with a question mark for half a surrogate pair, as in a prompt, which the library cannot read."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("tokenizers", "bpe", "The bpe tokenizer") from error
    return tokenizers
