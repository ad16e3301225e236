"""SLURM is asked to queue a job again when its time is up, and by nobody else; by a stand-in for scontrol."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_lm.training import preemption


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What scontrol was asked; `reason` says what it answers about the job."""
    tool = tmp_path / "scontrol"
    tool.write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then cat {tmp_path}/reason; else echo "$@" >> {tmp_path}/asked; fi\n'
    )
    tool.chmod(0o755)
    (tmp_path / "reason").write_text("JobId=7 JobState=COMPLETING Reason=None Dependency=(null)\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for name in ("SLURM_PROCID", "LOCAL_RANK", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "asked"


def time_is_up(asked: Path) -> None:
    """As SLURM 22.05 says it while a job that reached its limit ends."""
    reason = asked.with_name("reason")
    reason.write_text(reason.read_text().replace("Reason=None", "Reason=TimeLimit"))


@pytest.mark.parametrize("before", [False, True], ids=["cancelled or preempted", "time is up"])
def test_sigterm_is_a_time_limit_only_where_slurm_says_so(asked: Path, before: bool) -> None:
    """Saving took longer than the warning of SIGUSR1, and SIGTERM came after it."""
    if before:
        time_is_up(asked)
    preemption.requeue(signal.SIGTERM, begun=True)
    assert asked.exists() == before


def test_the_warning_before_a_time_limit(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preemption.requeue(signal.SIGUSR1, begun=True)
    assert asked.read_text() == "requeue 7\n"
    monkeypatch.setenv("SLURM_PROCID", "1")
    preemption.requeue(signal.SIGUSR1, begun=True)
    preemption.requeue(signal.SIGINT, begun=True)
    preemption.requeue(None, begun=True)
    assert asked.read_text() == "requeue 7\n", "one rank asks for all"


def test_a_limit_below_the_start_does_not_go_round_for_ever(
    asked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(preemption.ATTEMPTS))
    preemption.requeue(signal.SIGUSR1)
    assert not asked.exists()
    assert "before it trained" in capsys.readouterr().err
    preemption.requeue(signal.SIGUSR1, begun=True)
    assert asked.exists(), "a long run may be started again as often as it takes"


def signalled() -> None:
    signal.raise_signal(signal.SIGUSR1)


def saved() -> None:
    """As `callbacks.interrupt` ends."""
    ending = SystemExit(preemption.REQUEUE)
    ending.signal = signal.SIGUSR1  # type: ignore[attr-defined]
    raise ending


@pytest.mark.parametrize("ends", [signalled, saved])
def test_whoever_took_the_signal_slurm_is_asked(
    asked: Path, monkeypatch: pytest.MonkeyPatch, ends: Callable[[], None]
) -> None:
    """An attempt that has trained may be started again as often as it takes."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(preemption.ATTEMPTS))
    with pytest.raises(SystemExit) as ended, preemption.preemptible():
        ends()
    assert ended.value.code == preemption.REQUEUE
    assert asked.exists() == (ends is saved)


def test_other_endings_ask_for_nothing(asked: Path) -> None:
    with pytest.raises(SystemExit), preemption.preemptible():
        raise SystemExit(75)
    with pytest.raises(ValueError, match="x"), preemption.preemptible():
        raise ValueError("x")
    assert not asked.exists()


WAITING = """
from atlas_lm.training import preemption
preemption.exit_when_preempted()
{then}
print("ready", flush=True)
import time
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("then", "code", "says"),
    [("", preemption.REQUEUE, ""), ("preemption.only_wait_from_now_on()", preemption.INTERRUPTED, "the jobs stay")],
    ids=["at its start", "waiting for jobs"],
)
def test_who_waits_for_jobs_does_not_ask_to_be_started_again(then: str, code: int, says: str) -> None:
    """It would submit them a second time."""
    command = [sys.executable, "-c", WAITING.format(then=then)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, says in err) == (code, True)
