"""The command line: options, JSON, errors, listings."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster
from processes import SOON, wait_until

HYBRIDQ = Path(sys.executable).with_name("hybridq")
SCRIPT = """
import sys
import numpy as np
from qiskit import QuantumCircuit
from qiskit.circuit import Parameter
import hybridq as hq

CIRCUIT = QuantumCircuit(1)
CIRCUIT.ry(Parameter("a"), 0)

@hq.quantum
def energy(theta):
    return hq.expval(CIRCUIT, "Z", theta)

@hq.quantum
def counts(theta):
    return hq.sample(CIRCUIT, theta, shots=50)

@hq.classical
def loud(x):
    print("a step prints", flush=True)
    return x

@hq.workflow
def study(what, argument=None):
    print("the body prints")
    found = {}
    if "loop" in what:
        found["loop"] = hq.minimize(energy, [0.3], method="COBYLA", options={"maxiter": 12})
    if "value" in what:
        found["value"] = energy([0.0])
    if "sample" in what:
        found["bits"] = counts([0.0]).get_counts()
    if "step" in what:
        found["step"] = loud(what)
    if "clock" in what:
        found["clock"] = hq.now()
    if "random" in what:
        found["random"] = float(hq.rng().random())
    if "special" in what:
        found["special"] = [float("nan"), float("inf"), -np.inf, np.float64(1.5), np.arange(3), (1, None, True), 2**60]
    if "opaque" in what:
        found["opaque"] = object()
    if "caught" in what:
        try:
            energy([0.0, 1.0])
        except hq.WorkflowError as error:
            found["caught"] = str(error)
    if "raise" in what:
        broken(argument)
    return found

def broken(argument):
    raise ValueError(f"no good: {argument}")

if __name__ == "__main__":
    hq.run(study, sys.argv[1], *sys.argv[2:])
    print("the script prints")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A study that does what its argument names; it calls `hq.run` without options."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def hybridq(place: Path, *arguments: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [HYBRIDQ, *map(str, arguments)], check=False, capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done


def refuse_constants(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON document on stdout."""
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout, parse_constant=refuse_constants)


def test_run_resume_list_and_show(script: Path, tmp_path: Path) -> None:
    options = ("--name", "first", "--store", "kept", "--seed", 5, "--workers", 1, "--json")
    done = hybridq(tmp_path, "run", script, *options, "--", "loop value sample step random")
    live = document(done)
    for text in ("the body prints", "a step prints", "the script prints"):
        assert text in done.stderr
    loop = live["value"]["loop"]
    assert loop["nfev"] == 12
    assert isinstance(loop["x"], list)
    assert live["value"]["value"] == {"value": pytest.approx(1.0), "stderr": 0.0, "shots": None}
    assert live["value"]["bits"] == {"0": 50}
    assert live["value"]["step"] == "loop value sample step random"
    assert live["name"] == "first"
    assert (tmp_path / live["directory"]).resolve() == tmp_path / "kept" / "first"
    assert (live["evaluations_executed"], live["steps_executed"]) == (14, 1)

    again = hybridq(tmp_path, "run", script, *options, "--", "loop value sample step random")
    report = document(again)
    assert report["value"] == live["value"]
    assert (report["evaluations_executed"], report["steps_executed"]) == (0, 0)
    assert (report["evaluations_replayed"], report["steps_replayed"]) == (14, 1)
    assert "the body prints" in again.stderr  # bodies run again
    assert "a step prints" not in again.stderr

    [entry] = document(hybridq(tmp_path, "runs", "--store", "kept", "--json"))
    shown = document(hybridq(tmp_path, "show", "first", "--store", "kept", "--json"))
    assert entry == shown
    expected = {
        "name": "first", "workflow": "study", "status": "finished", "seed": 5, "evaluations": 14, "steps": 1,
        "shots": 50, "sessions": 2,
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    assert shown["value"] == live["value"]
    assert shown["loops"] == [
        {"at": "study/minimize[0]", "method": "COBYLA", "evaluations": 12, "best": loop["fun"], "finished": True}
    ]
    assert shown["failures"] == []
    assert {"qiskit", "qiskit-aer", "numpy", "hybridq-scheduler"} <= set(shown["versions"])
    text = hybridq(tmp_path, "show", "first", "--store", "kept").stdout
    for word in ("first", "finished", "study/minimize[0]", "COBYLA", "12", f"{loop['fun']:.10f}"):
        assert word in text
    listing = hybridq(tmp_path, "runs", "--store", "kept").stdout
    assert re.search(r"^first +finished +14 evaluations, 1 steps$", listing, re.MULTILINE)


def test_watch_report_and_graph(script: Path, tmp_path: Path) -> None:
    hybridq(tmp_path, "run", "script.py", "--name", "first", "--", "value")
    shown = document(hybridq(tmp_path, "show", "first", "--json"))
    state = document(hybridq(tmp_path, "watch", "first", "--once", "--json"))
    assert (state["left"], state["evaluations"], state["steps"]) == ("finished", shown["evaluations"], shown["steps"])
    assert "first: finished" in hybridq(tmp_path, "watch", "first").stderr
    assert "first-report/report.html, and" in hybridq(tmp_path, "report", "first", "--format", "svg").stdout
    assert "<h1>first</h1>" in (tmp_path / "first-report" / "report.html").read_text()
    assert {path.suffix for path in (tmp_path / "first-report").iterdir()} == {".html", ".svg"}
    assert hybridq(tmp_path, "graph", "first").stdout == "the graph is in first-graph.svg\n"
    assert (tmp_path / "first-graph.svg").read_text() == hybridq(tmp_path, "graph", "first", "--out", "-").stdout
    assert "--out" in hybridq(tmp_path, "graph", "first", "--out", "no/where.svg", code=1).stderr


@pytest.mark.slow
def test_options_replace_keywords(script: Path, tmp_path: Path) -> None:
    seeds = [document(hybridq(tmp_path, "run", script, "--seed", seed, "--json", "random"))["value"]["random"]
             for seed in (1, 2)]  # fmt: skip
    assert seeds[0] != seeds[1]
    default = document(hybridq(tmp_path, "run", script, "--json", "random"))
    assert default["value"]["random"] not in seeds
    names = [entry["name"] for entry in document(hybridq(tmp_path, "runs", "--json"))]
    assert len(set(names)) == 3  # three seeds, three runs
    assert all(re.fullmatch(r"study-[0-9a-f]{10}", name) for name in names)
    text = script.read_text().replace("*sys.argv[2:])", "*sys.argv[2:], name='own', seed=1, store='elsewhere')")
    script.write_text(text)
    own = document(hybridq(tmp_path, "run", script, "--json", "random"))
    assert (own["name"], own["directory"], own["value"]["random"]) == ("own", "elsewhere/own", seeds[0])
    other = document(
        hybridq(tmp_path, "run", script, "--name", "other", "--seed", 2, "--store", "s", "--json", "random")
    )
    assert (other["name"], other["directory"], other["value"]["random"]) == ("other", "s/other", seeds[1])
    plain = subprocess.run(
        [sys.executable, script, "random"], check=True, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert plain.stdout == "the body prints\nthe script prints\n"
    assert "own finished" in plain.stderr


def test_a_backend_by_name(script: Path, tmp_path: Path) -> None:
    options = ("--name", "one", "--json")
    live = document(hybridq(tmp_path, "run", script, *options, "--backend", "density_matrix", "--", "value sample"))
    again = document(hybridq(tmp_path, "run", script, *options, "--backend", "density_matrix", "--", "value sample"))
    assert again["value"] == live["value"]
    assert (live["evaluations_executed"], again["evaluations_executed"]) == (2, 0)
    lines = [json.loads(line) for line in (tmp_path / "runs/one/journal.jsonl").read_text().splitlines()]
    assert [e["plan"]["v"]["method"] for e in lines if e["k"] == "circuit"] == ["density_matrix"] * 2
    stopped = hybridq(tmp_path, "run", script, *options, "--backend", "stabilizer", "--", "value sample", code=1)
    assert "Diverged" in stopped.stderr
    assert "density_matrix" in stopped.stderr
    assert "stabilizer" in stopped.stderr


SITE = """
name = "lab"
[cluster]
workers = 1
[[devices]]
name = "noisy"
method = "density_matrix"
noise = { one_qubit = 1e-2 }
qubits = 7
cost_per_shot = 0.25
"""


@pytest.mark.slow
def test_a_site_by_its_file(script: Path, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    options = ("--site", "site.toml", "--backend", "noisy", "--name", "one")
    shown = document(hybridq(tmp_path, "devices", "--site", "site.toml", "--json"))
    assert [d["name"] for d in shown["devices"]] == ["driver", "worker 0", "noisy"]
    noisy = shown["devices"][-1]
    assert (noisy["qubits"], noisy["slots"], noisy["cost_per_shot"]) == (7, 1, 0.25)
    assert not shown["measured"]
    assert re.search(
        r"^noisy +1 +1 .* 7 +0.25 ", hybridq(tmp_path, "devices", "--site", "site.toml").stdout, re.MULTILINE
    )
    planned = document(hybridq(tmp_path, "plan", script, *options, "--json", "--", "value"))
    assert [call["device"] for call in planned["calls"]] == ["noisy"]
    found = document(hybridq(tmp_path, "run", script, *options, "--json", "--", "value"))
    assert found["value"]["value"]["value"] == pytest.approx(1 - 1e-2)
    lines = [json.loads(line) for line in (tmp_path / "runs/one/journal.jsonl").read_text().splitlines()]
    assert [e["where"] for e in lines if e["k"] == "eval"] == ["noisy"]
    refused = hybridq(tmp_path, "run", script, *options[:2], "--backend", "nosy", "--", "value", code=1)
    assert "'nosy' is neither a device of the site 'lab'" in refused.stderr


def test_devices_of_a_cluster_say_what_they_do(tmp_path: Path) -> None:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        keys = [("classical:nap-@lab", f"lab@1234/study/nap[{i}]", 0) for i in range(5)]
        naps = [client.submit(time.sleep, 60, key=key, pure=False) for key in keys]
        assert wait_until(lambda: sum(map(len, client.processing().values())) >= 2, SOON)
        found = document(hybridq(tmp_path, "devices", "--cluster", cluster.scheduler_address, "--json"))
        client.cancel(naps)
    workers = [d for d in found["devices"] if d["name"].startswith("tcp://")]
    assert len(workers) == 2
    assert all("lab/study/nap[" in d["doing"] for d in workers)
    assert all(d["used"] > 2**24 for d in workers)


def test_plan_then_run_then_show(script: Path, tmp_path: Path) -> None:
    """A plan prices and runs the steps; the run answers them; show puts what was predicted beside what was measured."""
    options, arguments = ("--name", "one", "--workers", 1), ("--", "loop value sample step random")
    text = hybridq(tmp_path, "plan", script, *options, *arguments)
    assert text.stdout.startswith("plan of one, recorded in runs/one\n")
    assert all(len(line) <= 120 for line in text.stdout.splitlines())
    for words in ("study/minimize[0]/energy", "study/energy[0]", "study/counts[0]", "at most 12 each (maxiter=12)",
                  "ran now, and is recorded", "what follows hq.run depends on the value of"):  # fmt: skip
        assert words in text.stdout
    for printed in ("the body prints", "a step prints"):
        assert printed in text.stderr
    assert "the script prints" not in text.stderr  # it would go on with what is not known
    planned = document(hybridq(tmp_path, "plan", script, *options, "--json", *arguments))
    assert [(row["at"], row["count"], row["circuits"], row["shots"]) for row in planned["calls"]] == [
        ("study/minimize[0]/energy", 1, 1, 0), ("study/energy[0]", 1, 1, 0), ("study/counts[0]", 1, 1, 50),
    ]  # fmt: skip
    assert planned["calls"][0]["loop"]["at_limit"]["evaluations"] == 12
    assert [(step["at"], step["state"]) for step in planned["steps"]] == [("study/loud[0]", "answered")]
    assert planned["answered"] == {"evaluations": 0, "steps": 1}
    assert json.loads((tmp_path / "runs/one/journal.jsonl").read_text().splitlines()[-1])["status"] == "planned"

    live = document(hybridq(tmp_path, "run", script, *options, "--json", *arguments))
    assert (live["evaluations_executed"], live["steps_executed"], live["steps_replayed"]) == (14, 0, 1)

    again = hybridq(tmp_path, "plan", script, *options, *arguments)
    assert "answered from the record" in again.stdout
    assert "the script prints" in again.stderr
    shown = document(hybridq(tmp_path, "show", "one", "--json"))
    assert shown["status"] == "finished"
    exact, sampled = sorted(shown["programs"], key=lambda one: one["shots"] or 0)
    assert (exact["evaluations"], exact["shots"], sampled["evaluations"], sampled["shots"]) == (13, None, 1, 50)
    for one in (exact, sampled):
        assert one["predicted_bytes"] >= 2**25
        assert 0 < one["seconds"] < 10
        assert 0 < one["predicted_seconds"] < 10
    text = hybridq(tmp_path, "show", "one")
    assert re.search(r"^[0-9a-f]{12} +1 +exact +13 +\S+ +\S+ +32 MiB", text.stdout, re.MULTILINE)


def test_a_plan_refuses_what_fits_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text("""
import hybridq as hq
from qiskit import QuantumCircuit

@hq.quantum
def wide(n):
    circuit = QuantumCircuit(n)
    circuit.h(0)
    return hq.expval(circuit, "Z" * n)

@hq.workflow
def study():
    return hq.map(wide, [2, 50, 60], return_exceptions=True)

if __name__ == "__main__":
    hq.run(study, name="wide")
""")
    done = hybridq(tmp_path, "plan", path, code=1)
    assert done.stdout.count("refused  study/wide") == 2
    assert re.search(
        r"needs 16,384.* TiB \([\d,]+ bytes\), 50 qubits .*, and the largest device for it, .* has", done.stdout
    )
    assert "study/wide[0]" in done.stdout
    refusals = document(hybridq(tmp_path, "plan", path, "--json", code=1))["refusals"]
    assert [(r["at"], r["needs"] > r["has"] > 0) for r in refusals] == [
        ("study/wide[1]", True), ("study/wide[2]", True),
    ]  # fmt: skip
    path.write_text("print('no run')")
    assert "without calling hq.run" in hybridq(tmp_path, "plan", path, code=1).stderr


def test_json_has_forms_for_what_json_lacks(script: Path, tmp_path: Path) -> None:
    found = document(hybridq(tmp_path, "run", script, "--json", "special"))
    assert found["value"]["special"] == ["nan", "inf", "-inf", 1.5, [0, 1, 2], [1, None, True], 2**60]
    refused = hybridq(tmp_path, "run", script, "--json", "opaque", code=1)
    assert refused.stdout == ""
    assert "returned a object, which has no JSON form" in refused.stderr
    assert "finished" in refused.stderr
    shown = document(hybridq(tmp_path, "runs", "--json"))
    assert [(e["status"], e["value"] is None) for e in shown] == [("finished", False), ("finished", True)]


@pytest.mark.slow
def test_json_of_scripts_that_end_in_their_own_way(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    body = "import sys\nimport hybridq as hq\n@hq.workflow\ndef w(k):\n    return k\nif __name__ == '__main__':\n"
    script.write_text(body + "    hq.run(w, 1)\n    hq.run(w, 2)\n")
    assert [d["value"] for d in document(hybridq(tmp_path, "run", script, "--json"))] == [1, 2]
    script.write_text(body + "    sys.exit(hq.run(w, 0))\n")
    assert document(hybridq(tmp_path, "run", script, "--json"))["value"] == 0
    script.write_text(body + "    sys.exit(hq.run(w, 3))\n")
    assert hybridq(tmp_path, "run", script, "--json", code=3).stdout == ""
    script.write_text(body + "    pass\n")
    assert "without calling hq.run" in hybridq(tmp_path, "run", script, "--json", code=1).stderr
    assert hybridq(tmp_path, "run", script).stdout == ""


def test_errors_begin_with_the_researchers_own_lines(script: Path, tmp_path: Path) -> None:
    done = hybridq(tmp_path, "run", script, "--name", "broken", "--", "value raise", "argument", code=1)
    trace = done.stderr[done.stderr.index("Traceback") :].splitlines()
    assert trace[1].startswith(f'  File "{script}", line')
    assert "in <module>" in trace[1]
    assert f'File "{script}", line' in [line for line in trace if "File" in line][-1]
    assert "ValueError: no good: argument" in trace
    assert "runpy" not in done.stderr
    assert "Run again with: " in done.stderr
    shown = document(hybridq(tmp_path, "show", "broken", "--json"))
    assert (shown["status"], shown["error"]) == ("failed", "ValueError: no good: argument")
    assert (shown["evaluations"], shown["value"]) == (1, None)

    nested = tmp_path / "hybridq-studies" / "runpy.d"
    nested.mkdir(parents=True)
    (nested / "script.py").write_text(SCRIPT)
    done = hybridq(tmp_path, "run", nested / "script.py", "raise", "x", code=1)
    assert f'File "{nested / "script.py"}", line' in done.stderr.split("Traceback")[1].splitlines()[1]


@pytest.mark.slow
def test_errors_of_other_sessions_are_shown(script: Path, tmp_path: Path) -> None:
    hybridq(tmp_path, "run", script, "--name", "one", "--", "value")
    stopped = hybridq(tmp_path, "run", script, "--name", "one", "--", "loop", code=1)
    assert "Diverged: the run 'one' was recorded with other arguments" in stopped.stderr
    assert document(hybridq(tmp_path, "show", "one", "--json"))["status"] == "finished"
    caught = document(hybridq(tmp_path, "run", script, "--name", "two", "--json", "--", "caught"))
    assert "1 parameters" in caught["value"]["caught"]

    journal = tmp_path / "runs" / "two" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0])  # killed right after its first line
    entries = {e["name"]: e["status"] for e in document(hybridq(tmp_path, "runs", "--json"))}
    assert entries == {"one": "finished", "two": "unfinished"}
    assert "unfinished" in hybridq(tmp_path, "show", "two").stdout
    journal.write_bytes(lines[0].replace(b"two", b"too") + b"".join(lines[1:]))
    entries = {e["name"]: e["status"] for e in document(hybridq(tmp_path, "runs", "--json"))}
    assert entries == {"one": "finished", "two": "damaged"}
    assert "line 1: its checksum does not match" in hybridq(tmp_path, "show", "two", code=1).stderr
    assert re.search(r"^two +damaged +.*checksum", hybridq(tmp_path, "runs").stdout, re.MULTILINE)
    again = hybridq(tmp_path, "run", script, "--name", "two", "--json", "--", "caught", code=1)
    assert again.stdout == ""
    assert "Corrupt" in again.stderr


def test_verify(script: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        hybridq(tmp_path, "run", script, "--name", name, "--", "loop value clock")
    text = hybridq(tmp_path, "verify", "one").stdout
    journal = tmp_path / "runs" / "one" / "journal.jsonl"
    lines = journal.read_text().splitlines()
    assert text.startswith("runs/one: sound\n")
    for words in (f"lines {len(lines)}, values 1 of", "sessions 1, steps 0, evaluations 13, loops 1, rows 12, events 1",
                  "finished", json.loads(lines[-1])["chain"], "qiskit-aer"):  # fmt: skip
        assert words in text
    assert "damage" not in text
    found = document(hybridq(tmp_path, "verify", "one", "--json"))
    assert (found["sound"], found["damage"], found["counts"]["rows"]) == (True, [], 12)
    assert hybridq(tmp_path, "verify", "--all").stdout.count(": sound\n") == 2
    assert [one["name"] for one in document(hybridq(tmp_path, "verify", "two", "one", "--json"))] == ["two", "one"]

    journal.write_text("\n".join([*lines[:2], lines[2].replace("energy", "Energy"), *lines[3:]]) + "\n")
    [value] = (tmp_path / "runs" / "one" / "values").iterdir()
    value.rename(value.with_name(f"{'0' * 64}.qpy"))
    text = hybridq(tmp_path, "verify", "--all", code=1).stdout
    for words in ("runs/one: DAMAGED in 3 places", "runs/two: sound", "damage       journal.jsonl, line 3: its checks",
                  f"damage       values/{value.name}: is missing",
                  f"damage       values/{'0' * 64}.qpy: its bytes do not match"):  # fmt: skip
        assert words in text
    found = document(hybridq(tmp_path, "verify", "one", "--json", code=1))
    assert not found["sound"]
    assert [(one["file"], one["line"]) for one in found["damage"]] == [
        ("journal.jsonl", 3), (f"values/{value.name}", None), (f"values/{'0' * 64}.qpy", None),
    ]  # fmt: skip
    assert document(hybridq(tmp_path, "verify", "--all", "--store", "none", "--json")) == []
    assert hybridq(tmp_path, "verify", "--all", "--store", "none").stdout == "no runs in none\n"


@pytest.mark.slow
def test_rerun(script: Path, tmp_path: Path) -> None:
    """What the command line had said is in the record: name, seed and backend; what the script prints is no output."""
    run = ("run", script, "--name", "one", "--seed", 5, "--backend", "density_matrix")
    hybridq(tmp_path, *run, "--", "loop value sample random clock caught")
    before = (tmp_path / "runs/one/journal.jsonl").read_bytes()
    check = ("rerun", "one", "--check")
    done = hybridq(tmp_path, *check)
    assert done.stdout.startswith("one again, beside its record\n")
    assert done.stdout.endswith("\nnothing differs\n")
    for part, count in [("evaluations", 2), ("loop rows", 12), ("loop results", 1), ("value", 1)]:
        assert re.search(rf"^{part} +{count}( +0){{5}}$", done.stdout, re.MULTILINE)
    assert "note     clock readings and orders of completion answered as recorded: 1\n" in done.stdout
    assert "the body prints" in done.stderr
    assert (tmp_path / "runs/one/journal.jsonl").read_bytes() == before

    script.rename(tmp_path / "moved.py")
    gone = hybridq(tmp_path, *check, code=1)
    assert f"there is no script '{script}' here" in gone.stderr
    assert "--script PATH" in gone.stderr
    script = tmp_path / "moved.py"
    script.write_text(script.read_text().replace('hq.expval(CIRCUIT, "Z", theta)', 'hq.expval(CIRCUIT, "X", theta)'))
    changed = hybridq(tmp_path, *check, "--script", script, code=1)
    assert changed.stdout.endswith("\nDIFFERENT\n")
    differs = r"^differs  evaluations: study/energy\[0\] .value\n  recorded 1.0\n  now      0.0$"
    assert re.search(differs, changed.stdout, re.MULTILINE)
    assert "note     the code is not what was recorded at study/minimize[0]" in changed.stdout


@pytest.mark.slow
def test_rerun_with_steps_as_data(script: Path, tmp_path: Path) -> None:
    hybridq(tmp_path, "run", script, "--name", "one", "--workers", 1, "--", "value step")
    check = ("rerun", "one", "--check", "--workers", 1, "--json")
    found = document(hybridq(tmp_path, *check))
    assert (found["same"], found["outputs"]) == (True, [])
    assert [found["counts"][part]["identical"] for part in ("steps", "evaluations", "value")] == [1, 1, 1]
    script.write_text(script.read_text().replace('hq.expval(CIRCUIT, "Z", theta)', 'hq.expval(CIRCUIT, "X", theta)'))
    found = document(hybridq(tmp_path, *check, code=1))
    assert not found["same"]
    assert found["counts"]["steps"]["identical"] == 1
    assert {"part": "evaluations", "at": "study/energy[0]", "grade": "differs", "where": ".value", "recorded": "1.0",
            "now": "0.0"} in found["outputs"]  # fmt: skip


@pytest.mark.slow
def test_rerun_of_one_of_several_runs(tmp_path: Path) -> None:
    """Other runs of the script keep their own names and settings; how the script ends does not matter."""
    script = tmp_path / "script.py"
    script.write_text("""
import hybridq as hq

@hq.workflow
def drawn(n):
    return [float(hq.rng().random()) for _ in range(n)]

if __name__ == "__main__":
    for n in (1, 2, 3):
        hq.run(drawn, n, name=f"drawn-{n}", seed=n)
    raise SystemExit(3)
""")
    plain = subprocess.run([sys.executable, script.name], check=False, cwd=tmp_path, capture_output=True, timeout=120)
    assert plain.returncode == 3
    for n in (2, 3):
        done = hybridq(tmp_path, "rerun", f"drawn-{n}", "--check")
        assert re.search(r"^value +1( +0){5}$", done.stdout, re.MULTILINE)
    script.write_text(script.read_text().replace("(1, 2, 3)", "(1, 3)"))
    missed = hybridq(tmp_path, "rerun", "drawn-2", "--check", code=1)
    assert missed.stdout == ""
    assert "did not make the run drawn-2 again" in missed.stderr
    assert "it finished drawn-1, drawn-3" in missed.stderr
    assert "recorded was the command script.py" in missed.stderr
    script.write_text("raise ValueError('not today')")
    broken = hybridq(tmp_path, "rerun", "drawn-2", "--check", code=1)
    assert "ValueError: not today" in broken.stderr
    assert "it finished no run" in broken.stderr
    journal = tmp_path / "runs/drawn-2/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    unfinished = hybridq(tmp_path, "rerun", "drawn-2", "--check", code=1)
    assert "drawn-2 has not finished (unfinished)" in unfinished.stderr


USAGE = {
    "no script": (["run", "missing.py"], 2, "'missing.py' does not exist"),
    "a directory": (["run", "."], 2, "is a directory"),
    "no workers": (["run", "script.py", "--workers", "0"], 2, "0 is not in the range"),
    "seed of words": (["run", "script.py", "--seed", "x"], 2, "'x' is not a valid integer"),
    "unknown option": (["run", "--fast", "script.py"], 2, "No such option"),
    "unknown command": (["walk"], 2, "No such command 'walk'"),
    "unknown backend": (["run", "script.py", "--backend", "fast", "--", "value"], 1, "'fast' is not a method of Aer"),
    "site of another kind": (["devices", "--site", "script.py"], 1, "the site file script.py: Expected"),
    "site that is missing": (["run", "script.py", "--site", "no.toml", "--", "value"], 1, "no.toml cannot be read"),
    "no scheduler": (["devices", "--cluster", "tcp://127.0.0.1:1"], 1, "no Dask scheduler answers"),
    "bad name": (["run", "script.py", "--name", "../x", "--", "value"], 1, "'../x' cannot name a run"),
    "empty name": (["run", "script.py", "--name", "", "--", "value"], 1, "'' cannot name a run"),
    "no such run": (["show", "nothing"], 1, "there is no run in"),
    "show a bad name": (["show", "../x"], 1, "cannot name a run"),
    "verify nothing": (["verify"], 2, "give the names of runs, or --all"),
    "verify some and all": (["verify", "x", "--all"], 2, "give the names of runs, or --all"),
    "verify no such run": (["verify", "nothing"], 1, "there is no run in"),
    "verify a bad name": (["verify", "../x"], 1, "cannot name a run"),
    "watch no such run": (["watch", "nothing"], 1, "there is no run in"),
    "report no such run": (["report", "nothing"], 1, "there is no run in"),
    "report of another format": (["report", "x", "--format", "gif"], 2, "'gif' is not one of"),
    "graph no such run": (["graph", "nothing"], 1, "there is no run in"),
    "graph a bad name": (["graph", "../x"], 1, "cannot name a run"),
    "rerun without a check": (["rerun", "x"], 2, "once more, in a fresh directory"),
    "rerun no such run": (["rerun", "x", "--check"], 1, "there is no run in"),
}


@pytest.mark.parametrize(("arguments", "code", "words"), USAGE.values(), ids=USAGE.keys())
def test_usage_errors(arguments: list[str], code: int, words: str, script: Path, tmp_path: Path) -> None:
    done = hybridq(tmp_path, *arguments, code=code)
    assert words in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "runs").exists()


def test_an_empty_store_help_and_version(tmp_path: Path) -> None:
    assert hybridq(tmp_path, "runs").stdout == "no runs in runs\n"
    assert document(hybridq(tmp_path, "runs", "--json")) == []
    assert re.search(r"\d+\.\d+\.\d+", hybridq(tmp_path, "--version").stdout)
    for command in ("run", "plan", "watch", "runs", "show", "report", "graph", "verify", "rerun", "devices"):
        assert command in hybridq(tmp_path, "--help").stdout
        assert "Usage: hybridq" in hybridq(tmp_path, command, "--help").stdout
