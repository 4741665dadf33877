"""Tokenizers: text to ids and back. `char` and `byte` are look-ups in NumPy; `words.py` has `word` and `bpe`.

A tokenizer has `size` output symbols, ids 0 .. size-1. A symbol that training never saw gets the id
`size`: it may be an input of a model (where it is embedded as the zero vector), never an output, and it is
never counted in `size`. So *The Time Machine* of the lecture has 43 symbols here as there.

All are saved as a `tokenizer.json` that Hugging Face `tokenizers` reads and that encodes the same there;
the format has a version of its own (`version`).
`from_json` reads only what `to_json` wrote, so no code and no regular expression of a stranger ever runs.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from longshort.errors import CheckpointError, TextError, UsageError

Ids = NDArray[np.int32]

UNKNOWN = "<unk>"


class Writer(Protocol):
    """Turns ids that come one by one into text; nothing is given out before its characters are whole."""

    def write(self, symbol: int) -> str:
        """Return what the symbol adds to the text."""

    def close(self) -> str:
        """Return what is still held back."""


class Tokenizer(ABC):
    """What every tokenizer offers."""

    name: ClassVar[str]
    size: int
    """Number of output symbols."""
    has_unknown: ClassVar[bool] = True
    """Whether `encode` can give the id `size`."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids of `text`, int32; `self.size` stands for a symbol outside the vocabulary."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; what stands for no symbol becomes U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """Return the content of `tokenizer.json`."""

    @abstractmethod
    def lengths(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Return how many characters, and how many UTF-8 bytes, of `text` each of its `ids` stands for."""

    def writer(self, after: str = "") -> Writer:
        """Return what writes ids as text that goes on where the text `after` ends."""
        return _SymbolWriter(self)

    def whole(self, pieces: Iterable[str]) -> Iterator[str]:
        """Return the same text in pieces that can be encoded one by one: their ids, joined, are the whole's."""
        yield from pieces

    def encode_lines(self, text: str) -> Ids:
        """Return the ids of lines that each end in a newline, which is a symbol of its own then."""
        return self.encode(text)

    def unknown_symbols(self, text: str) -> list[str]:
        """Return the symbols of `text` that are outside the vocabulary, each once, in the order of the text."""
        ids = self.encode(text)
        unknown = np.flatnonzero(ids == self.size)
        if not len(unknown):
            return []
        ends = np.cumsum(self.lengths(text, ids)[0])
        found = (text[0 if i == 0 else ends[i - 1] : ends[i]] for i in unknown)
        # A word stands for the white space before it too.
        return list(dict.fromkeys(symbol.strip() or symbol for symbol in found))

    @property
    def newline(self) -> int:
        """The id of a newline alone."""
        return int(self.encode("\n")[0])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned integers that hold every id."""
        return np.dtype(np.min_scalar_type(self.size if self.has_unknown else self.size - 1))

    @property
    def sha256(self) -> str:
        """Hash of `to_json()`: two tokenizers with the same hash encode the same."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()


class CharTokenizer(Tokenizer):
    """One id a character (Unicode code point), in sorted order.

    Args:
        symbols: the distinct characters; any order, stored sorted.
    """

    name = "char"

    def __init__(self, symbols: Iterable[str]) -> None:
        self.symbols = sorted(set(symbols))
        if not self.symbols:
            raise TextError("A character vocabulary needs at least one character; the text has none.")
        self.size = len(self.symbols)
        code_points = np.array([ord(symbol) for symbol in self.symbols], dtype=np.int64)
        # Only as long as the highest symbol; anything above it is clipped onto the last entry, which is unknown.
        self._id_of = np.full(int(code_points[-1]) + 2, self.size, dtype=np.int32)
        self._id_of[code_points] = np.arange(self.size, dtype=np.int32)

    @classmethod
    def train(cls, text: str | Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of all characters in `text`, whole or in pieces."""
        seen = np.zeros(0x110000, dtype=np.bool_)
        for piece in as_pieces(text):
            seen[_code_points(piece)] = True
        return cls(map(chr, np.flatnonzero(seen).tolist()))

    def encode(self, text: str) -> Ids:
        """Return one id a character."""
        encoded: Ids = np.take(self._id_of, _code_points(text), mode="clip")
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return one character an id."""
        size, symbols = self.size, self.symbols
        return "".join(symbols[i] if 0 <= i < size else "\N{REPLACEMENT CHARACTER}" for i in ids)

    def lengths(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Return ones, and the UTF-8 bytes of each character."""
        points = _code_points(text)
        sizes = 1 + (points > 0x7F).astype(np.int32) + (points > 0x7FF) + (points > 0xFFFF)
        return np.ones(len(ids), dtype=np.int32), sizes

    def to_json(self) -> str:
        """Return a WordLevel model over single characters."""
        vocabulary = {symbol: i for i, symbol in enumerate([*self.symbols, UNKNOWN])}
        split = {
            "type": "Split",
            "pattern": {"Regex": "[\\s\\S]"},
            "behavior": "Isolated",
            "invert": False,
        }
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN}
        return tokenizer_json(split, {"type": "Fuse"}, model)


class ByteTokenizer(Tokenizer):
    """One id a byte of the UTF-8 text, the id being the byte's value. Nothing is ever unknown."""

    name = "byte"
    size = 256
    has_unknown = False

    def encode(self, text: str) -> Ids:
        """Return one id a UTF-8 byte."""
        return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    def encode_bytes(self, data: bytes) -> Ids:
        """Return the ids of any bytes, text or not."""
        return np.frombuffer(data, dtype=np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes themselves."""
        return np.fromiter(ids, dtype=np.uint8).tobytes()

    def lengths(self, text: str, ids: Ids) -> tuple[Ids, Ids]:
        """Return 1 for each byte that begins a character (0 for one that continues it), and ones."""
        return ((np.asarray(ids) & 0xC0) != 0x80).astype(np.int32), np.ones(len(ids), dtype=np.int32)

    def writer(self, after: str = "") -> Writer:
        """Return what writes a character when its last byte has come."""
        return BytesWriter([bytes([value]) for value in range(256)])

    def to_json(self) -> str:
        """Return a byte-level BPE model without merges."""
        vocabulary = {symbol: i for i, symbol in enumerate(byte_level_alphabet())}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        return tokenizer_json(byte_level, byte_level, model)


class _SymbolWriter:
    """Of a tokenizer whose symbols stand for whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, symbol: int) -> str:
        return self._tokenizer.decode([symbol])

    def close(self) -> str:
        return ""


class BytesWriter:
    """Of a tokenizer whose symbols stand for bytes, which need not be whole characters.

    Args:
        symbols: the bytes of each id.
    """

    def __init__(self, symbols: list[bytes]) -> None:
        self._symbols = symbols
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, symbol: int) -> str:
        """Return the characters that are whole now."""
        return self._decoder.decode(self._symbols[symbol])

    def close(self) -> str:
        """Return U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


TOKENIZERS = ("char", "byte", "word", "bpe")


def train_tokenizer(
    name: str, text: str | Iterable[str], *, min_freq: int | None = None, vocab_size: int | None = None
) -> Tokenizer:
    """Return the tokenizer called `name`, made for `text`, the training part alone.

    Args:
        name: one of `TOKENIZERS`.
        text: whole, or in pieces.
        min_freq: of `word`: how often a word must occur to be a symbol; once if None.
        vocab_size: of `bpe`: the number of symbols at most; 4,096 if None.

    Raises:
        UsageError: no such tokenizer.
        TextError: a text without any symbol, or with more words than a model can have.
        MissingExtraError: `bpe` without Hugging Face `tokenizers`.
    """
    if name == CharTokenizer.name:
        return CharTokenizer.train(text)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    from longshort.text.words import BpeTokenizer, WordTokenizer  # here, because `words.py` imports this module

    if name == WordTokenizer.name:
        return WordTokenizer.train(text, min_freq or 1)
    if name == BpeTokenizer.name:
        return BpeTokenizer.train(text, vocab_size or 4096)
    raise UsageError(f"There is no tokenizer called {name!r}.", f"Choose one of: {', '.join(TOKENIZERS)}.")


def from_json(content: str) -> Tokenizer:
    """Return the tokenizer that `to_json` wrote as `content`.

    Raises:
        CheckpointError: `content` is not JSON, or is a tokenizer of another make.
        MissingExtraError: it is a `bpe` tokenizer, and Hugging Face `tokenizers` is not installed.
    """
    try:
        read = json.loads(content)
        tokenizer = _made_of(read)
        if read != json.loads(tokenizer.to_json()):
            raise ValueError("it differs from what longshort writes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, TextError) as error:
        raise CheckpointError(
            f"tokenizer.json is not a tokenizer written by longshort ({error!s:.200}).",
            "Use the tokenizer.json that was saved with the model.",
        ) from error
    return tokenizer


def _made_of(read: Any) -> Tokenizer:
    """Return the tokenizer that the values in a `tokenizer.json` seem to describe."""
    model = read["model"]
    if not isinstance(model["vocab"], dict):
        raise ValueError("its vocabulary is no table")
    if model["type"] == "WordLevel" and read["normalizer"] is None:
        symbols = [symbol for symbol in model["vocab"] if symbol != UNKNOWN]
        if any(len(symbol) != 1 for symbol in symbols):
            raise ValueError("symbols of more than one character")
        return CharTokenizer(symbols)
    if model["type"] == "BPE" and not read["pre_tokenizer"]["use_regex"]:
        return ByteTokenizer()
    from longshort.text.words import BpeTokenizer, WordTokenizer

    if model["type"] == "WordLevel":
        return WordTokenizer([word for word in model["vocab"] if word != model["unk_token"]])
    return BpeTokenizer(list(model["vocab"]), [(left, right) for left, right in model["merges"]])


def as_pieces(text: str | Iterable[str]) -> Iterable[str]:
    """Return the pieces of a text that is given whole or in pieces."""
    return [text] if isinstance(text, str) else text


def _code_points(text: str) -> NDArray[np.unsignedinteger[Any]]:
    if text.isascii():  # four times less to move
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def tokenizer_json(
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any] | None,
    model: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
) -> str:
    """Return the content of a `tokenizer.json`."""
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=True, indent=1) + "\n"


def byte_level_alphabet() -> list[str]:
    """Return the printable character that byte-level BPE writes for each byte value.

    Printable Latin-1 bytes stand for themselves; the others are numbered from U+0100 in byte order. (The
    convention of GPT-2's tokenizer, which the `ByteLevel` decoder of Hugging Face expects.)
    """
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    alphabet, next_free = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte if byte in printable else next_free))
        next_free += byte not in printable
    return alphabet
