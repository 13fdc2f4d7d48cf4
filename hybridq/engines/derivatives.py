"""Derivatives from values: which points to evaluate, and what their values come to. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridq.engines.measuring import generator

__all__ = ["both_ways", "shift_slopes", "spsa"]

Array = NDArray[Any]

_EXACT_STEP = 1e-4  # radians: of exact values, so small that its square is lost beside the estimate's own spread
_SAMPLED_STEP = 0.2  # of sampled values, whose noise the difference has to exceed
_DIRECTION = 2**32 - 1  # the stream of a row's generator that gives the direction; no observable has as many groups


def both_ways(angles: Array) -> Iterator[Array]:
    """``angles`` with the first shifted up by a quarter turn, then down; then the second, and so on."""
    for slot in range(len(angles)):
        for shift in (np.pi / 2, -np.pi / 2):
            shifted = angles.copy()
            shifted[slot] += shift
            yield shifted


def shift_slopes(values: Array) -> Array:
    """Derivatives by the angles, shape (observables, angles), of ``values`` at the points of `both_ways`.

    ``values`` has shape (2 * angles, observables). The derivative by the angle of exp(-i angle/2 P) is half the
    difference of the values at angle +- pi/2 (Mitarai et al., Phys. Rev. A 98, 032309 (2018); Schuld et al., Phys. Rev.
    A 99, 032331 (2019)).
    """
    slopes: Array = (values[0::2] - values[1::2]).T / 2
    return slopes


def spsa(theta: Array, seed: Array, evaluate: Callable[[Array], Array], *, sampled: bool) -> Array:
    """A random estimate of the gradient at ``theta``, shape (observables, parameters), by two evaluations in all.

    All parameters are moved at once, each up or down at random, and the difference of the values is shared out along
    that direction (Spall, IEEE Trans. Autom. Control 37, 332 (1992)); on average over directions it is the gradient, to
    second order in the step. The direction comes from ``seed``, the row's key, shape (2,). ``evaluate`` takes points of
    shape (2, parameters) and gives values of shape (2, observables).
    """
    step = _SAMPLED_STEP if sampled else _EXACT_STEP
    direction = generator(seed, _DIRECTION).choice((-1.0, 1.0), size=len(theta))
    values = evaluate(np.stack([theta + step * direction, theta - step * direction]))
    return np.outer((values[0] - values[1]) / (2 * step), direction)
