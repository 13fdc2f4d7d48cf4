"""A recorded run to look at while it runs and afterwards: its history, kept up with its journal."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybridq.errors import Corrupt, WorkflowError
from hybridq.history import History, RunHistory
from hybridq.journal import Owner, Tail, load_value, read_owner, run_directory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RecordedRun", "load"]

_CLOCK_SLACK = 2.0


class RecordedRun:
    """A run as it is recorded, whether it is finished or still running, on this machine or another.

    Made by `load`. Reading changes nothing of the run.
    """

    def __init__(self, directory: Path, **bounds: Any) -> None:
        self.directory = directory
        self._bounds = bounds
        self._begin()
        self._take()

    def _begin(self) -> None:
        self._tail = Tail(self.directory)
        self._fold = History(functools.partial(load_value, self.directory), **self._bounds)
        self._owner: Owner | None = None

    def _take(self) -> bool:
        self._owner = read_owner(self.directory)  # before the records: one that leaves meanwhile has written its end
        entries = self._tail.read()
        for number, record in entries:
            self._fold.take(number, record)
        return bool(entries)

    def update(self) -> bool:
        """Read what was recorded since; whether that was anything.

        Raises `Corrupt` for a damaged line.
        """
        try:
            return self._take()
        except Corrupt:  # a write that failed may have been taken back; what is there now counts
            self._begin()
            return self._take()

    @property
    def history(self) -> RunHistory:
        """All that is recorded by now."""
        self.update()
        return self._fold.run()

    @property
    def left(self) -> str | None:
        """Why nobody works on the run any more, in a few words; None while somebody may.

        As of the last `update`. Of a driver on another host only its own word is known.
        """
        status = self._fold.status
        if status is None:
            return "the run holds no record yet" if self._owner is None else None
        if status != "running":
            return status
        if self._owner is None:
            return "left by its driver without a word; run it again to finish it"
        if self._owner.host == socket.gethostname() and not _lives(self._owner):
            return f"its driver is gone ({self._owner}); run it again to finish it"
        return None

    # -- figures -------------------------------------------------------------------------------------------------------

    def plot_convergence(self, ax: Axes | None = None) -> Axes:
        """Draw the best value so far of each loop over its evaluations, with error bands and references.

        Draws on ``ax``, or on a new figure, and returns the axes.
        """
        from hybridq import figures

        return figures.on(ax, figures.convergence, self.history)

    def plot_error(self, ax: Axes | None = None) -> Axes:
        """Draw how far each loop is from its reference, on a logarithmic scale.

        Raises `WorkflowError` if no loop has a reference.
        """
        from hybridq import figures

        return figures.on(ax, figures.error, self.history)

    def plot_curve(self, ax: Axes | None = None) -> Axes:
        """Draw each loop's best value over the number that tells the loops apart, with errors and references.

        Raises `WorkflowError` if there are not several loops at one place of the workflow.
        """
        from hybridq import figures

        return figures.on(ax, figures.curve, self.history)

    def plot_timeline(self, ax: Axes | None = None) -> Axes:
        """Draw what ran where and when, quantum and classical in two colours.

        Raises `WorkflowError` if nothing is recorded with the time it began.
        """
        from hybridq import figures

        return figures.on(ax, figures.timeline, self.history)


def load(name: str, store: str | os.PathLike[str] = "runs") -> RecordedRun:
    """The run ``name`` of a store to look at, also while it runs: its ``history``, and figures of it.

    Raises `WorkflowError` for a name that no run can have, `JournalError` if there is no such run, `Corrupt` if its
    journal is damaged.
    """
    if not isinstance(name, str):
        raise WorkflowError(f"load() takes the name of a run, and got {name!r}; `hybridq runs --store DIR` lists them.")
    return RecordedRun(run_directory(Path(store), name))


def _lives(owner: Owner) -> bool:
    """Whether the process that a run's owner names is there, and is that one."""
    import psutil

    try:
        process = psutil.Process(owner.pid)
        ended = process.status() == psutil.STATUS_ZOMBIE  # and nobody has asked how
        return not ended and bool(process.create_time() <= owner.since + _CLOCK_SLACK)
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True
