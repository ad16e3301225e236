"""No document is trained on and held out, whatever it is called and wherever it lies."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.data import prepare as prepare_module
from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.interfaces import SPLITS, Document, Split, split_of
from atlas_lm.data.overlap import content_key
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.prepare import prepare
from atlas_lm.data.shard_overlap import token_documents
from atlas_lm.data.stdlib import StdlibSource
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokens import TokensSource


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)


def write(folder: str, names: str, word: str = "text") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names:
        Path(folder, f"{name}.txt").write_text(f"{word} {name} " * 20)


def trained_on(source: Any, split: Split = "train") -> Counter[bytes]:
    """The documents of a split, as the tokens of a byte tokenizer say; white space around them is left out."""
    source.setup()
    tokens = source._streams[split].tokens[:]
    pieces = "".join(chr(min(t, 256)) for t in tokens.tolist()).split(chr(256))[:-1]
    return Counter(piece.encode("latin-1").strip() for piece in pieces)


def disjoint(source: Any) -> bool:
    train, validation, test = (set(trained_on(source, split)) for split in SPLITS)
    return not (train & validation or train & test or validation & test)


def both_ways(source: PackedSource, name: str, **options: Any) -> Iterator[Any]:
    """The source in memory, then its shards."""
    yield source
    yield TokensSource(str(prepare(name, Path("shards"), block_mb=0.001, **options)))


def test_equal_content_has_one_key() -> None:
    forms = [b"a\nb", b"a\r\nb", b"a\rb", b"  a\nb\n\n", b"\xef\xbb\xbfa\nb"]
    assert len({content_key(raw) for raw in forms}) == 1
    assert content_key(b"a b") != content_key(b"a\nb")
    assert content_key(b" \n") is content_key(b"") is None


def test_validation_files_within_files(caplog: pytest.LogCaptureFixture) -> None:
    write("c", "abcdef")
    write("c/val", "xyz")
    options = {"files": "c/**/*.txt", "validation_files": "c/val/*.txt", "test_files": "c/val/z.txt"}
    for source in both_ways(TextSource(**options), "text", **options):
        assert disjoint(source)
        assert [len(trained_on(source, split)) for split in SPLITS] == [6, 2, 1]
    assert "files: 3 of 9 files, such as c/val/x.txt, are held out" in caplog.text
    assert "validation_files: 1 of 3 files, such as c/val/z.txt" in caplog.text
    with pytest.raises(ValueError, match=r"files: all 3 .* validation_files"):
        TextSource("c/val/*.txt", "c/**/*.txt")


def test_copies_under_other_names_and_forms(caplog: pytest.LogCaptureFixture) -> None:
    write("c", "abcdef")
    write("val", "xyz")
    shutil.copy("val/x.txt", "c/innocent.txt")
    Path("c/windows.txt").write_bytes(Path("val/y.txt").read_bytes().replace(b" ", b"\r\n"))
    Path("val/y.txt").write_bytes(Path("val/y.txt").read_bytes().replace(b" ", b"\n"))
    Path("c/padded.jsonl").write_text(json.dumps({"text": "\n" + Path("val/z.txt").read_text() + "\n\n"}))
    options = {"files": "c/*", "validation_files": "val/*"}
    for source in both_ways(TextSource(**options), "text", **options):
        assert [len(trained_on(source, split)) for split in SPLITS] == [6, 3, 0]
        assert "3 of 9 documents of the train split, " in caplog.text
        assert "are in the test or validation split too, such as c/innocent.txt" in caplog.text
        caplog.clear()


def test_test_files_are_held_out_of_validation_too() -> None:
    write("c", "abcdef")
    write("val", "vw")
    write("test", "xyz")
    shutil.copy("test/x.txt", "val/copy.txt")
    options = {"files": "c/*.txt", "validation_files": "val/*.txt", "test_files": "test/*.txt"}
    for source in both_ways(TextSource(**options), "text", **options):
        assert disjoint(source)
        assert [len(trained_on(source, split)) for split in SPLITS] == [6, 2, 3]


def test_nothing_is_left_of_a_split() -> None:
    write("c", "abc")
    shutil.copytree("c", "val")
    write("val", "z")
    for make in (
        TextSource("c/*.txt", "val/*.txt").setup,
        lambda: prepare("text", "out", files="c/*.txt", validation_files="val/*.txt"),
    ):
        with pytest.raises(ValueError, match=r"all 3 documents of the train split are in the .*validation split too"):
            make()
    assert not Path("out/index.json").exists()


def test_one_file_under_three_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write("c", "ab")
    os.symlink("a.txt", "c/link.txt")
    os.link("c/a.txt", "c/hard.txt")
    os.symlink("c", "folder")
    source = TextSource(["c/a.txt", f"{tmp_path}/c/a.txt", "c/*.txt", "folder/*.txt"], validation_fraction=0)
    assert len(source.files) == 2
    assert sum(trained_on(source).values()) == 2
    assert "files: 7 of 9 names" in caplog.text


def test_splits_drawn_by_hash_keep_their_training_text(caplog: pytest.LogCaptureFixture) -> None:
    """A run that began with it can be resumed; what is held out does without."""
    texts = [f"document {i} " * 9 for i in range(60)]
    splits = [split_of(text.encode(), 0.3, 0.2) for text in texts]
    variants = [text + "\n" * n for text in texts[:20] for n in (0, 1, 2)] + texts[20:]
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in variants))
    options: dict[str, Any] = {"files": "a.jsonl", "validation_fraction": 0.3, "test_fraction": 0.2}
    found = Counter(split_of(text.encode(), 0.3, 0.2) for text in variants)
    assert len(set(splits)) == 3
    for source in both_ways(TextSource(**options), "text", **options):
        assert sum(trained_on(source, "train").values()) == found["train"]
        assert disjoint(source)
        assert "documents of the validation split" in caplog.text
        caplog.clear()


def test_the_standard_library_trains_on_no_held_out_file() -> None:
    class First(StdlibSource):
        def documents(self):
            yield from (d for d in super().documents() if "hello__" in d.name or d.name < "b")

    source = First()
    assert disjoint(source)
    before = [d.raw for d in source.documents() if d.split == "train" and d.raw]
    assert sum(trained_on(source).values()) == len(before)


class Listed(PackedSource):
    """A source as a user may write it."""

    def documents(self):
        for split, text in (("train", "a b"), ("train", "c"), ("validation", "a b\n"), ("test", "z")):
            yield Document("d", text.encode(), split)


def test_any_source_is_compared() -> None:
    source = Listed()
    assert disjoint(source)
    assert set(trained_on(source)) == {b"c"}
    assert source.bytes_per_token("train") == 1 / 2


# Hugging Face


def test_one_split_named_twice() -> None:
    for names in (("train", "train", None), ("train", "dev", "dev"), ("a", "b", "a")):
        with pytest.raises(ValueError, match=r"is named twice.*name different splits"):
            HuggingFaceSource("d", None, *names)


def test_equal_rows_of_different_splits(caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"train": [f"row {i} " * 9 for i in range(30)], "dev": [f"row {i} " * 9 for i in range(25, 35)]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in rows.items()})
    saved.save_to_disk("d")
    options = {"path": "d", "validation_split": "dev"}
    for source in both_ways(HuggingFaceSource(**options), "hf", **options):
        assert disjoint(source)
        assert [sum(trained_on(source, split).values()) for split in SPLITS] == [25, 10, 0]
        assert "5 of 30 documents of the train split" in caplog.text
        caplog.clear()


# Shards


def old_shards(monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Shards as versions wrote them that compared nothing."""
    with monkeypatch.context() as patched:
        patched.setattr(prepare_module.Overlap, "leaves_out", lambda *_: False)
        canonical = prepare_module.canonical
        drop = {"splits_compared"}
        patched.setattr(
            prepare_module,
            "canonical",
            lambda value: canonical({k: v for k, v in value.items() if k not in drop}),
        )
        return prepare("text", Path("old"), block_mb=0.001, **options)


def test_shards_of_older_versions(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    write("c", "abcdef")
    write("val", "xyz")
    whole = TokensSource(str(old_shards(monkeypatch, files="c/*", validation_files="val/*")))
    everything = trained_on(whole, "validation")
    assert not caplog.text
    for name in "ab":
        shutil.copy(f"c/{name}.txt", f"val/copy-{name}.txt")
    shutil.rmtree("old")
    shards = TokensSource(str(old_shards(monkeypatch, files="c/*", validation_files="val/*")))
    assert disjoint(shards)
    assert trained_on(shards, "validation") == everything
    assert "2 of 5 documents of the validation split" in caplog.text
    assert shards.bytes_per_token("validation") == pytest.approx(whole.bytes_per_token("validation"))
    ours, theirs = shards.dataset("validation", 7), whole.dataset("validation", 7)
    assert ours.scored_bytes(range(len(ours))) == theirs.scored_bytes(range(len(theirs)))
    shutil.rmtree("val")
    shutil.copytree("c", "val")
    shutil.rmtree("old")
    with pytest.raises(ValueError, match=r"all 6 .* validation split .* train split"):
        TokensSource(str(old_shards(monkeypatch, files=["c/*"], validation_files="val/*"))).setup()


def test_documents_of_a_stream_across_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    tokens = np.array([1, 2, 9, 9, 3, 3, 3, 9, 1, 2, 9], dtype=np.uint16)
    for piece in range(1, 13):
        monkeypatch.setattr("atlas_lm.data.shard_overlap.PIECE", piece)
        found = list(token_documents(tokens, 9))
        assert [(start, end) for start, end, _ in found] == [(0, 3), (3, 4), (4, 8), (8, 11)]
        assert found[0][2] == found[3][2]
        assert len({key for _, _, key in found}) == 3
