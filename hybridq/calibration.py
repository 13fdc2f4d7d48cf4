"""Times measured on this machine, kept beside the runs of a store: predictions become this machine's own.

Nothing measured changes a result, so the file may go at any time; then the built-in figures count.
"""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hybridq.engines.costs import DEFAULT, TERMS, Calibration
from hybridq.errors import WorkflowError

__all__ = ["FILE", "machine", "processor", "read", "write"]

FILE = "calibration.json"
"""In the directory that holds the runs; one entry for each kind of machine that shares it."""
_LIBRARIES = ("qiskit", "qiskit-aer", "pennylane-lightning")


def processor() -> str:
    """The processor's model: optimizers and linear algebra differ in the last bits between types."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the architecture says what can be said
    return platform.processor() or platform.machine()


def machine() -> str:
    """What times depend on: the processor's model and the versions of the simulators."""
    versions = []
    for name in _LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} not installed")
    return ", ".join((processor(), *versions))


def read(store: Path) -> Calibration:
    """What was measured on machines like this one, else the built-in figures. Raises `WorkflowError` for a bad file."""
    found = _entries(store).get(machine())
    if found is None:
        return DEFAULT
    try:
        measured = Calibration(
            {kind: tuple(map(float, own)) for kind, own in found["coefficients"].items()},
            {engine: tuple(map(float, own)) for engine, own in found["first"].items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _bad(store, error) from error
    terms = {kind: len(own) for kind, own in measured.coefficients.items()}
    if terms != {kind: len(own) for kind, own in TERMS.items()} or measured.first.keys() != DEFAULT.first.keys():
        return DEFAULT  # another version counted other things
    return measured


def write(store: Path, measured: Calibration) -> Path:
    """Keep what was measured on this machine; the file's path."""
    store.mkdir(parents=True, exist_ok=True)
    path = store / FILE
    entries = {**_entries(store), machine(): {"coefficients": measured.coefficients, "first": measured.first}}
    part = path.with_name(f".{FILE}.{os.getpid()}.part")
    part.write_text(json.dumps(entries, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(part, path)
    return path


def _entries(store: Path) -> dict[str, Any]:
    try:
        text = (store / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise _bad(store, error) from error
    if not isinstance(entries, dict):
        raise _bad(store, "it holds no object")
    return entries


def _bad(store: Path, reason: object) -> WorkflowError:
    return WorkflowError(
        f"{store / FILE} is no calibration ({reason}); remove it, or measure again: hybridq devices --measure."
    )
