"""Groups, their circuits, and means of what was drawn or read, against dense matrices and loops over single shots."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qiskit import QuantumCircuit
from qiskit.primitives import BitArray
from qiskit.quantum_info import Clifford, Operator, Pauli, SparsePauliOp, Statevector

from hybridq.engines import measuring
from hybridq.engines.measuring import (
    cumulative,
    draws,
    generator,
    mean_of_bits,
    mean_of_draws,
    measured,
    probabilities,
    rotated,
    split,
)
from hybridq.errors import WorkflowError
from hybridq.problems import molecule
from hybridq.program import GROUPINGS

SETTINGS = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
groupings = pytest.mark.parametrize("grouping", GROUPINGS)


@st.composite
def observables(draw, most=5):
    """Random observables with Paulis that occur once, equal magnitudes among them."""
    n = draw(st.integers(1, most))
    labels = draw(st.lists(st.text("IXYZ", min_size=n, max_size=n), min_size=1, max_size=25, unique=True))
    numbers = st.one_of(st.sampled_from([1.0, -1.0, 0.5]), st.floats(0.01, 3), st.floats(-3, -0.01))
    return SparsePauliOp(labels, draw(st.lists(numbers, min_size=len(labels), max_size=len(labels))))


def circuit_of(group):
    circuit = QuantumCircuit(group.num_qubits)
    for name, qubits in group.gates:
        getattr(circuit, name)(*qubits)
    return circuit


def z_strings(group):
    """Labels of the Zs of the group's masks."""
    for words in group.masks.tolist():
        mask = sum(word << 64 * i for i, word in enumerate(words))
        yield "".join("Z" if mask >> q & 1 else "I" for q in reversed(range(group.num_qubits)))


def random_state(n, seed):
    rng = np.random.default_rng(seed)
    state = rng.normal(size=2**n) + 1j * rng.normal(size=2**n)
    return state / np.linalg.norm(state)


def exact(observable, state):
    return np.vdot(state, observable.to_matrix(sparse=True) @ state).real


def key(number):
    return np.array([number, 7], dtype=np.uint64)


def estimates(observable, state, shots, repetitions):
    """Values and standard errors of many estimates, each with a key of its own."""
    layout = split(observable, shots)
    sums = [cumulative(probabilities(rotated(state, group))) for group in observable.groups]
    found = np.empty((repetitions, 2))
    for number in range(repetitions):
        means = [
            mean_of_draws(group, own, total, key(number), stream)
            for stream, (group, own, total) in enumerate(zip(observable.groups, layout, sums, strict=True))
        ]
        found[number] = np.sum(means, axis=0)
    return found[:, 0] + observable.constant, np.sqrt(found[:, 1])


@groupings
class TestGroups:
    @SETTINGS
    @given(observable=observables())
    def test_every_pauli_becomes_a_product_of_zs_with_its_sign(self, grouping, observable):
        n = observable.num_qubits
        paulis = {label: Operator(Pauli(label)).data for label in observable.paulis.to_labels()}
        target = measured(observable, grouping)
        rebuilt = {"I" * n: target.constant} if target.constant else {}
        for group in target.groups:
            unitary = Operator(circuit_of(group)).data
            for string, coefficient in zip(z_strings(group), group.coefficients, strict=True):
                original = unitary.conj().T @ Operator(Pauli(string)).data @ unitary
                ((label, sign),) = [
                    (label, sign)
                    for label, matrix in paulis.items()
                    for sign in (1, -1)
                    if np.allclose(original, sign * matrix)
                ]
                assert label not in rebuilt
                rebuilt[label] = sign * coefficient
            assert group.weight == pytest.approx(np.abs(group.coefficients).sum())
        assert rebuilt == {label: c.real for label, c in observable.to_list()}

    @SETTINGS
    @given(observable=observables())
    def test_the_parts_add_up_to_the_matrix(self, grouping, observable):
        target = measured(observable, grouping)
        total = target.constant * np.eye(2**observable.num_qubits, dtype=complex)
        for group in target.groups:
            unitary = Operator(circuit_of(group)).data
            diagonal = SparsePauliOp(list(z_strings(group)), group.coefficients).to_matrix()
            total += unitary.conj().T @ diagonal @ unitary
        np.testing.assert_allclose(total, observable.to_matrix(), atol=1e-12)

    @SETTINGS
    @given(observable=observables())
    def test_two_qubit_gates_only_where_needed(self, grouping, observable):
        for group in measured(observable, grouping).groups:
            circuit = circuit_of(group)
            strings = [Pauli(string).evolve(Clifford(circuit), frame="h") for string in z_strings(group)]
            shared = all(
                len(set(p.to_label().lstrip("-")[i] for p in strings) - {"I"}) < 2 for i in range(len(strings[0]))
            )
            assert shared or grouping == "commuting"
            assert (circuit.num_nonlocal_gates() == 0) == shared

    @SETTINGS
    @given(observable=observables())
    def test_no_more_groups_than_by_first_fit(self, grouping, observable):
        labels = observable.paulis.to_labels()
        sizes = np.linspace(2, 1, len(labels))  # all different, in this order
        groups = []
        for label in labels:
            if set(label) == {"I"}:
                continue
            for group in groups:
                together = [SparsePauliOp([label, other]) for other in group]
                qubit_wise = grouping == "qubit-wise"
                if all(len(pair.group_commuting(qubit_wise=qubit_wise)) == 1 for pair in together):
                    group.append(label)
                    break
            else:
                groups.append([label])
        assert len(measured(SparsePauliOp(labels, sizes), grouping).groups) <= len(groups)

    @SETTINGS
    @given(observable=observables(), data=st.data())
    def test_the_order_of_the_paulis_and_noise_do_not_matter(self, grouping, observable, data):
        order = data.draw(st.permutations(range(len(observable))))
        noise = 1 + 1e-13 * np.random.default_rng(0).normal(size=len(order))
        one, other = measured(observable, grouping), measured(observable[order], grouping)
        noisy = measured(SparsePauliOp(observable.paulis, observable.coeffs * noise), grouping)
        for target in (other, noisy):
            assert [group.gates for group in target.groups] == [group.gates for group in one.groups]
            for a, b in zip(one.groups, target.groups, strict=True):
                assert sorted(a.masks.tolist()) == sorted(b.masks.tolist())

    @SETTINGS
    @given(observable=observables(6), seed=st.integers(0, 99))
    def test_rotated_states(self, grouping, observable, seed):
        state = random_state(observable.num_qubits, seed)
        before = state.copy()
        for group in measured(observable, grouping).groups:
            found = rotated(state, group)
            expected = Statevector(state).evolve(circuit_of(group)).data
            scale = np.linalg.norm(found)
            assert np.log2(scale**2) == pytest.approx(round(np.log2(scale**2)), abs=1e-9)
            np.testing.assert_allclose(found / scale, expected, atol=1e-12)
            assert np.array_equal(state, before)

    def test_rotated_states_of_more_qubits(self, grouping):
        rng = np.random.default_rng(5)
        labels = ["".join(rng.choice(list("IXYZ"), 8)) for _ in range(60)]
        state = random_state(8, 1)
        gates = set()
        for group in measured(SparsePauliOp(labels, rng.normal(size=60)), grouping).groups:
            found = rotated(state, group)
            gates.update(name for name, _ in group.gates)
            expected = Statevector(state).evolve(circuit_of(group)).data
            np.testing.assert_allclose(found / np.linalg.norm(found), expected, atol=1e-12)
        assert gates == ({"h", "sdg", "cx"} if grouping == "commuting" else {"h", "sdg"})

    def test_more_qubits_than_a_word_has_bits(self, grouping):
        rng = np.random.default_rng(3)
        zs = ["".join(rng.choice(["I", "Z"], 70)) for _ in range(30)]
        mixing = QuantumCircuit(70)
        if grouping == "commuting":
            for q in range(69):
                mixing.cz(q, q + 1)
                mixing.h(q)
        labels = [p.to_label() for p in SparsePauliOp(zs).paulis.evolve(Clifford(mixing))]
        signs = [-1 if label[0] == "-" else 1 for label in labels]
        observable = SparsePauliOp([label.lstrip("-") for label in labels], np.arange(1.0, 31) * signs)
        (group,) = measured(observable, grouping).groups
        assert group.masks.shape == (30, 2)
        back = {}
        for string, coefficient in zip(z_strings(group), group.coefficients, strict=True):
            pauli = Pauli(string).evolve(Clifford(circuit_of(group)), frame="h")
            back[pauli.to_label().lstrip("-")] = -coefficient if pauli.phase else coefficient
        assert back == {label: c.real for label, c in observable.to_list()}

    def test_lithium_hydride(self, grouping):
        hamiltonian = molecule("Li 0 0 0; H 0 0 1.595", basis="sto-3g").hamiltonian
        assert len(hamiltonian) == 631
        target = measured(hamiltonian, grouping)
        assert len(target.groups) <= {"qubit-wise": 136, "commuting": 39}[grouping]
        assert sum(len(group.masks) for group in target.groups) == 630
        # 236 where each gate is the first that will do
        assert sum(len(qubits) == 2 for group in target.groups for _, qubits in group.gates) <= 190
        state = random_state(12, 4)
        total = target.constant
        for group in target.groups:
            chances = probabilities(rotated(state, group))
            diagonal = SparsePauliOp(list(z_strings(group)), group.coefficients).to_matrix(sparse=True).diagonal()
            total += chances @ diagonal.real / chances.sum()
        assert total == pytest.approx(exact(hamiltonian, state), abs=1e-10)

    def test_only_the_identity(self, grouping):
        target = measured(SparsePauliOp(["II", "XX", "XX"], [0.5, 1, -1]), grouping)
        assert target.constant == 0.5
        assert target.groups == ()
        assert split(target, 5) == []
        assert target.nbytes == 0

    def test_bytes(self, grouping):
        observable = SparsePauliOp(["XXXX", "YYZZ", "ZZII", "IXIZ"], [1, 2, 3, 4])
        target = measured(observable, grouping)
        estimates(target, random_state(4, 0), 100, 1)
        held = [a.nbytes for g in target.groups for a in vars(g).values() if isinstance(a, np.ndarray)]
        assert len(held) >= 4 * len(target.groups) - 1  # the tables and matrices are there; ZZII needs no matrix
        assert sum(held) < target.nbytes < 2 * sum(held) + 1024 * len(target.groups)


def test_an_unknown_grouping():
    with pytest.raises(ValueError, match="'none'; choose one of qubit-wise, commuting"):
        measured(SparsePauliOp("X"), "none")


def test_many_paulis_are_compared_row_by_row(monkeypatch):
    rng = np.random.default_rng(0)
    labels = ["".join(rng.choice(list("IXYZ"), 6)) for _ in range(200)]
    observable = SparsePauliOp(labels, rng.normal(size=200))
    for grouping in GROUPINGS:
        whole = measured(observable, grouping)
        monkeypatch.setattr(measuring, "_PAIRS", 50)
        rows = measured(observable, grouping)
        monkeypatch.undo()
        assert [g.masks.tolist() for g in whole.groups] == [g.masks.tolist() for g in rows.groups]


class TestSplit:
    @pytest.mark.parametrize("shots", [3, 5, 6, 7, 50, 1001])
    def test_by_weight(self, shots):
        observable = measured(SparsePauliOp(["XX", "YY", "ZZ", "IZ"], [100.0, 0.01, 3.0, 2.0]), "qubit-wise")
        layout = split(observable, shots)
        assert sum(layout) == shots
        assert min(layout) >= (2 if shots >= 6 else 1)
        assert [group.weight for group in observable.groups] == [100.0, 5.0, 0.01]
        if shots == 1001:
            assert layout == [951, 48, 2]

    @SETTINGS
    @given(observable=observables(), shots=st.integers(1, 3000), grouping=st.sampled_from(GROUPINGS))
    def test_properties(self, observable, shots, grouping):
        target = measured(observable, grouping)
        count = len(target.groups)
        if 0 < shots < count:
            with pytest.raises(WorkflowError, match=f"{shots} shots .* need {count} different measurements"):
                split(target, shots)
            return
        layout = split(target, shots)
        assert len(layout) == count
        assert sum(layout) == (shots if count else 0)
        assert all(own >= (2 if shots >= 2 * count else 1) for own in layout)
        weights = [group.weight for group in target.groups]
        quotas = [shots * weight / sum(weights) for weight in weights]
        if min(quotas, default=2) >= 2:
            assert all(abs(own - quota) < 1 for own, quota in zip(layout, quotas, strict=True))
        for (one, a), (other, b) in pairwise(sorted(zip(weights, layout, strict=True))):
            assert a <= b or one == pytest.approx(other)


class TestDrawing:
    def test_the_generator_is_philox_with_the_key_and_a_counter(self):
        expected = np.random.Generator(np.random.Philox(key=key(5), counter=[0, 0, 3, 2])).random(9)
        assert np.array_equal(generator(key(5), 2, 3).random(9), expected)
        others = [generator(key(5), 2), generator(key(5), 3, 3), generator(key(6), 2, 3)]
        assert all(not np.array_equal(other.random(9), expected) for other in others)

    def test_impossible_states_are_never_drawn(self):
        chances = np.array([0.0, 0.25, 0.0, 0.25, 0.0])
        drawn = np.concatenate(list(draws(cumulative(chances.copy()), 10000, key(1), 0)))
        assert set(drawn.tolist()) == {1, 3}
        (group,) = measured(SparsePauliOp(["IIZ", "IZI"], [1.0, 0.0625]), "qubit-wise").groups
        means = [mean_of_draws(group, shots, cumulative(chances.copy()), key(1), 0)[0] for shots in (4, 10000)]
        for mean in means:  # the state 0 would add 1.0625, the state 4 as well, the state 2 would add 0.9375
            assert -1.0625 <= mean <= -0.9375

    def test_rounding_draws_no_impossible_state(self, monkeypatch):
        """The last number drawn may round up to the total, and chances that are taken off one by one leave a rest."""
        total = cumulative(np.array([0.1] * 10 + [0.0] * 6))
        labels = [f"{mask:04b}".replace("0", "I").replace("1", "Z") for mask in range(1, 16)]
        signs = [(-1) ** label.count("Z") for label in labels]  # their sum is 15 in the last state, else -1
        (group,) = measured(SparsePauliOp(labels, signs), "qubit-wise").groups
        assert mean_of_draws(group, 10**17, total, key(0), 0) == (-1.0, 0.0)

        class Ones:
            def random(self, count):
                return np.ones(count)

        monkeypatch.setattr(measuring, "generator", lambda *_: Ones())
        assert next(draws(total, 3, key(0), 0)).tolist() == [9, 9, 9]

    def test_frequencies(self):
        chances = np.array([0.5, 0.125, 0.0, 0.375])
        drawn = np.concatenate(list(draws(cumulative(3 * chances), 200_000, key(2), 0)))
        assert len(drawn) == 200_000
        counts = np.bincount(drawn, minlength=4)
        assert (np.abs(counts - 200_000 * chances) < 5 * np.sqrt(200_000 * chances) + 1).all()

    def test_pieces_go_on_where_the_last_one_ended(self, monkeypatch):
        total = cumulative(np.arange(1.0, 9))
        (whole,) = draws(total, 1000, key(3), 1)
        monkeypatch.setattr(measuring, "_DRAW", 77)
        pieces = list(draws(total, 1000, key(3), 1))
        assert max(map(len, pieces)) == 77
        assert np.array_equal(np.concatenate(pieces), whole)

    def test_probabilities_below_zero_count_as_zero(self):
        assert cumulative(np.array([0.5, -1e-17, 0.25, -0.5])).tolist() == [0.5, 0.5, 0.75, 0.75]
        assert probabilities(np.array([3 + 4j, 2])).tolist() == [25, 4]


def naive(labels, coefficients, shots):
    """Mean and variance of the mean of Z-strings, one shot after the other; each is a string of bits, qubit 0 last."""
    values = []
    for shot in shots:
        value = 0.0
        for label, coefficient in zip(labels, coefficients, strict=True):
            ones = sum(bit == "1" for bit, factor in zip(shot, label, strict=True) if factor == "Z")
            value += coefficient * (-1) ** ones
        values.append(value)
    return np.mean(values), np.var(values, ddof=1) / len(values)


def packed(shots):
    return BitArray.from_bool_array(np.array([[bit == "1" for bit in shot] for shot in shots]), order="big").array


class TestMeans:
    # few and many Paulis for the three ways to a value: a table, one that is not kept, and one Pauli after the other
    @pytest.mark.parametrize(
        ("n", "paulis", "shots"),
        [(1, 1, 5), (3, 5, 200), (9, 40, 300), (13, 70, 2500), (13, 3, 50), (40, 9, 80), (63, 4, 60), (64, 9, 90),
         (65, 9, 90), (70, 12, 150), (70, 400, 20), (130, 5, 40)],
    )  # fmt: skip
    def test_of_bits_are_those_of_a_loop(self, n, paulis, shots):
        rng = np.random.default_rng(n)
        labels = sorted({"".join(rng.choice(["I", "Z"], n)) for _ in range(paulis)} - {"I" * n})
        labels.append("Z" + "I" * (n - 1))
        coefficients = rng.normal(size=len(labels))
        bits = ["".join(rng.choice(["0", "1"], n, p=[0.7, 0.3])) for _ in range(shots)]
        (group,) = measured(SparsePauliOp(labels, coefficients), "qubit-wise").groups
        assert group.gates == ()
        expected = naive(labels, coefficients, bits)
        np.testing.assert_allclose(mean_of_bits(group, packed(bits)), expected, rtol=1e-10, atol=1e-13)

    def test_of_bits_in_pieces(self, monkeypatch):
        rng = np.random.default_rng(0)
        for n in (5, 70):
            labels = ["Z" * n, "Z" + "I" * (n - 1), "I" * (n - 1) + "Z"]
            bits = ["".join(rng.choice(["0", "1"], n)) for _ in range(500)]
            (group,) = measured(SparsePauliOp(labels, [1, 2, 3]), "qubit-wise").groups
            whole = mean_of_bits(group, packed(bits))
            monkeypatch.setattr(measuring, "_DRAW", 33)
            np.testing.assert_allclose(mean_of_bits(group, packed(bits)), whole, rtol=1e-12)
            np.testing.assert_allclose(whole, naive(labels, [1, 2, 3], bits), rtol=1e-12)
            monkeypatch.undo()

    @pytest.mark.parametrize("n", [6, 13])
    def test_of_fewer_draws_than_states_are_those_of_the_draws(self, n, monkeypatch):
        monkeypatch.setattr(measuring, "_DRAW", 17)
        total = cumulative(np.random.default_rng(0).exponential(size=2**n))
        labels, coefficients = ["Z" * n, "Z" + "I" * (n - 1), "I" * (n - 1) + "Z"], [0.5, 0.2, -0.7]
        (group,) = measured(SparsePauliOp(labels, coefficients), "qubit-wise").groups
        drawn = [f"{state:0{n}b}" for piece in draws(total, 60, key(4), 2, 9) for state in piece.tolist()]
        found = mean_of_draws(group, 60, total, key(4), 2, 9)
        np.testing.assert_allclose(found, naive(labels, coefficients, drawn), rtol=1e-12)
        assert mean_of_draws(group, 60, total, key(4), 3, 9) != found

    def test_of_more_draws_than_states_are_those_of_a_multinomial(self):
        chances = np.array([0.5, 0.125, 0.0, 0.375])
        labels, coefficients = ["ZZ", "IZ"], [0.5, 0.2]
        (group,) = measured(SparsePauliOp(labels, coefficients), "qubit-wise").groups
        counts = generator(key(4), 2, 9).multinomial(60, chances)
        bits = [f"{state:02b}" for state, count in enumerate(counts) for _ in range(count)]
        found = mean_of_draws(group, 60, cumulative(8 * chances), key(4), 2, 9)
        np.testing.assert_allclose(found, naive(labels, coefficients, bits), rtol=1e-12)
        assert mean_of_draws(group, 60, cumulative(8 * chances), key(4), 2, 8) != found

    def test_a_single_shot_gets_the_largest_deviation(self):
        (group,) = measured(SparsePauliOp(["ZZ", "IZ"], [0.7, -0.4]), "qubit-wise").groups
        for mean, variance in (
            mean_of_draws(group, 1, cumulative(np.full(4, 0.25)), key(0), 0),
            mean_of_draws(group, 1, cumulative(np.array([1.0])), key(0), 0),
            mean_of_bits(group, packed(["01"])),
        ):
            assert abs(mean) == pytest.approx(1.1) or abs(mean) == pytest.approx(0.3)
            assert variance == pytest.approx(1.1**2)

    def test_paulis_that_cancel_in_every_shot_have_no_variance(self):
        bell = np.array([1, 0, 0, 1]) / np.sqrt(2)
        (group,) = measured(SparsePauliOp(["IZ", "ZI"], [0.1, -0.1]), "qubit-wise").groups
        assert mean_of_draws(group, 100, cumulative(probabilities(bell)), key(0), 0) == (0.0, 0.0)

    def test_a_certain_outcome_has_no_variance(self):
        (group,) = measured(SparsePauliOp(["IZ", "ZZ", "ZI"], [0.1, 0.2, 0.7]), "qubit-wise").groups
        for shots in (*range(3, 99), 99999):  # sums that round differently
            mean, variance = mean_of_draws(group, shots, cumulative(np.array([0, 0.3, 0, 0])), key(0), 0)
            assert mean == pytest.approx(0.4)  # -0.1 - 0.2 + 0.7
            assert variance == 0.0

    def test_a_small_variance_beside_a_large_mean(self):
        labels, coefficients = ["IZ", "ZI"], [1e9, 1e-3]
        (group,) = measured(SparsePauliOp(labels, coefficients), "qubit-wise").groups
        bits = ["00", "10", "10", "00", "10"] * 20
        mean, variance = mean_of_bits(group, packed(bits))
        assert mean == pytest.approx(1e9 - 2e-4, abs=2e-7)
        assert variance == pytest.approx(np.var([1e-3, -1e-3, -1e-3, 1e-3, -1e-3] * 20, ddof=1) / 100, rel=1e-3)


def heisenberg(n):
    """A chain in a field, with strong and weak bonds in turn: those of strong ones commute, so grouping matters."""
    bonds = [("I" * q + pauli * 2 + "I" * (n - q - 2), (1.0, 0.6)[q % 2]) for q in range(n - 1) for pauli in "XYZ"]
    return SparsePauliOp.from_list([*bonds, *(("I" * q + "Z" + "I" * (n - q - 1), 0.3) for q in range(n))])


@groupings
class TestErrorBars:
    @pytest.mark.parametrize(("n", "shots"), [(2, 400), (3, 400), (6, 120)])
    def test_are_calibrated(self, grouping, n, shots):
        """Bounds are four standard deviations; the last case draws single shots, too few for pulls to be normal."""
        observable, state, repetitions = heisenberg(n), random_state(n, n), 2500
        target = measured(observable, grouping)
        assert any(len(qubits) == 2 for group in target.groups for _, qubits in group.gates) == (
            grouping == "commuting"
        )
        values, stderrs = estimates(target, state, shots, repetitions)
        error = values - exact(observable, state)
        assert abs(error.mean()) < 4 * values.std() / np.sqrt(repetitions)
        assert np.sqrt(np.mean(stderrs**2)) == pytest.approx(values.std(), rel=4 / np.sqrt(2 * repetitions))
        if shots == 400:
            pulls = error / stderrs
            assert abs(pulls.mean()) < 4 / np.sqrt(repetitions)
            assert abs(pulls.std() - 1) < 4 / np.sqrt(2 * repetitions)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["heisenberg", "LiH"])
    def test_are_calibrated_to_three_percent(self, grouping, name):
        """10,000 estimates: standard deviation of the pulls within 0.03 of 1 (4.2 of its own), mean within 0.04."""
        if name == "heisenberg":
            observable, state = heisenberg(4), random_state(4, 1)
        else:
            problem = molecule("Li 0 0 0; H 0 0 1.595", basis="sto-3g")
            observable, state = problem.hamiltonian, 0.2 * random_state(12, 1)
            energies = observable.to_matrix(sparse=True).diagonal().real
            state[energies.argmin()] += 1.0  # Hartree-Fock: the lowest of all determinants
            state /= np.linalg.norm(state)
        values, stderrs = estimates(measured(observable, grouping), state, 20_000, 10_000)
        pulls = (values - exact(observable, state)) / stderrs
        print(f"{grouping} {name}: pulls {pulls.mean():+.4f} +- {pulls.std():.4f}, stderr {stderrs.mean():.3g}")
        assert abs(pulls.std() - 1) <= 0.03
        assert abs(pulls.mean()) <= 0.04
