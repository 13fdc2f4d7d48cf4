"""The engine process: same results, and nothing survives, hangs or is lost when something is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from qiskit import QuantumCircuit
from qiskit.circuit import Gate
from qiskit.circuit.library import efficient_su2
from qiskit.quantum_info import SparsePauliOp

import hybridq
from hybridq.backends import Aer, Backend
from hybridq.engines import frames, server, wire
from hybridq.engines import process as process_module
from hybridq.engines.loops import Loop
from hybridq.engines.process import EngineProcess
from hybridq.errors import EngineFailed, TimedOut, TooLarge, WorkflowError

SOON = 60.0  # seconds that a process may take to end on a busy machine


def wait_for(condition):
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def gone(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def busy(pid):
    """Whether the process has computed for a while: it is past its start and in the middle of a circuit."""
    return psutil.Process(pid).cpu_times().user > 2.5


@pytest.fixture(scope="module")
def long(make):
    """One circuit that takes many seconds, with the interpreter's lock held all along."""
    circuit = efficient_su2(20, reps=60, entanglement="linear")
    return make(circuit, SparsePauliOp("Z" * 20), np.full(circuit.num_parameters, 0.1))


@pytest.fixture
def own():
    """A process that a test may harm."""
    process = EngineProcess(2**31, name="own")
    yield process
    process.kill()


@pytest.fixture(scope="module")
def short(make):
    return make(QuantumCircuit(2), "ZZ")


def background(call):
    """Run ``call`` in a thread; what it raised ends up in the list."""
    raised = []

    def target():
        try:
            call()
        except Exception as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    thread = threading.Thread(target=target)
    thread.start()
    return thread, raised


class TestResults:
    def test_the_same_bits_as_in_process(self, process, engine, make):
        circuit = efficient_su2(4, reps=1)
        observable = SparsePauliOp(["XXII", "ZIZZ"], [0.3, 0.7])
        theta = np.random.default_rng(0).uniform(-3, 3, (5, circuit.num_parameters))
        in_place = QuantumCircuit(1, 1)
        in_place.h(0)
        in_place.measure(0, 0)
        in_place.reset(0)
        programs = [
            make(circuit, observable, theta),
            make(circuit, observable, theta, 100),
            make(circuit, None, theta, 100),
            make(in_place, None, None, 100),
        ]
        for _ in range(2):  # the second time, the process has the templates
            for here, there in zip(engine.evaluate(programs), process.evaluate(programs), strict=True):
                assert np.array_equal(here.values, there.values)
                assert np.array_equal(here.stderrs, there.stderrs)
                assert (here.bits is None) == (there.bits is None)
                assert here.bits is None or np.array_equal(here.bits, there.bits)

    def test_a_custom_gate_with_a_known_name_survives_the_journey(self, process, make):
        inside = QuantumCircuit(1)
        inside.x(0)
        gate = inside.to_gate()
        gate.name = "h"
        circuit = QuantumCircuit(1)
        circuit.append(gate, [0])
        assert process.evaluate([make(circuit, "Z")])[0].values == -1.0

    def test_errors_are_values(self, process, make, short):
        unknown = QuantumCircuit(1)
        unknown.append(Gate("mystery", 1, [0.5]), [0])
        unsendable = make(QuantumCircuit(1, metadata={"object": object()}), "Z")
        large = make(QuantumCircuit(40), "Z" * 40)
        outcomes = process.evaluate([short, make(unknown, "Z"), large, unsendable, short])
        kinds = [type(outcome) for outcome in outcomes[1:4]]
        assert kinds == [EngineFailed, TooLarge, WorkflowError]
        assert outcomes[0].values == outcomes[4].values == 1.0
        assert process.evaluate([]) == []

    def test_large_replies(self, process, make):
        (outcome,) = process.evaluate([make(QuantumCircuit(9), None, None, 3_000_000)])
        assert outcome.bits.shape == (1, 3_000_000, 2)
        assert not outcome.bits.any()

    def test_large_requests(self, process, make):
        circuit = efficient_su2(1, reps=0)
        (outcome,) = process.evaluate([make(circuit, "Z", np.zeros((4000, circuit.num_parameters)))])
        assert (outcome.values == 1.0).all()

    def test_versions(self, process, short):
        process.evaluate([short])
        assert set(process.versions) == {"numpy", "qiskit", "qiskit_aer"}
        assert process.versions["numpy"] == np.__version__

    def test_threads_take_turns(self, process, make):
        circuit = efficient_su2(3, reps=1)
        found = {}

        def evaluate(number):
            for _ in range(5):
                program = make(circuit, "ZZZ", np.full(12, 0.1 * number))
                found.setdefault(number, set()).add(process.evaluate([program])[0].values.item())

        threads = [threading.Thread(target=evaluate, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [len(values) for values in found.values()] == [1] * 6
        assert len(set().union(*found.values())) == 6


class TestTemplates:
    def test_sent_once(self, own, short):
        batch = wire.pack([short])
        own.run(batch)
        (outcome,) = wire.unpack_outcomes(own.run(wire.Batch({}, batch.payload)))
        assert outcome.values == 1.0

    def test_a_batch_without_a_template_that_is_needed(self, own, short):
        with pytest.raises(EngineFailed, match="lacks the templates"):
            own.run(wire.Batch({}, wire.pack([short]).payload))

    def test_dropped_ones_are_sent_again(self, own, make):
        """Two templates too large to be kept together."""
        padding = {"padding": "x" * (server._TEMPLATE_BYTES // 2)}
        programs = [make(QuantumCircuit(1, metadata=padding), label) for label in "XZ"]
        assert sum(len(wire.encode_template(p.template)) for p in programs) > server._TEMPLATE_BYTES
        first = [own.evaluate([program])[0].values for program in programs]
        pid = own.pid
        again = [own.evaluate([program])[0].values for program in programs]
        assert np.array_equal(first, again)
        assert own.pid == pid

    def test_unreadable_ones_fail_their_own_programs(self, own, make, short):
        bad = make(QuantumCircuit(1), "X")
        batch = wire.pack([bad, short])
        data = batch.templates[bad.template.digest]
        broken = {**batch.templates, bad.template.digest: data[:-9]}
        error, good = wire.unpack_outcomes(own.run(wire.Batch(broken, batch.payload)))
        assert isinstance(error, EngineFailed)
        assert good.values == 1.0

    def test_a_message_that_is_no_batch(self, own, short):
        own.evaluate([short])
        with pytest.raises(EngineFailed, match=r"exit code 1 .* last words"):
            own.run(wire.Batch({}, b"nonsense, not a batch"))
        assert own.evaluate([short])[0].values == 1.0


class TestEnds:
    def test_kill_in_the_middle_of_a_circuit(self, own, long, short):
        own.evaluate([short])
        pid = own.pid
        thread, raised = background(lambda: own.evaluate([long]))
        wait_for(lambda: busy(pid))
        os.kill(pid, signal.SIGKILL)
        thread.join(SOON)
        assert isinstance(raised[0], EngineFailed)
        assert "SIGKILL" in str(raised[0])
        assert str(pid) in str(raised[0])
        assert own.evaluate([short])[0].values == 1.0
        assert own.pid != pid

    def test_kill_from_another_thread(self, own, long, short):
        own.evaluate([short])
        thread, raised = background(lambda: own.evaluate([long]))
        wait_for(lambda: busy(own.pid))
        own.kill()
        thread.join(SOON)
        assert isinstance(raised[0], EngineFailed)
        assert not own.alive
        assert own.pid is None
        assert own.evaluate([short])[0].values == 1.0

    def test_killed_while_idle(self, own, short):
        own.evaluate([short])
        pid = own.pid
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not own.alive)
        assert own.evaluate([short])[0].values == 1.0

    def test_timeout_kills_it_and_only_it(self, own, process, long, short):
        process.evaluate([short])
        other = process.pid
        own.evaluate([short])
        pid = own.pid
        with pytest.raises(TimedOut, match="longer than 1 s"):
            own.evaluate([long], timeout=1)
        wait_for(lambda: gone(pid))
        assert process.pid == other
        assert process.evaluate([short])[0].values == 1.0
        assert own.evaluate([short], timeout=60)[0].values == 1.0

    def test_close_and_start_again(self, own, short):
        own.close()
        own.kill()  # neither minds that there is nothing to end
        own.start()
        pid = own.pid
        own.start()
        assert own.pid == pid
        assert own.alive
        own.close()
        assert gone(pid)
        assert own.evaluate([short])[0].values == 1.0

    def test_collected_with_its_owner(self, short):
        process = EngineProcess(2**30)
        process.evaluate([short])
        pid = process.pid
        del process
        wait_for(lambda: gone(pid))

    def test_last_words_of_a_process_that_cannot_start(self, own, monkeypatch, short, tmp_path):
        (tmp_path / "qiskit_aer.py").write_text("raise ImportError('no such simulator')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(EngineFailed, match="could not start: ImportError: no such simulator"):
            own.evaluate([short])
        monkeypatch.undo()
        assert own.evaluate([short])[0].values == 1.0

    def test_prints_do_not_reach_the_pipe(self, own, monkeypatch, short, tmp_path):
        """A library that prints, and more than a pipe holds, neither breaks nor blocks anything."""
        (tmp_path / "sitecustomize.py").write_text(
            "import os, threading, time\n"
            "def talk():\n"
            "    time.sleep(1.5)\n"
            "    for _ in range(300): print('x' * 1000, flush=True); os.write(1, b'y' * 1000)\n"
            "threading.Thread(target=talk, daemon=True).start()\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        end = time.monotonic() + 2
        while time.monotonic() < end:
            assert own.evaluate([short])[0].values == 1.0

    def test_descriptors_do_not_pile_up(self, short):
        def cycle():
            process = EngineProcess(2**30)
            process.start()
            process.kill()

        cycle()
        before = psutil.Process().num_fds()
        for _ in range(5):
            cycle()
        assert psutil.Process().num_fds() <= before


class TestAhead:
    """What was begun before it was asked for is taken by who asks for the same, and forgotten by all others."""

    @pytest.fixture
    def programs(self, make, process):
        """Two that the process, and so every other one, answers differently; the first asked again as another."""
        circuit = efficient_su2(3, reps=1)
        made = [make(circuit, "ZZX", np.full(circuit.num_parameters, angle)) for angle in (0.3, 0.7, 0.3)]
        assert process.evaluate(made[:1])[0].values != process.evaluate(made[1:2])[0].values
        return made

    @pytest.fixture
    def sent(self, monkeypatch):
        """Kinds of the frames that are sent for who waits for the answer."""
        kinds = []
        send = process_module._Child._send

        def noted(self, kind, *rest):
            kinds.append(kind)
            return send(self, kind, *rest)

        monkeypatch.setattr(process_module._Child, "_send", noted)
        return kinds

    def test_the_answer_is_taken_and_asked_for_once(self, own, programs, sent):
        (expected,) = own.evaluate(programs[:1])
        assert len(sent) == 1
        own.ahead(programs[0])
        own.ahead(programs[1])  # it is at the first one
        (found,) = own.evaluate(programs[2:])
        assert len(sent) == 1
        assert found.values.tobytes() == expected.values.tobytes()
        own.evaluate(programs[:1])
        assert len(sent) == 2

    def test_others_get_their_own_answers(self, own, programs, sent):
        first, second = (own.evaluate([program])[0] for program in programs[:2])
        for asked, expected in ((programs[:1], [first]), (programs[:2], [first, second]), (programs[1:2], [second])):
            own.ahead(programs[1] if len(asked) == 1 and asked[0] is programs[0] else programs[0])
            found = own.evaluate(asked)
            assert [o.values.tobytes() for o in found] == [o.values.tobytes() for o in expected]
        assert len(sent) == 5

    def test_a_loop_that_comes_instead(self, own, make, programs):
        circuit = efficient_su2(2, reps=1)
        start = make(circuit, "ZZ", np.full(circuit.num_parameters, 0.3))
        loop = Loop("token", start, "run/minimize[0]/energy", 0, "COBYLA", {"options": {"maxiter": 30}})
        own.evaluate(programs[:1])
        own.ahead(programs[0])
        found = own.advance(loop, [], 60.0)
        assert found.state == "done"
        assert found.points[0].value == own.evaluate([start])[0].values.item()

    @pytest.fixture
    def loop(self, make):
        circuit = efficient_su2(2, reps=1)
        start = make(circuit, "ZZ", np.full(circuit.num_parameters, 0.3))
        return Loop("token", start, "run/minimize[0]/energy", 0, "COBYLA", {"options": {"maxiter": 300, "tol": 0.0}})

    @pytest.fixture
    def advanced(self, process, loop):
        """All that the loop comes to."""
        return process.advance(replace(loop, token="another"), [], 60.0)

    @staticmethod
    def taken(process, loop, seconds=60.0):
        """What `advance` comes to in one slice, points that came as parts among its own."""
        points = []

        def arrived(part):
            assert part.first == len(points)
            points.extend(part.points)

        found = process.advance(loop, points, seconds, arrived=arrived)
        return replace(found, points=(*points, *found.points), first=0)

    def test_a_loop_is_begun(self, own, loop, advanced, sent):
        own.evaluate([loop.program])
        own.advance_ahead(loop, 60.0)
        found = self.taken(own, loop)
        assert len(sent) == 1
        assert len(found.points) > 100
        assert [p.x.tobytes() + np.float64(p.value).tobytes() for p in found.points] == [
            p.x.tobytes() + np.float64(p.value).tobytes() for p in advanced.points
        ]
        assert found.result == advanced.result
        assert found.state == "done"

    @pytest.mark.parametrize("other", ["program", "loop", "slice"])
    def test_a_loop_that_was_begun_is_forgotten(self, own, programs, loop, advanced, sent, other):
        expected = own.evaluate([programs[0], loop.program])[0].values.tobytes()
        own.advance_ahead(loop, 0.05)
        if other == "program":
            assert own.evaluate(programs[:1])[0].values.tobytes() == expected
        found = self.taken(own, replace(loop, token="third") if other == "loop" else loop)
        assert len(sent) == (3 if other == "program" else 2)
        assert found.result == advanced.result
        assert len(found.points) == len(advanced.points)

    def test_what_nobody_takes_does_not_keep_it_from_ending(self, own, loop):
        own.evaluate([loop.program])
        popen = own._child.popen
        endless = {"options": {"maxiter": 10**6, "maxfev": 10**6, "xatol": 0.0, "fatol": 0.0}}
        own.advance_ahead(replace(loop, method="Nelder-Mead", settings=endless), 600.0)
        time.sleep(1.0)  # so much that the pipe is full
        own.close()
        assert popen.returncode not in (None, -signal.SIGKILL)

    def test_nothing_is_begun_where_nothing_is_known(self, own, programs, make):
        own.ahead(programs[0])
        assert not own.alive
        own.evaluate(programs[:1])
        wide = efficient_su2(2, reps=200)
        large = make(wide, "ZZ", np.full(wide.num_parameters, 0.1))
        for other in (make(QuantumCircuit(1), "Z"), large):  # not sent yet; more than a pipe takes at once
            own.ahead(other)
            assert own._child._begun is None
        own.evaluate([large])
        own.ahead(large)
        assert own._child._begun is None

    def test_what_cannot_be_sent_is_not_begun(self, own, programs, loop, make):
        own.evaluate([programs[0], loop.program])
        pid = own.pid
        circuit = efficient_su2(2, reps=1, entanglement="full")
        circuit.metadata = {"not": object()}
        unsent = make(circuit, "ZZ", np.full(circuit.num_parameters, 0.3))
        with pytest.raises(WorkflowError, match="serialise"):
            wire.pack([unsent])
        own.ahead(unsent)
        own.advance_ahead(replace(loop, program=unsent), 1.0)
        assert own._child._begun is None
        assert own.pid == pid

    def test_a_process_that_is_busy_is_left_alone(self, own, programs, long):
        own.evaluate(programs[:1])
        thread, _ = background(lambda: own.evaluate([long]))
        wait_for(own._lock.locked)
        own.ahead(programs[0])
        assert thread.is_alive()  # who asked did not wait
        own.kill()
        thread.join()

    def test_a_process_that_ended(self, own, programs):
        (expected,) = own.evaluate(programs[:1])
        for begun in (False, True):
            if begun:
                own.ahead(programs[0])
            os.kill(own.pid, signal.SIGKILL)
            wait_for(lambda: not own.alive)
            if not begun:
                own.ahead(programs[0])  # is not told
            try:
                (found,) = own.evaluate(programs[:1])
            except EngineFailed:
                assert begun  # it may have been at it
                (found,) = own.evaluate(programs[:1])
            assert found.values.tobytes() == expected.values.tobytes()

    def test_its_end_is_nobodys_failure(self, own, programs):
        expected = [own.evaluate([program])[0].values.tobytes() for program in programs]
        own.ahead(programs[0])
        os.kill(own.pid, signal.SIGKILL)
        wait_for(lambda: not own.alive)
        assert own.evaluate(programs[1:2])[0].values.tobytes() == expected[1]

    def test_one_that_never_comes_back_is_replaced(self, own, make, programs, monkeypatch):
        """And the time limit of what is asked for next is its own."""
        monkeypatch.setattr(process_module, "_FORGET_SECONDS", 0.2)
        circuit = efficient_su2(6, reps=1)
        endless = make(circuit, "Z" * 6, np.full(circuit.num_parameters, 0.1), backend=Aer("matrix_product_state"))
        expected = own.evaluate([programs[0], endless])[0]
        pid = own.pid
        endless.theta[0, 0] = np.nan
        own.ahead(endless)
        (found,) = own.evaluate(programs[:1], timeout=30.0)
        assert own.pid != pid
        assert found.values.tobytes() == expected.values.tobytes()

    def test_a_process_that_is_killed_meanwhile_is_replaced(self, own, programs, monkeypatch):
        (expected,) = own.evaluate(programs[:1])
        begin = process_module._Child.begin

        def killed(self, kind, batch):
            begin(self, kind, batch)
            killer = threading.Thread(target=own.kill)
            killer.start()
            wait_for(lambda: self.unwanted)
            killed.by = killer

        with monkeypatch.context() as patched:
            patched.setattr(process_module._Child, "begin", killed)
            own.ahead(programs[0])
        killed.by.join()
        assert own.evaluate(programs[:1])[0].values.tobytes() == expected.values.tobytes()

    def test_an_interrupt_ends_it(self, own, programs, monkeypatch):
        (expected,) = own.evaluate(programs[:1])
        pid = own.pid

        def interrupted(self, kind, batch):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(process_module._Child, "begin", interrupted)
            with pytest.raises(KeyboardInterrupt):
                own.ahead(programs[0])
        wait_for(lambda: gone(pid))
        assert own.evaluate(programs[:1])[0].values.tobytes() == expected.values.tobytes()


class Looked:
    """A pipe that can be used from the look with the number ``ready`` on."""

    def __init__(self, ready):
        self.ready, self.looks = ready, 0

    def poll(self, timeout):
        assert timeout == 0
        self.looks += 1
        return [(3, 1)] if self.looks > self.ready else []


def test_looking_that_does_not_pay_is_given_up_for_longer_and_longer(monkeypatch):
    monkeypatch.setattr(frames, "_TAKEN", float("inf"))
    spin, looked = frames.Spin(1e-6), []
    for _ in range(400):
        pipe = Looked(ready=10**9)
        spin(pipe)
        looked.append(pipe.looks > 0)
    assert [i for i, found in enumerate(looked) if found] == [0, 3, 8, 17, 34, 67, 132, 261, 390]
    for ready, found in ((0, False), (3, True)):
        patient, pipe = frames.Spin(3600.0), Looked(ready)
        patient(pipe)
        assert pipe.looks == ready + 1
        assert (pipe.looks > 1) is found
    never = Looked(ready=0)
    frames.Spin(0.0)(never)
    assert never.looks == 0


def test_what_is_expected_later_is_slept_for_first(monkeypatch):
    monkeypatch.setattr(frames, "_TAKEN", float("inf"))

    class Napped(Looked):
        naps = ()

        def poll(self, timeout):
            if timeout:
                self.naps = (*self.naps, timeout)
                return [(3, 1)] if self.ready < 0 else []
            return super().poll(timeout)

    for expected, naps in ((0.0, ()), (0.0019, ()), (0.0036, (2,)), (0.02, (19,))):
        pipe = Napped(ready=3)
        assert frames.Spin(3600.0)(pipe, expected)
        assert (pipe.naps, pipe.looks) == (naps, 4)
    early, late = Napped(ready=-1), Napped(ready=0)
    assert frames.Spin(3600.0)(early, 0.01)
    assert early.looks == 0
    assert not frames.Spin(3600.0)(late, 1.0)  # beside a second it does not count
    assert (late.naps, late.looks) == ((), 0)


def test_a_core_that_somebody_else_takes_is_left_to_them(monkeypatch):
    monkeypatch.setattr(frames, "_TAKEN", -1.0)
    spin, pipe = frames.Spin(3600.0), Looked(ready=10**9)
    spin(pipe)
    assert pipe.looks == 1


def run_script(text, *, path, **options):
    """A parent process of its own, which is not the tests'."""
    script = path / "parent.py"
    script.write_text(textwrap.dedent(HEAD) + textwrap.dedent(text))
    root = str(Path(hybridq.__path__[0]).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


HEAD = """
    import threading, time
    import numpy as np
    from qiskit import QuantumCircuit
    from qiskit.circuit.library import efficient_su2
    from qiskit.quantum_info import SparsePauliOp
    from hybridq.engines.process import EngineProcess
    from hybridq.location import Location
    from hybridq.program import Request, program

    def make(circuit, observable, theta=None):
        return program(Request(circuit, observable, theta), seed=1, location=Location("run"))

    def long():
        circuit = efficient_su2(20, reps=60, entanglement="linear")
        return make(circuit, SparsePauliOp("Z" * 20), np.full(circuit.num_parameters, 0.1))

    process = EngineProcess(2**31)
    short = make(QuantumCircuit(1), "Z")
"""


@pytest.fixture
def parent(tmp_path):
    """Start a script with the pieces above; it prints the process id of its engine first."""
    started = []

    def start(text, **options):
        started.append(run_script(text, path=tmp_path, **options))
        return started[-1], int(started[-1].stdout.readline())

    yield start
    for popen in started:
        popen.kill()
        popen.wait()
        popen.stdout.close()
        popen.stderr.close()


def rest(popen):
    """What the script printed after its first line, once it has ended without an error."""
    printed = popen.stdout.read().split()
    assert (popen.wait(SOON), popen.stderr.read()) == (0, "")
    return printed


class TestParents:
    @pytest.mark.slow
    def test_no_orphan_after_the_parent_is_killed_in_the_middle_of_a_circuit(self, parent):
        popen, pid = parent("""
            process.evaluate([short])
            print(process.pid, flush=True)
            process.evaluate([long()])
        """)
        wait_for(lambda: busy(pid))
        popen.kill()
        end = time.monotonic() + SOON
        while not gone(pid):
            assert time.monotonic() < end, "the engine process outlived its parent"
            time.sleep(0.02)

    def test_the_end_of_the_thread_that_started_it_does_not_end_it(self, parent):
        popen, pid = parent("""
            thread = threading.Thread(target=lambda: process.evaluate([short]))
            thread.start()
            thread.join()
            print(process.pid, flush=True)
            time.sleep(0.3)
            first = process.pid
            process.evaluate([short])
            print(process.pid == first, flush=True)
        """)
        assert rest(popen) == ["True"]
        wait_for(lambda: gone(pid))

    def test_a_parent_that_just_ends(self, parent):
        popen, pid = parent("""
            process.evaluate([short])
            print(process.pid, flush=True)
        """)
        assert rest(popen) == []
        assert gone(pid)

    def test_ctrl_c_reaches_the_waiting_parent_and_not_the_engine(self, parent):
        """As from a terminal: to the whole process group of the parent."""
        popen, pid = parent(
            """
            other = EngineProcess(2**30)
            other.evaluate([short])
            process.evaluate([short])
            print(process.pid, flush=True)
            start = time.monotonic()
            try:
                process.evaluate([long()])
            except KeyboardInterrupt:
                print("interrupted", process.alive, flush=True)
            first = other.pid
            print(process.evaluate([short])[0].values.item(), other.evaluate([short])[0].values.item())
            print(other.pid == first)
            """,
            start_new_session=True,
        )
        wait_for(lambda: busy(pid))
        os.killpg(popen.pid, signal.SIGINT)
        assert rest(popen) == ["interrupted", "False", "1.0", "1.0", "True"]
        wait_for(lambda: gone(pid))

    def test_the_users_main_is_not_imported(self, parent):
        """No guard around the script's work, which spawned children would run again."""
        popen, _ = parent("""
            process.evaluate([short])
            print(process.pid, flush=True)
            print("once")
        """)
        assert rest(popen) == ["once"]

    def test_a_fork_of_the_parent_has_an_engine_of_its_own(self, parent):
        popen, _ = parent("""
            import os, warnings
            warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
            process.evaluate([short])
            print(process.pid, flush=True)
            first = process.pid
            child = os.fork()
            if child == 0:
                value = process.evaluate([short])[0].values.item()
                print(value, process.pid != first, flush=True)
                process.kill()
                os._exit(0)
            os.waitpid(child, 0)
            print(process.evaluate([short])[0].values.item(), process.pid == first)
        """)
        assert rest(popen) == ["1.0", "True", "1.0", "True"]


def test_a_process_that_outgrows_what_was_predicted_is_ended(own, make, short):
    if not Path("/proc/self/statm").exists():
        pytest.skip("nothing tells here what a process has in memory")
    greedy = make(QuantumCircuit(2), "ZZ", shots=10, backend=Backend("devices:Queued", {"failing": "greedy"}))
    own.evaluate([short])
    before = own.pid
    with pytest.raises(TooLarge, match=r"far more than the predicted 1(\.0)? MiB .* was ended"):
        own.evaluate([greedy], expected=2**20)
    assert gone(before)
    assert own.evaluate([short], expected=2**20)[0].values.tolist() == [[1.0]]
    assert own.pid != before
