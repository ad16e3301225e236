"""Draw the safeguards' page of TensorBoard: python -m benchmarks.board_picture [run] [target]

Opens the newest finished run of `stage2` (or the given run) in TensorBoard and headless Chromium (on Debian: apt
install chromium); trains nothing.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

from atlas_lm.runs.resolve import resolve_run

SIZE = "1500,1460"  # pixels: the whole page
SECONDS = 25_000  # virtual milliseconds for the page to load its charts


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(address: str, seconds: float = 60) -> None:
    """Until TensorBoard has read the run."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"{address}/data/plugin/custom_scalars/layout") as answer:
                if b"Safeguards" in answer.read():
                    return
        except OSError:
            pass
        time.sleep(0.5)
    sys.exit(f"TensorBoard showed no layout within {seconds:.0f} seconds: was the run logged with conf/logger/default?")


def main(run: str = "stage2", target: str = "docs/safeguards.png") -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("there is no chromium: install it, on Debian with apt install chromium")
    port = free_port()
    board = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", "tensorboard", "--port", str(port), "--load_fast=false"],
        cwd=resolve_run(run), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,  # the page shows the folder
    )  # fmt: skip
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(address)
        with tempfile.TemporaryDirectory() as profile:
            subprocess.run(
                [
                    browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={profile}", f"--window-size={SIZE}", f"--virtual-time-budget={SECONDS}",
                    f"--screenshot={target}", f"{address}/#custom_scalars&_smoothingWeight=0",
                ],
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
    finally:
        board.terminate()
        board.wait()
    print(f"wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
