"""Points at which a test can make this process die, or a write fail; nothing happens at them otherwise.

``HYBRIDQ_FAULT="append.before:3:kill"`` ends the process with SIGKILL when it passes the point ``append.before`` for
the third time; ``ENOSPC``, ``EDQUOT``, ``EIO`` or ``EFBIG`` in the place of ``kill`` raises that `OSError` there. The
name may be a pattern (``*.before``, ``*``), counted over all the points that it matches; several faults are separated
by commas. The variable is read once, when this module is first imported; no result depends on it.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import signal
import threading
from dataclasses import dataclass

__all__ = ["ERRORS", "KILL", "VARIABLE", "faultpoint"]

VARIABLE = "HYBRIDQ_FAULT"
KILL = "kill"
ERRORS = ("ENOSPC", "EDQUOT", "EIO", "EFBIG")


@dataclass
class _Fault:
    pattern: str
    passings: int
    """How many are still to come, the one that fails among them."""
    action: str


def _faults(text: str) -> list[_Fault]:
    found = []
    for part in text.split(",") if text else []:
        pattern, _, rest = part.partition(":")
        passings, _, action = rest.partition(":")
        if not (pattern and passings.isdecimal() and (action == KILL or action in ERRORS)):
            raise ValueError(f"{VARIABLE}={text!r}: {part!r} is not NAME:NUMBER:ACTION with one of {(KILL, *ERRORS)}.")
        found.append(_Fault(pattern, int(passings), action))
    return found


_asked = _faults(os.environ.get(VARIABLE, ""))
_lock = threading.Lock()


def faultpoint(name: str) -> None:
    """Fail here, if this is the passing of the point ``name`` that was asked to; raises the `OSError` asked for."""
    if not _asked:
        return
    with _lock:
        due = []
        for fault in _asked:
            if fnmatch.fnmatchcase(name, fault.pattern):
                fault.passings -= 1
                if fault.passings == 0:
                    due.append(fault.action)
    for action in due:
        if action == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, action)
        raise OSError(code, os.strerror(code))
