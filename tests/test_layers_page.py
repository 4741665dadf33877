"""docs/layers.md: what its tables say runs, runs, and what they say is refused is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import longshort
from conftest import ROOT
from longshort import kernels
from longshort.errors import ConfigError, UsageError
from recurrent import flat, same, seeded

PAGE = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `(.+?)` \| `layer\((.+)\)` \| (yes|no) \| (yes|no) \|$", PAGE, re.MULTILINE)
REFUSED = re.findall(r"`((?:RNN|GRU|LSTM)\([^`]*\))`", PAGE.split("Refused by name:")[1].split("In a call:")[0])
NAMES = {name: getattr(longshort, name) for name in ("RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell")}


def arguments_of(text: str) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call in the table: the input, and those by keyword."""
    x = seeded(0, torch.randn, 3, 3, 8)
    known = {"x": x, "lengths": [1, 3, 0], "resets": torch.eye(3, dtype=torch.bool)}
    known["packed"] = pack_padded_sequence(x, torch.tensor([1, 3, 2]), enforce_sorted=False)
    given, keywords = eval(f"(lambda x, **keywords: (x, keywords))({text})", known)
    return given, keywords


def test_the_tables_are_found() -> None:
    assert len(ROWS) == PAGE.count("` | `layer(") >= 30
    assert len(REFUSED) >= 9


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(("constructor", "call", "native", "torchs"), ROWS)
def test_what_runs_where(constructor: str, call: str, native: str, torchs: str) -> None:
    layer = eval(constructor, dict(NAMES))
    x, arguments = arguments_of(call)
    with kernels.use("reference"):
        expected = seeded(1, layer, x, **arguments)
    able = []
    for name in kernels.available():
        with kernels.use(name):
            if {"torch": torchs, "reference": "yes"}.get(name, native) == "no":
                with pytest.raises(UsageError):
                    layer(x, **arguments)
                continue
            able.append(name)
            assert kernels.explain(layer, x, **arguments).name == name
            found = seeded(1, layer, x, **arguments)
        # PyTorch draws its own dropout between layers.
        if not (name == "torch" and getattr(layer, "dropout", False)):
            same(flat(found[0]), flat(expected[0]), 0.05 if flat(x)[0].dtype is torch.bfloat16 else 1e-5)
        if arguments.get("return_gates"):
            for ours, theirs in zip(found[2], expected[2], strict=True):
                assert list(ours) == list(theirs)
                same(list(ours.values()), list(theirs.values()))
    assert kernels.explain(layer, x, **arguments).name in able


@pytest.mark.parametrize("constructor", REFUSED)
def test_what_is_refused(constructor: str) -> None:
    with pytest.raises(ConfigError):
        eval(constructor, dict(NAMES))


@pytest.mark.parametrize(
    "measured",
    [
        "26-layers-projection",
        "26-layers-autocast",
        "26-layers-autocast-xeon",
        "27-layers-marks-high",
        "27-layers-medium",
        "27-layers-medium-epyc",
        "27-layers-sixteen-cores",
        "28-layers-stacks",
    ],
)
def test_the_tables_of_figures_are_the_result_files(measured: str) -> None:
    result = f"benchmarks/results/2026-11-{measured}.json"
    script = [sys.executable, "benchmarks/layers_table.py", result]
    assert subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout in PAGE
