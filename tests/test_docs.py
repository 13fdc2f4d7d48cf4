"""Documentation is run: each Python example as a script of its own, each `hybridq` line against the real command."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLE_LIMIT = 240  # seconds; below the limit of a test, so that the example's output is shown


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, the line of its first line of text, its info string and its text."""

    document: str
    line: int
    info: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def _blocks(text: str, document: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text; a fence closes with at least as many of the same marks."""
    lines = text.splitlines()
    number = 0
    while number < len(lines):
        opening = re.match(r"^( *)(`{3,}|~{3,})\s*([^`]*)$", lines[number])
        number += 1
        if not opening:
            continue
        indent, marks, info = opening.groups()
        first = number
        closing = re.compile(rf"^\s*{re.escape(marks[0])}{{{len(marks)},}}\s*$")
        while number < len(lines) and not closing.match(lines[number]):
            number += 1
        body = [line.removeprefix(indent) for line in lines[first:number]]
        number += 1
        yield Block(document, first + 1, tuple(info.split()), "\n".join(body) + "\n")


BLOCKS = [
    block
    for path in DOCUMENTS
    if path.exists()
    for block in _blocks(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
]
EXAMPLES = [block for block in BLOCKS if block.info[:1] == ("python",) and "no-run" not in block.info]


def _command_lines(block: Block) -> Iterator[list[str]]:
    """The `hybridq` commands of a shell block, each as its arguments after the command's own name.

    In a console block the lines after a prompt are commands and the others their output.
    """
    text = block.text
    if block.info[0] == "console":
        kept = re.findall(r"(?m)^[$#>] ((?:.*\\\n)*.*)$", text)
        text = "\n".join(re.sub(r"(?m)\\\n(?:> )?", " ", command) for command in kept)
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>()"):
                yield from _after_name(words)
                words = []
            else:
                words.append(word)


def _after_name(words: list[str]) -> Iterator[list[str]]:
    while words and (re.match(r"^\w+=", words[0]) or words[0] in ("nohup", "time", "exec")):
        words = words[1:]
    if words[:1] == ["hybridq"]:
        yield words[1:]
    elif words[1:3] == ["-m", "hybridq"]:
        yield words[3:]


COMMANDS = [
    pytest.param(arguments, id=f"{block} hybridq {' '.join(arguments)}")
    for block in BLOCKS
    if block.info and block.info[0] in ("console", "bash", "sh", "shell")
    for arguments in _command_lines(block)
]


def _check(command: click.Command, arguments: list[str], path: str) -> None:
    """Parse `arguments` as `command` would, without running it; raises `click.UsageError` for what it does not take.

    Values are not converted, so files that an example names need not exist; only choices are compared.
    """
    context = click.Context(command, info_name=path)
    values, rest, _ = command.make_parser(context).parse_args(args=list(arguments))
    if values.get("help") or any(option in arguments for option in ("--help", "--version")):
        return
    for parameter in command.get_params(context):
        value = values.get(parameter.name or "")
        given = isinstance(value, str | tuple | list) and len(value) > 0
        if isinstance(parameter, click.Argument) and parameter.required and not given:
            raise click.UsageError(f"`{path}` needs {parameter.make_metavar(context)}")
        if given and isinstance(parameter.type, click.Choice):
            for choice in [value] if isinstance(value, str) else value:
                parameter.type.convert(choice, parameter, context)
    if isinstance(command, click.Group):
        if not rest:
            if not command.invoke_without_command and arguments:
                raise click.UsageError(f"`{path}` needs a subcommand")
            return
        child = command.get_command(context, rest[0])
        if child is None:
            raise click.UsageError(f"`{path}` has no subcommand {rest[0]!r}; it has {command.list_commands(context)}")
        _check(child, rest[1:], f"{path} {rest[0]}")
    elif rest and not command.allow_extra_args:
        raise click.UsageError(f"`{path}` does not take {rest}")


def test_the_readme_exists_and_shows_an_example() -> None:
    assert (ROOT / "README.md").exists(), "README.md is missing"
    assert any(block.document == "README.md" for block in EXAMPLES), "README.md has no ```python example that runs"


@pytest.mark.parametrize("block", EXAMPLES, ids=str)
def test_example_runs(block: Block, tmp_path: Path) -> None:
    """The example as a user would save and run it; the padding makes its tracebacks count in the document's lines."""
    script = tmp_path / "example.py"
    script.write_text("\n" * (block.line - 1) + block.text, encoding="utf-8")
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [sys.executable, script.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search, "MPLBACKEND": "agg"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # workers and engines of an example that hangs end with it
    )
    try:
        output, _ = process.communicate(timeout=EXAMPLE_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the example at {block} ran longer than {EXAMPLE_LIMIT} s\n{output}")
    assert process.returncode == 0, f"the example at {block} failed\n{output}"


@pytest.mark.parametrize("arguments", COMMANDS)
def test_command_line_exists(arguments: list[str]) -> None:
    from hybridq.cli import main

    try:
        _check(main, arguments, "hybridq")
    except click.UsageError as error:
        pytest.fail(f"`{shlex.join(['hybridq', *arguments])}` is not a command: {error.format_message()}")


# The checker itself, against a command whose answers are known.


@click.group()
def toy() -> None:
    """A command with one of each kind."""


@toy.command()
@click.argument("script", type=click.Path(exists=True))
@click.argument("more", nargs=-1)
@click.option("--workers", "-w", type=int)
@click.option("--quiet", is_flag=True)
@click.option("--format", type=click.Choice(["svg", "png"]))
def run(**_: object) -> None:
    """Do nothing."""


@toy.command()
def runs() -> None:
    """Do nothing, without arguments."""


@pytest.mark.parametrize(
    "line", ["run a.py", "run a.py -w 4 --quiet x y", "run --format=svg a.py", "run --help", "--help", "runs", ""]
)
def test_checker_accepts(line: str) -> None:
    _check(toy, line.split(), "toy")


@pytest.mark.parametrize(
    "line", ["walk a.py", "run", "run a.py --loud", "run a.py -w", "runs a", "run a.py --format gif", "--loud run a.py"]
)
def test_checker_refuses(line: str) -> None:
    with pytest.raises(click.UsageError):
        _check(toy, line.split(), "toy")


def test_commands_are_found_in_blocks() -> None:
    text = r"""
```console
$ cd x && hybridq run a.py \
    --quiet | tail  # why
hybridq: output, not a command
$ A=1 python -m hybridq runs
```
~~~bash
hybridq show 'a b' > f
ls hybridq
~~~
"""
    found = [arguments for block in _blocks(text, "text") for arguments in _command_lines(block)]
    assert found == [["run", "a.py", "--quiet"], ["runs"], ["show", "a b"]]
