import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from atlas_lm.cli.arguments import attempt
from atlas_lm.cli.prepare import main
from atlas_lm.data import prepare as prepare_module
from atlas_lm.data.interfaces import SPLITS, Source
from atlas_lm.data.packed import PackedDataset
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokens import ShardedArray, TokensSource, write_durably


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"document {i}: " + "süß " * (i % 17)}) for i in range(300)]
    path.write_text("\n".join(lines))
    return str(path)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def items(dataset: PackedDataset) -> list[tuple[list[int], list[bool]]]:
    return [(s["targets"].tolist(), s["document_start"].tolist()) for s in (dataset[i] for i in range(len(dataset)))]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_shards_give_the_sequences_of_the_corpus_in_memory(corpus: str, tmp_path: Path, tokenizer: str) -> None:
    out = tmp_path / "out"
    prepare("text", out, tokenizer, 280 if tokenizer == "bpe" else None, block_mb=0.002, files=corpus)
    source = TokensSource(str(out))
    assert isinstance(source, Source)
    memory = TextSource(corpus, tokenizer="bytes" if tokenizer == "bytes" else str(out / "tokenizer.json"))
    assert source.vocab_size == memory.vocab_size == (257 if tokenizer == "bytes" else 280)
    assert source.tokenizer.fingerprint() == memory.tokenizer.fingerprint()
    assert len(list(out.glob("train-*.tokens"))) > 3  # sequences do cross shards
    for split in SPLITS:
        ours, theirs = source.dataset(split, 7), memory.dataset(split, 7)
        assert items(ours) == items(theirs)
        assert source.bytes_per_token(split) == memory.bytes_per_token(split)
        everything = range(len(ours))
        assert ours.scored_bytes(everything) == theirs.scored_bytes(everything)
    assert (source.dataset("validation", 7).scored_bytes([0]) is None) is False


@pytest.mark.parametrize("split", SPLITS)
def test_every_damage_is_one_clear_error(corpus: str, tmp_path: Path, split: str) -> None:
    out = prepare("text", tmp_path / "out", files=corpus)
    for path in sorted(out.glob(f"{split}-*")):
        good = path.read_bytes()
        middle = len(good) // 2
        flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
        for bad, message in ((flipped, "is damaged"), (good[:-2], "bytes instead of"), (None, "is missing")):
            path.unlink() if bad is None else path.write_bytes(bad)
            with pytest.raises(ValueError, match=rf"{path.name}' .*{message}.*prepare again"):
                TokensSource(str(out)).setup()
            path.write_bytes(good)
    TokensSource(str(out)).setup()


def test_a_damaged_index(corpus: str, tmp_path: Path) -> None:
    out = prepare("text", tmp_path / "out", files=corpus)
    good = (out / "index.json").read_text()
    for bad, message in (
        (good.replace('"tokens": ', '"tokens": 1'), "its checksum differs"),
        (good[:-9], "is damaged"),
        ('{"format": "something else"}', "is not of the format"),
    ):
        (out / "index.json").write_text(bad)
        with pytest.raises(ValueError, match=message):
            TokensSource(str(out))
    (out / "index.json").unlink()
    with pytest.raises(ValueError, match="no token shards in"):
        TokensSource(str(out))


def test_another_tokenizer_than_the_shards_were_written_with(corpus: str, tmp_path: Path) -> None:
    out = prepare("text", tmp_path / "out", "bpe", 280, files=corpus)
    prepare("text", tmp_path / "other", "bpe", 290, files=corpus)
    (out / "tokenizer.json").write_bytes((tmp_path / "other" / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="is not the tokenizer that wrote these shards"):
        TokensSource(str(out))


def test_a_tokenizer_json_is_copied_beside_the_shards(corpus: str, tmp_path: Path) -> None:
    bpe = prepare("text", tmp_path / "bpe", "bpe", 280, files=corpus)
    out = prepare("text", tmp_path / "out", str(bpe / "tokenizer.json"), files=corpus)
    expected = items(TokensSource(str(bpe)).dataset("train", 9))
    (bpe / "tokenizer.json").unlink()
    assert items(TokensSource(str(out)).dataset("train", 9)) == expected
    with pytest.raises(ValueError, match=r"tokenizer\.json' is missing: delete the folder"):
        TokensSource(str(bpe))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_resuming_after_any_interruption_gives_the_same_bytes(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    arguments = {"tokenizer": tokenizer, "vocab_size": 280 if tokenizer == "bpe" else None, "block_mb": 0.002}
    whole = content(prepare("text", tmp_path / "whole", **arguments, files=corpus))
    real = prepare_module.write_durably
    out = tmp_path / "out"
    runs = 0

    class Killed(BaseException):
        pass

    def dies_after_nine(path: Path, data: bytes):
        nonlocal left
        left -= 1
        if left < 0:
            path.with_name(path.name + ".9.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        return real(path, data)

    monkeypatch.setattr(prepare_module, "write_durably", dies_after_nine)
    while runs < 60:
        left, runs = 9, runs + 1
        try:
            prepare("text", out, **arguments, files=corpus)
            break
        except Killed:
            assert not (out / "index.json").exists()
    assert 5 < runs < 60
    assert content(out) == whole
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    prepare("text", out, **arguments, files=corpus)  # complete: nothing is written again
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_sigkill_and_again(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i} " * 40}) for i in range(2000)]
    (tmp_path / "c.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "atlas_lm", "prepare", "source=text", f"files={tmp_path}/c.jsonl",
               f"out={tmp_path}/out", "block_mb=0.02"]  # fmt: skip
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("part-*.json")):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*.json")}
    with pytest.raises(ValueError, match="no token shards in"):
        TokensSource(str(tmp_path / "out"))
    tokens = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("train-*.tokens")}
    options = {"files": f"{tmp_path}/c.jsonl", "block_mb": 0.02}
    out = prepare("text", tmp_path / "out", **options)
    assert content(out) == content(prepare("text", tmp_path / "whole", **options))
    assert len(written) >= 1
    assert (out / "train-00000.tokens").stat().st_mtime_ns == tokens["train-00000.tokens"]  # not written again


def interrupted(corpus: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prepare_module, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("text", out, files=corpus)


def test_what_changed_since_the_interruption_is_refused(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(corpus, out, monkeypatch)
    with pytest.raises(ValueError, match="was begun with other settings"):
        prepare("text", out, files=corpus, validation_fraction=0.2)
    Path(corpus).write_text(Path(corpus).read_text().replace("document 7:", "document 8:"))
    with pytest.raises(ValueError, match="the corpus changed since"):
        prepare("text", out, files=corpus)


def test_a_shard_damaged_during_the_interruption(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(corpus, tmp_path / "out", monkeypatch)
    shard = tmp_path / "out" / "train-00000.tokens"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"train-00000\.tokens' has \d+ bytes instead of"):
        prepare("text", tmp_path / "out", files=corpus)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("out=o", "source= is missing"),
        ("source=stdlib", "out= is missing"),
        ("source=nosuch out=o", "source=nosuch is unknown: use one of stdlib, text, hf"),
        ("source=stdlib out=o tokeniser=bytes", "source=stdlib has no tokeniser: it knows root"),
        ("source=text out=o", "missing 1 required positional argument: 'files'"),
        ("source=stdlib out=o vocab_size=300", "tokenizer=bytes with vocab_size=300"),
        ("source=stdlib out=o tokenizer=bpe", "tokenizer=bpe with vocab_size=None"),
        ("source=stdlib out=o block_mb=0", "block_mb=0 must be above 0"),
        ("source=stdlib out", "'out' is not key=value"),
        ("source=stdlib out=[", "cannot read the arguments"),
        ("source=stdlib out=o tokenizer=no.json", "no tokenizer at 'no.json'"),
        ("source=text out=o files=no.txt", "nothing matches 'no.txt'"),
    ],
)
def test_command_line_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    error = attempt(lambda: main(words.split()))
    assert isinstance(error, str)
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error


def test_command_line(capsys: pytest.CaptureFixture[str], corpus: str, tmp_path: Path) -> None:
    words = ["source=text", f"files=[{corpus}]", f"out={tmp_path}/out", "tokenizer=bpe", "vocab_size=280"]
    main(words)
    assert "validation:" in capsys.readouterr().out
    assert TokensSource(f"{tmp_path}/out").vocab_size == 280
    with pytest.raises(ValueError, match="other settings"):
        main([*words[:-1], "vocab_size=290"])
    main(["--help"])
    assert "vocab_size" in capsys.readouterr().out


def test_a_folder_with_something_else_in_it_and_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and was not written by prepare"):
        prepare("text", tmp_path, files=str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="the corpus is empty"):
        prepare("text", tmp_path / "out", files=str(tmp_path / "a.txt"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def power_cut(_: object) -> None:
        raise KeyboardInterrupt

    write_durably(tmp_path / "a", b"old")
    assert content(tmp_path) == {"a": b"old"}
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", lambda *_: power_cut(_))
        with pytest.raises(KeyboardInterrupt):
            write_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write_durably(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert len(synced) == 2  # the file before it gets its name, the folder after


def test_sharded_array_is_an_array(tmp_path: Path) -> None:
    whole = np.arange(20, dtype=np.uint16)
    paths = []
    for i, (first, last) in enumerate([(0, 3), (3, 4), (4, 15), (15, 20)]):
        paths.append(tmp_path / str(i))
        whole[first:last].tofile(paths[-1])
    array = ShardedArray(paths, "uint16")
    for first in range(21):
        for last in range(22):
            assert array[first:last].tolist() == whole[first:last].tolist()
    assert len(pickle.dumps(array)) < 2000
    assert pickle.loads(pickle.dumps(array))[2:9].tolist() == whole[2:9].tolist()
    assert len(ShardedArray([], "uint16")[:]) == 0
