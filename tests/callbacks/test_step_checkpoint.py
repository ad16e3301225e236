"""StepCheckpoint keeps the newest, the last step included."""

from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.step_checkpoint import StepCheckpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_keeps_the_newest_and_links_the_last(fit: Any, line: Any, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    fit(line(), StepCheckpoint(str(folder), every_n_steps=2, keep=2))
    assert names(folder) == ["last.ckpt", "step-0000006.ckpt", "step-0000008.ckpt"]
    assert (folder / "last.ckpt").resolve().name == "step-0000008.ckpt"


@pytest.mark.parametrize("every", [3, 5, 100])
def test_the_final_step_is_saved_when_it_is_not_its_turn(fit: Any, line: Any, tmp_path: Path, every: int) -> None:
    folder, module = tmp_path / "c", line()
    fit(module, StepCheckpoint(str(folder), every_n_steps=every, keep=1))
    assert names(folder) == ["last.ckpt", "step-0000008.ckpt"]
    saved = torch.load(folder / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 8
    assert torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_resuming_into_another_folder_leaves_the_first_alone(fit: Any, line: Any, tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    fit(line(), StepCheckpoint(str(first), every_n_steps=2, keep=2), max_steps=4)
    before = names(first)
    resumed = StepCheckpoint(str(second), every_n_steps=2, keep=1)
    trainer = fit(line(), resumed, ckpt_path=first / "last.ckpt")
    assert trainer.global_step == 8
    assert names(first) == before
    assert names(second) == ["last.ckpt", "step-0000008.ckpt"]


@pytest.mark.parametrize(("name", "changes"), [("every_n_steps", {"every_n_steps": 0}), ("keep", {"keep": 0})])
def test_counts_are_checked(name: str, changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 of the checkpoints must be at least 1"):
        StepCheckpoint(**{"folder": "x", "every_n_steps": 1, **changes})  # type: ignore[arg-type]
