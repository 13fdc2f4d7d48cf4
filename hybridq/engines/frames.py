"""Frames on the pipes of an engine process: a kind, a length in bytes, and that many bytes."""

from __future__ import annotations

import functools
import os
import select
import struct
import time

__all__ = [
    "ADVANCE", "EVALUATE", "FAILED", "HEAD", "MAX_LENGTH", "MISSING", "OUTCOMES", "PART", "READY", "SEARCH_PATH",
    "Spin",
]  # fmt: skip

HEAD = struct.Struct("<cQ")
"""Kind and length, before every message."""
MAX_LENGTH = 2**36
"""No message is longer, in bytes; a greater length means that something else wrote to the pipe."""

EVALUATE = b"E"
"""To the process: templates it lacks, and a payload."""
ADVANCE = b"A"
"""To the process: templates it lacks, and a slice of a loop."""
READY = b"R"
"""From the process, once: the versions it runs, as JSON."""
OUTCOMES = b"O"
"""From the process: packed outcomes, or what a slice of a loop came to."""
PART = b"P"
"""From the process, before the outcome: what a slice of a loop has come to since the last one."""
MISSING = b"M"
"""From the process: a JSON list of the templates it dropped; nothing was evaluated."""
FAILED = b"F"
"""From the process, as its last words: why it could not start."""

SEARCH_PATH = "HYBRIDQ_SEARCH_PATH"
"""Of the process' environment: the parent's folders of modules, where functions that return backends may be."""


class Spin:
    """Looks for a message again and again before it is waited for, where that is likely to pay.

    A process that sleeps wakes up late, by a tenth of a millisecond on a virtual machine, and with cold caches. Each
    look offers the core to whoever else wants it. A core that was taken, or ``seconds`` without a message that was
    expected, ends the looking, here and for the next messages, for ever more of them while it stays like that.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._rest = 0
        """Messages that are waited for without a look."""
        self._missed = 0
        """How often in a row looking did not pay."""

    def __call__(self, poll: select.poll, expected: float = 0.0) -> bool:
        """Whether the pipe can be used now; else it is to be waited for.

        Where the message is ``expected`` in some milliseconds, the looking begins a little before: until then it sleeps
        as well. One that is expected in more than `_LONG` seconds is not looked for.
        """
        if not self._seconds or expected > _LONG:
            return False
        if self._rest:
            self._rest -= 1
            return False
        now = time.perf_counter()
        end = now + expected + self._seconds
        nap = int(1e3 * expected) - 1  # in whole milliseconds, as `poll` has it, and it wakes up late
        if nap > 0:
            if poll.poll(nap):
                return True
            now = time.perf_counter()
        while not poll.poll(0):
            _offer_core()
            before, now = now, time.perf_counter()
            if now >= end or now - before > _TAKEN:
                self._missed = min(self._missed + 1, 7)
                self._rest = 2**self._missed
                return False
        self._missed = 0
        return True


_LONG = 0.05
"""Seconds beside which it does not count that who sleeps wakes up late."""
_offer_core = getattr(os, "sched_yield", functools.partial(time.sleep, 0))  # macOS has no sched_yield
_TAKEN = 2e-4
"""Seconds between two looks after which another process had the core."""
