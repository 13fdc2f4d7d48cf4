"""The page in a headless browser: reached from Dask's own pages, live, correct, late, harmless, through a restart."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from processes import SOON, free_port, scheduler_and_workers
from qiskit.circuit.library import efficient_su2
from runs import recorded
from told import TOTALS, loop, message

import hybridq as hq
from hybridq import journal as records
from hybridq.monitor.plugin import Monitor, pack
from hybridq.monitor.store import TOPIC

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
WAIT = 2 * SOON * 1000
MODELS = "[...Bokeh.documents[0]._all_models.values()]"


@hq.quantum
def energy(theta: list[float]) -> object:
    return hq.expval(efficient_su2(2, reps=1), {"XX": 1.0, "ZZ": 1.0}, theta)


@hq.workflow
def descend(index: int) -> float:
    found: float = hq.minimize(energy, [0.05 * index] * 8, method="COBYLA", options={"maxiter": 12}).fun
    return found


@hq.workflow
def loops(count: int) -> list[float]:
    return list(hq.map(descend, range(count)))


pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield found
        found.close()


def opened(browser: Any, address: str) -> Any:
    """A page whose figures are drawn; alerts and errors of scripts end up in its ``faults``."""
    page = browser.new_page()
    page.set_default_timeout(WAIT)
    page.faults = []
    page.on("dialog", lambda dialog: (page.faults.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.goto(address)
    return page


def base(client: Client) -> str:
    return str(client.dashboard_link).rpartition("/")[0]


def see(page: Any, text: str) -> None:
    """Wait until the table of runs shows ``text``."""
    page.wait_for_selector(f"#hybridq-runs >> text={text}")


def test_the_navigation_bar_leads_to_a_live_page(browser: Any, client: Client) -> None:
    client.register_plugin(Monitor())
    client.log_event(TOPIC, pack(message("live", loops=[loop(values=[-1.0])], totals=TOTALS)))
    page = opened(browser, f"{base(client)}/status")
    page.click('a[href="hybridq"]')
    see(page, "−1.00000000")
    client.log_event(TOPIC, pack(message("live", at=1.0, loops=[loop(values=[-1.25], first=1)], totals=TOTALS)))
    see(page, "−1.25000000")
    assert page.faults == []
    page.close()


def test_a_real_run_is_shown_with_the_journals_numbers_to_who_comes_late(
    browser: Any, client: Client, store: Path
) -> None:
    hq.run(loops, 2, name="seen-late", store=store, cluster=client)
    page = opened(browser, f"{base(client)}/hybridq")
    see(page, "seen-late")
    rows = recorded(store / "seen-late", records.Row)
    text = page.inner_text("#hybridq-runs")
    (run,) = [line for line in text.splitlines() if line.startswith("seen-late")]
    assert re.search(rf"finished\s+{len(rows)}\b", run)
    for line in {row.loop for row in rows}:
        best = min(row.value for row in rows if row.loop == line)
        assert f"{best:.8f}".replace("-", "−") in text
    # what still runs is drawn first, be it of another driver
    choice = page.locator("select option", has_text="seen-late")
    choice.wait_for(state="attached")
    page.select_option("select", value=choice.get_attribute("value"))
    page.wait_for_function(f"{MODELS}.filter(m => m.type == 'Figure').length == 6")
    page.wait_for_function(
        f"{MODELS}.some(m => m.type == 'GlyphRenderer' && m.glyph.type == 'MultiLine' && "
        "m.data_source.data.ys.map(ys => ys.length).join() == '12,12')"
    )
    assert page.faults == []
    page.close()


def test_names_of_strangers_do_nothing(browser: Any, client: Client) -> None:
    client.register_plugin(Monitor())
    evil = "<img src=x onerror=alert(1)>\"'$$\\alpha$$<script>alert(2)</script>"
    told = message(
        evil, driver=evil, workflow=evil, error=evil, full=True, devices=[[evil, 1, 1, 0, 0, 1]],
        loops=[loop(at=evil, group=evil, method=evil, where=evil, unit=evil, source=evil, reference=0.5)],
        notes=[[1e9, "failed", evil, evil]], spans=[[evil, 1e9, 1.0, "quantum", evil, 1]],
    )  # fmt: skip
    client.log_event(TOPIC, pack(told))
    page = opened(browser, f"{base(client)}/hybridq")
    see(page, "img src=x onerror")
    page.wait_for_function(f"{MODELS}.filter(m => m.type == 'Figure').length == 6")
    for figure in page.locator("canvas").all():  # where names stand in what hovers
        if figure.is_visible():
            figure.hover(force=True)
    page.select_option("select", index=1)
    page.wait_for_timeout(1500)
    assert page.locator("img[src='x']").count() == 0  # looks into shadow roots, too
    assert page.faults == []
    page.close()


def test_two_drivers_on_one_page(browser: Any, client: Client) -> None:
    client.register_plugin(Monitor())
    page = opened(browser, f"{base(client)}/hybridq")
    for driver in ("one", "two"):
        client.log_event(TOPIC, pack(message(f"of-{driver}", driver=f"{driver}:1", loops=[loop()], totals=TOTALS)))
    see(page, "of-one")
    see(page, "of-two")
    page.close()


def test_a_scheduler_that_comes_again_shows_what_it_is_told_again(browser: Any) -> None:
    port = free_port()
    at = f"http://127.0.0.1:{port}/hybridq"
    with scheduler_and_workers({}, dashboard=port) as (address, _), Client(address) as first:
        first.register_plugin(Monitor())
        first.log_event(TOPIC, pack(message("before")))
        page = opened(browser, at)
        see(page, "before")
    with scheduler_and_workers({}, dashboard=port) as (address, _), Client(address) as second:
        second.register_plugin(Monitor())
        second.log_event(TOPIC, pack(message("after", full=True)))
        page.goto(at)
        see(page, "after")
        assert "before" not in page.inner_text("#hybridq-runs")
    page.close()
