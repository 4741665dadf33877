"""One model for many who ask at once: a thread of its own writes all their texts side by side.

A text joins the others between two calls of the native loop and leaves when it is done, so nobody waits for another's
end, and the weights are read once a step for all. Each text is the one that it would be alone.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longshort.generation import Request, Writing
from longshort.scoring import LineModel

READ_AT_ONCE = 4096
"""Characters of prompts that are read between two steps of the texts, unless a single job has more."""


@dataclass(frozen=True)
class Piece:
    """What has become certain of a text."""

    number: int
    """Of the text among those of its job."""
    text: str
    end: str | None = None
    """Of the last piece, why it is the last: `stop` (a stop text came), `length`, or `time`."""


Tell = Callable[[list[Piece] | Exception], None]
"""Is called by the scheduler's thread with what a job's texts have grown by, or with the error that ended the job."""


@dataclass(eq=False)
class Job:
    """Texts that were asked for together."""

    requests: Sequence[Request]
    tell: Tell
    until: float
    """By `time.monotonic`."""
    cancelled: bool = False

    def cancel(self) -> None:
        """Nobody waits for it any more; from any thread."""
        self.cancelled = True


class Scheduler:
    """Runs a model in a thread: texts side by side, and between their steps whatever else it is asked.

    Args:
        model: with its tokenizer.
    """

    def __init__(self, model: LineModel) -> None:
        self._writing = Writing(model, model.tokenizer)
        self._places: dict[int, tuple[Job, int]] = {}
        self._asked: deque[Job | Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._open = True
        self.characters = 0
        """Written since the start, for whoever watches."""
        self._thread = threading.Thread(target=self._run, name="longshort-scheduler", daemon=True)
        self._thread.start()

    @property
    def texts(self) -> int:
        """How many are being written."""
        return len(self._places)

    def write(self, requests: Sequence[Request], tell: Tell, seconds: float) -> Job:
        """Have texts written; `tell` gets the pieces as they come, and of each text one with an `end`.

        Args:
            requests: the texts.
            tell: is called by the scheduler's thread, and must not block it.
            seconds: the most time from now on; what is not written by then is left away.
        """
        job = Job(requests, tell, time.monotonic() + seconds)
        self._ask(job)
        return job

    def call(self, function: Callable[[], Any], tell: Callable[[Any], None]) -> None:
        """Have `function` called between two steps of the texts; `tell` gets its result, or the exception it raised."""

        def run() -> None:
            try:
                found = function()
            except Exception as error:
                found = error
            tell(found)

        self._ask(run)

    def close(self) -> None:
        """End the thread, and with it what is being written."""
        with self._wake:
            self._open = False
            self._wake.notify()
        self._thread.join()

    def _ask(self, what: Job | Callable[[], None]) -> None:
        with self._wake:
            self._asked.append(what)
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._asked or self._places or not self._open)
                if not self._open:
                    return
            self._answer()
            self._advance()

    def _answer(self) -> None:
        """Start what has been asked for; of many prompts a part, so that texts that are being written do not wait."""
        read = 0
        while self._asked and read < READ_AT_ONCE:
            what = self._asked.popleft()
            if isinstance(what, Job):
                self._begin(what)
                read += sum(len(request.prompt) for request in what.requests)
            else:
                what()
                read = READ_AT_ONCE

    def _begin(self, job: Job) -> None:
        numbers = []
        try:
            for place, request in enumerate(() if job.cancelled else job.requests):
                numbers.append(self._writing.add(request))
                self._places[numbers[-1]] = job, place
        except Exception as error:  # this job's alone: the thread goes on for the others
            self._drop(numbers)
            job.tell(error)

    def _drop(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._writing.drop(number)
            del self._places[number]

    def _advance(self) -> None:
        now = time.monotonic()
        for number, (job, place) in list(self._places.items()):
            if job.cancelled or now > job.until:
                self._drop([number])
                if not job.cancelled:
                    job.tell([Piece(place, "", "time")])
        pieces = dict.fromkeys(self._places, "")
        try:
            for number, piece in self._writing.advance():
                pieces[number] += piece
        except Exception as error:  # such as memory that there is not: of all that are being written
            jobs = {job for job, _ in self._places.values()}
            self._drop(list(self._places))
            for job in jobs:
                job.tell(error)
            return
        ended, news = dict(self._writing.ended), dict[Job, list[Piece]]()
        for number, piece in pieces.items():
            job, place = self._places[number]
            self.characters += len(piece)
            if number in ended:
                del self._places[number]
                news.setdefault(job, []).append(Piece(place, piece, "stop" if ended[number] else "length"))
            elif piece:
                news.setdefault(job, []).append(Piece(place, piece))
        for job, of_job in news.items():
            job.tell(of_job)
