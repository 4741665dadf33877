"""Tokenizers: text to ids and back. `char` and `byte` are look-ups in NumPy.

A tokenizer has `size` output symbols, ids 0 .. size-1. A character that training never saw gets the id
`size`: it may be an input of a model (where it is embedded as the zero vector), never an output, and it is
never counted in `size`. So *The Time Machine* of the lecture has 43 symbols here as there.

Both are saved as a `tokenizer.json` that Hugging Face `tokenizers` reads and that encodes the same there;
The format has a version of its own (`version`).
`from_json` reads only what `to_json` wrote, so no code and no regular expression of a stranger ever runs.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from longshort.errors import CheckpointError, TextError, UsageError

Ids = NDArray[np.int32]

UNKNOWN = "<unk>"


class Tokenizer(ABC):
    """What every tokenizer offers."""

    name: ClassVar[str]
    size: int
    """Number of output symbols."""

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
    def characters(self, ids: Ids) -> int:
        """Return how many characters of the original text `ids` stand for."""

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
    def train(cls, text: str) -> CharTokenizer:
        """Return the tokenizer of all characters in `text`."""
        code_points = np.unique(_code_points(text))
        return cls(chr(code_point) for code_point in code_points.tolist())

    def encode(self, text: str) -> Ids:
        """Return one id a character."""
        encoded: Ids = np.take(self._id_of, _code_points(text), mode="clip")
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Return one character an id."""
        size, symbols = self.size, self.symbols
        return "".join(symbols[i] if 0 <= i < size else "\N{REPLACEMENT CHARACTER}" for i in ids)

    def characters(self, ids: Ids) -> int:
        """Return `len(ids)`: an id is a character."""
        return len(ids)

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
        return _tokenizer_json(split, {"type": "Fuse"}, model)


class ByteTokenizer(Tokenizer):
    """One id a byte of the UTF-8 text, the id being the byte's value. Nothing is ever unknown."""

    name = "byte"
    size = 256

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

    def characters(self, ids: Ids) -> int:
        """Return the number of characters that begin in `ids` (bytes that do not continue one)."""
        return int(np.count_nonzero((np.asarray(ids) & 0xC0) != 0x80))

    def to_json(self) -> str:
        """Return a byte-level BPE model without merges."""
        vocabulary = {symbol: i for i, symbol in enumerate(_byte_level_alphabet())}
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        model = {"type": "BPE", "vocab": vocabulary, "merges": []}
        return _tokenizer_json(byte_level, byte_level, model)


TOKENIZERS = {CharTokenizer.name: CharTokenizer, ByteTokenizer.name: ByteTokenizer}


def train_tokenizer(name: str, text: str) -> Tokenizer:
    """Return the tokenizer called `name`, made for `text`, the training part alone."""
    if name == CharTokenizer.name:
        return CharTokenizer.train(text)
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    raise UsageError(f"There is no tokenizer called {name!r}.", f"Choose one of: {', '.join(TOKENIZERS)}.")


def from_json(content: str) -> Tokenizer:
    """Return the tokenizer that `to_json` wrote as `content`.

    Raises:
        CheckpointError: `content` is not JSON, or is a tokenizer of another make.
    """
    try:
        read = json.loads(content)
        model = read["model"]
        tokenizer: Tokenizer
        if model["type"] == "WordLevel":
            symbols = [symbol for symbol in model["vocab"] if symbol != UNKNOWN]
            if any(len(symbol) != 1 for symbol in symbols):
                raise ValueError("symbols of more than one character")
            tokenizer = CharTokenizer(symbols)
        else:
            tokenizer = ByteTokenizer()
        if read != json.loads(tokenizer.to_json()):
            raise ValueError("it differs from what longshort writes")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, TextError) as error:
        raise CheckpointError(
            f"tokenizer.json is not a char or byte tokenizer written by longshort ({error}).",
            "Use the tokenizer.json that was saved with the model.",
        ) from error
    return tokenizer


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _tokenizer_json(pre_tokenizer: dict[str, Any], decoder: dict[str, Any], model: dict[str, Any]) -> str:
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(content, ensure_ascii=True, indent=1) + "\n"


def _byte_level_alphabet() -> list[str]:
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
