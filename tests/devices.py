"""Backends that tests name by their functions; imported by drivers and engine processes alike."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from qiskit.primitives import BackendEstimatorV2, BackendSamplerV2, StatevectorEstimator, StatevectorSampler
from qiskit.providers import BackendV2, Options
from qiskit.providers.fake_provider import GenericBackendV2
from qiskit.transpiler import Target


def line(qubits: int = 5, basis: tuple[str, ...] = ("rz", "sx", "x", "cx")) -> GenericBackendV2:
    """An ideal device whose qubits are coupled one to the next, in one direction."""
    return GenericBackendV2(
        qubits, list(basis), coupling_map=[[i, i + 1] for i in range(qubits - 1)], control_flow=True, seed=0,
        noise_info=False,
    )  # fmt: skip


class Queued(BackendV2):
    """A device that takes no seed, as real ones do; counts what it was handed."""

    jobs: ClassVar[list[tuple[int, int]]] = []  # of the circuits in each job, how many and with which shots

    def __init__(self, qubits: int = 5, failing: str = "") -> None:
        super().__init__(name="queued")
        self._simulator = line(qubits)
        self._failing = failing
        self.jobs.clear()

    @property
    def target(self) -> Target:
        return self._simulator.target

    @property
    def max_circuits(self) -> None:
        return None

    @classmethod
    def _default_options(cls) -> Options:
        return Options(shots=1024)

    def run(self, run_input: Any, **options: Any) -> Any:
        if self._failing == "greedy":  # memory that grows, whatever was predicted
            hoard = []
            for _ in range(200):
                hoard.append(bytes(range(256)) * 2**17)  # 32 MiB, written
                time.sleep(0.05)
        if self._failing == "raises":
            raise RuntimeError("the device is being calibrated")
        options = {name: value for name, value in options.items() if name in ("shots", "memory")}
        self.jobs.append((len(run_input), options["shots"]))
        if self._failing == "fails":
            options["max_memory_mb"] = 1
            options["method"] = "statevector"
        return self._simulator.run(run_input, seed_simulator=len(self.jobs), **options)


def manila() -> BackendV2:
    from qiskit_ibm_runtime.fake_provider import FakeManilaV2

    return FakeManilaV2()


def sampler(seed: int = 3) -> BackendSamplerV2:
    return BackendSamplerV2(backend=line(), options={"seed_simulator": seed})


def runtime_sampler() -> Any:
    """IBM's own sampler, in its local testing mode."""
    from qiskit_ibm_runtime.executor_sampler import SamplerV2

    return SamplerV2(mode=manila())


def estimator() -> BackendEstimatorV2:
    return BackendEstimatorV2(backend=line())


def noisy_estimator() -> BackendEstimatorV2:
    return BackendEstimatorV2(backend=manila())


def reference_sampler() -> StatevectorSampler:
    return StatevectorSampler(seed=5)


def reference_estimator() -> StatevectorEstimator:
    return StatevectorEstimator(seed=5)


def nothing() -> str:
    return "no backend"
