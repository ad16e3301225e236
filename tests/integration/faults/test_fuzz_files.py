"""Damaged files: what a checksum covers never passes for whole, and every answer is one line.

A tokenizer.json that the user names by its path has no checksum. Damaged, it is either refused in one line, or it is
another tokenizer that works: its ids fit its vocabulary. A run that began with the former does not continue with it:
the fingerprint of its data differs (tests/unit/data/test_resume.py).
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.checkpoints.listing import newest_intact
from atlas_lm.checkpoints.manifest import MANIFEST
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.interfaces import SPLITS
from atlas_lm.data.prepare import prepare
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokens import TokensSource
from atlas_lm.runs.resolve import resolve_checkpoint
from tests.support.faults import mutated, outcome

SECONDS = 30  # more is a hang


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, shards of a corpus, and the corpus with a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("seed: 0\n")
    for step in (1, 2):
        generator = torch.Generator().manual_seed(step)
        weights = {f"layer{i}.weight": torch.randn(40, 40, generator=generator) for i in range(4)}
        content = {
            "state_dict": weights,
            "hyper_parameters": {"model": {"dim": 40}, "vocab_size": 9},
            "global_step": step,
            "optimizer_states": [{"state": {0: {"exp_avg": weights["layer0.weight"]}}, "param_groups": [{"lr": 0.1}]}],
        }
        path = folder / "run" / "checkpoints" / f"step-{step}.ckpt"
        AtomicCheckpointIO().save_checkpoint(content, path)
    (folder / "run" / "checkpoints" / "last.ckpt").symlink_to("step-2.ckpt")
    lines = [json.dumps({"text": f"document {i}: " + "süß and 日本 " * (i % 17)}) for i in range(300)]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    prepare("text", folder / "shards", "bpe", 300, block_mb=0.01, files=str(folder / "corpus.jsonl"))
    shutil.copy(folder / "shards" / "tokenizer.json", folder / "tokenizer.json")
    return folder


def content_of_shards(folder: Path) -> tuple[list[str], int, int | None]:
    """All that training and validation take from shards."""
    data = TokenDataModule(TokensSource(str(folder)), batch_size=2, seq_len=16)
    data.setup("fit")
    return [data.source.dataset(split, 16).fingerprint() for split in SPLITS], data.vocab_size, data.validation_bytes


def tokens_of_corpus(folder: Path) -> tuple[int, int]:
    """Vocabulary and largest id of the corpus, encoded by the tokenizer beside it."""
    data = TokenDataModule(
        TextSource(str(folder / "corpus.jsonl"), tokenizer=str(folder / "tokenizer.json")), batch_size=2, seq_len=16
    )
    data.setup("fit")
    largest = max(int(batch["input_ids"].max()) for batch in (*data.train_dataloader(), *data.val_dataloader()))
    return data.vocab_size, largest


def check_checkpoint(folder: Path, target: Path, what: str) -> str:
    run, newest = folder / "run", folder / "run" / "checkpoints" / "last.ckpt"
    older = folder / "run" / "checkpoints" / "step-1.ckpt"
    _, line = outcome(lambda: read_checkpoint(target), SECONDS)
    assert line, f"{what} passed for whole"
    assert str(older if target.name == "step-2.ckpt" else newest) in line, "a good one is named"
    _, line = outcome(lambda: resolve_checkpoint(target), SECONDS)
    assert line, f"{what} passed for whole when it was named"
    found, skipped = newest_intact(run)
    good = older if target.name == "step-2.ckpt" else newest
    assert found == good
    assert len(skipped) == (good == older)
    assert resolve_checkpoint(run) == good
    return "refused"


def check_manifest(folder: Path, target: Path, what: str) -> str:
    """It accuses no checkpoint."""
    run = folder / "run"
    found, line = outcome(lambda: resolve_checkpoint(run), SECONDS)
    assert (found, line) == (run / "checkpoints" / "last.ckpt", None)
    assert read_checkpoint(found)["global_step"] == 2
    return "done without"


def check_unknown(folder: Path, target: Path, what: str) -> str:
    """Without a checksum: one line, or what can be used; both ways of reading."""
    (folder / "run" / "checkpoints" / MANIFEST).rename(folder / "aside")
    try:
        for lazily in (True, False):
            found, line = outcome(lambda lazily=lazily: read_checkpoint(target, lazily=lazily), SECONDS)
            assert line or isinstance(found["state_dict"], dict)
        assert newest_intact(folder / "run")[0] is not None
        return "refused" if line else "not noticed"
    finally:
        (folder / "aside").rename(folder / "run" / "checkpoints" / MANIFEST)


def check_shards(folder: Path, target: Path, what: str) -> str:
    found, line = outcome(lambda: content_of_shards(folder / "shards"), SECONDS)
    if line is None:  # white space in JSON
        assert target.suffix == ".json", f"{what} passed for whole"
        target.write_bytes(target.read_bytes().strip())
        assert found == content_of_shards(folder / "shards")
        assert found == WHOLE["shards"], f"{what} passed for whole"
        return "the same content"
    assert target.name in line
    return "refused"


def check_tokenizer(folder: Path, target: Path, what: str) -> str:
    found, line = outcome(lambda: tokens_of_corpus(folder), SECONDS)
    if line is None:
        vocabulary, largest = found
        assert 0 <= largest < vocabulary
        return "another tokenizer"
    assert "tokenizer.json" in line
    return "refused"


WHOLE: dict[str, object] = {}


def fuzz(whole: Path, scratch: Path, count: int, seed: int) -> Counter[str]:
    """How often each kind of file got which answer, over `count` damaged files."""
    r, seen = random.Random(seed), Counter[str]()
    folder = Path(shutil.copytree(whole, scratch / "work", symlinks=True))
    WHOLE["shards"] = content_of_shards(folder / "shards")
    tokens_of_corpus(folder)
    checkpoints = sorted((folder / "run" / "checkpoints").glob("step-*.ckpt"))
    kinds = [
        ("checkpoint", check_checkpoint, checkpoints),
        ("shards", check_shards, sorted((folder / "shards").iterdir())),
        ("tokenizer", check_tokenizer, [folder / "tokenizer.json"]),
        ("checkpoint", check_checkpoint, checkpoints),
        ("unknown checkpoint", check_unknown, checkpoints),
        ("shards", check_shards, sorted((folder / "shards").iterdir())),
        ("manifest", check_manifest, [folder / "run" / "checkpoints" / MANIFEST]),
    ]
    everything = [path.read_bytes() for _, _, files in kinds for path in files]
    for number in range(count):
        kind, check, files = kinds[number % len(kinds)]
        target = r.choice(files)
        good = target.read_bytes()
        name, bad = mutated(good, everything, r)
        target.write_bytes(bad)
        try:
            seen[f"{kind}: {check(folder, target, f'{target.name} ({name}, seed {seed}, number {number})')}"] += 1
        except BaseException as error:
            error.add_note(f"{target} ({name}, seed {seed}, number {number})")
            raise
        finally:
            target.write_bytes(good)
    return seen


@pytest.mark.parametrize("seed", [1, 2])
def test_two_hundred_damaged_files(whole: Path, tmp_path: Path, seed: int) -> None:
    seen = fuzz(whole, tmp_path, 210, seed)
    assert seen.total() == 210
    assert seen["checkpoint: refused"] == 60, "all"
    assert seen["manifest: done without"] == 30, "all"
    for answer in ("shards: refused", "unknown checkpoint: refused", "tokenizer: refused"):
        assert seen[answer] >= 10, seen
