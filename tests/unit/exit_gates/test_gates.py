"""Exit gates on plain numbers and records: each is seen to fail, also for want of anything to judge."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from atlas_lm.cli import gates as command
from atlas_lm.config.model import ModelConfig
from atlas_lm.exit_gates import chunk_sizes
from atlas_lm.exit_gates import measured_gates as measures
from atlas_lm.exit_gates import recorded_gates as records
from atlas_lm.exit_gates import rollback_drill as rollback
from atlas_lm.exit_gates.artifacts import uncovered
from atlas_lm.exit_gates.result import GateResult
from atlas_lm.loggers.jsonl import row
from atlas_lm.memory.projection import ProjectionState
from callbacks.proactive_clipping import ProactiveClipping
from tests.support.gate_cases import decided
from tests.support.launching import SMALL_MODEL

Rows = list[dict[str, Any]]


def rows_of(*steps: dict[str, float]) -> Rows:
    """Rows of metrics.jsonl, one per dict of metrics."""
    return [row(i, 0.0, metrics, seq=i) for i, metrics in enumerate(steps)]


# Judged by records


def probes(count: int, *overheads: float, accuracy: float = 0.9) -> Rows:
    found = [{"niah_probe/accuracy": accuracy, "niah_probe/overhead_percent": 0.5}] * (count - len(overheads))
    return rows_of(
        *found, *({"niah_probe/accuracy": accuracy, "niah_probe/overhead_percent": percent} for percent in overheads)
    )


@pytest.mark.parametrize(
    ("rows", "passes"),
    [
        (probes(5), True),
        (probes(5, 0.99), True),
        (probes(5, 7.0, 0.3), True),  # the last one counts
        (probes(5, 1.0), False),
        (probes(4), False),
        ([], False),
        (rows_of({"train/loss": 1.0}), False),
        (rows_of({"niah_probe/accuracy": 0.9}), False),  # a short run's, before there is a share of the time
        (probes(6, accuracy=math.nan), False),
    ],
)
def test_g2_2_the_probe_is_cheap_and_frequent(rows: Rows, passes: bool) -> None:
    assert records.probe_overhead(rows, 200).passed is passes


def test_g2_2_no_overhead_is_no_low_overhead() -> None:
    for rows in (probes(6, math.nan), rows_of(*[{"niah_probe/accuracy": 0.9}] * 5)):
        with pytest.raises(ValueError, match="niah_probe/overhead_percent"):
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
        ({}, [*LOSSES, {"spike_rollback/ppl_delta": math.inf}], True, "spike_rollback/ppl_delta was not finite"),
        ({}, [*LOSSES, {"nonfinite_guard/skipped_steps": 2.0}], True, "2 steps skipped"),
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
    rows = rows_of({"train/loss": 1.0}, *({"spike_rollback/ppl_delta": delta} for delta in deltas))
    assert records.deltas_visible(rows, on_board).passed is passes


def test_g2_7_counts_the_scalars_of_all_event_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        records.board_values(tmp_path, "spike_rollback/ppl_delta")
    for suffix, steps in (("a", (0, 100, 200)), ("b", (150, 300))):  # the second goes back, as a resumed run does
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=suffix) as writer:
            for step in steps:
                writer.add_scalar("spike_rollback/ppl_delta", 0.1, step)
                writer.add_scalar("spike_rollback/ppl", 9.0, step)
    assert records.board_values(tmp_path, "spike_rollback/ppl_delta") == 5
    assert records.board_values(tmp_path, "niah_probe/accuracy") == 0


def clipped(chunk: float, factor: float = 1.0) -> dict[str, float]:
    threshold = 0.5 * math.sqrt(32 / chunk) * factor if chunk else 1.0
    return {
        "chunk_size_scheduler/chunk_size": chunk,
        "optim/clip_threshold": float(torch.tensor(threshold)),
    }  # float32, as logged


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ([clipped(32), clipped(7), clipped(7, 0.5), {"chunk_size_scheduler/chunk_size": 3.0}], None),
        ([clipped(32), clipped(7, 1.00001)], "step 1, chunk 7: clipped at"),
        ([clipped(32), clipped(7, 0.25)], "the formula says"),
        ([], "0 rows"),
        ([{"chunk_size_scheduler/chunk_size": 3.0}, {"optim/clip_threshold": 0.5}], "0 rows"),
        ([clipped(32), {"chunk_size_scheduler/chunk_size": 3.0, "optim/clip_threshold": math.nan}], "1 not finite"),
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
    rows = rows_of({"spike_rollback/rollbacks": 0.0}, {"spike_rollback/rollbacks": last}, {"train/loss": 1.0})
    assert records.few_rollbacks(rows, "act").passed is passes
    assert not records.few_rollbacks(rows, "observe").passed


@pytest.mark.parametrize(("last", "passes"), [(0.0, True), (9.0, True), (10.0, False)])
def test_g4_3_few_spikes(last: float, passes: bool) -> None:
    assert records.few_spikes(rows_of({"spike_rollback/count": 0.0}, {"spike_rollback/count": last})).passed is passes


@pytest.mark.parametrize(
    "metrics", [[{"train/loss": 1.0}], [{"spike_rollback/count": math.nan, "spike_rollback/rollbacks": math.nan}]]
)
def test_g4_2_and_3_what_was_not_counted_is_not_zero(metrics: Rows) -> None:
    with pytest.raises(ValueError, match="spike_rollback/rollbacks"):
        records.few_rollbacks(rows_of(*metrics), "act")
    with pytest.raises(ValueError, match="spike_rollback/count"):
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


SMALL = chunk_sizes.model_config("tiny_deep", SMALL_MODEL)


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
    with pytest.raises(ValueError, match=r"no decision on model=tiny_deep, dim=16|repeat it"):
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
    asked = [
        "model=tiny_deep",
        "steps=2",
        "seq_len=32",
        "batch_size=1",
        f"decisions={path}",
        *SMALL_MODEL,
        "model.shard=128",
    ]
    path.parent.mkdir()
    path.write_text("# Decisions\n")
    command.main(["chunk_sizes", *asked])
    page = capsys.readouterr().out
    for chunks in ("{8,16,32,64}", "{16,32,64,128}", "{8,32,64}", "{8}", "{4} (configured)"):
        (cells,) = [line.split("|") for line in page.splitlines() if line.startswith("|") and f"{chunks} |" in line]
        assert float(cells[2].replace(",", "")) > 0
    assert "gates chunk_sizes model=tiny_deep steps=2 seq_len=32 batch_size=1 model.dim=16" in page
    assert path.read_text().startswith("# Decisions\n- model: tiny_deep\n")
    (found,) = chunk_sizes.read_decisions(path)
    assert found["local_chunks"] in ([4], [8], [8, 32, 64], [8, 16, 32, 64], [16, 32, 64, 128])
    assert found == {**decided(found["local_chunks"], found["tokens_per_second"]), "date": found["date"],
                     "device": chunk_sizes.device_name()}  # fmt: skip
    assert f"{found['tokens_per_second']:,}" in page
    path.write_text("a: 1\n")
    with pytest.raises(ValueError, match="no list of decisions"):
        command.main(["chunk_sizes", *asked])
    assert path.read_text() == "a: 1\n"
