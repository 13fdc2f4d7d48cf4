"""Hypothesis profiles and the place of runs; whatever else a test needs stands in its own file."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from distributed import Client, LocalCluster

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile("explore", derandomize=False, deadline=None, print_blob=True, max_examples=500)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
hypothesis.settings.load_profile(PROFILE)


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job, and every process it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)  # before hypothesis's own hook, which reads the option
def pytest_configure(config: pytest.Config) -> None:
    """Under the profile `explore`, name a seed unless one is given: only a known seed can be printed."""
    if PROFILE == "explore" and config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))


def pytest_report_header(config: pytest.Config) -> str:
    """Say which examples these tests try, so that a failure can be repeated."""
    seed = config.getoption("--hypothesis-seed")
    return f"hypothesis: profile {PROFILE}, seed {'derandomized' if seed is None else seed}"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A directory for runs: fresh, and not created yet."""
    return tmp_path / "store"


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """A Dask cluster of two one-thread worker processes, shared by the tests that need one."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long on a quiet machine may take several times as long on a busy one."""
    for item in items:
        if item.get_closest_marker("slow") is not None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(1200))
