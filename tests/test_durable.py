from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from failing import nth_call_fails
from longshort.durable import append_line, require_writable_directory, set_aside, write_directory, write_file
from longshort.errors import OutputError

OLD, NEW = {"a": b"old"}, {"a": b"new", "b": b"more"}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def content(directory: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in directory.iterdir()}


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What reaches the system, temporary names written as TMP; fsync with the size of the file at that moment."""
    events: list[tuple[Any, ...]] = []
    opened: dict[int, str] = {}
    real_open, real_write, real_fsync, real_mkdir = os.open, os.write, os.fsync, os.mkdir
    real_replace, real_rename = os.replace, os.rename

    def named(path: Any) -> str:
        return "/".join("TMP" if part.endswith(".tmp") else part for part in Path(path).parts[-2:])

    def spy_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        descriptor = real_open(path, flags, *args, **kwargs)
        opened[descriptor] = named(path)
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            events.append(("create", opened[descriptor]))
        return descriptor

    def spy_write(descriptor: int, data: Any) -> int:
        written = real_write(descriptor, data[:7])  # short writes are allowed, so they must not matter
        if events[-1][0] != "write":
            events.append(("write", opened[descriptor]))
        return written

    def spy_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        size = status.st_size if stat.S_ISREG(status.st_mode) else "directory"
        events.append(("fsync", opened[descriptor], size))
        real_fsync(descriptor)

    def spy_move(kind: str, real: Callable[..., None]) -> Callable[..., None]:
        def move(source: Any, target: Any) -> None:
            events.append((kind, named(source), named(target)))
            real(source, target)

        return move

    def spy_mkdir(path: Any, mode: int = 0o777) -> None:
        events.append(("mkdir", named(path)))
        real_mkdir(path, mode)

    monkeypatch.setattr(os, "open", spy_open)
    monkeypatch.setattr(os, "write", spy_write)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "mkdir", spy_mkdir)
    monkeypatch.setattr(os, "replace", spy_move("rename", real_replace))
    monkeypatch.setattr(os, "rename", spy_move("rename", real_rename))
    return events


def test_order_of_calls_for_a_file(tmp_path: Path, trace: list[tuple[Any, ...]]) -> None:
    home = tmp_path.name
    parent = "/".join(tmp_path.parts[-2:])
    write_file(tmp_path / "f", b"x" * 100)
    assert trace == [
        ("create", f"{home}/TMP"),
        ("write", f"{home}/TMP"),
        ("fsync", f"{home}/TMP", 100),
        ("rename", f"{home}/TMP", f"{home}/f"),
        ("fsync", parent, "directory"),
    ]
    assert content(tmp_path) == {"f": b"x" * 100}


def test_order_of_calls_for_a_directory(tmp_path: Path, trace: list[tuple[Any, ...]]) -> None:
    home = tmp_path.name
    parent = "/".join(tmp_path.parts[-2:])
    written = [
        ("mkdir", f"{home}/TMP"),
        ("create", "TMP/a"),
        ("write", "TMP/a"),
        ("fsync", "TMP/a", 3),
        ("create", "TMP/b"),
        ("write", "TMP/b"),
        ("fsync", "TMP/b", 4),
        ("fsync", f"{home}/TMP", "directory"),
    ]
    published = [("rename", f"{home}/TMP", f"{home}/d"), ("fsync", parent, "directory")]
    write_directory(tmp_path / "d", NEW)
    assert trace == [*written, *published]
    trace.clear()
    write_directory(tmp_path / "d", NEW)
    assert trace == [*written, ("rename", f"{home}/d", f"{home}/.d.old"), *published]
    assert names(tmp_path) == ["d"]
    assert content(tmp_path / "d") == NEW


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_nth_call_fails_for_a_file(tmp_path: Path, code: int) -> None:
    path = tmp_path / "f"
    for number in range(1, 7):  # open, write, fsync, replace, open, fsync
        path.write_bytes(b"old")
        with nth_call_fails(number, code), pytest.raises(OutputError, match=re.escape(str(path))):
            write_file(path, b"new")
        assert content(tmp_path) == {"f": b"old" if number <= 4 else b"new"}
    with nth_call_fails(7, code) as calls:
        write_file(path, b"newer")
    assert len(calls) == 6
    assert content(tmp_path) == {"f": b"newer"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("replaces", [False, True])
def test_nth_call_fails_for_a_directory(tmp_path: Path, code: int, replaces: bool) -> None:
    number = 0
    while True:
        number += 1
        home = tmp_path / str(number)
        home.mkdir()
        path = home / "d"
        if replaces:
            write_directory(path, OLD)
        with nth_call_fails(number, code) as calls:
            try:
                write_directory(path, NEW)
            except OutputError:
                assert names(home) == (["d"] if replaces else [])
                assert not replaces or content(path) == OLD
            else:
                assert content(path) == NEW
        if len(calls) < number:
            break
    assert number > 10


def test_interrupt_leaves_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_directory(tmp_path / "d", OLD)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "d", NEW)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "f", b"new")
    assert names(tmp_path) == ["d"]
    assert content(tmp_path / "d") == OLD


def test_write_after_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "d"
    write_directory(path, OLD)
    path.rename(set_aside(path))  # where the kill left it
    with nth_call_fails(1, errno.ENOSPC), pytest.raises(OutputError):
        write_directory(path, NEW)
    assert content(set_aside(path)) == OLD  # the only complete one, so it stays until another is in place
    write_directory(path, NEW)
    assert names(tmp_path) == ["d"]
    write_directory(set_aside(path), OLD)  # killed after both renames, before the old one was deleted
    write_directory(path, {"c": b"newest"})
    assert names(tmp_path) == ["d"]
    assert content(path) == {"c": b"newest"}


def test_directory_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    write_directory(tmp_path / "d", OLD)
    (tmp_path / "link").symlink_to("d")
    write_directory(tmp_path / "link", NEW)
    assert names(tmp_path) == ["d", "link"]
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "d") == NEW


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(b"mine")
    with pytest.raises(OutputError, match="not a directory"):
        write_directory(tmp_path / "d", NEW)
    assert content(tmp_path) == {"d": b"mine"}


@pytest.mark.parametrize(("mask", "file_mode", "directory_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_follow_the_umask(tmp_path: Path, mask: int, file_mode: int, directory_mode: int) -> None:
    with umask(mask):
        write_file(tmp_path / "f", b"x")
        write_file(tmp_path / "f", b"y")
        append_line(tmp_path / "lines", "x")
        write_directory(tmp_path / "d", OLD)
    for name, mode in {"f": file_mode, "lines": file_mode, "d": directory_mode, "d/a": file_mode}.items():
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "No space left on {path}: needs 2.4 MB"),
        (errno.EDQUOT, "Disk quota used up on {path}: needs 2.4 MB"),
        (errno.EFBIG, "File size limit reached on {path}: needs 2.4 MB"),
        (errno.EACCES, "Cannot write {path}: permission denied."),
        (errno.EROFS, "Cannot write {path}: read-only file system."),
        (errno.EIO, "Cannot write {path}: input/output error."),
    ],
)
def test_messages_say_what_failed_and_what_to_do(tmp_path: Path, code: int, words: str) -> None:
    path = tmp_path / "f"
    with nth_call_fails(1, code), pytest.raises(OutputError) as caught:
        write_file(path, bytes(2_345_678))
    assert words.format(path=path) in caught.value.what
    assert caught.value.hint.endswith(".")
    assert len(str(caught.value).splitlines()) <= 3
    assert isinstance(caught.value.__cause__, OSError)


def test_network_file_systems_without_directory_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "f", b"x")
    write_directory(tmp_path / "d", NEW)
    assert content(tmp_path / "d") == NEW


def test_append_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_line(path, "one")
    append_line(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "one\nzwei ü\n"
    with pytest.raises(ValueError, match="more than one line"):
        append_line(path, "a\nb")

    real, calls = os.write, []

    def fills_up(descriptor: int, data: Any) -> int:
        calls.append(data)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:2])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(OutputError, match="No space left"):
        append_line(path, "three")
    assert path.read_text(encoding="utf-8") == "one\nzwei ü\n"


def test_append_line_to_a_full_device() -> None:
    with pytest.raises(OutputError, match="No space left on /dev/full"):
        append_line(Path("/dev/full"), "x")


def test_require_writable_directory(tmp_path: Path) -> None:
    require_writable_directory(tmp_path / "new" / "deep")
    require_writable_directory(tmp_path / "new" / "deep")
    assert names(tmp_path / "new" / "deep") == []
    for number in (1, 2, 3):  # open, write, fsync: the directory is there already
        with nth_call_fails(number + 1, errno.EROFS), pytest.raises(OutputError, match="read-only"):
            require_writable_directory(tmp_path)
    assert names(tmp_path) == ["new"]
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/longshort")):
        with pytest.raises(OutputError, match="Cannot write"):
            require_writable_directory(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_require_writable_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        for path in (tmp_path, tmp_path / "below"):
            with pytest.raises(OutputError, match="permission denied"):
                require_writable_directory(path)
    finally:
        tmp_path.chmod(0o755)


def test_file_size_limit_of_the_process(tmp_path: Path) -> None:
    script = """
import resource, sys
from pathlib import Path
from longshort.durable import write_file
from longshort.errors import OutputError
path = Path(sys.argv[1])
write_file(path, b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_file(path, bytes(1_000_000))
except OutputError as error:
    print(error)
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "f")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"File size limit reached on {tmp_path / 'f'}: needs 1.0 MB")
    assert len(done.stdout.splitlines()) <= 3
    assert content(tmp_path) == {"f": b"old"}
