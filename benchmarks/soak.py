"""An hour of the default experiment with a fault every few minutes: python -m benchmarks.soak [--minutes 60]

Judged: memory of the process (median of each tenth of the time after the warm-up, within 5 % of their median), open
files and threads, and whether the verdict reports every fault. Draws docs/soak.png with --picture.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WARM_UP = 0.2  # share of the time
SKIPPED = ("NaNGradient", "InfiniteLoss")  # faults that cost a step; the others cost a rollback


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(folder: Path, minutes: float, every_s: float, overrides: list[str]) -> int:
    """The exit code of the run."""
    command = [
        sys.executable, str(ROOT / "train.py"), "+experiment=stage1", "name=soak", f"paths.outputs={folder}/outputs",
        "optim.total_steps=100000", f"+trainer.max_time={{minutes: {minutes}}}", "data.val_sequences=64",
        "callbacks.spike_rollback.max_rollbacks=1000", "callbacks.spike_rollback.every_n_steps=25",
        "+callbacks.soak._target_=benchmarks.injection.Soak", f"+callbacks.soak.folder={folder}",
        f"+callbacks.soak.every_s={every_s}", *overrides,
    ]  # fmt: skip
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode


def judge(folder: Path, code: int) -> dict[str, Any]:
    """What is asked of the run, with the figures."""
    samples, faults = read(folder / "samples.jsonl"), read(folder / "faults.jsonl")
    end = samples[-1]["seconds"]
    warm = [sample for sample in samples if sample["seconds"] >= WARM_UP * end]
    tenths: list[list[int]] = [[] for _ in range(10)]
    for sample in warm:
        tenths[min(9, int(10 * (sample["seconds"] / end - WARM_UP) / (1 - WARM_UP)))].append(sample["bytes"])
    levels = [statistics.median(tenth) for tenth in tenths if tenth]
    middle = statistics.median(levels)
    report = json.loads(next((folder / "outputs" / "soak").glob("2*/report.json")).read_text())
    skips = sum(fault["kind"] in SKIPPED for fault in faults)
    return {
        "minutes": end / 60,
        "steps": report["steps"],
        "exit_code": code,
        "faults": len(faults),
        "skipped_steps": report["skipped_steps"],
        "skips_expected_at_least": skips,
        "rollbacks": report["rollbacks"],
        "rollbacks_expected_at_least": len(faults) - skips,
        "memory_mib": round(middle / 2**20),
        "memory_spread": max(abs(level / middle - 1) for level in levels),
        "open_files": sorted({sample["files"] for sample in warm}),
        "threads": sorted({sample["threads"] for sample in warm}),
        "verdict": report["verdict"],
    }


def passed(found: dict[str, Any]) -> list[str]:
    """What is wrong; nothing if the soak is passed."""
    wrong = []
    if found["exit_code"] != 0:
        wrong.append(f"exit code {found['exit_code']}")
    if found["memory_spread"] > 0.05:
        wrong.append(f"memory moves by {found['memory_spread']:.1%}")
    if len(found["open_files"]) > 1:
        wrong.append(f"open files {found['open_files']}")
    reported = re.search(r"(\d+) rollbacks? and (\d+) skipped", found["verdict"])
    if not reported or (int(reported[1]), int(reported[2])) != (found["rollbacks"], found["skipped_steps"]):
        wrong.append("the verdict does not report all rollbacks and skipped steps")
    for name in ("rollbacks", "skips"):
        seen = found["rollbacks"] if name == "rollbacks" else found["skipped_steps"]
        if (seen or 0) < found[f"{name}_expected_at_least"]:
            wrong.append(f"{seen} {name} where at least {found[f'{name}_expected_at_least']} faults ask for one")
    return wrong


def draw(folder: Path, target: Path) -> None:
    from matplotlib.figure import Figure

    samples, faults = read(folder / "samples.jsonl"), read(folder / "faults.jsonl")
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([s["seconds"] / 60 for s in samples], [s["bytes"] / 2**20 for s in samples], label="memory, MiB")
    axes.set_xlabel("minutes")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    for i, fault in enumerate(faults):
        axes.axvline(fault["seconds"] / 60, color="tab:red", lw=0.8, label=None if i else "fault")
    files = axes.twinx()
    files.plot([s["seconds"] / 60 for s in samples], [s["files"] for s in samples], color="tab:green")
    files.set_ylabel("open files", color="tab:green")
    files.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    figure.savefig(target, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--every", type=float, default=240, help="seconds between faults")
    parser.add_argument("--folder", type=Path, default=Path("outputs/soak"), help="a new one")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("overrides", nargs="*", help="further settings, as train.py takes them")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True)
    found = judge(folder, train(folder, args.minutes, args.every, args.overrides))
    (folder / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    if args.picture:
        draw(folder, args.picture)
    wrong = passed(found)
    print("passed" if not wrong else "FAILED: " + "; ".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
