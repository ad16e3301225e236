"""What happens to a run's folder and clock between two processes that write to it, for the tests of resuming.

Clocks are set back, the next machine lives in another time zone, folders are copied without time stamps. No decision
may depend on it.
"""

import datetime
import os
import shutil
import time
from pathlib import Path

import hydra.core.utils
import pytest

DAY = 86400.0
ZONES = ("Pacific/Kiritimati", "America/Los_Angeles", "UTC", "Asia/Tokyo")  # the second is a day after the first


KINDS = ("clock set back", "other time zone", "copied")


class World:
    """What happens between the processes of a test that begins in `folder`: one of `KINDS`, or nothing."""

    def __init__(self, kind: str, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.kind, self.patch, self.folder = kind, patch, folder
        self.processes = 0

    def begin(self) -> None:
        """A process begins."""
        outputs = [path for path in (self.folder / "outputs", self.folder / "cut" / "outputs") if path.is_dir()]
        if self.kind == "clock set back":
            for path in (path for one in outputs for path in one.rglob("*")):
                stamp = path.lstat().st_mtime + DAY
                os.utime(path, (stamp, stamp), follow_symlinks=False)
            set_clock(self.patch, -DAY * self.processes)
        elif self.kind == "other time zone":
            self.patch.setenv("TZ", ZONES[self.processes % len(ZONES)])
            time.tzset()
        elif self.kind == "copied":
            for path in outputs:
                copy_without_time_stamps(path)
        self.processes += 1


def set_clock(patch: pytest.MonkeyPatch, offset: float) -> None:
    """Let this process believe that it is `offset` seconds later than it is."""
    seconds, nanoseconds = _clocks

    class Shifted(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime.now(tz) + datetime.timedelta(seconds=offset)

    patch.setattr(time, "time", lambda: seconds() + offset)
    patch.setattr(time, "time_ns", lambda: nanoseconds() + int(offset * 1e9))
    patch.setattr(hydra.core.utils, "datetime", Shifted)


_clocks = time.time, time.time_ns


def copy_without_time_stamps(folder: Path) -> None:
    """Replace a folder by what `cp -r` makes of it: later files may be older now."""
    copy = folder.with_name("copy")
    copy.mkdir()
    for path in sorted(folder.rglob("*"), reverse=True):
        target = copy / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            target.symlink_to(os.readlink(path))
        elif path.is_file():
            shutil.copyfile(path, target)
        else:
            target.mkdir(exist_ok=True)
    shutil.rmtree(folder)
    copy.rename(folder)
