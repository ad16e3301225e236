"""What the dashboard finds and draws, without a browser."""

import json
import os
import re
from pathlib import Path

import pytest

from atlas_lm.inspection import schema
from atlas_lm.inspection.dashboard import finding, report_tables, run_tables, thinning
from atlas_lm.loggers.jsonl import row
from tests.support.reports import a_report


def write(path: Path, name: str = "tiny", steps: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    schema.write(a_report(name, steps), path)
    return path


# Finding


def test_reports_are_found_and_nothing_else(tmp_path: Path) -> None:
    whole = [write(tmp_path / "inspect" / "1" / "report.json"), write(tmp_path / "run" / "x" / "health" / "100.json")]
    cut = write(tmp_path / "inspect" / "2" / "report.json")
    cut.write_bytes(cut.read_bytes()[:500])
    empty = tmp_path / "inspect" / "3" / "report.json"
    empty.parent.mkdir()
    empty.touch()
    run = tmp_path / "run" / "x"  # a training run: its report.json is none of ours
    for name, text in {"config.yaml": "a: 1", "report.json": '{"status": "finished"}', "run.json": "{}"}.items():
        (run / name).write_text(text)
    write(run / "checkpoints" / "report.json")
    found = {item.path: item for item in map(finding.load, finding.report_files([tmp_path, tmp_path / "inspect"]))}
    assert set(found) == {path.resolve() for path in (*whole, cut, empty)}
    assert {path for path, item in found.items() if item.error} == {cut.resolve(), empty.resolve()}
    assert str(cut) in found[cut.resolve()].error
    assert all(item.report == a_report() for item in found.values() if not item.error)


def test_the_newest_comes_first_and_a_report_of_the_future_has_its_reason(tmp_path: Path) -> None:
    old, new = write(tmp_path / "a" / "report.json"), tmp_path / "b" / "report.json"
    new.parent.mkdir()
    new.write_text(json.dumps({"schema_version": 99}))
    os.utime(old, (1, 1))
    assert finding.report_files([tmp_path]) == [new.resolve(), old.resolve()]
    assert "99" in finding.load(new).error
    assert finding.load(tmp_path / "none.json").error
    assert finding.report_files([tmp_path / "nowhere"]) == []


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json")
    before = finding.stamp(path)
    write(path, steps=9)
    assert finding.stamp(path) != before
    assert finding.stamp(tmp_path / "none") == (0, 0)


def test_runs_are_found_once(tmp_path: Path) -> None:
    run = tmp_path / "x" / "2026-11-27"
    run.mkdir(parents=True)
    for folder in (run, run / ".hydra"):
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").touch()
    (tmp_path / "x" / "latest").symlink_to("2026-11-27")
    assert finding.run_folders(tmp_path) == [run.resolve()]
    assert finding.short(run.resolve(), [tmp_path]) == "x/2026-11-27"


# Reports


def test_steps_have_their_flags() -> None:
    rows = report_tables.step_rows(a_report())
    assert [r["flags"] for r in rows] == ["", "", "", "high_entropy"]
    assert [r["token"] for r in rows] == ["·", "(", "x", "):"]
    assert rows[2]["entropy_bits"] == 4.0


def test_a_report_without_capture_has_tables() -> None:
    report = a_report().model_copy(
        update={
            "layers": schema.LayerColumns(), "memory": schema.MemoryColumns(), "latency": schema.Latency(),
            "steps": schema.Steps(token_ids=[1, 2], tokens=["a", "b"]), "prompt": schema.Prompt(text="a", tokens=["a"]),
        }
    )  # fmt: skip
    assert [r["entropy_bits"] for r in report_tables.step_rows(report)] == [None, None]
    assert report_tables.layer_rows(report, report.layers, "norm") == []
    assert report_tables.memory_rows(report, "weight_norm") == report_tables.residual_rows(report) == []
    assert report_tables.prompt_layer_rows(report) == report_tables.latency_rows(report) == []
    assert report_tables.prompt(report).count("<span") == 1
    assert report_tables.comparison(report, a_report())


def test_tokens_are_coloured_by_their_surprisal() -> None:
    assert report_tables.colour(0) == "#ffffff"
    assert report_tables.colour(None) == "#d9d9d9"
    assert report_tables.colour(report_tables.STRONG) == report_tables.colour(100) != report_tables.colour(6)
    found = report_tables.generated(a_report())
    assert re.findall(r"background:(#\w+);color", found) == [report_tables.colour(bits) for bits in (1, 2, 3, 4)]
    assert found.count("border-bottom") == 1, "the step that a flag points to"
    first = re.findall(r"background:(#\w+);color", report_tables.prompt(a_report()))[0]
    assert first == report_tables.colour(None), "the first token of a prompt has no surprisal"


def test_text_cannot_become_a_part_of_the_page() -> None:
    report = a_report()
    report.steps.tokens[0] = '<script>alert("x")</script>'
    report.flags[0].name, report.flags[0].steps = '"><b>', [0]
    for found in (report_tables.generated(report), report_tables.around(report, 0)):
        assert "<script" not in found
        assert "<b>" not in found


def test_layers_are_named_by_their_number_in_the_model() -> None:
    report = a_report()
    report.settings.layers = [3, 7]
    rows = report_tables.layer_rows(report, report.layers, "norm")
    assert rows[1] == {"step": 0, "layer": 7, "value": 4.0}
    assert len(rows) == 8
    assert report_tables.head_rows(report, report.layers.head_entropy)[2] == {"layer": 7, "head": 0, "value": 0.4}
    assert [r["layer"] for r in report_tables.prompt_layer_rows(report)] == [3, 7]


def test_memory_over_time() -> None:
    report = a_report()
    assert report_tables.memory_rows(report, "half_life") == [
        {"step": 0, "memory": "layer 1 global", "value": 900.0}, {"step": 3, "memory": "layer 1 global", "value": 800.0}
    ]  # fmt: skip
    assert {r["lag"]: r["value"] for r in report_tables.residual_rows(report) if r["step"] == 3} == {0: 0.3, 64: 0.7}
    assert set(report_tables.OF_MEMORY) == set(schema.MemoryColumns.model_fields) - {
        "labels", "chunks", "steps", "lags", "residual",
    }  # fmt: skip


def test_flags_that_fired_come_first_with_their_steps() -> None:
    report = a_report()
    report.flags.reverse()
    report.flags[1].steps = [1, 2, 3, 7]
    rows = report_tables.flag_rows(report)
    assert (rows[0]["flag"], rows[0]["steps"]) == ("high_entropy", "1–3, 7")
    assert report_tables.pointed_at(report)[7] == ["high_entropy"]


@pytest.mark.parametrize(("step", "count"), [(0, 6), (10, 11), (19, 6)])
def test_the_tokens_about_a_step(step: int, count: int) -> None:
    found = report_tables.around(a_report(steps=20), step)
    assert found.count("<span") == count
    assert found.count("border-bottom") == 1


def test_two_reports_side_by_side() -> None:
    a, b = a_report("a"), a_report("b", steps=6)
    b.flags[0].fired = False
    b.summary["new"] = 1.0
    rows = {r["figure"]: r for r in report_tables.comparison(a, b)}
    assert rows["tokens"] == {"figure": "tokens", "A": 4.0, "B": 6.0, "B − A": 2.0}
    assert rows["new"]["A"] is rows["new"]["B − A"] is None
    assert report_tables.flag_comparison(a, b)[0] == {"flag": "high_entropy", "A": "fired", "B": "quiet"}


# Runs


def test_charts_and_events_of_a_run() -> None:
    logged = [
        {"train/loss": 5.0, "spike_rollback/count": 0.0, "spike_rollback/rollbacks": 0.0,
         "spike_rollback/ema": float("nan")},
        {"train/loss": 4.0, "niah_probe/accuracy": 0.9, "spike_rollback/count": 1.0, "spike_rollback/rollbacks": 1.0},
        {"train/loss": float("nan"), "nonfinite_guard/skipped_steps": 2.0, "spike_rollback/count": 1.0},
    ]  # fmt: skip
    rows = [row(10 * i, 0.0, metrics, i) for i, metrics in enumerate(logged)]
    found = run_tables.charts(rows)
    assert [(p["step"], p["value"]) for p in found["loss (nats per token)"]] == [(0, 5.0), (10, 4.0)]
    assert set(found) == {"loss (nats per token)", "needle (cosine)"}
    assert [(e["step"], e["event"]) for e in run_tables.events(rows)] == [
        (10, "spike"), (10, "rollback"), (20, "step skipped: not finite"), (20, "not finite: train/loss"),
    ]  # fmt: skip


def test_every_metric_that_is_drawn_exists() -> None:
    from benchmarks.reference import METRICS

    drawn = {name for names in run_tables.CHARTS.values() for name in names} | set(run_tables.COUNTERS)
    assert drawn <= set(METRICS)


# Less than there is


def test_a_long_line_keeps_its_peaks() -> None:
    rows = [{"step": i, "of": "a", "value": 1.0} for i in range(10_000)]
    rows[4321]["value"], rows[77]["value"], rows[9999]["value"] = 50.0, -3.0, None
    found = thinning.thin_lines([*rows, {"step": 0, "of": "b", "value": 2.0}], "value", "of")
    assert len(found) <= thinning.POINTS + 1
    assert {4321, 77} <= {r["step"] for r in found}
    assert [r["step"] for r in found if r["of"] == "a"] == sorted(r["step"] for r in found if r["of"] == "a")
    assert thinning.thin_lines(rows[:100], "value", "of") == rows[:100]


def test_a_wide_heat_map_is_averaged() -> None:
    rows = [{"step": i, "layer": j, "value": float(i)} for i in range(2000) for j in range(3)]
    rows[0]["value"] = None
    found = thinning.thin_heat(rows, "step", "layer")
    assert len(found) <= 3 * thinning.COLUMNS
    cells = {(r["step"], r["layer"]): r["value"] for r in found}
    assert cells[0, 0] == sum(range(1, 14)) / 13
    assert cells[0, 1] == sum(range(14)) / 14
    assert thinning.thin_heat(rows[:30], "step", "layer") == rows[:30]


def test_lines_have_short_names_where_those_differ() -> None:
    rows = [row(0, 0.0, {"train/loss": 1.0, "val/loss": 2.0, "gate_monitor/mean": 0.5, "gate_monitor/std": 0.1})]
    found = run_tables.charts(rows)
    assert [p["metric"] for p in found["loss (nats per token)"]] == ["train/loss", "val/loss"]
    assert [p["metric"] for p in found["gates"]] == ["mean", "std"]
