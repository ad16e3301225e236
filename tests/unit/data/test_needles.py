"""Needles in text: what is asked was said, too far back for attention; keys of splits differ; answers are scored."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from atlas_lm.data.interfaces import SPLITS, UNSCORED
from atlas_lm.data.needles import NeedlesSource, keys_of, statement
from atlas_lm.data.recall import RecallSource
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokenizers import ByteTokenizer
from atlas_lm.model.probes import attention_reach

LENGTH, GAP = 400, 40


@pytest.fixture
def source(tmp_path: Path) -> NeedlesSource:
    for split in SPLITS:
        (tmp_path / f"{split}.txt").write_text("".join(f"{split} line {i} of a text.\n" for i in range(400)))
    files = {name: str(tmp_path / f"{split}.txt") for split, name in zip(
        SPLITS, ("files", "validation_files", "test_files"), strict=True)}  # fmt: skip
    return NeedlesSource(TextSource(**files), needles=5, digits=4, window=20, layers=2)


def text_of(source: NeedlesSource, item: dict[str, Any]) -> str:
    return source.tokenizer.decode(item["input_ids"].numpy())


def statements_and_questions(text: str) -> tuple[list[tuple[str, str, int]], list[tuple[str, str, int]]]:
    """Key, value and place of each; a key stands first in its statement."""
    found = [(m[1], m[2], m.start()) for m in re.finditer(r"\[(\w+)=(\d{4})\]", text)]
    first = {key: place for key, _, place in reversed(found)}
    return [f for f in found if f[2] == first[f[0]]], [f for f in found if f[2] != first[f[0]]]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_scored_question_has_its_statement_beyond_the_gap(source: NeedlesSource, split: Any) -> None:
    dataset = source.dataset(split, LENGTH)
    for i in range(len(dataset)):
        said, asked = statements_and_questions(text_of(source, dataset[i]))
        assert sorted(f[:2] for f in said) == sorted(f[:2] for f in asked)
        assert len({key for key, _, _ in said}) == 5
        assert min(place for _, _, place in asked) - max(place for _, _, place in said) > GAP


def test_one_training_question_in_ten_comes_within_the_gap(source: NeedlesSource) -> None:
    dataset, near = source.dataset("train", LENGTH), []
    for i in range(len(dataset)):
        text = text_of(source, dataset[i])
        said, asked = statements_and_questions(text)
        assert sorted(f[:2] for f in said) == sorted(f[:2] for f in asked)
        places = {key: place for key, _, place in said}
        for key, _, place in asked:
            between = re.sub(r"\n\[\w+=\d+\]\n", "", text[places[key] - 1 : place - 1])  # the other statements
            assert place > places[key]
            near.append(len(between) < GAP)
    assert 0.03 < sum(near) / len(near) < 0.2, len(near)


def test_answers_alone_are_scored_where_it_is_measured_and_everything_is_trained(source: NeedlesSource) -> None:
    for split in SPLITS:
        dataset = source.dataset(split, LENGTH)
        item = dataset[0]
        whole = torch.cat([item["input_ids"][1:], item["targets"][-1:]])
        scored = item["targets"] != UNSCORED
        assert torch.equal(item["targets"][scored], whole[scored])
        assert ("weights" in item) == (split == "train")
        if split == "train":
            assert scored.all()
            answers = "".join(value for _, value, _ in statements_and_questions(text_of(source, item))[1])
            assert source.tokenizer.decode(item["targets"][item["weights"] == 20].numpy()) == answers
            assert (item["weights"] == 1).sum() == LENGTH - 5 * 4
            assert dataset.scored_tokens([0, 1]) == 2 * LENGTH
        else:
            answers = "".join(re.findall(r"=(\d{4})\]", text_of(source, item))[5:])
            assert source.tokenizer.decode(whole[scored].numpy()) == answers
            assert dataset.scored_tokens([0, 1]) == 2 * 5 * 4
        assert dataset.scored_bytes([0]) is None


def test_long_values_stand_alone_in_their_share_of_the_sequences(source: NeedlesSource) -> None:
    sizes = {"needles": 5, "digits": 4, "window": 20, "layers": 2}
    mixed = NeedlesSource(source.text, **sizes, long_share=0.4, long_digits=12)
    dataset, plain = mixed.dataset("train", LENGTH), source.dataset("train", LENGTH)
    assert dataset.fingerprint() != plain.fingerprint()
    kinds = []
    for i in range(40):
        values = re.findall(r"\n\[\w+=([0-9a-f]+)\]\n", text_of(source, dataset[i % len(dataset)]))
        kinds.append(sorted(map(len, values)))
        if len(kinds[-1]) == 2:
            assert len(set(values)) == 1, "a statement and its question"
        if len(kinds) == len(dataset):
            break
    assert {tuple(kind) for kind in kinds} == {(12, 12), (4,) * 10}
    assert 0.1 < sum(len(kind) == 2 for kind in kinds) / len(kinds) < 0.8
    every = NeedlesSource(source.text, **sizes, long_share=1.0).dataset("validation", LENGTH)
    assert (every[0]["targets"] != UNSCORED).sum() == 32


def test_what_is_left_is_the_text_in_its_order(source: NeedlesSource) -> None:
    dataset = source.dataset("validation", LENGTH)
    left = re.sub(r"\n\[\w+=\d+\]\n", "", text_of(source, dataset[1]))
    whole = source.tokenizer.decode(source.text.dataset("validation", LENGTH)[1]["input_ids"].numpy())
    assert whole.startswith(left)
    assert len(left) > LENGTH // 2


def test_items_are_the_same_at_every_call_and_differ_by_seed_and_index(source: NeedlesSource) -> None:
    dataset = source.dataset("train", LENGTH)
    first, again, other = dataset[0], dataset[0], dataset[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])
    seeded = NeedlesSource(source.text, needles=5, digits=4, window=20, layers=2, seed=1).dataset("train", LENGTH)
    assert not torch.equal(first["input_ids"], seeded[0]["input_ids"])
    assert dataset.fingerprint() != seeded.fingerprint()
    assert first["input_ids"].shape == first["targets"].shape == first["document_start"].shape == (LENGTH,)


def test_no_key_is_in_two_splits() -> None:
    train, validation, test = (set(keys_of(split)) for split in SPLITS)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert min(map(len, (train, validation, test))) > 500


def test_places_differ(source: NeedlesSource) -> None:
    """A needle is at no fixed distance: a model cannot count its way back."""
    dataset, distances = source.dataset("train", LENGTH), set()
    for i in range(10):
        text = text_of(source, dataset[i])
        places: dict[str, list[int]] = {}
        for match in re.finditer(r"\[(\w+)=", text):
            places.setdefault(match[1], []).append(match.start())
        distances |= {b - a for a, b in places.values()}
    assert len(distances) > 20


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"needles": 0}, "needles=0"), ({"digits": 0}, "digits=0"), ({"window": 0}, "window=0"),
        ({"long_share": 1.5}, "long_share=1.5"), ({"long_digits": 0}, "long_digits=0"),
        ({"gap": 39}, "gap=39 .* raise it to 40"), ({"answer_weight": 0.5}, "answer_weight=0.5"),
        ({"seed": -1}, "seed=-1"), ({"needles": 10_000}, "needles=10000"),
    ],
)  # fmt: skip
def test_bad_values_are_named(source: NeedlesSource, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        NeedlesSource(source.text, **{"window": 20, **changes})


def test_a_source_without_text_and_a_sequence_without_room_are_refused(source: NeedlesSource) -> None:
    with pytest.raises(ValueError, match="none"):
        NeedlesSource(RecallSource())
    with pytest.raises(ValueError, match="seq_len=100 is too short"):
        source.dataset("train", 100)


def test_a_statement_and_its_question_are_the_same_tokens() -> None:
    ids, asked = statement(ByteTokenizer(), "bako", "528").joined()
    assert bytes(ids.tolist()).decode() == "\n[bako=528]\n"
    assert bytes(ids[asked].tolist()).decode() == "528"
    assert asked.dtype == np.bool_


def test_chance_is_that_of_digits(source: NeedlesSource) -> None:
    assert source.chance == 0.1
    assert source.bytes_per_token("train") is None


def test_questions_lie_beyond_attention_with_its_convolution(source: NeedlesSource) -> None:
    """Every layer reaches window − 1 + convolution − 1 tokens back."""
    config = SimpleNamespace(layers=2, window=20, attention_conv=4)
    wide = NeedlesSource(source.text, needles=5, digits=4, window=20, layers=2, attention_conv=4)
    assert wide.gap == attention_reach(config) + 2 == 46
    assert source.gap == 40
    with pytest.raises(ValueError, match="gap=45 lies within 2 windows of 20 with a convolution of 4: raise it to 46"):
        NeedlesSource(source.text, needles=5, digits=4, window=20, layers=2, attention_conv=4, gap=45)
