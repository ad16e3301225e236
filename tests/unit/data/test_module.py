"""TokenDataModule: the batch contract, the bytes that bits per byte counts, and the shipped configurations."""

import gzip
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.interfaces import Split
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from tests.support import ROOT

CONF = ROOT / "conf" / "data"


@pytest.fixture
def files(tmp_path: Path) -> str:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{i}: " + "the quick brown fox, schnöde " * (i % 7 + 1))
    return f"{tmp_path}/*.txt"


def module(files: str, **changes: object) -> TokenDataModule:
    source = TextSource(files, validation_fraction=0.3, test_fraction=0.2)
    return TokenDataModule(**{"source": source, "batch_size": 4, "seq_len": 16, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("loader", ["train_dataloader", "val_dataloader", "test_dataloader"])
def test_batches(files: str, loader: str) -> None:
    for batch in getattr(module(files), loader)():
        assert {name: tensor.dtype for name, tensor in batch.items()} == {
            "input_ids": torch.int64,
            "targets": torch.int64,
            "document_start": torch.bool,
        }
        assert {tensor.shape[1:] for tensor in batch.values()} == {(16,)}
        assert torch.equal(batch["targets"][:, :-1], batch["input_ids"][:, 1:])
        assert batch["document_start"].shape == batch["input_ids"].shape


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("cap", [None, 1, 7])
def test_held_out_bytes_are_those_that_the_loader_scores(files: str, split: Split, cap: int | None) -> None:
    dm = module(files, val_sequences=cap, test_sequences=cap, val_batch_size=3)
    batches = list(dm.val_dataloader() if split == "validation" else dm.test_dataloader())
    targets = torch.cat([batch["targets"].flatten() for batch in batches])
    raw = dm.held_out_bytes(split)
    assert raw == bytes(targets[targets < 256].tolist())
    if split == "validation":
        assert dm.validation_bytes == len(raw)
        assert dm.validation_tokens == len(targets) == (cap or len(targets) // 16) * 16


def test_a_cap_spreads_over_the_split(files: str) -> None:
    total = len(module(files).held_out_indices("validation"))
    assert module(files).held_out_indices("validation") == list(range(total))
    chosen = module(files, val_sequences=4).held_out_indices("validation")
    assert chosen == [i * total // 4 for i in range(4)]
    assert len(module(files, val_sequences=10**9).held_out_indices("validation")) == total


def test_ranks_validate_on_equal_shares(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        dm = module(files, val_sequences=8)
        monkeypatch.setattr(dm, "_ranks", lambda rank=rank: (3, rank))
        shares.append([row for batch in dm.val_dataloader() for row in batch["input_ids"].tolist()])
        assert dm.validation_tokens == 6 * 16
    assert [len(share) for share in shares] == [2, 2, 2]
    assert len({str(row) for share in shares for row in share}) == 6
    dm = module(files, val_sequences=2)
    monkeypatch.setattr(dm, "_ranks", lambda: (3, 0))
    with pytest.raises(ValueError, match="fewer sequences than the 3 ranks need"):
        dm.val_dataloader()


def test_vocabulary_and_tokenizer_are_known_before_reading(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dm = module(files)
    with monkeypatch.context() as patched:
        patched.setattr(TextSource, "documents", lambda self: pytest.fail("read"))
        assert dm.vocab_size == 257
        assert dm.tokenizer is not None
    assert dm.seq_len == 16
    assert dm.bytes_per_token() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0 must be at least 1"),
        ({"seq_len": 0}, r"data\.seq_len=0 must be at least 1"),
        ({"val_sequences": 0}, r"data\.val_sequences=0 must be at least 1"),
        ({"num_workers": -1}, r"data\.num_workers=-1 must be at least 0"),
        ({"seed": -1}, r"data\.seed=-1 must be at least 0"),
    ],
)
def test_counts_are_checked_at_once(files: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(files, **changes)


def test_bad_corpora_fail_in_setup(files: str) -> None:
    with pytest.raises(ValueError, match=r"seq_len=100000 needs at least 100001: lower data\.seq_len"):
        module(files, seq_len=100_000).setup()
    with pytest.raises(ValueError, match="seq_len=None"):
        module(files, seq_len=None).setup()
    source = TextSource(files, validation_fraction=0.0, test_fraction=0.0)
    with pytest.raises(ValueError, match="the validation split is empty"):
        module(files, source=source).setup()
    with pytest.raises(ValueError, match=r"fewer than batch_size=1000 on 1 rank\(s\) take"):
        module(files, batch_size=1000).train_dataloader()


# The configurations


def configured(name: str, **source: object) -> TokenDataModule:
    config = OmegaConf.load(CONF / f"{name}.yaml")
    OmegaConf.set_struct(config, True)  # as Hydra does: a misspelled key is an error
    for key, value in source.items():
        OmegaConf.update(config, f"source.{key}", value)
    dm = instantiate(config)
    assert isinstance(dm, TokenDataModule)
    return dm


def test_every_configuration_is_tested_here() -> None:
    here = {"stdlib", "text", "tokens", "hf", "recall", "needles", "mix"}
    others = {"embeddings"}  # frames and no tokens: tests/integration/test_latent.py
    assert {path.stem for path in CONF.glob("*.yaml")} == here | others


@pytest.mark.slow
def test_stdlib_configuration() -> None:
    dm = configured("stdlib")
    assert next(iter(dm.train_dataloader()))["input_ids"].shape == (8, 1024)
    raw = dm.held_out_bytes()
    assert raw is not None
    assert len(raw) > 100_000
    assert 1.5 < 8 * len(gzip.compress(raw, 9)) / len(raw) < 2.5


def test_needles_configuration() -> None:
    dm = configured("needles", window=64, layers=2, attention_conv=1)
    assert next(iter(dm.train_dataloader()))["input_ids"].shape == (8, 1024)
    assert dm.validation_tokens == 64 * 8 * 3
    assert dm.validation_bytes_per_token is None


def test_text_and_tokens_configurations(files: str, tmp_path: Path) -> None:
    sizes = {"validation_fraction": 0.3, "test_fraction": 0.2}
    text = configured("text", files=[files], **sizes)
    prepare("text", tmp_path / "shards", files=[files], **sizes)
    tokens = configured("tokens", path=str(tmp_path / "shards"))
    text._wanted_seq_len = tokens._wanted_seq_len = 16
    assert text.held_out_bytes() == tokens.held_out_bytes()
    for ours, theirs in zip(text.train_dataloader(), tokens.train_dataloader(), strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_hf_configuration(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    rows = [f"row {i} " * 200 for i in range(60)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(tmp_path / "d"))
    assert next(iter(configured("hf", path=str(tmp_path / "d")).train_dataloader()))["input_ids"].shape == (8, 1024)


def test_recall_configuration() -> None:
    dm = configured("recall")
    assert next(iter(dm.train_dataloader()))["input_ids"].shape == (32, 96)
    assert dm.validation_tokens == 1024 * 16


@pytest.mark.parametrize("name", ["text", "tokens", "hf"])
def test_what_only_the_user_knows_is_mandatory(name: str) -> None:
    with pytest.raises(Exception, match=r"Missing mandatory value: source\.(files|path)"):
        configured(name)
