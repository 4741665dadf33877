"""Files and directories that are there whole or not at all, whatever stops the program or the machine.

    open .NAME.RANDOM.tmp -> write -> fsync -> rename to NAME -> fsync(directory)

The temporary name is in the same directory, as a rename cannot cross file systems, and random, so that two
writers never share one. The file is fsynced before the rename, or a crash could leave the final name on an
empty file; the directory is fsynced after it, because names are the directory's data. Whatever fails, what
was begun is removed and an `OutputError` says why.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from longshort.errors import OutputError

_SHORT_OF = {
    errno.ENOSPC: "No space left",
    errno.EDQUOT: "Disk quota used up",
    errno.EFBIG: "File size limit reached",
}


_MARGIN = 1 << 16
"""What a checkpoint takes on a disk beside the content of its files, with room to spare."""


def write_file(path: Path, data: bytes) -> None:
    """Write `data` as the file `path`, replacing what was there, with mode 0666 less the umask.

    Raises:
        OutputError: it cannot be written. `path` is as before, or new where only the last step failed.
    """
    temporary = _temporary(path)
    with _explained(path, len(data)):
        try:
            _write_new(temporary, data)
            temporary.replace(path)
            _sync_directory(path.parent)
        except BaseException:  # KeyboardInterrupt too
            with suppress(OSError):
                temporary.unlink()
            raise


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write the directory `path` with exactly `files`, content by plain name, replacing what was there.

    A directory that holds files cannot be replaced in one step: the old one is moved to `set_aside(path)`,
    the new one to `path`, then the old one is deleted. Killed between the two moves, `path` is missing and
    the old directory lies complete at `set_aside(path)`: a reader who misses `path` has to look there.

    Raises:
        OutputError: it cannot be written. `path` is as before.
    """
    path = Path(os.path.realpath(path))  # replaces the directory that a link names, not the link
    temporary, old = _temporary(path), set_aside(path)
    moved = published = False
    with _explained(path, sum(len(data) for data in files.values())):
        try:
            temporary.mkdir()
            for name, data in files.items():
                _write_new(temporary / name, data)
            _sync_directory(temporary)
            if path.is_dir():
                shutil.rmtree(old, ignore_errors=True)  # from a write that was killed before it deleted it
                path.rename(old)
                moved = True
            temporary.rename(path)
            published = True
            _sync_directory(path.parent)
        except BaseException:  # back to what was
            with suppress(OSError):
                if published:
                    path.rename(temporary)
                if moved:
                    old.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill, which becomes `path` when the block ends; for files too large to hold.

    What fails within the block leaves nothing behind. Where `path` has come to be meanwhile, it stays as it is.

    Raises:
        OutputError: it cannot be written; also for an OSError within the block.
    """
    temporary = _temporary(path)
    with _explained(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.mkdir()
            yield temporary
            for file in temporary.iterdir():
                _sync(file)
            _sync_directory(temporary)
            try:
                temporary.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
            _sync_directory(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Return where `write_directory` keeps the old directory `path` until the new one is in place."""
    return path.with_name(f".{path.name}.old")


def append_line(path: Path, line: str) -> None:
    """Append `line` and a newline to the file `path`, all or nothing, not fsynced.

    Raises:
        OutputError: it cannot be written.
    """
    if "\n" in line:
        raise ValueError(f"more than one line: {line!r:.80}")
    data = line.encode() + b"\n"
    with _explained(path, len(data)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        size_before = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, data)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size_before)  # half a line would spoil the next one too
            raise
        finally:
            os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until all of the file `path` is on the disk; OutputError where it cannot get there."""
    with _explained(path, 0):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def cut_file(path: Path, size: int) -> None:
    """Leave the first `size` bytes of the file `path`; OutputError where it cannot be written."""
    with _explained(path, size):
        os.truncate(path, size)


def delete_file(path: Path) -> None:
    """Delete the file `path` if there is one; OutputError where it stays."""
    with _explained(path, 0):
        path.unlink(missing_ok=True)


def has_space(directory: Path, size: int) -> bool:
    """Return whether the disk of `directory` has `size` bytes free."""
    return _free(directory) >= size + _MARGIN


def require_space(directory: Path, size: int, what: str = "a checkpoint") -> None:
    """Raise OutputError unless `has_space`; what a quota leaves shows only in writing."""
    if not has_space(directory, size):
        raise OutputError(
            f"No space for {what}: need {_megabytes(size)} MB, have {_free(directory) / 1e6:.1f} MB at {directory}.",
            "Free some space, or choose another place.",
        )


def _free(directory: Path) -> float:
    """Return how many bytes are free on the disk of `directory`, infinity where that cannot be known."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return math.inf


def _megabytes(size: int) -> float:
    return math.ceil(size / 1e5) / 10


def require_writable_directory(path: Path) -> None:
    """Make the directory `path` and its parents, and prove by a file, deleted again, that it can be written.

    Raises:
        OutputError: it cannot.
    """
    probe = _temporary(path / "probe")
    with _explained(path, 1):
        path.mkdir(parents=True, exist_ok=True)
        try:
            _write_new(probe, b"\n")
        finally:
            probe.unlink(missing_ok=True)


def require_place(path: Path) -> None:
    """Prove by a file, deleted again, that the directory `path` can be made and written, or written if it is there.

    Nothing is made on the way to it, as another process may be making the same directory.

    Raises:
        OutputError: it cannot.
    """
    with _explained(path, 1):
        probe = _temporary(_nearest(path) / "probe")
        try:
            _write_new(probe, b"\n")
        finally:
            probe.unlink(missing_ok=True)


def _nearest(path: Path) -> Path:
    """Return `path`, or the first of what is above it that is there."""
    for place in (path, *path.parents):
        with suppress(FileNotFoundError, NotADirectoryError):
            place.lstat()
            return place
    return Path()


def make_directory(path: Path) -> bool:
    """Make the directory `path` and its parents; return False where it is there: of several who try, one gets True.

    Raises:
        OutputError: it cannot be made.
    """
    with _explained(path, 0):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not path.is_dir():
                raise
            return False
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")


def _write_new(path: Path, data: bytes) -> None:
    # The system takes the umask off 0666 by itself; a chmod would need the umask, which cannot be read safely.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:  # one call may write less than it was given
        rest = rest[os.write(descriptor, rest) :]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this
            raise
    finally:
        os.close(descriptor)


@contextmanager
def _explained(path: Path, size: int) -> Iterator[None]:
    """Turn an OSError into an OutputError about `path` and, where space is short, about `size` bytes."""
    try:
        yield
    except OSError as error:
        if error.errno in _SHORT_OF:
            free = ""
            with suppress(OSError):
                free = f", {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free on the disk"
            needed = f"needs {_megabytes(size)} MB" if size else "it needs more"
            what = f"{_SHORT_OF[error.errno]} on {path}: {needed}{free}."
            hint = "Free some space, or choose another place."
        else:
            what = f"Cannot write {path}: {(error.strerror or str(error)).lower()}."
            hint = "Choose another place, or look at the permissions and the disk."
        raise OutputError(what, hint) from error
