import gzip
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from atlas_lm.data.interfaces import Source
from atlas_lm.data.stdlib import StdlibSource
from atlas_lm.data.text import TextSource


def texts(source: TextSource | StdlibSource) -> list[bytes]:
    return [document.raw for document in source.documents()]


def jsonl(path: Path, *records: object) -> str:
    path.write_text("\n".join(map(json.dumps, records)) + "\n")
    return str(path)


def test_every_format_gives_its_documents(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt").write_bytes(b"plain \xff")
    (tmp_path / "b.md").write_text("# mark")
    jsonl(tmp_path / "c.jsonl", {"body": "line 1"}, {"body": "ö"})
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"body": "zipped"}\n\n'))
    frame = zstandard.ZstdCompressor().compress
    (tmp_path / "e.txt.zst").write_bytes(frame(b"two ") + frame(b"frames"))
    parquet.write_table(pyarrow.table({"body": ["row 1", "row 2"], "n": [1, 2]}), tmp_path / "f.parquet")
    (tmp_path / "ignored.py").write_text("not matched")
    sub = tmp_path / "sub"
    sub.mkdir()
    (sub / "g.txt").write_text("deep")
    source = TextSource([f"{tmp_path}/*.[tmz]*", f"{tmp_path}/**/*.txt", f"{tmp_path}/[cdf].*"], text_field="body")
    assert isinstance(source, Source)
    assert texts(source) == [
        b"plain \xff", b"# mark", b"line 1", "ö".encode(), b"zipped", b"two frames", b"row 1", b"row 2", b"deep",
    ]  # fmt: skip


def test_order_of_the_patterns_does_not_matter(tmp_path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    one = TextSource([f"{tmp_path}/b.txt", f"{tmp_path}/*.txt"])
    assert texts(one) == texts(TextSource(f"{tmp_path}/*.txt")) == [b"a", b"b", b"c"]


def test_equal_documents_lie_on_one_side(tmp_path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"text": f"document {i % 20}"} for i in range(200)))
    split_of_text: dict[bytes, set[str]] = {}
    for document in TextSource(path, validation_fraction=0.3, test_fraction=0.3).documents():
        split_of_text.setdefault(document.raw, set()).add(document.split)
    assert all(len(splits) == 1 for splits in split_of_text.values())
    assert {split for splits in split_of_text.values() for split in splits} == {"train", "validation", "test"}


def test_named_held_out_files(tmp_path) -> None:
    for name in ("train", "val", "test"):
        (tmp_path / f"{name}.txt").write_text(name * 50)
    paths = {name: str(tmp_path / f"{name}.txt") for name in ("train", "val", "test")}
    source = TextSource(paths["train"], paths["val"], paths["test"])
    assert source.dataset("validation", 10).scored_bytes([0]) == b"valvalvalva"[1:]
    assert {(d.raw[:3], d.split) for d in source.documents()} == {
        (b"tra", "train"), (b"val", "validation"), (b"tes", "test"),
    }  # fmt: skip
    without = TextSource(paths["train"], paths["val"])
    with pytest.raises(ValueError, match=r"test split .* test_fraction"):
        without.dataset("test", 10)
    with pytest.raises(ValueError, match="test_files without validation_files"):
        TextSource(paths["train"], test_files=paths["test"])


def test_one_large_file_is_split_by_cutting(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"line {i}\n" for i in range(2000)))
    with pytest.raises(ValueError, match=r"the validation split is empty.*document_bytes"):
        TextSource(str(tmp_path / "a.txt"), validation_fraction=0.01).dataset("validation", 10)
    source = TextSource(str(tmp_path / "a.txt"), document_bytes=200)
    assert b"".join(texts(source)) == (tmp_path / "a.txt").read_bytes()
    assert len(source.dataset("validation", 10)) > 10


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut o', r"a\.jsonl:2: not valid JSON .*correct or remove the line"),
        ('{"body": "x"}', r"a\.jsonl:2: no field 'text' in \['body'\]: set text_field"),
        ('["text"]', r"a\.jsonl:2: no field 'text' in list"),
        ('{"text": null}', r"a\.jsonl:2: 'text' is NoneType, not text"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: 'text' cannot be written as UTF-8"),
        ("\udcff", r"a\.jsonl:2: not valid JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(ValueError, match=message) as caught:
        TextSource(str(tmp_path / "a.jsonl")).setup()
    assert "\n" not in str(caught.value)


def test_damaged_files_are_named(tmp_path) -> None:
    pytest.importorskip("pyarrow")
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
    (tmp_path / "b.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"text" * 1000)[:-3])
    (tmp_path / "c.txt.zst").write_bytes(b"no zstd at all")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 not really PAR1")
    (tmp_path / "e.txt.gz").write_bytes(b"no gzip at all")
    for name in ("a.txt.gz", "b.txt.zst", "c.txt.zst", "d.parquet", "e.txt.gz"):
        with pytest.raises(ValueError, match=rf"cannot read .*{name}.*copy it again"):
            TextSource(str(tmp_path / name)).setup()


def test_parquet_without_the_column(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text' in \['body'\]: set text_field"):
        TextSource(str(tmp_path / "a.parquet")).setup()
    with pytest.raises(ValueError, match="row 2: 'body' is NoneType"):
        TextSource(str(tmp_path / "a.parquet"), text_field="body").setup()


@pytest.mark.parametrize(("module", "name"), [("pyarrow", "a.parquet"), ("zstandard", "a.txt.zst")])
def test_optional_libraries_are_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs {module}: pip install 'atlas-lm\[text\]'"):
        TextSource(str(tmp_path / name)).setup()


def test_files_that_cannot_be_meant(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"files: nothing matches '.*nothing\*\.txt'"):
        TextSource(f"{tmp_path}/nothing*.txt")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="validation_files: nothing matches"):
        TextSource(f"{tmp_path}/a.txt", f"{tmp_path}/b.txt")
    with pytest.raises(ValueError, match="files is empty"):
        TextSource([])
    with pytest.raises(ValueError, match="TextSource found no text"):
        TextSource(f"{tmp_path}/a.txt").setup()
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(ValueError, match=r"cannot read .*a\.docx.*use \.txt"):
        TextSource(f"{tmp_path}/a.*")
    with pytest.raises(ValueError, match=r"validation_fraction=0\.6 and test_fraction=0\.4"):
        TextSource(f"{tmp_path}/a.txt", validation_fraction=0.6, test_fraction=0.4)
    with pytest.raises(ValueError, match="document_bytes=0"):
        TextSource(f"{tmp_path}/a.txt", document_bytes=0)


def test_a_name_with_glob_characters_is_a_name(tmp_path) -> None:
    (tmp_path / "a[1].txt").write_text("bracket")
    assert texts(TextSource(str(tmp_path / "a[1].txt"))) == [b"bracket"]


# The standard library


def test_stdlib_is_large_and_leaves_out_what_differs_between_installations() -> None:
    documents = list(StdlibSource().documents())
    names = [document.name for document in documents]
    assert sum(len(document.raw) for document in documents) >= 10_000_000
    assert names == sorted(names)
    assert "argparse.py" in names
    assert "asyncio/tasks.py" in names
    excluded = ("site-packages", "test", "tests", "idle_test")
    assert not any(part in excluded for name in names for part in name.split("/"))
    assert not any(name.startswith(("_sysconfigdata", "config-")) for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    assert documents[names.index("argparse.py")].raw == (root / "argparse.py").read_bytes()


def test_stdlib_splits_by_path_alone(tmp_path) -> None:
    for name in ("a.py", "sub/b.py", "test/c.py", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff" + name.encode())
    source = StdlibSource(root=str(tmp_path))
    whole = {document.name: document.split for document in StdlibSource().documents()}
    assert [document.name for document in source.documents()] == ["a.py", "sub/b.py"]
    top = [name for name in whole if "/" not in name]
    for name in top:
        (tmp_path / name).write_text("other content")
    found = {document.name: document.split for document in source.documents()}
    assert {name: found[name] for name in top} == {name: whole[name] for name in top}
    assert set(whole.values()) == {"train", "validation", "test"}


def test_a_python_without_source_text(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no \.py file below .*use data=text"):
        StdlibSource(root=str(tmp_path)).setup()
