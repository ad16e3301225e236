"""Next-vector prediction through train.py: resumed bit for bit, rolled back, guarded, and refused in one line."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_lm.cli import evaluate, generate, latent
from atlas_lm.latent.module import LatentModule
from atlas_lm.loggers.jsonl import read_rows
from tests.support.latent_toys import turning_documents, write_npz
from tests.support.launching import launch, only_run, report_of
from tests.support.resuming import TIMED, Killed, assert_equal, die_at

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")

SMALL = [
    "model.dim=32", "model.layers=1", "model.heads=2", "model.head_dim=16", "model.memory_hidden=16",
    "data.source.path=vectors.npz", "data.batch_size=64", "data.val_batch_size=64",
    "optim.warmup_steps=2", "optim.lr=1e-2",
    "trainer.log_every_n_steps=1", "callbacks.spike_rollback.rows=64", "callbacks.progress.every_n_seconds=0",
]  # fmt: skip
# some 64 documents of 19 windows: 19 steps or so an epoch
OFTEN = [
    "optim.total_steps=36", "callbacks.step_checkpoint.every_n_steps=5", "callbacks.spike_rollback.every_n_steps=4",
    "callbacks.spike_rollback.threshold=0.5",
]  # fmt: skip
GUARDED = ["callbacks.loss_weight_schedule.stages=[{epoch: 2, direction: 0.002, future: 0.002}]"]


def fit(in_tmp: Path, experiment: str, *overrides: str, name: str = "x") -> int:
    if not (in_tmp / "vectors.npz").exists():
        write_npz(in_tmp / "vectors.npz", turning_documents(80))
    return launch(f"+experiment={experiment}", f"name={name}", *SMALL, *overrides)


def records(run: Path) -> list[dict[str, Any]]:
    rows = read_rows(run / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


@pytest.mark.long
@pytest.mark.parametrize("experiment", ["latent_p2", "latent_memory"])
@pytest.mark.parametrize(
    "batch", [pytest.param(9, marks=pytest.mark.slow), 23, pytest.param(31, marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_bit_for_bit_the_whole_one(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, batch: int
) -> None:
    """Guards from the second epoch on; the probe, validations, saves and snapshots fall on different steps."""
    more = ["data.batch_size=4", "data.val_batch_size=4"] if experiment == "latent_memory" else []
    assert fit(in_tmp, experiment, *OFTEN, *GUARDED, *more, name="whole") == 0
    with pytest.MonkeyPatch.context() as patched:

        def kill() -> None:
            raise Killed

        die_at(batch, patched, kill, LatentModule)
        with pytest.raises(Killed):
            fit(in_tmp, experiment, *OFTEN, *GUARDED, *more, name="cut")
    assert fit(in_tmp, experiment, *OFTEN, *GUARDED, *more, "resume=auto", name="cut") == 0
    whole, cut = (only_run(in_tmp / "outputs", name) for name in ("whole", "cut"))
    a, b = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, cut))
    # Resumed where an epoch and its validation end at one step, Lightning draws a seed more for a loader; nothing here
    # draws from that generator after the start
    at_epoch_end = experiment == "latent_memory" and batch == 31
    random_state = () if at_epoch_end else ("random_state",)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", *random_state, "global_step"):
        assert_equal(a[part], b[part], part)
    for one, other in zip(records(whole), records(cut), strict=True):
        assert one == other
    for name in ("status", "val_cosine", "val_recall_at_5", "steps", "tokens", "rollbacks", "margin", "drift"):
        assert report_of(whole)[name] == report_of(cut)[name], name
    ratios = [row["latent/guard_ratio"] for row in records(whole) if "latent/guard_ratio" in row]
    assert len(ratios) > 10, "the guards were on"


def faulty(monkeypatch: pytest.MonkeyPatch, at: int, fault: Any) -> None:
    """`fault(module, loss)` acts on the loss of one batch of the whole run."""
    step, seen = LatentModule.training_step, []

    def spoiled(self: Any, batch: Any, index: int) -> Any:
        loss = step(self, batch, index)
        seen.append(index)
        return fault(self, loss) if len(seen) - 1 == at else loss

    monkeypatch.setattr(LatentModule, "training_step", spoiled)


def test_a_loss_that_is_not_finite_is_skipped(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 5, lambda module, loss: loss * math.nan)
    assert fit(in_tmp, "latent_p2", *OFTEN) == 0
    found = report_of(only_run(in_tmp / "outputs"))
    assert (found["status"], found["skipped_steps"], found["rollbacks"]) == ("finished", 1, 0)


def spoiled_head(module: Any, loss: torch.Tensor) -> torch.Tensor:
    module.model.leave.weight.data.neg_()
    return loss


def test_spoiled_weights_are_rolled_back_though_the_mean_squared_error_hardly_moves(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over 16 dimensions (384 in earnest) of an error of at most 4: its exponential would not rise by 5 %."""
    faulty(monkeypatch, 26, spoiled_head)
    watch = ["callbacks.spike_rollback.threshold=0.05", "~callbacks.weight_integrity"]
    assert fit(in_tmp, "latent_p1", *OFTEN, *watch) == 0
    run = only_run(in_tmp / "outputs")
    assert report_of(run)["rollbacks"] == 1
    assert "1 rollback on the way" in report_of(run)["verdict"]
    assert report_of(run)["val_cosine"] > 0.7


def test_a_flipped_weight_is_noticed(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 20, spoiled_head)
    assert fit(in_tmp, "latent_p1", *OFTEN) == 0
    rows = records(only_run(in_tmp / "outputs"))
    assert any(row.get("weight_integrity/corruptions") == 1 for row in rows)


def test_what_cannot_recover_ends_with_1_and_a_verdict(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, 5, lambda module, loss: loss * math.nan)
    assert fit(in_tmp, "latent_p1", *OFTEN, "callbacks.nonfinite_guard.max_consecutive=0") == 1
    assert report_of(only_run(in_tmp / "outputs"))["verdict"].startswith("FAILED")


@pytest.mark.long
def test_forced_drift_takes_the_guards_away(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second epoch on the head predicts the frame before the context: nothing that the guards could mend."""
    found = LatentModule.offset_cosines

    def backward(self: Any, batch: Any, offsets: Any) -> Any:
        cosines = found(self, batch, offsets)
        return torch.where(torch.tensor([k == -5 for k in offsets]), torch.ones_like(cosines), cosines)

    monkeypatch.setattr(LatentModule, "offset_cosines", backward)
    stages = "callbacks.loss_weight_schedule.stages=[{epoch: 1, direction: 0.002, future: 0.002}]"
    assert fit(in_tmp, "latent_p2", *OFTEN, stages, "optim.total_steps=90") == 0
    rows = records(only_run(in_tmp / "outputs"))
    guarded = [row["epoch"] for row in rows if row.get("latent/guard_ratio") is not None]
    assert max(guarded) == 2, "epochs are counted from 0 here: the probe acts after the third"
    assert report_of(only_run(in_tmp / "outputs"))["drift"] == 1


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))])
def test_no_clean_run_backs_off(in_tmp: Path, seed: int) -> None:
    assert fit(in_tmp, "latent_p2", *OFTEN, *GUARDED, f"seed={seed}", "optim.total_steps=110") == 0
    rows = records(only_run(in_tmp / "outputs"))
    drift = [row["five_cat_probe/drift"] for row in rows if row.get("five_cat_probe/drift") is not None]
    assert len(drift) >= 4
    assert not any(drift)
    scales = [row["latent/guard_scale"] for row in rows if row.get("latent/guard_scale") is not None]
    assert len(scales) > 20


def test_a_changed_embedder_is_refused_when_a_run_is_resumed(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(in_tmp / "vectors.npz", turning_documents(80), embedder=np.array("one"))
    assert fit(in_tmp, "latent_p1", "optim.total_steps=5", "callbacks.step_checkpoint.every_n_steps=5") == 0
    run = only_run(in_tmp / "outputs")
    write_npz(in_tmp / "vectors.npz", turning_documents(80), embedder=np.array("other"))
    assert fit(in_tmp, "latent_p1", f"resume={run}", "optim.total_steps=9") == 1
    assert fit(in_tmp, "latent_p1", f"init_from={run}", "optim.total_steps=9", name="y") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert all("embedder other but one" in line for line in errors)


WRONG = {
    "module=atlas": "module=latent",
    "data.source.context=9": "context=9",
    "data.seq_len=3": "seq_len=3",
    "data.source.path=nowhere": "atlas_lm embed",
    "module.trunk=lstm": "module.trunk=lstm",
    "module.guard_cap=-1": "guard_cap=-1",
    "callbacks.five_cat_probe.samples=0": "samples=0",
    "callbacks.loss_weight_schedule.stages=[{direction: 1}]": "epoch",
    "data.source.validation_fraction=1e-9": "validation_fraction",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_does_not_fit_is_said_in_one_line(in_tmp: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    assert fit(in_tmp, "latent_p1", override, "optim.total_steps=2") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert WRONG[override] in errors[0]


def test_text_is_not_for_this_module(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("data=recall", "module=latent") == 1
    assert "data=embeddings goes with module=latent" in capsys.readouterr().err


# python -m atlas_lm latent five_cat


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of P2 and of the memory on the same vectors."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(sys, "argv", ["train.py"])
        write_npz(folder / "other.npz", turning_documents(20, seed=5))
        of_both = ["data.source.out_of_domain=other.npz", "optim.total_steps=80"]
        assert fit(folder, "latent_p2", *of_both, name="p2") == 0
        assert fit(folder, "latent_memory", *of_both, "data.batch_size=4", "data.seq_len=24", name="memory") == 0
    return folder


@pytest.fixture
def runs(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory."""
    shutil.copytree(trained, tmp_path / "work", symlinks=True)
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.mark.long
def test_runs_are_tested_beside_the_oracle_and_the_baselines(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:  # ridge knows the rotation
        latent.main(["five_cat", "run=p2,memory", "samples=200"])
    assert ending.value.code == 1
    out = capsys.readouterr().out
    written = only_run(runs / "outputs", "p2")
    content = json.loads((written / "five_cat.json").read_text())
    names = [row["name"] for row in content["rows"]]
    assert names == [
        "oracle", "train mean", "last frame", "context mean", "scalar mix", "ridge", "kNN", "p2",
        "p2, shuffled context", "p2, reversed context", "memory", "memory, shuffled context",
        "memory, reversed context", "memory, context alone",
    ]  # fmt: skip
    by_name = {row["name"]: row for row in content["rows"]}
    assert all(by_name["oracle"]["passed"].values())
    assert not all(by_name["last frame"]["passed"].values())
    assert content["verdicts"]["p2"]["holds"] is False
    assert by_name["p2"]["held_out"]["chance"]["recall_at_5"] == pytest.approx(5 / 19)
    assert (written / "five_cat.md").read_text().strip() in out
    assert (written / "five_cat.png").stat().st_size > 5000
    assert [line.split()[1] for line in out.splitlines() if line.startswith("verdict:")] == ["p2", "memory"]


def test_what_a_run_logged_is_what_the_tests_find(runs: Path) -> None:
    """The last validation and five_cat on the validation split measure the same thing in the same way."""
    with pytest.raises(SystemExit):
        latent.main(["five_cat", "run=p2", "samples=50", "split=validation", "out=found"])
    content = json.loads((runs / "found" / "five_cat_validation.json").read_text())
    row = next(row for row in content["rows"] if row["name"] == "p2")
    report = report_of(only_run(runs / "outputs", "p2"))
    assert row["held_out"]["cosine"][0] == pytest.approx(report["val_cosine"], abs=1e-5)
    assert row["held_out"]["recall_at_5"][0] == pytest.approx(report["val_recall_at_5"], abs=1e-6)
    assert row["held_out"]["accuracy"][0] == pytest.approx(report["val_contrastive_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "why"),
    [(["run=p2"], "five_cat"), (["five_cat"], "run="), (["five_cat", "run=nope"], "nope"),
     (["five_cat", "run=p2", "split=train"], "split=train"), (["five_cat", "run=p2", "samples=0"], "samples=0")],
)  # fmt: skip
def test_wrong_arguments_are_named(runs: Path, words: list[str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        latent.main(words)


def test_vectors_that_have_changed_are_refused(runs: Path) -> None:
    for name in ("vectors.npz", "other.npz"):
        write_npz(runs / name, turning_documents(80, dim=9))
    with pytest.raises(ValueError, match="9 dimensions"):
        latent.main(["five_cat", "run=p2"])
    (runs / "vectors.npz").unlink()
    with pytest.raises(ValueError, match="not there"):
        latent.main(["five_cat", "run=p2"])


def test_a_run_that_predicts_tokens_is_refused(runs: Path, basic_run: Path) -> None:
    with pytest.raises(ValueError, match="predicts tokens"):
        latent.main(["five_cat", f"run={basic_run}"])
    with pytest.raises(ValueError, match=r"not trained on text|predicts vectors"):
        generate.main(["run=p2", "prompt=x"])
    with pytest.raises(ValueError, match="predicts vectors"):
        evaluate.main(["run=p2"])


def test_a_configuration_that_names_another_class_is_refused(runs: Path) -> None:
    path = only_run(runs / "outputs", "p2") / "config.yaml"
    path.write_text(path.read_text().replace("atlas_lm.latent.source.EmbeddingSource", "os.system"))
    with pytest.raises(ValueError, match="EmbeddingSource"):
        latent.main(["five_cat", "run=p2"])
