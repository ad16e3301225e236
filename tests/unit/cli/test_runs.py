"""The list of runs: what each folder says, whatever state it is in."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.cli import runs as command
from atlas_lm.runs import lock
from atlas_lm.runs.listing import examine

NOW = 1_000_000.0


def make_run(outputs: Path, name: str, rows: list[dict[str, Any]] | None = None, **report: Any) -> Path:
    run = outputs / name / "2026-01-01_00-00-00"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("optim:\n  total_steps: 300\n")
    if rows is not None:
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if report:
        (run / "report.json").write_text(json.dumps(report))
    return run


ROWS: list[dict[str, Any]] = [
    {"global_step": 100, "time": NOW - 600, "lm_loss": 3.0, "tokens_per_second": 900.0, "val/loss": 2.9},
    {"global_step": 110, "time": NOW - 60, "lm_loss": 2.5, "tokens_per_second": 1000.0},
]


def test_a_run_that_ended_is_what_its_report_says(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", ROWS, status="finished", val_loss=2.25, steps=300, tokens_per_second=950.0)
    found = examine(run, NOW)
    assert (found.state, found.step, found.steps, found.loss, found.age) == ("finished", 110, 300, 2.25, 60.0)
    assert found.is_validation


def test_a_run_without_a_report_is_running_killed_or_never_began(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", ROWS)
    assert examine(run, NOW).state == "killed"
    assert examine(run, NOW).loss == 2.9, "its last validation"
    assert examine(make_run(tmp_path, "b", [{**ROWS[1]}]), NOW).loss == 2.5, "of training, where none was"
    assert examine(make_run(tmp_path, "c"), NOW).state == "not begun"
    with lock.locked(run):
        assert examine(run, NOW).state == "running"
    assert examine(run, NOW).state == "killed"


def test_a_resumed_run_is_running_whatever_an_old_report_says(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", ROWS, status="interrupted")
    with lock.locked(run):
        assert examine(run, NOW).state == "running"


def test_looking_does_not_keep_a_run_from_beginning(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a")
    with lock.locked(run):
        pass
    with (run / lock.LOCK).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        with pytest.raises(ValueError, match="another process"), lock.locked(run):
            pass  # who holds it for longer than a look is another process
    with lock.locked(run):
        assert lock.is_held(run)
    assert not lock.is_held(run)


def test_an_owner_stands_for_a_lock_as_long_as_it_lives(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", ROWS)
    (run / lock.OWNER).write_text(json.dumps({"host": "elsewhere", "pid": 1, "birth": "?"}))
    assert examine(run, NOW).state == "running", "of another machine: not known to have ended"
    (run / lock.OWNER).write_text(json.dumps({"host": lock.socket.gethostname(), "pid": 2**22 - 1, "birth": "?"}))
    assert examine(run, NOW).state == "killed"


@pytest.mark.parametrize("broken", ["report.json", "metrics.jsonl", "config.yaml"])
def test_what_is_broken_is_left_open(tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "a", ROWS, status="finished", val_loss=2.25)
    (run / broken).write_bytes(b'{"a": [\xff')
    command.main([f"outputs={tmp_path}"])
    assert "a/2026-01-01_00-00-00" in capsys.readouterr().out.replace("\n", "")


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", ROWS)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"global_step": 999, "ti')
    assert examine(run, NOW).step == 110


def test_all_runs_are_listed_with_what_went_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "good", ROWS, status="finished", val_loss=2.25)
    make_run(tmp_path, "bad", ROWS, status="failed", error="the disk is full")
    make_run(tmp_path, "gone", ROWS)
    command.main([f"outputs={tmp_path}"])
    shown = capsys.readouterr().out
    for words in (
        "good/",
        "bad/",
        "gone/",
        "finished",
        "failed",
        "killed",
        "110 of 300",
        "the disk is full",
        "resume=auto",
    ):
        assert words in shown
    command.main([f"outputs={tmp_path}", "state=failed"])
    assert "good/" not in capsys.readouterr().out


def test_no_runs_and_no_such_state_are_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no runs: train one"):
        command.main([f"outputs={tmp_path}"])
    make_run(tmp_path, "a", ROWS)
    with pytest.raises(ValueError, match="no run is finished: there are runs killed"):
        command.main([f"outputs={tmp_path}", "state=finished"])


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "–"), (3, "3 s"), (119, "119 s"), (121, "2 min"), (7300, "2 h"), (400_000, "5 d")]
)
def test_ages_in_words(seconds: float | None, words: str) -> None:
    assert command.duration(seconds) == words


def test_a_line_of_a_pipe_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "an_experiment_of_a_long_name_with_all_that_makes_it_other_than_the_rest"
    make_run(tmp_path, name)
    command.main([f"outputs={tmp_path}"])
    assert any(line.split()[0] == f"{name}/2026-01-01_00-00-00" for line in capsys.readouterr().out.splitlines())


def test_a_run_whose_job_comes_back_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`resume=auto` would be refused for it. By a stand-in for squeue, which knows job 7 alone, and later nothing."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(
        f'#!/bin/sh\necho "$4" >> {tmp_path}/asked\n[ "$3" = 7 ] && echo "7 main PD" && exit 0\n'
        '[ "$3" = 9 ] && echo "cannot reach the controller" >&2 && exit 1\necho "Invalid job id" >&2; exit 1\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:/bin:/usr/bin")
    outputs = tmp_path / "outputs"
    for name, job in (("waits", "slurm-7"), ("gone", "slurm-8"), ("other", "pbs-7")):
        run = make_run(outputs, name, ROWS)
        (run / "run.json").write_text(json.dumps({"number": 1, "overrides": [], "job": job}))
    lost = make_run(outputs, "lost", ROWS, status="failed")  # another rank was killed: its job is queued again
    (lost / "run.json").write_text(json.dumps({"number": 1, "overrides": [], "job": "slurm-7"}))
    command.main([f"outputs={outputs}"])
    shown = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    for name, state in (("waits", "queued"), ("lost", "queued"), ("gone", "killed"), ("other", "killed")):
        assert [f"{name}/2026-01-01_00-00-00", state] in shown
    assert len((tmp_path / "asked").read_text().splitlines()) == 3
    for i in range(3):
        run = make_run(outputs, f"unknown{i}", ROWS)
        (run / "run.json").write_text(json.dumps({"number": 1, "overrides": [], "job": "slurm-9"}))
    (tmp_path / "asked").unlink()
    command.main([f"outputs={outputs}", *(f"unknown{i}" for i in range(3))])
    assert len((tmp_path / "asked").read_text().splitlines()) == 1, "a controller that does not answer is asked once"
