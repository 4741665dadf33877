"""Every exception that a user of longshort can meet.

    LongshortError              what went wrong in words for its reader; exit status 1
    ├── UsageError              a flag or an argument that cannot be right; exit status 2
    │   └── ConfigError         a value outside its range, in a flag, a TOML file or a dataclass
    ├── TextError               a text that cannot be read or is too small to use
    ├── CorpusError             a named corpus that cannot be had: no network, wrong checksum
    ├── VocabularyError         a symbol that the model never saw, where that cannot be passed over
    ├── CheckpointError         a run or model directory that is missing, damaged or of another kind
    ├── OutputError             a place that cannot be written
    ├── TrainingError           training that cannot go on, such as a loss that is not finite
    └── MissingExtraError       a part that was not installed; the message holds the command that installs it

    NativeWarning               a RuntimeWarning: the native kernels are missing, something slower runs

A message says what happened and, in `hint`, what to do. `str(error)` is both, at most three lines.
"""

from __future__ import annotations


class LongshortError(Exception):
    """Base of all errors that longshort raises on purpose.

    Args:
        what: what happened, with what was wanted and what was given.
        hint: what to do about it; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


class UsageError(LongshortError):
    """A flag or an argument that cannot be right."""

    exit_code = 2


class ConfigError(UsageError, ValueError):
    """A value outside its range. Also a `ValueError`, for users of the Python interface."""


class TextError(LongshortError):
    """A text that cannot be read or is too small to use."""


class CorpusError(LongshortError):
    """A named corpus that cannot be had."""


class VocabularyError(LongshortError):
    """A symbol that the model never saw."""


class CheckpointError(LongshortError):
    """A run or model directory that is missing, damaged or of another kind."""


class OutputError(LongshortError):
    """A place that cannot be written."""


class TrainingError(LongshortError):
    """Training that cannot go on."""


class MissingExtraError(LongshortError):
    """A part of longshort that was not installed."""

    def __init__(self, package: str, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs {package}, which is not installed.",
            f"Install it with: pip install 'longshort[{extra}]'",
        )


class NativeWarning(RuntimeWarning):
    """The native kernels are missing, so that something slower runs."""
