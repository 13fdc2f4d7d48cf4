"""Which waiting program goes to which device, with which others: pure, no clock, no I/O, no Dask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hybridq.errors import TooLarge
from hybridq.resources import Device, Need, format_bytes

__all__ = ["Batch", "Free", "Placements", "Refusal", "Waiting", "place"]

MAX_BATCH_SECONDS = 0.5
"""No batch is estimated to hold a device for longer, unless one program alone does."""
MAX_BATCH_PROGRAMS = 256
_WORTH_THE_TRIP = 10.0
"""A program this many times longer than the trip to a device is sent there rather than run at hand."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A program in the queue."""

    need: Need
    alone: bool
    """Whether nothing else in the run could be waiting at the same time: a lone loop, the driver's own code."""


@dataclass(frozen=True, slots=True)
class Free:
    """A device and how many of its slots are free."""

    device: Device
    slots: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Programs that leave together for one slot of a device, by their positions in the queue."""

    device: str
    programs: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """A program that no device can ever run."""

    program: int
    error: TooLarge


@dataclass(frozen=True, slots=True)
class Placements:
    """Decisions; programs in neither list go on waiting."""

    batches: tuple[Batch, ...]
    refusals: tuple[Refusal, ...]


def place(queue: Sequence[Waiting], devices: Sequence[Free]) -> Placements:
    """Decide what leaves the queue now, in order of arrival.

    A program fits a device if its bytes are at most the device's. A lone program that is short beside the trip to the
    far device runs on the nearest one; all others share the free slots of the widest device they fit, each slot taking
    an equal part of what waits as long as that is worth the trip, so that batches grow while devices are busy.
    """
    refusals: list[Refusal] = []
    shares: dict[str, list[int]] = {}
    free = {f.device.name: f for f in devices}
    for position, waiting in enumerate(queue):
        fitting = [f.device for f in devices if waiting.need.bytes <= f.device.bytes]
        if not fitting:
            refusals.append(Refusal(position, _too_large(waiting.need, [f.device for f in devices])))
            continue
        shares.setdefault(_choose(waiting, fitting).name, []).append(position)
    batches: list[Batch] = []
    for name, positions in shares.items():
        batches += _split(free[name], positions, queue)
    return Placements(tuple(batches), tuple(refusals))


def _choose(waiting: Waiting, fitting: Sequence[Device]) -> Device:
    near = min(fitting, key=lambda d: d.latency)
    wide = max(fitting, key=lambda d: d.slots)
    if waiting.alone and waiting.need.seconds < _WORTH_THE_TRIP * wide.latency:
        return near
    return wide


def _split(free: Free, positions: Sequence[int], queue: Sequence[Waiting]) -> list[Batch]:
    """Equal shares for the free slots, but no more batches than are worth a trip each."""
    batches: list[Batch] = []
    rest = list(positions)
    worth = math.ceil(sum(queue[p].need.seconds for p in positions) / max(free.device.latency, 1e-6))
    slots = min(free.slots, max(1, worth, -(-len(positions) // MAX_BATCH_PROGRAMS)))
    while rest and slots > len(batches):
        share = -(-len(rest) // (slots - len(batches)))
        taken, seconds = 0, 0.0
        while taken < min(share, MAX_BATCH_PROGRAMS):
            seconds += queue[rest[taken]].need.seconds
            if taken and seconds > MAX_BATCH_SECONDS:
                break
            taken += 1
        count = f"{taken} of {len(positions)} waiting" if len(positions) > 1 else "the only one waiting"
        batches.append(Batch(free.device.name, tuple(rest[:taken]), count))
        rest = rest[taken:]
    return batches


def _too_large(need: Need, devices: Sequence[Device]) -> TooLarge:
    most = max(devices, key=lambda d: d.bytes)
    return TooLarge(
        f"the program needs {format_bytes(need.bytes)} ({need.bytes:,} bytes, {need.qubits} qubits), and the largest "
        f"device, {most.name}, has {format_bytes(most.bytes)} ({most.bytes:,} bytes) for one program. Use fewer "
        "qubits, fewer workers with more memory each, or a cluster with larger workers."
    )
