"""The dashboard in Debian's Chromium: a report opened, its tabs switched, two compared, a training run opened."""

import importlib.util
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from atlas_lm.inspection import schema
from atlas_lm.inspection.dashboard import run_tables
from atlas_lm.loggers.jsonl import read_rows
from benchmarks.screenshots import Browser, browsing, dashboard, take_pictures
from tests.support import ROOT
from tests.support.launching import with_all_safeguards
from tests.support.receivers import free_port
from tests.support.reports import a_report

HAS_STREAMLIT, HAS_SELENIUM = (importlib.util.find_spec(name) is not None for name in ("streamlit", "selenium"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_STREAMLIT, reason="pip install 'atlas-lm[dashboard]'"),
    pytest.mark.skipif(not HAS_SELENIUM, reason="pip install selenium"),
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_all_safeguards(tmp_path_factory.mktemp("run"), "name=trained")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole reports, one that is cut off, and one of a newer version."""
    folder = tmp_path_factory.mktemp("reports")
    reports = {"first": a_report("alpha", 12), "second": a_report("beta", 8)}
    reports["second"].flags[0].fired = False
    for name, report in reports.items():
        (folder / name).mkdir()
        schema.write(report, folder / name / "report.json")
    for name, text in {"cut": reports["first"].model_dump_json()[:300], "newer": '{"schema_version": 9}'}.items():
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def browser(folder: Path, run: Path) -> Iterator[Browser]:
    outputs = run.parents[1]
    (outputs / "broken" / "1").mkdir(parents=True)
    (outputs / "broken" / "1" / "config.yaml").write_text("optim: {total_steps: 4}")
    os.utime(outputs / "broken" / "1" / "config.yaml", (1, 1))  # the newest run is shown at first
    (outputs / "broken" / "1" / "metrics.jsonl").write_text("{}\nnone\n{}\n")
    with dashboard(folder, outputs) as url, browsing(url) as found:
        yield found


CHART, TABLE = '[data-testid="stVegaLiteChart"] :is(svg, canvas).marks', '[data-testid="stDataFrame"]'


def test_reports_are_listed_and_broken_ones_with_their_reason(browser: Browser) -> None:
    browser.open("Reports")
    browser.wait_for("2 that cannot be read", "cut/report.json", "newer/report.json", "version 9")


def test_a_report_is_opened_and_its_tabs_switched(browser: Browser) -> None:
    browser.open("Reports")
    browser.wait_for("report")
    browser.choose("report", "second/report.json")
    browser.wait_for("No flag fired.")
    browser.choose("report", "first/report.json")
    browser.wait_for("Flags: high_entropy", "(x):")
    seen = {"Tokens": 0, "Entropy": 1, "Attention": 3, "Memory": 9, "Prompt": 2, "Flags": 0, "Latency": 1}
    for tab, charts in seen.items():
        browser.switch(tab)
        browser.wait_until_shown(CHART, charts)
    browser.switch("Flags")
    browser.wait_for("a warning")
    assert browser.chosen("step") == "step 3: high_entropy"
    browser.switch("Attention")
    browser.choose("figure", "norm of the hidden state")
    browser.wait_for("self-attention")


def test_two_reports_are_compared(browser: Browser) -> None:
    browser.open("Compare")
    browser.wait_for("A: ", "B: ")
    browser.choose("A", "first/report.json")
    browser.choose("B", "second/report.json")
    browser.wait_for("A: alpha", "B: beta")
    browser.wait_until_shown(CHART, 1)
    browser.wait_until_shown(TABLE, 2)


def test_a_training_run_is_opened(browser: Browser, run: Path) -> None:
    browser.open("Training runs")
    browser.wait_for("Spikes, rollbacks and skipped steps")
    browser.choose("run", f"trained/{run.name}")
    browser.wait_for("Spikes, rollbacks and skipped steps", "None.")
    browser.wait_until_shown(CHART, len(run_tables.charts(read_rows(run / "metrics.jsonl"))))


def test_a_run_without_metrics_that_can_be_read_says_why(browser: Browser) -> None:
    browser.open("Training runs")
    browser.wait_for("run")
    browser.choose("run", "broken/1")
    browser.wait_for("broken/1 has no metrics that can be read", "line 2")


def test_pictures_are_taken(folder: Path, run: Path, tmp_path: Path) -> None:
    take_pictures(folder, run.parents[1], tmp_path)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.name for path in pictures] == ["dashboard_compare.png", "dashboard_report.png", "dashboard_run.png"]
    for path in pictures:
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width >= 1200
        assert height >= 700


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_no_server_is_left_behind(sent: signal.Signals, folder: Path) -> None:
    port = free_port()
    start = f"from pathlib import Path; from atlas_lm.inspection.serve import serve; p = Path({str(folder)!r})"
    command = [sys.executable, "-c", f"{start}; serve(p, p, {port})"]
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        server = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
    finally:
        signal.signal(signal.SIGINT, ignored)
    until = time.monotonic() + 60
    while not answers(port):
        assert time.monotonic() < until
        time.sleep(0.2)
    server.send_signal(sent)
    server.wait(30)
    assert not answers(port)


def answers(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0
