"""hybridq schedules workflows that mix quantum circuits with classical computing.

The public names; each is imported when it is first used, so that ``import hybridq`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybridq.backends import Adjoint, Aer, Backend, Noise
    from hybridq.errors import (
        ClusterLost,
        Corrupt,
        Diverged,
        EngineFailed,
        EvaluationError,
        HybridqError,
        JournalError,
        Locked,
        NoDevice,
        NotFinite,
        PlacementError,
        StepFailed,
        TimedOut,
        TooLarge,
        Unhashable,
        Version,
        WorkerLost,
        WorkflowError,
    )
    from hybridq.following import RecordedRun, load
    from hybridq.language import (
        Future,
        as_completed,
        classical,
        expval,
        gradient,
        map,
        minimize,
        now,
        priority,
        quantum,
        rng,
        run,
        sample,
        workflow,
    )
    from hybridq.primitives import Estimator, Sampler
    from hybridq.problems import Problem, lattice, molecule
    from hybridq.program import Estimate
    from hybridq.sites import Device, Site

__all__ = [
    "Adjoint",
    "Aer",
    "Backend",
    "ClusterLost",
    "Corrupt",
    "Device",
    "Diverged",
    "EngineFailed",
    "Estimate",
    "Estimator",
    "EvaluationError",
    "Future",
    "HybridqError",
    "JournalError",
    "Locked",
    "NoDevice",
    "Noise",
    "NotFinite",
    "PlacementError",
    "Problem",
    "RecordedRun",
    "Sampler",
    "Site",
    "StepFailed",
    "TimedOut",
    "TooLarge",
    "Unhashable",
    "Version",
    "WorkerLost",
    "WorkflowError",
    "__version__",
    "as_completed",
    "classical",
    "expval",
    "gradient",
    "lattice",
    "load",
    "map",
    "minimize",
    "molecule",
    "now",
    "priority",
    "quantum",
    "rng",
    "run",
    "sample",
    "workflow",
]

_LANGUAGE = {
    "Future", "as_completed", "classical", "expval", "gradient", "map", "minimize", "now", "priority", "quantum", "rng",
    "run", "sample", "workflow",
}  # fmt: skip
_HOMES = {name: "hybridq.errors" for name in __all__} | {
    **dict.fromkeys(_LANGUAGE, "hybridq.language"),
    **dict.fromkeys(("Adjoint", "Aer", "Backend", "Noise"), "hybridq.backends"),
    **dict.fromkeys(("Device", "Site"), "hybridq.sites"),
    **dict.fromkeys(("Estimator", "Sampler"), "hybridq.primitives"),
    **dict.fromkeys(("Problem", "lattice", "molecule"), "hybridq.problems"),
    "Estimate": "hybridq.program",
    **dict.fromkeys(("RecordedRun", "load"), "hybridq.following"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("hybridq-scheduler")
    if name not in _HOMES:
        raise AttributeError(f"module 'hybridq' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
