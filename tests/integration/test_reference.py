"""docs/reference is what the code says: each page is generated again, and the tables are compared with a small run."""

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

import callbacks
from atlas_lm.loggers.jsonl import FIELDS, read_rows
from benchmarks import reference


@pytest.fixture(autouse=True)
def no_hydra() -> Iterator[None]:
    yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("page", reference.PAGES)
def test_pages_are_what_the_generator_writes(page: str) -> None:
    written = (reference.FOLDER / page).read_text(encoding="utf-8")
    assert written == reference.PAGES[page](), "run python -m benchmarks.reference"


def test_there_are_no_other_pages() -> None:
    assert {path.name for path in reference.FOLDER.iterdir()} == set(reference.PAGES)


def test_every_callback_has_its_settings_on_the_page() -> None:
    page = (reference.FOLDER / "config.md").read_text(encoding="utf-8")
    assert [name for name in callbacks.__all__ if f".{name}`:" not in page] == []


def test_every_callback_is_exported() -> None:
    found = {}
    for path in sorted(Path(callbacks.__file__ or "").parent.glob("[!_]*.py")):
        for name in re.findall(
            r"^class (\w+)\(\w*(?:Callback|Checkpoint|ProgressBar)\):", path.read_text(), re.MULTILINE
        ):
            found[name] = path.stem
    assert found == callbacks._HOME
    assert sorted(found) == callbacks.__all__
    assert [getattr(callbacks, name).__name__ for name in callbacks.__all__] == callbacks.__all__
    with pytest.raises(AttributeError, match="Nothing"):
        _ = callbacks.Nothing


def unknown_metrics(names: set[str]) -> set[str]:
    """Those that the page has no row for."""
    rows = [re.sub(r"<\w+>", "*", name) for name in reference.METRICS]
    return {name for name in names if not any(fnmatch.fnmatchcase(name, row) for row in rows)}


def test_a_run_logs_the_metrics_of_the_page(guarded_run: Path) -> None:
    logged = {name for row in read_rows(guarded_run / "metrics.jsonl") for name in row}
    metrics = logged - set(FIELDS) - set(reference.COLUMNS)
    assert unknown_metrics(metrics) == set()
    unseen = {
        name: metric.when for name, metric in reference.METRICS.items()
        if not fnmatch.filter(metrics, re.sub(r"<\w+>", "*", name))
    }  # fmt: skip
    steps = {name for name in unseen if name.startswith("gate_monitor/")}  # measured every 10 steps
    assert {unseen[name] for name in unseen.keys() - steps} <= {
        reference.EVENT, reference.EMBEDDINGS, reference.INSPECTED, "validations on data=recall",
    }  # fmt: skip
    assert set(reference.COLUMNS) <= logged


def test_a_metric_without_a_row_is_found() -> None:
    assert unknown_metrics({"train/loss", "niah_probe/accuracy/layer_3", "niah_probe/other"}) == {"niah_probe/other"}


def unknown_files(files: set[str]) -> set[str]:
    """Those that the page has no row for."""
    return {name for name in files if not any(fnmatch.fnmatchcase(name, row) for row in reference.RUN_FOLDER)}


def test_a_run_writes_the_files_of_the_page(guarded_run: Path) -> None:
    files = {str(path.relative_to(guarded_run)) for path in guarded_run.rglob("*") if not path.is_dir()}
    assert unknown_files(files) == set()
    must = {"report.json", "metrics.jsonl", "config.yaml", "run.json", "checkpoints/last.ckpt"}
    assert must <= files


def test_a_file_without_a_row_is_found() -> None:
    assert unknown_files({"report.json", "config.2.yaml", "other.txt"}) == {"other.txt"}


def test_settings_are_read_with_their_comments(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "# About.\n# More.\nname:\n  _target_: a.b\n  steps: 3        # optimizer steps\n  list: [1, 2]\n  text: '#1'\n"
    )
    assert reference.head_comment(path) == "About. More."
    assert reference.entries(path) == [
        reference.Entry("name.steps", "3", "optimizer steps"),
        reference.Entry("name.list", "[1, 2]", ""),
        reference.Entry("name.text", "'#1'", ""),
    ]
