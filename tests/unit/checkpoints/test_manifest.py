"""Every checkpoint can be reported from a damaged one, whenever the process that wrote it died."""

import logging
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.content import CheckpointError
from atlas_lm.checkpoints.io import AtomicCheckpointIO, SaveError, read_checkpoint
from atlas_lm.checkpoints.listing import newest_usable
from atlas_lm.checkpoints.manifest import MANIFEST, verify, versions


def content(step: int) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((100,), float(step))}, "global_step": step}


def save(path: Path, step: int) -> Path:
    AtomicCheckpointIO().save_checkpoint(content(step), path)
    return path


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit, leave all else."""
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= 1
    path.write_bytes(raw)


def test_what_is_recorded(tmp_path: Path) -> None:
    began = time.time()
    path = save(tmp_path / "a.ckpt", 7)
    entry = manifest.read(tmp_path)["a.ckpt"]
    assert sorted(entry) == ["global_step", "logged_steps", "sha256", "size", "written"]
    assert entry["size"] == path.stat().st_size
    assert entry["global_step"] == 7
    assert began - 1 <= entry["written"] <= time.time() + 1
    assert verify(path) is None


@pytest.mark.parametrize("where", [0.0, 0.01, 0.3, 0.5, 0.8, 0.999])
def test_one_bit(tmp_path: Path, where: float, caplog: pytest.LogCaptureFixture) -> None:
    path, other = save(tmp_path / "a.ckpt", 1), save(tmp_path / "b.ckpt", 2)
    flip(path, where)
    assert verify(path) == "its checksum is not the one in manifest.json"
    with pytest.raises(CheckpointError, match=f"a.ckpt' is damaged, its checksum is not .*: use {other}$"):
        read_checkpoint(path)
    assert read_checkpoint(other)["global_step"] == 2
    assert not caplog.records


def test_the_remedy_is_the_newest_other_that_is_intact(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{name}.ckpt", step) for step, name in enumerate("abcd")]
    for age, path in enumerate(paths):
        os.utime(path, (9000 - age, 9000 - age))
    (tmp_path / "last.ckpt").symlink_to("d.ckpt")
    flip(paths[3])
    (tmp_path / "e.ckpt").write_bytes(b"no checkpoint, and none that is known")
    flip(paths[0])
    assert newest_usable(tmp_path) == paths[2]
    for damaged in (paths[3], tmp_path / "last.ckpt", paths[0]):
        with pytest.raises(CheckpointError, match=f"use {paths[2]}$"):
            read_checkpoint(damaged)
    for path in paths[1:3]:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"copy it again or use another$"):
        read_checkpoint(paths[3])


def test_a_link_is_what_it_points_to(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    (tmp_path / "elsewhere").mkdir()
    for link in (tmp_path / "last.ckpt", tmp_path / "elsewhere" / "last.ckpt"):
        link.symlink_to(path)
        assert verify(link) is None
    flip(path)
    assert verify(tmp_path / "last.ckpt")
    assert verify(tmp_path / "elsewhere" / "last.ckpt")


def test_lazily_means_unverified(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    where = path.read_bytes().find(b"\x00\x00\x80?" * 8) / path.stat().st_size  # the ones of the tensor
    flip(path, where + 0.01)
    assert read_checkpoint(path, lazily=True)["global_step"] == 1
    with pytest.raises(CheckpointError, match="checksum"):
        read_checkpoint(path)


@pytest.mark.parametrize("how", ["copied", "no manifest", "damaged manifest", "another's manifest"])
def test_without_a_known_checksum_it_loads_and_the_log_says_so(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    if how == "copied":
        path = path.rename(tmp_path / "b.ckpt")
    elif how == "no manifest":
        (tmp_path / MANIFEST).unlink()
    elif how == "damaged manifest":
        flip(tmp_path / MANIFEST)
    else:
        (tmp_path / MANIFEST).write_text('{"files": []}')
    assert read_checkpoint(path)["global_step"] == 1
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{path} has no checksum in a manifest.json beside it" in record.getMessage()
    save(tmp_path / "c.ckpt", 2)  # a damaged manifest is replaced by a whole one
    assert verify(tmp_path / "c.ckpt") is None
    assert versions(tmp_path / "c.ckpt")


def test_a_flipped_bit_in_the_manifest_accuses_no_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    whole = (tmp_path / MANIFEST).read_bytes()
    for where in range(len(whole)):
        (tmp_path / MANIFEST).write_bytes(whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1 :])
        assert verify(path) is None
        (tmp_path / MANIFEST).write_bytes(whole[:where])
        assert verify(path) is None


def test_entries_of_files_that_are_gone_are_dropped(tmp_path: Path) -> None:
    first = save(tmp_path / "a.ckpt", 1)
    save(tmp_path / "b.ckpt", 2)
    first.rename(tmp_path / "a.ckpt.abandoned1")
    assert sorted(manifest.read(tmp_path)) == ["a.ckpt", "b.ckpt"]
    save(tmp_path / "c.ckpt", 3)
    assert sorted(manifest.read(tmp_path)) == ["b.ckpt", "c.ckpt"]


def test_once_replaced_the_old_bytes_are_damage(tmp_path: Path) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    old = path.read_bytes()
    save(path, 2)
    assert "previous" not in manifest.read(tmp_path)["a.ckpt"]
    path.write_bytes(old)
    assert verify(path)


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    for name in ("x.ckpt.tmp", "a.ckpt.tmp"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("somebody's")
    save(tmp_path / "a.ckpt", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", MANIFEST, "notes.tmp"]


@pytest.mark.parametrize("new", [True, False])
def test_a_full_disk_while_writing_the_manifest(tmp_path: Path, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.ckpt", 1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    target = tmp_path / "b.ckpt" if new else path
    with monkeypatch.context() as patched:
        patched.setattr(manifest, "write_atomically", full)
        with pytest.raises(SaveError, match=f"cannot save .*{target.name}.*No space left.*resume with resume={path}"):
            save(target, 2)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert verify(path) is None


# Whenever it dies


def in_a_child(body: Callable[[], None]) -> int:
    """What a process that runs `body` ends with: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL this process just before its `call`-th flush, rename or deletion."""
    left = [call]

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def whole(folder: Path) -> dict[str, int]:
    """The steps of all checkpoints of a folder; each is known to the manifest and is what it says."""
    found = {}
    for path in folder.glob("*.ckpt"):
        assert versions(path), f"nothing is known of {path}"
        assert verify(path) is None
        found[path.name] = read_checkpoint(path)["global_step"]
        assert found[path.name] in [entry["global_step"] for entry in versions(path)]
    return found


@pytest.mark.long
def test_killed_at_every_moment_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a.ckpt is replaced and b.ckpt is new, and what the dead left does not hinder the next."""
    seen, call, ending = set(), 0, -9
    while ending:
        folder = tmp_path / str(call)
        save(folder / "a.ckpt", 1)

        def die(folder: Path = folder, call: int = call) -> None:
            killed_at(call, monkeypatch)
            save(folder / "a.ckpt", 2)
            save(folder / "b.ckpt", 3)

        ending = in_a_child(die)
        assert ending in (0, -signal.SIGKILL)
        found = whole(folder)
        seen.add(tuple(sorted(found.items())))
        assert found["a.ckpt"] in (1, 2)
        again = in_a_child(lambda folder=folder: killed_at(3, monkeypatch) or save(folder / "a.ckpt", 4))
        assert again == -signal.SIGKILL
        whole(folder)  # killed twice over the same name
        save(folder / "a.ckpt", 5)
        assert whole(folder)["a.ckpt"] == 5
        assert not list(folder.glob("*.tmp"))
        call += 1
    assert call > 12, "there are that many moments"
    assert seen == {(("a.ckpt", 1),), (("a.ckpt", 2),), (("a.ckpt", 2), ("b.ckpt", 3))}


def test_killed_at_random(tmp_path: Path) -> None:
    """Within a few saves' time of this machine, however busy it is: the first child is let save a few."""
    generator, longest = random.Random(0), 0.0
    for n in range(20):
        child, start = os.fork(), time.monotonic()
        if child == 0:
            try:
                for step in range(10**6):
                    save(tmp_path / f"{step % 3}.ckpt", step)
            finally:
                os._exit(99)
        if n == 0:
            while not (tmp_path / "2.ckpt").exists():
                assert time.monotonic() < start + 60
                time.sleep(0.001)
            longest = 2 * (time.monotonic() - start)
        else:
            time.sleep(generator.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        whole(tmp_path)
    assert whole(tmp_path), "none was written: the test shows nothing"
