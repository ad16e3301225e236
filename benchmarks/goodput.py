"""What faults cost on a cluster: the share of 20 minutes that went into steps that count: python -m benchmarks.goodput

Starts a SLURM of two nodes on this machine (root; slurm-wlm, munge) and trains the same model on both nodes twice: by
train.py with `launcher=slurm`, and by Lightning with its own requeue and ModelCheckpoint. Every four minutes there is a
fault: a signal as before a time limit, a killed process, a lost node, a stopped process. --write puts the table into
docs.

Both save at the same interval. Lightning's batch script has the line of ours that queues a killed job again, without
which it would end at the first kill. A job that was queued again starts ten seconds after its last process in both,
instead of after the two minutes of SLURM.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from atlas_lm.files import ROOT, write_atomically
from benchmarks.figures import inserted

PAGE, NUMBERS = Path("docs") / "results" / "goodput.md", Path("docs") / "results" / "goodput.json"
BEGIN = "<!-- goodput: python -m benchmarks.goodput --write -->"
CLUSTER = ROOT / "tests" / "slurm"
SAVE_EVERY = 50  # steps
# seconds in the queue after the last process has ended; sooner a node refuses the job, whose credential it has just
# revoked, or takes the new step for the old one, and half of the ranks never start
RELEASE_AFTER = 10.0
NODE_LOST = 40.0  # seconds until the node that was lost is back; SLURM gives it up after 20
TRAINING = [
    "+experiment=stage1", "data.batch_size=1", "optim.total_steps=100000", "trainer.val_check_interval=1000",
    "callbacks.niah_probe.every_n_steps=1000", "callbacks.memory_horizon.every_n_steps=1000",
    "callbacks.memory_contribution.every_n_steps=1000",
]  # fmt: skip
OURS = [
    "launcher=slurm", "trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1",
    f"callbacks.step_checkpoint.every_n_steps={SAVE_EVERY}", "+callbacks.goodput._target_=benchmarks.goodput.Clock",
]  # fmt: skip
KINDS = {"ours": "atlas-lm", "lightning": "Lightning's requeue"}
KEYWORD = "ATLAS_LM_GOODPUT"  # the environment's name for the folder of the clocks


class Clock(Callback):
    """Writes when each step began and ended, a file for each process of rank 0."""

    def __init__(self) -> None:
        self._began = 0.0
        self._file: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._began = time.time()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.is_global_zero:
            if self._file is None:
                path = Path(os.environ[KEYWORD]) / f"clock-{time.time():.3f}-{os.getpid()}.txt"
                self._file = path.open("w", buffering=1)
            self._file.write(f"{trainer.global_step} {self._began} {time.time()}\n")


class Step(NamedTuple):
    """The optimizer step that a process finished, and when."""

    number: int
    began: float
    ended: float


@dataclass
class Record:
    """Of a run: seconds since 1970."""

    begin: float
    end: float
    attempts: list[list[Step]] = field(default_factory=list)  # one list a process, in order of time
    running: list[tuple[float, float]] = field(default_factory=list)  # when the job ran
    faults: list[tuple[float, str]] = field(default_factory=list)


@dataclass
class Parts:
    """Seconds of the whole time."""

    counted: float = 0.0  # in steps that count
    between: float = 0.0  # from one step to the next: data, validation, saving, probes
    repeated: float = 0.0  # in steps that were done again, and in the one that a fault cut
    detection: float = 0.0  # from a fault, or the last step after it, to where SLURM no longer has the job as running
    queue: float = 0.0  # until the job runs again
    restore: float = 0.0  # until its first step begins; of the first start too

    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


def parts_of(record: Record) -> Parts:
    """Where the time went, from `begin` to `end`; the parts sum to it.

    A step counts where it was finished last. ValueError: none was.
    """
    steps = [step for steps in record.attempts for step in steps if step.ended <= record.end]
    if not steps:
        raise ValueError("no step was finished")
    last = {step.number: step.ended for step in sorted(steps, key=lambda step: step.ended)}
    found, now = Parts(), record.begin
    for began, ended in record.running:
        found.queue += began - now
        inside = sorted((s for s in steps if began <= s.began and s.ended <= ended), key=lambda s: s.began)
        now = began
        for i, step in enumerate(inside):
            spent = step.ended - step.began
            if last[step.number] == step.ended:
                found.counted += spent
            else:
                found.repeated += spent
            if i:
                found.between += step.began - now
            else:
                found.restore += step.began - now
            now = step.ended
        fault = next((at for at, _ in record.faults if now <= at < ended), None)
        if fault is not None:  # what was under way is lost
            if inside:
                found.repeated += fault - now
            else:
                found.restore += fault - now
            now = fault
        elif not inside:
            found.restore += ended - now
            now = ended
        elif ended == record.end and not any(began <= at < ended for at, _ in record.faults):
            # a step that was under way when time was up
            found.between += ended - now
            now = ended
        found.detection += ended - now
        now = ended
    found.queue += record.end - now
    return found


def table(found: dict[str, Parts]) -> str:
    """Markdown."""
    lines = ["| | goodput | steps that count | between steps | repeated steps | detection | queue | restore | sum |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for kind, parts in found.items():
        seconds = (
            parts.counted, parts.between, parts.repeated, parts.detection, parts.queue, parts.restore, parts.total()
        )  # fmt: skip
        cells = " | ".join(f"{value:.0f} s" for value in seconds)
        lines.append(f"| {KINDS[kind]} | **{parts.counted / parts.total():.1%}** | {cells} |")
    return "\n".join(lines)


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """A SLURM of two nodes for as long as it takes. RuntimeError: it does not start."""
    up = subprocess.run([CLUSTER / "up.sh", folder], capture_output=True, text=True, timeout=120)
    if up.returncode:
        raise RuntimeError(f"SLURM does not start: {up.stderr.strip()[-300:]}")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    try:
        yield folder
    finally:
        subprocess.run([CLUSTER / "down.sh", folder], capture_output=True, timeout=60)


def submit_ours(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), *TRAINING, *OURS, "name=goodput", f"paths.outputs={folder}"]
    with (folder / "submitted.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def submit_lightning(folder: Path) -> subprocess.Popen[bytes]:
    script = folder / "job.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --open-mode=append\n"
        f"#SBATCH --output={folder}/job.log\n"
        "trap 'code=$?; [ $code -ge 128 ] && scontrol requeue $SLURM_JOB_ID' EXIT\n"
        f"srun {sys.executable} -m benchmarks.goodput_lightning {folder}\n"
    )
    return subprocess.Popen(["sbatch", "--wait", str(script)], cwd=ROOT, stdout=subprocess.DEVNULL)


def signal_of_limit(job: str, _: Path) -> None:
    """As SLURM sends it before a time limit."""
    slurm("scancel", "--signal=USR1", job)


def kill(job: str, _: Path) -> None:
    """One process of the job, as the kernel does when memory ends."""
    os.kill(trainers()[0], signal.SIGKILL)


def lose_node(job: str, folder: Path) -> None:
    """SLURM hears no more of the second node; it comes back."""
    os.kill(int((folder / "slurmd-n2.pid").read_text()), signal.SIGKILL)
    command = ["slurmd", "-N", "n2", "-f", str(folder / "slurm.conf")]
    threading.Timer(NODE_LOST, subprocess.run, [command]).start()


def stop(job: str, _: Path) -> None:
    """One process stands still, without an end."""
    os.kill(trainers()[-1], signal.SIGSTOP)


FAULTS: dict[str, Callable[[str, Path], None]] = {
    "a signal as before a time limit": signal_of_limit, "a process killed": kill, "a node lost": lose_node,
    "a process stopped": stop,
}  # fmt: skip


def trainers() -> list[int]:
    """The processes of all ranks, by rank."""
    found: dict[str, tuple[int, int]] = {}  # rank → when it began, and its number
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(entry.partition("=")[::2] for entry in (folder / "environ").read_text().split("\0"))
            name, _, after = (folder / "stat").read_text().rpartition(")")
        except (OSError, UnicodeDecodeError):  # it has ended
            continue
        rank = environment.get("SLURM_PROCID")
        if rank is not None and KEYWORD in environment and "python" in name:
            one = int(after.split()[19]), int(folder.name)
            found[rank] = min(found.get(rank, one), one)  # its own children are younger
    return [found[rank][1] for rank in sorted(found)]


def job_state(job: str) -> str:
    shown = slurm("scontrol", "show", "job", job)
    return next((word.partition("=")[2] for word in shown.split() if word.startswith("JobState=")), "")


def measure(kind: str, folder: Path, at: Path, minutes: float, every: float) -> Record:
    """Train for so long with a fault at each interval. RuntimeError: no job was submitted."""
    folder.mkdir(parents=True)
    clocks = folder / "clocks"
    clocks.mkdir()
    os.environ |= {KEYWORD: str(clocks), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = submit_ours(folder) if kind == "ours" else submit_lightning(folder)
    job, deadline = "", time.time() + 120
    while not job:
        job = slurm("squeue", "--noheader", "--format=%A").partition("\n")[0]
        if time.time() > deadline:
            raise RuntimeError(f"no job after two minutes: see {folder}")
        time.sleep(0.2)
    record = Record(begin=time.time(), end=time.time() + 60 * minutes)
    due = [(record.begin + 60 * every * (n + 1), *item) for n, item in enumerate(FAULTS.items())]
    due = [item for item in due if item[0] < record.end - 1]
    since: float | None = None
    waits = record.begin
    while time.time() < record.end:
        state, now = job_state(job), time.time()
        if state == "RUNNING" and since is None:
            since = now
        elif state != "RUNNING" and since is not None:
            record.running.append((since, now))
            since = None
        waits = now if state != "PENDING" or trainers() else waits
        if now - waits > RELEASE_AFTER:
            slurm("scontrol", "update", f"JobId={job}", "StartTime=now")
            waits = now
        trains = since is not None and any(path.stat().st_mtime > since for path in clocks.iterdir())
        if due and now >= due[0][0] and trains:
            _, name, act = due.pop(0)
            record.faults.append((now, name))
            print(f"{KINDS[kind]}: {name} at {now - record.begin:.0f} s", file=sys.stderr, flush=True)
            act(job, at)
        time.sleep(0.25)
    if since is not None:
        record.running.append((since, record.end))
    for process_id in trainers():  # one that stands still answers to nothing else
        os.kill(process_id, signal.SIGKILL)
    slurm("scancel", job)
    process.kill()
    process.wait()
    for path in sorted(clocks.iterdir()):
        rows = [line.split() for line in path.read_text().splitlines()]
        record.attempts.append([Step(int(n), float(a), float(b)) for n, a, b in rows])
    return record


def main(arguments: list[str] | None = None, root: Path = ROOT) -> None:
    """Measure both, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/goodput"))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=4, help="minutes from fault to fault")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--write", action="store_true", help="into docs/results")
    options = parser.parse_args(arguments)
    asked: dict[str, Any] = {"minutes": options.minutes, "every": options.every, "save_every_steps": SAVE_EVERY}
    content = json.loads((root / NUMBERS).read_text(encoding="utf-8")) if (root / NUMBERS).is_file() else {}
    if {name: content.get(name) for name in asked} != asked:  # rows of another measurement do not stand beside these
        content = asked
    out = options.out.absolute() / f"{time.time():.0f}"
    for kind in options.kinds:
        with cluster(out / f"cluster-{kind}") as at:
            record = measure(kind, out / kind, at, options.minutes, options.every)
        parts = parts_of(record)
        faults = [{"seconds": round(when - record.begin, 1), "fault": name} for when, name in record.faults]
        steps = max(step.number for steps in record.attempts for step in steps)
        content[kind] = {**vars(parts), "steps": steps, "attempts": len(record.attempts), "faults": faults}
        print(table({kind: parts}), flush=True)
    if options.write:
        names = [entry.name for entry in fields(Parts)]
        found = {kind: Parts(*(content[kind][name] for name in names)) for kind in KINDS if kind in content}
        page = (root / PAGE).read_text(encoding="utf-8")
        write_atomically(root / PAGE, inserted(page, table(found), BEGIN))
        write_atomically(root / NUMBERS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
