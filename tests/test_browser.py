"""Reports in headless Chromium: readable, usable by keyboard, live. Skipped where there is no Chromium."""

from __future__ import annotations

import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from test_report import LINES, SEARCH, run_json, write

import raychain
from raychain.pages import following

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: reports are not looked at in a browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe: accessibility is not checked")
CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: reports are not looked at in a browser")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def serious(page: Any) -> list[str]:
    """What axe calls serious or critical."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['target']} {node.get('failureSummary', '')[:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["run", "search"])
def test_reports_have_no_serious_fault_of_access(
    browser: Any, tmp_path: Path, kind: str, size: str, theme: str
) -> None:

    folder = write(tmp_path / kind, run_json() if kind == "run" else None, search=SEARCH if kind == "search" else None)
    raychain.report(folder)
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.goto(f"file://{folder}/report.html")
    assert serious(page) == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing is wider than the page"
    page.close()


def test_terms_are_told_by_keyboard_and_tables_sorted(browser: Any, tmp_path: Path) -> None:

    folder = write(tmp_path / "run", run_json(), search=SEARCH)
    raychain.report(folder)
    page = browser.new_page()
    page.goto(f"file://{folder}/report.html")
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator("button.term", has_text="MACs").first.focus()
    assert "Multiply-accumulates" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    head = page.locator("table.sortable th button.sort", has_text="MACs").first
    head.focus()
    page.keyboard.press("Enter")
    assert page.locator("th[aria-sort=descending]").count() == 1
    page.close()


def test_the_live_view_follows_keeps_its_place_and_ends(browser: Any, tmp_path: Path) -> None:

    running = run_json(status="running", stages=run_json()["stages"][:1])
    folder = write(tmp_path / "run", running, LINES[:12])
    command = [sys.executable, "-m", "raychain", "report", str(folder), "--follow"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    at = process.stdout.readline().split()[0]
    assert at.startswith("http://127.0.0.1:")
    page = browser.new_page(viewport={"width": 1280, "height": 500})
    page.goto(at)
    assert "step 20" in page.inner_text("body")
    page.locator("summary").first.click()
    term = page.locator("button.term", has_text="gap").first
    term.focus()
    place = page.evaluate("(window.scrollTo(0, 400), window.scrollY)")
    write(folder, running, LINES[:15])
    page.get_by_text("step 50").first.wait_for(timeout=30000)
    assert page.evaluate("window.scrollY") == place
    assert page.evaluate("document.activeElement.textContent") == "gap"
    assert page.locator("details[open]").count() == 1
    write(folder, run_json(), LINES)
    page.get_by_text("The run has ended.").wait_for(timeout=30000)
    assert serious(page) == []
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert (folder / "report.html").exists()
    assert out.strip().endswith("report.html")
    page.close()


def test_other_names_and_places_get_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FRESH_S", 0.1)
    monkeypatch.setattr(following, "LINGER_S", 0.1)
    folder = write(tmp_path / "run", run_json(status="running", stages=[]), LINES[:3])
    said: queue.Queue[str] = queue.Queue()
    showing = threading.Thread(target=following.follow, args=(str(folder), 0, said.put))
    showing.start()
    at = urlsplit(said.get(timeout=30).split()[0])
    for host, path, status in [("evil.example", "/", 403), ("localhost:1", "/", 200), ("127.0.0.1", "/run.json", 404)]:
        connection = HTTPConnection(at.netloc, timeout=10)
        connection.request("GET", path, headers={"Host": host})
        assert connection.getresponse().status == status
        connection.close()
    write(folder, run_json())
    showing.join(30)
    assert not showing.is_alive()
