"""Classifiers and taggers: against torch.nn, scikit-learn and the best possible accuracy; runs kept and resumed."""

from __future__ import annotations

import itertools
import json
import math
import re
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import longshort
from conftest import ROOT
from longshort import checkpoint, training
from longshort.cli import main
from longshort.config import LabelModelConfig, LabelTrainConfig, ModelConfig, TrainConfig
from longshort.errors import CheckpointError, ConfigError, LongshortError, OutputError, TrainingError, UsageError
from longshort.labels import labelling, supervision
from longshort.labels.examples import Encoded, Examples
from longshort.labels.label_decoder import LabelDecoder
from longshort.labels.labellers import Labeller, SequenceClassifier, SequenceTagger, make_labeller
from longshort.labels.labelling import evaluate_labels
from longshort.loop import Finished, Looked, Stopped
from longshort.text.hidden_markov import HiddenMarkov

Sequences = list[NDArray[Any]]


def made(**given: Any) -> Labeller:
    config: dict[str, Any] = {"labels": ("a", "b", "c"), "hidden": 5, "embedding": 4, "vocab_size": 6} | given
    torch.manual_seed(0)
    return make_labeller(LabelModelConfig(**config), None).eval()


def drawn(lengths: list[int], width: int = 0, seed: int = 0) -> Sequences:
    """Return sequences of ids below 7, where 6 is unknown to a model of 6 symbols, or of vectors."""
    generator = np.random.default_rng(seed)
    if width:
        return [generator.normal(size=(length, width)).astype(np.float32) for length in lengths]
    return [generator.integers(7, size=length) for length in lengths]


def by_torch(model: Labeller, sequence: NDArray[Any]) -> Tensor:
    """Return the logits of one sequence alone, by torch.nn's layers in float64: (C), or (T, C)."""
    config = model.config
    kinds: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN, "rnn_relu": nn.RNN}
    more = {"nonlinearity": "relu"} if config.cell == "rnn_relu" else {}
    size = (model.recurrent.input_size, config.hidden, config.layers)
    layer = kinds[config.cell](*size, bidirectional=config.bidirectional, **more).double()
    layer.load_state_dict(model.recurrent.state_dict())
    weight, bias = model.output.weight.double(), model.output.bias.double()
    directions = 1 + config.bidirectional
    if len(sequence):
        x = torch.from_numpy(np.asarray(sequence))
        if model.embedding is not None:
            x = torch.cat([model.embedding.weight, torch.zeros(1, config.embedding)])[x]
        elif not config.inputs:
            x = torch.cat([torch.eye(config.vocab_size), torch.zeros(1, config.vocab_size)])[x]
        h_TH, state = layer(x.double())
        last = (state[0] if config.cell == "lstm" else state)[-directions:].flatten()
    else:
        h_TH, last = (
            torch.zeros(0, directions * config.hidden).double(),
            torch.zeros(directions * config.hidden).double(),
        )
    if config.per_step:
        return F.linear(h_TH, weight, bias)
    mean = h_TH.mean(0) if len(sequence) else last
    return F.linear(last if config.pooling == "ends" else mean, weight, bias)


@settings(max_examples=40)
@given(
    cell=st.sampled_from(["lstm", "gru", "rnn", "rnn_relu"]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    per_step=st.booleans(),
    pooling=st.sampled_from(["mean", "ends"]),
    reads=st.sampled_from(["embedded", "one-hot", "vectors"]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_row_is_labelled_as_if_it_were_alone(
    cell: str,
    layers: int,
    bidirectional: bool,
    per_step: bool,
    pooling: str,
    reads: str,
    lengths: list[int],
    padding: int,
    seed: int,
) -> None:
    """Whatever else is in the batch, in any order, with any padding behind it, zero steps included."""
    width = 3 if reads == "vectors" else 0
    given: dict[str, Any] = {"embedding": 0} if reads == "one-hot" else {}
    given |= {"reads": "vectors", "inputs": 3, "vocab_size": 0} if width else {}
    stack = {"cell": cell, "layers": layers, "bidirectional": bidirectional, "per_step": per_step}
    stack |= {} if per_step else {"pooling": pooling}
    model = made(**stack, **given)
    sequences = drawn(lengths, width, seed)
    batch = Encoded(model.config, None, sequences).batch(np.arange(len(sequences)))
    behind = drawn([padding] * len(sequences), width, seed + 1)
    inputs = np.concatenate([batch.inputs, np.stack(behind, 1)]).astype(batch.inputs.dtype)
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs), batch.lengths_B)
    found = model.probabilities(sequences)
    for row, sequence in enumerate(sequences):
        wanted = by_torch(model, sequence)
        got = logits[: len(sequence), row] if per_step else logits[row]
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[row], wanted.softmax(-1).detach(), rtol=1e-5, atol=1e-6)


@settings(max_examples=15)
@given(per_step=st.booleans(), order=st.permutations(range(5)), pooling=st.sampled_from(["mean", "ends"]))
def test_gradients_do_not_depend_on_order_and_padding(per_step: bool, order: list[int], pooling: str) -> None:
    sequences = drawn([4, 0, 7, 1, 3])
    names = ["a", "b", "c", "a", "b"]
    labels = [[name] * len(each) for name, each in zip(names, sequences, strict=True)] if per_step else names
    weights = torch.tensor([1.0, 2.0, 0.5])

    def gradients(groups: list[list[int]], longer: int) -> list[Tensor]:
        model = made(per_step=per_step, pooling="mean" if per_step else pooling, layers=2)
        encoded = Encoded(model.config, None, sequences, labels)
        counts = np.array([len(each) if per_step else 1 for each in sequences])
        importance = weights.numpy()[["abc".index(name) for name in names]] * counts
        for group in groups:
            batch = encoded.batch(np.array(group))
            fill = ((0, longer), *([(0, 0)] * (batch.inputs.ndim - 1)))
            padded = type(batch)(
                np.pad(batch.inputs, fill, constant_values=3),
                batch.lengths_B,
                np.pad(batch.targets, fill, constant_values=-1) if per_step else batch.targets,
            )
            share = importance[group].sum() / importance.sum()
            (model.loss(padded, weights) * float(share)).backward()  # type: ignore[no-untyped-call]
        return [p.grad for p in model.parameters() if p.grad is not None]

    for found, wanted in zip(gradients([order], 2), gradients([[0], [1], [2], [3], [4]], 0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@settings(max_examples=25)
@given(st.data())
def test_figures_are_those_of_scikit_learn(data: st.DataObject) -> None:
    from sklearn import metrics
    from sklearn.utils import class_weight

    model = made(per_step=True)
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any))
    sequences = drawn(lengths, seed=sum(lengths))
    names = st.sampled_from(data.draw(st.sampled_from(["abc", "ab", "c"])))
    labels = [data.draw(st.lists(names, min_size=n, max_size=n)) for n in lengths]
    examples = Examples(sequences, labels)
    found = evaluate_labels(model, examples)
    truth = list(itertools.chain(*labels))
    said = list(itertools.chain(*model.predict(sequences)))
    p = np.concatenate(model.probabilities(sequences))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that do not occur
        for average, wanted in (("precision", found.precision), ("recall", found.recall), ("f1", found.f1)):
            score = getattr(metrics, f"{average}_score")(truth, said, labels=list("abc"), average=None, zero_division=0)
            np.testing.assert_allclose(list(wanted.values()), score)
        np.testing.assert_allclose(found.macro_f1, metrics.f1_score(truth, said, average="macro", zero_division=0))
        np.testing.assert_allclose(found.nats_per_label, metrics.log_loss(truth, p, labels=list("abc")), rtol=1e-9)
        balanced = class_weight.compute_class_weight("balanced", classes=np.array(examples.names), y=np.array(truth))
    assert found.confusion == metrics.confusion_matrix(truth, said, labels=list("abc")).tolist()
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, said))
    assert found.labels == len(truth)
    assert found.sequences == len(sequences)
    np.testing.assert_allclose(examples.balanced_weights(), balanced)
    weights = (1.0, 3.0, 0.5)
    by_class = [weights["abc".index(name)] for name in truth]
    nats = -np.log(p[np.arange(len(truth)), ["abc".index(name) for name in truth]])
    weighted = evaluate_labels(model, examples, weights)
    assert weighted.nats_per_label == pytest.approx(float(np.average(nats, weights=by_class)))
    assert "weights" in weighted.protocol


@settings(max_examples=20)
@given(seed=st.integers(0, 999), T=st.integers(1, 5))
def test_posteriors_are_sums_over_all_tags(seed: int, T: int) -> None:
    grammar = HiddenMarkov.drawn(3, 4, seed)
    words, _ = grammar.sample(T, np.random.default_rng(seed))

    def joint(tags: tuple[int, ...], words: NDArray[Any]) -> float:
        p = grammar.start_K[tags[0]]
        p *= math.prod(grammar.next_KK[a, b] for a, b in itertools.pairwise(tags))
        return float(p * math.prod(grammar.says_KV[tag, word] for tag, word in zip(tags, words, strict=True)))

    for forward_only in (False, True):
        found = grammar.posterior(words, forward_only=forward_only)
        for t in range(T):
            known = words[: t + 1] if forward_only else words
            sums = np.zeros(3)
            for tags in itertools.product(range(3), repeat=len(known)):
                sums[tags[t]] += joint(tags, known)
            np.testing.assert_allclose(found[t], sums / sums.sum(), atol=1e-12)
    assert grammar.log_likelihood(words) == pytest.approx(math.log(sums.sum()))


def test_what_a_hidden_markov_model_is_made_of() -> None:
    grammar = HiddenMarkov(np.array([1.0, 0.0]), np.eye(2), np.eye(2))
    assert grammar.sample(3, np.random.default_rng(0))[0].tolist() == [0, 0, 0]
    assert grammar.log_likelihood(np.array([0, 1])) == -math.inf
    with pytest.raises(ConfigError, match="shapes"):
        HiddenMarkov(np.ones(1), np.eye(2), np.eye(2))
    with pytest.raises(ConfigError, match="come to 1"):
        HiddenMarkov(np.array([0.5, 0.4]), np.eye(2), np.eye(2))
    grammar = HiddenMarkov.drawn(3, 5, seed=1)
    words, tags = grammar.sample(20_000, np.random.default_rng(2))
    for tag in range(3):
        share = np.bincount(words[tags == tag], minlength=5) / (tags == tag).sum()
        np.testing.assert_allclose(share, grammar.says_KV[tag], atol=0.03)
        after = tags[1:][tags[:-1] == tag]
        np.testing.assert_allclose(np.bincount(after, minlength=3) / len(after), grammar.next_KK[tag], atol=0.03)


def languages(count: int, seed: int) -> tuple[dict[str, HiddenMarkov], Sequences, list[str]]:
    known = {name: HiddenMarkov.drawn(3, 8, number, 0.6) for number, name in enumerate("xyz")}
    generator = np.random.default_rng(seed)
    names = [str(name) for name in generator.choice(list(known), count)]
    return known, [known[name].sample(int(generator.integers(20)), generator)[0] for name in names], names


def test_a_classifier_reaches_the_best_possible_accuracy(tmp_path: Path) -> None:
    """Within 1 %: expected over the posterior of the language, which leaves out the luck of the draw."""
    known, sequences, names = languages(8000, seed=1)
    config = LabelTrainConfig(out=str(tmp_path / "run"), cell="gru", hidden=32, embedding=16, lr=1e-2, epochs=3)
    *_, finished = longshort.train_labels(config, Examples(sequences, names))
    assert isinstance(finished, Finished)
    assert finished.heldout is None
    _, unseen, _ = languages(3000, seed=2)
    p_NC = np.exp([[language.log_likelihood(each) for language in known.values()] for each in unseen])
    p_NC /= p_NC.sum(1, keepdims=True)
    best = p_NC.max(1).mean()
    said = ["xyz".index(label) for label in longshort.load(tmp_path / "run").predict(unseen)]
    assert best - 0.01 < p_NC[np.arange(len(said)), said].mean() <= best
    assert best > 0.8


def test_a_tagger_that_reads_back_goes_past_the_bound_of_one_that_does_not(tmp_path: Path) -> None:
    grammar = HiddenMarkov.drawn(5, 15, 7, 0.5)
    generator = np.random.default_rng(0)

    def sentences(count: int) -> tuple[Sequences, list[list[str]]]:
        pairs = [grammar.sample(int(generator.integers(25)), generator) for _ in range(count)]
        return [words for words, _ in pairs], [[f"t{tag}" for tag in tags] for _, tags in pairs]

    examples, unseen = Examples(*sentences(3000)), sentences(500)[0]
    bound = {}
    for both in (True, False):
        out = tmp_path / f"run-{both}"
        config = LabelTrainConfig(out=str(out), epochs=4, hidden=32, embedding=16, lr=1e-2, bidirectional=both)
        list(longshort.train_labels(config, examples))
        posterior_NK = np.concatenate([grammar.posterior(each, forward_only=not both) for each in unseen])
        said = [int(tag[1:]) for tags in longshort.load(out).predict(unseen) for tag in tags]
        bound[both] = posterior_NK.max(1).mean()
        reached = posterior_NK[np.arange(len(said)), said].mean()
        assert bound[both] - 0.01 < reached <= bound[both]
        if both:
            with_both = reached
    assert with_both > bound[False] + 0.01


TINY: dict[str, Any] = {"hidden": 6, "batch_size": 8, "validate_every": 5, "steps": 20, "dropout": 0.2}
VECTORS = drawn([3, 0, 5, 2, 4, 1] * 6, width=2)
KINDS: dict[str, Examples] = {
    "text": Examples(["abc", "", "bca", "ac", "cab", "b"] * 6, ["x", "y", "z"] * 12),
    "words": Examples([["a", "bc"], [], ["bc"]] * 12, [["N", "V"], [], ["V"]] * 12),
    "ids": Examples(drawn([3, 0, 5, 2, 4, 1] * 6), ["x", "y"] * 18),
    "vectors": Examples(VECTORS, [["up" if value > 0 else "down" for value in each[:, 0]] for each in VECTORS]),
}


def run(out: Path, examples: Examples, heldout: Examples | None, stop_at: int | None = None, **given: Any) -> list[Any]:
    of_symbols: dict[str, Any] = {} if examples.reads == "vectors" else {"embedding": 4}
    config = LabelTrainConfig(**(TINY | of_symbols | {"out": str(out)} | given))
    count = itertools.count(1)
    return list(longshort.train_labels(config, examples, heldout, stop=lambda: next(count) == stop_at))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_kept_loaded_and_resumed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    examples, heldout = KINDS[kind].split(0.25, seed=1)
    deep = {"layers": 3, "residual": True, "layer_norm": True} if kind == "vectors" else {}
    events = run(tmp_path / "whole", examples, heldout, **deep)
    assert sum(isinstance(event, Looked) for event in events) == 4
    assert isinstance(events[-1], Finished)
    model = longshort.load(tmp_path / "whole", train=True)
    assert type(model) is (SequenceTagger if examples.per_step else SequenceClassifier)
    assert not model.training
    assert model.config.reads == kind
    assert (model.recurrent.options.residual, model.recurrent.options.layer_norm) == (bool(deep), bool(deep))
    found = evaluate_labels(model, heldout)
    assert found == events[-1].heldout
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["heldout"] == found.to_dict()
    without = evaluate_labels(longshort.load(tmp_path / "whole"), heldout)  # PyTorch
    assert without.nats_per_label == pytest.approx(found.nats_per_label, abs=1e-5)
    assert without.confusion == found.confusion
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert {"heldout_nats_per_label", "heldout_accuracy", "heldout_macro_f1"} <= {key for line in lines for key in line}

    *_, stopped = run(tmp_path / "parts", examples, heldout, stop_at=9, **deep)
    assert isinstance(stopped, Stopped)
    assert stopped.step < 20
    started, *_, finished = longshort.resume_labels(tmp_path / "parts", examples, heldout)
    assert isinstance(started, supervision.LabelsStarted)
    assert started.resumed_at == stopped.step
    assert isinstance(finished, Finished)
    assert finished.heldout == found
    for name in ("metrics.jsonl", "checkpoints/step-000020/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    *_, further = longshort.resume_labels(tmp_path / "parts", examples, heldout, steps=25)
    assert isinstance(further, Finished)
    assert further.step == 25


def test_what_a_step_reads() -> None:
    """Every sequence once an epoch, in a new order, those of similar length side by side."""
    examples = Examples(drawn(list(range(50))), ["a", "b"] * 25)
    model = made(labels=("a", "b"))
    task = supervision.LabelTask(
        LabelTrainConfig(batch_size=8), model, Encoded(model.config, None, examples.sequences, examples.labels), None
    )
    assert task.steps_per_epoch == 7
    epochs = [[task.batch(step + first).lengths_B.tolist() for step in range(7)] for first in (0, 7)]
    for epoch in epochs:
        assert sorted(itertools.chain(*epoch)) == list(range(50))
        assert all(max(batch) - min(batch) < 8 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_class_weights_shift_what_is_said(tmp_path: Path) -> None:
    """The same symbol in both classes, nine times as often in one: with balanced weights both are as likely."""
    examples = Examples([np.zeros(2, int)] * 100, ["often"] * 90 + ["seldom"] * 10)
    assert examples.balanced_weights() == (100 / 180, 100 / 20)
    for weights, wanted in (((), 0.9), (examples.balanced_weights(), 0.5)):
        config = TINY | {"dropout": 0.0, "batch_size": 100, "lr": 0.05, "steps": 60, "class_weights": weights}
        run(tmp_path / f"run-{wanted}", examples, None, **config)
        p = longshort.load(tmp_path / f"run-{wanted}").probabilities(examples.sequences[:1])[0]
        assert p[0] == pytest.approx(wanted, abs=0.01)


def test_predictions_leave_a_model_in_training_as_it_was() -> None:
    model = made(dropout=0.5).train()
    first, second = model.predict(drawn([3])), model.predict(drawn([3]))
    assert first == second
    assert model.training
    assert model.predict([]) == []


@pytest.mark.parametrize(
    ("sequences", "labels", "words"),
    [
        ([], [], "0 sequences and 0 labels"),
        (["a"], ["x", "y"], "1 sequences and 2 labels"),
        (["a", [1]], ["x", "y"], "Sequence 1 must be a text"),
        ([["a"], "b"], ["x", "y"], "Sequence 0 must be a text"),
        ([["a"], [1]], ["x", "y"], "Sequence 1 must be a list of words"),
        ([[1], [-1]], ["x", "y"], "Sequence 1 must be an array .T,. of whole numbers"),
        ([[1], [[1.0]]], ["x", "y"], "Sequence 1"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], ["x", "y"], r"Sequence 1 must be an array \(T, 3\)"),
        ([np.zeros((2, 3)), np.full((2, 3), np.nan)], ["x", "y"], "finite"),
        ([np.zeros((2, 3, 4))], ["x"], "of the shape .2, 3, 4."),
        ([[1], [2]], ["x", 3], "Labels are texts, .* that of sequence 1 is 3"),
        (["a b", "c"], [0, 1], "Labels are texts, .* that of sequence 0 is 0"),
        ([[1], [2]], [["x"], None], "Labels are texts, .* that of sequence 1 is None"),
        ([[1], [2]], [["x"], "y"], "Labels are texts, .* that of sequence 1 is 'y'"),
        ([[1], [2]], ["x", ["y"]], r"Labels are texts, .* that of sequence 1 is \['y'\]"),
        ([1, 2], ["x", "y"], "Sequences are texts, .*\nOne of these is 1"),
        ([[], None, [1]], ["x", "y", "x"], "Sequences are texts, .*\nOne of these is None"),
        ([{"a": 1}, {"b": 2}], ["x", "y"], "Sequences are texts, .*\nOne of these is {'a': 1}"),
        ([[[1], [1, 2]]], ["x"], "Sequences are texts, .*\nOne of these is"),
        ([[1], None], ["x", "y"], "Sequence 1 must be an array .T,. of whole numbers"),
        ([["a"], {"b": 2}], ["x", "y"], "Sequence 1 must be a list of words"),
        ([["a"], {"b"}], ["x", "y"], "Sequence 1 must be a list of words"),
        ([np.zeros((2, 3)), 5], ["x", "y"], r"Sequence 1 must be an array \(T, 3\)"),
        ([[1, 2], [2]], [["x", "y"], ["x", "y"]], "Sequence 1 has 1 steps"),
        ([[1, 2]], [["x", 3]], "Sequence 0 has 2 steps"),
        (["ab"], [["x", "y"]], "A text has no steps"),
    ],
)
def test_examples_that_are_none(sequences: list[Any], labels: list[Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Examples(sequences, labels)


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, out = Examples([[1], [2], []], ["x", "y", "x"]), tmp_path / "run"
    with pytest.raises(ConfigError, match="Two labels at least"):
        run(out, Examples([[1]], ["x"]), None)
    with pytest.raises(ConfigError, match="class_weights are wanted for 2 labels"):
        run(out, examples, None, class_weights=(1.0,))
    with pytest.raises(ConfigError, match="class_weights must be above 0"):
        run(out, examples, None, class_weights=(1.0, 0.0))
    with pytest.raises(ConfigError, match="class_weights must be a list of numbers"):
        run(out, examples, None, class_weights=("x",))
    with pytest.raises(UsageError, match="patience needs held-out"):
        run(out, examples, None, patience=2)
    with pytest.raises(UsageError, match="steps or epochs"):
        run(out, examples, None, epochs=2.0)
    with pytest.raises(UsageError, match="does not know the label 'z'"):
        run(out, examples, Examples([[1]], ["z"]))
    with pytest.raises(ConfigError, match="needs a label for the sequence"):
        run(out, examples, Examples([[1]], [["x"]]))
    with pytest.raises(ConfigError, match="Sequence 0 must be an array"):
        run(out, examples, Examples(["a"], ["x"]))
    with pytest.raises(ConfigError, match="cell lstm, gru"):
        run(out, examples, None, cell="my.py:Cell")
    with pytest.raises(ConfigError, match="One-hot input is for at most"):
        run(out, Examples([[5000], [1]], ["x", "y"]), None, embedding=0)
    with pytest.raises(ConfigError, match="embedding is the width that symbols get; these sequences are vectors"):
        run(out, KINDS["vectors"], None, embedding=8)
    with pytest.raises(ConfigError, match="tokenizer bpe is for texts; these sequences are ids"):
        run(out, examples, None, tokenizer="bpe")
    with pytest.raises(ConfigError, match="min_freq is for words"):
        run(out, examples, None, min_freq=2)
    with pytest.raises(ConfigError, match="holds white space"):
        run(out, Examples([["a b"], ["c"]], ["x", "y"]), None)
    with pytest.raises(TrainingError, match="diverged"):
        run(out, Examples([np.full((3, 1), 3e38, np.float32)] * 2, ["x", "y"]), None, lr=1e30, cell="rnn_relu")
    with pytest.raises(ConfigError, match="leaves one of the two parts empty"):
        examples.split(0.999)
    assert not out.exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"):
        run(out, examples, None, device="cuda")
    assert not out.exists()


def test_configurations_that_make_no_sense() -> None:
    for changes, words in (
        ({"labels": ("a",)}, "two different ones"),
        ({"labels": ("a", "a")}, "two different ones"),
        ({"inputs": 2}, "vocab_size and no inputs"),
        ({"reads": "vectors"}, "inputs and no vocab_size"),
        ({"per_step": True, "pooling": "ends"}, "no pooling"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(**changes)
    with pytest.raises(ConfigError, match="that is a SequenceTagger"):
        SequenceClassifier(made(per_step=True).config)
    with pytest.raises(ConfigError, match="cannot be bidirectional"):
        ModelConfig(bidirectional=True)
    with pytest.raises(LongshortError, match="needs the tokenizer"):
        made(reads="text").predict(["a"])
    with pytest.raises(ConfigError, match="vectors of 3 numbers, not of 2"):
        made(reads="vectors", vocab_size=0, inputs=3).predict([np.zeros((1, 2))])
    none: list[Any] = [1.0, [1.0, 2.0], [[1.0], [1.0, 2.0]], None, {}]
    for sequence in none:
        with pytest.raises(ConfigError, match="Sequence 0 must be an array"):
            made(reads="vectors", vocab_size=0, inputs=3).predict([sequence])
    with pytest.raises(CheckpointError, match="weights are not those"):
        made().load_weights(made(hidden=7).weights())


def test_a_run_with_labels_is_no_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples, out = KINDS["text"], tmp_path / "run"
    run(out, examples, None, steps=2)
    text = tmp_path / "text.txt"
    text.write_text("abc " * 100, encoding="utf-8")
    for command in (
        ["generate", str(out)],
        ["eval", str(out), str(text)],
        ["score", str(out), str(text)],
        ["train", str(text), "--from", str(out), "--steps", "1", "--out", str(tmp_path / "other")],
        ["resume", str(out)],
    ):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert "labels sequences" in said
        assert "longshort." in said  # where to go instead
        assert len(said.strip().splitlines()) <= 3
    run(tmp_path / "ids", KINDS["ids"], None, steps=2)  # which has no tokenizer
    assert main(["train", str(text), "--from", str(tmp_path / "ids"), "--out", str(tmp_path / "other")]) == 2
    assert "config.json is that of a model that labels sequences" in capsys.readouterr().err
    with pytest.raises(UsageError, match="a model that labels sequences"):
        training.Prepared(TrainConfig(texts=(str(text),), from_model=str(tmp_path / "ids")))
    assert isinstance(longshort.load(out, train=True), SequenceClassifier)
    assert isinstance(longshort.load(out), LabelDecoder)
    with pytest.raises(UsageError, match="float32 weights, not int8"):
        longshort.load(out, weights="int8")
    list(training.train(TrainConfig(texts=(str(text),), steps=1, out=str(tmp_path / "lm"), hidden=4, embedding=4)))
    with pytest.raises(UsageError, match="trains a language model"):
        list(longshort.resume_labels(tmp_path / "lm", examples))
    with pytest.raises(UsageError, match="holds a language model"):
        labelling.read_saved(checkpoint.load_model(tmp_path / "lm"))


def test_resuming_with_threads_of_its_own_warns_of_nothing(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        run(tmp_path / "run", KINDS["ids"], None, steps=2, threads=before + 1)
        torch.set_num_threads(before)  # as another process has them
        *_, finished = longshort.resume_labels(tmp_path / "run", KINDS["ids"], steps=4)
    finally:
        torch.set_num_threads(before)
    assert isinstance(finished, Finished)


def test_resuming_needs_the_same_examples(tmp_path: Path) -> None:
    examples, heldout = KINDS["ids"].split(0.25)
    run(tmp_path / "run", examples, heldout, steps=2)
    swapped = Examples(examples.sequences[::-1], examples.labels[::-1])
    with pytest.raises(UsageError, match="The examples are not those of"):
        list(longshort.resume_labels(tmp_path / "run", swapped, heldout))
    with pytest.raises(UsageError, match="The held-out examples are not those of"):
        list(longshort.resume_labels(tmp_path / "run", examples))
    with pytest.raises(UsageError, match="has made 2 steps already"):
        list(longshort.resume_labels(tmp_path / "run", examples, heldout, steps=1))
    with checkpoint.open_run(tmp_path / "run").lock(), pytest.raises(OutputError, match="Another process"):
        list(longshort.resume_labels(tmp_path / "run", examples, heldout, steps=4))
    with pytest.raises(UsageError, match="is a run already"):
        run(tmp_path / "run", examples, heldout)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    checkpoint.open_run(tmp_path / "run").write_config({"train_labels": config["train_labels"], "legs": [[1]]})
    with pytest.raises(CheckpointError, match="not the configuration"):
        list(longshort.resume_labels(tmp_path / "run", examples, heldout))


JSON_VALUES = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text() | st.lists(st.text())
)


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(made().config.to_dict())), value=JSON_VALUES)
def test_a_changed_configuration_is_refused_or_is_a_model(name: str, value: Any, tmp_path_factory: Any) -> None:
    """Whoever changes a file and its hash gets an error of ours, or a model that works."""
    model = made()
    path = tmp_path_factory.mktemp("model") / "model"
    config = model.config.to_dict() | {name: value}
    try:
        checkpoint.save_model(path, model.weights(), config, "null\n", {})
    except ValueError:
        return
    try:
        loaded = longshort.load(path)
    except LongshortError:
        return
    assert len(loaded.predict([np.array([1, 2, 3])])) == 1


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("classify_lines.py", ["best possible accuracy", "macro F1"]),
        ("tag_words.py", ["forward only", "boat/noun"]),
    ],
)
def test_the_examples_run(
    name: str, wanted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = ROOT / "examples" / name
    monkeypatch.setattr(sys, "argv", [name, "--count", "500", "--out", str(tmp_path / "run")])
    runpy.run_path(str(program), run_name="__main__")
    shown = capsys.readouterr().out
    assert all(words in shown for words in wanted)
    assert len(program.read_text(encoding="utf-8").splitlines()) <= 75


def test_the_pages_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    assert "['english', 'french']" in capsys.readouterr().out


def test_the_page_has_the_figures_of_the_file() -> None:
    page = (ROOT / "docs" / "labels.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "2026-11-25-labels.json").read_text(encoding="utf-8"))
    tags: dict[int, list[str]] = {}
    for row in found["rows"]:
        figures = f"{row.get('accuracy', 0):.3f} | {row.get('best_possible', 0):.3f}"
        if row["task"] == "made-up languages":
            assert f"| {row['cell'].upper()}, pooling {row['pooling']} | {figures} |" in page
        elif row["task"] == "tags":
            tags.setdefault(row["sentences"], []).append(figures)
        elif "model" in row:
            figures = f"{row['accuracy']:.3f} | {row['macro_f1']:.3f} | {row['f1']['timemachine']:.3f}"
            assert f"| {row['model']} | {figures} | {row['seconds']:.0f} |" in page
    assert len(tags) == 5
    for sentences, both in tags.items():
        assert f"| {sentences:,} | {' | '.join(both)} |" in page


def test_texts_are_cut_into_words_where_that_is_asked_for(tmp_path: Path) -> None:
    texts = ["good day", "day night", "bad night", "bad day", "good good"]
    examples = Examples(texts * 8, ["+", "-", "-", "-", "+"] * 8)
    run(tmp_path / "run", examples, None, tokenizer="word", lr=0.05, steps=60, dropout=0.0)
    model = longshort.load(tmp_path / "run")
    assert model.config.vocab_size == 4  # and no symbol reaches from one text into the next
    assert model.predict(["good night  good", "bad unheard-of"]) == ["+", "-"]
