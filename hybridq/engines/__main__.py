"""The engine process: ``python -m hybridq.engines PARENT_PID MAX_BYTES SPIN``, started by `hybridq.engines.process`."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, even in the middle of a circuit (Linux).

    Elsewhere the end of the pipe does it, after the circuit.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before this could be asked for
        os._exit(1)


if __name__ == "__main__":
    _die_with(int(sys.argv[1]))  # before anything that takes time is imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to decide about

    from hybridq.engines.server import serve

    serve(int(sys.argv[2]), float(sys.argv[3]))
