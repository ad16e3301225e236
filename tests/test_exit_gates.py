"""Exit gates: each is seen to fail, also for want of anything to judge; a small real run is judged from end to end."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from atlas_lm.checkpoints.io import AtomicCheckpointIO
from atlas_lm.cli import gates as command
from atlas_lm.config.schema import ModelConfig
from atlas_lm.config.validate import check_targets
from atlas_lm.exit_gates import chunk_sizes
from atlas_lm.exit_gates import measured_gates as measures
from atlas_lm.exit_gates import recorded_gates as records
from atlas_lm.exit_gates import rollback_drill as rollback
from atlas_lm.exit_gates.artifacts import RunArtifacts, uncovered
from atlas_lm.exit_gates.result import Gate, GateResult
from atlas_lm.loggers.jsonl import row
from atlas_lm.memory.projection import ProjectionState
from callbacks.proactive_clipping import ProactiveClipping
from callbacks.support import snapshots
from launching import SMALL_MODEL, with_all_safeguards

Rows = list[dict[str, Any]]


def rows_of(*steps: dict[str, float]) -> Rows:
    """Rows of metrics.jsonl, one per dict of metrics."""
    return [row(i, 0.0, metrics, seq=i) for i, metrics in enumerate(steps)]


# Judged by records


def probes(count: int, *overheads: float, accuracy: float = 0.9) -> Rows:
    found = [{"niah/accuracy": accuracy, "niah/overhead_percent": 0.5}] * (count - len(overheads))
    return rows_of(*found, *({"niah/accuracy": accuracy, "niah/overhead_percent": percent} for percent in overheads))


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        (probes(5), True),
        (probes(5, 0.99), True),
        (probes(5, 7.0, 0.3), True),  # the last one counts
        (probes(5, 1.0), False),
        (probes(4), False),
        (probes(6, accuracy=math.nan), False),
    ],
)
def test_g2_2_the_probe_is_cheap_and_frequent(rows: Rows, passes: bool) -> None:
    assert records.probe_overhead(rows, 200).passed is passes


@pytest.mark.parametrize("rows", [[], rows_of({"train/loss": 1.0}), probes(6, math.nan)])
def test_g2_2_no_overhead_is_no_low_overhead(rows: Rows) -> None:
    with pytest.raises(ValueError, match="niah/overhead_percent"):
        records.probe_overhead(rows, 200)


FINISHED = {"status": "finished", "steps": 1000, "error": None}
LOSSES = [{"train/loss": 2.0, "val/loss": 2.0}] * 3


@pytest.mark.parametrize(
    ("report", "metrics", "guarded", "words"),
    [
        ({}, LOSSES, True, None),
        ({"steps": 999}, LOSSES, True, "999 steps, 1000 are needed"),
        ({"status": "failed", "error": "OutOfMemoryError: no"}, LOSSES, True, "failed: OutOfMemoryError"),
        ({"status": "interrupted"}, LOSSES, True, "interrupted"),
        ({"status": None, "steps": None}, LOSSES, True, "0 steps"),
        ({}, [], True, "no finite lm_loss"),
        ({}, [{"train/loss": math.nan}], True, "train/loss was not finite 1 times"),
        ({}, [*LOSSES, {"val/loss": math.inf}], True, "val/loss was not finite"),
        ({}, [*LOSSES, {"spike/ppl_delta": math.inf}], True, "spike/ppl_delta was not finite"),
        ({}, [*LOSSES, {"guard/skipped_steps": 2.0}], True, "2 steps skipped"),
        ({}, LOSSES, False, "nonfinite_guard"),
    ],
)
def test_g2_4_a_stable_run(report: dict[str, Any], metrics: Rows, guarded: bool, words: str | None) -> None:
    found = records.stability({**FINISHED, **report}, rows_of(*metrics), guarded)
    assert found.passed is (words is None)
    assert (words or "no NaN, no OOM") in found.detail


@pytest.mark.parametrize(
    ("deltas", "on_board", "passes"),
    [([0.1, 0.2], 2, True), ([0.1, math.inf], 2, True), ([0.1, 0.2], 1, False), ([], 0, False), ([math.nan], 1, False)],
)
def test_g2_7_deltas_are_on_both_sides(deltas: list[float], on_board: int, passes: bool) -> None:
    rows = rows_of({"train/loss": 1.0}, *({"spike/ppl_delta": delta} for delta in deltas))
    assert records.deltas_visible(rows, on_board).passed is passes


def test_g2_7_counts_the_scalars_of_all_event_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        records.board_values(tmp_path, "spike/ppl_delta")
    for suffix, steps in (("a", (0, 100, 200)), ("b", (150, 300))):  # the second goes back, as a resumed run does
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=suffix) as writer:
            for step in steps:
                writer.add_scalar("spike/ppl_delta", 0.1, step)
                writer.add_scalar("spike/ppl", 9.0, step)
    assert records.board_values(tmp_path, "spike/ppl_delta") == 5
    assert records.board_values(tmp_path, "niah/accuracy") == 0


def clipped(chunk: float, factor: float = 1.0) -> dict[str, float]:
    threshold = 0.5 * math.sqrt(32 / chunk) * factor if chunk else 1.0
    return {"memory/chunk_size": chunk, "optim/clip_threshold": float(torch.tensor(threshold))}  # float32, as logged


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ([clipped(32), clipped(7), clipped(7, 0.5), {"memory/chunk_size": 3.0}], None),
        ([clipped(32), clipped(7, 1.00001)], "step 1, chunk 7: clipped at"),
        ([clipped(32), clipped(7, 0.25)], "the formula says"),
        ([], "0 rows"),
        ([{"memory/chunk_size": 3.0}, {"optim/clip_threshold": 0.5}], "0 rows"),
        ([clipped(32), {"memory/chunk_size": 3.0, "optim/clip_threshold": math.nan}], "1 not finite"),
    ],
)
def test_g4_1_the_run_clipped_by_the_formula(metrics: Rows, words: str | None) -> None:
    found = records.clip_formula(ProactiveClipping(), 0.5, rows_of(*metrics))
    assert found.passed is (words is None)
    assert (words or "3 rows at 2 chunk sizes, 1 halved") in found.detail


def test_g4_1_another_formula_fails() -> None:
    class Off(ProactiveClipping):
        def threshold(self, chunk: int) -> float:
            return math.nextafter(super().threshold(chunk), math.inf) if chunk == 17 else super().threshold(chunk)

    rows = rows_of(clipped(32))
    assert "[17]" in records.clip_formula(Off(), 0.5, rows).detail
    wrong = [
        records.clip_formula(Off(), 0.5, rows),
        records.clip_formula(ProactiveClipping(reference_chunk=64), 0.5, rows),
        records.clip_formula(ProactiveClipping(kappa_base=0.6), 0.6, rows),
    ]
    assert not any(found.passed for found in wrong)


@pytest.mark.parametrize(("last", "passes"), [(0.0, True), (3.0, True), (4.0, False)])
def test_g4_2_few_rollbacks(last: float, passes: bool) -> None:
    rows = rows_of({"spike/rollbacks": 0.0}, {"spike/rollbacks": last}, {"train/loss": 1.0})
    assert records.few_rollbacks(rows, "act").passed is passes
    assert not records.few_rollbacks(rows, "observe").passed


@pytest.mark.parametrize(("last", "passes"), [(0.0, True), (9.0, True), (10.0, False)])
def test_g4_3_few_spikes(last: float, passes: bool) -> None:
    assert records.few_spikes(rows_of({"spike/count": 0.0}, {"spike/count": last})).passed is passes


@pytest.mark.parametrize("metrics", [[{"train/loss": 1.0}], [{"spike/count": math.nan, "spike/rollbacks": math.nan}]])
def test_g4_2_and_3_what_was_not_counted_is_not_zero(metrics: Rows) -> None:
    with pytest.raises(ValueError, match="spike/rollbacks"):
        records.few_rollbacks(rows_of(*metrics), "act")
    with pytest.raises(ValueError, match="spike/count"):
        records.few_spikes(rows_of(*metrics))


def test_records_have_to_cover_the_run() -> None:
    """Logged every 10 steps, as Lightning does: at steps 9, 19, …"""
    rows = [{"step": step, "train/loss": None if step == 9 else 1.0} for step in range(9, 100, 10)]
    assert uncovered(rows, 100, 10) is None
    assert uncovered([*rows, {"step": 109, "train/loss": 1.0}], 100, 10) is None, "after a rollback"
    assert "30 are missing after 70" in str(uncovered(rows[:7], 100, 10))
    assert "40 are missing after 50" in str(uncovered(rows[:5] + rows[8:], 100, 10))
    assert "60 are missing after 0" in str(uncovered(rows[5:], 100, 10)), "begun by another run"
    assert "no training loss" in str(uncovered([{"step": 5, "val/loss": 1.0}], 100, 10))


# Measured on the model


def test_g2_3_the_reset_restores_m_and_n() -> None:
    keys = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    streamed, reset = measures.reset_of(keys)
    assert measures.judge_reset(keys, streamed, reset) is None
    assert streamed.n.flatten().tolist() == pytest.approx((keys.square().sum((1, 2)) + measures.STREAM).tolist())

    off_n = ProjectionState(reset.M, torch.nextafter(reset.n, torch.tensor(math.inf)))
    off_M = ProjectionState(torch.nextafter(reset.M, torch.tensor(math.inf)), reset.n)
    assert "norm_persistent" in str(measures.judge_reset(keys, streamed, off_n))
    assert "M is not m_persistent" in str(measures.judge_reset(keys, streamed, off_M))
    assert "moved nothing" in str(measures.judge_reset(keys, reset, reset))
    assert "norm_persistent" in str(measures.judge_reset(keys, streamed, streamed)), "no reset at all"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.empty(2, 0, 8), "no persistent keys"),
        (torch.zeros(2, 4, 8), "norm_persistent is"),
        (torch.full((2, 4, 8), math.nan), "norm_persistent is"),
    ],
)
def test_g2_3_broken_keys(keys: torch.Tensor, words: str) -> None:
    assert words in str(measures.judge_reset(keys, *measures.reset_of(keys)))


def answers(cosine: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (2 layers, 3 heads, 4 needles, dim 2) and answers of 2 memories at this cosine to them."""
    values = torch.tensor([1.0, 0.0]).expand(2, 3, 4, 2)
    return torch.tensor([cosine, math.sqrt(1 - cosine**2)]).expand(2, 2, 3, 4, 2), values


@pytest.mark.parametrize(
    ("cosine", "control", "haystack", "passes"),
    [
        (0.81, 0.0, 100, True),
        (0.81, -0.29, 200, True),
        (0.79, 0.0, 100, False),
        (0.95, 0.31, 100, False),
        (0.95, -0.31, 100, False),
        (0.95, 0.0, 99, False),
    ],
)
def test_g2_5_needles(cosine: float, control: float, haystack: int, passes: bool) -> None:
    (found, values), (empty, _) = answers(cosine), answers(control)
    judged = measures.judge_needles(found, empty, values, haystack)
    assert judged.passed is passes
    assert judged.measured == pytest.approx(cosine)
    assert f"{control:+.3f}" in judged.detail


def test_g2_5_no_answer_is_no_answer() -> None:
    found, values = answers(1.0)
    empty = answers(0.0)[0]
    broken = found.clone()
    broken[1, 1, 2, 3] = math.nan
    assert not measures.judge_needles(broken, empty, values, 100).passed
    assert not measures.judge_needles(found, empty * math.nan, values, 100).passed
    assert not measures.judge_needles(found[:0], empty[:0], values[:0], 100).passed


def curve(*values: float) -> dict[int, float]:
    return dict(zip(measures.SIZES, values, strict=False))


@pytest.mark.parametrize(
    ("perplexities", "passes"),
    [
        (curve(10, 10.1, 10, 10, 10, 9.9), True),
        (curve(8, 9, 10, 10, 11, 12), False),
        (curve(10, 10.1, 10, 10, 10, math.nan), False),
        (curve(10, 10.1, 10, 10, 10, math.inf), False),
        (curve(10, 10.1, 10, 10, 10), False),
        (curve(10, 10, 10, 10, 10, 10), False),  # the chunk size was not set at all
        ({}, False),
    ],
)
def test_g4_4_flat_over_chunk_sizes(perplexities: dict[int, float], passes: bool) -> None:
    assert measures.judge_flatness(perplexities).passed is passes


def test_g4_4_uses_the_population_deviation() -> None:
    assert measures.judge_flatness(curve(9, 9, 9, 11, 11, 11)).measured == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("counts", "passes"), [((20, 0, 100), True), ((19, 0, 100), False), ((50, 1, 100), False), ((0, 0, 0), False)]
)
def test_g4_5_polarised(counts: tuple[int, int, int], passes: bool) -> None:
    assert measures.judge_polarisation(*counts).passed is passes


# G2-6


def spike(returns: list[tuple[int, bool]], losses: list[float], still: bool = False) -> rollback.ForcedSpike:
    """What a forced spike has seen."""
    found = rollback.ForcedSpike()
    found.digests = {step: "same" if still else str(step) for step in range(rollback.SPOILED_AT + 1)}
    found.returns, found.losses = returns, losses
    return found


@pytest.mark.parametrize(
    ("seen", "count", "reached", "words"),
    [
        (spike([(2, True)], [1.0]), 1, 8, None),
        (spike([], [1.0]), 0, 8, "0 rollbacks counted, 0 seen"),
        (spike([], [1.0]), 1, 8, "1 rollbacks counted, 0 seen"),
        (spike([(2, True), (2, True)], [1.0]), 2, 8, "2 rollbacks"),
        (spike([(2, False)], [1.0]), 1, 8, "are not those of step 2"),
        (spike([(2, True)], [1.0]), 1, 7, "step 7 of 8"),
        (spike([(2, True)], [1.0, math.nan]), 1, 8, "nan"),
        (spike([(2, True)], []), 1, 8, "losses"),
        (spike([(2, True)], [1.0], still=True), 1, 8, "could not fail"),
        (rollback.ForcedSpike(), 0, 0, "could not fail"),
    ],
)
def test_g2_6_judgement(seen: rollback.ForcedSpike, count: int, reached: int, words: str | None) -> None:
    found = rollback.judge(seen, count, reached)
    assert found.passed is (words is None)
    assert (words or "back to step 2 bit for bit") in found.detail


# G2-1


SMALL = chunk_sizes.model_config("tiny", SMALL_MODEL)
DECIDED = {"model": "tiny", "dim": 16, "layers": 1, "heads": 2, "head_dim": 8}


def decided(chunks: Any, rate: Any = 99, **changes: Any) -> dict[str, Any]:
    return {**DECIDED, "local_chunks": chunks, "tokens_per_second": rate, **changes}


def test_g2_1_the_newest_decision_counts() -> None:
    known = [decided([8, 16], 100), decided([4], 1234), decided([8], 5, dim=32)]
    assert chunk_sizes.judge(known, SMALL) == GateResult(True, "{4}", "{4}, 1,234 tokens/s")
    other = chunk_sizes.judge([*known, decided([8, 16, 32, 64], 9)], SMALL)
    assert not other.passed
    assert "Set A: {8,16,32,64} was decided, the run has {4}" in other.detail


@pytest.mark.parametrize(
    "known",
    [
        [],
        [{}],
        [decided([4], dim=32)],
        [decided([4], model="tiny2")],
        [decided([])],
        [decided("4")],
        [decided(["4"])],
        [decided([4], math.nan)],
        [decided([4], None)],
        [decided([4], "99")],
        [decided([4], 0)],
    ],
)
def test_g2_1_no_decision(known: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"no decision on model=tiny, dim=16|repeat it"):
        chunk_sizes.judge(known, SMALL)


@pytest.mark.parametrize("text", ["a: 1", "- 3", "- [1]", "text", "- {a: [", "\xff", "- date: 2026-99-99", "[" * 2000])
def test_g2_1_a_file_of_something_else_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "decisions.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"decisions\.yaml"):
        chunk_sizes.read_decisions(path)


def test_the_repository_has_decided_on_the_default_model() -> None:
    known = chunk_sizes.read_decisions(chunk_sizes.DECISIONS)
    assert chunk_sizes.judge(known, chunk_sizes.model_config("tiny", [])).passed


@pytest.mark.parametrize(("rate", "chosen"), [(110.0, (64,)), (110.1, (8,)), (50.0, (64,))])
def test_the_configured_set_stays_unless_another_is_clearly_faster(rate: float, chosen: tuple[int, ...]) -> None:
    assert chunk_sizes.decide({(8, 16): 90.0, (8,): rate, (64,): 100.0}, (64,)) == chosen


def test_a_decision_against_the_config_says_so() -> None:
    rates = {**dict.fromkeys(chunk_sizes.candidates(SMALL), 100.0), (8,): 150.0}
    text = chunk_sizes.entry(SMALL, rates, chunk_sizes.Options())
    assert "Set D: {8}, 50% faster than the configured {4}: model.local_chunks has to follow" in text
    known = [chunk_sizes.decision(SMALL, rates)]
    assert not chunk_sizes.judge(known, SMALL).passed
    assert chunk_sizes.judge(known, ModelConfig(**{**vars(SMALL), "local_chunks": [8]})).passed


def test_chunk_sizes_are_measured_and_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "conf" / "decisions.yaml"
    asked = ["steps=2", "seq_len=32", "batch_size=1", f"decisions={path}", *SMALL_MODEL, "model.shard=128"]
    path.parent.mkdir()
    path.write_text("# Decisions\n")
    command.main(["chunk_sizes", *asked])
    page = capsys.readouterr().out
    for chunks in ("{8,16,32,64}", "{16,32,64,128}", "{8,32,64}", "{8}", "{4} (configured)"):
        (cells,) = [line.split("|") for line in page.splitlines() if line.startswith("|") and f"{chunks} |" in line]
        assert float(cells[2].replace(",", "")) > 0
    assert path.read_text().startswith("# Decisions\n- model: tiny\n")
    (found,) = chunk_sizes.read_decisions(path)
    assert found["local_chunks"] in ([4], [8], [8, 32, 64], [8, 16, 32, 64], [16, 32, 64, 128])
    assert found == {**decided(found["local_chunks"], found["tokens_per_second"]), "date": found["date"],
                     "device": chunk_sizes.device_name()}  # fmt: skip
    assert f"{found['tokens_per_second']:,}" in page
    path.write_text("a: 1\n")
    with pytest.raises(ValueError, match="no list of decisions"):
        command.main(["chunk_sizes", *asked])
    assert path.read_text() == "a: 1\n"


# What a run's config may name


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.Popen", "torch.os.system", "callbacks.support.probing.record",
     "callbacks.niah_probe.Path",
     "callbacks.niah_probe.Any", "builtins.eval", "atlas_lm.runs.folder.os.system", "",
     "atlas_lm.training.module.AtlasModule",
     "atlas_lm.data.prepare.StdlibSource.__init__", "atlas_lm.data.tokens.os.system", "callbacksx.Y", None, 3, {}, [],
     "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler", "lightning.Trainer"],
)  # fmt: skip
def test_only_classes_of_known_packages_are_built(target: Any) -> None:
    probe = {"_target_": "callbacks.niah_probe.NiahProbe"}
    check_targets({**probe, "more": [{"_target_": "atlas_lm.data.stdlib.StdlibSource"}]}, "x")
    with pytest.raises(ValueError, match="_target_"):
        check_targets({**probe, "source": [{"a": {"_target_": target}}]}, "x")


@pytest.mark.parametrize("text", ["${oc.create:{_target_: os.system}}", "a${oc.env:HOME}", "\\${x}"])
def test_what_would_be_resolved_again_is_refused(text: str) -> None:
    """`instantiate` resolves once more, behind the check: what is text now would then be a class."""
    with pytest.raises(ValueError, match="resolved a second time"):
        check_targets({"_target_": "callbacks.niah_probe.NiahProbe", "needles": [text]}, "x")


# A small run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps with all safeguards of stage 2; judged for both phases."""
    return with_all_safeguards(tmp_path_factory.mktemp("run"), "callbacks.memory_contribution.every_n_steps=4")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoiled."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True))


def judged(run: Path, phase: str) -> dict[str, Gate]:
    gates = command.judge(command.PHASES[phase], RunArtifacts(run, run / "decisions.yaml", sequences=4))
    return {gate.id: gate for gate in gates}


def change_config(run: Path, **values: Any) -> None:
    config = OmegaConf.load(run / "config.yaml")
    for name, value in values.items():
        OmegaConf.update(config, name.replace("__", "."), value)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))


def test_a_small_run_is_judged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "decisions.yaml").write_text(json.dumps([decided([4], 1000)]))
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
    assert list(gates) == [*(f"G2-{i}" for i in range(1, 8)), *(f"G4-{i}" for i in range(1, 7))]
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
    assert "PHASE 2 SUMMARY: 4/7 checkpoints passed" in lines
    assert "*** 3 FAILED: G2-2, G2-4, G2-5 ***" in lines
    assert "PHASE 4 SUMMARY: 4/6 checkpoints passed" in lines
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
    for name in ("niah_probe", "proactive_clipping", "spike_rollback", "nonfinite_guard"):
        del config.callbacks[name]
    (run / "config.yaml").write_text(OmegaConf.to_yaml(config))
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "tensorboard")
    gates = {**judged(run, "phase2"), **judged(run, "phase4")}
    assert [name for name, gate in gates.items() if gate.passed] == ["G2-3", "G4-4"]
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
    change_config(run, callbacks__chunk_size=None)
    with pytest.raises(ValueError, match=r"no callbacks\.chunk_size"):
        RunArtifacts(run, run).final_chunks  # noqa: B018


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
    assert lines[-2:] == ["PHASE 2 SUMMARY: 7/7 checkpoints passed", "*** ALL PHASE 2 CHECKS PASSED ***"]


def test_exit_code_0_when_all_pass(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = (command.Check("G2-1", "always", "", lambda run: GateResult(True, math.inf, "fine")),)
    monkeypatch.setitem(command.PHASES, "phase2", command.Phase("PHASE 2: x", checks))
    (run / "exit_gates.json").write_text("{broken")
    command.main(["phase2", f"run={run}"])
    assert json.loads((run / "exit_gates.json").read_text())["phase2"][0]["measured"] == "inf"


def test_a_gate_that_breaks_fails_and_the_others_go_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        ([], "give one of phase2, phase4, chunk_sizes"),
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
