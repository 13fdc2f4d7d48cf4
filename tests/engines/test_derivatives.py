"""Derivatives from values: which points are asked for, and what becomes of them."""

from __future__ import annotations

import numpy as np
import pytest

from hybridq.engines.derivatives import both_ways, shift_slopes, spsa
from hybridq.engines.measuring import generator

KEY = np.array([5, 7], dtype=np.uint64)


def test_each_angle_is_shifted_up_and_down() -> None:
    angles = np.array([0.1, 0.2])
    points = list(both_ways(angles))
    np.testing.assert_allclose(np.array(points) - angles, np.array([[1, 0], [-1, 0], [0, 1], [0, -1]]) * np.pi / 2)
    assert angles.tolist() == [0.1, 0.2]
    assert list(both_ways(np.zeros(0))) == []


def test_slopes_of_rotations() -> None:
    """Of a + b cos x + c sin x, any in the place of each other."""
    angles = np.array([0.4, -1.1, 2.0])
    values = np.array([[np.cos(p).sum() + 3, np.sin(p[0]) + 2 * np.cos(p[1])] for p in both_ways(angles)])
    expected = [-np.sin(angles), [np.cos(0.4), 2 * np.sin(1.1), 0.0]]
    np.testing.assert_allclose(shift_slopes(values), expected, atol=1e-15)
    assert shift_slopes(np.zeros((0, 2))).shape == (2, 0)


@pytest.mark.parametrize(("sampled", "step"), [(False, 1e-4), (True, 0.2)])
def test_one_direction_and_its_slope(sampled: bool, step: float) -> None:
    theta, seen = np.array([1.0, -2.0, 0.5]), []

    def evaluate(points: np.ndarray) -> np.ndarray:
        seen.append(points)
        return np.array([[point @ [1.0, 10.0, 100.0], 4.0] for point in points])

    gradient = spsa(theta, KEY, evaluate, sampled=sampled)
    ((up, down),) = seen
    direction = (up - theta) / step
    np.testing.assert_allclose(np.abs(direction), 1.0)
    np.testing.assert_allclose(up + down, 2 * theta)
    np.testing.assert_allclose(gradient, np.outer([direction @ [1.0, 10.0, 100.0], 0.0], direction), atol=1e-9)


def test_directions_are_fair_and_keys_have_their_own() -> None:
    def direction(key: int) -> np.ndarray:
        seed = np.array([key, 3], dtype=np.uint64)
        return spsa(np.zeros(4), seed, lambda p: p[:, :1], sampled=True)[0]

    found = np.sign([direction(key) * direction(key)[0] for key in range(400)])
    assert np.array_equal(direction(9), direction(9))
    assert len(np.unique(found, axis=0)) == 8
    assert (np.abs(found[:, 1:].mean(axis=0)) < 0.2).all()


def test_no_draw_of_samples_shares_the_direction() -> None:
    ends = spsa(np.zeros(8), KEY, lambda p: p[:, :1], sampled=True)[0]
    drawn = [generator(KEY, stream).choice((-1.0, 1.0), size=8) for stream in range(50)]
    assert not any(np.array_equal(ends * ends[0], d * d[0]) for d in drawn)


def test_without_parameters() -> None:
    assert spsa(np.zeros(0), KEY, lambda p: np.ones((2, 3)), sampled=False).shape == (3, 0)
