"""The first 20 losses of each experiment at a fixed seed: a change of numbers needs a reason in the commit message.

To write them again: python -m tests.integration.test_golden
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

from atlas_lm.loggers.jsonl import read_rows
from tests.support import ROOT
from tests.support.latent_toys import write_npz
from tests.support.launching import launch, only_run

GOLDEN = ROOT / "tests" / "golden"
STEPS = 20
COMMON = [
    f"optim.total_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "trainer.log_every_n_steps=1",
    "precision=32-true", "data.batch_size=2", "data.val_sequences=2", "seed=0",
]  # fmt: skip
# text that is the same with every Python: the standard library's source is not
TEXT = ["data=text", "data.source.files=['corpus/*.txt']", "data.seq_len=512", "data.batch_size=2"]
FAST = ["optim.warmup_steps=1"]  # within its own warm-up recall would hardly move
NEEDLES = ["data.source.text._target_=atlas_lm.data.text.TextSource", "+data.source.text.files=['corpus/*.txt']", *FAST]
# vectors of our own making: an embedder's depend on the machine
LATENT = [
    "data.source.path=vectors.npz",
    "trainer.check_val_every_n_epoch=null",
    "optim.warmup_steps=1",
    "callbacks.spike_rollback.rows=2",
]
SPECIFIC = {
    "stage1": TEXT, "stage1_twin": TEXT, "stage2": TEXT, "recall": FAST, "recall_twin": FAST,
    "needles": NEEDLES, "needles_twin": NEEDLES,
    **dict.fromkeys(("latent_p1", "latent_p2", "latent_v3", "latent_memory"), LATENT),
}  # fmt: skip
STARTS_FROM = {"stage2": "stage1"}
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def write_sums(folder: Path) -> None:
    """Forty files of additions, from a generator of our own seed."""
    folder.mkdir()
    rng = random.Random(0)
    for i in range(40):
        pairs = [(rng.randrange(1000), rng.randrange(1000)) for _ in range(120)]
        (folder / f"{i}.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a, b in pairs))


def first_losses(experiment: str, steps: int = STEPS) -> list[float]:
    """Losses of a run in the working directory, which is stopped after `steps` of its STEPS."""
    write_sums(Path("corpus"))
    write_npz(Path("vectors.npz"))
    if experiment in STARTS_FROM:
        before = STARTS_FROM[experiment]
        assert launch(f"+experiment={before}", *SPECIFIC[before], *COMMON, "optim.total_steps=2") == 0
    stop = [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]
    assert launch(f"+experiment={experiment}", *SPECIFIC.get(experiment, []), *COMMON, *stop) == 0
    rows = read_rows(only_run(Path("outputs"), experiment) / "metrics.jsonl")
    return [row["lm_loss"] for row in rows if row["lm_loss"] is not None]


@pytest.mark.parametrize("steps", [6, pytest.param(STEPS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_first_losses(experiment: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    golden = json.loads((GOLDEN / f"{experiment}.json").read_text())
    losses = first_losses(experiment, steps)
    assert len(losses) == steps
    # the order of sums differs between processors, and twenty steps amplify it
    assert losses == pytest.approx(golden[:steps], rel=2e-3)


if __name__ == "__main__":
    sys.argv = ["train.py"]
    for name in EXPERIMENTS:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            (GOLDEN / f"{name}.json").write_text(json.dumps([round(x, 5) for x in first_losses(name)]) + "\n")
