"""GenerationHealth: flags are warned of or stop, reports are written, and training is undisturbed."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch

from atlas_lm.inspection.schema import parse
from atlas_lm.inspection.training import TrainingInspector
from callbacks.generation_health import GenerationHealth, GenerationUnsound, Inspector
from tests.support.rollback_cases import Faulty, differences, plain
from tests.support.toys import Line, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder
from tests.unit.callbacks.test_niah_probe import fit as fit_real


class Says:
    """An inspector that raises a flag at some calls, and draws random numbers as a generation does."""

    def __init__(self, *flags_by_call: list[str]) -> None:
        self.flags, self.calls = list(flags_by_call), 0

    def inspect(self, module: Any, batch: Any) -> list[tuple[dict[str, float], list[str], str]]:
        torch.rand(7)
        flags = self.flags[self.calls] if self.calls < len(self.flags) else []
        self.calls += 1
        return [({"entropy": 2.0}, flags, '{"n": 0}'), ({"entropy": 4.0, "rare": 1.0}, [], '{"n": 1}')]


def fit(callback: GenerationHealth, folder: Path, **options: Any) -> Any:
    trainer = lightning.Trainer(
        default_root_dir=folder, callbacks=[callback], max_steps=8, enable_progress_bar=False, logger=False,
        enable_checkpointing=False, enable_model_summary=False, accelerator="cpu", **options,
    )  # fmt: skip
    model = Line()
    trainer.fit(model, loader(), loader())
    return trainer, model


def test_what_is_found_is_logged_and_written(tmp_path: Path) -> None:
    trainer, _ = fit(GenerationHealth(Says(), str(tmp_path / "reports"), every_n_steps=4), tmp_path)
    metrics = trainer.callback_metrics
    assert float(metrics["generation_health/entropy"]) == 3.0
    assert float(metrics["generation_health/rare"]) == 1.0
    assert float(metrics["generation_health/flags"]) == 0
    assert float(metrics["generation_health/step"]) == 8
    files = sorted(path.name for path in (tmp_path / "reports").iterdir())
    assert files == [f"step_0000000{step}_{n}.json" for step in (4, 8) for n in (0, 1)]


def test_a_flag_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    trainer, _ = fit(GenerationHealth(Says([], [], ["repetition (a loop)"]), str(tmp_path), every_n_steps=4), tmp_path)
    assert [r for r in caplog.records if "repetition" in r.getMessage() and "step 8" in r.getMessage()]
    assert float(trainer.callback_metrics["generation_health/flags"]) == 1


def test_a_flag_can_stop_training(tmp_path: Path) -> None:
    callback = GenerationHealth(Says([], ["nonfinite"]), str(tmp_path), every_n_steps=4, on_failure="stop")
    with pytest.raises(GenerationUnsound, match="nonfinite"):
        fit(callback, tmp_path)


def test_flags_before_a_step_do_not_count(tmp_path: Path) -> None:
    says = Says([], ["nonfinite"])
    fit(GenerationHealth(says, str(tmp_path), every_n_steps=4, from_step=9, on_failure="stop"), tmp_path)
    assert says.calls == 1  # before the first step: whether it can


def test_training_is_left_as_it_was(tmp_path: Path) -> None:
    _, without = fit(GenerationHealth(Says(), str(tmp_path), every_n_steps=100), tmp_path)
    _, with_it = fit(GenerationHealth(Says(), str(tmp_path), every_n_steps=1), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_it.parameters(), strict=True))


def test_reports_that_cannot_be_written_cost_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    trainer, _ = fit(GenerationHealth(Says(), str(tmp_path / "file"), every_n_steps=8), tmp_path)
    assert trainer.global_step == 8
    assert any("no report" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"every_n_steps": 0}, "every_n_steps"), ({"rows": 0}, "rows"), ({"on_failure": "shout"}, "on_failure")],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        GenerationHealth(Says(), "x", **values)


def test_what_is_no_inspector_is_refused() -> None:
    with pytest.raises(TypeError, match="inspector"):
        GenerationHealth(object(), "x")  # type: ignore[arg-type]


def test_a_module_without_our_model_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Line"):
        fit(GenerationHealth(TrainingInspector(), str(tmp_path)), tmp_path)


def test_the_real_model_writes_and_is_undisturbed(tmp_path: Path) -> None:
    inspector = TrainingInspector(prompt_tokens=8, tokens=20, capture="full")
    assert isinstance(inspector, Inspector)
    reports = tmp_path / "reports"
    ours, theirs = Faulty((), 1.0), Faulty((), 1.0)
    trainer = fit_real(ours, GenerationHealth(inspector, str(reports), every_n_steps=2), folder=tmp_path)
    fit_real(theirs, folder=tmp_path)
    assert not differences(plain(ours.state_dict()), plain(theirs.state_dict()))
    found = parse((reports / "step_00000004_0.json").read_text())
    assert len(found.steps.token_ids) == 20
    assert found.memory.labels
    metrics = trainer.callback_metrics
    assert float(metrics["generation_health/mean_entropy_bits"]) > 0
    assert any(name.endswith("output_ratio") for name in metrics)


def test_it_is_the_same_before_and_after_the_same_weights(tmp_path: Path) -> None:
    """Prompts and draws are fixed: two inspections of the same weights are one."""
    texts = []
    for folder in ("a", "b"):
        inspector = TrainingInspector(prompt_tokens=8, tokens=12)
        callback = GenerationHealth(inspector, str(tmp_path / folder), every_n_steps=2)
        fit_real(Faulty((), 1.0), callback, steps=2, folder=tmp_path)
        content = json.loads((tmp_path / folder / "step_00000002_0.json").read_text())
        texts.append(content["steps"]["token_ids"])
    assert texts[0] == texts[1]


def stopped_on_one_rank() -> str:
    says = Says([], ["nonfinite"] if int(os.environ.get("LOCAL_RANK", "0")) == 1 else [])
    folder = shared_folder()
    callback = GenerationHealth(says, str(folder / "reports"), every_n_steps=4, on_failure="stop")
    try:
        fit(callback, folder, devices=2, strategy="ddp")
    except GenerationUnsound as error:
        return str(error)
    return "finished"


@pytest.mark.long
def test_a_flag_on_one_rank_stops_both() -> None:
    [(first, second)] = run_on_two_ranks(stopped_on_one_rank)
    assert "nonfinite" in second
    assert "another rank" in first
