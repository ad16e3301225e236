"""Exit gates judge a small real run from end to end; copies of it are spoiled, and each gate is seen to fail."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console

from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.cli import gates as command
from atlas_lm.exit_gates import measured_gates as measures
from atlas_lm.exit_gates import rollback_drill as rollback
from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import Gate, GateResult
from callbacks.support import snapshots
from tests.support.gate_cases import decided


@pytest.fixture
def run(guarded_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with all safeguards, to be spoiled."""
    return Path(shutil.copytree(guarded_run, tmp_path / "run", symlinks=True))


def judged(run: Path, phase: str) -> dict[str, Gate]:
    gates = command.judge(command.PHASES[phase], RunArtifacts(run, run / "decisions.yaml", sequences=4))
    return {gate.id: gate for gate in gates}


def change_config(run: Path, **values: Any) -> None:
    config = OmegaConf.load(run / "config.yaml")
    for name, value in values.items():
        OmegaConf.update(config, name.replace("__", "."), value)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))


def test_a_small_run_is_judged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "decisions.yaml").write_text(json.dumps([decided([4], 1000, model="tiny")]))
    for phase in ("phase2", "phase4"):
        with pytest.raises(SystemExit) as ending:
            command.main([phase, f"run={run}", f"decisions={run / 'decisions.yaml'}", "sequences=4"])
        assert ending.value.code == 1
    results = json.loads((run / "exit_gates.json").read_text())
    assert list(results) == ["phase2", "phase4"]
    assert {key for gates in results.values() for gate in gates for key in gate} == {
        "id", "name", "passed", "measured", "threshold", "detail",
    }  # fmt: skip
    gates = {gate["id"]: gate for found in results.values() for gate in found}
    assert list(gates) == [*(f"G2-{i}" for i in range(1, 8)), "used", *(f"G4-{i}" for i in range(1, 7))]
    used = gates.pop("used")
    assert used == results["phase2"][-1], "it ends both tables"
    assert math.isfinite(used["measured"])
    passed = [name for name, gate in gates.items() if gate["passed"]]
    assert passed == ["G2-1", "G2-3", "G2-6", "G2-7", "G4-1", "G4-2", "G4-3", "G4-4"], gates
    assert gates["G2-4"]["detail"] == "4 steps, 1000 are needed"
    assert "at least 5 are needed" in gates["G2-2"]["detail"]
    assert gates["G2-7"]["detail"] == "3 values in metrics.jsonl, 3 in TensorBoard"
    assert 0 < gates["G4-4"]["measured"] < 0.1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "[G2-1] Chunk sizes... DECIDED ({4}, 1,000 tokens/s)" in lines
    assert "[G2-6] Rollback test... PASSED (forced at step 5, back to step 2 bit for bit, on to step 8)" in lines
    assert f"PHASE 2 SUMMARY: {4 + used['passed']}/8 checkpoints passed" in lines
    assert f"*** {4 - used['passed']} FAILED: G2-2, G2-4, G2-5{'' if used['passed'] else ', used'} ***" in lines
    assert f"PHASE 4 SUMMARY: {4 + used['passed']}/7 checkpoints passed" in lines
    assert "measuring [G4-4] Resolution flat" in err
    assert "WARNING" not in err
    assert "spike:" not in err


def test_a_run_that_did_not_finish_passes_no_gate(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "status": "failed", "error": "OutOfMemoryError: no"}))
    for gate in judged(run, "phase4").values():
        assert not gate.passed
        assert "the run did not finish, it is failed at step 4: OutOfMemoryError: no" in gate.detail


def test_a_run_whose_end_was_not_saved_passes_no_gate(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps({**report, "steps": 5}))
    assert RunArtifacts(run, run).unfinished() == "the newest checkpoint is of step 4, the run ended at 5"
    (run / "report.json").unlink()
    assert "no report.json" in str(RunArtifacts(run, run).unfinished())
    shutil.rmtree(run / "checkpoints")
    assert not any(gate.passed for gate in judged(run, "phase2").values())


def test_what_is_missing_fails_and_is_named(run: Path) -> None:
    config = OmegaConf.load(run / "config.yaml")
    for name in ("niah_probe", "memory_horizon", "proactive_clipping", "spike_rollback", "nonfinite_guard"):
        del config.callbacks[name]
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "tensorboard")
    gates = {**judged(run, "phase2"), **judged(run, "phase4")}
    assert [name for name, gate in gates.items() if gate.passed and name != "used"] == ["G2-3", "G4-4"]
    assert gates["used"].measured is not None, "where the run had no such probe, that of the defaults asks"
    for name, words in {
        "G2-1": "there is no ", "G2-2": "no metrics.jsonl", "G2-4": "no metrics.jsonl",
        "G2-5": "no callbacks.niah_probe",
        "G2-6": "no callbacks.spike_rollback", "G2-7": "no metrics.jsonl", "G4-1": "no callbacks.proactive_clipping",
        "G4-2": "no metrics.jsonl", "G4-3": "no metrics.jsonl", "G4-6": "no callbacks.niah_probe",
    }.items():  # fmt: skip
        assert words in gates[name].detail


def test_half_the_records_are_not_enough(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:1]))
    change_config(run, trainer__log_every_n_steps=1)
    gates = judged(run, "phase4")
    assert all("metrics.jsonl is not complete" in gates[name].detail for name in ("G4-1", "G4-2", "G4-3"))


def test_broken_weights_pass_nothing_that_is_measured(run: Path) -> None:
    path = RunArtifacts(run, run).checkpoint.resolve()
    content = torch.load(path, weights_only=True)
    for tensor in content["state_dict"].values():
        tensor.fill_(math.nan)
    AtomicCheckpointIO().save_checkpoint(content, path)
    for gate in (run / "checkpoints").glob("*.ckpt"):
        if gate.resolve() != path:
            gate.unlink()
    gates = {**judged(run, "phase2"), **judged(run, "phase4")}
    for name in ("G2-3", "G2-5", "G2-6", "G4-4", "G4-5", "G4-6"):
        assert not gates[name].passed, gates[name]
    json.dumps([gate.as_json() for gate in gates.values()], allow_nan=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"callbacks__spike_rollback__mode": "observe"}, "0 rollbacks counted"),
        ({"callbacks__spike_rollback__max_rollbacks": 0}, "max_rollbacks=0"),
        ({"callbacks__spike_rollback___target_": "os.system"}, "must be a class of"),
        ({"data__source___target_": "subprocess.Popen"}, "data.source._target_=subprocess.Popen must be"),
    ],
)
def test_g2_6_fails_where_nothing_rolls_back(run: Path, changes: dict[str, Any], words: str) -> None:
    change_config(run, **changes)
    (check,) = [check for check in command.PHASES["phase2"].checks if check.id == "G2-6"]
    found = command.measure(check, RunArtifacts(run, run))
    assert not found.passed
    assert words in found.detail


def test_g2_6_fails_where_the_weights_do_not_come_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = snapshots.set_model_state_dict

    def nearly(module: Any, state: dict[str, Any]) -> None:
        real(module, state)
        with torch.no_grad():
            weight = next(module.parameters()).view(-1)
            weight[0] = torch.nextafter(weight[0], torch.tensor(math.inf))

    monkeypatch.setattr(snapshots, "set_model_state_dict", nearly)
    found = rollback.forced(RunArtifacts(run, run))
    assert not found.passed
    assert found.detail == "the weights after the return to step 2 are not those of step 2"


def test_the_model_is_measured_at_the_sizes_it_ended_with(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 · 0.9⁴ = 2.6; G4-4 sets its own and puts them back."""
    evidence = RunArtifacts(run, run, sequences=4)
    assert evidence.final_chunks == evidence.module.local_chunks == (2,)
    seen = []
    real = measures.perplexity

    def watched(module: Any, batches: Any) -> float:
        seen.append((module.local_chunks, sum(len(batch["targets"]) for batch in batches)))
        return real(module, batches)

    monkeypatch.setattr(measures, "perplexity", watched)
    measures.resolution(evidence)
    sizes = (1, 4, 8, 16, 16, 16)  # 32 and 64 are longer than this model's shard
    assert seen == [((size,), len(evidence.batches) and 4) for size in sizes]
    assert evidence.module.local_chunks == (2,)
    change_config(run, callbacks__chunk_size_scheduler=None)
    assert RunArtifacts(run, run).final_chunks == (2,), "the checkpoint's, whatever the configuration says"


def test_perplexity_is_that_of_all_scored_tokens(run: Path) -> None:
    evidence = RunArtifacts(run, run, sequences=3)
    (batch,) = evidence.batches
    with torch.no_grad():
        logits = evidence.module(batch).logits
        whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).exp()
        parts = [{name: x[rows] for name, x in batch.items()} for rows in (slice(0, 2), slice(2, 3))]
        assert measures.perplexity(evidence.module, parts) == pytest.approx(float(whole), rel=1e-5)
        nothing = {**batch, "targets": torch.full_like(batch["targets"], -100)}
        assert math.isnan(measures.perplexity(evidence.module, [nothing]))
    assert math.isnan(measures.perplexity(evidence.module, []))


# The command


def test_all_passed_reads_as_in_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    gates = [Gate(check.id, check.name, True, 1.0, "", "x") for check in command.PHASES["phase2"].checks]
    command.show("phase2", gates, Console(highlight=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "PHASE 2: Training Infrastructure",
        "=" * 60,
        "[G2-1] Chunk sizes... DECIDED (x)",
        "[G2-2] NIAH frequency... LOCKED (x)",
    ]
    assert lines[-2:] == ["PHASE 2 SUMMARY: 8/8 checkpoints passed", "*** ALL PHASE 2 CHECKS PASSED ***"]


def test_exit_code_0_when_all_pass(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (command.Check("G2-1", "always", "", lambda run: GateResult(True, math.inf, "fine")),)
    monkeypatch.setitem(command.PHASES, "phase2", command.Phase("PHASE 2: x", checks))
    (run / "exit_gates.json").write_text("{broken")
    command.main(["phase2", f"run={run}"])
    assert json.loads((run / "exit_gates.json").read_text())["phase2"][0]["measured"] == "inf"


def test_a_gate_that_breaks_fails_and_the_others_continue(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(run: RunArtifacts) -> GateResult:
        raise KeyError("a bug")

    phase = command.Phase(
        "x", (command.Check("a", "a", "", broken), command.Check("b", "b", "", lambda run: GateResult(True, 1, "")))
    )
    first, second = command.judge(phase, RunArtifacts(run, run))
    assert (first.passed, second.passed) == (False, True)
    assert "KeyError: 'a bug'" in first.detail
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of phase2, phase4, used, chunk_sizes"),
        (["phase3"], r"did you mean 'phase[24]'"),
        (["phase2"], "run= is missing"),
        (["phase2", "run=nowhere"], "no run 'nowhere'"),
        (["phase2", "run=x", "sequences=0"], "sequences=0 must be at least 1"),
        (["chunk_sizes", "steps=0"], "steps=0 must be at least 1"),
        (["chunk_sizes", "step=1"], "did you mean 'steps'"),
        (["chunk_sizes", "model.memory=none"], "no local memory"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        command.main(arguments)
    assert not list(tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--help"])
    assert "phase4 run=..." in capsys.readouterr().out


def test_used_alone_is_judged_and_fails_without_a_gain(run: Path) -> None:
    """With the writes switched off the past is worth exactly nothing."""
    (gate,) = command.judge(command.PHASES["used"], RunArtifacts(run, run, sequences=4))
    assert gate.id == "used"
    artifacts = RunArtifacts(run, run, sequences=4)
    for block in artifacts.module.model.blocks:
        hierarchy = block.memory.hierarchy
        for memory in (hierarchy.global_memory, *hierarchy.local_memories):
            memory.eta_max = 0.0
        hierarchy.persistent_keys.data.mul_(1e9)  # the projection's own keys are drowned
    (gate,) = command.judge(command.PHASES["used"], artifacts)
    assert not gate.passed
    assert abs(float(gate.measured or 0)) < 1e-5


@pytest.mark.parametrize(("low", "passes"), [(1e-6, True), (0.0, False), (-0.1, False), (math.nan, False)])
def test_used_asks_for_an_interval_above_zero(low: float, passes: bool) -> None:
    assert measures.judge_use(0.2, low, 0.3, 100.0).passed is passes
