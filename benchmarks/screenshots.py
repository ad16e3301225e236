"""The dashboard's pictures in docs/, taken with Chromium: python -m benchmarks.screenshots REPORTS OUTPUTS

REPORTS: a folder with at least two reports of python -m atlas_lm inspect. OUTPUTS: a folder of training runs.
Needs pip install 'atlas-lm[dashboard]' selenium, and apt-get install chromium chromium-driver.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atlas_lm.files import ROOT
from atlas_lm.inspection.serve import command

SIZE = 1280, 1100  # pixels of the window
WAIT = 60.0  # seconds for a page


class Browser:
    """Chromium at the dashboard, driven as a person would: by what is written on the page."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    @property
    def text(self) -> str:
        """What can be read on the page."""
        return str(self.driver.find_element("css selector", "body").text)

    def wait_for(self, *words: str) -> None:
        """AssertionError: they do not appear, or the page has an error."""
        until = time.monotonic() + WAIT
        while True:
            text, calm = self.text, not self._elements('[data-testid="stStatusWidget"]')
            assert not self._elements('[data-testid="stException"]'), text
            if calm and all(word in text for word in words):
                return
            assert time.monotonic() < until, f"{words} not in:\n{text}"
            time.sleep(0.1)

    def open(self, page: str) -> None:
        """One of the pages at the side."""
        self._click('[data-testid="stRadio"] label', page)

    def switch(self, tab: str) -> None:
        """One of the tabs of a report."""
        self._click('[role="tab"]', tab)

    def choose(self, label: str, option: str) -> None:
        """An option of the box with that label."""
        box = self._box(label)
        self._into_view(box)
        box.click()
        self._click('[role="option"]', option)

    def chosen(self, label: str) -> str:
        """What the box with that label shows."""
        return str(self._box(label).get_attribute("value"))

    def shows(self, selector: str) -> int:
        """How many elements of a kind can be seen."""
        return sum(element.is_displayed() for element in self._elements(selector))

    def wait_until_shown(self, selector: str, count: int) -> None:
        """AssertionError: there are never as many elements of a kind to be seen, or the page has an error."""
        until = time.monotonic() + WAIT
        while self.shows(selector) != count:
            assert time.monotonic() < until, f"{self.shows(selector)} of {selector}, not {count}"
            time.sleep(0.1)
        self.wait_for()

    def take(self, path: Path, top: str = "") -> None:
        """A picture, with the element that has this text at its top."""
        until = time.monotonic() + WAIT
        while top:
            found = self.driver.find_elements("xpath", f"//*[normalize-space(text())='{top}']")
            if found:
                self.driver.execute_script("arguments[0].scrollIntoView(true)", found[-1])
                break
            assert time.monotonic() < until, f"{top!r} is not on the page"
            time.sleep(0.1)
        time.sleep(1.5)  # charts are drawn after the page is there
        self.driver.save_screenshot(str(path))

    def _elements(self, selector: str) -> list[Any]:
        return list(self.driver.find_elements("css selector", selector))

    def _box(self, label: str) -> Any:
        boxes = self._elements('[data-testid="stSelectbox"]')
        found = [box for box in boxes if box.is_displayed() and box.text.split("\n")[0] == label]
        assert len(found) == 1, [box.text for box in boxes]
        return found[0].find_element("css selector", "input")

    def _into_view(self, element: Any) -> None:
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)

    def _click(self, selector: str, text: str) -> None:
        until = time.monotonic() + WAIT
        while True:
            found = [element for element in self._elements(selector) if element.text.strip() == text]
            if found:
                self._into_view(found[0])
                found[0].click()
                return
            assert time.monotonic() < until, f"{text!r} is none of {[e.text for e in self._elements(selector)]}"
            time.sleep(0.1)


@contextmanager
def dashboard(folder: Path, outputs: Path) -> Iterator[str]:
    """Its address while it runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command(folder, outputs, port), stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        try:
            until = time.monotonic() + WAIT
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                    break
                except OSError:
                    log.seek(0)
                    assert server.poll() is None, log.read().decode()
                    assert time.monotonic() < until
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def browsing(url: str) -> Iterator[Browser]:
    """Debian's Chromium at an address."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    options = Options()
    options.binary_location = shutil.which("chromium") or "chromium"
    width, height = SIZE
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or "chromedriver"))
    try:
        driver.get(url)
        yield Browser(driver)
    finally:
        driver.quit()


def take_pictures(folder: Path, outputs: Path, to: Path) -> None:
    """The three of docs/: a report, two compared, a run."""
    with dashboard(folder, outputs) as url, browsing(url) as browser:
        browser.wait_for("Reports", "Latency")
        browser.take(to / "dashboard_report.png", top="report")
        browser.open("Compare")
        browser.wait_for("A: ", "B: ")
        browser.take(to / "dashboard_compare.png", top="Compare")
        browser.open("Training runs")
        browser.wait_for("Spikes, rollbacks and skipped steps")
        browser.take(to / "dashboard_run.png", top="Spikes, rollbacks and skipped steps")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("reports", type=Path, help="folder of reports")
    parser.add_argument("outputs", type=Path, help="folder of training runs")
    given = parser.parse_args()
    take_pictures(given.reports, given.outputs, ROOT / "docs")


if __name__ == "__main__":
    main()
