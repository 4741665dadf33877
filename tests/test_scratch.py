from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch

from longshort import scratch
from longshort.text.tokenizers import CharTokenizer


def model_for(text: str, cell: str = "lstm", H: int = 8) -> scratch.Model:
    tokenizer = CharTokenizer.train(text)
    torch.manual_seed(0)
    return scratch.Model(cell, scratch.get_params(cell, tokenizer.size, H), tokenizer)


def test_it_needs_nothing_but_torch_and_the_texts() -> None:
    tree = ast.parse(Path(scratch.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported - {"__future__", "collections.abc", "dataclasses", "math", "time"} == {
        "torch",
        "longshort.text.batches",
        "longshort.text.tokenizers",
    }


@pytest.mark.parametrize(("cell", "parameters"), [("rnn", 87_851), ("gru", 241_451), ("lstm", 318_251)])
def test_parameters_are_the_lectures(cell: str, parameters: int) -> None:
    params = scratch.get_params(cell, 43, 256)
    assert sum(param.numel() for param in params) == parameters
    weights = torch.cat([param.detach().flatten() for param in params if param.dim() == 2])
    assert float(weights.std()) == pytest.approx(0.01, rel=0.02)
    assert abs(float(weights.mean())) < 1e-4
    assert all(not param.any() for param in params if param.dim() == 1)


def test_clipping_scales_all_gradients_by_one_factor() -> None:
    params = [torch.zeros(3, requires_grad=True), torch.zeros(2, 2, requires_grad=True)]
    params[0].grad, params[1].grad = torch.full((3,), 3.0), torch.full((2, 2), -4.0)
    norm = math.sqrt(3 * 9 + 4 * 16)
    assert scratch.clip_gradients(params, 100.0) == pytest.approx(norm)
    assert params[0].grad.tolist() == [3.0] * 3
    assert scratch.clip_gradients(params, 1.0) == pytest.approx(norm)
    torch.testing.assert_close(params[0].grad, torch.full((3,), 3.0 / norm))
    torch.testing.assert_close(params[1].grad, torch.full((2, 2), -4.0 / norm))


def test_cross_entropy_is_torchs() -> None:
    logits, targets = torch.randn(4, 3, 5), torch.randint(5, (4, 3))
    targets[1, 2] = -1
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(scratch.cross_entropy(logits, targets), expected)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    model = model_for("abcd" * 10)
    for param in model.params:
        param.data.zero_()
    assert scratch.perplexity(model, "abcdabcdz") == pytest.approx(4.0)


@pytest.mark.parametrize("cell", sorted(scratch.CELLS))
def test_prediction_warms_the_state_on_the_prefix(cell: str) -> None:
    """The greedy continuation is that of a model that reads prefix and continuation in one go."""
    model = model_for("hello world ", cell)
    written = scratch.predict(model, "hello ", 10)
    assert written.startswith("hello ")
    assert len(written) == 16
    ids = torch.from_numpy(model.tokenizer.encode(written)).long().unsqueeze(1)
    logits, _ = scratch.forward(model, ids, scratch.zero_state(cell, 1, 8))
    assert model.tokenizer.decode(logits[5:-1, 0].argmax(-1).tolist()) == written[6:]
    with pytest.raises(ValueError, match="prefix"):
        scratch.predict(model, "", 3)


@pytest.mark.parametrize("cell", sorted(scratch.CELLS))
@pytest.mark.parametrize("random_sampling", [False, True])
def test_training_learns_a_simple_text_and_repeats(cell: str, random_sampling: bool) -> None:
    text = "the quick brown fox. " * 40
    settings = {"cell": cell, "num_hiddens": 24, "num_steps": 8, "batch_size": 4, "num_epochs": 25}

    def perplexities() -> list[float]:
        epochs = scratch.train(text, random_sampling=random_sampling, seed=1, **settings)  # type: ignore[arg-type]
        return [epoch.perplexity for epoch in epochs]

    found = perplexities()
    assert found == perplexities()
    assert found[-1] < 0.5 * found[0]


def test_an_epoch_of_the_lecture_is_eight_updates_of_its_length(english: str) -> None:
    """Nearly every step is clipped, and then has length learning_rate * theta = 1."""
    epochs = scratch.train(english[:10_000], "rnn", num_hiddens=16, num_epochs=1)
    first = next(epochs)
    assert (first.number, first.updates, first.tokens) == (1, 8, 8960)
    torch.manual_seed(0)
    start = scratch.get_params("rnn", first.model.tokenizer.size, 16)
    moved = math.sqrt(sum(float(((a - b).detach() ** 2).sum()) for a, b in zip(start, first.model.params, strict=True)))
    assert 0.5 < moved <= 8.0


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("cell", "order"), [("rnn", (0,)), ("gru", (0, 1, 2)), ("lstm", (0, 1, 3, 2))])
def test_a_deep_model_is_torchs(cell: str, order: tuple[int, ...], layers: int) -> None:
    """Gates are in another order here: of the LSTM i, f, o and the candidate, where PyTorch has the candidate third."""
    tokenizer, H, T, B = CharTokenizer("abc"), 5, 7, 2
    torch.manual_seed(1)
    model = scratch.Model(cell, scratch.get_params(cell, 3, H, layers), tokenizer)
    assert model.num_layers == layers
    with torch.no_grad():
        for param in model.params:
            param.copy_(torch.randn(param.shape))
    layer = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](3, H, layers)
    for number in range(layers):
        own = model.params[number * 3 * len(order) : (number + 1) * 3 * len(order)]
        gates = [own[3 * gate : 3 * gate + 3] for gate in order]
        with torch.no_grad():
            for name, part in (("weight_ih", 0), ("weight_hh", 1), ("bias_ih", 2)):
                values = torch.cat([gate[part].T if part < 2 else gate[part] for gate in gates])
                getattr(layer, f"{name}_l{number}").copy_(values)
            getattr(layer, f"bias_hh_l{number}").zero_()
    ids = torch.randint(3, (T, B))
    logits, state = scratch.forward(model, ids, scratch.zero_state(cell, B, H, layers))
    h, after = layer(scratch.one_hot(ids, 3))
    torch.testing.assert_close(logits, h @ model.params[-2] + model.params[-1])
    tops = after[0] if cell == "lstm" else after
    per_layer = scratch.CELLS[cell].num_states
    for number in range(layers):
        torch.testing.assert_close(state[number * per_layer], tops[number])


def test_a_deep_model_trains_predicts_and_is_evaluated() -> None:
    *_, last = scratch.train("ab" * 400, "gru", 12, 8, 4, num_epochs=30, num_layers=2)
    assert last.model.num_layers == 2
    assert last.perplexity < 1.3
    assert scratch.predict(last.model, "ab", 6) == "abababab"
    assert scratch.perplexity(last.model, "ab" * 50) < 1.3
