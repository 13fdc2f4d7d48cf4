"""2,000 trivial classical steps in seconds: a run, journal on, each step its own record, against Dask's `Client.map`.

Both on one cluster of two one-thread workers, in turns. `map` is ``client.gather(client.map(...))`` of the same
function; `run` is all of ``hq.run``, from opening the record to closing it. `ratio` is run / map: the median of rounds,
with the `least` and the `most`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from distributed import Client

import hybridq as hq
from benchmarks._site import play, site
from hybridq.journal import Step, read_records

STEPS, ROUNDS, WORKERS = 2000, 9, 2


@hq.classical
def square(number: int) -> int:
    return number * number


@hq.workflow
def study(count: int) -> list[int]:
    return hq.map(square, range(count))


def run(compare: Any) -> list[dict[str, Any]]:
    rounds = itertools.count()
    expected = [number * number for number in range(STEPS)]
    recorded: list[int] = []
    times: dict[str, list[float]] = {"map": [], "run": []}

    def look(directory: Path) -> None:
        recorded.append(sum(isinstance(record, Step) for _, record in read_records(directory)))

    def plain(client: Client) -> list[int]:
        keys = [f"square-{next(rounds)}" for _ in range(STEPS)]
        return list(client.gather(client.map(square.__wrapped__, range(STEPS), key=keys, pure=False)))

    with site(WORKERS) as client:
        assert plain(client) == play(client, study, STEPS)[0] == expected  # both are warm now
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            assert plain(client) == expected
            times["map"].append(time.perf_counter() - begun)
            found, seconds = play(client, study, STEPS, look=look)
            times["run"].append(seconds)
            assert found == expected
    assert recorded == [STEPS] * ROUNDS, recorded
    middle = {name: statistics.median(found) for name, found in times.items()}
    ratios = [a / b for a, b in zip(times["run"], times["map"], strict=True)]
    return [{
        "steps": STEPS, "records": recorded[0], "rounds": ROUNDS, "map": middle["map"], "run": middle["run"],
        "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
    }]  # fmt: skip
