"""Qiskit backends and primitives: right values on routed qubits, honest error bars, and bits that belong to rows."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import dense
import devices
import numpy as np
import pytest
from gates import teleportation
from qiskit import ClassicalRegister, QuantumCircuit, QuantumRegister
from qiskit.circuit import Clbit, Parameter, ParameterVector
from qiskit.primitives import BackendEstimatorV2, BackendSamplerV2, BaseSamplerV2
from qiskit.quantum_info import SparsePauliOp

import hybridq as hq
from hybridq.backends import Backend, loaded, named_backend
from hybridq.engines import backend as module
from hybridq.engines.backend import BackendEngine
from hybridq.engines.process import EngineProcess
from hybridq.errors import Diverged, EngineFailed, TooLarge, WorkflowError
from hybridq.location import Location
from hybridq.program import Request, physical, program, result
from hybridq.sites import Site

pytestmark = [
    pytest.mark.filterwarnings(  # of a device without noise, when its noise model is made
        "ignore:Qiskit backend .* has no QubitProperties:UserWarning:qiskit_aer"
    ),
]

LINE = Backend("devices:line")
MANILA = Backend("qiskit_ibm_runtime.fake_provider:FakeManilaV2")
QUEUED = Backend("devices:Queued")
OTHER_GATES = Backend("devices:line", {"basis": ["u", "ecr"]})
# No symmetry of the circuit's qubits leaves it as it is.
OBSERVABLE = SparsePauliOp(
    ["IIIZ", "IIXI", "IYIZ", "ZIII", "XZYI", "YIIX", "IIII"], [0.7, -0.4, 0.9, 0.3, -0.6, 0.5, 0.2]
)


def routed():
    """Couplings of far-apart qubits, so that a line has to move qubits about."""
    angles = ParameterVector("a", 5)
    circuit = QuantumCircuit(4)
    for qubit in range(4):
        circuit.ry(angles[qubit] * (qubit + 1), qubit)
    circuit.cx(0, 3)
    circuit.cx(1, 3)
    circuit.rx(angles[4], 3)
    circuit.cx(0, 2)
    circuit.rz(angles[0] + angles[4], 2)
    circuit.cx(3, 2)
    circuit.ry(0.3, 1)
    circuit.cx(1, 2)
    return circuit


THETA = np.array([[0.3, -0.8, 0.5, 1.1, 0.4], [1.2, 0.1, -0.7, 0.2, -1.5], [0.0, 2.0, 0.9, -0.3, 0.6]])


@pytest.fixture(scope="module")
def engine():
    return BackendEngine(2**31)


@pytest.fixture(scope="module")
def make():
    def make(circuit, observables=None, theta=None, shots=1000, backend=LINE, gradient="none", grouping=None, at="f"):
        if isinstance(observables, list) and np.ndim(theta) == 2:
            theta = np.asarray(theta)[:, None]  # every observable at every point
        request = Request(circuit, observables, theta, shots, grouping=grouping)
        return program(request, seed=11, location=Location(at), gradient=gradient, site=Site(backend=backend))

    return make


def rows_of(whole, rows):
    return dataclasses.replace(whole, theta=whole.theta[rows], seeds=whole.seeds[rows], batch_shape=(len(rows),))


def good(outcomes):
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


class TestEstimates:
    @pytest.mark.parametrize("grouping", ["qubit-wise", "commuting"])
    @pytest.mark.parametrize(
        "backend",
        [LINE, OTHER_GATES, QUEUED, Backend("devices:sampler"), Backend("devices:estimator")],
        ids=lambda backend: backend.source,
    )
    def test_routed_circuits_have_right_values(self, engine, make, twin, backend, grouping):
        circuit = routed()
        asked = make(circuit, [OBSERVABLE, SparsePauliOp("IIXX")], THETA, 8000, backend, grouping=grouping)
        (outcome,) = good(engine.evaluate([asked]))
        error = outcome.values - twin(circuit, [OBSERVABLE, SparsePauliOp("IIXX")], THETA)
        assert (np.abs(error) < 5 * outcome.stderrs).all()
        assert (outcome.stderrs < 0.06).all()
        assert (outcome.stderrs > 0).all()
        assert physical(asked.template).circuit.layout.final_index_layout() != [0, 1, 2, 3]  # or nothing was tested

    def test_a_change_of_basis_starts_where_the_circuit_left_its_qubits(self, engine, make, twin):
        """Gates between far-apart qubits, which would be laid out otherwise on their own."""
        circuit = QuantumCircuit(5)
        for qubit in range(5):
            circuit.ry(0.4 + 0.5 * qubit, qubit)
        observable = SparsePauliOp(["XIIIX", "ZIIIZ", "IXIXI", "IZIZI"], [1.0, 0.5, 0.7, 0.3])
        asked = make(circuit, observable, None, 8000, grouping="commuting")
        (outcome,) = good(engine.evaluate([asked]))
        assert abs(outcome.values - twin(circuit, [observable], [[]])).item() < 5 * outcome.stderrs.item()
        ready = physical(asked.template)
        (measuring,) = engine._device(asked.plan).measured(ready.circuit, ready.observables[0], "commuting")[1]
        assert measuring.count_ops()["cx"] > 2  # or nothing was routed

    def test_error_bars_are_calibrated(self, engine, make, twin):
        circuit = routed()
        repetitions = 100
        theta = np.repeat(THETA[:1], repetitions, axis=0)
        (outcome,) = good(engine.evaluate([make(circuit, OBSERVABLE, theta, 200)]))
        pulls = (outcome.values - twin(circuit, [OBSERVABLE], THETA[:1])) / outcome.stderrs
        assert abs(pulls.mean()) < 4 / np.sqrt(repetitions)
        assert abs(pulls.std() - 1) < 0.25

    def test_a_noisy_device_agrees_with_qiskits_estimator(self, engine, make):
        circuit = routed()
        asked = make(circuit, OBSERVABLE, THETA[:2], 8000, MANILA)
        (outcome,) = good(engine.evaluate([asked]))
        ready = physical(asked.template)
        oracle = BackendEstimatorV2(backend=loaded(MANILA), options={"seed_simulator": 7})
        data = oracle.run([(ready.circuit, ready.observables[0], THETA[:2])], precision=1 / 100).result()[0].data
        assert (np.abs(outcome.values[:, 0] - data.evs) < 5 * np.hypot(outcome.stderrs[:, 0], data.stds)).all()

    def test_noise_is_there(self, engine, make):
        flipped = QuantumCircuit(1)
        flipped.x(0)
        (outcome,) = good(engine.evaluate([make(flipped, "Z", None, 4000, MANILA)]))
        assert -0.99 < outcome.values.item() < -0.8

    def test_only_qubits_that_count_are_measured(self, engine, make):
        asked = make(routed(), SparsePauliOp(["IIIZ", "IXII"], [1.0, 0.5]), THETA[0], 50)
        device = engine._device(asked.plan)
        ready = physical(asked.template)
        observable, circuits = device.measured(ready.circuit, ready.observables[0], "qubit-wise")
        assert [circuit.count_ops()["measure"] for circuit in circuits] == [2]
        assert [group.num_qubits for group in observable.groups] == [2]

    def test_a_constant_and_no_rows(self, engine, make):
        constant, none = good(engine.evaluate([
            make(QuantumCircuit(2), SparsePauliOp("II", 0.5), None, 10),
            make(routed(), OBSERVABLE, np.empty((0, 5)), 10),
        ]))  # fmt: skip
        assert constant.values.tolist() == [[0.5]]
        assert constant.stderrs.tolist() == [[0.0]]
        assert none.values.shape == (0, 1)

    def test_an_estimator_by_its_own_precision(self, engine, make, monkeypatch):
        """Its groups have as many shots each as were asked for."""
        seen = []
        run = module._Simulator.run
        monkeypatch.setattr(
            module._Simulator, "run", lambda self, circuits, **o: seen.append(o["shots"]) or run(self, circuits, **o)
        )
        good(
            engine.evaluate([make(routed(), OBSERVABLE, THETA[:1], n, Backend("devices:estimator")) for n in (7, 1000)])
        )
        assert seen == [7, 1000]

    def test_qiskits_reference_primitives(self, engine, make, twin):
        circuit = routed()
        exact = twin(circuit, [OBSERVABLE], THETA)
        asked = [make(circuit, OBSERVABLE, THETA, 20000, Backend(f"devices:reference_{n}"))
                 for n in ("sampler", "estimator")]  # fmt: skip
        for outcome in good(engine.evaluate(asked)):
            np.testing.assert_allclose(outcome.values, exact, atol=0.06)

    @pytest.mark.parametrize("grouping", ["qubit-wise", "commuting"])
    def test_a_simulator_wider_than_the_circuit(self, engine, make, twin, grouping):
        """Without couplings, circuits stay as wide as they are."""
        backend = Backend("qiskit_aer:AerSimulator", {"method": "statevector"})
        (outcome,) = good(engine.evaluate([make(routed(), OBSERVABLE, THETA[0], 4000, backend, grouping=grouping)]))
        assert abs(outcome.values - twin(routed(), [OBSERVABLE], THETA[:1])).item() < 5 * outcome.stderrs.item()

    def test_fewer_shots_than_groups(self, engine, make):
        (error,) = engine.evaluate([make(routed(), OBSERVABLE, THETA[0], 2)])
        assert isinstance(error, WorkflowError)
        assert "2 shots" in str(error)


def registers():
    """Two registers with a loose bit between them, out of the order of qubits."""
    qubits, first, second = QuantumRegister(4, "q"), ClassicalRegister(3, "first"), ClassicalRegister(9, "second")
    circuit = QuantumCircuit(qubits, first, [Clbit()], second)
    circuit.x([0, 3])
    circuit.cx(0, 2)
    circuit.measure(0, second[8])
    circuit.measure(1, first[0])
    circuit.measure(2, first[2])
    circuit.measure(3, 3)
    return circuit


class TestSamples:
    @pytest.mark.parametrize("backend", [LINE, QUEUED, Backend("devices:reference_sampler")], ids=lambda b: b.source)
    def test_every_qubit_in_its_place(self, engine, make, twin, backend):
        circuit = routed()
        asked = make(circuit, None, THETA[0], 20000, backend)
        array = result(asked, good(engine.evaluate([asked]))[0])
        assert array.num_bits == 4
        counts = Counter(array.get_int_counts())
        for state, probability in enumerate(np.abs(dense.state(circuit, THETA[0])) ** 2):
            assert abs(counts[state] - 20000 * probability) < 5 * np.sqrt(20000 * probability * (1 - probability)) + 1

    @pytest.mark.parametrize("backend", [LINE, QUEUED], ids=lambda b: b.source)
    def test_registers_lie_in_the_order_of_bits(self, engine, make, backend):
        asked = make(registers(), None, None, 3, backend)
        array = result(asked, good(engine.evaluate([asked]))[0])
        assert array.get_bitstrings() == [f"{1 << 12 | 1 << 3 | 1 << 2:013b}"] * 3

    def test_batches_and_widths(self, engine, make):
        circuit = QuantumCircuit(5)
        circuit.rx(Parameter("a"), 4)
        asked = make(circuit, None, [[0.0], [np.pi]], 5)
        array = result(asked, good(engine.evaluate([asked]))[0])
        assert [array.get_counts(row) for row in range(2)] == [{"00000": 5}, {"10000": 5}]

    @pytest.mark.parametrize("backend", [LINE, QUEUED], ids=lambda b: b.source)
    def test_measurements_on_the_way(self, engine, make, backend):
        asked = make(teleportation(), None, [1.1], 4000, backend)
        array = result(asked, good(engine.evaluate([asked]))[0])
        ones = sum(n for bits, n in array.get_counts().items() if bits[0] == "1") / 4000
        assert ones == pytest.approx(np.sin(0.55) ** 2, abs=0.04)

    def test_many_shots_in_several_runs(self, engine, make, monkeypatch):
        monkeypatch.setattr(module, "_SHOTS", 64)
        circuit = QuantumCircuit(3)
        circuit.h(range(3))
        (outcome,) = good(engine.evaluate([make(circuit, None, None, 300)]))
        assert outcome.bits.shape == (1, 300, 1)
        assert len({outcome.bits[0, i : i + 64].tobytes() for i in range(0, 256, 64)}) == 4

    def test_an_estimator_has_none(self, engine, make):
        (error,) = engine.evaluate([make(routed(), None, THETA[0], 5, Backend("devices:estimator"))])
        assert isinstance(error, WorkflowError)
        assert "devices:estimator is an estimator" in str(error)


class TestGradients:
    @pytest.mark.parametrize(
        "backend", [LINE, OTHER_GATES, QUEUED, Backend("devices:estimator")], ids=lambda backend: backend.source
    )
    def test_parameter_shift(self, engine, make, slopes, backend):
        circuit, shots = routed(), 4000
        asked = make(circuit, [OBSERVABLE], THETA[:2], shots, backend, "parameter-shift")
        (outcome,) = good(engine.evaluate([asked]))
        exact = slopes(circuit, [OBSERVABLE], THETA[:2])
        # each slope of an angle is half a difference; a parameter sums over its angles with factors up to 4
        assert np.abs(outcome.gradients - exact).max() < 5 * 4 * 3.4 / np.sqrt(2 * shots)
        assert np.abs(exact).max() > 1  # or nothing was tested
        assert (np.abs(outcome.stderrs) > 0).all()

    def test_controlled_rotations_in_a_target_that_has_them(self, engine, make, slopes):
        """They are rewritten as rotations, and these in gates of the device."""
        circuit = QuantumCircuit(3)
        angles = ParameterVector("a", 2)
        circuit.h(range(3))
        circuit.crx(angles[0], 0, 1)
        circuit.cp(angles[1], 1, 2)
        observable = SparsePauliOp(["IZI", "XII"], [1, 1])
        backend = Backend("devices:line", {"basis": ["u", "crx", "cp", "cx"]})
        asked = make(circuit, [observable], [[0.7, 1.3]], 8000, backend, "parameter-shift")
        assert {"crx", "cp"} & set(physical(asked.template).circuit.count_ops())
        (outcome,) = good(engine.evaluate([asked]))
        np.testing.assert_allclose(outcome.gradients, slopes(circuit, [observable], [[0.7, 1.3]]), atol=0.07)

    def test_more_than_ten_slots(self, engine, make, slopes):
        """Qiskit sorts parameters by name, and slot10 comes before slot2."""
        angles = ParameterVector("a", 12)
        circuit = QuantumCircuit(1)
        for number, angle in enumerate(angles):
            circuit.ry(angle, 0) if number % 2 else circuit.rx(angle, 0)
        theta = np.linspace(-1, 2, 12)[None]
        asked = make(circuit, ["Z"], theta, 4000, gradient="parameter-shift")
        (outcome,) = good(engine.evaluate([asked]))
        np.testing.assert_allclose(outcome.gradients, slopes(circuit, [SparsePauliOp("Z")], theta), atol=0.06)

    def test_spsa(self, engine, make, slopes):
        """On average over directions the gradient."""
        circuit, rows = QuantumCircuit(2), 60
        angles = ParameterVector("a", 2)
        circuit.ry(angles[0], 0)
        circuit.ry(angles[1], 1)
        theta = np.array([[0.4, 1.0]])
        observable = SparsePauliOp(["IZ", "ZI"], [1.0, 0.5])
        for outcome in good(engine.evaluate([
            make(circuit, [observable], np.repeat(theta, rows, axis=0), 500, backend, "spsa")
            for backend in (LINE, QUEUED)
        ])):  # fmt: skip
            mean, spread = outcome.gradients[:, 0].mean(axis=0), outcome.gradients[:, 0].std(axis=0)
            assert (np.abs(mean - slopes(circuit, [observable], theta)[0, 0]) < 5 * spread / np.sqrt(rows) + 0.01).all()


SAMPLED = {
    "estimate": (routed(), [SparsePauliOp(["ZIXI", "IYIZ"], [1, 0.3]), "IIXX"], THETA[[0, 1, 0]], "none"),
    "samples": (routed(), None, THETA[[0, 1, 0]], "none"),
    "trajectories": (teleportation(), None, [[0.3], [1.1], [0.3]], "none"),
    "gradient": (routed(), "ZXIY", THETA[[0, 1, 0]], "spsa"),
}


ESTIMATOR = Backend("devices:noisy_estimator")


@pytest.mark.parametrize(
    ("backend", "kind"),
    [*((LINE, kind) for kind in SAMPLED), (MANILA, "estimate"), (MANILA, "samples"), (ESTIMATOR, "estimate")],
    ids=lambda value: getattr(value, "source", value),
)
class TestBits:
    def test_a_row_depends_on_its_key_and_parameters_alone(self, engine, make, process, kind, backend):
        circuit, observables, theta, gradient = SAMPLED[kind]
        whole = make(circuit, observables, theta, 301, backend, gradient)
        (reference,) = good(engine.evaluate([whole]))
        places = {process: ([2], [1, 2, 0]), BackendEngine(2**30): ([2, 0],)}  # alone, first, in the middle and last
        for runner, batches in places.items():
            parts = [rows_of(whole, rows) for rows in batches]
            for part, rows in zip(good(runner.evaluate(parts)), batches, strict=True):
                for name in ("values", "stderrs", "bits", "gradients"):
                    expected, found = getattr(reference, name), getattr(part, name)
                    assert (expected is None) == (found is None)
                    assert found is None or np.array_equal(found, expected[rows])
        drawn = reference.values if reference.bits is None else reference.bits
        assert len({row.tobytes() for row in drawn}) == 3  # the first and last rows differ in their keys alone


def test_groups_are_drawn_independently(engine, make):
    """One run of circuits with different numbers of shots gives them one seed, and correlated errors."""
    circuit = QuantumCircuit(1)
    circuit.rx(np.pi / 4, 0)
    observable = SparsePauliOp(["X", "Y"], [1.0, 0.9])
    shots, rows = 101, 200
    asked = make(circuit, observable, np.empty((rows, 0)), shots)
    (outcome,) = good(engine.evaluate([asked]))
    assert np.std(outcome.values) == pytest.approx(np.sqrt(np.mean(outcome.stderrs**2)), rel=0.15)


def test_the_noise_of_unused_qubits_changes_no_bit():
    device = devices.manila()
    circuit = QuantumCircuit(5, 2)
    for _ in range(20):
        circuit.sx(3)
        circuit.cx(3, 4)
    circuit.measure([3, 4], [0, 1])
    whole = BackendSamplerV2(backend=device, options={"seed_simulator": 5})
    reduced = BackendSamplerV2(backend=module._Simulator(device), options={"seed_simulator": 5})
    bits = [sampler.run([circuit], shots=500).result()[0].data.c.array for sampler in (whole, reduced)]
    assert np.array_equal(*bits)
    left = module._noise_of(device.options.noise_model, [circuit])
    assert sorted(left._local_readout_errors) == [(3,), (4,)]
    assert {name: sorted(places) for name, places in left._local_quantum_errors.items() if places} == {
        "sx": [(3,)], "cx": [(3, 4)],
    }  # fmt: skip


class TestQueues:
    def test_everything_is_handed_over_at_once(self, engine, make):
        """All rows, groups and shifted angles: a job for each number of shots."""
        observable = SparsePauliOp(["IIIX", "IIIY", "IIIZ"], [1.0, 1.0, 0.5])
        jobs = devices.Queued.jobs
        jobs.clear()
        good(engine.evaluate([make(routed(), observable, THETA, 400, QUEUED)]))
        assert sorted(jobs) == [(3, 80), (6, 160)]  # circuits of a job, and their shots
        jobs.clear()
        good(engine.evaluate([make(routed(), "IIIX", THETA, 400, QUEUED, "parameter-shift")]))
        slots = len(physical(make(routed(), "IIIX", THETA, 400, QUEUED).template).circuit.parameters)
        assert len(jobs) == 1
        assert jobs[0][0] >= 3 * (1 + 2 * slots)

    def test_no_job_is_left_where_one_fails(self, monkeypatch):
        """What nobody waits for is taken back, before it costs anything."""
        taken_back = []

        class Job:
            def __init__(self, words):
                self.words = words

            def result(self):
                raise RuntimeError(self.words)

            def cancel(self):
                taken_back.append(self.words)

        class Sampler:
            def run(self, pubs, *, shots):
                return Job(f"no queue for {shots} shots")

        circuit = QuantumCircuit(1, 1)
        circuit.measure(0, 0)
        queue = module._Queued(Sampler(), "lab:device")
        with pytest.raises(EngineFailed, match="lab:device failed on this program: RuntimeError: no queue for 5 shots"):
            queue.bits([module._Circuit(circuit, ())] * 2, np.zeros((1, 0)), [5, 7], None, None)
        assert taken_back == ["no queue for 5 shots", "no queue for 7 shots"]

    def test_ibms_backends_go_through_ibms_sampler(self, monkeypatch):
        """They no longer run circuits themselves."""
        import qiskit_ibm_runtime

        monkeypatch.setattr(qiskit_ibm_runtime, "IBMBackend", devices.Queued)
        device = module._device(devices.Queued(), "lab:device")
        assert isinstance(device._route._sampler, BaseSamplerV2)
        assert type(device._route._sampler).__module__.startswith("qiskit_ibm_runtime")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning:qiskit_ibm_runtime")
    @pytest.mark.filterwarnings("ignore:Options .* have no effect in local testing mode")
    def test_ibms_sampler(self, engine, make):
        asked = make(routed(), OBSERVABLE, THETA[:1], 4000, Backend("devices:runtime_sampler"))
        other = make(routed(), OBSERVABLE, THETA[:1], 4000, MANILA)
        mine, reference = good(engine.evaluate([asked, other]))
        assert (np.abs(mine.values - reference.values) < 5 * np.hypot(mine.stderrs, reference.stderrs)).all()

    @pytest.mark.parametrize(
        ("failing", "words"), [("raises", "the device is being calibrated"), ("fails", "Insufficient memory")]
    )
    def test_failures_are_values_with_the_devices_words(self, engine, make, failing, words):
        broken = Backend("devices:Queued", {"failing": failing, "qubits": 20})
        circuit = QuantumCircuit(18)
        circuit.h(range(18))
        first, second = engine.evaluate([
            make(circuit, None, None, 5, broken), make(QuantumCircuit(1), "Z", None, 5),
        ])  # fmt: skip
        assert isinstance(first, EngineFailed)
        assert "devices:Queued" in str(first)
        assert words in str(first)
        assert second.values.tolist() == [[1.0]]


class TestRefusals:
    def test_arguments_that_are_no_json(self):
        with pytest.raises(WorkflowError, match="are not JSON data"):
            Backend("devices:line", {"qubits": {1, 2}})
        with pytest.raises(WorkflowError, match="are not JSON data"):
            Backend("devices:line", {"qubits": float("nan")})
        with pytest.raises(WorkflowError, match="does not name a backend"):
            Backend("devices")
        with pytest.raises(WorkflowError, match="a module of its own"):
            Backend("__main__:device")

    def test_an_instance_stands_for_its_class(self):
        found = named_backend(devices.manila())
        assert isinstance(loaded(found), type(devices.manila()))
        with pytest.raises(WorkflowError, match="write a function that returns it"):
            named_backend(devices.line())

    def test_a_backend_that_cannot_be_made_here(self, engine, make, process):
        asked = make(routed(), OBSERVABLE, THETA[0], 100)
        options = dict(asked.plan.options) | {"source": "no_such_module:device"}
        asked = dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, options=tuple(options.items())))
        for runner in (engine, process):
            (error,) = runner.evaluate([asked])
            assert isinstance(error, WorkflowError)
            assert "no_such_module" in str(error)
            assert "its package is installed" in str(error)

    def test_no_backend_at_all(self, engine, make):
        (error,) = engine.evaluate([make(QuantumCircuit(1), "Z", None, 5, Backend("devices:nothing"))])
        assert isinstance(error, WorkflowError)
        assert "devices:nothing made a str" in str(error)

    def test_exact_values_and_unknown_gradients(self, engine, make):
        with pytest.raises(WorkflowError, match="no exact values"):
            make(routed(), OBSERVABLE, THETA[0], None)
        asked = make(routed(), OBSERVABLE, THETA[0], 10)
        asked = dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, gradient="adjoint"))
        (error,) = engine.evaluate([asked])
        assert isinstance(error, WorkflowError)

    def test_too_few_qubits_and_instructions_that_it_lacks(self, engine, make):
        branching = QuantumCircuit(1, 1)
        with branching.while_loop((branching.clbits[0], 0)):
            branching.measure(0, 0)
        wide, unknown = engine.evaluate([
            make(QuantumCircuit(6), "Z" * 6, None, 5, MANILA), make(branching, None, None, 5, MANILA),
        ])  # fmt: skip
        assert isinstance(wide, WorkflowError)
        assert "6 qubits" in str(wide)
        assert "has 5" in str(wide)
        assert isinstance(unknown, WorkflowError)
        assert "while_loop" in str(unknown)

    def test_memory(self, engine, make):
        (error,) = engine.evaluate([make(routed(), OBSERVABLE, THETA[0], 10)], max_bytes=1000)
        assert isinstance(error, TooLarge)


@hq.quantum
def energy(theta, backend=None):
    return hq.expval(routed(), OBSERVABLE, theta, shots=100, backend=backend)


@hq.quantum
def too_wide(backend=None):
    return hq.expval(QuantumCircuit(6), "ZZZZZZ", shots=10, backend=backend)


@hq.workflow
def study():
    return [float(energy(row)) for row in THETA]


@hq.workflow
def wide():
    return float(too_wide())


class TestRuns:
    @pytest.mark.slow
    def test_a_run_on_a_backend_is_recorded_and_resumed(self, tmp_path, monkeypatch):
        source = MANILA.source
        first = hq.run(study, name="study", seed=7, store=tmp_path, backend=source)
        lines = (tmp_path / "study").rglob("*")
        before = {path: path.stat().st_mtime_ns for path in lines if path.is_file()}
        monkeypatch.setattr(EngineProcess, "evaluate", lambda *_: pytest.fail("evaluated again"))
        assert hq.run(study, name="study", seed=7, store=tmp_path, backend=source) == first
        assert before
        with pytest.raises(Diverged, match="another backend"):
            hq.run(study, name="study", seed=7, store=tmp_path, backend=LINE)

    def test_as_a_plain_function(self):
        assert abs(float(energy(THETA[0], MANILA.source))) < 4

    def test_too_few_qubits_are_refused_before_anything_is_spent(self, tmp_path, monkeypatch):
        with pytest.raises(WorkflowError, match="has 5"):
            too_wide(MANILA.source)
        monkeypatch.setattr(EngineProcess, "evaluate", lambda *_: pytest.fail("evaluated"))
        with pytest.raises(WorkflowError, match="has 5"):
            hq.run(wide, name="wide", store=tmp_path, backend=MANILA.source)
        assert json.dumps(MANILA.source) in "".join(path.read_text() for path in (tmp_path / "wide").rglob("*.json*"))
