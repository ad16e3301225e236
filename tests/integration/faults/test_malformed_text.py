"""Forty malformed inputs per decoder, from fixed seeds: one line that names the file, or the text is read rightly."""

import gzip
import io
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.cli import calibrate, compare
from atlas_lm.config.parsing import parse_json, read_config, read_json
from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokens import TokensSource
from tests.support.faults import mutated, outcome

COUNT = 40
SECONDS = 20  # more is a hang
r, WORDS = random.Random(7), ["alpha", "beta", "gamma", "süß", "東京"]
ROWS = [
    f"row {i}: " + " ".join(r.choice(["alpha", "beta", "gamma", "süß", "東京"]) for _ in range(40)) for i in range(60)
]
TEXT = "\n".join(ROWS).encode()
LINES = "".join(json.dumps({"text": row}) + "\n" for row in ROWS).encode()


def zst(raw: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(raw)


def parquet() -> bytes:
    pyarrow, module = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    module.write_table(pyarrow.table({"text": ROWS, "n": list(range(len(ROWS)))}), buffer, write_page_checksum=True)
    return buffer.getvalue()


def documents(source: PackedSource) -> list[bytes]:
    return [document.raw for document in source.documents()]


def text_of(path: Path) -> list[bytes]:
    return documents(TextSource(str(path)))


def lines_of(raw: bytes) -> list[bytes]:
    """What a jsonl file says after the damage, as the standard library reads it."""
    return [json.loads(line)["text"].encode() for line in io.BytesIO(raw) if line.strip()]


# decoder: file name, its content, and what may be read from a damaged copy of it
DECODERS: dict[str, tuple[str, Callable[[], bytes], Callable[[bytes], list[list[bytes]]]]] = {
    "txt": ("a.txt", lambda: TEXT, lambda bad: [[bad]]),
    "txt.gz": ("a.txt.gz", lambda: gzip.compress(TEXT, mtime=0), lambda bad: [[TEXT], [TEXT * 2]]),
    "txt.zst": ("a.txt.zst", lambda: zst(TEXT), lambda bad: [[TEXT], [TEXT * 2]]),
    "jsonl": ("a.jsonl", lambda: LINES, lambda bad: [lines_of(bad)]),
    "jsonl.gz": ("a.jsonl.gz", lambda: gzip.compress(LINES), lambda bad: [lines_of(LINES), lines_of(LINES * 2)]),
    "jsonl.zst": ("a.jsonl.zst", lambda: zst(LINES), lambda bad: [lines_of(LINES), lines_of(LINES * 2)]),
    "parquet": ("a.parquet", parquet, lambda bad: [lines_of(LINES)]),
    "parquet.gz": ("a.parquet.gz", lambda: gzip.compress(parquet(), mtime=0), lambda bad: [lines_of(LINES)]),
}  # fmt: skip


def says(line: str | None, *words: str) -> bool:
    """Whether an error line has all these words."""
    return line is not None and all(word in line for word in words)


def damaged(good: bytes, seed: int) -> list[tuple[str, bytes]]:
    r = random.Random(seed)
    return [mutated(good, [b"no text", LINES, gzip.compress(b"x")], r) for _ in range(COUNT)]


def refused_or_right(path: Path, read: Callable[[], Any], right: Callable[[Any], bool], seed: int) -> Counter[str]:
    """Damage a file `COUNT` times. Every time one line names it, or what is read is right."""
    seen, good = Counter[str](), path.read_bytes()
    for number, (name, bad) in enumerate(damaged(good, seed)):
        path.write_bytes(bad)
        found, line = outcome(read, SECONDS)
        what = f"{path.name}: {name}, seed {seed}, number {number}"
        if line is None:
            assert right(found), f"{what}: read wrongly"
        else:
            assert path.name in line, f"{what}: {line}"
            assert len(line) < 600, what
        seen["refused" if line else "right"] += 1
    path.write_bytes(good)
    return seen


@pytest.mark.parametrize("decoder", DECODERS)
def test_malformed_files(tmp_path: Path, decoder: str) -> None:
    name, content, readings = DECODERS[decoder]
    path = tmp_path / name
    path.write_bytes(content())
    seen = refused_or_right(
        path, lambda: text_of(path), lambda found: found in readings(path.read_bytes()), seed=len(name)
    )
    assert seen["refused"] >= 10 or decoder == "txt"


def test_malformed_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(LINES)
    prepare("text", tmp_path / "shards", "bpe", 280, files=f"{tmp_path}/corpus.jsonl")
    path = tmp_path / "shards" / "tokenizer.json"

    def read() -> tuple[int, int]:
        source = TextSource(f"{tmp_path}/corpus.jsonl", tokenizer=str(path))
        source.setup()
        dataset = source.dataset("train", 8)
        return source.vocab_size, max(int(dataset[i]["targets"].max()) for i in range(len(dataset)))

    assert refused_or_right(path, read, lambda found: found[1] < found[0], seed=1)["refused"] >= 10


def test_text_that_is_no_utf8_names_its_file(tmp_path: Path) -> None:
    """A tokenizer.json needs UTF-8; bytes take anything but what is no text byte by byte."""
    (tmp_path / "corpus.jsonl").write_bytes(LINES)
    shards = prepare("text", tmp_path / "shards", "bpe", 280, files=f"{tmp_path}/corpus.jsonl")
    path = tmp_path / "a.txt"
    for encoding in ("utf-16", "utf-32", "utf-16-le", "latin-1", "cp1252"):
        path.write_bytes("süße Grüße, größer\n".encode(encoding) * 40)
        _, line = outcome(TextSource(str(path), tokenizer=str(shards / "tokenizer.json")).setup, SECONDS)
        assert says(line, "a.txt", "UTF-8")
        _, line = outcome(TextSource(str(path)).setup, SECONDS)
        assert says(line, "a.txt", encoding.upper()) == (encoding in ("utf-16", "utf-32"))


@pytest.mark.parametrize("file", ["index.json", "tokenizer.json", "train-00000.tokens", "validation-00000.raw",
                                  "validation-00000.lengths"])  # fmt: skip
def test_malformed_shards(tmp_path: Path, file: str) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(LINES)
    shards = prepare("text", tmp_path / "shards", "bpe", 280, validation_fraction=0.3, files=f"{tmp_path}/corpus.jsonl")

    def read() -> list[str]:
        source = TokensSource(str(shards))
        return [source.dataset(split, 8).fingerprint() for split in ("train", "validation")]

    whole = read()
    assert refused_or_right(shards / file, read, whole.__eq__, seed=2)["refused"] >= 10


def test_malformed_manifests_of_an_interrupted_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(LINES)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("atlas_lm.data.prepare._finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", tmp_path / "out", files=f"{tmp_path}/corpus.jsonl")
        path = tmp_path / "out" / "part-00000.json"
        path.write_text("[" * 100_000)
        _, line = outcome(lambda: prepare("text", tmp_path / "out", files=f"{tmp_path}/corpus.jsonl"), SECONDS)
        assert says(line, "part-00000.json", "delete the folder")
        path.write_text('{"block": "x"}')
        _, line = outcome(lambda: prepare("text", tmp_path / "out", files=f"{tmp_path}/corpus.jsonl"), SECONDS)
        assert says(line, "part-00000.json")


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    module.disable_progress_bars()
    return module


@pytest.mark.parametrize("file", ["data-00000-of-00001.arrow", "dataset_info.json", "state.json"])
def test_malformed_datasets_on_disk(tmp_path: Path, datasets: Any, file: str) -> None:
    """The library's files have no checksums; the folder is what the user names."""
    folder = tmp_path / file.partition(".")[0]
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(folder))
    path, good, seen = folder / file, (folder / file).read_bytes(), Counter[str]()
    for _, bad in damaged(good, 3):
        path.unlink()  # the library maps the file: written over, it would change under a reader
        path.write_bytes(bad)
        _, line = outcome(HuggingFaceSource(str(folder)).setup, SECONDS)
        assert line is None or str(folder) in line
        seen["refused" if line else "read"] += 1
    assert seen["refused"] >= 10


def test_an_error_after_the_first_row_of_a_stream(tmp_path: Path, datasets: Any) -> None:
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"text": f"row {i}"}) for i in range(2000)]
    (tmp_path / "d" / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "d" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    source = HuggingFaceSource(str(tmp_path / "d"), streaming=True, max_documents=9000)
    _, line = outcome(source.setup, SECONDS)
    assert says(line, f"'{tmp_path}/d' [train]", "cannot read row 2000")


def test_deep_nesting_is_an_error_of_the_file(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "a", "meta": ' + deep + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not valid JSON .*nested too deeply.*remove the line"):
        TextSource(str(tmp_path / "a.jsonl")).setup()
    (tmp_path / "report.json").write_text(deep)
    with pytest.raises(ValueError, match=r"report\.json: .*nested too deeply"):
        read_json(tmp_path / "report.json")
    (tmp_path / "config.yaml").write_text(deep[:3000])
    with pytest.raises(ValueError, match=r"config\.yaml: "):
        read_config(tmp_path / "config.yaml")
    assert parse_json("[1]", "here") == [1]


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    source = TextSource(str(tmp_path / "a.txt"))

    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "a.txt"))

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ValueError, match=r"cannot read .*a\.txt' \(Permission denied\).*permissions") as caught:
        source.setup()
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_compressed_file_of_no_bytes_is_cut_off(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"cannot read .*{name}.*0 bytes.*copy it again"):
        TextSource(str(tmp_path / name)).setup()


def test_tokenizers_that_cannot_say_what_they_meet_are_named(tmp_path: Path) -> None:
    import tokenizers

    (tmp_path / "a.txt").write_text("a b c " * 50)
    for number, model in enumerate((
        tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="[UNK]"),
        tokenizers.models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]"),
        tokenizers.models.Unigram([("a", 0.0), ("</s>", 0.0)]),
    )):  # fmt: skip
        path = tmp_path / f"{number}.json"
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(path))
        _, line = outcome(TextSource(str(tmp_path / "a.txt"), tokenizer=str(path)).setup, SECONDS)
        assert says(line, str(path), "a.txt")


# What lies in a run folder: JSON that is whole, with values of another kind

VALUES: list[Any] = ["abc", [1], {"a": 1}, True, ""]
ROW = {"seq": 0, "step": 0, "ppl_delta": 0.01, "train/loss": 1.0}
REPORT = {"status": "finished", "val_loss": 1.0, "val_bits_per_byte": 1.0, "tokens_per_second": 1.0,
          "train_seconds": 1.0, "tokens": 9, "val_bytes": 9}  # fmt: skip


def run_folder(folder: Path, report: Any, last_row: Any, chunks: Any = (4,)) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    rows = [{**ROW, "seq": i, "step": i} for i in range(30)]
    rows += [last_row, {**ROW, "seq": 31, "step": 31}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.yaml").write_text(json.dumps({"model": {"local_chunks": chunks}}))
    return folder


@pytest.mark.parametrize("value", VALUES)
def test_values_of_another_kind_in_a_run_folder(tmp_path: Path, value: Any) -> None:
    good_row = {**ROW, "seq": 30, "step": 30}
    for key in REPORT:
        run_folder(tmp_path / "run", {**REPORT, key: value}, good_row)
        _, line = outcome(lambda: compare.compare([tmp_path / "run"]), SECONDS)
        assert key == "status" or says(line, "report.json", key, repr(value)), (key, line)
    for key in ("ppl_delta", "seq", "step", "nonfinite", "train/loss"):
        run = run_folder(tmp_path / "run", REPORT, {**good_row, key: value})
        _, line = outcome(lambda: calibrate.calibrate(run, Console(quiet=True)), SECONDS)  # noqa: B023
        assert says(line, "metrics.jsonl, line 31", key) or (key == "seq" and says(line, "metrics.jsonl")), (key, line)
    run = run_folder(tmp_path / "run", REPORT, good_row, chunks=value)
    _, line = outcome(lambda: compare.compare([run]), SECONDS)
    assert says(line, "config.yaml", "local_chunks") or value == [1]
    assert calibrate.calibrate(run_folder(tmp_path / "run", REPORT, good_row), Console(quiet=True)).count == 32


@pytest.mark.parametrize("content", ["7", "true", "- 1", "a: [", "\xff", "\t"])
def test_a_config_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content.encode("latin-1"))
    _, line = outcome(lambda: read_config(tmp_path / "config.yaml"), SECONDS)
    assert says(line, "config.yaml")
