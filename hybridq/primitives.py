"""Qiskit's V2 primitives over the scheduler: programs written for Qiskit run as they are, in runs and outside.

In a run each PUB is one recorded evaluation, ``curve/estimator[0]/pub[1]``, so a Qiskit program in a workflow's body
(``qiskit_algorithms.VQE``, say) resumes like any other: it runs again, and what is recorded is answered. Whatever
randomness it has of its own must be seeded, as in any workflow. Outside of runs the PUBs are evaluated on this
process' own engine, in the background.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeAlias

import numpy as np
from qiskit import QuantumCircuit
from qiskit.primitives import (
    BaseEstimatorV2,
    BasePrimitiveJob,
    BaseSamplerV2,
    BitArray,
    DataBin,
    PrimitiveResult,
    PubResult,
    SamplerPubResult,
)
from qiskit.primitives.containers.estimator_pub import EstimatorPub
from qiskit.primitives.containers.observables_array import ObservablesArray
from qiskit.primitives.containers.sampler_pub import SamplerPub
from qiskit.providers import JobStatus
from qiskit.quantum_info import SparseObservable, SparsePauliOp

from hybridq.dispatch import driver_engine
from hybridq.engines.costs import need
from hybridq.errors import HybridqError, WorkflowError
from hybridq.language import _scope
from hybridq.location import Location
from hybridq.program import Estimate, Outcome, Program, Request, program, result
from hybridq.runner import Pending, Run
from hybridq.scope import Scope, StepScope, current

__all__ = ["Estimator", "EstimatorOptions", "Job", "Sampler", "SamplerOptions"]

_BATCH_SECONDS = 0.25
"""PUBs estimated to take less go to the engine together; a job is cancelled between such batches."""
_MAX_PROJECTORS = 16
"""Projectors in one term of an observable: each doubles the Paulis that the term is made of."""

Finish: TypeAlias = Callable[[Program, Any], PubResult]
"""Makes a PUB's result of its program and of what `hybridq.program.result` returns."""


@dataclass(frozen=True)
class EstimatorOptions:
    """How an `Estimator` was set up."""

    default_precision: float = 0.0
    """Standard error asked for where neither call nor PUB says, in units of the observable; 0 for exact values."""
    seed: int | None = None
    backend: Any = None
    grouping: str | None = None


@dataclass(frozen=True)
class SamplerOptions:
    """How a `Sampler` was set up."""

    default_shots: int = 1024
    """Shots of each parameter set where neither call nor PUB says."""
    seed: int | None = None
    backend: Any = None


class Estimator(BaseEstimatorV2):  # type: ignore[misc]  # Qiskit publishes no types
    """Expectation values, as Qiskit's ``BaseEstimatorV2``: anything that takes one takes this.

    ``default_precision`` is the standard error asked for where neither `run` nor a PUB names one, in units of the
    observable; 0 asks for exact values. Sampled values take the shots that keep the standard error below the precision
    in any state, as ``hq.expval`` does, and report the error that was measured. ``backend`` and ``grouping`` are those
    of ``hq.expval``.

    In a run, randomness comes from the run's seed and the place of the call, and ``seed`` plays no part. Outside of
    one, ``seed`` and the number of the call give it: calls differ from each other, and an equal seed repeats their
    sequence. Without a seed, the calls of all estimators of this process are one such sequence.

    Raises `WorkflowError` for options of the wrong kind.
    """

    def __init__(self, *, default_precision: float = 0.0, seed: int | None = None, backend: Any = None,
                 grouping: str | None = None) -> None:  # fmt: skip
        if isinstance(default_precision, bool) or not _is_precision(default_precision):
            raise WorkflowError(
                f"default_precision is {default_precision!r}; it must be a finite number, 0 or more, in units of the "
                "observable (0 for exact values)."
            )
        self._options = EstimatorOptions(default_precision, _seed(seed), backend, grouping)
        self._calls = _calls["estimator"] if seed is None else itertools.count()

    @property
    def options(self) -> EstimatorOptions:
        """How it was set up; fixed, so that equal calls mean the same all along."""
        return self._options

    @property
    def default_precision(self) -> float:
        """The precision of PUBs that name none, in units of the observable; 0 for exact values."""
        return self._options.default_precision

    @property
    def seed(self) -> int | None:
        """The seed of calls outside of runs."""
        return self._options.seed

    def run(self, pubs: Iterable[Any], *, precision: float | None = None) -> Job:
        """Estimate ``pubs``: each ``(circuit, observables, parameter values, precision)``, the last two optional.

        Parameter values and observables broadcast as in Qiskit. ``precision`` is for PUBs that name none. Returns a
        job, whose result holds for each PUB ``data.evs`` and ``data.stds``, arrays of the PUB's shape in units of the
        observables (``stds`` is 0 for exact values), and ``metadata``: ``target_precision``, ``circuit_metadata``,
        ``shots`` (of each parameter set; None for exact values), ``engine``, ``method``, ``sampling``, ``grouping``.

        Raises before anything is evaluated: Qiskit's ``ValueError`` and ``TypeError`` for malformed PUBs,
        `WorkflowError` for what cannot be evaluated, `NotFinite` for parameters that are NaN or infinite.
        """
        scope = _calling(type(self).__name__)
        precision = self.default_precision if precision is None else precision
        coerced = [EstimatorPub.coerce(pub, precision) for pub in pubs]
        asked = [(self._request(pub), functools.partial(_estimated, *_facts(pub), pub.precision)) for pub in coerced]
        return _begin("estimator", scope, asked, self.seed, self._calls)

    def _request(self, pub: EstimatorPub) -> Request:
        return Request(
            pub.circuit, _observables(pub.observables), pub.parameter_values.as_array(pub.circuit.parameters), None,
            float(pub.precision) or None, **_given(backend=self._options.backend, grouping=self._options.grouping),
        )  # fmt: skip


class Sampler(BaseSamplerV2):  # type: ignore[misc]  # Qiskit publishes no types
    """Samples of bit strings, as Qiskit's ``BaseSamplerV2``: anything that takes one takes this.

    ``default_shots`` counts where neither `run` nor a PUB says; ``backend`` is that of ``hq.sample``; ``seed`` is as
    for `Estimator`. Measurements within the circuit, resets and control flow are allowed.

    Raises `WorkflowError` for options of the wrong kind.
    """

    def __init__(self, *, default_shots: int = 1024, seed: int | None = None, backend: Any = None) -> None:
        whole = isinstance(default_shots, (int, np.integer)) and not isinstance(default_shots, bool)
        if not whole or default_shots < 1:
            raise WorkflowError(f"default_shots is {default_shots!r}; it must be an integer, 1 or more.")
        self._options = SamplerOptions(int(default_shots), _seed(seed), backend)
        self._calls = _calls["sampler"] if seed is None else itertools.count()

    @property
    def options(self) -> SamplerOptions:
        """How it was set up; fixed, so that equal calls mean the same all along."""
        return self._options

    @property
    def default_shots(self) -> int:
        """The shots of PUBs that name none."""
        return self._options.default_shots

    @property
    def seed(self) -> int | None:
        """The seed of calls outside of runs."""
        return self._options.seed

    def run(self, pubs: Iterable[Any], *, shots: int | None = None) -> Job:
        """Sample ``pubs``: each a circuit, or ``(circuit, parameter values, shots)``, the last two optional.

        ``shots`` is for PUBs that name none. Returns a job, whose result holds for each PUB ``data`` with one Qiskit
        ``BitArray`` of the PUB's shape for each classical register, by its name, shot for shot from the same
        executions, and ``metadata``: ``shots``, ``circuit_metadata``, ``engine``, ``method``, ``sampling``. Bits that
        belong to no register are not returned, bits that are never measured are 0.

        Raises before anything is evaluated: Qiskit's ``ValueError`` and ``TypeError`` for malformed PUBs,
        `WorkflowError` for what cannot be sampled, such as a circuit without classical registers, and `NotFinite`.
        """
        scope = _calling(type(self).__name__)
        shots = self.default_shots if shots is None else shots
        coerced = [SamplerPub.coerce(pub, shots) for pub in pubs]
        asked = [
            (self._request(pub), functools.partial(_sampled, *_facts(pub), _registers(pub.circuit, position)))
            for position, pub in enumerate(coerced)
        ]
        return _begin("sampler", scope, asked, self.seed, self._calls)

    def _request(self, pub: SamplerPub) -> Request:
        return Request(
            pub.circuit, None, pub.parameter_values.as_array(pub.circuit.parameters), pub.shots, None,
            **_given(backend=self._options.backend),
        )  # fmt: skip


_calls = {"estimator": itertools.count(), "sampler": itertools.count()}
"""Numbers of the calls outside of runs of primitives without a seed of their own."""


def _is_precision(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and bool(0 <= value < math.inf)


def _seed(seed: Any) -> int | None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer))):
        raise WorkflowError(
            f"seed is {seed!r}; it must be an integer or None. A generator has a state, which no run could record."
        )
    return None if seed is None else int(seed)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _calling(name: str) -> Scope | None:
    """The scope to record in, or None outside of runs."""
    if isinstance(current.get(), StepScope):
        raise WorkflowError(
            f"{name}.run was called inside a classical step; a step runs on one worker and cannot wait for devices. "
            "Call it in the workflow and pass its values to the step."
        )
    try:
        return _scope(f"{name}.run")
    except WorkflowError as error:
        if current.get() is None:  # a foreign thread
            error.add_note(
                "Qiskit's gradients and sampling algorithms (QAOA, SamplingVQE) call primitives in a thread of their "
                "own: use them outside of runs, or an optimizer without gradients or with finite differences."
            )
        raise


def _begin(name: str, scope: Scope | None, asked: Sequence[tuple[Request, Finish]], seed: int | None,
           calls: Iterator[int]) -> Job:  # fmt: skip
    """Check everything that is ``asked`` and begin it: in ``scope``, or outside of runs."""
    if scope is None:
        call = Location(f"{name}[{next(calls)}]")
        programs = [
            _program(request, 0 if seed is None else seed, call.child("pub", i)) for i, (request, _) in enumerate(asked)
        ]
        own = _OwnJob(programs, [finish for _, finish in asked])
        _line.append(own)
        return own
    run: Run = scope.run
    run.go_on(scope)
    call = scope.next(name)
    begun = run.begin(name, [(call.child("pub", i), request) for i, (request, _) in enumerate(asked)])
    # the scope waits at its end for what nobody asked for; what has its value already is not kept for that
    scope.submitted += [p for _, p in begun if not p.future.done() or p.future.exception() is not None]
    return _RunJob(str(call), run, begun, [finish for _, finish in asked])


def _program(request: Request, seed: int, location: Location) -> Program:
    try:
        return program(request, seed=seed, location=location)
    except HybridqError as error:
        error.add_note(f"in {location}")
        raise


# -- what PUBs say, and their results ------------------------------------------------------------------------------


def _facts(pub: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape and metadata of a PUB: all that its result needs, so that jobs keep no circuits."""
    return pub.shape, {"circuit_metadata": pub.circuit.metadata}


def _observables(array: ObservablesArray) -> Any:
    """The observables of a PUB as a nested list of Pauli sums (one alone for shape ()).

    Qiskit makes new objects of them for each PUB; equal ones become the same object here, which is what `program`
    knows templates by.
    """
    parts = tuple(
        (o.num_qubits, *(np.asarray(part).tobytes() for part in (o.coeffs, o.bit_terms, o.indices, o.boundaries)))
        for o in array.sparse_observables_array().reshape(-1)
    )
    return _pauli_sums(array.shape, parts)


@functools.lru_cache(maxsize=256)
def _pauli_sums(shape: tuple[int, ...], parts: tuple[Any, ...]) -> Any:
    sums = np.empty(len(parts), dtype=object)
    for i, (num_qubits, coefficients, terms, indices, boundaries) in enumerate(parts):
        observable = SparseObservable.from_raw_parts(
            num_qubits,
            np.frombuffer(coefficients, np.complex128),
            np.frombuffer(terms, np.uint8),
            np.frombuffer(indices, np.uint32),
            np.frombuffer(boundaries, np.uintp),
        )
        most = _projectors(observable)
        if most > _MAX_PROJECTORS:
            raise WorkflowError(
                f"a term of an observable has {most} projectors (the letters 0, 1, +, -, r, l), which would make "
                f"2^{most} Paulis; at most {_MAX_PROJECTORS} are allowed. Sample the circuit with hq.Sampler instead."
            )
        paulis = SparsePauliOp.from_sparse_observable(observable)
        sums[i] = paulis.simplify() if most else paulis
    return sums.reshape(shape).tolist()


_PAULIS = np.array([SparseObservable.BitTerm.X, SparseObservable.BitTerm.Y, SparseObservable.BitTerm.Z], dtype=np.uint8)


def _projectors(observable: SparseObservable) -> int:
    """Projectors in the term of ``observable`` that has most of them."""
    projects = np.concatenate([[0], np.cumsum(~np.isin(observable.bit_terms, _PAULIS))])
    return int(np.diff(projects[observable.boundaries]).max(initial=0))


def _estimated(shape: tuple[int, ...], metadata: dict[str, Any], precision: float, asked: Program,
               estimate: Estimate) -> PubResult:  # fmt: skip
    values = np.array(estimate.value, dtype=np.float64)  # a 0-d array for shape (), as Qiskit's own
    errors = np.full(shape, estimate.stderr, dtype=np.float64)
    return PubResult(
        DataBin(evs=values, stds=errors, shape=shape),
        {
            "target_precision": precision, **metadata, "shots": asked.shots, **_provenance(asked),
            "grouping": asked.plan.grouping,
        },
    )  # fmt: skip


def _sampled(shape: tuple[int, ...], metadata: dict[str, Any], registers: Sequence[_Register], asked: Program,
             samples: BitArray) -> SamplerPubResult:  # fmt: skip
    data = {register.name: register.of(samples) for register in registers}
    return SamplerPubResult(DataBin(**data, shape=shape), {"shots": asked.shots, **metadata, **_provenance(asked)})


def _provenance(asked: Program) -> dict[str, Any]:
    return {"engine": asked.plan.engine, "method": asked.plan.method, "sampling": asked.plan.sampling}


@dataclass(frozen=True)
class _Register:
    name: str
    bits: tuple[int, ...]
    """Its bits among the circuit's classical bits."""

    def of(self, samples: BitArray) -> BitArray:
        """The register's part of samples of all classical bits."""
        if self.bits == tuple(range(samples.num_bits)):
            return samples
        if not self.bits:
            return BitArray(np.zeros((*samples.shape, samples.num_shots, 0), dtype=np.uint8), 0)
        return samples.slice_bits(self.bits)


def _registers(circuit: QuantumCircuit, position: int) -> tuple[_Register, ...]:
    if not circuit.cregs:
        loose = f"; its {circuit.num_clbits} classical bits are in none" if circuit.num_clbits else ""
        raise WorkflowError(
            f"the circuit of PUB {position} has no classical registers{loose}, and results are returned by register: "
            "call circuit.measure_all(), or add a ClassicalRegister and measure into it."
        )
    registers = tuple(_Register(r.name, tuple(circuit.find_bit(bit).index for bit in r)) for r in circuit.cregs)
    try:
        DataBin(**dict.fromkeys((r.name for r in registers), None), shape=())
    except (TypeError, ValueError) as error:
        raise WorkflowError(
            f"the circuit of PUB {position} has classical registers {[r.name for r in registers]}, which Qiskit's "
            f"DataBin cannot all hold by name ({error}); rename the register."
        ) from error
    return registers


# -- jobs ----------------------------------------------------------------------------------------------------------


class Job(BasePrimitiveJob):  # type: ignore[misc]  # Qiskit publishes no types
    """PUBs on their way, as Qiskit's ``PrimitiveJob``: returned by `Estimator.run` and `Sampler.run`."""

    @abstractmethod
    def result(self) -> PrimitiveResult:
        """Wait for the results, one for each PUB; raises what evaluating the first that failed raised."""

    @abstractmethod
    def status(self) -> JobStatus:
        """Where the job stands, without waiting."""

    @abstractmethod
    def cancel(self) -> bool:
        """Give the job up if it has not ended; whether it will end as cancelled."""

    def done(self) -> bool:
        """Whether all results are there."""
        return self.status() is JobStatus.DONE

    def running(self) -> bool:
        """Whether it is being evaluated."""
        return self.status() is JobStatus.RUNNING

    def cancelled(self) -> bool:
        """Whether it was given up before its end."""
        return self.status() is JobStatus.CANCELLED

    def in_final_state(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status() in (JobStatus.DONE, JobStatus.CANCELLED, JobStatus.ERROR)


class _RunJob(Job):
    """PUBs in a run; its id is the location of the call."""

    def __init__(self, job_id: str, run: Run, begun: Sequence[tuple[Program, Pending]], finish: Sequence[Finish]
                 ) -> None:  # fmt: skip
        super().__init__(job_id)
        self._run, self._begun, self._finish = run, begun, finish
        self._result: PrimitiveResult | None = None

    def result(self) -> PrimitiveResult:
        """Wait for the results, one for each PUB; raises what evaluating the first that failed raised.

        Raises `WorkflowError` in a thread that the run did not start, and after the run.
        """
        if self._result is None:
            scope = current.get()
            if not isinstance(scope, Scope) or scope.run is not self._run:
                raise WorkflowError(
                    f"the result of {self.job_id()} was asked for outside of the run that it belongs to; ask in the "
                    "workflow, and return the values."
                )
            found: list[Any] = []
            errors: list[Exception] = []
            for _, pending in self._begun:
                try:
                    found.append(self._run.wait(scope, pending))
                except Exception as error:  # noqa: BLE001  # all PUBs end before one's error is raised
                    errors.append(error)
            if errors:
                raise errors[0]
            self._result = _results([asked for asked, _ in self._begun], found, self._finish)
        return self._result

    def status(self) -> JobStatus:
        """Where the job stands, without waiting; not recorded, so a workflow must not branch on it."""
        futures = [pending.future for _, pending in self._begun]
        if not all(future.done() for future in futures):
            return JobStatus.RUNNING
        return JobStatus.ERROR if any(future.exception() for future in futures) else JobStatus.DONE

    def cancel(self) -> bool:
        """False: what a run has begun it records."""
        return False


class _OwnJob(Job):
    """PUBs outside of runs, for this process' own engine."""

    def __init__(self, programs: Sequence[Program], finish: Sequence[Finish]) -> None:
        super().__init__(str(uuid.uuid4()))
        self._programs, self._finish = programs, finish
        self._future: Future[PrimitiveResult] = Future()
        self._lock = threading.Lock()
        self._given_up = False

    def result(self) -> PrimitiveResult:
        """Wait for the results, one for each PUB; raises what evaluating the first that failed raised.

        Raises ``concurrent.futures.CancelledError`` for a cancelled job. Ctrl-C gives the job up.
        """
        try:
            return self._future.result()
        except CancelledError:
            raise CancelledError(f"the job {self.job_id()} was cancelled; run its PUBs again.") from None
        except KeyboardInterrupt:
            if self._future.running() and self.cancel():
                driver_engine().kill()  # it may be in the middle of a long circuit
            raise

    def status(self) -> JobStatus:
        """Where the job stands, without waiting: queued behind others of this process, running, or ended."""
        if self._future.running():
            return JobStatus.RUNNING
        if not self._future.done():
            return JobStatus.QUEUED
        if self._given_up:
            return JobStatus.CANCELLED
        return JobStatus.ERROR if self._future.exception() is not None else JobStatus.DONE

    def cancel(self) -> bool:
        """Give the job up if it has not ended; whether it will end as cancelled.

        A queued job ends at once, a running one when the engine is done with the PUBs it has.
        """
        with self._lock:
            if not self._future.done():
                self._given_up = True
                self._future.cancel()
            return self._given_up

    def evaluate(self) -> None:
        """Evaluate all PUBs, in this thread."""
        if not self._future.set_running_or_notify_cancel():
            return
        found, error = None, None
        try:
            found = self._evaluated()
        except BaseException as raised:  # noqa: BLE001  # raised by result()
            error = raised
        with self._lock:
            if self._given_up:
                self._future.set_exception(CancelledError())
            elif error is not None:
                self._future.set_exception(error)
            else:
                self._future.set_result(found)

    def _evaluated(self) -> PrimitiveResult:
        outcomes: list[Outcome] = []
        for batch in _batches(self._programs):
            if self._given_up:
                raise CancelledError
            for outcome in driver_engine().evaluate(batch):
                if not isinstance(outcome, Outcome):
                    raise outcome
                outcomes.append(outcome)
        values = [result(asked, outcome) for asked, outcome in zip(self._programs, outcomes, strict=True)]
        return _results(self._programs, values, self._finish)


def _results(programs: Sequence[Program], values: Sequence[Any], finish: Sequence[Finish]) -> PrimitiveResult:
    return PrimitiveResult([f(p, v) for f, p, v in zip(finish, programs, values, strict=True)], {"version": 2})


def _batches(programs: Sequence[Program]) -> Iterator[list[Program]]:
    """``programs`` in their order, those that are short together."""
    batch: list[Program] = []
    seconds = 0.0
    for each in programs:
        estimated = need(each).seconds
        if batch and seconds + estimated > _BATCH_SECONDS:
            yield batch
            batch, seconds = [], 0.0
        batch.append(each)
        seconds += estimated
    if batch:
        yield batch


class _Line:
    """Jobs outside of runs, one after the other, as the engine takes them.

    Their thread starts with the first and is a daemon, so that the process can end in the middle of a circuit.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, as in a fork of this process, which has none of its threads."""
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_OwnJob] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def append(self, job: _OwnJob) -> None:
        self._jobs.put(job)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hybridq-primitives", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            job.evaluate()
            del job  # nothing is kept alive until the next one comes


_line = _Line()
os.register_at_fork(after_in_child=_line.reset)
