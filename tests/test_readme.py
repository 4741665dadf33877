"""The README is true: its commands run, its programs run, its figures are those of the result files."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from longshort.cli import main, tables
from longshort.text.corpus import SOURCES

PAGE = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
SESSIONS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line[2:] for block in SESSIONS for line in block.splitlines() if line.startswith("$ ")]
COMMANDS += [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]
THREE_MINUTES = ROOT / "benchmarks" / "results" / "2026-11-26-tinyshakespeare-3-minutes.json"
LAYERS = ROOT / "benchmarks" / "results" / "2026-11-27-layers-marks-folds.json"
LAYERS_ELSEWHERE = ROOT / "benchmarks" / "results" / "2026-11-28-layers-marks-stacks.json"
LAYERS_ON_MATRIX_UNITS = ROOT / "benchmarks" / "results" / "2026-11-26-layers-marks-amx.json"
LAYERS_IN_BFLOAT16 = ROOT / "benchmarks" / "results" / "2026-11-26-layers-marks-bfloat16.json"
NATIVE = ROOT / "benchmarks" / "results" / "2026-11-24-lecture-native.json"
RECORDS = ("2026-11-25-shakespeare-record.json", "2026-11-26-shakespeare-bfloat16.json")
LECTURE = ROOT / "benchmarks" / "results" / "2026-11-23-lecture-timemachine.json"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A new user's directory, with a text of their own and the corpora where --data-dir says."""
    folder = tmp_path_factory.mktemp("new-user")
    for name in ("my-text.txt", "tinyshakespeare.txt"):
        (folder / name).write_text(english + "ROMEO:" * 9, encoding="utf-8")
    for name in ("app.log", "new.log"):
        (folder / name).write_text(english.replace(". ", ".\n"), encoding="utf-8")
    return folder


def shortened(arguments: list[str]) -> list[str]:
    """Return a command as the page has it, with less training."""
    if "--minutes" in arguments:
        where = arguments.index("--minutes")
        arguments = [*arguments[:where], "--steps", "2", "--hidden", "8", *arguments[where + 2 :]]
    if arguments[0] == "train" and "--steps" not in arguments:
        arguments = [*arguments, "--steps", "2", "--hidden", "8"]
    if "--steps" in arguments:
        arguments[arguments.index("--steps") + 1] = "2"
    if "--seeds" in arguments:
        arguments[arguments.index("--seeds") + 1] = "1"
    if arguments[0] == "demo":
        arguments = [*arguments, "--minutes", "0.01"]
    if arguments[0] == "compare":
        arguments = [*arguments, "--epochs", "1"]
    return arguments


def test_every_command_of_the_readme_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], english: str
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("LONGSHORT_CACHE", str(place / "cache"))
    # The downloads have tests of their own; here the named corpora are in the cache already, as after a download.
    import hashlib

    for name in SOURCES:
        content = english.encode("utf-8")
        monkeypatch.setitem(SOURCES, name, ("http://127.0.0.1:9/", hashlib.sha256(content).hexdigest()))
        (place / "cache").mkdir(exist_ok=True)
        (place / "cache" / f"{name}.txt").write_bytes(content)
    for name in ("app.log", "new.log"):
        (place / name).write_text(english.replace(" (", "\n"), encoding="utf-8")
    monkeypatch.setattr("longshort.serving.server.serve", lambda *_: None)  # tests/test_serving.py lets it serve
    ran = set()
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "torchrun":  # tests/test_processes.py starts several; the words behind are as of one
            assert arguments[:4] == ["--nproc-per-node", "4", "-m", "longshort"]
            program, arguments = arguments[3], arguments[4:]
        if program == "longshort":
            ran.add(arguments[0])
            ended = 143 if arguments[0] == "serve" else 0
            assert main(shortened(arguments)) == ended, (command, capsys.readouterr().err)
            capsys.readouterr()
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        elif program == "cp":
            source, target = arguments
            (place / target).write_bytes((ROOT / source).read_bytes())
        else:
            assert program in ("git", "cd", "pip", "uv", "python"), command
    assert ran == {
        "demo",
        "train",
        "resume",
        "eval",
        "generate",
        "score",
        "inspect",
        "export",
        "publish",
        "serve",
        "compare",
        "doctor",
    }


def test_every_python_program_of_the_readme_runs(place: Path, english: str) -> None:
    run = place / "my-text-run"
    if not run.exists():
        assert main(["train", str(place / "my-text.txt"), "--steps", "2", "--hidden", "8", "--out", str(run)]) == 0
    programs = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert programs
    for program in programs:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program], cwd=place, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_the_lectures_table_is_the_result_file() -> None:
    result = json.loads(LECTURE.read_text(encoding="utf-8"))
    for group in tables.summary(result["rows"]):
        figures = [f"{group['train_perplexity'][epoch]:.2f}" for epoch in ("40", "80", "120", "160")]
        cells = [f"{group['cell'].upper()}, {group['implementation']}", *figures]
        cells += [f"{group['heldout_perplexity']:.1f}", f"{group['heldout_best']:.1f} ({group['heldout_best_epoch']})"]
        cells += [f"{group['seconds_per_epoch']:.3f}"]
        assert "| " + " | ".join(cells) + " |" in PAGE
    for baseline in result["baselines"]:
        counted = f"{baseline['train_perplexity']:.2f} | {baseline['heldout_perplexity']:.1f}"
        assert re.search(rf"\| {baseline['order']}-gram[^|]*\|[^\n]*{re.escape(counted)}", PAGE)


def test_the_layers_table_is_the_result_file() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "layers_table.py"), str(LAYERS)]
    table = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert table in PAGE
    for other in (LAYERS_ELSEWHERE, LAYERS_ON_MATRIX_UNITS, LAYERS_IN_BFLOAT16):
        script[-1] = str(other)
        table = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        assert table in PAGE
    best = max(json.loads(LAYERS.read_text(encoding="utf-8"))["rows"], key=lambda row: float(row["ratio"]))
    case = f"{best['cell'].upper()}, T={best['T']} B={best['B']} H={best['H']}"
    assert f"{best['ratio']:.0f} times ({case}" in PAGE


def test_the_table_of_workloads_is_the_result_files() -> None:
    for suffix in ("", "-bfloat16", "-int8"):
        names = ["2026-11-28-generate", "2026-11-28-score", *(["2026-11-28-train"] if suffix != "-int8" else [])]
        paths = [f"benchmarks/results/{name}{suffix}.json" for name in names]
        script = [sys.executable, "benchmarks/workloads_table.py", *paths]
        assert subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout in PAGE


def test_the_lectures_seconds_on_our_kernels_are_the_result_file() -> None:
    groups = tables.summary(json.loads(NATIVE.read_text(encoding="utf-8"))["rows"])
    seconds = {(g["cell"], g["implementation"]): f"{g['seconds_per_epoch']:.3f}" for g in groups}
    for implementation in ("native", "torch"):
        figures = [re.escape(seconds[cell, implementation]) for cell in ("lstm", "gru", "rnn")]
        assert re.search(r"[^.]*".join(f"{figure}" for figure in figures), PAGE), figures


def test_the_three_minutes_are_the_result_file() -> None:
    result = json.loads(THREE_MINUTES.read_text(encoding="utf-8"))
    assert f"held-out: {result['heldout']['nats_per_token']:.4f} nats a token" in PAGE
    assert f"{result['train']['hidden']} units, {result['train']['steps']:,} steps" in PAGE


def test_the_record_is_the_result_file() -> None:
    paths = [ROOT / "benchmarks" / "results" / name for name in RECORDS]
    rows = [row for path in paths for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]
    assert len(rows) == 6
    for row in rows:
        flags = row["command"].removeprefix("longshort train tinyshakespeare.txt ")
        figures = [f"{row['seconds']:.0f}", *(f"{nats:.3f}" for nats in row["nats"].values())]
        assert f"| `{flags}` | {' | '.join(figures)} |" in PAGE


def test_the_record_by_matrix_units_is_the_result_file() -> None:
    path = ROOT / "benchmarks" / "results" / "2026-11-26-shakespeare-amx.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    seconds = "{:.0f}, {:.0f} and {:.0f} seconds".format(*(row["seconds"] for row in rows))
    nats = "{:.3f}, {:.3f} and {:.3f} in blocks".format(*(next(iter(row["nats"].values())) for row in rows))
    assert f"By the matrix units of a Xeon (below) the bfloat16 rows take {seconds} and score {nats}." in PAGE


def test_the_page_opens_with_the_sentence_and_ends_with_the_tree() -> None:
    assert PAGE.split("\n")[2].startswith("longshort trains and runs small LSTM, GRU and RNN models on ordinary CPUs:")
    tree = PAGE.rsplit("```", 2)[1]
    for path in (ROOT / "src" / "longshort").rglob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            assert path.name in tree, path.name
