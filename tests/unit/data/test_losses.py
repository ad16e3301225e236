"""What a tokenizer loses of a text counts in no figure, is reported, and is refused above a tenth."""

import json
import logging
import math
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from atlas_lm.cli import generate
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.losses import Losses
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokenizers import ByteTokenizer, JsonTokenizer
from atlas_lm.data.tokens import TokensSource
from atlas_lm.runs.report import quality
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, launch, only_run, report_of

ENGLISH = ["alpha beta gamma delta epsilon zeta eta theta"] * 20


def saved(path: Path, tokenizer: tokenizers.Tokenizer, words: list[str] = ENGLISH, size: int = 200) -> JsonTokenizer:
    special = ["<unk>", "<|endoftext|>"] if getattr(tokenizer.model, "unk_token", None) else ["<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if tokenizer.decoder else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.save(str(path))
    return JsonTokenizer(path)


def words_only(path: Path, unknown: str | None) -> JsonTokenizer:
    """A BPE on words, as `BPE()` and `Whitespace()` give: no byte fallback."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token=unknown, fuse_unk=True) if unknown else models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return saved(path, tokenizer)


def byte_level(path: Path, normalizer: normalizers.Normalizer | None = None, trim: bool = False) -> JsonTokenizer:
    from tokenizers import processors

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return saved(path, tokenizer, size=275)


def kept(tokenizer: JsonTokenizer | ByteTokenizer, text: str) -> str:
    """What is left of a text without the characters that are lost."""
    raw = text.encode()
    (encoded,) = tokenizer.encode_batch(["t"], [raw])
    if encoded.lost is None:
        return text
    assert len(encoded.lost) == len(raw)
    return bytes(b for b, fate in zip(raw, encoded.lost, strict=True) if fate == 0).decode()


@pytest.mark.parametrize("unknown", [None, "<unk>"])
def test_unknown_characters_are_lost_whether_dropped_or_marked(tmp_path: Path, unknown: str | None) -> None:
    tokenizer = words_only(tmp_path / "t.json", unknown)
    assert kept(tokenizer, "alpha дельта beta") == "alphabeta"
    assert kept(tokenizer, "дельта") == ""
    assert kept(tokenizer, "") == ""


def test_a_byte_level_tokenizer_loses_nothing(tmp_path: Path) -> None:
    text = "alpha  дельта\n\tbeta 東京 🦉 <|endoftext|> \x00"
    for tokenizer in (ByteTokenizer(), byte_level(tmp_path / "t.json"), byte_level(tmp_path / "u.json", trim=True)):
        assert kept(tokenizer, text) == text


@pytest.mark.parametrize(
    ("normalizer", "text", "left"),
    [
        (normalizers.Lowercase(), "Alpha BETA gamma", "lpha  gamma"),
        (normalizers.NFKC(), "alpha ﬁ ①", "alpha  "),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "alphä été", "alph t"),
    ],
)
@pytest.mark.parametrize("trim", [False, True])
def test_what_a_normalizer_changes_is_lost(
    tmp_path: Path, normalizer: normalizers.Normalizer, text: str, left: str, trim: bool
) -> None:
    assert kept(byte_level(tmp_path / "t.json", normalizer, trim), text) == left


def test_a_decoder_that_is_missing_loses_nothing(tmp_path: Path) -> None:
    """Ids are what a model learns; only `generate` needs the decoder."""
    byte_level(tmp_path / "t.json")
    content = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**content, "decoder": None}))
    assert kept(JsonTokenizer(tmp_path / "t.json"), "alpha дельта\nbeta") == "alpha дельта\nbeta"


def test_metaspace_and_byte_fallback_lose_nothing(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("a", -2.0), ("b", -2.0)]
    pieces += [(f"<0x{i:02X}>", -9.0) for i in range(256)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.save(str(tmp_path / "t.json"))
    assert kept(JsonTokenizer(tmp_path / "t.json"), "ab ba д  a") == "ab ba д  a"
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces[:5], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(tmp_path / "t.json"))
    assert kept(JsonTokenizer(tmp_path / "t.json"), "ab ba д a") == "ab ba  a"


def test_the_name_of_the_unknown_token_in_a_text_is_text(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "t.json"))
    assert kept(JsonTokenizer(tmp_path / "t.json"), "a <unk> b") == "a<unk>"


def write(path: Path, russian: int) -> str:
    words = ENGLISH[0].split()
    texts = [" ".join(words[(i + j * j) % 8] for j in range(12 + i % 7)) + " ж" * russian for i in range(120)]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n".join(lines))
    return str(path)


def test_the_denominator_counts_what_tokens_stand_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = words_only(tmp_path / "t.json", None)
    path = write(tmp_path / "a.jsonl", russian=3)
    source = TextSource(path, tokenizer=tokenizer, validation_fraction=0.3)
    with caplog.at_level(logging.WARNING):
        data = TokenDataModule(source, batch_size=2, seq_len=16)
        data.setup("fit")
    assert "of the characters of the validation split" in caplog.text
    assert "such as 'ж" in caplog.text
    raw = data.held_out_bytes()
    assert raw
    assert b"\xd0" not in raw
    assert b" " not in raw
    tokens = [data.source.dataset("validation", 16)[i]["targets"] for i in data.held_out_indices("validation")]
    said = "".join(tokenizer.decode(t.numpy()).replace(" ", "") for t in tokens).replace("<|endoftext|>", "")
    assert raw.decode() == said
    share = data.lost_characters()
    assert share is not None
    documents = [d.raw.decode() for d in source.documents() if d.split == "validation"]
    whole, left = sum(map(len, documents)), sum(len(kept(tokenizer, text)) for text in documents)
    assert share == pytest.approx(1 - left / whole)
    assert 0 < source.bytes_per_token("train") < 10

    out = prepare("text", tmp_path / "out", str(tmp_path / "t.json"), files=path, validation_fraction=0.3)
    shards = TokensSource(str(out))
    for split in ("train", "validation", "test"):
        assert shards.losses(split) == source.losses(split)
        assert shards.bytes_per_token(split) == pytest.approx(source.bytes_per_token(split), nan_ok=True)
    ours, theirs = shards.dataset("validation", 16), source.dataset("validation", 16)
    assert ours.scored_bytes(range(len(ours))) == theirs.scored_bytes(range(len(theirs)))


def test_another_script_is_refused(tmp_path: Path) -> None:
    words_only(tmp_path / "t.json", "<unk>")
    path = write(tmp_path / "a.jsonl", russian=40)
    for make in (
        lambda: TextSource(path, tokenizer=str(tmp_path / "t.json")).setup(),
        lambda: prepare("text", tmp_path / "out", str(tmp_path / "t.json"), files=path),
    ):
        with pytest.raises(ValueError, match=r"\d\d\.\d% of the characters of the train split are unknown.*'ж"):
            make()
    assert not (tmp_path / "out" / "index.json").exists()


def test_documents_without_a_single_token_are_counted(tmp_path: Path) -> None:
    """They leave no trace among the tokens, so they must leave one here."""
    words_only(tmp_path / "t.json", None)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in ["alpha beta"] * 90 + ["ж"] * 5))
    source = TextSource(
        f"{tmp_path}/a.jsonl", tokenizer=str(tmp_path / "t.json"), validation_fraction=0, test_fraction=0
    )
    found = source.losses("train")
    assert found == Losses(characters=90 * 10 + 5, changed=90, unknown=5, examples="ж")


def test_report_and_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    words_only(tmp_path / "t.json", "<unk>")
    path = write(tmp_path / "a.jsonl", russian=2)
    source = [f"data.source.files=['{path}']", "data.source.tokenizer=t.json", "data.source.validation_fraction=0.3"]
    assert launch("data=text", *source, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, "callbacks=basic") == 0
    run = only_run(tmp_path / "outputs")
    found = report_of(run)
    assert 0.1 < found["lost_characters"] < 0.3
    assert 0.1 < found["lost_characters_train"] < 0.3
    assert f"without the {found['lost_characters']:.2%} of its characters that the tokenizer loses" in found["verdict"]
    raw_bits = found["val_loss"] / math.log(2)
    tokens = 4 * 32
    assert found["val_bits_per_byte"] == pytest.approx(raw_bits * tokens / found["val_bytes"])
    capsys.readouterr()
    generate.main([f"run={run}", "prompt=alpha жук", "tokens=1"])
    assert "does not know 3 of 9 characters of the prompt" in capsys.readouterr().err


def test_a_verdict_without_losses_says_nothing_of_them() -> None:
    values = {"val_bits_per_byte": 1.0, "gzip_bits_per_byte": 2.0, "xz_bits_per_byte": 2.0}
    assert "loses" not in quality({**values, "lost_characters": 0.0})
    assert "loses" not in quality(values)
    assert "without the 2.00% of its characters" in quality({**values, "lost_characters": 0.02})
