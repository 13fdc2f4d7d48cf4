"""There is an archived run of this version, with every kind of record; that it is answered shows the campaign.

``tests/archive/VERSION`` holds what ``hybridq run tests/studies/archived.py`` recorded with that version, and what it
returned. A release adds its own; the first test says how. `campaign_files` replays them, and the likes of earlier and
later versions.
"""

from __future__ import annotations

import pytest
from campaign_files import ARCHIVE, RELEASES, SCRIPT

import hybridq
from hybridq import journal as records
from hybridq.journal import read_records


def test_there_is_a_run_of_this_version() -> None:
    assert hybridq.__version__ in RELEASES, (
        f"record one: hybridq run {SCRIPT} --store {ARCHIVE / hybridq.__version__} --json, and keep its value in "
        "answer.json beside it"
    )


@pytest.mark.parametrize("release", RELEASES)
def test_an_archived_run_has_every_kind_of_record(release: str) -> None:
    found = [record for _, record in read_records(ARCHIVE / release / "archived")]
    assert {type(record) for record in found} == set(records._FIELDS)
    assert sum(isinstance(record, records.Evaluation | records.Row) for record in found) > 50
