"""Sites: a Dask cluster and the devices beside it, as frozen data or a TOML file; what a name of a device stands for.

What evaluates a circuit is part of its result; where that runs is not. So a name of a device stands for both, and only
what evaluates is recorded: a run goes on after its device got another name, more slots, or another machine.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hybridq.backends import AER_METHODS, Adjoint, Aer, AnyBackend, Backend, Noise, loaded, named_backend
from hybridq.errors import HybridqError, NoDevice, WorkflowError
from hybridq.resources import parse_bytes

__all__ = ["LOCAL", "POLICY_NAMES", "Device", "Site"]

_SIMULATORS = ("aer", "adjoint", *AER_METHODS)
"""Names of backends without a colon."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Device:
    """What evaluates circuits in engine processes of its own beside the driver: a QPU, a simulator set apart.

    ``name`` can stand wherever a backend can. ``backend`` is what evaluates: anything that ``backend=`` of ``hq.run``
    takes, but a name of a device. Raises `WorkflowError` for anything that cannot be.
    """

    name: str
    backend: Any
    qubits: int | None = None
    """The largest circuit it takes; None: only its memory bounds that."""
    memory: str | int | None = None
    """What all programs on it may take together: bytes, or text such as "2 GiB". None: 40 % of the machine's."""
    slots: int = 1
    """How many batches it evaluates side by side, each in an engine process on one thread; a wide program takes all."""
    cost_per_shot: float = 0.0
    """In any one currency."""
    latency: float = 0.0
    """Seconds from sending a batch to its first gate and from its last one back, together: a queue, a network."""

    def __post_init__(self) -> None:
        what = f"device {self.name!r}"
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise WorkflowError(
                f"{self.name!r} cannot name a device; give a letter or digit, then up to 63 letters, digits, '.', '_' "
                "and '-'."
            )
        if self.name in _SIMULATORS:
            raise WorkflowError(f"{what}: the name stands for a simulator already; choose another.")
        object.__setattr__(self, "backend", named_backend(self.backend))
        if self.qubits is not None:
            _whole(f"qubits of {what}", self.qubits)
        if self.memory is not None:
            object.__setattr__(self, "memory", _memory(f"memory of {what}", self.memory))
        _whole(f"slots of {what}", self.slots)
        _amount(f"cost_per_shot of {what}", self.cost_per_shot)
        _amount(f"latency of {what}", self.latency)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A Dask cluster, and devices beside it.

    The cluster's workers run classical steps and what names no device; but programs of a Qiskit backend that a device
    has run there, named or not. ``Site.read(path)`` reads one from TOML.
    Raises `WorkflowError` for anything that cannot be.
    """

    name: str = "local"
    cluster: Any = None
    """A scheduler's address, a ``distributed.Client``, a cluster object of Dask's (``LocalCluster``, dask-jobqueue's
    ``SLURMCluster``), or None for a cluster of our own on this machine."""
    workers: int | None = None
    """Worker processes of our own cluster; None: one for each core."""
    most_workers: int | None = None
    """If given, the cluster is asked for up to so many workers while calls wait, and shrinks to ``workers`` (default 1)
    afterwards: one of our own, or a cluster object of Dask's such as dask-jobqueue's ``SLURMCluster``."""
    worker_memory: str | int | None = None
    """Of each worker of our own cluster: bytes, or text such as "4 GiB"; None: an equal part of the machine's."""
    worker_threads: int = 1
    """How many calls a worker of our own cluster runs side by side."""
    patience: float = 300.0
    """Seconds that a run waits for a cluster that was lost, or has no workers left, to be there again."""
    allow_unencrypted: bool = False
    """Whether a cluster may be used that is reached over a network without TLS: whoever reaches such a scheduler, or
    reads along, can run code as you."""
    policy: str = "earliest-finish"
    """Which waiting call goes where: one of `hybridq.policies.POLICIES`."""
    backend: Any = None
    """What evaluates circuits that name nothing: a backend, or a device's name."""
    devices: tuple[Device, ...] = ()

    def __post_init__(self) -> None:
        if self.workers is not None:
            _whole("workers", self.workers)
        if self.most_workers is not None:
            _whole("most_workers", self.most_workers)
            if self.most_workers < self.local_workers:
                raise WorkflowError(f"most_workers is {self.most_workers}, fewer than workers, {self.workers}.")
            if isinstance(self.cluster, str):
                raise WorkflowError(
                    f"most_workers is {self.most_workers}, and the cluster an address, {self.cluster}: only a cluster "
                    "object can be asked for workers; give that, or None for a cluster of our own."
                )
        _whole("worker_threads", self.worker_threads)
        _amount("patience", self.patience)
        if not isinstance(self.allow_unencrypted, bool):
            raise WorkflowError(f"allow_unencrypted is {self.allow_unencrypted!r}; it must be true or false.")
        if self.worker_memory is not None:
            object.__setattr__(self, "worker_memory", _memory("worker_memory", self.worker_memory))
        if self.policy not in POLICY_NAMES:
            raise WorkflowError(f"there is no policy {self.policy!r}; there are {', '.join(POLICY_NAMES)}.")
        object.__setattr__(self, "devices", tuple(self.devices))
        for device in self.devices:
            if not isinstance(device, Device):
                raise WorkflowError(f"devices holds a {type(device).__qualname__}; give hq.Device(...) values.")
        names = [device.name for device in self.devices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise WorkflowError(f"the site {self.name!r} has more than one device named {', '.join(twice)}.")
        self.resolve(None)

    @classmethod
    def of(cls, site: Any, *, cluster: Any = None, workers: int | None = None, backend: Any = None,
           allow_unencrypted: bool | None = None) -> Site:  # fmt: skip
        """``site``, read if it is a path, `LOCAL` if it is None, with what else is given in place of what it says.

        Raises `WorkflowError` for anything that cannot be.
        """
        if isinstance(site, (str, os.PathLike)):
            site = cls.read(site)
        elif site is None:
            site = LOCAL
        elif not isinstance(site, Site):
            raise WorkflowError(f"site is a {type(site).__qualname__}; give an hq.Site, or the path of a TOML file.")
        given = {"cluster": cluster, "workers": workers, "backend": backend, "allow_unencrypted": allow_unencrypted}
        changed: Site = replace(site, **{key: value for key, value in given.items() if value is not None})
        return changed

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Site:
        """The site that a TOML file describes. Raises `WorkflowError`, naming the file, for anything wrong in it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkflowError(f"the site file {os.fspath(path)} cannot be read: {error}") from error
        try:
            return _site(tomllib.loads(text))
        except (tomllib.TOMLDecodeError, HybridqError) as error:
            raise WorkflowError(f"the site file {os.fspath(path)}: {error}") from error

    @property
    def local_workers(self) -> int:
        """Worker processes of a cluster of our own."""
        return self.workers or (1 if self.most_workers is not None else os.cpu_count() or 1)

    def local_memory(self, total: int) -> int:
        """Bytes of each worker of a cluster of our own, on a machine of ``total`` bytes."""
        most = self.most_workers or self.local_workers
        return int(self.worker_memory) if self.worker_memory is not None else total // most

    def resolve(self, backend: Any) -> tuple[AnyBackend, str]:
        """What evaluates a request that asks for ``backend``, and the device that it named, or "".

        Raises `NoDevice`, where there are devices, for a name that is neither one's nor a backend's, and
        `WorkflowError` for anything else that is no backend.
        """
        asked = self.backend if backend is None else backend
        for device in self.devices:
            if device.name == asked:
                return device.backend, device.name
        known = [device.name for device in self.devices]
        if not known or not isinstance(asked, str) or asked in _SIMULATORS or ":" in asked:
            return named_backend(asked), ""
        raise NoDevice(
            f"{asked!r} is neither a device of the site {self.name!r} (it has {', '.join(known)}) nor a "
            f"backend ({', '.join(_SIMULATORS)}, module:function).{_meant(asked, (*known, *_SIMULATORS))}"
        )


POLICY_NAMES = ("earliest-finish", "fair-share", "first-come", "least-busy", "round-robin")


def _site(document: Mapping[str, Any]) -> Site:
    top = _known(document, "at the top", ("name", "policy", "backend", "cluster", "devices"))
    cluster = _known(
        _table(document.get("cluster", {}), "cluster"),
        "in [cluster]",
        ("address", "workers", "most_workers", "memory", "threads", "patience", "allow_unencrypted"),
    )
    others = ", ".join(key for key in cluster if key not in ("address", "patience", "allow_unencrypted"))
    if "address" in cluster and others:
        raise WorkflowError(
            f"[cluster] has an address and {others}; a scheduler that runs elsewhere has its own workers."
        )
    listed = document.get("devices", [])
    if not isinstance(listed, list):
        raise WorkflowError("devices is not a list of tables; write each device below a line [[devices]].")
    found = Site(
        cluster=cluster.get("address"), workers=cluster.get("workers"), most_workers=cluster.get("most_workers"),
        worker_memory=cluster.get("memory"),
        worker_threads=cluster.get("threads", 1), devices=tuple(_device(_table(d, "devices")) for d in listed),
        patience=cluster.get("patience", Site.patience),
        allow_unencrypted=cluster.get("allow_unencrypted", False),
        **{key: top[key] for key in ("name", "policy") if key in top},
    )  # fmt: skip
    # the devices are checked first: a misspelt key in one is not to be told as a device that is missing
    return replace(found, backend=top.get("backend"))


_ENGINES: Mapping[str, tuple[str, ...]] = {
    "aer": ("method", "noise", "bond_dimension"),
    "adjoint": (),
    "module:function": ("arguments", "optimization_level"),
}
"""Keys of a device that say how its engine evaluates, by engine."""


def _device(table: Mapping[str, Any]) -> Device:
    name = table.get("name")
    if name is None:
        raise WorkflowError("a device has no name; give name = '...' below its [[devices]].")
    where = f"in the device {name!r}"
    engine = table.get("engine", "aer")
    if not isinstance(engine, str) or (engine not in _ENGINES and ":" not in engine):
        raise WorkflowError(f"engine is {engine!r} {where}; give 'aer', 'adjoint' or 'module:function'.")
    settings = _ENGINES.get(engine, _ENGINES["module:function"])
    own = tuple(field.name for field in fields(Device) if field.name != "backend")
    _known(table, where, ("engine", *own, *settings))
    try:
        given = {key: table[key] for key in settings if key in table}
        make: Callable[..., AnyBackend]
        if engine == "aer":
            if "noise" in given:
                given["noise"] = _noise(_table(given["noise"], "noise"))
            make = Aer
        elif engine == "adjoint":
            make = Adjoint
        else:
            given["source"] = engine
            make = Backend
        return Device(backend=make(**given), **{key: table[key] for key in own if key in table})
    except (HybridqError, TypeError, ValueError) as error:
        raise WorkflowError(f"{where}: {error}") from error


def _noise(table: Mapping[str, Any]) -> Noise:
    """Of ``{one_qubit = .., two_qubit = .., readout = ..}``, or ``{of = "module:function"}`` of a Qiskit backend."""
    if "of" in table:
        _known(table, "in its noise", ("of",))
        return Noise.of(loaded(Backend(table["of"])))
    return Noise.depolarizing(**_known(table, "in its noise", ("one_qubit", "two_qubit", "readout")))


def _table(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise WorkflowError(f"{what} is {value!r}; it must be a table of keys.")
    return value


def _known(table: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """``table``; raises `WorkflowError` for a key that is not among ``keys``."""
    for key in table:
        if key not in keys:
            raise WorkflowError(f"there is no key {key!r} {where}; there are {', '.join(keys)}.{_meant(key, keys)}")
    return dict(table)


def _meant(name: str, names: Sequence[str]) -> str:
    """A question after the one of ``names`` that is spelt almost like ``name``, if there is one."""
    near = difflib.get_close_matches(name, names, 1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _memory(what: str, value: Any) -> int:
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise WorkflowError(f"{what}: {error}.") from error


def _whole(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkflowError(f"{what} is {value!r}; it must be an integer, 1 or more.")


def _amount(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise WorkflowError(f"{what} is {value!r}; it must be a number, 0 or more.")


LOCAL = Site()
"""This machine, and nothing else."""
