"""Run folders: what is in them, which one a name means, and `latest`."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.checkpoints.listing import newest_checkpoint, newest_intact
from atlas_lm.files import write_atomically
from atlas_lm.runs.environment import environment, git_state
from atlas_lm.runs.folder import finished_runs, mark_latest, number_of, overrides_of, runs_in, write_identity
from atlas_lm.runs.resolve import resolve_checkpoint, resolve_run
from tests.support import ROOT


def make_run(outputs: Path, experiment: str, stamp: str, checkpoints: tuple[str, ...] = ()) -> Path:
    run = outputs / experiment / stamp
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    for age, name in enumerate(checkpoints):
        path = run / "checkpoints" / name
        AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(99)}, "global_step": age}, path)
        os.utime(path, (9000 - age, 9000 - age))  # as a copy or a clock that was set back leaves them
    return run


def test_a_name_means_the_newest_finished_run(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path, "stage1", stamp) for stamp in ("2024", "2025"))
    mark_latest(first, tmp_path / "stage1")
    assert resolve_run("stage1", tmp_path) == first.resolve()
    mark_latest(second, tmp_path / "stage1")
    assert resolve_run("stage1", tmp_path) == second.resolve()
    assert resolve_run(tmp_path / "stage1") == second.resolve()
    assert resolve_run(first) == first.resolve()
    assert not os.path.isabs(os.readlink(tmp_path / "stage1" / "latest")), "moving outputs/ would break the link"
    assert sorted(path.name for path in (tmp_path / "stage1").iterdir()) == ["2024", "2025", "latest"]


def test_a_name_wins_over_a_folder_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "outputs", "stage1", "2024")
    mark_latest(run, tmp_path / "outputs" / "stage1")
    monkeypatch.chdir(tmp_path)
    assert resolve_run("stage1") == run.resolve()
    assert resolve_run("outputs/stage1/latest") == run.resolve()


def test_what_is_no_run_is_an_error_that_helps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no runs yet"):
        resolve_run("stage1", tmp_path / "outputs")
    unfinished = make_run(tmp_path, "stage1", "2024")
    with pytest.raises(ValueError, match=f"no finished run; give the path of one, e.g. {unfinished}"):
        resolve_run("stage1", tmp_path)
    with pytest.raises(ValueError, match=r"no run 'stge1' \(did you mean 'stage1'\?\)"):
        resolve_run("stge1", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no run folder"):
        resolve_run(tmp_path / "empty", tmp_path)


def test_checkpoints_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", "2024", ("step=2.ckpt", "step=1.ckpt"))
    assert resolve_checkpoint(run).name == "step=1.ckpt", "the one of the latest step, whatever its name and time stamp"
    (run / "checkpoints" / "last.ckpt").symlink_to("step=1.ckpt")
    assert resolve_checkpoint(run).name == "last.ckpt"
    (run / "checkpoints" / "gone.ckpt").symlink_to("deleted.ckpt")
    assert newest_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint(run / "checkpoints" / "step=2.ckpt") == run / "checkpoints" / "step=2.ckpt"
    with pytest.raises(ValueError, match=r"no checkpoint .*step=3.ckpt' \(did you mean 'step=\d.ckpt'\?\)"):
        resolve_checkpoint(run / "checkpoints" / "step=3.ckpt")
    with pytest.raises(ValueError, match="has no checkpoint"):
        resolve_checkpoint(make_run(tmp_path, "b", "2024"))


def damage(path: Path) -> None:
    """One bit."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def test_the_newest_intact_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "a", "2024", ("1.ckpt", "2.ckpt", "3.ckpt", "4.ckpt"))
    first, second, third, fourth = (run / "checkpoints" / f"{i}.ckpt" for i in range(1, 5))
    last = run / "checkpoints" / "last.ckpt"
    last.symlink_to("4.ckpt")
    assert newest_intact(run) == (last, [])
    damage(fourth)
    third.write_bytes(b"")
    found, skipped = newest_intact(run)
    assert found == second
    assert len(skipped) == 2, "a file and the link to it are one"
    assert f"'{last.resolve()}' is damaged, its checksum" in skipped[0]
    assert f"'{third}' is damaged, it has 0 bytes" in skipped[1]
    assert not caplog.records
    assert resolve_checkpoint(run) == second
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert f"taking {second} instead" in caplog.text
    for named in (last, fourth):
        with pytest.raises(CheckpointError, match=f"is damaged, its checksum .*: use {second}$"):
            resolve_checkpoint(named)
    damage(first)
    damage(second)
    assert newest_intact(run)[0] is None
    with pytest.raises(ValueError, match="has no intact checkpoint") as caught:
        resolve_checkpoint(run)
    assert all(f"{i}.ckpt'" in str(caught.value) for i in ("1", "2", "3", "4"))
    assert newest_intact(make_run(tmp_path, "b", "2024")) == (None, [])


def test_one_that_no_manifest_knows_has_to_load(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", "2024", ("1.ckpt", "2.ckpt"))
    (run / "checkpoints" / "manifest.json").unlink()
    assert newest_intact(run)[0] == run / "checkpoints" / "2.ckpt"
    (run / "checkpoints" / "2.ckpt").write_bytes(b"half of one")
    found, skipped = newest_intact(run)
    assert found == run / "checkpoints" / "1.ckpt"
    assert "truncated or not a checkpoint (11 bytes)" in skipped[0]


def test_what_a_rollback_abandoned_is_never_taken(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", "2024", ("1.ckpt", "2.ckpt", "3.ckpt"))
    folder = run / "checkpoints"
    (folder / "2.ckpt").rename(folder / "2.ckpt.abandoned1")
    (folder / "3.ckpt").rename(folder / "3.ckpt.abandoned")
    (folder / "last.ckpt").symlink_to("2.ckpt.abandoned1")
    (folder / "older.ckpt").symlink_to("3.ckpt.abandoned")
    assert newest_intact(run) == (folder / "1.ckpt", [])
    assert newest_checkpoint(run) == folder / "1.ckpt"
    assert resolve_checkpoint(folder / "2.ckpt.abandoned1") == folder / "2.ckpt.abandoned1", "unless it is named"


def test_runs_are_ordered_by_the_number_that_they_began_with(tmp_path: Path) -> None:
    """Named by clocks in three time zones."""
    runs = [make_run(tmp_path, "a", stamp, ("1.ckpt",)) for stamp in ("2026-03-01_09-00", "2026-03-01_01-00", "2025")]
    for run in runs:
        write_identity(run, ["+experiment=stage1"])
        (run / "report.json").write_text('{"status": "finished"}')
    assert [number_of(run) for run in runs] == [1, 2, 3]
    assert overrides_of(runs[0]) == ["+experiment=stage1"]
    older = make_run(tmp_path, "a", "2027", ("1.ckpt",))  # of a version that gave no numbers
    oldest = make_run(tmp_path, "a", "2026", ("1.ckpt",))
    assert runs_in(tmp_path / "a") == [*reversed(runs), older, oldest]
    assert finished_runs(tmp_path / "a") == [*reversed(runs)]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert [run.name for run in runs_in(tmp_path / "b")] == [run.name for run in runs_in(tmp_path / "a")]


def test_a_copy_without_links(tmp_path: Path) -> None:
    """`latest` is a folder then, with a run in it."""
    run = make_run(tmp_path, "a", "1", ("1.ckpt",))
    write_identity(run, [])
    shutil.copytree(run, tmp_path / "a" / "latest")
    assert runs_in(tmp_path / "a") == [run]
    mark_latest(run, tmp_path / "a")
    assert (tmp_path / "a" / "latest").is_symlink()
    assert (tmp_path / "a" / "latest.1" / "config.yaml").is_file(), "nothing is lost"
    assert runs_in(tmp_path / "a") == [run]


@pytest.mark.parametrize("text", ["[]", '{"number": "1", "overrides": 5}', "{", "\udcff"])
def test_a_broken_identity_is_none(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path, "a", "1")
    (run / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    assert number_of(run) == 0
    assert overrides_of(run) is None


def test_of_a_run_and_its_copy_the_newer_is_the_one_that_was_trained_further(tmp_path: Path) -> None:
    run = make_run(tmp_path, "a", "z", ("1.ckpt",))
    write_identity(run, [])
    shutil.copytree(run, tmp_path / "a" / "copy")
    content = {"state_dict": {"w": torch.ones(99)}, "global_step": 7}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "a" / "copy" / "checkpoints" / "2.ckpt")
    assert [run.name for run in runs_in(tmp_path / "a")] == ["copy", "z"]
    shutil.rmtree(run / "checkpoints")
    assert [run.name for run in runs_in(tmp_path / "a")] == ["copy", "z"]


def test_runs_that_begin_at_once_get_numbers_of_their_own(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / str(i) for i in range(12)]
    for run in runs:  # a number is given before there is a configuration
        run.mkdir(parents=True)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda run: write_identity(run, []), runs))
    assert sorted(number_of(run) for run in runs) == [*range(1, 13)]


@pytest.mark.parametrize("report", ["{broken", "[]", "{}", '{"status": ["finished"]}', "\udcff"])
def test_a_broken_report_is_of_no_finished_run(tmp_path: Path, report: str) -> None:
    good, bad = (make_run(tmp_path, "a", stamp) for stamp in ("2024", "2025"))
    (good / "report.json").write_text('{"status": "finished"}')
    (bad / "report.json").write_bytes(report.encode(errors="surrogateescape"))
    assert finished_runs(tmp_path / "a") == [good]


def test_small_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_environment_is_json_and_knows_this_repository(tmp_path: Path) -> None:
    found = json.loads(json.dumps(environment(ROOT)))
    assert found["packages"]["lightning"].startswith("2.")
    assert found["python"]
    assert git_state(tmp_path) == {"commit": None, "dirty": False, "changed": []}


def test_git_state(tmp_path: Path) -> None:
    commands = ["init -q", "add a", "-c user.name=n -c user.email=e commit -qm m"]
    (tmp_path / "a").write_text("1")
    for command in commands:
        assert os.system(f"git -C {tmp_path} {command}") == 0
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert not clean["dirty"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True, "changed": ["a"]}
