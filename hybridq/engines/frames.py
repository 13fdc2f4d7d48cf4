"""Frames on the pipes of an engine process: a kind, a length in bytes, and that many bytes."""

from __future__ import annotations

import os
import select
import struct
import time

__all__ = [
    "ADVANCE", "EVALUATE", "FAILED", "HEAD", "MAX_LENGTH", "MISSING", "OUTCOMES", "READY", "SEARCH_PATH", "spin",
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
MISSING = b"M"
"""From the process: a JSON list of the templates it dropped; nothing was evaluated."""
FAILED = b"F"
"""From the process, as its last words: why it could not start."""

SEARCH_PATH = "HYBRIDQ_SEARCH_PATH"
"""Of the process' environment: the parent's folders of modules, where functions that return backends may be."""


def spin(poll: select.poll, seconds: float) -> bool:
    """Look at a pipe for up to ``seconds``, again and again; whether it can be used.

    A process that sleeps wakes up a tenth of a millisecond late, on a virtual machine later, with cold caches. Whoever
    else wants the core, or the interpreter's lock, has it after each look.
    """
    end = time.perf_counter() + seconds
    while not poll.poll(0):
        if time.perf_counter() >= end:
            return False
        os.sched_yield()
    return True
