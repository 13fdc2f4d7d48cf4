"""Runs one comparison: ``python -m benchmarks NAME [--json FILE] [--png FILE]``, NAME a module of this folder.

Each module has a function ``run(compare)`` that returns rows, dictionaries with equal keys, and may have ``plot(rows,
path)``. One with options of its own adds them in ``options(parser)``, and its ``run`` takes them as keywords; one that
can fail has ``failed(rows)``. One thread everywhere.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # before any library that reads it is imported

ROUND_SECONDS = 0.05  # of one contender in one round, if a call is shorter
LIBRARIES = (
    "numpy",
    "scipy",
    "qiskit",
    "qiskit-aer",
    "pennylane",
    "pennylane-lightning",
    "qulacs",
    "hybridq-scheduler",
)


def compare(contenders: Mapping[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Median seconds of a call of each contender, timed in turns, so that a slow moment of the machine meets all."""
    repeats = {}
    for name, call in contenders.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in times.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([shown[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *shown[1:]])


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def main() -> None:
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=names)
    parser.add_argument("--json", type=Path, help="write rows, versions and machine here")
    parser.add_argument("--png", type=Path, help="draw the rows here, if the comparison can")
    named, _ = parser.parse_known_args([word for word in sys.argv[1:] if word not in ("-h", "--help")] or ["--help"])
    module = importlib.import_module(f"benchmarks.{named.name}")
    if hasattr(module, "options"):
        module.options(parser)
    arguments = parser.parse_args()
    own = {key: value for key, value in vars(arguments).items() if key not in vars(named)}
    if arguments.png and not hasattr(module, "plot"):
        parser.error(f"{arguments.name} draws nothing")
    rows = module.run(compare, **own)
    print(f"{(module.__doc__ or '').strip()}\n\n{_table(rows)}")
    if arguments.png:
        module.plot(rows, arguments.png)
    if arguments.json:
        record = {
            "benchmark": arguments.name,
            "rows": rows,
            "versions": {library: _version(library) for library in LIBRARIES},
            "machine": {"python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count()},
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
    if hasattr(module, "failed") and module.failed(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
