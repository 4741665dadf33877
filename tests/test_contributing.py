"""CONTRIBUTING.md's worked example of a new cell runs as it stands on the page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from longshort import cells, decoder, kernels
from longshort.cli import main
from longshort.config import ModelConfig
from longshort.model import LanguageModel
from longshort.text.tokenizers import CharTokenizer
from test_cells import test_reference_gradients_match_finite_differences_twice as check_gradients

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n# src/longshort/(\w+)\.py\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def with_the_new_cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    modules = {"cells": cells, "decoder": decoder}
    for module in modules.values():
        monkeypatch.setattr(module, "CELLS", dict(module.CELLS))
    for name, code in BLOCKS:
        exec(code, vars(modules[name]))
    yield
    for module in modules.values():
        for name in ("update_gru_step", "_update_gru_step"):
            vars(module).pop(name, None)


def test_it_takes_at_most_three_files_and_eighty_lines() -> None:
    assert 1 <= len({name for name, _ in BLOCKS}) <= 3
    assert sum(len(code.splitlines()) for _, code in BLOCKS) <= 80


def test_its_gradients_are_right() -> None:
    check_gradients("update_gru")


def test_it_runs_by_the_reference_equations_and_without_torch() -> None:
    assert kernels.choose("update_gru").name == "reference"
    tokenizer = CharTokenizer("abcd")
    model = LanguageModel(ModelConfig(vocab_size=4, cell="update_gru", hidden=5, layers=2), tokenizer)
    ids = np.random.default_rng(0).integers(5, size=(6, 3))
    targets = np.random.default_rng(1).integers(4, size=(6, 3))
    array_model = decoder.Decoder(model.config, model.weights(), tokenizer)
    np.testing.assert_allclose(array_model.nats(ids, targets, None)[0], model.nats(ids, targets, None)[0], atol=1e-6)


def test_the_pages_commands_run(tmp_path: Path, english: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-text.txt").write_text(english, encoding="utf-8")
    Path("src").symlink_to(ROOT / "src")
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) == 4
    for command in commands:
        program, *arguments = command.split()
        if program == "cp":
            Path(arguments[1]).write_bytes(Path(arguments[0]).read_bytes())
            continue
        assert program == "longshort"
        shorter = ["--epochs", "1"] if arguments[0] == "compare" else ["--steps", "2", "--hidden", "8"]
        assert main([*arguments, *shorter]) == 0
    assert torch.get_num_threads() >= 1
