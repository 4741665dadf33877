"""The command line as its user meets it: results, messages, exit codes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pty
import re
import select
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
from longshort.errors import OutputError
from longshort.text.corpus import SOURCES

VERBS = (
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
    "bench",
    "doctor",
)
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


def give(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Let standard input give `content`."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


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


def as_users_have_it() -> dict[str, str]:
    """Return an environment in which output into a pipe is held back, as it is where nobody asks for another way."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


def python(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**as_users_have_it(), "COLUMNS": "100"}
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
    content = hashlib.sha256((workplace / "english.txt").read_bytes()).hexdigest()
    whole = json.loads(out_of(capsys, "eval", str(workplace / "run"), str(workplace / "english.txt"), "--json"))
    assert found["text_sha256"] == whole["text_sha256"] == content
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


def test_beams_search_instead_of_sampling(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("generate", str(workplace / "run"), "--prompt", "the ", "--length", "20")
    greedy, best = out_of(capsys, *words, "--greedy"), out_of(capsys, *words, "--beams", "9")
    assert out_of(capsys, *words, "--beams", "1") == greedy
    one = json.loads(out_of(capsys, *words, "--beams", "9", "--json"))
    assert ("the " + one["text"] + "\n", one["beams"], one["length"]) == (best, 9, 20)
    assert "seed" not in one
    three = json.loads(out_of(capsys, *words, "--beams", "9", "--samples", "3", "--json"))
    assert (three["texts"][0], three["nats"][0]) == (one["text"], one["nats"])
    assert three["nats"] == sorted(three["nats"])
    shown = out_of(capsys, *words, "--beams", "9", "--samples", "3")
    assert shown.startswith(f"--- 1: {one['nats']:.2f} nats\nthe {one['text']}\n--- 2: ")
    for more, named in (
        (["--beams", "0"], "--beams must be from 1 to"),
        (["--beams", "2", "--samples", "3"], "Give more --beams"),
        (["--beams", "2", "--seed", "0", "--greedy"], "--beams does not go with --seed, --greedy"),
        (["--beams", "2", "--state", "talk", "--top-k", "3"], "--beams does not go with --top-k, --state"),
    ):
        assert named in complaint(capsys, 2, *words, *more)


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


def test_unseen_words_of_a_prompt_are_named(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("words.txt").write_text("the quick fox sees the dog .\n" * 90, encoding="utf-8")
    assert main(["train", "words.txt", "--tokenizer", "word", "--steps", "2", *TINY, "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "fox zebra the\n\tyak zebra ", "--length", "3"]) == 0
    assert capsys.readouterr().err == "longshort: the model never saw 'zebra', 'yak'; read as <unk>.\n"
    assert main(["generate", "run", "--prompt", "the fox", "--length", "3"]) == 0
    assert capsys.readouterr().err == ""
    message = complaint(capsys, 1, "generate", "run", "--prompt", "zebra yak")
    assert "never saw any word of the prompt 'zebra yak'" in message


def test_prompts_and_stops_may_begin_with_a_hyphen(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(workplace / "run")
    for prompt in ("- the item", "-- the item", "--the item", "-1 the item"):
        assert out_of(capsys, "generate", run, "--prompt", prompt, "--length", "3").startswith(prompt)
        found = json.loads(out_of(capsys, "inspect", run, "--prompt", prompt, "--json"))
        assert (found["text"], found["symbols"]) == ("the prompt", [*prompt])
    stops = ("-", "--length", "-e")
    words = [word for stop in stops for word in ("--stop", stop)]
    found = json.loads(out_of(capsys, "generate", run, *words, "--length", "7", "--json"))
    assert (found["stop"], found["length"]) == ([*stops], 7)


def test_a_lone_hyphen_is_standard_input_where_a_text_stands(workplace: Path) -> None:
    run, text = str(workplace / "run"), "the text that comes"
    for words in (["-", "--json"], ["--json", "-"], ["--json", "--length", "99", "-"], ["--json", "--", "-"]):
        done = python("-m", "longshort", "inspect", run, *words, input=text)
        assert json.loads(done.stdout)["symbols"] == [*text], done.stderr
    done = python("-m", "longshort", "inspect", run, "--prompt", "-", input=text)
    assert "1 symbol of the prompt" in done.stdout
    done = python("-m", "longshort", "inspect", run, "--plot", "-", input=text)
    assert (done.returncode, "--plot requires an argument" in done.stderr) == (2, True)


def test_a_prompt_is_read_from_a_file(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, prompt = str(workplace / "run"), "the cat\nsees a \n"
    Path("prompt").write_text(prompt, encoding="utf-8")
    wanted = out_of(capsys, "generate", run, "--prompt", prompt, "--length", "30")
    assert wanted.startswith(prompt)
    assert out_of(capsys, "generate", run, "--prompt-file", "prompt", "--length", "30") == wanted
    done = python("-m", "longshort", "generate", run, "--prompt-file", "-", "--length", "30", input=prompt)
    assert done.stdout == wanted, done.stderr
    found = json.loads(out_of(capsys, "generate", run, "--prompt-file", "prompt", "--length", "30", "--json"))
    assert (found["prompt"], prompt + found["text"] + "\n") == (prompt, wanted)
    long = "the cat sees. " * 20_000  # more than a word of the command line may have
    Path("prompt").write_text(long, encoding="utf-8")
    assert out_of(capsys, "generate", run, "--prompt-file", "prompt", "--length", "1").startswith(long)
    Path("prompt").write_text("é" * 100_000, encoding="utf-8")
    assert len(complaint(capsys, 1, "generate", run, "--prompt-file", "prompt")) < 300
    Path("prompt").write_bytes("the café".encode("latin-1"))
    assert "byte 0xe9 at offset 7" in complaint(capsys, 1, "generate", run, "--prompt-file", "prompt")
    assert "'nowhere'" in complaint(capsys, 2, "generate", run, "--prompt-file", "nowhere")
    for given in ("", "the "):
        message = complaint(capsys, 2, "generate", run, "--prompt", given, "--prompt-file", "prompt")
        assert "--prompt or --prompt-file" in message


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
    assert report["handover_seconds"] is None or 1e-9 < report["handover_seconds"] < 1e-2
    shown = out_of(capsys, "doctor")
    assert report["torch"] in shown
    assert "handover" not in shown


def test_doctor_leaves_out_how_far_cores_are_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "handover", lambda: None)
    assert "core to core" not in out_of(capsys, "doctor")
    monkeypatch.setattr(native, "handover", lambda: 4e-8)
    assert "core to core        40 ns" in out_of(capsys, "doctor")


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
    Path("c.toml").write_text('corpus = "timemachine"\ndata_dir = ""\n', encoding="utf-8")
    assert "--data-dir is empty" in complaint(capsys, 2, "train", "--config", "c.toml")
    Path("c.toml").write_text("hidden = = 9\n", encoding="utf-8")
    assert "cannot be read" in complaint(capsys, 2, "train", text, "--config", "c.toml")
    missing = complaint(capsys, 2, "train", text, "--config", "none.toml")
    assert "none.toml cannot be read: no such file or directory" in missing


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
        (["train", "TEXT", "--out="], "--out is empty"),
        (["train", "TEXT", "--config", ""], "--config is empty"),
        (["train", "--corpus", "timemachine", "--data-dir", ""], "--data-dir is empty"),
        (["demo", "--minutes", "0.01", "--out", ""], "--out is empty"),
        (["resume", "RUN", "--data-dir", ""], "--data-dir is empty"),
        (["eval", "RUN", "TEXT", "--cell", ""], "--cell is empty"),
        (["generate", "RUN", "--state", ""], "--state is empty"),
        (["generate", "RUN", "--stop", "a", "--stop", ""], "--stop is empty"),
        (["generate", "RUN", "--prompt-file", ""], "--prompt-file is empty"),
        (["bench", "layers", "--out", ""], "--out is empty"),
        (["bench", "train", "--out", ""], "--out is empty"),
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
        (["eval", "RUN", "TEXT", "--block", "0"], "--block must be from 1 to 2147483647, not 0"),
        (["eval", "RUN", "TEXT", "--dynamic", "--block", "0"], "--block must be from 1"),
        (["eval", "RUN", "TEXT", "--block", "1" + 19 * "0"], "--block must be from 1"),
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
        (["generate", "RUN", "--greedy", "--top-k", "3"], "does not go with"),
        (["generate", "RUN", "--greedy", "--seed", "3"], "--seed does not go with"),
        (["generate", "RUN", "--greedy", "--samples", "3"], "--samples does not go with"),
        (["generate", "RUN", "--cell", "lstm"], "FILE.py:NAME, not 'lstm'"),
        (["inspect", "RUN", "TEXT", "--data-dir", "."], "--data-dir holds named corpora"),
        (["train", "TEXT", "--minutes", "1", "--recipe", "shakespeare"], "--recipe shakespeare says how long"),
        (["generate", "RUN", "--tmperature", "1"], "See: longshort generate --help"),
        (["compare", "TEXT", "--cells", "rnn,lsmt"], "no cell called 'lsmt'"),
        (["compare", "TEXT", "--cells", ","], "list of names"),
        (["compare", ""], "One of the paths is empty"),
        (["compare", "TEXT", "--threads", "99999999999"], "--threads must be at most 1024"),
        (["train", "TEXT", "--threads", "99999999999"], "threads must be at most 1024"),
        (["train", "TEXT", "--epochs", "1e308"], "epochs must be at most"),
        (["train", "TEXT", "--data-dir", "."], "goes with --corpus"),
        (["train", "TEXT", "--heldout", "0", "--patience", "3"], "patience needs held-out text"),
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


def test_a_current_directory_that_cannot_be_written_is_told_before_the_text_is_read(
    workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longshort.training.Prepared", lambda *_: pytest.fail("the text was read"))
    monkeypatch.chdir("/proc")
    for more in ([], ["--minutes", "1"]):
        assert "/proc" in complaint(capsys, 1, "train", str(workplace / "english.txt"), *more)


def test_what_is_next_is_what_can_be_done(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(workplace / "english.txt")
    for verb in (["train", text, "--heldout", "0", "--steps", "2", *TINY, "--out", "a"], ["resume", "a"]):
        assert main(verb) == 0
        assert capsys.readouterr().err.endswith("Next: longshort generate a\n")
    assert main(["train", text, "--lines", "--heldout", "0", "--steps", "2", *TINY, "--out", "b"]) == 0
    assert capsys.readouterr().err.endswith("Next: longshort score b FILE --top 5\n")
    assert main(["resume", str(workplace / "run")]) == 0
    assert capsys.readouterr().err.endswith(f"    longshort eval {workplace / 'run'} --split valid\n")


def test_standard_input_is_kept_for_a_run_alone(
    workplace: Path, english: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGSHORT_CACHE", str(Path("cache").absolute()))

    def kept() -> list[Path]:
        return list(Path("cache", "stdin").iterdir())

    run, content = str(workplace / "run"), english.encode("utf-8")
    give(monkeypatch, content)
    assert "19,999 tokens" in out_of(capsys, "eval", run, "-")
    assert not kept()
    give(monkeypatch, content)
    complaint(capsys, 2, "eval", "nowhere", "-")
    assert not kept()
    train = ["train", "-", "--steps", "2", *TINY, "--out", "a"]
    give(monkeypatch, content)
    complaint(capsys, 2, *train, "--min-freq", "2")
    assert not kept()

    def refuse(*_: Any) -> None:
        raise OutputError("There is no space.")

    with pytest.MonkeyPatch.context() as patch:  # noticed where the run is made already, which is deleted then
        patch.setattr("longshort.durable.require_space", refuse)
        give(monkeypatch, content)
        assert main(train) == 1
    assert not Path("a").exists()
    assert not kept()
    give(monkeypatch, content)
    assert main(train) == 0
    assert len(kept()) == 1
    assert "1,999 tokens" in out_of(capsys, "eval", "a", "--split", "valid")


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


@pytest.mark.parametrize("how", ["pipe", "terminal", "full"])
def test_training_goes_on_where_nobody_hears_of_it(how: str, workplace: Path) -> None:
    """Standard error goes away after its first bytes; that of `resume` is never there."""
    arguments = ["train", str(workplace / "english.txt"), "--steps", "60", "--validate-every", "5", *TINY]
    environment = {**as_users_have_it(), "TERM": "xterm"}
    if how == "full":
        read, write = None, os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = pty.openpty() if how == "terminal" else os.pipe()
    command = [sys.executable, "-m", "longshort", *arguments, "--out", "run"]
    with subprocess.Popen(command, stderr=write, env=environment) as process:
        os.close(write)
        if read is not None:
            assert os.read(read, 1)
            os.close(read)
        assert process.wait() == 0
    assert main([*arguments, "--out", "whole"]) == 0
    for name in ("metrics.jsonl", "result.json"):
        assert Path("run", name).read_bytes() == Path("whole", name).read_bytes()
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "longshort", "resume", "run", "--steps", "70"]
        assert subprocess.run(command, stderr=full, env=environment, check=False).returncode == 0
    assert json.loads(Path("run", "result.json").read_text(encoding="utf-8"))["steps"] == 70


def test_streams_that_are_closed_or_full_change_no_exit_status(workplace: Path) -> None:
    run = shlex.quote(str(workplace / "run"))
    for words, status in (
        (f"generate {run} >&-", 0),
        ("doctor >&-", 0),
        (f"generate {run} --prompt éthe 2>&-", 0),
        (f"generate {run} --prompt éthe 2>/dev/full", 0),
        ("generate nowhere 2>&-", 2),
        ("generate nowhere 2>/dev/full", 2),
        (f"generate {run} >/dev/full", 1),
        ("doctor >/dev/full", 1),
    ):
        command = f"{shlex.quote(sys.executable)} -m longshort {words}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env=as_users_have_it(), check=False)
        assert done.returncode == status, (words, done.stderr)
        assert len(done.stderr.splitlines()) == (status == 1), done.stderr
        assert ("the" in done.stdout) == (status == 0 and "2>" in words), words


def test_standard_input_that_is_closed_is_told(workplace: Path) -> None:
    run = shlex.quote(str(workplace / "run"))
    for words in (f"score {run} -", f"eval {run} -", "train -", f"inspect {run} -", f"generate {run} --prompt-file -"):
        command = f"{shlex.quote(sys.executable)} -m longshort {words} <&-"
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        wanted = "longshort: Standard input is closed.\nPipe some text into it, or give a file.\n"
        assert (done.returncode, done.stderr) == (1, wanted), words


@pytest.mark.parametrize("ahead", [1, 3])
def test_a_live_log_is_answered_while_it_grows(ahead: int, workplace: Path) -> None:
    command = [sys.executable, "-m", "longshort", "score", str(workplace / "run"), "-", "--ahead", str(ahead)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    with subprocess.Popen(command, env=as_users_have_it(), **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdin.write(b"the cat sees the dog.\n" * ahead)
            for _ in range(ahead):
                assert select.select([process.stdout], [], [], 60)[0], "there was no answer"
                assert float(process.stdout.readline()) > 0
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0


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


def test_an_interrupt_that_nobody_hears_of_saves_and_ends_with_130(workplace: Path) -> None:
    arguments = ["train", str(workplace / "english.txt"), "--steps", "100000", "--validate-every", "5", "--out", "run"]
    command = [sys.executable, "-m", "longshort", *arguments, *TINY]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=as_users_have_it()) as process:
        assert process.stderr is not None
        assert process.stderr.read(1)
        process.stderr.close()
        deadline = time.monotonic() + 60
        while not Path("run", "best.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
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
