"""Messages as drivers send them to the scheduler, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

TOTALS = {
    "evaluations": 0, "steps": 0, "shots": 0, "retries": 0, "failures": 0, "quantum": 0.0, "classical": 0.0,
}  # fmt: skip


def message(name: str = "study", *, at: float = 0.0, **changes: Any) -> dict[str, Any]:
    """A message of the run ``name``, ``at`` seconds after it began."""
    head = {
        "v": 1, "id": f"{name}@0", "run": name, "workflow": "curve", "driver": "host:1", "full": False,
        "time": 1e9 + at, "clock": at, "began": 1e9, "state": "running", "error": "",
    }  # fmt: skip
    return {**head, **changes}


def loop(at: str = "curve/minimize[0]", values: list[float] | None = None, *, first: int = 0, **changes: Any
         ) -> dict[str, Any]:  # fmt: skip
    """A loop whose rows from ``first`` on have these ``values``."""
    values = values if values is not None else [1.0]
    points = [[first + i, v, 0.0, min(values[: i + 1])] for i, v in enumerate(values)]
    told = {
        "at": at, "group": "curve/energy", "state": "running", "method": "COBYLA", "rows": first + len(values),
        "best": min(values, default=None), "last": values[-1] if values else None, "stderr": 0.0, "seconds": 1.0,
        "limit": None, "where": "0", "reference": None, "source": "", "unit": "", "points": points,
    }  # fmt: skip
    return {**told, **changes}
