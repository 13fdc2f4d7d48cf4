"""Sites: what a file may say, what a name stands for, and what runs on the devices that it names."""

from __future__ import annotations

import contextvars
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp
from runs import recorded

import hybridq as hq
from hybridq import journal as records
from hybridq.engines.process import EngineProcess
from hybridq.journal import read_records
from hybridq.language import Overrides, overrides
from hybridq.policies import POLICIES
from hybridq.sites import LOCAL, POLICY_NAMES, _device

CIRCUIT = efficient_su2(2, reps=1)
TERMS = SparsePauliOp(["ZZ", "XI", "IX"], [1.0, 0.5, 0.5])
START = np.linspace(0.1, 0.8, CIRCUIT.num_parameters)
NOISY = hq.Aer("density_matrix", hq.Noise.depolarizing(1e-2, 5e-2, 0.02))
LAB = """
    name = "lab"
    policy = "fair-share"
    backend = "noisy"

    [cluster]
    workers = 3
    memory = "2 GiB"
    threads = 2

    [[devices]]
    name = "noisy"
    method = "density_matrix"
    noise = { one_qubit = 1e-2, two_qubit = 5e-2, readout = 0.02 }
    qubits = 3
    memory = "1 GiB"
    slots = 2

    [[devices]]
    name = "line"
    engine = "devices:line"
    arguments = { qubits = 4 }
    cost_per_shot = 1e-4
    latency = 0.5

    [[devices]]
    name = "values"
    engine = "adjoint"
"""


@hq.quantum
def energy(theta: Any, backend: Any = None, shots: int | None = None) -> Any:
    return hq.expval(CIRCUIT, TERMS, theta, backend=backend, shots=shots)


@hq.quantum
def wide(qubits: int, backend: Any = None) -> Any:
    circuit = efficient_su2(qubits, reps=1)
    return hq.expval(circuit, "Z" * qubits, np.zeros(circuit.num_parameters), backend=backend)


@hq.workflow
def values(backends: list[Any]) -> list[float]:
    return [float(energy(START, backend)) for backend in backends]


@hq.workflow
def sampled(backend: Any) -> float:
    return float(energy(START, backend, shots=4000))


@hq.workflow
def lowest(backend: Any, method: str = "COBYLA") -> Any:
    found = hq.minimize(energy, START, (backend,), method=method, options={"maxiter": 12})
    return {"x": found.x, "fun": found.fun}


@hq.workflow
def many(count: int, backend: Any) -> list[float]:
    found: list[Any] = hq.map(lambda_energy, range(count), [backend] * count)
    return [float(f) for f in found]


@hq.workflow
def lambda_energy(i: int, backend: Any) -> float:
    return float(energy(START + 0.01 * i, backend))


@hq.workflow
def refused(qubits: int, backend: Any) -> str:
    try:
        return str(wide(qubits, backend))
    except hq.PlacementError as error:
        return f"{type(error).__name__}: {error}"


def lab(tmp_path: Path, text: str = LAB) -> Path:
    path = tmp_path / "site.toml"
    path.write_text(textwrap.dedent(text))
    return path


# -- what a file says --------------------------------------------------------------------------------------------------


def test_a_file_says_what_python_says(tmp_path: Path) -> None:
    found = hq.Site.read(lab(tmp_path))
    assert (found.name, found.policy, found.backend) == ("lab", "fair-share", "noisy")
    assert (found.cluster, found.workers, found.worker_memory, found.worker_threads) == (None, 3, 2 * 2**30, 2)
    noisy, line, values_ = found.devices
    assert noisy.backend.identity == NOISY.identity
    assert (noisy.qubits, noisy.memory, noisy.slots) == (3, 2**30, 2)
    assert line.backend.identity == hq.Backend("devices:line", {"qubits": 4}).identity
    assert (line.cost_per_shot, line.latency, line.slots, line.qubits) == (1e-4, 0.5, 1, None)
    assert values_.backend.identity == hq.Adjoint().identity
    assert hq.Site.read(lab(tmp_path, "")) == LOCAL


def test_policies_are_those_of_the_ledger() -> None:
    assert set(POLICY_NAMES) == set(POLICIES)


DEVICE = "[[devices]]\nname = 'd'\n"
BAD = {
    "not toml": ("name =", "Invalid value"),
    "key at the top": ("polices = 'x'", "no key 'polices' at the top; .* Did you mean 'policy'"),
    "key of the cluster": ("[cluster]\nworker = 3", "no key 'worker' in .cluster.; .* Did you mean 'workers'"),
    "key of a device": (DEVICE + "slot = 3", "no key 'slot' in the device 'd'; .* Did you mean 'slots'"),
    "key of another engine": (DEVICE + "engine = 'adjoint'\nmethod = 'statevector'", "no key 'method' in the device"),
    "key of noise": (DEVICE + "noise = { two = 0.1 }", "no key 'two' in its noise"),
    "no name": ("[[devices]]\nslots = 3", "a device has no name"),
    "name with a slash": ("[[devices]]\nname = '../x'", "cannot name a device"),
    "name of a simulator": ("[[devices]]\nname = 'stabilizer'", "stands for a simulator already"),
    "devices as a table": ("[devices]\nname = 'd'", "below a line ..devices.."),
    "device twice": (DEVICE + DEVICE, "more than one device named d"),
    "negative memory": (DEVICE + "memory = -1", "memory of device 'd': -1 is not an amount of memory"),
    "odd memory": (DEVICE + "memory = 'much'", "'much' is not an amount of memory"),
    "no slots": (DEVICE + "slots = 0", "slots of device 'd' is 0"),
    "half a slot": (DEVICE + "slots = 0.5", "slots of device 'd' is 0.5"),
    "no qubits": (DEVICE + "qubits = 0", "qubits of device 'd' is 0"),
    "negative cost": (DEVICE + "cost_per_shot = -1.0", "cost_per_shot of device 'd' is -1.0"),
    "endless latency": (DEVICE + "latency = inf", "latency of device 'd' is inf"),
    "unknown engine": (DEVICE + "engine = 'aeer'", "engine is 'aeer' in the device 'd'"),
    "unknown method": (DEVICE + "method = 'exact'", "in the device 'd': 'exact' is not a method of Aer"),
    "noise of what has none": (DEVICE + "method = 'stabilizer'\nnoise = { readout = 0.1 }", "noise and method"),
    "no probability": (DEVICE + "noise = { readout = 2 }", "in the device 'd': .*readout"),
    "noise as a number": (DEVICE + "noise = 0.1", "noise is 0.1; it must be a table"),
    "noise of what has none to give": (DEVICE + "noise = { of = 'devices:nothing' }", "noise is a str"),
    "noise of what cannot be made": (DEVICE + "noise = { of = 'devices:nowhere' }", "could not be made"),
    "backend that is missing": ("backend = 'fez'\n" + DEVICE, "'fez' is neither a device of the site 'local'"),
    "policy": ("policy = 'best'", "no policy 'best'; there are earliest-finish"),
    "no workers": ("[cluster]\nworkers = 0", "workers is 0"),
    "address and workers": ("[cluster]\naddress = 'tcp://h:1'\nworkers = 2", "has an address and workers"),
}


@pytest.mark.parametrize(("text", "words"), BAD.values(), ids=BAD.keys())
def test_a_file_that_is_wrong_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(hq.WorkflowError, match=words) as caught:
        hq.Site.read(lab(tmp_path, text))
    assert "site.toml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(hq.WorkflowError, match="cannot be read"):
        hq.Site.read(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("site", "words"),
    [(3, "site is a int"), (hq.Site, "site is a type")],
)
def test_what_is_no_site(store: Path, site: Any, words: str) -> None:
    with pytest.raises(hq.WorkflowError, match=words):
        hq.run(values, [None], store=store, site=site)


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans()), max_size=4))
def test_no_key_is_passed_over(table: dict[str, Any]) -> None:
    table = {"name": "d", **table}
    known = {"name", "engine", "method", "noise", "bond_dimension", "qubits", "memory", "slots", "cost_per_shot",
             "latency"}  # fmt: skip
    try:
        _device(table)
    except hq.WorkflowError:
        return
    assert set(table) <= known


def test_workers_within_bounds() -> None:
    assert hq.Site(most_workers=4).local_workers == 1
    assert hq.Site(workers=2, most_workers=4).local_memory(100) == 25
    with pytest.raises(hq.WorkflowError, match="most_workers is 2, fewer than workers, 3"):
        hq.Site(workers=3, most_workers=2)


# -- what a name stands for --------------------------------------------------------------------------------------------


def test_a_name_stands_for_a_backend_and_a_place(tmp_path: Path) -> None:
    site = hq.Site.read(lab(tmp_path))
    assert site.resolve(None) == site.resolve("noisy") == (site.devices[0].backend, "noisy")
    assert site.resolve("stabilizer")[0].identity == hq.Aer("stabilizer").identity
    assert site.resolve("stabilizer")[1] == ""
    assert site.resolve(NOISY) == (NOISY, "")
    with pytest.raises(hq.NoDevice, match=r"it has noisy, line, values.* Did you mean 'noisy'"):
        site.resolve("nosy")


# -- what runs where ---------------------------------------------------------------------------------------------------


def test_devices_evaluate_what_names_them(store: Path, tmp_path: Path) -> None:
    """No cluster is started for it: the devices are beside the driver."""
    site = hq.Site.read(lab(tmp_path))
    found = hq.run(values, [None, "noisy", "values"], name="a", store=store, site=site)
    expected = hq.run(values, [NOISY, NOISY, hq.Adjoint()], name="b", store=store)
    assert found == expected
    assert [e.where for e in recorded(store / "a", records.Evaluation)] == ["noisy", "noisy", "values"]
    assert {e.where for e in recorded(store / "b", records.Evaluation)} == {"driver"}


def test_what_has_the_backend_of_a_device_runs_there_unnamed(store: Path, tmp_path: Path) -> None:
    line = hq.Backend("devices:line", {"qubits": 4})
    found = hq.run(sampled, line, name="a", store=store, site=hq.Site.read(lab(tmp_path)))
    assert abs(found - hq.run(values, [None], store=store)[0]) < 0.2
    assert [e.where for e in recorded(store / "a", records.Evaluation)] == ["line"]


def test_a_simulator_of_a_site_takes_only_what_names_it(store: Path) -> None:
    site = hq.Site(devices=(hq.Device(name="apart", backend="aer"),))
    hq.run(values, [None, "aer", "apart"], name="a", store=store, site=site)
    assert [e.where for e in recorded(store / "a", records.Evaluation)] == ["driver", "driver", "apart"]


def test_a_run_goes_on_when_its_device_has_another_name(store: Path, tmp_path: Path) -> None:
    first = hq.Site(devices=(hq.Device(name="old", backend=NOISY),), backend="old")
    again = hq.Site(devices=(hq.Device(name="new", backend=NOISY, slots=2),), backend="new")
    whole = hq.run(values, [None], name="a", store=store, site=first)
    assert hq.run(values, [None], name="a", store=store, site=again) == whole
    assert len(recorded(store / "a", records.Evaluation)) == 1
    with pytest.raises(hq.Diverged, match="another backend"):
        hq.run(values, [None], name="a", store=store)


@pytest.mark.parametrize("backend", ["values", "noisy"])
@pytest.mark.parametrize("method", ["COBYLA", "L-BFGS-B"])
def test_loops_run_on_devices_with_the_same_bits(store: Path, tmp_path: Path, backend: str, method: str) -> None:
    site = hq.Site.read(lab(tmp_path))
    same = {"values": hq.Adjoint(), "noisy": NOISY}[backend]
    far = hq.run(lowest, backend, method, name="far", store=store, site=site)
    near = hq.run(lowest, same, method, name="near", store=store)
    assert far["x"].tobytes() == near["x"].tobytes()
    wheres = {r.where for _, r in read_records(store / "far") if isinstance(r, records.Row)}
    assert wheres == {backend}


def test_slots_bound_what_runs_side_by_side(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most, now, lock = [0], [0], threading.Lock()
    evaluate = EngineProcess.evaluate

    def counted(self: EngineProcess, *args: Any, **options: Any) -> Any:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:
            return evaluate(self, *args, **options)
        finally:
            with lock:
                now[0] -= 1

    monkeypatch.setattr(EngineProcess, "evaluate", counted)
    site = hq.Site(devices=(hq.Device(name="two", backend=NOISY, slots=2),))
    found = hq.run(many, 30, "two", store=store, site=site)
    assert len(set(found)) == 30
    assert most[0] == 2


@pytest.mark.parametrize(("options", "where"), [({}, "noisy"), ({"backend": "values"}, "values")], ids=["file", "both"])
def test_the_commands_site_counts_before_the_scripts_keywords(
    store: Path, tmp_path: Path, options: dict[str, str], where: str
) -> None:
    asked = Overrides(site=str(lab(tmp_path)), **options)

    def inner() -> None:
        overrides.set(asked)
        hq.run(values, [None], name="a", store=store, backend="statevector", workers=2)

    contextvars.copy_context().run(inner)
    assert [e.where for e in recorded(store / "a", records.Evaluation)] == [where]


def test_what_a_device_cannot_take_is_refused_with_need_and_have(store: Path, tmp_path: Path) -> None:
    site = hq.Site.read(lab(tmp_path))
    assert "needs 4 qubits, has 3" in hq.run(refused, 4, "noisy", store=store, site=site)
    small = hq.Site(devices=(hq.Device(name="small", backend="statevector", memory="64 MiB"),))
    found = hq.run(refused, 24, "small", store=store, site=small)
    assert found.startswith("TooLarge")
    assert "64 MiB" in found
    with pytest.raises(hq.NoDevice, match="'nosy' is neither a device"):
        hq.run(values, ["nosy"], store=store, site=site)


def test_a_lost_engine_of_a_device_is_replaced(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    run = EngineProcess.run

    def deadly(self: EngineProcess, *args: Any, **options: Any) -> Any:
        if not killed and self.name.startswith("one"):
            self.start()
            killed.append(1)
            self.kill()
        return run(self, *args, **options)

    monkeypatch.setattr(EngineProcess, "run", deadly)
    site = hq.Site(devices=(hq.Device(name="one", backend=NOISY),))
    found = hq.run(values, ["one"], name="a", store=store, site=site)
    assert killed
    assert found == hq.run(values, [NOISY], name="b", store=store)
