"""Signals that ask a program to end: finish what must be finished, then end; the second one ends it at once.

    with Interruption() as interruption:
        read_the_text()                      # a signal raises Interrupted here
        with interruption.deferred():
            while not interruption.wanted():     # and here it is only noted
                ...

Exit status: 128 and the number of the signal, so 130 for SIGINT (Ctrl-C), 143 for SIGTERM, 129 for SIGHUP.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end.

    Args:
        number: of the signal.
        words: what became of the work, for the user.
    """

    def __init__(self, number: int, words: str = "interrupted.") -> None:
        super().__init__(words)
        self.words = words
        self.exit_code = 128 + number


class Interruption:
    """The wish to end that a signal brings. A context of the main thread; elsewhere it has no effect."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The number of the first signal that came."""
        self._deferred = False
        self._before: dict[int, Any] = {}

    def wanted(self) -> bool:
        """Return whether a signal has come."""
        return self.signal is not None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note a first signal while this lasts, instead of raising Interrupted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def __enter__(self) -> Interruption:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in _SIGNALS:
            if number.name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # as under nohup, which wants just that
            self._before[number] = signal.signal(number, self._receive)
        # Python runs a handler only between two of its own instructions, and a step in the kernels may be long. The
        # system's own handler writes to this pipe at once, so a thread sees the second signal whatever runs.
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.close(self._write)  # the thread reads the end of the pipe and closes the other side
            self._watcher.join()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number if self.signal is None else self.signal
        if not self._deferred:
            raise Interrupted(number)

    def _watch(self) -> None:
        """Count signals as they come; at the second end the process, without waiting for anything."""
        come = 0
        while data := os.read(self._read, 16):
            come += sum(number in self._before for number in data)
            if come > 1:
                if sys.stderr.isatty():
                    os.write(sys.stderr.fileno(), b"\x1b[?25h\n")  # a live display hides the cursor
                os._exit(128 + data[-1])
        os.close(self._read)
