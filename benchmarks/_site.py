"""What the comparisons on real Dask clusters share: a cluster of processes, its engines loaded, and quiet runs."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster

import hybridq as hq
from hybridq.cluster import SELDOM


@contextlib.contextmanager
def site(workers: int, memory: str | None = None) -> Iterator[Client]:
    """A client of a local cluster of one-thread processes, its engines started; ``memory`` is of each worker.

    Its Dask processes look at themselves as often as those of a cluster that a run starts for itself.
    """
    limit: Any = "auto" if memory is None else memory
    with (
        dask.config.set(SELDOM),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", memory_limit=limit,
            dashboard_address="127.0.0.1:0", silence_logs=50, config=SELDOM,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        play(client, warm, 4 * workers)
        yield client


def play(client: Client, workflow: Callable[..., Any], *args: Any, seed: int = 0,
         look: Callable[[Path], None] | None = None) -> tuple[Any, float]:  # fmt: skip
    """The value of one run on the cluster, its record on disk, and the seconds of all of ``hq.run``.

    ``look`` is given the record's directory before it goes. Progress lines are kept from the terminal.
    """
    with tempfile.TemporaryDirectory() as store, contextlib.redirect_stderr(io.StringIO()):
        begun = time.perf_counter()
        value = hq.run(workflow, *args, name="benchmark", seed=seed, store=store, cluster=client)
        seconds = time.perf_counter() - begun
        if look is not None:
            look(Path(store) / "benchmark")
    return value, seconds


@hq.quantum
def first_energy(angle: float) -> Any:
    from qiskit.circuit.library import efficient_su2

    return hq.expval(efficient_su2(2, reps=1), "ZZ", [angle] * 8)


@hq.workflow
def warm(count: int) -> list[float]:
    """Evaluations enough that every engine has loaded its libraries."""
    return [float(value) for value in hq.map(first_energy, [0.1 * number for number in range(count)])]
