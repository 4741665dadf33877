"""The command line: a verb's words read, its work done, its result shown."""

from __future__ import annotations


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; `verbs.main` has the details."""
    from longshort.cli import verbs

    return verbs.main(arguments)
