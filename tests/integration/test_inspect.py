"""The command `inspect`: a report from a run, thresholds from its held-out text, two reports compared, bad input."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from atlas_lm.cli import generate, inspect
from atlas_lm.files import ROOT
from atlas_lm.inspection import exported, schema
from atlas_lm.inspection.capture import AT_ONCE, SAMPLED_EVERY, Trace
from atlas_lm.inspection.health import Thresholds, flags_of
from tests.support.reports import a_report


@pytest.fixture(scope="module")
def written(basic_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a short generation."""
    out = tmp_path_factory.mktemp("inspect")
    inspect.main([f"run={basic_run}", "prompt=the quick", "tokens=24", f"out={out}"])
    return out


def test_a_run_is_inspected_and_writes_what_generate_writes(
    basic_run: Path, written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main([f"run={basic_run}", "prompt=the quick", "tokens=24"])
    text = capsys.readouterr().out.rstrip("\n")
    report = schema.read(written / "report.json")
    assert "the quick" + report.text == text
    assert report.model.memories
    assert len(report.steps.token_ids) == len(report.steps.tokens) == 24
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "memory_silent" in page
    assert page.count("<svg") >= 4
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", ""), "the page needs nothing else"


def test_ctrl_c_reports_what_was_written_until_then(
    basic_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = inspect.Streaming.flush

    def interrupted(self: inspect.Streaming, trace: Trace) -> None:
        flush(self, trace)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(inspect.Streaming, "flush", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit, match="130"):
        inspect.main([f"run={basic_run}", "prompt=the quick", "tokens=200", f"out={tmp_path}"])
    assert signal.getsignal(signal.SIGINT) is before
    report = schema.read(tmp_path / "report.json")
    written = len(report.steps.token_ids)
    assert written == AT_ONCE
    assert len(report.layers.norm) == written
    assert report.warnings == [f"interrupted after {written} of 200 tokens"]


def test_a_sample_says_nothing_of_the_steps_between(basic_run: Path, tmp_path: Path) -> None:
    inspect.main([f"run={basic_run}", "prompt=the quick", "tokens=70", "capture=sampled", f"out={tmp_path}"])
    report = schema.read(tmp_path / "report.json")
    assert [i for i in range(70) if report.steps.has_logits(i)] == [0, SAMPLED_EVERY]
    flags = {flag.name: flag for flag in report.flags}
    assert not flags["nonfinite"].fired
    assert flags["high_entropy"].value in (0.0, 0.5, 1.0)
    assert report.baselines.sequence_log2_probability is None
    assert report.baselines.perplexity is not None
    report.steps.entropy_bits[SAMPLED_EVERY] = None  # as NaN comes back from a file
    broken = {flag.name: flag for flag in flags_of(report, Thresholds())}["nonfinite"]
    assert (broken.fired, broken.steps) == (True, [SAMPLED_EVERY])


def test_live_figures_have_ranks_and_residuals_though_not_every_row_has_them(written: Path) -> None:
    memory = schema.read(written / "report.json").memory
    memory.effective_rank.append([None] * len(memory.labels))
    memory.residual.append([[None] * len(memory.lags)] * len(memory.labels))
    for name in set(exported.MEMORY) - {"effective_rank", "residual"}:
        getattr(memory, name).append([0.5] * len(memory.labels))
    for figures in inspect.last_row(memory).values():
        assert set(figures) == set(exported.MEMORY)
        assert figures["weight_norm"] == 0.5


def test_thresholds_are_fitted_to_the_run_and_used(
    basic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "thresholds.json"
    common = [f"run={basic_run}", "tokens=5"]
    inspect.main(["calibrate", *common, "texts=8", "prompt_tokens=8", f"out={path}"])
    fitted = json.loads(path.read_text())
    assert fitted["unusual"] > 0
    assert fitted["centre"]["mean_entropy_bits"] > 0
    capsys.readouterr()
    inspect.main([*common, "prompt=the quick", f"thresholds={path}", f"out={tmp_path}"])
    assert "calibrate" not in capsys.readouterr().out
    report = schema.read(tmp_path / "report.json")
    assert report.thresholds["unusual"] == pytest.approx(fitted["unusual"])
    assert "unusual" in {flag.name for flag in report.flags}


def test_two_reports_side_by_side(written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = a_report()
    schema.write(other, tmp_path / "other.json")
    inspect.main(["compare", str(written), str(tmp_path / "other.json")])
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("mean_entropy_bits"))
    a, b = schema.read(written / "report.json").baselines.mean_entropy_bits, other.baselines.mean_entropy_bits
    assert float(row.split()[3]) == pytest.approx(b - a, rel=1e-3)
    assert any("high_entropy" in line and "raised" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prompt=x"], "run="),
        (["run=x", "model=y", "prompt=x"], "one of them"),
        (["model=/no/such/folder", "prompt=x"], "/no/such/folder"),
        (["model=y"], "prompt="),
        (["run=x"], "prompt="),
        (["run=x", "prompt=x", "gguf=y"], "gguf=y"),
        (["dashboard", "folder=/no/such"], "/no/such"),
        (["run=nowhere", "prompt=x"], "nowhere"),
        (["run=x", "prompt=x", "sink=promtheus"], "prometheus"),
        (["run=x", "prompt=x", "capture=all"], "capture=all"),
        (["run=x", "prompt=x", "layers=a,b"], "layers=a,b"),
        (["run=x", "prompt=x", "temperature=-1"], "temperature=-1"),
        (["run=x", "prompt=x", "top_p=0.5"], "top_p=0.5"),
        (["compare", "one"], "got 1"),
        (["compare", "one", "two"], "one"),
        (["comparr", "one", "two"], "compare"),
        (["calibrate", "model=y"], "text="),
        (["calibrate", "run=x", "texts=3"], "texts=3"),
        (["calibrate", "run=x", "quantile=1"], "quantile=1"),
    ],
)
def test_bad_arguments(arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=named):
        inspect.main(arguments)


def test_bad_values_for_a_run_that_is_there(basic_run: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (["layers=99"], "layers=99"),
        ([f"thresholds={tmp_path / 'none.json'}"], "calibrate"),
        (["tokens=0"], "tokens=0"),
    ):
        with pytest.raises(ValueError, match=named):
            inspect.main([f"run={basic_run}", "prompt=x", f"out={tmp_path / 'out'}", *arguments])
    (tmp_path / "half.json").write_text('{"centre": {')
    with pytest.raises(ValueError, match=r"half\.json"):
        inspect.main([f"run={basic_run}", "prompt=x", f"thresholds={tmp_path / 'half.json'}"])
    assert not (tmp_path / "out").exists()


def test_clean_text_that_is_too_short_is_refused(basic_run: Path) -> None:
    with pytest.raises(ValueError, match="texts=5000"):
        inspect.main(["calibrate", f"run={basic_run}", "texts=5000", "prompt_tokens=50"])


def test_reports_that_are_none(tmp_path: Path, written: Path) -> None:
    text = (written / "report.json").read_text()
    (tmp_path / "cut.json").write_text(text[:500])
    (tmp_path / "newer.json").write_text(text.replace('"schema_version":1', '"schema_version":7'))
    for name, word in (("cut", "cut off"), ("newer", "7")):
        with pytest.raises(ValueError, match=word):
            inspect.main(["compare", str(written), str(tmp_path / f"{name}.json")])


@pytest.mark.long
def test_a_missing_extra_is_one_line(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["pydantic"] = None
from atlas_lm.__main__ import main
from atlas_lm.cli.arguments import call
sys.argv[1:] = ["inspect", "run=x", "prompt=x"]
call(main)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "atlas-lm[inspect]" in found.stderr
