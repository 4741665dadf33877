"""Lines as a tree of their prefixes: what they have in common is read once, and costs what it costs in each of them."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import need_target
from longshort import evaluation, native, native_model, prefixes, training
from longshort.config import TrainConfig
from longshort.decoder import Decoder
from longshort.errors import UsageError
from longshort.native_model import Tree
from longshort.structures import ModelStructure, TreeArgs
from longshort.text.encoding import encode_text
from longshort.text.tokenizers import CharTokenizer

needs_library = pytest.mark.skipif(not native.targets(), reason="there is no kernel library")
TOKENIZER = CharTokenizer("abcdefgh \n")
LINES = ["", "a", "ab", "abc", "abd", "abd", "b", "baaaa", "baaab", "", "hhhhhhhhhhhhhhhhhhhhhhhhhhhh", "ab€c", "ab€d"]


def decoder(precision: str = "float32", **given: Any) -> Decoder:
    torch.manual_seed(4)
    options = {"hidden": 20, "embedding": 7} | given
    model = training.make_model(TrainConfig(**options, lines=True), TOKENIZER)
    return Decoder(model.config, model.weights(), TOKENIZER, precision)


def laid_out(lines: list[list[int]]) -> tuple[Any, Any, Any]:
    """Return ids, starts and stops of lines that follow each other."""
    stops = np.cumsum([len(line) for line in lines]) - 1
    return np.array([i for line in lines for i in line], np.int32), np.append(0, stops[:-1] + 1), stops


class Paths:
    """Reads trees as a model would whose nats are numbers of their own for each prefix, and counts what it reads."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []
        self.read: list[tuple[int, ...]] = []

    @staticmethod
    def number(path: tuple[int, ...]) -> float:
        return float(hash(path) % 2**40)

    def __call__(self, tree: Tree, *, threads: int) -> Any:
        found, at = np.empty(len(tree.ids)), 0
        above: list[tuple[int, ...]] = [()]
        for level, (nodes, reads) in enumerate(zip(tree.nodes, tree.reads, strict=True)):
            below: list[tuple[int, ...]] = []
            for node in range(at, at + nodes):
                path = (*(above[tree.parents[node]] if level else ()), int(tree.ids[node]))
                found[node] = self.number(path)
                below.append(path)
            self.seen += below
            above, at = below[:reads], at + nodes
            self.read += above
        assert not above
        return found


symbols = st.integers(0, 3) | st.just(2**31 - 1)


@settings(max_examples=300)
@given(st.lists(st.lists(symbols, min_size=1, max_size=9), min_size=1, max_size=30), st.integers(1, 40))
def test_every_prefix_is_read_once_and_stands_for_all_lines_that_have_it(lines: list[list[int]], most: int) -> None:
    ids, starts, stops = laid_out(lines)
    paths, pauses = Paths(), []
    found = prefixes.nats_of_lines(
        paths, ids, starts, stops, most=most, threads=1, pause=lambda: pauses.append(len(paths.seen))
    )
    wanted = [Paths.number(tuple(line[: t + 1])) for line in lines for t in range(1, len(line))]
    assert found.tolist() == wanted
    assert pauses
    if most > len(lines):  # all in one tree
        every = {tuple(line[: t + 1]) for line in lines for t in range(len(line))}
        assert sorted(paths.seen) == sorted(every)
        assert sorted(paths.read) == sorted({path[:-1] for path in every} - {()})


@pytest.mark.parametrize("places", [1, 40, 1 << 17])
def test_groups_are_as_large_as_they_may_be(places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_PLACES_A_TREE", places)
    lengths = np.random.default_rng(0).integers(1, 12, size=50)
    groups = prefixes._groups(lengths, 9, 60)
    assert [i for group in groups for i in range(group.start, group.stop)] == list(range(50))
    for group, after in zip(groups, [*groups[1:], None], strict=True):
        own = lengths[group]
        grown = lengths[group.start : group.stop + 1]

        def fits(some: Any) -> bool:
            return len(some) <= 9 and some.sum() <= 60 and some.max() * len(some) <= places

        assert fits(own) or len(own) == 1
        assert after is None or not fits(grown)


@needs_library
@pytest.mark.parametrize("target", native.built_targets())
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn", "rnn_relu"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"hidden": 130, "layers": 2, "residual": True, "layer_norm": True},
        {"hidden": 130, "layers": 3, "table": False},
        {"hidden": 37, "precision": "int8"},
    ],
)
def test_nats_have_the_bits_that_each_line_has_alone(
    cell: str, given: dict[str, Any], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_target(target)
    monkeypatch.setattr(native, "active_target", lambda: target)
    if not given.get("table", True):
        monkeypatch.setattr(native_model, "TABLE_BYTES", 0)
    model = decoder(cell=cell, **{name: value for name, value in given.items() if name != "table"})
    rng = np.random.default_rng(1)
    lines = [*LINES, *("".join(rng.choice(list("abc"), size=rng.integers(0, 14))) for _ in range(90))]
    encoded = [TOKENIZER.encode(f"\n{line}\n").tolist() for line in lines]
    ids, starts, stops = laid_out(encoded)
    wanted = []
    for line in encoded:
        ids_T = np.array(line)
        known = ids_T[1:] < TOKENIZER.size
        nats_TB, _ = model.nats(ids_T[:-1, None], np.where(known, ids_T[1:], -1)[:, None], None)
        wanted.append(nats_TB[:, 0])
    for threads in (1, 2, 3):
        model.threads = threads
        found = model.nats_of_lines(ids, starts, stops)
        assert found.tobytes() == np.concatenate(wanted).tobytes()


@needs_library
def test_threads_have_a_tree_each_and_one_tree_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder(hidden=260)
    model.threads = 3
    assert model._native is not None
    asked: list[int] = []
    original = model._native.read_tree

    def watched(tree: Tree, *, threads: int) -> Any:
        asked.append(threads)
        return original(tree, threads=threads)

    monkeypatch.setattr(model._native, "read_tree", watched)
    ids, starts, stops = laid_out([[9, 1, 2, 3, 9]] * 3 + [[9, 1, 4, 9]])
    one = model.nats_of_lines(ids, starts, stops)
    assert asked == [3]
    monkeypatch.setattr(prefixes, "_SYMBOLS_A_TREE", (1, 1))
    several = model.nats_of_lines(ids, starts, stops)
    assert asked == [3, 1, 1]
    assert one.tobytes() == several.tobytes()


@needs_library
def test_lines_are_read_in_a_thread_that_outlives_the_main_one(tmp_path: Path) -> None:
    model = decoder()
    safetensors.numpy.save_file(model.weights(), tmp_path / "weights")
    program = f"""
import threading, time, safetensors.numpy
from longshort.config import ModelConfig
from longshort.decoder import Decoder
from longshort.scoring import score
from longshort.text.tokenizers import CharTokenizer
config = ModelConfig.from_dict({model.config.to_dict()!r}, "here")
model = Decoder(config, safetensors.numpy.load_file("weights"), CharTokenizer({"".join(TOKENIZER.symbols)!r}))
model.threads = 2
def run():
    time.sleep(0.3)
    print(len(list(score(model, ["ab" * (i % 40) + "c" * (i // 40) for i in range(400)]))))
threading.Thread(target=run).start()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("400\n", "")


@needs_library
@pytest.mark.parametrize(
    ("threads", "vocabulary", "most"), [(1, 11, 1024), (2, 11, 1024), (8, 10_000, 52), (8, 1_000_000, 8)]
)
def test_many_threads_hold_no_more_logits_than_few(
    threads: int, vocabulary: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder()
    model.threads = threads
    model.config = replace(model.config, vocab_size=vocabulary)
    asked: list[int] = []
    monkeypatch.setattr("longshort.decoder.nats_of_lines", lambda *_, most, **__: asked.append(most))
    model.nats_of_lines(*laid_out([[9, 1, 9]]))
    assert asked == [most]


@needs_library
def test_a_pause_that_raises_ends_the_reading() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder().nats_of_lines(*laid_out([[9, 1, 9], [9, 2, 9]]), stop)


@pytest.mark.parametrize("lines_at_a_time", [3, 4096])
@pytest.mark.parametrize("symbols", [5, 1 << 20])
def test_lines_are_evaluated_as_by_pytorch(lines_at_a_time: int, symbols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_LINES_AT_A_TIME", lines_at_a_time)
    monkeypatch.setattr(evaluation, "_SYMBOLS_OF_LINES", symbols)
    monkeypatch.setattr(evaluation, "LONG", 8)
    torch.manual_seed(4)
    model = training.make_model(TrainConfig(hidden=20, embedding=7, lines=True), TOKENIZER).eval()
    ours = Decoder(model.config, model.weights(), TOKENIZER)
    part = encode_text(TOKENIZER, "".join(f"{line}\n" for line in LINES), True)
    found, theirs = evaluation.evaluate(ours, TOKENIZER, part), evaluation.evaluate(model, TOKENIZER, part)
    assert found.nats_per_token == pytest.approx(theirs.nats_per_token, rel=1e-6)
    assert (found.tokens, found.skipped) == (theirs.tokens, 2)
    total, count = 0.0, 0
    for line in LINES:
        ids = TOKENIZER.encode(f"\n{line}\n").astype(np.int64)
        known = ids[1:] < TOKENIZER.size
        nats, _ = model.nats(ids[:-1, None], np.where(known, ids[1:], 0)[:, None], None)
        total, count = total + nats[known, 0].sum(), count + known.sum()
    assert found.nats_per_token == pytest.approx(total / count, rel=1e-6)


def test_without_the_kernels_lines_are_read_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    native_lines = evaluation.evaluate(decoder(), TOKENIZER, "".join(f"{line}\n" for line in LINES))
    monkeypatch.setattr(native, "ready", lambda: False)
    model = decoder()
    with pytest.raises(UsageError, match="Without native kernels"):
        model.nats_of_lines(*laid_out([[9, 1, 9]]))
    found = evaluation.evaluate(model, TOKENIZER, "".join(f"{line}\n" for line in LINES))
    assert found.nats_per_token == pytest.approx(native_lines.nats_per_token, rel=1e-5)


@needs_library
def test_what_is_not_a_tree_is_refused() -> None:
    model = decoder()
    assert model._native is not None
    good = {"nodes": [1, 2, 1], "reads": [1, 1, 0], "ids": [9, 1, 2, 3], "parents": [0, 0, 0, 0]}

    def read(**changed: Any) -> Any:
        assert model._native is not None
        return model._native.read_tree(Tree(**{n: np.array(v, np.int64) for n, v in {**good, **changed}.items()}))

    assert read()[0] == 0
    assert (read()[1:] > 0).all()
    assert read(parents=[77, 0, 0, 0]).tobytes() == read().tobytes()  # of the first level not read
    assert read(nodes=[0, 0], reads=[0, 0], ids=[], parents=[]).shape == (0,)
    assert read(nodes=[2], reads=[0], ids=[1, 2], parents=[0, 0]).tolist() == [0, 0]
    assert read(nodes=[2], reads=[2], ids=[1, 2], parents=[0, 0]).tolist() == [0, 0]  # nobody asked what follows
    for changed, words in (
        ({"nodes": [1, 2]}, "must have an entry a level"),
        ({"nodes": [9, -6, 1]}, "must have an entry a level"),
        ({"ids": [9, 1, 2]}, "must have an entry a level"),
        ({"parents": [0, 0, 0]}, "must have an entry a level"),
        ({"reads": [1, 1]}, "must have an entry a level"),
        ({"reads": [2, 1, 0]}, "refused an argument"),
        ({"reads": [-1, 1, 0]}, "refused an argument"),
        ({"reads": [0, 1, 0]}, "refused an argument"),
        ({"reads": [1, 0, 0]}, "refused an argument"),
        ({"ids": [9, 1, 11, 3]}, "refused an argument"),
        ({"ids": [-1, 1, 2, 3]}, "refused an argument"),
        ({"parents": [0, 0, 1, 0]}, "refused an argument"),
        ({"parents": [0, 0, 0, -1]}, "refused an argument"),
    ):
        with pytest.raises(ValueError, match=words):
            read(**changed)
    library = native.need()
    structure = model._native._structure
    place = (ctypes.c_int64 * 4)(1, 1, 1, 1)
    fitting = {name: ctypes.cast(place, ctypes.c_void_p) for name in ("nodes", "reads", "ids", "parents")}
    nats = (ctypes.c_double * 4)()
    fitting["nats"] = ctypes.cast(nats, ctypes.c_void_p)

    def status(**changed: Any) -> int:
        args = TreeArgs(**{"model": structure, "levels": 1, "num_threads": 1, **fitting, **changed})
        return int(library.ls_read_tree(ctypes.byref(args)))

    assert status() == native.OK
    assert status(levels=0, nodes=None, reads=None) == native.OK
    assert status(parents=None) == native.OK
    for name in ("nodes", "reads", "ids", "nats"):
        assert status(**{name: None}) == native.BAD_ARGUMENT, name
    assert status(levels=2, parents=None) == native.BAD_ARGUMENT
    assert status(levels=-1) == native.BAD_ARGUMENT
    assert status(num_threads=0) == native.BAD_ARGUMENT
    for name, value in (("V", 0), ("layers", 0), ("cell", 9), ("target", 99), ("head", None), ("packed", None)):
        wrong = ModelStructure.from_buffer_copy(structure)
        setattr(wrong, name, value)
        assert status(model=wrong) == native.BAD_ARGUMENT, name
    assert library.ls_read_tree(None) == native.BAD_ARGUMENT
