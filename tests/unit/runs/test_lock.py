"""A run folder is one process's, also where the filesystem has no locks: Lustre without `-o flock` answers ENOSYS."""

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.runs import lock
from atlas_lm.runs.lock import OWNER, locked


@pytest.fixture(params=sorted(lock.WITHOUT_LOCKS))
def without_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    def flock(*_: Any) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    return request.param


def owner(**changes: Any) -> str:
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "birth": lock._birth(os.getpid()), "job": None,
            "attempt": "0"}  # fmt: skip
    return json.dumps(mine | changes)


@pytest.mark.usefixtures("without_locks")
def test_a_file_stands_for_a_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    with locked(run):
        assert json.loads((run / OWNER).read_text())["pid"] == os.getpid()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on .*remove"), locked(run):
            pass
    assert not (run / OWNER).exists()
    assert "filesystem without locks" in caplog.text
    with locked(run):
        pass


@pytest.mark.usefixtures("without_locks")
def test_the_file_of_a_process_that_has_ended_holds_nobody_up(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for killed in (owner(pid=int(ended.stdout)), owner(birth="of an earlier process of this number")):
        (tmp_path / OWNER).write_text(killed)
        with locked(tmp_path):
            assert json.loads((tmp_path / OWNER).read_text()) == json.loads(owner())
        assert not (tmp_path / OWNER).exists()


@pytest.mark.usefixtures("without_locks")
def test_the_attempt_before_of_the_same_job_has_ended_on_whatever_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node is lost, or a process killed; SLURM starts the job again elsewhere."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(lock, "still_known", lambda job: job != "slurm-5")
    held = [
        (owner(host="n2", job="slurm-7", attempt="0"), "1", False),
        (owner(host="n2", job="slurm-7", attempt="1"), "1", True),  # another process of this attempt
        (owner(host="n2", job="slurm-6", attempt="0"), "1", True),
        (owner(host="n2", job="slurm-5", attempt="0"), "1", False),  # a job that is gone
    ]
    for content, attempt, refused in held:
        (tmp_path / OWNER).write_text(content)
        monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
        if refused:
            with pytest.raises(ValueError, match="being written to"), locked(tmp_path):
                pass
        else:
            with locked(tmp_path):
                assert json.loads((tmp_path / OWNER).read_text())["job"] == "slurm-7"


@pytest.mark.usefixtures("without_locks")
@pytest.mark.parametrize(
    "content",
    [owner(host="another"), owner(pid="x"), "", "{", "[]"],
    ids=["another", "no pid", "empty", "cut off", "no names"],
)
def test_of_another_machine_nothing_is_known(tmp_path: Path, content: str) -> None:
    (tmp_path / OWNER).write_text(content)
    with pytest.raises(ValueError, match="being written to"), locked(tmp_path):
        pass
    assert (tmp_path / OWNER).read_text() == content


def test_other_errors_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(OSError, match="broken"), locked(tmp_path):
        pass
