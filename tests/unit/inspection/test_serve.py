"""Starting the dashboard: what is wrong is one line, and Streamlit gets the folders and the port."""

import importlib.util
import socket
from pathlib import Path

import pytest

from atlas_lm.inspection import serve
from tests.support.receivers import free_port


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'atlas-lm\[dashboard\]'"):
        serve.serve(tmp_path, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("streamlit") is None, reason="pip install 'atlas-lm[dashboard]'")
def test_folders_and_ports_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        serve.serve(tmp_path / "nowhere", tmp_path / "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port} is in use"):
            serve.serve(tmp_path, tmp_path, port)


@pytest.mark.parametrize("port", [0, -1, 70000])
def test_a_port_that_cannot_be(port: int) -> None:
    with pytest.raises(ValueError, match=f"port={port} "):
        serve.check_port(port)
    serve.check_port(free_port())


def test_the_command_names_a_file_that_is_there() -> None:
    words = serve.command(Path("a"), Path("b"), 8501)
    assert serve.APP.is_file()
    assert words[words.index("run") + 1] == str(serve.APP)
    assert words[-3:] == ["--", "a", "b"]
    assert "--server.port=8501" in words
    assert "--server.address=127.0.0.1" in words
