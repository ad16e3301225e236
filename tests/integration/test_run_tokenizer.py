"""A run keeps its tokenizer: another file at the same path, or none, changes nothing, and is never read in silence."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.cli import generate
from atlas_lm.data.prepare import prepare
from atlas_lm.data.run_tokenizer import COPY, keep_tokenizer, kept_tokenizer, tokenizer_of
from atlas_lm.data.tokenizers import JsonTokenizer
from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.runs.resolve import resolve_checkpoint
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, launch, only_run

WORDS = "alpha beta gamma delta epsilon zeta eta theta"


def bpe(path: Path, words: str) -> str:
    """A byte-level tokenizer; those of different words have the same size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([words] * 30, trainer)
    tokenizer.save(str(path))
    return JsonTokenizer(path).fingerprint()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    write_sources(tmp_path)


def write_sources(folder: Path) -> None:
    (folder / "corpus").mkdir()
    for i in range(60):
        for suffix in ("py", "txt"):
            (folder / "corpus" / f"{i}.{suffix}").write_text(f"document {i}: {WORDS} " * 4)
    bpe(folder / "tok.json", WORDS)


SOURCES = {
    "text": ["data=text", "data.source.files=['corpus/*.txt']", "data.source.tokenizer=tok.json"],
    "stdlib": ["data=stdlib", "+data.source.root=corpus", "data.source.tokenizer=tok.json"],
    "tokens": ["data=tokens", "data.source.path=shards"],
    "hf": ["data=hf", "data.source.path=dataset", "data.source.tokenizer=tok.json"],
}


def train(*overrides: str, source: str = "text") -> int:
    if source == "tokens" and not Path("shards").exists():
        prepare("text", "shards", "tok.json", files="corpus/*.txt", validation_fraction=0.2)
    if source == "hf":
        datasets = pytest.importorskip("datasets")
        rows = [f"row {i}: {WORDS}" for i in range(150)]
        datasets.Dataset.from_dict({"text": rows}).save_to_disk("dataset")
    held_out = [] if source == "tokens" else ["data.source.validation_fraction=0.2"]
    settings = [*SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, "callbacks=basic", "callbacks.step_checkpoint.every_n_steps=2"]
    return launch(*SOURCES[source], *held_out, *settings, *overrides)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Working directories with a finished run named a, to be copied: every path in its configuration is relative."""
    found = {source: tmp_path_factory.mktemp(source) for source in ("text", "tokens")}
    for source, folder in found.items():
        write_sources(folder)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(sys, "argv", ["train.py"])
            assert train("name=a", source=source) == 0
    return found


def trained(folders: dict[str, Path], source: str = "text") -> Path:
    """The folder of a finished run named a, and what it was trained on, in the working directory."""
    shutil.copytree(folders[source], Path.cwd(), symlinks=True, dirs_exist_ok=True)
    return only_run(Path.cwd() / "outputs", "a")


def said(run: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    generate.main([f"run={run}", "prompt=alpha ", "tokens=12"])
    return capsys.readouterr().out


def forget(run: Path) -> None:
    """Make a run as older versions left them: no copy, no fingerprint."""
    (run / COPY).unlink(missing_ok=True)
    for path in (run / "checkpoints").glob("*.ckpt"):
        if not path.is_symlink():
            content = read_checkpoint(path)
            del content["hyper_parameters"]["tokenizer"]
            AtomicCheckpointIO().save_checkpoint(content, path)


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_folder_alone_is_enough(
    tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(source=source) == 0
    run = only_run(tmp_path / "outputs")
    first, trained_with = said(run, capsys), JsonTokenizer("tok.json").fingerprint()
    content = read_checkpoint(resolve_checkpoint(run))
    assert content["hyper_parameters"]["tokenizer"] == trained_with
    elsewhere = Path(shutil.copytree(run, tmp_path / "far" / "away" / "run", symlinks=True))
    assert bpe(tmp_path / "tok.json", WORDS[::-1]) != trained_with  # of the same size
    assert said(run, capsys) == first
    Path("tok.json").unlink()
    shutil.rmtree("shards", ignore_errors=True)
    monkeypatch.chdir("/")
    assert said(elsewhere, capsys) == first
    assert said(resolve_checkpoint(elsewhere), capsys) == first


def test_exit_gates_measure_with_the_copy(folders: dict[str, Path], tmp_path: Path) -> None:
    run = trained(folders)
    evidence = RunArtifacts(run, tmp_path / "decisions.yaml", sequences=2)
    before = [batch["input_ids"] for batch in evidence.batches]
    bpe(tmp_path / "tok.json", WORDS[::-1])
    after = [batch["input_ids"] for batch in RunArtifacts(run, tmp_path / "decisions.yaml", sequences=2).batches]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    Path("tok.json").unlink()
    assert RunArtifacts(run, tmp_path / "decisions.yaml", sequences=2).batches
    (run / COPY).unlink()
    bpe(tmp_path / "tok.json", WORDS[::-1])
    with pytest.raises(ValueError, match=r"fingerprint \w+ but \w+ in the checkpoint: restore its tokenizer"):
        _ = RunArtifacts(run, tmp_path / "decisions.yaml", sequences=2).batches


def test_a_copy_that_is_lost_or_changed_is_noticed(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(folders)
    first, ours = said(run, capsys), JsonTokenizer("tok.json").fingerprint()
    whole = (run / COPY).read_bytes()
    theirs = bpe(run / COPY, WORDS[::-1])
    with pytest.raises(ValueError, match=rf"{COPY}' is not the tokenizer .* fingerprint is {theirs}.*{ours}"):
        said(run, capsys)
    (run / COPY).write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=rf"{COPY}' is not a tokenizer\.json"):
        said(run, capsys)
    (run / COPY).unlink()
    assert said(run, capsys) == first, "the file that the configuration names is still the same"
    bpe(tmp_path / "tok.json", WORDS[::-1])
    with pytest.raises(ValueError, match=rf"'tok\.json' is not the tokenizer .*{theirs}.*{ours}"):
        said(run, capsys)
    bpe(run / COPY, WORDS)
    assert said(run, capsys) == first, "as the error advises"


@pytest.mark.parametrize("what", ["init_from=a", "init_from={run}", "init_from={checkpoint}", "resume={run}"])
@pytest.mark.parametrize("source", ["text", "tokens"])
def test_another_tokenizer_is_refused(
    folders: dict[str, Path], tmp_path: Path, what: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, ours = trained(folders, source), JsonTokenizer("tok.json").fingerprint()
    own = [path for path in run.rglob("*") if ".hydra" not in path.parts and path.name not in ("train.log", ".lock")]
    before = [path.stat().st_mtime_ns for path in own]
    theirs = bpe(tmp_path / "tok.json", WORDS[::-1])
    shutil.rmtree("shards", ignore_errors=True)
    capsys.readouterr()
    name = "a" if what.startswith("resume") else "b"
    override = what.format(run=run, checkpoint=resolve_checkpoint(run))
    assert train(f"name={name}", override, "optim.total_steps=6", source=source) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{theirs} but {ours} in the checkpoint, kept as " in line
    assert f"{run.name}/{COPY}'" in line
    assert [path.stat().st_mtime_ns for path in own] == before, "the run is as it was"


@pytest.mark.long
def test_the_same_tokenizer_under_another_name_is_the_same(folders: dict[str, Path], tmp_path: Path) -> None:
    run = trained(folders)
    Path("tok.json").rename("moved.json")
    for i, more in enumerate(("init_from=a", f"resume={run}")):
        for j, path in enumerate(("moved.json", run / COPY)):  # folders are named by the second
            assert train(f"name=b{i}{j}", more, f"data.source.tokenizer={path}", "optim.total_steps=6") == 0


def test_runs_of_older_versions_work_with_a_warning(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(folders)
    first = said(run, capsys)
    forget(run)
    logging.getLogger("atlas_lm.data.run_tokenizer").addHandler(
        caplog.handler
    )  # Hydra has replaced the root's handlers
    with caplog.at_level(logging.WARNING):
        assert said(run, capsys) == first
    assert "does not record its tokenizer: tok.json is taken, which cannot be checked" in caplog.text
    for name, more in (("b", "init_from=a"), ("c", f"resume={run}")):
        assert train(f"name={name}", more, "optim.total_steps=6") == 0
        log = next(only_run(tmp_path / "outputs", name).glob("*.log")).read_text()
        assert "does not record its tokenizer: make sure" in log


def test_bytes_need_no_copy_and_recall_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("data.source.tokenizer=bytes") == 0
    run = only_run(tmp_path / "outputs")
    assert not (run / COPY).exists()
    assert said(run, capsys).startswith("alpha ")
    with pytest.raises(ValueError, match="was not trained on text"):
        tokenizer_of(run, "none")


def test_a_separator_of_its_own_is_kept(tmp_path: Path) -> None:
    tokenizer = JsonTokenizer("tok.json", separator="q")
    keep_tokenizer(tmp_path, tokenizer)
    kept: Any = kept_tokenizer(tmp_path)
    assert (kept.fingerprint(), kept.separator_id) == (tokenizer.fingerprint(), tokenizer.separator_id)
    keep_tokenizer(tmp_path, JsonTokenizer("tok.json"))
    assert kept_tokenizer(tmp_path).separator == "q", "what is kept stays"  # type: ignore[union-attr]
