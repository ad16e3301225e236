"""Token shards at an address: the same sequences, each file copied once, and every failure in one clear line."""

import errno
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from filelock import FileLock

from atlas_lm.data import remote
from atlas_lm.data.interfaces import SPLITS
from atlas_lm.data.prepare import prepare
from atlas_lm.data.remote import RemoteShards
from atlas_lm.data.tokens import TokensSource


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"document {i}: " + "word " * (i % 17)}) for i in range(300)))
    return prepare("text", tmp_path / "shards", "bpe", 280, block_mb=0.002, files=str(corpus))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; `asked` are their names, in order."""

    asked: ClassVar[list[str]] = []
    cut: ClassVar[dict[str, int]] = {}  # how often a name comes as half

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.asked.append(name)
        if self.cut.get(name, 0) > 0:
            self.cut[name] -= 1
            content = Path(self.translate_path(self.path)).read_bytes()
            half = content[: len(content) // 2]
            self.send_response(200)
            self.send_header("Content-Length", str(len(half)))
            self.end_headers()
            self.wfile.write(half)
            return
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address(shards: Path) -> Iterator[str]:
    Handler.asked, Handler.cut = [], {}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(shards)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAIT", 0.01)


def test_the_sequences_are_those_of_the_folder_and_no_file_is_fetched_twice(
    shards: Path, address: str, tmp_path: Path
) -> None:
    ours, theirs = TokensSource(address, str(tmp_path / "cache")), TokensSource(str(shards))
    for split in SPLITS:
        one, other = ours.dataset(split, 7), theirs.dataset(split, 7)
        assert len(one) == len(other) > 0
        assert all(one[i]["targets"].tolist() == other[i]["targets"].tolist() for i in range(len(one)))
    assert ours._streams["train"].fingerprint == theirs._streams["train"].fingerprint
    fetched = [name for name in Handler.asked if name.endswith((".tokens", ".raw", ".lengths"))]
    assert len(fetched) == len(set(fetched)) > 5
    before = len(Handler.asked)
    TokensSource(address, str(tmp_path / "cache")).setup()
    assert Handler.asked[before:] == ["index.json"]


def test_an_address_that_no_longer_answers_has_its_copy(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A job that is started again at night."""
    address = f"file://{shards}"
    before = TokensSource(address, str(tmp_path / "cache")).dataset("train", 7)
    shards.rename(tmp_path / "away")
    after = TokensSource(address, str(tmp_path / "cache")).dataset("train", 7)
    assert [row["targets"].tolist() for row in after] == [row["targets"].tolist() for row in before]
    assert "taking the copy of before" in caplog.text
    with pytest.raises(ValueError, match="cannot be copied"):
        TokensSource(address, str(tmp_path / "another cache")).setup()


def test_who_waits_for_another_process_reads_so(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    caplog.set_level("INFO")
    copy = RemoteShards(f"file://{shards}", tmp_path / "cache")
    with FileLock(copy.folder / ".lock"):
        waiting = threading.Thread(target=copy.fetch, args=([{"file": "train-00000.tokens", "size": 1}],), daemon=True)
        waiting.start()
        deadline = time.monotonic() + 10
        while "another process copies" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        (copy.folder / "train-00000.tokens").touch()
    waiting.join(10)
    assert "another process copies" in caplog.text
    assert not waiting.is_alive()


@pytest.mark.long
def test_processes_that_ask_at_once_fetch_once(shards: Path, address: str, tmp_path: Path) -> None:
    code = (
        f"from atlas_lm.data.tokens import TokensSource; TokensSource({address!r}, {str(tmp_path / 'cache')!r}).setup()"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    fetched = [name for name in Handler.asked if name.endswith((".tokens", ".raw", ".lengths"))]
    assert len(fetched) == len(set(fetched)) > 5


def test_a_file_that_came_as_half_is_fetched_again(address: str, tmp_path: Path) -> None:
    Handler.cut = {"train-00001.tokens": 2}
    TokensSource(address, str(tmp_path / "cache")).setup()
    assert Handler.asked.count("train-00001.tokens") == 3


def test_a_file_that_never_comes_whole_is_one_clear_line_and_leaves_nothing(address: str, tmp_path: Path) -> None:
    Handler.cut = {"train-00001.tokens": 99}
    source = TokensSource(address, str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"train-00001.tokens cannot be copied .*not the \d+ of the index"):
        source.setup()
    left = [path.name for path in (tmp_path / "cache").rglob("*train-00001*")]
    assert left == []


def test_shards_that_were_written_anew_are_another_copy(shards: Path, address: str, tmp_path: Path) -> None:
    first = TokensSource(address, str(tmp_path / "cache"))
    first.setup()
    for path in shards.iterdir():
        path.unlink()
    (tmp_path / "other.txt").write_text("another text " * 4000)
    prepare("text", shards, files=str(tmp_path / "other.txt"))
    second = TokensSource(address, str(tmp_path / "cache"))
    second.setup()
    assert second.vocab_size != first.vocab_size
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 2


def test_a_copy_that_was_damaged_here_says_so(address: str, tmp_path: Path) -> None:
    TokensSource(address, str(tmp_path / "cache")).setup()
    (path,) = (tmp_path / "cache").rglob("train-00001.tokens")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"delete the folder, it is copied again from {address}"):
        TokensSource(address, str(tmp_path / "cache")).setup()


def test_what_is_no_index_names_the_address(shards: Path, address: str, tmp_path: Path) -> None:
    for content in ("<html>sign in first</html>", "{}"):
        (shards / "index.json").write_text(content)
        with pytest.raises(ValueError, match=f"index.json' is .* copied again from {address}"):
            TokensSource(address, str(tmp_path / "cache"))


def test_a_full_disk_is_not_tried_again(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, fsync = TokensSource(address, str(tmp_path / "cache")), os.fsync
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    before = len(Handler.asked)
    with pytest.raises(ValueError, match=r"No space left on device\): free space, or name another folder"):
        source.setup()
    assert len(Handler.asked) == before + 1
    monkeypatch.setattr(os, "fsync", fsync)
    source.setup()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{address}/nowhere", r"index.json cannot be copied \(.*404.*correct the address"),
        ("nosuch://x/y", "cannot be read: Protocol not known"),
        ("http://127.0.0.1:9/shards", r"index.json cannot be copied \(.*connect.*correct the address"),
    ],
)
def test_an_address_that_cannot_be_read_is_one_clear_line(
    address: str, tmp_path: Path, given: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        TokensSource(given.format(address=address), str(tmp_path))
    assert "\n" not in str(error.value)


def test_an_index_cannot_write_outside_its_copy(address: str, tmp_path: Path) -> None:
    shards = RemoteShards(address, tmp_path / "cache")
    for name in ("../../outside", "/tmp/outside", ".."):
        with pytest.raises(ValueError, match="not a plain name"):
            shards.fetch([{"file": name, "size": 1, "blake2b": ""}])
    assert not (tmp_path / "outside").exists()


def test_a_protocol_without_its_package_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/shards needs a package: .*s3fs"):
        TokensSource("s3://bucket/shards", str(tmp_path))


def test_a_cache_that_cannot_be_written_is_one_clear_line(address: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"name another folder with data\.source\.cache"):
        RemoteShards(address, tmp_path / "file")
