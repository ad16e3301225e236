import sys
from itertools import chain
from pathlib import Path

import pytest

from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.interfaces import Source

datasets = pytest.importorskip("datasets")

ROWS = [f"row {i} " * 5 for i in range(60)]


@pytest.fixture(autouse=True)
def _cache_in_tmp(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def texts(source: HuggingFaceSource, split: str) -> list[str]:
    return [document.raw.decode() for document in source.documents() if document.split == split]


def test_a_saved_dataset_is_split_by_content(tmp_path) -> None:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(tmp_path / "d"))
    source = HuggingFaceSource(str(tmp_path / "d"), validation_fraction=0.2, test_fraction=0.2)
    assert isinstance(source, Source)
    found = [texts(source, split) for split in ("train", "validation", "test")]
    assert all(found)
    assert sorted(chain(*found)) == sorted(ROWS)
    assert len(source.dataset("validation", 16)) > 1


def test_a_saved_dict_has_its_own_splits(tmp_path) -> None:
    parts = {"fit": ROWS[:40], "dev": ROWS[40:50], "held": ROWS[50:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"body": v}) for k, v in parts.items()})
    saved.save_to_disk(str(tmp_path / "d"))
    source = HuggingFaceSource(str(tmp_path / "d"), None, "fit", "dev", "held", text_field="body", max_documents=12)
    assert texts(source, "train") == ROWS[:12]
    assert texts(source, "validation") == ROWS[40:50]
    assert texts(source, "test") == ROWS[50:]
    with pytest.raises(ValueError, match=r"has no split 'train': it has \['dev', 'fit', 'held'\]"):
        HuggingFaceSource(str(tmp_path / "d")).setup()
    with pytest.raises(ValueError, match=r"\[fit\] row 0: no column 'text' in \['body'\]"):
        HuggingFaceSource(str(tmp_path / "d"), train_split="fit").setup()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_data_files(tmp_path, streaming: bool) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ROWS}).to_json(str(folder / "train.jsonl"))
    source = HuggingFaceSource(str(folder), streaming=streaming, max_documents=30)
    assert [document.raw.decode() for document in source.documents()] == ROWS[:30]
    with pytest.raises(ValueError, match=r"cannot load .*\[nosuch\].*check path, name and split"):
        HuggingFaceSource(str(folder), train_split="nosuch").setup()


def test_a_row_without_text(tmp_path) -> None:
    datasets.Dataset.from_dict({"text": ["a", None]}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ValueError, match=r"\[train\] row 1: 'text' is NoneType"):
        HuggingFaceSource(str(tmp_path / "d")).setup()


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="chunksize=0 must be at least 1"):
        HuggingFaceSource("x", streaming=True, chunksize=0)
    with pytest.raises(ValueError, match="held_out_documents=0 must be at least 1"):
        HuggingFaceSource("x", streaming=True, held_out_documents=0)
    with pytest.raises(ValueError, match="max_documents=0 must be at least 1"):
        HuggingFaceSource("x", max_documents=0)
    with pytest.raises(ValueError, match="test_split='t' without validation_split"):
        HuggingFaceSource("x", test_split="t")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the datasets library: pip install 'atlas-lm\[hf\]'"):
        HuggingFaceSource("x").setup()


def test_chunks_are_of_formats_that_have_them(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ROWS}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="chunksize=100 is of JSON lines, text and CSV"):
        HuggingFaceSource(str(tmp_path), streaming=True, chunksize=100).setup()
