"""Every file in conf/ that a run can be started with, through train.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from atlas_lm.config.validate import check_config
from atlas_lm.data.prepare import prepare
from tests.support import ROOT
from tests.support.latent_toys import write_npz
from tests.support.launching import SMALL_DATA, SMALL_MODEL, launch, only_run, report_of, write_corpus

CONF = ROOT / "conf"
TWO_STEPS = [
    "optim.total_steps=2", "optim.warmup_steps=1", "trainer.val_check_interval=2", "trainer.log_every_n_steps=1",
    "data.batch_size=2", "data.val_sequences=2", "data.val_batch_size=2",
]  # fmt: skip
# What makes a model small enough for seconds, and leaves what distinguishes the configurations.
SMALL_SIZES = [
    "model.dim=32",
    "model.layers=1",
    "model.memory_layers=[0]",
    "model.heads=2",
    "model.head_dim=16",
    "model.memory_hidden=16",
]


def names(group: str) -> list[str]:
    """The options of a group; files that begin with _ are parts of others."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_"))


STARTS_FROM = {"stage2": "stage1"}  # experiments that need a finished run of another


LONG = {"stage1_twin", "stage2"}  # tests/integration/test_golden.py has their first steps


def finished(in_tmp: Path, *overrides: str, name: str = "*") -> dict[str, Any]:
    """The report of a run that must finish with a finite validation loss."""
    assert launch(*overrides) == 0
    found = report_of(only_run(in_tmp / "outputs", name))
    assert found["status"] == "finished"
    assert found["steps"] == found["validated_at_step"] == 2
    assert found["val_loss"] > 0  # null where it is not finite
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in names("experiment")]
)
def test_experiments(in_tmp: Path, name: str) -> None:
    """With their data, at small sizes; test_golden.py trains them at their own."""
    if name in STARTS_FROM:
        assert launch(f"+experiment={name}", *SMALL_SIZES, *TWO_STEPS) == 1, "there is nothing to start from yet"
        shutil.rmtree(in_tmp / "outputs" / name)
        finished(in_tmp, f"+experiment={STARTS_FROM[name]}", *SMALL_SIZES, *TWO_STEPS)
    embedded = [f"data.source.path={write_npz(in_tmp / 'x.npz')}"] if name.startswith("latent") else []
    found = finished(in_tmp, f"+experiment={name}", *SMALL_SIZES, *TWO_STEPS, *embedded, name=name)
    assert (in_tmp / "outputs" / name / "latest").exists(), "an experiment's `name` is that of its file"
    if name.startswith("latent"):
        assert -1 <= found["val_cosine"] <= 1
        assert 0 <= found["val_contrastive_accuracy"] <= 1
        assert found["quality"] in found["verdict"]
    elif name.startswith(("recall", "needles")):
        assert 0 <= found["recall_accuracy"] <= 1
        assert found["val_bits_per_byte"] is None
    else:
        assert found["val_bits_per_byte"] > found["gzip_bits_per_byte"] > 0, "two steps cannot beat gzip"


@pytest.mark.parametrize("memory", ["none", "gated_delta"])
def test_the_twins(in_tmp: Path, memory: str) -> None:
    finished(in_tmp, "+experiment=recall", f"model.memory={memory}", "callbacks=basic", *TWO_STEPS)


@pytest.mark.parametrize("name", names("model"))
def test_models(in_tmp: Path, name: str) -> None:
    corpus = write_corpus(in_tmp / "corpus")
    probes = ["callbacks=basic"] if name == "latent" else []  # it has no memory that they could ask
    finished(in_tmp, "data=text", corpus, f"model={name}", *SMALL_SIZES, "data.seq_len=96", *TWO_STEPS, *probes)


@pytest.mark.parametrize("name", names("optim"))
def test_optimizers(in_tmp: Path, name: str) -> None:
    corpus = write_corpus(in_tmp / "corpus")
    finished(in_tmp, "data=text", corpus, f"optim={name}", *SMALL_MODEL, *SMALL_DATA, *TWO_STEPS)


@pytest.mark.long
@pytest.mark.parametrize("name", names("data"))
def test_data(in_tmp: Path, name: str) -> None:
    corpus = write_corpus(in_tmp / "corpus")
    overrides: dict[str, list[str]] = {
        "stdlib": SMALL_DATA,
        "text": [corpus, *SMALL_DATA],
        "tokens": ["data.source.path=shards", *SMALL_DATA],
        "hf": ["data.source.path=rows", "data.source.validation_fraction=0.3", *SMALL_DATA],
        "recall": ["data.source.samples=100"],
        "needles": ["data.source.needles=1", "data.seq_len=200"],
        "mix": SMALL_DATA,
        "embeddings": ["module=latent", f"data.source.path={write_npz(in_tmp / 'x.npz')}", "callbacks=latent"],
    }
    if name == "tokens":
        prepare("text", in_tmp / "shards", files=[f"{in_tmp}/corpus/*.txt"], validation_fraction=0.3)
    if name == "hf":
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict({"text": [f"row {i} " * 20 for i in range(60)]}).save_to_disk("rows")
    finished(in_tmp, f"data={name}", *overrides[name], *SMALL_MODEL, *TWO_STEPS)


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group in ("trainer", "logger", "callbacks", "paths") for name in names(group)],
)
def test_what_needs_other_hardware_composes(group: str, name: str) -> None:
    overrides = [f"{group}={name}", "paths.run=/nowhere"] if group != "callbacks" else ["paths.run=/nowhere"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check_config(compose("train", overrides))


@pytest.mark.parametrize("name", names("sweep"))
def test_sweeps_compose(name: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"+sweep={name}", "paths.run=/nowhere"], return_hydra_config=True)
    assert cfg.hydra.mode.name == "MULTIRUN"
    assert cfg.hydra.sweeper.params
