"""Frames on the pipes of an engine process: a kind, a length in bytes, and that many bytes."""

from __future__ import annotations

import struct

__all__ = ["EVALUATE", "FAILED", "HEAD", "MAX_LENGTH", "MISSING", "OUTCOMES", "READY"]

HEAD = struct.Struct("<cQ")
"""Kind and length, before every message."""
MAX_LENGTH = 2**36
"""No message is longer, in bytes; a greater length means that something else wrote to the pipe."""

EVALUATE = b"E"
"""To the process: templates it lacks, and a payload."""
READY = b"R"
"""From the process, once: the versions it runs, as JSON."""
OUTCOMES = b"O"
"""From the process: packed outcomes."""
MISSING = b"M"
"""From the process: a JSON list of the templates it dropped; nothing was evaluated."""
FAILED = b"F"
"""From the process, as its last words: why it could not start."""
