"""Where texts come from: files, the built-in text, and corpora that are downloaded."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longshort.errors import CorpusError, LongshortError, MissingExtraError, TextError, UsageError
from longshort.text import builtin as builtin_module
from longshort.text import corpus
from longshort.text.builtin import builtin, compose
from longshort.text.corpus import CORPORA, Text, cache_directory, download, load, read_files

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GOOD = b"The Time Traveller (for so it will be convenient)\n" * 400
GOOD_SHA256 = hashlib.sha256(GOOD).hexdigest()


@contextmanager
def refused(kind: type[LongshortError], *patterns: str) -> Iterator[None]:
    """Expect an error of exactly this kind, in at most three printable lines that match the patterns."""
    with pytest.raises(LongshortError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert len(message.splitlines()) <= 3
    assert all(line.isprintable() for line in message.split("\n")), repr(message)
    assert caught.value.hint, "nothing says what to do"
    for pattern in patterns:
        assert re.search(pattern, message), message


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Fail instead of hanging."""

    def stop(*_: object) -> None:
        pytest.fail(f"still waiting after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------- files


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff")), min_size=1))
def test_any_text_comes_back_as_it_was_written(contents: list[str]) -> None:
    whole = "".join(contents)
    with tempfile.TemporaryDirectory() as folder:
        files = [write(Path(folder, f"{i}.txt"), text.encode()) for i, text in enumerate(contents)]
        if not whole:
            with refused(TextError, "empty"):
                read_files(files)
            return
        text = read_files(files)
    assert text.content == whole
    assert text.sha256 == hashlib.sha256(whole.encode()).hexdigest()
    assert text.characters == len(whole)
    names = [f"{i}.txt" for i in range(len(contents))]
    assert text.name == ("+".join(names) if len(names) <= 3 else f"0.txt+{len(names) - 1}-more")


def test_order_is_the_given_one(tmp_path: Path) -> None:
    b, a = write(tmp_path / "b", b"1"), write(tmp_path / "a", b"2")
    assert read_files([b, str(a)]) == Text.of("12", "b+a")
    assert load([a]) == load(str(a)) == load(a)  # type: ignore[arg-type]  # a likely slip, and harmless


def test_line_ends_are_kept_and_byte_order_marks_dropped(tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", codecs.BOM_UTF8 + b"one\r\ntwo\rthree\n")
    second = write(tmp_path / "b.txt", codecs.BOM_UTF8 + "four\ufeff\x85".encode())
    assert read_files([first, second]).content == "one\r\ntwo\rthree\nfour\ufeff\x85"


def test_folder_stands_for_its_text_files_sorted_by_path(tmp_path: Path) -> None:
    for name in ["b.txt", "a/z.txt", "a/deep/c.txt", "a.txt", "a/notes.md", "d.gz"]:
        write(tmp_path / name, f"{name}\n".encode())
    write(tmp_path / "c.txt.gz", gzip.compress(b"c.txt.gz\n"))
    (tmp_path / "d.txt").mkdir()
    (tmp_path / "round").symlink_to(tmp_path)
    text = read_files([tmp_path])
    assert text.content.split() == ["a/deep/c.txt", "a/z.txt", "a.txt", "b.txt", "c.txt.gz"]
    assert text.name == tmp_path.name


def test_hundred_megabytes_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", b"x" * 100_000_000)
    assert read_files([path]).characters == 100_000_000
    path.unlink()  # pytest keeps the folder


def test_gzip_is_unpacked_whatever_its_name(tmp_path: Path) -> None:
    plain, packed = write(tmp_path / "a.txt", b"one\n"), write(tmp_path / "b.log", gzip.compress(b"two\n"))
    several = write(tmp_path / "c.gz", gzip.compress(codecs.BOM_UTF8 + b"thr") + gzip.compress(b"ee\n"))
    assert read_files([plain, packed, several]).content == "one\ntwo\nthree\n"
    whole = gzip.compress(b"some text " * 1000)
    for damaged in (whole[:-4], whole[:-1] + b"x", whole[:20], whole[:15] + b"\xff\xff\xff\xff" + whole[19:]):
        with refused(TextError, r"'.*d\.gz' is a damaged gzip file", "unpack it"):
            read_files([write(tmp_path / "d.gz", damaged)])
    with refused(TextError, "0xff at offset 2, line 2"):
        read_files([write(tmp_path / "e.gz", gzip.compress(b"a\n\xff"))])
    with refused(TextError, "binary"):
        read_files([write(tmp_path / "f.gz", gzip.compress(gzip.compress(b"a\0")))])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(good=st.text(st.sampled_from("a\né€😀")), bad=st.sampled_from([b"\xff", b"\xe2\x82a", b"\xf0\x9f", b"\0", b""]))
def test_what_is_wrong_is_found_wherever_the_blocks_end(tmp_path: Path, good: str, bad: bytes) -> None:
    path = write(tmp_path / "x.txt", good.encode() + bad + (b"" if bad.startswith(b"\xf0") else b"tail"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "PIECE", 4)
        if not bad:
            assert read_files([path]).content == good + "tail"
        elif bad == b"\0":
            with refused(TextError, "binary"):
                read_files([path])
        else:
            place = f"offset {len(good.encode())}, line {good.count(chr(10)) + 1}"
            with refused(TextError, f"byte 0x{bad[0]:02x} at {place}"):
                read_files([path])


def test_files_are_read_again_as_often_as_wanted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"x" * 3_000_000)
    found = corpus.find([path])
    for _ in range(2):
        assert [len(piece) for piece in found.pieces() if piece] == [1 << 20, 1 << 20, 3_000_000 - (2 << 20)]
    assert load([path]).content == "x" * 3_000_000


def test_standard_input_is_kept_as_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    given("some text é\n".encode())
    [path, other] = corpus.keep_standard_input(["-", "other.txt"])
    assert other == "other.txt"
    assert Path(path).parent.parent == cache / "stdin"
    assert Path(path).name == "stdin"
    assert read_files([path]).content == "some text é\n"
    for content, reason in (
        (b"", "empty: standard input"),
        (b"\xff", "'standard input' is not UTF-8"),
        (b"a\0", "binary"),
    ):
        given(content)
        with refused(TextError, reason):
            corpus.keep_standard_input(["-"])
    with refused(UsageError, "Standard input is given twice"):
        corpus.keep_standard_input(["-", "-"])
    assert len(list((cache / "stdin").iterdir())) == 1, "a text that was refused was kept"


def test_standard_input_is_kept_while_it_is_needed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> list[Path]:
        return list((cache / "stdin").iterdir())

    for needed in (False, True):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some text\n")))
        with corpus.standard_input_kept(["-"], partial(bool, needed)) as paths:
            assert read_files(paths).content == "some text\n"
        assert len(kept()) == needed
    with corpus.standard_input_kept(paths) as same:  # a file that was kept before is a file as any other
        assert same == paths
    assert len(kept()) == 1
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"some text\n")))
    with pytest.raises(ZeroDivisionError), corpus.standard_input_kept(["-"]):
        raise ZeroDivisionError
    assert len(kept()) == 1


def test_standard_input_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it then
    for path in corpus.STDIN:
        with refused(TextError, "Standard input is closed"):
            corpus.keep_standard_input([path])
        with refused(TextError, "Standard input is closed"):
            list(corpus.lines(path))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("nothing-like-it", "Give a text file, or a folder"),
        ("shakspeare.txt", "Did you mean '.*/shakespeare.txt'"),
        ("shakespeare.txt/below", "Give a text file"),
        ("no/such/folder/shakespeare.txt", "Give a text file"),
        ("link", "symbolic link to something that is not there"),
        ("bad\x1b[31m\r\n\u202e\udcff.txt", r"\\x1b\[31m\\r\\n\\u202e\\udcff\.txt"),
    ],
)
def test_missing_file(tmp_path: Path, name: str, hint: str) -> None:
    write(tmp_path / "shakespeare.txt", b"To be")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with refused(UsageError, "There is no file or folder", hint):
        read_files([tmp_path / name])


def test_name_of_a_corpus_given_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(UsageError, "--corpus timemachine"):
        load(["timemachine"])


def test_control_characters_stay_out_of_the_name(tmp_path: Path) -> None:
    assert read_files([write(tmp_path / "a\n\x1b.txt", b"x")]).name == r"'a\n\x1b.txt'"


@pytest.mark.parametrize(
    ("content", "patterns"),
    [
        (b"", ["is empty"]),
        (codecs.BOM_UTF8, ["is empty"]),
        (b"\x7fELF\x02\x01\0\0\0text and text and text", ["binary"]),
        (b"one\0two, and so on", ["binary"]),
        (b"\0", ["binary"]),
        (b"first\nsecond \xe9t\xe9\n", ["0xe9 at offset 13, line 2", "iconv"]),
        (codecs.BOM_UTF8 + b"a\n\n\xff", ["0xff at offset 6, line 3"]),
        ("Größe".encode("latin-1"), ["0xf6 at offset 2, line 1", "iconv -f WINDOWS-1252 -t UTF-8"]),
        ("cut €".encode()[:-1], ["0xe2 at offset 4, line 1"]),
        ("The Time Machine".encode("utf-16"), ["looks like UTF-16 text", "iconv -f UTF-16 -t UTF-8"]),
        (codecs.BOM_UTF16_BE + "время".encode("utf-16-be"), ["UTF-16 text", "iconv -f UTF-16 -t UTF-8"]),
        (codecs.BOM_UTF16_LE, ["UTF-16 text"]),
        ("The Time Machine".encode("utf-16-le"), ["UTF-16LE", "iconv -f UTF-16LE -t UTF-8"]),
        ("The Time Machine".encode("utf-16-be"), ["UTF-16BE", "iconv -f UTF-16BE -t UTF-8"]),
        ("The Time Machine".encode("utf-32"), ["looks like UTF-32 text", "iconv -f UTF-32 -t UTF-8"]),
        ("The Time Machine".encode("utf-32-le"), ["UTF-32LE", "iconv -f UTF-32LE -t UTF-8"]),
        ("The Time Machine".encode("utf-32-be"), ["UTF-32BE", "iconv -f UTF-32BE -t UTF-8"]),
    ],
)
def test_what_is_no_utf8_text(tmp_path: Path, content: bytes, patterns: list[str]) -> None:
    path = write(tmp_path / "wrong.txt", content)
    with refused(TextError, re.escape(str(path)), *patterns):
        read_files([path])


def test_one_bad_file_among_good_ones_is_named(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.txt", b"text"), write(tmp_path / "bad.txt", b"\xff")
    with refused(TextError, r"bad\.txt"):
        read_files([good, bad])
    with refused(TextError, r"bad\.txt"):
        read_files([tmp_path])


def test_folder_without_text_files(tmp_path: Path) -> None:
    write(tmp_path / "README.md", b"text")
    with refused(TextError, r"no \*\.txt files"):
        read_files([tmp_path])


def test_pipes_devices_and_sockets_do_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("pipe.txt")
    places = ["pipe.txt", "socket"] + [name for name in ["/dev/zero"] if Path(name).exists()]
    with at_most(5), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for place in places:
            with refused(TextError, re.escape(place), "pipe, a socket or a device", "Save the text to a file"):
                read_files([place])
        with refused(TextError, "pipe"):
            read_files([tmp_path])


def test_paths_that_the_system_refuses(tmp_path: Path) -> None:
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    with refused(TextError, r"Cannot read '.*loop\.txt': Too many levels of symbolic links"):
        read_files([tmp_path / "loop.txt"])
    with refused(TextError, "Too many levels"):
        read_files([tmp_path])
    with refused(TextError, "name too long"):
        read_files([tmp_path / ("x" * 5000)])
    with refused(TextError, r"'a\\x00b': embedded null"):
        read_files(["a\0b"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "folder" / "secret.txt", b"text")
    path.chmod(0)
    with refused(TextError, r"Cannot read '.*secret\.txt': Permission denied"):
        read_files([path])
    path.parent.chmod(0)
    try:
        with refused(TextError, "Permission denied"):
            read_files([tmp_path])  # a folder that is passed over would go unnoticed
        with refused(TextError, "Permission denied"):
            read_files([path])
    finally:
        path.parent.chmod(stat.S_IRWXU)


def test_arguments_of_load(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"text")
    with refused(UsageError, "Both text files and a corpus"):
        load([path], corpus="builtin")
    with refused(UsageError, "No text was given", "builtin|timemachine|tinyshakespeare"):
        load()
    with refused(UsageError, "One of the paths is empty"):
        load([path, ""])
    with refused(UsageError, "no corpus named 'TimeMashine'", "Did you mean timemachine", ", ".join(CORPORA)):
        load(corpus="TimeMashine")
    with refused(UsageError, r"named '\\x1b'", "The corpora are builtin, timemachine, tinyshakespeare"):
        load(corpus="\x1b")
    with refused(UsageError, "no corpus named 'builtin'"):
        download("builtin")


# -------------------------------------------------------------------------------------------- download


@contextmanager
def server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """The address of a server that gives this answer to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_address[1]}"
        finally:
            httpd.shutdown()
            thread.join()


def sends(content: bytes, status: int = 200, length: int | None = None) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status, "Whatever\x1b[31m")
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    return answer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory, and GOOD as what the corpora should be."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LONGSHORT_CACHE", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("LONGSHORT_CORPUS_URL", raising=False)
    for name in corpus.SOURCES:
        monkeypatch.setitem(corpus.SOURCES, name, (f"http://127.0.0.1:9/{name}.txt", GOOD_SHA256))
    return folder


def test_download_then_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    asked = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(handler.path)
        sends(GOOD)(handler)

    with server(answer) as url:
        monkeypatch.setenv("LONGSHORT_CORPUS_URL", f"{url}/mirror/")
        first = load(corpus="timemachine")
    assert first == Text(GOOD.decode(), "timemachine", GOOD_SHA256)
    assert asked == ["/mirror/timemachine.txt"]
    assert [path.name for path in cache.iterdir()] == ["timemachine.txt"]
    assert capfd.readouterr() == ("", ""), "pooch was not quiet"

    # From here on there is no server, and neither pooch nor requests is needed.
    monkeypatch.setitem(sys.modules, "pooch", None)
    assert load(corpus="timemachine") == first


def test_corrupted_cache_is_replaced(cache: Path, tmp_path: Path) -> None:
    kept = write(cache / "timemachine.txt", GOOD[:-1])
    with server(sends(GOOD)) as url:
        assert download("timemachine", base_url=url).content == GOOD.decode()
        assert kept.read_bytes() == GOOD
        other = tmp_path / "other"
        assert download("tinyshakespeare", cache_dir=other, base_url=url).name == "tinyshakespeare"
        assert (other / "tinyshakespeare.txt").read_bytes() == GOOD


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (sends(GOOD[:-1]), "another SHA-256"),
        (sends(b""), "another SHA-256"),
        (sends(GOOD[:5000], length=len(GOOD)), "cut off"),
        (sends(b"not here", status=404), "answered 404"),
        (sends(GOOD, status=503), "answered 503"),
        (lambda handler: handler.wfile.write(b"\x00 this is no HTTP"), "no answer"),
    ],
)
def test_failed_download_leaves_nothing(
    cache: Path, answer: Callable[[BaseHTTPRequestHandler], None], reason: str
) -> None:
    with server(answer) as url, refused(CorpusError, reason, f"{url}/timemachine.txt", "--data-dir"):
        download("timemachine", base_url=url)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("begins", [False, True])
def test_server_that_falls_silent(cache: Path, monkeypatch: pytest.MonkeyPatch, begins: bool) -> None:
    monkeypatch.setattr(corpus, "TIMEOUT", 0.2)
    over = threading.Event()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        if begins:
            sends(GOOD[:5000], length=len(GOOD))(handler)
        over.wait(10)

    with server(answer) as url:
        try:
            with at_most(5), refused(CorpusError, "no answer", f"{url}/timemachine.txt", "--data-dir"):
                download("timemachine", base_url=url)
        finally:
            over.set()
    assert list(cache.iterdir()) == []


def test_no_server(cache: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with refused(CorpusError, "no answer", f"http://127.0.0.1:{port}/timemachine.txt", "--data-dir"):
        download("timemachine", base_url=f"http://127.0.0.1:{port}")
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("base_url", ["", "file:///etc", "nonsense", "http://", "http://\x1b[31m/"])
def test_address_that_is_none(cache: Path, base_url: str) -> None:
    # The empty one stands for unset: then the corpus's own address is asked, where the fixture has no server.
    with refused(CorpusError, "Cannot download the corpus timemachine", "--data-dir"):
        download("timemachine", base_url=base_url)


def test_failed_download_keeps_a_damaged_cache_from_being_used(cache: Path) -> None:
    kept = write(cache / "timemachine.txt", b"damaged")
    with server(sends(b"damaged")) as url, refused(CorpusError, "another SHA-256"):
        download("timemachine", base_url=url)
    assert [path.name for path in cache.iterdir()] == [kept.name]


def test_cache_that_cannot_be_written(cache: Path) -> None:
    write(cache, b"a file, where the cache directory should be")
    with server(sends(GOOD)) as url, refused(CorpusError, "Cannot keep", "LONGSHORT_CACHE", "--data-dir"):
        download("timemachine", base_url=url)


def test_download_without_pooch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with refused(MissingExtraError, "needs pooch", r"pip install 'longshort\[train\]'"):
        download("timemachine")


def test_data_dir(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    missing = f"no '{re.escape(str(folder))}/timemachine.txt' with SHA-256 {GOOD_SHA256}"
    for content in [None, GOOD + b" ", b""]:
        if content is not None:
            write(folder / "timemachine.txt", content)
        with refused(CorpusError, missing, "Download it from http://127.0.0.1:9/timemachine.txt"):
            load(corpus="timemachine", data_dir=folder)
    write(folder / "timemachine.txt", GOOD)
    assert load(corpus="timemachine", data_dir=folder) == Text.of(GOOD.decode(), "timemachine")
    assert not cache.exists()


def test_data_dir_that_holds_a_pipe(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "timemachine.txt")
    with at_most(5), refused(CorpusError, "There is no"):
        load(corpus="timemachine", data_dir=tmp_path)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data beside the repository is not there")
@pytest.mark.parametrize(("name", "characters"), [("timemachine", 178_979), ("tinyshakespeare", 1_115_394)])
def test_the_real_files_have_the_hashes_we_ask_for(name: str, characters: int) -> None:
    text = load(corpus=name, data_dir=DATA)
    assert (text.name, text.characters, text.sha256) == (name, characters, corpus.SOURCES[name][1])


def test_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv("LONGSHORT_CACHE", raising=False)
    for place in ["/elsewhere", ""]:
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        assert cache_directory() == pooch.os_cache("longshort")
    monkeypatch.setenv("LONGSHORT_CACHE", "/mine")
    assert cache_directory() == Path("/mine")


# --------------------------------------------------------------------------------------- built-in text


@pytest.fixture(scope="module")
def builtin_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache directory that holds the built-in text, parsed once for all tests of this file."""
    folder = tmp_path_factory.mktemp("builtin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSHORT_CACHE", str(folder))
        builtin.cache_clear()
        builtin()
        yield folder
    builtin.cache_clear()


def paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]


def test_builtin_is_printable_english_without_repetition(builtin_cache: Path) -> None:
    text = load(corpus="builtin")
    if text.name == "builtin-grammar":
        pytest.skip("this Python was stripped of its docstrings")
    assert text.name == "builtin"
    assert text.sha256 == hashlib.sha256(text.content.encode()).hexdigest()
    assert 300_000 < text.characters < 5_000_000
    assert set(text.content) <= {"\n", *map(chr, range(32, 127))}
    found = paragraphs(text.content)
    assert len(found) == len(set(found))
    assert "" not in found
    assert text.content.lower().count(" the ") > text.characters / 500, "this is not English"


def test_builtin_ends_with_the_same_kind_of_text(builtin_cache: Path) -> None:
    pydoc_data = pytest.importorskip("pydoc_data.topics")
    reference = set(paragraphs(compose(pydoc_data.topics)))
    content = builtin().content

    def share(part: str) -> float:
        return sum(len(p) for p in paragraphs(part) if p in reference) / len(part)

    assert share(content[-len(content) // 10 :]) == pytest.approx(share(content), rel=0.3)


def test_builtin_comes_from_the_cache_only_when_whole(builtin_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = builtin()
    [kept] = builtin_cache.iterdir()
    whole = kept.read_bytes()
    parsed = []

    def parse(library: Path) -> dict[str, str]:
        parsed.append(library)
        return {"module": "\n\n".join(f"Paragraph {i} has some words." for i in range(10_000))}

    monkeypatch.setattr(builtin_module, "_docstrings", parse)
    builtin.cache_clear()
    assert builtin() == text
    assert parsed == []
    for damaged in [whole[:-1], whole[:30], b"", whole.replace(b"the", b"teh", 1)]:
        kept.write_bytes(damaged)
        builtin.cache_clear()
        assert "Paragraph 9999 has some words." in builtin().content
    assert len(parsed) == 4
    assert [path.name for path in builtin_cache.iterdir()] == [kept.name]
    kept.write_bytes(whole)
    builtin.cache_clear()
    assert builtin() == text


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A standard library of a few files in place of the real one, and no language reference."""
    library = tmp_path / "library"
    docstrings = builtin_module._docstrings
    monkeypatch.setattr(builtin_module, "_docstrings", lambda _: docstrings(library))
    monkeypatch.setattr(builtin_module, "_topics", dict)
    monkeypatch.setattr(builtin_module, "MINIMUM", 1)
    monkeypatch.setenv("LONGSHORT_CACHE", str(tmp_path / "cache"))
    builtin.cache_clear()
    yield library
    builtin.cache_clear()


def test_docstrings_are_taken_in_order_cleaned_and_once(small_library: Path) -> None:
    source = '''
"""A module.

    Indented\there.
"""
def f():
    "Function."
    "Not a docstring."
    class Inner:
        """Inner   class."""
class C:
    """Class.

    A   module.

    Trailing space: \\n
      kept indentation
    """
    async def g(self):
        "Caf\\xe9: dropped.\\n\\n\\x07Dropped too.\\n\\nIt\\u2019s \\u201ckept\\u201d."
bad = "\\d"  # only a warning
'''
    write(small_library / "package" / "module.py", source.encode())
    for skipped in ["test/a.py", "x/tests/b.py", "idlelib/c.py", "site-packages/d.py", "encodings/e.py", "f.txt"]:
        write(small_library / skipped, b'"""Not to be seen."""')
    write(small_library / "broken.py", b'"""Broken."""\ndef')
    write(small_library / "null.py", b'"""Null."""\0')
    write(small_library / "latin.py", b'# coding: latin-1\n"""Latin \xe9.\n\nFrom latin."""')
    module = (
        "A module.\n\nIndented    here.\n\nFunction.\n\nInner   class.\n\nClass.\n\n"
        'Trailing space:\n\n  kept indentation\n\nIt\'s "kept".'
    )
    text = builtin()
    assert text.name == "builtin"
    # The order of the two files has no meaning.
    assert text.content in (f"{module}\n\nFrom latin.\n", f"From latin.\n\n{module}\n")


def test_builtin_does_not_need_a_cache(small_library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(small_library / "a.py", b'"""Words."""')
    write(tmp_path / "file", b"")
    monkeypatch.setenv("LONGSHORT_CACHE", str(tmp_path / "file" / "below"))
    assert builtin() == Text.of("Words.\n", "builtin")

    def nobody() -> Path:
        raise CorpusError("There is no home directory.")

    monkeypatch.setattr(builtin_module, "cache_directory", nobody)
    builtin.cache_clear()
    assert builtin() == Text.of("Words.\n", "builtin")


def test_python_without_docstrings_gets_the_grammar(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_module, "FALLBACK", 5000)
    text = load(corpus="builtin")
    assert text.name == "builtin-grammar"
    assert text.characters == 5000
    assert not cache_directory().exists(), "a fallback that is kept would outlive its reason"


def test_language_reference_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(builtin_module._topics()) > 50
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert builtin_module._topics() == {}


def test_builtin_does_not_depend_on_the_order_of_sets_and_folders(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"{i % 7}" / f"{i}.py", f'"""Shared {i % 5}.\n\nOwn {i}."""'.encode())
    program = (
        "import sys; from pathlib import Path; from longshort.text import builtin as b;"
        "print(b.compose({'t': 'Topic.', 'u': 'Shared 1.'}, b._docstrings(Path(sys.argv[1]))))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().count("Shared") == 5


# What paragraphs are made of, and what must not get through, half a surrogate pair included.
documents = st.dictionaries(st.text(), st.text(st.sampled_from("ab.\n\n\n \t\r\f\x07\xa0\u2019\u2026\xe9\ud800")))


@settings(max_examples=200, deadline=None)
@given(st.lists(documents, max_size=3))
def test_compose_of_anything_is_clean_and_once(kinds: list[dict[str, str]]) -> None:
    text = compose(*kinds)
    assert set(text) <= {"\n", *map(chr, range(32, 127))}
    found = paragraphs(text) if text else []
    assert len(found) == len(set(found))
    assert "" not in found


def test_compose_mixes_kinds_evenly() -> None:
    few = {f"few {i}": f"few {i} " + "x" * 90 for i in range(100)}
    many = {f"many {i}": f"many {i} " + "y" * 90 for i in range(900)}
    lines = compose(few, many).split("\n\n")
    for start in range(0, 1000, 100):
        assert 9 <= sum("few" in line for line in lines[start : start + 100]) <= 11
