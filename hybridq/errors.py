"""Every exception hybridq raises itself, grouped by what the caller can do about it.

::

    HybridqError
      WorkflowError        written wrongly; caught before anything is spent
        Unhashable         a value that can be neither hashed nor stored
        Diverged           a replayed call differs from its record
      PlacementError       fits no device of this site
        TooLarge           needs more than any device has (need and have)
        NoDevice           no device can run it (reasons)
      EvaluationError      the infrastructure failed; running again may help
        WorkerLost         the worker died, repeatedly, under this call
        ClusterLost        the Dask scheduler is gone
        TimedOut           it ran longer than allowed
        NotFinite          a value that should be a number is NaN or infinite
        EngineFailed       the quantum engine reported a failure
        StepFailed         a step's own exception could not be rebuilt here
      JournalError         the run directory is not what it should be
        Locked             another driver owns it
        Corrupt            a file of it is damaged (which, and where)
        Version            it was written by another version of hybridq

Exceptions of the user's own code keep their type; they are never wrapped in one of these.
"""

from __future__ import annotations

__all__ = [
    "ClusterLost",
    "Corrupt",
    "Diverged",
    "EngineFailed",
    "EvaluationError",
    "HybridqError",
    "JournalError",
    "Locked",
    "NoDevice",
    "NotFinite",
    "PlacementError",
    "StepFailed",
    "TimedOut",
    "TooLarge",
    "Unhashable",
    "Version",
    "WorkerLost",
    "WorkflowError",
]


class HybridqError(Exception):
    """Base of every exception that hybridq raises itself."""


class WorkflowError(HybridqError):
    """The workflow is written wrongly; nothing was spent on the call that raised it."""


class Unhashable(WorkflowError):
    """A value can be neither hashed nor stored, so no record of it could be kept."""


class Diverged(WorkflowError):
    """A replayed call is not the call that was recorded; the message holds the difference."""


class PlacementError(HybridqError):
    """No device of this site can run the program."""


class TooLarge(PlacementError):
    """A program or step needs more than any device has; the message gives both numbers."""


class NoDevice(PlacementError):
    """No device of this site accepts the program; the message gives each one's reason."""


class EvaluationError(HybridqError):
    """The infrastructure failed while running something that was written correctly."""


class WorkerLost(EvaluationError):
    """Workers died, repeatedly, while they ran this call."""


class ClusterLost(EvaluationError):
    """The Dask scheduler was lost with all that waited or ran there, and none has taken its place; run again."""


class TimedOut(EvaluationError):
    """A call ran longer than it was allowed to."""


class NotFinite(EvaluationError):
    """A value that has to be a finite number is NaN or infinite."""


class EngineFailed(EvaluationError):
    """A quantum engine reported a failure, or died."""


class StepFailed(EvaluationError):
    """A step raised an exception whose type cannot be rebuilt here; the message holds its text."""


class JournalError(HybridqError):
    """The run directory is not what it should be."""


class Locked(JournalError):
    """Another driver owns the run directory; the message names it."""


class Corrupt(JournalError):
    """A file of the run directory is damaged; the message names file and line."""


class Version(JournalError):
    """The run directory was written by a version of hybridq that this one cannot read."""
