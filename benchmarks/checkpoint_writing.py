"""What a checkpoint costs training, by the way it is written: python -m benchmarks.checkpoint_writing

direct      `DirectFile`: past the page cache, hashed meanwhile; training waits
plain       through the page cache, hashed, flushed; training waits
async       Lightning's AsyncCheckpointIO around plain: a copy in memory, then a thread writes while training continues
background  ours around direct: the copy goes into the memory of the copy before it

Each round computes some steps with one save among them, and without; ways are taken in turn. Cost is the difference of
the two; wait is the call of save_checkpoint alone; safe is when the file is on the disk.
"""

import argparse
import hashlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from atlas_lm.checkpoints import io
from atlas_lm.checkpoints.background import BackgroundCheckpointIO
from atlas_lm.checkpoints.direct_file import DirectFile


class PlainFile:
    """As `DirectFile`, through the page cache."""

    def __init__(self, path: Path) -> None:
        self._file, self._sum = path.open("wb"), hashlib.sha256()

    def write(self, data: Any) -> int:
        self._sum.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def finish(self) -> str:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._sum.hexdigest()

    def __enter__(self) -> "PlainFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=27.7, help="of tiny with AdamW's moments")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="of about 0.1 s, in a round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count = int(options.megabytes * 1e6 / 4 / 100)
    content = {"state_dict": {str(i): torch.randn(count) for i in range(100)}, "global_step": 1}
    a = torch.randn(800, 800)

    def step() -> None:
        for _ in range(4):
            a @ a

    found: dict[str, dict[str, list[float]]] = {
        way: {"cost": [], "wait": [], "safe": []} for way in ("direct", "plain", "async", "background")
    }
    ours = BackgroundCheckpointIO()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for n in range(options.rounds + 1):
            start = time.perf_counter()
            for _ in range(options.steps):
                step()
            without = time.perf_counter() - start
            for way, values in found.items():
                plugin: Any = ours if way == "background" else io.AtomicCheckpointIO()
                if way == "async":
                    plugin = AsyncCheckpointIO(plugin)
                with patch.object(io, "DirectFile", DirectFile if way in ("direct", "background") else PlainFile):
                    start = time.perf_counter()
                    step()
                    before = time.perf_counter()
                    plugin.save_checkpoint(content, f"{folder}/{way}.ckpt")
                    wait = time.perf_counter() - before
                    for _ in range(options.steps - 1):
                        step()
                    took = time.perf_counter() - start
                    plugin.wait() if way == "background" else plugin.teardown()
                    safe = (
                        wait
                        if way in ("direct", "plain")
                        else os.stat(f"{folder}/{way}.ckpt").st_mtime - (time.time() - (time.perf_counter() - before))
                    )
                if n:  # the first warms up
                    values["cost"].append(took - without)
                    values["wait"].append(wait)
                    values["safe"].append(safe)
    rows = {
        way: {name: round(statistics.median(x) * 1e3, 1) for name, x in values.items()} for way, values in found.items()
    }
    print(f"{options.megabytes} MB, medians of {options.rounds}, ms")
    for way, values in rows.items():
        print(f"{way:12}" + "".join(f"{name} {value:8.1f}   " for name, value in values.items()))
    if options.out:
        options.out.write_text(json.dumps({"megabytes": options.megabytes, "milliseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
