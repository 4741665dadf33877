"""A text that is left and gone on with later: one text in two sittings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import native, training
from longshort.config import TrainConfig
from longshort.continuation import Continuation
from longshort.decoder import Decoder
from longshort.errors import CheckpointError, UsageError
from longshort.generation import Request, Sampling, generate_many
from longshort.model import LanguageModel
from longshort.model_files import encode_arrays
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from longshort.text.words import WordTokenizer

TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer("abcdefgh \n"),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.train("the cat sat on a mat .\nwhy , said he ."),
}


def models(name: str = "char", **given: Any) -> dict[str, Any]:
    """Return one model as the native loop, as NumPy and as PyTorch run it."""
    torch.manual_seed(3)
    model = training.make_model(TrainConfig(**({"hidden": 12, "embedding": 5} | given)), TOKENIZERS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ready", lambda: False)
        plain = Decoder(model.config, model.weights(), TOKENIZERS[name])
    found = {"numpy": plain, "torch": model}
    return found | ({"native": Decoder(model.config, model.weights(), TOKENIZERS[name])} if native.targets() else {})


CACHE = {(name, lines): models(name, lines=lines) for name in TOKENIZERS for lines in (False, True)}


def written(model: Decoder | LanguageModel, request: Request) -> tuple[str, Continuation]:
    assert model.tokenizer is not None
    ends: dict[int, Continuation] = {}
    text = "".join(piece for _, piece in generate_many(model, model.tokenizer, [request], ends))
    return text, ends[0]


@settings(max_examples=60)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    lines=st.booleans(),
    how=st.sampled_from(["native", "numpy", "torch"]),
    first=st.integers(0, 40),
    second=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_two_sittings_write_the_text_of_one(
    name: str, lines: bool, how: str, first: int, second: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = CACHE[name, lines].get(how) or CACHE[name, lines]["numpy"]
    request = Request(prompt="a", length=first + second, sampling=Sampling(temperature=1.0, seed=seed))
    whole, end = written(model, request)
    beginning, middle = written(model, dataclasses.replace(request, length=first))
    path = tmp_path_factory.mktemp("kept") / "state"
    middle.save(path, model)
    rest, last = written(
        model, dataclasses.replace(request, prompt="", length=second, after=Continuation.load(path, model))
    )
    assert beginning + rest == whole
    assert last.position == end.position == first + second
    assert last.tail.tolist() == end.tail.tolist()
    for ours, theirs in zip((*last.state, last.logits_V), (*end.state, end.logits_V), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("how", ["native", "numpy", "torch"])
def test_a_prompt_goes_on_where_the_text_was(how: str, lines: bool) -> None:
    model = CACHE["char", lines].get(how)
    if model is None:
        pytest.skip("there is no kernel library")
    _, end = written(model, Request(prompt="abc", length=0))
    for said in ("de", "d\nea", "\n"):
        once, at_once = written(model, Request(prompt=f"abc{said}", length=20))
        later, after = written(model, Request(prompt=said, length=20, after=end))
        assert (later, after.position) == (once, 20)
        np.testing.assert_allclose(after.logits_V, at_once.logits_V, atol=1e-5)


@pytest.mark.parametrize("how", ["native", "numpy", "torch"])
def test_after_a_stop_the_state_is_that_of_what_was_given_out(how: str) -> None:
    model = CACHE["char", False].get(how)
    if model is None:
        pytest.skip("there is no kernel library")
    request = Request(prompt="a", length=300, sampling=Sampling(temperature=1.5), stop=("b",))
    text, end = written(model, request)
    assert len(text) < 299
    _, expected = written(model, Request(prompt=f"a{text}", length=0))
    np.testing.assert_allclose(end.logits_V, expected.logits_V, atol=1e-5)
    assert end.position == len(text) + 1  # the stop's number is spent, or the same stop would come again at once
    assert written(model, request)[1].position == end.position


def test_a_conversation_takes_kilobytes_however_long_it_is(tmp_path: Path) -> None:
    model = CACHE["char", False]["numpy"]
    sizes = set()
    for length in (10, 1000):
        written(model, Request(prompt="a", length=length))[1].save(tmp_path / "state", model)
        sizes.add((tmp_path / "state").stat().st_size)
    assert len(sizes) == 1
    assert max(sizes) < 2000


def test_the_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, others = CACHE["char", False]["numpy"], [CACHE["byte", False]["numpy"], models(hidden=13)["numpy"]]
    weights = model.weights()
    weights["output.bias"] = weights["output.bias"] + 1
    others.append(Decoder(model.config, weights, model.tokenizer))
    written(model, Request())[1].save(tmp_path / "state", model)
    for other in others:
        with pytest.raises(UsageError, match="left by another model"):
            Continuation.load(tmp_path / "state", other)


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    model, path = CACHE["char", False]["numpy"], tmp_path / "state"
    written(model, Request(length=3))[1].save(path, model)
    good = path.read_bytes()
    arrays = safetensors.numpy.load(good)
    rng = np.random.default_rng(0)
    for place in rng.integers(len(good), size=60):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << int(rng.integers(8))]) + good[place + 1 :])
        with pytest.raises(CheckpointError):
            Continuation.load(path, model)
    for bad in (good[:-1], b"", b"\0" * 100, encode_arrays({k: v for k, v in arrays.items() if k != "logits"})):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError):
            Continuation.load(path, model)
    with pytest.raises(CheckpointError, match="no such file"):
        Continuation.load(tmp_path / "nothing", model)
