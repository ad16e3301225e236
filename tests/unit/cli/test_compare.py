"""Runs side by side: what is found, how it is sorted, shown and drawn; unfinished runs are said to be so."""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from atlas_lm.cli import compare
from atlas_lm.cli.compare import UNFINISHED, Run, by_chunk_size, find_runs, markdown, read_run
from tests.support.launching import only_run, report_of, small_run


def make_run(
    folder: Path, chunks: list[int], loss: float | None = 1.0, status: str = "finished", **report: Any
) -> Path:
    """A run folder; status "unfinished" leaves the report out, memory="none" the memory."""
    folder.mkdir(parents=True)
    memory = report.pop("memory", "atlas")
    (folder / "config.yaml").write_text(f"model:\n  memory: {memory}\n  local_chunks: {chunks}\n")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text("model: {local_chunks: [999]}\n")
    values = {
        "status": status, "val_loss": loss, "val_bits_per_byte": 1.5, "tokens_per_second": 1000.0 * max(chunks),
        "train_seconds": 3725.4, "tokens": 5000, "val_bytes": 700, **report,
    }  # fmt: skip
    if status != UNFINISHED:
        (folder / "report.json").write_text(json.dumps(values))
    return folder


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An experiment of five runs and another of one, below the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs"
    make_run(folder / "chunks" / "a", [32], 1.2)
    make_run(folder / "chunks" / "b", [4], 1.1)
    make_run(folder / "chunks" / "c", [8, 16], 1.3)
    make_run(folder / "chunks" / "d", [2], 2.0, "failed")
    make_run(folder / "chunks" / "e", [1], status=UNFINISHED)
    (folder / "chunks" / "latest").symlink_to("a")
    make_run(folder / "twin" / "f", [64], 1.5, memory="none")
    return folder


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn."""
    made: list[Figure] = []
    save = compare.save

    def remember(figure: Figure, path: Path) -> None:
        made.append(figure)
        save(figure, path)

    monkeypatch.setattr(compare, "save", remember)
    return made


def table_of(path: Path) -> list[list[str]]:
    """The cells of compare.md without its heading."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_is_sorted_by_chunk_size_and_says_who_failed(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare.main(["outputs/chunks"])
    rows = table_of(outputs / "chunks" / "compare.md")
    assert [(row[0], row[1], row[6]) for row in rows] == [
        ("e", "1", "unfinished"),
        ("d", "2", "failed"),
        ("b", "4", "finished"),
        ("c", "8, 16", "finished"),
        ("a", "32", "finished"),
    ]
    assert rows[2][2:6] == [f"{math.exp(1.1):.3f}", "1.500", "4,000", "1:02:05"]
    assert rows[0][2:6] == ["–"] * 4
    shown = capsys.readouterr().out
    assert (outputs / "chunks" / "compare.md").read_text() in shown
    for text in (shown, (outputs / "chunks" / "compare.md").read_text()):
        assert "d: failed, not drawn" in text
        assert "e: unfinished, not drawn" in text
        assert "mind:" not in text
    assert str(outputs / "chunks" / "compare.png") in shown


def test_the_picture_has_two_panels_of_the_finished_runs(outputs: Path, panels: list[Figure]) -> None:
    compare.main(["outputs"])
    (figure,) = panels
    left, right = figure.axes
    for axes, values in ((left, [math.exp(x) for x in (1.1, 1.3, 1.2)]), (right, [4000.0, 16000.0, 32000.0])):
        assert axes.get_xscale() == "log"
        assert axes.xaxis.get_transform().base == 2
        points, twin = axes.lines
        assert list(points.get_xdata()) == [4, 16, 32]
        assert list(points.get_ydata()) == pytest.approx(values)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["4", "16", "32"]
        assert [text.get_text() for text in axes.texts] == ["", "8, 16", ""]
        assert twin.get_label() == "no memory"
    assert list(left.lines[1].get_ydata()) == pytest.approx([math.exp(1.5)] * 2)
    picture = matplotlib.image.imread(outputs / "compare.png")
    assert picture.shape[1] > 2 * picture.shape[0]
    assert picture[..., :3].min() < 0.5 < picture[..., :3].max()
    assert {path.name for path in outputs.iterdir() if path.is_file()} == {"compare.md", "compare.png"}


def test_runs_of_one_chunk_size_are_not_joined(tmp_path: Path, panels: list[Figure]) -> None:
    runs = [make_run(tmp_path / name, [8], loss) for name, loss in (("a", 1.0), ("b", 1.1))]
    compare.compare(runs)
    assert panels[0].axes[0].lines[0].get_linestyle() == "None"
    assert len(panels[0].axes[0].lines[0].get_xdata()) == 2


def test_nothing_finished_is_still_a_table_and_a_picture(outputs: Path, panels: list[Figure]) -> None:
    compare.main(["outputs/chunks/d", "outputs/chunks/e"])
    assert [row[6] for row in table_of(outputs / "chunks" / "compare.md")] == ["unfinished", "failed"]
    assert all("no finished run" in [text.get_text() for text in axes.texts] for axes in panels[0].axes)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["outputs/chunks/a"], "a"),
        (["outputs/chunks/latest", "outputs/chunks/a"], "a"),
        (["outputs/chunks"], "abcde"),
        (["outputs/chunks/[ab]"], "ab"),
        (["outputs"], "abcdef"),
        (["twin", "outputs/chunks/b"], "bf"),
    ],
)
def test_runs_are_found_once_each(outputs: Path, names: list[str], found: str) -> None:
    assert sorted(run.name for run in find_runs(names)) == list(found)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], r"no run is named.*'outputs' has chunks, twin"),
        (["outputs/chunk"], r"no run 'outputs/chunk' \(did you mean 'chunks'\?\); 'outputs' has chunks, twin"),
        (["outputs/x*"], r"no run 'outputs/x\*'.*'outputs' has chunks, twin"),
        (["empty"], r"no run 'empty'.*'empty' has no runs yet"),
        (["a", "outputs=nowhere"], r"no run 'a'; 'nowhere' does not exist"),
        (["outputs/chunks", "ot=x"], r"unknown argument 'ot=x'.*did you mean 'out'"),
    ],
)
def test_bad_arguments(outputs: Path, arguments: list[str], words: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(ValueError, match=words):
        compare.main(arguments)
    assert not list(Path().rglob("compare.*"))


@pytest.mark.parametrize("content", ['{"status": "fini', "[1]"])
def test_a_broken_report_is_named(outputs: Path, content: str) -> None:
    (outputs / "chunks" / "a" / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"chunks/a/report\.json is .*delete it"):
        compare.main(["outputs/chunks"])


def test_another_folder_takes_the_files(outputs: Path) -> None:
    compare.main(["outputs/chunks", "out=figures/new"])
    assert sorted(path.name for path in Path("figures/new").iterdir()) == ["compare.md", "compare.png"]
    assert not list(outputs.rglob("compare.*"))


def test_runs_that_cannot_be_compared_are_pointed_out(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a", [8], tokens=1000),
        make_run(tmp_path / "b", [16], tokens=2000),
        make_run(tmp_path / "c", [32], status="failed", val_bytes=1),
    ]
    text = markdown([read_run(run) for run in runs], tmp_path)
    assert "mind: the runs differ in tokens trained on (1,000, 2,000)" in text
    assert "bytes validated" not in text, "the failed run is not compared"


def test_a_loss_that_is_not_finite_has_no_perplexity(tmp_path: Path) -> None:
    """A report writes null for NaN; a huge loss would overflow."""
    runs = [read_run(make_run(tmp_path / str(i), [8], loss)) for i, loss in enumerate((None, 1e6))]
    assert [run.perplexity for run in runs] == [None, None]
    assert not any(run.finished for run in runs)
    assert "0: no finite validation loss, not drawn" in markdown(runs, tmp_path)


def test_order() -> None:
    sets = [(), (64,), (8, 64), (8, 32), (1,), (16, 8)]
    runs = [Run(Path("x"), chunks, {}) for chunks in sets]
    assert [run.chunks for run in by_chunk_size(runs)] == [(1,), (16, 8), (8, 32), (64,), (8, 64), ()]


def test_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert small_run(tmp_path) == 0
    run = only_run(tmp_path / "outputs")
    (row,) = compare.compare(find_runs([str(run.parent)]))
    report = report_of(run)
    assert (row.folder, row.chunks, row.status) == (run.resolve(), (4,), "finished")
    assert row.perplexity == math.exp(report["val_loss"])
    assert row.report == report
    assert table_of(run.parent / "compare.md")[0][0] == os.path.basename(run)
