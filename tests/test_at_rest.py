"""What a run leaves on disk: data only, of allowed kinds, without secrets of the environment."""

from __future__ import annotations

import io
import json
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from qiskit import QuantumCircuit
from runs import journal, report

import hybridq as hq

TOKENS = {
    "IBM_QUANTUM_TOKEN": "planted-token-0123456789",
    "QISKIT_IBM_TOKEN": "planted-token-abcdefghij",
    "AWS_SECRET_ACCESS_KEY": "planted-secret-klmnopqrst",
    "HYBRIDQ_PASSWORD": "planted-password-uvwxyz",
    "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY": "planted-key-9876543210",
}


@hq.classical
def table(n: int) -> dict[str, Any]:
    return {"array": np.arange(float(n)), "text": "x" * 5000, "set": {1, 2}, "bytes": b"\x80\x04."}


@hq.classical
def refuses() -> None:
    raise RuntimeError("no")


@hq.quantum
def energy(theta: Any, shots: int | None) -> Any:
    circuit = QuantumCircuit(2)
    circuit.h(0)
    circuit.cx(0, 1)
    return hq.expval(circuit, {"ZZ": 1.0, "XX": 0.5}, shots=shots)


@hq.workflow
def everything() -> list[Any]:
    found = [table(1000)["array"].sum(), float(energy(None, None)), float(energy(None, 50))]
    try:
        refuses()
    except RuntimeError as error:
        found.append(str(error))
    bowl = hq.minimize(lambda x: float(x @ x), [0.5, 0.4], method="COBYLA", options={"maxiter": 5})
    return [*found, bowl.fun, hq.now() > 0, hq.map(table, [1, 2])]


@pytest.fixture(scope="module")
def recorded(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with every kind of record, made while there are secrets in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOKENS.items():
            patch.setenv(name, value)
        return Path(report(everything, name="all", store=tmp_path_factory.mktemp("store"), cluster=client).directory)


def test_nothing_of_the_environment_is_recorded(recorded: Path) -> None:
    files = [path for path in recorded.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        data = path.read_bytes()
        for name, value in TOKENS.items():
            assert value.encode() not in data, path
            assert name.encode() not in data, path


def test_what_is_recorded_of_the_machine_is_a_list_of_names(recorded: Path) -> None:
    (opened,) = [line for line in journal(recorded) if line["k"] == "opened"]
    assert set(opened) == {"chain", "k", "host", "pid", "time", "python", "processor", "versions", "command"}
    assert set(opened["versions"]) == {
        "hybridq-scheduler", "numpy", "scipy", "qiskit", "qiskit-aer", "pyscf", "dask", "distributed",
    }  # fmt: skip


def pickled(data: bytes) -> bool:
    """Whether ``data`` is a pickle from its first byte to its last, protocol 0 to 5."""
    try:
        last = [(code.name, place) for code, _, place in pickletools.genops(data)][-1]
    except Exception:  # noqa: BLE001  # of pickletools: any, for what is no pickle
        return False
    return last[0] == "STOP" and last[1] == len(data) - 1


def test_no_pickle_is_at_rest(recorded: Path) -> None:
    assert pickled(np.arange(3.0).dumps())
    kinds = set()
    for path in recorded.rglob("*"):
        if path.is_dir():
            continue
        data = path.read_bytes()
        kinds.add(path.suffix)
        assert not pickled(data) or not data, path
        assert b"cnumpy" not in data, path
        match path.suffix:
            case ".npy":
                array = np.load(io.BytesIO(data), allow_pickle=False)
                assert array.dtype.kind in "biufcSU"
            case ".json":
                json.loads(data)
            case ".jsonl":
                assert all(json.loads(line) for line in data.splitlines())
            case ".qpy":
                assert data[:6] == b"QISKIT"
                assert data[6] >= 13
            case _:
                assert (path.name, data) == ("owner", b"")
    assert kinds == {".jsonl", ".npy", ".json", ".qpy", ""}
