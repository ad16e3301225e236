"""The table of figures says what the newest runs say, and goes between the markers."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import figures


def write_run(outputs: Path, name: str, gates: dict[str, float], **values: Any) -> None:
    folder = outputs / name / "2026-01-01_00-00-00"
    folder.mkdir(parents=True)
    (folder.parent / "latest").symlink_to(folder.name)
    report = {
        "status": "finished", "steps": 1000, "tokens": 2_048_000, "train_seconds": 360.0, "parameters": 10,
        "tokens_per_second": 6000.0, "val_bytes": 429_019, "val_bits_per_byte": 1.5, "gzip_bits_per_byte": 2.0,
        "xz_bits_per_byte": 1.75, "recall_accuracy": 1.0,
        **values,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text("name: x\n")
    judged = [{"id": gate, "passed": value > 0, "measured": value} for gate, value in gates.items()]
    phase = figures.GATES.get(name)
    if phase:
        (folder / "exit_gates.json").write_text(json.dumps({phase: judged}))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    gates = {
        "stage1": {"G2-4": 0.0, "G2-5": 0.874, "used": -0.01},
        "stage2": {"G4-4": 0.009, "G4-5": 0.23, "G4-6": 0.836},
        "recall": {"used": 7.5},
    }
    for i, name in enumerate(figures.RUNS):
        write_run(tmp_path, name, gates.get(name, {}), val_bits_per_byte=1.5 + i / 10)
    return tmp_path


def test_the_table_is_written_between_the_markers(
    outputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for page in figures.PAGES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(f"before\n{figures.BEGIN}\nold\n{figures.END}\nafter\n")
    models = [{"model": "memory", "equal_time": [1.7, 0.01], "seconds": 360.0},
              {"model": "no memory", "equal_time": [1.6, None], "seconds": 360.0}]  # fmt: skip
    (tmp_path / figures.WORTH).write_text(json.dumps({"models": models, "seeds": 3, "command": "python -m b"}))
    figures.main(["--write", "--outputs", str(outputs)], root=tmp_path)
    printed = capsys.readouterr().out.strip()
    for page in figures.PAGES:
        assert (tmp_path / page).read_text() == f"before\n{figures.BEGIN}\n{printed}\n{figures.END}\nafter\n"
    assert "| with memory, held-out source (429,019 bytes), bits per byte | **1.500** |" in printed
    first = printed.splitlines()[2]
    what = "**equal training time** (6.0 min), 3 seeds, bits per byte"
    assert first == f"| {what} | memory **1.700** ± 0.010, no memory **1.600** | `python -m b` |"
    assert "beyond attention's reach, nats per token | **-0.010** | `python -m atlas_lm gates phase2" in printed
    assert "| the same of recall | +7.500 | `python -m atlas_lm gates used run=recall` |" in printed
    assert "| exit gates of Stage 1 | **1/3** |" in printed
    found = json.loads((tmp_path / figures.NUMBERS).read_text())
    assert found["runs"]["stage2"] == "2026-01-01_00-00-00"
    assert len(found["figures"]) == len(printed.splitlines()) - 2
    assert {"what": "the same bytes, gzip -9", "values": [2.0], "command": "the same"} in found["figures"]


def test_a_screening_does_not_become_the_readmes_first_row(outputs: Path, tmp_path: Path) -> None:
    (tmp_path / figures.WORTH).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / figures.WORTH).write_text(json.dumps({"models": [], "seeds": 1, "command": "python -m b --quick"}))
    with pytest.raises(SystemExit, match=r"1 seed\(s\), a screening"):
        figures.main(["--write", "--outputs", str(outputs)], root=tmp_path)


def test_a_run_that_is_missing_is_named_with_its_command(outputs: Path) -> None:
    (outputs / "stage1_twin").rename(outputs / "away")
    with pytest.raises(ValueError, match=r"stage1_twin.*comes from python train\.py"):
        figures.collect(str(outputs))


@pytest.mark.parametrize("page", ["", figures.BEGIN, f"{figures.END} {figures.BEGIN}", figures.BEGIN * 2 + figures.END])
def test_a_page_without_its_markers_is_not_written(page: str) -> None:
    with pytest.raises(ValueError, match="the page needs one line"):
        figures.inserted(page, "x")


def test_the_pages_of_the_repository_have_their_markers() -> None:
    for page in figures.PAGES:
        text = (figures.ROOT / page).read_text()
        assert figures.HEAD in figures.inserted(text, figures.HEAD)
