from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from failing import nth_call_fails
from longshort import checkpoint, documents, model_files
from longshort.checkpoint import Run, create_run, is_run, load_model, open_run, save_model
from longshort.durable import set_aside
from longshort.errors import CheckpointError, LongshortError, OutputError, TextError, UsageError
from longshort.model_files import Saved
from longshort.text.words import MOST_WORDS, WordTokenizer

MODEL = {"vocab_size": 3, "cell": "lstm", "hidden_size": 2}
TOKENIZER = '{"symbols": "a\\u00fc"}\n'
FILES = ["model.safetensors", "config.json", "tokenizer.json"]
QUICK = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def weights(fill: float = 1.0) -> dict[str, NDArray[np.float32]]:
    return {"w": np.full((2, 3), fill, np.float32), "b": np.full(3, fill, np.float32)}


def save(run: Run, step: int, *, best: bool = True) -> Path:
    return run.save(step, weights(step), MODEL, TOKENIZER, {"bits_per_character": 1.5}, best=best)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def forge(directory: Path, name: str, data: bytes) -> None:
    """Change a file of a model directory and make the manifest agree, as a hostile or careless hand would."""
    (directory / name).write_bytes(data)
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (directory / "MANIFEST.json").write_text(json.dumps(manifest))


def forge_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | changes
    forge(directory, "config.json", json.dumps(config).encode())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk: that fsync is called, and when, is shown by test_durable.py and by the child processes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return create_run(tmp_path / "run", {"seed": 1, "lr": 0.5}, TOKENIZER)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", weights(), MODEL, TOKENIZER, {})
    return tmp_path / "model"


@contextmanager
def within_seconds(seconds: int) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda number, frame: pytest.fail("it waited"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---- what is written


def test_layout_of_a_run(run: Run) -> None:
    assert save(run, 500) == run.path / "checkpoints" / "step-000500"
    assert names(run.path) == ["best.json", "checkpoints", "config.json", "latest.json", "tokenizer.json"]
    content = json.loads((run.path / "config.json").read_text())
    assert list(content.items())[:3] == [("format_version", 1), ("seed", 1), ("lr", 0.5)]
    unsealed = '{\n  "format_version": 1,\n  "seed": 1,\n  "lr": 0.5\n}\n'
    assert content["sha256"] == hashlib.sha256(unsealed.encode()).hexdigest()
    for pointer in ("best.json", "latest.json"):
        content = json.loads((run.path / pointer).read_text())
        assert content == {"format_version": 1, "checkpoint": "step-000500", "step": 500}
    directory = run.path / "checkpoints" / "step-000500"
    assert names(directory) == sorted([*FILES, "MANIFEST.json"])
    config = json.loads((directory / "config.json").read_text())
    assert config.items() >= {"format_version": 1, "model_type": "longshort", "model": MODEL}.items()
    assert config["vocab_size"] == 3
    assert config["tokenizer_sha256"] == hashlib.sha256(TOKENIZER.encode()).hexdigest()
    manifest = json.loads((directory / "MANIFEST.json").read_text())
    assert list(manifest["files"]) == FILES
    for name, entry in manifest["files"].items():
        data = (directory / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def test_round_trip(run: Run) -> None:
    path = save(run, 7)
    for given_path in (run.path, str(run.path), path):
        saved = load_model(given_path)
        assert saved.path == path
        assert saved.model == MODEL
        assert saved.tokenizer_json == TOKENIZER
        assert saved.step == 7
        assert saved.extra == {"bits_per_character": 1.5}
        assert saved.weights.keys() == {"w", "b"}
        assert saved.weights["w"].flags.writeable


@given(
    st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        hnp.arrays(np.dtype(np.float32), hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
        | hnp.arrays(np.dtype(np.float16), hnp.array_shapes(max_side=4)),
        max_size=4,
    ),
    st.text(max_size=20),
)
@settings(QUICK, max_examples=60)
def test_weights_are_bit_exact(tmp_path: Path, arrays: dict[str, NDArray[Any]], text: str) -> None:
    save_model(tmp_path / "model", arrays, MODEL, text, {"text": text}, step=None)
    saved = load_model(tmp_path / "model")
    assert saved.step is None
    assert (saved.tokenizer_json, saved.extra) == (text, {"text": text})
    assert saved.weights.keys() == arrays.keys()
    for name, array in arrays.items():
        assert saved.weights[name].dtype == np.float32
        assert saved.weights[name].shape == array.shape
        assert saved.weights[name].tobytes() == array.astype(np.float32).tobytes()


def test_special_values_and_strided_views_are_bit_exact(tmp_path: Path) -> None:
    special = np.array([-0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38], np.float32)
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"special": special, "transposed": grid.T, "strided": grid[::2, ::-1]}
    save_model(tmp_path / "model", arrays, MODEL, TOKENIZER, {})
    saved = load_model(tmp_path / "model")
    for name, array in arrays.items():
        assert saved.weights[name].tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "changed",
    [
        {"weights": {"w": np.zeros(2)}},
        {"weights": {"w": np.zeros(2, ">f4")}},
        {"weights": {"__metadata__": np.zeros(2, np.float32)}},
        {"model": {"hidden_size": 2}},
        {"model": {**MODEL, "vocab_size": 0}},
        {"model": {**MODEL, "dropout": float("nan")}},
        {"tokenizer_json": "\ud800"},
        {"extra": {"step": 3}},
        {"extra": {"format_version": 3}},
        {"extra": {"text": "x" * (2 << 20)}},
        {"step": -1},
    ],
)
def test_what_could_not_be_loaded_is_not_saved(run: Run, changed: dict[str, Any]) -> None:
    given_values = {"weights": weights(), "model": MODEL, "tokenizer_json": TOKENIZER, "extra": {}, "step": 1}
    with pytest.raises(ValueError):
        run.save(**{**given_values, **changed}, best=True)
    assert names(run.path / "checkpoints") == []


def test_a_vocabulary_that_could_not_be_read_back_starts_no_run(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_files.LIMITS, "tokenizer.json", 300_000)
    with pytest.raises(TextError, match=r"takes 1\.0 MB; at most 0\.3 MB") as caught:
        create_run(tmp_path / "other", {}, " " * 1_000_000)
    assert "--min-freq" in caught.value.hint
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError):
        run.save(1, weights(), MODEL, " " * 1_000_000, {}, best=True)
    assert names(run.path / "checkpoints") == []


def test_a_million_words_of_any_usual_length_can_be_read_back() -> None:
    word = "щ" * 40
    one, two = (len(WordTokenizer([word + c for c in more]).to_json()) for more in ("a", "ab"))
    assert MOST_WORDS * (two - one + len(f"{MOST_WORDS}")) < model_files.LIMITS["tokenizer.json"]


def test_old_checkpoints_are_deleted_but_best_and_latest_stay(run: Run) -> None:
    checkpoints = run.path / "checkpoints"
    (checkpoints / "my-favourite").mkdir()
    kept = [(1, False, [1]), (2, True, [1, 2]), (3, False, [2, 3]), (4, False, [2, 3, 4]), (5, False, [2, 4, 5])]
    for step, best, left in kept:
        save(run, step, best=best)
        assert names(checkpoints) == ["my-favourite", *(f"step-{number:06d}" for number in left)]
        assert run.latest() == checkpoints / f"step-{step:06d}"
    assert load_model(run.path).step == 2
    save(run, 1_234_567)
    assert names(checkpoints) == ["my-favourite", "step-000005", "step-1234567"]
    assert load_model(run.path).step == 1_234_567


def test_nothing_is_deleted_while_a_pointer_is_unreadable(run: Run) -> None:
    save(run, 1)
    (run.path / "best.json").write_text("{")
    save(run, 2, best=False)
    assert names(run.path / "checkpoints") == ["step-000001", "step-000002"]


def test_what_a_killed_save_left_is_deleted(run: Run) -> None:
    checkpoints = run.path / "checkpoints"
    (checkpoints / ".step-000001.0123456789abcdef.tmp").mkdir()
    save(run, 1)
    (checkpoints / "step-000001").rename(set_aside(checkpoints / "step-000001"))  # killed between two renames
    assert load_model(run.path).step == 1
    save(run, 2, best=False)
    assert load_model(run.path).step == 1
    save(run, 1)
    assert names(checkpoints) == ["step-000001"]


def test_logs_and_json(run: Run) -> None:
    run.log_metrics({"step": 1, "nats_per_token": 2.5})
    run.log_metrics({"step": 2, "nats_per_token": 2.25})
    run.log_timing({"step": 1, "tokens_per_second": 9.0})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines][1] == {"step": 2, "nats_per_token": 2.25}
    assert (run.path / "timing.jsonl").read_text() == '{"step": 1, "tokens_per_second": 9.0}\n'
    for values in ({"loss": float("nan")}, {"loss": float("inf")}):
        for write in (run.log_metrics, run.log_timing, lambda values: run.write_json("x.json", values)):
            with pytest.raises(ValueError):
                write(values)
    run.write_json("x.json", {"a": "ü"})
    assert json.loads((run.path / "x.json").read_text()) == {"format_version": 1, "a": "ü"}
    assert len((run.path / "metrics.jsonl").read_text().splitlines()) == 2


def test_open_run(run: Run) -> None:
    assert open_run(run.path) == run
    assert open_run(run.path).config() == {"seed": 1, "lr": 0.5}
    assert run.latest() is None
    (run.path / "config.json").write_text('{"format_version": 2}')
    with pytest.raises(CheckpointError, match="newer longshort"):
        open_run(run.path)


def test_create_run_overwrites_nothing(tmp_path: Path, run: Run, model: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, words in [(run.path, "is a run already"), (model, "not an empty"), (tmp_path / "file", "not an empty")]:
        with pytest.raises(UsageError, match=words) as caught:
            create_run(path, {}, TOKENIZER)
        assert "--out" in caught.value.hint
    with pytest.raises(OutputError):
        create_run(tmp_path / "file" / "below", {}, TOKENIZER)
    with pytest.raises(ValueError):
        create_run(tmp_path / "other", {"lr": float("nan")}, TOKENIZER)
    (tmp_path / "empty").mkdir()
    assert is_run(create_run(tmp_path / "empty", {}, TOKENIZER).path)
    assert create_run(tmp_path / "new" / "deep", {}, TOKENIZER).config() == {}
    assert not (tmp_path / "other").exists()
    assert not is_run(model)
    assert not is_run(tmp_path / "missing")


def test_of_several_who_start_a_run_at_one_place_one_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, real = threading.Barrier(2), checkpoint._refuse_existing

    def refuse(path: str | Path) -> None:
        real(path)
        looked.wait(10)  # both have seen that nothing is there

    def start(number: int) -> str:
        try:
            create_run(path, {"number": number}, f"{number}")
        except UsageError as error:
            return error.what
        return "mine"

    monkeypatch.setattr(checkpoint, "_refuse_existing", refuse)
    for trial in range(10):
        path = tmp_path / "runs" / f"{trial}"
        if trial % 2:
            path.mkdir(parents=True)
        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(start, range(2)))
        assert sorted(won) == [f"Another process has just started a run at {path}.", "mine"]
        assert open_run(path).config() == {"number": won.index("mine")}
        assert (path / "tokenizer.json").read_text() == f"{won.index('mine')}"


def test_who_looks_whether_a_run_can_be_started_disturbs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.require_new_run(tmp_path / "new" / "run")
    assert names(tmp_path) == []
    real = os.open

    def opened(*given: Any) -> int:
        if not (tmp_path / "new" / "run").exists():  # another starts one while this looks
            monkeypatch.setattr(os, "open", real)
            create_run(tmp_path / "new" / "run", {}, TOKENIZER)
        return real(*given)

    monkeypatch.setattr(os, "open", opened)
    checkpoint.require_new_run(tmp_path / "new" / "run")
    save(open_run(tmp_path / "new" / "run"), 1)
    with pytest.raises(UsageError, match="is a run already"):
        checkpoint.require_new_run(tmp_path / "new" / "run")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    for place in ("file/run", "link", "link/run", "x" * 300):
        with pytest.raises(OutputError, match="Cannot write") as caught:
            checkpoint.require_new_run(tmp_path / place)
        assert place in caught.value.what


def test_a_run_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    number = 0
    while True:
        number += 1
        with nth_call_fails(number, errno.EIO) as calls:
            try:
                create_run(tmp_path / "deep" / "run", {}, TOKENIZER)
            except OutputError:
                assert not (tmp_path / "deep" / "run").exists()
            else:
                break
    assert number > 8, calls


def test_save_model_replaces_a_model_and_nothing_else(tmp_path: Path, model: Path, run: Run) -> None:
    save_model(model, weights(2.0), MODEL, TOKENIZER, {})
    assert load_model(model).weights["b"][0] == 2.0
    (model / "notes.txt").write_text("mine")
    for path in (model, run.path):
        with pytest.raises(OutputError, match="other files"):
            save_model(path, weights(3.0), MODEL, TOKENIZER, {})
    assert load_model(model).weights["b"][0] == 2.0  # and a foreign file does not matter to a reader
    save_model(tmp_path / "new" / "deep", weights(), MODEL, TOKENIZER, {})
    model.rename(set_aside(model))  # killed between the two renames
    assert load_model(model).weights["b"][0] == 2.0
    save_model(model, weights(4.0), MODEL, TOKENIZER, {})
    assert load_model(model).weights["b"][0] == 4.0
    assert not set_aside(model).exists()


# ---- what goes wrong while writing


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("second", [1, 2])
def test_nth_call_fails_while_saving(tmp_path: Path, code: int, second: int) -> None:
    number, failures = 0, 0
    while True:
        number += 1
        run = create_run(tmp_path / str(number), {}, TOKENIZER)
        run.save(1, weights(1), MODEL, TOKENIZER, {}, best=True)
        with nth_call_fails(number, code) as calls:
            try:
                run.save(second, weights(2), MODEL, TOKENIZER, {}, best=True)
                wanted = [2.0]
            except OutputError:
                failures += 1
                wanted = [1.0, 2.0]
        assert load_model(run.path).weights["b"][0] in wanted  # and no warning, or this test fails
        assert not list(run.path.rglob("*.tmp"))
        best, latest = (json.loads((run.path / name).read_text()) for name in ("best.json", "latest.json"))
        assert best["step"] <= latest["step"]
        if len(calls) < number:
            break
    assert failures > 25


def test_kill_at_random_moments(tmp_path: Path) -> None:
    script = """
import os, random, signal, sys, time
import numpy as np
from longshort.checkpoint import create_run, load_model

def save(run, step):
    weights = {"w": np.full(250_000, step, np.float32)}
    run.save(step, weights, {"vocab_size": 3}, "{}", {}, best=step % 3 == 0)

run = create_run(sys.argv[1], {}, "{}")
started = time.perf_counter()
save(run, 0)
duration = time.perf_counter() - started
newest = 0
for trial in range(12):
    first = newest + trial % 2  # every other child first replaces a checkpoint, perhaps the only one
    done, signal_done = os.pipe()
    child = os.fork()
    if child == 0:
        step = first
        while True:
            save(run, step)
            os.write(signal_done, b".")
            step += 1
    if first > newest:
        os.read(done, 1)
    time.sleep(random.uniform(0, 1.5 * duration))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for path in (run.path, run.latest()):
        saved = load_model(path)
        assert (saved.weights["w"] == saved.step).all()
        assert path == run.path or saved.step >= first
        newest = max(newest, saved.step)
save(run, newest + 3)
assert len(os.listdir(run.path / "checkpoints")) <= 3, os.listdir(run.path / "checkpoints")
print(newest)
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    arguments = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "run")]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 6


def test_reading_while_training_goes_on(run: Run) -> None:
    save(run, 1)
    stop = threading.Event()

    def train() -> None:
        step = 1
        while not stop.is_set():
            step += 1
            save(run, step)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(100):  # a warning about a fall-back would be an error
            saved = load_model(run.path)
            assert saved.weights["b"][0] == saved.step
    finally:
        stop.set()
        thread.join()


def test_a_checkpoint_deleted_while_it_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save(run, 1)
    read: list[str] = []
    real = documents.read

    def read_while_training_goes_on(path: Path, limit: int) -> bytes:
        read.append(path.name)
        if path.name == "tokenizer.json" and read.count("tokenizer.json") == 1:
            save(run, 2)
            save(run, 3)  # the first is no longer kept then
        return real(path, limit)

    monkeypatch.setattr(model_files, "read", read_while_training_goes_on)
    assert load_model(run.path).step == 3  # and no warning: nothing is damaged


def test_no_space_for_a_checkpoint(run: Run) -> None:
    save(run, 1)
    script = """
import resource, sys
import numpy as np
from longshort.checkpoint import open_run
from longshort.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    open_run(sys.argv[1]).save(2, {"w": np.zeros(250_000, np.float32)}, {"vocab_size": 3}, "{}", {}, best=True)
except OutputError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", script, str(run.path)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert "needs 1.1 MB" in done.stdout
    assert names(run.path / "checkpoints") == ["step-000001"]
    assert load_model(run.path).step == 1


def test_no_pickle_and_no_torch(tmp_path: Path) -> None:
    script = """
import sys
events = []
sys.addaudithook(lambda event, arguments: events.append(event))
import numpy as np
from longshort.checkpoint import create_run, load_model
events.clear()
run = create_run(sys.argv[1], {}, "{}")
for step in (1, 2):
    run.save(step, {"w": np.zeros(9, np.float32)}, {"vocab_size": 3}, "{}", {}, best=True)
    load_model(run.path)
assert "open" in events
assert not [event for event in events if event.startswith("pickle")]
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], check=True)


# ---- what goes wrong with what is read


@given(st.sampled_from([*FILES, "MANIFEST.json"]), st.data())
@settings(QUICK, max_examples=100)
def test_a_flipped_bit_in_a_model_is_refused(tmp_path: Path, name: str, data: st.DataObject) -> None:
    if not (tmp_path / "model").exists():
        save_model(tmp_path / "model", weights(), MODEL, TOKENIZER, {})
    path = tmp_path / "model" / name
    content = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        with pytest.raises(CheckpointError):
            load_model(tmp_path / "model")
    finally:
        path.write_bytes(content)
    load_model(tmp_path / "model")


def test_every_flipped_bit_in_a_pointer_is_noticed(run: Run) -> None:
    save(run, 4, best=True)
    save(run, 5, best=False)  # one bit from the best one, in both its places
    path = run.path / "best.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.warns(UserWarning, match="Loaded .*step-000005 instead"):
            assert load_model(run.path).step == 5


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
def test_a_damaged_best_falls_back_loudly(run: Run, name: str) -> None:
    best = save(run, 1)
    save(run, 2, best=False)
    content = (best / name).read_bytes()
    for damage in (None, b"", content[:-2], content + b"\0", content[: len(content) // 2]):
        (best / name).unlink()
        if damage is not None:
            (best / name).write_bytes(damage)
        with pytest.raises(CheckpointError, match=name):
            load_model(best)
        with pytest.warns(UserWarning, match=f"{name}.*Loaded .*step-000002 instead") as caught:
            assert load_model(run.path).step == 2
        assert caught[0].filename == __file__
        (best / name).write_bytes(content)
    assert load_model(run.path).step == 1
    shutil.rmtree(best)
    with pytest.warns(UserWarning, match="step-000001"):
        assert load_model(run.path).step == 2
    shutil.rmtree(run.path / "checkpoints" / "step-000002")
    with pytest.raises(CheckpointError, match=r"No checkpoint of .* can be loaded"):
        load_model(run.path)


def test_a_run_without_a_best_loads_the_latest(run: Run) -> None:
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(run.path)
    save(run, 3, best=False)
    assert load_model(run.path).step == 3


@pytest.mark.parametrize("what", ["../../x", "step-000001/", "/etc", "step-1", 1, None])
def test_a_pointer_names_only_checkpoints(run: Run, what: Any) -> None:
    save(run, 1)
    for pointer in ("best.json", "latest.json"):
        run.write_json(pointer, {"checkpoint": what, "step": 1})
    with pytest.warns(UserWarning, match=r"names no checkpoint.*Loaded .*step-000001 instead"):
        assert load_model(run.path).step == 1
    with pytest.raises(CheckpointError, match="names no checkpoint"):
        run.latest()


def test_a_swapped_tokenizer_is_refused(tmp_path: Path, model: Path) -> None:
    save_model(tmp_path / "other", weights(), MODEL, '{"symbols": "bc"}', {})
    forge(model, "tokenizer.json", (tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(CheckpointError, match="not the tokenizer that the model was trained with"):
        load_model(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"model": [1]},
        {"model": {**MODEL, "vocab_size": 4}},
        {"vocab_size": True},
        {"vocab_size": "3"},
        {"step": 1.5},
        {"step": -1},
        {"tokenizer_sha256": None},
        {"format_version": 0},
        {"format_version": True},
        {"format_version": "1"},
    ],
)
def test_a_configuration_of_another_kind_is_refused(model: Path, changes: dict[str, Any]) -> None:
    forge_config(model, **changes)
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(model)


@pytest.mark.parametrize("name", ["config.json", "MANIFEST.json"])
def test_a_newer_format_says_to_upgrade(model: Path, name: str) -> None:
    if name == "config.json":
        forge_config(model, format_version=2)
    else:
        (model / name).write_text('{"format_version": 2, "weights": []}')
    with pytest.raises(CheckpointError, match="made by a newer longshort") as caught:
        load_model(model)
    assert "Upgrade" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[1]",
        b"null",
        b"\xff\xfe{",
        b'\xef\xbb\xbf{"format_version": 1}',
        b'{"format_version": 1, "model": NaN}',
        b'{"format_version": 1, "model": -Infinity}',
        b'{"format_version": 1, "model": 1e999}',
        b'{"format_version": 1, "model": ' + b"9" * 5000 + b"}",
        b'{"format_version": 1}' + b" " * (1 << 20),
        b"",
    ],
)
def test_hostile_json_is_refused(model: Path, content: bytes) -> None:
    forge(model, "config.json", content)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged") as caught:
        load_model(model)
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) <= 3
    (model / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
        load_model(model)


@pytest.mark.parametrize(
    ("twist", "words"),
    [
        ('"extra": {"a": 1, "a": 1}', "a name occurs twice"),
        ('"extra": NaN', "NaN is not a finite number"),
        ('"extra": -1e999', "-1e999 is not a finite number"),
        ('"extra": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_unclear_json_is_refused_and_the_reason_told(model: Path, twist: str, words: str) -> None:
    whole = (model / "config.json").read_text().rstrip("}\n")
    forge(model, "config.json", f"{whole}}}".encode())
    load_model(model)
    forge(model, "config.json", f"{whole}, {twist}}}".encode())
    with pytest.raises(CheckpointError, match=words):
        load_model(model)


@pytest.mark.parametrize("change", ["../x", "/etc/passwd", "sub/x", "..", "notes.txt"])
def test_a_manifest_names_exactly_the_three_files(model: Path, change: str) -> None:
    whole = json.loads((model / "MANIFEST.json").read_text())
    for files in (
        {**whole["files"], change: whole["files"]["config.json"]},
        {name: entry for name, entry in whole["files"].items() if name != "config.json"},
        list(whole["files"]),
    ):
        (model / "MANIFEST.json").write_text(json.dumps({**whole, "files": files}))
        with pytest.raises(CheckpointError, match="does not name exactly"):
            load_model(model)


@pytest.mark.parametrize("entry", [None, 5, {}, {"bytes": "9"}, {"bytes": -1}, {"bytes": 1 << 70}, {"bytes": 0.5}])
def test_hostile_manifest_entries_are_refused(model: Path, entry: Any) -> None:
    whole = json.loads((model / "MANIFEST.json").read_text())
    whole["files"]["model.safetensors"] = entry
    (model / "MANIFEST.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError):
        load_model(model)


def test_a_huge_file_is_not_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(CheckpointError, match="more than"):
        load_model(model)
    manifest = json.loads((model / "MANIFEST.json").read_text())
    manifest["files"]["tokenizer.json"]["bytes"] = 1 << 30
    (model / "MANIFEST.json").write_text(json.dumps(manifest))
    with (model / "tokenizer.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match=f"more than {model_files.LIMITS['tokenizer.json']}"):
        load_model(model)


def bfloat16_file() -> bytes:
    header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 20,
        (8).to_bytes(8, "little") + b"[" * 8,
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
        (1 << 62).to_bytes(8, "little"),
        b"\x80\x04]\x94.",  # a pickle
        safetensors.numpy.save({"w": np.zeros(3, np.float64)}),
        safetensors.numpy.save({"w": np.zeros(3, np.int8)}),
        safetensors.numpy.save({"w": np.zeros(3, np.float32)})[:-1],
        safetensors.numpy.save({"w": np.zeros(3, np.float32)}) + b"\0",
        bfloat16_file(),
    ],
)
def test_weights_that_are_none_are_refused(model: Path, content: bytes) -> None:
    forge(model, "model.safetensors", content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(model)


@given(st.binary(max_size=200), st.integers(0, 300), st.sampled_from(FILES))
@settings(QUICK, max_examples=100)
def test_forged_files_never_crash(tmp_path: Path, patch: bytes, position: int, name: str) -> None:
    save_model(tmp_path / "model", weights(), MODEL, TOKENIZER, {})
    content = (tmp_path / "model" / name).read_bytes()
    forge(tmp_path / "model", name, content[:position] + patch + content[position + len(patch) :])
    with suppress(CheckpointError):
        assert isinstance(load_model(tmp_path / "model"), Saved)


@pytest.mark.parametrize("name", [*FILES, "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "loop"])
def test_special_files_are_refused_without_waiting(model: Path, name: str, kind: str) -> None:
    path = model / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    words = "too many levels" if kind == "loop" else "not a regular file"
    with within_seconds(10), pytest.raises(CheckpointError, match=words):
        load_model(model)


def test_links_to_whole_files_are_followed(tmp_path: Path, model: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere")
    (model / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(model)
    assert load_model(tmp_path / "link").model == MODEL


def test_a_path_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("missing", "file", "file/below", "loop", "x" * 300, "nul\0", "line\nbreak"):
        for load in (load_model, open_run):
            with pytest.raises(UsageError, match="Wanted a run") as caught:
                load(tmp_path / name)
            assert "--out" in caught.value.hint
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: no such file"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_in_memory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(LongshortError, match="does not fit in memory"):
        load_model(model)


def test_nothing_is_warned_about_a_whole_run(run: Run) -> None:
    save(run, 1)
    save(run, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(run.path)
        load_model(run.path / "checkpoints" / "step-000002")
    assert not caught
    assert documents.FORMAT_VERSION == 1
