"""What a function is: its source, and everything of the researcher's own that it reaches.

The digest of a step's code decides whether its record still answers for it. It covers the normalised source (comments,
layout and docstrings do not count), closure and default values, and, recursively, the functions, classes and constants
of the researcher's own modules that it names. Installed packages count by name; their versions are recorded.
"""

from __future__ import annotations

import ast
import functools
import inspect
import site
import sys
import sysconfig
import textwrap
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybridq.errors import Unhashable, WorkflowError
from hybridq.values import digest, digest_bytes

__all__ = ["Source", "parsing", "source_of", "unwrap"]


@dataclass(frozen=True)
class Source:
    """A function's code as data."""

    digest: str
    """SHA-256 of ``text``, in hexadecimal."""
    text: str
    """One section for each function, class and value that counts, the function itself first."""
    modules: tuple[str, ...]
    """Names of the researcher's own importable modules it reaches, which workers may not have."""


parsing = threading.Lock()
"""Held around each `ast.parse`: early versions of Python 3.11 fail where several threads are at it (gh-106905)."""


def unwrap(function: Any) -> Any:
    """The researcher's own function below hybridq's decorators."""
    while type(function).__module__.partition(".")[0] == "hybridq" and hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def source_of(function: Any, version: str | None = None) -> Source:
    """The `Source` of ``function``; with ``version``, the researcher's word replaces the source.

    Raises `WorkflowError` if no source can be found and no version is given, and `Unhashable` for a value it depends
    on that cannot be hashed.
    """
    function = unwrap(function)
    walk = _Walk()
    if version is not None:
        name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"
        walk.sections.append(f"{name} version {version!r}")
        if isinstance(function, types.FunctionType):
            walk.note_module(function.__module__)
    else:
        with parsing:
            walk.add(_name_of(function), function)
    text = "\n\n".join(walk.sections)
    return Source(digest_bytes(text.encode()), text, tuple(sorted(walk.modules)))


def _name_of(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


class _Walk:
    def __init__(self) -> None:
        self.sections: list[str] = []
        self.modules: set[str] = set()
        self._seen: set[int] = set()

    def add(self, name: str, value: Any) -> None:
        """Append the section of ``value``, known to the code as ``name``, and of what it reaches."""
        version = getattr(value, "_version", None) if value is not unwrap(value) else None
        value = unwrap(value)
        if version is not None:
            self.sections.append(f"{name} = {_name_of(value)} version {version!r}")
        elif isinstance(value, types.ModuleType):
            self.sections.append(f"{name} = module {value.__name__}")
            self.note_module(value.__name__)
        elif isinstance(value, functools.partial):
            given = digest([list(value.args), value.keywords], name)
            self.sections.append(f"{name} = partial of {_name_of(value.func)}: {given}")
            self.add(f"{name}.func", value.func)
        elif isinstance(value, types.MethodType):
            self.sections.append(f"{name} = method {value.__name__}")
            self.add(f"{name}.__func__", value.__func__)
            self.add(f"{name}.__self__", value.__self__)
        elif isinstance(value, (types.FunctionType, type)):
            self._code(name, value)
        elif _is_users(type(value).__module__) and (callable(value) or _is_data(value)):
            state = value if _is_data(value) else getattr(value, "__dict__", value)
            self.sections.append(f"{name} = instance: {digest(state, name)}")
            self.add(f"type({name})", type(value))
        elif type(value) in (list, tuple, dict) and not _is_data(value):  # a table of functions, for one
            self._members(name, value)
        elif callable(value) and _wraps_users(value):  # functools.cache and the like
            self.sections.append(f"{name} = {type(value).__module__}:{type(value).__qualname__} of")
            self.add(f"{name}.__wrapped__", value.__wrapped__)
        elif callable(value) or not (_is_users(type(value).__module__) or _is_data(value)):
            # a library's own object (a logger, a ufunc, a compiled pattern): its package's version stands for it
            home = getattr(value, "__module__", None) or type(value).__module__
            self.sections.append(f"{name} = {home}:{_name_of(value)}")
        else:
            self.sections.append(f"{name} = {digest(value, name)}")

    def _code(self, name: str, value: types.FunctionType | type) -> None:
        home = _home(value)
        if not _is_users(home):
            if isinstance(value, type):
                self.sections.append(f"{name} = {home}:{value.__qualname__}")
                return
            self.sections.append(f"{name} = {home}:{value.__code__.co_qualname}")
            if _wraps_users(value):  # a library's decorator around a function
                self.add(f"{name}.__wrapped__", inspect.unwrap(value))
            return
        if id(value) in self._seen:
            self.sections.append(f"{name} = {value.__qualname__}, above")
            return
        self._seen.add(id(value))
        self.note_module(value.__module__)
        node = _parse(value)
        self.sections.append(f"{name} =\n{ast.unparse(node)}")
        if isinstance(value, type):
            for base in value.__bases__:
                self.add(f"{name} base {base.__qualname__}", base)
        functions = [value] if isinstance(value, types.FunctionType) else list(_methods(value))
        for function in functions:
            for inner, reached in _reached(function):
                self.add(inner, reached)

    def _members(self, name: str, value: Any) -> None:
        members = value if isinstance(value, dict) else dict(enumerate(value))
        self.sections.append(f"{name} = {type(value).__name__}: {digest(list(members), name)}")
        if id(value) not in self._seen:
            self._seen.add(id(value))
            for key, member in members.items():
                self.add(f"{name}[{key!r}]", member)

    def note_module(self, module: str) -> None:
        if module != "__main__" and _is_users(module):
            self.modules.add(module)


def _is_data(value: Any) -> bool:
    try:
        digest(value)
    except Unhashable:
        return False
    return True


def _home(value: types.FunctionType | type) -> str | None:
    """The module whose text holds ``value``: for a wrapper, not that of the function it pretends to be."""
    if isinstance(value, type):
        return value.__module__
    home = value.__globals__.get("__name__")
    return home if isinstance(home, str) else None


def _wraps_users(value: Any) -> bool:
    """Whether a function of the researcher's own is below a library's decorator."""
    inner = inspect.unwrap(value)
    return inner is not value and isinstance(inner, types.FunctionType) and _is_users(_home(inner))


def _methods(kind: type) -> Iterator[types.FunctionType]:
    for member in vars(kind).values():
        for part in (member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset", "func"))):
            if not isinstance(part, types.FunctionType) or part.__module__ != kind.__module__:
                continue
            if inspect.unwrap(part).__code__.co_filename != "<string>":  # made by the class' decorator or base
                yield part


def _parse(value: types.FunctionType | type) -> ast.AST:
    """The normalised syntax tree of one function or class."""
    try:
        # the code object of a function, since for the function itself `inspect` would look below its decorators
        text = inspect.getsource(value if isinstance(value, type) else value.__code__)
        tree = ast.parse(textwrap.dedent(text).strip())
    except (OSError, TypeError, SyntaxError, IndentationError) as error:
        if isinstance(value, types.FunctionType) and value.__name__ == "<lambda>":
            reason = "a lambda on a line that cannot be read alone; make it a function with def"
        else:
            reason = f"its source is not to be had ({error}); put it into a file, or give version='1' to the decorator"
        raise WorkflowError(f"the code of {value.__qualname__} cannot be hashed: {reason}.") from error
    if isinstance(value, types.FunctionType) and value.__name__ == "<lambda>":
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]
        if len(found) != 1:
            raise WorkflowError(
                f"the code of {value.__qualname__} cannot be hashed: its line holds several lambdas; make it a "
                "function with def."
            )
        return found[0]
    _strip(tree, getattr(value, "__globals__", vars(sys.modules[value.__module__])))
    return tree


def _strip(tree: ast.AST, names: Mapping[str, Any]) -> None:
    """Remove docstrings and hybridq's decorators: they change where a step runs, not what it computes."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        node.decorator_list = [d for d in node.decorator_list if not _is_hybridq(d, names)]
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]


def _is_hybridq(decorator: ast.expr, names: Mapping[str, Any]) -> bool:
    root: ast.AST = decorator
    while isinstance(root, (ast.Call, ast.Attribute)):
        root = root.func if isinstance(root, ast.Call) else root.value
    if not isinstance(root, ast.Name):
        return False
    value = names.get(root.id)
    home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return isinstance(home, str) and home.partition(".")[0] == "hybridq"


def _reached(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What ``function`` depends on beyond its text: defaults, closure, and the globals it names, in a fixed order."""
    defaults = function.__defaults__ or ()
    yield from ((f"{function.__name__} default {i}", value) for i, value in enumerate(defaults))
    yield from sorted((function.__kwdefaults__ or {}).items())
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # an empty cell: a local function that is not defined yet
            continue
    names = sorted(_names(function.__code__))
    for name in names:
        if name in function.__globals__:
            yield from _found(name, function.__globals__[name], names)


def _found(
    name: str, value: Any, names: Sequence[str], above: tuple[types.ModuleType, ...] = ()
) -> Iterator[tuple[str, Any]]:
    """``value``; of the researcher's own modules also the members, whose names stand in the code beside theirs."""
    yield name, value
    if isinstance(value, types.ModuleType) and _is_users(value.__name__) and value not in above:
        for member in names:
            if member in vars(value):
                yield from _found(f"{name}.{member}", vars(value)[member], names, (*above, value))


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*inner)


@functools.cache
def _is_users(module_name: str | None) -> bool:
    """Whether a module is the researcher's own: neither installed, nor Python's, nor hybridq's."""
    if not module_name or module_name == "__main__" or module_name not in sys.modules:
        return True  # made by `exec`, of a module that does not exist
    if module_name.partition(".")[0] == "hybridq":
        return False
    file = getattr(sys.modules[module_name], "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    return not any(path.is_relative_to(place) for place in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    paths = [sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple({Path(path).resolve() for path in paths})
