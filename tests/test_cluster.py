"""Clusters: one of our own, one started elsewhere, and the ones that are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import dask
import psutil
import pytest
from distributed import CancelledError, Client, LocalCluster
from distributed.comm import CommClosedError
from distributed.diagnostics.plugin import SchedulerPlugin
from processes import SITE, SOON, Marked, free_port, scheduler_and_workers, wait_until
from runs import recorded

import hybridq as hq
from hybridq import cluster as cluster_module
from hybridq import journal as records
from hybridq.cluster import Cluster
from hybridq.journal import read_records

HEISENBERG = {"XX": 1.0, "YY": 1.0, "ZZ": 1.0}


@hq.classical
def where_am_i(index: int) -> dict[str, int]:
    return {"index": index, "pid": os.getpid(), "parent": os.getppid()}


@hq.quantum
def energy(theta: list[float]) -> object:
    from qiskit.circuit.library import efficient_su2

    return hq.expval(efficient_su2(2, reps=1), HEISENBERG, theta)


@hq.quantum
def slow_energy(theta: float, qubits: int, reps: int) -> object:
    from qiskit.circuit.library import efficient_su2

    circuit = efficient_su2(qubits, reps=reps, entanglement="linear")
    return hq.expval(circuit, "Z" * qubits, [theta] * circuit.num_parameters)


@hq.workflow
def loops(count: int) -> list[float]:
    return [r.fun for r in hq.map(loop, range(count))]


@hq.workflow
def loop(index: int) -> object:
    where_am_i(index)
    return hq.minimize(energy, [0.1 * index] * 8, method="COBYLA", options={"maxiter": 10})


@hq.workflow
def slow(qubits: int, reps: int) -> list[float]:
    return [float(e) for e in hq.map(slow_energy, [0.1, 0.2], [qubits] * 2, [reps] * 2)]


@pytest.mark.slow
def test_a_cluster_started_elsewhere(store: Path) -> None:
    with scheduler_and_workers({}, {}) as (address, _):
        values = hq.run(loops, 4, name="far", store=store, cluster=address)
        steps = recorded(store / "far", records.Step)
        pids = {r.output["pid"] for r in steps}
        assert os.getpid() not in pids
        assert all(psutil.pid_exists(pid) for pid in pids), "the workers of a cluster that is not ours were ended"
        with Client(address) as client:
            assert len(client.scheduler_info()["workers"]) == 2
    assert hq.run(loops, 4, name="near", store=store, workers=1) == values


@hq.classical
def nap(index: int, folder: str) -> int:
    Path(folder, str(os.getpid())).touch()
    time.sleep(0.25)
    return index


@hq.workflow
def naps(count: int, folder: str) -> list[int]:
    found: list[int] = hq.map(nap, range(count), [folder] * count)
    return found


@pytest.mark.slow
def test_workers_that_join_and_leave_in_the_middle_are_used_and_survived(store: Path, tmp_path: Path) -> None:
    def came(count: int) -> list[int]:
        assert wait_until(lambda: len(list(tmp_path.glob("[0-9]*"))) >= count, 60)
        return [int(path.name) for path in tmp_path.glob("[0-9]*")]

    def change(address: str) -> None:
        (first,) = came(1)
        worker = [sys.executable, "-P", "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1"]
        second = subprocess.Popen([*worker, "--no-dashboard", "--nthreads", "1"], stderr=subprocess.DEVNULL)
        started.append(second)
        came(2)
        psutil.Process(first).parent().terminate()  # its nanny, which ends it

    started: list[subprocess.Popen[bytes]] = []
    with scheduler_and_workers({}) as (address, _):
        changing = threading.Thread(target=change, args=(address,))
        changing.start()
        try:
            found = hq.run(naps, 80, str(tmp_path), name="a", store=store, cluster=address)
            changing.join(60)
            assert not changing.is_alive()
        finally:
            for process in started:
                process.terminate()
                process.wait(30)
    assert found == list(range(80))
    steps = recorded(store / "a", records.Step)
    assert sorted(r.at for r in steps) == sorted(f"naps/nap[{i}]" for i in range(80))  # each once
    assert len({r.where for r in steps}) == 2


@hq.classical
def counted(index: int, folder: str) -> int:
    with open(Path(folder, "log"), "a") as log:  # so short a line is written whole
        log.write(f"{index}\n")
    time.sleep(0.2)
    return index


@hq.quantum
def sampled(theta: list[float]) -> object:
    from qiskit.circuit.library import efficient_su2

    return hq.expval(efficient_su2(2, reps=1), HEISENBERG, theta, shots=200)


@hq.workflow
def sampled_loop(index: int) -> object:
    return hq.minimize(sampled, [0.1 * index] * 8, method="COBYLA", options={"maxiter": 150}).fun


@hq.workflow
def steps_and_loops(count: int, folder: str) -> object:
    waiting = [counted.submit(i, folder) for i in range(count)]
    return hq.map(sampled_loop, range(6)), [w.result() for w in waiting]


def executed(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "log").read_text().split()] if (folder / "log").exists() else []


def kill_scheduler(processes: list[Marked], _: Client) -> None:
    processes[0].kill()


def stop_scheduler(processes: list[Marked], _: Client) -> None:
    processes[0].process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "given"), [(kill_scheduler, "client"), (stop_scheduler, "address")], ids=["killed", "ended"]
)
def test_a_scheduler_that_is_lost_is_waited_for_and_what_was_unfinished_is_asked_again(
    store: Path, tmp_path: Path, fault: Callable[..., None], given: str, capfd: pytest.CaptureFixture[str]
) -> None:
    port, found, errors = free_port(), [], []
    first = scheduler_and_workers({}, {}, port=port)
    address, processes = first.__enter__()
    cluster: Any = Client(address) if given == "client" else address

    def run() -> None:
        try:
            site = hq.Site(cluster=cluster, patience=120)
            found.append(hq.run(steps_and_loops, 40, str(tmp_path), name="a", seed=5, store=store, site=site))
        except BaseException as error:  # noqa: BLE001  # shown by the test
            errors.append(error)

    running = threading.Thread(target=run)
    running.start()
    try:
        assert wait_until(lambda: len(executed(tmp_path)) >= 5, 90)
        fault(processes, cluster)
        assert wait_until(lambda: "asked again" in capfd.readouterr().err, SOON), "not noticed"
    finally:
        first.__exit__(None, None, None)
    with scheduler_and_workers({}, {}, port=port):
        running.join(200)
        assert not running.is_alive()
        if given == "client":
            cluster.close()
    assert not errors
    (tmp_path / "b").mkdir()
    undisturbed = hq.run(steps_and_loops, 40, str(tmp_path / "b"), name="b", seed=5, store=store, workers=2)
    assert found == [undisturbed]
    steps = recorded(store / "a", records.Step)
    assert sorted(r.at for r in steps) == sorted(f"steps_and_loops/counted[{i}]" for i in range(40))
    assert 40 <= len(executed(tmp_path)) <= 44, "more was repeated than what was in flight"


@pytest.mark.slow
def test_a_cluster_that_does_not_come_back_ends_the_run_and_nothing_recorded_is_lost(
    store: Path, tmp_path: Path
) -> None:
    with scheduler_and_workers({}) as (address, processes):

        def fault() -> None:
            assert wait_until(lambda: len(executed(tmp_path)) >= 5, 90)
            kill_scheduler(processes, None)  # type: ignore[arg-type]

        killing = threading.Thread(target=fault)
        killing.start()
        site = hq.Site(cluster=address, patience=2)
        with pytest.raises(hq.ClusterLost, match=r"none was there in its place within 2 s"):
            hq.run(steps_and_loops, 40, str(tmp_path), name="a", seed=5, store=store, site=site)
        killing.join()
    done = {r.at for r in recorded(store / "a", records.Step)}
    assert len(done) >= 4
    before = executed(tmp_path)
    hq.run(steps_and_loops, 40, str(tmp_path), name="a", seed=5, store=store, workers=2)
    again = executed(tmp_path)[len(before) :]
    assert sorted(again) == [i for i in range(40) if f"steps_and_loops/counted[{i}]" not in done]


@pytest.mark.slow
def test_a_cluster_without_workers_is_told_and_left_after_a_while(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with scheduler_and_workers({}) as (address, processes):

        def fault() -> None:
            assert wait_until(lambda: len(executed(tmp_path)) >= 3, 90)
            processes[1].process.terminate()  # the nanny, which ends its worker

        ending = threading.Thread(target=fault)
        ending.start()
        with pytest.raises(hq.NoDevice, match=r"has had no workers for 5 s, and \d+ calls wait for one"):
            hq.run(naps_counted, 40, str(tmp_path), name="a", store=store, site=hq.Site(cluster=address, patience=5))
        ending.join()
    assert "has no workers" in capfd.readouterr().err
    assert len(recorded(store / "a", records.Step)) >= 2


@hq.workflow
def naps_counted(count: int, folder: str) -> object:
    return hq.map(counted, range(count), [folder] * count)


@pytest.mark.slow
def test_a_cluster_of_our_own_is_built_again(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    started: list[LocalCluster] = []
    start = cluster_module._start_local
    monkeypatch.setattr(cluster_module, "_start_local", lambda site: started.append(start(site)) or started[-1])

    def fault() -> None:
        assert wait_until(lambda: len(executed(tmp_path)) >= 5, 90)
        started[0].sync(started[0].scheduler.close)

    ending = threading.Thread(target=fault)
    ending.start()
    found = hq.run(naps_counted, 30, str(tmp_path), name="a", store=store, workers=2)
    ending.join()
    assert len(started) == 2
    assert found == list(range(30))
    assert sorted(r.at for r in recorded(store / "a", records.Step)) == sorted(
        f"naps_counted/counted[{i}]" for i in range(30)
    )
    assert 30 <= len(executed(tmp_path)) <= 33
    assert "what it had is asked again" in capfd.readouterr().err
    assert wait_until(lambda: started[0].status.name == "closed", 60)


@pytest.mark.slow
def test_a_cluster_that_may_grow_is_asked_for_workers(store: Path, tmp_path: Path) -> None:
    """As for dask-jobqueue: a cluster object without workers, scaled by what waits in the driver."""
    options = {"threads_per_worker": 1, "host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "silence_logs": 50}
    with LocalCluster(n_workers=0, **options) as cluster:
        site = hq.Site(cluster=cluster, workers=1, most_workers=2)
        assert hq.run(naps, 60, str(tmp_path), name="a", store=store, site=site) == list(range(60))
        assert len(cluster.workers) == 2
    assert len(list(tmp_path.glob("[0-9]*"))) == 2


def test_an_address_cannot_be_asked_for_workers(client: Client, store: Path) -> None:
    with pytest.raises(hq.WorkflowError, match="only a cluster object can be asked for workers"):
        hq.Site(cluster="tcp://host:1", most_workers=2)
    assert client.scheduler is not None
    with Client(client.scheduler.address) as another:
        site = hq.Site(cluster=another, most_workers=2)
        with pytest.raises(hq.NoDevice, match="its client was connected to an address"):
            hq.run(loops, 1, name="a", store=store, site=site)


def test_a_client_is_used_as_it_is(client: Client, store: Path) -> None:
    hq.run(loops, 2, name="given", store=store, cluster=client)
    assert client.status == "running"
    assert client.submit(lambda: 1).result() == 1


def test_what_is_sent_to_a_worker_that_is_known_to_be_lost_is_answered(client: Client) -> None:
    cluster = Cluster(hq.Site(cluster=client))
    gone = "tcp://127.0.0.1:9"
    answers: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
    try:
        cluster.lost(gone)
        cluster.submit(len, ((),), key=("quantum:late", "lost", 0), needs={}, done=lambda *a: answers.put(a), on=gone)
        value, error = answers.get(timeout=30)
        assert value is None
        assert isinstance(error, hq.WorkerLost)
        (there, _) = cluster.devices()  # the others are sent to as before
        cluster.submit(len, ((),), key=("quantum:there", "lost", 0), needs={}, done=lambda *a: answers.put(a),
                       on=there.name)  # fmt: skip
        assert answers.get(timeout=30) == (0, None)
    finally:
        cluster.close()


@pytest.mark.slow
@pytest.mark.parametrize("why", ["gave up", "never came"])
def test_a_nanny_without_a_worker_is_replaced(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "_free_port", lambda wanted: 0)  # both start at once: no race for one port
    cluster = Cluster(hq.Site(workers=2))
    try:
        own = cluster._own
        assert own is not None
        first, second = own.workers[0], own.workers[1]
        if why == "gave up":
            own.sync(first.close)
        else:  # it would come again by itself, but is not waited for
            monkeypatch.setattr(cluster_module, "_START_SECONDS", 0.0)
            os.kill(first.pid, signal.SIGKILL)
        assert wait_until(lambda: len(own.scheduler_info["workers"]) < 2, SOON)

        def replaced() -> bool:
            cluster.replenish()
            time.sleep(0.5)
            return len(own.scheduler_info["workers"]) == 2 and own.workers.get(0) not in (None, first)

        assert wait_until(replaced, SOON)
        assert own.workers[1] is second
        cluster.replenish()
        assert not cluster._missed  # or the next loss would count from this one on
        assert own.scheduler.periodic_callbacks["tick"].callback_time == 500
        for key, value in cluster_module.SELDOM.items():
            assert set(cluster.client.run(dask.config.get, key).values()) == {value}
    finally:
        cluster.close()


@pytest.mark.slow
def test_a_cluster_whose_worker_does_not_answer_is_ended_all_the_same(tmp_path: Path) -> None:
    """Within the driver, too, and when its process ends: there Dask would ask once more, for ten seconds."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    run = Marked(script)
    answer, errors = run.finish()
    assert run.process.returncode == 0, errors
    before, after = answer.split()
    assert before == "1"
    assert after == "0"
    assert "Traceback" not in errors
    assert wait_until(lambda: not run.alive(), SOON)


LEAVES = """
import atexit, signal, time
import psutil
import hybridq as hq
from hybridq.cluster import Cluster

if __name__ == "__main__":
    cluster = Cluster(hq.Site(workers=1))
    (nanny,) = cluster._own.workers.values()
    worker = psutil.Process(nanny.pid)
    worker.send_signal(signal.SIGSTOP)
    asked = []
    kind = type(cluster._own)
    closes = kind.close
    kind.close = lambda self, *rest, **named: asked.append(self) or closes(self, *rest, **named)
    cluster.close(patience=0.5)
    print(len(asked), flush=True)
    asked.clear()
    psutil.wait_procs([worker], timeout=60)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    from distributed.deploy.spec import close_clusters

    atexit.unregister(close_clusters)
    close_clusters()
    print(len(asked), flush=True)
"""


def test_no_worker_is_missed_while_the_client_refreshes_what_it_knows(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask's client asks for the scheduler without its workers every two seconds, perhaps just before it is read."""
    refresh = Client._update_scheduler_info

    async def meanwhile(self: Client, n_workers: int = 0) -> None:
        await refresh(self, n_workers)
        await refresh(self, 0)

    cluster = Cluster(hq.Site(cluster=client))
    monkeypatch.setattr(Client, "_update_scheduler_info", meanwhile)
    try:
        assert len(cluster.devices()) == 2
    finally:
        cluster.close()


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("tcp://127.0.0.1:8786", True),
        ("tcp://localhost:8786", True),
        ("tcp://[::1]:8786", True),
        ("tls://10.0.0.5:8786", True),
        ("inproc://10.0.0.5/1/2", True),
        ("tcp://10.0.0.5:8786", False),
        ("10.0.0.5:8786", False),
        ("tcp://head:8786", False),
        ("ucx://10.0.0.5:8786", False),
        ("tcp://[2001:db8::1]:8786", False),
        ("tcp://127.0.0.1.example.org:8786", False),
    ],
)
def test_a_cluster_on_other_hosts_needs_tls(store: Path, address: str, near: bool) -> None:
    cluster_module._check_encrypted(address, allowed=True)
    if near:
        cluster_module._check_encrypted(address, allowed=False)
        return
    with pytest.raises(hq.WorkflowError, match="without encryption") as refused:
        hq.run(loops, 1, name="a", store=store, cluster=address)
    assert "allow_unencrypted" in str(refused.value)


@pytest.mark.slow
def test_nobody_answers(store: Path) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(hq.NoDevice, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1"):
        hq.run(loops, 1, name="nobody", store=store, cluster=address)
    kinds = {type(r) for _, r in read_records(store / "nobody")}
    assert not kinds & {records.Step, records.Evaluation, records.Row}


def test_a_worker_without_hybridq_is_refused(store: Path) -> None:
    # without the site module an editable installation is not importable
    bare = {**os.environ, "PYTHONPATH": SITE}
    importing = [sys.executable, "-S", "-P", "-c", "import hybridq"]
    probe = subprocess.run(importing, env=bare, capture_output=True, cwd="/", check=False)
    if probe.returncode == 0:
        pytest.skip("hybridq is installed as a copy, which every process of this environment can import")
    with (
        scheduler_and_workers({}, isolated=True) as (address, _),
        pytest.raises(hq.NoDevice, match=r"has no hybridq; install hybridq-scheduler"),
    ):
        hq.run(loops, 1, name="bare", store=store, cluster=address)


@pytest.mark.slow
def test_long_circuits_do_not_silence_heartbeats(client: Client, store: Path) -> None:
    silences: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            workers = cluster_module._identity(client)["workers"].values()
            silences.append(max(time.time() - w["last_seen"] for w in workers))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        hq.run(slow, 20, 16, name="slow", store=store, cluster=client)
    finally:
        done.set()
        watcher.join()
    evaluations = recorded(store / "slow", records.Evaluation)
    there = cluster_module._identity(client)["workers"].values()
    assert {r.where for r in evaluations} == {str(w["name"]) for w in there}
    shortest = min(r.seconds for r in evaluations)
    assert shortest >= 3.0, "the circuits are too short to silence anything"
    assert len(silences) >= shortest / 0.5, "nobody looked at the workers"
    assert max(silences) < shortest, f"a worker was silent for {max(silences):.1f} s under circuits of {shortest:.1f} s"


class Seen(SchedulerPlugin):
    """Tasks as Dask's own pages take them together."""

    name = "seen"

    def __init__(self) -> None:
        self.tasks: set[tuple[str, str, str]] = set()
        self.scheduler: Any = None

    async def start(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        task = self.scheduler.tasks.get(key)
        if finish == "processing" and task is not None and "hybridq" in (task.annotations or {}):
            told = task.annotations["hybridq"]
            self.tasks.add((task.prefix.name, task.group.name, told["call"].partition("@")[2].partition("/")[2]))


def test_dasks_own_pages_tell_kinds_functions_and_loops_apart(client: Client, store: Path) -> None:
    client.register_plugin(Seen())
    hq.run(loops, 3, name="named-apart", store=store, cluster=client)

    def seen(dask_scheduler: Any = None) -> set[tuple[str, str, str]]:
        found: set[tuple[str, str, str]] = dask_scheduler.plugins["seen"].tasks
        return found

    tasks = client.run_on_scheduler(seen)
    client.unregister_scheduler_plugin("seen")
    assert {prefix for prefix, _, _ in tasks} == {"classical:where_am_i", "quantum:energy"}
    of_loops = {group for prefix, group, _ in tasks if prefix == "quantum:energy"}
    assert len(of_loops) >= 2  # one that is alone for a while goes on at hand
    assert of_loops <= {f"quantum:energy-@named-apart/loops/loop[{i}]/minimize[0]" for i in range(3)}
    steps = {(group, at) for prefix, group, at in tasks if prefix == "classical:where_am_i"}
    assert ("classical:where_am_i-@named-apart", "loops/loop[1]/where_am_i[0]") in steps


@pytest.mark.slow
def test_nothing_is_left_of_an_own_cluster(store: Path) -> None:
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    hq.run(loops, 2, name="own", store=store, workers=2)

    def left() -> set[int]:
        children = psutil.Process().children(recursive=True)
        # multiprocessing keeps a tracker, and the driver its engine, for the life of the process
        kept = ("resource_tracker", "hybridq.engines")
        return {p.pid for p in children if p.pid not in before and not any(k in " ".join(p.cmdline()) for k in kept)}

    assert wait_until(lambda: not left(), SOON)


@pytest.mark.parametrize(
    ("raised", "becomes"),
    [
        (CommClosedError("in <TCP (closed) gather>: Stream is closed"), hq.ClusterLost),
        (OSError("Timed out trying to connect"), hq.ClusterLost),
        (CancelledError("lost"), hq.ClusterLost),
        (hq.TimedOut("it took too long"), hq.TimedOut),
        (hq.EngineFailed("it died"), hq.EngineFailed),
        (ValueError("of a task"), ValueError),
    ],
)
def test_what_a_broken_connection_does_to_a_result_is_not_the_calls_failure(
    raised: BaseException, becomes: type[BaseException]
) -> None:
    """A scheduler that dies while a result is fetched shows as a closed connection."""
    assert type(cluster_module._explained(raised)) is becomes
