"""Where in a run a call stands: the key of its record, the seed of its randomness, its name on every screen.

A location is the path of scopes that lead to a call, ``curve/point[3]/minimize[0]/energy[17]``. Indices are counted
per name and parent at the moment of the call, so a location depends on the program alone, never on timing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Location", "seed_key"]


@dataclass(frozen=True, slots=True)
class Location:
    """A path of scopes; ``str(location)`` is its canonical form."""

    path: str

    def child(self, name: str, index: int) -> Location:
        """The location of call number ``index`` (from 0) of ``name`` made directly in this scope."""
        return Location(f"{self.path}/{name}[{index}]")

    @property
    def parent(self) -> Location | None:
        """The enclosing scope, or None at the root of the run."""
        head, separator, _ = self.path.rpartition("/")
        return Location(head) if separator else None

    @property
    def name(self) -> str:
        """The last step's name, without its index."""
        return self.path.rpartition("/")[2].partition("[")[0]

    def __str__(self) -> str:
        return self.path


def seed_key(seed: int, location: Location, row: int = 0) -> tuple[int, int]:
    """The 128-bit key of a counter-based generator for one row of one call, as two 64-bit integers.

    Equal to the first 16 bytes of SHA-256 of ``seed``, ``location`` and ``row``: rows are statistically independent
    and know nothing of batches, workers, attempts or each other.
    """
    text = f"{seed}\x00{location.path}\x00{row}".encode()
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")
