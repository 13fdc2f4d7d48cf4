"""Where a thread stands in a run: what decorated functions look at when they are called."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from hybridq.location import Location

__all__ = ["Describing", "Scope", "StepScope", "current", "priority"]


@dataclass(eq=False)
class Scope:
    """A running workflow, or a call of a loop's objective; belongs to one thread."""

    run: Any
    location: Location
    counts: dict[str, int] = field(default_factory=dict)
    """Calls made so far, by name."""
    failures: list[str] = field(default_factory=list)
    """Locations of recorded failures that reached this scope and that it has not gone on from yet."""
    submitted: list[Any] = field(default_factory=list)
    """Calls submitted here; the scope does not end before they do."""

    def reserve(self, name: str, count: int = 1) -> int:
        """The index of the next call of ``name`` made here; ``count`` indices from it on are taken."""
        index = self.counts.get(name, 0)
        self.counts[name] = index + count
        return index

    def next(self, name: str) -> Location:
        """The location of the next call of ``name`` made here."""
        return self.location.child(name, self.reserve(name))


@dataclass(eq=False)
class StepScope:
    """A classical step, in whatever process it runs."""

    location: Location
    seed: int
    generators: int = 0
    """Calls of ``hq.rng`` so far."""


@dataclass(eq=False)
class Describing:
    """A quantum function's body, which describes an evaluation and does nothing else."""

    name: str


current: ContextVar[Scope | StepScope | Describing | None] = ContextVar("hybridq_scope", default=None)
"""The innermost of these around the running code; None outside of any run."""
priority: ContextVar[int] = ContextVar("hybridq_priority", default=0)
"""Of what the running code calls; threads of a run start with that of the code that starts them."""
