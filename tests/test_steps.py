"""A classical step where it runs: what it returns and what it raises arrive as they were."""

from __future__ import annotations

import dataclasses
import importlib
import json
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from hybridq.errors import StepFailed, Unhashable, WorkflowError
from hybridq.scope import StepScope, current
from hybridq.steps import Raised, StepReply, capture, pack_call, rebuild, run_step
from hybridq.values import decode


class OddError(Exception):
    """Its constructor takes two arguments and passes one on."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} is {value}")
        self.name = name


class Prefixed(Exception):
    """Built again from its arguments it would say its prefix twice."""

    def __init__(self, text: str) -> None:
        super().__init__(f"prefix: {text}")


class Locking(Exception):
    """Holds what cannot be pickled."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()


class Mute(Exception):
    """Cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Unbuildable(Exception):
    """Cannot be made again at all."""

    def __new__(cls, *args: Any, key: Any = None) -> Unbuildable:
        if key is None:
            raise TypeError("no")
        return super().__new__(cls, *args)

    def __init__(self, *args: Any, key: Any = None) -> None:
        super().__init__(*args)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> StepReply:
    return run_step(pack_call(function, args, kwargs, (), "the call"), "run/step[0]", 7, "here")


def iter_nothing() -> Iterator[int]:
    yield from ()


def raise_made(kind: str) -> None:
    raise made(kind)


def raising(kind: str) -> StepReply:
    return call(raise_made, kind)


def made(kind: str) -> BaseException:
    return {
        "ValueError": ValueError("no", 1),
        "KeyError": KeyError("k"),
        "SystemExit": SystemExit(3),
        "KeyboardInterrupt": KeyboardInterrupt(),
        "OSError": FileNotFoundError(2, "No such file", "/nowhere"),
        "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        "StopIteration": StopIteration(4),
        "numpy": np.linalg.LinAlgError("singular"),
        "array": ValueError(np.arange(3.0)),
        "nothing": RuntimeError(),
        "odd": OddError("x", 3),
        "prefixed": Prefixed("x"),
        "locking": Locking("x"),
        "surrogates": ValueError("name \udcff"),
        "long": ValueError("a" + "b" * 10**7 + "c"),
        "mute": Mute("x"),
        "unbuildable": Unbuildable("x", key=1),
    }[kind]


KINDS = ["ValueError", "KeyError", "SystemExit", "KeyboardInterrupt", "OSError", "UnicodeDecodeError", "StopIteration",
         "numpy", "nothing", "odd", "prefixed", "locking", "surrogates"]  # fmt: skip


def at_rest(raised: Raised) -> Raised:
    """What is left of it in a journal: text, and nothing pickled."""
    return dataclasses.replace(raised, pickled=None, arguments=json.loads(json.dumps(raised.arguments)))


# -- what a step returns -------------------------------------------------------------------------------------------


def test_a_value_comes_back_with_when_and_where() -> None:
    reply = call(lambda x, *, k: {"x": x, "k": np.full(300, k)}, (1, 2), k=1.5)
    assert reply.raised is None
    assert reply.output is not None
    value = decode(reply.output)
    assert value["x"] == (1, 2)
    assert value["k"].tolist() == [1.5] * 300
    assert reply.where == "here"
    assert reply.seconds >= 0
    assert reply.bytes >= 0
    assert isinstance(reply.started, float)


def test_a_step_knows_where_it_stands_and_leaves_no_trace() -> None:
    def step() -> Any:
        from hybridq.scope import current

        scope: Any = current.get()
        return str(scope.location), scope.seed, scope.generators

    before = current.get()
    reply = call(step)
    assert reply.output is not None
    assert decode(reply.output) == ("run/step[0]", 7, 0)
    assert current.get() is before
    raising("ValueError")
    assert current.get() is before
    assert not isinstance(before, StepScope)


def test_libraries_use_one_thread_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def step() -> list[int]:
        np.ones((2, 2)) @ np.ones((2, 2))
        return [pool["num_threads"] for pool in threadpool_info()]

    assert step()
    reply = call(step)
    assert reply.output is not None
    assert set(decode(reply.output)) == {1}


def test_a_value_that_is_no_data_is_refused_with_its_path() -> None:
    reply = call(lambda: {"result": [1, threading.current_thread]})
    assert reply.output is None
    assert reply.raised is not None
    error = rebuild(reply.raised, "run/step[0] on here")
    assert type(error) is Unhashable
    assert "the value returned by run/step[0]['result'][1] is a builtins.function" in str(error)


# -- what a step raises --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "array"])
def test_an_exception_comes_back_of_its_own_type(kind: str) -> None:
    original = made(kind)
    reply = raising(kind)
    assert reply.output is None
    assert reply.raised is not None
    assert reply.raised.type == f"{type(original).__module__}:{type(original).__qualname__}"
    error = rebuild(reply.raised, "run/step[0] on here")
    assert type(error) is type(original)
    assert str(error) == str(original)
    assert repr(error.args) == repr(original.args)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_comes_back_from_the_record_alone(kind: str) -> None:
    original = made(kind)
    raised = raising(kind).raised
    assert raised is not None
    error = rebuild(at_rest(raised), "run/step[0]")
    assert type(error) is type(original)
    assert str(error) == str(original)
    assert error.args == original.args


def test_attributes_travel_while_a_run_lasts() -> None:
    original = ValueError("x")
    original.answer = 42  # type: ignore[attr-defined]
    raised = capture(original)
    assert vars(rebuild(raised, "x"))["answer"] == 42


def test_the_remote_traceback_is_printed_before_the_exception() -> None:
    def inner_name() -> None:
        raise KeyError("k")

    raised = call(inner_name).raised
    assert raised is not None
    for source in (raised, at_rest(raised)):
        text = "".join(traceback.format_exception(rebuild(source, "run/step[0] on worker-3")))
        assert "in inner_name" in text
        assert "(in run/step[0] on worker-3)" in text
        assert text.index("in inner_name") < text.index("direct cause") < text.rindex("KeyError: 'k'")


def test_causes_are_part_of_the_traceback() -> None:
    def step() -> None:
        try:
            dict[str, int]()["missing"]
        except KeyError as error:
            raise ValueError("second") from error

    raised = call(step).raised
    assert raised is not None
    assert "KeyError: 'missing'" in raised.traceback
    assert "direct cause" in raised.traceback


def test_notes_are_part_of_the_traceback() -> None:
    original = ValueError("x")
    original.add_note("remember the milk")
    assert "remember the milk" in capture(original).traceback


def test_a_message_of_ten_megabytes_is_cut_in_the_text_alone() -> None:
    original = made("long")
    raised = raising("long").raised
    assert raised is not None
    assert len(raised.message) < 21_000
    assert len(raised.traceback) < 21_000
    assert raised.message.startswith("ab")
    assert raised.message.endswith("bc")
    assert "characters left out" in raised.message
    assert "characters left out" in raised.traceback
    assert rebuild(raised, "x").args == original.args
    assert type(rebuild(at_rest(raised), "x")) is ValueError


def test_arguments_that_would_need_a_file_of_their_own_are_left_out() -> None:
    """A record of a failure keeps none, and names none."""
    kept = capture(ValueError(np.arange(3.0)))
    assert kept.arguments is not None
    lost = capture(ValueError(np.arange(1000.0)))
    assert lost.arguments is None
    assert lost.message.startswith("[")
    assert type(rebuild(lost, "a/b[0]")) is ValueError  # while it can travel whole
    assert type(rebuild(dataclasses.replace(lost, pickled=None), "a/b[0]")) is StepFailed


def test_an_exception_without_words_is_captured() -> None:
    raised = raising("mute").raised
    assert raised is not None
    assert raised.message == "(its message cannot be had: RuntimeError)"
    assert type(rebuild(raised, "x")) is Mute


@pytest.mark.parametrize("kind", ["unbuildable", "local", "arguments"])
def test_an_exception_that_cannot_be_rebuilt_says_what_it_was(kind: str) -> None:
    class Local(Exception):
        pass

    originals = {"unbuildable": Unbuildable("x", key=1), "local": Local("x"), "arguments": ValueError(threading.Lock())}
    raised = capture(originals[kind])
    error = rebuild(at_rest(raised), "run/step[0]")
    assert type(error) is StepFailed
    assert str(error) == f"run/step[0] raised {raised.type.replace(':', '.')}: {raised.message}"
    assert error.__cause__ is not None
    assert raised.traceback.rstrip() in str(error.__cause__)


@pytest.mark.parametrize("kind", ["os:system", "subprocess:run", "builtins:print", "builtins:int", "missing.module:X",
                                  "builtins:Missing", "builtins:", ":", "os:environ"])  # fmt: skip
def test_a_record_cannot_make_anything_but_an_exception_run(kind: str, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    raised = Raised(kind, "text", [f"touch {trap}"], "Traceback\n")
    assert type(rebuild(raised, "x")) is StepFailed
    assert not trap.exists()


def test_what_is_captured_can_travel_itself() -> None:
    for kind in KINDS:
        reply = raising(kind)
        again = cloudpickle.loads(cloudpickle.dumps(reply))
        assert again == reply


# -- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lock", "generator", "socket"])
def test_an_argument_that_cannot_travel_is_refused_by_name(kind: str) -> None:
    with socket.socket() as connection:
        argument = {"lock": threading.Lock(), "generator": iter_nothing(), "socket": connection}[kind]
        for args, kwargs in (((argument,), {}), ((), {"k": argument})):
            with pytest.raises(WorkflowError, match=rf"^a call of f\(\) cannot be sent to a worker: .*{kind}"):
                pack_call(len, args, kwargs, (), "a call of f()")


def test_a_closure_that_cannot_travel_is_refused_by_name() -> None:
    lock = threading.Lock()
    with pytest.raises(WorkflowError, match=r"^a call of g\(\) cannot be sent"):
        pack_call(lambda: lock, (), {}, (), "a call of g()")


ELSEWHERE = """
import sys
from hybridq.steps import rebuild, run_step
from hybridq.values import decode
reply = run_step(sys.stdin.buffer.read(), "run/step[0]", 7, "elsewhere")
if reply.raised is not None:
    print("raised", reply.raised.type)
else:
    print("returned", decode(reply.output))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the researcher's own, which no other process can import."""
    (tmp_path / "ownlibrary.py").write_text(
        "K = 5\nclass Own(Exception): pass\ndef inner(x): return K * x\n"
        "def f(x): return inner(x)\ndef g(): raise Own('x')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("ownlibrary")
    sys.modules.pop("ownlibrary")


def elsewhere(packed: bytes) -> str:
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], input=packed, capture_output=True, check=True)
    return done.stdout.decode().strip()


def test_modules_go_by_value_when_they_are_named(own: Any) -> None:
    assert elsewhere(pack_call(own.f, (4,), {}, ("ownlibrary",), "x")) == "returned 20"
    assert elsewhere(pack_call(own.g, (), {}, ("ownlibrary",), "x")) == "raised ownlibrary:Own"
    assert elsewhere(pack_call(own.f, (4,), {}, (), "x")) == "raised builtins:ModuleNotFoundError"
    assert elsewhere(pack_call(len, ([1],), {}, ("not.loaded",), "x")) == "returned 1"


def test_packing_leaves_the_registry_as_it_was(own: Any) -> None:
    before = cloudpickle.list_registry_pickle_by_value()
    pack_call(own.f, (4,), {}, ("ownlibrary",), "x")
    with pytest.raises(WorkflowError):
        pack_call(own.f, (threading.Lock(),), {}, ("ownlibrary",), "x")
    assert cloudpickle.list_registry_pickle_by_value() == before
    cloudpickle.register_pickle_by_value(own)  # the researcher's own registration stays
    try:
        pack_call(own.f, (4,), {}, ("ownlibrary",), "x")
        assert cloudpickle.list_registry_pickle_by_value() == before | {"ownlibrary"}
    finally:
        cloudpickle.unregister_pickle_by_value(own)


def test_threads_that_pack_at_once_do_not_disturb_each_other(own: Any) -> None:
    by_name = pack_call(own.f, (4,), {}, (), "x")
    with ThreadPoolExecutor(8) as pool:
        packed = list(pool.map(lambda _: pack_call(own.f, (4,), {}, ("ownlibrary",), "x"), range(200)))
    assert b"inner" not in by_name
    assert all(b"inner" in p for p in packed)  # by value: the function's own code travels
