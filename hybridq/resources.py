"""What work needs and what devices have: frozen numbers, nothing measured here."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["KINDS", "ROUND_TRIP", "Need", "cores", "format_bytes", "idle_bytes", "parse_bytes", "worker_allowance"]

_UNITS = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Need:
    """What one program or step asks of a device, known before it runs."""

    bytes: int
    """Upper bound of the memory it takes while it runs, in bytes, on top of the device's baseline."""
    seconds: float
    """Estimated time on one thread, in seconds; it decides where work goes, never what it computes."""
    threads: int = 1
    """0: all of the device that it runs on, with nothing beside it."""
    qubits: int = 0
    shots: int = 0


KINDS = ("quantum", "loop", "classical")
"""What a worker runs: programs, slices of loops, steps."""
ROUND_TRIP = 0.012
"""Seconds from handing a task to a Dask cluster to having its result, beyond its run time (measured)."""
_WORKER_BASELINE = 400 * 2**20
_ENGINE_BASELINE = 250 * 2**20


def idle_bytes(slots: int) -> int:
    """What a worker's own process and its ``slots`` engine processes are taken to need when idle, in bytes."""
    return _WORKER_BASELINE + slots * _ENGINE_BASELINE


def worker_allowance(memory_limit: int, slots: int) -> int:
    """Bytes that all programs and steps on one worker may take together.

    Of the worker's ``memory_limit`` (bytes) 5% stay free, and what its own process and its ``slots`` engine processes
    take when idle is set aside (400 and 250 MiB, above what was measured).
    """
    return max(0, int(0.95 * memory_limit) - idle_bytes(slots))


def parse_bytes(text: str | int) -> int:
    """Bytes from ``"1 GiB"``, ``"500 MB"`` or a plain number of bytes.

    Raises ValueError for anything else, negative amounts included.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        amount, unit = float(text), ""
    elif isinstance(text, str):
        digits = text.strip().rstrip("bBkKmMgGtTiI ")
        unit = text.strip()[len(digits) :].strip().lower()
        try:
            amount = float(digits)
        except ValueError:
            raise ValueError(f"{text!r} is not an amount of memory; write it like '1 GiB' or '500 MB'") from None
    else:
        raise ValueError(f"{text!r} is not an amount of memory; write it like '1 GiB' or '500 MB'")
    if unit not in _UNITS or not 0 <= amount < 2**60:
        raise ValueError(f"{text!r} is not an amount of memory; write it like '1 GiB' or '500 MB'")
    return int(amount * _UNITS[unit])


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def format_bytes(amount: int) -> str:
    """``amount`` in the largest binary unit that keeps it at or above one, to three digits."""
    if amount >= 2**100:
        return f"2^{amount.bit_length() - 1} B"
    value = float(amount)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if round(value) < 1024:
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"
