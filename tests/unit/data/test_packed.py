import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from atlas_lm.data.interfaces import Document, Split, split_of
from atlas_lm.data.packed import PackedDataset, PackedSource, Packer, cut
from atlas_lm.data.tokenizers import ByteTokenizer, JsonTokenizer, train_bpe

SEPARATOR = 256


def packed(raws: list[bytes], seq_len: int, tokenizer=None) -> PackedDataset:
    packer = Packer(tokenizer or ByteTokenizer(), keep_raw=True)
    for raw in raws:
        packer.add(Document("d", raw, "validation"))
    return PackedDataset(packer.stream(), seq_len, "validation")


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=30), st.integers(1, 9))
def test_sequences_against_a_plain_loop(raws: list[bytes], seq_len: int) -> None:
    stream: list[int] = []
    starts: list[bool] = []
    for raw in filter(None, raws):
        stream += [*raw, SEPARATOR]
        starts += [True] + [False] * len(raw)
    if len(stream) <= seq_len:
        with pytest.raises(ValueError, match="validation split"):
            packed(raws, seq_len)
        return
    dataset = packed(raws, seq_len)
    assert len(dataset) == (len(stream) - 1) // seq_len
    for i in range(len(dataset)):
        first, last = i * seq_len, (i + 1) * seq_len
        assert dataset[i]["input_ids"].tolist() == stream[first:last]
        assert dataset[i]["targets"].tolist() == stream[first + 1 : last + 1]
        assert dataset[i]["document_start"].tolist() == starts[first:last]
        targets = dataset[i]["targets"]
        assert dataset.scored_bytes([i]) == bytes(targets[targets != SEPARATOR].tolist())


def test_dtypes_and_fingerprint() -> None:
    dataset = packed([b"hello world"], 4)
    assert {k: v.dtype for k, v in dataset[0].items()} == {
        "input_ids": torch.int64,
        "targets": torch.int64,
        "document_start": torch.bool,
    }
    assert dataset.fingerprint() == packed([b"hello world"], 4).fingerprint()
    assert dataset.fingerprint() != packed([b"hello World"], 4).fingerprint()
    assert dataset.fingerprint() != packed([b"hello world"], 5).fingerprint()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_scored_bytes_of_bpe_are_the_text_of_the_targets(tmp_path) -> None:
    raws = [("def f(x):\n    return x + 1\n" * n).encode() for n in range(1, 20)]
    train_bpe(raws, 270).save(str(tmp_path / "t.json"))
    tokenizer = JsonTokenizer(tmp_path / "t.json")
    dataset = packed(raws, 7, tokenizer)
    for i in range(len(dataset)):
        assert dataset.scored_bytes([i]) == tokenizer.decode(dataset[i]["targets"].numpy()).encode()
    whole = dataset.scored_bytes(range(len(dataset)))
    assert whole is not None
    first = len(tokenizer.decode(dataset[0]["input_ids"][:1].numpy()))
    assert whole == b"".join(raws)[first : first + len(whole)]


def test_bytes_that_no_token_stands_for_are_no_text(tmp_path) -> None:
    """White space that a pre-tokenizer skips costs a model nothing, so it must not count as text that it predicts."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[SEP]": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "t.json"))
    dataset = packed([b" a b  ", b"   ", b"b "], 1, JsonTokenizer(tmp_path / "t.json"))
    assert [dataset[i]["targets"].item() for i in range(4)] == [2, 0, 2, 0]
    assert [dataset.scored_bytes([i]) for i in range(4)] == [b"b", b"", b"b", b""]


def test_errors_name_the_value_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="seq_len=None"):
        packed([b"abc"], None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"validation split .* validation_fraction"):
        packed([b""], 4)
    with pytest.raises(ValueError, match=r"4 tokens .* seq_len=4 .* 5"):
        packed([b"abc"], 4)


class Listed(PackedSource):
    def __init__(self, *documents: tuple[bytes, Split]) -> None:
        super().__init__()
        self.listed = documents
        self.passes = 0

    def documents(self):
        self.passes += 1
        return (Document("d", raw, split) for raw, split in self.listed)


def test_a_source_reads_once_and_keeps_the_splits_apart() -> None:
    source = Listed((b"train" * 9, "train"), (b"val" * 9, "validation"))
    source.setup()
    source.setup()
    assert source.passes == 1
    assert set(source.dataset("train", 8)[0]["input_ids"].tolist()) == set(b"train")
    assert set(source.dataset("validation", 8)[0]["input_ids"].tolist()) == set(b"val")
    assert source.bytes_per_token("train") == 45 / 46
    assert source.dataset("train", 8).scored_bytes([0]) is None
    with pytest.raises(ValueError, match="test split is empty"):
        source.dataset("test", 8)
    with pytest.raises(ValueError, match="Listed found no text"):
        Listed((b"", "train")).setup()


def test_large_vocabularies_are_not_wrapped_round() -> None:
    class Wide(ByteTokenizer):
        vocab_size = 70_001
        separator_id = 70_000

    packer = Packer(Wide(), keep_raw=False)
    packer.add(Document("d", b"ab", "train"))
    assert packer.arrays()[0].tolist() == [97, 98, 70_000]


@given(st.text(st.sampled_from("ab\nö東"), max_size=200), st.integers(4, 20))
def test_cut_keeps_every_byte_and_every_character(text: str, document_bytes: int) -> None:
    parts = list(cut(Document("d", text.encode(), "train"), document_bytes))
    assert b"".join(part.raw for part in parts) == text.encode()
    for part in parts:
        part.raw.decode()
        assert len(part.raw) <= document_bytes
    for part in parts[:-1]:
        assert part.raw.endswith(b"\n") or b"\n" not in part.raw


def test_cut_ends_on_bytes_that_are_no_utf8() -> None:
    raw = bytes([0x80]) * 10
    assert b"".join(part.raw for part in cut(Document("d", raw, "train"), 3)) == raw


def test_splits_by_hash_have_the_sizes_asked_for_and_never_move() -> None:
    splits = [split_of(str(i).encode(), 0.1, 0.2) for i in range(5000)]
    assert abs(splits.count("validation") / 5000 - 0.1) < 0.02
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02
    assert [split_of(f"{name}.py".encode(), 0.3, 0.3) for name in "abcf"] == [
        "train", "train", "test", "validation",
    ]  # fmt: skip
    assert {split_of(bytes([i]), 0, 0) for i in range(99)} == {"train"}


def test_stream_is_small() -> None:
    packer = Packer(ByteTokenizer(), keep_raw=False)
    packer.add(Document("d", b"x" * 1000, "train"))
    assert packer.arrays()[0].dtype == np.uint16
