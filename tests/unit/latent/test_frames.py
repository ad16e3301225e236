"""Embedded documents are read as they were, split by document, and refused where they are wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atlas_lm.latent.audit import audit
from atlas_lm.latent.frames import read_frames
from atlas_lm.latent.source import AFTER, BEFORE, EmbeddingDataset, EmbeddingSource
from tests.support.latent_toys import CONTEXT, DIM, turning_documents, windows, write_npz


def read(path: Path, context: int = CONTEXT) -> Any:
    return read_frames(path, context, 0.3, 0.2)


def test_windows_become_the_documents_that_they_were_cut_from(tmp_path: Path) -> None:
    documents = turning_documents(6)
    found = read(write_npz(tmp_path / "x.npz", documents))
    assert [np.array_equal(a, b) for a, b in zip(found.documents(None, 0), documents, strict=True)] == [True] * 6
    assert {piece.split for piece in found.pieces} <= {"train", "validation", "test"}


def test_windows_out_of_order_are_counted_and_sorted(tmp_path: Path) -> None:
    documents = turning_documents(2)
    arrays = windows(documents)
    order = np.arange(len(arrays["targets"]))
    order[[3, 4]] = order[[4, 3]]
    found = read(write_npz(tmp_path / "x.npz", **{name: value[order] for name, value in arrays.items()}))
    assert found.order_errors == 1
    assert np.array_equal(found.documents(None, 0)[0], documents[0])


def test_windows_with_a_gap_are_two_pieces_of_one_document(tmp_path: Path) -> None:
    arrays = {name: np.delete(value, 7, axis=0) for name, value in windows(turning_documents(2)).items()}
    found = read(write_npz(tmp_path / "x.npz", **arrays))
    assert [piece.document for piece in found.pieces] == ["0", "0", "1"]
    assert found.pieces[0].split == found.pieces[1].split
    assert (found.loose, found.windows) == (1, len(arrays["targets"]))


def test_windows_in_no_order_are_said_to_be_loose(tmp_path: Path) -> None:
    arrays = windows(turning_documents(30))
    order = np.random.default_rng(0).permutation(len(arrays["targets"]))
    mixed = {**{name: value[order] for name, value in arrays.items()}, "target_indices": None}
    alarms = audit(read(write_npz(tmp_path / "x.npz", **mixed)), CONTEXT + 1).alarms()
    assert any("do not continue the one before" in alarm for alarm in alarms)
    alarms = audit(read(write_npz(tmp_path / "y.npz", **arrays)), CONTEXT + 1).alarms()
    assert not any("do not continue" in alarm for alarm in alarms)


def test_no_document_is_in_two_splits_and_a_split_does_not_depend_on_others(tmp_path: Path) -> None:
    few = read(write_npz(tmp_path / "few.npz", turning_documents(20)))
    many = read(write_npz(tmp_path / "many.npz", turning_documents(60)))
    of_few, of_many = ({p.document: p.split for p in found.pieces} for found in (few, many))
    assert of_few.items() <= of_many.items()
    assert set(of_many.values()) == {"train", "validation", "test"}


def test_every_window_is_scored_once_whatever_the_length_of_a_run(tmp_path: Path) -> None:
    found = read(write_npz(tmp_path / "x.npz"))
    wanted = sum(len(rows) - CONTEXT for rows in found.documents("train", CONTEXT + 1))
    for length in (CONTEXT, 7, 64):
        data = EmbeddingDataset(found, "train", CONTEXT, length)
        assert data.scored_tokens(range(len(data))) == wanted
        targets = []
        for item in (data[i] for i in range(len(data))):
            for t in np.flatnonzero(item["scored"].numpy()):
                assert item["valid"][BEFORE + t - CONTEXT + 1 : BEFORE + t + 2].all()
                targets.append(item["frames"][BEFORE + t + 1].numpy().tobytes())
        assert len(set(targets)) == wanted


def test_neighbours_of_another_document_are_not_shown(tmp_path: Path) -> None:
    data = EmbeddingDataset(read(write_npz(tmp_path / "x.npz")), "train", CONTEXT, CONTEXT)
    first = data[0]
    assert not first["valid"][:BEFORE].any()
    assert not first["frames"][:BEFORE].any()
    last = next(i for i, (start, piece) in enumerate(data.runs) if start + CONTEXT + 1 == piece.stop)
    assert data[last]["valid"][-AFTER:].tolist() == [True, False, False]


def test_the_audit_counts_what_is_planted(tmp_path: Path) -> None:
    documents = turning_documents(30)
    documents[4][9] = documents[4][8]
    documents[5][0] = 0
    documents[6] = documents[6][: CONTEXT + 1]
    found = read(write_npz(tmp_path / "x.npz", documents))
    splits = {piece.document: piece.split for piece in found.pieces}
    held = next(int(name) for name, split in splits.items() if split == "validation" and int(name) > 6)
    train = next(int(name) for name, split in splits.items() if split == "train" and int(name) > 6)
    documents[held][3] = documents[train][11]
    found = read(write_npz(tmp_path / "x.npz", documents))
    figures = audit(found, CONTEXT + 2)
    assert (figures.repeated, figures.padded, figures.too_short, figures.order_errors) == (1, 1, 1, 0)
    assert figures.near_duplicates["validation"] == 1
    assert figures.documents == 30
    assert 0.3 < figures.coherence < 0.7
    assert "1 padded" in figures.line()


def test_few_held_out_documents_are_an_alarm(tmp_path: Path) -> None:
    found = read(write_npz(tmp_path / "x.npz", turning_documents(30)))
    held = len({piece.document for piece in found.of("test", CONTEXT + 1)})
    assert 0 < held < 10
    figures = audit(found, CONTEXT + 1)
    assert figures.held_out_documents["test"] == held
    assert any(f"the test split has {held} document" in alarm for alarm in figures.alarms())


def bad(name: str, value: Any) -> dict[str, Any]:
    return {name: value}


GOOD = windows(turning_documents(8))
LONG = {name: np.repeat(value[:1], 3, axis=0) for name, value in GOOD.items()}
WRONG = {
    "no targets": (bad("targets", None), "no targets"),
    "no documents": (bad("document_ids", None), "no document_ids"),
    "objects": (bad("document_ids", np.array([{}] * len(GOOD["targets"]))), "npz of numbers"),
    "whole numbers": (bad("targets", GOOD["targets"].astype(int)), "int64"),
    "another dimension": (bad("targets", GOOD["targets"][:, :9]), "9"),
    "too few rows": (bad("document_ids", GOOD["document_ids"][:-1]), "rows"),
    "a flat context": (bad("contexts", GOOD["contexts"][:, 0]), "3 axes"),
    "not normalised": (bad("targets", GOOD["targets"] * 3), "unit length"),
    "NaN": (
        bad("contexts", np.where(GOOD["contexts"] > 0.9, np.nan, GOOD["contexts"])),
        r"the first is contexts\[2, 1\]",
    ),
    "no rows": ({name: value[:0] for name, value in GOOD.items()}, "holds no windows"),
    "one document": (bad("document_ids", np.zeros_like(GOOD["document_ids"])), "one document"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_by_one_line_that_says_why(case: str, tmp_path: Path) -> None:
    changes, why = WRONG[case]
    if case == "NaN":
        changes = {"contexts": GOOD["contexts"].copy()}
        changes["contexts"][2, 1, 0] = np.nan
    with pytest.raises(ValueError, match=why) as error:
        EmbeddingSource(str(write_npz(tmp_path / "x.npz", turning_documents(8), **changes))).setup()
    assert "\n" not in str(error.value)


def test_documents_shorter_than_a_context_are_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", turning_documents(8, frames=6))
    EmbeddingSource(str(path)).setup()
    with pytest.raises(ValueError, match="context=7"):
        EmbeddingSource(str(path), context=7).setup()
    with pytest.raises(ValueError, match="no document of 6 frames"):  # no hash falls into so small a split
        EmbeddingSource(str(path), validation_fraction=1e-9).dataset("validation", None)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"{}"])
def test_a_file_that_is_no_npz_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz"):
        EmbeddingSource(str(path)).setup()


def test_what_is_not_there_is_said_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="atlas_lm embed"):
        EmbeddingSource(str(tmp_path / "none")).setup()
    with pytest.raises(ValueError, match=r"data.source.out_of_domain=.*nowhere\.npz' is not there: correct"):
        EmbeddingSource(str(write_npz(tmp_path / "x.npz")), str(tmp_path / "nowhere.npz")).setup()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no embeddings"):
        EmbeddingSource(str(tmp_path / "empty")).setup()


def test_out_of_domain_text_by_another_model_is_refused(tmp_path: Path) -> None:
    one = write_npz(tmp_path / "a.npz", embedder=np.array("a"))
    other = write_npz(tmp_path / "b.npz", embedder=np.array("b"))
    with pytest.raises(ValueError, match="embedded by the model b"):
        EmbeddingSource(str(one), str(other)).setup()
    wide = write_npz(tmp_path / "c.npz", turning_documents(dim=DIM + 1))
    with pytest.raises(ValueError, match=f"{DIM + 1} dimensions"):
        EmbeddingSource(str(one), str(wide)).setup()


def test_out_of_domain_documents_are_all_of_the_other_set(tmp_path: Path) -> None:
    other = turning_documents(5, seed=3)
    source = EmbeddingSource(str(write_npz(tmp_path / "a.npz")), str(write_npz(tmp_path / "b.npz", other)))
    assert len(source.documents("out-of-domain")) == 5
    assert EmbeddingSource(str(tmp_path / "a.npz")).documents("out-of-domain") == []
