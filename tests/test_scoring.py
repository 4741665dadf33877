"""Bits per character of lines: exact, in order, the same in any company, in memory that does not grow."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import campaign
import longshort
from longshort import training
from longshort.cli import main
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.errors import ConfigError
from longshort.model import LanguageModel
from longshort.scoring import UNKNOWN_BITS, odd_part, score
from longshort.text import grammar
from longshort.text.tokenizers import train_tokenizer

LINES = ["", "a", "ab ba", "abab" * 40, "b" * 5000, " ", "aab b"]


def models(tokenizer_name: str = "char") -> tuple[Decoder, LanguageModel]:
    tokenizer = train_tokenizer(tokenizer_name, "ab ba aab\n")
    torch.manual_seed(3)
    model = training.make_model(TrainConfig(hidden=12, embedding=6, layers=2, lines=True), tokenizer).eval()
    return Decoder(model.config, model.weights(), tokenizer), model


@pytest.mark.parametrize("tokenizer_name", ["char", "byte", "word"])
def test_a_line_costs_what_it_costs_alone_after_a_newline(tokenizer_name: str) -> None:
    decoder, model = models(tokenizer_name)
    tokenizer = decoder.tokenizer
    scorers: list[Any] = [decoder, model]
    for scorer in scorers:
        found = list(score(scorer, LINES))
        assert [scored.line for scored in found] == list(range(1, len(LINES) + 1))
        for scored, line in zip(found, LINES, strict=True):
            ids = tokenizer.encode_lines(f"\n{line}\n").astype(np.int64)
            nats, _ = model.nats(ids[:-1, None], np.where(ids < tokenizer.size, ids, 0)[1:, None], None)
            bits = np.where(ids[1:] < tokenizer.size, nats[:, 0] / math.log(2), UNKNOWN_BITS).sum()
            assert scored.characters == len(line)
            assert scored.bits_per_character == pytest.approx(bits / (len(line) + 1), rel=1e-5)


def test_a_symbol_never_seen_is_the_oddest() -> None:
    decoder, _ = models()
    plain, odd = score(decoder, ["abab", "ab€b"])
    assert (plain.unknown, odd.unknown) == (0, 1)
    assert odd.bits_per_character > plain.bits_per_character + 2
    assert odd_part(odd) == (2, 3)


def test_company_does_not_change_a_score() -> None:
    decoder, _ = models()
    rng = np.random.default_rng(0)
    lines = ["".join(rng.choice(list("ab "), size=rng.integers(0, 60))) for _ in range(300)]
    together = [scored.bits_per_character for scored in score(decoder, lines)]
    alone = [scored.bits_per_character for scored in score(decoder, lines, ahead=1)]
    assert together == (alone if decoder.writes else pytest.approx(alone, abs=1e-6))  # the kernels give the same bits
    with pytest.raises(ConfigError):
        next(score(decoder, lines, ahead=0))


@pytest.mark.parametrize("lines", [[" " * ((1 << 20) - 5), "abcdef ab"], ["ab", "x" * (1 << 20)], ["a b", "\tab  a "]])
def test_what_symbols_stand_for_does_not_depend_on_company(lines: list[str]) -> None:
    decoder, _ = models("word")
    for scored, line in zip(score(decoder, lines), lines, strict=True):
        (alone,) = score(decoder, [line])
        assert scored.symbol_characters.tolist() == alone.symbol_characters.tolist()
        assert odd_part(scored) == odd_part(alone)


def test_no_more_lines_are_read_than_asked_for() -> None:
    decoder, _ = models()
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "ab ba\n"

    scored = score(decoder, endless(), ahead=10)
    for _ in range(25):
        next(scored)
    assert read == 30


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["open ok 12", "read ok 7"] * 100
    Path("log.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = ["--lines", "--hidden", "16", "--embedding", "8", "--steps", "60", "--lr", "0.02", "--out", "run"]
    assert main(["train", "log.txt", *flags, "--threads", "1"]) == 0
    Path("new.txt").write_text("\n".join([*lines[:5], "read \x1b[31mxx 7", *lines[5:9]]), encoding="utf-8")
    capsys.readouterr()
    assert main(["score", "run", "new.txt", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["line"] for row in rows] == list(range(1, 11))
    assert max(rows, key=lambda row: float(row["bits_per_character"]))["line"] == 6
    model = longshort.load("run")
    expected = [scored.to_dict() for scored in longshort.score(model, Path("new.txt").read_text().split("\n"))]
    assert rows == expected
    assert main(["score", "run", "new.txt"]) == 0
    assert [float(x) for x in capsys.readouterr().out.split()] == pytest.approx(
        [row["bits_per_character"] for row in rows], abs=1e-4
    )
    assert main(["score", "run", "new.txt", "--json", "--weights", "int8"]) == 0
    rounded, said = capsys.readouterr()
    assert "int8" in said
    for line, row in zip(rounded.splitlines(), rows, strict=True):
        assert json.loads(line)["bits_per_character"] == pytest.approx(row["bits_per_character"], abs=0.1)
    assert main(["score", "run", "new.txt", "--top", "2"]) == 0
    first, _ = capsys.readouterr().out.splitlines()
    assert first.split()[1] == "6"
    assert ">>>" in first
    assert "\x1b" not in first
    piped = subprocess.run(
        [sys.executable, "-m", "longshort", "score", "run", "-", "--json"],
        input=Path("new.txt").read_bytes(),
        capture_output=True,
        check=True,
    )
    assert [json.loads(line) for line in piped.stdout.splitlines()] == rows
    for verb in (["train", "-", *flags[:-1], "run-2"], ["eval", "run", "-"]):
        command = [sys.executable, "-m", "longshort", *verb]
        subprocess.run(command, input=Path("log.txt").read_bytes(), capture_output=True, check=True)
    assert Path("run-2", "result.json").exists()
    for arguments, code in ((["new.txt", "--top", "0"], 2), (["gone.txt"], 2), (["."], 1)):
        assert main(["score", "run", *arguments]) == code
        assert len(capsys.readouterr().err.splitlines()) <= 3


def test_memory_does_not_grow_with_the_lines() -> None:
    """What is held after 60,000 lines is what was held after 20,000."""
    import tracemalloc

    decoder, _ = models()
    most = []
    for number in (20_000, 60_000):
        tracemalloc.start()
        for _ in score(decoder, ("ab" for _ in range(number))):
            pass
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < 1.1 * most[0]


@campaign.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by /proc")
def test_a_stream_of_any_length_is_scored_in_the_same_memory(tmp_path: Path) -> None:
    """The command line on a file of many lines: one answer a line, and no more memory at its end than early on."""
    text = tmp_path / "lines.txt"
    with campaign.trials("lines scored in a stream, memory not growing", short=20_000, long=1_000_000) as trials:
        config = TrainConfig(hidden=8, embedding=4, lines=True, steps=2, texts=(str(text),), out=str(tmp_path / "run"))
        english = grammar.generate(100_000, seed=3).replace(". ", ".\n")
        text.write_text(english)
        list(training.train(config))
        kept = english.splitlines()
        with text.open("w") as file:
            for number in trials:
                file.write(f"{number} {kept[number % len(kept)]}\n")
        command = [sys.executable, "-m", "longshort", "score", str(tmp_path / "run"), str(text)]
        most, early = 0.0, 0.0
        with (tmp_path / "answers").open("w") as answers, subprocess.Popen(command, stdout=answers) as process:
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                most = max([most, *(int(kilobytes) / 1000 for kilobytes in re.findall(r"RssAnon:\s*(\d+)", status))])
                early = most if (tmp_path / "answers").stat().st_size < trials.count else early  # about a seventh
                time.sleep(0.01)
            assert process.returncode == 0
        assert (tmp_path / "answers").read_bytes().count(b"\n") == trials.count
        print(f"{early:.0f} MB early, {most:.0f} MB at most, anonymous")
        assert 0 < most < early + 20
