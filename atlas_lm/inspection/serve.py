"""Start the dashboard: Streamlit, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from atlas_lm.files import ROOT

APP = Path(__file__).with_name("dashboard") / "app.py"
HOST = "127.0.0.1"  # reports hold prompts and texts: another machine reaches them through a tunnel


def check_port(port: int) -> None:
    """ValueError naming it, where a server cannot have it."""
    if not 1 <= port <= 65535:
        raise ValueError(f"port={port} must be 1 to 65535")
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended is no server
        try:
            found.bind((HOST, port))
            found.listen(1)
        except OSError as error:
            raise ValueError(f"port={port} is in use: give another one, or end who has it") from error


def command(folder: Path, outputs: Path, port: int) -> list[str]:
    """What runs the dashboard."""
    settings = {
        "server.port": str(port), "server.address": HOST, "server.headless": "true", "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false", "client.toolbarMode": "minimal",
        "global.developmentMode": "false",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "streamlit", "run", str(APP), *flags, "--", str(folder), str(outputs)]


def serve(folder: Path, outputs: Path, port: int = 8501) -> None:
    """Serve the reports below `folder` and `outputs` and the training runs below `outputs` at 127.0.0.1, until Ctrl-C.

    ValueError, one line: Streamlit is not installed, neither folder exists, or the port is in use.
    """
    if importlib.util.find_spec("streamlit") is None:
        raise ValueError("the dashboard needs streamlit: pip install 'atlas-lm[dashboard]'")
    if not folder.is_dir() and not outputs.is_dir():
        raise ValueError(
            f"neither {str(folder)!r} nor {str(outputs)!r} is a folder: give one that holds reports or runs"
        )
    check_port(port)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]  # as this process finds the package
    child = subprocess.Popen(command(folder, outputs, port), env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)})
    before = signal.signal(signal.SIGTERM, lambda *_: child.terminate())  # the server ends too
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
        child.terminate()
        child.wait()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)
