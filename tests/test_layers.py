"""The house: imports only go down, heavy libraries load late, nothing at rest is pickled, and the map is right.

To add a module, write its name into the lowest row of LAYERS that allows what it imports.
"""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hybridq"

# Top to bottom. A module may import modules of lower rows only; a row that ends in SIBLINGS, also those of its own row.
# Names are relative to `hybridq`; "" is `hybridq/__init__.py`, and "engines" is `hybridq/engines/__init__.py`.
SIBLINGS = "(siblings)"
LAYERS: tuple[tuple[str, ...], ...] = (
    # windows: nothing imports them
    ("cli",),
    # the public names
    ("",),
    # what people look at
    ("report",),
    ("watch", "graph"),
    ("following",),
    ("figures",),
    # language
    ("primitives",),
    ("language",),
    # execution
    ("runner",),
    ("monitor.feed",),
    ("dispatch",),
    ("cluster",),
    ("monitor.plugin",),
    ("monitor.page",),
    ("monitor.tables",),
    ("steps", "progress"),
    ("scope",),
    ("planning",),
    ("calibration",),
    # engines: none imports another; what they share is below them
    ("engines.__main__",),
    ("engines.server", "engines.process"),
    ("engines.aer", "engines.adjoint", "engines.backend"),
    ("engines.derivatives", "engines.guard"),
    ("engines.costs",),
    ("engines.measuring",),
    ("engines.wire",),
    ("engines.loops", "engines.frames", "engines.lowering"),
    ("engines",),
    # policies, methods, records
    ("simulation",),
    ("why",),
    ("ledger", "recorded", "audit", "comparison", "history"),
    ("policies", "journal", "differences", "monitor.store"),
    ("pace", "monitor"),
    # nouns
    ("problems", "problems.fermions", "problems.lattices", "problems.molecules", "problems.problem", SIBLINGS),
    ("program",),
    ("sites",),
    ("backends",),
    ("resources",),
    ("source",),
    ("values",),
    ("location",),
    ("errors", "faults"),
)
HEAVY = ("qiskit", "qiskit_aer", "distributed", "pyscf", "scipy")  # not imported by `import hybridq`
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")
NO_PICKLE_FROM = "journal"  # neither this row nor a lower one, `values` among them, may import any of PICKLES

ROW = {name: row for row, names in enumerate(LAYERS) for name in names if name != SIBLINGS}


def _name(path: Path) -> str:
    """`hybridq/engines/aer.py` -> `engines.aer`; `hybridq/engines/__init__.py` -> `engines`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def _shown(name: str) -> str:
    return f"hybridq.{name}" if name else "hybridq"


def _imports(name: str) -> Iterator[tuple[str, int]]:
    """Every absolute name that module `name` imports, wherever the import stands, with its line.

    `from a import b` yields `a.b`: whether b is a module is for the caller to know.
    """
    package = ["hybridq", *name.split(".")] if name else ["hybridq"]
    if MODULES[name].name != "__init__.py":
        package.pop()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(target := node.args[0].value, str):
                yield target, node.lineno


def _own_imports(name: str) -> dict[str, int]:
    """The modules of hybridq that module `name` imports, each with its first line."""
    found: dict[str, int] = {}
    for target, line in _imports(name):
        if target != "hybridq" and not target.startswith("hybridq."):
            continue
        relative = target.removeprefix("hybridq").removeprefix(".")
        while relative not in MODULES and "." in relative:
            relative = relative.rpartition(".")[0]  # a name in a module, not a module
        relative = relative if relative in MODULES else ""
        if relative != name:
            found[relative] = min(line, found.get(relative, line))
    return found


def test_the_table_lists_every_module_once() -> None:
    entries = [name for names in LAYERS for name in names if name != SIBLINGS]
    twice = sorted({name for name in entries if entries.count(name) > 1})
    missing = sorted(_shown(name) for name in MODULES.keys() - ROW.keys())
    gone = sorted(_shown(name) for name in ROW.keys() - MODULES.keys())
    wrong = [
        *(f"{_shown(name)} stands in LAYERS more than once" for name in twice),
        *(f"{name} is not in LAYERS; add it to the lowest row that allows what it imports" for name in missing),
        *(f"{name} is in LAYERS but not on disk; remove it" for name in gone),
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", sorted(MODULES), ids=_shown)
def test_imports_only_go_down(name: str) -> None:
    if name not in ROW:
        pytest.fail(f"{_shown(name)} is not in LAYERS; add it to the lowest row that allows what it imports")
    wrong = []
    for target, line in _own_imports(name).items():
        if target not in ROW:
            continue  # reported by the test of the table
        same_row = ROW[target] == ROW[name] and SIBLINGS in LAYERS[ROW[name]]
        if ROW[target] <= ROW[name] and not same_row:
            where = "beside" if ROW[target] == ROW[name] else "above"
            wrong.append(f"{MODULES[name].relative_to(ROOT)}:{line} imports {_shown(target)}, which stands {where} it")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    graph = {name: set(_own_imports(name)) for name in MODULES}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(_shown(name) for name in error.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES), ids=_shown)
def test_nothing_at_rest_is_pickled(name: str) -> None:
    """Records, values and nouns know no pickle; no module reads or writes a pickle file, or lets numpy do it."""
    path = MODULES[name].relative_to(ROOT)
    wrong = []
    if ROW.get(name, 0) >= ROW[NO_PICKLE_FROM]:
        wrong += [f"{path}:{line} imports {target}" for target, line in _imports(name) if _is_pickle(target)]
    wrong += [
        f"{path}:{line} imports {target}, which works on files"
        for target, line in _imports(name)
        if _is_pickle(target) and target.rpartition(".")[2] in ("load", "dump", "Pickler", "Unpickler")
    ]
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PICKLES:
            if node.attr in ("load", "dump", "open"):
                wrong.append(f"{path}:{node.lineno} uses {node.value.id}.{node.attr}, which works on files")
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ):
            wrong.append(f"{path}:{node.value.lineno} allows pickle in numpy files")
    assert not wrong, "\n".join(wrong)


def _is_pickle(target: str) -> bool:
    return target.partition(".")[0] in PICKLES


def test_import_hybridq_is_light() -> None:
    program = (
        "import json, sys; before = set(sys.modules); import hybridq;"
        f"print(json.dumps(sorted(set({HEAVY!r}) & (set(sys.modules) - before))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    heavy = json.loads(done.stdout)
    assert not heavy, (
        f"`import hybridq` imports {heavy}; import them where they are first needed (-X importtime shows by whom)"
    )


def _map_of_the_code(readme: str) -> str:
    """The first fenced block under the heading of README.md that contains `map of the code`."""
    _, heading, rest = _split(readme, r"(?im)^#+ .*map of the code.*$")
    assert heading, "README.md has no heading with the words `map of the code`"
    _, fence, rest = _split(rest, r"(?m)^(```+|~~~+).*\n")
    assert fence, "README.md has no fenced block under its heading `map of the code`"
    block, _, _ = _split(rest, r"(?m)^(```+|~~~+)\s*$")
    return block


def _split(text: str, pattern: str) -> tuple[str, str, str]:
    match = re.search(pattern, text)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def _named_files(block: str) -> set[str]:
    """The Python files that a drawn tree names, as paths: `engines/` with `aer.py` indented below is `engines/aer.py`.

    Only names that open a line count, several with commas between them if need be; what follows is description.
    """
    files: set[str] = set()
    open_folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        match = re.match(r"^[\s│├└─|`+-]*", line)
        indent = match.end() if match else 0
        names = re.match(r"[\w./-]+(, *[\w./-]+)*", line[indent:])
        if not names:
            continue
        while open_folders and open_folders[-1][0] >= indent:
            open_folders.pop()
        folder = open_folders[-1][1] if open_folders else ""
        for entry in re.split(r", *", names[0]):
            if entry.endswith("/"):
                open_folders.append((indent, f"{folder}{entry}"))
            elif entry.endswith(".py"):
                files.add(f"{folder}{entry}")
    return files


def test_the_map_in_the_readme_names_every_module() -> None:
    readme = ROOT / "README.md"
    assert readme.exists(), "README.md is missing, and with it the map of the code"
    named = _named_files(_map_of_the_code(readme.read_text(encoding="utf-8")))
    real = {path.relative_to(ROOT).as_posix() for path in MODULES.values()}
    missing = sorted(real - named)
    gone = sorted(path for path in named - real if path.startswith("hybridq/"))
    assert not missing, f"the map of the code in README.md does not name {missing}"
    assert not gone, f"the map of the code in README.md names files that are not on disk: {gone}"


def test_the_map_is_read_as_drawn() -> None:
    drawn = """
    hybridq/
    ├── __init__.py      the public names
    ├── -- engines -----------------
    ├── engines/         see process.py
    │   ├── aer.py       values
    │   └── adjoint.py, backend.py   others
    └── errors.py        exceptions
    workflows/
      h2.py
    """
    assert _named_files(drawn) == {
        "hybridq/__init__.py",
        "hybridq/engines/aer.py",
        "hybridq/engines/adjoint.py",
        "hybridq/engines/backend.py",
        "hybridq/errors.py",
        "workflows/h2.py",
    }


def test_durations_and_limits_are_not_measured_by_the_wall_clock() -> None:
    """Clocks are set by an hour or a day; what is calculated with is `time.monotonic` or `time.perf_counter`."""

    def reads_the_clock(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Call) and ast.unparse(n.func) in ("time.time", "time") for n in ast.walk(node))

    calculated = [
        f"{_shown(name)}:{node.lineno}"
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.BinOp, ast.Compare)) and reads_the_clock(node)
    ]
    assert not calculated
