"""What a function is: changes that matter change its digest, others do not, and what cannot be read is refused."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import hybridq as hq
from hybridq.errors import Unhashable, WorkflowError
from hybridq.source import Source, source_of, unwrap


class Library:
    """Modules of a researcher, written to directories of their own and imported from there under the same names."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory, self._monkeypatch = directory, monkeypatch
        self._count = itertools.count()

    def load(self, text: str, **others: str) -> ModuleType:
        """Import ``text`` as ``mine``; ``others`` are modules that it may import."""
        place = self.directory / str(next(self._count))
        place.mkdir(exist_ok=True)
        for name, body in {**others, "mine": text}.items():
            (place / f"{name}.py").write_text(textwrap.dedent(body))
            self._monkeypatch.delitem(sys.modules, name, raising=False)
        self._monkeypatch.syspath_prepend(str(place))
        return importlib.import_module("mine")

    def source(self, text: str, function: str = "f", **others: str) -> Source:
        return source_of(functools.reduce(getattr, function.split("."), self.load(text, **others)))

    def digest(self, text: str, function: str = "f", **others: str) -> str:
        return self.source(text, function, **others).digest


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    before = set(sys.modules)
    yield Library(tmp_path, monkeypatch)
    for name in {"mine", "tools", "deep", "pack", "pack.inner"} - before:
        sys.modules.pop(name, None)


BASE = """
import hybridq as hq
SCALE = 2.0
def helper(x):
    return SCALE * x
def f(x, k=1):
    return helper(x) + k
"""

SAME: dict[str, str] = {
    "comments": BASE.replace("return helper(x) + k", "# a remark\n    return helper(x) + k  # another"),
    "docstrings": BASE.replace("    return helper(x) + k", '    """What it does."""\n    return helper(x) + k'),
    "docstring of a helper": BASE.replace("    return SCALE", '    """Helps."""\n    return SCALE'),
    "layout": BASE.replace("return helper(x) + k", "return (\n        helper( x )\n        + k\n    )"),
    "blank lines": BASE.replace("def f", "\n\n\n\ndef f"),
    "place in the file": BASE.replace("SCALE = 2.0\n", "").replace("import hybridq as hq\n", "import math\n")
    + "SCALE = 2.0",
    "quotes and numbers": BASE.replace("k=1", "k=0x1"),
    "others around it": BASE + "\ndef unrelated():\n    return 7\nOTHER = 3\n",
    "decorator": BASE.replace("def f", "@hq.classical\ndef f"),
    "decorator with options": BASE.replace("def f", '@hq.classical(memory="1 GiB", retries=3, timeout=7)\ndef f'),
    "imported decorator": BASE.replace("def f", "@classical(retries=1)\ndef f").replace(
        "import hybridq as hq", "from hybridq import classical"
    ),
    "decorated helper": BASE.replace("def helper", "@hq.classical(retries=1)\ndef helper"),
}

CHANGED: dict[str, str] = {
    "text": BASE.replace("+ k", "- k"),
    "name of an argument": BASE.replace("x, k=1", "y, k=1").replace("helper(x) + k", "helper(y) + k"),
    "default": BASE.replace("k=1", "k=2"),
    "constant": BASE.replace("2.0", "2.5"),
    "type of a constant": BASE.replace("2.0", "2"),
    "helper": BASE.replace("SCALE * x", "SCALE * x * x"),
    "global of the same text": BASE.replace("def helper(x):\n    return SCALE * x", "from math import sin as helper"),
    "removed global": BASE.replace("SCALE = 2.0", ""),
    "foreign decorator": BASE.replace("def f", "def same(g):\n    return g\n@same\ndef f"),
    "keyword default": BASE.replace("k=1", "*, k=1"),
}


@pytest.mark.parametrize("change", SAME)
def test_the_digest_does_not_see(library: Library, change: str) -> None:
    assert SAME[change] != BASE
    assert library.digest(SAME[change]) == library.digest(BASE)


@pytest.mark.parametrize("change", CHANGED)
def test_the_digest_sees(library: Library, change: str) -> None:
    assert CHANGED[change] != BASE
    assert library.digest(CHANGED[change]) != library.digest(BASE)


def test_all_changes_are_told_apart(library: Library) -> None:
    found = [library.digest(text) for text in (BASE, *CHANGED.values())]
    assert len(set(found)) == len(found)


def test_the_digest_is_that_of_the_text(library: Library) -> None:
    import hashlib

    found = library.source(BASE)
    assert found.digest == hashlib.sha256(found.text.encode()).hexdigest()
    assert "helper(x) + k" in found.text.split("\n\n")[0]  # the function itself comes first
    assert "return SCALE * x" in found.text


PAIRS: dict[str, tuple[str, str]] = {
    "closure": (
        "def make(n):\n def f(): return n\n return f\nf = make(N)",
        "f",
    ),
    "closure over a function": (
        "def make(g):\n def f(): return g()\n return f\ndef inner(): return N\nf = make(inner)",
        "f",
    ),
    "default of an object": ("def f(x=[1, N]): return x", "f"),
    "value behind a default": (
        "K = N\ndef f(x=K): return x",
        "f",
    ),
    "keyword default": (
        "K = N\ndef f(*, x=K): return x",
        "f",
    ),
    "constant of a nested function": (
        "K = N\ndef f():\n def g(): return K\n return g()",
        "f",
    ),
    "global in a comprehension": (
        "K = N\ndef f(): return [K for _ in range(3)]",
        "f",
    ),
    "array constant": (
        "import numpy as np\nK = np.arange(N)\ndef f(): return K",
        "f",
    ),
    "dict constant": (
        "K = {'a': [N]}\ndef f(): return K",
        "f",
    ),
    "two calls deep": (
        "def h(): return N\ndef g(): return h()\ndef f(): return g()",
        "f",
    ),
    "function as a default": (
        "def h(): return N\ndef f(g=h): return g()",
        "f",
    ),
    "lambda": ("f = lambda x: x + N", "f"),
    "lambda among arguments": (
        "def keep(a, g): return g\nf = keep(\n 1,\n lambda x: x + N,\n)",
        "f",
    ),
    "lambda in a function": (
        "def f(xs):\n return sorted(xs, key=lambda x: x * N)",
        "f",
    ),
    "partial": (
        "from functools import partial\ndef g(x, y): return x\nf = partial(g, N)",
        "f",
    ),
    "keyword of a partial": (
        "from functools import partial\ndef g(x, y): return x\nf = partial(g, y=N)",
        "f",
    ),
    "function of a partial": (
        "from functools import partial\ndef g(x): return N\nf = partial(g, 1)",
        "f",
    ),
    "method": (
        "class A:\n def f(self): return N",
        "A.f",
    ),
    "bound method": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n k: int\n def f(self): return N\nf = A(1).f",
        "f",
    ),
    "object of a bound method": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n k: int\n def f(self): return 1\nf = A(N).f",
        "f",
    ),
    "method beside a bound method": (
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class A:\n"
        " k: int\n"
        " def g(self): return N\n"
        " def f(self): return self.g()\n"
        "f = A(1).f",
        "f",
    ),
    "class method": (
        "class A:\n @classmethod\n def f(cls): return N",
        "A.f",
    ),
    "callable": (
        "class A:\n def __init__(self, k): self.k = k\n def __call__(self): return N\nf = A(1)",
        "f",
    ),
    "state of a callable": (
        "class A:\n def __init__(self, k): self.k = k\n def __call__(self): return 1\nf = A(N)",
        "f",
    ),
    "callable dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n k: int\n def __call__(self): return N\nf = A(1)",
        "f",
    ),
    "global object": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n k: int\nM = A(N)\ndef f(): return M.k",
        "f",
    ),
    "method of a global object": (
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class A:\n"
        " k: int\n"
        " def g(self): return N\n"
        "M = A(1)\n"
        "def f(): return M.g()",
        "f",
    ),
    "class": (
        "class A:\n def g(self): return N\ndef f(): return A().g()",
        "f",
    ),
    "static method": (
        "class A:\n @staticmethod\n def g(): return N\ndef f(): return A.g()",
        "f",
    ),
    "property": (
        "def h(): return N\nclass A:\n @property\n def g(self): return h()\ndef f(): return A().g",
        "f",
    ),
    "setter": (
        "def h(): return N\n"
        "class A:\n"
        " @property\n"
        " def g(self): return 1\n"
        " @g.setter\n"
        " def g(self, v): h()\n"
        "def f(): A().g = 1",
        "f",
    ),
    "cached property": (
        "from functools import cached_property\n"
        "def h(): return N\n"
        "class A:\n"
        " @cached_property\n"
        " def g(self): return h()\n"
        "def f(): return A().g",
        "f",
    ),
    "reached by a method": (
        "def h(): return N\nclass A:\n def g(self): return h()\ndef f(): return A().g()",
        "f",
    ),
    "base class": (
        "class B:\n def g(self): return N\nclass A(B):\n pass\ndef f(): return A().g()",
        "f",
    ),
    "attribute of a class": (
        "class A:\n k = N\ndef f(): return A.k",
        "f",
    ),
    "function of a method's own name": (
        "def g(): return N\nclass A:\n def g(self): return g()\ndef f(): return A().g()",
        "f",
    ),
    "wrapper": (
        "from functools import wraps\n"
        "def twice(g):\n"
        " @wraps(g)\n"
        " def inner(x): return N * g(x)\n"
        " return inner\n"
        "@twice\n"
        "def f(x): return x",
        "f",
    ),
    "function in a wrapper": (
        "from functools import wraps\n"
        "def twice(g):\n"
        " @wraps(g)\n"
        " def inner(x): return 2 * g(x)\n"
        " return inner\n"
        "@twice\n"
        "def f(x): return N",
        "f",
    ),
    "cached function": (
        "from functools import cache\n@cache\ndef g(): return N\ndef f(): return g()",
        "f",
    ),
    "function under a library's decorator": (
        "from contextlib import contextmanager\n@contextmanager\ndef g(): yield N\ndef f():\n with g() as x: return x",
        "f",
    ),
    "table of functions": (
        "def g(): return N\nK = {'a': [g, 1]}\ndef f(): return K['a'][0]()",
        "f",
    ),
    "number in a table of functions": (
        "def g(): return 1\nK = (g, N)\ndef f(): return K[0]()",
        "f",
    ),
    "key in a table of functions": (
        "def g(): return 1\nK = {N: g}\ndef f(): return K",
        "f",
    ),
    "dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n k: int = N\ndef f(): return A().k",
        "f",
    ),
    "frozen dataclass": (
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, order=True, slots=True)\n"
        "class A:\n"
        " k: int\n"
        " def g(self): return N\n"
        "def f(): return A(1).g()",
        "f",
    ),
    "enum": (
        "import enum\nclass A(enum.Enum):\n K = N\ndef f(): return A.K",
        "f",
    ),
    "typed named tuple": (
        "from typing import NamedTuple\nclass A(NamedTuple):\n k: int = N\ndef f(): return A().k",
        "f",
    ),
    "recursion": ("def f(n): return n and f(n - N)", "f"),
    "mutual recursion": (
        "def g(n): return f(n - N)\ndef f(n): return n and g(n)",
        "f",
    ),
    "step that a workflow calls": (
        "import hybridq as hq\n@hq.classical\ndef g(): return N\n@hq.workflow\ndef f(): return g()",
        "f",
    ),
    "global function of a method": (
        "import hybridq as hq\nK = N\n@hq.classical\ndef f(): return K",
        "f",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_everything_of_the_researchers_own_counts(library: Library, name: str) -> None:
    text, function = PAIRS[name]
    one, two = (re.sub(r"\bN\b", number, text) for number in ("11", "12"))
    assert one != two
    assert library.digest(one, function) == library.digest(one, function)
    assert library.digest(one, function) != library.digest(two, function)


MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "module": ("import tools\ndef f(): return tools.g()", {"tools": "def g(): return N"}),
    "under another name": ("import tools as t\ndef f(): return t.g()", {"tools": "def g(): return N"}),
    "constant": ("import tools\ndef f(): return tools.K", {"tools": "K = N"}),
    "imported function": ("from tools import g\ndef f(): return g()", {"tools": "def g(): return N"}),
    "imported constant": ("from tools import K\ndef f(): return K", {"tools": "K = N"}),
    "constant of an imported function": (
        "from tools import g\ndef f(): return g()",
        {"tools": "K = N\ndef g(): return K"},
    ),
    "class": ("from tools import A\ndef f(): return A().g()", {"tools": "class A:\n def g(self): return N"}),
    "two modules deep": (
        "import tools\ndef f(): return tools.g()",
        {"tools": "import deep\ndef g(): return deep.h()", "deep": "def h(): return N"},
    ),
    "module of a module": (
        "import tools\ndef f(): return tools.deep.h()",
        {"tools": "import deep", "deep": "def h(): return N"},
    ),
    "base class elsewhere": (
        "from tools import B\nclass A(B):\n pass\ndef f(): return A().g()",
        {"tools": "class B:\n def g(self): return N"},
    ),
    "modules that import each other": (
        "import tools\ndef f(): return tools.g()",
        {"tools": "import deep\ndef g(): return deep.h()\nK = 1", "deep": "import tools\ndef h(): return tools.K + N"},
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_other_modules_of_the_researchers_own_count(library: Library, name: str) -> None:
    text, others = MODULES[name]

    def build(number: str) -> str:
        return library.digest(text, **{word: re.sub(r"\bN\b", number, body) for word, body in others.items()})

    assert build("11") == build("11") != build("12")


def test_modules_that_workers_may_not_have_are_named(library: Library) -> None:
    found = library.source(
        "import tools\nimport numpy as np\nfrom deep import g\ndef f(): return np.sin(tools.K + g())",
        tools="K = 1", deep="def g(): return 1",
    ).modules  # fmt: skip
    assert found == ("deep", "mine", "tools")


def test_a_package_and_its_submodules(library: Library) -> None:
    package = library.directory / "0" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from pack import inner\n")
    (package / "inner.py").write_text("import pack\ndef g(): return 1\n")
    library.load("")
    found = library.source("import pack.inner\ndef f(): return pack.inner.g()")
    assert "def g()" in found.text
    assert "pack.inner" in found.modules


def test_library_functions_count_by_name() -> None:
    assert source_of(np.linalg.norm).text == "norm = numpy.linalg:norm"
    assert source_of(np.linalg.norm).digest != source_of(np.linalg.det).digest
    assert source_of(np.sin).text != source_of(np.cos).text
    assert "scipy" not in source_of(np.linalg.norm).text

    def uses_library(x: Any) -> Any:
        return np.linalg.norm(textwrap.dedent(x))

    found = source_of(uses_library)
    assert "np = module numpy" in found.text
    assert "textwrap = module textwrap" in found.text
    assert "def dedent" not in found.text
    assert not any(name.startswith(("numpy", "textwrap", "hybridq")) for name in found.modules)


def test_a_logger_or_lock_of_a_module_does_not_stand_in_the_way(library: Library) -> None:
    text = "import logging, threading\nlog = logging.getLogger('x')\nlock = threading.Lock()\n"
    text += "def f():\n with lock: log.info(1)"
    assert "log = logging:Logger" in library.source(text).text


# -- refusals ------------------------------------------------------------------------------------------------------


def _made_by_exec(namespace: dict[str, Any], name: str = "f") -> Callable[[], int]:
    exec(compile(f"def {name}():\n    return 1\n", "<made>", "exec"), namespace)
    found: Callable[[], int] = namespace[name]
    return found


@pytest.mark.parametrize("namespace", [{}, {"__name__": "nowhere"}, {"__name__": "__main__"}, {"__name__": __name__}])
def test_a_function_without_source_is_refused_unless_a_version_stands_for_it(namespace: dict[str, Any]) -> None:
    function = _made_by_exec(namespace)
    with pytest.raises(WorkflowError, match=r"the code of f cannot be hashed.*version="):
        source_of(function)
    one, two = source_of(function, version="1"), source_of(function, version="2")
    assert one.digest == source_of(_made_by_exec(namespace), version="1").digest != two.digest
    assert one.digest != source_of(_made_by_exec(namespace, "g"), version="1").digest


def test_a_version_replaces_the_source(library: Library) -> None:
    one, two = (library.load(f"def f():\n return {number}") for number in (1, 2))
    assert source_of(one.f).digest != source_of(two.f).digest
    found = source_of(one.f, version="a")
    assert found.text.endswith("f version 'a'")
    assert found.modules == ("mine",)


def test_a_version_holds_where_a_workflow_calls_the_step(library: Library) -> None:
    text = "import hybridq as hq\n@hq.classical(version='a')\ndef g(): return N\n@hq.workflow\ndef f(): return g()"
    one, two = (library.digest(text.replace("N", number)) for number in ("1", "2"))
    assert one == two != library.digest(text.replace("'a'", "'b'"))


def test_a_step_made_by_exec_can_be_called_in_a_workflow(library: Library) -> None:
    module = library.load("def f(): return g()")
    vars(module)["g"] = hq.classical(version="1")(_made_by_exec({}, "g"))
    assert "g = g version '1'" in source_of(module.f).text


def test_lambdas_that_cannot_be_told_apart_are_refused(library: Library) -> None:
    text = "fs = [lambda x: x + 1, lambda x: x + 2]\ndef f(xs): return fs[0](xs)"
    module = library.load(text)
    with pytest.raises(WorkflowError, match="several lambdas; make it a function with def"):
        source_of(module.fs[0])
    module = library.load("table = {\n 'a': lambda x: x + 1,\n}")
    with pytest.raises(WorkflowError, match="a lambda on a line that cannot be read alone"):
        source_of(module.table["a"])


REFUSED = {
    "closure": "class A: pass\ndef make(n):\n def f(): return n\n return f\nf = make([A()])",
    "default": "class A: pass\ndef f(x=[A()]): return x",
    "constant": "class A: pass\nK = {'a': [A()]}\ndef f(): return K",
    "partial": "from functools import partial\ndef g(x): return x\nf = partial(g, object())",
    "own object": "class A: pass\nM = A()\ndef f(): return M",
    "slots": "class A:\n __slots__ = ('x',)\n def __call__(self): return 1\nM = A()\ndef f(): return M()",
}


@pytest.mark.parametrize(("name", "path"), [
    ("closure", r"n\[0\] is a"), ("default", r"f default 0\[0\] is a"), ("constant", r"K\['a'\]\[0\] is a"),
    ("partial", r"is a builtins.object"), ("own object", r"M is a .*\.A"), ("slots", r"M is a .*\.A"),
])  # fmt: skip
def test_a_value_that_cannot_be_hashed_is_refused_by_name(library: Library, name: str, path: str) -> None:
    module = library.load(REFUSED[name])
    with pytest.raises(Unhashable, match=path):
        source_of(module.f)


# -- the rest ------------------------------------------------------------------------------------------------------


def test_unwrap_goes_below_our_own_decorators_only() -> None:
    def plain() -> int:
        return 1

    assert unwrap(hq.classical(plain)) is plain
    assert unwrap(hq.workflow(plain)) is plain

    @functools.wraps(plain)
    def wrapper() -> int:
        return plain()

    assert unwrap(wrapper) is wrapper


def test_an_empty_cell_is_no_obstacle() -> None:
    def outer() -> Any:
        def early() -> Any:
            return late()

        found = source_of(early)

        def late() -> int:
            return 1

        return found

    assert "return late()" in outer().text


def test_digests_are_stable_across_processes(library: Library) -> None:
    names = {"tools": "K = {'b', 'a', 'c'}\ndef g(x, *, z=1, a={'k': 2}): return K, x"}
    module = library.load("import tools\ndef f(x): return tools.g(x)", **names)
    script = (
        f"import sys; sys.path.insert(0, {str(library.directory / '0')!r}); import mine as m;"
        "from hybridq.source import source_of; print(source_of(m.f).digest)"
    )
    found = {source_of(module.f).digest}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        )
        found.add(done.stdout.strip())
    assert len(found) == 1


def test_a_script_is_the_researchers_own(tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    text = (
        "from hybridq.source import source_of\nK = N\ndef helper(): return K\ndef f(): return helper()\n"
        "if __name__ == '__main__': print(source_of(f).digest, source_of(f).modules)\n"
    )
    found = []
    for number in ("1", "1", "2"):
        script.write_text(text.replace("N", number))
        done = subprocess.run([sys.executable, script], check=True, capture_output=True, text=True)
        found.append(done.stdout)
    assert found[0] == found[1] != found[2]
    assert found[0].endswith("()\n")  # a script has no module that workers could lack
