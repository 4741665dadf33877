"""The language model, its torch-free decoder, and evaluation on either."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longshort import cells, checkpoint, evaluation, kernels, native
from longshort.config import ModelConfig, TrainConfig
from longshort.decoder import Decoder, load_decoder
from longshort.errors import CheckpointError, ConfigError, TextError, UsageError
from longshort.evaluation import evaluate
from longshort.model import LanguageModel, load_language_model
from longshort.text.tokenizers import ByteTokenizer, CharTokenizer
from recurrent import same

SYMBOLS = "abcdefgh"
TOKENIZER = CharTokenizer(SYMBOLS)


def model_of(seed: int = 0, **changes: Any) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel(ModelConfig(**({"vocab_size": 8, "hidden": 6, "embedding": 5} | changes)), TOKENIZER).eval()


@st.composite
def architectures_that_exist(draw: st.DrawFn) -> dict[str, Any]:
    layers, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    return {
        "cell": draw(st.sampled_from(["rnn", "rnn_relu", "gru", "lstm"])),
        "layers": layers,
        "hidden": hidden,
        "embedding": draw(st.sampled_from([0, 3, 12])),
        "seed": draw(st.integers(0, 99)),
        "residual": layers > 1 and draw(st.booleans()),
        "layer_norm": hidden > 3 and draw(st.booleans()),
    }


architectures = architectures_that_exist()


@given(architecture=architectures, T=st.integers(1, 9), B=st.integers(1, 4))
def test_table_and_embedding_give_the_same_logits_and_gradients(architecture: dict[str, Any], T: int, B: int) -> None:
    """Gathering from the projected table equals embedding first and multiplying then, on every kernel."""
    single = model_of(**architecture)
    model = copy.deepcopy(single).double()
    ids_TB = torch.randint(9, (T, B))  # 8 is unknown
    table = torch.eye(8, dtype=torch.float64) if model.embedding is None else model.embedding.weight
    padded = torch.cat([table, torch.zeros(1, table.shape[1], dtype=torch.float64)])
    definition = cells.CELLS[model.config.cell]
    state = model.zero_state(B)
    h_TBH, after, options = padded[ids_TB], [], model.recurrent.options
    for layer, own in enumerate(model.recurrent.all_weights):
        before = tuple(tensor[layer : layer + 1] for tensor in state)
        having = options[layer : layer + 1]
        y_TBH, last = cells.run_stack(definition, h_TBH, before, [own], bias=True, options=having)
        h_TBH = h_TBH + y_TBH if model.config.residual and layer else y_TBH
        after.append(last)
    expected_state = tuple(torch.cat(tensors) for tensors in zip(*after, strict=True))
    expected = model.output(h_TBH)
    weights = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), list(model.parameters()), allow_unused=True)
    largest = max(1.0, *(g.abs().max().item() for g in expected_gradients if g is not None))
    for kernel in kernels.available():
        if kernel == "torch" and model.config.layer_norm:
            continue  # it has none
        exact = kernel in ("torch", "reference")  # the native kernels are for float32
        tested, close = (model, 1e-10) if exact else (single, 1e-5)
        with kernels.use(kernel):
            logits, found_state = tested(ids_TB)
            with torch.no_grad():
                torch.testing.assert_close(tested(ids_TB)[0], logits, rtol=0, atol=close)
        torch.testing.assert_close(logits.double(), expected, rtol=0, atol=close)
        for a, b in zip(found_state, expected_state, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=0, atol=close)
        gradients = torch.autograd.grad((logits * weights.to(logits.dtype)).sum(), list(tested.parameters()))
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            # Rows of few units that are nearly equal are normalised with few digits.
            lost = 10 if model.config.layer_norm else 1
            torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=lost * close * largest)


@given(architecture=architectures, cut=st.integers(1, 8))
def test_state_goes_in_and_comes_out(architecture: dict[str, Any], cut: int) -> None:
    model = model_of(**architecture).double()
    ids_TB = torch.randint(8, (9, 2))
    whole, end = model(ids_TB)
    first, between = model(ids_TB[:cut])
    second, end_of_parts = model(ids_TB[cut:], between)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-12)
    for a, b in zip(end, end_of_parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@given(architecture=architectures, T=st.integers(1, 9), B=st.integers(1, 4), tied=st.booleans(), numpy=st.booleans())
def test_the_decoder_is_the_same_model_without_torch(
    architecture: dict[str, Any], T: int, B: int, tied: bool, numpy: bool
) -> None:
    if tied:
        architecture |= {"tied": True, "embedding": architecture["hidden"]}
    model = model_of(**architecture)
    with without_kernels() if numpy else nullcontext():
        decoder = Decoder(model.config, model.weights(), TOKENIZER)
    assert bool(decoder._native) == (not numpy and bool(native.targets()))
    rng = np.random.default_rng(0)
    inputs_TB, targets_TB = rng.integers(9, size=(T, B)), rng.integers(8, size=(T, B))
    ours, state = decoder.nats(inputs_TB, targets_TB, None)
    theirs, torch_state = model.nats(inputs_TB, targets_TB, None)
    close = 2e-5 if model.config.layer_norm else 2e-6  # nearly equal units are normalised with few digits
    np.testing.assert_allclose(ours, theirs, atol=close)
    for a, b in zip(state, torch_state, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=close)
    more = rng.integers(8, size=(3,))
    column = tuple(tensor[:, :1] for tensor in state), tuple(tensor[:, :1].contiguous() for tensor in torch_state)
    np.testing.assert_allclose(decoder.logits(more, column[0])[0], model.logits(more, column[1])[0], atol=2 * close)


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "ready", lambda: False)
        yield


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("embedding", [0, 16])
def test_what_does_not_fit_a_model_is_refused(kernel: str, embedding: int) -> None:
    model = LanguageModel(ModelConfig(cell="lstm", vocab_size=20, embedding=embedding, hidden=8, layers=2))
    ids, (h, c) = torch.randint(20, (30, 4)), model.zero_state(4)
    wrong_states = {
        "one row": model.zero_state(1),
        "other units": (h, c[..., :3]),
        "another type": (h, c.double()),
        "no c": (h,),
    }
    with kernels.use(kernel):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                for state in wrong_states.values():
                    with pytest.raises(UsageError, match=r"state must be|state of lstm is"):
                        model(ids, state)
                for wrong in (ids + 21, ids - 20, ids[0], ids.float(), ids > 3, ids.to("meta")):
                    with pytest.raises(UsageError, match="Symbols must be"):
                        model(wrong)
                for targets in (ids + 20, ids - 21, ids.float()):
                    with pytest.raises(UsageError, match="Symbols must be"):
                        model.loss(ids, targets, None, 120)
                with pytest.raises(UsageError, match="a target for each symbol"):
                    model.loss(ids, ids[:7], None, 120)
                same(model(ids.int()), model(ids))
                logits, state = model(ids[:0], (h, c))
                assert logits.shape == (0, 4, 20)
                assert state[0] is h
        right = model.recurrent.get_parameter("weight_hh_l1")
        model.recurrent.weight_hh_l1 = torch.nn.Parameter(right[:, :4].detach())
        with pytest.raises(UsageError, match=r"Weight 5 must be \(32, 8\)"):
            model(ids)


def test_tied_weights_are_one_and_are_saved_once() -> None:
    model = model_of(embedding=6, tied=True)
    assert model.embedding is not None
    assert model.output.weight is model.embedding.weight
    assert "output.weight" not in model.weights()
    assert model.num_parameters == sum(w.size for w in model.weights().values())
    other = model_of(seed=1, embedding=6, tied=True)
    other.load_weights(model.weights())
    ids = torch.randint(8, (5, 1))
    assert torch.equal(model(ids)[0], other(ids)[0])
    assert other.embedding is not None
    assert other.output.weight is other.embedding.weight


@pytest.mark.parametrize(("cell", "parameters"), [("rnn", 88_107), ("gru", 242_219), ("lstm", 319_275)])
def test_the_lectures_model_has_pytorchs_number_of_parameters(cell: str, parameters: int) -> None:
    assert LanguageModel(ModelConfig(vocab_size=43, cell=cell, embedding=0)).num_parameters == parameters


def test_a_causal_model_refuses_to_be_bidirectional_and_says_why() -> None:
    for config in (ModelConfig, TrainConfig):
        with pytest.raises(ConfigError, match="bidirectional: its backward direction would read"):
            config(bidirectional=True)


def test_dropout_acts_in_training_alone() -> None:
    model = model_of(dropout=0.5, layers=2, hidden=64)
    ids = torch.randint(8, (5, 3))
    assert torch.equal(model(ids)[0], model(ids)[0])
    model.train()
    assert not torch.equal(model(ids)[0], model(ids)[0])
    assert evaluate(model, TOKENIZER, "abcabc") == evaluate(model, TOKENIZER, "abcabc")
    assert model.training


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, not 0"),
        ({"hidden": 2.5}, "hidden must be a whole number, not 2.5"),
        ({"hidden": True}, "hidden must be a whole number, not True"),
        ({"dropout": 1.0}, "dropout must be below 1, not 1"),
        ({"dropout": math.nan}, "dropout must be a finite number"),
        ({"cell": 3}, "cell must be a text"),
        ({"tied": True}, "tied needs embedding = hidden"),
        ({"tied": 1}, "tied must be true or false"),
        ({"hiden": 3}, "Did you mean 'hidden'"),
        ({"zzz": 3}, "Known: cell"),
        ({"vocab_size": 5000, "embedding": 0}, "One-hot input is for at most 4096"),
    ],
)
def test_configurations_name_what_is_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_dict(values)
    assert str(caught.value).count("\n") <= 2
    assert isinstance(caught.value, ValueError)


@given(architecture=architectures)
def test_configurations_survive_json(architecture: dict[str, Any]) -> None:
    del architecture["seed"]
    config = TrainConfig(**architecture, texts=("a", "b"))
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_an_unknown_cell_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'lsmt'"):
        model_of(cell="lsmt")
    with pytest.raises(UsageError, match=r"runs with PyTorch only(.|\n)*train=True"):
        Decoder(ModelConfig(vocab_size=8, cell="mine"), {}, TOKENIZER)


# ---------------------------------------------------------------------------------------------- saved and loaded


def save(model: LanguageModel, path: Any) -> None:
    checkpoint.save_model(path, model.weights(), model.config.to_dict(), TOKENIZER.to_json(), {})


def test_both_engines_load_a_model_directory(tmp_path: Any) -> None:
    model = model_of(layers=2, embedding=4)
    save(model, tmp_path / "model")
    text = "abcabcaddehhg" * 5
    expected = evaluate(model, TOKENIZER, text).nats_per_token
    again = load_language_model(tmp_path / "model")
    assert evaluate(again, TOKENIZER, text).nats_per_token == expected
    decoder = load_decoder(tmp_path / "model")
    assert decoder.tokenizer.sha256 == TOKENIZER.sha256
    assert evaluate(decoder, decoder.tokenizer, text).nats_per_token == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("change", [{"hidden": 7}, {"layers": 2}, {"embedding": 4}, {"cell": "gru"}])
def test_weights_of_another_model_are_refused(tmp_path: Any, change: dict[str, Any]) -> None:
    model = model_of()
    config = ModelConfig(**(model.config.to_dict() | change))
    checkpoint.save_model(tmp_path / "m", model.weights(), config.to_dict(), TOKENIZER.to_json(), {})
    for load in (load_decoder, load_language_model):
        with pytest.raises(CheckpointError, match=r"weight \S+ should have the shape"):
            load(tmp_path / "m")


# ------------------------------------------------------------------------------------------------- evaluation


def constant_model(probabilities: list[float]) -> LanguageModel:
    """A model that gives the same probabilities whatever it reads."""
    model = model_of()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.get_parameter("output.bias").copy_(torch.tensor(probabilities).log())
    return model


@given(
    text=st.text(alphabet=SYMBOLS + "?", min_size=2, max_size=60),
    lanes=st.integers(1, 9),
    block=st.none() | st.integers(1, 70),
)
def test_every_protocol_counts_each_symbol_after_the_first_once(text: str, lanes: int, block: int | None) -> None:
    p = [0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]
    counted = [c for c in text[1:] if c != "?"]
    model = constant_model(p)
    given: dict[str, Any] = {"block": block} if block else {"lanes": lanes}
    if not counted:
        with pytest.raises(TextError, match="no symbol that this model can predict"):
            evaluate(model, TOKENIZER, text, **given)
        return
    found = evaluate(model, TOKENIZER, text, **given)
    nats = -sum(math.log(p[SYMBOLS.index(c)]) for c in counted)
    assert found.tokens == found.characters == found.bytes == len(counted)
    assert found.skipped == len(text) - 1 - len(counted)
    assert found.nats_per_token == pytest.approx(nats / len(counted), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(nats / len(counted)), rel=1e-5)
    assert found.bits_per_character == found.bits_per_byte == pytest.approx(nats / len(counted) / math.log(2), rel=1e-6)


@settings(max_examples=20)
@given(architecture=architectures, length=st.integers(2, 200), block=st.integers(1, 60))
def test_protocols_carry_and_zero_the_state_where_they_say(
    architecture: dict[str, Any], length: int, block: int
) -> None:
    model = model_of(**architecture)
    rng = np.random.default_rng(length)
    text = "".join(rng.choice(list(SYMBOLS), size=length))
    ids = torch.tensor([SYMBOLS.index(c) for c in text]).unsqueeze(1)

    def nats(inputs: torch.Tensor, targets: torch.Tensor) -> float:
        logits, _ = model(inputs)
        return float(torch.nn.functional.cross_entropy(logits[:, 0], targets[:, 0], reduction="sum").detach())

    whole = nats(ids[:-1], ids[1:])
    assert evaluate(model, TOKENIZER, text).nats_per_token == pytest.approx(whole / (length - 1), abs=1e-5)
    blocks = [(ids[i : min(i + block, length - 1)], ids[i + 1 : i + 1 + block]) for i in range(0, length - 1, block)]
    in_blocks = sum(nats(inputs, targets) for inputs, targets in blocks)
    found = evaluate(model, TOKENIZER, text, block=block)
    assert found.nats_per_token == pytest.approx(in_blocks / (length - 1), abs=1e-5)
    assert str(block) in found.protocol


@settings(max_examples=20)
@given(length=st.integers(2, 200), lanes=st.integers(1, 9), overlap=st.integers(0, 70))
def test_each_lane_is_read_from_so_far_before_it(length: int, lanes: int, overlap: int) -> None:
    model = model_of(cell="gru")
    text = "".join(np.random.default_rng(length).choice(list(SYMBOLS), size=length))
    ids = torch.tensor([SYMBOLS.index(c) for c in text]).unsqueeze(1)
    total, part = 0.0, -(-(length - 1) // lanes)
    for first in range(0, length - 1, part):
        begin, end = max(first - overlap, 0), min(first + part, length - 1)
        logits = model(ids[begin:end])[0][first - begin :, 0]
        total += float(torch.nn.functional.cross_entropy(logits, ids[first + 1 : end + 1, 0], reduction="sum").detach())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "OVERLAP", overlap)
        found = evaluate(model, TOKENIZER, text, lanes=lanes)
    assert found.nats_per_token == pytest.approx(total / (length - 1), abs=1e-5)
    assert found.tokens == length - 1


def test_a_text_is_read_in_as_many_lanes_as_its_length_is_worth() -> None:
    assert [evaluation.lanes_for(tokens) for tokens in (0, 1, 8191, 8192, 10**9)] == [1, 1, 1, 2, 64]
    model, text = constant_model([1 / 8] * 8), SYMBOLS * 1100
    assert "each of 2 lanes, which overlap by 256 tokens" in evaluate(model, TOKENIZER, text).protocol
    assert "one lane" in evaluate(model, TOKENIZER, text, lanes=1).protocol


def test_bytes_and_characters_differ_where_the_text_is_not_ascii() -> None:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=256, hidden=4))
    found = evaluate(model.eval(), ByteTokenizer(), "aé€")  # 1 + 2 + 3 bytes
    assert (found.tokens, found.bytes, found.characters) == (5, 5, 2)
    assert found.bits_per_character == pytest.approx(found.bits_per_byte * 5 / 2)


def test_wrong_protocols_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"lanes": 0}, {"block": 0}, {"block": -1}, {"lanes": 2, "block": 5}]
    for arguments in wrong:
        with pytest.raises(ConfigError):
            evaluate(model_of(), TOKENIZER, "abc", **arguments)


def test_looks_are_read_by_the_native_loop_also_where_its_target_is_forced() -> None:
    if not native.targets():
        pytest.skip("there are no native kernels")
    model = LanguageModel(ModelConfig(vocab_size=TOKENIZER.size, hidden=4, embedding=3), TOKENIZER)
    for name in ("auto", "native"):
        with kernels.use(name):
            assert isinstance(model.reader(), Decoder)
    for name in ("reference", "torch"):
        with kernels.use(name):
            assert model.reader() is model
