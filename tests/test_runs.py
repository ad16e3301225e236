"""Run folders: what is in them, which one a name means, and `latest`."""

import json
import os
from pathlib import Path

import pytest

from atlas_lm.environment import environment, git_state
from atlas_lm.runs import mark_latest, newest_checkpoint, resolve_checkpoint, resolve_run, write_atomically


def make_run(outputs: Path, experiment: str, stamp: str, checkpoints: tuple[str, ...] = ()) -> Path:
    run = outputs / experiment / stamp
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text("seed: 0\n")
    for age, name in enumerate(checkpoints):
        path = run / "checkpoints" / name
        path.write_bytes(b"x")
        os.utime(path, (1000 + age, 1000 + age))
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
    assert resolve_checkpoint(run).name == "step=1.ckpt", "the one written last, whatever its name"
    (run / "checkpoints" / "last.ckpt").symlink_to("step=1.ckpt")
    assert resolve_checkpoint(run).name == "last.ckpt"
    (run / "checkpoints" / "gone.ckpt").symlink_to("deleted.ckpt")
    assert newest_checkpoint(run) == run / "checkpoints" / "last.ckpt"
    assert resolve_checkpoint(run / "checkpoints" / "step=2.ckpt") == run / "checkpoints" / "step=2.ckpt"
    with pytest.raises(ValueError, match=r"no checkpoint .*step=3.ckpt' \(did you mean 'step=\d.ckpt'\?\)"):
        resolve_checkpoint(run / "checkpoints" / "step=3.ckpt")
    with pytest.raises(ValueError, match="has no checkpoint"):
        resolve_checkpoint(make_run(tmp_path, "b", "2024"))


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
    found = json.loads(json.dumps(environment(Path(__file__).parents[1])))
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
