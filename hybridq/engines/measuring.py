"""How an observable is measured: groups of Paulis, the circuit that measures each, and means of what was drawn or read.

A group is a set of commuting Paulis, with a Clifford circuit after which each of them is a product of Zs up to its
sign. Every shot then gives all of them at once, and the variance is that of their sum over the shots, covariances
included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence
from numpy.typing import NDArray
from qiskit.quantum_info import SparsePauliOp

from hybridq.engines.lowering import without_identity
from hybridq.errors import WorkflowError
from hybridq.program import GROUPINGS

__all__ = [
    "Group",
    "Measured",
    "cumulative",
    "draws",
    "generator",
    "mean_of_bits",
    "mean_of_draws",
    "measured",
    "probabilities",
    "rotated",
    "split",
]

Array = NDArray[Any]
Gates = tuple[tuple[str, tuple[int, ...]], ...]

_DRAW = 2**17  # shots drawn at a time, which bounds the memory of drawing; part of what fixes the bits
_CELLS = 2**16  # signs worked out at a time
_NARROW = 12  # qubits up to which a group keeps its value in every basis state, 32 KiB at most
_DENSE = 5  # qubits up to which a group keeps the matrix of its gates, 16 KiB at most
_PAIRS = 2**12  # Paulis up to which all pairs are compared once, 16 MiB at most


# -- groups ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Group:
    """Paulis of an observable that one measurement of every qubit gives together."""

    num_qubits: int
    gates: Gates
    """Clifford gates (``h``, ``sdg``, ``cx``) with their qubits, to be applied in this order before every qubit is
    measured in the computational basis."""
    masks: Array
    """For each Pauli, the bits whose parity is its sign: uint64, shape (paulis, words), qubits 0 to 63 in word 0."""
    coefficients: Array
    """Shape (paulis,), with the signs that the gates bring."""
    weight: float
    """Sum of the magnitudes of the coefficients."""

    @property
    def nbytes(self) -> int:
        """Bytes that the group takes once it was used."""
        table = 8 << self._width if self._width <= _NARROW else 0
        matrix = 16 << 2 * self.num_qubits if self.num_qubits <= _DENSE else 0
        return self.masks.nbytes + self.coefficients.nbytes + 128 * len(self.gates) + table + matrix + 512

    @cached_property
    def _width(self) -> int:
        """Qubits up to the last one that matters."""
        used: list[int] = np.bitwise_or.reduce(self.masks, axis=0).tolist()
        return max(64 * word + bits.bit_length() for word, bits in enumerate(used))

    @cached_property
    def _matrix(self) -> Array:
        """What the gates do, shape (states, states), times a power of sqrt(2)."""
        states = 1 << self.num_qubits
        rows = _applied(self.gates, np.eye(states, dtype=np.complex128).reshape(-1))  # each row is a state of its own
        return np.ascontiguousarray(rows.reshape(states, states).T)

    @cached_property
    def _table(self) -> Array:
        return self._transformed()

    def _transformed(self) -> Array:
        """The group's part of the observable in every basis state, shape (2**_width,): a Walsh-Hadamard transform."""
        table = np.zeros(1 << self._width)
        table[self.masks[:, 0]] = self.coefficients
        for qubit in range(self._width):
            _butterfly(table, qubit)
        return table

    def _parts(self, states: Array) -> Array:
        """The group's part of the observable in basis ``states``, integers, shape (states,)."""
        if self._width <= _NARROW:
            return np.asarray(self._table[states & (len(self._table) - 1)])
        if self._width < 48 and self._width << self._width <= len(self.masks) * len(states):
            return np.asarray(self._transformed()[states & ((1 << self._width) - 1)])
        return self._sums(states.astype(np.uint64)[None])

    def _sums(self, words: Array) -> Array:
        """The group's part of the observable for bits in ``words``, uint64, shape (words, states)."""
        count = words.shape[1]
        parts = np.zeros(count)
        step = max(1, _CELLS // max(1, count))
        for start in range(0, len(self.masks), step):
            own = words[0] & self.masks[start : start + step, :1]
            for word, mask in zip(words[1:], self.masks[start : start + step, 1:].T, strict=True):
                own ^= word & mask[:, None]  # the parity of two words is that of their exclusive or
            signs = self.coefficients[start : start + step, None]
            parts += np.where(np.bitwise_count(own) & 1, -signs, signs).sum(axis=0)
        return parts


@dataclass(frozen=True, eq=False)
class Measured:
    """An observable as what is measured: groups, and the part that needs no measurement."""

    constant: float
    groups: tuple[Group, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the groups take once they were used."""
        return sum(group.nbytes for group in self.groups)


def measured(observable: SparsePauliOp, grouping: str) -> Measured:
    """``observable`` as groups by ``grouping``, one of `GROUPINGS`.

    Which groups these are is decided here and not by a library's colouring of a graph, because that may change with the
    library's version, and with it which samples are drawn.
    """
    if grouping not in GROUPINGS:
        raise ValueError(f"grouping is {grouping!r}; choose one of {', '.join(GROUPINGS)}")
    constant, rest = without_identity(observable)
    if rest is None:
        return Measured(constant, ())
    x, z, coefficients = np.asarray(rest.paulis.x), np.asarray(rest.paulis.z), np.asarray(rest.coeffs.real)
    sizes = _sizes(coefficients)
    # Of equal ones, those with equally many Ys stay together, as of an excitation's Paulis these commute: 22 groups for
    # LiH instead of 32. What is still equal goes by its bits, and never by its place in the observable.
    order = np.lexsort((*_packed(z).T, *_packed(x).T, (x & z).sum(axis=1), -sizes))
    x, z, coefficients = x[order], z[order], coefficients[order]
    numbers = _numbered(sizes[order], _conflicts(_packed(x), _packed(z), grouping))
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    return Measured(constant, tuple(_group(x[own], z[own], coefficients[own]) for own in members))


def _sizes(coefficients: Array) -> Array:
    """Magnitudes as whole numbers, int64: equal coefficients of a molecule differ by noise, and should not here."""
    magnitudes = np.abs(coefficients)
    return np.asarray(np.rint(magnitudes / magnitudes.max() * 2**30), dtype=np.int64)


def _numbered(sizes: Array, conflicts: Callable[[int], Array]) -> Array:
    """A group's number for each Pauli, shape (paulis,); the largest come first.

    First fit from the largest down puts as much as possible into few groups, and so has small variances (sorted
    insertion: Crawford et al., Quantum 5, 385 (2021)). Then first fit again in the order of these groups, which never
    needs more of them, whatever their order, and mostly fewer (iterated greedy: Culberson and Luo, DIMACS Ser. Discrete
    Math. Theor. Comput. Sci. 26, 245 (1996)): backwards twice, which merges the many small groups at the end and comes
    back to the first order, then by weight, which fills the heaviest, as they have most shots. Colouring by saturation
    has hardly fewer groups, and tears large coefficients apart: for LiH, qubit-wise, one group less and twice the
    variance.
    """
    numbers = _first_fit(np.arange(len(sizes)), conflicts)
    for _ in range(2):
        numbers = _first_fit(np.argsort(-numbers, kind="stable"), conflicts)
    weights = np.zeros(numbers.max() + 1, dtype=np.int64)
    np.add.at(weights, numbers, sizes)
    return _first_fit(np.lexsort((numbers, -weights[numbers])), conflicts)


def _first_fit(order: Array, conflicts: Callable[[int], Array]) -> Array:
    """Each Pauli into the first group that it fits, one after the other."""
    numbers = np.zeros(len(order), dtype=np.int64)  # from 1 on; 0 is not placed yet
    taken = np.empty(len(order) + 2, dtype=bool)
    count = 0
    for pauli in order.tolist():
        taken[: count + 2] = False
        taken[numbers * conflicts(pauli)] = True
        number = int(taken[1 : count + 2].argmin()) + 1
        numbers[pauli] = number
        count = max(count, number)
    return numbers - 1


def _conflicts(x: Array, z: Array, grouping: str) -> Callable[[int], Array]:
    """For a Pauli, which ones may not be in its group: bool, shape (paulis,). ``x`` and ``z`` have packed rows."""
    words = [(own_x.copy(), own_z.copy(), own_x | own_z) for own_x, own_z in zip(x.T, z.T, strict=True)]

    def qubit_wise(pauli: int) -> Array:
        differing = [((x ^ x[pauli]) | (z ^ z[pauli])) & used & used[pauli] for x, z, used in words]
        return np.asarray(reduce(np.bitwise_or, differing) != 0)

    def commuting(pauli: int) -> Array:
        parities = [(x & z[pauli]) ^ (z & x[pauli]) for x, z, _ in words]
        return np.asarray((np.bitwise_count(reduce(np.bitwise_xor, parities)) & 1).view(bool))

    row = qubit_wise if grouping == "qubit-wise" else commuting
    if len(x) > _PAIRS:
        return row
    matrix = np.array([row(pauli) for pauli in range(len(x))])
    return lambda pauli: np.asarray(matrix[pauli])


def _packed(bits: Array) -> Array:
    """Rows of ``bits``, shape (rows, qubits), as uint64 words, shape (rows, words)."""
    padded = np.zeros((len(bits), -(-bits.shape[1] // 64) * 64), dtype=bool)
    padded[:, : bits.shape[1]] = bits
    return np.packbits(padded, axis=1, bitorder="little").view("<u8").astype(np.uint64, copy=False)


def split(observable: Measured, shots: int) -> list[int]:
    """Shots of each group: in proportion to its weight, but at least 2 (1 where there are too few).

    Raises `WorkflowError` for fewer shots than groups.
    """
    count = len(observable.groups)
    if count == 0:
        return []
    if shots < count:
        raise WorkflowError(
            f"{shots} shots cannot measure this observable: its Paulis need {count} different measurements, each at "
            f"least once; ask for {count} shots or more, or for a smaller precision."
        )
    weights = np.array([group.weight for group in observable.groups])
    quotas = weights * (shots / weights.sum())
    parts = np.floor(quotas).astype(np.int64)
    rest = shots - int(parts.sum())
    parts[np.argsort(parts - quotas, kind="stable")[:rest]] += 1
    least = 2 if shots >= 2 * count else 1
    while parts.min() < least:
        parts[np.argmin(parts)] += 1
        parts[np.argmax(parts)] -= 1
    return [int(n) for n in parts]


# -- circuits ----------------------------------------------------------------------------------------------------


def _group(x: Array, z: Array, coefficients: Array) -> Group:
    """Commuting Paulis, bools of shape (paulis, qubits), as a group."""
    own = _independent(x, z)
    gates = _diagonalising(x[own], z[own])
    z, flipped = _conjugated(x, z, gates)
    signed = np.where(flipped, -coefficients, coefficients)
    return Group(x.shape[1], gates, _packed(z), signed, float(np.abs(coefficients).sum()))


def _independent(x: Array, z: Array) -> list[int]:
    """The lightest Paulis of which all others are products."""
    rows = [int.from_bytes(row.tobytes(), "big") for row in np.packbits(np.hstack([x, z]), axis=1)]
    reduced: dict[int, int] = {}  # by leading bit
    found = []
    for pauli in np.argsort((x | z).sum(axis=1), kind="stable").tolist():
        row = rows[pauli]
        while row and row.bit_length() in reduced:
            row ^= reduced[row.bit_length()]
        if row:
            reduced[row.bit_length()] = row
            found.append(pauli)
    return found


# What gates make of a Pauli (0 I, 1 X, 2 Z, 3 Y), signs aside.
_AFTER = {"h": np.array([0, 2, 1, 3], dtype=np.uint8), "sdg": np.array([0, 3, 2, 1], dtype=np.uint8)}
# Gates that take a Pauli to Z, and those that also take another one to X.
_TO_Z = {1: ("h",), 2: (), 3: ("sdg", "h")}
_TO_Z_AND_X = {
    (1, 2): ("h",), (1, 3): ("h", "sdg"),
    (2, 1): (), (2, 3): ("sdg",),
    (3, 1): ("sdg", "h", "sdg"), (3, 2): ("sdg", "h"),
}  # fmt: skip


def _diagonalising(x: Array, z: Array) -> Gates:
    """Gates that take commuting Paulis, bools of shape (paulis, qubits), to products of Zs.

    Elimination in the binary representation of Paulis (Aaronson and Gottesman, Phys. Rev. A 70, 052328 (2004); for
    this use: van den Berg and Temme, Quantum 4, 322 (2020); Gokhale et al., arXiv:1907.13623), with the lightest Pauli
    first: a qubit on which all are the identity or one and the same Pauli needs a rotation of its own only, and is then
    done with. Otherwise, one gate takes a qubit off the lightest Pauli. Once that is left with one qubit, all others
    agree with it there, as they commute. Of all such gates, the one is taken that leaves the lightest Paulis.
    """
    kinds = (x + 2 * z).astype(np.uint8)
    gates: list[tuple[str, tuple[int, ...]]] = []

    def rotate(qubit: int, names: tuple[str, ...]) -> None:
        for name in names:
            gates.append((name, (qubit,)))
            kinds[:, qubit] = _AFTER[name][kinds[:, qubit]]

    while True:
        some = np.bitwise_or.reduce(kinds, axis=0)
        least = np.where(kinds, kinds, 4).min(axis=0)
        for qubit in np.flatnonzero(some == least).tolist():  # where two kinds differ, their union is neither's least
            rotate(qubit, _TO_Z[int(some[qubit])])
            kinds[:, qubit] = 0
        weights = np.count_nonzero(kinds, axis=1)
        if not weights.any():
            return tuple(gates)
        lightest = kinds[np.where(weights, weights, kinds.shape[1] + 1).argmin()].copy()
        control, target, other = _best_gate(kinds, lightest)
        rotate(control, _TO_Z[int(lightest[control])])
        rotate(target, _TO_Z_AND_X[int(lightest[target]), other])
        gates.append(("cx", (control, target)))
        sources = kinds[:, control].copy()
        kinds[:, control] ^= kinds[:, target] & 2
        kinds[:, target] ^= sources & 1


def _best_gate(kinds: Array, pauli: Array) -> tuple[int, int, int]:
    """Control and target of a gate that takes the control off ``pauli``, and the Pauli that it applies to the target.

    With P and R for ``pauli`` on control and target, and Q another Pauli than R, it multiplies what anticommutes with P
    by Q on the target, and what anticommutes with Q by P on the control. Of all choices, the one that leaves the
    smallest sum of weights.
    """
    qubits = np.flatnonzero(pauli)
    kinds, own = kinds[:, qubits], pauli[qubits]

    def anticommutes(other: Array) -> Array:
        return np.asarray((kinds != 0) & (kinds != other), dtype=np.int64)

    def grows(other: Array) -> Array:
        return np.asarray(np.asarray(kinds != other, dtype=np.int64) - (kinds != 0))

    others = np.array([own % 3 + 1, (own + 1) % 3 + 1])
    costs = np.array([anticommutes(own).T @ grows(q) + grows(own).T @ anticommutes(q) for q in others])
    costs[:, np.arange(len(qubits)), np.arange(len(qubits))] = np.iinfo(np.int64).max
    choice, control, target = np.unravel_index(costs.argmin(), costs.shape)
    return int(qubits[control]), int(qubits[target]), int(others[choice, target])


def _conjugated(x: Array, z: Array, gates: Gates) -> tuple[Array, Array]:
    """What ``gates`` make of Paulis that they take to products of Zs: their Zs, and which get the sign -1."""
    x, z = x.T.copy(), z.T.copy()
    flipped = np.zeros(x.shape[1], dtype=bool)
    for name, qubits in gates:
        if name == "h":
            (q,) = qubits
            flipped ^= x[q] & z[q]
            x[q], z[q] = z[q].copy(), x[q].copy()
        elif name == "sdg":
            (q,) = qubits
            flipped ^= x[q] & ~z[q]
            z[q] ^= x[q]
        else:
            control, target = qubits
            flipped ^= x[control] & z[target] & ~(x[target] ^ z[control])
            x[target] ^= x[control]
            z[control] ^= z[target]
    return z.T, flipped


def rotated(state: Array, group: Group) -> Array:
    """``state``, shape (2**qubits,), after the group's gates, times a power of sqrt(2), which drops out when drawn.

    Elementwise in place of linear algebra: the bits depend on no library's threads.
    """
    if not group.gates:
        return state
    if group.num_qubits <= _DENSE:
        return np.asarray((group._matrix * state).sum(axis=1))
    return _applied(group.gates, state.copy())


def _applied(gates: Gates, state: Array) -> Array:
    for name, qubits in gates:
        if name == "h":
            _butterfly(state, qubits[0])
        elif name == "sdg":
            state.reshape(-1, 2, 1 << qubits[0])[:, 1] *= -1j
        else:
            low, high = sorted(qubits)
            parts = state.reshape(-1, 2, 1 << (high - low - 1), 2, 1 << low)
            ones = parts[:, 1] if qubits[0] == high else parts[:, :, :, 1]  # of the control
            off, on = (ones[:, :, 0], ones[:, :, 1]) if qubits[0] == high else (ones[:, 0], ones[:, 1])
            kept = off.copy()
            off[...] = on
            on[...] = kept
    return state


def _butterfly(array: Array, qubit: int) -> None:
    """Sum and difference of the halves of ``array`` by the value of ``qubit``, in place."""
    halves = array.reshape(-1, 2, 1 << qubit)
    low, high = halves[:, 0], halves[:, 1]
    total = low + high
    np.subtract(low, high, out=high)
    low[...] = total


# -- drawing -----------------------------------------------------------------------------------------------------


def probabilities(state: Array) -> Array:
    """Squared magnitudes of ``state``, not normalised, in an array of their own."""
    squares: Array = np.square(state.real)
    squares += np.square(state.imag)
    return squares


def cumulative(probabilities: Array) -> Array:
    """Running sum of ``probabilities``, in their place, not normalised: the last entry is their total.

    Those below zero, as rounding may leave them in a density matrix, count as zero.
    """
    np.maximum(probabilities, 0.0, out=probabilities)
    return np.cumsum(probabilities, out=probabilities)


class _Key(ISeedSequence):
    """A key as it is: without it, numpy asks the system for randomness first, and then takes the key."""

    def __init__(self, key: Array) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Array:
        return self._key


def generator(seed: Array, stream: int, shift: int = 0) -> np.random.Generator:
    """The generator of a row: ``seed`` is its key, uint64, shape (2,); streams and shifts never overlap."""
    key: Any = _Key(seed)
    return np.random.Generator(np.random.Philox(key, counter=np.array([0, 0, shift, stream], dtype=np.uint64)))


def draws(cumulative: Array, shots: int, seed: Array, stream: int, shift: int = 0) -> Iterator[Array]:
    """Basis states drawn one shot after the other, int64, in arrays of at most 2**17."""
    source = generator(seed, stream, shift)
    total, last = cumulative[-1], _last(cumulative)
    for start in range(0, shots, _DRAW):
        points = source.random(min(_DRAW, shots - start))
        points *= total
        yield np.minimum(np.searchsorted(cumulative, points, side="right"), last)


def _last(cumulative: Array) -> int:
    """The last state that has any probability."""
    return int(cumulative.searchsorted(cumulative[-1]))


# -- means -------------------------------------------------------------------------------------------------------


def mean_of_draws(
    group: Group, shots: int, cumulative: Array, seed: Array, stream: int, shift: int = 0
) -> tuple[float, float]:
    """Mean of the group's part of the observable over ``shots`` drawn from `cumulative`, and the variance of that mean.

    The variance is that of the shots, so that covariances inside the group count; a single shot has none and gets the
    largest possible deviation.
    """
    if shots < len(cumulative):
        pieces = (_counted(group, drawn, len(cumulative)) for drawn in draws(cumulative, shots, seed, stream, shift))
        return _mean(group, shots, pieces)
    # How often each state occurs is all that counts here, and a multinomial draws that in a time that does not grow
    # with the shots (4 qubits, 1000 shots: a tenth of the time of single shots; below one shot a state it is slower).
    # Its stream depends on nothing but its arguments, and numpy may change it between versions as it may any other
    # (NEP 19); versions are part of the plan.
    sums = cumulative[: _last(cumulative) + 1]
    chances = sums.copy()
    chances[1:] -= sums[:-1]
    chances /= sums[-1]
    counts = generator(seed, stream, shift).multinomial(shots, chances)
    states = counts.nonzero()[0]
    return _mean(group, shots, [(group._parts(states), counts[states])])


def mean_of_bits(group: Group, bits: Array) -> tuple[float, float]:
    """Mean of the group's part of the observable over measured ``bits``, and the variance of that mean.

    ``bits`` has shape (shots, bytes), uint8, packed as in Qiskit's ``BitArray``: qubit 0 is the lowest bit of the last
    byte. Any number of qubits; variances as in `mean_of_draws`.
    """
    return _mean(group, len(bits), _read(group, bits))


def _read(group: Group, bits: Array) -> Iterator[tuple[Array, Array]]:
    """Values of the group and how often each occurs, for a piece of ``bits`` at a time."""
    words = group.masks.shape[1]
    for start in range(0, len(bits), _DRAW):
        piece = bits[start : start + _DRAW, ::-1]
        padded = np.zeros((len(piece), 8 * words), dtype=np.uint8)
        padded[:, : piece.shape[1]] = piece
        own = padded.view("<u8").astype(np.uint64, copy=False)
        if words > 1:
            yield group._sums(np.ascontiguousarray(own.T)), np.ones(len(own), dtype=np.int64)
        else:
            used = (1 << group._width) - 1
            yield _counted(group, own[:, 0] & np.uint64(used), used + 1)


def _counted(group: Group, states: Array, total: int) -> tuple[Array, Array]:
    """Values of the group in ``states``, of which there are ``total``, and how often each occurs."""
    if total <= 4 * len(states):
        counts = np.bincount(states.astype(np.int64, copy=False), minlength=total)
        found = counts.nonzero()[0]
        return group._parts(found), counts[found]
    if group._width <= _NARROW:  # a look-up, which is cheaper than to sort them
        return group._parts(states), np.ones(len(states), dtype=np.int64)
    found, counts = np.unique(states, return_counts=True)
    return group._parts(found), counts


def _mean(group: Group, shots: int, pieces: Iterable[tuple[Array, Array]]) -> tuple[float, float]:
    """Mean of values that occur so many times, in pieces, and the variance of that mean.

    Sums of squares are taken about each piece's mean and then merged (Chan, Golub and LeVeque, The American
    Statistician 37, 242 (1983)). Values are taken from the first one, so that equal ones have no variance at all.
    """
    mean = squares = 0.0
    done = 0
    for parts, counts in pieces:
        size = int(counts.sum())
        first = float(parts[0])
        parts = parts - first
        own = float((counts * parts).sum()) / size
        parts -= own
        squares += float((counts * np.square(parts)).sum())
        step = first + own - mean
        squares += step * step * done * size / (done + size)
        done += size
        mean += step * size / done
    variance = squares / (shots - 1) if shots > 1 else group.weight**2
    return mean, variance / shots
