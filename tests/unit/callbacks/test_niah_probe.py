"""NiahProbe and MemoryContribution: what they see of a working and of a broken memory; training is not disturbed."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.data import DataLoader

from atlas_lm.training.module import AtlasModule
from callbacks.memory_contribution import MemoryContribution
from callbacks.niah_probe import NeedleLost, NiahProbe
from tests.support.rollback_cases import MODEL, OPTIM, VOCABULARY, Batches, Faulty, differences, plain
from tests.support.toys import Line, Lines, loader
from tests.support.two_ranks import run_on_two_ranks

WIDE = {
    **MODEL, "head_dim": 64, "heads": 1, "rank": 447, "memory_hidden": 64, "local_chunks": [32], "global_chunk": 8,
    "shard": 32,
}  # fmt: skip


def fit(module: Any, *callbacks: Any, steps: int = 4, folder: Any = None, **changes: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_model_summary": False, "max_epochs": -1,
        "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0, "limit_val_batches": 1,
        "val_check_interval": 1000, "check_val_every_n_epoch": None, "default_root_dir": folder,
        "log_every_n_steps": 100,
    }  # fmt: skip
    trainer = lightning.Trainer(max_steps=steps, callbacks=list(callbacks), **{**settings, **changes})
    data = (DataLoader(Batches([*range(steps + 2)]), batch_size=None), DataLoader(Batches([999]), batch_size=None))
    trainer.fit(module, *data)
    return trainer


def wide() -> AtlasModule:
    torch.manual_seed(0)
    return AtlasModule(WIDE, OPTIM, VOCABULARY)


def measured(module: AtlasModule, folder: Path, **changes: Any) -> tuple[Tensor, float, float]:
    probe = NiahProbe(**changes)
    trainer = fit(module, probe, steps=1, folder=folder)
    return probe.measure(trainer, module)


def values_of(rows: list[tuple[int, dict[str, float]]], name: str) -> list[float]:
    return [row[name] for _, row in rows if name in row]


def test_a_fresh_memory_of_enough_features_gives_the_needle_back(tmp_path: Path) -> None:
    accuracy, control, retained = measured(wide(), tmp_path, needles=8)
    assert accuracy.shape == (1, 5)
    assert accuracy[0, -1] > 0.8
    assert accuracy[0, 0] > accuracy[0, -1] - 0.05, "a needle on top of the haystack is no harder to find"
    assert abs(control) < 0.1
    assert abs(retained) <= 1


def test_a_memory_that_forgets_loses_it(tmp_path: Path) -> None:
    """Its output layer is gone, so that writes find room in its few hidden units alone; it has too few features."""
    broken = wide()
    with torch.no_grad():
        for memory in (broken.model.blocks[0].memory.hierarchy.global_memory,
                       *broken.model.blocks[0].memory.hierarchy.local_memories):  # fmt: skip
            memory.initial[1].zero_()
    accuracy, _, _ = measured(broken, tmp_path)
    assert accuracy[0, -1] < 0.7
    narrow = AtlasModule({**WIDE, "rank": 4}, OPTIM, VOCABULARY)
    accuracy, _, _ = measured(narrow, tmp_path)
    assert accuracy[0, -1] < 0.8


def test_it_stops_or_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    with pytest.raises(NeedleLost, match=r"step 0: accuracy 0\.\d+ is below 0\.8"):
        fit(Faulty((), 1.0), NiahProbe(on_failure="stop"), folder=tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer = fit(Faulty((), 1.0), NiahProbe(), folder=tmp_path)
    assert trainer.global_step == 4
    assert "is below 0.8" in caplog.text


def test_what_it_logs(tmp_path: Path) -> None:
    board, lines = TensorBoardLogger(tmp_path, name="", version="board"), Lines()
    fit(wide(), NiahProbe(every_n_steps=2), MemoryContribution(every_n_steps=2), folder=tmp_path, logger=[board, lines])
    rows = lines.rows
    assert [step for step, row in rows if "niah_probe/accuracy" in row] == [0, 1, 3], (
        "before training, after steps 2 and 4"
    )
    assert all(0.8 < value <= 1 for value in values_of(rows, "niah_probe/accuracy"))
    assert values_of(rows, "niah_probe/accuracy/layer_0") == values_of(rows, "niah_probe/accuracy"), (
        "there is one layer"
    )
    assert all(0 < value <= 100 for value in values_of(rows, "niah_probe/overhead_percent"))
    assert len(values_of(rows, "memory_contribution/perplexity_rise")) == 3
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert "niah_probe/layer_by_depth" in events.Tags()["images"]
    assert len(events.Images("niah_probe/layer_by_depth")) == 3


def test_training_is_bitwise_undisturbed(tmp_path: Path) -> None:
    ours, theirs = Faulty((), 1.0), Faulty((), 1.0)
    a = fit(ours, NiahProbe(every_n_steps=1), MemoryContribution(every_n_steps=1), folder=tmp_path)
    b = fit(theirs, folder=tmp_path)
    assert differences(plain(ours.state_dict()), plain(theirs.state_dict())) == []
    assert differences(plain(a.optimizers[0].state_dict()), plain(b.optimizers[0].state_dict())) == []
    assert ours.training == theirs.training


def test_counts_survive_a_resume(tmp_path: Path) -> None:
    probe = NiahProbe(every_n_steps=1)
    trainer = fit(Faulty((), 1.0), probe, folder=tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["callbacks"]["NiahProbe"]
    again = NiahProbe(every_n_steps=1)
    again.load_state_dict(state)
    assert again.probes == probe.probes == 5
    assert again.seconds == pytest.approx(probe.seconds)
    assert 0 < again.overhead_percent() <= 100


class BrokenOnRank1(lightning.Callback):
    """Once DDP has made the ranks alike."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            with torch.no_grad():
                hierarchy = pl_module.model.blocks[0].memory.hierarchy
                for memory in (hierarchy.global_memory, *hierarchy.local_memories):
                    memory.initial[1].zero_()


def both_ranks() -> Any:
    """On rank 1 alone the memory is broken: the means, and so the verdicts, are the same on both."""
    probe, seen = NiahProbe(on_failure="stop"), []
    judge = probe.judge
    probe.judge = lambda *numbers: seen.append(numbers) or judge(*numbers)  # type: ignore[method-assign,func-returns-value]
    try:
        fit(wide(), BrokenOnRank1(), probe, strategy="ddp", devices=2)
    except NeedleLost as error:
        return str(error), seen
    return None, seen


def fsdp() -> Any:
    from tests.support.rollback_cases import sharded

    accuracy = NiahProbe(needles=2)
    gain = MemoryContribution(every_n_steps=2)
    ours, theirs = Faulty((), 1.0), Faulty((), 1.0)
    fit(ours, accuracy, gain, strategy=sharded(), devices=2)
    fit(theirs, strategy=sharded(), devices=2)
    return differences(plain(ours.state_dict()), plain(theirs.state_dict())), accuracy.probes


@pytest.mark.long
def test_two_ranks() -> None:
    (first, second), sharded = run_on_two_ranks(both_ranks, fsdp)
    assert first == second, "the ranks judge the same numbers"
    assert "is below 0.8" in first[0]
    for rank in sharded:
        assert rank == ([], 1), "bitwise undisturbed where parameters are sharded, too"


class Dictionary(Line):
    """Somebody else's module; its memory is a softmax over what was written; `loses`: over the last pair alone."""

    def __init__(self, loses: bool = False) -> None:
        super().__init__()
        self.loses = loses

    def memory_shape(self) -> tuple[int, int, int]:
        return 3, 2, 16

    def write_and_read(self, keys: Tensor, values: Tensor, query: Tensor, batch: Any = None) -> Tensor:
        if self.loses:
            keys, values = keys[..., -1:, :], values[..., -1:, :]
        scores = (100 * keys @ query.unsqueeze(-1)).softmax(dim=-2)
        return (scores * values).sum(dim=-2).unsqueeze(1)  # one memory a layer


def test_any_module_with_the_protocol_can_be_probed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "enable_progress_bar": False, "max_steps": 3, "default_root_dir": tmp_path,
    }  # fmt: skip
    probe = NiahProbe(on_failure="stop", every_n_steps=1)
    trainer = lightning.Trainer(callbacks=[probe], **settings)
    trainer.fit(Dictionary(), loader(), loader())
    assert probe.probes == 4
    accuracy, control, _ = probe.measure(trainer, trainer.lightning_module)
    assert accuracy.shape == (3, 5)
    assert accuracy.min() > 0.95
    assert abs(control) < 0.2
    with pytest.raises(NeedleLost, match=r"is below 0\.8"):
        lightning.Trainer(callbacks=[NiahProbe(on_failure="stop")], **settings).fit(
            Dictionary(True), loader(), loader()
        )
    with pytest.raises(TypeError, match=r"memory_shape\(\) and write_and_read.*Line lacks"):
        lightning.Trainer(callbacks=[NiahProbe()], **settings).fit(Line(), loader(), loader())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("every_n_steps", 0), ("haystack", 0), ("needles", 0), ("threshold", 1.5), ("on_failure", "ignore"),
        ("depths", [0.5]), ("depths", [-1.0, 1.0]),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        NiahProbe(**{name: value})


def test_judgement_on_plain_numbers() -> None:
    probe = NiahProbe(threshold=0.8)
    assert probe.judge(0.81, 0.01, 5) is None
    assert "accuracy 0.790 is below 0.8" in str(probe.judge(0.79, 0.0, 5))
    assert "not finite" in str(probe.judge(math.nan, 0.0, 5))
    assert "something else than the memory's writes" in str(probe.judge(0.9, 0.9, 5))


def test_a_module_without_a_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no memory.*~callbacks\.niah_probe"):
        fit(AtlasModule({**MODEL, "memory": "none"}, OPTIM, VOCABULARY), NiahProbe(), folder=tmp_path)


def test_without_validation_data_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"niah_probe measures on held-out data.*limit_val_batches > 0"):
        fit(wide(), NiahProbe(), folder=tmp_path, limit_val_batches=0)


# What the memory is worth


class Judged(Faulty):
    """Losses are given."""

    losses = (1.0, 1.0)

    def memory_contribution(self, batch: Any) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.losses[0]), torch.tensor(self.losses[1])


def test_contribution_is_the_rise_of_the_perplexity_without_the_memory(
    tmp_path: Path,
) -> None:
    module, lines = Judged((), 1.0), Lines()
    module.losses = (1.0, 1.0 + math.log(1.25))
    fit(module, MemoryContribution(every_n_steps=4), folder=tmp_path, logger=lines)
    assert values_of(lines.rows, "memory_contribution/perplexity_rise") == pytest.approx([0.25, 0.25])


def test_a_memory_that_is_silent_contributes_nothing(tmp_path: Path) -> None:
    """Gates of 0 take the memory out: zeroing it changes nothing. Open ones do."""
    module = Faulty((), 1.0)
    batch = next(iter(Batches([0])))
    with_memory, without = module.memory_contribution(batch)
    assert with_memory != without
    with torch.no_grad():
        module.model.blocks[0].fusion.gate.weight.zero_()
        module.model.blocks[0].fusion.gate.bias.fill_(-40.0)
    with_memory, without = module.memory_contribution(batch)
    assert with_memory.item() == pytest.approx(without.item(), abs=1e-6)


def test_text_that_attention_sees_whole_measures_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = AtlasModule({**MODEL, "window": 24}, OPTIM, VOCABULARY)
    lines = Lines()
    with caplog.at_level(logging.WARNING):
        fit(module, MemoryContribution(every_n_steps=1), folder=tmp_path, logger=lines)
    assert "not measured: sequences of 24 tokens lie within one attention window, 24 tokens" in caplog.text
    assert values_of(lines.rows, "memory_contribution/perplexity_rise") == []


def test_a_deep_model_is_measured_beyond_one_window() -> None:
    """Windows of 24 layers reach further than any sequence: the number was missing for the larger models."""
    deep = AtlasModule({**MODEL, "window": 8, "layers": 4}, OPTIM, VOCABULARY)
    batch = next(iter(Batches([0])))
    assert deep.attention_reach() == (8, 28)
    assert batch["input_ids"].size(1) == 24
    with_memory, without = deep.memory_contribution(batch)
    logits = deep.model(batch["input_ids"]).logits[:, 8:]
    expected = nnf.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 8:].flatten())
    assert with_memory.item() == pytest.approx(expected.item(), rel=1e-6)
    assert with_memory != without


def test_the_rows_of_metrics_are_json(tmp_path: Path) -> None:
    assert json.loads(json.dumps(NiahProbe().state_dict())) == {"probes": 0, "seconds": 0.0, "trained": 0.0}
