"""WeightIntegrity: one flipped bit outside the optimizer is found before the optimizer uses it, and rolled back."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from callbacks.nonfinite_guard import NonfiniteGuard
from callbacks.support.rollback_request import CanRollBack
from callbacks.support.snapshots import restore, take
from callbacks.weight_integrity import WeightIntegrity, WeightsCorrupted
from tests.support.toys import STEPS, Line, Lines
from tests.support.two_ranks import run_on_two_ranks
from tests.unit.callbacks.test_two_ranks import Sharded, summary, train


def flip(tensor: Tensor, bit: int, index: int = 0) -> None:
    """Invert one bit, in place, after everybody's back."""
    raw = tensor.detach().view(-1).view(torch.uint8)
    raw[index * tensor.element_size() + bit // 8] ^= 1 << (bit % 8)


class Flip(lightning.Callback):
    """One bit of a parameter, or of a moment, in `hook` of the given steps (each once)."""

    def __init__(self, steps: set[int], moment: str = "", hook: str = "on_train_batch_start", rank: str = "") -> None:
        self.steps, self.moment = set(steps), moment
        if rank in ("", os.environ.get("RANK", "")):
            setattr(self, hook, self.strike)

    def strike(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            self.steps.remove(trainer.global_step)
            weight = next(p for p in pl_module.parameters() if p.numel())
            state = trainer.optimizers[0].state
            flip(state[weight][self.moment] if self.moment else weight, bit=3)


class RollBack(lightning.Callback):
    """What SpikeRollback does with a request: back to the end of the step before; to be listed last."""

    def __init__(self, works: bool = True) -> None:
        self.works, self.reasons, self.requested = works, [], False  # type: ignore[var-annotated]
        self.ring: list[Any] = []

    def request_rollback(self, reason: str) -> None:
        self.reasons.append(reason)
        self.requested = self.works

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.ring = [take(trainer, pl_module)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if self.requested:
            self.requested = False
            restore(trainer, pl_module, self.ring[-1])
        elif not trainer.fit_loop._should_accumulate():
            self.ring.append(take(trainer, pl_module))


class Weights(lightning.Callback):
    """The first weight as each batch begins and ends."""

    def __init__(self) -> None:
        self.start: list[float] = []
        self.end: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.start.append(pl_module.layer.weight[0, 0].item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.end.append(pl_module.layer.weight[0, 0].item())


def test_the_judgement() -> None:
    guard = WeightIntegrity()
    assert guard.judge({"a": 1, "b": 2}, {"a": 1, "b": 2}) == []
    assert guard.judge({"a": 1, "b": 2}, {"a": 3, "b": 2}) == ["a"]
    assert guard.judge({"a": 1}, {"a": 1, "a (exp_avg)": 5}) == [], "an optimizer makes its state when it needs it"


# It trips


@pytest.mark.parametrize(
    ("moment", "name"),
    [("", "layer.weight"), ("exp_avg", r"layer\.weight \(exp_avg\)"), ("step", r"layer\.weight \(step\)")],
)
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_validation_start"]
)
def test_it_stops_at_one_bit(fit: Any, line: Any, moment: str, name: str, hook: str) -> None:
    weights, lines = Weights(), Lines()
    validation = {"limit_val_batches": 1, "val_check_interval": 1} if hook == "on_validation_start" else {}
    named = rf"before step 3: rank 0: {name}: resume the last checkpoint"
    with pytest.raises(WeightsCorrupted, match=named):
        fit(line(), Flip({3}, moment, hook), weights, WeightIntegrity(), logger=lines, **validation)
    assert len(weights.start) == 4
    assert [row for _, row in lines.rows if "weight_integrity/corruptions" in row] == [
        {"weight_integrity/corruptions": 1.0}
    ]


def test_a_requested_rollback_restores_the_weights(fit: Any, line: Any, caplog: pytest.LogCaptureFixture) -> None:
    weights, guard, back = Weights(), WeightIntegrity(), RollBack()
    assert isinstance(back, CanRollBack)
    assert not isinstance(guard, CanRollBack)
    with caplog.at_level(logging.WARNING, "callbacks.weight_integrity"):
        fit(line(), Flip({3}), weights, guard, back, max_steps=6)
    assert len(back.reasons) == 1
    assert "step 3" in back.reasons[0]
    [text] = [text for name, _, text in caplog.record_tuples if name == "callbacks.weight_integrity"]
    assert text == f"{back.reasons[0]}: rank 0: layer.weight"
    assert weights.end[3] == weights.start[3] != weights.end[2], "no step was made with the damage"
    assert weights.start[4] == weights.end[2], "what was before it is back"
    assert guard.corruptions == 1, "the rollback does not undo it"
    assert len(weights.start) == 7, "one batch was lost"


def test_two_corruptions_are_two(fit: Any, line: Any) -> None:
    guard, back = WeightIntegrity(), RollBack()
    fit(line(), Flip({2, 5}), guard, back, max_steps=6)
    assert guard.corruptions == len(back.reasons) == 2


def test_a_snapshot_that_is_damaged_itself_is_found_out(fit: Any, line: Any) -> None:
    """Restored weights are compared with the sums of their own time."""

    class Damaged(RollBack):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, pl_module)
            if trainer.global_step == 3 and not self.reasons:
                flip(self.ring[-1].checkpoint["state_dict"]["layer.weight"], 7)
            if len(self.reasons) == 1 and len(self.ring) == 4:
                self.ring.pop()

    back = Damaged()
    fit(line(), Flip({3}), WeightIntegrity(), back, max_steps=5)
    assert len(back.reasons) == 2


def test_a_rollback_that_does_not_come_stops_the_run(fit: Any, line: Any) -> None:
    back = RollBack(works=False)
    with pytest.raises(WeightsCorrupted, match="requested at step 3"):
        fit(line(), Flip({3}), WeightIntegrity(), back)
    assert len(back.reasons) == 1


def test_with_accumulation_it_covers_the_whole_window(fit: Any, line: Any) -> None:
    class Late(Flip):
        def strike(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
            if index == 5:  # the second of four micro-batches
                super().strike(trainer, pl_module)

    with pytest.raises(WeightsCorrupted, match=r"before step 1: rank 0: layer\.weight"):
        fit(line(), Late({1}), WeightIntegrity(), accumulate_grad_batches=4)


# It stays silent


class Normed(Line):
    """Its buffers change in every forward."""

    def __init__(self, bad: Any = None) -> None:
        super().__init__(bad)
        self.norm = nn.BatchNorm1d(1)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.norm(batch[:, :1].repeat(2, 1))
        return super().training_step(batch, index) + 0 * self.norm.weight.sum() + 0 * self.norm.bias.sum()


@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 3}, {"limit_val_batches": 2}], ids=str)
def test_it_is_silent_and_bitwise_inert_on_a_healthy_run(fit: Any, same_training: Any, changes: Any) -> None:
    guard, lines = WeightIntegrity(), Lines()
    ours = fit(Normed(), guard, logger=lines, max_steps=2, **changes)
    same_training(ours, fit(Normed(), max_steps=2, **changes))
    assert guard.corruptions == 0
    assert not [row for _, row in lines.rows if "weight_integrity/corruptions" in row]


def test_skipped_steps_and_rollbacks_of_others_are_no_corruption(fit: Any, line: Any) -> None:
    class Elsewhere(RollBack):
        """Goes back for a reason of its own."""

        def on_train_batch_end(self, trainer: Any, pl_module: Any, batch: Any, outputs: Any, index: int) -> None:
            self.requested = index in (4, 6)
            super().on_train_batch_end(trainer, pl_module)
            self.ring = self.ring[:2]

    guard, back = WeightIntegrity(), Elsewhere()
    module = line(bad={1: math.nan})
    fit(module, NonfiniteGuard(2), guard, back, max_steps=5)
    assert len(module.seen) > 5, "the test rolled nothing back"
    assert (guard.corruptions, back.reasons) == (0, [])


def test_a_scalers_skipped_step_is_no_corruption(fit: Any, line: Any) -> None:
    """Gradients that overflow: the scaler leaves the optimizer out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)  # type: ignore[arg-type]
    weights, guard = Weights(), WeightIntegrity()
    fit(line(), weights, guard, plugins=[plugin])
    assert any(a == b for a, b in zip(weights.start, weights.end, strict=True)), "the test skipped no step"
    assert any(a != b for a, b in zip(weights.start, weights.end, strict=True))
    assert guard.corruptions == 0


def test_a_corruption_under_a_scaler_leaves_the_weights_alone(fit: Any, line: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)  # type: ignore[arg-type]
    weights, guard, back = Weights(), WeightIntegrity(), RollBack()
    fit(line(), Flip({3}), weights, guard, back, max_steps=6, plugins=[plugin])
    assert guard.corruptions == 1
    assert weights.end[3] == weights.start[3] != weights.end[2]
    assert weights.start[4] == weights.end[2]


# State


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_the_state_survives_a_resume(fit: Any, line: Any, tmp_path: Path) -> None:
    guard = WeightIntegrity()
    fit(line(), Flip({2}), guard, RollBack(), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]["WeightIntegrity"]
    assert saved["corruptions"] == 1
    assert saved["sums"].keys() >= {"layer.weight", "layer.bias", "layer.weight (exp_avg)", "layer.bias (step)"}
    again = WeightIntegrity()
    fit(line(), again, ckpt_path=tmp_path / "4.ckpt")
    assert again.corruptions == 1


def test_state_of_no_parameter_is_watched_too_where_it_is_tensors(fit: Any, line: Any) -> None:
    """Some optimizers keep numbers of their own beside those of their parameters."""

    class Odd(torch.optim.AdamW):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.state["all"] = {"mean": torch.ones(5), "count": 3}
            self.state["steps"] = 7

    class Module(Line):
        def configure_optimizers(self) -> Any:
            return Odd(self.parameters(), lr=1e-3)

    class Strike(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                flip(trainer.optimizers[0].state["all"]["mean"], bit=3)

    fit(Module(), WeightIntegrity(), max_steps=3)
    with pytest.raises(WeightsCorrupted, match=r"rank 0: state of no parameter \(mean\)"):
        fit(Module(), WeightIntegrity(), Strike(), max_steps=4)


def test_a_smaller_count_never_comes_back() -> None:
    guard = WeightIntegrity()
    guard.corruptions = 3
    guard.load_state_dict({"corruptions": 2, "sums": None})
    assert guard.corruptions == 3
    assert not getattr(guard, "survives_rollback", False), "its sums must travel with the snapshot"


def test_it_needs_automatic_optimization(fit: Any, line: Any) -> None:
    module = line()
    module.automatic_optimization = False
    with pytest.raises(TypeError, match=r"weight_integrity .* Line"):
        fit(module, WeightIntegrity())


# Two ranks, of which only one sees it


class Wrong(lightning.Callback):
    """What reached the caller; train() of test_two_ranks knows no RuntimeError."""

    message = ""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.message = f"{type(exception).__name__}: {exception}"


def outcome(module: Line, *callbacks: Any, **changes: Any) -> Any:
    wrong = Wrong()
    try:
        run = summary(train(module, *callbacks, wrong, **changes))
    except WeightsCorrupted:
        run = {}
    return {**run, "said": wrong.message}


def stops_both() -> Any:
    return outcome(Line(), Flip({3}, rank="1"), WeightIntegrity())


def rolls_both_back() -> Any:
    guard, weights, back = WeightIntegrity(), Weights(), RollBack()
    run = outcome(Line(), Flip({3}, rank="1"), weights, guard, back, max_steps=6)
    return {**run, "corruptions": guard.corruptions, "reasons": back.reasons, "start": weights.start}


def shards_stop() -> Any:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

    class OfAShard(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3 and trainer.global_rank == 1:
                flip(pl_module.more.weight.to_local(), 3)

    healthy, guard = WeightIntegrity(), WeightIntegrity()
    fine = train(Sharded(), healthy, NonfiniteGuard(1), strategy=strategy)["raised"]
    again = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    return {"fine": fine, "none": healthy.corruptions, **outcome(Sharded(), OfAShard(), guard, strategy=again)}


def healthy_both() -> Any:
    guard = WeightIntegrity()
    ours, theirs = outcome(Line(), guard), outcome(Line())
    return ours, theirs, guard.corruptions


@pytest.mark.long
def test_two_ranks_do_the_same() -> None:
    stopped, rolled, shards, healthy = run_on_two_ranks(stops_both, rolls_both_back, shards_stop, healthy_both)
    reason = "weights changed outside the optimizer before step 3"
    for run in stopped:
        assert run["said"].startswith(f"WeightsCorrupted: {reason}: rank 1: layer.weight: resume"), run
    assert isinstance(rolled[0], dict), rolled
    assert rolled[0] | {"start": 0} == rolled[1] | {"start": 0}
    for rank, run in enumerate(rolled):
        assert run["reasons"] == [reason]
        assert run["corruptions"] == 1
        assert run["batches"] == 7
        assert run["start"][4] == rolled[0]["start"][3], f"rank {rank}"
    for run in shards:
        assert run["fine"] is None
        assert run["none"] == 0
        assert run["said"].startswith(f"WeightsCorrupted: {reason}: rank 1: more.weight: resume")
    for ours, theirs, found in healthy:
        assert ours == theirs
        assert found == 0
        assert ours["batches"] == STEPS
