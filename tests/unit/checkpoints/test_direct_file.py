"""DirectFile: the bytes that were written and their checksum, whatever the filesystem lets it do."""

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from atlas_lm.checkpoints import direct_file
from atlas_lm.checkpoints.direct_file import BLOCK, CHUNK, DirectFile
from tests.support.launching import files_no_larger_than

SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5]


def content_of(size: int) -> bytes:
    return (b"0123456789abcdefghijklmnopqrstuvwxyz" * (size // 36 + 1))[:size]


def takes_any_block(folder: Path) -> bool:
    """Some filesystems in memory do, also past the cache that they are themselves."""
    handle = os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | direct_file.DIRECT)
    try:
        return os.write(handle, b"x") == 1
    except OSError:
        return False
    finally:
        os.close(handle)


def write(path: Path, content: bytes, part: int) -> str:
    with DirectFile(path) as file:
        for start in range(0, len(content), part):
            assert file.write(memoryview(content)[start : start + part]) == len(content[start : start + part])
        return file.finish()


@pytest.mark.parametrize("part", [997, 64 * 1024, 10 * CHUNK])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("direct", [direct_file.DIRECT, 0], ids=["direct", "through the cache"])
def test_what_was_written_is_there(
    direct: int, size: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_file, "DIRECT", direct)
    path, content = tmp_path / "file", content_of(size)
    path.write_bytes(b"older and longer" * CHUNK)
    assert write(path, content, part) == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content


def test_it_goes_past_the_cache_where_it_can(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | direct_file.DIRECT))
    except OSError:
        pytest.skip("the filesystem of temporary files knows no direct writes")
    with DirectFile(tmp_path / "file") as file:
        file.write(content_of(CHUNK + 1))
        file.finish()
        assert direct_file.DIRECT == 0 or direct_file._is_direct(file._handle)


@pytest.mark.parametrize("size", [100, CHUNK + 100])
def test_a_filesystem_that_wants_other_blocks(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one byte are none that a disk takes."""
    monkeypatch.setattr(direct_file, "BLOCK", 1)
    monkeypatch.setattr(direct_file, "_spare", [])
    path, content = tmp_path / "file", content_of(size)
    with DirectFile(path) as file:
        file.write(content)
        assert file.finish() == hashlib.sha256(content).hexdigest()
        assert not direct_file._is_direct(file._handle) or takes_any_block(tmp_path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP, errno.ENOMEM])
def test_what_fails_past_the_cache_goes_through_it(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filesystems that are not here may open a file for direct writes and then refuse them."""
    write_to = os.write

    def refuse(handle: int, data: memoryview) -> int:
        if direct_file._is_direct(handle):
            raise OSError(error, os.strerror(error))
        return write_to(handle, data)

    monkeypatch.setattr(os, "write", refuse)
    content = content_of(CHUNK + 100)
    assert write(tmp_path / "file", content, 1000) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


def test_another_default_device_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "_spare", [])
    with torch.device("meta"):
        assert write(tmp_path / "file", b"abc", 1) == hashlib.sha256(b"abc").hexdigest()


@pytest.mark.parametrize("room", [0, 100, CHUNK, CHUNK + BLOCK, 2 * CHUNK + 100])
def test_a_full_disk_is_said_at_the_end(room: int, tmp_path: Path) -> None:
    content = content_of(2 * CHUNK + 200)
    with files_no_larger_than(room), DirectFile(tmp_path / "file") as file:
        for _ in range(3):
            assert file.write(content) == len(content)
        with pytest.raises(OSError, match="File too large") as caught:
            file.finish()
    assert caught.value.errno == errno.EFBIG
    assert write(tmp_path / "file", content, CHUNK) == hashlib.sha256(content).hexdigest(), "and the next one is whole"


def test_files_written_at_once_do_not_mix(tmp_path: Path) -> None:
    contents = [bytes([i]) * (2 * CHUNK + 10 * i) for i in range(3)]
    files = [DirectFile(tmp_path / str(i)) for i in range(3)]
    for start in range(0, len(contents[-1]), 100_000):
        for file, content in zip(files, contents, strict=True):
            file.write(content[start : start + 100_000])
    for i, (file, content) in enumerate(zip(files, contents, strict=True)):
        with file:
            assert file.finish() == hashlib.sha256(content).hexdigest()
        assert (tmp_path / str(i)).read_bytes() == content


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "missing" / "file")
    with pytest.raises(IsADirectoryError):
        DirectFile(tmp_path)
