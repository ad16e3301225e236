"""PersistentMemoryCheck: what was saved is what is loaded; all ranks hold the same."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks.persistent_memory_check import PersistentMemoryCheck, PersistentMemoryDiffers, digest
from tests.support.toys import Line


class Remembering(Line):
    """Its weights are its persistent memory."""

    def persistent_memory(self) -> list[Tensor]:
        return [self.layer.weight, self.layer.bias]


def tampered(path: Path, by: float) -> Path:
    """The checkpoint, with one number of the memory changed."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["layer.weight"][0, 2] += by
    torch.save(checkpoint, path)
    return path


def test_the_hash_is_that_of_the_bytes() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor(3)]
    content = b"".join(bytes(t.flatten().view(torch.uint8).tolist()) for t in tensors)
    assert digest(tensors) == hashlib.sha256(content).hexdigest()
    assert digest([tensors[0].T]) == digest([tensors[0].T.contiguous()]) != digest([tensors[0]])
    assert digest([torch.tensor(0.0)]) != digest([torch.tensor(-0.0)]), "bits, not values"


def test_the_judgement() -> None:
    check = PersistentMemoryCheck()
    check.judge(["a", "a", "a"], None)
    check.judge(["a", "a"], "a")
    with pytest.raises(PersistentMemoryDiffers, match="rank 0 a, rank 2 b, rank 3 c"):
        check.judge(["a", "a", "b", "c"], None)
    with pytest.raises(ValueError, match="saved as b and loaded as a"):
        check.judge(["a", "a"], "b")


def test_it_reports_the_first_digits(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Remembering()
    found = digest(module.persistent_memory())
    with caplog.at_level(logging.INFO, "callbacks.persistent_memory_check"):
        fit(module, PersistentMemoryCheck())
    reported = [text for name, _, text in caplog.record_tuples if name == "callbacks.persistent_memory_check"]
    assert reported == [f"persistent memory {found[:12]} on 1 rank(s)"]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_a_resumed_run_holds_what_was_saved(fit: Any, tmp_path: Path) -> None:
    """The hash is that of the moment of saving, not of the start: training changes the memory."""
    module = Remembering()
    start = digest(module.persistent_memory())
    fit(module, PersistentMemoryCheck(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    saved = digest(module.persistent_memory())
    assert start != saved
    again = Remembering()
    assert fit(again, PersistentMemoryCheck(), ckpt_path=tmp_path / "4.ckpt").global_step == 8

    wrong = Remembering()
    path = tampered(tmp_path / "4.ckpt", by=1e-3)
    with pytest.raises(PersistentMemoryDiffers, match=f"saved as {saved} and loaded as [0-9a-f]{{64}}") as caught:
        fit(wrong, PersistentMemoryCheck(), ckpt_path=path)
    assert digest(wrong.persistent_memory()) in str(caught.value)
    assert wrong.seen == [], "before the first step"


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_only_what_was_loaded_counts(fit: Any, tmp_path: Path) -> None:
    """One callback in two fits: the second starts afresh and has no checkpoint to answer for."""
    fit(Remembering(), PersistentMemoryCheck(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    check = PersistentMemoryCheck()
    fit(Remembering(), check, ckpt_path=tmp_path / "4.ckpt")
    check.load_state_dict({"sha256": "of a snapshot to which a rollback went back"})
    fit(Remembering(), check)


def test_it_is_bitwise_inert(fit: Any, same_training: Any) -> None:
    same_training(fit(Remembering(), PersistentMemoryCheck()), fit(Remembering()))


def test_the_module_is_checked_before_step_0(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match=r"needs persistent_memory\(\), which Line lacks"):
        fit(line(), PersistentMemoryCheck())
    module = Remembering()
    module.persistent_memory = list  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match=r"remove the check with ~callbacks\.persistent_memory_check$"):
        fit(module, PersistentMemoryCheck())
