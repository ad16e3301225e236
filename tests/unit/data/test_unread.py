"""What is named and not read, and where a name stands in for content."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from tests.support.launching import only_run, report_of, small_run


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    caplog.set_level(logging.INFO)


def test_documents_without_text_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    for i in range(5):
        Path(f"{i}.txt").write_text("" if i in (1, 3) else f"text {i}")
    for read in (
        TextSource("*.txt", validation_fraction=0, test_fraction=0).setup,
        lambda: prepare("text", "out", files="*.txt", validation_fraction=0, test_fraction=0),
    ):
        read()
        assert "2 of 5 documents of the train split hold no text, such as 1.txt" in caplog.text
        caplog.clear()


def test_rows_beyond_max_documents_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(50)]}).save_to_disk("d")
    HuggingFaceSource("d", max_documents=20).setup()
    assert "d [train]: max_documents=20 rows are read, the rest is not" in caplog.text
    caplog.clear()
    HuggingFaceSource("d", max_documents=80).setup()
    assert "max_documents" not in caplog.text


def test_finished_shards_are_compared_with_the_corpus() -> None:
    """The same names are not the same text."""
    options: dict[str, Any] = {"files": "a.jsonl", "validation_fraction": 0.3}
    lines = [json.dumps({"text": f"document {i}"}) for i in range(50)]
    Path("a.jsonl").write_text("\n".join(lines))
    out = prepare("text", "out", **options)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare("text", "out", **options) == out
    Path("a.jsonl").write_text("\n".join([*lines, '{"text": "one more"}']))
    with pytest.raises(ValueError, match="the corpus changed since 'out' was written: choose another out=, or delete"):
        prepare("text", "out", **options)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def data(text: str) -> TokenDataModule:
    Path("train.txt").write_text("training text " * 50)
    Path("val.txt").write_text(text)
    found = TokenDataModule(TextSource("train.txt", "val.txt"), batch_size=2, seq_len=16)
    found.setup("fit")
    return found


def test_a_checkpoint_knows_the_text_that_it_was_validated_on(caplog: pytest.LogCaptureFixture) -> None:
    state = data("held out " * 20).state_dict()
    data("held out " * 20).load_state_dict(state)
    data("held out " * 20).load_state_dict({})  # of an older version
    assert not caplog.text
    data("held up! " * 20).load_state_dict(state)
    assert "the validation text is not that of the checkpointed run" in caplog.text


def test_a_figure_is_not_taken_over_from_another_validation_text(tmp_path: Path) -> None:
    """A finished run that is resumed validates again if the text after the same names is another one now."""
    Path("val").mkdir()
    for i in range(8):
        Path("val", f"{i}.txt").write_text(f"held out {i} " * 30)
    overrides = ["name=x", "callbacks=basic", "data.source.validation_files=['val/*.txt']"]
    assert small_run(tmp_path, *overrides) == 0
    run = only_run(tmp_path / "outputs")
    first = report_of(run)
    assert small_run(tmp_path, *overrides, f"resume={run}") == 0
    assert report_of(run)["val_loss"] == first["val_loss"]
    for path in Path("val").iterdir():
        path.write_text(path.read_text().replace("held out", "ZZZZ QQQ"))
    assert small_run(tmp_path, *overrides, f"resume={run}") == 0
    again = report_of(run)
    assert again["val_loss"] != first["val_loss"]
    assert "the validation text is not that" in next(run.glob("*.log")).read_text()


def test_shards_that_continue_with_another_tokenizer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_lm.data.tokenizers import train_bpe

    Path("a.txt").write_text("alpha beta gamma " * 30)
    train_bpe([b"alpha beta gamma" * 9], 262).save("t.json")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("atlas_lm.data.prepare._finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", "out", "t.json", files="a.txt")
    train_bpe([b"gamma delta" * 9], 262).save("out/tokenizer.json")
    with pytest.raises(ValueError, match=r"out/tokenizer\.json' is not 't\.json', which this folder was begun with"):
        prepare("text", "out", "t.json", files="a.txt")
