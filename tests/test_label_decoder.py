"""Classifiers and taggers without PyTorch, against PyTorch's in float64, on the native kernels and on NumPy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import longshort
from longshort import checkpoint, native
from longshort.config import LabelModelConfig
from longshort.errors import CheckpointError
from longshort.labels.examples import Encoded
from longshort.labels.label_decoder import LabelDecoder
from longshort.labels.labellers import Labeller, make_labeller
from longshort.native_model import product

Sequences = list[NDArray[Any]]
CELLS = ("rnn", "rnn_relu", "gru", "lstm")


def made(**given: Any) -> Labeller:
    """Return a model with random weights, biases and gains."""
    torch.manual_seed(0)
    config = LabelModelConfig(**{"labels": ("a", "b", "c"), "hidden": 5, "embedding": 4, "vocab_size": 6, **given})
    model = make_labeller(config, None).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model


def drawn(lengths: list[int], width: int) -> Sequences:
    """Return vectors, or ids below 7, where 6 is unknown to the model."""
    rng = np.random.default_rng(0)
    if width:
        return [rng.normal(size=(length, width)).astype(np.float32) for length in lengths]
    return [rng.integers(7, size=length) for length in lengths]


@pytest.mark.parametrize("natively", [True, False], ids=["native", "numpy"])
@settings(max_examples=40)
@given(
    cell=st.sampled_from(CELLS),
    layers=st.integers(1, 3),
    both=st.booleans(),
    options=st.sampled_from([{}, {"residual": True}, {"layer_norm": True}, {"residual": True, "layer_norm": True}]),
    reads=st.sampled_from([{"embedding": 4}, {"embedding": 0}, {"reads": "vectors", "vocab_size": 0, "inputs": 3}]),
    decides=st.sampled_from([{"pooling": "mean"}, {"pooling": "ends"}, {"per_step": True}]),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
)
def test_it_gives_what_pytorch_gives(
    natively: bool, cell: str, layers: int, both: bool, options: Any, reads: Any, decides: Any, lengths: list[int]
) -> None:
    if natively and not native.targets():
        pytest.skip(native.reason())
    options = {name: value for name, value in options.items() if name != "residual" or layers > 1}
    model = made(cell=cell, layers=layers, bidirectional=both, **options, **reads, **decides)
    config, sequences = model.config, drawn(lengths, model.config.inputs)
    with pytest.MonkeyPatch.context() as patch:
        if not natively:
            patch.setattr(native, "ready", lambda: False)
        decoder = LabelDecoder(config, model.weights())
    batch = Encoded(config, None, sequences).batch(np.arange(len(sequences)))
    with longshort.kernels.use("reference"):
        exact = model.double()
        inputs = torch.from_numpy(batch.inputs)
        expected = (
            exact(inputs.double() if config.inputs else inputs, torch.from_numpy(batch.lengths_B)).detach().numpy()
        )
    found = decoder.logits(batch)
    if config.per_step:
        valid_TB = np.arange(len(found))[:, None] < batch.lengths_B
        found, expected = found[valid_TB], expected[valid_TB]
    np.testing.assert_allclose(found, expected, atol=3e-5)
    assert decoder.predict(sequences) == [model.float().predict([each])[0] for each in sequences]


def test_a_product_tells_nothing_of_what_was_thrown_away() -> None:
    """OpenBLAS raises the processor's flag of an invalid product by chance: here one raises it for certain."""
    endless, nothing = np.full((1, 1), np.inf, np.float32), np.zeros((1, 1), np.float32)
    with pytest.warns(RuntimeWarning, match="invalid value"):
        _ = endless @ nothing
    assert np.isnan(product(endless, nothing)).all()


@pytest.mark.skipif(not native.targets(), reason=native.reason())
def test_company_does_not_change_a_probability() -> None:
    model = made(layers=2, bidirectional=True, hidden=20)
    decoder = LabelDecoder(model.config, model.weights())
    sequences = drawn([4, 0, 9, 1, 3] * 30, 0)
    together = decoder.probabilities(sequences)
    for found, sequence in zip(together, sequences, strict=True):
        assert found.sum() == pytest.approx(1)
        (alone,) = decoder.probabilities([sequence])
        np.testing.assert_allclose(found, alone, atol=1e-6)


def test_other_weights_are_refused() -> None:
    model = made()
    weights = model.weights()
    wrong: list[dict[str, Any]] = [
        {name: value for name, value in weights.items() if name != "output.bias"},
        weights | {"output.bias": np.zeros(4, np.float32)},
        weights | {"recurrent.weight_ih_l1": np.zeros(4, np.float32)},
    ]
    for each in wrong:
        with pytest.raises(CheckpointError, match=r"The weight '(output.bias|recurrent.weight_ih_l1)' should have"):
            LabelDecoder(model.config, each)


def test_it_runs_where_there_is_no_pytorch(tmp_path: Path) -> None:
    model = made(bidirectional=True)
    checkpoint.save_model(tmp_path / "model", model.weights(), model.config.to_dict(), "null\n", {})
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import longshort, numpy as np\n"
        f"model = longshort.load({str(tmp_path / 'model')!r})\n"
        "print(model.predict([np.array([1, 2, 3]), np.array([5])]))\n"
        "examples = longshort.Examples([np.array([1, 2]), np.array([3])], ['a', 'b'])\n"
        "print(longshort.evaluate_labels(model, examples).labels)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{model.predict([np.array([1, 2, 3]), np.array([5])])}\n2\n"
