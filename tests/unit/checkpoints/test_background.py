"""BackgroundCheckpointIO: training continues while a file is written, and the file is what it was at the save."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError
from tests.unit.checkpoints.test_checkpoint import files_no_larger_than, names


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Files are written only while it is set."""
    event = threading.Event()
    save = AtomicCheckpointIO.save_checkpoint

    def held(self: Any, *arguments: Any) -> None:
        assert event.wait(60)
        save(self, *arguments)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", held)
    return event


def content(value: float) -> dict[str, Any]:
    storage = torch.full((10,), value)
    return {
        "state_dict": {"a": storage[:4].view(2, 2).t(), "b": storage[4:], "none": torch.zeros(0, 3)},
        "again": storage[4:],
        "counts": {"steps": [int(value)]},
    }


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted) and found.dtype == wanted.dtype
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    return found == wanted


def test_a_file_holds_what_was_there_when_it_was_saved(tmp_path: Path, gate: threading.Event) -> None:
    plugin, path, changing = BackgroundCheckpointIO(), tmp_path / "a.ckpt", content(1)
    plugin.save_checkpoint(changing, path)
    changing["state_dict"]["b"].fill_(7)
    changing["counts"]["steps"].append(9)
    assert not path.exists(), "training is not held up"
    gate.set()
    plugin.wait()
    assert same(torch.load(path, weights_only=True), content(1))
    assert manifest.versions(path)
    assert manifest.verify(path) is None
    plugin.save_checkpoint(content(2), path)
    assert same(plugin.load_checkpoint(path), content(2)), "the next one reuses the memory of the first"


def test_it_is_the_file_that_training_would_have_waited_for(tmp_path: Path) -> None:
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(content(3), tmp_path / "a.ckpt")
    plugin.wait()
    AtomicCheckpointIO().save_checkpoint(content(3), tmp_path / "b.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size == (tmp_path / "b.ckpt").stat().st_size
    assert same(torch.load(tmp_path / "a.ckpt"), torch.load(tmp_path / "b.ckpt"))


def test_two_saves_of_one_step_wait_for_no_file_and_a_third_for_the_first(
    tmp_path: Path, gate: threading.Event
) -> None:
    """A checkpoint and a snapshot fall on one step."""
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(content(1), tmp_path / "a.ckpt")
    plugin.save_checkpoint(content(2), tmp_path / "b.ckpt")
    assert not list(tmp_path.glob("*.ckpt"))
    threading.Timer(0.2, gate.set).start()
    plugin.save_checkpoint(content(3), tmp_path / "c.ckpt")
    assert (tmp_path / "a.ckpt").exists()
    plugin.wait()
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        assert same(torch.load(tmp_path / f"{name}.ckpt"), content(value)), "none has another's content"


def test_who_is_interrupted_while_waiting_loses_no_file(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(content(1), tmp_path / "a.ckpt")
    future = plugin._pending[0]
    with monkeypatch.context() as patched:
        patched.setattr(future, "exception", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            plugin.wait()
    gate.set()
    plugin.teardown()
    assert (tmp_path / "a.ckpt").exists()


def test_what_follows_a_file_waits_for_it(tmp_path: Path, gate: threading.Event) -> None:
    plugin, seen = BackgroundCheckpointIO(), []
    plugin.save_checkpoint(content(1), tmp_path / "a.ckpt")
    plugin.after_writing(lambda: seen.extend(names(tmp_path)))
    assert seen == []
    gate.set()
    plugin.wait()
    assert seen == ["a.ckpt", "manifest.json"]
    plugin.after_writing(lambda: seen.append("at once"))
    plugin.wait()
    assert seen[-1] == "at once"


@pytest.mark.parametrize("found_by", ["wait", "the next save"])
def test_a_full_disk_is_said_and_nothing_follows_it(tmp_path: Path, found_by: str) -> None:
    plugin, followed = BackgroundCheckpointIO(), []
    large = {"state_dict": {"a": torch.ones(100_000)}}
    with files_no_larger_than(10_000):
        plugin.save_checkpoint(large, tmp_path / "a.ckpt")
        plugin.after_writing(lambda: followed.append(1))
        act = plugin.wait if found_by == "wait" else lambda: plugin.save_checkpoint(large, tmp_path / "b.ckpt")
        while not plugin.failed():
            time.sleep(0.01)
        with pytest.raises(SaveError, match=r"a\.ckpt"):
            act()
    assert followed == []
    assert not list(tmp_path.glob("*.ckpt"))
    plugin.save_checkpoint(content(1), tmp_path / "b.ckpt")
    plugin.wait()


def test_the_end_of_a_run_finishes_the_file(tmp_path: Path, gate: threading.Event) -> None:
    plugin = BackgroundCheckpointIO()
    plugin.save_checkpoint(content(1), tmp_path / "a.ckpt")
    threading.Timer(0.2, gate.set).start()
    plugin.teardown()
    assert (tmp_path / "a.ckpt").exists()
