"""The command line as its user meets it: results, messages, exit codes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from longshort import checkpoint, documents, native
from longshort.cli import main
from longshort.text.corpus import SOURCES

VERBS = ("demo", "train", "resume", "eval", "generate", "score", "inspect", "compare", "bench", "doctor")
TINY = ["--hidden", "12", "--embedding", "8", "--seq-len", "12", "--batch-size", "4", "--threads", "1"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, english: str) -> Path:
    """A text and a run that was trained on it."""
    place = tmp_path_factory.mktemp("workplace")
    (place / "english.txt").write_text(english, encoding="utf-8")
    arguments = ["train", str(place / "english.txt"), "--steps", "30", *TINY, "--out", str(place / "run")]
    assert main(arguments) == 0
    return place


def out_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that succeeds and return its standard output."""
    capsys.readouterr()
    status = main(list(arguments))
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def complaint(capsys: pytest.CaptureFixture[str], status: int, *arguments: str) -> str:
    """Run a command that fails with `status`, and return its message after checking its form."""
    capsys.readouterr()
    found = main(list(arguments))
    captured = capsys.readouterr()
    message = captured.err.strip()
    assert found == status, message
    assert "Traceback" not in message
    assert message.startswith("longshort: ")
    assert len(message.split("\n")) <= 3
    assert all(c.isprintable() or c == "\n" for c in message)
    return message


# ------------------------------------------------------------------------------------------------ help and version


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_needs_neither_torch_nor_numpy(arguments: list[str]) -> None:
    heavy = ["torch", "numpy", "matplotlib", "safetensors", "pooch"]
    program = (
        "import sys; from longshort.cli import main; status = main(sys.argv[1:]);"
        f"assert not set({heavy}) & set(sys.modules), set({heavy}) & set(sys.modules); sys.exit(status)"
    )
    done = python("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert not done.stderr


def test_help_names_every_verb_and_every_training_option(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from longshort.config import TrainConfig

    helped = out_of(capsys, "--help")
    assert all(verb in helped for verb in VERBS)
    helped = out_of(capsys, "train", "--help")
    for field in fields(TrainConfig):
        if field.name != "texts":
            assert f"--{field.name.replace('_', '-')}" in helped


def test_the_module_is_the_command() -> None:
    done = python("-m", "longshort", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, "0.1.0")


# ------------------------------------------------------------------------------------------------------- the verbs


def test_training_says_what_it_does_on_standard_error(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(workplace / "english.txt"), "--steps", "2", *TINY]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    for words in (
        "english.txt: 20,000 characters",
        "LSTM 1 x 12",
        "step 2: held-out",
        "best weights",
        "Next: longshort",
    ):
        assert words in captured.err
    assert checkpoint.is_run("english-run")
    assert main(["train", str(workplace / "english.txt"), "--steps", "1", *TINY]) == 0
    assert checkpoint.is_run("english-run-2")


def test_eval_of_the_held_out_part_repeats_the_trainings_figure(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")  # a run finds its text from anywhere
    found = json.loads(out_of(capsys, "eval", str(workplace / "run"), "--split", "valid", "--json"))
    result = json.loads((workplace / "run" / "result.json").read_text(encoding="utf-8"))
    assert {key: found[key] for key in result["heldout"]} == result["heldout"]
    assert found["format_version"] == 1
    keys = ["tokens", "nats_per_token", "perplexity", "bits_per_character", "bits_per_byte", "protocol"]
    assert set(keys) <= set(found)
    assert "one lane" in found["protocol"]
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    shown = out_of(capsys, "eval", str(workplace / "run"), "--split", "valid")
    assert f"{found['nats_per_token']:.4f} nats a token" in shown


def test_eval_of_a_text_by_protocol(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, text = str(workplace / "run"), str(workplace / "english.txt")
    whole = json.loads(out_of(capsys, "eval", run, text, "--json"))
    blocks = json.loads(out_of(capsys, "eval", run, text, "--block", "4", "--json"))
    lanes = json.loads(out_of(capsys, "eval", run, text, "--lanes", "7", "--json"))
    assert whole["tokens"] == blocks["tokens"] == lanes["tokens"] == 19_999
    assert blocks["nats_per_token"] > whole["nats_per_token"]
    assert "block of 4" in blocks["protocol"]
    assert "7 lanes" in lanes["protocol"]
    model = str(next((workplace / "run" / "checkpoints").iterdir()))
    assert "19,999 tokens" in out_of(capsys, "eval", model, text)


def test_eval_of_a_model_that_learns_while_it_reads(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(workplace / "run")
    static = json.loads(out_of(capsys, "eval", run, "--split", "valid", "--json"))
    found = json.loads(out_of(capsys, "eval", run, "--split", "valid", "--dynamic", "--rate", "0.003", "--json"))
    assert found["tokens"] == static["tokens"]
    assert found["nats_per_token"] < static["nats_per_token"]
    assert "learns after each" in found["protocol"]
    assert "learns after each" in out_of(capsys, "eval", run, str(workplace / "english.txt"), "--dynamic")
    for more in (["--block", "4"], ["--lanes", "2"]):
        assert "--dynamic" in complaint(capsys, 2, "eval", run, "--split", "valid", "--dynamic", *more)
    assert "--dynamic" in complaint(capsys, 2, "eval", run, "--split", "valid", "--rate", "0.1")
    assert "rate must be" in complaint(capsys, 2, "eval", run, "--split", "valid", "--dynamic", "--rate", "0")


def test_generate_repeats_by_seed_and_continues_the_prompt(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(workplace / "run")
    first = out_of(capsys, "generate", run, "--prompt", "the ", "--length", "60")
    assert first == out_of(capsys, "generate", run, "--prompt", "the ", "--length", "60")
    assert first != out_of(capsys, "generate", run, "--prompt", "the ", "--length", "60", "--seed", "1")
    assert first.startswith("the ")
    assert len(first) == 4 + 60 + 1
    content = json.loads(out_of(capsys, "generate", run, "--prompt", "the ", "--length", "60", "--json"))
    assert "the " + content["text"] + "\n" == first
    greedy = out_of(capsys, "generate", run, "--prompt", "the ", "--length", "60", "--greedy")
    assert greedy == out_of(
        capsys, "generate", run, "--prompt", "the ", "--length", "60", "--top-k", "1", "--seed", "9"
    )
    assert out_of(capsys, "generate", run, "--prompt", "the ", "--length", "0") == "the \n"


def test_a_text_goes_on_from_a_state_file(workplace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run, kept = str(workplace / "run"), str(tmp_path / "talk")
    whole = out_of(capsys, "generate", run, "--prompt", "the ", "--length", "90")
    first = out_of(capsys, "generate", run, "--prompt", "the ", "--length", "50", "--state", kept)
    assert first.removesuffix("\n") + out_of(capsys, "generate", run, "--length", "40", "--state", kept) == whole
    before = Path(kept).read_bytes()
    assert "does not go with" in complaint(capsys, 2, "generate", run, "--state", kept, "--samples", "2")
    other = str(next((workplace / "run" / "checkpoints").iterdir()))
    out_of(capsys, "generate", other, "--length", "3", "--state", kept, "--json")
    assert Path(kept).read_bytes() != before
    Path(kept).write_bytes(before[:-1])
    assert "is damaged" in complaint(capsys, 1, "generate", run, "--state", kept)
    assert "nowhere" in complaint(capsys, 1, "generate", run, "--state", "/proc/nowhere/talk")


def test_unseen_prompt_characters_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(workplace / "run"), "--prompt", "the é", "--length", "5"]) == 0
    captured = capsys.readouterr()
    assert "never saw 'é'; read as <unk>" in captured.err
    assert captured.out.startswith("the é")
    message = complaint(capsys, 1, "generate", str(workplace / "run"), "--prompt", "éø")
    assert "never saw any character" in message


def test_control_characters_are_shown_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    Path("evil.txt").write_text("\x1b[31m\x07\x9b\u202e\r\n" * 300, encoding="utf-8")
    assert main(["train", "evil.txt", "--steps", "2", *TINY, "--out", "run"]) == 0
    written = out_of(capsys, "generate", "run", "--prompt", "\x1b[", "--length", "400", "--temperature", "2")
    assert "\N{SYMBOL FOR ESCAPE}" in written
    assert all(c.isprintable() or c == "\n" for c in written)
    content = json.loads(out_of(capsys, "generate", "run", "--length", "400", "--temperature", "2", "--json"))
    assert "\x1b" in content["text"]


def test_compare_prints_a_table_json_and_a_picture(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(workplace / "english.txt")
    shown = out_of(capsys, "compare", text, "--cells", "rnn,gru", "--epochs", "1", "--plot", "curves.png")
    for words in ("RNN", "GRU", "scratch", "torch", "3-gram", "held-out", "tokens/s"):
        assert words in shown
    assert Path("curves.png").stat().st_size > 5000
    shown = out_of(
        capsys, "compare", text, "--cells", "rnn", "--implementations", "reference", "--epochs", "1", "--json"
    )
    (row,) = json.loads(shown)["rows"]
    keys = "cell implementation seed parameters seconds_per_epoch tokens_per_second train_perplexity heldout_perplexity"
    assert set(keys.split()) <= set(row)
    assert set(row["train_perplexity"]) == {"1"}


def test_doctor_tells_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(out_of(capsys, "doctor", "--json"))
    assert report["kernels"] == [*report["native_kernels"], "torch", "reference"]
    assert report["native_kernels"] == list(native.targets())
    assert [*report["native_kernels"], *report["bfloat16_kernels"]] == list(native.supported())
    assert next((name for name in report["bfloat16_kernels"] if name in native.BFLOAT16), None) == native.bfloat16()
    assert report["native_target"] == native.active_target()
    assert report["native_threads"] == native.threading()
    assert report["advice"] == []
    assert report["torch"] in out_of(capsys, "doctor")


def test_demo_trains_writes_and_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("longshort-demo", "longshort-demo-2")):
        assert main(["demo", "--minutes", "0.01"]) == 0, number
        captured = capsys.readouterr()
        assert checkpoint.is_run(name)
        assert captured.out.startswith("The ")
        assert f"longshort generate {name}" in captured.err


def test_a_toml_file_sets_options_and_flags_win(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.toml").write_text('hidden = 9\ncell = "gru"\nsteps = 2\nclip = 2\n', encoding="utf-8")
    text = str(workplace / "english.txt")
    assert main(["train", text, "--config", "c.toml", "--cell", "rnn", "--threads", "1", "--out", "run"]) == 0
    saved = checkpoint.open_run("run").config()["train"]
    assert (saved["hidden"], saved["cell"], saved["steps"], saved["clip"]) == (9, "rnn", 2, 2)
    Path("c.toml").write_text("hiddn = 9\n", encoding="utf-8")
    assert "Did you mean 'hidden'" in complaint(capsys, 2, "train", text, "--config", "c.toml")
    Path("c.toml").write_text("hidden = = 9\n", encoding="utf-8")
    assert "cannot be read" in complaint(capsys, 2, "train", text, "--config", "c.toml")
    assert "cannot be read" in complaint(capsys, 2, "train", text, "--config", "none.toml")


def test_a_run_finds_a_named_corpus_again(
    english: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = english.encode("utf-8")
    monkeypatch.setitem(SOURCES, "timemachine", ("http://127.0.0.1:9/", hashlib.sha256(content).hexdigest()))
    Path("data").mkdir()
    Path("data", "timemachine.txt").write_bytes(content)
    assert main(["train", "--corpus", "timemachine", "--data-dir", "data", "--steps", "2", *TINY]) == 0
    place = Path.cwd()
    monkeypatch.chdir("/")
    evaluation = ["eval", str(place / "timemachine-run"), "--split", "valid"]
    assert "1,999 tokens" in out_of(capsys, *evaluation)
    (place / "data").rename(place / "moved")
    assert "There is no" in complaint(capsys, 1, *evaluation)
    assert "1,999 tokens" in out_of(capsys, *evaluation, "--data-dir", str(place / "moved"))


def test_a_configuration_that_is_not_a_runs_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(workplace / "run", "run")
    Path("run", "config.json").write_bytes(documents.seal({"train": 5}))
    assert "not the configuration of a training run" in complaint(capsys, 1, "eval", "run", "--split", "valid")


def test_too_little_memory_is_told(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("longshort.training.make_model", fail)
    arguments = ["train", str(workplace / "english.txt"), "--steps", "2", *TINY]
    assert "not enough memory" in complaint(capsys, 1, *arguments)


def test_minutes_print_the_choice_and_the_flags_that_repeat_it(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(workplace / "english.txt")
    assert main(["train", text, "--minutes", "0.02", "--hidden", "16", "--threads", "1", "--out", "a"]) == 0
    said = capsys.readouterr().err
    (line,) = (line for line in said.split("\n") if line.startswith("The same run again: longshort "))
    assert main([*shlex.split(line)[5:], "--out", "b"]) == 0
    first, second = (Path(name, "metrics.jsonl").read_text(encoding="utf-8") for name in "ab")
    assert first == second


# ------------------------------------------------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "Did you mean"),
        (["train", "TEXT", "--hiden", "3"], "Did you mean"),
        (["train", "TEXT", "--lr", "-1"], "lr must be above 0, not -1"),
        (["train", "TEXT", "--lr", "nan"], "lr must be a finite number, not nan"),
        (["train", "TEXT", "--clip", "inf"], "clip must be a finite number"),
        (["train", "TEXT", "--steps", "0"], "steps must be at least 1, not 0"),
        (["train", "TEXT", "--steps", "-5"], "steps must be at least 1, not -5"),
        (["train", "TEXT", "--steps", "1.5"], "--steps"),
        (["train", "TEXT", "--steps", "x"], "--steps"),
        (["train", "TEXT", "--dropout", "1"], "dropout must be below 1"),
        (["train", "TEXT", "--seed", "-1"], "seed must be at least 0"),
        (["train", "TEXT", "--minutes", "nan"], "minutes must be a positive number"),
        (["train", "TEXT", "--minutes", "-1"], "minutes must be a positive number"),
        (["train", "TEXT", "--minutes", "1", "--steps", "3"], "not both"),
        (["train", "TEXT", "--steps", "1", "--epochs", "1"], "not both"),
        (["train", "TEXT", "--cell", "lsmt"], "Did you mean 'lstm'"),
        (["train", "TEXT", "--cell", "LSTM"], "Did you mean 'lstm'"),
        (["train", "TEXT", "--out", ""], "--out is empty"),
        (["train", "TEXT", "--tokenizer", "wrod"], "tokenizer must be one of char, byte"),
        (["train", "TEXT", "--bidirectional"], "cannot be bidirectional"),
        (["train", "TEXT", "--recipe", "lectre"], "Did you mean 'lecture'"),
        (["train", "TEXT", "--corpus", "builtin"], "not both"),
        (["train"], "No text was given"),
        (["train", "--corpus", "bultin"], "builtin"),
        (["train", "TEXT", "--out", "TEXT"], "Choose another --out"),
        (["train", "nowhere.txt"], "nowhere.txt"),
        (["train", "TEXT", "TEXT"], "given twice"),
        (["train", "TEXT", "--device", "cuda"], "no CUDA device"),
        (["eval", "nowhere", "TEXT"], "run or model directory"),
        (["eval", "RUN"], "No text was given"),
        (["eval", "RUN", "TEXT", "--split", "valid"], "own text"),
        (["eval", "RUN", "TEXT", "--block", "0"], "at least 1"),
        (["eval", "RUN", "TEXT", "--lanes", "0"], "--lanes must be at least 1"),
        (["eval", "RUN", "--split", "train"], "--split"),
        (["eval", "TEXT", "--split", "valid"], "not a run"),
        (["generate"], "MODEL"),
        (["generate", "TEXT"], "run or model directory"),
        (["generate", "RUN", "--length", "-1"], "--length must be at least 0"),
        (["generate", "RUN", "--temperature", "-0.1"], "temperature must be at least 0"),
        (["generate", "RUN", "--temperature", "nan"], "temperature must be a finite number"),
        (["generate", "RUN", "--top-p", "1.5"], "top_p must be at most 1"),
        (["generate", "RUN", "--top-k", "0"], "top_k must be at least 1"),
        (["generate", "RUN", "--greedy", "--top-k", "3"], "do not go with"),
        (["compare", "TEXT", "--cells", "rnn,lsmt"], "no cell called 'lsmt'"),
        (["compare", "TEXT", "--cells", ","], "list of names"),
        (["compare", ""], "One of the paths is empty"),
        (["compare", "TEXT", "--threads", "99999999999"], "--threads must be at most 1024"),
        (["train", "TEXT", "--threads", "99999999999"], "threads must be at most 1024"),
        (["train", "TEXT", "--epochs", "1e308"], "epochs must be at most"),
        (["train", "TEXT", "--data-dir", "."], "goes with --corpus"),
        (["train", "TEXT", "--heldout", "0", "--patience", "3"], "need held-out text"),
        (["compare", "TEXT", "--implementations", "natvie"], "no implementation called 'natvie'"),
        (["compare", "TEXT", "--seeds", "0"], "--seeds must be at least 1"),
        (["compare", "TEXT", "--epochs", "-1"], "--epochs must be at least 1"),
        (["compare", "TEXT", "--plot", "x.doc"], "unknown format"),
        (["compare", "TEXT", "--recipe", "other"], "--recipe"),
    ],
)
def test_wrong_usage_is_told_in_three_lines_and_exit_status_2(
    arguments: list[str], words: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"TEXT": str(workplace / "english.txt"), "RUN": str(workplace / "run")}
    before = sorted(Path().iterdir())
    assert words in complaint(capsys, 2, *(places.get(argument, argument) for argument in arguments))
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"x", "1 character"),
        (bytes(range(256)) * 20, "binary"),
        (("Größe " * 500).encode("latin-1"), "UTF-8"),
        (("English text. " * 100).encode("utf-16"), "UTF-16"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "eval", "compare"])
def test_texts_that_cannot_be_used_are_told_in_three_lines_and_exit_status_1(
    content: bytes, words: str, verb: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("odd\x1b[31m.txt").write_bytes(content)
    arguments = [verb, *([str(workplace / "run")] if verb == "eval" else []), "odd\x1b[31m.txt"]
    if verb == "train":
        arguments += ["--out", "new/run"]
    if verb == "compare" and content == b"x":
        words = "10,000 characters"
    if verb == "eval" and content == b"x":
        words = "no symbol"
    assert words in complaint(capsys, 1, *arguments)
    assert [path.name for path in Path().iterdir()] == ["odd\x1b[31m.txt"]


def test_a_directory_without_texts_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("folder").mkdir()
    assert ".txt" in complaint(capsys, 1, "train", "folder")


def test_a_line_of_a_hundred_megabytes_is_a_text() -> None:
    Path("long.txt").write_bytes(b"abcdefghij" * 10_000_000)
    assert main(["train", "long.txt", "--steps", "2", *TINY, "--out", "run"]) == 0
    found = json.loads(Path("run", "result.json").read_text(encoding="utf-8"))["heldout"]
    assert found["tokens"] == 9_999_999
    assert "64 lanes" in found["protocol"]


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run", "file.txt/run"])
def test_an_output_that_cannot_be_written_is_told_before_training(
    place: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file.txt").write_text("x", encoding="utf-8")
    message = complaint(capsys, 1, "train", str(workplace / "english.txt"), "--steps", "1000000", "--out", place)
    assert place in message
    message = complaint(capsys, 1, "compare", str(workplace / "english.txt"), "--plot", f"{place}/x.png")
    assert "cannot be written" in message


def test_a_damaged_model_is_refused(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = next((workplace / "run" / "checkpoints").iterdir())
    shutil.copytree(source, "model")
    weights = Path("model", "model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    complaint(capsys, 1, "generate", "model")
    complaint(capsys, 1, "eval", "model", str(workplace / "english.txt"))


def test_a_model_needs_no_torch_to_write_and_says_so_to_train(workplace: Path) -> None:
    """Runs in a process that cannot import torch."""
    program = (
        "import sys, importlib.metadata as m; sys.modules['torch'] = None; old = m.version\n"
        "def version(name):\n"
        "    if name == 'torch': raise m.PackageNotFoundError(name)\n"
        "    return old(name)\n"
        "m.version = version\n"
        "from longshort.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    run, text = str(workplace / "run"), str(workplace / "english.txt")
    done = python("-c", program, "generate", run, "--length", "30")
    assert done.returncode == 0, done.stderr
    assert done.stdout == python("-m", "longshort", "generate", run, "--length", "30").stdout
    done = python("-c", program, "eval", run, text)
    assert done.returncode == 0, done.stderr
    for arguments in (["train", text], ["compare", text], ["bench", "layers"], ["eval", run, "--split", "valid"]):
        done = python("-c", program, *arguments)
        assert done.returncode == 1, done.stderr
        assert "pip install 'longshort[train]'" in done.stderr
        assert len(done.stderr.strip().split("\n")) <= 3
    done = python("-c", program, "inspect", run, text)
    assert done.returncode == 0, done.stderr
    assert done.stdout == python("-m", "longshort", "inspect", run, text).stdout
    assert "PyTorch is missing" in python("-c", program, "doctor").stdout


# ------------------------------------------------------------------------------------------------------ the process


def test_a_closed_pipe_is_no_error(workplace: Path) -> None:
    run, text = workplace / "run", workplace / "english.txt"
    for words in (f"generate {run} --length 3000", f"inspect {run} {text}", f"eval {run} {text}"):
        # The last one's reader is gone before the first word.
        reader = "true" if words.startswith("eval") else "head -c 5"
        command = f"{sys.executable} -m longshort {words} | {reader}"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, check=False)
        assert done.stderr == b"", words
        assert len(done.stdout) == (0 if reader == "true" else 5)
        assert done.returncode == 0


def test_an_interrupt_ends_with_130_and_what_was_saved_loads(workplace: Path) -> None:
    arguments = ["train", str(workplace / "english.txt"), "--steps", "100000", "--validate-every", "5", "--out", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "longshort", *arguments, *TINY], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not Path("run", "best.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert re.search(r"longshort: stopped; step \d+ of 100,000 is saved. Go on with: \S* ?resume run$", said.strip())
    assert checkpoint.load_model("run").weights


def test_a_model_that_diverged_gives_null_and_no_traceback(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = checkpoint.load_model(workplace / "run")
    saved.weights["output.bias"][:] = math.nan
    checkpoint.save_model(tmp_path / "model", saved.weights, saved.model, saved.tokenizer_json, {})
    model, text = str(tmp_path / "model"), str(workplace / "english.txt")
    for verb, figure in (("eval", "nats_per_token"), ("inspect", "nats_per_token"), ("score", "bits_per_character")):
        shown = out_of(capsys, verb, model, text, "--json")
        found = json.loads(shown.splitlines()[0] if verb == "score" else shown, parse_constant=pytest.fail)
        assert found[figure] is None
