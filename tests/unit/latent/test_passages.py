"""Text becomes passages: nothing is lost, nothing empty, none too long where it can be cut."""

import pytest

from atlas_lm.latent.passages import passages

TEXT = "To the Senate:\n\nA first paragraph\nof two lines. It has two sentences.\n\n\nA second one.\n\n  \n\nEnd."


def test_paragraphs_are_what_blank_lines_separate() -> None:
    assert passages(TEXT, "paragraph", 0, 1000) == [
        "To the Senate:", "A first paragraph of two lines. It has two sentences.", "A second one.", "End.",
    ]  # fmt: skip


def test_short_ones_join_the_next_and_the_last_one_the_one_before() -> None:
    assert passages(TEXT, "paragraph", 20, 1000) == [
        "To the Senate: A first paragraph of two lines. It has two sentences. A second one. End."
    ] or passages(TEXT, "paragraph", 20, 1000) == [
        "To the Senate: A first paragraph of two lines. It has two sentences.", "A second one. End.",
    ]  # fmt: skip
    assert passages("short", "paragraph", 100, 1000) == ["short"]


def test_sentences_end_where_a_capital_follows() -> None:
    found = passages('He said "no." Then e.g. this, at 3.5 percent. Was it? Yes!', "sentence", 0, 1000)
    assert found == ['He said "no.', "Then e.g. this, at 3.5 percent.", "Was it?", "Yes!"]


@pytest.mark.parametrize("unit", ["paragraph", "line", "sentence"])
@pytest.mark.parametrize("most", [12, 40, 1000])
def test_no_word_is_lost_and_none_is_too_long(unit: str, most: int) -> None:
    text = "\n".join(f"Sentence {i} of some words. Another {i * 7} one follows!\n" for i in range(30))
    found = passages(text, unit, 0, most)
    assert " ".join(found).split() == text.split()
    assert all(0 < len(part) <= most for part in found)


def test_a_word_is_never_cut() -> None:
    assert passages("x" * 50 + " y", "line", 0, 10) == ["x" * 50, "y"]


def test_a_text_of_white_space_has_none() -> None:
    assert passages(" \n\n \t", "paragraph", 40, 1000) == []
