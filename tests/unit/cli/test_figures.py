"""Pictures are written whole or not at all."""

from pathlib import Path
from typing import BinaryIO

import matplotlib.image
import pytest

from atlas_lm.cli.figures import new_figure, save


def test_a_picture_of_the_size_that_was_asked_for(tmp_path: Path) -> None:
    figure = new_figure(4, 2)
    figure.subplots().plot([0, 1], [0, 1])
    save(figure, tmp_path / "a.png")
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (240, 480)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    figure = new_figure(4, 2)

    def half(file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError("full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        save(figure, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == b"old"
