import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_lm.data.prepare import prepare
from atlas_lm.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer, train_bpe

TEXT = "Zwölf Boxkämpfer jagen Viktor — 東京 🦉 def f(x):\n    return x\n" * 20


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> JsonTokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([TEXT.encode()], 300).save(str(path))
    return JsonTokenizer(path)


@given(st.binary())
def test_bytes_take_anything_and_give_it_back(raw: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(raw).astype(np.uint8).tobytes() == raw
    assert tokenizer.decode(tokenizer.encode(raw)) == raw.decode(errors="replace")


def test_separators_decode_to_nothing(bpe: JsonTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        assert isinstance(tokenizer, Tokenizer)
        ids = np.concatenate([tokenizer.encode("a"), [tokenizer.separator_id], tokenizer.encode(b"b")])
        assert tokenizer.decode(ids) == "ab"
        assert tokenizer.separator_id < tokenizer.vocab_size


@given(text=st.text())
def test_bpe_gives_text_back_and_counts_its_bytes(bpe: JsonTokenizer, text: str) -> None:
    ids, n_bytes = bpe.encode_batch(["t"], [text.encode()])[0][:2]
    assert bpe.decode(ids) == text
    assert n_bytes.sum() == len(text.encode())
    assert (n_bytes >= 0).all()
    assert len(ids) == len(n_bytes)


def test_bytes_of_each_token_follow_the_text(bpe: JsonTokenizer) -> None:
    raw = TEXT.encode()
    ids, n_bytes = bpe.encode_batch(["t"], [raw])[0][:2]
    ends = np.cumsum(n_bytes)
    for token, end, n in zip(ids, ends, n_bytes, strict=True):
        piece = bpe.decode([token])
        if "\ufffd" not in piece:  # whole characters
            assert piece.encode() == raw[end - n : end]


def test_a_separator_inside_a_document_is_text(bpe: JsonTokenizer) -> None:
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.separator_id not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"


def test_bpe_training_is_deterministic(bpe: JsonTokenizer, tmp_path) -> None:
    train_bpe([TEXT.encode()], 300).save(str(tmp_path / "again.json"))
    again = JsonTokenizer(tmp_path / "again.json")
    assert again.fingerprint() == bpe.fingerprint() != ByteTokenizer().fingerprint()
    assert again.vocab_size == 300


def test_a_foreign_tokenizer_with_normalizer_and_unknown_word_counts_all_bytes(tmp_path) -> None:
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "grüße": 2}, unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.Lowercase()
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "words.json"))
    tokenizer = load_tokenizer(str(tmp_path / "words.json"))
    raw = "  GRÜSSE Grüße   x".encode()
    ids, n_bytes = tokenizer.encode_batch(["t"], [raw])[0][:2]
    assert ids.tolist() == [0, 2, 0]
    assert n_bytes.tolist() == [9, 8, 4]  # "  GRÜSSE", " Grüße", "   x"
    assert tokenizer.separator_id == 1
    assert tokenizer.encode_batch(["t"], [b"grosse   "])[0].n_bytes.tolist() == [6]  # nothing stands for the tail


def test_offsets_that_run_backwards_count_no_byte_twice(bpe: JsonTokenizer) -> None:
    assert bpe._with_bytes("t", "abcd", [2, 3, 4], [(0, 3), (1, 2), (3, 4)]).n_bytes.tolist() == [3, 0, 1]


def test_not_utf8_is_named(bpe: JsonTokenizer) -> None:
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8 at byte 2 \(0xfc\).*tokenizer=bytes"):
        bpe.encode_batch(["ok.txt", "latin.txt"], [b"ok", b"Gr\xfc\xdfe"])


@pytest.mark.parametrize("ids", [[257], [-1], [3, 1000]])
def test_ids_outside_the_vocabulary(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 257\)"):
        ByteTokenizer().decode(ids)


def test_the_shipped_tokenizer_is_that_of_the_standard_library(tmp_path) -> None:
    """Its separator, its size; and what prepare writes from the name alone loads as the same."""
    found = load_tokenizer("python")
    assert found.vocab_size == 2048
    text = "def forward(self, x):\n        return self.norm(x)  # größer\n"
    assert found.decode(found.encode(text)) == text
    assert len(found.encode(text)) < 0.6 * len(text.encode())
    (tmp_path / "a.txt").write_text(text * 20)
    folder = prepare("text", tmp_path / "out", tokenizer="python", files=[str(tmp_path / "*.txt")])
    assert load_tokenizer(str(folder / "tokenizer.json")).fingerprint() == found.fingerprint()


def test_bad_tokenizers(tmp_path) -> None:
    import tokenizers

    with pytest.raises(ValueError, match=r"no tokenizer at 'nowhere\.json': give 'bytes', 'python' or"):
        load_tokenizer("nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json' is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path / "broken.json"))
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "bare.json"))
    with pytest.raises(ValueError, match="no separator token"):
        load_tokenizer(str(tmp_path / "bare.json"))
    assert JsonTokenizer(tmp_path / "bare.json", separator="a").separator_id == 0
    with pytest.raises(ValueError, match="the text encodes to the separator 'a'"):
        JsonTokenizer(tmp_path / "bare.json", separator="a").encode("a")
    with pytest.raises(ValueError, match="tokenizer=3 is no tokenizer"):
        load_tokenizer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocab_size=256 is below 257"):
        train_bpe([b"abc"], 256)
    with pytest.raises(ValueError, match="vocab_size=5000: this corpus yields only"):
        train_bpe([b"abc abc"], 5000)
