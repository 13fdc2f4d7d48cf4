"""Where two documents differ, in two columns, for people."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from typing import Any

from hybridq.values import Encoded, decode

__all__ = ["readable", "two_columns"]


def two_columns(left: Any, right: Any, width: int = 56, heads: tuple[str, str] = ("recorded", "called now")) -> str:
    """The lines in which two documents or texts differ, one on the left and the other on the right, 20 at most."""
    rows = [(a, b) for a, b in _aligned(_lines(left), _lines(right)) if a != b]
    shown = [f"  {a:<{width}} | {b}" for a, b in (_cut(a, b, width) for a, b in rows[:20])]
    more = [f"  ... and {len(rows) - 20} more lines"] if len(rows) > 20 else []
    return "\n".join([f"  {heads[0]:<{width}} | {heads[1]}", f"  {'-' * width}-+-{'-' * width}", *shown, *more])


def _aligned(left: list[str], right: list[str]) -> Iterator[tuple[str, str]]:
    for _, a0, a1, b0, b1 in difflib.SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for k in range(max(a1 - a0, b1 - b0)):
            yield (left[a0 + k] if a0 + k < a1 else ""), (right[b0 + k] if b0 + k < b1 else "")


def _cut(left: str, right: str, width: int) -> tuple[str, str]:
    """Both lines within ``width``: from shortly before the first character that differs, if that is further on."""
    same = next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 0)
    if same < width - 10:
        return left[:width], right[:width]
    return f"...{left[same - 10 :]}"[:width], f"...{right[same - 10 :]}"[:width]


def _lines(document: Any) -> list[str]:
    if isinstance(document, str):
        return document.splitlines() or [""]
    return json.dumps(readable(document), indent=1, default=repr).splitlines()


def readable(document: Any) -> Any:
    """An encoded document with its small arrays spelt out."""
    if isinstance(document, dict) and document.get("$") == "array":
        return decode(Encoded(document)).tolist()
    if isinstance(document, dict):
        return {key: readable(value) for key, value in document.items()}
    return [readable(value) for value in document] if isinstance(document, list) else document
