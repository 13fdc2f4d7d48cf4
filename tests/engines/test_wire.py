"""What crosses the border of an engine process comes out as it went in."""

from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qiskit import QuantumCircuit
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

from hybridq import errors
from hybridq.engines import wire
from hybridq.errors import Corrupt, EngineFailed, HybridqError, TooLarge, WorkflowError
from hybridq.program import Outcome


def same_arrays(left, right):
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def round_trip(batch):
    templates = {digest: wire.decode_template(data) for digest, data in batch.templates.items()}
    return wire.unpack(batch.payload, templates.get)


def test_programs(make):
    ansatz = efficient_su2(3, reps=1)
    theta = np.random.default_rng(0).normal(size=(2, 1, 12))
    observables = [SparsePauliOp(["XYZ", "III"], [0.25, -1 / 3]), SparsePauliOp(["ZZZ"], [1e-300])]
    programs = [
        make(ansatz, observables, theta),
        make(ansatz, observables, theta[0, 0], 100),
        make(ansatz, None, theta, 2**31 - 1),
        make(QuantumCircuit(1), "Z"),
    ]
    batch = wire.pack(programs, max_bytes=12345)
    assert len(batch.templates) == 3
    unpacked = round_trip(batch)
    assert unpacked.max_bytes == 12345
    assert unpacked.missing == ()
    for program, copy in zip(programs, unpacked.programs, strict=True):
        assert same_arrays(program.theta, copy.theta)
        assert same_arrays(program.seeds, copy.seeds)
        for name in ("shots", "plan", "batch_shape", "observables_shape"):
            assert getattr(program, name) == getattr(copy, name)
        for name in ("digest", "num_qubits", "num_parameters", "num_gates", "num_paulis", "sampled_in_place"):
            assert getattr(program.template, name) == getattr(copy.template, name)
        for observable, other in zip(program.template.observables, copy.template.observables, strict=True):
            assert observable.to_list() == other.to_list()
        assert [p.name for p in program.template.circuit.parameters] == [
            p.name for p in copy.template.circuit.parameters
        ]
        copy.theta[...] = 0  # writable, as the original is


def test_a_template_is_encoded_once(make):
    program = make(efficient_su2(2, reps=1), "ZZ", np.zeros(8))
    (first,) = wire.pack([program]).templates.values()
    (second,) = wire.pack([program, program]).templates.values()
    assert first is second


def test_missing_templates_are_named(make):
    programs = [make(QuantumCircuit(1), label) for label in "XYZ"]
    batch = wire.pack(programs)
    unpacked = wire.unpack(batch.payload, {programs[1].template.digest: programs[1].template}.get)
    assert unpacked.programs == ()
    assert set(unpacked.missing) == {programs[0].template.digest, programs[2].template.digest}


def test_an_error_takes_the_place_of_its_programs(make):
    good, bad = make(QuantumCircuit(1), "Z"), make(QuantumCircuit(1), "X")
    batch = wire.pack([bad, good, bad])
    error = Corrupt("unreadable")
    find = {good.template.digest: good.template, bad.template.digest: error}.get
    programs = wire.unpack(batch.payload, find).programs
    assert programs[0] is programs[2] is error
    assert programs[1].template is good.template


def test_old_qpy_is_not_loaded(make):
    data = wire.encode_template(make(QuantumCircuit(1), "Z").template)
    at = data.index(b"QISKIT") + 6
    with pytest.raises(Corrupt, match="version 13"):
        wire.decode_template(data[:at] + b"\x0c" + data[at + 1 :])
    with pytest.raises(Corrupt, match="version 13"):
        wire.decode_template(data.replace(b"QISKIT", b"PICKLE"))


def test_circuits_that_cannot_be_serialised_are_refused(make):
    program = make(QuantumCircuit(1), "Z")
    template = dataclasses.replace(program.template, circuit=QuantumCircuit(1, metadata={"object": object()}), cache={})
    with pytest.raises(WorkflowError, match="cannot be sent"):
        wire.pack([dataclasses.replace(program, template=template)])


VALUES = hnp.arrays(np.float64, st.tuples(st.integers(0, 3), st.integers(0, 3)), elements=st.floats(width=64))


@given(values=VALUES, bits=st.none() | hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, min_side=0)))
def test_outcomes(values, bits):
    outcome = Outcome(values, -values, bits, 0.1 + 0.2, 2**40)
    (copy,) = wire.unpack_outcomes(wire.pack_outcomes([outcome]))
    assert same_arrays(copy.values, values)
    assert same_arrays(copy.stderrs, -values)
    assert copy.bits is None if bits is None else same_arrays(copy.bits, bits)
    assert (copy.seconds, copy.peak_bytes) == (outcome.seconds, outcome.peak_bytes)


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_keep_their_class_and_message(name):
    error = getattr(errors, name)("what was found, 'quoted' — and the remedy\n")
    outcome = Outcome(np.ones((1, 1)), np.zeros((1, 1)), None, 0.5, 0)
    first, copy, last = wire.unpack_outcomes(wire.pack_outcomes([outcome, error, outcome]))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert first.values == last.values == 1.0


def test_unknown_errors_are_failures_of_the_engine():
    class Local(TooLarge):
        pass

    (copy,) = wire.unpack_outcomes(wire.pack_outcomes([Local("text")]))
    assert type(copy) is EngineFailed
    assert str(copy) == "Local: text"
    assert isinstance(copy, HybridqError)


def test_truncated_messages_are_noticed(make):
    payload = wire.pack([make(efficient_su2(2, reps=1), "ZZ", np.zeros(8))]).payload
    template = make(efficient_su2(2, reps=1), "ZZ", np.zeros(8)).template
    with pytest.raises(Corrupt, match="array"):
        wire.unpack(payload[:-1], lambda digest: template)
    outcomes = wire.pack_outcomes([Outcome(np.ones((3, 1)), np.ones((3, 1)), None, 0.0, 0)])
    with pytest.raises(Corrupt, match="array"):
        wire.unpack_outcomes(outcomes[:-1])
    with pytest.raises(Corrupt, match="header"):
        wire.unpack_outcomes(outcomes[:6])


def test_requests():
    templates = {"a": b"\x00" * 5, "b": b"", "c": b"xyz"}
    assert wire.split_request(wire.join_request(templates, b"payload")) == (templates, b"payload")
    assert wire.split_request(wire.join_request({}, b"")) == ({}, b"")


def test_headers_are_plain_json(make):
    payload = wire.pack([make(QuantumCircuit(1), "Z")]).payload
    (length,) = struct.unpack_from("<I", payload)
    assert json.loads(payload[4 : 4 + length])["programs"][0][1:4] == [1, 0, None]
